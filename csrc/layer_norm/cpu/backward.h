// Backward. Rows go in groups of kGroup; each row's two sums first, then, column by column over the whole group,
// grad_input and the parameter gradients. This way weight and the running parameter gradients are read and written once
// a group instead of once a row. Bytes moved: grad_output, x and grad_input, each once, and one partial row a block of
// rows, summed in a fixed order.
#pragma once

#include "../../common/cpu/partials.h"
#include "shared.h"

namespace dlkit::layer_norm::DLKIT_ISA {
namespace {

template <class A>
constexpr int64_t kShortBackward = 16 * kLanes<A>;  // columns up to which a row is short

// Backward's work: blocks of whole periods, each with one partial row of each parameter gradient, times tiles of the
// rows of a period: this way even few samples give many threads work, and a tile's parameters stay in the first-level
// cache. Depends only on the shape.
struct Cut {
  int64_t blocks, tiles;
};

constexpr int64_t kTile = 2048;  // elements of a row of a tile

Cut cut(const Backward& op) {
  if (op.rows == 0) return {0, 0};
  const int64_t periods = op.rows / op.period;
  const int64_t tiles = max64(1, min64(op.period, op.period * op.cols / kTile));
  const int64_t by_work = op.rows * op.cols / kGrain;
  const int64_t by_rows = op.period > 1 ? periods / 16 : max64(periods / kGroup, min64(periods, 2));
  return {max64(1, min64(64, min64(by_work, by_rows)) / tiles), tiles};
}

// The terms from a row's sums in grad_input = rstd * (wdy - mean_wdy - (x - mean) * slope).
template <class A>
struct RowGradient {
  A mean_wdy, slope;  // slope: rstd^2 * mean(wdy * (x - mean))
};

// The same, from the sums of wdy and of wdy * (x - mean).
template <class A>
DLKIT_INLINE RowGradient<A> row_gradient(const Backward& op, double sum, double product, double rstd) {
  return {op.rms ? A(0) : A(sum / double(op.cols)), A(product * rstd * rstd / double(op.cols))};
}

// Of several rows, as vectors.
template <class A>
struct RowGradients {
  static constexpr int64_t kRows = kLanes<A> > kGroup ? kLanes<A> : kGroup;
  A mean_wdy[kRows], slope[kRows];
  DLKIT_INLINE_MEMBER void set(int64_t r, const RowGradient<A>& found) {
    mean_wdy[r] = found.mean_wdy;
    slope[r] = found.slope;
  }
};

// The same for short rows, at most a vector of them, each in its own lane as in forward_short_rows.
template <class T>
void short_row_gradients(const Backward& op, const accumulate_t<T>* weight, int64_t first, int count,
                         RowGradients<accumulate_t<T>>& found) {
  using A = accumulate_t<T>;
  using V = Vector<A>;
  const bool far = is_far<T>(op.rows, op.cols);
  V sums[kLanes<A>], products[kLanes<A>], rstds = {};
  for (int r = count; r < kLanes<A>; ++r) sums[r] = products[r] = V{};
  for (int r = 0; r < count; ++r) {
    const int64_t row = first + r * op.period;
    const T* const x = static_cast<const T*>(op.x) + row * op.x_stride;
    const T* const grad_output = static_cast<const T*>(op.grad_output) + row * op.grad_output_stride;
    const V mean = broadcast<A>(op.rms ? A(0) : static_cast<const A*>(op.mean)[row]);
    rstds[r] = static_cast<const A*>(op.rstd)[row];
    sums[r] = products[r] = V{};
    for (int64_t i = 0; far && i < op.cols; i += kLanes<A>) {
      prefetch<kLanes<A>>(x + kLanes<A> * op.period * op.x_stride + i);
      prefetch<kLanes<A>>(grad_output + kLanes<A> * op.period * op.grad_output_stride + i);
    }
    for_columns<A, 1>(0, op.cols, [&](int64_t i, int, auto width) DLKIT_INLINE_LAMBDA {
      V wdy = load(grad_output + i, width);
      if (weight != nullptr) wdy *= load(weight + i, width);
      sums[r] += wdy;
      products[r] = fma(wdy, load(x + i, width) - mean, products[r]);
    });
  }
  store(found.mean_wdy, op.rms ? V{} : sums_of_lanes(sums) / A(op.cols), All{});
  store(found.slope, sums_of_lanes(products) * rstds * rstds / A(op.cols), All{});
}

// Rows first, first + period, ... If `found` is there, it holds their sums from `place` on.
template <class T, int kRows>
void backward_group(const Backward& op, const accumulate_t<T>* weight, int64_t first, int64_t end,
                    accumulate_t<T>* weight_sums, accumulate_t<T>* bias_sums, const PhiloxState& state,
                    RowBits<kGroup * kScratch>& bits, bool nt_store,
                    const RowGradients<accumulate_t<T>>* found = nullptr, int place = 0) {
  using A = accumulate_t<T>;
  const int64_t cols = op.cols;
  const T* const all_x = static_cast<const T*>(op.x);
  const T* const all_grad_output = static_cast<const T*>(op.grad_output);
  const bool input = op.grad_input != nullptr, drop = input && op.dropout.active;
  if (drop) bits.draw(state, op.dropout.threshold, first * cols, (first + kRows) * cols);
  const bool far = found == nullptr && is_far<T>(op.rows, cols);
  // Both passes fetch half of the next group each.
  const T *next_x[kRows], *next_grad_output[kRows];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    const int64_t next = min64(first + (r + kRows) * op.period, end - 1);
    next_x[r] = all_x + next * op.x_stride;
    next_grad_output[r] = all_grad_output + next * op.grad_output_stride;
  }
  const auto fetch_half = [](const T* x, const T* grad_output, int64_t column) DLKIT_INLINE_LAMBDA {
    prefetch<kSlots * kLanes<A> / 2>(x + column);
    prefetch<kSlots * kLanes<A> / 2>(grad_output + column);
  };
  RowGradients<A> own;
  if (input && found == nullptr) {
    for (int r = 0; r < kRows; ++r) {
      const int64_t row = first + r * op.period;
      const T *const x = all_x + row * op.x_stride, *const grad_output = all_grad_output + row * op.grad_output_stride;
      const T *const later_x = next_x[r], *const later_grad_output = next_grad_output[r];
      const A mean = op.rms ? A(0) : static_cast<const A*>(op.mean)[row];
      const double rstd = double(static_cast<const A*>(op.rstd)[row]);
      double totals[2];
      sum_columns<A>(cols, totals, [&](int64_t i, int slot, auto width, auto* terms) DLKIT_INLINE_LAMBDA {
        if (far && slot == 0) fetch_half(later_x, later_grad_output, i / 2);
        Vector<A> wdy = load(grad_output + i, width);
        if (weight != nullptr) wdy *= load(weight + i, width);
        terms[0] += wdy;
        terms[1] = fma(wdy, load(x + i, width) - mean, terms[1]);
      });
      own.set(r, row_gradient<A>(op, totals[0], totals[1], rstd));
    }
    found = &own;
    place = 0;
  }
  const T *x[kRows], *grad_output[kRows], *grad_sum[kRows];
  T* grad_residual[kRows];  // grad_input where there is no dropout
  A mean[kRows], rstd[kRows], mean_wdy[kRows], slope[kRows];
#pragma GCC unroll 4  // keeps the arrays in registers
  for (int r = 0; r < kRows; ++r) {
    const int64_t row = first + r * op.period;
    x[r] = all_x + row * op.x_stride;
    grad_output[r] = all_grad_output + row * op.grad_output_stride;
    grad_sum[r] = at<const T>(op.grad_sum, row * op.grad_sum_stride);
    grad_residual[r] = at<T>(drop ? op.grad_residual : op.grad_input, row * cols);
    mean[r] = op.rms ? A(0) : static_cast<const A*>(op.mean)[row];
    rstd[r] = static_cast<const A*>(op.rstd)[row];
    mean_wdy[r] = input ? found->mean_wdy[place + r] : A(0);
    slope[r] = input ? found->slope[place + r] : A(0);
  }
  RowsInTurns<T, kRows> inputs, dropped_inputs;
  for_columns<A, 1>(0, cols, [&](int64_t i, int, auto width) DLKIT_INLINE_LAMBDA {
    if (far && i % (kSlots * kLanes<A>) == 0) {
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) fetch_half(next_x[r], next_grad_output[r], cols / 2 + i / 2);
    }
    Vector<A> w = broadcast<A>(1), weight_sum = {}, bias_sum = {};
    if (weight != nullptr) w = load(weight + i, width);
    Vector<A> dy[kRows], centred[kRows];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      dy[r] = load(grad_output[r] + i, width);
      centred[r] = load(x[r] + i, width) - mean[r];
      weight_sum = fma(dy[r], centred[r] * rstd[r], weight_sum);
      bias_sum += dy[r];
    }
    if (input) {
      Vector<A> dx[kRows];
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        dx[r] = fma(centred[r], broadcast<A>(-slope[r]), fma(dy[r], w, broadcast<A>(-mean_wdy[r]))) * rstd[r];
      }
      if (op.grad_sum != nullptr) {
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) dx[r] += load(grad_sum[r] + i, width);
      }
      inputs.write(dx, i, width, nt_store, [&](int r) DLKIT_INLINE_LAMBDA { return grad_residual[r] + i; });
      if (drop) {
        const int64_t element = first * cols + i;
        T* const dropped = static_cast<T*>(op.grad_input) + element;
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
          dx[r] = select<A>(bits.template lanes<A>(element + r * cols), dx[r] * broadcast<A>(A(op.dropout.scale)),
                            Vector<A>{});
        }
        dropped_inputs.write(dx, i, width, nt_store, [&](int r) DLKIT_INLINE_LAMBDA { return dropped + r * cols; });
      }
    }
    if (weight_sums != nullptr) store(weight_sums + i, load(weight_sums + i, width) + weight_sum, width);
    if (bias_sums != nullptr) store(bias_sums + i, load(bias_sums + i, width) + bias_sum, width);
  });
}

// The rows at places [first, last) of periods [begin, end).
template <class T>
void backward_rows(const Backward& op, int64_t begin, int64_t end, int64_t first, int64_t last,
                   accumulate_t<T>* weight_sums, accumulate_t<T>* bias_sums, bool nt_store) {
  using A = accumulate_t<T>;
  const int64_t cols = op.cols, period = op.period;
  const size_t bytes = size_t((last - first) * cols) * sizeof(A);
  if (weight_sums != nullptr) memset(weight_sums + first * cols, 0, bytes);
  if (bias_sums != nullptr) memset(bias_sums + first * cols, 0, bytes);
  const Widened<T> weights(op.weight, op.parameter_dtype, cols);
  RowBits<kGroup * kScratch> bits;
  const PhiloxState state = read(op.dropout.source);
  // For each place, rows of several periods are taken in groups; the remaining ones one by one.
  constexpr int kShortGroup = kGroup < kLanes<A> ? kGroup : int(kLanes<A>);
  const bool is_short = op.grad_input != nullptr && cols <= kShortBackward<A>;
  const int64_t most = is_short ? kLanes<A> : kGroup;
  for (int64_t sample = begin; sample < end; sample += most) {
    const int count = int(min64(most, end - sample));
    for (int64_t k = first; k < last; ++k) {
      const A* const weight = at<const A>(weights.data, k * cols);
      const int64_t row = sample * period + k;
      RowGradients<A> found;
      if (is_short) short_row_gradients<T>(op, weight, row, count, found);
      const auto run = [&](auto rows) {
        for (int place = 0; place < count; place += rows) {
          backward_group<T, rows>(op, weight, row + place * period, end * period, at<A>(weight_sums, k * cols),
                                  at<A>(bias_sums, k * cols), state, bits, nt_store, is_short ? &found : nullptr,
                                  place);
        }
      };
      if (count < most) {
        run(std::integral_constant<int, 1>());
      } else if (is_short) {
        run(std::integral_constant<int, kShortGroup>());
      } else {
        run(std::integral_constant<int, kGroup>());
      }
    }
  }
  if (nt_store) streaming_fence();
}

}  // namespace
}  // namespace dlkit::layer_norm::DLKIT_ISA
