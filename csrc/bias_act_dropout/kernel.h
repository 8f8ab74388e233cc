// The contract of dropout(act(x + bias)):
//
//   forward    y = keep(i) ? act(x + bias) * scale : 0
//   backward   grad_input = keep(i) ? grad_output * scale * act'(x + bias) : 0, grad_bias = its sum over the rows
//
// x, y, grad_output and grad_input are [rows, cols], contiguous; bias and grad_bias are [cols], of the accumulation
// type (fp64 where dtype is F64, else fp32), in which all arithmetic is done. Results are rounded once. bias may be
// null: then rows is 1 and cols the number of elements. i is the logical index of an element, keep() the stream of
// common/philox.h; an inactive dropout keeps all. A dropped element is 0 whatever its value was, even NaN. Backward
// computes mask and activation again; on the CPU it reads the mask where forward kept its bits.
#pragma once

#include "../common/activation.h"
#include "../common/philox.h"

namespace dlkit::bias_act_dropout {

// Calls f with the activation as a constant: one of the three that usually follow a matrix product. op.cpp refuses the
// others.
template <class F>
[[maybe_unused]] static void with_supported_activation(Activation activation, const F& f) {
  with_activation<Activation::Relu, Activation::Gelu, Activation::GeluTanh>(activation, f);
}

struct Forward {
  const void* x;
  const void* bias;  // or null
  void* y;
  int64_t rows, cols;
  FusedDropout dropout;
  Activation activation;
  DType dtype;
};

struct Backward {
  const void* grad_output;
  const void* x;
  const void* bias;  // or null
  void* grad_input;
  void* grad_bias;  // or null, as it is where bias is
  void* partials;   // backward_partials_*() bytes
  int64_t rows, cols;
  FusedDropout dropout;
  Activation activation;
  DType dtype;
};

void forward_cpu(const Forward& op);
void backward_cpu(const Backward& op);
int64_t backward_partials_cpu(const Backward& op);

// `stream` is a cudaStream_t of the current device. Throw std::runtime_error when a launch fails.
void forward_cuda(const Forward& op, void* stream);
void backward_cuda(const Backward& op, void* stream);
int64_t backward_partials_cuda(const Backward& op);

}  // namespace dlkit::bias_act_dropout
