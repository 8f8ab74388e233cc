// exp, log, tanh and the normal distribution on vectors, which libm has only for scalars. The polynomials are Chebyshev
// interpolants, computed with 50 digits; their largest relative errors are: exp 2.5e-9 (fp64 4e-18), the normal tail
// 1.7e-8 (4e-17). GELU from them in fp32 has a relative error of at most 3.4e-7 from -12 to 8, and of 4e-6 without
// fused multiply-add, which keeps the bits that rounding x * x loses.
#pragma once

#include "simd.h"

namespace dlkit::DLKIT_ISA {

template <class A, int kCount>
DLKIT_INLINE Vector<A> polynomial(const A (&coefficients)[kCount], Vector<A> x) {  // the highest power first
  Vector<A> sum = broadcast<A>(coefficients[0]);
#pragma GCC unroll 32
  for (int i = 1; i < kCount; ++i) sum = fma(sum, x, broadcast<A>(coefficients[i]));
  return sum;
}

template <class A>
struct MathConstants;

template <>
struct MathConstants<float> {
  using Bits = uint32_t;
  using VectorBits = Bits __attribute__((vector_size(kVectorBytes)));
  static constexpr int kExponent = 23;
  static constexpr float kRound = 0x1.8p23f, kLog2E = 1.44269504f, kLn2High = 0.693115234375f, kLn2Low = 3.19461849e-5f,
                         kLowest = -87.3f;
  static constexpr float kExp[] = {0.00139411084f, 0.0083751264f, 0.0416663529f, 0.166664155f, 0.500000005f, 1, 1};
  static constexpr float kExp2[] = {0.00132647273f, 0.00967151299f, 0.0555073358f,
                                    0.240222424f,   0.693147004f,   1};  // 2^x
  // log(1 + f) = f - (f^2 / 2 - s (f^2 / 2 + s^2 kLog(s^2))), s = f / (2 + f); tanh(v) = v + v^3 kTanh(v^2).
  static constexpr float kLog[] = {0.181818182f, 0.222222222f, 0.285714286f, 0.4f, 0.666666667f};
  static constexpr float kTanh[] = {0.000590027441f, -0.00145583439f, 0.00359212804f, -0.00886323553f,
                                    0.0218694885f,   -0.0539682540f,  0.133333333f,   -0.333333333f};
  static constexpr float kTailShift = 3.5f, kTailEnd = 14.5f;
  static constexpr float kTail[] = {0.000123010596f, 0.000441367588f, -0.000499085678f, -0.00319128146f, 0.00649195194f,
                                    0.0174106645f,   -0.116052621f,   0.315424662f,     -0.565561765f,   0.74441608f};
};

template <>
struct MathConstants<double> {
  using Bits = uint64_t;
  using VectorBits = Bits __attribute__((vector_size(kVectorBytes)));
  static constexpr int kExponent = 52;
  static constexpr double kRound = 0x1.8p52, kLog2E = 1.4426950408889634, kLn2High = 0.6931471805592082,
                          kLn2Low = 7.3710025651677989e-13, kLowest = -708;
  static constexpr double kExp[] = {2.5110037605963777e-08,
                                    2.7632639639041029e-07,
                                    2.755724091857897e-06,
                                    2.4801485482328494e-05,
                                    0.00019841269890047113,
                                    0.0013888888952314775,
                                    0.0083333333333196011,
                                    0.041666666666488099,
                                    0.1666666666666668,
                                    0.50000000000000189,
                                    1,
                                    1};
  static constexpr double kLog[] = {2.0 / 23, 2.0 / 21, 2.0 / 19, 2.0 / 17, 2.0 / 15, 2.0 / 13,
                                    2.0 / 11, 2.0 / 9,  2.0 / 7,  2.0 / 5,  2.0 / 3};
  static constexpr double kTailShift = 4, kTailEnd = 39;
  static constexpr double kTail[] = {
      -9.6534254202285038e-10, 7.2695454790266894e-11,  1.3924023993501709e-08, 1.457859334703646e-08,
      -7.6380820534904505e-08, -1.5426320536771075e-07, 2.6368248576407624e-07, 1.0198048518135172e-06,
      -6.25132104047868e-07,   -5.9188927317632362e-06, 7.1500559592160986e-07, 3.5144181157760973e-05,
      -1.9078665316613576e-06, -0.0002310948183193762,  0.00013334425401904912, 0.0016308184418903596,
      -0.0034796923622425332,  -0.0075401889655930593,  0.060396574890699467,   -0.18652185795969417,
      0.38713740074221886,     -0.60789664197189175,    0.75528513041575152};
};

template <class A>
using VectorBits = typename MathConstants<A>::VectorBits;

template <class A>
DLKIT_INLINE Vector<A> absolute(Vector<A> v) {
  return (Vector<A>)((VectorBits<A>)v & typename MathConstants<A>::Bits(-1) >> 1);
}

// 1 / v within 1 ulp or so, for v whose square is finite.
DLKIT_INLINE VectorF32 reciprocal(VectorF32 v) {
#if defined(__AVX512F__)
  const VectorF32 estimate = (VectorF32)_mm512_rcp14_ps((__m512)v);
  return fma(fma(-v, estimate, broadcast<float>(1)), estimate, estimate);
#else
  return 1.0f / v;
#endif
}
DLKIT_INLINE VectorF64 reciprocal(VectorF64 v) { return 1.0 / v; }

// exp(x + low) for x of 0 or less, where low is a correction far smaller than x; 0 where the result would be subnormal;
// NaN for NaN.
template <class A>
DLKIT_INLINE Vector<A> exp_of_negative(Vector<A> x, Vector<A> low) {
  using C = MathConstants<A>;
  const Vector<A> shifted = fma(x, broadcast<A>(C::kLog2E), broadcast<A>(C::kRound));  // the integer in its last bits
  const Vector<A> n = shifted - C::kRound;
  const Vector<A> rest = fma(n, broadcast<A>(-C::kLn2Low), fma(n, broadcast<A>(-C::kLn2High), x) + low);
  constexpr typename C::Bits kOne = typename C::Bits((1ull << (8 * sizeof(A) - 2 - C::kExponent)) - 1) << C::kExponent;
  const Vector<A> power = (Vector<A>)(((VectorBits<A>)shifted << C::kExponent) + kOne);
  return x < C::kLowest ? Vector<A>{} : polynomial<A>(C::kExp, rest) * power;
}

// exp(x) for x of 0 or less. In fp32 it is 2^(x * log2(e)), where the fused product gives the fraction of the exponent
// unrounded: relative error 2e-7 in 12 instructions of AVX2, 10 of AVX-512. The power 2^-127, and so smaller results,
// are 0.
DLKIT_INLINE VectorF64 exponential(VectorF64 x) { return exp_of_negative<double>(x, broadcast(-0.0)); }
DLKIT_INLINE VectorF32 exponential(VectorF32 x) {
  using C [[maybe_unused]] = MathConstants<float>;
#if defined(__AVX512F__)
  const VectorF32 n = fma(x, broadcast<float>(C::kLog2E), broadcast<float>(C::kRound)) - C::kRound;
  const VectorF32 rest = fma(x, broadcast<float>(C::kLog2E), -n);
  const __mmask16 counts = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(C::kLowest), _CMP_NLT_UQ);  // NaN too
  return (VectorF32)_mm512_maskz_scalef_ps(counts, (__m512)polynomial<float>(C::kExp2, rest), (__m512)n);
#elif defined(__FMA__)
  const VectorF32 bounded = maximum(broadcast(-88.0f), x);  // NaN stays NaN
  const VectorF32 shifted = fma(bounded, broadcast<float>(C::kLog2E), broadcast<float>(C::kRound));
  const VectorF32 rest = fma(bounded, broadcast<float>(C::kLog2E), C::kRound - shifted);
  const VectorF32 power = (VectorF32)(((VectorBits<float>)shifted << C::kExponent) + 0x3f800000);
  return polynomial<float>(C::kExp2, rest) * power;
#else
  return exp_of_negative<float>(x, broadcast(-0.0f));
#endif
}

// log(v) within 1 ulp, for v of 1 or more; -inf for 0; NaN for NaN.
template <class A>
DLKIT_INLINE Vector<A> logarithm(Vector<A> v) {
  using C = MathConstants<A>;
  using Bits = typename C::Bits;
  constexpr Bits kMantissa = (Bits(1) << C::kExponent) - 1;
  constexpr Bits kBias = (Bits(1) << (8 * sizeof(A) - 2 - C::kExponent)) - 1;
  const VectorBits<A> bits = (VectorBits<A>)v;
  const Vector<A> significand = (Vector<A>)((bits & kMantissa) | kBias << C::kExponent);
  const auto upper = significand > A(1.4142135623730951);
  const Vector<A> f = (upper ? significand * A(0.5) : significand) - A(1);
  // The last bits of a number from 2^kExponent on are an integer.
  const A offset = A(Bits(1) << C::kExponent);
  const Vector<A> biased = (Vector<A>)((bits >> C::kExponent) + (VectorBits<A>)broadcast<A>(offset)) - offset;
  const Vector<A> exponent = biased - (upper ? broadcast<A>(A(kBias) - 1) : broadcast<A>(A(kBias)));
  const Vector<A> s = f / (f + A(2)), half_square = f * f * A(0.5);
  const Vector<A> series = s * s * polynomial<A>(C::kLog, s * s);
  const Vector<A> rest = fma(exponent, broadcast<A>(C::kLn2Low), s * (half_square + series));
  const Vector<A> result = fma(exponent, broadcast<A>(C::kLn2High), f - (half_square - rest));
  return v >= A(1) ? result : v == A(0) ? broadcast<A>(-A(__builtin_inf())) : v * A(__builtin_nan(""));
}

// tanh(v) and its derivative, each within 4 ulp.
DLKIT_INLINE VectorF32 hyperbolic_tangent(VectorF32 v, VectorF32& derivative) {
  using C = MathConstants<float>;
  const VectorF32 magnitude = absolute<float>(v), square = v * v;
  const VectorF32 e = exp_of_negative<float>(magnitude * -2.0f, VectorF32{});
  const VectorF32 large = (1.0f - e) / (1.0f + e);
  const VectorF32 small = fma(v * square, polynomial<float>(C::kTanh, square), v);
  derivative = magnitude < 0.55f ? 1.0f - small * small : 4.0f * e / ((1.0f + e) * (1.0f + e));
  return magnitude < 0.55f ? small : v < 0.0f ? -large : large;
}
DLKIT_INLINE VectorF64 hyperbolic_tangent(VectorF64 v, VectorF64& derivative) {
  for (int i = 0; i < kLanes<double>; ++i) {
    const long double tanh = __builtin_tanhl(v[i]), cosh = __builtin_coshl(v[i]);  // libm errs by 2 ulp in double
    derivative[i] = double(1 / (cosh * cosh));
    v[i] = double(tanh);
  }
  return v;
}

// The parts of GELU and its derivative: exp(-x^2 / 2), and the normal distribution function. The latter comes from its
// tail below -|x|: tail / exp(-x^2 / 2) * (|x| + a) is a polynomial in (|x| - a) / (|x| + a), with a = kTailShift. One
// exponential and one division give both.
template <class A>
struct Normal {
  Vector<A> exponential, distribution;
};

template <class A>
DLKIT_INLINE Normal<A> normal(Vector<A> x) {
  using C = MathConstants<A>;
  using V = Vector<A>;
  const V half = x * A(-0.5), square = half * x;
  const V exponential = exp_of_negative<A>(square, fma(half, x, -square));
  const V magnitude = absolute<A>(x);
  const V bounded = magnitude < C::kTailEnd ? magnitude : broadcast<A>(C::kTailEnd);  // infinite ones too
  const V inverse = reciprocal(bounded + C::kTailShift);
  const V tail = exponential * polynomial<A>(C::kTail, (bounded - C::kTailShift) * inverse) * inverse;
  return {exponential, x < A(0) ? tail : A(1) - tail};
}

}  // namespace dlkit::DLKIT_ISA
