// keep_block() of philox.h for Count blocks of a thread at once, in about 90 instructions each. The blocks share the
// key schedule and one branch for ties. A 16-bit lane is compared as the upper half of its word, to which only the
// lower lanes are shifted. Ties are looked for in two lanes at once, since only one block in 8,192 has one.
#pragma once

#include "../philox.h"
#include "launch.cuh"

namespace dlkit::cuda {

// Sets bit j of kept[i] where element j of block `first + i * step` is kept.
template <int Count>
__device__ __forceinline__ void keep_bits(const PhiloxState& state, uint64_t threshold, uint64_t first, uint64_t step,
                                          uint32_t (&kept)[Count]) {
  const uint32_t high = uint32_t(threshold >> 16), limit = high << 16, both = limit | high;
  PhiloxBlock drawn[Count];
  philox_blocks(state.seed, state.offset / 4, first, step, drawn);
  uint32_t ties = 0;
#pragma unroll
  for (int i = 0; i < Count; ++i) {
    kept[i] = 0;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const uint32_t word = drawn[i].words[k], difference = word ^ both;
      kept[i] |= uint32_t(word << 16 >= limit) << 2 * k | uint32_t(word >= limit) << (2 * k + 1);
      ties |= (difference - 0x00010001) & ~difference;  // bits 15 and 31: this half is 0, or the half below it is
    }
  }
  if ((ties & 0x80008000) != 0 || threshold >> 32 != 0) {
#pragma unroll
    for (int i = 0; i < Count; ++i) kept[i] = keep_block(state, threshold, first + i * step);
  }
}

__device__ __forceinline__ uint32_t keep_bits(const PhiloxState& state, uint64_t threshold, uint64_t block) {
  uint32_t kept[1];
  keep_bits(state, threshold, block, 0, kept);
  return kept[0];
}

}  // namespace dlkit::cuda
