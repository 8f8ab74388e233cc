// Sums over a group of Lanes adjacent threads (a power of two; more than a warp: whole warps of one block). Every
// thread of the group gets the same bits, whichever ran first: lanes are added in a fixed butterfly of shuffles, then
// warps in a fixed order. merge_threads() merges states that are more than sums.
#pragma once

#include "launch.cuh"

namespace dlkit::cuda {

constexpr uint32_t full_warp = 0xffffffff;

// Several sums in one exchange. All threads of the block must call. `exchange` holds Count values for each warp of the
// block; it may be used again only after the next __syncthreads, so a loop needs two exchanges and one barrier an
// iteration.
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

// Merges the states of threads, each an array `at` of State::size values with a merge(): over lanes `first` to `last`
// (powers of two) of each warp, then over `warps` warps, every warp_stride-th. The first thread gets the result. All
// threads of the block must call; `exchange` holds a State for each of them, or for half of them where warps *
// warp_stride is the block's number of warps.
template <class State, class A>
__device__ __forceinline__ void merge_threads(State& state, int first, int last, int warp_stride, int warps,
                                              A* exchange) {
  for (int offset = first; offset < last; offset *= 2) {
    State other;
#pragma unroll
    for (int i = 0; i < State::size; ++i) other.at[i] = __shfl_xor_sync(full_warp, state.at[i], offset);
    state.merge(other);
  }
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, place = warp / warp_stride % warps;
  for (int half = warps / 2; half > 0; half /= 2) {
    A* to = exchange + (warp - half * warp_stride) * State::size * 32 + lane;
    if (place >= half && place < 2 * half) {
#pragma unroll
      for (int i = 0; i < State::size; ++i) to[i * 32] = state.at[i];
    }
    __syncthreads();
    if (place < half) {
      const A* from = exchange + warp * State::size * 32 + lane;
      State other;
#pragma unroll
      for (int i = 0; i < State::size; ++i) other.at[i] = from[i * 32];
      state.merge(other);
    }
    __syncthreads();
  }
}

}  // namespace dlkit::cuda
