// The contract of cross entropy. For a row of logits x (after the softcap if there is one: x = cap * tanh(logits /
// cap)), with m the largest x, s = sum_c exp(x_c - m), lse = m + log(s), e = label_smoothing and w_c = 1 where there is
// no weight:
//
//   classes        u_c = w_c * e / classes, and w_t * (1 - e) more at the target t; all 0 in a row that is ignored
//   probabilities  u_c = w_c * ((1 - e) * probabilities_c + e / classes)
//
//   loss           sum_c u_c * (lse - x_c) + z, where z = z_scale * lse^2 (0 in a row that is ignored)
//   grad_x_c       g * (exp(x_c - lse) * sum_c u_c - u_c) + 2 * g_z * z_scale * lse * exp(x_c - lse)
//
// The mean divides the first part by the sum of the targets' weights (for probabilities by the number of rows), z by
// the number of rows that are not ignored. g and g_z are grad_loss divided by these.
//
// Forward keeps m and s of each row (for probabilities also sum_c u_c), nothing of the logits' size. Layouts: with
// inner = 1, a row has adjacent classes and begins `stride` elements after the one before; with inner > 1, logits are
// [rows / inner, classes, inner], contiguous, and a row is a column of that.
#pragma once

#include "../common/scalar.h"

namespace dlkit::cross_entropy {

constexpr int64_t kSlices = 4 * 64;

enum class Reduction : int32_t { None = 0, Mean = 1, Sum = 2 };  // as torch numbers them

struct Problem {
  const void* x;
  const int64_t* target;      // [rows], or null; then there are
  const void* probabilities;  // laid out as x, of dtype; the distance of its rows is `classes`
  const void* weight;         // [classes] of the accumulation type, or null
  void* max;                  // m, s and sum_c u_c: [rows] each, of the accumulation type; forward writes them
  void* sum;
  void* mass;   // null for classes
  void* total;  // of the accumulation type: the mean's divisors of loss and z; null without a mean
  int64_t rows, classes, inner, stride;
  int64_t ignore_index;
  double label_smoothing, z_scale;
  double softcap;  // 0: none
  Reduction reduction;
  DType dtype;
};

struct Forward : Problem {
  void* losses;  // [rows] of the accumulation type
  void* z;       // the same, or null
  void* loss;    // their sum or mean, of loss_dtype; null without a reduction
  void* z_loss;  // the same of z, or null
  DType loss_dtype;
  double* slices;    // on a GPU with a reduction: kSlices doubles of scratch
  int64_t* bad_row;  // the first with a target out of range, or -1. Null on a GPU, which stops there
};

struct Backward : Problem {
  const void* grad_loss;  // of the accumulation type: one value, or one a row
  int64_t grad_loss_stride;
  void* grad_input;     // laid out as x; may be x itself
  int64_t grad_stride;  // as stride
};

void forward_cpu(const Forward& op);
void backward_cpu(const Backward& op);

// `stream` is a cudaStream_t of the current device. Throw std::runtime_error when a launch fails.
void forward_cuda(const Forward& op, void* stream);
void backward_cuda(const Backward& op, void* stream);

}  // namespace dlkit::cross_entropy
