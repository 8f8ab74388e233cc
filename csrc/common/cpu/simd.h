// SIMD for every CPU kernel: GCC/Clang vector types, so one source serves SSE2/NEON (4 floats), AVX2 (8) and AVX-512
// (16), plus operations that those types lack: 16-bit loads and stores, partial vectors, streaming stores. A Vector<A>
// holds kLanes<A> accumulation values (A is float or double); loads widen and stores narrow in registers. Everything
// lives in the instruction set's own namespace and is inlined: nothing leaks between objects.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <type_traits>
#include <utility>

#include "../scalar.h"
#include "cache.h"
#include "capability.h"

#if defined(__AVX512F__)
#define DLKIT_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define DLKIT_VECTOR_BYTES 32
#else
#define DLKIT_VECTOR_BYTES 16
#endif
#define DLKIT_INLINE static inline __attribute__((always_inline))
#define DLKIT_INLINE_MEMBER inline __attribute__((always_inline))
#define DLKIT_INLINE_LAMBDA __attribute__((always_inline))

namespace dlkit::DLKIT_ISA {

constexpr int64_t kVectorBytes = DLKIT_VECTOR_BYTES;

constexpr int kSlots =
    4;  // independent vectors in flight in a loop over columns: as many as the latency of an addition

template <class A>
constexpr int64_t kLanes = kVectorBytes / int64_t(sizeof(A));

using VectorF32 = float __attribute__((vector_size(kVectorBytes)));
using VectorF64 = double __attribute__((vector_size(kVectorBytes)));
using VectorU32 = uint32_t __attribute__((vector_size(kVectorBytes)));
using VectorI32 = int32_t __attribute__((vector_size(kVectorBytes)));
using VectorU16 = uint16_t __attribute__((vector_size(kVectorBytes / 2)));

template <class A>
struct VectorOf {
  using type = VectorF32;
};
template <>
struct VectorOf<double> {
  using type = VectorF64;
};
template <class A>
using Vector = typename VectorOf<A>::type;

DLKIT_INLINE int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
DLKIT_INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }

// The element at an offset of an array that may be absent.
template <class T, class Pointer>
DLKIT_INLINE T* at(Pointer* array, int64_t offset) {
  return array == nullptr ? nullptr : static_cast<T*>(array) + offset;
}

template <class V>
DLKIT_INLINE V load_raw(const void* p) {
  V v;
  memcpy(&v, p, sizeof(V));
  return v;
}

template <class V>
DLKIT_INLINE void store_raw(void* p, const V& v) {
  memcpy(p, &v, sizeof(V));
}

template <class A>
DLKIT_INLINE Vector<A> broadcast(A value) {
  return Vector<A>{} + value;
}

// The vector {f(0), f(1), ...}. A loop that sets one lane after the other stays a loop at -O2 from 16 lanes on, and the
// vector is then written to memory and read back at every use.
template <class V, class F>
DLKIT_INLINE V constant(const F& f) {
  using Lane = std::remove_cvref_t<decltype(V{}[0])>;
  return [&]<int... I>(std::integer_sequence<int, I...>) DLKIT_INLINE_LAMBDA {
    return V{Lane(f(I))...};
  }(std::make_integer_sequence<int, sizeof(V) / sizeof(Lane)>());
}

// The vector type of kLanes values of T as they lie in memory.
template <class T>
struct PackedOf {
  using type = VectorU16;
};
template <>
struct PackedOf<float> {
  using type = VectorF32;
};
template <>
struct PackedOf<double> {
  using type = VectorF64;
};
template <class T>
using Packed = typename PackedOf<T>::type;

DLKIT_INLINE VectorF32 unpack(VectorF32 packed, float) { return packed; }
DLKIT_INLINE VectorF64 unpack(VectorF64 packed, double) { return packed; }
DLKIT_INLINE VectorF32 unpack(VectorU16 packed, BFloat16) {
#if defined(__AVX512F__)  // GCC needs five instructions for the plain conversion
  return (VectorF32)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)packed), 16);
#elif defined(__AVX2__)
  return (VectorF32)_mm256_slli_epi32(_mm256_cvtepu16_epi32((__m128i)packed), 16);
#else
  return (VectorF32)(__builtin_convertvector(packed, VectorU32) << 16);
#endif
}
DLKIT_INLINE VectorF32 unpack(VectorU16 packed, Float16) {
#if defined(__AVX512F__)
  return (VectorF32)_mm512_cvtph_ps((__m256i)packed);
#elif defined(__F16C__)
  return (VectorF32)_mm256_cvtph_ps((__m128i)packed);
#else  // as widen(), but subnormals by a subtraction: as operands they are slow, or read as 0 (set_flush_denormal)
  const auto bits = (VectorI32) __builtin_convertvector(packed, VectorU32);
  const VectorI32 magnitude = bits & 0x7fff, shifted = magnitude << 13, least = VectorI32{} + 0x38800000;  // 2^-14
  const VectorI32 rebias = VectorI32{} + (112 << 23);
  const VectorI32 normal = shifted + rebias + (rebias & (magnitude >= 0x7c00));  // twice for infinity and NaN
  const VectorI32 subnormal = (VectorI32)((VectorF32)(shifted + least) - (VectorF32)least);
  return (VectorF32)((magnitude < 0x400 ? subnormal : normal) | (bits ^ magnitude) << 16);
#endif
}

// The bits of v rounded to bf16, in the upper halves.
DLKIT_INLINE VectorU32 round_to_bf16(VectorF32 v) {
  const VectorU32 bits = (VectorU32)v, rounded = bits + 0x7fff + (bits >> 16 & 1);
#if defined(__AVX512F__)
  const __mmask16 is_nan = _mm512_cmp_ps_mask((__m512)v, (__m512)v, _CMP_UNORD_Q);
  return (VectorU32)_mm512_mask_mov_epi32((__m512i)rounded, is_nan, _mm512_set1_epi32(0x7fc00000));
#elif defined(__AVX2__)
  const __m256 is_nan = _mm256_cmp_ps((__m256)v, (__m256)v, _CMP_UNORD_Q);
  return (VectorU32)_mm256_blendv_ps((__m256)rounded, (__m256)_mm256_set1_epi32(0x7fc00000), is_nan);
#else
  return v != v ? VectorU32{} + 0x7fc00000 : rounded;
#endif
}

// The upper halves of two vectors' lanes, interleaved.
DLKIT_INLINE VectorU32 join_upper_halves(VectorU32 even, VectorU32 odd) {
#if defined(__AVX512F__)
  return (VectorU32)_mm512_mask_blend_epi16(0xaaaaaaaa, (__m512i)(even >> 16), (__m512i)odd);
#elif defined(__AVX2__)
  return (VectorU32)_mm256_blend_epi16((__m256i)(even >> 16), (__m256i)odd, 0xaa);
#else
  return even >> 16 | (odd & 0xffff0000);
#endif
}

// Rounds to nearest even.
DLKIT_INLINE VectorF32 pack(VectorF32 v, float) { return v; }
DLKIT_INLINE VectorF64 pack(VectorF64 v, double) { return v; }
DLKIT_INLINE VectorU16 pack(VectorF32 v, BFloat16) {
#if defined(__AVX512BF16__)  // halves the time of a bf16 pass; subnormal results become 0
  return (VectorU16)_mm512_cvtneps_pbh((__m512)v);
#elif defined(__AVX512F__)
  return (VectorU16)_mm512_cvtepi32_epi16((__m512i)(round_to_bf16(v) >> 16));
#elif defined(__AVX2__)  // GCC needs two instructions more for the plain conversion
  const __m256i high = (__m256i)(round_to_bf16(v) >> 16);
  return (VectorU16)_mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
#else
  return __builtin_convertvector(round_to_bf16(v) >> 16, VectorU16);
#endif
}
DLKIT_INLINE VectorU16 pack(VectorF32 v, Float16) {
#if defined(__AVX512F__)
  return (VectorU16)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__F16C__)
  return (VectorU16)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else  // as narrow()
  const VectorI32 magnitude = (VectorI32)v & 0x7fffffff;
  const VectorI32 normal = (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13;
  const VectorI32 subnormal = (VectorI32)((VectorF32)magnitude + 0.5f) - 0x3f000000;
  const VectorI32 beyond = magnitude > 0x7f800000 ? VectorI32{} + 0x7e00 : VectorI32{} + 0x7c00;  // NaN, or infinity
  const VectorI32 finite = magnitude < 0x38800000 ? subnormal : normal;
  return __builtin_convertvector((VectorU32)(magnitude >= 0x477ff000 ? beyond : finite) | ((VectorU32)v >> 16 & 0x8000),
                                 VectorU16);
#endif
}

// v as it reads after it was stored as T.
template <class T>
DLKIT_INLINE Vector<accumulate_t<T>> round_to(Vector<accumulate_t<T>> v) {
  return unpack(pack(v, T()), T());
}

// A store past the caches, for outputs larger than them: p is aligned to the bytes written, and streaming_fence()
// follows.
template <class Packed>
DLKIT_INLINE void non_temporal_store(void* p, const Packed& packed) {
#if defined(__AVX512F__)
  if constexpr (sizeof(Packed) == 64) return _mm512_stream_si512((__m512i*)p, (__m512i)packed);
#endif
#if defined(__AVX2__)
  if constexpr (sizeof(Packed) == 32) return _mm256_stream_si256((__m256i*)p, (__m256i)packed);
#endif
#if defined(__x86_64__)
  if constexpr (sizeof(Packed) == 16) return _mm_stream_si128((__m128i*)p, (__m128i)packed);
#endif
  store_raw(p, packed);
}

// Vectors of T in a cache line.
template <class T>
constexpr int kLineVectors = 64 / int(sizeof(Packed<T>));

// Whether that many elements of T should be written past the caches: the instruction set must be able to, and the
// elements so many that they would evict everything else from the last-level cache.
template <class T>
DLKIT_INLINE bool is_beyond_caches([[maybe_unused]] int64_t elements) {
#if defined(__x86_64__)
  return sizeof(Packed<T>) >= 16 && elements * int64_t(sizeof(T)) >= streaming_threshold_bytes();
#else
  return false;
#endif
}

DLKIT_INLINE void streaming_fence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// The part of a vector that is used: all of it, or its first `count` < kLanes lanes at the end of a row.
struct All {};
struct First {
  int64_t count;
};

// Loads and stores at any address.
template <class T>
DLKIT_INLINE Vector<accumulate_t<T>> load(const T* p, All) {
  return unpack(load_raw<Packed<T>>(p), T());
}

template <class T>
DLKIT_INLINE void store(T* p, Vector<accumulate_t<T>> v, All) {
  store_raw(p, pack(v, T()));
}

#if defined(__AVX2__) && !defined(__AVX512F__)
// A mask of the first `count` lanes of kBytes each.
template <int kBytes>
DLKIT_INLINE __m256i first_lanes(int64_t count) {
  if constexpr (kBytes == 4) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(int(count)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  } else {
    return _mm256_cmpgt_epi64(_mm256_set1_epi64x(count), _mm256_setr_epi64x(0, 1, 2, 3));
  }
}
#endif

// Loads and stores of the first `bytes`, an even number of at most 16. memcpy of a size known only at run time is a
// call, which takes as long as ten vectors.
using Words = uint64_t __attribute__((vector_size(16)));
DLKIT_INLINE uint64_t load_word(const char* p, int64_t bytes) {
  uint64_t word = 0;
  if (bytes & 4) word = load_raw<uint32_t>(p);
  if (bytes & 2) word |= uint64_t(load_raw<uint16_t>(p + (bytes & 4))) << 8 * (bytes & 4);
  return word;
}
DLKIT_INLINE void store_word(char* p, uint64_t word, int64_t bytes) {
  if (bytes & 4) store_raw(p, uint32_t(word));
  if (bytes & 2) store_raw(p + (bytes & 4), uint16_t(word >> 8 * (bytes & 4)));
}
DLKIT_INLINE Words load_words(const void* from, int64_t bytes) {
  const char* const p = static_cast<const char*>(from);
  if (bytes & 8) return Words{load_raw<uint64_t>(p), load_word(p + 8, bytes)};
  return Words{load_word(p, bytes), 0};
}
DLKIT_INLINE void store_words(void* to, Words words, int64_t bytes) {
  char* const p = static_cast<char*>(to);
  if (bytes & 8) {
    store_raw(p, uint64_t(words[0]));
    store_word(p + 8, words[1], bytes);
  } else {
    store_word(p, words[0], bytes);
  }
}

// Lanes past the count read as zero.
template <class T>
DLKIT_INLINE Vector<accumulate_t<T>> load(const T* p, First width) {
#if defined(__AVX512F__)
  const uint32_t mask = (1u << width.count) - 1;
  if constexpr (sizeof(T) == 8) return (VectorF64)_mm512_maskz_loadu_pd(__mmask8(mask), p);
  if constexpr (sizeof(T) == 4) return (VectorF32)_mm512_maskz_loadu_ps(__mmask16(mask), p);
  if constexpr (sizeof(T) == 2) return unpack((VectorU16)_mm256_maskz_loadu_epi16(__mmask16(mask), p), T());
#else
#if defined(__AVX2__)
  if constexpr (sizeof(T) == 4) return (VectorF32)_mm256_maskload_ps((const float*)p, first_lanes<4>(width.count));
  if constexpr (sizeof(T) == 8) return (VectorF64)_mm256_maskload_pd((const double*)p, first_lanes<8>(width.count));
#endif
  Packed<T> packed;
  const Words words = load_words(p, width.count * int64_t(sizeof(T)));
  memcpy(&packed, &words, sizeof(packed) < sizeof(words) ? sizeof(packed) : sizeof(words));
  return unpack(packed, T());
#endif
}

template <class T>
DLKIT_INLINE void store_packed(T* p, Packed<T> packed, First width) {
#if defined(__AVX512F__)
  const uint32_t mask = (1u << width.count) - 1;
  if constexpr (sizeof(T) == 8) _mm512_mask_storeu_pd(p, __mmask8(mask), (__m512d)packed);
  if constexpr (sizeof(T) == 4) _mm512_mask_storeu_ps(p, __mmask16(mask), (__m512)packed);
  if constexpr (sizeof(T) == 2) _mm256_mask_storeu_epi16(p, __mmask16(mask), (__m256i)packed);
#else
  int64_t bytes = width.count * int64_t(sizeof(T));
  char* to = reinterpret_cast<char*>(p);
  Words halves[sizeof(packed) > 16 ? 2 : 1] = {};  // a masked store takes AMD's processors some 20 instructions
  memcpy(halves, &packed, sizeof(packed));
  if (sizeof(packed) > 16 && bytes & 16) {
    store_raw(to, halves[0]);
    halves[0] = halves[sizeof(packed) > 16];
    to += 16;
  }
  store_words(to, halves[0], bytes);
#endif
}

template <class T>
DLKIT_INLINE void store(T* p, Vector<accumulate_t<T>> v, First width) {
  store_packed(p, pack(v, T()), width);
}

// A store that goes past the caches if the pass streams and the vector is whole. A branch that is always the same costs
// less than a second copy of every loop: 4 % of the shortest ones, which lie in the first-level cache.
template <class T, class Width>
DLKIT_INLINE void write_packed(T* p, Packed<T> packed, Width width, bool nt_store) {
  if constexpr (std::is_same_v<Width, All>) {
    nt_store ? non_temporal_store(p, packed) : store_raw(p, packed);
  } else {
    store_packed(p, packed, width);
  }
}

template <class T, class Width>
DLKIT_INLINE void write(T* p, Vector<accumulate_t<T>> v, Width width, bool nt_store) {
  write_packed(p, pack(v, T()), width, nt_store);
}

// f(0), f(1), ... unrolled.
template <class Count, class F>
DLKIT_INLINE void repeat(Count, const F& f) {
  [&]<int... I>(std::integer_sequence<int, I...>)
      DLKIT_INLINE_LAMBDA { (f(I), ...); }(std::make_integer_sequence<int, Count::value>());
}

// Writes several vectors, v[r] to address(r), with one branch for all.
template <int kCount, class V, class Width, class Address>
DLKIT_INLINE void write_all(const V (&v)[kCount], Width width, bool nt_store, const Address& address) {
  constexpr std::integral_constant<int, kCount> kAll;
  if (nt_store) {
    repeat(kAll, [&](int r) DLKIT_INLINE_LAMBDA { write(address(r), v[r], width, true); });
  } else {
    repeat(kAll, [&](int r) DLKIT_INLINE_LAMBDA { store(address(r), v[r], width); });
  }
}

// Writes columns of kRows rows, one vector of each at a time. A store past the caches of less than a cache line must be
// followed at once by the rest of that line: lines of several rows, half filled in turns, made LayerNorm's backward
// half as fast as torch's. Vectors therefore wait here until their line is whole. Streamed rows consist of whole
// aligned lines.
template <class T, int kRows>
struct RowsInTurns {
  Packed<T> waiting[kRows][kLineVectors<T>];

  // Writes v[r] to address(r), which is at `column` of its row.
  template <class V, class Width, class Address>
  DLKIT_INLINE_MEMBER void write(const V (&v)[kRows], int64_t column, Width width, bool nt_store,
                                 const Address& address) {
    constexpr std::integral_constant<int, kRows> kAll;
    constexpr std::integral_constant<int, kLineVectors<T>> kLine;
    constexpr int64_t kStep = kLanes<accumulate_t<T>>;
    if (kLine == 1 || !nt_store || !std::is_same_v<Width, All>) return write_all(v, width, nt_store, address);
    const int64_t place = column / kStep % kLine;
    repeat(kAll, [&](int r) DLKIT_INLINE_LAMBDA { waiting[r][place] = pack(v[r], T()); });
    if (place != kLine - 1) return;
    repeat(kAll, [&](int r) DLKIT_INLINE_LAMBDA {
      T* const line = address(r) - place * kStep;
      repeat(kLine, [&](int k) DLKIT_INLINE_LAMBDA { non_temporal_store(line + k * kStep, waiting[r][k]); });
    });
  }
};

// v, with the lanes past the count taken from `rest`.
template <class V>
DLKIT_INLINE V keep(V v, All, V = V{}) {
  return v;
}
template <class V>
DLKIT_INLINE V keep(V v, First width, V rest = V{}) {
  const auto lane = constant<decltype(v < v)>([](int i) { return i; });
  return lane < decltype(lane[0] + 0)(width.count) ? v : rest;
}

// a * b + c, rounded once where the instruction set can. The build turns automatic contraction off (-ffp-contract=off),
// since it could round the same product differently in two places, and their difference would not be 0.
DLKIT_INLINE VectorF32 fma(VectorF32 a, VectorF32 b, VectorF32 c) {
#if defined(__AVX512F__)
  return (VectorF32)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (VectorF32)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}
DLKIT_INLINE VectorF64 fma(VectorF64 a, VectorF64 b, VectorF64 c) {
#if defined(__AVX512F__)
  return (VectorF64)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif defined(__FMA__)
  return (VectorF64)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#else
  return a * b + c;
#endif
}

// The square root, correctly rounded as IEEE 754 asks.
DLKIT_INLINE VectorF32 square_root(VectorF32 v) {
#if defined(__AVX512F__)
  return (VectorF32)_mm512_sqrt_ps((__m512)v);
#elif defined(__AVX2__)
  return (VectorF32)_mm256_sqrt_ps((__m256)v);
#elif defined(__x86_64__)
  return (VectorF32)_mm_sqrt_ps((__m128)v);
#else
  for (int i = 0; i < kLanes<float>; ++i) v[i] = __builtin_sqrtf(v[i]);
  return v;
#endif
}
DLKIT_INLINE VectorF64 square_root(VectorF64 v) {
#if defined(__AVX512F__)
  return (VectorF64)_mm512_sqrt_pd((__m512d)v);
#elif defined(__AVX2__)
  return (VectorF64)_mm256_sqrt_pd((__m256d)v);
#elif defined(__x86_64__)
  return (VectorF64)_mm_sqrt_pd((__m128d)v);
#else
  for (int i = 0; i < kLanes<double>; ++i) v[i] = __builtin_sqrt(v[i]);
  return v;
#endif
}

// The larger of two; b where a is NaN. GCC needs two instructions for the plain comparison.
DLKIT_INLINE VectorF32 maximum(VectorF32 a, VectorF32 b) {
#if defined(__AVX512F__)
  return (VectorF32)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (VectorF32)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}
DLKIT_INLINE VectorF64 maximum(VectorF64 a, VectorF64 b) { return a > b ? a : b; }

// The largest lane; none may be NaN. Found by halving an array in memory, which GCC turns into shuffles.
template <class V>
DLKIT_INLINE auto largest_lane(V v) {
  using E = std::remove_cvref_t<decltype(v[0])>;
  constexpr int kCount = sizeof(V) / sizeof(E);
  E lanes[kCount];
  memcpy(lanes, &v, sizeof(v));
#pragma GCC unroll 4
  for (int half = kCount / 2; half > 0; half /= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < half; ++i) lanes[i] = lanes[i] > lanes[i + half] ? lanes[i] : lanes[i + half];
  }
  return lanes[0];
}

// The sum of all lanes in double, by halving: a fixed order.
DLKIT_INLINE double sum_lanes(VectorF64 v) {
#if DLKIT_VECTOR_BYTES == 64
  double __attribute__((vector_size(32))) quarters[2];
  memcpy(quarters, &v, sizeof(v));
  quarters[0] += quarters[1];
  double __attribute__((vector_size(16))) halves[2];
  memcpy(halves, quarters, sizeof(halves));
  halves[0] += halves[1];
  return halves[0][0] + halves[0][1];
#elif DLKIT_VECTOR_BYTES == 32
  return (v[0] + v[2]) + (v[1] + v[3]);
#else
  return v[0] + v[1];
#endif
}
DLKIT_INLINE double sum_lanes(VectorF32 v) {
  using HalfF32 = float __attribute__((vector_size(kVectorBytes / 2)));
  HalfF32 halves[2];
  memcpy(halves, &v, sizeof(v));
  return sum_lanes(__builtin_convertvector(halves[0], VectorF64) + __builtin_convertvector(halves[1], VectorF64));
}

// The lanes I of a followed by b.
template <int... I, class V>
DLKIT_INLINE V shuffle(V a, V b) {
#if __has_builtin(__builtin_shufflevector)
  return __builtin_shufflevector(a, b, I...);
#else
  using Mask = decltype(a < b);
  return __builtin_shuffle(a, b, Mask{I...});
#endif
}

// [a0 + a1, a2 + a3, ..., b0 + b1, b2 + b3, ...]
template <class V>
DLKIT_INLINE V add_pairs(V a, V b) {
  constexpr int kCount = sizeof(V) / sizeof(a[0]);
  return [&]<int... I>(std::integer_sequence<int, I...>) DLKIT_INLINE_LAMBDA {
    return shuffle<(2 * I)...>(a, b) + shuffle<(2 * I + 1)...>(a, b);
  }(std::make_integer_sequence<int, kCount>());
}

// Swaps the squares of kStep x kStep lanes that lie above the diagonal with those below it.
template <int kStep, class V, int kCount>
DLKIT_INLINE void swap_squares(V (&rows)[kCount]) {
  [&]<int... I>(std::integer_sequence<int, I...>) DLKIT_INLINE_LAMBDA {
#pragma GCC unroll 16
    for (int r = 0; r < kCount; ++r) {
      if (r & kStep) continue;
      const V a = rows[r], b = rows[r + kStep];
      rows[r] = shuffle<(I & kStep ? kCount + I - kStep : I)...>(a, b);
      rows[r + kStep] = shuffle<(I & kStep ? kCount + I : I + kStep)...>(a, b);
    }
  }(std::make_integer_sequence<int, kCount>());
}

// The first two steps for lanes of 4 bytes: swap_squares<1> and <2> in 2 instructions a vector instead of 3.
template <class V, int kCount>
DLKIT_INLINE void swap_in_fours(V (&rows)[kCount]) {
  [&]<int... I>(std::integer_sequence<int, I...>) DLKIT_INLINE_LAMBDA {
#pragma GCC unroll 4
    for (int r = 0; r < kCount; r += 4) {
      V pairs[4];
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
        const V a = rows[r + 2 * i], b = rows[r + 2 * i + 1];
        pairs[i] = shuffle<(I & ~3) + (I & 2) / 2 + (I & 1) * kCount...>(a, b);
        pairs[2 + i] = shuffle<(I & ~3) + (I & 2) / 2 + 2 + (I & 1) * kCount...>(a, b);
      }
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
        const V a = pairs[2 * i], b = pairs[2 * i + 1];
        rows[r + 2 * i] = shuffle<(I & ~3) + (I & 1) + (I & 2) / 2 * kCount...>(a, b);
        rows[r + 2 * i + 1] = shuffle<(I & ~3) + (I & 1) + 2 + (I & 2) / 2 * kCount...>(a, b);
      }
    }
  }(std::make_integer_sequence<int, kCount>());
}

// Transposes as many vectors as one has lanes: lane i of vector r becomes lane r of vector i.
template <class V, int kCount>
DLKIT_INLINE void transpose(V (&rows)[kCount]) {
  static_assert(kCount * sizeof(rows[0][0]) == sizeof(V), "one vector a lane");
  if constexpr (sizeof(rows[0][0]) == 4) {
    swap_in_fours(rows);
  } else {
    swap_squares<1>(rows);
    if constexpr (kCount >= 4) swap_squares<2>(rows);
  }
  if constexpr (kCount >= 8) swap_squares<4>(rows);
  if constexpr (kCount >= 16) swap_squares<8>(rows);
}

// Lane r of the result is the sum of all lanes of vectors[r], by pairs of adjacent ones: a fixed order, the same for
// one vector as for kLanes of them. 3 instructions a sum where sum_lanes takes 10.
template <class V, int kCount>
DLKIT_INLINE V sums_of_lanes(const V (&vectors)[kCount]) {
  constexpr int kLaneCount = sizeof(V) / sizeof(vectors[0][0]);
  static_assert(kCount == 1 || kCount == kLaneCount, "one, or one a lane");
  V level[kCount];
  for (int i = 0; i < kCount; ++i) level[i] = vectors[i];
#pragma GCC unroll 4
  for (int left = kLaneCount / 2; left > 0; left /= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < (kCount == 1 ? 1 : left); ++i)
      level[i] = add_pairs(level[2 * i % kCount], level[(2 * i + 1) % kCount]);
  }
  return level[0];
}

// Prefetches kElements elements from p on into the second-level cache, each cache line once.
template <int64_t kElements, class T>
DLKIT_INLINE void prefetch(const T* p) {
#pragma GCC unroll 8
  for (int64_t line = 0; line < kElements; line += 64 / int64_t(sizeof(T))) __builtin_prefetch(p + line, 0, 2);
}

// Calls f(column, slot, width) for every vector of a row: kUnroll independent slots in the main loop, slot 0 after it.
template <class A, int kUnroll, class F>
DLKIT_INLINE void for_columns(int64_t begin, int64_t end, const F& f) {
  constexpr int64_t kStep = kLanes<A>;
  int64_t column = begin;
  for (; column + kUnroll * kStep <= end; column += kUnroll * kStep) {
#pragma GCC unroll 8
    for (int slot = 0; slot < kUnroll; ++slot) f(column + slot * kStep, slot, All{});
  }
  for (; column + kStep <= end; column += kStep) f(column, 0, All{});
  if (column < end) f(column, 0, First{end - column});
}

// Calls f(column, count, width) for kCount vectors at a time, then for each that is left; count is a constant.
template <class A, int kCount, class F>
DLKIT_INLINE void for_vectors(int64_t begin, int64_t end, const F& f) {
  constexpr int64_t kStep = kLanes<A>;
  int64_t column = begin;
  for (; column + kCount * kStep <= end; column += kCount * kStep)
    f(column, std::integral_constant<int, kCount>(), All{});
  for (; column + kStep <= end; column += kStep) f(column, std::integral_constant<int, 1>(), All{});
  if (column < end) f(column, std::integral_constant<int, 1>(), First{end - column});
}

// totals[k] = the sum over all columns of what f(column, slot, width, terms) puts into terms[k]. Lanes past the end
// must be zero. A lane adds up 64 terms in A before it goes into a compensated double, so the error does not grow with
// the row.
template <class A, int kTotals, class F>
DLKIT_INLINE void sum_columns(int64_t cols, double (&totals)[kTotals], const F& f) {
  constexpr int64_t kRun = 64 * kSlots * kLanes<A>;
  double lost[kTotals] = {};
  for (int k = 0; k < kTotals; ++k) totals[k] = 0;
  for (int64_t begin = 0; begin < cols; begin += kRun) {
    Vector<A> sums[kSlots][kTotals] = {};
    for_columns<A, kSlots>(begin, begin + kRun < cols ? begin + kRun : cols,
                           [&](int64_t column, int slot, auto width)
                               DLKIT_INLINE_LAMBDA { f(column, slot, width, sums[slot]); });
#pragma GCC unroll 4  // keeps the sums in registers
    for (int k = 0; k < kTotals; ++k) {
      const double term = sum_lanes((sums[0][k] + sums[1][k]) + (sums[2][k] + sums[3][k])) - lost[k];
      const double total = totals[k] + term;
      lost[k] = total - total == 0 ? (total - totals[k]) - term : 0;  // 0 after an infinity
      totals[k] = total;
    }
  }
}

}  // namespace dlkit::DLKIT_ISA
