// The contract of the optimizers: one step over many tensors, the global norm of many gradients, and their scaling.
//
//   g = grad * factor             factor: 1 / grad_scale, times min(1, max_norm / (grad_norm + 1e-6)); -g with maximize
//   g = g + weight_decay * p      (Adam without decoupled_weight_decay, SGD, RMSprop)
//
//   Adam     p = p * (1 - lr * weight_decay)                       (with decoupled_weight_decay)
//            exp_avg = lerp(exp_avg, g, 1 - beta1),  exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * g^2
//            v = exp_avg_sq, or max_exp_avg_sq = max(max_exp_avg_sq, exp_avg_sq) where there is one
//            p = p - lr / (1 - beta1^t) * exp_avg / (sqrt(v) / sqrt(1 - beta2^t) + eps)
//   SGD      momentum_buffer = momentum * momentum_buffer + (1 - dampening) * g      (where there is one)
//            p = p - lr * (momentum_buffer, or g + momentum * momentum_buffer with nesterov, or g without momentum)
//   RMSprop  square_avg = alpha * square_avg + (1 - alpha) * g^2
//            grad_avg = lerp(grad_avg, g, 1 - alpha)                        (where there is one)
//            v = square_avg - grad_avg^2, or square_avg without grad_avg
//            momentum_buffer = momentum * momentum_buffer + g / (sqrt(v) + eps)      (where there is one)
//            p = p - lr * (momentum_buffer, or g / (sqrt(v) + eps))
//   ema = lerp(ema, p, 1 - ema_decay), of the exact p where there is a remainder, else of p as stored
//
// A tensor's arrays are contiguous, have numel elements and need only the alignment of their element type; arrays of
// two tensors do not overlap. `accumulate` below is fp32, or fp64 where dtype is F64; all arithmetic is done in it. A
// pointer documented "or null" may be null. The formulas are in math.h, 8-bit states in dynamic_map.h. Where found_inf
// is not zero, nothing is written, not even step counters.
#pragma once

#include "../common/scalar.h"

namespace dlkit::optim {

enum class Algorithm : int32_t { Adam = 0, Sgd = 1, RmsProp = 2 };

// The storage type of states. The first four values are DType's.
enum class StateType : int32_t { F32 = 0, F64 = 1, BF16 = 2, F16 = 3, Int8 = 4 };

constexpr int64_t kBlock = 256;  // elements that share a scale in an 8-bit state, and the unit of work
constexpr int kStates = 3;
// Adam:     exp_avg, exp_avg_sq, max_exp_avg_sq or null
// SGD:      momentum_buffer or null, -, -
// RMSprop:  square_avg, grad_avg or null, momentum_buffer or null

// Hyperparameters of many tensors; each algorithm reads its own.
struct Group {
  double lr, weight_decay, eps, beta1, beta2, momentum, dampening, alpha, ema_decay;
  bool decoupled_weight_decay, nesterov, maximize;
  bool stochastic_rounding;   // of BF16 and F16 parameters without a remainder
  int32_t stochastic_states;  // bit s: of state s, where it is stored as BF16 or F16
  const float* lr_pointer;    // on the device, in place of lr; or null
};

struct Tensor {
  void* param;
  void* grad;              // of grad_dtype; changed only with write_grads
  void* states[kStates];   // of state_type; as listed above
  float* scales[kStates];  // with Int8: [blocks of kBlock], the largest magnitude of each; where the state is not null
  int16_t* remainder;      // the exact parameter less the rounded one (math.h); BF16 and F16 only; or null
  void* ema;               // of accumulate, or null
  void* step;              // t - 1, on the device; the kernel adds 1. Null: the host counts and sets the two below
  double bias_correction1, bias_correction2;  // Adam's 1 - beta^t
  int64_t numel;                              // may be 0
  int32_t group;
  DType dtype;       // of param
  DType grad_dtype;  // any where dtype is not F64, but F64; else F64
  DType step_dtype;  // F32 or F64
  StateType state_type;
};

struct Step {
  const Group* groups;
  const Tensor* tensors;
  const int64_t* first_block;  // [tensor_count + 1]: the number of blocks of kBlock elements of all tensors before
  int64_t group_count, tensor_count;
  const void* grad_norm;    // on the device, of the gradients divided by grad_scale; or null: no clipping
  const float* grad_scale;  // on the device, or null
  const float* found_inf;   // on the device, or null
  double max_norm;
  uint64_t seed;  // of all stochastic rounding; see stochastic_block() in math.h
  Algorithm algorithm;
  DType norm_dtype;  // of grad_norm: F32 or F64
  bool write_grads;  // write g back, before weight decay and the sign of maximize
};

// A gradient, for the norm and the scaling; dtypes may differ.
struct Gradient {
  void* data;
  int64_t numel;
  DType dtype;
};

// norm = sqrt(sum of grad^2). A block is summed in fp32, the blocks' sums in fp64 and in a fixed order.
struct Norm {
  const Gradient* grads;
  const int64_t* first_block;  // as in Step
  int64_t count;
  double* partials;  // [norm_partials_*()]
  void* norm;        // one value
  DType norm_dtype;  // F32 or F64
};

// grad = grad * min(1, max_norm / (norm + 1e-6)); untouched where that is 1.
struct Clip {
  const Gradient* grads;
  const int64_t* first_block;
  int64_t count;
  const void* norm;
  DType norm_dtype;
  double max_norm;
};

void step_cpu(const Step& op);
void norm_cpu(const Norm& op);
void clip_cpu(const Clip& op);
int64_t norm_partials_cpu(const Norm& op);

// `stream` is a cudaStream_t of the current device. Throw std::runtime_error when a launch fails.
void step_cuda(const Step& op, void* stream);
void norm_cuda(const Norm& op, void* stream);
void clip_cuda(const Clip& op, void* stream);
int64_t norm_partials_cuda(const Norm& op);

}  // namespace dlkit::optim
