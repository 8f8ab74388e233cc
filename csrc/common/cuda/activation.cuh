// Activations and their derivatives, defined once for CUDA with the formulas of common/cpu/activation.h.
#pragma once

#include <cmath>

#include "../activation.h"
#include "launch.cuh"

namespace dlkit::cuda {

// act(x), and g * act'(x).
template <class A, Activation Kind>
struct Act {
  static constexpr A linear = A(1.5957691216057308), cubic = linear * A(0.044715);

  __device__ __forceinline__ static A value(A x, A negative_slope = 0) {
    if constexpr (Kind == Activation::Relu) {
      return x <= A(0) ? A(0) : x;  // NaN stays
    } else if constexpr (Kind == Activation::Gelu) {
      return x * distribution(x);
    } else if constexpr (Kind == Activation::GeluTanh) {
      return x / (A(1) + A(exp(-x * (linear + cubic * (x * x)))));
    } else if constexpr (Kind == Activation::Silu) {
      return x / (A(1) + A(exp(-x)));
    } else if constexpr (Kind == Activation::Hardswish) {
      const A shifted = x + A(3);
      return x * (shifted <= A(0) ? A(0) : shifted < A(6) ? shifted : A(6)) / A(6);
    } else if constexpr (Kind == Activation::Relu6) {
      return x <= A(0) ? A(0) : x >= A(6) ? A(6) : x;
    } else {
      return x > A(0) ? x : x * negative_slope;
    }
  }

  __device__ __forceinline__ static A gradient(A g, A x, A negative_slope = 0) {
    if constexpr (Kind == Activation::Relu) {
      return x <= A(0) ? A(0) : g;
    } else if constexpr (Kind == Activation::Gelu) {
      return g * (distribution(x) + x * A(0.3989422804014327) * A(exp(A(-0.5) * x * x)));
    } else if constexpr (Kind == Activation::GeluTanh) {
      const A square = x * x;
      return g * slope_of_times_logistic(x * (linear + 3 * cubic * square), x * (linear + cubic * square));
    } else if constexpr (Kind == Activation::Silu) {
      return g * slope_of_times_logistic(x, x);
    } else if constexpr (Kind == Activation::Hardswish) {
      return x <= A(-3) ? A(0) : x < A(3) ? g * (x * A(1.0 / 3) + A(0.5)) : g;
    } else if constexpr (Kind == Activation::Relu6) {
      return x <= A(0) || x >= A(6) ? A(0) : g;
    } else {
      return x > A(0) ? g : g * negative_slope;
    }
  }

 private:
  __device__ __forceinline__ static A distribution(A x) { return A(0.5) * A(erfc(x * A(-0.7071067811865476))); }

  // The derivative of x / (1 + exp(-u)), for slope = x * du/dx.
  __device__ __forceinline__ static A slope_of_times_logistic(A slope, A u) {
    const A e = A(exp(u < A(0) ? u : -u)), inverse = A(1) / (A(1) + e);
    return (u < A(0) ? e : A(1)) * inverse + slope * (e * inverse * inverse);
  }
};

}  // namespace dlkit::cuda
