// Forward, row by row. A row is read from memory once, then twice more from the first-level caches (mean, squared
// deviations, output); the output goes past the caches when it is larger than them. Bytes moved: x and y, each once.
#pragma once

#include <algorithm>
#include <cmath>

#include "shared.h"

namespace dlkit::layer_norm::DLKIT_ISA {
namespace {

// Columns up to which a row is short. To treat one of 16 vectors as short is faster within the caches, but takes 1.9
// instead of 1.5 ms for 32768x256.
template <class A>
constexpr int64_t kShortForward = 8 * kLanes<A>;

// The row to normalize: x, or with kAdds x + residual rounded to T, where x passes a dropout if there are `bits`. The
// first pass writes the sum and leaves a computed row in `kept`: two output streams in two passes are faster than both
// in the last one.
template <class T, bool kAdds>
struct Row {
  using A = accumulate_t<T>;
  static constexpr bool kKeeps = kAdds || !std::is_same_v<T, A>;
  const T* x;
  const T* residual;
  T* sum;
  A* kept;
  bool nt_store;
  const RowBits<kScratch>* bits = nullptr;  // of the dropout, or null
  int64_t first_element = 0;                // the logical index of column 0
  A scale = 0;
  template <class Width>
  DLKIT_INLINE_MEMBER Vector<A> first(int64_t column, Width width) const {
    Vector<A> v = load(x + column, width);
    if constexpr (kAdds) {
      const Vector<A> added = load(residual + column, width);
      if (bits == nullptr) {
        v += added;
      } else {
        v = select<A>(bits->template lanes<A>(first_element + column), fma(v, broadcast<A>(scale), added), added);
      }
      v = round_to<T>(v);
      write(sum + column, v, width, nt_store);
    }
    if constexpr (kKeeps) store(kept + column, v, All{});
    return v;
  }
  template <class Width>
  DLKIT_INLINE_MEMBER Vector<A> again(int64_t column, Width width) const {
    if constexpr (kKeeps) return load(kept + column, All{});
    return load(x + column, width);
  }
  // Fetches half of the elements that one step of kSlots vectors covers: two passes over a row fetch all of the next.
  // 9.4 -> 6.5 ms for 8192x4096 fp32, where a copy takes 5.9; fetching each line twice loses that gain.
  DLKIT_INLINE_MEMBER void fetch_half(int64_t column) const {
    prefetch<kSlots * kLanes<A> / 2>(x + column);
    if constexpr (kAdds) prefetch<kSlots * kLanes<A> / 2>(residual + column);
  }
};

DLKIT_INLINE VectorF64 inverse_root(VectorF64 variance, double eps) {
  for (int i = 0; i < kLanes<double>; ++i) variance[i] = 1 / std::sqrt(variance[i] + eps);
  return variance;
}
DLKIT_INLINE VectorF32 inverse_root(VectorF32 variance, double eps) {
  for (int i = 0; i < kLanes<float>; ++i) variance[i] = float(1 / std::sqrt(double(variance[i]) + eps));
  return variance;
}

// Short rows, at most a vector of them together: a row's sums, mean and rstd are a lane of a vector. Adding up lanes
// and taking the root then cost some 10 cycles a row instead of 60. A row's bits do not depend on the number of rows.
template <class T, bool kAdds>
void forward_short_rows(const Forward& op, const accumulate_t<T>* weights, const accumulate_t<T>* biases, int64_t first,
                        int count, bool nt_store) {
  using A = accumulate_t<T>;
  using V = Vector<A>;
  using RowT = Row<T, kAdds>;
  constexpr bool kFine = std::is_same_v<A, T>;
  const int64_t cols = op.cols, pitch = padded<A>(cols);
  alignas(64) A kept[kLanes<A> * kShortForward<A>];
  alignas(64) A means[kLanes<A>] = {}, rests[kLanes<A>] = {}, scales[kLanes<A>];
  const auto row_of = [&](int r) DLKIT_INLINE_LAMBDA {
    const int64_t row = first + r;
    return RowT{static_cast<const T*>(op.x) + row * op.x_stride, at<const T>(op.residual, row * op.residual_stride),
                at<T>(op.sum, row * cols), kept + r * pitch, nt_store};
  };
  const bool far = is_far<T>(op.rows, cols);
  const auto fetch_next = [&](int r) {
    const RowT next = row_of(r + int(kLanes<A>));
    for (int64_t i = 0; i < cols; i += kLanes<A>) {
      prefetch<kLanes<A>>(next.x + i);
      if constexpr (kAdds) prefetch<kLanes<A>>(next.residual + i);
    }
  };
  const auto save = [&](void* statistics, V values) DLKIT_INLINE_LAMBDA {
    if (statistics != nullptr) memcpy(static_cast<A*>(statistics) + first, &values, size_t(count) * sizeof(A));
  };
  V sums[kLanes<A>], squares[kLanes<A>], variance;
  for (int r = count; r < kLanes<A>; ++r) sums[r] = squares[r] = V{};
  if (op.rms) {
    for (int r = 0; r < count; ++r) {
      const RowT x = row_of(r);
      if (far) fetch_next(r);
      squares[r] = V{};
      for_columns<A, 1>(0, cols, [&](int64_t i, int, auto width) DLKIT_INLINE_LAMBDA {
        const V v = x.first(i, width);
        squares[r] = fma(v, v, squares[r]);
      });
    }
    variance = sums_of_lanes(squares) / A(cols);
  } else {
    for (int r = 0; r < count; ++r) {
      const RowT x = row_of(r);
      if (far) fetch_next(r);
      sums[r] = V{};
      for_columns<A, 1>(0, cols, [&](int64_t i, int, auto width) DLKIT_INLINE_LAMBDA { sums[r] += x.first(i, width); });
    }
    const V mean = sums_of_lanes(sums) / A(cols);
    store(means, mean, All{});
    for (int r = 0; r < count; ++r) {
      const RowT x = row_of(r);
      const V centre = broadcast<A>(means[r]);
      sums[r] = squares[r] = V{};
      for_columns<A, 1>(0, cols, [&](int64_t i, int, auto width) DLKIT_INLINE_LAMBDA {
        const V v = keep(x.again(i, width) - centre, width);
        sums[r] += v;
        squares[r] = fma(v, v, squares[r]);
      });
    }
    const V sum = sums_of_lanes(sums), rest = sum / A(cols);  // rest: the mean's rounding error
    variance = (sums_of_lanes(squares) - sum * rest) / A(cols);
    variance = variance < 0 ? V{} : variance;
    save(op.mean, mean + rest);
    store(means, kFine ? mean : mean + rest, All{});
    store(rests, rest, All{});
  }
  const V rstd = inverse_root(variance, op.eps);
  save(op.rstd, rstd);
  store(scales, rstd, All{});
  for (int r = 0; r < count; ++r) {
    const RowT x = row_of(r);
    const V centre = broadcast<A>(means[r]), rest = broadcast<A>(rests[r]), scale = broadcast<A>(scales[r]);
    const int64_t parameter = (first + r) % op.period * cols;
    const A *const weight = at<const A>(weights, parameter), *const bias = at<const A>(biases, parameter);
    T* const y = static_cast<T*>(op.y) + (first + r) * cols;
    for_columns<A, 1>(0, cols, [&](int64_t i, int, auto width) DLKIT_INLINE_LAMBDA {
      V v = x.again(i, width) - centre;
      if constexpr (kFine) v -= rest;
      write(y + i, scaled(v * scale, weight, bias, i, width), width, nt_store);
    });
  }
}

template <class T, bool kAdds>
void forward_all_short_rows(const Forward& op, int64_t begin, int64_t end, bool nt_store) {
  using A = accumulate_t<T>;
  const Widened<T> weight(op.weight, op.parameter_dtype, op.cols), bias(op.bias, op.parameter_dtype, op.cols);
  for (int64_t row = begin; row < end; row += kLanes<A>) {
    forward_short_rows<T, kAdds>(op, weight.data, bias.data, row, int(min64(kLanes<A>, end - row)), nt_store);
  }
}

template <class T, bool kAdds>
void forward_rows(const Forward& op, int64_t begin, int64_t end, bool nt_store) {
  using A = accumulate_t<T>;
  using RowT = Row<T, kAdds>;
  const int64_t cols = op.cols;
  const Widened<T> weights(op.weight, op.parameter_dtype, cols), biases(op.bias, op.parameter_dtype, cols);
  // The mean's rounding error matters where deviations are small beside the mean and T is precise enough to show it.
  constexpr bool kFine = std::is_same_v<A, T>;
  // A limit on mean^2 / variance. Above it the sum's own rounding shows, and one more pass over the deviations finds
  // the mean's error. Few rows are. Summing deviations in the variance's pass would cost it 5 to 15 %.
  constexpr double kLargeMean = 64;
  // Of LayerNorm's three passes the first two fetch the next row for 16-bit types, which leaves the last to the stores:
  // 5.4 -> 4.4 ms for 8192x4096 bf16. fp32, and rows with a residual, would be 4 % slower: there the last two passes
  // fetch it.
  constexpr bool kFetchEarly = !kAdds && !std::is_same_v<A, T>;
  // Each step handles a few short rows together: the latency of one row's sum is hidden by the next row's work.
  const int64_t together = cols <= 1024 ? kGroup : 1;
  const bool far = is_far<T>(op.rows, cols);
  RowBits<kScratch> bits;
  const PhiloxState state = read(op.dropout.source);
  const int64_t pitch = padded<A>(cols);
  const Scratch<A> kept(RowT::kKeeps ? together * pitch : 0);
  const auto row_of = [&](int64_t row) DLKIT_INLINE_LAMBDA {
    return RowT{static_cast<const T*>(op.x) + row * op.x_stride,
                at<const T>(op.residual, row * op.residual_stride),
                at<T>(op.sum, row * cols),
                kept.data + row % together * pitch,
                nt_store,
                op.dropout.active ? &bits : nullptr,
                row * cols,
                A(op.dropout.scale)};
  };
  for (int64_t first = begin; first < end; first += together) {
    const int64_t last = min64(first + together, end);
    if (kAdds && op.dropout.active) bits.find(op.dropout, state, first * cols, last * cols);
    A mean[kGroup] = {}, mean_rest[kGroup] = {}, rstd[kGroup];
    if (!op.rms) {
      for (int64_t row = first; row < last; ++row) {
        const RowT x = row_of(row), next = row_of(min64(row + together, end - 1));
        double totals[1];
        sum_columns<A>(cols, totals, [&](int64_t i, int slot, auto width, auto* terms) DLKIT_INLINE_LAMBDA {
          if (kFetchEarly && far && slot == 0) next.fetch_half(i / 2);
          terms[0] += x.first(i, width);
        });
        mean[row - first] = A(totals[0] / double(cols));
        if (kFine) mean_rest[row - first] = A(totals[0] / double(cols) - double(mean[row - first]));
      }
    }
    for (int64_t row = first; row < last; ++row) {
      const RowT x = row_of(row), next = row_of(min64(row + together, end - 1));
      const Vector<A> centre = broadcast<A>(mean[row - first]), rest = broadcast<A>(mean_rest[row - first]);
      double totals[1];
      if (op.rms) {
        sum_columns<A>(cols, totals, [&](int64_t i, int slot, auto width, auto* terms) DLKIT_INLINE_LAMBDA {
          if (far && slot == 0) next.fetch_half(i / 2);
          const Vector<A> v = x.first(i, width);
          terms[0] = fma(v, v, terms[0]);
        });
      } else {
        sum_columns<A>(cols, totals, [&](int64_t i, int slot, auto width, auto* terms) DLKIT_INLINE_LAMBDA {
          if (far && slot == 0) next.fetch_half((kFetchEarly ? cols / 2 : 0) + i / 2);
          Vector<A> v = x.again(i, width) - centre;
          if constexpr (kFine) v -= rest;
          v = keep(v, width);
          terms[0] = fma(v, v, terms[0]);
        });
        const double average = double(mean[row - first]);
        if (kFine && average * average > kLargeMean * totals[0] / double(cols)) {
          double lacking[1];
          sum_columns<A>(cols, lacking, [&](int64_t i, int, auto width, auto* terms) DLKIT_INLINE_LAMBDA {
            terms[0] += keep(x.again(i, width) - centre - rest, width);
          });
          const double shift = lacking[0] / double(cols);
          mean_rest[row - first] += A(shift);
          totals[0] = std::max(totals[0] - shift * lacking[0], 0.0);
        }
        if (op.mean != nullptr) static_cast<A*>(op.mean)[row] = A(average + double(mean_rest[row - first]));
      }
      rstd[row - first] = A(1.0 / std::sqrt(totals[0] / double(cols) + op.eps));
      if (op.rstd != nullptr) static_cast<A*>(op.rstd)[row] = rstd[row - first];
    }
    for (int64_t row = first; row < last; ++row) {
      const RowT x = row_of(row), next = row_of(min64(row + together, end - 1));
      const Vector<A> centre = broadcast<A>(mean[row - first]), rest = broadcast<A>(mean_rest[row - first]);
      const Vector<A> scale = broadcast<A>(rstd[row - first]);
      const int64_t parameter = row % op.period * cols;
      const A *const weight = at<const A>(weights.data, parameter), *const bias = at<const A>(biases.data, parameter);
      T* y = static_cast<T*>(op.y) + row * cols;
      for_columns<A, kSlots>(0, cols, [&](int64_t i, int slot, auto width) DLKIT_INLINE_LAMBDA {
        if (far && slot == 0 && (op.rms || !kFetchEarly)) next.fetch_half(cols / 2 + i / 2);
        Vector<A> v = x.again(i, width) - centre;
        if constexpr (kFine) v -= rest;
        write(y + i, scaled(v * scale, weight, bias, i, width), width, nt_store);
      });
    }
  }
}

}  // namespace
}  // namespace dlkit::layer_norm::DLKIT_ISA
