// Checks and bookkeeping for ops that write to their input.
#pragma once

#include <c10/core/InferenceMode.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>

#include "autograd.h"

namespace dlkit {

// The checks that torch makes of leaves and views known to autograd, and of inference tensors.
inline void check_written(const char* name, const at::Tensor& input) {
  torch::autograd::check_inplace(input, any_requires_grad(input));
  TORCH_CHECK(
      !input.is_inference() || c10::InferenceMode::is_enabled(), name,
      "(): an inference tensor cannot be changed in place outside InferenceMode: clone it, or leave out inplace");
}

// Called after a kernel wrote to `input`; `node`, if there is one, becomes its gradient function.
template <class Node>
void mark_written(at::Tensor& input, const Node& node) {
  if (!input.is_inference()) torch::autograd::increment_version(input);
  if (node) torch::autograd::rebase_history(input, node);
}

// Whether the tensor's memory may be reused freely. Under a compiler, a mode, a subclass or vmap it may not.
inline bool is_plain(const at::Tensor& tensor) {
  constexpr c10::DispatchKeySet others{c10::DispatchKey::Python, c10::DispatchKey::Functionalize,
                                       c10::DispatchKey::FuncTorchBatched, c10::DispatchKey::Batched};
  return !c10::impl::TorchDispatchModeTLS::any_modes_set() && !tensor.key_set().has_any(others);
}

}  // namespace dlkit
