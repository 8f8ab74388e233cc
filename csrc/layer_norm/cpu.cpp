// LayerNorm and RMSNorm on the CPU.
//
// Forward: a row is read from memory once, then twice more from the first-level caches (mean, squared deviations,
// output); the output goes past the caches when it is larger than them. Bytes moved: x and y, each once. Backward: rows
// go in groups of kGroup; each row's two sums first, then, column by column over the whole group, grad_input and the
// parameter gradients, so that weight and the running parameter gradients are touched once a group, not once a row.
// Bytes moved: grad_output, x and grad_input, each once, and one partial row a block of rows, summed in a fixed order.
#include <algorithm>
#include <cmath>
#include <memory>

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

// `count` values: on the stack where they are few.
template <class A>
class Scratch {
  alignas(64) A near_[kScratch];
  std::unique_ptr<A[]> far_;

 public:
  A* data;
  explicit Scratch(int64_t count) : far_(count > kScratch ? new A[size_t(count)] : nullptr) {
    data = count > kScratch ? far_.get() : near_;
  }
};

// The columns of a row as whole vectors.
template <class A>
int64_t padded(int64_t cols) {
  return (cols + kLanes<A> - 1) / kLanes<A> * kLanes<A>;
}

// What is normalised: x, or with kAdds x + residual rounded to T, where x passes a dropout if there are `bits`. The
// first reading writes the sum out and leaves a row that had to be worked out in `kept`: two output streams in two
// passes are faster than both in the last one.
template <class T, bool kAdds>
struct Row {
  using A = accumulate_t<T>;
  static constexpr bool kKeeps = kAdds || !std::is_same_v<T, A>;
  const T* x;
  const T* residual;
  T* sum;
  A* kept;
  bool stream;
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
      write(sum + column, v, width, stream);
    }
    if constexpr (kKeeps) store(kept + column, v, All{});
    return v;
  }
  template <class Width>
  DLKIT_INLINE_MEMBER Vector<A> again(int64_t column, Width width) const {
    if constexpr (kKeeps) return load(kept + column, All{});
    return load(x + column, width);
  }
  // Half of what one step of kSlots vectors covers: two passes over a row fetch all of the next. 9.4 -> 6.5 ms for
  // 8192x4096 fp32, where a copy takes 5.9; asking twice for a line costs all of that again.
  DLKIT_INLINE_MEMBER void fetch_half(int64_t column) const {
    prefetch<kSlots * kLanes<A> / 2>(x + column);
    if constexpr (kAdds) prefetch<kSlots * kLanes<A> / 2>(residual + column);
  }
};

// v * weight + bias, each where there is one.
template <class V, class A, class Width>
DLKIT_INLINE V scaled(V v, const A* weight, const A* bias, int64_t i, Width width) {
  if (weight != nullptr) return fma(v, load(weight + i, width), bias != nullptr ? load(bias + i, width) : V{});
  return bias != nullptr ? v + load(bias + i, width) : v;
}

// weight or bias as the inner loops want it: of T widened once a task, else as it is.
template <class T>
struct Widened {
  using A = accumulate_t<T>;
  static constexpr bool kIsWide = std::is_same_v<T, A>;
  Scratch<A> scratch;
  const A* data;
  Widened(const void* source, DType type, int64_t cols)
      : scratch(kIsWide ? 0 : padded<A>(cols)), data(static_cast<const A*>(source)) {
    if (kIsWide || source == nullptr || type == DType::F32) return;
    data = scratch.data;
    for_columns<A, 1>(0, cols, [&](int64_t i, int, auto width) DLKIT_INLINE_LAMBDA {
      store(scratch.data + i, load(static_cast<const T*>(source) + i, width), All{});
    });
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

// Short rows, up to a vector of them together: what belongs to a row (its sums, mean and rstd) is a lane of a vector,
// so that adding lanes up and taking the root cost a row some 10 cycles instead of 60. A row's bits are the same
// however many there are.
template <class T, bool kAdds>
void forward_short_rows(const Forward& op, const accumulate_t<T>* weights, const accumulate_t<T>* biases, int64_t first,
                        int count, bool stream) {
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
                at<T>(op.sum, row * cols), kept + r * pitch, stream};
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
  for (int r = 0; r < count; ++r) {
    const RowT x = row_of(r);
    const V centre = broadcast<A>(means[r]), rest = broadcast<A>(rests[r]), scale = broadcast<A>(scales[r]);
    const int64_t parameter = (first + r) % op.period * cols;
    const A *const weight = at<const A>(weights, parameter), *const bias = at<const A>(biases, parameter);
    T* const y = static_cast<T*>(op.y) + (first + r) * cols;
    for_columns<A, 1>(0, cols, [&](int64_t i, int, auto width) DLKIT_INLINE_LAMBDA {
      V v = x.again(i, width) - centre;
      if constexpr (kFine) v -= rest;
      write(y + i, scaled(v * scale, weight, bias, i, width), width, stream);
    });
  }
}

template <class T, bool kAdds>
void forward_all_short_rows(const Forward& op, int64_t begin, int64_t end, bool stream) {
  using A = accumulate_t<T>;
  const Widened<T> weight(op.weight, op.parameter_dtype, op.cols), bias(op.bias, op.parameter_dtype, op.cols);
  for (int64_t row = begin; row < end; row += kLanes<A>) {
    forward_short_rows<T, kAdds>(op, weight.data, bias.data, row, int(min64(kLanes<A>, end - row)), stream);
  }
}

template <class T, bool kAdds>
void forward_rows(const Forward& op, int64_t begin, int64_t end, bool stream) {
  using A = accumulate_t<T>;
  using RowT = Row<T, kAdds>;
  const int64_t cols = op.cols;
  const Widened<T> weights(op.weight, op.parameter_dtype, cols), biases(op.bias, op.parameter_dtype, cols);
  // What rounding takes from the mean matters where the deviations are small beside it and T is fine enough to tell.
  constexpr bool kFine = std::is_same_v<A, T>;
  // The square of a mean over the variance. Above it the sum's own rounding shows, and a pass over the deviations finds
  // what the mean lacks. Few rows are above it, which is why no other pass adds them up: it costs 5 to 15 % there.
  constexpr double kLargeMean = 64;
  // Of LayerNorm's three passes the first two fetch the next row for 16-bit types, which leaves the last to the stores:
  // 5.4 -> 4.4 ms for 8192x4096 bf16. fp32 is 4 % slower so, with a residual too: the last two do it there.
  constexpr bool kFetchEarly = !kAdds && !std::is_same_v<A, T>;
  // Step by step over a few short rows rather than row by row: the latency of one row's sum hides behind the next
  // row's.
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
                stream,
                op.dropout.active ? &bits : nullptr,
                row * cols,
                A(op.dropout.scale)};
  };
  for (int64_t first = begin; first < end; first += together) {
    const int64_t last = min64(first + together, end);
    if (kAdds && op.dropout.active) bits.draw(state, op.dropout.threshold, first * cols, last * cols);
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
        write(y + i, scaled(v * scale, weight, bias, i, width), width, stream);
      });
    }
  }
}

template <class T, bool kAdds>
void forward_typed(const Forward& op) {
  const bool stream = should_stream<T>(op.y, op.rows, op.cols) && (!kAdds || uintptr_t(op.sum) % 64 == 0);
  parallel_for(op.rows, max64(1, kGrain / op.cols), [&](int64_t begin, int64_t end) {
    if (op.cols <= kShortForward<accumulate_t<T>> && !op.dropout.active) {
      forward_all_short_rows<T, kAdds>(op, begin, end, stream);
    } else {
      forward_rows<T, kAdds>(op, begin, end, stream);
    }
    if (stream) streaming_fence();
  });
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
  static constexpr int64_t kRows = kLanes<A> > kGroup ? kLanes<A> : kGroup;
  A mean_wdy[kRows], slope[kRows];  // slope: rstd^2 * mean(wdy * (x - mean))
};

// Of up to a vector of short rows, each in a lane of its own as in forward_short_rows.
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

// Rows first, first + period, ...; those of `found`, from `place` on, where there are any.
template <class T, int kRows>
void backward_group(const Backward& op, const accumulate_t<T>* weight, int64_t first, int64_t end,
                    accumulate_t<T>* weight_sums, accumulate_t<T>* bias_sums, const PhiloxState& state,
                    RowBits<kGroup * kScratch>& bits, bool stream, const RowGradients<accumulate_t<T>>* found = nullptr,
                    int place = 0) {
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
      own.mean_wdy[r] = op.rms ? A(0) : A(totals[0] / double(cols));
      own.slope[r] = A(totals[1] * rstd * rstd / double(cols));
    }
    found = &own;
    place = 0;
  }
  const T *x[kRows], *grad_output[kRows], *grad_sum[kRows];
  T* grad_input[kRows];
  A mean[kRows], rstd[kRows], mean_wdy[kRows], slope[kRows];
#pragma GCC unroll 4  // so that the arrays are registers
  for (int r = 0; r < kRows; ++r) {
    const int64_t row = first + r * op.period;
    x[r] = all_x + row * op.x_stride;
    grad_output[r] = all_grad_output + row * op.grad_output_stride;
    grad_sum[r] = at<const T>(op.grad_sum, row * op.grad_sum_stride);
    grad_input[r] = at<T>(op.grad_input, row * cols);
    mean[r] = op.rms ? A(0) : static_cast<const A*>(op.mean)[row];
    rstd[r] = static_cast<const A*>(op.rstd)[row];
    mean_wdy[r] = input ? found->mean_wdy[place + r] : A(0);
    slope[r] = input ? found->slope[place + r] : A(0);
  }
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
      write_all(dx, width, stream, [&](int r) DLKIT_INLINE_LAMBDA { return grad_input[r] + i; });
      if (drop) {
        const int64_t element = first * cols + i;
        T* const dropped = static_cast<T*>(op.grad_dropped) + element;
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
          dx[r] = select<A>(bits.template lanes<A>(element + r * cols), dx[r] * broadcast<A>(A(op.dropout.scale)),
                            Vector<A>{});
        }
        write_all(dx, width, stream, [&](int r) DLKIT_INLINE_LAMBDA { return dropped + r * cols; });
      }
    }
    if (weight_sums != nullptr) store(weight_sums + i, load(weight_sums + i, width) + weight_sum, width);
    if (bias_sums != nullptr) store(bias_sums + i, load(bias_sums + i, width) + bias_sum, width);
  });
}

// The rows of periods [begin, end) at places [first, last) of theirs.
template <class T>
void backward_rows(const Backward& op, int64_t begin, int64_t end, int64_t first, int64_t last,
                   accumulate_t<T>* weight_sums, accumulate_t<T>* bias_sums, bool stream) {
  using A = accumulate_t<T>;
  const int64_t cols = op.cols, period = op.period;
  const size_t bytes = size_t((last - first) * cols) * sizeof(A);
  if (weight_sums != nullptr) memset(weight_sums + first * cols, 0, bytes);
  if (bias_sums != nullptr) memset(bias_sums + first * cols, 0, bytes);
  const Widened<T> weights(op.weight, op.parameter_dtype, cols);
  RowBits<kGroup * kScratch> bits;
  const PhiloxState state = read(op.dropout.source);
  // Of each place the rows of as many periods as go together, in groups; what is left at the end row by row.
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
                                  at<A>(bias_sums, k * cols), state, bits, stream, is_short ? &found : nullptr, place);
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
  if (stream) streaming_fence();
}

template <class T>
void backward_typed(const Backward& op) {
  using A = accumulate_t<T>;
  const bool stream = op.grad_input != nullptr && should_stream<T>(op.grad_input, op.rows, op.cols) &&
                      uintptr_t(op.grad_dropped) % 64 == 0;
  const auto [blocks, tiles] = cut(op);
  const bool has_weight = op.grad_weight != nullptr, has_bias = op.grad_bias != nullptr;
  const int64_t periods = op.rows / op.period, parameters = op.period * op.cols;
  const int64_t block_stride = parameters * (int64_t(has_weight) + int64_t(has_bias));
  A* const weight_partials = has_weight ? static_cast<A*>(op.partials) : nullptr;
  A* const bias_partials = has_bias ? static_cast<A*>(op.partials) + (has_weight ? parameters : 0) : nullptr;
  parallel_for(blocks * tiles, 1, [&, blocks = blocks, tiles = tiles](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t block = i / tiles, tile = i % tiles;
      backward_rows<T>(op, periods * block / blocks, periods * (block + 1) / blocks, op.period * tile / tiles,
                       op.period * (tile + 1) / tiles, at<A>(weight_partials, block * block_stride),
                       at<A>(bias_partials, block * block_stride), stream);
    }
  });
  const auto finish = [&, blocks = blocks](const A* partials, void* gradient) {
    if (gradient == nullptr) return;
    if (op.parameter_dtype == op.dtype) {
      sum_partials<T>(partials, blocks, block_stride, parameters, gradient);
    } else {
      sum_partials<A>(partials, blocks, block_stride, parameters, gradient);
    }
  };
  finish(weight_partials, op.grad_weight);
  finish(bias_partials, op.grad_bias);
}

}  // namespace

void forward(const Forward& op) {
  write_state(read(op.dropout.source), op.dropout.state);
  with_data_type(op.dtype, [&](auto type) {
    using T = decltype(type);
    op.residual != nullptr ? forward_typed<T, true>(op) : forward_typed<T, false>(op);
  });
}

void backward(const Backward& op) {
  if (op.grad_input == nullptr && op.grad_weight == nullptr && op.grad_bias == nullptr) return;
  with_data_type(op.dtype, [&](auto type) { backward_typed<decltype(type)>(op); });
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
