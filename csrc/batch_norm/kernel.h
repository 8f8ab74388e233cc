// The contract of batch_norm, group_norm and instance_norm, optionally followed by a residual add and an activation.
//
// x is [batch, channels, space] (all spatial dimensions in one), in memory as written (contiguous) or, with
// channels_last, as [batch, space, channels]; all tensors of x's shape have the same layout and no gaps. A group is the
// set of elements that share a mean:
//   groups == 0: a channel over batch and space (batch_norm); statistics are [channels]
//   groups  > 0: channels / groups adjacent channels over space, in one sample (group_norm; instance_norm where groups
//                == channels); statistics are [batch * groups]
//
//   mean, var  of a group (var biased), or given
//   rstd       = 1 / sqrt(var + eps)
//   z          = fma(x - mean, rstd * weight, bias) + residual      rounded so in backward too: its mask is forward's
//   y          = act(z)                                     a NaN stays one
//
//   g          = act'(z) * grad_output                      but after a ReLU:
//   g          = y <= 0 ? 0 : grad_output                   y as it was rounded to its dtype; a NaN passes
//   grad_residual = g
//   grad_bias   = sum of g over a channel,  grad_weight = sum of g * (x - mean) * rstd over a channel
//   wg         = g * weight
//   grad_input = rstd * (wg - mean(wg) - xhat * mean(wg * xhat))        means over the group; xhat = (x - mean) * rstd
//   grad_input = rstd * wg                                              where the statistics were given (evaluation)
//
// Running statistics, one a group: n the count of a group's elements, f the momentum, or where that is negative 1 /
// num_batches_tracked with this batch included:
//   running_mean = (1 - f) * running_mean + f * mean,  running_var = (1 - f) * running_var + f * var * n / (n - 1)
// The form running_mean + f * (mean - running_mean) would lose a small mean beside a large running_mean where f = 1.
//
// Statistics and parameter arithmetic are fp32 (fp64 where dtype is F64): `accumulate` below. A pointer documented "or
// null" may be null: that input counts as absent, that output is not computed. Addresses need only the alignment of the
// element type. batch, channels and space are at least 1.
#pragma once

#include "../common/activation.h"
#include "../common/scalar.h"

namespace dlkit::batch_norm {

struct Shape {
  int64_t batch, channels, space;
  int64_t groups;
  bool channels_last;
};

// Where mean and rstd come from.
enum class Statistics : int32_t {
  Compute,  // from x; written to mean, rstd and var
  Running,  // from running_mean and running_var; written to mean and rstd
  Given     // read from mean and rstd
};

struct Forward {
  const void* x;
  const void* residual;          // as x, or null
  const void* weight;            // [channels] or null
  const void* bias;              // [channels] or null
  void* y;                       // as x, or null: only statistics are computed
  void* mean;                    // of accumulate, one a group
  void* rstd;                    // of accumulate, one a group
  void* var;                     // of accumulate, one a group, biased; or null. Only with Compute
  void* running_mean;            // one a group, or null; read by Running, updated by Compute
  void* running_var;             // one a group, or null
  int64_t* num_batches_tracked;  // one element, raised by one by Compute; or null (then momentum is not negative)
  void* workspace;               // forward_workspace_*() bytes, 64-byte aligned; null where that is 0
  Shape shape;
  double momentum;  // negative: cumulative average
  double eps;
  Statistics statistics;
  DType dtype;            // of x, residual and y
  DType parameter_dtype;  // of weight and bias: dtype or F32
  DType running_dtype;    // of running_mean and running_var: any
  Activation activation;
  double negative_slope;  // of LeakyRelu
};

struct Backward {
  const void* grad_output;
  const void* x;
  const void* y_or_residual;  // the tensor g needs beside x: with a ReLU forward's y, else forward's residual; null
                              // where there was no residual, or no activation
  const void* weight;         // [channels] or null
  const void* bias;           // [channels] or null; read only to find z from x
  const void* mean;           // of accumulate, one a group
  const void* rstd;           // of accumulate, one a group
  void* grad_input;           // as x, or null
  void* grad_residual;        // as x, or null
  void* grad_weight;          // [channels] of parameter_dtype, or null
  void* grad_bias;            // [channels] of parameter_dtype, or null
  // Only with groups == 0, for statistics that several processes share:
  void* sums;       // [2, channels] of accumulate or null: sum of g, then sum of g * (x - mean); an output unless
                    // sums_given
  void* workspace;  // backward_workspace_*() bytes, 64-byte aligned; null where that is 0
  Shape shape;
  bool* out_of_range;     // set by the CPU where a group's sums, or values from them, are out of fp32's range; or null
  double count;           // elements of a group: the divisor of the means in grad_input
  bool sums_given;        // read sums, do not compute them; grad_weight and grad_bias are null
  bool statistics_given;  // grad_input has no term through mean and var
  DType dtype;            // of grad_output, x, y_or_residual, grad_input and grad_residual
  DType parameter_dtype;  // of weight, bias, grad_weight and grad_bias: dtype or F32
  Activation activation;
  double negative_slope;  // of LeakyRelu
};

void forward_cpu(const Forward& op);
void backward_cpu(const Backward& op);
int64_t forward_workspace_cpu(const Forward& op);
int64_t backward_workspace_cpu(const Backward& op);

// `stream` is a cudaStream_t of the current device. Throw std::runtime_error when a launch fails.
void forward_cuda(const Forward& op, void* stream);
void backward_cuda(const Backward& op, void* stream);
int64_t forward_workspace_cuda(const Forward& op);
int64_t backward_workspace_cuda(const Backward& op);

}  // namespace dlkit::batch_norm
