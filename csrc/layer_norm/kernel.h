// The contract of layer_norm: forward and backward of LayerNorm and RMSNorm, with or without a residual add before
// them. Before that addition x may pass a dropout.
//
//   sum  = x + residual                      (rounded to the input's dtype; only with a residual, else sum = x)
//   sum  = drop(x) + residual                (with op.dropout, whose mask goes by row * cols + col; rounded once)
//   xhat = (sum - mean) * rstd               mean of the row, 0 for RMSNorm
//   rstd = 1 / sqrt(mean((sum - mean)^2) + eps)
//   y    = xhat * weight + bias
//
//   wdy           = grad_output * weight
//   grad_residual = rstd * (wdy - mean(wdy) - xhat * mean(wdy * xhat)) + grad_sum      (no mean(wdy) for RMSNorm)
//   grad_input    = grad_residual, or drop(grad_residual) with op.dropout
//   grad_weight   = sum over rows of grad_output * xhat,  grad_bias = sum over rows of grad_output
//
// Tensors are [rows, cols]; a stride is the distance of two rows in elements; columns are adjacent; addresses need only
// the alignment of the element type. weight, bias and their gradients are [period, cols]: row r takes row r % period,
// which lets group_norm pass its groups as rows; rows is a multiple of period. On CUDA, and where parameter_dtype is
// not that of accumulate, period is 1. Outputs are contiguous. Statistics and parameter arithmetic are fp32 (fp64 where
// dtype is F64). `accumulate` below is float, or double where dtype is F64. A pointer documented "or null" may be null:
// that input counts as absent, that output is not computed. rows may be 0; cols is at least 1.
#pragma once

#include "../common/philox.h"

namespace dlkit::layer_norm {

struct Forward {
  const void* x;
  const void* residual;  // or null
  const void* weight;    // [period, cols] or null
  const void* bias;      // [period, cols] or null
  void* y;
  void* sum;   // null exactly where residual is
  void* mean;  // [rows] of accumulate, or null
  void* rstd;  // [rows] of accumulate, or null
  int64_t rows, cols;
  int64_t x_stride, residual_stride;
  double eps;
  DType dtype;            // of x, residual, y and sum
  DType parameter_dtype;  // of weight and bias: dtype or F32
  bool rms;
  FusedDropout dropout;  // only with a residual, and where can_drop_*() is true; keeps bits where cols % 8 == 0
  int64_t period = 1;
  void* partials = nullptr;  // CUDA: forward_partials_cuda() bytes, 64-byte aligned; null where that is 0
};

struct Backward {
  const void* grad_output;
  const void* grad_sum;  // gradient that reaches `sum` from elsewhere, or null
  const void* x;         // the normalized tensor: `sum` where there was a residual
  const void* mean;      // [rows] of accumulate; null for RMSNorm
  const void* rstd;      // [rows] of accumulate
  const void* weight;    // [period, cols] or null
  void* grad_input;      // or null
  void* grad_residual;   // exactly where dropout is active; null otherwise, since it is grad_input
  void* grad_weight;     // [period, cols] of parameter_dtype, or null
  void* grad_bias;       // [period, cols] of parameter_dtype, or null
  void* partials;        // backward_partials_*() bytes, 64-byte aligned; null where that is 0
  int64_t rows, cols;
  int64_t grad_output_stride, grad_sum_stride, x_stride;
  DType dtype;            // of grad_output, grad_sum, x, grad_input and grad_residual
  DType parameter_dtype;  // of weight, grad_weight and grad_bias: dtype or F32
  bool rms;
  FusedDropout dropout;  // forward's; only with grad_input, and where can_drop_*() is true
  int64_t period = 1;
};

// Whether the kernels can apply the dropout: rows may be too long for it.
bool can_drop_cpu(const Forward& op);
bool can_drop_cpu(const Backward& op);
bool can_drop_cuda(const Forward& op);
bool can_drop_cuda(const Backward& op);

void forward_cpu(const Forward& op);
void backward_cpu(const Backward& op);
int64_t backward_partials_cpu(const Backward& op);

// `stream` is a cudaStream_t of the current device. Throw std::runtime_error when a launch fails.
void forward_cuda(const Forward& op, void* stream);
int64_t forward_partials_cuda(const Forward& op);
void backward_cuda(const Backward& op, void* stream);
int64_t backward_partials_cuda(const Backward& op);

}  // namespace dlkit::layer_norm
