// LayerNorm and RMSNorm as torch ops. The public four check their arguments, then call layer_norm_forward, through an
// autograd node where a gradient is asked for; layer_norm_backward is an op of its own, so that compilers see both.
// With a dropout before the residual add they are dropout_add_layer_norm and dropout_add_rms_norm, and forward and
// backward are two ops more, which give and take the dropout's state; where a row is too long for the fused kernels
// they fall apart into dropout's own op and these.
// Forward-mode derivatives, torch.func transforms and double backward go through differentiable torch formulas.
#include "../glue/op.h"

#include <ATen/autocast_mode.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/broadcast_tensors.h>
#include <ATen/ops/layer_norm.h>
#include <ATen/ops/result_type.h>
#include <ATen/ops/rms_norm.h>

#include "../glue/autograd.h"
#include "../glue/checked.h"
#include "../glue/random.h"
#include "kernel.h"

namespace dlkit::layer_norm {
namespace {

using at::Tensor;
using torch::autograd::variable_list;
using ForwardOutputs = std::tuple<Tensor, Tensor, Tensor, Tensor>;                 // y, sum, mean, rstd
using BackwardOutputs = std::tuple<Tensor, Tensor, Tensor>;                        // grad_input, grad_weight, grad_bias
using DroppedForwardOutputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;  // ..., state
using DroppedBackwardOutputs = std::tuple<Tensor, Tensor, Tensor, Tensor>;         // grad_input, grad_residual, ...

Tensor contiguous_or_undefined(const OptionalTensor& tensor) { return has(tensor) ? tensor->contiguous() : Tensor(); }

// [..., normalized dims] -> [..., 1, ...]: the shape of mean and rstd.
template <class Sizes>
auto statistics_sizes(const Sizes& sizes, int64_t normalized_ndim) {
  auto result = sizes.vec();
  std::fill(result.end() - normalized_ndim, result.end(), 1);
  return result;
}

#if defined(DLKIT_WITH_CUDA) || defined(DLKIT_CUDA_ON_CPU)
void run(const CudaDevice& device, const Forward& op) { forward_cuda(op, device.stream()); }
void run(const CudaDevice& device, const Backward& op) { backward_cuda(op, device.stream()); }
int64_t partials_bytes(const CudaDevice&, const Forward& op) { return forward_partials_cuda(op); }
int64_t partials_bytes(const CudaDevice&, const Backward& op) { return backward_partials_cuda(op); }
template <class Op>
bool can_drop(const CudaDevice&, const Op& op) {
  return can_drop_cuda(op);
}
#endif
#if !defined(DLKIT_CUDA_ON_CPU)
void run(const CpuDevice&, const Forward& op) { forward_cpu(op); }
void run(const CpuDevice&, const Backward& op) { backward_cpu(op); }
int64_t partials_bytes(const CpuDevice&, const Forward&) { return 0; }
int64_t partials_bytes(const CpuDevice&, const Backward& op) { return backward_partials_cpu(op); }
template <class Op>
bool can_drop(const CpuDevice&, const Op& op) {
  return can_drop_cpu(op);
}
#endif

// Room for partial sums, undefined where the op needs none.
template <class Device, class Op>
Tensor partials_of(const Device& device, const Op& op, const Tensor& input) {
  const int64_t bytes = partials_bytes(device, op);
  return bytes > 0 ? at::empty({bytes}, input.options().dtype(at::kByte)) : Tensor();
}

struct Shape {
  int64_t rows, cols;
};

Shape shape_of(const Tensor& input, int64_t normalized_ndim) {
  const int64_t cols = c10::multiply_integers(input.sizes().slice(input.dim() - normalized_ndim));
  return {cols > 0 ? input.numel() / cols : 0, cols};
}

// What of an op's dropout the kernels do not decide themselves. `state`: given, or drawn here.
FusedDropout fused_dropout(double p, const PhiloxSource& source, int64_t* state) {
  return {source, state, drop_threshold(p), dropout_scale(p), true};
}

// `dropout`, if there is one, may be filled in from what only the kernels' limits decide: false if they cannot drop.
template <class Device, class FillIn>
bool forward(const Device& device, ForwardOutputs& outputs, const Tensor& input, const OptionalTensor& residual,
             int64_t normalized_ndim, const OptionalTensor& weight, const OptionalTensor& bias, double eps, bool rms,
             bool stats, const FillIn& dropout) {
  const Rows x = as_rows(input, normalized_ndim);
  const Rows added = as_rows(or_undefined(residual), normalized_ndim);
  const Tensor w = contiguous_or_undefined(weight);
  const Tensor b = contiguous_or_undefined(bias);
  const auto sizes = input.sizes();
  auto& [y, sum, mean, rstd] = outputs;
  y = at::empty(sizes, input.options());
  if (has(residual)) sum = at::empty(sizes, input.options());
  if (stats) {
    const auto options = input.options().dtype(accumulate_type(input.scalar_type()));
    const auto stats_sizes = statistics_sizes(sizes, normalized_ndim);
    if (!rms) mean = at::empty(stats_sizes, options);
    rstd = at::empty(stats_sizes, options);
  }
  const auto [rows, cols] = shape_of(input, normalized_ndim);
  Forward op{x.data(),
             added.data(),
             data_or_null(w),
             data_or_null(b),
             y.mutable_data_ptr(),
             mutable_data_or_null(sum),
             mutable_data_or_null(mean),
             mutable_data_or_null(rstd),
             rows,
             cols,
             x.stride,
             added.stride,
             eps,
             dtype_of(input.scalar_type()),
             dtype_of(parameter_type(input, weight, bias)),
             rms,
             {}};
  if (!dropout(op)) return false;
  if (rows == 0) return true;
  const Tensor partials = partials_of(device, op, input);
  op.partials = mutable_data_or_null(partials);
  run(device, op);
  return true;
}

template <class Device>
ForwardOutputs forward(const Tensor& input, const OptionalTensor& residual, int64_t normalized_ndim,
                       const OptionalTensor& weight, const OptionalTensor& bias, double eps, bool rms, bool stats) {
  ForwardOutputs outputs;
  forward(Device(input), outputs, input, residual, normalized_ndim, weight, bias, eps, rms, stats,
          [](const Forward&) { return true; });
  return outputs;
}

// Nothing is drawn for nothing: an empty input, or p = 1, which needs no mask.
template <class Device>
DroppedForwardOutputs dropped_forward(const Tensor& input, const Tensor& residual, const OptionalTensor& state,
                                      double p, int64_t normalized_ndim, const OptionalTensor& weight,
                                      const OptionalTensor& bias, double eps, bool rms, bool stats,
                                      const OptionalGenerator& generator) {
  const Device device(input);
  Tensor drawn = has(state) ? *state : empty_state(input);
  const bool draws = !has(state) && p < 1 && input.numel() > 0;
  ForwardOutputs outputs;
  const bool fused =
      forward(device, outputs, input, residual, normalized_ndim, weight, bias, eps, rms, stats, [&](Forward& op) {
        if (op.rows > 0 && !can_drop(device, op)) return false;
        const PhiloxSource source = draws        ? draw(device, input, generator)
                                    : has(state) ? source_of(*state, input)
                                                 : PhiloxSource{};
        op.dropout = fused_dropout(p, source, has(state) ? nullptr : drawn.mutable_data_ptr<int64_t>());
        return true;
      });
  if (!fused) {
    static const auto add =
        find_op<std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const OptionalTensor&, double,
                                           const OptionalGenerator&, bool)>("dropout_add_forward");
    const auto [sum, own_state] = add.call(input, residual, state, p, generator, false);
    ForwardOutputs plain = forward<Device>(sum, std::nullopt, normalized_ndim, weight, bias, eps, rms, stats);
    std::get<1>(plain) = sum;
    outputs = std::move(plain);
    drawn = own_state;
  } else if (input.numel() == 0 && !has(state)) {
    drawn.zero_();
  } else if (has(state)) {
    drawn = state->clone();
  }
  auto& [y, sum, mean, rstd] = outputs;
  return {std::move(y), std::move(sum), std::move(mean), std::move(rstd), std::move(drawn)};
}

template <class Device>
DroppedBackwardOutputs backward(const Tensor& grad_output, const OptionalTensor& grad_sum, const Tensor& input,
                                const OptionalTensor& mean, const Tensor& rstd, const OptionalTensor& weight,
                                const OptionalTensor& bias, const OptionalTensor& state, double p,
                                int64_t normalized_ndim, std::array<bool, 4> output_mask) {
  const Rows dy = as_rows(grad_output, normalized_ndim);
  const Rows ds = as_rows(or_undefined(grad_sum), normalized_ndim);
  const Rows x = as_rows(input, normalized_ndim);
  const Tensor w = contiguous_or_undefined(weight);
  const Device device(input);
  Tensor grad_input, grad_dropped, grad_weight, grad_bias;
  const auto row_sizes = input.sizes().slice(input.dim() - normalized_ndim);
  const at::ScalarType parameter = parameter_type(input, weight, bias);
  const auto [rows, cols] = shape_of(input, normalized_ndim);
  if (output_mask[0] || output_mask[1]) grad_input = at::empty(input.sizes(), input.options());
  if (output_mask[2]) grad_weight = at::empty(row_sizes, input.options().dtype(parameter));
  if (output_mask[3]) grad_bias = at::empty(row_sizes, input.options().dtype(parameter));
  Backward op{dy.data(),
              ds.data(),
              x.data(),
              data_or_null(mean),
              rstd.const_data_ptr(),
              data_or_null(w),
              mutable_data_or_null(grad_input),
              mutable_data_or_null(grad_weight),
              mutable_data_or_null(grad_bias),
              nullptr,
              rows,
              cols,
              dy.stride,
              ds.stride,
              x.stride,
              dtype_of(input.scalar_type()),
              dtype_of(parameter),
              !has(mean),
              {},
              nullptr};
  const bool drop = has(state) && output_mask[0];
  if (drop && cols > 0 && can_drop(device, op)) {
    grad_dropped = at::empty(input.sizes(), input.options());
    op.dropout = fused_dropout(p, source_of(*state, input), nullptr);
    op.grad_dropped = grad_dropped.mutable_data_ptr();
  }
  if (cols > 0) {
    const Tensor partials = partials_of(device, op, input);
    op.partials = mutable_data_or_null(partials);
    run(device, op);
  }
  if (drop && !grad_dropped.defined()) {
    static const auto apply =
        find_op<Tensor(const Tensor&, const Tensor&, double, c10::SymInt, double, double, double)>("dropout_apply");
    grad_dropped = apply.call(grad_input, *state, p, 1, fused_dropout(p, {}, nullptr).scale, 0, 0);
  }
  if (!has(state)) return {Tensor(), std::move(grad_input), std::move(grad_weight), std::move(grad_bias)};
  return {std::move(grad_dropped), output_mask[1] ? std::move(grad_input) : Tensor(), std::move(grad_weight),
          std::move(grad_bias)};
}

template <class Device>
BackwardOutputs backward(const Tensor& grad_output, const OptionalTensor& grad_sum, const Tensor& input,
                         const OptionalTensor& mean, const Tensor& rstd, const OptionalTensor& weight,
                         const OptionalTensor& bias, int64_t normalized_ndim, std::array<bool, 3> output_mask) {
  auto [unused, grad_input, grad_weight, grad_bias] =
      backward<Device>(grad_output, grad_sum, input, mean, rstd, weight, bias, std::nullopt, 0, normalized_ndim,
                       {false, output_mask[0], output_mask[1], output_mask[2]});
  return {std::move(grad_input), std::move(grad_weight), std::move(grad_bias)};
}

template <class Device>
DroppedBackwardOutputs dropped_backward(const Tensor& grad_output, const OptionalTensor& grad_sum, const Tensor& input,
                                        const OptionalTensor& mean, const Tensor& rstd, const OptionalTensor& weight,
                                        const OptionalTensor& bias, const Tensor& state, double p,
                                        int64_t normalized_ndim, std::array<bool, 4> output_mask) {
  return backward<Device>(grad_output, grad_sum, input, mean, rstd, weight, bias, state, p, normalized_ndim,
                          output_mask);
}

// Shapes and dtypes of the above, for tracing.
ForwardOutputs forward_meta(const Tensor& input, const OptionalTensor& residual, int64_t normalized_ndim,
                            const OptionalTensor&, const OptionalTensor&, double, bool rms, bool stats) {
  const auto like = [&](const auto& sizes, at::ScalarType type) {
    return at::empty_symint(sizes, input.options().dtype(type));
  };
  const auto stats_sizes = statistics_sizes(input.sym_sizes(), normalized_ndim);
  const at::ScalarType stats_type = accumulate_type(input.scalar_type());
  return {like(input.sym_sizes(), input.scalar_type()),
          has(residual) ? like(input.sym_sizes(), input.scalar_type()) : Tensor(),
          stats && !rms ? like(stats_sizes, stats_type) : Tensor(), stats ? like(stats_sizes, stats_type) : Tensor()};
}

BackwardOutputs backward_meta(const Tensor&, const OptionalTensor&, const Tensor& input, const OptionalTensor&,
                              const Tensor&, const OptionalTensor& weight, const OptionalTensor& bias,
                              int64_t normalized_ndim, std::array<bool, 3> output_mask) {
  const auto row_sizes = input.sym_sizes().slice(input.dim() - normalized_ndim);
  const auto options = input.options().dtype(parameter_type(input, weight, bias));
  return {output_mask[0] ? at::empty_symint(input.sym_sizes(), input.options()) : Tensor(),
          output_mask[1] ? at::empty_symint(row_sizes, options) : Tensor(),
          output_mask[2] ? at::empty_symint(row_sizes, options) : Tensor()};
}

DroppedForwardOutputs dropped_forward_meta(const Tensor& input, const Tensor& residual, const OptionalTensor&, double,
                                           int64_t normalized_ndim, const OptionalTensor& weight,
                                           const OptionalTensor& bias, double eps, bool rms, bool stats,
                                           const OptionalGenerator&) {
  auto [y, sum, mean, rstd] = forward_meta(input, residual, normalized_ndim, weight, bias, eps, rms, stats);
  return {std::move(y), std::move(sum), std::move(mean), std::move(rstd), empty_state(input)};
}

DroppedBackwardOutputs dropped_backward_meta(const Tensor& grad_output, const OptionalTensor& grad_sum,
                                             const Tensor& input, const OptionalTensor& mean, const Tensor& rstd,
                                             const OptionalTensor& weight, const OptionalTensor& bias, const Tensor&,
                                             double, int64_t normalized_ndim, std::array<bool, 4> output_mask) {
  auto [grad_residual, grad_weight, grad_bias] =
      backward_meta(grad_output, grad_sum, input, mean, rstd, weight, bias, normalized_ndim,
                    {output_mask[1], output_mask[2], output_mask[3]});
  return {output_mask[0] ? at::empty_symint(input.sym_sizes(), input.options()) : Tensor(), std::move(grad_residual),
          std::move(grad_weight), std::move(grad_bias)};
}

// The same results from torch's own differentiable ops.
std::tuple<Tensor, Tensor> native(const Tensor& input, const OptionalTensor& residual, c10::SymIntArrayRef shape,
                                  const OptionalTensor& weight, const OptionalTensor& bias, double eps, bool rms) {
  const Tensor x = has(residual) ? input + *residual : input;
  const Tensor y = in_accumulate_type(x, weight, bias, [&](const Tensor& t, const auto& w, const auto& b) {
    if (rms) return at::rms_norm_symint(t, shape, w, eps);
    // torch's double backward fails with a bias and no weight.
    if (has(b) && !has(w)) return at::layer_norm_symint(t, shape, {}, {}, eps) + *b;
    return at::layer_norm_symint(t, shape, w, b, eps);
  });
  return {y, x};
}

const auto& forward_op() {
  static const auto op = find_op<decltype(forward_meta)>("layer_norm_forward");
  return op;
}

ForwardOutputs call_forward(const Tensor& input, const OptionalTensor& residual, int64_t normalized_ndim,
                            const OptionalTensor& weight, const OptionalTensor& bias, double eps, bool rms,
                            bool stats) {
  return forward_op().call(input, residual, normalized_ndim, weight, bias, eps, rms, stats);
}

BackwardOutputs call_backward(const Tensor& grad_output, const OptionalTensor& grad_sum, const Tensor& input,
                              const OptionalTensor& mean, const Tensor& rstd, const OptionalTensor& weight,
                              const OptionalTensor& bias, int64_t normalized_ndim, std::array<bool, 3> output_mask) {
  static const auto op = find_op<decltype(call_backward)>("layer_norm_backward");
  return op.call(grad_output, grad_sum, input, mean, rstd, weight, bias, normalized_ndim, output_mask);
}

// The dropout on the way to a residual add, as autograd's side and the calls carry it.
struct DropoutCall {
  double p;
  OptionalTensor state;  // where a stream gave it
  OptionalGenerator generator;
};

std::tuple<ForwardOutputs, Tensor> call_forward(const Tensor& input, const OptionalTensor& residual,
                                                int64_t normalized_ndim, const OptionalTensor& weight,
                                                const OptionalTensor& bias, double eps, bool rms, bool stats,
                                                const DropoutCall* dropout) {
  if (dropout == nullptr) {
    return {call_forward(input, residual, normalized_ndim, weight, bias, eps, rms, stats), Tensor()};
  }
  static const auto op = find_op<decltype(dropped_forward_meta)>("dropout_layer_norm_forward");
  auto [y, sum, mean, rstd, state] = op.call(input, *residual, dropout->state, dropout->p, normalized_ndim, weight,
                                             bias, eps, rms, stats, dropout->generator);
  return {ForwardOutputs{std::move(y), std::move(sum), std::move(mean), std::move(rstd)}, std::move(state)};
}

Tensor drop(const Tensor& input, const Tensor& state, double p) {
  static const auto op =
      find_op<Tensor(const Tensor&, const Tensor&, double, c10::SymInt, double, double, double)>("dropout_apply");
  return op.call(input, state, p, 1, dropout_scale(p), 0, 0);
}

// A node of its own rather than torch::autograd::Function, which costs some 5 us more a call: as much as a small layer.
struct LayerNormBackward : SavingNode<5> {
  enum { Input, Mean, Rstd, Weight, State };  // Input: what was normalised, the sum where there is one
  Bias bias;
  int64_t normalized_ndim = 0;
  double eps = 0, p = 0;
  bool residual = false, rms = false;

  std::string name() const override { return "DlkitLayerNormBackward"; }

  variable_list backward(const variable_list& grads, const Saved& saved) override {
    const Tensor& grad_output = grads[0];
    const Tensor grad_sum = residual ? grads[1] : Tensor();
    if (!grad_output.defined()) return through_dropout({grad_sum, Tensor(), Tensor()}, saved);
    const auto wanted = mask();
    // A weight tells the parameters' type as well.
    const Tensor b = saved[Weight].defined() ? Tensor() : bias.stand_in(row_sizes(saved), saved[Input]);
    if (!saved[State].defined()) {
      return through_dropout(call_backward(grad_output, grad_sum, saved[Input], saved[Mean], saved[Rstd], saved[Weight],
                                           b, normalized_ndim, wanted),
                             saved);
    }
    static const auto op = find_op<decltype(dropped_backward_meta)>("dropout_layer_norm_backward");
    auto [grad_dropped, grad_residual, grad_weight, grad_bias] =
        op.call(grad_output, grad_sum, saved[Input], saved[Mean], saved[Rstd], saved[Weight], b, saved[State], p,
                normalized_ndim, {task_should_compute_output(0), task_should_compute_output(1), wanted[1], wanted[2]});
    return {grad_dropped, grad_residual, grad_weight, grad_bias};
  }

  // torch's own backward of the same function.
  variable_list differentiable_backward(const variable_list& grads, const Saved& saved) override {
    const Tensor& grad_output = grads[0];
    const Tensor grad_sum = residual ? grads[1] : Tensor();
    if (!grad_output.defined()) return through_dropout({grad_sum, Tensor(), Tensor()}, saved);
    // Aliases: the input may be an output of this very node, which must not be entered again while it runs.
    const auto alias = [](const Tensor& t) { return t.defined() ? t.view_as(t) : t; };
    const auto shape = row_sizes(saved);
    const std::array<Tensor, 3> sources{alias(saved[Input]), alias(saved[Weight]), bias.stand_in(shape, saved[Input])};
    const Tensor y = std::get<0>(native(sources[0], std::nullopt, shape, sources[1], sources[2], eps, rms));
    std::array<Tensor, 3> result = differentiable_gradients(y, grad_output, sources, mask());
    if (mask()[0] && grad_sum.defined()) result[0] = result[0] + grad_sum;
    return through_dropout({result[0], result[1], result[2]}, saved);
  }

  void collect(torch::dynamo::autograd::CompiledNodeArgs& args) const override {
    args.collect(normalized_ndim);
    args.collect(eps);
    args.collect(p);
    args.collect(residual);
    args.collect(rms);
    args.collect(bias.type);
  }

 private:
  c10::SymIntArrayRef row_sizes(const Saved& saved) const {
    return saved[Input].sym_sizes().slice(saved[Input].dim() - normalized_ndim);
  }

  std::array<bool, 3> mask() const {
    return {task_should_compute_output(0) || task_should_compute_output(1), task_should_compute_output(2),
            task_should_compute_output(3)};
  }

  // grad_input of what was normalised goes to the residual as it is, and to the input by way of the dropout.
  variable_list through_dropout(const BackwardOutputs& found, const Saved& saved) const {
    const auto& [grad_input, grad_weight, grad_bias] = found;
    Tensor first = task_should_compute_output(0) ? grad_input : Tensor();
    if (first.defined() && saved[State].defined()) first = drop(first, saved[State], p);
    return {first, task_should_compute_output(1) ? grad_input : Tensor(), grad_weight, grad_bias};
  }
};

std::tuple<Tensor, Tensor> forward_with_graph(const Tensor& input, const OptionalTensor& residual,
                                              int64_t normalized_ndim, const OptionalTensor& weight,
                                              const OptionalTensor& bias, double eps, bool rms,
                                              const DropoutCall* dropout) {
  using Node = LayerNormBackward;
  const auto node = make_node<Node>();
  node->set_next_edges(
      torch::autograd::collect_next_edges(input, or_undefined(residual), or_undefined(weight), or_undefined(bias)));
  ForwardOutputs outputs;
  Tensor state;
  {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    std::tie(outputs, state) = call_forward(input, residual, normalized_ndim, weight, bias, eps, rms, true, dropout);
  }
  auto& [y, sum, mean, rstd] = outputs;
  torch::autograd::set_history(y, node);
  if (sum.defined()) torch::autograd::set_history(sum, node);
  node->save(Node::Input, sum.defined() ? sum : input, sum.defined());
  node->save(Node::Mean, mean);
  node->save(Node::Rstd, rstd);
  node->save(Node::Weight, or_undefined(weight));
  node->bias = Bias(bias);
  node->normalized_ndim = normalized_ndim;
  node->eps = eps;
  node->rms = rms;
  node->residual = sum.defined();
  if (dropout != nullptr) {
    node->save(Node::State, state);
    node->p = dropout->p;
  }
  return {std::move(y), std::move(sum)};
}

// The check that torch's op makes, in torch's exception types.
void check_arguments(const char* name, const Tensor& input, c10::SymIntArrayRef shape, const OptionalTensor& weight,
                     const OptionalTensor& bias, bool rms) {
  const int64_t ndim = int64_t(shape.size());
  TORCH_CHECK(ndim >= 1, name, "(): expected normalized_shape to have at least one dimension, got an empty one");
  const auto check_parameter = [&](const char* argument, const OptionalTensor& p) {
    if (!has(p)) return;
    TORCH_CHECK(p->sym_sizes().equals(shape), name, "(): expected ", argument, " of shape ", shape,
                " (normalized_shape), got ", p->sym_sizes());
    TORCH_CHECK(p->device() == input.device(), name, "(): expected ", argument, " on ", input.device(),
                " (the device of input), got ", p->device());
  };
  check_parameter("weight", weight);
  check_parameter("bias", bias);
  if (rms) {
    TORCH_CHECK_VALUE(input.dim() >= ndim, name, "(): expected input with at least ", ndim,
                      " dimensions for normalized_shape ", shape, ", got shape ", input.sym_sizes());
  }
  TORCH_CHECK(input.dim() >= ndim && input.sym_sizes().slice(input.dim() - ndim).equals(shape), name,
              "(): expected input whose last dimensions are normalized_shape ", shape, ", got shape ",
              input.sym_sizes());
}

std::tuple<Tensor, Tensor> normalize(const char* name, const Tensor& input, const OptionalTensor& residual,
                                     c10::SymIntArrayRef shape, const OptionalTensor& weight,
                                     const OptionalTensor& bias, double eps, bool rms,
                                     const DropoutCall* dropout = nullptr) {
  if (!is_strided_nested(input)) check_arguments(name, input, shape, weight, bias, rms);
  if (needs_native(forward_op(), input, residual, weight, bias))
    return native(input, residual, shape, weight, bias, eps, rms);
  check_parameter_types(name, input, weight, bias);
  const int64_t ndim = int64_t(shape.size());
  if (any_requires_grad(input, residual, weight, bias)) {
    return forward_with_graph(input, residual, ndim, weight, bias, eps, rms, dropout);
  }
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  auto outputs = std::get<0>(call_forward(input, residual, ndim, weight, bias, eps, rms, false, dropout));
  return {std::move(std::get<0>(outputs)), std::move(std::get<1>(outputs))};
}

double rms_eps(const Tensor& input, std::optional<double> eps) {
  const bool is_double = input.scalar_type() == at::kDouble || input.scalar_type() == at::kComplexDouble;
  return eps.value_or(is_double ? std::numeric_limits<double>::epsilon() : std::numeric_limits<float>::epsilon());
}

// torch.rms_norm takes a weight of any floating type.
OptionalTensor rms_weight(const Tensor& input, const OptionalTensor& weight) {
  if (!has(weight) || weight->scalar_type() == input.scalar_type() || !at::isFloatingType(weight->scalar_type())) {
    return weight;
  }
  return weight->to(accumulate_type(input.scalar_type()));
}

// x + residual broadcasts and promotes as torch's addition does, a number on the CPU with any device; the kernel wants
// one shape, one type and one device.
std::tuple<Tensor, Tensor> promote(const Tensor& input, const Tensor& residual) {
  const bool nested = input.is_nested() || residual.is_nested();
  if (nested || (input.scalar_type() == residual.scalar_type() && input.sym_sizes().equals(residual.sym_sizes()))) {
    return {input, residual};
  }
  const at::ScalarType type = at::result_type(input, residual);  // without dimensions one counts for less
  const auto expanded = at::broadcast_tensors({input.to(type), residual.to(input.device(), type)});
  return {expanded[0], expanded[1]};
}

Tensor layer_norm(const Tensor& input, c10::SymIntArrayRef normalized_shape, const OptionalTensor& weight,
                  const OptionalTensor& bias, double eps) {
  return std::get<0>(normalize("layer_norm", input, std::nullopt, normalized_shape, weight, bias, eps, false));
}

// torch.rms_norm gives channels_last input a channels_last output; torch.layer_norm does not.
Tensor rms_norm(const Tensor& input, c10::SymIntArrayRef normalized_shape, const OptionalTensor& weight,
                std::optional<double> eps) {
  const Tensor y = std::get<0>(normalize("rms_norm", input, std::nullopt, normalized_shape, rms_weight(input, weight),
                                         std::nullopt, rms_eps(input, eps), true));
  return input.layout() != at::kStrided || input.is_contiguous() ? y : y.contiguous(input.suggest_memory_format());
}

std::tuple<Tensor, Tensor> add_layer_norm(const Tensor& input, const Tensor& residual,
                                          c10::SymIntArrayRef normalized_shape, const OptionalTensor& weight,
                                          const OptionalTensor& bias, double eps) {
  const auto [x, added] = promote(input, residual);
  return normalize("add_layer_norm", x, added, normalized_shape, weight, bias, eps, false);
}

std::tuple<Tensor, Tensor> add_rms_norm(const Tensor& input, const Tensor& residual,
                                        c10::SymIntArrayRef normalized_shape, const OptionalTensor& weight,
                                        std::optional<double> eps) {
  const auto [x, added] = promote(input, residual);
  return normalize("add_rms_norm", x, added, normalized_shape, rms_weight(x, weight), std::nullopt, rms_eps(x, eps),
                   true);
}

// One pass where x and residual have one shape and one type; else dropout, then what the addition makes of them.
std::tuple<Tensor, Tensor> dropout_add_norm(const char* name, const Tensor& input, const Tensor& residual,
                                            c10::SymIntArrayRef normalized_shape, const OptionalTensor& weight,
                                            const OptionalTensor& bias, std::optional<double> eps, double p, bool rms,
                                            const OptionalGenerator& generator, const OptionalTensor& stream) {
  check_dropout(name, input, p, generator, stream);
  TORCH_CHECK(residual.defined(), name, "(): expected residual to be a Tensor, got None");
  static const auto op = find_op<decltype(dropped_forward_meta)>("dropout_layer_norm_forward");
  const bool fits = !input.is_nested() && !residual.is_nested() && input.scalar_type() == residual.scalar_type() &&
                    input.device() == residual.device() && input.sym_sizes().equals(residual.sym_sizes()) &&
                    !needs_native(op, input, residual, weight, bias);
  const auto norm = [&](const Tensor& x, const Tensor& added, const DropoutCall* dropout) {
    return normalize(name, x, added, normalized_shape, rms ? rms_weight(x, weight) : weight, bias,
                     rms ? rms_eps(x, eps) : *eps, rms, dropout);
  };
  if (fits) {
    check_arguments(name, input, normalized_shape, weight, bias, rms);  // before anything is drawn
    const DropoutCall dropout{p, draw_for(input, p, stream), generator};
    return norm(input, residual, &dropout);
  }
  static const auto drop_op =
      find_op<Tensor(const Tensor&, double, int64_t, bool, const OptionalGenerator&, const OptionalTensor&)>("dropout");
  const auto [x, added] = promote(drop_op.call(input, p, -1, false, generator, stream), residual);
  return norm(x, added, nullptr);
}

std::tuple<Tensor, Tensor> dropout_add_layer_norm(const Tensor& input, const Tensor& residual,
                                                  c10::SymIntArrayRef normalized_shape, double p,
                                                  const OptionalTensor& weight, const OptionalTensor& bias, double eps,
                                                  const OptionalGenerator& generator, const OptionalTensor& stream) {
  return dropout_add_norm("dropout_add_layer_norm", input, residual, normalized_shape, weight, bias, eps, p, false,
                          generator, stream);
}

std::tuple<Tensor, Tensor> dropout_add_rms_norm(const Tensor& input, const Tensor& residual,
                                                c10::SymIntArrayRef normalized_shape, double p,
                                                const OptionalTensor& weight, std::optional<double> eps,
                                                const OptionalGenerator& generator, const OptionalTensor& stream) {
  return dropout_add_norm("dropout_add_rms_norm", input, residual, normalized_shape, weight, std::nullopt, eps, p, true,
                          generator, stream);
}

// Autocast on CUDA runs torch's layer_norm and, from torch 2.12 on, its rms_norm in fp32, and leaves the addition as it
// is; on the CPU it does nothing.
bool casts_rms_norm() {
  return c10::Dispatcher::singleton()
      .findSchemaOrThrow("aten::rms_norm", "")
      .hasKernelForDispatchKey(c10::DispatchKey::AutocastCUDA);
}

Tensor to_fp32(const Tensor& tensor) { return at::autocast::cached_cast(at::kFloat, tensor, at::kCUDA); }
OptionalTensor to_fp32(const OptionalTensor& tensor) {
  return at::autocast::cached_cast(at::kFloat, tensor, at::kCUDA);
}

Tensor layer_norm_autocast(const Tensor& input, c10::SymIntArrayRef normalized_shape, const OptionalTensor& weight,
                           const OptionalTensor& bias, double eps) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::DispatchKey::AutocastCUDA);
  return find_op<decltype(layer_norm)>("layer_norm")
      .call(to_fp32(input), normalized_shape, to_fp32(weight), to_fp32(bias), eps);
}

Tensor rms_norm_autocast(const Tensor& input, c10::SymIntArrayRef normalized_shape, const OptionalTensor& weight,
                         std::optional<double> eps) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::DispatchKey::AutocastCUDA);
  return find_op<decltype(rms_norm)>("rms_norm").call(to_fp32(input), normalized_shape, to_fp32(weight), eps);
}

std::tuple<Tensor, Tensor> add_layer_norm_autocast(const Tensor& input, const Tensor& residual,
                                                   c10::SymIntArrayRef normalized_shape, const OptionalTensor& weight,
                                                   const OptionalTensor& bias, double eps) {
  const Tensor sum = input + residual;
  return {layer_norm_autocast(sum, normalized_shape, weight, bias, eps), sum};
}

std::tuple<Tensor, Tensor> add_rms_norm_autocast(const Tensor& input, const Tensor& residual,
                                                 c10::SymIntArrayRef normalized_shape, const OptionalTensor& weight,
                                                 std::optional<double> eps) {
  const Tensor sum = input + residual;
  return {rms_norm_autocast(sum, normalized_shape, weight, eps), sum};
}

Tensor dropout_add(const Tensor& input, const Tensor& residual, double p, const OptionalGenerator& generator,
                   const OptionalTensor& stream) {
  static const auto op = find_op<decltype(dropout_add)>("dropout_add");
  return op.call(input, residual, p, generator, stream);
}

std::tuple<Tensor, Tensor> dropout_add_layer_norm_autocast(const Tensor& input, const Tensor& residual,
                                                           c10::SymIntArrayRef normalized_shape, double p,
                                                           const OptionalTensor& weight, const OptionalTensor& bias,
                                                           double eps, const OptionalGenerator& generator,
                                                           const OptionalTensor& stream) {
  const Tensor sum = dropout_add(input, residual, p, generator, stream);
  return {layer_norm_autocast(sum, normalized_shape, weight, bias, eps), sum};
}

std::tuple<Tensor, Tensor> dropout_add_rms_norm_autocast(const Tensor& input, const Tensor& residual,
                                                         c10::SymIntArrayRef normalized_shape, double p,
                                                         const OptionalTensor& weight, std::optional<double> eps,
                                                         const OptionalGenerator& generator,
                                                         const OptionalTensor& stream) {
  const Tensor sum = dropout_add(input, residual, p, generator, stream);
  return {rms_norm_autocast(sum, normalized_shape, weight, eps), sum};
}

template <class Device>
void implement_kernels(torch::Library& m) {
  implement_kernel<static_cast<decltype(&forward_meta)>(forward<Device>)>(m, "layer_norm_forward");
  implement_kernel<static_cast<decltype(&backward_meta)>(backward<Device>)>(m, "layer_norm_backward");
  implement_kernel<dropped_forward<Device>>(m, "dropout_layer_norm_forward");
  implement_kernel<dropped_backward<Device>>(m, "dropout_layer_norm_backward");
}

void implement_random(torch::Library& m) {
  implement_public<dropout_add_layer_norm>(m, "dropout_add_layer_norm");
  implement_public<dropout_add_rms_norm>(m, "dropout_add_rms_norm");
}

void implement_all(torch::Library& m) {
  implement_public<layer_norm>(m, "layer_norm");
  implement_public<rms_norm>(m, "rms_norm");
  implement_public<add_layer_norm>(m, "add_layer_norm");
  implement_public<add_rms_norm>(m, "add_rms_norm");
  implement_random(m);
}

}  // namespace
}  // namespace dlkit::layer_norm

DLKIT_DEFINE_OPS(m) {
  const std::vector<at::Tag> tags{at::Tag::pt2_compliant_tag};
  m.def(
      "layer_norm(Tensor input, SymInt[] normalized_shape, Tensor? weight=None, Tensor? bias=None, float eps=1e-05)"
      " -> Tensor",
      tags);
  m.def("rms_norm(Tensor input, SymInt[] normalized_shape, Tensor? weight=None, float? eps=None) -> Tensor", tags);
  m.def(
      "add_layer_norm(Tensor input, Tensor residual, SymInt[] normalized_shape, Tensor? weight=None,"
      " Tensor? bias=None, float eps=1e-05) -> (Tensor, Tensor)",
      tags);
  m.def(
      "add_rms_norm(Tensor input, Tensor residual, SymInt[] normalized_shape, Tensor? weight=None,"
      " float? eps=None) -> (Tensor, Tensor)",
      tags);
  const std::vector<at::Tag> random{at::Tag::pt2_compliant_tag, at::Tag::nondeterministic_seeded};
  m.def(
      "dropout_add_layer_norm(Tensor input, Tensor residual, SymInt[] normalized_shape, float p, Tensor? weight=None,"
      " Tensor? bias=None, float eps=1e-05, *, Generator? generator=None, Tensor(a!)? stream=None)"
      " -> (Tensor, Tensor)",
      random);
  m.def(
      "dropout_add_rms_norm(Tensor input, Tensor residual, SymInt[] normalized_shape, float p, Tensor? weight=None,"
      " float? eps=None, *, Generator? generator=None, Tensor(a!)? stream=None) -> (Tensor, Tensor)",
      random);
  m.def(
      "dropout_layer_norm_forward(Tensor input, Tensor residual, Tensor? state, float p, int normalized_ndim,"
      " Tensor? weight, Tensor? bias, float eps, bool rms, bool stats, Generator? generator=None)"
      " -> (Tensor y, Tensor sum, Tensor mean, Tensor rstd, Tensor state)",
      random);
  m.def(
      "dropout_layer_norm_backward(Tensor grad_output, Tensor? grad_sum, Tensor input, Tensor? mean, Tensor rstd,"
      " Tensor? weight, Tensor? bias, Tensor state, float p, int normalized_ndim, bool[4] output_mask)"
      " -> (Tensor grad_input, Tensor grad_residual, Tensor grad_weight, Tensor grad_bias)",
      tags);
  m.def(
      "layer_norm_forward(Tensor input, Tensor? residual, int normalized_ndim, Tensor? weight, Tensor? bias,"
      " float eps, bool rms, bool stats) -> (Tensor y, Tensor sum, Tensor mean, Tensor rstd)",
      tags);
  m.def(
      "layer_norm_backward(Tensor grad_output, Tensor? grad_sum, Tensor input, Tensor? mean, Tensor rstd,"
      " Tensor? weight, Tensor? bias, int normalized_ndim, bool[3] output_mask)"
      " -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)",
      tags);
}

DLKIT_IMPLEMENT_KERNELS(dlkit::layer_norm::implement_kernels)

DLKIT_IMPLEMENT_OPS(Meta, m) {
  dlkit::implement_kernel<dlkit::layer_norm::forward_meta>(m, "layer_norm_forward");
  dlkit::implement_kernel<dlkit::layer_norm::backward_meta>(m, "layer_norm_backward");
  dlkit::implement_kernel<dlkit::layer_norm::dropped_forward_meta>(m, "dropout_layer_norm_forward");
  dlkit::implement_kernel<dlkit::layer_norm::dropped_backward_meta>(m, "dropout_layer_norm_backward");
}
DLKIT_IMPLEMENT_PUBLIC_OPS(dlkit::layer_norm::implement_all)
DLKIT_IMPLEMENT_OPS(FuncTorchVmapMode, m) { dlkit::layer_norm::implement_random(m); }
DLKIT_IMPLEMENT_OPS(AutocastCUDA, m) {
  m.impl("layer_norm", dlkit::layer_norm::layer_norm_autocast);
  m.impl("add_layer_norm", dlkit::layer_norm::add_layer_norm_autocast);
  m.impl("dropout_add_layer_norm", dlkit::layer_norm::dropout_add_layer_norm_autocast);
  if (!dlkit::layer_norm::casts_rms_norm()) return;
  m.impl("rms_norm", dlkit::layer_norm::rms_norm_autocast);
  m.impl("add_rms_norm", dlkit::layer_norm::add_rms_norm_autocast);
  m.impl("dropout_add_rms_norm", dlkit::layer_norm::dropout_add_rms_norm_autocast);
}
