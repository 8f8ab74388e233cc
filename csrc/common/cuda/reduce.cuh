// Sums over a group of Lanes adjacent threads (a power of two; more than a warp: whole warps of one block). Every
// thread of the group gets the same bits, whatever ran first: shuffles in a fixed butterfly, then warps in a fixed
// order.
#pragma once

#include "launch.cuh"

namespace dlkit::cuda {

constexpr uint32_t full_warp = 0xffffffff;

// Several sums in one exchange. All threads of the block must call. `exchange` holds Count values for each warp of the
// block; it may be used again after the next __syncthreads, so a loop needs two of them and one barrier an iteration.
template <int Lanes, int Count, class A>
__device__ __forceinline__ void group_sum(A (&values)[Count], A (*exchange)[Count]) {
#pragma unroll
  for (int offset = (Lanes < 32 ? Lanes : 32) / 2; offset > 0; offset /= 2) {
#pragma unroll
    for (int i = 0; i < Count; ++i) values[i] += __shfl_xor_sync(full_warp, values[i], offset);
  }
  if constexpr (Lanes > 32) {
    constexpr int warps = Lanes / 32;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (lane == 0) {
#pragma unroll
      for (int i = 0; i < Count; ++i) exchange[warp][i] = values[i];
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < Count; ++i) values[i] = exchange[warp / warps * warps + lane % warps][i];
#pragma unroll
    for (int offset = warps / 2; offset > 0; offset /= 2) {
#pragma unroll
      for (int i = 0; i < Count; ++i) values[i] += __shfl_xor_sync(full_warp, values[i], offset);
    }
  }
}

}  // namespace dlkit::cuda
