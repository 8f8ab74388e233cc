// Activations computed by torch's own ops.
#pragma once

#include <ATen/ops/gelu.h>
#include <ATen/ops/hardswish.h>
#include <ATen/ops/hardtanh.h>
#include <ATen/ops/leaky_relu.h>
#include <ATen/ops/relu.h>
#include <ATen/ops/silu.h>

#include "../common/activation.h"
#include "op.h"

namespace dlkit {

inline at::Tensor activated(const at::Tensor& z, Activation activation, double negative_slope = 0) {
  switch (activation) {
    case Activation::None:
      return z;
    case Activation::Relu:
      return at::relu(z);
    case Activation::Gelu:
      return at::gelu(z, "none");
    case Activation::GeluTanh:
      return at::gelu(z, "tanh");
    case Activation::Silu:
      return at::silu(z);
    case Activation::Hardswish:
      return at::hardswish(z);
    case Activation::Relu6:
      return at::hardtanh(z, 0, 6);
    case Activation::LeakyRelu:
      return at::leaky_relu(z, negative_slope);
  }
  TORCH_CHECK_VALUE(false, "dlkit: expected activation from 0 to ", kActivations - 1, ", got ", int64_t(activation));
}

}  // namespace dlkit
