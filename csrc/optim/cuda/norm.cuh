// The norm of all gradients, and their scaling. For the norm a block adds up one chunk of one tensor: each thread 64
// squares in fp32, then the block in fp64. One block adds up the chunks' sums. Neither the chunks nor the sum depend on
// the device.
#pragma once

#include "../../common/cuda/reduce.cuh"
#include "../../common/cuda/vec.cuh"
#include "../math.h"
#include "launcher.cuh"

namespace dlkit::optim {
namespace {

using namespace dlkit::cuda;

constexpr int64_t kNormChunk = 16384;

struct NormCommon {
  double* partials;
};

template <int ArgumentBytes, class T>
__global__ void __launch_bounds__(kThreads)
    sum_squares(const __grid_constant__ TensorListMetadata<NormCommon, ArgumentBytes> metadata) {
  using A = accumulate_t<T>;
  constexpr int width = 16 / sizeof(T), batch = 4;
  __shared__ double exchange[kThreads / 32][1];
  const int entry = find_entry(metadata, blockIdx.x);
  const uint64_t first_word = metadata.words[entry];
  const int64_t chunk = blockIdx.x - uint32_t(first_word), first = chunk * kNormChunk;
  const int64_t left = int64_t(metadata.words[entry + 1]) - first;
  const int numel = int(left < kNormChunk ? left : kNormChunk);
  const T* grad = reinterpret_cast<const T*>(metadata.words[entry + 2]) + first;
  A sum = 0;
  int done = 0;  // elements read in wide accesses
  if ((first_word >> 32 & 1) != 0) {
    const int packs = numel / width;
    done = packs * width;
#pragma unroll 1
    for (int start = threadIdx.x; start < packs; start += batch * kThreads) {
      Pack<16> values[batch];
#pragma unroll
      for (int i = 0; i < batch; ++i) {
        const int at = start + i * kThreads;
        values[i] = at < packs ? load_once<16>(grad + at * width) : Pack<16>{};
      }
#pragma unroll
      for (int i = 0; i < batch; ++i) {
        A g[width];
        widen<T, 16>(values[i], g);
#pragma unroll
        for (int j = 0; j < width; ++j) sum = multiply_add(g[j], g[j], sum);
      }
    }
  }
#pragma unroll 4
  for (int at = done + threadIdx.x; at < numel; at += kThreads) {
    const A g = dlkit::widen(grad[at]);
    sum = multiply_add(g, g, sum);
  }
  double sums[1] = {double(sum)};
  group_sum<kThreads>(sums, exchange);
  if (threadIdx.x == 0) metadata.common.partials[int64_t(metadata.words[entry + 3]) + chunk] = sums[0];
}

__global__ void __launch_bounds__(1024) finish_norm(const double* partials, int64_t count, void* norm, DType dtype) {
  __shared__ double exchange[32][1];
  double sums[1] = {0};
#pragma unroll 4
  for (int64_t i = threadIdx.x; i < count; i += 1024) sums[0] += partials[i];
  group_sum<1024>(sums, exchange);
  if (threadIdx.x != 0) return;
  if (dtype == DType::F64) {
    *static_cast<double*>(norm) = sqrt(sums[0]);
  } else {
    *static_cast<float*>(norm) = float(sqrt(sums[0]));
  }
}

struct ClipCommon {
  const void* norm;
  DType norm_dtype;
  double max_norm;
};

template <class T, int PackBytes, int ArgumentBytes>
__global__ void __launch_bounds__(kThreads)
    scale_grads(const __grid_constant__ TensorListMetadata<ClipCommon, ArgumentBytes> metadata) {
  using A = accumulate_t<T>;
  constexpr int width = PackBytes / sizeof(T), batch = 4;
  const ClipCommon& common = metadata.common;
  const double coefficient = clip_coefficient(read(common.norm, common.norm_dtype), common.max_norm);
  if (coefficient == 1) return;
  const A factor = A(coefficient);
  const int entry = find_entry(metadata, blockIdx.x);
  const uint64_t first_word = metadata.words[entry];
  const int64_t first = int64_t(blockIdx.x - uint32_t(first_word)) * metadata.chunk;
  const int64_t left = int64_t(metadata.words[entry + 1]) - first;
  const int numel = int(left < metadata.chunk ? left : metadata.chunk);
  T* grad = reinterpret_cast<T*>(metadata.words[entry + 2]) + first;
  int done = 0;
  if ((first_word >> 32 & 1) != 0) {
    const int packs = numel / width;
    done = packs * width;
#pragma unroll 1
    for (int start = threadIdx.x; start < packs; start += batch * kThreads) {
      Pack<PackBytes> values[batch];
#pragma unroll
      for (int i = 0; i < batch; ++i) {
        const int at = start + i * kThreads;
        if (at < packs) values[i] = load<PackBytes>(grad + at * width);
      }
#pragma unroll
      for (int i = 0; i < batch; ++i) {
        const int at = start + i * kThreads;
        if (at >= packs) continue;
        A g[width];
        widen<T, PackBytes>(values[i], g);
#pragma unroll
        for (int j = 0; j < width; ++j) g[j] *= factor;
        store<PackBytes>(grad + at * width, narrow<T, PackBytes>(g));
      }
    }
  }
#pragma unroll 4
  for (int at = done + threadIdx.x; at < numel; at += kThreads) {
    grad[at] = dlkit::narrow<T>(dlkit::widen(grad[at]) * factor);
  }
}

}  // namespace
}  // namespace dlkit::optim
