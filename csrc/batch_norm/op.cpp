// batch_norm and group_norm, with a residual add and an activation after them, and instance_norm as torch ops. The
// public three check their arguments, then call batch_norm_forward, through an autograd node where a gradient is asked
// for; the other internal ops are its backward and the halves of both, for statistics that several processes share.
// Forward-mode derivatives, torch.func transforms and double backward go through differentiable torch formulas.
#include "../glue/op.h"

#include <ATen/autocast_mode.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/batch_norm.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/group_norm.h>
#include <ATen/ops/instance_norm.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include "../glue/activation.h"
#include "../glue/autograd.h"
#include "../glue/checked.h"
#include "kernel.h"

namespace dlkit::batch_norm {
namespace {

using at::Tensor;
using torch::autograd::variable_list;
using ForwardOutputs = std::tuple<Tensor, Tensor, Tensor>;  // y, mean, rstd
using BackwardOutputs =
    std::tuple<Tensor, Tensor, Tensor, Tensor>;  // grad_input, grad_residual, grad_weight, grad_bias

// The type of the parameters, and both in it and without gaps.
struct Parameters {
  at::ScalarType type;
  Tensor weight, bias;
  Parameters(const Tensor& input, const OptionalTensor& w, const OptionalTensor& b)
      : type(parameter_type(input, w, b)), weight(ready(w)), bias(ready(b)) {}
  Tensor ready(const OptionalTensor& p) const { return has(p) ? p->to(type).contiguous() : Tensor(); }
};

// x in one of the two layouts that the kernels know, and what they call its sizes.
struct Layout {
  at::MemoryFormat format;
  Tensor x;
  Shape shape;
  Layout(const Tensor& input, int64_t groups) : format(input.suggest_memory_format()), x(like(input)) {
    const int64_t batch = input.size(0), channels = input.size(1);
    const int64_t space = channels > 0 && batch > 0 ? input.numel() / (batch * channels) : 0;
    // Where both layouts are the same memory, the one whose inner loops are long.
    const bool last = space == 1 || (format != at::MemoryFormat::Contiguous && channels > 1);
    shape = {batch, channels, space, groups, last};
  }
  Tensor like(const Tensor& tensor) const { return tensor.defined() ? tensor.contiguous(format) : tensor; }
  Tensor like(const OptionalTensor& tensor) const { return like(or_undefined(tensor)); }
  Tensor empty() const { return at::empty(x.sizes(), x.options(), format); }
};

DLKIT_RUN(Forward, forward)
DLKIT_RUN(Backward, backward)
DLKIT_ASK(workspace_bytes, Forward, forward_workspace)
DLKIT_ASK(workspace_bytes, Backward, backward_workspace)

// For what is found over the elements of a channel or a group: zeros where there are none.
Tensor empty_for(const Tensor& input, at::IntArrayRef sizes, const at::TensorOptions& options) {
  return input.numel() > 0 ? at::empty(sizes, options) : at::zeros(sizes, options);
}

// An empty input gets here where a compiler could not know its size.
template <class Device, class Op>
void run_with_workspace(const Tensor& input, Op& op) {
  if (input.numel() == 0) return;
  const Device device(input);
  const int64_t bytes = workspace_bytes(device, op);
  Tensor workspace;
  if (bytes > 0)
    workspace = at::empty({bytes}, input.options().dtype(at::kByte).memory_format(at::MemoryFormat::Contiguous));
  op.workspace = mutable_data_or_null(workspace);
  run(device, op);
}

at::TensorOptions accumulate_options(const Tensor& input) {
  return input.options().dtype(accumulate_type(input.scalar_type()));
}

template <class Int>
auto statistics_sizes(c10::ArrayRef<Int> sizes, Int groups) {
  const bool grouped = groups != 0;
  auto result = sizes.slice(0, grouped ? 2 : 1).vec();
  if (grouped) {
    result[1] = groups;
  } else {
    result[0] = sizes[1];
  }
  return result;
}

Activation to_activation(int64_t number) {
  TORCH_CHECK_VALUE(number >= 0 && number < kActivations, "batch_norm: expected activation from 0 to ",
                    kActivations - 1, ", got ", number);
  return static_cast<Activation>(number);
}

template <class Device>
ForwardOutputs forward(const Tensor& input, const OptionalTensor& residual, const OptionalTensor& weight,
                       const OptionalTensor& bias, const OptionalTensor& running_mean,
                       const OptionalTensor& running_var, const OptionalTensor& num_batches_tracked, int64_t groups,
                       bool training, double momentum, double eps, int64_t activation, double negative_slope) {
  const Layout layout(input, groups);
  const Parameters parameters(input, weight, bias);
  const Tensor added = layout.like(residual);
  const Tensor old_mean = has(running_mean) ? running_mean->contiguous() : Tensor();
  const Tensor old_var = has(running_var) ? running_var->contiguous() : Tensor();
  Tensor y = layout.empty();
  Tensor mean = empty_for(input, statistics_sizes(input.sizes(), groups), accumulate_options(input));
  Tensor rstd = empty_for(input, mean.sizes(), mean.options());
  if (input.numel() == 0) {  // a process's part of a larger tensor, or a size that a compiler did not know
    if (training && has(num_batches_tracked)) num_batches_tracked->add_(1);
    return {std::move(y), mean.zero_(), rstd.zero_()};
  }
  const DType type = dtype_of(input.scalar_type());
  Forward op{
      .x = layout.x.const_data_ptr(),
      .residual = data_or_null(added),
      .weight = data_or_null(parameters.weight),
      .bias = data_or_null(parameters.bias),
      .y = y.mutable_data_ptr(),
      .mean = mean.mutable_data_ptr(),
      .rstd = rstd.mutable_data_ptr(),
      .var = nullptr,
      .running_mean = mutable_data_or_null(old_mean),
      .running_var = mutable_data_or_null(old_var),
      .num_batches_tracked = has(num_batches_tracked) ? num_batches_tracked->mutable_data_ptr<int64_t>() : nullptr,
      .workspace = nullptr,
      .shape = layout.shape,
      .momentum = momentum,
      .eps = eps,
      .statistics = training ? Statistics::Compute : Statistics::Running,
      .dtype = type,
      .parameter_dtype = dtype_of(parameters.type),
      .running_dtype = old_mean.defined() ? dtype_of(old_mean.scalar_type()) : type,
      .activation = to_activation(activation),
      .negative_slope = negative_slope};
  run_with_workspace<Device>(input, op);
  if (training && has(running_mean) && !running_mean->is_contiguous()) running_mean->copy_(old_mean);
  if (training && has(running_var) && !running_var->is_contiguous()) running_var->copy_(old_var);
  return {std::move(y), std::move(mean), std::move(rstd)};
}

// Whether backward works z out again, of which the bias is a part. A ReLU's mask follows from y, where there is one.
bool finds_z(Activation activation, bool has_y_or_residual) {
  return activation != Activation::None && !(activation == Activation::Relu && has_y_or_residual);
}

Backward backward_arguments(const Layout& layout, const Tensor& grad_output, const Tensor& y_or_residual,
                            const Parameters& parameters, const Tensor& mean, const Tensor& rstd, int64_t activation,
                            double negative_slope) {
  Backward op{};
  op.grad_output = grad_output.const_data_ptr();
  op.x = layout.x.const_data_ptr();
  op.activation = to_activation(activation);
  op.negative_slope = negative_slope;
  op.y_or_residual = data_or_null(y_or_residual);
  op.weight = data_or_null(parameters.weight);
  if (finds_z(op.activation, y_or_residual.defined())) op.bias = data_or_null(parameters.bias);
  op.mean = mean.const_data_ptr();
  op.rstd = rstd.const_data_ptr();
  op.shape = layout.shape;
  const auto& shape = layout.shape;
  op.count =
      double(shape.space) * (shape.groups == 0 ? double(shape.batch) : double(shape.channels) / double(shape.groups));
  op.dtype = dtype_of(layout.x.scalar_type());
  op.parameter_dtype = dtype_of(parameters.type);
  return op;
}

template <class Device>
BackwardOutputs backward(const Tensor& grad_output, const Tensor& input, const OptionalTensor& y_or_residual,
                         const OptionalTensor& weight, const OptionalTensor& bias, const Tensor& mean,
                         const Tensor& rstd, int64_t groups, bool training, int64_t activation,
                         std::array<bool, 4> output_mask, double negative_slope) {
  const Layout layout(input, groups);
  const Parameters parameters(input, weight, bias);
  const Tensor dy = layout.like(grad_output), known = layout.like(y_or_residual);
  const auto parameter_options = accumulate_options(input).dtype(parameters.type);
  Tensor grad_input, grad_residual, grad_weight, grad_bias;
  if (output_mask[0]) grad_input = layout.empty();
  if (output_mask[1]) grad_residual = layout.empty();
  if (output_mask[2]) grad_weight = empty_for(input, {input.size(1)}, parameter_options);
  if (output_mask[3]) grad_bias = empty_for(input, {input.size(1)}, parameter_options);
  if (input.numel() == 0) {
    if (grad_weight.defined()) grad_weight.zero_();
    if (grad_bias.defined()) grad_bias.zero_();
    return {std::move(grad_input), std::move(grad_residual), std::move(grad_weight), std::move(grad_bias)};
  }
  Backward op = backward_arguments(layout, dy, known, parameters, mean, rstd, activation, negative_slope);
  op.grad_input = mutable_data_or_null(grad_input);
  op.grad_residual = mutable_data_or_null(grad_residual);
  op.grad_weight = mutable_data_or_null(grad_weight);
  op.grad_bias = mutable_data_or_null(grad_bias);
  op.statistics_given = !training;
  bool out_of_range = false;
  if (op.dtype != DType::F64) op.out_of_range = &out_of_range;
  run_with_workspace<Device>(input, op);
  if (out_of_range) {  // rare: gradients or deviations of about 1e19 and more, or of which little is left
    const auto wide = [](const OptionalTensor& t) { return has(t) ? OptionalTensor(t->to(at::kDouble)) : t; };
    const auto found = backward<Device>(dy.to(at::kDouble), layout.x.to(at::kDouble), wide(y_or_residual), wide(weight),
                                        wide(bias), mean.to(at::kDouble), rstd.to(at::kDouble), groups, training,
                                        activation, output_mask, negative_slope);
    const auto as = [](const Tensor& t, const Tensor& like) {
      return like.defined() ? t.to(like.scalar_type()) : like;
    };
    return {as(std::get<0>(found), grad_input), as(std::get<1>(found), grad_residual),
            as(std::get<2>(found), grad_weight), as(std::get<3>(found), grad_bias)};
  }
  return {std::move(grad_input), std::move(grad_residual), std::move(grad_weight), std::move(grad_bias)};
}

template <class Device>
std::tuple<Tensor, Tensor> statistics(const Tensor& input, int64_t groups) {
  const Layout layout(input, groups);
  Tensor mean = empty_for(input, statistics_sizes(input.sizes(), groups), accumulate_options(input));
  Tensor rstd = at::empty_like(mean), var = empty_for(input, mean.sizes(), mean.options());
  Forward op{};
  op.x = layout.x.const_data_ptr();
  op.mean = mean.mutable_data_ptr();
  op.rstd = rstd.mutable_data_ptr();
  op.var = var.mutable_data_ptr();
  op.shape = layout.shape;
  op.dtype = op.parameter_dtype = op.running_dtype = dtype_of(input.scalar_type());
  run_with_workspace<Device>(input, op);
  return {std::move(mean), std::move(var)};
}

template <class Device>
Tensor apply(const Tensor& input, const OptionalTensor& residual, const OptionalTensor& weight,
             const OptionalTensor& bias, const Tensor& mean, const Tensor& rstd, int64_t activation,
             double negative_slope) {
  const Layout layout(input, 0);
  const Parameters parameters(input, weight, bias);
  const Tensor added = layout.like(residual), m = mean.contiguous(), r = rstd.contiguous();
  Tensor y = layout.empty();
  Forward op{};
  op.x = layout.x.const_data_ptr();
  op.residual = data_or_null(added);
  op.weight = data_or_null(parameters.weight);
  op.bias = data_or_null(parameters.bias);
  op.y = y.mutable_data_ptr();
  op.mean = m.mutable_data_ptr();
  op.rstd = r.mutable_data_ptr();
  op.shape = layout.shape;
  op.statistics = Statistics::Given;
  op.dtype = op.running_dtype = dtype_of(input.scalar_type());
  op.parameter_dtype = dtype_of(parameters.type);
  op.activation = to_activation(activation);
  op.negative_slope = negative_slope;
  run_with_workspace<Device>(input, op);
  return y;
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor> backward_sums(const Tensor& grad_output, const Tensor& input,
                                                 const OptionalTensor& y_or_residual, const OptionalTensor& weight,
                                                 const OptionalTensor& bias, const Tensor& mean, const Tensor& rstd,
                                                 int64_t activation, std::array<bool, 2> output_mask,
                                                 double negative_slope) {
  const Layout layout(input, 0);
  const Parameters parameters(input, weight, bias);
  const Tensor dy = layout.like(grad_output), known = layout.like(y_or_residual), m = mean.contiguous(),
               r = rstd.contiguous();
  Tensor sums = empty_for(input, {2, input.size(1)}, accumulate_options(input)), grad_weight, grad_bias;
  if (output_mask[0]) grad_weight = empty_for(input, {input.size(1)}, accumulate_options(input).dtype(parameters.type));
  if (output_mask[1]) grad_bias = empty_for(input, {input.size(1)}, accumulate_options(input).dtype(parameters.type));
  Backward op = backward_arguments(layout, dy, known, parameters, m, r, activation, negative_slope);
  op.grad_weight = mutable_data_or_null(grad_weight);
  op.grad_bias = mutable_data_or_null(grad_bias);
  op.sums = sums.mutable_data_ptr();
  run_with_workspace<Device>(input, op);
  return {std::move(sums), std::move(grad_weight), std::move(grad_bias)};
}

template <class Device>
std::tuple<Tensor, Tensor> backward_apply(const Tensor& grad_output, const Tensor& input,
                                          const OptionalTensor& y_or_residual, const OptionalTensor& weight,
                                          const OptionalTensor& bias, const Tensor& mean, const Tensor& rstd,
                                          const Tensor& sums, int64_t activation, std::array<bool, 2> output_mask,
                                          double negative_slope) {
  const Layout layout(input, 0);
  const Parameters parameters(input, weight, bias);
  const Tensor dy = layout.like(grad_output), known = layout.like(y_or_residual), m = mean.contiguous(),
               r = rstd.contiguous();
  const Tensor given = sums.contiguous();
  Tensor grad_input, grad_residual;
  if (output_mask[0]) grad_input = layout.empty();
  if (output_mask[1]) grad_residual = layout.empty();
  Backward op = backward_arguments(layout, dy, known, parameters, m, r, activation, negative_slope);
  op.grad_input = mutable_data_or_null(grad_input);
  op.grad_residual = mutable_data_or_null(grad_residual);
  op.sums = given.mutable_data_ptr();
  op.sums_given = true;
  op.count = 1;  // the sums are means already
  run_with_workspace<Device>(input, op);
  return {std::move(grad_input), std::move(grad_residual)};
}

// Shapes, layouts and dtypes of the above, for tracing.
Tensor like_input_meta(const Tensor& input) {
  return at::empty_symint(input.sym_sizes(), input.options(), input.suggest_memory_format());
}

Tensor channels_meta(const Tensor& input, at::ScalarType type) {
  return at::empty_symint({input.sym_size(1)}, input.options().dtype(type));
}

ForwardOutputs forward_meta(const Tensor& input, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                            const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, c10::SymInt groups,
                            bool, double, double, int64_t, double) {
  const auto like = [&] {
    return at::empty_symint(statistics_sizes(input.sym_sizes(), groups), accumulate_options(input));
  };
  return {like_input_meta(input), like(), like()};
}

BackwardOutputs backward_meta(const Tensor&, const Tensor& input, const OptionalTensor&, const OptionalTensor& weight,
                              const OptionalTensor& bias, const Tensor&, const Tensor&, c10::SymInt, bool, int64_t,
                              std::array<bool, 4> output_mask, double) {
  const at::ScalarType type = parameter_type(input, weight, bias);
  return {output_mask[0] ? like_input_meta(input) : Tensor(), output_mask[1] ? like_input_meta(input) : Tensor(),
          output_mask[2] ? channels_meta(input, type) : Tensor(),
          output_mask[3] ? channels_meta(input, type) : Tensor()};
}

std::tuple<Tensor, Tensor> statistics_meta(const Tensor& input, c10::SymInt groups) {
  const auto like = [&] {
    return at::empty_symint(statistics_sizes(input.sym_sizes(), groups), accumulate_options(input));
  };
  return {like(), like()};
}

Tensor apply_meta(const Tensor& input, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                  const Tensor&, const Tensor&, int64_t, double) {
  return like_input_meta(input);
}

std::tuple<Tensor, Tensor, Tensor> backward_sums_meta(const Tensor&, const Tensor& input, const OptionalTensor&,
                                                      const OptionalTensor& weight, const OptionalTensor& bias,
                                                      const Tensor&, const Tensor&, int64_t,
                                                      std::array<bool, 2> output_mask, double) {
  const at::ScalarType type = parameter_type(input, weight, bias);
  return {at::empty_symint({2, input.sym_size(1)}, accumulate_options(input)),
          output_mask[0] ? channels_meta(input, type) : Tensor(),
          output_mask[1] ? channels_meta(input, type) : Tensor()};
}

std::tuple<Tensor, Tensor> backward_apply_meta(const Tensor&, const Tensor& input, const OptionalTensor&,
                                               const OptionalTensor&, const OptionalTensor&, const Tensor&,
                                               const Tensor&, const Tensor&, int64_t, std::array<bool, 2> output_mask,
                                               double) {
  return {output_mask[0] ? like_input_meta(input) : Tensor(), output_mask[1] ? like_input_meta(input) : Tensor()};
}

// What one call computes, beside its tensors.
struct Options {
  c10::SymInt groups = 0;  // 0: batch_norm
  bool training = true;
  double eps = 1e-5;
  int64_t activation = 0;     // a number, which a compiler keeps
  double negative_slope = 0;  // of LeakyRelu
  Activation kind() const { return static_cast<Activation>(activation); }
};

// x normalized by torch's own differentiable ops, where the statistics are x's own.
Tensor native_norm(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                   const Options& options) {
  if (has(bias) && !has(weight)) {  // torch's backwards fail so
    std::vector<int64_t> along(input.dim(), 1);
    along[1] = -1;
    return native_norm(input, {}, {}, options) + bias->view(along);
  }
  if (options.groups == 0) return at::batch_norm(input, weight, bias, {}, {}, true, 0, options.eps, true);
  return at::group_norm(input, options.groups.guard_int(__FILE__, __LINE__), weight, bias, options.eps, true);
}

const auto& forward_op() {
  static const auto op = find_op<decltype(forward_meta)>("batch_norm_forward");
  return op;
}

// No kernel for it, or nothing to normalize.
template <class... Optionals>
bool is_for_torch(const Tensor& input, const Optionals&... others) {
  return needs_native(forward_op(), input, others...) || TORCH_GUARD_SIZE_OBLIVIOUS(input.sym_numel().sym_eq(0));
}

ForwardOutputs call_forward(const Tensor& input, const OptionalTensor& residual, const OptionalTensor& weight,
                            const OptionalTensor& bias, const OptionalTensor& running_mean,
                            const OptionalTensor& running_var, const OptionalTensor& num_batches_tracked,
                            double momentum, const Options& options) {
  return forward_op().call(input, residual, weight, bias, running_mean, running_var, num_batches_tracked,
                           options.groups, options.training, momentum, options.eps, options.activation,
                           options.negative_slope);
}

BackwardOutputs call_backward(const Tensor& grad_output, const Tensor& input, const OptionalTensor& y_or_residual,
                              const OptionalTensor& weight, const OptionalTensor& bias, const Tensor& mean,
                              const Tensor& rstd, const Options& options, std::array<bool, 4> output_mask) {
  static const auto op = find_op<decltype(backward_meta)>("batch_norm_backward");
  return op.call(grad_output, input, y_or_residual, weight, bias, mean, rstd, options.groups, options.training,
                 options.activation, output_mask, options.negative_slope);
}

struct BatchNormBackward : SavingNode<BatchNormBackward, 6> {
  // YOrResidual and MaskBias only where what passes the activation is found from them.
  enum { Input, YOrResidual, Weight, MaskBias, Mean, Rstd };
  Options options;
  Bias bias;
  bool residual = false;

  std::string name() const override { return "DlkitBatchNormBackward"; }
  auto fields() const {
    return std::tie(options.groups, options.training, options.eps, options.activation, options.negative_slope,
                    bias.type, residual);
  }

  variable_list backward(const variable_list& grads, const Saved& saved) override {
    // A weight tells the parameters' type as well.
    const Tensor b = saved[Weight].defined() ? saved[MaskBias] : bias_of(saved);
    return gradients(grads[0], call_backward(grads[0], saved[Input], saved[YOrResidual], saved[Weight], b, saved[Mean],
                                             saved[Rstd], options, mask()));
  }

  // torch's own backward of the same function.
  variable_list differentiable_backward(const variable_list& grads, const Saved& saved) override {
    const auto alias = [](const Tensor& t) { return t.defined() ? t.view_as(t) : t; };
    const Tensor& known = saved[YOrResidual];
    const std::array<Tensor, 3> sources{alias(saved[Input]), alias(saved[Weight]), alias(bias_of(saved))};
    const Tensor z =
        in_accumulate_type(sources[0], sources[1], sources[2], [&](const Tensor& t, const auto& p, const auto& q) {
          // torch's backwards read a weight with gaps beyond it, and crash where channels_last input needs no gradient.
          const auto dense = [](const auto& v) { return has(v) ? OptionalTensor(v->contiguous()) : std::nullopt; };
          if (options.training) return native_norm(t.contiguous(), dense(p), dense(q), options);
          std::vector<int64_t> along(t.dim(), 1);
          along[1] = -1;
          Tensor scaled = (t - saved[Mean].view(along)) * saved[Rstd].view(along);
          if (has(p)) scaled = scaled * p->view(along);
          return has(q) ? scaled + q->view(along) : scaled;
        });
    Tensor g = grads[0];
    if (options.kind() == Activation::Relu) {
      // Where the result is NaN the gradient passes, as through torch's ReLU.
      g = g.masked_fill((known.defined() ? known : z.detach()) <= 0, 0);
    } else if (options.kind() != Activation::None) {
      const Tensor sum = known.defined() ? z + known : z.view_as(z);
      const Tensor y = activated(sum, options.kind(), options.negative_slope);
      g = differentiable_gradients(y, g, {sum, Tensor(), Tensor()}, {true, false, false})[0];
    }
    const auto wanted = mask();
    // torch's batch_norm exchanges elements of a gradient that lies in another order than its input.
    const std::array<Tensor, 3> found =
        differentiable_gradients(z, g.contiguous(), sources, {wanted[0], wanted[2], wanted[3]});
    return gradients(grads[0], {found[0], wanted[1] ? g : Tensor(), found[1], found[2]});
  }

 private:
  Tensor bias_of(const Saved& saved) const {
    if (saved[MaskBias].defined()) return saved[MaskBias];
    return bias.stand_in({saved[Input].sym_size(1)}, saved[Input]);
  }

  std::array<bool, 4> mask() const {
    const bool activates = options.kind() != Activation::None;
    return {task_should_compute_output(0), task_should_compute_output(1) && activates, task_should_compute_output(2),
            task_should_compute_output(3)};
  }

  variable_list gradients(const Tensor& grad_output, const BackwardOutputs& found) const {
    const auto& [grad_input, grad_residual, grad_weight, grad_bias] = found;
    // Without an activation the residual's gradient is what came.
    const bool as_it_came = task_should_compute_output(1) && options.kind() == Activation::None;
    return {grad_input, as_it_came ? grad_output : grad_residual, grad_weight, grad_bias};
  }
};

// The kernel, through an autograd node where a gradient is asked for. Also gives the statistics. As with torch's op,
// the update of running statistics leaves their version as it is.
ForwardOutputs normalize(const Tensor& input, const OptionalTensor& residual, const OptionalTensor& weight,
                         const OptionalTensor& bias, const OptionalTensor& running_mean,
                         const OptionalTensor& running_var, const OptionalTensor& num_batches_tracked, double momentum,
                         const Options& options) {
  using Node = BatchNormBackward;
  const auto node = node_for<Node>(input, residual, weight, bias);
  ForwardOutputs outputs = below_autograd([&] {
    return call_forward(input, residual, weight, bias, running_mean, running_var, num_batches_tracked, momentum,
                        options);
  });
  if (node) {
    const auto& [y, mean, rstd] = outputs;
    torch::autograd::set_history(y, node);
    node->save(Node::Input, input);
    if (has(residual) && options.kind() == Activation::Relu) {
      node->save(Node::YOrResidual, y, true);
    } else if (has(residual) && options.kind() != Activation::None) {
      node->save(Node::YOrResidual, *residual);
    }
    node->save(Node::Weight, or_undefined(weight));
    if (finds_z(options.kind(), has(residual))) node->save(Node::MaskBias, or_undefined(bias));
    node->bias = Bias(bias);
    node->save(Node::Mean, mean);
    node->save(Node::Rstd, rstd);
    node->options = options;
    node->residual = has(residual);
  }
  return outputs;
}

// How many values share a mean, but for the batch where `first` is 2.
c10::SymInt values_of(const Tensor& input, int64_t first) {
  c10::SymInt count = first == 0 && input.dim() > 0 ? input.sym_size(0) : 1;
  for (int64_t i = 2; i < input.dim(); ++i) count = count * input.sym_size(i);
  return count;
}

// The checks that torch's ops make, in torch's exception types, before anything is written.
void check_vector(const char* name, const char* argument, const Tensor& input, const OptionalTensor& p) {
  if (!has(p)) return;
  TORCH_CHECK(p->dim() == 1 && p->sym_size(0) == input.sym_size(1), name, "(): expected ", argument, " of shape [",
              input.sym_size(1), "] (the channels of input ", input.sym_sizes(), "), got ", p->sym_sizes());
  TORCH_CHECK(p->device() == input.device(), name, "(): expected ", argument, " on ", input.device(),
              " (the device of input), got ", p->device());
}

void check_running(const char* name, const Tensor& input, const OptionalTensor& running_mean,
                   const OptionalTensor& running_var, bool needed) {
  const char* const got = has(running_mean) ? "only running_mean" : has(running_var) ? "only running_var" : "None";
  TORCH_CHECK(!needed || (has(running_mean) && has(running_var)), name,
              "(): expected running_mean and running_var in evaluation, got ", got);
  TORCH_CHECK_VALUE(has(running_mean) == has(running_var), name,
                    "(): expected running_mean and running_var to be both given or both None, got ", got);
  check_vector(name, "running_mean", input, running_mean);
  check_vector(name, "running_var", input, running_var);
  if (!has(running_mean)) return;
  const at::ScalarType type = running_mean->scalar_type();
  TORCH_CHECK(!is_supported(input.scalar_type()) || (is_supported(type) && running_var->scalar_type() == type), name,
              "(): expected running_mean and running_var of one floating type, got ", type, " and ",
              running_var->scalar_type());
}

// Whether the kernel can count: it takes one Long on the input's device, and torch's layer anything that can be added
// to (a checkpoint that was averaged has floats, a model whose buffers stayed elsewhere a counter on the CPU).
bool is_plain_counter(const Tensor& input, const Tensor& counter) {
  return counter.scalar_type() == at::kLong && counter.device() == input.device() && counter.dim() == 0;
}

// x + residual broadcasts and promotes as torch's addition does; the kernel wants one shape and one type.
bool is_apart(const Tensor& input, const OptionalTensor& residual) {
  return has(residual) &&
         (residual->scalar_type() != input.scalar_type() || !residual->sym_sizes().equals(input.sym_sizes()));
}

// The residual add and the activation after a norm, by torch's own ops.
Tensor added_and_activated(const Tensor& y, const OptionalTensor& residual, int64_t activation, double negative_slope) {
  return activated(has(residual) ? y + *residual : y, to_activation(activation), negative_slope);
}

Tensor normalize_batch(const char* name, const Tensor& input, const OptionalTensor& running_mean,
                       const OptionalTensor& running_var, const OptionalTensor& weight, const OptionalTensor& bias,
                       const OptionalTensor& residual, const OptionalTensor& num_batches_tracked, bool training,
                       std::optional<double> momentum, double eps, int64_t activation, double negative_slope) {
  TORCH_CHECK(input.dim() >= 2, name, "(): expected input of at least 2 dimensions [N, C, ...], got shape ",
              input.sym_sizes());
  if (training) {
    TORCH_CHECK_VALUE(TORCH_GUARD_SIZE_OBLIVIOUS(values_of(input, 0).sym_ne(1)), name,
                      "(): expected more than 1 value per channel when training, got input of shape ",
                      input.sym_sizes());
  }
  to_activation(activation);  // before anything is written
  check_running(name, input, running_mean, running_var, !training);
  check_vector(name, "weight", input, weight);
  check_vector(name, "bias", input, bias);
  if (training) {
    TORCH_CHECK_VALUE(momentum.has_value() || has(num_batches_tracked) || !has(running_mean), name,
                      "(): expected momentum to be a float where there is no num_batches_tracked, got None");
  }
  // The kernel takes a negative momentum for a cumulative average; torch takes it as it is.
  const bool odd_momentum = training && momentum.has_value() && !(*momentum >= 0);
  const bool fallback = is_for_torch(input, residual, weight, bias) || odd_momentum;
  if (!fallback) check_parameter_types(name, input, weight, bias);
  const bool apart = is_apart(input, residual);
  const bool counted = training && has(num_batches_tracked);
  const bool counted_here = counted && (fallback || !is_plain_counter(input, *num_batches_tracked));
  if (counted_here) {
    num_batches_tracked->add_(1);
    if (!momentum.has_value()) momentum = 1 / num_batches_tracked->item<double>();
  }
  if (fallback) {
    const double factor = momentum.value_or(0);
    const Tensor y = in_accumulate_type(input, weight, bias, [&](const Tensor& t, const auto& w, const auto& b) {
      return at::batch_norm(t, w, b, running_mean, running_var, training, factor, eps, true);
    });
    return added_and_activated(y, residual, activation, negative_slope);
  }
  Options options{0, training, eps};
  if (!apart) options.activation = activation, options.negative_slope = negative_slope;
  const Tensor y = std::get<0>(normalize(input, apart ? std::nullopt : residual, weight, bias, running_mean,
                                         running_var, counted && !counted_here ? num_batches_tracked : std::nullopt,
                                         momentum.value_or(-1), options));
  return apart ? added_and_activated(y, residual, activation, negative_slope) : y;
}

Tensor batch_norm(const Tensor& input, const OptionalTensor& running_mean, const OptionalTensor& running_var,
                  const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& residual,
                  const OptionalTensor& num_batches_tracked, bool training, std::optional<double> momentum, double eps,
                  int64_t activation, double negative_slope) {
  constexpr const char* name = "batch_norm";
  // torch checks this of batch_norm alone.
  TORCH_CHECK_VALUE(!(eps < 0) && !(training && eps == 0), name, "(): expected eps ",
                    training ? "greater than 0 when training" : "of at least 0", ", got ", eps);
  return normalize_batch(name, input, running_mean, running_var, weight, bias, residual, num_batches_tracked, training,
                         momentum, eps, activation, negative_slope);
}

Tensor group_norm(const Tensor& input, c10::SymInt num_groups, const OptionalTensor& weight, const OptionalTensor& bias,
                  double eps, const OptionalTensor& residual, int64_t activation, double negative_slope) {
  constexpr const char* name = "group_norm";
  TORCH_CHECK(input.dim() >= 2, name, "(): expected input of at least 2 dimensions [N, C, ...], got shape ",
              input.sym_sizes());
  // torch divides by 0 before it looks at the sign.
  TORCH_CHECK_VALUE(num_groups != 0, name, "(): expected num_groups greater than 0, got 0");
  TORCH_CHECK(num_groups > 0, name, "(): expected num_groups greater than 0, got ", num_groups);
  // torch asks this first, of a share that it rounds down.
  c10::SymInt values = input.sym_size(0) * input.sym_size(1) / num_groups;
  for (int64_t i = 2; i < input.dim(); ++i) values = values * input.sym_size(i);
  TORCH_CHECK_VALUE(TORCH_GUARD_SIZE_OBLIVIOUS(values.sym_ne(1)), name,
                    "(): expected more than 1 value per group, got input of shape ", input.sym_sizes(),
                    " and num_groups ", num_groups);
  TORCH_CHECK(input.sym_size(1) % num_groups == 0, name,
              "(): expected channels divisible by num_groups, got input of shape ", input.sym_sizes(),
              " and num_groups ", num_groups);
  check_vector(name, "weight", input, weight);
  check_vector(name, "bias", input, bias);
  to_activation(activation);  // before anything is written
  Options options{num_groups, true, eps};
  if (is_for_torch(input, residual, weight, bias)) {
    const Tensor y = in_accumulate_type(input, weight, bias, [&](const Tensor& t, const auto& w, const auto& b) {
      return native_norm(t, w, b, options);
    });
    return added_and_activated(y, residual, activation, negative_slope);
  }
  check_parameter_types(name, input, weight, bias);
  const bool apart = is_apart(input, residual);
  if (!apart) options.activation = activation, options.negative_slope = negative_slope;
  const Tensor y = std::get<0>(normalize(input, apart ? std::nullopt : residual, weight, bias, {}, {}, {}, 0, options));
  return apart ? added_and_activated(y, residual, activation, negative_slope) : y;
}

Tensor instance_norm(const Tensor& input, const OptionalTensor& running_mean, const OptionalTensor& running_var,
                     const OptionalTensor& weight, const OptionalTensor& bias, bool use_input_stats, double momentum,
                     double eps) {
  constexpr const char* name = "instance_norm";
  TORCH_CHECK_VALUE(!use_input_stats || TORCH_GUARD_SIZE_OBLIVIOUS(values_of(input, 2).sym_ne(1)), name,
                    "(): expected more than 1 spatial element, got input of shape ", input.sym_sizes());
  TORCH_CHECK(input.dim() >= 2, name, "(): expected input of at least 2 dimensions [N, C, ...], got shape ",
              input.sym_sizes());
  check_running(name, input, running_mean, running_var, !use_input_stats);
  if (!use_input_stats)
    return normalize_batch(name, input, running_mean, running_var, weight, bias, {}, {}, false, momentum, eps, 0, 0);
  check_vector(name, "weight", input, weight);
  check_vector(name, "bias", input, bias);
  if (is_for_torch(input, weight, bias)) {
    return in_accumulate_type(input, weight, bias, [&](const Tensor& t, const auto& w, const auto& b) {
      return at::instance_norm(t, w, b, running_mean, running_var, true, momentum, eps, true);
    });
  }
  check_parameter_types(name, input, weight, bias);
  const Options options{input.sym_size(1), true, eps};
  if (!has(running_mean)) return std::get<0>(normalize(input, {}, weight, bias, {}, {}, {}, 0, options));
  TORCH_SYM_CHECK(input.sym_numel().sym_ne(0), name, "(): expected elements to take statistics of, got none");
  // Running statistics of each sample's channels that start anew: the mean and the unbiased variance themselves.
  const Tensor means = input.new_zeros_symint({input.sym_size(0), input.sym_size(1)}, accumulate_options(input));
  const Tensor vars = at::zeros_like(means);
  const Tensor y = std::get<0>(normalize(input, {}, weight, bias, means, vars, {}, 1, options));
  // The mean over the batch of what each sample alone would leave, rounded once.
  const at::NoGradGuard no_grad;
  const auto update = [&](const Tensor& running, const Tensor& found) {
    running.copy_(running.to(at::kDouble) * (1 - momentum) + found.to(at::kDouble).mean(0) * momentum);
  };
  update(*running_mean, means);
  update(*running_var, vars);
  return y;
}

// Autocast on CUDA runs torch's group_norm in fp32; batch_norm and instance_norm keep the type that comes.
Tensor group_norm_autocast(const Tensor& input, c10::SymInt num_groups, const OptionalTensor& weight,
                           const OptionalTensor& bias, double eps, const OptionalTensor& residual, int64_t activation,
                           double negative_slope) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::DispatchKey::AutocastCUDA);
  const auto to_fp32 = [](const auto& tensor) { return at::autocast::cached_cast(at::kFloat, tensor, at::kCUDA); };
  return find_op<decltype(group_norm)>("group_norm")
      .call(to_fp32(input), num_groups, to_fp32(weight), to_fp32(bias), eps, to_fp32(residual), activation,
            negative_slope);
}

template <class Device>
void implement_kernels(torch::Library& m) {
  implement_kernel<forward<Device>>(m, "batch_norm_forward");
  implement_kernel<backward<Device>>(m, "batch_norm_backward");
  implement_kernel<statistics<Device>>(m, "batch_norm_statistics");
  implement_kernel<apply<Device>>(m, "batch_norm_apply");
  implement_kernel<backward_sums<Device>>(m, "batch_norm_backward_sums");
  implement_kernel<backward_apply<Device>>(m, "batch_norm_backward_apply");
}

void implement_all(torch::Library& m) {
  implement_public<batch_norm>(m, "batch_norm");
  implement_public<group_norm>(m, "group_norm");
  implement_public<instance_norm>(m, "instance_norm");
}

}  // namespace
}  // namespace dlkit::batch_norm

DLKIT_DEFINE_OPS(m) {
  const std::vector<at::Tag> tags{at::Tag::pt2_compliant_tag};
  m.def(
      "batch_norm(Tensor input, Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor? weight, Tensor? bias,"
      " Tensor? residual, Tensor(c!)? num_batches_tracked, bool training, float? momentum, float eps, int activation,"
      " float negative_slope=0.01)"
      " -> Tensor",
      tags);
  m.def(
      "group_norm(Tensor input, SymInt num_groups, Tensor? weight, Tensor? bias, float eps,"
      " Tensor? residual=None, int activation=0, float negative_slope=0.01) -> Tensor",
      tags);
  m.def(
      "instance_norm(Tensor input, Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor? weight, Tensor? bias,"
      " bool use_input_stats, float momentum, float eps) -> Tensor",
      tags);
  m.def(
      "batch_norm_forward(Tensor input, Tensor? residual, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean,"
      " Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, SymInt groups, bool training, float momentum, float "
      "eps,"
      " int activation, float negative_slope=0.01) -> (Tensor y, Tensor mean, Tensor rstd)",
      tags);
  m.def(
      "batch_norm_backward(Tensor grad_output, Tensor input, Tensor? y_or_residual, Tensor? weight, Tensor? bias, "
      "Tensor mean,"
      " Tensor rstd, SymInt groups, bool training, int activation, bool[4] output_mask, float negative_slope=0.01)"
      " -> (Tensor grad_input, Tensor grad_residual, Tensor grad_weight, Tensor grad_bias)",
      tags);
  m.def("batch_norm_statistics(Tensor input, SymInt groups) -> (Tensor mean, Tensor var)", tags);
  m.def(
      "batch_norm_apply(Tensor input, Tensor? residual, Tensor? weight, Tensor? bias, Tensor mean, Tensor rstd,"
      " int activation, float negative_slope=0.01) -> Tensor",
      tags);
  m.def(
      "batch_norm_backward_sums(Tensor grad_output, Tensor input, Tensor? y_or_residual, Tensor? weight, Tensor? bias, "
      "Tensor mean,"
      " Tensor rstd, int activation, bool[2] output_mask, float negative_slope=0.01) -> (Tensor sums, Tensor "
      "grad_weight, Tensor grad_bias)",
      tags);
  m.def(
      "batch_norm_backward_apply(Tensor grad_output, Tensor input, Tensor? y_or_residual, Tensor? weight, Tensor? "
      "bias, Tensor "
      "mean,"
      " Tensor rstd, Tensor sums, int activation, bool[2] output_mask, float negative_slope=0.01) -> (Tensor "
      "grad_input, Tensor grad_residual)",
      tags);
}

DLKIT_IMPLEMENT_KERNELS(dlkit::batch_norm::implement_kernels)

DLKIT_IMPLEMENT_OPS(Meta, m) {
  dlkit::implement_kernel<dlkit::batch_norm::forward_meta>(m, "batch_norm_forward");
  dlkit::implement_kernel<dlkit::batch_norm::backward_meta>(m, "batch_norm_backward");
  dlkit::implement_kernel<dlkit::batch_norm::statistics_meta>(m, "batch_norm_statistics");
  dlkit::implement_kernel<dlkit::batch_norm::apply_meta>(m, "batch_norm_apply");
  dlkit::implement_kernel<dlkit::batch_norm::backward_sums_meta>(m, "batch_norm_backward_sums");
  dlkit::implement_kernel<dlkit::batch_norm::backward_apply_meta>(m, "batch_norm_backward_apply");
}
DLKIT_IMPLEMENT_PUBLIC_OPS(dlkit::batch_norm::implement_all)
DLKIT_IMPLEMENT_OPS(AutocastCUDA, m) { m.impl("group_norm", dlkit::batch_norm::group_norm_autocast); }
