// LayerNorm and RMSNorm on the CPU.
//
// Forward: a row is read from memory once, then twice more from the first-level caches (mean, squared deviations,
// output); the output goes past the caches when it is larger than them. Bytes moved: x and y, each once. Backward: rows
// go in groups of kGroup; each row's two sums first, then, column by column over the whole group, grad_input and the
// parameter gradients, so that weight and the running parameter gradients are touched once a group, not once a row.
// Bytes moved: grad_output, x and grad_input, each once, and one partial row a block of rows, summed in a fixed order.
#include <algorithm>
#include <cmath>

#include "../common/cpu/cache.h"
#include "../common/cpu/parallel.h"
#include "../common/cpu/partials.h"
#include "../common/cpu/philox.h"
#include "../common/cpu/simd.h"
#include "../common/dispatch.h"
#include "kernel.h"

namespace dlkit::layer_norm {
namespace DLKIT_ISA {
namespace {

using namespace dlkit::DLKIT_ISA;

// Whether the input is likely to come from beyond the second-level cache, so that fetching rows ahead pays.
template <class T>
bool is_far(int64_t rows, int64_t cols) {
  return rows * cols * int64_t(sizeof(T)) >= int64_t(1) << 20;
}

// Streaming pays once the outputs push everything else out of the last-level cache, and needs whole aligned vectors.
template <class T>
bool should_stream(const void* output, int64_t rows, int64_t cols) {
  const int64_t row_bytes = cols * int64_t(sizeof(T));
  return rows * row_bytes >= streaming_threshold_bytes() && row_bytes % 64 == 0 && uintptr_t(output) % 64 == 0;
}

constexpr int kGroup = 4;  // rows taken together
template <class A>
constexpr int64_t kShortForward = 8 * kLanes<A>;  // columns up to which a row is short: one of 16 vectors is faster so
template <class A>
constexpr int64_t kShortBackward = 16 * kLanes<A>;  // within the caches, but 1.9 instead of 1.5 ms for 32768x256
constexpr int64_t kScratch = 16384;  // columns up to which a row, or a parameter, is kept widened on the stack

// Whether and how a residual is added; kDrop: to x behind a dropout.
enum Residual { kNone, kAdd, kDrop };

// Not inlined into every kernel: it is long.
__attribute__((noinline)) void draw_bits(const PhiloxState& state, uint64_t threshold, int64_t first, int64_t blocks,
                                         uint8_t* bits) {
  keep_bits(state, threshold, first, blocks, bits);
}

// The keep bits of a few rows that follow each other, of kElements or less.
template <int64_t kElements>
struct RowBits {
  alignas(64) uint8_t bits[kElements / kBlockElements + kKeepStep + 16];
  int64_t first = 0;  // the element that bit 0 belongs to
  DLKIT_INLINE_MEMBER void draw(const PhiloxState& state, uint64_t threshold, int64_t begin, int64_t end) {
    first = begin / kBlockElements * kBlockElements;
    draw_bits(state, threshold, first / kBlockElements, (end - first + kBlockElements - 1) / kBlockElements, bits);
  }
  template <class A>
  DLKIT_INLINE_MEMBER uint32_t lanes(int64_t element) const {
    return lanes_at<A>(bits, element - first);
  }
};

template <Residual kResidual>
constexpr int64_t kDropped = kResidual == kDrop ? kScratch : 0;

// What is normalised: x, or x + residual rounded to T. The first reading writes the sum out and, with kKeep, leaves the
// row widened in `kept`: two output streams in two passes are faster than both in the last one.
template <class T, Residual kResidual, bool kStream, bool kKeep>
struct Row {
  using A = accumulate_t<T>;
  const T* x;
  const T* residual;
  T* sum;
  A* kept;
  const RowBits<kDropped<kResidual>>* bits;
  int64_t first_element;  // the logical index of column 0
  A scale;
  template <class Width>
  DLKIT_INLINE_MEMBER Vector<A> read(int64_t column, Width width) const {
    const Vector<A> v = load(x + column, width);
    if constexpr (kResidual == kNone) return v;
    const Vector<A> added = load(residual + column, width);
    if constexpr (kResidual == kDrop) {
      return round_to<T>(
          select<A>(bits->template lanes<A>(first_element + column), fma(v, broadcast<A>(scale), added), added));
    }
    return round_to<T>(v + added);
  }
  template <class Width>
  DLKIT_INLINE_MEMBER Vector<A> first(int64_t column, Width width) const {
    const Vector<A> v = read(column, width);
    if constexpr (kResidual != kNone) write<kStream>(sum + column, v, width);
    if constexpr (kKeep) store(kept + column, v, All{});
    return v;
  }
  template <class Width>
  DLKIT_INLINE_MEMBER Vector<A> again(int64_t column, Width width) const {
    if constexpr (kKeep) return load(kept + column, All{});
    return read(column, width);
  }
  // Half of what one step of kSlots vectors covers: two passes over a row fetch all of the next. 9.4 -> 6.5 ms for
  // 8192x4096 fp32, where a copy takes 5.9; asking twice for a line costs all of that again.
  DLKIT_INLINE_MEMBER void fetch_half(int64_t column) const {
    prefetch<kSlots * kLanes<A> / 2>(x + column);
    if constexpr (kResidual != kNone) prefetch<kSlots * kLanes<A> / 2>(residual + column);
  }
};

// v * weight + bias, each where there is one.
template <class V, class P, class Width>
DLKIT_INLINE V scaled(V v, const P* weight, const P* bias, int64_t i, Width width) {
  if (weight != nullptr) return fma(v, load(weight + i, width), bias != nullptr ? load(bias + i, width) : V{});
  return bias != nullptr ? v + load(bias + i, width) : v;
}

// weight and bias as the inner loops want them: widened once a task where they fit, else as they are.
template <class A, class P, bool kKeep>
struct Widened {
  using Element = std::conditional_t<kKeep, A, P>;
  alignas(64) A kept[kKeep && !std::is_same_v<A, P> ? kScratch + kLanes<A> : 1];
  const Element* data;
  Widened(const void* source, int64_t cols) {
    const P* parameter = static_cast<const P*>(source);
    if constexpr (std::is_same_v<Element, P>) {
      data = parameter;
    } else {
      data = parameter == nullptr ? nullptr : kept;
      if (parameter == nullptr) return;
      for_columns<A, 1>(0, cols, [&](int64_t i, int, auto width) DLKIT_INLINE_LAMBDA {
        store(kept + i, load(parameter + i, width), All{});
      });
    }
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

// Short rows, one or a vector of them together: what belongs to a row (its sums, mean and rstd) is a lane of a vector,
// so that adding lanes up and taking the root cost a row some 10 cycles instead of 60. A row's bits are the same
// either way.
template <class T, Residual kResidual, bool kStream, int kRows>
void forward_short_rows(const Forward& op, const accumulate_t<T>* weights, const accumulate_t<T>* biases,
                        int64_t first) {
  using A = accumulate_t<T>;
  using V = Vector<A>;
  using RowT = Row<T, kResidual, kStream, kResidual != kNone || !std::is_same_v<A, T>>;
  constexpr bool kFine = std::is_same_v<A, T>;
  const int64_t cols = op.cols, pitch = (cols + kLanes<A> - 1) / kLanes<A> * kLanes<A>;
  alignas(64) A kept[kRows * kShortForward<A>];
  alignas(64) A means[kLanes<A>] = {}, rests[kLanes<A>] = {}, scales[kLanes<A>];
  const auto row_of = [&](int r) DLKIT_INLINE_LAMBDA {
    const int64_t row = first + r;
    return RowT{static_cast<const T*>(op.x) + row * op.x_stride,
                at<const T>(op.residual, row * op.residual_stride),
                at<T>(op.sum, row * cols),
                kept + r * pitch,
                nullptr,
                0,
                0};
  };
  const bool far = is_far<T>(op.rows, cols);
  const auto fetch_next = [&](int r, int64_t i) DLKIT_INLINE_LAMBDA {
    const RowT next = row_of(r + kRows);
    prefetch<kLanes<A>>(next.x + i);
    if constexpr (kResidual != kNone) prefetch<kLanes<A>>(next.residual + i);
  };
  const auto save = [&](void* statistics, V values) DLKIT_INLINE_LAMBDA {
    if (statistics != nullptr) memcpy(static_cast<A*>(statistics) + first, &values, kRows * sizeof(A));
  };
  V sums[kRows], squares[kRows], variance;
  if (op.rms) {
    for (int r = 0; r < kRows; ++r) {
      const RowT x = row_of(r);
      squares[r] = V{};
      for_columns<A, 1>(0, cols, [&](int64_t i, int, auto width) DLKIT_INLINE_LAMBDA {
        if (far) fetch_next(r, i);
        const V v = x.first(i, width);
        squares[r] = fma(v, v, squares[r]);
      });
    }
    variance = sums_of_lanes(squares) / A(cols);
  } else {
    for (int r = 0; r < kRows; ++r) {
      const RowT x = row_of(r);
      sums[r] = V{};
      for_columns<A, 1>(0, cols, [&](int64_t i, int, auto width) DLKIT_INLINE_LAMBDA {
        if (far) fetch_next(r, i);
        sums[r] += x.first(i, width);
      });
    }
    const V mean = sums_of_lanes(sums) / A(cols);
    store(means, mean, All{});
    for (int r = 0; r < kRows; ++r) {
      const RowT x = row_of(r);
      const V centre = broadcast<A>(means[r]);
      sums[r] = squares[r] = V{};
      for_columns<A, 1>(0, cols, [&](int64_t i, int, auto width) DLKIT_INLINE_LAMBDA {
        const V v = keep(x.again(i, width) - centre, width);
        sums[r] += v;
        squares[r] = fma(v, v, squares[r]);
      });
    }
    const V sum = sums_of_lanes(sums), rest = sum / A(cols);  // rest: what rounding took from the mean
    variance = (sums_of_lanes(squares) - sum * rest) / A(cols);
    variance = variance < 0 ? V{} : variance;
    save(op.mean, mean + rest);
    store(means, kFine ? mean : mean + rest, All{});
    store(rests, rest, All{});
  }
  const V rstd = inverse_root(variance, op.eps);
  save(op.rstd, rstd);
  store(scales, rstd, All{});
  for (int r = 0; r < kRows; ++r) {
    const RowT x = row_of(r);
    const V centre = broadcast<A>(means[r]), rest = broadcast<A>(rests[r]), scale = broadcast<A>(scales[r]);
    const int64_t parameter = (first + r) % op.period * cols;
    const A *const weight = at<const A>(weights, parameter), *const bias = at<const A>(biases, parameter);
    T* const y = static_cast<T*>(op.y) + (first + r) * cols;
    for_columns<A, 1>(0, cols, [&](int64_t i, int, auto width) DLKIT_INLINE_LAMBDA {
      V v = x.again(i, width) - centre;
      if constexpr (kFine) v -= rest;
      write<kStream>(y + i, scaled(v * scale, weight, bias, i, width), width);
    });
  }
}

template <class T, class P, Residual kResidual, bool kStream>
void forward_all_short_rows(const Forward& op, int64_t begin, int64_t end) {
  using A = accumulate_t<T>;
  const Widened<A, P, true> weight(op.weight, op.cols), bias(op.bias, op.cols);
  int64_t row = begin;
  for (; row + kLanes<A> <= end; row += kLanes<A>) {
    forward_short_rows<T, kResidual, kStream, kLanes<A>>(op, weight.data, bias.data, row);
  }
  for (; row < end; ++row) forward_short_rows<T, kResidual, kStream, 1>(op, weight.data, bias.data, row);
  if constexpr (kStream) streaming_fence();
}

template <class T, class P, Residual kResidual, bool kStream, bool kKeep>
void forward_rows(const Forward& op, int64_t begin, int64_t end) {
  using A = accumulate_t<T>;
  using RowT = Row<T, kResidual, kStream, kKeep && (kResidual != kNone || !std::is_same_v<A, T>)>;
  const int64_t cols = op.cols;
  const Widened<A, P, kKeep> weights(op.weight, cols), biases(op.bias, cols);
  using Parameter = typename decltype(weights)::Element;
  alignas(64) A kept[kKeep ? kScratch + kLanes<A> : 1];
  // What rounding takes from the mean matters where the deviations are small beside it and T is fine enough to tell.
  constexpr bool kFine = std::is_same_v<A, T>;
  // The square of a mean over the variance. Above it the sum's own rounding shows, and a pass over the deviations finds
  // what the mean lacks. Few rows are above it, which is why no other pass adds them up: it costs 5 to 15 % there.
  constexpr double kLargeMean = 64;
  // Of LayerNorm's three passes the first two fetch the next row for 16-bit types, which leaves the last to the stores:
  // 5.4 -> 4.4 ms for 8192x4096 bf16. fp32 is 4 % slower so, with a residual too: the last two do it there.
  constexpr bool kFetchEarly = kResidual == kNone && !std::is_same_v<A, T>;
  // Step by step over a few short rows rather than row by row: the latency of one row's sum hides behind the next
  // row's.
  const int64_t together = cols <= 1024 ? kGroup : 1;
  const bool far = is_far<T>(op.rows, cols);
  RowBits<kDropped<kResidual>> bits;
  const PhiloxState state = read(op.dropout.source);
  const int64_t pitch = (cols + kLanes<A> - 1) / kLanes<A> * kLanes<A>;
  const auto row_of = [&](int64_t row) DLKIT_INLINE_LAMBDA {
    return RowT{static_cast<const T*>(op.x) + row * op.x_stride,
                at<const T>(op.residual, row * op.residual_stride),
                at<T>(op.sum, row * cols),
                kept + row % together * pitch,
                &bits,
                row * cols,
                A(op.dropout.scale)};
  };
  for (int64_t first = begin; first < end; first += together) {
    const int64_t last = min64(first + together, end);
    if constexpr (kResidual == kDrop) bits.draw(state, op.dropout.threshold, first * cols, last * cols);
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
      const auto weight = at<const Parameter>(weights.data, parameter),
                 bias = at<const Parameter>(biases.data, parameter);
      T* y = static_cast<T*>(op.y) + row * cols;
      for_columns<A, kSlots>(0, cols, [&](int64_t i, int slot, auto width) DLKIT_INLINE_LAMBDA {
        if (far && slot == 0 && (op.rms || !kFetchEarly)) next.fetch_half(cols / 2 + i / 2);
        Vector<A> v = x.again(i, width) - centre;
        if constexpr (kFine) v -= rest;
        write<kStream>(y + i, scaled(v * scale, weight, bias, i, width), width);
      });
    }
  }
  if constexpr (kStream) streaming_fence();
}

template <class T, class P, Residual kResidual>
void forward_typed(const Forward& op) {
  const int64_t grain = max64(1, kGrain / op.cols);
  const bool stream = should_stream<T>(op.y, op.rows, op.cols) && (kResidual == kNone || uintptr_t(op.sum) % 64 == 0);
  const auto run = [&](auto streaming, auto keeping) {
    parallel_for(op.rows, grain, [&](int64_t begin, int64_t end) {
      forward_rows<T, P, kResidual, streaming, keeping>(op, begin, end);
    });
  };
  if constexpr (kResidual != kDrop) {
    if (op.cols <= kShortForward<accumulate_t<T>>) {
      return parallel_for(op.rows, grain, [&](int64_t begin, int64_t end) {
        stream ? forward_all_short_rows<T, P, kResidual, true>(op, begin, end)
               : forward_all_short_rows<T, P, kResidual, false>(op, begin, end);
      });
    }
  }
  constexpr bool kNothingToKeep = kResidual == kNone && std::is_same_v<T, accumulate_t<T>>;
  if (kNothingToKeep || op.cols <= kScratch) {
    stream ? run(std::true_type(), std::true_type()) : run(std::false_type(), std::true_type());
  } else if constexpr (!kNothingToKeep && kResidual != kDrop) {
    run(std::false_type(), std::false_type());
  }
}

// Backward's work: blocks of whole periods, each with one partial row of each parameter gradient, times tiles of the
// places in a period, so that few samples are work for many threads and a tile's parameters stay in the first-level
// cache. A function of the shape alone.
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

// What a row's sums give: grad_input = rstd * (wdy - mean_wdy - (x - mean) * slope).
template <class A>
struct RowGradients {
  A mean_wdy[kLanes<A>], slope[kLanes<A>];  // slope: rstd^2 * mean(wdy * (x - mean))
};

// Of short rows, each in a lane of its own as in forward_short_rows.
template <class T, int kRows>
void short_row_gradients(const Backward& op, const accumulate_t<T>* weight, int64_t first,
                         RowGradients<accumulate_t<T>>& found) {
  using A = accumulate_t<T>;
  using V = Vector<A>;
  const bool far = is_far<T>(op.rows, op.cols);
  V sums[kRows], products[kRows], rstds = {};
  for (int r = 0; r < kRows; ++r) {
    const int64_t row = first + r * op.period;
    const T* const x = static_cast<const T*>(op.x) + row * op.x_stride;
    const T* const grad_output = static_cast<const T*>(op.grad_output) + row * op.grad_output_stride;
    const V mean = broadcast<A>(op.rms ? A(0) : static_cast<const A*>(op.mean)[row]);
    rstds[r] = static_cast<const A*>(op.rstd)[row];
    sums[r] = products[r] = V{};
    for_columns<A, 1>(0, op.cols, [&](int64_t i, int, auto width) DLKIT_INLINE_LAMBDA {
      if (far) {
        prefetch<kLanes<A>>(x + kRows * op.period * op.x_stride + i);
        prefetch<kLanes<A>>(grad_output + kRows * op.period * op.grad_output_stride + i);
      }
      V wdy = load(grad_output + i, width);
      if (weight != nullptr) wdy *= load(weight + i, width);
      sums[r] += wdy;
      products[r] = fma(wdy, load(x + i, width) - mean, products[r]);
    });
  }
  store(found.mean_wdy, op.rms ? V{} : sums_of_lanes(sums) / A(op.cols), All{});
  store(found.slope, sums_of_lanes(products) * rstds * rstds / A(op.cols), All{});
}

// Rows first, first + period, ...; those of `found`, from `place` on, where there are any.
template <class T, class P, int kRows, bool kInput, bool kWeight, bool kBias, bool kStream>
void backward_group(const Backward& op, const P* weight, int64_t first, int64_t end, accumulate_t<T>* weight_sums,
                    accumulate_t<T>* bias_sums, const PhiloxState& state, RowBits<kInput ? kGroup * kScratch : 0>& bits,
                    const RowGradients<accumulate_t<T>>* found = nullptr, int place = 0) {
  using A = accumulate_t<T>;
  const int64_t cols = op.cols;
  const T* const all_x = static_cast<const T*>(op.x);
  const T* const all_grad_output = static_cast<const T*>(op.grad_output);
  const T *x[kRows], *grad_output[kRows], *grad_sum[kRows], *next_x[kRows], *next_grad_output[kRows];
  T* grad_input[kRows];
  A mean[kRows], rstd[kRows], mean_wdy[kRows], slope[kRows];
  for (int r = 0; r < kRows; ++r) {
    const int64_t row = first + r * op.period, next = min64(row + kRows * op.period, end - 1);
    x[r] = all_x + row * op.x_stride;
    next_x[r] = all_x + next * op.x_stride;
    grad_output[r] = all_grad_output + row * op.grad_output_stride;
    next_grad_output[r] = all_grad_output + next * op.grad_output_stride;
    grad_sum[r] = at<const T>(op.grad_sum, row * op.grad_sum_stride);
    grad_input[r] = at<T>(op.grad_input, row * cols);
    mean[r] = op.rms ? A(0) : static_cast<const A*>(op.mean)[row];
    rstd[r] = static_cast<const A*>(op.rstd)[row];
  }
  const bool drop = kInput && op.dropout.active;
  if (drop) bits.draw(state, op.dropout.threshold, first * cols, (first + kRows) * cols);
  const bool far = found == nullptr && is_far<T>(op.rows, cols);
  // Both passes fetch half of the next group each.
  const auto fetch_half = [&](int r, int64_t column) DLKIT_INLINE_LAMBDA {
    prefetch<kSlots * kLanes<A> / 2>(next_x[r] + column);
    prefetch<kSlots * kLanes<A> / 2>(next_grad_output[r] + column);
  };
  if constexpr (kInput) {
    for (int r = 0; r < kRows; ++r) {
      if (found != nullptr) {
        mean_wdy[r] = found->mean_wdy[place + r];
        slope[r] = found->slope[place + r];
        continue;
      }
      double totals[2];
      sum_columns<A>(cols, totals, [&](int64_t i, int slot, auto width, auto* terms) DLKIT_INLINE_LAMBDA {
        if (far && slot == 0) fetch_half(r, i / 2);
        Vector<A> wdy = load(grad_output[r] + i, width);
        if (weight != nullptr) wdy *= load(weight + i, width);
        terms[0] += wdy;
        terms[1] = fma(wdy, load(x[r] + i, width) - mean[r], terms[1]);
      });
      mean_wdy[r] = op.rms ? A(0) : A(totals[0] / double(cols));
      slope[r] = A(totals[1] * double(rstd[r]) * double(rstd[r]) / double(cols));
    }
  }
  for_columns<A, 1>(0, cols, [&](int64_t i, int, auto width) DLKIT_INLINE_LAMBDA {
    if (far && i % (kSlots * kLanes<A>) == 0) {
      for (int r = 0; r < kRows; ++r) fetch_half(r, cols / 2 + i / 2);
    }
    Vector<A> w = broadcast<A>(1), weight_sum = {}, bias_sum = {};
    if (weight != nullptr) w = load(weight + i, width);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const Vector<A> dy = load(grad_output[r] + i, width);
      const Vector<A> centred = load(x[r] + i, width) - mean[r];
      if constexpr (kInput) {
        Vector<A> dx = fma(centred, broadcast<A>(-slope[r]), fma(dy, w, broadcast<A>(-mean_wdy[r]))) * rstd[r];
        if (op.grad_sum != nullptr) dx += load(grad_sum[r] + i, width);
        write<kStream>(grad_input[r] + i, dx, width);
        if (drop) {
          const int64_t element = (first + r) * cols + i;
          const Vector<A> kept = dx * broadcast<A>(A(op.dropout.scale));
          write<kStream>(static_cast<T*>(op.grad_dropped) + element,
                         select<A>(bits.template lanes<A>(element), kept, Vector<A>{}), width);
        }
      }
      if constexpr (kWeight) weight_sum = fma(dy, centred * rstd[r], weight_sum);
      if constexpr (kBias) bias_sum += dy;
    }
    if constexpr (kWeight) store(weight_sums + i, load(weight_sums + i, width) + weight_sum, width);
    if constexpr (kBias) store(bias_sums + i, load(bias_sums + i, width) + bias_sum, width);
  });
}

// The rows of periods [begin, end) at places [first, last) of theirs.
template <class T, class P, bool kInput, bool kWeight, bool kBias, bool kStream, bool kKeep>
void backward_rows(const Backward& op, int64_t begin, int64_t end, int64_t first, int64_t last,
                   accumulate_t<T>* weight_sums, accumulate_t<T>* bias_sums) {
  using A = accumulate_t<T>;
  const int64_t cols = op.cols, period = op.period;
  const size_t bytes = size_t((last - first) * cols) * sizeof(A);
  if constexpr (kWeight) memset(weight_sums + first * cols, 0, bytes);
  if constexpr (kBias) memset(bias_sums + first * cols, 0, bytes);
  const Widened<A, P, kKeep> weights(op.weight, cols);
  using Parameter = typename decltype(weights)::Element;
  RowBits<kInput ? kGroup * kScratch : 0> bits;
  const PhiloxState state = read(op.dropout.source);
  // Calls f(how many, a row, its weight, its sums) for rows of one place, from as many periods.
  const auto for_groups = [&](auto most, const auto& f) DLKIT_INLINE_LAMBDA {
    const auto at_places = [&](int64_t sample, auto count) DLKIT_INLINE_LAMBDA {
      for (int64_t k = first; k < last; ++k) {
        f(count, sample * period + k, at<const Parameter>(weights.data, k * cols), at<A>(weight_sums, k * cols),
          at<A>(bias_sums, k * cols));
      }
    };
    int64_t sample = begin;
    for (; sample + most <= end; sample += most) at_places(sample, most);
    for (; sample < end; ++sample) at_places(sample, std::integral_constant<int, 1>());
  };
  if constexpr (kKeep && kInput) {
    if (cols <= kShortBackward<A>) {
      for_groups(std::integral_constant<int, kLanes<A>>(),
                 [&](auto count, int64_t row, const A* weight, A* weight_sum, A* bias_sum) DLKIT_INLINE_LAMBDA {
                   constexpr int kTogether = kGroup < count ? kGroup : int(count);
                   RowGradients<A> found;
                   short_row_gradients<T, count>(op, weight, row, found);
                   for (int place = 0; place < count; place += kTogether) {
                     backward_group<T, A, kTogether, kInput, kWeight, kBias, kStream>(
                         op, weight, row + place * period, op.rows, weight_sum, bias_sum, state, bits, &found, place);
                   }
                 });
      if constexpr (kStream) streaming_fence();
      return;
    }
  }
  for_groups(std::integral_constant<int, kGroup>(),
             [&](auto count, int64_t row, const Parameter* weight, A* weight_sum, A* bias_sum) DLKIT_INLINE_LAMBDA {
               backward_group<T, Parameter, count, kInput, kWeight, kBias, kStream>(op, weight, row, end * period,
                                                                                    weight_sum, bias_sum, state, bits);
             });
  if constexpr (kStream) streaming_fence();
}

template <class T, class P, bool kInput, bool kWeight, bool kBias>
void backward_typed(const Backward& op) {
  using A = accumulate_t<T>;
  const bool stream =
      kInput && should_stream<T>(op.grad_input, op.rows, op.cols) && uintptr_t(op.grad_dropped) % 64 == 0;
  const auto run = [&](auto streaming, auto keeping) {
    const auto [blocks, tiles] = cut(op);
    const int64_t periods = op.rows / op.period, parameters = op.period * op.cols;
    const int64_t block_stride = parameters * (int64_t(kWeight) + int64_t(kBias));
    A* const weight_partials = kWeight ? static_cast<A*>(op.partials) : nullptr;
    A* const bias_partials = kBias ? static_cast<A*>(op.partials) + (kWeight ? parameters : 0) : nullptr;
    parallel_for(blocks * tiles, 1, [&, blocks = blocks, tiles = tiles](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t block = i / tiles, tile = i % tiles;
        backward_rows<T, P, kInput, kWeight, kBias, streaming, keeping>(
            op, periods * block / blocks, periods * (block + 1) / blocks, op.period * tile / tiles,
            op.period * (tile + 1) / tiles, at<A>(weight_partials, block * block_stride),
            at<A>(bias_partials, block * block_stride));
      }
    });
    if constexpr (kWeight) sum_partials<P>(weight_partials, blocks, block_stride, parameters, op.grad_weight);
    if constexpr (kBias) sum_partials<P>(bias_partials, blocks, block_stride, parameters, op.grad_bias);
  };
  constexpr bool kNothingToKeep = std::is_same_v<A, P>;
  if (kNothingToKeep || op.cols <= kScratch) {
    stream ? run(std::bool_constant<kInput>(), std::true_type()) : run(std::false_type(), std::true_type());
  } else if constexpr (!kNothingToKeep) {
    run(std::false_type(), std::false_type());
  }
}

}  // namespace

void forward(const Forward& op) {
  write_state(read(op.dropout.source), op.dropout.state);
  with_types(op.dtype, op.parameter_dtype, [&](auto t, auto p) {
    using T = decltype(t);
    using P = decltype(p);
    if (op.dropout.active) {
      forward_typed<T, P, kDrop>(op);
    } else {
      op.residual != nullptr ? forward_typed<T, P, kAdd>(op) : forward_typed<T, P, kNone>(op);
    }
  });
}

void backward(const Backward& op) {
  with_types(op.dtype, op.parameter_dtype, [&](auto t, auto p) {
    with_flags(
        [&](auto input, auto weight, auto bias) {
          if constexpr (input || weight || bias) backward_typed<decltype(t), decltype(p), input, weight, bias>(op);
        },
        op.grad_input != nullptr, op.grad_weight != nullptr, op.grad_bias != nullptr);
  });
}

#if defined(DLKIT_ISA_IS_BASELINE)
constexpr int64_t most_dropped = kScratch;  // columns: the keep bits of a group of rows lie on the stack
int64_t partials_bytes(const Backward& op) {
  const int64_t arrays = int64_t(op.grad_weight != nullptr) + int64_t(op.grad_bias != nullptr);
  return cut(op).blocks * arrays * op.period * op.cols * accumulate_size(op.dtype);
}
#endif

}  // namespace DLKIT_ISA

DLKIT_CPU_ENTRY(forward_cpu, forward, Forward)
DLKIT_CPU_ENTRY(backward_cpu, backward, Backward)
#if defined(DLKIT_ISA_IS_BASELINE)
int64_t backward_partials_cpu(const Backward& op) { return baseline::partials_bytes(op); }
bool can_drop_cpu(const Forward& op) { return op.cols <= baseline::most_dropped; }
bool can_drop_cpu(const Backward& op) { return op.cols <= baseline::most_dropped; }
#endif

}  // namespace dlkit::layer_norm
