// What ops that write to their input ask of it.
#pragma once

#include <c10/core/InferenceMode.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>

#include "autograd.h"

namespace dlkit {

// torch's checks: of leaves and views that autograd knows, and of inference tensors.
inline void check_written(const char* name, const at::Tensor& input) {
  torch::autograd::check_inplace(input, any_requires_grad(input));
  TORCH_CHECK(
      !input.is_inference() || c10::InferenceMode::is_enabled(), name,
      "(): an inference tensor cannot be changed in place outside InferenceMode: clone it, or leave out inplace");
}

}  // namespace dlkit
