// dropout(act(input + bias)) as torch ops. The public one checks its arguments, then calls the forward op, with an
// autograd node where a gradient is needed. Backward is an op of its own, which lets compilers see both. Forward-mode
// derivatives, torch.func transforms and double backward go through torch's formula with the same mask.
#include "../dropout/op.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>

#include "../glue/activation.h"
#include "../glue/autograd.h"
#include "../glue/checked.h"
#include "kernel.h"

namespace dlkit::bias_act_dropout {
namespace {

using at::Tensor;
using torch::autograd::variable_list;

DLKIT_RUN(Forward, forward)
DLKIT_RUN(Backward, backward)
DLKIT_ASK(partials_bytes, Backward, backward_partials)

void check_activation(int64_t activation) {
  TORCH_CHECK_VALUE(activation >= 1 && activation <= 3, "bias_act_dropout(): expected activation 1, 2 or 3, got ",
                    activation);
}

// Fills in the arguments that both kernels share. A 16-bit bias is widened here: its one row is negligible beside the
// input.
template <class Op>
Tensor describe(Op& op, const Tensor& x, const OptionalTensor& bias, int64_t activation, double p) {
  check_activation(activation);
  const Tensor wide = has(bias) ? bias->contiguous().to(accumulate_type(x.scalar_type())) : Tensor();
  op.x = x.const_data_ptr();
  op.bias = data_or_null(wide);
  op.cols = has(bias) ? x.size(-1) : x.numel();
  op.rows = x.numel() / op.cols;
  op.dropout.threshold = drop_threshold(p);
  op.dropout.scale = dropout_scale(p);
  op.dropout.active = p > 0;
  op.activation = static_cast<Activation>(activation);
  op.dtype = dtype_of(x.scalar_type());
  return wide;
}

// An empty input, p = 0 and p = 1 need no mask: nothing is drawn.
template <class Device>
std::tuple<Tensor, Tensor> forward(const Tensor& input, const OptionalTensor& bias, const OptionalTensor& rng_state,
                                   int64_t activation, double p, const OptionalGenerator& generator, bool keep_bits) {
  const Device device(input);
  TORCH_CHECK(!keep_bits || input.is_cpu(), "bias_act_dropout: expected keep_bits on cpu, got input on ",
              input.device());
  Tensor y = at::empty(input.sizes(), input.options());
  const bool draws = p > 0 && p < 1 && input.numel() > 0;
  Tensor drawn = has(rng_state) ? rng_state->clone()
                 : draws        ? empty_rng_state(input, keep_bits)
                                : empty_rng_state(input, keep_bits).zero_();
  if (input.numel() == 0) return {std::move(y), std::move(drawn)};
  const Tensor x = input.contiguous();
  Forward op{};
  const Tensor wide = describe(op, x, bias, activation, p);
  op.y = y.mutable_data_ptr();
  if (has(rng_state)) {
    op.dropout.source = source_of(*rng_state, input);
  } else if (draws) {
    op.dropout.source = draw(device, input, generator);
    op.dropout.rng_state = drawn.mutable_data_ptr<int64_t>();
  }
  op.dropout.bits = bits_in(drawn, input.numel(), has(rng_state));
  run(device, op);
  return {std::move(y), std::move(drawn)};
}

// grad_bias is undefined where it is not needed.
template <class Device>
std::tuple<Tensor, Tensor> backward(const Tensor& grad_output, const Tensor& input, const OptionalTensor& bias,
                                    const Tensor& rng_state, int64_t activation, double p, bool needs_bias) {
  const Device device(input);
  Tensor grad_input = at::empty(input.sizes(), input.options());
  needs_bias = needs_bias && has(bias);
  if (input.numel() == 0) {
    return {std::move(grad_input), needs_bias ? at::zeros(bias->sizes(), bias->options()) : Tensor()};
  }
  const Tensor x = input.contiguous(), dy = grad_output.contiguous();
  Backward op{};
  const Tensor wide = describe(op, x, bias, activation, p);
  op.grad_output = dy.const_data_ptr();
  op.grad_input = grad_input.mutable_data_ptr();
  Tensor sum, partials;
  if (needs_bias) {
    sum = at::empty_like(wide);
    op.grad_bias = sum.mutable_data_ptr();
    partials = at::empty({partials_bytes(device, op)}, input.options().dtype(at::kByte));
    op.partials = partials.mutable_data_ptr();
  }
  if (p > 0) op.dropout.source = source_of(rng_state, input);
  op.dropout.bits = bits_in(rng_state, input.numel(), true);
  run(device, op);
  return {std::move(grad_input), needs_bias ? sum.to(bias->scalar_type()) : Tensor()};
}

std::tuple<Tensor, Tensor> forward_meta(const Tensor& input, const OptionalTensor&, const OptionalTensor& rng_state,
                                        int64_t, double, const OptionalGenerator&, bool keep_bits) {
  return {at::empty_symint(input.sym_sizes(), input.options()),
          has(rng_state) ? at::empty_like(*rng_state) : empty_rng_state(input, keep_bits)};
}

std::tuple<Tensor, Tensor> backward_meta(const Tensor&, const Tensor& input, const OptionalTensor& bias, const Tensor&,
                                         int64_t, double, bool needs_bias) {
  return {at::empty_symint(input.sym_sizes(), input.options()),
          needs_bias && has(bias) ? at::empty_symint(bias->sym_sizes(), bias->options()) : Tensor()};
}

// act(input + bias) by torch's own ops, in the input's type.
Tensor activate(const Tensor& input, const OptionalTensor& bias, int64_t activation) {
  return in_accumulate_type(input, bias, std::nullopt,
                            [&](const Tensor& x, const OptionalTensor& b, const OptionalTensor&) {
                              return activated(has(b) ? x + *b : x, static_cast<Activation>(activation));
                            });
}

struct BiasActDropoutBackward : SavingNode<BiasActDropoutBackward, 3> {
  enum { Input, Bias, RngState };
  int64_t activation = 0;
  double p = 0;

  std::string name() const override { return "DlkitBiasActDropoutBackward"; }
  auto fields() const { return std::tie(activation, p); }

  variable_list backward(const variable_list& grads, const Saved& saved) override {
    static const auto op = find_op<decltype(backward_meta)>("bias_act_dropout_backward");
    auto [grad_input, grad_bias] =
        op.call(grads[0], saved[Input], saved[Bias], saved[RngState], activation, p, task_should_compute_output(1));
    return {task_should_compute_output(0) ? grad_input : Tensor(), grad_bias};
  }

  // dropout's own backward, which is linear, then torch's backward of the activation.
  variable_list differentiable_backward(const variable_list& grads, const Saved& saved) override {
    const Tensor grad = p > 0 ? dropout::drop_again(grads[0], saved[RngState], p) : grads[0];
    const auto found = differentiable_gradients(activate(saved[Input], saved[Bias], activation), grad,
                                                {saved[Input], saved[Bias], Tensor()},
                                                {task_should_compute_output(0), task_should_compute_output(1), false});
    return {found[0], found[1]};
  }
};

// torch's formula with this library's mask, for tensors without a kernel, torch.func transforms and forward mode.
Tensor formula(const Tensor& input, const OptionalTensor& bias, int64_t activation, double p,
               const OptionalGenerator& generator, const OptionalTensor& stream) {
  const Tensor y = activate(input, bias, activation);
  return p > 0 ? dropout::drop(y, p, generator, stream) : y;
}

void check(const Tensor& input, const OptionalTensor& bias, int64_t activation, double p,
           const OptionalGenerator& generator, const OptionalTensor& stream) {
  constexpr auto name = "bias_act_dropout";
  check_dropout(name, input, p, generator, stream);
  check_activation(activation);
  if (!has(bias)) return;
  TORCH_CHECK(input.dim() > 0 && bias->dim() == 1 && bias->sym_size(0) == input.sym_size(-1), name,
              "(): expected bias of one dimension, as long as the last one of input ", input.sym_sizes(),
              ", got shape ", bias->sym_sizes());
  check_parameter_types(name, input, std::nullopt, bias);
}

Tensor bias_act_dropout(const Tensor& input, const OptionalTensor& bias, int64_t activation, double p,
                        const OptionalGenerator& generator, const OptionalTensor& stream) {
  check(input, bias, activation, p, generator, stream);
  static const auto op = find_op<decltype(forward_meta)>("bias_act_dropout_forward");
  if (needs_native(op, input, bias)) return formula(input, bias, activation, p, generator, stream);
  const OptionalTensor drawn = p > 0 ? draw_for(input, p, stream) : std::nullopt;
  using Node = BiasActDropoutBackward;
  const auto node = node_for<Node>(input, bias);
  auto [y, rng_state] = below_autograd(
      [&] { return op.call(input, bias, drawn, activation, p, generator, node && should_keep_bits(input, p)); });
  if (node) {
    torch::autograd::set_history(y, node);
    node->save(Node::Input, input);
    node->save(Node::Bias, or_undefined(bias));
    node->save(Node::RngState, rng_state);
    node->activation = activation;
    node->p = p;
  }
  return std::move(y);
}

template <class Device>
void implement_kernels(torch::Library& m) {
  implement_kernel<forward<Device>>(m, "bias_act_dropout_forward");
  implement_kernel<backward<Device>>(m, "bias_act_dropout_backward");
}

void implement_meta(torch::Library& m) {
  implement_kernel<forward_meta>(m, "bias_act_dropout_forward");
  implement_kernel<backward_meta>(m, "bias_act_dropout_backward");
}

void implement_all(torch::Library& m) { implement_public<bias_act_dropout>(m, "bias_act_dropout"); }

}  // namespace
}  // namespace dlkit::bias_act_dropout

DLKIT_DEFINE_OPS(m) {
  m.def(
      "bias_act_dropout(Tensor input, Tensor? bias, int activation, float p, *, Generator? generator=None,"
      " Tensor(a!)? stream=None) -> Tensor",
      DLKIT_RANDOM);
  m.def(
      "bias_act_dropout_forward(Tensor input, Tensor? bias, Tensor? rng_state, int activation, float p,"
      " Generator? generator=None, bool keep_bits=False) -> (Tensor y, Tensor rng_state)",
      DLKIT_RANDOM);
  m.def(
      "bias_act_dropout_backward(Tensor grad_output, Tensor input, Tensor? bias, Tensor rng_state, int activation,"
      " float p, bool needs_bias) -> (Tensor grad_input, Tensor grad_bias)",
      DLKIT_PURE);
}

DLKIT_IMPLEMENT_KERNELS(dlkit::bias_act_dropout::implement_kernels)
DLKIT_IMPLEMENT_OPS(Meta, m) { dlkit::bias_act_dropout::implement_meta(m); }
DLKIT_IMPLEMENT_RANDOM_OPS(dlkit::bias_act_dropout::implement_all)
