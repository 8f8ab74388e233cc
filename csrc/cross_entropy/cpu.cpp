// Cross entropy on the CPU.
//
// Bytes moved, in units of the logits' size: forward 1 (reads them), backward 2 (reads them, writes the gradient), the
// least there is; torch moves 7. A row is taken in chunks that stay in the first-level cache: first their maximum, then
// exp(x - max) and its sum; the sum of earlier chunks is rescaled where the maximum grew. Forward and backward each
// take one exp an element, 10 instructions a vector (12 on AVX2); bf16 has its own loops (cpu/bf16.h). Where classes
// are not adjacent ([N, C, H, W]), a lane is a pixel (cpu/pixels.h): forward copies blocks of pixels class by class,
// because classes 2^k bytes apart would evict each other from the cache. Rows of few classes are transposed and go the
// same way. One thread computes all of a row in a fixed order; the rows' losses are added up in the order of the rows.
#include "../common/cpu/cache.h"
#include "../common/dispatch.h"
#include "cpu/pixels.h"
#include "cpu/rows.h"

namespace dlkit::cross_entropy {
namespace DLKIT_ISA {
namespace {

using namespace dlkit::DLKIT_ISA;

// The sum of rows' values, in the order of the rows.
template <class A>
double sum_rows(const void* values, int64_t rows) {
  double totals[1];
  sum_columns<A>(rows, totals, [&](int64_t i, int, auto width, auto* terms) DLKIT_INLINE_LAMBDA {
    terms[0] += load(static_cast<const A*>(values) + i, width);
  });
  return totals[0];
}

int64_t rows_that_count(const Problem& op) {
  int64_t count = 0;
  for (int64_t row = 0; row < op.rows; ++row) count += op.target[row] != op.ignore_index;
  return count;
}

template <class A>
wide_t<A> sum_of_target_weights(const Problem& op) {
  wide_t<A> sums[kSlots] = {};
  for (int64_t first = 0; first < op.rows; first += kSlots) {
#pragma GCC unroll 4
    for (int slot = 0; slot < kSlots; ++slot) {
      const int64_t row = min64(first + slot, op.rows - 1);
      const bool counts = first + slot < op.rows && !is_ignored(op, row);
      const A weight = weight_of<A>(op, counts ? op.target[row] : 0);
      sums[slot] += counts ? weight : A(0);
    }
  }
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

template <class A>
void reduce(const Forward& op) {
  double loss = sum_rows<A>(op.losses, op.rows), z = op.z == nullptr ? 0 : sum_rows<A>(op.z, op.rows);
  if (op.reduction == Reduction::Mean) {
    const wide_t<A> count = wide_t<A>(op.target == nullptr ? op.rows : rows_that_count(op));
    const wide_t<A> weights = op.target == nullptr || op.weight == nullptr ? count : sum_of_target_weights<A>(op);
    static_cast<A*>(op.total)[0] = A(weights);
    static_cast<A*>(op.total)[1] = A(count);
    loss = double((loss - z) / weights + (op.z == nullptr ? 0 : z / count));
    z = double(z / count);
  }
  with_type(op.loss_dtype, [&](auto type) {
    using L = decltype(type);
    *static_cast<L*>(op.loss) = narrow<L>(accumulate_t<L>(loss));
    if (op.z_loss != nullptr) *static_cast<L*>(op.z_loss) = narrow<L>(accumulate_t<L>(z));
  });
}

}  // namespace

void forward(const Forward& op) {
  *op.bad_row = -1;
  with_data_type(op.dtype, [&](auto type) {
    using T = decltype(type);
    if (op.inner == 1 && !are_short(op)) {
      parallel_for(op.rows, row_grain(op), [&](int64_t begin, int64_t end) { forward_rows<T>(op, begin, end); });
    } else {
      for_pixels(op, kPixels, [&](int64_t first, int64_t count) {
        with_lanes<T>(op, first, count, [&](const auto* x, const auto* probabilities, int64_t pitch, auto*) {
          read_pixels(op, first, count, x, probabilities, pitch);
        });
      });
    }
  });
  if (*op.bad_row >= 0 || op.loss == nullptr) return;
  with_accumulate(op.dtype, [&](auto type) { reduce<decltype(type)>(op); });
}

void backward(const Backward& op) {
  with_data_type(op.dtype, [&](auto type) {
    using T = decltype(type);
    const auto weights = sum_of_weights<accumulate_t<T>>(op);
    const int64_t run = (op.inner == 1 ? op.classes : op.inner) * int64_t(sizeof(T));
    const bool nt_store = op.grad_input != op.x &&
                          op.rows * op.classes * int64_t(sizeof(T)) >= streaming_threshold_bytes() &&
                          uintptr_t(op.grad_input) % 64 == 0 && run % 64 == 0;
    if (op.inner == 1 && !are_short(op)) {
      parallel_for(op.rows, row_grain(op), [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) write_row<T>(op, row, weights, nt_store);
        if (nt_store) streaming_fence();
      });
    } else {
      for_pixels(op, op.inner == 1 ? kPixels : kWritten, [&](int64_t first, int64_t count) {
        const PixelSlopes<accumulate_t<T>> slopes(op, first, count, weights);
        T* const grad = pixel_at<T>(op, op.grad_input, first, op.grad_stride);
        const auto write = [&]<class S>(const S* x, const S* probabilities, int64_t pitch, auto* turned) {
          void* const to = turned == nullptr ? static_cast<void*>(grad) : turned->lanes;
          write_pixels(op, slopes, count, x, probabilities, static_cast<S*>(to), pitch, nt_store && turned == nullptr);
          if (turned != nullptr) turned->write(grad, count, op.classes, op.grad_stride);
        };
        with_lanes<T>(op, first, count, write);
        if (nt_store) streaming_fence();
      });
    }
  });
}

}  // namespace DLKIT_ISA

DLKIT_CPU_ENTRY(forward_cpu, forward, Forward)
DLKIT_CPU_ENTRY(backward_cpu, backward, Backward)

}  // namespace dlkit::cross_entropy
