// Activations and their derivatives on vectors, defined once for the CPU. Where an activation is not differentiable,
// the derivative is torch's. A NaN stays a NaN.
#pragma once

#include "../activation.h"
#include "math.h"

namespace dlkit::DLKIT_ISA {

// act(x), and g * act'(x).
template <class A, Activation kActivation>
struct Act {
  using V = Vector<A>;
  // The logistic function of 2 sqrt(2 / pi) (x + 0.044715 x^3), which is (1 + tanh of half of that) / 2.
  static constexpr A kLinear = A(1.5957691216057308), kCubic = kLinear * A(0.044715);

  DLKIT_INLINE_MEMBER static V value(V x, [[maybe_unused]] A negative_slope = 0) {
    if constexpr (kActivation == Activation::Relu) return x <= A(0) ? V{} : x;
    if constexpr (kActivation == Activation::Gelu) return x * normal<A>(x).distribution;
    if constexpr (kActivation == Activation::GeluTanh) {
      return times_logistic(x, x * fma(x * x, broadcast<A>(kCubic), broadcast<A>(kLinear)));
    }
    if constexpr (kActivation == Activation::Silu) return times_logistic(x, x);
    if constexpr (kActivation == Activation::Hardswish) {
      const V shifted = x + A(3);
      return x * (shifted <= A(0) ? V{} : shifted < A(6) ? shifted : broadcast<A>(6)) / A(6);
    }
    if constexpr (kActivation == Activation::Relu6) return x <= A(0) ? V{} : x >= A(6) ? broadcast<A>(6) : x;
    if constexpr (kActivation == Activation::LeakyRelu) return x > A(0) ? x : x * negative_slope;
  }

  DLKIT_INLINE_MEMBER static V gradient(V g, V x, [[maybe_unused]] A negative_slope = 0) {
    if constexpr (kActivation == Activation::Relu) return x <= A(0) ? V{} : g;
    if constexpr (kActivation == Activation::Gelu) {
      const Normal<A> n = normal<A>(x);
      return g * fma(x * A(0.3989422804014327), n.exponential, n.distribution);
    }
    if constexpr (kActivation == Activation::GeluTanh) {
      const V square = x * x;
      const V slope = fma(square, broadcast<A>(3 * kCubic), broadcast<A>(kLinear));
      return g * slope_of_times_logistic(x * slope, x * fma(square, broadcast<A>(kCubic), broadcast<A>(kLinear)));
    }
    if constexpr (kActivation == Activation::Silu) return g * slope_of_times_logistic(x, x);
    if constexpr (kActivation == Activation::Hardswish) {
      const V middle = g * fma(x, broadcast<A>(A(1) / 3), broadcast<A>(0.5));
      return x <= A(-3) ? V{} : x < A(3) ? middle : g;
    }
    if constexpr (kActivation == Activation::Relu6) return x <= A(0) ? V{} : x >= A(6) ? V{} : g;
    if constexpr (kActivation == Activation::LeakyRelu) return x > A(0) ? g : g * negative_slope;
  }

 private:
  // x / (1 + exp(-u)) by exp(-|u|), which does not overflow.
  DLKIT_INLINE_MEMBER static V times_logistic(V x, V u) {
    const V e = exp_of_negative<A>(-absolute<A>(u), V{});
    return x * (u < A(0) ? e : broadcast<A>(1)) * reciprocal(A(1) + e);
  }
  // The derivative of the above, for slope = x * du/dx.
  DLKIT_INLINE_MEMBER static V slope_of_times_logistic(V slope, V u) {
    const V e = exp_of_negative<A>(-absolute<A>(u), V{});
    const V inverse = reciprocal(A(1) + e);
    return fma(slope, e * inverse * inverse, (u < A(0) ? e : broadcast<A>(1)) * inverse);
  }
};

// Calls f(Act()) for any activation but None.
template <class A, class F>
DLKIT_INLINE void with_act(Activation activation, const F& f) {
  with_activation<Activation::Relu, Activation::Gelu, Activation::GeluTanh, Activation::Silu, Activation::Hardswish,
                  Activation::Relu6, Activation::LeakyRelu>(activation,
                                                            [&](auto kind) DLKIT_INLINE_LAMBDA { f(Act<A, kind>()); });
}

// Both work in place on a few vectors of a loop: the activation, and g * act'(z). They are not inlined, since a kernel
// that takes any activation would compile much longer than one that takes none; the work on 64 elements of fp32
// outweighs a call.
template <class A>
[[gnu::noinline]] static void activate(Activation activation, A negative_slope, Vector<A>* z, int count) {
  with_act<A>(activation, [&](auto act) DLKIT_INLINE_LAMBDA {
    for (int i = 0; i < count; ++i) z[i] = act.value(z[i], negative_slope);
  });
}

template <class A>
[[gnu::noinline]] static void activation_gradients(Activation activation, A negative_slope, const Vector<A>* z,
                                                   Vector<A>* g, int count) {
  with_act<A>(activation, [&](auto act) DLKIT_INLINE_LAMBDA {
    for (int i = 0; i < count; ++i) g[i] = act.gradient(g[i], z[i], negative_slope);
  });
}

}  // namespace dlkit::DLKIT_ISA
