// channels_last: a unit is a matrix of rows by channels.
#pragma once

#include <utility>

#include "shared.h"

namespace dlkit::batch_norm::DLKIT_ISA {
namespace {

// Few channels leave most of a vector empty. So `fold` rows of them are taken as one row of as many times their number,
// where they divide: 32 pixels of 3 channels as 96 columns. What belongs to a channel is then in `fold` places.
struct Matrix {
  int64_t channels, fold;
  int64_t rows, cols;
  int64_t pitch;  // of arrays with one value a column: whole vectors of any type
  explicit Matrix(const Shape& shape) : channels(shape.channels), fold(1) {
    const int64_t all_rows = shape.groups > 0 ? shape.space : shape.batch * shape.space;
    while (channels < 16 && channels * fold % 32 != 0 && all_rows % (2 * fold) == 0 && all_rows >= 1024) fold *= 2;
    rows = all_rows / fold;
    cols = channels * fold;
    pitch = (cols + 15) / 16 * 16;
  }
  double count() const { return double(rows * fold); }  // of a channel's elements

  // Copies what was found for each channel to all of its places.
  template <class A>
  void unfold(A* values) const {
    for (int64_t i = channels; i < cols; ++i) values[i] = values[i - channels];
  }

  // Whether every row of an output, which may be absent, is whole aligned cache lines.
  template <class T>
  bool has_whole_lines(const void* output) const {
    return cols * int64_t(sizeof(T)) % 64 == 0 && uintptr_t(output) % 64 == 0;
  }
};

// Calls f(row, count) for groups of up to kRowsTogether rows; count is a constant.
template <class F>
DLKIT_INLINE void for_rows(int64_t begin, int64_t end, const F& f) {
  int64_t row = begin;
  for (; row + kRowsTogether <= end; row += kRowsTogether) f(row, std::integral_constant<int, kRowsTogether>());
  for (; row < end; ++row) f(row, std::integral_constant<int, 1>());
}

// The same, block by block from the end; within a block forwards, which is what the processor fetches ahead.
template <class T, class F>
DLKIT_INLINE void for_rows_backwards(int64_t begin, int64_t end, int64_t cols, const F& f) {
  const int64_t block = max64(1, kBlockBytes / (cols * int64_t(sizeof(T)) * kRowsTogether)) * kRowsTogether;
  for (int64_t first = begin + (end - begin - 1) / block * block; first >= begin; first -= block) {
    for_rows(first, min64(end, first + block), f);
  }
}

// Room for one part: double sums and fp32 ones of each channel; the first part's fp32 arrays then serve the unit.
template <class A>
struct Scratch {
  static constexpr bool kHasLow = std::is_same_v<A, double>;
  double *first, *second;     // mean and m2, or sums of g and of g * (x - mean)
  double* low;                // of fp64 means, as in Moments; what is left of them in fp32 is far below the elements
  A *centre, *sums, *others;  // while a part is reduced
  A *mean, *scale, *bias, *offset, *slope;
  static int64_t bytes(int64_t pitch) { return pitch * int64_t((kHasLow ? 3 : 2) * sizeof(double) + 5 * sizeof(A)); }
  Scratch(void* workspace, int64_t part, int64_t pitch) {
    char* const start = static_cast<char*>(workspace) + part * bytes(pitch);
    first = reinterpret_cast<double*>(start);
    second = first + pitch;
    low = kHasLow ? second + pitch : nullptr;
    mean = centre = reinterpret_cast<A*>(second + (kHasLow ? 2 : 1) * pitch);
    scale = sums = centre + pitch;
    bias = others = sums + pitch;
    offset = others + pitch;
    slope = offset + pitch;
  }
  double low_of(int64_t i) const { return kHasLow ? low[i] : 0; }
  Moments moments(int64_t i, double count) const { return {count, first[i], low_of(i), second[i]}; }
  void keep_moments(int64_t i, const Moments& moments) const {
    first[i] = moments.mean;
    second[i] = moments.m2;
    if (kHasLow) low[i] = moments.low;
  }
  DLKIT_INLINE_MEMBER Channel<Vector<A>> forward_channel(int64_t i) const {
    return {load(mean + i, All{}), load(scale + i, All{}), load(bias + i, All{}), Vector<A>{}, Vector<A>{}};
  }
  DLKIT_INLINE_MEMBER Channel<Vector<A>> channel(int64_t i) const {
    return {load(mean + i, All{}), load(scale + i, All{}), load(bias + i, All{}), load(offset + i, All{}),
            load(slope + i, All{})};
  }
};

// Mean, scale and bias of each column of a unit.
template <class Op, class A>
void spread_statistics(const Op& op, const Scratch<A>& own, const Matrix& matrix, int64_t unit) {
  const Shape& shape = op.shape;
  const int64_t statistics = shape.groups > 0 ? shape.groups : shape.channels, size = shape.channels / statistics;
  const A* const mean = static_cast<const A*>(op.mean) + unit * shape.groups;
  const A* const rstd = static_cast<const A*>(op.rstd) + unit * shape.groups;
  read_all(op.weight, op.parameter_dtype, A(1), shape.channels, own.scale);
  read_all(op.bias, op.parameter_dtype, A(0), shape.channels, own.bias);
  for (int64_t g = 0; g < statistics; ++g) {
    for (int64_t i = g * size; i < (g + 1) * size; ++i) {
      own.mean[i] = mean[g];
      own.scale[i] *= rstd[g];
    }
  }
  for (A* values : {own.mean, own.scale, own.bias}) matrix.unfold(values);
}

// Asks for the same columns of the next rows, each cache line once. Several rows at a time are more than the
// processor's own prefetching follows: 3.9 -> 2.5 ms for 64x256x28x28 bf16.
template <int kCount, class T>
DLKIT_INLINE void fetch_rows_ahead(const T* rows, int64_t i, int64_t cols) {
  constexpr int64_t kLine = 64 / int64_t(sizeof(T)), kStep = kLanes<accumulate_t<T>>;
  if (kCount == 1 || (kStep < kLine && i % kLine != 0)) return;
  repeat(std::integral_constant<int, kCount>(),
         [&](int r) DLKIT_INLINE_LAMBDA { prefetch<(kStep > kLine ? kStep : kLine)>(rows + (kCount + r) * cols + i); });
}

// Adds [cols] sums kept in A to ones kept in double.
template <class A>
void add_to(double* totals, A* sums, int64_t cols) {
  for (int64_t i = 0; i < cols; ++i) {
    totals[i] += double(sums[i]);
    sums[i] = 0;
  }
}

template <class T>
struct ForwardChannelsLast {
  using A = accumulate_t<T>;
  using V = Vector<A>;
  const Forward& op;
  double factor;
  Matrix matrix;

  Scratch<A> scratch(int64_t unit, int64_t part, int64_t parts) const {
    return {op.workspace, unit * parts + part, matrix.pitch};
  }
  const T* rows_of(const void* tensor, int64_t unit) const {
    return tensor == nullptr ? nullptr : static_cast<const T*>(tensor) + unit * matrix.rows * matrix.cols;
  }

  void reduce(int64_t unit, int64_t part, int64_t parts) const {
    const int64_t cols = matrix.cols, begin = matrix.rows * part / parts, end = matrix.rows * (part + 1) / parts;
    const T* const x = rows_of(op.x, unit);
    const Scratch<A> own = scratch(unit, part, parts);
    if (end - begin == 1) {  // group_norm of [N, C]
      for (int64_t i = 0; i < cols; ++i) own.first[i] = double(widen(x[begin * cols + i])), own.second[i] = 0;
      if constexpr (own.kHasLow) memset(own.low, 0, size_t(matrix.pitch) * sizeof(double));
      return;
    }
    const int64_t some = min64(end - begin, kFirstRunRows);
    for_columns<A, 1>(0, cols, [&](int64_t i, int, auto width) DLKIT_INLINE_LAMBDA {
      V total = {};
      for (int64_t row = begin; row < begin + some; ++row) total += load(x + row * cols + i, width);
      const V centre = total * A(1.0 / double(some));
      store(own.centre + i, centre - centre == 0 ? centre : V{}, All{});
    });
    for (double* zero : {own.first, own.second, own.low}) {
      if (zero != nullptr) memset(zero, 0, size_t(matrix.pitch) * sizeof(double));
    }
    for (int64_t first = begin, last; first < end; first = last) {
      last = min64(end, first + (first == begin ? kFirstRunRows : min64(kRunRows, 4 * (first - begin))));
      memset(own.sums, 0, size_t(matrix.pitch) * sizeof(A));
      memset(own.others, 0, size_t(matrix.pitch) * sizeof(A));
      for_rows(first, last, [&](int64_t row, auto together) DLKIT_INLINE_LAMBDA {
        for_columns<A, 1>(0, cols, [&](int64_t i, int, auto width) DLKIT_INLINE_LAMBDA {
          const V centre = load(own.centre + i, All{});
          // First among themselves: a quarter of the additions to what has grown large.
          fetch_rows_ahead<together()>(x + row * cols, i, cols);
          V sum = {}, squares = {};
          repeat(together, [&](int r) DLKIT_INLINE_LAMBDA {
            const V d = keep(load(x + (row + r) * cols + i, width) - centre, width);
            sum += d;
            squares = fma(d, d, squares);
          });
          store(own.sums + i, load(own.sums + i, All{}) + sum, All{});
          store(own.others + i, load(own.others + i, All{}) + squares, All{});
        });
      });
      merge(own, cols, double(first - begin), double(last - first));
    }
  }

  // Each channel's moments of `count` rows and the sums over n more, into the moments of all. The divisions are the
  // same for every channel.
  static void merge(const Scratch<A>& own, int64_t cols, double count, double n) {
    if constexpr (Scratch<A>::kHasLow) {
      for (int64_t i = 0; i < cols; ++i) {
        Moments moments = own.moments(i, count);
        moments.add(n, own.centre[i], own.sums[i], own.others[i]);
        own.keep_moments(i, moments);
        own.centre[i] = finite_or_zero(moments.mean);
      }
      return;
    }
    const double inverse = 1 / n, old_share = count / (count + n), share = n / (count + n), between = old_share * n;
    double *const means = own.first, *const m2s = own.second;
    A *const centres = own.centre, *const sums = own.sums, *const squares = own.others;
#pragma GCC ivdep
    for (int64_t i = 0; i < cols; ++i) {
      const double sum = double(sums[i]), mean = double(centres[i]) + sum * inverse, delta = mean - means[i];
      const double m2 = double(squares[i]) - sum * sum * inverse;
      m2s[i] += (m2 < 0 ? 0 : m2) + delta * delta * between;
      means[i] = means[i] * old_share + mean * share;
      centres[i] = means[i] - means[i] == 0 ? A(means[i]) : A(0);
    }
  }

  // Each channel's moments over all parts, into the first part's room.
  void merge_parts(int64_t unit, int64_t parts) const {
    const Scratch<A> all = scratch(unit, 0, parts);
    for (int64_t part = 1; part < parts; ++part) {
      const Scratch<A> some = scratch(unit, part, parts);
      const int64_t begin = matrix.rows * part / parts, end = matrix.rows * (part + 1) / parts;
      for (int64_t i = 0; i < matrix.cols; ++i) {
        Moments moments = all.moments(i, double(begin));
        moments.merge(some.moments(i, double(end - begin)));
        all.keep_moments(i, moments);
      }
    }
  }

  void finish(int64_t unit, int64_t parts) const {
    const Shape& shape = op.shape;
    const int64_t statistics = shape.groups > 0 ? shape.groups : shape.channels, size = shape.channels / statistics;
    const Scratch<A> own = scratch(unit, 0, parts);
    if (op.statistics == Statistics::Compute) {
      merge_parts(unit, parts);
      const T* const x = rows_of(op.x, unit);
      for (int64_t column = 0; column < matrix.cols; ++column) {
        add_large_in_double<A>(double(matrix.rows), own.first[column], own.second[column],
                               [&](int64_t row) { return double(widen(x[row * matrix.cols + column])); });
      }
      for (int64_t i = 0; i < matrix.channels && matrix.fold > 1; ++i) {
        Moments moments = own.moments(i, double(matrix.rows));
        for (int64_t column = i + matrix.channels; column < matrix.cols; column += matrix.channels) {
          moments.merge(own.moments(column, double(matrix.rows)));
        }
        own.keep_moments(i, moments);
      }
      for (int64_t g = 0; g < statistics && size > 1; ++g) {
        double mean = 0, m2 = 0;
        for (int64_t i = g * size; i < (g + 1) * size; ++i) mean += own.first[i];
        mean /= double(size);
        for (int64_t i = g * size; i < (g + 1) * size; ++i) {
          const double delta = own.first[i] - mean + own.low_of(i);
          m2 += own.second[i] + delta * delta * matrix.count();
        }
        own.first[g] = mean;
        own.second[g] = m2;
      }
      finish_groups<A>(op, unit * statistics, statistics, own.first, own.second, matrix.count() * double(size), factor);
    } else {
      finish_given_groups<A>(op, 0, statistics);
    }
    spread_statistics(op, own, matrix, unit);
  }

  void apply(int64_t unit, int64_t part, int64_t parts) const {
    const AfterNorm<A> after(op);
    const bool nt_store = matrix.has_whole_lines<T>(op.y) && should_stream<T>(op.shape, matrix.rows * matrix.cols);
    const int64_t cols = matrix.cols, begin = matrix.rows * part / parts, end = matrix.rows * (part + 1) / parts;
    const Scratch<A> own = scratch(unit, 0, parts);
    const T *const x = rows_of(op.x, unit), *const residual = rows_of(op.residual, unit);
    T* const y = const_cast<T*>(rows_of(op.y, unit));
    for_rows_backwards<T>(begin, end, cols, [&](int64_t row, auto together) DLKIT_INLINE_LAMBDA {
      RowsInTurns<T, together()> outputs;
      for_columns<A, 1>(0, cols, [&](int64_t i, int, auto width) DLKIT_INLINE_LAMBDA {
        const Channel<V> c = own.forward_channel(i);
        fetch_rows_ahead<together()>(x + row * cols, i, cols);
        if (residual != nullptr) fetch_rows_ahead<together()>(residual + row * cols, i, cols);
        const auto index = [&](int r) DLKIT_INLINE_LAMBDA { return (row + r) * cols + i; };
        forward_values<together()>(x, residual, after, width, c, index, [&](const auto& z) DLKIT_INLINE_LAMBDA {
          outputs.write(z, i, width, nt_store, [&](int r) DLKIT_INLINE_LAMBDA { return y + index(r); });
        });
      });
    });
    if (nt_store) streaming_fence();
  }
};

template <class T>
struct BackwardChannelsLast {
  using A = accumulate_t<T>;
  using V = Vector<A>;
  const Backward& op;
  Matrix matrix;

  Scratch<A> scratch(int64_t unit, int64_t part, int64_t parts) const {
    return {op.workspace, unit * parts + part, matrix.pitch};
  }
  template <class Pointer>
  auto rows_of(Pointer* tensor, int64_t unit) const {
    using Element = std::conditional_t<std::is_const_v<Pointer>, const T, T>;
    return tensor == nullptr ? nullptr : static_cast<Element*>(tensor) + unit * matrix.rows * matrix.cols;
  }

  bool nt_stores() const {
    return matrix.has_whole_lines<T>(op.grad_input) && matrix.has_whole_lines<T>(op.grad_residual) &&
           !is_applied_in_place(op) && should_stream<T>(op.shape, matrix.rows * matrix.cols);
  }

  void reduce(int64_t unit, int64_t part, int64_t parts) const {
    const Passing<T> passing = Passing<T>(op, mask_of(op)).from(unit * matrix.rows * matrix.cols);
    const bool nt_store = nt_stores();
    const int64_t cols = matrix.cols, begin = matrix.rows * part / parts, end = matrix.rows * (part + 1) / parts;
    const T *const x = rows_of(op.x, unit), *const grad_output = rows_of(op.grad_output, unit);
    T* const grad_input = op.statistics_given ? rows_of(op.grad_input, unit) : nullptr;
    T* const passed = rows_of(passed_gradient(op), unit);
    const Scratch<A> own = scratch(unit, part, parts);
    A *const g_sums = own.offset, *const gx_sums = own.slope;  // not yet what they are named for
    spread_statistics(op, own, matrix, unit);
    for (double* sums : {own.first, own.second}) memset(sums, 0, size_t(matrix.pitch) * sizeof(double));
    for (A* sums : {g_sums, gx_sums}) memset(sums, 0, size_t(matrix.pitch) * sizeof(A));
    for (int64_t first = begin; first < end; first += kRunRows) {
      for_rows(first, min64(end, first + kRunRows), [&](int64_t row, auto together) DLKIT_INLINE_LAMBDA {
        RowsInTurns<T, together()> residuals, inputs;
        for_columns<A, 1>(0, cols, [&](int64_t i, int, auto width) DLKIT_INLINE_LAMBDA {
          const Channel<V> c = own.forward_channel(i);
          fetch_rows_ahead<together()>(x + row * cols, i, cols);
          fetch_rows_ahead<together()>(grad_output + row * cols, i, cols);
          if (passing.source != nullptr) fetch_rows_ahead<together()>(passing.source + row * cols, i, cols);
          V g_sum = {}, gx_sum = {};
          const auto index = [&](int r) DLKIT_INLINE_LAMBDA { return (row + r) * cols + i; };
          V centred[together()], g[together()];
          repeat(together, [&](int r) DLKIT_INLINE_LAMBDA { centred[r] = load(x + index(r), width) - c.mean; });
          masked_gradients(passing, grad_output, width, centred, c, g, index);
          repeat(together, [&](int r) DLKIT_INLINE_LAMBDA {
            g_sum += g[r];
            gx_sum = fma(g[r], centred[r], gx_sum);
          });
          if (passed != nullptr) {
            residuals.write(g, i, width, nt_store, [&](int r) DLKIT_INLINE_LAMBDA { return passed + index(r); });
          }
          if (grad_input != nullptr) {
            repeat(together, [&](int r) DLKIT_INLINE_LAMBDA { g[r] *= c.scale; });
            inputs.write(g, i, width, nt_store, [&](int r) DLKIT_INLINE_LAMBDA { return grad_input + index(r); });
          }
          store(g_sums + i, load(g_sums + i, All{}) + g_sum, All{});
          store(gx_sums + i, load(gx_sums + i, All{}) + gx_sum, All{});
        });
      });
      add_to(own.first, g_sums, cols);
      add_to(own.second, gx_sums, cols);
    }
    if (nt_store) streaming_fence();
  }

  void finish(int64_t unit, int64_t parts) const {
    const Shape& shape = op.shape;
    const int64_t channels = matrix.channels;
    const Scratch<A> all = scratch(unit, 0, parts);
    if (op.sums_given) {
      const A* const given = static_cast<const A*>(op.sums);
      for (int64_t i = 0; i < channels; ++i) all.first[i] = given[i], all.second[i] = given[channels + i];
    } else {
      for (int64_t part = 1; part < parts; ++part) {
        const Scratch<A> some = scratch(unit, part, parts);
        for (int64_t i = 0; i < matrix.cols; ++i) all.first[i] += some.first[i], all.second[i] += some.second[i];
      }
      for (int64_t column = channels; column < matrix.cols; ++column) {
        all.first[column % channels] += all.first[column];
        all.second[column % channels] += all.second[column];
      }
    }
    spread_statistics(op, all, matrix, unit);
    const int64_t size = shape.groups > 0 ? shape.channels / shape.groups : 1;
    const A* const rstd = static_cast<const A*>(op.rstd) + unit * shape.groups;
    read_all(op.weight, op.parameter_dtype, A(1), channels, all.offset);  // the weight until the offset is known
    for (int64_t first = 0; first < channels; first += size) {
      double g = 0, gx = 0;
      for (int64_t i = first; i < first + size; ++i) {
        g += double(all.offset[i]) * all.first[i];
        gx += double(all.offset[i]) * all.second[i];
      }
      const auto [offset, slope] = GroupGradient<A>(op, rstd[first / size], g, gx);
      for (int64_t i = first; i < first + size; ++i) all.offset[i] = offset, all.slope[i] = slope;
    }
    matrix.unfold(all.offset);
    matrix.unfold(all.slope);
    if (shape.groups > 0 || op.sums_given) return;
    for (int64_t i = 0; i < channels; ++i) check_range<A>(op, all.first[i]), check_range<A>(op, all.second[i]);
    A* const sums = static_cast<A*>(op.sums);
    for (int64_t i = 0; sums != nullptr && i < channels; ++i) {
      sums[i] = A(all.first[i]);
      sums[channels + i] = A(all.second[i]);
    }
    for (int64_t i = 0; i < channels; ++i) all.second[i] *= double(rstd[i]);
    write_values(op.grad_weight, op.parameter_dtype, 0, channels, all.second);
    write_values(op.grad_bias, op.parameter_dtype, 0, channels, all.first);
  }

  void apply(int64_t unit, int64_t part, int64_t parts) const {
    const Passing<T> passing = Passing<T>(op, applied_mask(op)).from(unit * matrix.rows * matrix.cols);
    const bool nt_store = nt_stores();
    const int64_t cols = matrix.cols, begin = matrix.rows * part / parts, end = matrix.rows * (part + 1) / parts;
    const Scratch<A> own = scratch(unit, 0, parts);
    const T *const x = rows_of(op.x, unit), *const grad_output = rows_of(applied_gradient(op), unit);
    T* const grad_input = rows_of(op.grad_input, unit);
    T* const grad_residual = op.sums_given ? rows_of(op.grad_residual, unit) : nullptr;
    for_rows_backwards<T>(begin, end, cols, [&](int64_t row, auto together) DLKIT_INLINE_LAMBDA {
      RowsInTurns<T, together()> residuals, inputs;
      for_columns<A, 1>(0, cols, [&](int64_t i, int, auto width) DLKIT_INLINE_LAMBDA {
        const Channel<V> c = own.channel(i);
        fetch_rows_ahead<together()>(x + row * cols, i, cols);
        fetch_rows_ahead<together()>(grad_output + row * cols, i, cols);
        if (passing.source != nullptr) fetch_rows_ahead<together()>(passing.source + row * cols, i, cols);
        const auto index = [&](int r) DLKIT_INLINE_LAMBDA { return (row + r) * cols + i; };
        const auto write_to = [&](auto& rows, T* output) DLKIT_INLINE_LAMBDA {
          return [&, output](const auto& g) DLKIT_INLINE_LAMBDA {
            if (output == nullptr) return;
            rows.write(g, i, width, nt_store, [&](int r) DLKIT_INLINE_LAMBDA { return output + index(r); });
          };
        };
        backward_values<together()>(passing, x, grad_output, width, c, index, write_to(residuals, grad_residual),
                                    write_to(inputs, grad_input));
      });
    });
    if (nt_store) streaming_fence();
  }
};

}  // namespace
}  // namespace dlkit::batch_norm::DLKIT_ISA
