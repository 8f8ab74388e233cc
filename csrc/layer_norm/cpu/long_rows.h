// Long rows are cut into pieces of kPiece columns. A row's sums are those of its pieces, added up in their order: its
// bits depend neither on the other rows nor on the number of threads. Rows go in batches that fit into the last-level
// cache: first the sums of all their pieces, in parallel, then their outputs, column by column.
#pragma once

#include <cmath>
#include <vector>

#include "../../common/cpu/moments.h"
#include "backward.h"

namespace dlkit::layer_norm::DLKIT_ISA {
namespace {

constexpr int64_t kPiece = kScratch;
constexpr int64_t kBatchBytes = int64_t(4) << 20;  // of what is read twice

template <class Op>
bool has_long_rows(const Op& op) {
  return op.cols >= 4 * kPiece;
}

// The rows of a batch, whole periods, where `row_bytes` of each row are read twice.
template <class Op>
int64_t rows_of_batch(const Op& op, int64_t row_bytes) {
  return max64(1, kBatchBytes / (row_bytes * op.period)) * op.period;
}

inline int64_t rows_of_batch(const Backward& op) { return rows_of_batch(op, 2 * op.cols * size_of(op.dtype)); }

constexpr int64_t count_of_pieces(int64_t cols) { return (cols + kPiece - 1) / kPiece; }

// Calls f(row, begin, end) for columns [begin, end) of rows [first, last), kColumns at a time.
template <int64_t kColumns, class F>
void for_pieces(int64_t first, int64_t last, int64_t cols, const F& f) {
  const int64_t pieces = (cols + kColumns - 1) / kColumns;
  parallel_for((last - first) * pieces, 1, [&](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; ++i) {
      const int64_t begin = i % pieces * kColumns;
      f(first + i / pieces, begin, min64(cols, begin + kColumns));
    }
    streaming_fence();
  });
}

// Columns [begin, end) of weight or bias for `row`, widened.
template <class T, class Op>
Widened<T> parameter_piece(const Op& op, const void* parameter, int64_t row, int64_t begin, int64_t end) {
  const int64_t first = row % op.period * op.cols + begin;
  const void* const piece = op.parameter_dtype == DType::F32
                                ? static_cast<const void*>(at<const float>(parameter, first))
                                : at<const T>(parameter, first);
  return {piece, op.parameter_dtype, end - begin};
}

template <class T, bool kAdds>
void forward_long_rows(const Forward& op) {
  using A = accumulate_t<T>;
  using V = Vector<A>;
  const int64_t cols = op.cols, pieces = count_of_pieces(cols);
  const auto normalised = [&](int64_t row) {  // the row to normalize: the sum, once its pieces are written, or x
    return kAdds ? static_cast<const T*>(op.sum) + row * cols : static_cast<const T*>(op.x) + row * op.x_stride;
  };
  const auto add = [&](int64_t row, int64_t begin, int64_t end) {
    const T* const x = static_cast<const T*>(op.x) + row * op.x_stride;
    const T* const residual = static_cast<const T*>(op.residual) + row * op.residual_stride;
    T* const sum = static_cast<T*>(op.sum) + row * cols;
    for_columns<A, kSlots>(begin, end, [&](int64_t c, int, auto width) DLKIT_INLINE_LAMBDA {
      store(sum + c, load(x + c, width) + load(residual + c, width), width);
    });
  };
  const auto moments_of = [&](const T* values, int64_t columns) {
    const double count = double(columns);
    double centre = 0, totals[2];
    if (!op.rms) {
      double total[1];
      sum_columns<A>(columns, total, [&](int64_t c, int, auto width, auto* terms) DLKIT_INLINE_LAMBDA {
        terms[0] += load(values + c, width);
      });
      centre = double(A(total[0] / count));
    }
    sum_columns<A>(columns, totals, [&](int64_t c, int, auto width, auto* terms) DLKIT_INLINE_LAMBDA {
      const V d = keep(load(values + c, width) - A(centre), width);
      terms[0] += d;
      terms[1] = fma(d, d, terms[1]);
    });
    Moments found;
    if (op.rms) {
      found = {count, 0, 0, totals[1]};
    } else {
      found.add(count, centre, totals[0], totals[1]);
    }
    return found;
  };
  struct Statistics {
    A mean, rest, rstd;  // rest: the mean's rounding error
  };
  const auto statistics_of = [&](const Moments* of_pieces) {
    Moments all;
    for (int64_t piece = 0; piece < pieces; ++piece) all.merge(of_pieces[piece]);
    const A mean = A(all.mean);
    const A rest = std::is_same_v<A, T> ? A(all.mean - double(mean) + all.low) : A(0);
    return Statistics{mean, rest, A(1 / std::sqrt(all.m2 / all.count + op.eps))};
  };

  const bool nt_store = should_stream<T>(op.y, op.rows, cols);
  const int64_t batch = rows_of_batch(op, cols * int64_t(sizeof(T)));
  std::vector<Moments> found(size_t(min64(batch, op.rows) * pieces));
  std::vector<Statistics> statistics(size_t(min64(batch, op.rows)));
  for (int64_t first = 0; first < op.rows; first += batch) {
    const int64_t last = min64(op.rows, first + batch);
    for_pieces<kPiece>(first, last, cols, [&](int64_t row, int64_t begin, int64_t end) {
      if constexpr (kAdds) add(row, begin, end);
      found[(row - first) * pieces + begin / kPiece] = moments_of(normalised(row) + begin, end - begin);
    });
    for (int64_t row = first; row < last; ++row) {
      const Statistics& row_statistics = statistics[row - first] = statistics_of(&found[(row - first) * pieces]);
      if (op.mean != nullptr) static_cast<A*>(op.mean)[row] = row_statistics.mean;
      if (op.rstd != nullptr) static_cast<A*>(op.rstd)[row] = row_statistics.rstd;
    }
    // One task takes a tile of the columns in every row, so that it widens its parameters once.
    for_pieces<kTile>(0, op.period, cols, [&](int64_t place, int64_t begin, int64_t end) {
      const Widened<T> weight = parameter_piece<T>(op, op.weight, place, begin, end);
      const Widened<T> bias = parameter_piece<T>(op, op.bias, place, begin, end);
      for (int64_t row = first + place; row < last; row += op.period) {
        const T* const values = normalised(row) + begin;
        T* const y = static_cast<T*>(op.y) + row * cols + begin;
        const auto [mean, rest, rstd] = statistics[row - first];
        const V centre = broadcast<A>(mean), shift = broadcast<A>(rest), scale = broadcast<A>(rstd);
        for_columns<A, kSlots>(0, end - begin, [&](int64_t c, int, auto width) DLKIT_INLINE_LAMBDA {
          V v = load(values + c, width) - centre;
          if constexpr (std::is_same_v<A, T>) v -= shift;
          write(y + c, scaled(v * scale, weight.data, bias.data, c, width), width, nt_store);
        });
      }
    });
  }
}

template <class T>
void backward_long_rows(const Backward& op) {
  using A = accumulate_t<T>;
  using V = Vector<A>;
  const int64_t cols = op.cols, pieces = count_of_pieces(cols);
  const auto x_of = [&](int64_t row) { return static_cast<const T*>(op.x) + row * op.x_stride; };
  const auto gradient_of = [&](int64_t row) {
    return static_cast<const T*>(op.grad_output) + row * op.grad_output_stride;
  };
  const auto mean_of = [&](int64_t row) { return op.rms ? A(0) : static_cast<const A*>(op.mean)[row]; };
  struct Sums {
    double wdy, product;  // of wdy * (x - mean)
  };
  const int64_t batch = rows_of_batch(op);
  std::vector<Sums> found(size_t(min64(batch, op.rows) * pieces));
  std::vector<RowGradient<A>> terms_of(size_t(min64(batch, op.rows)));
  const bool nt_store = op.grad_input != nullptr && should_stream<T>(op.grad_input, op.rows, cols);
  // The parameters' gradients of the batches before.
  A* const weight_partials = op.grad_weight != nullptr ? static_cast<A*>(op.partials) : nullptr;
  A* const bias_partials = at<A>(op.partials, op.grad_weight != nullptr ? op.period * cols : 0);

  for (int64_t first = 0; first == 0 || first < op.rows; first += batch) {  // without rows, the gradients become zero
    const int64_t last = min64(op.rows, first + batch);
    if (op.grad_input != nullptr) {
      for_pieces<kPiece>(first, last, cols, [&](int64_t row, int64_t begin, int64_t end) {
        const Widened<T> weight = parameter_piece<T>(op, op.weight, row, begin, end);
        const T *const x = x_of(row) + begin, *const grad_output = gradient_of(row) + begin;
        const V mean = broadcast<A>(mean_of(row));
        double totals[2];
        sum_columns<A>(end - begin, totals, [&](int64_t c, int, auto width, auto* terms) DLKIT_INLINE_LAMBDA {
          V wdy = load(grad_output + c, width);
          if (weight.data != nullptr) wdy *= load(weight.data + c, width);
          terms[0] += wdy;
          terms[1] = fma(wdy, load(x + c, width) - mean, terms[1]);
        });
        found[(row - first) * pieces + begin / kPiece] = {totals[0], totals[1]};
      });
      for (int64_t row = first; row < last; ++row) {
        Sums all = {};
        for (int64_t piece = 0; piece < pieces; ++piece) {
          all.wdy += found[(row - first) * pieces + piece].wdy;
          all.product += found[(row - first) * pieces + piece].product;
        }
        terms_of[row - first] = row_gradient<A>(op, all.wdy, all.product, double(static_cast<const A*>(op.rstd)[row]));
      }
    }
    // As in forward; the task owns its tile of the parameters' gradients.
    for_pieces<kTile>(0, op.period, cols, [&](int64_t place, int64_t begin, int64_t end) {
      const Widened<T> weight = parameter_piece<T>(op, op.weight, place, begin, end);
      alignas(64) A weight_sums[kTile] = {}, bias_sums[kTile] = {};
      for (int64_t row = first + place; row < last; row += op.period) {
        const T *const x = x_of(row) + begin, *const grad_output = gradient_of(row) + begin;
        const T* const grad_sum = at<const T>(op.grad_sum, row * op.grad_sum_stride + begin);
        T* const grad_input = at<T>(op.grad_input, row * cols + begin);
        const V mean = broadcast<A>(mean_of(row)), rstd = broadcast<A>(static_cast<const A*>(op.rstd)[row]);
        const V slope = broadcast<A>(terms_of[row - first].slope);
        const V mean_wdy = broadcast<A>(terms_of[row - first].mean_wdy);
        for_columns<A, 1>(0, end - begin, [&](int64_t c, int, auto width) DLKIT_INLINE_LAMBDA {
          const V dy = load(grad_output + c, width), centred = load(x + c, width) - mean;
          store(weight_sums + c, fma(dy, centred * rstd, load(weight_sums + c, All{})), All{});
          store(bias_sums + c, load(bias_sums + c, All{}) + dy, All{});
          if (grad_input == nullptr) return;
          V w = broadcast<A>(1);
          if (weight.data != nullptr) w = load(weight.data + c, width);
          V dx = fma(centred, -slope, fma(dy, w, -mean_wdy)) * rstd;
          if (grad_sum != nullptr) dx += load(grad_sum + c, width);
          write(grad_input + c, dx, width, nt_store);
        });
      }
      const int64_t offset = place * cols + begin;
      const auto finish = [&](const A* sums, A* partials, void* gradient) {
        if (gradient == nullptr) return;
        const auto add_to = [&](auto* to) {
          for_columns<A, kSlots>(0, end - begin, [&](int64_t c, int, auto width) DLKIT_INLINE_LAMBDA {
            V sum = load(sums + c, width);
            if (first > 0) sum += load(partials + offset + c, width);
            store(to + offset + c, sum, width);
          });
        };
        if (last < op.rows) {
          add_to(partials);
        } else if (op.parameter_dtype == op.dtype) {
          add_to(static_cast<T*>(gradient));
        } else {
          add_to(static_cast<A*>(gradient));
        }
      };
      finish(weight_sums, weight_partials, op.grad_weight);
      finish(bias_sums, bias_partials, op.grad_bias);
    });
  }
}

}  // namespace
}  // namespace dlkit::layer_norm::DLKIT_ISA
