// The activations that an op can apply to its result. They are numbers, since the fast call from Python takes no
// strings; dlkit/functional/_activation.py has their names.
#pragma once

#include <cstdint>

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

}  // namespace dlkit
