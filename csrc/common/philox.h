// The random stream that decides which elements dropout drops. It is the same on every device and for any number of
// threads, grid, vector width and strides. Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
// 2011), keyed by a seed, counted by the element's logical (contiguous-order) index i:
//
//   key      seed, 64 bits: low word, high word
//   counter  offset / 4, 64 bits: low word, high word; then the block's number i / 8, 64 bits: low word, high word
//   lane     j = i % 8: the j-th 16 bits of the block's 128, low halves first
//   p        T = round(p * 2^32). Element i is dropped if its 16 bits are below T / 2^16; where they equal it, a second
//            16 bits decide: the same lane of the block with offset / 4 + 1, dropped if below T % 2^16
//
// This makes p exact to 2^-32, and eight elements nearly always cost one block. Drawing the bits on one core of a Zen 4
// takes 0.19 ns an element with AVX-512, 0.29 with AVX2 and 0.61 with SSE2; a 32-bit word an element, which needs no
// second draw, would take 0.32, 0.54 and 1.19. A copy at full bandwidth takes 0.30 ns a core for an element of fp32,
// 0.15 for one of bf16. The counter's words hold what torch's own CUDA kernels put there (the offset first, then the
// subsequence), and a call advances the generator's offset by kDrawn, so it shares no word with any call before or
// after it, torch's included. tests/test_dropout.py has the published vectors.
#pragma once

#include "scalar.h"

namespace dlkit {

constexpr uint64_t kDrawn = 8;  // words of a lane's sequence that one call uses: two blocks of four
constexpr int kBlockElements = 8;
constexpr uint32_t kPhiloxMultiply0 = 0xd2511f53, kPhiloxMultiply1 = 0xcd9e8d57;
constexpr uint32_t kPhiloxKeyStep0 = 0x9e3779b9, kPhiloxKeyStep1 = 0xbb67ae85;

struct PhiloxState {
  uint64_t seed, offset;
};

// Where a kernel finds the state: seed and offset as *seed_at and *offset_at + offset, or, where the pointers are null,
// in the fields themselves.
struct PhiloxSource {
  const int64_t* seed_at;
  const int64_t* offset_at;
  uint64_t seed, offset;
};

DLKIT_HOST_DEVICE PhiloxState read(const PhiloxSource& source) {
  if (source.seed_at == nullptr) return {source.seed, source.offset};
  return {uint64_t(*source.seed_at), uint64_t(*source.offset_at) + source.offset};
}

// Stores the state for backward; output is [2], or null.
DLKIT_HOST_DEVICE void write_state(const PhiloxState& state, int64_t* output) {
  if (output == nullptr) return;
  output[0] = int64_t(state.seed);
  output[1] = int64_t(state.offset);
}

// The keep bits of a call on the CPU, one an element in element order, for a backward that reads them faster than it
// draws them again. The kernel draws and writes them unless `drawn` is set. `data` is null where they are not kept.
struct KeptBits {
  uint8_t* data = nullptr;
  bool drawn = false;
};

// A dropout as a part of another op: keep ? x * scale : 0.
struct FusedDropout {
  PhiloxSource source{};
  int64_t* rng_state = nullptr;  // [2]: receives what was read from source; or null
  uint64_t threshold = 0;
  double scale = 1;
  bool active = false;
  KeptBits bits{};
};

struct PhiloxBlock {
  uint32_t words[4];
};

struct Product {
  uint32_t low, high;
};

DLKIT_HOST_DEVICE Product multiply_wide(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)  // nvcc would add 0 to the upper half of a 64-bit product: 20 more instructions a block
  uint64_t product;
  asm("mul.wide.u32 %0, %1, %2;" : "=l"(product) : "r"(a), "r"(b));
  Product halves;
  asm("mov.b64 {%0, %1}, %2;" : "=r"(halves.low), "=r"(halves.high) : "l"(product));
  return halves;
#else
  const uint64_t product = uint64_t(a) * b;
  return {uint32_t(product), uint32_t(product >> 32)};
#endif
}

#if defined(__CUDACC__)
#define DLKIT_UNROLL _Pragma("unroll")
#define DLKIT_ROLLED _Pragma("unroll 1")
#else
#define DLKIT_UNROLL
#define DLKIT_ROLLED
#endif

// One round of block `c`.
DLKIT_HOST_DEVICE void philox_round(PhiloxBlock& c, uint32_t key0, uint32_t key1) {
  const Product product0 = multiply_wide(kPhiloxMultiply0, c.words[0]);
  const Product product1 = multiply_wide(kPhiloxMultiply1, c.words[2]);
  c = {{product1.high ^ c.words[1] ^ key0, product1.low, product0.high ^ c.words[3] ^ key1, product0.low}};
}

DLKIT_HOST_DEVICE PhiloxBlock philox_counter(uint64_t low, uint64_t high) {
  return {{uint32_t(low), uint32_t(low >> 32), uint32_t(high), uint32_t(high >> 32)}};
}

// Several blocks side by side: the upper halves of their counters are `first`, `first` + `step` ...
template <int Count>
DLKIT_HOST_DEVICE void philox_blocks(uint64_t key, uint64_t counter_low, uint64_t first, uint64_t step,
                                     PhiloxBlock (&blocks)[Count]) {
  DLKIT_UNROLL
  for (int i = 0; i < Count; ++i) blocks[i] = philox_counter(counter_low, first + uint64_t(i) * step);
  uint32_t key0 = uint32_t(key), key1 = uint32_t(key >> 32);
  DLKIT_UNROLL
  for (int round = 0; round < 10; ++round, key0 += kPhiloxKeyStep0, key1 += kPhiloxKeyStep1) {
    DLKIT_UNROLL
    for (int i = 0; i < Count; ++i) philox_round(blocks[i], key0, key1);
  }
}

// One block, in as little code and as few registers as possible.
DLKIT_HOST_DEVICE PhiloxBlock philox(uint64_t key, uint64_t counter_low, uint64_t counter_high) {
  PhiloxBlock block = philox_counter(counter_low, counter_high);
  uint32_t key0 = uint32_t(key), key1 = uint32_t(key >> 32);
  DLKIT_ROLLED
  for (int round = 0; round < 10; ++round, key0 += kPhiloxKeyStep0, key1 += kPhiloxKeyStep1) {
    philox_round(block, key0, key1);
  }
  return block;
}

// The 16 bits of a lane.
DLKIT_HOST_DEVICE uint32_t lane_bits(const PhiloxBlock& block, int lane) {
  return block.words[lane / 2] >> (lane % 2 * 16) & 0xffff;
}

// The T of this file's header, from 0 to 2^32.
DLKIT_HOST_DEVICE uint64_t drop_threshold(double p) { return uint64_t(p * 4294967296.0 + 0.5); }

// Kept elements are multiplied by this, which preserves the mean.
DLKIT_HOST_DEVICE double dropout_scale(double p) { return p < 1 ? 1 / (1 - p) : 0; }

// Bit j is set if element 8 * block + j is kept. This is the definition; cpu/philox.h and cuda/philox.cuh compute the
// same bits faster.
DLKIT_HOST_DEVICE uint32_t keep_block(const PhiloxState& state, uint64_t threshold, uint64_t block) {
  const uint32_t high = uint32_t(threshold >> 16), low = uint32_t(threshold & 0xffff);
  const PhiloxBlock first = philox(state.seed, state.offset / 4, block);
  uint32_t kept = 0, ties = 0;
  for (int lane = 0; lane < kBlockElements; ++lane) {
    kept |= uint32_t(lane_bits(first, lane) >= high) << lane;
    ties |= uint32_t(lane_bits(first, lane) == high) << lane;
  }
  if (ties != 0) {
    const PhiloxBlock second = philox(state.seed, state.offset / 4 + 1, block);
    for (int lane = 0; lane < kBlockElements; ++lane) {
      if (lane_bits(second, lane) < low) kept &= ~(ties & 1u << lane);
    }
  }
  return kept;
}

}  // namespace dlkit
