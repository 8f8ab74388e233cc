// LayerNorm and RMSNorm as torch ops. The public four check their arguments, then call layer_norm_forward, through an
// autograd node where a gradient is asked for; layer_norm_backward is an op of its own, so that compilers see both.
// dropout_add_layer_norm and dropout_add_rms_norm have a dropout before the residual add, and forward and backward ops
// of their own, which return and take the dropout's state. Where a row is too long for the fused kernels they call
// dropout's op, then these. Forward-mode derivatives, torch.func transforms and double backward go through
// differentiable torch formulas.
#include "../glue/op.h"

#include <ATen/ops/broadcast_tensors.h>
#include <ATen/ops/layer_norm.h>
#include <ATen/ops/result_type.h>
#include <ATen/ops/rms_norm.h>

#include "../dropout/op.h"
#include "../glue/autocast.h"
#include "../glue/autograd.h"
#include "../glue/checked.h"
#include "kernel.h"

namespace dlkit::layer_norm {
namespace {

using at::Tensor;
using torch::autograd::variable_list;
using ForwardOutputs = std::tuple<Tensor, Tensor, Tensor, Tensor>;                 // y, sum, mean, rstd
using BackwardOutputs = std::tuple<Tensor, Tensor, Tensor>;                        // grad_input, grad_weight, grad_bias
using DroppedForwardOutputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;  // ..., state
using DroppedBackwardOutputs = std::tuple<Tensor, Tensor, Tensor, Tensor>;         // grad_input, grad_residual, ...

DLKIT_RUN(Forward, forward)
DLKIT_RUN(Backward, backward)
DLKIT_ASK(can_drop, Forward, can_drop)
DLKIT_ASK(can_drop, Backward, can_drop)
DLKIT_ASK(partials_bytes, Backward, backward_partials)
DLKIT_FOR_CUDA(int64_t partials_bytes(const CudaDevice&, const Forward& op) { return forward_partials_cuda(op); })
DLKIT_FOR_CPU(int64_t partials_bytes(const CpuDevice&, const Forward&) { return 0; })

// Runs the kernel with the memory for partial sums that it asks for.
template <class Device, class Op>
void run_with_partials(const Device& device, Op& op, const Tensor& input) {
  const int64_t bytes = partials_bytes(device, op);
  const Tensor partials = bytes > 0 ? at::empty({bytes}, input.options().dtype(at::kByte)) : Tensor();
  op.partials = mutable_data_or_null(partials);
  run(device, op);
}

// The tensors of a norm and its options.
struct Norm {
  const Tensor& input;
  const OptionalTensor& residual = kNone;
  c10::SymIntArrayRef shape = {};  // of a row: the last dimensions
  const OptionalTensor& weight = kNone;
  const OptionalTensor& bias = kNone;
  std::optional<double> eps = std::nullopt;  // RMSNorm has a default
  bool rms = false;

  int64_t ndim() const { return int64_t(shape.size()); }
  at::ScalarType parameters() const { return parameter_type(input, weight, bias); }
};

c10::SymIntArrayRef last_sizes(const Tensor& input, int64_t ndim) {
  return input.sym_sizes().slice(input.dim() - ndim);
}

// Rows and columns.
std::pair<int64_t, int64_t> shape_of(const Tensor& input, int64_t ndim) {
  const int64_t cols = c10::multiply_integers(input.sizes().slice(input.dim() - ndim));
  return {cols > 0 ? input.numel() / cols : 0, cols};
}

Tensor empty_like_input(const Tensor& input) { return at::empty_symint(input.sym_sizes(), input.options()); }

ForwardOutputs empty_outputs(const Norm& norm, bool stats) {
  ForwardOutputs outputs;
  auto& [y, sum, mean, rstd] = outputs;
  y = empty_like_input(norm.input);
  if (has(norm.residual)) sum = empty_like_input(norm.input);
  if (stats) {
    c10::SymDimVector sizes(norm.input.sym_sizes().begin(), norm.input.sym_sizes().end());
    std::fill(sizes.end() - norm.ndim(), sizes.end(), 1);
    const auto options = norm.input.options().dtype(accumulate_type(norm.input.scalar_type()));
    if (!norm.rms) mean = at::empty_symint(sizes, options);
    rstd = at::empty_symint(sizes, options);
  }
  return outputs;
}

BackwardOutputs empty_gradients(const Norm& norm, std::array<bool, 3> mask) {
  const auto parameter = [&](bool wanted) {
    return wanted ? at::empty_symint(norm.shape, norm.input.options().dtype(norm.parameters())) : Tensor();
  };
  return {mask[0] ? empty_like_input(norm.input) : Tensor(), parameter(mask[1]), parameter(mask[2])};
}

// Dropout arguments that are fixed before launch.
FusedDropout fused_dropout(double p, const PhiloxSource& source, int64_t* rng_state, const KeptBits& bits) {
  return {source, rng_state, drop_threshold(p), dropout_scale(p), true, bits};
}

// The arguments of forward's kernel, what they point to, and its outputs.
struct ForwardCall {
  Rows x, residual;
  Tensor weight, bias;
  ForwardOutputs outputs;
  Forward op;

  ForwardCall(const Norm& norm, bool stats)
      : x(as_rows(norm.input, norm.ndim())),
        residual(as_rows(or_undefined(norm.residual), norm.ndim())),
        weight(contiguous_or_undefined(norm.weight)),
        bias(contiguous_or_undefined(norm.bias)),
        outputs(empty_outputs(norm, stats)) {
    const auto& [y, sum, mean, rstd] = outputs;
    const auto [rows, cols] = shape_of(norm.input, norm.ndim());
    op = {.x = x.data(),
          .residual = residual.data(),
          .weight = data_or_null(weight),
          .bias = data_or_null(bias),
          .y = y.mutable_data_ptr(),
          .sum = mutable_data_or_null(sum),
          .mean = mutable_data_or_null(mean),
          .rstd = mutable_data_or_null(rstd),
          .rows = rows,
          .cols = cols,
          .x_stride = x.stride,
          .residual_stride = residual.stride,
          .eps = *norm.eps,
          .dtype = dtype_of(norm.input.scalar_type()),
          .parameter_dtype = dtype_of(norm.parameters()),
          .rms = norm.rms,
          .dropout = {}};
  }
};

template <class Device>
ForwardOutputs forward(const Norm& norm, bool stats) {
  const Device device(norm.input);
  ForwardCall call(norm, stats);
  if (call.op.rows > 0) run_with_partials(device, call.op, norm.input);
  return std::move(call.outputs);
}

template <class Device>
ForwardOutputs forward(const Tensor& input, const OptionalTensor& residual, int64_t normalized_ndim,
                       const OptionalTensor& weight, const OptionalTensor& bias, double eps, bool rms, bool stats) {
  return forward<Device>({.input = input,
                          .residual = residual,
                          .shape = last_sizes(input, normalized_ndim),
                          .weight = weight,
                          .bias = bias,
                          .eps = eps,
                          .rms = rms},
                         stats);
}

// An empty input, or p = 1, needs no mask: nothing is drawn.
template <class Device>
DroppedForwardOutputs dropped_forward(const Tensor& input, const Tensor& residual, const OptionalTensor& rng_state,
                                      double p, int64_t normalized_ndim, const OptionalTensor& weight,
                                      const OptionalTensor& bias, double eps, bool rms, bool stats,
                                      const OptionalGenerator& generator, bool keep_bits) {
  const Device device(input);
  const OptionalTensor added = residual;
  const Norm norm{.input = input,
                  .residual = added,
                  .shape = last_sizes(input, normalized_ndim),
                  .weight = weight,
                  .bias = bias,
                  .eps = eps,
                  .rms = rms};
  ForwardCall call(norm, stats);
  TORCH_CHECK(!keep_bits || (input.is_cpu() && call.op.cols % kBlockElements == 0),
              "dropout: expected keep_bits on cpu, with rows of a multiple of ", kBlockElements,
              " elements; got input on ", input.device(), ", rows of ", call.op.cols);
  Tensor drawn = has(rng_state) ? rng_state->clone() : empty_rng_state(input, keep_bits);
  if (call.op.rows > 0 && !can_drop(device, call.op)) {
    static const auto add = find_op<dropout::AddForwardOp>("dropout_add_forward");
    Tensor sum;
    std::tie(sum, drawn) = add.call(input, residual, rng_state, p, generator, keep_bits);
    call.outputs = forward<Device>({.input = sum,
                                    .shape = last_sizes(sum, normalized_ndim),
                                    .weight = weight,
                                    .bias = bias,
                                    .eps = eps,
                                    .rms = rms},
                                   stats);
    std::get<1>(call.outputs) = sum;
  } else if (call.op.rows > 0) {
    const PhiloxSource source = has(rng_state) ? source_of(*rng_state, input)
                                : p < 1        ? draw(device, input, generator)
                                               : PhiloxSource{};
    call.op.dropout = fused_dropout(p, source, has(rng_state) ? nullptr : drawn.mutable_data_ptr<int64_t>(),
                                    bits_in(drawn, input.numel(), has(rng_state)));
    run_with_partials(device, call.op, input);
  } else if (!has(rng_state)) {
    drawn.zero_();
  }
  auto& [y, sum, mean, rstd] = call.outputs;
  return {std::move(y), std::move(sum), std::move(mean), std::move(rstd), std::move(drawn)};
}

// The arguments of backward beside forward's norm, whose `input` is then the normalized tensor.
struct Upstream {
  const Tensor& grad_output;
  const OptionalTensor& grad_sum;
  const OptionalTensor& mean;
  const Tensor& rstd;
};

// With a state, grad_residual is the gradient of the sum, and grad_input that gradient after the dropout's backward.
template <class Device>
DroppedBackwardOutputs backward(const Upstream& upstream, const Norm& norm, const OptionalTensor& rng_state, double p,
                                std::array<bool, 4> output_mask) {
  const Tensor& input = norm.input;
  const Rows dy = as_rows(upstream.grad_output, norm.ndim());
  const Rows ds = as_rows(or_undefined(upstream.grad_sum), norm.ndim());
  const Rows x = as_rows(input, norm.ndim());
  const Tensor w = contiguous_or_undefined(norm.weight);
  const Device device(input);
  auto [grad_residual, grad_weight, grad_bias] =
      empty_gradients(norm, {output_mask[0] || output_mask[1], output_mask[2], output_mask[3]});
  Tensor grad_input;
  const auto [rows, cols] = shape_of(input, norm.ndim());
  Backward op{.grad_output = dy.data(),
              .grad_sum = ds.data(),
              .x = x.data(),
              .mean = data_or_null(upstream.mean),
              .rstd = upstream.rstd.const_data_ptr(),
              .weight = data_or_null(w),
              .grad_input = mutable_data_or_null(grad_residual),
              .grad_residual = nullptr,
              .grad_weight = mutable_data_or_null(grad_weight),
              .grad_bias = mutable_data_or_null(grad_bias),
              .partials = nullptr,
              .rows = rows,
              .cols = cols,
              .grad_output_stride = dy.stride,
              .grad_sum_stride = ds.stride,
              .x_stride = x.stride,
              .dtype = dtype_of(input.scalar_type()),
              .parameter_dtype = dtype_of(norm.parameters()),
              .rms = norm.rms,
              .dropout = {}};
  const bool drops = has(rng_state) && output_mask[0];
  if (drops && cols > 0 && can_drop(device, op)) {
    grad_input = at::empty(input.sizes(), input.options());
    op.dropout = fused_dropout(p, source_of(*rng_state, input), nullptr, bits_in(*rng_state, input.numel(), true));
    op.grad_residual = op.grad_input;
    op.grad_input = grad_input.mutable_data_ptr();
  }
  if (cols > 0) run_with_partials(device, op, input);
  if (drops && !grad_input.defined()) grad_input = dropout::drop_again(grad_residual, *rng_state, p);
  return {std::move(grad_input), output_mask[1] ? std::move(grad_residual) : Tensor(), std::move(grad_weight),
          std::move(grad_bias)};
}

template <class Device>
BackwardOutputs backward(const Tensor& grad_output, const OptionalTensor& grad_sum, const Tensor& input,
                         const OptionalTensor& mean, const Tensor& rstd, const OptionalTensor& weight,
                         const OptionalTensor& bias, int64_t normalized_ndim, std::array<bool, 3> output_mask) {
  auto [unused, grad_input, grad_weight, grad_bias] = backward<Device>(
      {.grad_output = grad_output, .grad_sum = grad_sum, .mean = mean, .rstd = rstd},
      {.input = input, .shape = last_sizes(input, normalized_ndim), .weight = weight, .bias = bias, .rms = !has(mean)},
      std::nullopt, 0, {false, output_mask[0], output_mask[1], output_mask[2]});
  return {std::move(grad_input), std::move(grad_weight), std::move(grad_bias)};
}

template <class Device>
DroppedBackwardOutputs dropped_backward(const Tensor& grad_output, const OptionalTensor& grad_sum, const Tensor& input,
                                        const OptionalTensor& mean, const Tensor& rstd, const OptionalTensor& weight,
                                        const OptionalTensor& bias, const Tensor& rng_state, double p,
                                        int64_t normalized_ndim, std::array<bool, 4> output_mask) {
  return backward<Device>(
      {.grad_output = grad_output, .grad_sum = grad_sum, .mean = mean, .rstd = rstd},
      {.input = input, .shape = last_sizes(input, normalized_ndim), .weight = weight, .bias = bias, .rms = !has(mean)},
      rng_state, p, output_mask);
}

// Shapes and dtypes of the above, for tracing.
ForwardOutputs forward_meta(const Tensor& input, const OptionalTensor& residual, int64_t normalized_ndim,
                            const OptionalTensor&, const OptionalTensor&, double, bool rms, bool stats) {
  return empty_outputs({.input = input, .residual = residual, .shape = last_sizes(input, normalized_ndim), .rms = rms},
                       stats);
}

BackwardOutputs backward_meta(const Tensor&, const OptionalTensor&, const Tensor& input, const OptionalTensor&,
                              const Tensor&, const OptionalTensor& weight, const OptionalTensor& bias,
                              int64_t normalized_ndim, std::array<bool, 3> output_mask) {
  return empty_gradients({.input = input, .shape = last_sizes(input, normalized_ndim), .weight = weight, .bias = bias},
                         output_mask);
}

DroppedForwardOutputs dropped_forward_meta(const Tensor& input, const Tensor& residual, const OptionalTensor& rng_state,
                                           double, int64_t normalized_ndim, const OptionalTensor&,
                                           const OptionalTensor&, double, bool rms, bool stats,
                                           const OptionalGenerator&, bool keep_bits) {
  auto [y, sum, mean, rstd] = empty_outputs(
      {.input = input, .residual = residual, .shape = last_sizes(input, normalized_ndim), .rms = rms}, stats);
  return {std::move(y), std::move(sum), std::move(mean), std::move(rstd),
          has(rng_state) ? at::empty_like(*rng_state) : empty_rng_state(input, keep_bits)};
}

DroppedBackwardOutputs dropped_backward_meta(const Tensor&, const OptionalTensor&, const Tensor& input,
                                             const OptionalTensor&, const Tensor&, const OptionalTensor& weight,
                                             const OptionalTensor& bias, const Tensor&, double, int64_t normalized_ndim,
                                             std::array<bool, 4> output_mask) {
  auto [grad_residual, grad_weight, grad_bias] =
      empty_gradients({.input = input, .shape = last_sizes(input, normalized_ndim), .weight = weight, .bias = bias},
                      {output_mask[1], output_mask[2], output_mask[3]});
  return {output_mask[0] ? empty_like_input(input) : Tensor(), std::move(grad_residual), std::move(grad_weight),
          std::move(grad_bias)};
}

// The same results from torch's own differentiable ops: y and the sum.
std::tuple<Tensor, Tensor> native(const Norm& norm) {
  const Tensor x = has(norm.residual) ? norm.input + *norm.residual : norm.input;
  const Tensor y = in_accumulate_type(x, norm.weight, norm.bias, [&](const Tensor& t, const auto& w, const auto& b) {
    if (norm.rms) return at::rms_norm_symint(t, norm.shape, w, norm.eps);
    // torch's double backward fails with a bias and no weight.
    if (has(b) && !has(w)) return at::layer_norm_symint(t, norm.shape, {}, {}, *norm.eps) + *b;
    return at::layer_norm_symint(t, norm.shape, w, b, *norm.eps);
  });
  return {y, x};
}

const auto& forward_op() {
  static const auto op = find_op<decltype(forward_meta)>("layer_norm_forward");
  return op;
}

const auto& dropped_forward_op() {
  static const auto op = find_op<decltype(dropped_forward_meta)>("dropout_layer_norm_forward");
  return op;
}

// The dropout on the way to a residual add.
struct DropoutCall {
  double p;
  OptionalTensor rng_state;  // where a stream gave it
  OptionalGenerator generator;
};

DroppedForwardOutputs call_forward(const Norm& norm, bool stats, const DropoutCall* dropout) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const auto& [input, residual, shape, weight, bias, eps, rms] = norm;
  if (dropout != nullptr) {
    // The kernel keeps whole bytes of a row. `stats` are wanted where there will be a backward.
    const auto cols = c10::multiply_integers(shape).maybe_as_int();
    const bool keep_bits = stats && cols && *cols % kBlockElements == 0 && should_keep_bits(input, dropout->p);
    return dropped_forward_op().call(input, *residual, dropout->rng_state, dropout->p, norm.ndim(), weight, bias, *eps,
                                     rms, stats, dropout->generator, keep_bits);
  }
  return std::tuple_cat(forward_op().call(input, residual, norm.ndim(), weight, bias, *eps, rms, stats),
                        std::make_tuple(Tensor()));
}

struct LayerNormBackward : SavingNode<LayerNormBackward, 5> {
  enum { Input, Mean, Rstd, Weight, RngState };  // Input: the normalized tensor, which is the sum if there is one
  Bias bias;
  int64_t normalized_ndim = 0;
  double eps = 0, p = 0;
  bool residual = false, rms = false;

  std::string name() const override { return "DlkitLayerNormBackward"; }
  auto fields() const { return std::tie(normalized_ndim, eps, p, residual, rms, bias.type); }

  variable_list backward(const variable_list& grads, const Saved& saved) override {
    const Tensor& grad_output = grads[0];
    const Tensor grad_sum = residual ? grads[1] : Tensor();
    if (!grad_output.defined()) return through_dropout({grad_sum, Tensor(), Tensor()}, saved);
    const auto wanted = mask();
    // A weight has the parameters' type too.
    const Tensor b = saved[Weight].defined() ? Tensor() : bias.stand_in(row_sizes(saved), saved[Input]);
    if (!saved[RngState].defined()) {
      static const auto op = find_op<decltype(backward_meta)>("layer_norm_backward");
      return through_dropout(op.call(grad_output, grad_sum, saved[Input], saved[Mean], saved[Rstd], saved[Weight], b,
                                     normalized_ndim, wanted),
                             saved);
    }
    static const auto op = find_op<decltype(dropped_backward_meta)>("dropout_layer_norm_backward");
    auto [grad_input, grad_residual, grad_weight, grad_bias] =
        op.call(grad_output, grad_sum, saved[Input], saved[Mean], saved[Rstd], saved[Weight], b, saved[RngState], p,
                normalized_ndim, {task_should_compute_output(0), task_should_compute_output(1), wanted[1], wanted[2]});
    return {grad_input, grad_residual, grad_weight, grad_bias};
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
    const OptionalTensor weight = sources[1], stand_in = sources[2];
    const Tensor y = std::get<0>(
        native({.input = sources[0], .shape = shape, .weight = weight, .bias = stand_in, .eps = eps, .rms = rms}));
    std::array<Tensor, 3> result = differentiable_gradients(y, grad_output, sources, mask());
    if (mask()[0] && grad_sum.defined()) result[0] = result[0] + grad_sum;
    return through_dropout({result[0], result[1], result[2]}, saved);
  }

 private:
  c10::SymIntArrayRef row_sizes(const Saved& saved) const { return last_sizes(saved[Input], normalized_ndim); }

  std::array<bool, 3> mask() const {
    return {task_should_compute_output(0) || task_should_compute_output(1), task_should_compute_output(2),
            task_should_compute_output(3)};
  }

  // The normalized tensor's gradient goes to the residual unchanged, and to the input through the dropout's backward.
  variable_list through_dropout(const BackwardOutputs& found, const Saved& saved) const {
    const auto& [grad_sum, grad_weight, grad_bias] = found;
    Tensor first = task_should_compute_output(0) ? grad_sum : Tensor();
    if (first.defined() && saved[RngState].defined()) first = dropout::drop_again(first, saved[RngState], p);
    return {first, task_should_compute_output(1) ? grad_sum : Tensor(), grad_weight, grad_bias};
  }
};

// The checks that torch's op makes, with torch's exception types.
void check_arguments(const char* name, const Norm& norm) {
  const auto& [input, residual, shape, weight, bias, eps, rms] = norm;
  TORCH_CHECK(!shape.empty(), name, "(): expected normalized_shape to have at least one dimension, got an empty one");
  const auto check_parameter = [&](const char* argument, const OptionalTensor& p) {
    TORCH_CHECK(!has(p) || p->sym_sizes().equals(norm.shape), name, "(): expected ", argument, " of shape ", norm.shape,
                " (normalized_shape), got ", p->sym_sizes());
  };
  check_parameter("weight", weight);
  check_parameter("bias", bias);
  const int64_t ndim = norm.ndim();
  if (rms) {
    TORCH_CHECK_VALUE(input.dim() >= ndim, name, "(): expected input with at least ", ndim,
                      " dimensions for normalized_shape ", shape, ", got shape ", input.sym_sizes());
  }
  TORCH_CHECK(input.dim() >= ndim && last_sizes(input, ndim).equals(shape), name,
              "(): expected input whose last dimensions are normalized_shape ", shape, ", got shape ",
              input.sym_sizes());
}

// Returns y and the sum, with a node where a gradient is needed.
std::tuple<Tensor, Tensor> normalize(const char* name, const Norm& norm, const DropoutCall* dropout = nullptr) {
  const auto& [input, residual, shape, weight, bias, eps, rms] = norm;
  if (!is_strided_nested(input)) check_arguments(name, norm);
  if (needs_native(forward_op(), input, residual, weight, bias)) return native(norm);
  check_parameter_types(name, input, weight, bias);
  using Node = LayerNormBackward;
  const auto node = node_for<Node>(input, residual, weight, bias);
  auto [y, sum, mean, rstd, rng_state] = call_forward(norm, bool(node), dropout);
  if (node) {
    torch::autograd::set_history(y, node);
    if (sum.defined()) torch::autograd::set_history(sum, node);
    node->save(Node::Input, sum.defined() ? sum : input, sum.defined());
    node->save(Node::Mean, mean);
    node->save(Node::Rstd, rstd);
    node->save(Node::Weight, or_undefined(weight));
    node->save(Node::RngState, rng_state);
    node->bias = Bias(bias);
    node->normalized_ndim = norm.ndim();
    node->eps = *eps;
    node->p = dropout != nullptr ? dropout->p : 0;
    node->residual = sum.defined();
    node->rms = rms;
  }
  return {std::move(y), std::move(sum)};
}

// RMSNorm's defaults; torch.rms_norm takes a weight of any floating type.
std::tuple<Tensor, Tensor> normalize_rms(const char* name, Norm norm, const DropoutCall* dropout = nullptr) {
  const at::ScalarType type = norm.input.scalar_type();
  const bool is_double = type == at::kDouble || type == at::kComplexDouble;
  norm.rms = true;
  if (!norm.eps) {
    norm.eps = is_double ? std::numeric_limits<double>::epsilon() : std::numeric_limits<float>::epsilon();
  }
  if (!has(norm.weight) || norm.weight->scalar_type() == type || !at::isFloatingType(norm.weight->scalar_type())) {
    return normalize(name, norm, dropout);
  }
  const OptionalTensor weight = norm.weight->to(accumulate_type(type));
  return normalize(name,
                   {.input = norm.input,
                    .residual = norm.residual,
                    .shape = norm.shape,
                    .weight = weight,
                    .eps = norm.eps,
                    .rms = true},
                   dropout);
}

// x + residual broadcasts and promotes as torch's addition does, a number on the CPU with any device; the kernel wants
// one shape, one type and one device.
std::tuple<Tensor, Tensor> promote(const Tensor& input, const Tensor& residual) {
  const bool nested = input.is_nested() || residual.is_nested();
  if (nested || (input.scalar_type() == residual.scalar_type() && input.sym_sizes().equals(residual.sym_sizes()))) {
    return {input, residual};
  }
  const at::ScalarType type = at::result_type(input, residual);  // one without dimensions counts for less
  const auto expanded = at::broadcast_tensors({input.to(type), residual.to(input.device(), type)});
  return {expanded[0], expanded[1]};
}

Tensor layer_norm(const Tensor& input, c10::SymIntArrayRef normalized_shape, const OptionalTensor& weight,
                  const OptionalTensor& bias, double eps) {
  return std::get<0>(
      normalize("layer_norm", {.input = input, .shape = normalized_shape, .weight = weight, .bias = bias, .eps = eps}));
}

// torch.rms_norm gives channels_last input a channels_last output; torch.layer_norm does not.
Tensor rms_norm(const Tensor& input, c10::SymIntArrayRef normalized_shape, const OptionalTensor& weight,
                std::optional<double> eps) {
  const Tensor y =
      std::get<0>(normalize_rms("rms_norm", {.input = input, .shape = normalized_shape, .weight = weight, .eps = eps}));
  return input.layout() != at::kStrided || input.is_contiguous() ? y : y.contiguous(input.suggest_memory_format());
}

std::tuple<Tensor, Tensor> add_layer_norm(const Tensor& input, const Tensor& residual,
                                          c10::SymIntArrayRef normalized_shape, const OptionalTensor& weight,
                                          const OptionalTensor& bias, double eps) {
  const auto [x, added] = promote(input, residual);
  return normalize(
      "add_layer_norm",
      {.input = x, .residual = added, .shape = normalized_shape, .weight = weight, .bias = bias, .eps = eps});
}

std::tuple<Tensor, Tensor> add_rms_norm(const Tensor& input, const Tensor& residual,
                                        c10::SymIntArrayRef normalized_shape, const OptionalTensor& weight,
                                        std::optional<double> eps) {
  const auto [x, added] = promote(input, residual);
  return normalize_rms("add_rms_norm",
                       {.input = x, .residual = added, .shape = normalized_shape, .weight = weight, .eps = eps});
}

// One pass where x and residual have one shape and type; else dropout, then the norm of the promoted sum.
std::tuple<Tensor, Tensor> dropout_add_norm(const char* name, const Norm& norm, double p,
                                            const OptionalGenerator& generator, const OptionalTensor& stream) {
  const auto& [input, residual, shape, weight, bias, eps, rms] = norm;
  check_dropout(name, input, p, generator, stream);
  TORCH_CHECK(has(residual), name, "(): expected residual to be a Tensor, got None");
  if (has_form_of(input, *residual) && !needs_native(dropped_forward_op(), input, residual, weight, bias)) {
    check_arguments(name, norm);  // before anything is drawn
    const DropoutCall dropout{p, draw_for(input, p, stream), generator};
    return rms ? normalize_rms(name, norm, &dropout) : normalize(name, norm, &dropout);
  }
  const auto [x, added] = promote(dropout::drop(input, p, generator, stream), *residual);
  const Norm rest{
      .input = x, .residual = added, .shape = shape, .weight = weight, .bias = bias, .eps = eps, .rms = rms};
  return rms ? normalize_rms(name, rest) : normalize(name, rest);
}

std::tuple<Tensor, Tensor> dropout_add_layer_norm(const Tensor& input, const Tensor& residual,
                                                  c10::SymIntArrayRef normalized_shape, double p,
                                                  const OptionalTensor& weight, const OptionalTensor& bias, double eps,
                                                  const OptionalGenerator& generator, const OptionalTensor& stream) {
  const OptionalTensor added = residual;
  return dropout_add_norm(
      "dropout_add_layer_norm",
      {.input = input, .residual = added, .shape = normalized_shape, .weight = weight, .bias = bias, .eps = eps}, p,
      generator, stream);
}

std::tuple<Tensor, Tensor> dropout_add_rms_norm(const Tensor& input, const Tensor& residual,
                                                c10::SymIntArrayRef normalized_shape, double p,
                                                const OptionalTensor& weight, std::optional<double> eps,
                                                const OptionalGenerator& generator, const OptionalTensor& stream) {
  const OptionalTensor added = residual;
  return dropout_add_norm(
      "dropout_add_rms_norm",
      {.input = input, .residual = added, .shape = normalized_shape, .weight = weight, .eps = eps, .rms = true}, p,
      generator, stream);
}

// Autocast on CUDA runs torch's layer_norm and, from torch 2.12 on, its rms_norm in fp32; it does not cast the
// addition. On the CPU it casts neither.
bool casts_rms_norm() {
  return c10::Dispatcher::singleton()
      .findSchemaOrThrow("aten::rms_norm", "")
      .hasKernelForDispatchKey(c10::DispatchKey::AutocastCUDA);
}

template <auto kNorm, class... Rest>
std::tuple<Tensor, Tensor> add_autocast(const Tensor& input, const Tensor& residual, Rest... rest) {
  const Tensor sum = input + residual;
  return {InFp32<kNorm>::call(sum, rest...), sum};
}

template <auto kNorm, class... Rest>
std::tuple<Tensor, Tensor> dropout_add_autocast(const Tensor& input, const Tensor& residual, c10::SymIntArrayRef shape,
                                                double p, Rest... rest, const OptionalGenerator& generator,
                                                const OptionalTensor& stream) {
  static const auto op = find_op<dropout::AddOp>("dropout_add");
  const Tensor sum = op.call(input, residual, p, generator, stream);
  return {InFp32<kNorm>::call(sum, shape, rest...), sum};
}

template <class Device>
void implement_kernels(torch::Library& m) {
  implement_kernel<static_cast<decltype(&forward_meta)>(forward<Device>)>(m, "layer_norm_forward");
  implement_kernel<static_cast<decltype(&backward_meta)>(backward<Device>)>(m, "layer_norm_backward");
  implement_kernel<dropped_forward<Device>>(m, "dropout_layer_norm_forward");
  implement_kernel<dropped_backward<Device>>(m, "dropout_layer_norm_backward");
}

void implement_meta(torch::Library& m) {
  implement_kernel<forward_meta>(m, "layer_norm_forward");
  implement_kernel<backward_meta>(m, "layer_norm_backward");
  implement_kernel<dropped_forward_meta>(m, "dropout_layer_norm_forward");
  implement_kernel<dropped_backward_meta>(m, "dropout_layer_norm_backward");
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

void implement_autocast(torch::Library& m) {
  using Weight = const OptionalTensor&;
  implement_in_fp32<layer_norm>(m, "layer_norm");
  m.impl("add_layer_norm", add_autocast<layer_norm, c10::SymIntArrayRef, Weight, Weight, double>);
  m.impl("dropout_add_layer_norm", dropout_add_autocast<layer_norm, Weight, Weight, double>);
  if (!casts_rms_norm()) return;
  implement_in_fp32<rms_norm>(m, "rms_norm");
  m.impl("add_rms_norm", add_autocast<rms_norm, c10::SymIntArrayRef, Weight, std::optional<double>>);
  m.impl("dropout_add_rms_norm", dropout_add_autocast<rms_norm, Weight, std::optional<double>>);
}

}  // namespace
}  // namespace dlkit::layer_norm

DLKIT_DEFINE_OPS(m) {
  m.def(
      "layer_norm(Tensor input, SymInt[] normalized_shape, Tensor? weight=None, Tensor? bias=None, float eps=1e-05)"
      " -> Tensor",
      DLKIT_PURE);
  m.def("rms_norm(Tensor input, SymInt[] normalized_shape, Tensor? weight=None, float? eps=None) -> Tensor",
        DLKIT_PURE);
  m.def(
      "add_layer_norm(Tensor input, Tensor residual, SymInt[] normalized_shape, Tensor? weight=None,"
      " Tensor? bias=None, float eps=1e-05) -> (Tensor, Tensor)",
      DLKIT_PURE);
  m.def(
      "add_rms_norm(Tensor input, Tensor residual, SymInt[] normalized_shape, Tensor? weight=None,"
      " float? eps=None) -> (Tensor, Tensor)",
      DLKIT_PURE);
  m.def(
      "dropout_add_layer_norm(Tensor input, Tensor residual, SymInt[] normalized_shape, float p, Tensor? weight=None,"
      " Tensor? bias=None, float eps=1e-05, *, Generator? generator=None, Tensor(a!)? stream=None)"
      " -> (Tensor, Tensor)",
      DLKIT_RANDOM);
  m.def(
      "dropout_add_rms_norm(Tensor input, Tensor residual, SymInt[] normalized_shape, float p, Tensor? weight=None,"
      " float? eps=None, *, Generator? generator=None, Tensor(a!)? stream=None) -> (Tensor, Tensor)",
      DLKIT_RANDOM);
  m.def(
      "dropout_layer_norm_forward(Tensor input, Tensor residual, Tensor? rng_state, float p, int normalized_ndim,"
      " Tensor? weight, Tensor? bias, float eps, bool rms, bool stats, Generator? generator=None,"
      " bool keep_bits=False) -> (Tensor y, Tensor sum, Tensor mean, Tensor rstd, Tensor rng_state)",
      DLKIT_RANDOM);
  m.def(
      "dropout_layer_norm_backward(Tensor grad_output, Tensor? grad_sum, Tensor input, Tensor? mean, Tensor rstd,"
      " Tensor? weight, Tensor? bias, Tensor rng_state, float p, int normalized_ndim, bool[4] output_mask)"
      " -> (Tensor grad_input, Tensor grad_residual, Tensor grad_weight, Tensor grad_bias)",
      DLKIT_PURE);
  m.def(
      "layer_norm_forward(Tensor input, Tensor? residual, int normalized_ndim, Tensor? weight, Tensor? bias,"
      " float eps, bool rms, bool stats) -> (Tensor y, Tensor sum, Tensor mean, Tensor rstd)",
      DLKIT_PURE);
  m.def(
      "layer_norm_backward(Tensor grad_output, Tensor? grad_sum, Tensor input, Tensor? mean, Tensor rstd,"
      " Tensor? weight, Tensor? bias, int normalized_ndim, bool[3] output_mask)"
      " -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)",
      DLKIT_PURE);
}

DLKIT_IMPLEMENT_KERNELS(dlkit::layer_norm::implement_kernels)

DLKIT_IMPLEMENT_OPS(Meta, m) { dlkit::layer_norm::implement_meta(m); }
DLKIT_IMPLEMENT_PUBLIC_OPS(dlkit::layer_norm::implement_all)
DLKIT_IMPLEMENT_OPS(FuncTorchVmapMode, m) { dlkit::layer_norm::implement_random(m); }
DLKIT_IMPLEMENT_OPS(AutocastCUDA, m) { dlkit::layer_norm::implement_autocast(m); }
