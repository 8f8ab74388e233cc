// Shared by the kernels of both directions: how a row is spread, packs with a residual or a dropout, a row's
// statistics, the gradients of a pack.
#pragma once

#include "../../common/cuda/launch.cuh"
#include "../../common/cuda/philox.cuh"
#include "../../common/cuda/reduce.cuh"
#include "../../common/cuda/vec.cuh"
#include "../kernel.h"

namespace dlkit::layer_norm {
namespace {

using namespace dlkit::cuda;

// Kernels are templates of the input type, of PackBytes (16 in the fast paths, sizeof(T) where addresses or widths are
// odd) and of how a row is spread: Lanes threads a row, Packs packs a thread. Where Lanes is below a block's threads, a
// block has several rows.
template <int Lanes>
constexpr int threads_of = Lanes > 256 ? Lanes : 256;
constexpr int long_threads = 512;  // of a block that has a row, or a piece of one, to itself

template <class T>
__device__ __forceinline__ const T* row_of(const void* tensor, int64_t row, int64_t stride) {
  return static_cast<const T*>(tensor) + row * stride;
}

template <int Lanes>
__device__ __forceinline__ void group_barrier() {
  if constexpr (Lanes > 32) {
    __syncthreads();
  } else {
    __syncwarp();
  }
}

// A row of odd width or address begins anywhere in a line. Element by element it would be fetched in accesses of 2 or 4
// bytes, and cp.async cannot copy 2. Its lanes therefore fetch 16 aligned bytes at a time, except at its ends. The row
// begins in shared memory as many bytes after a multiple of 16 as in global memory; these are its phase. The elements a
// thread owns and adds up do not depend on the phase.
template <class T>
__device__ __forceinline__ int phase_of(const T* row) {
  return int(reinterpret_cast<uintptr_t>(row) % 16);
}

// Bytes of shared memory for a row.
template <int PackBytes>
__host__ __device__ constexpr int slot_bytes(int row_bytes) {
  return PackBytes == 16 ? row_bytes : (row_bytes + 16 - PackBytes + 15) / 16 * 16;
}

template <int Lanes, class T>
__device__ __forceinline__ void copy_row_async(unsigned char* slot, const T* row, int row_bytes, int lane) {
  const int phase = phase_of(row), end = phase + row_bytes;
  const unsigned char* from = reinterpret_cast<const unsigned char*>(row) - phase;
#pragma unroll 2
  for (int at = lane * 16; at < end; at += Lanes * 16) {
    if (at >= phase && at + 16 <= end) {
      copy_async<16>(slot + at, from + at);
    } else {
#pragma unroll 1
      for (int k = at < phase ? phase : at; k < end && k < at + 16; k += int(sizeof(T))) {
        store<sizeof(T)>(slot + k, load_once<sizeof(T)>(from + k));
      }
    }
  }
}

// x + residual, rounded to T.
template <class T, int PackBytes>
__device__ __forceinline__ Pack<PackBytes> add(const Pack<PackBytes>& x, const Pack<PackBytes>& residual) {
  accumulate_t<T> a[PackBytes / sizeof(T)], b[PackBytes / sizeof(T)];
  widen<T, PackBytes>(x, a);
  widen<T, PackBytes>(residual, b);
#pragma unroll
  for (int k = 0; k < int(PackBytes / sizeof(T)); ++k) a[k] += b[k];
  return narrow<T, PackBytes>(a);
}

// The keep bits of a pack of adjacent elements; the first one's index is a multiple of their number. Narrow packs share
// a Philox block and each draw it again: moving four tensors for every element leaves time for that.
__device__ __forceinline__ uint32_t keep_pack(const FusedDropout& dropout, const PhiloxState& state, int64_t element) {
  return keep_bits(state, dropout.threshold, uint64_t(element / kBlockElements)) >> element % kBlockElements;
}

// drop(x) + residual, rounded to T: the same bits as dropout's op with a residual.
template <class T, int PackBytes>
__device__ __forceinline__ Pack<PackBytes> drop_add(const Pack<PackBytes>& x, const Pack<PackBytes>& residual,
                                                    uint32_t keep, accumulate_t<T> scale) {
  accumulate_t<T> a[PackBytes / sizeof(T)], b[PackBytes / sizeof(T)];
  widen<T, PackBytes>(x, a);
  widen<T, PackBytes>(residual, b);
#pragma unroll
  for (int k = 0; k < int(PackBytes / sizeof(T)); ++k) b[k] = keep >> k & 1 ? multiply_add(a[k], scale, b[k]) : b[k];
  return narrow<T, PackBytes>(b);
}

template <class T, int PackBytes>
__device__ __forceinline__ accumulate_t<T> pack_sum(const Pack<PackBytes>& pack) {
  accumulate_t<T> values[PackBytes / sizeof(T)], sum = 0;
  widen<T, PackBytes>(pack, values);
#pragma unroll
  for (accumulate_t<T> value : values) sum += value;
  return sum;
}

// Adds a pack's squared deviations from `mean` to sums[0] and, where T is precise enough for the mean's rounding error
// to show in small deviations from a large mean, the deviations themselves to sums[1].
template <class T, int PackBytes, int Count>
__device__ __forceinline__ void add_deviations(const Pack<PackBytes>& pack, accumulate_t<T> mean,
                                               accumulate_t<T> (&sums)[Count]) {
  accumulate_t<T> values[PackBytes / sizeof(T)];
  widen<T, PackBytes>(pack, values);
#pragma unroll
  for (accumulate_t<T> value : values) {
    const accumulate_t<T> deviation = value - mean;
    sums[0] += deviation * deviation;
    if constexpr (Count == 2) sums[1] += deviation;
  }
}

template <class T>
constexpr int deviation_sums = std::is_same_v<T, accumulate_t<T>> ? 2 : 1;

template <class A>
struct Statistics {
  A mean, rest, rstd;  // rest: the mean's rounding error
};

template <class A, int Count>
__device__ __forceinline__ Statistics<A> statistics_of(const Forward& op, A mean, const A (&deviations)[Count]) {
  A rest = 0;
  if constexpr (Count == 2) rest = op.rms ? A(0) : deviations[1] / A(op.cols);
  return {mean, rest, A(1) / sqrt(deviations[0] / A(op.cols) - rest * rest + A(op.eps))};
}

template <class T, int PackBytes>
__device__ __forceinline__ Pack<PackBytes> normalize(const Forward& op, const Pack<PackBytes>& pack, int64_t column,
                                                     const Statistics<accumulate_t<T>>& statistics) {
  using A = accumulate_t<T>;
  constexpr int width = PackBytes / sizeof(T);
  A values[width], weight[width], bias[width];
  widen<T, PackBytes>(pack, values);
  load_parameter<T>(op.weight, op.parameter_dtype, column, A(1), weight);
#pragma unroll
  for (int k = 0; k < width; ++k) {
    values[k] -= statistics.mean;
    if constexpr (deviation_sums<T> == 2) values[k] -= statistics.rest;
    values[k] = values[k] * statistics.rstd * weight[k];
  }
  load_parameter<T>(op.bias, op.parameter_dtype, column, A(0), bias);
#pragma unroll
  for (int k = 0; k < width; ++k) values[k] += bias[k];
  return narrow<T, PackBytes>(values);
}

template <class A>
__device__ __forceinline__ void store_statistics(const Forward& op, int64_t row, A mean, A rstd) {
  if (op.mean != nullptr) static_cast<A*>(op.mean)[row] = mean;
  if (op.rstd != nullptr) static_cast<A*>(op.rstd)[row] = rstd;
}
// The values of one pack that the row sums and the gradients need. Their bits are the same with and without a dropout.
template <class T, int PackBytes>
struct Gradients {
  static constexpr int width = PackBytes / sizeof(T);
  accumulate_t<T> centered[width], grad_output[width], weight[width];

  __device__ __forceinline__ Gradients(const Backward& op, const Pack<PackBytes>& x_pack,
                                       const Pack<PackBytes>& grad_output_pack, int64_t column, accumulate_t<T> mean) {
    widen<T, PackBytes>(x_pack, centered);
    widen<T, PackBytes>(grad_output_pack, grad_output);
    load_parameter<T>(op.weight, op.parameter_dtype, column, accumulate_t<T>(1), weight);
#pragma unroll
    for (int k = 0; k < width; ++k) centered[k] -= mean;
  }

  // Adds wdy to sums[0] and wdy * xhat to sums[1].
  __device__ __forceinline__ void add_to(accumulate_t<T> (&sums)[2], accumulate_t<T> rstd) const {
#pragma unroll
    for (int k = 0; k < width; ++k) {
      const accumulate_t<T> wdy = multiply(grad_output[k], weight[k]);
      sums[0] += wdy;
      sums[1] = multiply_add(wdy, centered[k] * rstd, sums[1]);
    }
  }

  __device__ __forceinline__ void add_to(accumulate_t<T>* grad_weight, accumulate_t<T>* grad_bias,
                                         accumulate_t<T> rstd) const {
#pragma unroll
    for (int k = 0; k < width; ++k) {
      grad_weight[k] = multiply_add(grad_output[k], centered[k] * rstd, grad_weight[k]);
      grad_bias[k] += grad_output[k];
    }
  }

  __device__ __forceinline__ Pack<PackBytes> input(const accumulate_t<T> (&means)[2], accumulate_t<T> rstd,
                                                   const accumulate_t<T> (&grad_sum)[width]) const {
    accumulate_t<T> result[width];
#pragma unroll
    for (int k = 0; k < width; ++k) {
      const accumulate_t<T> wdy = multiply(grad_output[k], weight[k]);
      result[k] = multiply_add(rstd, multiply_add(-centered[k] * rstd, means[1], wdy - means[0]), grad_sum[k]);
    }
    return narrow<T, PackBytes>(result);
  }
};

}  // namespace
}  // namespace dlkit::layer_norm
