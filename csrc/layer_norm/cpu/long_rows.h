// One to three long rows, fewer than there are threads, are cut into pieces of kPiece columns. The sums over the pieces
// are computed in parallel and added up in the pieces' order; then each piece is written. x is read twice, from memory
// or from the last-level cache. The cut depends only on the shape.
#pragma once

#include <cmath>
#include <vector>

#include "../../common/cpu/moments.h"
#include "backward.h"

namespace dlkit::layer_norm::DLKIT_ISA {
namespace {

constexpr int64_t kPiece = kScratch;

template <class Op>
bool has_few_long_rows(const Op& op) {
  return op.rows < 4 && op.cols >= 4 * kPiece;
}

// Calls f(i, row, begin, end) for each piece of `rows` rows: the i-th piece is columns [begin, end) of `row`.
template <class F>
void for_pieces(int64_t rows, int64_t cols, const F& f) {
  const int64_t pieces = (cols + kPiece - 1) / kPiece;
  parallel_for(rows * pieces, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t begin = i % pieces * kPiece;
      f(i, i / pieces, begin, min64(cols, begin + kPiece));
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
  const int64_t cols = op.cols, pieces = (cols + kPiece - 1) / kPiece;
  const auto normalised = [&](int64_t row) {  // the row to normalize: the sum, once its pieces are written, or x
    return kAdds ? static_cast<const T*>(op.sum) + row * cols : static_cast<const T*>(op.x) + row * op.x_stride;
  };
  std::vector<Moments> found(size_t(op.rows * pieces));  // of each piece
  for_pieces(op.rows, cols, [&](int64_t i, int64_t row, int64_t begin, int64_t end) {
    if constexpr (kAdds) {
      const T* const x = static_cast<const T*>(op.x) + row * op.x_stride;
      const T* const residual = static_cast<const T*>(op.residual) + row * op.residual_stride;
      T* const sum = static_cast<T*>(op.sum) + row * cols;
      for_columns<A, kSlots>(begin, end, [&](int64_t c, int, auto width) DLKIT_INLINE_LAMBDA {
        store(sum + c, load(x + c, width) + load(residual + c, width), width);
      });
    }
    const T* const values = normalised(row) + begin;
    const double count = double(end - begin);
    double centre = 0, totals[2];
    if (!op.rms) {
      double total[1];
      sum_columns<A>(end - begin, total, [&](int64_t c, int, auto width, auto* terms) DLKIT_INLINE_LAMBDA {
        terms[0] += load(values + c, width);
      });
      centre = double(A(total[0] / count));
    }
    sum_columns<A>(end - begin, totals, [&](int64_t c, int, auto width, auto* terms) DLKIT_INLINE_LAMBDA {
      const V d = keep(load(values + c, width) - A(centre), width);
      terms[0] += d;
      terms[1] = fma(d, d, terms[1]);
    });
    if (op.rms) {
      found[i] = {count, 0, 0, totals[1]};
    } else {
      found[i].add(count, centre, totals[0], totals[1]);
    }
  });

  A mean[4] = {}, rest[4] = {}, rstd[4];  // rest: the mean's rounding error
  for (int64_t row = 0; row < op.rows; ++row) {
    Moments all;
    for (int64_t piece = row * pieces; piece < (row + 1) * pieces; ++piece) all.merge(found[piece]);
    mean[row] = A(all.mean);
    if constexpr (std::is_same_v<A, T>) rest[row] = A(all.mean - double(mean[row]) + all.low);
    rstd[row] = A(1 / std::sqrt(all.m2 / all.count + op.eps));
    if (op.mean != nullptr) static_cast<A*>(op.mean)[row] = mean[row];
    if (op.rstd != nullptr) static_cast<A*>(op.rstd)[row] = rstd[row];
  }

  const bool nt_store = should_stream<T>(op.y, op.rows, cols);
  for_pieces(op.rows, cols, [&](int64_t, int64_t row, int64_t begin, int64_t end) {
    const Widened<T> weight = parameter_piece<T>(op, op.weight, row, begin, end);
    const Widened<T> bias = parameter_piece<T>(op, op.bias, row, begin, end);
    const T* const values = normalised(row) + begin;
    T* const y = static_cast<T*>(op.y) + row * cols + begin;
    for_columns<A, kSlots>(0, end - begin, [&](int64_t c, int, auto width) DLKIT_INLINE_LAMBDA {
      const V v = (load(values + c, width) - mean[row] - rest[row]) * rstd[row];
      write(y + c, scaled(v, weight.data, bias.data, c, width), width, nt_store);
    });
  });
}

template <class T>
void backward_long_rows(const Backward& op) {
  using A = accumulate_t<T>;
  using V = Vector<A>;
  const int64_t cols = op.cols, pieces = (cols + kPiece - 1) / kPiece;
  const auto x_of = [&](int64_t row) { return static_cast<const T*>(op.x) + row * op.x_stride; };
  const auto gradient_of = [&](int64_t row) {
    return static_cast<const T*>(op.grad_output) + row * op.grad_output_stride;
  };
  const auto mean_of = [&](int64_t row) { return op.rms ? A(0) : static_cast<const A*>(op.mean)[row]; };
  RowGradients<A> found = {};
  if (op.grad_input != nullptr) {
    std::vector<double> sums(size_t(op.rows * pieces)), products(sums);
    for_pieces(op.rows, cols, [&](int64_t i, int64_t row, int64_t begin, int64_t end) {
      const Widened<T> weight = parameter_piece<T>(op, op.weight, row, begin, end);
      const T *const x = x_of(row) + begin, *const grad_output = gradient_of(row) + begin;
      const A mean = mean_of(row);
      double totals[2];
      sum_columns<A>(end - begin, totals, [&](int64_t c, int, auto width, auto* terms) DLKIT_INLINE_LAMBDA {
        V wdy = load(grad_output + c, width);
        if (weight.data != nullptr) wdy *= load(weight.data + c, width);
        terms[0] += wdy;
        terms[1] = fma(wdy, load(x + c, width) - mean, terms[1]);
      });
      sums[i] = totals[0];
      products[i] = totals[1];
    });
    for (int64_t row = 0; row < op.rows; ++row) {
      double sum = 0, product = 0;
      for (int64_t piece = row * pieces; piece < (row + 1) * pieces; ++piece) {
        sum += sums[piece];
        product += products[piece];
      }
      found.set(op, row, sum, product, double(static_cast<const A*>(op.rstd)[row]));
    }
  }

  const bool nt_store = op.grad_input != nullptr && should_stream<T>(op.grad_input, op.rows, cols);
  // One task takes a piece for all periods, since it owns that piece of the parameters' gradients.
  for_pieces(op.period, cols, [&](int64_t, int64_t place, int64_t begin, int64_t end) {
    const Widened<T> weight = parameter_piece<T>(op, op.weight, place, begin, end);
    alignas(64) A weight_sums[kPiece], bias_sums[kPiece];
    for (int64_t row = place; row < op.rows; row += op.period) {
      const T *const x = x_of(row) + begin, *const grad_output = gradient_of(row) + begin;
      const T* const grad_sum = at<const T>(op.grad_sum, row * op.grad_sum_stride + begin);
      T* const grad_input = at<T>(op.grad_input, row * cols + begin);
      const A mean = mean_of(row), rstd = static_cast<const A*>(op.rstd)[row];
      const V slope = broadcast<A>(found.slope[row]), mean_wdy = broadcast<A>(found.mean_wdy[row]);
      const bool first = row == place;
      for_columns<A, 1>(0, end - begin, [&](int64_t c, int, auto width) DLKIT_INLINE_LAMBDA {
        const V dy = load(grad_output + c, width), centred = load(x + c, width) - mean;
        const V weight_sum = first ? V{} : load(weight_sums + c, All{});
        const V bias_sum = first ? V{} : load(bias_sums + c, All{});
        store(weight_sums + c, fma(dy, centred * rstd, weight_sum), All{});
        store(bias_sums + c, bias_sum + dy, All{});
        if (grad_input == nullptr) return;
        V w = broadcast<A>(1);
        if (weight.data != nullptr) w = load(weight.data + c, width);
        V dx = fma(centred, -slope, fma(dy, w, -mean_wdy)) * rstd;
        if (grad_sum != nullptr) dx += load(grad_sum + c, width);
        write(grad_input + c, dx, width, nt_store);
      });
    }
    const auto finish = [&](void* gradient, const A* piece) {
      if (gradient == nullptr) return;
      const auto copy = [&](auto* to) {
        for_columns<A, kSlots>(0, end - begin, [&](int64_t c, int, auto width) DLKIT_INLINE_LAMBDA {
          store(to + c, load(piece + c, width), width);
        });
      };
      const int64_t offset = place * cols + begin;
      op.parameter_dtype == op.dtype ? copy(static_cast<T*>(gradient) + offset)
                                     : copy(static_cast<A*>(gradient) + offset);
    };
    finish(op.grad_weight, weight_sums);
    finish(op.grad_bias, bias_sums);
  });
}

}  // namespace
}  // namespace dlkit::layer_norm::DLKIT_ISA
