// Linear + cross entropy as one torch op, on any device that has cross entropy's kernels. Rows go in chunks: the logits
// of a chunk are written to one buffer, become their gradient in place, and give their part of each gradient before the
// next chunk takes the buffer. All logits are thus never in memory at once. With a reduction, forward computes the
// gradients too, with three matrix products in all, as many as the unfused layers take. They are sums in fp32 (fp64 for
// fp64) of terms that are O(1): a gradient already divided by the number of rows would underflow in fp16. Without a
// reduction backward runs the chunks again, with the gradient of each row. Double backward, torch.func and forward mode
// go through the unfused ops.
#include "../cross_entropy/op.h"

#include <ATen/TensorOperators.h>
#include <ATen/autocast_mode.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/full.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>

#include "../glue/autograd.h"
#include "../glue/checked.h"
#include "../glue/in_place.h"

namespace dlkit::linear_cross_entropy {
namespace {

using at::Tensor;
using cross_entropy::Options;
using torch::autograd::variable_list;

constexpr auto name = "linear_cross_entropy";
constexpr int64_t kLeastRows = 256, kElements = 1 << 25;  // of a chunk: fewer rows would make matrix products slow

struct Problem {
  Tensor input, linear_weight, target;
  OptionalTensor linear_bias, weight;
  Options options;
};

bool has_probabilities(const Tensor& target) { return target.is_floating_point(); }

// The mean's divisors of the loss and the z-loss.
std::pair<Tensor, Tensor> totals(const Problem& problem) {
  const auto options = problem.input.options().dtype(at::kDouble);
  if (has_probabilities(problem.target)) {
    const Tensor rows = at::full({}, double(problem.input.size(0)), options);
    return {rows, rows};
  }
  const Tensor kept = problem.target != problem.options.ignore_index, count = kept.sum(at::kDouble);
  if (!has(problem.weight)) return {count, count};
  const Tensor index = at::where(kept, problem.target, at::zeros_like(problem.target));
  return {(problem.weight->to(at::kDouble).index({index}) * kept).sum(), count};
}

// Targets are checked before the chunks, since a chunk's kernel would report its own row number. On a GPU the kernel
// stops at a wrong target.
void check_targets(const Problem& problem, int64_t classes) {
  const Tensor& target = problem.target;
  if (has_probabilities(target) || !target.is_cpu()) return;
  const Tensor wrong = (target < 0).logical_or(target >= classes).logical_and(target != problem.options.ignore_index);
  if (!wrong.any().item<bool>()) return;
  const int64_t row = wrong.nonzero()[0].item<int64_t>();
  TORCH_CHECK_INDEX(false, name, "(): expected targets from 0 to ", classes - 1, " (linear_weight has ", classes,
                    " rows) or ", problem.options.ignore_index, " (ignore_index), got ", target[row].item<int64_t>(),
                    " in row ", row);
}

void check(const Tensor& input, const Tensor& linear_weight, const OptionalTensor& linear_bias) {
  TORCH_CHECK(input.dim() == 2, name, "(): expected input of shape [N, in_features], got ", input.sym_sizes());
  TORCH_CHECK(linear_weight.dim() == 2 && linear_weight.sym_size(1) == input.sym_size(1), name,
              "(): expected linear_weight of shape [C, ", input.sym_size(1), "] (input is ", input.sym_sizes(),
              "), got ", linear_weight.sym_sizes());
  TORCH_CHECK(linear_weight.scalar_type() == input.scalar_type(), name, "(): expected linear_weight of ",
              input.scalar_type(), " (the type of input), got ", linear_weight.scalar_type());
  if (!has(linear_bias)) return;
  TORCH_CHECK(linear_bias->dim() == 1 && linear_bias->sym_size(0) == linear_weight.sym_size(0), name,
              "(): expected linear_bias of shape [", linear_weight.sym_size(0), "], got ", linear_bias->sym_sizes());
  TORCH_CHECK(linear_bias->scalar_type() == input.scalar_type(), name, "(): expected linear_bias of ",
              input.scalar_type(), " (the type of input), got ", linear_bias->scalar_type());
}

struct Gradients {
  Tensor input, weight, bias;  // of the accumulation type, undefined where not needed
};

using ForwardOutputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;  // loss, z_loss, gradients

// Calls f(first row, rows) for each chunk.
template <class F>
void for_chunks(const Problem& problem, const F& f) {
  const int64_t rows = problem.input.size(0), classes = problem.linear_weight.size(0);
  const int64_t step = std::max(kLeastRows, std::max(kElements, problem.input.numel()) / classes);
  for (int64_t first = 0; first < rows; first += step) f(first, std::min(step, rows - first));
}

// The losses of all rows, and the gradients that the mask selects: for grad_loss, one value a row, or for the sum of
// losses. With `total`, that sum has the losses divided by its first value and the z-losses by its second.
std::pair<Tensor, Tensor> run_chunks(const Problem& problem, const OptionalTensor& grad_loss,
                                     const OptionalTensor& total, std::array<bool, 3> mask, Gradients& gradients) {
  static const auto forward = find_op<cross_entropy::ForwardOp>("cross_entropy_forward");
  static const auto backward = find_op<cross_entropy::BackwardInPlaceOp>("cross_entropy_backward_");
  check(problem.input, problem.linear_weight, problem.linear_bias);
  const Options& o = problem.options;
  const Tensor x = problem.input.contiguous(), transposed = problem.linear_weight.t();
  const int64_t rows = x.size(0), classes = problem.linear_weight.size(0);
  const auto wide = x.options().dtype(accumulate_type(x.scalar_type()));
  const bool direct = wide.dtype() == x.dtype();
  if (mask[0]) gradients.input = at::empty(x.sizes(), wide);
  if (mask[1]) gradients.weight = at::zeros(problem.linear_weight.sizes(), wide);
  if (mask[2]) gradients.bias = at::zeros({classes}, wide);
  const bool differentiates = mask[0] || mask[1] || mask[2];
  const Tensor losses = at::empty({rows}, wide), squares = o.z_scale == 0 ? Tensor() : at::empty({rows}, wide);
  const Tensor one = at::ones({}, wide);
  const int64_t backward_reduction = has(grad_loss) ? 0 : has(total) ? 1 : 2;
  Tensor buffer;
  for_chunks(problem, [&](int64_t first, int64_t count) {
    if (!buffer.defined()) buffer = at::empty({count, classes}, x.options());
    Tensor logits = buffer.narrow(0, 0, count);
    const Tensor part = x.narrow(0, first, count), target = problem.target.narrow(0, first, count);
    if (has(problem.linear_bias)) {
      at::addmm_out(logits, *problem.linear_bias, part, transposed);
    } else {
      at::mm_out(logits, part, transposed);
    }
    const auto [loss, square, stats, unused] =
        forward.call(logits, target, problem.weight, 0, o.ignore_index, o.label_smoothing, o.z_scale, o.softcap, true);
    losses.narrow(0, first, count).copy_(loss);
    if (squares.defined()) squares.narrow(0, first, count).copy_(square);
    if (!differentiates) return;
    backward.call(has(grad_loss) ? grad_loss->narrow(0, first, count) : one, logits, target, problem.weight, stats,
                  total, backward_reduction, o.ignore_index, o.label_smoothing, o.z_scale, o.softcap);
    if (mask[0]) {
      Tensor into = gradients.input.narrow(0, first, count);
      direct ? void(at::mm_out(into, logits, problem.linear_weight))
             : void(into.copy_(at::mm(logits, problem.linear_weight)));
    }
    if (mask[1]) {
      direct ? gradients.weight.addmm_(logits.t(), part) : gradients.weight.add_(at::mm(logits.t(), part));
    }
    if (mask[2]) gradients.bias.add_(logits.sum({0}, false, wide.dtype().toScalarType()));
  });
  return {losses, squares};
}

ForwardOutputs forward(const Tensor& input, const Tensor& linear_weight, const Tensor& target,
                       const OptionalTensor& linear_bias, const OptionalTensor& weight, int64_t reduction,
                       int64_t ignore_index, double label_smoothing, double z_scale, double softcap, bool wide,
                       std::array<bool, 3> output_mask) {
  const Problem problem{input,       linear_weight, target,
                        linear_bias, weight,        {reduction, ignore_index, label_smoothing, z_scale, softcap}};
  check_targets(problem, linear_weight.size(0));
  Gradients gradients;
  const at::ScalarType type = wide ? accumulate_type(input.scalar_type()) : input.scalar_type();
  const auto narrow = [&](const Tensor& t) { return t.defined() ? t.to(type) : t; };
  if (reduction == 0) {
    const auto [losses, squares] = run_chunks(problem, std::nullopt, std::nullopt, {false, false, false}, gradients);
    return {narrow(losses), narrow(squares), Tensor(), Tensor(), Tensor()};
  }
  Tensor weights, count;
  OptionalTensor total;
  if (reduction == 1) {
    std::tie(weights, count) = totals(problem);
    total = at::stack({at::ones_like(count), count / weights}).to(accumulate_type(input.scalar_type()));
  }
  const auto [losses, squares] = run_chunks(problem, std::nullopt, total, output_mask, gradients);
  Tensor loss = losses.sum(at::kDouble), z_loss = squares.defined() ? squares.sum(at::kDouble) : Tensor();
  if (reduction == 1) {
    loss = z_loss.defined() ? (loss - z_loss) / weights + z_loss / count : loss / weights;
    if (z_loss.defined()) z_loss = z_loss / count;
    // All rows ignored: gradients are 0, the loss is NaN.
    const Tensor factor = at::where(weights == 0, weights, 1 / weights);
    for (const Tensor& gradient : {gradients.input, gradients.weight, gradients.bias}) {
      if (gradient.defined()) gradient.mul_(factor);
    }
  }
  return {narrow(loss), narrow(z_loss), gradients.input, gradients.weight, gradients.bias};
}

using BackwardOutputs = std::tuple<Tensor, Tensor, Tensor>;

BackwardOutputs backward(const Tensor& grad_loss, const Tensor& input, const Tensor& linear_weight,
                         const Tensor& target, const OptionalTensor& linear_bias, const OptionalTensor& weight,
                         int64_t ignore_index, double label_smoothing, double z_scale, double softcap,
                         std::array<bool, 3> output_mask) {
  const Problem problem{input,       linear_weight, target,
                        linear_bias, weight,        {0, ignore_index, label_smoothing, z_scale, softcap}};
  const at::ScalarType accumulate = accumulate_type(input.scalar_type());
  TORCH_CHECK(grad_loss.scalar_type() == accumulate || grad_loss.scalar_type() == input.scalar_type(), name,
              "(): expected grad_loss of ", accumulate, ", got ", grad_loss.scalar_type());
  Gradients gradients;
  run_chunks(problem, grad_loss.to(accumulate), std::nullopt, output_mask, gradients);
  return {gradients.input, gradients.weight, gradients.bias};
}

// Shapes and dtypes of the above, for tracing.
BackwardOutputs empty_gradients(const Tensor& input, const Tensor& linear_weight, std::array<bool, 3> mask) {
  const auto options = input.options().dtype(accumulate_type(input.scalar_type()));
  const auto like = [&](bool wanted, c10::SymIntArrayRef sizes) {
    return wanted ? at::empty_symint(sizes, options) : Tensor();
  };
  return {like(mask[0], input.sym_sizes()), like(mask[1], linear_weight.sym_sizes()),
          like(mask[2], linear_weight.sym_sizes().slice(0, 1))};
}

ForwardOutputs forward_meta(const Tensor& input, const Tensor& linear_weight, const Tensor&, const OptionalTensor&,
                            const OptionalTensor&, int64_t reduction, int64_t, double, double z_scale, double,
                            bool wide, std::array<bool, 3> output_mask) {
  const auto options = input.options().dtype(wide ? accumulate_type(input.scalar_type()) : input.scalar_type());
  const auto loss = [&] {
    return reduction == 0 ? at::empty_symint(input.sym_sizes().slice(0, 1), options) : at::empty({}, options);
  };
  if (reduction == 0) output_mask = {false, false, false};
  auto [grad_input, grad_weight, grad_bias] = empty_gradients(input, linear_weight, output_mask);
  return {loss(), z_scale == 0 ? Tensor() : loss(), std::move(grad_input), std::move(grad_weight),
          std::move(grad_bias)};
}

BackwardOutputs backward_meta(const Tensor&, const Tensor& input, const Tensor& linear_weight, const Tensor&,
                              const OptionalTensor&, const OptionalTensor&, int64_t, double, double, double,
                              std::array<bool, 3> output_mask) {
  return empty_gradients(input, linear_weight, output_mask);
}

// The unfused ops.
std::tuple<Tensor, Tensor> formula(const Tensor& input, const Tensor& linear_weight, const Tensor& target,
                                   const OptionalTensor& linear_bias, const OptionalTensor& weight, const Options& o,
                                   bool wide) {
  static const auto op = find_op<cross_entropy::PublicOp>("cross_entropy");
  return op.call(at::linear(input, linear_weight, linear_bias), target, weight, o.reduction, o.ignore_index,
                 o.label_smoothing, o.z_scale, o.softcap, false, wide);
}

struct LinearCrossEntropyBackward : SavingNode<LinearCrossEntropyBackward, 8> {
  enum { Input, LinearWeight, Target, LinearBias, Weight, GradInput, GradWeight, GradBias };
  Options options{};
  bool wide = false;

  std::string name() const override { return "DlkitLinearCrossEntropyBackward"; }
  auto fields() const { return std::tuple_cat(options.fields(), std::tie(wide)); }

  variable_list backward(const variable_list& grads, const Saved& saved) override {
    Tensor grad_input = saved[GradInput], grad_weight = saved[GradWeight], grad_bias = saved[GradBias];
    const std::array<bool, 3> mask = wanted();
    if (options.reduction == 0) {
      static const auto op = find_op<decltype(backward_meta)>("linear_cross_entropy_backward");
      std::tie(grad_input, grad_weight, grad_bias) =
          op.call(grads[0], saved[Input], saved[LinearWeight], saved[Target], saved[LinearBias], saved[Weight],
                  options.ignore_index, options.label_smoothing, options.z_scale, options.softcap, mask);
      return {narrow(grad_input, saved[Input]), narrow(grad_weight, saved[LinearWeight]),
              narrow(grad_bias, saved[LinearBias])};
    }
    // A plain backward() has a gradient of 1: not multiplying by it saves a pass and a tensor of the weight's size.
    const bool is_one = grads[0].is_cpu() && is_plain(grads[0]) && grads[0].item<double>() == 1;
    const auto scaled = [&](bool asked, const Tensor& gradient, const Tensor& of) {
      if (!asked) return Tensor();
      return narrow(is_one ? gradient : gradient * grads[0].to(gradient.scalar_type()), of);
    };
    return {scaled(mask[0], grad_input, saved[Input]), scaled(mask[1], grad_weight, saved[LinearWeight]),
            scaled(mask[2], grad_bias, saved[LinearBias])};
  }

  variable_list differentiable_backward(const variable_list& grads, const Saved& saved) override {
    const auto loss = std::get<0>(
        formula(saved[Input], saved[LinearWeight], saved[Target], saved[LinearBias], saved[Weight], options, wide));
    const auto found =
        differentiable_gradients(loss, grads[0], {saved[Input], saved[LinearWeight], saved[LinearBias]}, wanted());
    return {found[0], found[1], found[2]};
  }

 private:
  std::array<bool, 3> wanted() const {
    return {task_should_compute_output(0), task_should_compute_output(1), task_should_compute_output(2)};
  }
  static Tensor narrow(const Tensor& gradient, const Tensor& of) {
    return gradient.defined() ? gradient.to(of.scalar_type()) : gradient;
  }
};

std::tuple<Tensor, Tensor> linear_cross_entropy(const Tensor& input, const Tensor& linear_weight, const Tensor& target,
                                                const OptionalTensor& linear_bias, const OptionalTensor& weight,
                                                int64_t reduction, int64_t ignore_index, double label_smoothing,
                                                double lse_square_scale, double softcap, bool wide) {
  check(input, linear_weight, linear_bias);
  const Options options{reduction, ignore_index, label_smoothing, lse_square_scale, softcap};
  static const auto kernel = find_op<cross_entropy::ForwardOp>("cross_entropy_forward");
  const bool classes = target.dim() == 1 && target.scalar_type() == at::kLong;
  const bool probabilities = target.dim() == 2 && target.scalar_type() == input.scalar_type() &&
                             target.sym_size(1) == linear_weight.sym_size(0);
  const bool fits = (classes || probabilities) && target.sym_size(0) == input.sym_size(0) &&
                    (!has(weight) || (weight->dim() == 1 && weight->sym_size(0) == linear_weight.sym_size(0)));
  // Arguments that do not fit are left to cross entropy's own checks.
  if (!fits || needs_native(kernel, input, linear_weight, linear_bias, weight) || target.requires_grad() ||
      has_tangent(target) || (has(weight) && weight->requires_grad()) ||
      TORCH_GUARD_OR_FALSE(input.sym_numel().sym_eq(0)) || linear_weight.sym_size(0) == 0 || label_smoothing < 0 ||
      label_smoothing > 1) {
    return formula(input, linear_weight, target, linear_bias, weight, options, wide);
  }
  check_parameter_types(name, input, weight, std::nullopt);
  using Node = LinearCrossEntropyBackward;
  const auto node = node_for<Node>(input, linear_weight, linear_bias);
  const auto asks = [&](const Tensor& t) { return node && t.defined() && t.requires_grad(); };
  const std::array<bool, 3> mask{asks(input), asks(linear_weight), asks(or_undefined(linear_bias))};
  static const auto op = find_op<decltype(forward_meta)>("linear_cross_entropy_forward");
  auto [loss, z_loss, grad_input, grad_weight, grad_bias] = below_autograd([&] {
    return op.call(input, linear_weight, target, linear_bias, weight, reduction, ignore_index, label_smoothing,
                   lse_square_scale, softcap, wide, mask);
  });
  if (node) {
    torch::autograd::set_history(loss, node);
    node->save(Node::Input, input);
    node->save(Node::LinearWeight, linear_weight);
    node->save(Node::Target, target);
    node->save(Node::LinearBias, or_undefined(linear_bias));
    node->save(Node::Weight, or_undefined(weight));
    node->save(Node::GradInput, grad_input);
    node->save(Node::GradWeight, grad_weight);
    node->save(Node::GradBias, grad_bias);
    node->options = options;
    node->wide = wide;
  }
  return {std::move(loss), std::move(z_loss)};
}

// The product is in autocast's type and the loss in fp32, as with the unfused ops.
template <c10::DispatchKey kKey, c10::DeviceType kDevice>
std::tuple<Tensor, Tensor> autocast(const Tensor& input, const Tensor& linear_weight, const Tensor& target,
                                    const OptionalTensor& linear_bias, const OptionalTensor& weight, int64_t reduction,
                                    int64_t ignore_index, double label_smoothing, double lse_square_scale,
                                    double softcap, bool) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(kKey);
  const at::ScalarType type = at::autocast::get_autocast_dtype(kDevice);
  const auto cast = [&](const auto& t) { return at::autocast::cached_cast(type, t, kDevice); };
  return find_op<decltype(linear_cross_entropy)>(name).call(cast(input), cast(linear_weight), target, cast(linear_bias),
                                                            at::autocast::cached_cast(at::kFloat, weight, kDevice),
                                                            reduction, ignore_index, label_smoothing, lse_square_scale,
                                                            softcap, true);
}

void implement_all(torch::Library& m) { implement_public<linear_cross_entropy>(m, name); }

}  // namespace
}  // namespace dlkit::linear_cross_entropy

DLKIT_DEFINE_OPS(m) {
  m.def(
      "linear_cross_entropy(Tensor input, Tensor linear_weight, Tensor target, Tensor? linear_bias=None,"
      " Tensor? weight=None, int reduction=1, int ignore_index=-100, float label_smoothing=0.,"
      " float lse_square_scale=0., float softcap=0., bool wide=False) -> (Tensor loss, Tensor z_loss)",
      DLKIT_PURE);
  m.def(
      "linear_cross_entropy_forward(Tensor input, Tensor linear_weight, Tensor target, Tensor? linear_bias,"
      " Tensor? weight, int reduction, int ignore_index, float label_smoothing, float lse_square_scale, float softcap,"
      " bool wide, bool[3] output_mask)"
      " -> (Tensor loss, Tensor z_loss, Tensor grad_input, Tensor grad_weight, Tensor grad_bias)",
      DLKIT_PURE);
  m.def(
      "linear_cross_entropy_backward(Tensor grad_loss, Tensor input, Tensor linear_weight, Tensor target,"
      " Tensor? linear_bias, Tensor? weight, int ignore_index, float label_smoothing, float lse_square_scale,"
      " float softcap, bool[3] output_mask) -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)",
      DLKIT_PURE);
}

DLKIT_IMPLEMENT_OPS(Meta, m) {
  dlkit::implement_kernel<dlkit::linear_cross_entropy::forward_meta>(m, "linear_cross_entropy_forward");
  dlkit::implement_kernel<dlkit::linear_cross_entropy::backward_meta>(m, "linear_cross_entropy_backward");
}
DLKIT_IMPLEMENT_PUBLIC_OPS(dlkit::linear_cross_entropy::implement_all)
DLKIT_IMPLEMENT_OPS(CompositeExplicitAutograd, m) {
  dlkit::implement_kernel<dlkit::linear_cross_entropy::forward>(m, "linear_cross_entropy_forward");
  dlkit::implement_kernel<dlkit::linear_cross_entropy::backward>(m, "linear_cross_entropy_backward");
}
DLKIT_IMPLEMENT_OPS(AutocastCPU, m) {
  m.impl("linear_cross_entropy",
         dlkit::linear_cross_entropy::autocast<c10::DispatchKey::AutocastCPU, c10::DeviceType::CPU>);
}
DLKIT_IMPLEMENT_OPS(AutocastCUDA, m) {
  m.impl("linear_cross_entropy",
         dlkit::linear_cross_entropy::autocast<c10::DispatchKey::AutocastCUDA, c10::DeviceType::CUDA>);
}
