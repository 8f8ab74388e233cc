// The optimizers' formulas, shared by the CPU and CUDA. V is a kernel's type of arithmetic (float or double on a GPU, a
// vector of them on a CPU), A the scalar type, M a struct of static functions: splat(A), fma(V, V, V), sqrt(V), and
// choose(condition, V, V), whose condition is the result of comparing two V. Internal linkage, for the reason given in
// scalar.h.
#pragma once

#include "../common/philox.h"
#include "kernel.h"

namespace dlkit::optim {

// Reads a norm of F32 or F64.
DLKIT_HOST_DEVICE double read(const void* scalar, DType dtype) {
  return dtype == DType::F64 ? *static_cast<const double*>(scalar) : double(*static_cast<const float*>(scalar));
}

// A tensor's hyperparameters in the form the formulas use, computed in fp64 and rounded once.
template <class A>
struct Scalars {
  A grad_factor;  // from the stored gradient to the formula's, except the sign
  A l2;           // weight decay that is added to the gradient
  A decay;        // factor on the parameter
  A step_size;    // lr, with Adam over 1 - beta1^t
  A root_factor;  // Adam: 1 / sqrt(1 - beta2^t)
  A eps;
  A average_rest;         // 1 - beta1, 1 - alpha (grad_avg)
  A square, square_rest;  // beta2 or alpha, and 1 minus it
  A momentum, dampening_rest;
  A ema_rest;
  bool maximize, nesterov, stochastic_rounding;
  int32_t stochastic_states;
};

// With Adam and a step counter on the device: bias_correction = 1 - pow(beta, t), in fp64.
template <class A>
DLKIT_HOST_DEVICE Scalars<A> scalars(Algorithm algorithm, const Group& group, double lr, double bias_correction1,
                                     double root_bias_correction2, double grad_factor) {
  const bool adam = algorithm == Algorithm::Adam;
  const bool decoupled = adam && group.decoupled_weight_decay;
  const double square = adam ? group.beta2 : group.alpha;
  Scalars<A> k;
  k.grad_factor = A(grad_factor);
  k.l2 = A(decoupled ? 0 : group.weight_decay);
  k.decay = A(decoupled ? 1 - lr * group.weight_decay : 1);
  k.step_size = A(adam ? lr / bias_correction1 : lr);
  k.root_factor = A(adam ? 1 / root_bias_correction2 : 1);
  k.eps = A(group.eps);
  k.average_rest = A(1 - (adam ? group.beta1 : group.alpha));
  k.square = A(square);
  k.square_rest = A(1 - square);
  k.momentum = A(group.momentum);
  k.dampening_rest = A(1 - group.dampening);
  k.ema_rest = A(1 - group.ema_decay);
  k.maximize = group.maximize;
  k.nesterov = group.nesterov;
  k.stochastic_rounding = group.stochastic_rounding;
  k.stochastic_states = group.stochastic_states;
  return k;
}

// The factor of clipping. NaN stays NaN, as in torch.
DLKIT_HOST_DEVICE double clip_coefficient(double norm, double max_norm) {
  const double coefficient = max_norm / (norm + 1e-6);
  return coefficient > 1 ? 1 : coefficient;
}

template <class M, class V, class A>
DLKIT_HOST_DEVICE V lerp(V from, V to, A weight) {
  return weight < A(0.5) ? M::fma(M::splat(weight), to - from, from) : M::fma(M::splat(weight - 1), to - from, to);
}

template <class M, class V>
DLKIT_HOST_DEVICE V maximum(V a, V b) {
  return M::choose((a > b) | (a != a), a, b);  // NaN where either is, as torch's maximum
}

// From the scaled gradient, the one that enters the averages.
template <class M, class V, class A>
DLKIT_HOST_DEVICE V decayed_gradient(const Scalars<A>& k, V g, V p) {
  if (k.maximize) g = -g;
  if (k.l2 != 0) g = M::fma(p, M::splat(k.l2), g);
  return g;
}

// `largest` is max_exp_avg_sq, or null.
template <class M, class V, class A>
DLKIT_HOST_DEVICE void adam(const Scalars<A>& k, V g, V& p, V& exp_avg, V& exp_avg_sq, V* largest) {
  g = decayed_gradient<M>(k, g, p);
  exp_avg = lerp<M>(exp_avg, g, k.average_rest);
  exp_avg_sq = M::fma(g * k.square_rest, g, exp_avg_sq * k.square);
  V square = exp_avg_sq;
  if (largest != nullptr) square = *largest = maximum<M>(*largest, exp_avg_sq);
  const V denominator = M::fma(M::sqrt(square), M::splat(k.root_factor), M::splat(k.eps));
  p = M::fma(exp_avg / denominator, M::splat(-k.step_size), p * k.decay);
}

// `buffer` is momentum_buffer, or null.
template <class M, class V, class A>
DLKIT_HOST_DEVICE void sgd(const Scalars<A>& k, V g, V& p, V* buffer) {
  g = decayed_gradient<M>(k, g, p);
  if (buffer != nullptr) {
    *buffer = M::fma(*buffer, M::splat(k.momentum), g * k.dampening_rest);
    g = k.nesterov ? M::fma(*buffer, M::splat(k.momentum), g) : *buffer;
  }
  p = M::fma(g, M::splat(-k.step_size), p);
}

// `average` is grad_avg, `buffer` momentum_buffer; either may be null. Where a gradient does not change, rounding may
// leave square_avg - grad_avg^2 below 0. torch's root of it is NaN; here it counts as 0.
template <class M, class V, class A>
DLKIT_HOST_DEVICE void rmsprop(const Scalars<A>& k, V g, V& p, V& square_avg, V* average, V* buffer) {
  g = decayed_gradient<M>(k, g, p);
  square_avg = M::fma(g * k.square_rest, g, square_avg * k.square);
  V square = square_avg;
  if (average != nullptr) {
    *average = lerp<M>(*average, g, k.average_rest);
    square = M::fma(-*average, *average, square);
    square = M::choose(square < M::splat(0), M::splat(0), square);
  }
  V update = g / (M::sqrt(square) + k.eps);
  if (buffer != nullptr) update = *buffer = M::fma(*buffer, M::splat(k.momentum), update);
  p = M::fma(update, M::splat(-k.step_size), p);
}

// A 16-bit parameter with a remainder is an fp32 one in two halves, `high` and the remainder. If other code writes to
// the parameter between two steps, the remainder belongs to the old value. For any two halves, therefore, the joined
// value rounds to `high`, and is NaN only where `high` is. BF16: bits of the fp32 value = (bits of the bf16 value <<
// 16) + remainder. Ties are rounded away from zero, which lets the remainder always fit. Zero (any magnitude below
// 2^-134), infinity and NaN have no remainder.
DLKIT_HOST_DEVICE bool has_remainder(BFloat16 high) { return ((high.bits - 1) & 0x7fff) < 0x7f7f; }
DLKIT_HOST_DEVICE float join(BFloat16 high, int16_t remainder) {
  const int32_t rest = has_remainder(high) ? remainder : 0;
  return bit_cast<float>((uint32_t(high.bits) << 16) + uint32_t(rest));
}
DLKIT_HOST_DEVICE BFloat16 split(float value, BFloat16, int16_t* remainder) {
  const uint32_t bits = bit_cast<uint32_t>(value);
  const BFloat16 high{uint16_t((bits + 0x8000) >> 16)};
  *remainder = int16_t(has_remainder(high) ? bits : 0);  // these lower 16 bits are the difference to `high`
  return value != value ? BFloat16{uint16_t(0x7fc0)} : high;
}

// F16: value = fp16 value + remainder * 2^-16 ulp of it (2^-40 among fp16's subnormals): exact for magnitudes from
// 2^-16 to 65504, within 2^-40 below. Rounds to nearest even. A value of either sign that rounds to zero but has a
// remainder is stored as -0. +0, which other code writes, has no remainder, nor have infinity and NaN.
DLKIT_HOST_DEVICE float remainder_unit(Float16 high) {
  const uint32_t exponent = bit_cast<uint32_t>(widen(high)) & 0x7f800000, least = uint32_t(127 - 14) << 23;
  return bit_cast<float>((exponent < least ? least : exponent) - (uint32_t(26) << 23));
}
// 1 / power, a power of two between 2^-126 and 2^126. A division would be a subroutine on a GPU.
DLKIT_HOST_DEVICE float inverse_of_power(float power) {
  return bit_cast<float>((uint32_t(254) << 23) - bit_cast<uint32_t>(power));
}
DLKIT_HOST_DEVICE float join(Float16 high, int16_t remainder) {
  const float wide = widen(high), sum = wide + float(remainder) * remainder_unit(high);
  const bool belongs = remainder != 0 && high.bits != 0 && widen(narrow(sum, Float16())) == wide;
  return belongs ? sum : wide;
}
DLKIT_HOST_DEVICE Float16 split(float value, Float16, int16_t* remainder) {
  const Float16 high = narrow(value, Float16());
  const float rest = (value - widen(high)) * inverse_of_power(remainder_unit(high));  // exact
  *remainder = 0;
  if (!(rest - rest == 0)) return high;
  const float rounded = rest + 12582912.0f - 12582912.0f;  // to the nearest integer, by 1.5 * 2^23
  *remainder = int16_t(rounded > 32767 ? 32767 : rounded < -32767 ? -32767 : rounded);  // more would not give `high`
  return widen(high) == 0 && rounded != 0 ? Float16{uint16_t(0x8000)} : high;
}

// 16 bits, read by lane_bits(), for each of the elements 8 * block to 8 * block + 7 of the step's tensor number
// `index`. `step` is t where the counter is on the device, else 0: a captured graph replays the same seed. `stream` is
// 0 for the parameter, s + 1 for state s.
DLKIT_HOST_DEVICE uint64_t stochastic_counter(int64_t block, int stream) {
  return uint64_t(block) | uint64_t(stream) << 60;
}
DLKIT_HOST_DEVICE PhiloxBlock stochastic_block(uint64_t seed, int64_t index, uint32_t step, int64_t block, int stream) {
  return philox(seed, uint64_t(index) | uint64_t(step) << 32, stochastic_counter(block, stream));
}

// Rounds up with a probability equal to the part cut off, in 65,536ths of an ulp for bf16 and 8,192ths for fp16.
DLKIT_HOST_DEVICE BFloat16 round_stochastically(float value, uint32_t bits, BFloat16) {
  if (value != value) return BFloat16{uint16_t(0x7fc0)};
  return BFloat16{uint16_t((bit_cast<uint32_t>(value) + bits) >> 16)};
}
DLKIT_HOST_DEVICE Float16 round_stochastically(float value, uint32_t bits, Float16) {
  if (!(value - value == 0)) return narrow(value, Float16());
  const uint32_t exponent = bit_cast<uint32_t>(value) & 0x7f800000, least = uint32_t(127 - 14) << 23;
  const float unit = bit_cast<float>((exponent < least ? least : exponent) - (uint32_t(10) << 23));
  const float magnitude = value < 0 ? -value : value;
  const float steps = magnitude * inverse_of_power(unit) + float(bits >> 3) * (1.0f / 8192);
  const float rounded = (steps < 4096 ? float(int32_t(steps)) : steps) * unit;
  return narrow(value < 0 ? -rounded : rounded, Float16());
}

}  // namespace dlkit::optim
