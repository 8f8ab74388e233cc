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

// Of a vector of rows.
template <class A>
struct RowGradients {
  alignas(64) A mean_wdy[kLanes<A>], slope[kLanes<A>];
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

using GroupBits = RowBits<kGroup * kScratch>;

// Short rows first, first + period, ..., at most a vector of them. They are written one or two at a time: a
// group's registers would take longer to prepare than such rows take.
template <class T>
void backward_short_rows(const Backward& op, const accumulate_t<T>* weight, int64_t first, int count,
                         accumulate_t<T>* weight_sums, accumulate_t<T>* bias_sums, const PhiloxState& state,
                         GroupBits& bits, bool nt_store) {
  using A = accumulate_t<T>;
  using V = Vector<A>;
  const int64_t cols = op.cols;
  const bool drop = op.dropout.active;
  const bool past_caches = nt_store && !drop;  // one row at a time: two streams in turns would leave lines half full
  if (drop) bits.find(op.dropout, state, first * cols, (first + count) * cols);
  RowGradients<A> found;
  short_row_gradients<T>(op, weight, first, count, found);
  alignas(64) A weight_sums_here[kShortBackward<A>], bias_sums_here[kShortBackward<A>];
  for (int64_t i = 0; i < cols; i += kLanes<A>) {
    store(weight_sums_here + i, V{}, All{});
    store(bias_sums_here + i, V{}, All{});
  }
  const auto write_rows = [&](int begin, auto together) DLKIT_INLINE_LAMBDA {
    constexpr int kRows = decltype(together)::value;
    const T *x[kRows], *grad_output[kRows], *grad_sum[kRows];
    T *grad_residual[kRows], *dropped[kRows];
    V mean[kRows], rstd[kRows], mean_wdy[kRows], slope[kRows];
    repeat(together, [&](int r) DLKIT_INLINE_LAMBDA {
      const int64_t row = first + (begin + r) * op.period;
      x[r] = static_cast<const T*>(op.x) + row * op.x_stride;
      grad_output[r] = static_cast<const T*>(op.grad_output) + row * op.grad_output_stride;
      grad_sum[r] = at<const T>(op.grad_sum, row * op.grad_sum_stride);
      grad_residual[r] = static_cast<T*>(drop ? op.grad_residual : op.grad_input) + row * cols;
      dropped[r] = static_cast<T*>(op.grad_input) + row * cols;
      mean[r] = broadcast<A>(op.rms ? A(0) : static_cast<const A*>(op.mean)[row]);
      rstd[r] = broadcast<A>(static_cast<const A*>(op.rstd)[row]);
      mean_wdy[r] = broadcast<A>(found.mean_wdy[begin + r]);
      slope[r] = broadcast<A>(found.slope[begin + r]);
    });
    for_columns<A, 1>(0, cols, [&](int64_t i, int, auto width) DLKIT_INLINE_LAMBDA {
      const V w = weight == nullptr ? broadcast<A>(1) : load(weight + i, width);
      V weight_sum = load(weight_sums_here + i, All{}), bias_sum = load(bias_sums_here + i, All{});
      repeat(together, [&](int r) DLKIT_INLINE_LAMBDA {
        const V dy = load(grad_output[r] + i, width), centred = load(x[r] + i, width) - mean[r];
        weight_sum = fma(dy, centred * rstd[r], weight_sum);
        bias_sum += dy;
        V dx = fma(centred, -slope[r], fma(dy, w, -mean_wdy[r])) * rstd[r];
        if (grad_sum[r] != nullptr) dx += load(grad_sum[r] + i, width);
        write(grad_residual[r] + i, dx, width, past_caches);
        if (!drop) return;
        const V scaled = dx * broadcast<A>(A(op.dropout.scale));
        const uint32_t keep = bits.template lanes<A>((first + begin + r) * cols + i);
        store(dropped[r] + i, select<A>(keep, scaled, V{}), width);
      });
      store(weight_sums_here + i, weight_sum, All{});
      store(bias_sums_here + i, bias_sum, All{});
    });
  };
  int r = 0;
  for (; !past_caches && r + 2 <= count; r += 2) write_rows(r, std::integral_constant<int, 2>());
  for (; r < count; ++r) write_rows(r, std::integral_constant<int, 1>());
  const auto add = [&](A* sums, const A* of_rows) DLKIT_INLINE_LAMBDA {
    if (sums == nullptr) return;
    for_columns<A, 1>(0, cols, [&](int64_t i, int, auto width) DLKIT_INLINE_LAMBDA {
      store(sums + i, load(sums + i, width) + load(of_rows + i, width), width);
    });
  };
  add(weight_sums, weight_sums_here);
  add(bias_sums, bias_sums_here);
}

// Rows first, first + period, ...
template <class T, int kRows>
void backward_group(const Backward& op, const accumulate_t<T>* weight, int64_t first, int64_t end,
                    accumulate_t<T>* weight_sums, accumulate_t<T>* bias_sums, const PhiloxState& state, GroupBits& bits,
                    bool nt_store) {
  using A = accumulate_t<T>;
  const int64_t cols = op.cols;
  const T* const all_x = static_cast<const T*>(op.x);
  const T* const all_grad_output = static_cast<const T*>(op.grad_output);
  const bool input = op.grad_input != nullptr, drop = input && op.dropout.active;
  if (drop) bits.find(op.dropout, state, first * cols, (first + kRows) * cols);
  const bool far = is_far<T>(op.rows, cols);
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
  RowGradient<A> found[kRows] = {};
  if (input) {
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
      found[r] = row_gradient<A>(op, totals[0], totals[1], rstd);
    }
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
    mean_wdy[r] = input ? found[r].mean_wdy : A(0);
    slope[r] = input ? found[r].slope : A(0);
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
  GroupBits bits;
  const PhiloxState state = read(op.dropout.source);
  // For each place, rows of several periods are taken together; the remaining ones of long rows one by one.
  const bool is_short = op.grad_input != nullptr && cols <= kShortBackward<A>;
  const int64_t together = is_short ? kLanes<A> : kGroup;
  for (int64_t sample = begin; sample < end; sample += together) {
    const int count = int(min64(together, end - sample));
    for (int64_t k = first; k < last; ++k) {
      const A* const weight = at<const A>(weights.data, k * cols);
      A *const weight_sum = at<A>(weight_sums, k * cols), *const bias_sum = at<A>(bias_sums, k * cols);
      const auto run = [&](auto rows) {
        for (int i = 0; i < count; i += rows) {
          const int64_t row = (sample + i) * period + k;
          backward_group<T, rows>(op, weight, row, end * period, weight_sum, bias_sum, state, bits, nt_store);
        }
      };
      if (is_short) {
        backward_short_rows<T>(op, weight, sample * period + k, count, weight_sum, bias_sum, state, bits, nt_store);
      } else if (count < kGroup) {
        run(std::integral_constant<int, 1>());
      } else {
        run(std::integral_constant<int, kGroup>());
      }
    }
  }
  if (nt_store) streaming_fence();
}

}  // namespace
}  // namespace dlkit::layer_norm::DLKIT_ISA
