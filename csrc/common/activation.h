// The activations that an op can apply to its result. They are numbers, since the fast call from Python takes no
// strings; dlkit/_activation.py has their names.
#pragma once

#include <cstdint>
#include <type_traits>

namespace dlkit {

enum class Activation : int64_t {
  None = 0,
  Relu = 1,
  Gelu = 2,      // x * Phi(x)
  GeluTanh = 3,  // Gelu's approximation by tanh
  Silu = 4,      // x * logistic(x)
  Hardswish = 5,
  Relu6 = 6,
  LeakyRelu = 7  // x > 0 ? x : negative_slope * x
};
constexpr int64_t kActivations = 8;

// Calls f with the activation as a constant if it is one of Kinds. Internal linkage, for the reason given in scalar.h.
template <Activation... Kinds, class F>
[[maybe_unused]] static constexpr void with_activation(Activation activation, const F& f) {
  (void)((activation == Kinds && (f(std::integral_constant<Activation, Kinds>()), true)) || ...);
}

}  // namespace dlkit
