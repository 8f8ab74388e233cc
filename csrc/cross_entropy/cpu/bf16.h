// Rows of adjacent bf16 classes, which take longer to compute than to read. A shift and a mask turn a load into two
// vectors, of its even and its odd elements: a sum may take them in any order, and two instructions join them again.
// exp(x - shift) is 2^t with t = x * log2(e) - c, rounded once; the rounding error of c = shift * log2(e) is one factor
// for all of a chunk. Backward folds its own factor into c, and the half unit that rounding adds into the polynomial:
// the gradient is then the upper halves of the results (ties, one in 2^16, are rounded away from 0).
//
// Vector instructions for 16 elements on AVX2, those of the general loops in brackets: forward 30 (45), backward 25
// (58), with smoothing 33. Half of forward's need one of the two units that multiply. Interleaving 2 or 4 loads,
// Estrin's scheme for the polynomial and fetching the next chunk ahead gained nothing.
#pragma once

#include <cmath>

#include "../../common/cpu/math.h"

namespace dlkit::cross_entropy::DLKIT_ISA {
namespace {

using namespace dlkit::DLKIT_ISA;

using VectorI16 = int16_t __attribute__((vector_size(kVectorBytes)));

constexpr int64_t kPair = 2 * kLanes<float>;
#if defined(__FMA__)
constexpr bool kFused = true;
#else
constexpr bool kFused = false;
#endif
constexpr float kMostShift = kFused ? 1024 : 64;  // beyond it, c is too coarse for backward
constexpr float kBits = MathConstants<float>::kLog2E, kRoundToInteger = MathConstants<float>::kRound;

// Chebyshev approximations for r from -0.5 to 0.5: 2^r within 2.8e-6, and 2^(r + 0.5) within 7.5e-5, a 26th of the
// largest error of rounding to bf16.
constexpr float kExp2Short[] = {0.00958285294f, 0.0559064262f, 0.240240991f, 0.693124175f, 1};
constexpr float kExp2Half[] = {0.0780245215f, 0.343103945f, 0.980419099f, 1.41411185f + 0x1p-8f};

struct Pair {
  VectorF32 even, odd;
};

DLKIT_INLINE Pair load_pair(const BFloat16* p) {
  const VectorU32 both = load_raw<VectorU32>(p);
  return {(VectorF32)(both << 16), (VectorF32)(both & 0xffff0000)};
}

// Writes the upper halves of the pair's lanes, in order.
DLKIT_INLINE void write_pair(BFloat16* p, Pair v, bool nt_store) {
  const VectorU32 joined = join_upper_halves((VectorU32)v.even, (VectorU32)v.odd);
  nt_store ? non_temporal_store(p, joined) : store_raw(p, joined);
}

// 2^n * polynomial(t - n), where n is the integer nearest to t; 0 for t up to `lowest`, whose result has the exponent
// of 0.
template <int kTerms>
DLKIT_INLINE VectorF32 exp2_by(const float (&terms)[kTerms], VectorF32 t, float lowest, VectorF32 round) {
  const VectorF32 bounded = maximum(broadcast(lowest), t);  // NaN stays NaN
  const VectorF32 shifted = bounded + round, rest = bounded - (shifted - round);
  return (VectorF32)((VectorU32)polynomial<float>(terms, rest) + ((VectorU32)shifted << 23));
}

// The largest element of whole pairs, found by comparing bits; NaN where none is above 0 or one is NaN.
float largest_of_pairs(const BFloat16* x, int64_t count) {
  VectorI16 most = VectorI16{} - 1, others = most;
  const auto larger = [&](VectorI16 v, int64_t i) DLKIT_INLINE_LAMBDA {
    const VectorI16 bits = load_raw<VectorI16>(x + i);
    return bits > v ? bits : v;
  };
  int64_t i = 0;
  for (; i + 2 * kPair <= count; i += 2 * kPair) most = larger(most, i), others = larger(others, i + kPair);
  if (i < count) most = larger(most, i);
  const int16_t bits = largest_lane(most > others ? most : others);
  return bits > 0 && bits <= 0x7f80 ? widen(BFloat16{uint16_t(bits)}) : NAN;
}

bool fits(float shift) { return std::abs(shift) <= kMostShift; }

struct PairSums {
  double sum, dot;
};

// The sum of exp(x - shift) over whole pairs, and with kDots that of x - shift; for a shift that fits().
template <bool kDots>
PairSums sum_pairs(const BFloat16* x, int64_t count, float shift) {
  const float c = kFused ? shift * kBits : 0;
  const VectorF32 round = broadcast(kRoundToInteger);
  VectorF32 sums[2] = {}, dots[2] = {};
  const auto add = [&](int slot, VectorF32 v) DLKIT_INLINE_LAMBDA {
    const VectorF32 t = kFused ? fma(v, broadcast(kBits), broadcast(-c)) : (v - shift) * kBits;
    sums[slot] += exp2_by(MathConstants<float>::kExp2, t, -127, round);
    if constexpr (kDots) dots[slot] += v - shift;
  };
  for (int64_t i = 0; i < count; i += kPair) {
    const Pair v = load_pair(x + i);
    add(0, v.even);
    add(1, v.odd);
  }
  const double lost = kFused ? double(c) - double(shift) * double(kBits) : 0;
  return {sum_lanes(sums[0] + sums[1]) * (lost == 0 ? 1 : std::exp2(lost)), sum_lanes(dots[0] + dots[1])};
}

// Whether write_gradient() can serve such a row.
bool fits(float shift, float scale, float share) {
  return fits(shift) && std::abs(scale) >= 0x1p-64f && std::abs(scale) <= 0x1p64f && std::isfinite(share);
}

// Writes exp(x - shift) * scale - share for whole pairs. kFolds: share is 0.
template <bool kFolds>
void write_gradient(const BFloat16* x, BFloat16* grad, int64_t count, float shift, float scale, float share,
                    bool nt_store) {
  const double bits = double(shift) * double(kBits);
  const float c = float(kFolds ? bits - std::log2(std::abs(double(scale))) + 0.5 : bits);
  // 256 more set the sign bit when the exponent is shifted into place.
  const VectorF32 round = broadcast(kRoundToInteger + (kFolds && scale < 0 ? 256 : 0));
  const auto gradient = [&](VectorF32 v) DLKIT_INLINE_LAMBDA {
    const VectorF32 t = fma(v, broadcast(kBits), broadcast(-c));
    if constexpr (kFolds) {
      return exp2_by(kExp2Half, t, -127.5f, round);
    } else {
      const VectorF32 e = exp2_by(kExp2Short, t, -127, round);
      return (VectorF32)((VectorU32)fma(e, broadcast(scale), broadcast(-share)) + 0x8000);
    }
  };
  for (int64_t i = 0; i < count; i += kPair) {
    const Pair v = load_pair(x + i);
    write_pair(grad + i, {gradient(v.even), gradient(v.odd)}, nt_store);
  }
}

}  // namespace
}  // namespace dlkit::cross_entropy::DLKIT_ISA
