// An optimizer's step on the CPU: one parallel loop over blocks of 256 elements of all tensors, each array read and
// written once (AdamW in fp32: 4 words read and 3 written a parameter, 28 bytes, the least there is). Which thread
// takes which blocks changes no result. The flags of a step are branches inside the loop over vectors: the root and the
// division take some 25 cycles for a vector of 16 elements, a predicted branch one. 8-bit states are unpacked to fp32
// block by block, in L1.
#include <cmath>

#include "../common/cpu/parallel.h"
#include "../common/cpu/simd.h"
#include "../common/dispatch.h"
#include "dynamic_map.h"
#include "kernel.h"
#include "math.h"

namespace dlkit::optim {

namespace DLKIT_ISA {
namespace {

using namespace dlkit::DLKIT_ISA;

template <class A>
struct Math {
  using V = Vector<A>;
  DLKIT_INLINE V splat(A value) { return broadcast<A>(value); }
  DLKIT_INLINE V fma(V a, V b, V c) { return dlkit::DLKIT_ISA::fma(a, b, c); }
  DLKIT_INLINE V sqrt(V v) { return square_root(v); }
  template <class Condition>
  DLKIT_INLINE V choose(Condition condition, V a, V b) {
    return condition ? a : b;
  }
};

// Adjacent elements, from `first` on, of the step's tensor number `index`.
template <class T, class S>
struct Span {
  T* param;
  T* grad;  // null where wide_grad has it
  accumulate_t<T>* wide_grad;
  S* states[kStates];
  int16_t* remainder;
  accumulate_t<T>* ema;
  int64_t count, index, first;
};

DLKIT_INLINE void store_bits(void* p, VectorU32 bits, All) {
  const auto packed = __builtin_convertvector(bits, VectorU16);
  memcpy(p, &packed, sizeof(packed));
}
DLKIT_INLINE void store_bits(void* p, VectorU32 bits, First width) {
  const auto packed = __builtin_convertvector(bits, VectorU16);
  memcpy(p, &packed, size_t(width.count) * sizeof(uint16_t));
}

// join(), split() and round_stochastically() of math.h on vectors.
DLKIT_INLINE VectorI32 extend_sign(VectorU16 bits) {
#if defined(__AVX512F__)  // GCC needs more instructions for the plain conversion
  return (VectorI32)_mm512_cvtepi16_epi32((__m256i)bits);
#elif defined(__AVX2__)
  return (VectorI32)_mm256_cvtepi16_epi32((__m128i)bits);
#else
  return (VectorI32)(__builtin_convertvector(bits, VectorU32) << 16) >> 16;
#endif
}
DLKIT_INLINE VectorI32 load_remainder(const int16_t* p, All) { return extend_sign(load_raw<VectorU16>(p)); }
DLKIT_INLINE VectorI32 load_remainder(const int16_t* p, First width) {
  VectorU16 bits = {};
  memcpy(&bits, p, size_t(width.count) * sizeof(int16_t));
  return extend_sign(bits);
}

// `rest` where the bf16 value `high`, given as fp32 bits, may have a remainder, else 0.
DLKIT_INLINE VectorU32 rest_beside(VectorU32 high, VectorU32 rest) {
#if defined(__AVX512DQ__)
  const __mmask16 has_none = _mm512_fpclass_ps_mask((__m512)high, 0x9f);  // zero, infinity and NaN of every kind
  return (VectorU32)_mm512_maskz_mov_epi32(_knot_mask16(has_none), (__m512i)rest);
#else
  const VectorI32 place = (VectorI32)((high - 0x10000) & 0x7fff0000);  // zero becomes the largest
#if defined(__AVX2__)  // GCC needs two instructions for a comparison with a constant
  return rest & (VectorU32)_mm256_cmpgt_epi32(_mm256_set1_epi32(0x7f7f0000), (__m256i)place);
#else
  return rest & (VectorU32)(place < 0x7f7f0000);
#endif
#endif
}
template <class Width>
DLKIT_INLINE VectorF32 join(const BFloat16* high, const int16_t* remainder, Width width) {
  const VectorU32 wide = (VectorU32)load(high, width);
  return (VectorF32)(wide + rest_beside(wide, (VectorU32)load_remainder(remainder, width)));
}

// Stores the upper 16 bits of `high` and the lower 16 bits of `rest` to two arrays.
template <class Width>
DLKIT_INLINE void store_halves(VectorU32 high, VectorU32 rest, BFloat16* to_high, int16_t* to_rest, Width width) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  if constexpr (std::is_same_v<Width, All>) {  // together, in half the instructions
    const __m256i sort =
        _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15));
    const __m256i pairs = _mm256_blend_epi16((__m256i)high, (__m256i)rest, 0x55);
    const __m256i sorted = _mm256_permute4x64_epi64(_mm256_shuffle_epi8(pairs, sort), 0xd8);
    _mm_storeu_si128((__m128i*)to_rest, _mm256_castsi256_si128(sorted));
    _mm_storeu_si128((__m128i*)to_high, _mm256_extracti128_si256(sorted, 1));
    return;
  }
#endif
  store_bits(to_high, high >> 16, width);
  store_bits(to_rest, rest, width);
}
template <class Width>
DLKIT_INLINE void split(VectorF32 value, BFloat16* high, int16_t* remainder, Width width) {
  const VectorU32 bits = (VectorU32)value, rounded = (bits + 0x8000) & 0xffff0000;
  const VectorU32 number = value == value ? rounded : VectorU32{} + 0x7fc00000;
  store_halves(number, rest_beside(rounded, bits), high, remainder, width);
}

DLKIT_INLINE VectorF32 exponent_of(VectorF32 value) {  // 2^-14 below that
  const VectorU32 exponent = (VectorU32)value & 0x7f800000, least = VectorU32{} + (uint32_t(127 - 14) << 23);
  return (VectorF32)(exponent < least ? least : exponent);
}
DLKIT_INLINE VectorF32 remainder_unit(VectorF32 high) {
  return (VectorF32)((VectorU32)exponent_of(high) - (uint32_t(26) << 23));
}
DLKIT_INLINE VectorF32 inverse_of_power(VectorF32 power) {
  return (VectorF32)((uint32_t(254) << 23) - (VectorU32)power);
}
template <class Width>
DLKIT_INLINE VectorF32 join(const Float16* high, const int16_t* remainder, Width width) {
  const VectorF32 wide = load(high, width);
  const VectorI32 rest = load_remainder(remainder, width);
  const VectorF32 sum = wide + __builtin_convertvector(rest, VectorF32) * remainder_unit(wide);
  const VectorF32 joined = round_to<Float16>(sum) == wide ? sum : wide;
  return (rest & (VectorI32)((VectorI32)wide != 0)) != 0 ? joined : wide;
}
template <class Width>
DLKIT_INLINE void split(VectorF32 value, Float16* high, int16_t* remainder, Width width) {
  const VectorF32 wide = round_to<Float16>(value);
  const VectorF32 rest = (value - wide) * inverse_of_power(remainder_unit(wide));
  VectorF32 rounded = rest + 12582912.0f - 12582912.0f;
  rounded = rounded > 32767 ? broadcast<float>(32767) : rounded;
  rounded = rounded < -32767 ? broadcast<float>(-32767) : rounded;
  rounded = rest - rest == 0 ? rounded : VectorF32{};
  const VectorU32 is_tiny = (VectorU32)((wide == 0) & (rounded != 0));
  store(high, (VectorF32)((VectorU32)wide | (is_tiny & 0x80000000)), width);
  store_bits(remainder, (VectorU32) __builtin_convertvector(rounded, VectorI32), width);
}

DLKIT_INLINE VectorF32 round_stochastically(VectorF32 value, VectorU32 random, BFloat16) {
  const VectorU32 is_nan = (VectorU32)(value != value);
  const VectorU32 rounded = ((VectorU32)value + random) & 0xffff0000;
  return (VectorF32)((is_nan & 0x7fc00000) | (~is_nan & rounded));
}
DLKIT_INLINE VectorF32 round_stochastically(VectorF32 value, VectorU32 random, Float16) {
  const VectorF32 unit = (VectorF32)((VectorU32)exponent_of(value) - (uint32_t(10) << 23));
  const VectorF32 magnitude = (VectorF32)((VectorU32)value & 0x7fffffff);
  const VectorF32 part = __builtin_convertvector((VectorI32)(random >> 3), VectorF32) * (1.0f / 8192);
  const VectorF32 steps = magnitude * inverse_of_power(unit) + part;
  const VectorF32 whole = __builtin_convertvector(__builtin_convertvector(steps, VectorI32), VectorF32);
  const VectorF32 rounded = (steps < 4096 ? whole : steps) * unit;
  const VectorF32 result = (VectorF32)((VectorU32)rounded | ((VectorU32)value & 0x80000000));
  return value - value == 0 ? result : value;
}

// stochastic_block() for all elements of a block of kBlock, 16 bits each, in order. The words of 32 Philox blocks lie
// side by side, which compilers vectorize: 12 times as fast as one block after the other. Not inlined, since a step may
// draw for the parameter and each state.
__attribute__((noinline)) void fill_random(uint64_t seed, int64_t index, int64_t first, int stream, uint16_t* bits) {
  constexpr int kCount = kBlock / 8;
  uint32_t c0[kCount], c1[kCount], c2[kCount], c3[kCount];
  for (int b = 0; b < kCount; ++b) {
    const uint64_t block = stochastic_counter(first / 8 + b, stream);
    c0[b] = uint32_t(index), c1[b] = 0, c2[b] = uint32_t(block), c3[b] = uint32_t(block >> 32);
  }
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    for (int b = 0; b < kCount; ++b) {
      const uint64_t low = uint64_t(kPhiloxMultiply0) * c0[b], high = uint64_t(kPhiloxMultiply1) * c2[b];
      c0[b] = uint32_t(high >> 32) ^ c1[b] ^ k0;
      c2[b] = uint32_t(low >> 32) ^ c3[b] ^ k1;
      c1[b] = uint32_t(high);
      c3[b] = uint32_t(low);
    }
    k0 += kPhiloxKeyStep0;
    k1 += kPhiloxKeyStep1;
  }
  for (int b = 0; b < kCount; ++b) {
    const uint32_t words[4] = {c0[b], c1[b], c2[b], c3[b]};
    for (int j = 0; j < 8; ++j) bits[8 * b + j] = uint16_t(words[j / 2] >> 16 * (j % 2));
  }
}

// The 16 random bits of each lane at element i, from fill_random().
DLKIT_INLINE VectorU32 random_lanes(const uint16_t* bits, int64_t i) {
  return __builtin_convertvector(load_raw<VectorU16>(bits + i % kBlock), VectorU32);
}

// Parameters to the type of arithmetic and back. `stored` is the value that a later reader finds, for the average of
// weights.
template <class T, class S, class Width>
DLKIT_INLINE Vector<accumulate_t<T>> load_param(const Span<T, S>& span, int64_t i, Width width) {
  if constexpr (sizeof(T) == 2) {
    if (span.remainder != nullptr) return join(span.param + i, span.remainder + i, width);
  }
  return load(span.param + i, width);
}
template <class T, class S, class Width>
DLKIT_INLINE Vector<accumulate_t<T>> store_param(const uint16_t* random, const Span<T, S>& span, int64_t i,
                                                 Vector<accumulate_t<T>> value, Width width) {
  if constexpr (sizeof(T) == 2) {
    if (span.remainder != nullptr) {
      split(value, span.param + i, span.remainder + i, width);
      return value;
    }
    if (random != nullptr) value = round_stochastically(value, random_lanes(random, i), T());
    store(span.param + i, value, width);
    return span.ema != nullptr ? round_to<T>(value) : value;
  }
  store(span.param + i, value, width);
  return value;
}

// A gradient of another type than its 16-bit parameter is fp32 here.
template <class T, class S, class Width>
DLKIT_INLINE Vector<accumulate_t<T>> load_grad(const Span<T, S>& span, int64_t i, Width width) {
  if constexpr (sizeof(T) == 2) {
    if (span.grad == nullptr) return load(span.wide_grad + i, width);
  }
  return load(span.grad + i, width);
}
template <class T, class S, class Width>
DLKIT_INLINE void store_grad(const Span<T, S>& span, int64_t i, Vector<accumulate_t<T>> value, Width width) {
  if constexpr (sizeof(T) == 2) {
    if (span.grad == nullptr) return store(span.wide_grad + i, value, width);
  }
  store(span.grad + i, value, width);
}

constexpr int kAnyStates = -1;
template <int kMask>
using Has = std::integral_constant<int, kMask>;

// One of the states that kHas has a bit for; with kHas of kAnyStates, that the span has.
template <class S, class Width, int kHas, int kIndex>
struct State {
  S* p;
  Width width;
  Vector<accumulate_t<S>> value;
  DLKIT_INLINE_MEMBER State(S* const (&states)[kStates], int64_t i, Width w)
      : p(states[kIndex] == nullptr ? nullptr : states[kIndex] + i), width(w), value{} {
    if (exists()) value = load(p, width);
  }
  DLKIT_INLINE_MEMBER bool exists() const { return kHas == kAnyStates ? p != nullptr : kHas >> kIndex & 1; }
  DLKIT_INLINE_MEMBER auto* get() { return exists() ? &value : nullptr; }
  DLKIT_INLINE_MEMBER void put(const uint16_t* random, int64_t i) {
    if (!exists()) return;
    if constexpr (sizeof(S) == 2 && kHas == kAnyStates) {
      if (random != nullptr) value = round_stochastically(value, random_lanes(random, i), S());
    }
    store(p, value, width);
  }
};

// The arguments are copies: a store through a pointer to float might change an object in memory, which the loop would
// then read again after every store. With kHas other than kAnyStates there are those states and no other optional
// arrays.
template <Algorithm kAlgorithm, int kHas, class T, class S>
void update_by(const uint64_t seed, const bool write_grads, const Scalars<accumulate_t<T>> k, Span<T, S> span) {
  using A = accumulate_t<T>;
  using M = Math<A>;
  constexpr bool kPlain = kHas != kAnyStates, kRandom = !kPlain && (sizeof(T) == 2 || sizeof(S) == 2);
  if constexpr (kPlain) span.remainder = nullptr, span.ema = nullptr;
  alignas(64) uint16_t bits[kRandom ? 1 + kStates : 1][kBlock];  // of the parameter and the states
  const uint16_t* random[1 + kStates] = {};                      // null for those that are not rounded stochastically
  if (kRandom && sizeof(T) == 2 && k.stochastic_rounding && span.remainder == nullptr) random[0] = bits[0];
  for (int s = 0; kRandom && sizeof(S) == 2 && s < kStates; ++s) {
    if (k.stochastic_states >> s & 1 && span.states[s] != nullptr) random[s + 1] = bits[s + 1];
  }
  const bool draws = random[0] != nullptr || random[1] != nullptr || random[2] != nullptr || random[3] != nullptr;
  for_columns<A, kPlain ? 2 : 1>(0, span.count, [&](int64_t i, int, auto width) DLKIT_INLINE_LAMBDA {
    if (kRandom && draws && i % kBlock == 0) {
      for (int stream = 0; stream < 1 + kStates; ++stream) {
        if (random[stream] != nullptr) fill_random(seed, span.index, span.first + i, stream, bits[stream]);
      }
    }
    using Width = decltype(width);
    Vector<A> g = (kPlain ? load(span.grad + i, width) : load_grad(span, i, width)) * k.grad_factor;
    Vector<A> p = load_param(span, i, width);
    if (!kPlain && write_grads) store_grad(span, i, g, width);
    State<S, Width, kHas, 0> first(span.states, i, width);
    State<S, Width, kHas, 1> second(span.states, i, width);
    State<S, Width, kHas, 2> third(span.states, i, width);
    if constexpr (kAlgorithm == Algorithm::Adam) adam<M>(k, g, p, first.value, second.value, third.get());
    if constexpr (kAlgorithm == Algorithm::Sgd) sgd<M>(k, g, p, first.get());
    if constexpr (kAlgorithm == Algorithm::RmsProp) rmsprop<M>(k, g, p, first.value, second.get(), third.get());
    first.put(random[1], i), second.put(random[2], i), third.put(random[3], i);
    p = store_param(random[0], span, i, p, width);
    if (span.ema != nullptr) store(span.ema + i, lerp<M>(load(span.ema + i, width), p, k.ema_rest), width);
  });
}

// The most common cases have a loop without branches on the arrays there are: 2 to 3 times as fast in cache, and SGD
// and 16-bit states are then limited only by memory.
template <Algorithm kAlgorithm, class T, class S>
void update_with(const Step& op, Scalars<accumulate_t<T>> k, const Span<T, S>& span) {
  if constexpr (std::is_same_v<T, S>) {
    const bool random = sizeof(T) == 2 && (k.stochastic_rounding || k.stochastic_states != 0);
    if (span.grad != nullptr && span.remainder == nullptr && span.ema == nullptr && !op.write_grads && !random) {
      if (k.maximize) k.grad_factor = -k.grad_factor, k.maximize = false;
      int has = 0;
      for (int s = 0; s < kStates; ++s) has |= (span.states[s] != nullptr) << s;
      const auto run = [&](auto mask) { update_by<kAlgorithm, mask(), T, S>(op.seed, false, k, span); };
      if constexpr (kAlgorithm == Algorithm::Adam) return has == 3 ? run(Has<3>()) : run(Has<7>());
      if constexpr (kAlgorithm == Algorithm::Sgd) return has == 0 ? run(Has<0>()) : run(Has<1>());
      if constexpr (kAlgorithm == Algorithm::RmsProp) {
        return has == 1 ? run(Has<1>()) : has == 3 ? run(Has<3>()) : has == 5 ? run(Has<5>()) : run(Has<7>());
      }
    }
  }
  update_by<kAlgorithm, kAnyStates>(op.seed, op.write_grads, k, span);
}

template <class T, class S>
void update(const Step& op, const Scalars<accumulate_t<T>>& k, const Span<T, S>& span) {
  switch (op.algorithm) {
    case Algorithm::Adam:
      return update_with<Algorithm::Adam>(op, k, span);
    case Algorithm::Sgd:
      return update_with<Algorithm::Sgd>(op, k, span);
    case Algorithm::RmsProp:
      return update_with<Algorithm::RmsProp>(op, k, span);
  }
}

// encode() by a table. An index is the upper 16 bits of values: sign, exponent from 2^-24 on and 7 bits of mantissa. An
// entry is the number of midpoints below all values of that index. At most one midpoint lies among these values: one
// comparison replaces a search of 8 steps.
struct Codes {
  static constexpr int kExponents = 25, kCells = kExponents * 128;
  static constexpr uint32_t kFirst = uint32_t(127 - 24) << 7;
  uint8_t below[2][kCells];  // for positive values and for negative ones
};
constexpr Codes make_codes(const DynamicMap& map) {
  Codes codes{};
  int positive = 0, negative = 0;
  for (int cell = 0; cell < Codes::kCells; ++cell) {
    // The least magnitude of a cell: the smallest of its positive values, and of its negative ones the largest.
    float unit = 1.0f / (1 << 24);
    for (int i = 0; i < cell / 128; ++i) unit *= 2;
    const float low = cell == 0 ? 0 : unit * (1 + float(cell % 128) / 128),
                high = unit * (1 + float(cell % 128 + 1) / 128);
    while (map.midpoints[positive] < low) ++positive;
    codes.below[0][cell] = uint8_t(positive);
    if (cell == 0) negative = positive;
    while (negative > 0 && !(map.midpoints[negative - 1] < -high)) --negative;
    codes.below[1][cell] = uint8_t(negative);
  }
  return codes;
}
constexpr Codes kSignedCodes = make_codes(kSignedMap), kUnsignedCodes = make_codes(kUnsignedMap);

DLKIT_INLINE uint8_t encode(const Codes& codes, const DynamicMap& map, float value) {
  const uint32_t bits = bit_cast<uint32_t>(value), magnitude = bits >> 16 & 0x7fff;
  const uint32_t above = magnitude < Codes::kFirst ? 0 : magnitude - Codes::kFirst;
  const uint32_t cell = above < Codes::kCells ? above : Codes::kCells - 1;
  const uint8_t code = codes.below[bits >> 31][cell];
  return uint8_t(code + (map.midpoints[code] < value));
}

// Unpacks one block of an 8-bit state to fp32; the function below packs it.
DLKIT_INLINE void decode(const uint8_t* codes, float scale, const DynamicMap& map, int64_t count, float* values) {
  for (int64_t i = 0; i < count; ++i) values[i] = map.values[codes[i]] * scale;
}
DLKIT_INLINE float encode_block(const float* values, bool with_sign, int64_t count, uint8_t* codes) {
  const Codes& table = with_sign ? kSignedCodes : kUnsignedCodes;
  const DynamicMap& map = with_sign ? kSignedMap : kUnsignedMap;
  uint32_t largest = 0;  // magnitudes are ordered as their bits are, NaN last
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t magnitude = bit_cast<uint32_t>(values[i]) & 0x7fffffff;
    largest = largest < magnitude ? magnitude : largest;
  }
  const float scale = bit_cast<float>(largest), divisor = scale == 0 ? 1 : scale;
  for (int64_t i = 0; i < count; ++i) {
    const uint8_t code = encode(table, map, values[i] / divisor);
    codes[i] = code | uint8_t(code == 0 && least_code(with_sign, values[i], scale));
  }
  return scale;
}

template <class T>
void update_int8(const Step& op, const Scalars<float>& k, const Tensor& tensor, Span<T, float> span) {
  alignas(64) float values[kStates][kBlock];
  const int64_t block = span.first / kBlock;
  for (int s = 0; s < kStates; ++s) {
    span.states[s] = nullptr;
    if (tensor.states[s] == nullptr) continue;
    const DynamicMap& map = has_sign(op.algorithm, s) ? kSignedMap : kUnsignedMap;
    decode(static_cast<uint8_t*>(tensor.states[s]) + span.first, tensor.scales[s][block], map, span.count, values[s]);
    span.states[s] = values[s];
  }
  update(op, k, span);
  for (int s = 0; s < kStates; ++s) {
    if (tensor.states[s] == nullptr) continue;
    tensor.scales[s][block] = encode_block(values[s], has_sign(op.algorithm, s), span.count,
                                           static_cast<uint8_t*>(tensor.states[s]) + span.first);
  }
}

// `wide_grad` is the gradient of these elements in fp32, or null where the gradient is of T.
template <class T, class S>
Span<T, S> span_of(const Tensor& tensor, accumulate_t<T>* wide_grad, int64_t index, int64_t begin, int64_t end) {
  Span<T, S> span{at<T>(tensor.param, begin),
                  wide_grad == nullptr ? at<T>(tensor.grad, begin) : nullptr,
                  wide_grad,
                  {},
                  at<int16_t>(tensor.remainder, begin),
                  at<accumulate_t<T>>(tensor.ema, begin),
                  end - begin,
                  index,
                  begin};
  if constexpr (std::is_same_v<T, float>) {
    if (wide_grad != nullptr) span.grad = wide_grad;
  }
  for (int s = 0; s < kStates; ++s) span.states[s] = at<S>(tensor.states[s], begin);
  return span;
}

template <class T>
void update_states(const Step& op, const Scalars<accumulate_t<T>>& k, const Tensor& tensor, accumulate_t<T>* wide_grad,
                   int64_t index, int64_t begin, int64_t end) {
  const auto run = [&](auto state) {
    update(op, k, span_of<T, decltype(state)>(tensor, wide_grad, index, begin, end));
  };
  if constexpr (std::is_same_v<T, double>) {
    run(double());
  } else {
    switch (tensor.state_type) {
      case StateType::F32:
        return run(float());
      case StateType::BF16:
        return run(BFloat16());
      case StateType::F16:
        if constexpr (std::is_same_v<T, Float16>) run(Float16());
        return;
      case StateType::Int8:
        for (int64_t first = begin; first < end; first += kBlock) {
          float* grad = wide_grad == nullptr ? nullptr : wide_grad + (first - begin);
          update_int8(op, k, tensor, span_of<T, float>(tensor, grad, index, first, min64(first + kBlock, end)));
        }
        return;
      case StateType::F64:
        return;
    }
  }
}

// Converts 16-bit gradients to fp32; the function below converts them back.
template <class G>
void widen_grad(const G* grad, int64_t count, float* wide) {
  for_columns<float, 1>(
      0, count, [&](int64_t i, int, auto width) DLKIT_INLINE_LAMBDA { store(wide + i, load(grad + i, width), width); });
}
template <class G>
void narrow_grad(const float* wide, int64_t count, G* grad) {
  for_columns<float, 1>(
      0, count, [&](int64_t i, int, auto width) DLKIT_INLINE_LAMBDA { store(grad + i, load(wide + i, width), width); });
}

// For 16-bit gradients of another type than the parameter's: converted to fp32 block by block, in L1.
template <class T, class G>
void update_widened(const Step& op, const Scalars<float>& k, const Tensor& tensor, G* grad, int64_t index,
                    int64_t begin, int64_t end) {
  alignas(64) float wide[kBlock];
  for (int64_t first = begin; first < end; first += kBlock) {
    const int64_t count = min64(kBlock, end - first);
    widen_grad(grad + first, count, wide);
    update_states<T>(op, k, tensor, wide, index, first, first + count);
    if (op.write_grads) narrow_grad(wide, count, grad + first);
  }
}

template <class T>
void update_typed(const Step& op, const Group& group, const Tensor& tensor, double factor, int64_t index, int64_t begin,
                  int64_t end) {
  using A = accumulate_t<T>;
  const double lr = group.lr_pointer != nullptr ? double(*group.lr_pointer) : group.lr;
  const auto k =
      scalars<A>(op.algorithm, group, lr, tensor.bias_correction1, std::sqrt(tensor.bias_correction2), factor);
  if constexpr (!std::is_same_v<T, double>) {
    if (tensor.grad_dtype != tensor.dtype) {
      switch (tensor.grad_dtype) {
        case DType::F32:
          return update_states<T>(op, k, tensor, at<float>(tensor.grad, begin), index, begin, end);
        case DType::BF16:
          return update_widened<T>(op, k, tensor, static_cast<BFloat16*>(tensor.grad), index, begin, end);
        case DType::F16:
          return update_widened<T>(op, k, tensor, static_cast<Float16*>(tensor.grad), index, begin, end);
        case DType::F64:
          return;
      }
    }
  }
  update_states<T>(op, k, tensor, nullptr, index, begin, end);
}

// Calls f(index, begin, end) for the elements of each tensor that lie in the blocks from `begin` to `end`.
template <class Array, class F>
DLKIT_INLINE void for_blocks(const Array* tensors, const int64_t* first_block, int64_t count, int64_t begin,
                             int64_t end, const F& f) {
  int64_t low = 0, high = count;  // the last tensor that begins at or before `begin`
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (first_block[middle] <= begin ? low : high) = middle;
  }
  for (int64_t i = low; begin < end; ++i) {
    const int64_t last = min64(end, first_block[i + 1]);
    if (last <= begin) continue;
    f(i, (begin - first_block[i]) * kBlock, min64((last - first_block[i]) * kBlock, tensors[i].numel));
    begin = last;
  }
}

constexpr int64_t kGrainBlocks = kGrain / kBlock;

// The sum of squares of adjacent elements, in fp32 within a block.
template <class T>
double sum_squares(const T* grad, int64_t begin, int64_t end) {
  using A = accumulate_t<T>;
  double totals[1];
  sum_columns<A>(end - begin, totals, [&](int64_t i, int, auto width, auto* terms) DLKIT_INLINE_LAMBDA {
    const Vector<A> g = load(grad + begin + i, width);
    terms[0] = fma(g, g, terms[0]);
  });
  return totals[0];
}

}  // namespace

void step(const Step& op) {
  if (op.found_inf != nullptr && *op.found_inf != 0) return;
  double factor = 1;
  if (op.grad_scale != nullptr) factor /= double(*op.grad_scale);
  if (op.grad_norm != nullptr) factor *= clip_coefficient(read(op.grad_norm, op.norm_dtype), op.max_norm);
  parallel_for(op.first_block[op.tensor_count], kGrainBlocks, [&](int64_t first, int64_t last) {
    for_blocks(op.tensors, op.first_block, op.tensor_count, first, last, [&](int64_t i, int64_t begin, int64_t end) {
      const Tensor& tensor = op.tensors[i];
      with_type(tensor.dtype, [&](auto type) {
        update_typed<decltype(type)>(op, op.groups[tensor.group], tensor, factor, i, begin, end);
      });
    });
  });
}

void norm(const Norm& op) {
  const int64_t blocks = op.first_block[op.count], chunks = (blocks + kGrainBlocks - 1) / kGrainBlocks;
  parallel_for(chunks, 1, [&](int64_t first, int64_t last) {
    for (int64_t chunk = first; chunk < last; ++chunk) {
      double sum = 0;
      for_blocks(op.grads, op.first_block, op.count, chunk * kGrainBlocks, min64((chunk + 1) * kGrainBlocks, blocks),
                 [&](int64_t i, int64_t begin, int64_t end) {
                   with_type(op.grads[i].dtype, [&](auto type) {
                     sum += sum_squares(static_cast<const decltype(type)*>(op.grads[i].data), begin, end);
                   });
                 });
      op.partials[chunk] = sum;
    }
  });
  double sum = 0;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += op.partials[chunk];
  const double root = std::sqrt(sum);
  if (op.norm_dtype == DType::F64) {
    *static_cast<double*>(op.norm) = root;
  } else {
    *static_cast<float*>(op.norm) = float(root);
  }
}

void clip(const Clip& op) {
  const double factor = clip_coefficient(read(op.norm, op.norm_dtype), op.max_norm);
  if (factor == 1) return;
  parallel_for(op.first_block[op.count], kGrainBlocks, [&](int64_t first, int64_t last) {
    for_blocks(op.grads, op.first_block, op.count, first, last, [&](int64_t i, int64_t begin, int64_t end) {
      with_type(op.grads[i].dtype, [&](auto type) {
        using T = decltype(type);
        using A = accumulate_t<T>;
        T* grad = static_cast<T*>(op.grads[i].data);
        for_columns<A, 1>(begin, end, [&](int64_t k, int, auto width) DLKIT_INLINE_LAMBDA {
          store(grad + k, load(grad + k, width) * A(factor), width);
        });
      });
    });
  });
}

#if defined(DLKIT_ISA_IS_BASELINE)
int64_t partials(const Norm& op) { return (op.first_block[op.count] + kGrainBlocks - 1) / kGrainBlocks; }
#endif

}  // namespace DLKIT_ISA

DLKIT_CPU_ENTRY(step_cpu, step, Step)
DLKIT_CPU_ENTRY(norm_cpu, norm, Norm)
DLKIT_CPU_ENTRY(clip_cpu, clip, Clip)
#if defined(DLKIT_ISA_IS_BASELINE)
int64_t norm_partials_cpu(const Norm& op) { return baseline::partials(op); }
#endif

}  // namespace dlkit::optim
