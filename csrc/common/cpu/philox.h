// Keep bits for the CPU's kernels, by vectors: one bit an element, which is one byte a Philox block, in element order.
// A round works on 64-bit lanes, a block each. The multiplication reads only the lanes' low halves: the four words of a
// block live in the low halves of four registers and nothing is blended until the end. Two interleaves then lay whole
// blocks side by side as 16-bit lanes in element order, and one comparison decides 32 (16, 8) elements.
#pragma once

#include "../philox.h"
#include "simd.h"

namespace dlkit::DLKIT_ISA {

using VectorU64 = uint64_t __attribute__((vector_size(kVectorBytes)));

constexpr int64_t kVectorBlocks = kLanes<double>;  // a block each lane
constexpr int kPhiloxGroups =
    DLKIT_VECTOR_BYTES == 64 ? 4 : 2;                         // vectors in flight: a round's latency is two issue times
constexpr int64_t kKeepStep = kVectorBlocks * kPhiloxGroups;  // blocks, so bytes, that keep_bits writes at a time

#if defined(__x86_64__)
DLKIT_INLINE VectorU64 multiply_low(VectorU64 a, VectorU64 b) {
#if defined(__AVX512F__)
  return (VectorU64)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (VectorU64)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#else
  return (VectorU64)_mm_mul_epu32((__m128i)a, (__m128i)b);
#endif
}

DLKIT_INLINE VectorU64 xor3(VectorU64 a, VectorU64 b, VectorU64 c) {
#if defined(__AVX512F__)
  return (VectorU64)_mm512_ternarylogic_epi64((__m512i)a, (__m512i)b, (__m512i)c, 0x96);
#else
  return a ^ b ^ c;
#endif
}

// The low halves of a in the even 32-bit lanes, those of b in the odd ones.
DLKIT_INLINE VectorU64 join_halves(VectorU64 a, VectorU64 b) {
#if defined(__AVX512F__)
  return (VectorU64)_mm512_mask_shuffle_epi32((__m512i)a, 0xaaaa, (__m512i)b, _MM_PERM_CCAA);
#elif defined(__AVX2__)
  return (VectorU64)_mm256_blend_epi32((__m256i)a, (__m256i)(b << 32), 0xaa);
#else
  return (a & 0xffffffff) | b << 32;
#endif
}

// The block, counted from the group's first, that each 64-bit lane works on. After the interleaves all are in order.
#if DLKIT_VECTOR_BYTES == 64
constexpr VectorU64 kLaneBlocks = {0, 4, 1, 5, 2, 6, 3, 7};
#elif DLKIT_VECTOR_BYTES == 32
constexpr VectorU64 kLaneBlocks = {0, 1, 2, 3};
#else
constexpr VectorU64 kLaneBlocks = {0, 1};
#endif

// Keep bits and tie bits of one group. compare() gets them from its four words, each in the low halves of a vector's
// lanes.
struct KeepAndTies {
  uint64_t keep, ties;
};

DLKIT_INLINE KeepAndTies compare(const VectorU64 (&words)[4], uint32_t high) {
  const VectorU64 front = join_halves(words[0], words[1]), back = join_halves(words[2], words[3]);
#if defined(__AVX512F__)
  const __m512i low_blocks = _mm512_unpacklo_epi64((__m512i)front, (__m512i)back);
  const __m512i high_blocks = _mm512_unpackhi_epi64((__m512i)front, (__m512i)back);
  const __m512i limit = _mm512_set1_epi16(short(high));
  return {_mm512_cmpge_epu16_mask(low_blocks, limit) | uint64_t(_mm512_cmpge_epu16_mask(high_blocks, limit)) << 32,
          _mm512_cmpeq_epu16_mask(low_blocks, limit) | uint64_t(_mm512_cmpeq_epu16_mask(high_blocks, limit)) << 32};
#elif defined(__AVX2__)
  const __m256i low_blocks = _mm256_unpacklo_epi64((__m256i)front, (__m256i)back);
  const __m256i high_blocks = _mm256_unpackhi_epi64((__m256i)front, (__m256i)back);
  const __m256i limit = _mm256_set1_epi16(short(high));
  const auto bits = [](__m256i a, __m256i b) { return uint32_t(_mm256_movemask_epi8(_mm256_packs_epi16(a, b))); };
  const auto at_least = [&](__m256i v) { return _mm256_cmpeq_epi16(_mm256_max_epu16(v, limit), v); };
  return {bits(at_least(low_blocks), at_least(high_blocks)),
          bits(_mm256_cmpeq_epi16(low_blocks, limit), _mm256_cmpeq_epi16(high_blocks, limit))};
#else
  const __m128i low_block = _mm_unpacklo_epi64((__m128i)front, (__m128i)back);
  const __m128i high_block = _mm_unpackhi_epi64((__m128i)front, (__m128i)back);
  const __m128i limit = _mm_set1_epi16(short(high));
  const auto bits = [](__m128i a, __m128i b) { return uint32_t(_mm_movemask_epi8(_mm_packs_epi16(a, b))); };
  const auto at_least = [&](__m128i v) { return _mm_cmpeq_epi16(_mm_subs_epu16(limit, v), _mm_setzero_si128()); };
  return {bits(at_least(low_block), at_least(high_block)),
          bits(_mm_cmpeq_epi16(low_block, limit), _mm_cmpeq_epi16(high_block, limit))};
#endif
}
#endif

// The state that all blocks of a call share. The keys lie in memory, from where a broadcast is free: from general
// registers the 20 broadcasts would be a seventh of a step's vector instructions.
struct PhiloxKeys {
  PhiloxState state;
  uint64_t words[10][2];  // a key in the low half

  explicit PhiloxKeys(const PhiloxState& state) : state(state) {
    uint32_t key0 = uint32_t(state.seed), key1 = uint32_t(state.seed >> 32);
    for (auto& round : words) {
      round[0] = key0;
      round[1] = key1;
      key0 += kPhiloxKeyStep0;
      key1 += kPhiloxKeyStep1;
    }
    asm("" : "+m"(words));  // else the compiler computes them again in each step
  }
};

// Not inlined, to keep the fast path short: inlined it would be nine tenths of a kernel's code.
__attribute__((noinline, cold)) static void keep_step_by_definition(PhiloxState state, uint64_t threshold,
                                                                    uint64_t block, uint8_t* bits) {
  for (int64_t i = 0; i < kKeepStep; ++i) bits[i] = uint8_t(keep_block(state, threshold, block + uint64_t(i)));
}

// Writes the bits of kKeepStep blocks from `block` on.
DLKIT_INLINE void keep_step(const PhiloxKeys& keys, uint64_t threshold, uint64_t block, uint8_t* bits) {
  if (threshold >> 32) {  // p is 1: everything is dropped
    memset(bits, 0, kKeepStep);
    return;
  }
#if defined(__x86_64__)
  if (uint32_t(block) <= uint32_t(-kKeepStep)) {  // only the counter's third word changes
    VectorU64 words[kPhiloxGroups][4];
    const VectorU64 multiply0 = VectorU64{} + kPhiloxMultiply0, multiply1 = VectorU64{} + kPhiloxMultiply1;
    const uint64_t counter = keys.state.offset / 4;
#pragma GCC unroll 4
    for (int g = 0; g < kPhiloxGroups; ++g) {
      words[g][0] = VectorU64{} + counter;
      words[g][1] = VectorU64{} + (counter >> 32);
      words[g][2] = (VectorU64{} + (block + g * kVectorBlocks)) + kLaneBlocks;
      words[g][3] = VectorU64{} + (block >> 32);
    }
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round) {
      const VectorU64 k0 = VectorU64{} + keys.words[round][0], k1 = VectorU64{} + keys.words[round][1];
#pragma GCC unroll 4
      for (int g = 0; g < kPhiloxGroups; ++g) {
        const VectorU64 product0 = multiply_low(words[g][0], multiply0);
        const VectorU64 product1 = multiply_low(words[g][2], multiply1);
        words[g][0] = xor3(product1 >> 32, words[g][1], k0);
        words[g][2] = xor3(product0 >> 32, words[g][3], k1);
        words[g][1] = product1;
        words[g][3] = product0;
      }
    }
    uint64_t ties = 0;
#pragma GCC unroll 4
    for (int g = 0; g < kPhiloxGroups; ++g) {
      const KeepAndTies found = compare(words[g], uint32_t(threshold >> 16));
      ties |= found.ties;
      memcpy(bits + g * kVectorBlocks, &found.keep, kVectorBlocks);
    }
    if (__builtin_expect(ties == 0 || (threshold & 0xffff) == 0, 1)) return;
  }
#endif
  keep_step_by_definition(keys.state, threshold, block, bits);
}

// Writes the bits of `blocks` blocks from `first` on, and up to kKeepStep - 1 bytes more.
DLKIT_INLINE void keep_bits(const PhiloxState& state, uint64_t threshold, int64_t first, int64_t blocks,
                            uint8_t* bits) {
  const PhiloxKeys keys(state);
  for (int64_t i = 0; i < blocks; i += kKeepStep) keep_step(keys, threshold, uint64_t(first + i), bits + i);
}

// Which lanes of V have their bit set: what a comparison of two V gives, for a choice without a second comparison.
template <class V>
DLKIT_INLINE auto lane_mask(uint32_t bits) {
  using Lane = std::remove_cvref_t<decltype(V{}[0])>;
  return ((V{} + Lane(bits)) & constant<V>([](int i) { return 1u << i; })) != 0;
}

// `kept` where the lane's bit is set, else `dropped`.
template <class A>
DLKIT_INLINE Vector<A> select(uint32_t bits, Vector<A> kept, Vector<A> dropped) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<A, float>) {
    return (VectorF32)_mm512_mask_mov_ps((__m512)dropped, __mmask16(bits), (__m512)kept);
  } else {
    return (VectorF64)_mm512_mask_mov_pd((__m512d)dropped, __mmask8(bits), (__m512d)kept);
  }
#else
  using Lanes = std::conditional_t<std::is_same_v<A, float>, VectorU32, VectorU64>;
  return lane_mask<Lanes>(bits) ? kept : dropped;
#endif
}

// The bits of kLanes<A> elements from any element on, in the low bits.
template <class A>
DLKIT_INLINE uint32_t lanes_at(const uint8_t* bits, int64_t element) {
  if constexpr (kLanes<A> == 16) {
    uint32_t found;
    memcpy(&found, bits + element / 8, 4);
    return found >> element % 8;
  } else {
    uint16_t found;
    memcpy(&found, bits + element / 8, 2);
    return uint32_t(found) >> element % 8;
  }
}

}  // namespace dlkit::DLKIT_ISA
