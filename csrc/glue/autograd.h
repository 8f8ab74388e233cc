// The autograd code that ops share: which calls go to torch's own ops, and the node that saves variables.
#pragma once

#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>

#include "op.h"
#include "torch_itself.h"

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
  return is_supported(input.scalar_type()) && input.layout() == at::kStrided && !input.is_nested() &&
         op.hasKernelForDispatchKey(c10::computeDispatchKey(std::nullopt, std::nullopt, input.device()));
}

// Whether the call is inside a transform of torch.func.
inline bool is_transformed() {
  return c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerBackMode);
}

// Whether only torch's own ops can serve the call: tensors without a kernel, torch.func transforms, forward-mode
// derivatives.
template <class Op, class... Optionals>
bool needs_native(const Op& op, const at::Tensor& input, const Optionals&... others) {
  [[maybe_unused]] const auto with_tangent = [](const OptionalTensor& t) { return has(t) && has_tangent(*t); };
  return !has_kernel(op, input) || is_transformed() || has_tangent(input) || (with_tangent(others) || ...);
}

// The gradients of y with respect to those of `sources` that the mask selects; they are differentiable themselves.
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

// Returns call(), made below autograd, as kernels' ops are called.
template <class F>
auto below_autograd(const F& call) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  return call();
}

// A node for the gradients of `inputs`, or null where none is needed. Torch up to 2.12 holds a node by shared_ptr;
// later releases, which have node.h, by intrusive_ptr.
template <class T, class... Inputs>
auto node_for(const Inputs&... inputs) {
#if __has_include(<torch/csrc/autograd/node.h>)
  c10::intrusive_ptr<T> node;
  if (any_requires_grad(inputs...)) node = c10::make_intrusive<T>();
#else
  std::shared_ptr<T> node;
  if (any_requires_grad(inputs...)) node.reset(new T(), torch::autograd::deleteNode);
#endif
  if (node) node->set_next_edges(torch::autograd::collect_next_edges(or_undefined(inputs)...));
  return node;
}

// Stands for a bias whose elements backward does not read. A node keeps only its type, which its gradient gets, and the
// user may change the bias before backward.
struct Bias {
  std::optional<at::ScalarType> type;
  Bias() = default;
  explicit Bias(const OptionalTensor& bias) {
    if (has(bias)) type = bias->scalar_type();
  }
  at::Tensor stand_in(c10::SymIntArrayRef sizes, const at::Tensor& input) const {
    // A method of the input makes it, which gives a subclass where the input is one.
    return type ? input.new_zeros_symint(sizes, input.options().dtype(*type)).requires_grad_(at::GradMode::is_enabled())
                : at::Tensor();
  }
};

// A node with kCount saved variables. Unpacking one may run the user's hooks, which compute (checkpointing) or copy
// (offloading) and need all of torch's dispatch. All are therefore unpacked here, before autograd's keys are excluded
// for the kernels, and an op's node gets plain tensors. torch::autograd::Function would cost some 5 us more a call: as
// much as a small layer.
//
// Self lists its fields other than tensors in fields(), a tuple of references: a compiler must know them to be
// constant, except sizes, which may be dynamic.
template <class Self, size_t kCount>
struct SavingNode : torch::autograd::Node {
  using Variables = torch::autograd::variable_list;
  using Saved = std::array<at::Tensor, kCount>;

  void save(size_t i, const at::Tensor& tensor, bool is_output = false) {
    saved_[i] = torch::autograd::SavedVariable(tensor, is_output);
    is_output_[i] = is_output;
  }

  // Computes the gradients by the kernels' ops, without autograd.
  virtual Variables backward(const Variables& grads, const Saved& saved) = 0;
  // The same by ops that can be differentiated again or transformed by torch.func. The default is the kernels' ops.
  virtual Variables differentiable_backward(const Variables& grads, const Saved& saved) {
    return backward(grads, saved);
  }

  Variables apply(Variables&& grads) override {
    bool any = false;
    for (const at::Tensor& grad : grads) any = any || grad.defined();
    if (!any) return Variables(num_outputs());
    const Saved saved = unpack();
    if (at::GradMode::is_enabled() || is_transformed()) {
      const at::AutoGradMode recording(true);
      const TorchItself no_override;
      return differentiable_backward(grads, saved);
    }
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    return backward(grads, saved);
  }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (auto& variable : saved_) variable.reset_data();
  }

  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const override {
    for (size_t i = 0; i < kCount; ++i) args.collect(saved_[i], is_output_[i]);
    std::apply([&](const auto&... field) { (args.collect(field), ...); }, static_cast<const Self*>(this)->fields());
  }

  Variables apply_with_saved(const Variables& grads, torch::dynamo::autograd::SwapSavedVariables& swap) override {
    for (auto& variable : saved_) swap.before(variable);
    for_sizes([&](c10::SymInt& size) { swap.before(size); });
    Variables result = apply(Variables(grads));
    for (auto& variable : saved_) swap.after(variable);
    for_sizes([&](c10::SymInt& size) { swap.after(size); });
    return result;
  }

 private:
  template <class F>
  void for_sizes(const F& f) {
    const auto visit = [&](const auto& field) {
      if constexpr (std::is_same_v<decltype(field), const c10::SymInt&>) f(const_cast<c10::SymInt&>(field));
    };
    std::apply([&](const auto&... field) { (visit(field), ...); }, static_cast<const Self*>(this)->fields());
  }

  Saved unpack() {
    const std::lock_guard<std::mutex> lock(mutex_);
    Saved result;
    for (size_t i = 0; i < kCount; ++i) {
      result[i] = is_output_[i] ? saved_[i].unpack(getptr()) : saved_[i].unpack();
    }
    return result;
  }

  std::array<torch::autograd::SavedVariable, kCount> saved_;
  std::array<bool, kCount> is_output_{};
};

// Takes y of (y, state) and sets its node, if there is one, which saves the state.
template <class Node>
at::Tensor with_history(std::tuple<at::Tensor, at::Tensor> result, const Node& node) {
  auto& [y, rng_state] = result;
  if (node) {
    torch::autograd::set_history(y, node);
    node->save(0, rng_state);
  }
  return std::move(y);
}

}  // namespace dlkit
