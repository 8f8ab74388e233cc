// What ops that write to their input ask of it.
#pragma once

#include <c10/core/InferenceMode.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
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

// After a kernel wrote to `input`, whose gradients go by `node`, if there is one.
template <class Node>
void mark_written(at::Tensor& input, const Node& node) {
  if (!input.is_inference()) torch::autograd::increment_version(input);
  if (node) torch::autograd::rebase_history(input, node);
}

// Whether memory may be reused at will: a compiler, a mode, a subclass or vmap has plans of its own.
inline bool is_plain(const at::Tensor& tensor) {
  constexpr c10::DispatchKeySet others{c10::DispatchKey::Python, c10::DispatchKey::Functionalize,
                                       c10::DispatchKey::FuncTorchBatched, c10::DispatchKey::Batched};
  return !c10::impl::TorchDispatchModeTLS::any_modes_set() && !tensor.key_set().has_any(others);
}

}  // namespace dlkit
