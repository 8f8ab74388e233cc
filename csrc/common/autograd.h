// What the ops share on autograd's side: which calls it serves, and nodes, which torch names differently from release
// to release.
#pragma once

#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>

#include "op.h"

namespace dlkit {

template <class... Optionals>
bool any_requires_grad(const at::Tensor& input, const Optionals&... others) {
  [[maybe_unused]] const auto required = [](const OptionalTensor& t) { return has(t) && t->requires_grad(); };
  return at::GradMode::is_enabled() && (input.requires_grad() || (required(others) || ...));
}

inline bool has_tangent(const at::Tensor& input) { return input._fw_grad(0).defined(); }

// Whether `op` has a kernel for this type, layout and device.
template <class Op>
bool has_kernel(const Op& op, const at::Tensor& input) {
  return is_supported(input.scalar_type()) && input.layout() == at::kStrided &&
         op.hasKernelForDispatchKey(c10::computeDispatchKey(std::nullopt, std::nullopt, input.device()));
}

// Where only torch's own ops will do: what has no kernel, torch.func transforms, forward-mode derivatives.
template <class Op, class... Optionals>
bool needs_native(const Op& op, const at::Tensor& input, const Optionals&... others) {
  [[maybe_unused]] const auto with_tangent = [](const OptionalTensor& t) { return has(t) && has_tangent(*t); };
  return !has_kernel(op, input) ||
         c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerBackMode) ||
         has_tangent(input) || (with_tangent(others) || ...);
}

// The gradients of y with respect to those of `sources` that the mask names, differentiable themselves.
inline std::array<at::Tensor, 3> differentiable_gradients(const at::Tensor& y, const at::Tensor& grad_output,
                                                          const std::array<at::Tensor, 3>& sources,
                                                          std::array<bool, 3> mask) {
  torch::autograd::variable_list wanted;
  for (int i = 0; i < 3; ++i) {
    if (mask[i]) wanted.push_back(sources[i]);
  }
  std::array<at::Tensor, 3> result;
  if (wanted.empty()) return result;
  const auto found = torch::autograd::grad({y}, wanted, {grad_output}, true, true, true);
  for (int i = 0, next = 0; i < 3; ++i) {
    if (mask[i]) result[i] = found[next++];
  }
  return result;
}

// Up to torch 2.12 a node is held by shared_ptr, from the release on that has node.h by intrusive_ptr.
template <class T>
auto make_node() {
#if __has_include(<torch/csrc/autograd/node.h>)
  return c10::make_intrusive<T>();
#else
  return std::shared_ptr<T>(new T(), torch::autograd::deleteNode);
#endif
}

}  // namespace dlkit
