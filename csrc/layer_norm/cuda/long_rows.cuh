// Rows too long for one block. They are cut into pieces, whose size depends only on the row's length: a row has the
// same bits whatever other rows there are, and a single row gets as many blocks as each of many.
//
//   forward    forward_moments reads x and leaves each piece's moments (and writes sum); forward_apply merges the
//              moments of its row, in a fixed order, reads x again and writes y: 3 units of one tensor.
//   backward   backward_sums reads x and grad_output and leaves each piece's two sums; backward_columns reads both
//              again, writes grad_input and adds up the parameters' gradients as it walks down its columns: 5 units.
//
// Predicted for 1 x 1,048,576 in fp32 on an H200: 128 pieces, each block with its 32 KB in flight at once, the second
// read out of L2: some 2 us a kernel, 5 us for forward, where one block a row took 100 us (40 to 80 GB/s).
#pragma once

#include "shared.cuh"

namespace dlkit::layer_norm {
namespace {

using namespace dlkit::cuda;

// A unit is the part of a row that a block holds in registers: 32 KB. With an odd width or address it is 8 K elements
// in fp32, and 4 K in 16 bits and fp64, where more would spill.
template <class T, int PackBytes>
constexpr int unit_packs = PackBytes == 16 ? 4 : (sizeof(T) == 4 ? 16 : 8);  // of a thread
template <class T, int PackBytes>
constexpr int long_resident = PackBytes == 16 && sizeof(T) <= 4 ? 2 : 1;  // blocks: others need 64 to 128 registers

// A piece is one unit, or more where a row would have more than 1024 pieces: every block of a row reads the moments of
// all of them.
struct Pieces {
  int64_t packs, count;  // of a piece; pieces of a row
};

template <class T, int PackBytes>
Pieces pieces_of(int64_t row_packs) {
  constexpr int64_t unit = long_threads * unit_packs<T, PackBytes>;
  const int64_t packs = unit * divide_up(row_packs, unit * 1024);
  return {packs, divide_up(row_packs, packs)};
}

// A block's piece of a row, in packs.
struct Piece {
  int64_t row, begin, end;

  __device__ __forceinline__ Piece(const Pieces& pieces, int64_t block, int64_t row_packs) {
    row = block / pieces.count;
    begin = (block - row * pieces.count) * pieces.packs;
    end = begin + pieces.packs < row_packs ? begin + pieces.packs : row_packs;
  }
};

// Calls f(i, at) for each of this thread's packs in the unit that begins at `first`.
template <class T, int PackBytes, class F>
__device__ __forceinline__ void each_pack(int64_t first, int64_t end, const F& f) {
#pragma unroll
  for (int i = 0; i < unit_packs<T, PackBytes>; ++i) {
    const int64_t at = first + threadIdx.x + i * long_threads;
    if (at < end) f(i, at);
  }
}

// Count, mean, the sum of deviations from that mean (not 0, since the mean is rounded) and the sum of their squares.
template <class A>
struct RowMoments {
  static constexpr int size = 4;
  A at[size];

  __device__ __forceinline__ void merge(const RowMoments& other) {
    if (other.at[0] == A(0)) return;
    if (at[0] == A(0)) {
      *this = other;
      return;
    }
    const A total = at[0] + other.at[0], share = other.at[0] / total;
    const A mean = at[1] * (A(1) - share) + other.at[1] * share;  // not by the difference: an infinity must stay one
    const A shift = at[1] - mean, other_shift = other.at[1] - mean;
    at[3] = at[3] + shift * (2 * at[2] + at[0] * shift) +
            (other.at[3] + other_shift * (2 * other.at[2] + other.at[0] * other_shift));
    at[2] = at[2] + at[0] * shift + (other.at[2] + other.at[0] * other_shift);
    at[1] = mean;
    at[0] = total;
  }
};

// Partial results are [3, rows * pieces]: mean, and the two sums.
template <class T, int PackBytes>
__global__ void __launch_bounds__(long_threads, (long_resident<T, PackBytes>))
    forward_moments(const Forward op, const Pieces pieces) {
  using A = accumulate_t<T>;
  constexpr int width = PackBytes / sizeof(T);
  constexpr int64_t unit = long_threads * unit_packs<T, PackBytes>;
  __shared__ A exchange[long_threads / 32][1], deviation_exchange[2][long_threads / 32][deviation_sums<T>];
  const int64_t blocks = op.rows * pieces.count;
  int turn = 0;
  for (int64_t block = blockIdx.x; block < blocks; block += gridDim.x) {
    const Piece piece(pieces, block, op.cols / width);
    RowMoments<A> moments{};
    for (int64_t first = piece.begin; first < piece.end; first += unit, turn ^= 1) {
      Pack<PackBytes> values[unit_packs<T, PackBytes>];
      each_pack<T, PackBytes>(first, piece.end, [&](int i, int64_t at) {
        values[i] = load_once<PackBytes>(row_of<T>(op.x, piece.row, op.x_stride) + at * width);
      });
      if (op.residual != nullptr) {
        each_pack<T, PackBytes>(first, piece.end, [&](int i, int64_t at) {
          const T* residual = row_of<T>(op.residual, piece.row, op.residual_stride) + at * width;
          values[i] = add<T, PackBytes>(values[i], load_once<PackBytes>(residual));
          store<PackBytes>(static_cast<T*>(op.sum) + piece.row * op.cols + at * width, values[i]);
        });
      }
      const A count = A((piece.end - first < unit ? piece.end - first : unit) * width);
      A mean = 0;
      if (!op.rms) {
        A sum[1] = {0};
        each_pack<T, PackBytes>(first, piece.end, [&](int i, int64_t) { sum[0] += pack_sum<T, PackBytes>(values[i]); });
        group_sum<long_threads>(sum, exchange);
        mean = sum[0] / count;
      }
      A deviations[deviation_sums<T>] = {0};
      each_pack<T, PackBytes>(first, piece.end,
                              [&](int i, int64_t) { add_deviations<T, PackBytes>(values[i], mean, deviations); });
      group_sum<long_threads>(deviations, deviation_exchange[turn]);
      A rest = 0;
      if constexpr (deviation_sums<T> == 2) rest = op.rms ? A(0) : deviations[1];
      moments.merge({{count, mean, rest, deviations[0]}});
    }
    if (threadIdx.x == 0) {
      A* to = static_cast<A*>(op.partials) + block;
#pragma unroll
      for (int i = 0; i < 3; ++i) to[i * blocks] = moments.at[1 + i];
    }
  }
}

template <class T, int PackBytes>
__global__ void __launch_bounds__(long_threads, (long_resident<T, PackBytes>))
    forward_apply(const Forward op, const Pieces pieces) {
  using A = accumulate_t<T>;
  constexpr int width = PackBytes / sizeof(T);
  constexpr int64_t unit = long_threads * unit_packs<T, PackBytes>;
  __shared__ A exchange[long_threads / 2 * RowMoments<A>::size];
  __shared__ Statistics<A> of_row;
  const int64_t blocks = op.rows * pieces.count, row_packs = op.cols / width;
  for (int64_t block = blockIdx.x; block < blocks; block += gridDim.x) {
    const Piece piece(pieces, block, row_packs);
    const T* const source =
        op.residual != nullptr ? row_of<T>(op.sum, piece.row, op.cols) : row_of<T>(op.x, piece.row, op.x_stride);
    Pack<PackBytes> values[unit_packs<T, PackBytes>];
    const auto fetch = [&](int64_t first) {
      each_pack<T, PackBytes>(first, piece.end,
                              [&](int i, int64_t at) { values[i] = load<PackBytes>(source + at * width); });
    };
    fetch(piece.begin);  // on its way while the moments are merged

    RowMoments<A> moments{};
    for (int64_t i = threadIdx.x; i < pieces.count; i += long_threads) {
      const A* from = static_cast<const A*>(op.partials) + piece.row * pieces.count + i;
      const int64_t left = row_packs - i * pieces.packs;
      moments.merge(
          {{A((left < pieces.packs ? left : pieces.packs) * width), from[0], from[blocks], from[2 * blocks]}});
    }
    merge_threads(moments, 1, 32, 1, long_threads / 32, exchange);
    if (threadIdx.x == 0) {
      A deviations[deviation_sums<T>] = {moments.at[3]};
      if constexpr (deviation_sums<T> == 2) deviations[1] = moments.at[2];
      of_row = statistics_of(op, moments.at[1], deviations);
      if (piece.begin == 0) store_statistics(op, piece.row, of_row.mean, of_row.rstd);
    }
    __syncthreads();
    const Statistics<A> statistics = of_row;
    for (int64_t first = piece.begin; first < piece.end; first += unit) {
      if (first > piece.begin) fetch(first);
      each_pack<T, PackBytes>(first, piece.end, [&](int i, int64_t at) {
        store<PackBytes>(static_cast<T*>(op.y) + piece.row * op.cols + at * width,
                         normalize<T, PackBytes>(op, values[i], at * width, statistics));
      });
    }
  }
}

// The sums of wdy and of wdy * xhat over each piece, [rows * pieces, 2], to `row_sums`. PackBytes comes first, since
// check_sass.py expects wide stores where it comes second, and this kernel has none. Without a number of resident
// blocks in its launch bounds ptxas spills for sm_100.
template <int PackBytes, class T>
__global__ void __launch_bounds__(long_threads, 1)
    backward_sums(const Backward op, const Pieces pieces, accumulate_t<T>* row_sums) {
  using A = accumulate_t<T>;
  constexpr int width = PackBytes / sizeof(T);
  constexpr int64_t unit = long_threads * unit_packs<T, PackBytes>;
  __shared__ A exchange[2][long_threads / 32][2];
  int turn = 0;
  for (int64_t block = blockIdx.x; block < op.rows * pieces.count; block += gridDim.x) {
    const Piece piece(pieces, block, op.cols / width);
    const A mean = op.mean != nullptr ? static_cast<const A*>(op.mean)[piece.row] : A(0);
    const A rstd = static_cast<const A*>(op.rstd)[piece.row];
    A totals[2] = {0, 0};
    for (int64_t first = piece.begin; first < piece.end; first += unit, turn ^= 1) {
      Pack<PackBytes> x[unit_packs<T, PackBytes>], grad_output[unit_packs<T, PackBytes>];
      each_pack<T, PackBytes>(first, piece.end, [&](int i, int64_t at) {
        x[i] = load<PackBytes>(row_of<T>(op.x, piece.row, op.x_stride) + at * width);
        grad_output[i] = load<PackBytes>(row_of<T>(op.grad_output, piece.row, op.grad_output_stride) + at * width);
      });
      A sums[2] = {0, 0};
      each_pack<T, PackBytes>(first, piece.end, [&](int i, int64_t at) {
        Gradients<T, PackBytes>(op, x[i], grad_output[i], at * width, mean).add_to(sums, rstd);
      });
      group_sum<long_threads>(sums, exchange[turn]);
#pragma unroll
      for (int i = 0; i < 2; ++i) totals[i] += sums[i];
    }
    if (threadIdx.x == 0) {
#pragma unroll
      for (int i = 0; i < 2; ++i) row_sums[2 * block + i] = totals[i];
    }
  }
}

// Computes grad_input and sums of the parameters' gradients. A thread walks down its columns, every gridDim.y-th row.
// Where one block has all rows, the sums are the gradients.
constexpr int column_threads = 256;

template <class T, int PackBytes>
__global__ void __launch_bounds__(column_threads, 1)
    backward_columns(const Backward op, const Pieces pieces, const accumulate_t<T>* row_sums) {
  using A = accumulate_t<T>;
  constexpr int width = PackBytes / sizeof(T), batch = PackBytes == 16 ? 2 : 8, turn_rows = column_threads / 32;
  __shared__ A means_of_turn[turn_rows][2];
  const int64_t column = (int64_t(blockIdx.x) * column_threads + threadIdx.x) * width, step = gridDim.y;
  A grad_weight[width] = {}, grad_bias[width] = {};
  for (int64_t first = blockIdx.y; first < op.rows; first += step * turn_rows) {
    if (op.grad_input != nullptr) {
      __syncthreads();  // the previous iteration has read its means
      const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
      const int64_t row = first + step * warp;
      A sums[2] = {0, 0};
      for (int64_t i = lane; row < op.rows && i < pieces.count; i += 32) {
#pragma unroll
        for (int k = 0; k < 2; ++k) sums[k] += row_sums[2 * (row * pieces.count + i) + k];
      }
      group_sum<32>(sums, static_cast<A(*)[2]>(nullptr));
      if (lane == 0) {
        means_of_turn[warp][0] = op.rms ? A(0) : sums[0] / A(op.cols);
        means_of_turn[warp][1] = sums[1] / A(op.cols);
      }
      __syncthreads();
    }
    if (column >= op.cols) continue;
#pragma unroll 1
    for (int start = 0; start < turn_rows; start += batch) {
      Pack<PackBytes> x[batch], grad_output[batch], grad_sum[batch];
      A mean[batch], rstd[batch];
#pragma unroll
      for (int i = 0; i < batch; ++i) {
        const int64_t row = first + step * (start + i);
        if (row >= op.rows) continue;
        x[i] = load_once<PackBytes>(row_of<T>(op.x, row, op.x_stride) + column);
        grad_output[i] = load_once<PackBytes>(row_of<T>(op.grad_output, row, op.grad_output_stride) + column);
        if (op.grad_sum != nullptr) {
          grad_sum[i] = load_once<PackBytes>(row_of<T>(op.grad_sum, row, op.grad_sum_stride) + column);
        }
        mean[i] = op.mean != nullptr ? static_cast<const A*>(op.mean)[row] : A(0);
        rstd[i] = static_cast<const A*>(op.rstd)[row];
      }
#pragma unroll
      for (int i = 0; i < batch; ++i) {
        const int64_t row = first + step * (start + i);
        if (row >= op.rows) continue;
        const Gradients<T, PackBytes> gradients(op, x[i], grad_output[i], column, mean[i]);
        gradients.add_to(grad_weight, grad_bias, rstd[i]);
        if (op.grad_input == nullptr) continue;
        const A means[2] = {means_of_turn[start + i][0], means_of_turn[start + i][1]};
        A added[width] = {};
        if (op.grad_sum != nullptr) widen<T, PackBytes>(grad_sum[i], added);
        store<PackBytes>(static_cast<T*>(op.grad_input) + row * op.cols + column,
                         gradients.input(means, rstd[i], added));
      }
    }
  }
  if (column >= op.cols) return;
  A* partial = static_cast<A*>(op.partials) + blockIdx.y * op.cols + column;
  const auto leave = [&](const A(&sums)[width], void* gradient) {
    if (gradient == nullptr) return;
    if (gridDim.y > 1) {
      store_values<A, width>(partial, sums);
      partial += gridDim.y * op.cols;
    } else if (op.parameter_dtype == DType::F32) {
#pragma unroll
      for (int k = 0; k < width; ++k) static_cast<float*>(gradient)[column + k] = float(sums[k]);
    } else {
#pragma unroll
      for (int k = 0; k < width; ++k) static_cast<T*>(gradient)[column + k] = dlkit::narrow<T>(sums[k]);
    }
  };
  leave(grad_weight, op.grad_weight);
  leave(grad_bias, op.grad_bias);
}

}  // namespace
}  // namespace dlkit::layer_norm
