// Cross entropy as torch ops. The public one checks its arguments, then calls the forward op, with an autograd node
// where a gradient is needed. Backward is an op of its own, which lets compilers see both; it has an in-place variant
// for logits that their gradient may overwrite. Empty input, gradients of targets and class weights, forward-mode
// derivatives, torch.func transforms and double backward go through torch's formula.
#include "op.h"

#include <ATen/TensorOperators.h>
#include <ATen/autocast_mode.h>
#include <ATen/ops/cross_entropy_loss.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/logsumexp.h>
#include <ATen/ops/movedim.h>
#include <ATen/ops/tanh.h>
#include <ATen/ops/zeros_like.h>

#include "../glue/autograd.h"
#include "../glue/checked.h"
#include "../glue/in_place.h"
#include "kernel.h"

namespace dlkit::cross_entropy {
namespace {

using at::Tensor;
using torch::autograd::variable_list;

constexpr auto name = "cross_entropy";

DLKIT_RUN(Backward, backward)
DLKIT_FOR_CUDA(void run(const CudaDevice& device, const Forward& op) { forward_cuda(op, device.stream()); })
DLKIT_FOR_CPU(void run(const CpuDevice&, const Forward& op) {
  int64_t bad_row = -1;
  Forward checked = op;
  checked.bad_row = &bad_row;
  forward_cpu(checked);
  TORCH_CHECK_INDEX(bad_row < 0, name, "(): expected targets from 0 to ", op.classes - 1, " (input has ", op.classes,
                    " classes) or ", op.ignore_index, " (ignore_index), got ", op.target[bad_row], " in row ", bad_row);
})

bool has_probabilities(const Tensor& input, const Tensor& target) {
  return input.sym_sizes().equals(target.sym_sizes());
}

int64_t class_dim(const Tensor& input) { return input.dim() == 1 ? 0 : 1; }

// Whether the classes are adjacent in memory though not the last dimension: [N, C, ...] in channels_last.
bool classes_last(const Tensor& input) { return input.dim() > 2 && !input.is_contiguous() && input.sym_stride(1) == 1; }

// The sizes of a tensor with one element a row.
c10::SymDimVector row_sizes(const Tensor& input) {
  c10::SymDimVector sizes(input.sym_sizes().begin(), input.sym_sizes().end());
  sizes.erase(sizes.begin() + class_dim(input));
  return sizes;
}

// Moves the classes to the last dimension.
Tensor with_classes_last(const Tensor& t) { return t.dim() <= 2 ? t : at::movedim(t, 1, -1); }

// Logits as the kernels take them.
struct View {
  Tensor x;
  int64_t inner = 1, stride = 0;
};

View view_of(const Tensor& input) {
  if (input.dim() <= 2 || classes_last(input)) {
    const Rows rows = as_rows(with_classes_last(input), 1);
    return {rows.tensor, 1, rows.stride};
  }
  const int64_t inner = c10::multiply_integers(input.sizes().slice(2));
  return {input.contiguous(), inner, inner == 1 ? input.size(1) : 0};
}

// Memory for the gradient, laid out as view_of() has the input.
Tensor empty_gradient(const Tensor& input) {
  if (!classes_last(input)) return at::empty_symint(input.sym_sizes(), input.options());
  return at::movedim(at::empty_symint(at::movedim(input, 1, -1).sym_sizes(), input.options()), -1, 1);
}

// The arguments that both kernels share. These tensors own the memory that `op` points to and must outlive it.
struct Held {
  View view;
  Tensor target, weight;
};

// The weight in the accumulation type. torch's conversion takes longer than cross entropy of a row.
Tensor widened(const Tensor& weight, at::ScalarType type) {
  if (weight.scalar_type() == type) return weight.contiguous();
  if (!weight.is_cpu() || weight.scalar_type() != at::kBFloat16 || type != at::kFloat || !weight.is_contiguous()) {
    return weight.contiguous().to(type);
  }
  const Tensor wide = at::empty({weight.numel()}, weight.options().dtype(type));
  float* const to = wide.mutable_data_ptr<float>();
  const auto* const from = weight.const_data_ptr<at::BFloat16>();
  constexpr int64_t kTogether = 16;  // a constant count lets -O2 vectorize the loop
  int64_t i = 0;
  for (; i + kTogether <= weight.numel(); i += kTogether) {
    for (int64_t j = 0; j < kTogether; ++j) to[i + j] = from[i + j];
  }
  for (; i < weight.numel(); ++i) to[i] = from[i];
  return wide;
}

Held describe(Problem& op, const Tensor& input, const Tensor& target, const OptionalTensor& weight,
              const Options& options) {
  Held held{view_of(input), Tensor(), Tensor()};
  const at::ScalarType accumulate = accumulate_type(input.scalar_type());
  if (has_probabilities(input, target)) {
    TORCH_CHECK(target.scalar_type() == input.scalar_type(), name, "(): expected target of ", input.scalar_type(),
                " (the type of input) for probabilities, got ", target.scalar_type());
    const bool moved = input.dim() <= 2 || classes_last(input);
    held.target = (moved ? with_classes_last(target) : target).contiguous();
    op.probabilities = held.target.const_data_ptr();
  } else {
    TORCH_CHECK(target.scalar_type() == at::kLong, name, "(): expected target of Long for classes, got ",
                target.scalar_type());
    held.target = target.contiguous();
    op.target = held.target.const_data_ptr<int64_t>();
  }
  if (has(weight)) held.weight = widened(*weight, accumulate);
  op.x = held.view.x.const_data_ptr();
  op.weight = data_or_null(held.weight);
  op.classes = input.size(class_dim(input));
  op.rows = input.numel() / op.classes;
  op.inner = held.view.inner;
  op.stride = held.view.stride;
  op.ignore_index = options.ignore_index;
  op.label_smoothing = options.label_smoothing;
  op.z_scale = options.z_scale;
  op.softcap = options.softcap;
  op.reduction = static_cast<Reduction>(options.reduction);
  op.dtype = dtype_of(input.scalar_type());
  return held;
}

using ForwardOutputs = std::tuple<Tensor, Tensor, Tensor, Tensor>;  // loss, z_loss, stats, total

at::ScalarType loss_type(const Tensor& input, bool wide) {
  return wide ? accumulate_type(input.scalar_type()) : input.scalar_type();
}

// stats: the maximum and the sum of exponentials of each row, and for probabilities their mass; total: the divisors of
// a mean.
ForwardOutputs empty_outputs(const Tensor& input, const Tensor& target, const Options& options, bool wide) {
  const auto wanted = input.options().dtype(accumulate_type(input.scalar_type()));
  const auto loss_options = input.options().dtype(loss_type(input, wide));
  const c10::SymInt rows = input.sym_numel() / input.sym_size(class_dim(input));
  const auto loss = [&] {
    return options.reduction == 0 ? at::empty_symint(row_sizes(input), loss_options) : at::empty({}, loss_options);
  };
  return {loss(), options.z_scale == 0 ? Tensor() : loss(),
          at::empty_symint({has_probabilities(input, target) ? 3 : 2, rows}, wanted),
          options.reduction == 1 ? at::empty({2}, wanted) : Tensor()};
}

void set_stats(Problem& op, const Tensor& stats, const Tensor& total) {
  const int64_t bytes = op.rows * accumulate_size(op.dtype);
  const auto row = [&](int64_t i) { return static_cast<char*>(stats.data_ptr()) + i * bytes; };
  op.max = row(0);
  op.sum = row(1);
  op.mass = stats.size(0) == 3 ? row(2) : nullptr;
  op.total = total.defined() ? total.data_ptr() : nullptr;
}

template <class Device>
ForwardOutputs forward(const Tensor& input, const Tensor& target, const OptionalTensor& weight, int64_t reduction,
                       int64_t ignore_index, double label_smoothing, double z_scale, double softcap, bool wide) {
  const Device device(input);
  const Options options{reduction, ignore_index, label_smoothing, z_scale, softcap};
  ForwardOutputs outputs = empty_outputs(input, target, options, wide);
  auto& [loss, z_loss, stats, total] = outputs;
  Forward op{};
  const Held held = describe(op, input, target, weight, options);
  set_stats(op, stats, total);
  // Without a reduction the kernel's losses are the result, rounded once more for 16 bits. The losses of a few rows
  // need no tensor: making one takes as long as their logits.
  const bool direct = reduction == 0 && loss.scalar_type() == stats.scalar_type();
  constexpr int64_t kFew = 16;
  double few[kFew];
  const bool in_few = std::is_same_v<Device, CpuDevice> && reduction != 0 && op.rows <= kFew;
  const auto per_row = [&, options = stats.options()](const Tensor& result) {
    return !result.defined() ? Tensor() : direct ? result : at::empty({op.rows}, options);
  };
  const Tensor losses = in_few ? Tensor() : per_row(loss), z = per_row(z_loss);
  op.losses = in_few ? few : losses.mutable_data_ptr();
  op.z = mutable_data_or_null(z);
  if (reduction != 0) {
    op.loss = loss.mutable_data_ptr();
    op.z_loss = mutable_data_or_null(z_loss);
  }
  op.loss_dtype = dtype_of(loss.scalar_type());
  const Tensor slices = std::is_same_v<Device, CpuDevice> || reduction == 0
                            ? Tensor()
                            : at::empty({kSlices}, input.options().dtype(at::kDouble));
  op.slices = static_cast<double*>(mutable_data_or_null(slices));
  run(device, op);
  if (reduction == 0 && !direct) {
    loss.copy_(losses.view(loss.sizes()));
    if (z_loss.defined()) z_loss.copy_(z.view(z_loss.sizes()));
  }
  return outputs;
}

template <class Device>
void run_backward(const Tensor& grad_loss, const Tensor& input, const Tensor& target, const OptionalTensor& weight,
                  const Tensor& stats, const OptionalTensor& total, const Options& options, Tensor* grad_input) {
  const Device device(input);
  Backward op{};
  const Held held = describe(op, input, target, weight, options);
  const auto check = [&](const char* argument, const Tensor& t) {
    TORCH_CHECK(t.scalar_type() == accumulate_type(input.scalar_type()), name, "(): expected ", argument, " of ",
                accumulate_type(input.scalar_type()), ", got ", t.scalar_type());
  };
  if (grad_loss.scalar_type() != input.scalar_type()) check("grad_loss", grad_loss);
  check("stats", stats);
  if (has(total)) check("total", *total);
  const Tensor kept = stats.contiguous(), sums = has(total) ? total->contiguous() : Tensor();
  set_stats(op, kept, sums);
  const Tensor grad = grad_loss.to(stats.scalar_type()).contiguous();
  op.grad_loss = grad.const_data_ptr();
  op.grad_loss_stride = options.reduction == 0 ? 1 : 0;
  if (grad_input == nullptr) {
    op.grad_input = held.view.x.mutable_data_ptr();
    op.grad_stride = op.stride;
  } else {
    op.grad_input = grad_input->mutable_data_ptr();
    op.grad_stride = op.classes;
  }
  run(device, op);
}

template <class Device>
Tensor backward(const Tensor& grad_loss, const Tensor& input, const Tensor& target, const OptionalTensor& weight,
                const Tensor& stats, const OptionalTensor& total, int64_t reduction, int64_t ignore_index,
                double label_smoothing, double z_scale, double softcap) {
  Tensor grad_input = empty_gradient(input);
  run_backward<Device>(grad_loss, input, target, weight, stats, total,
                       {reduction, ignore_index, label_smoothing, z_scale, softcap}, &grad_input);
  return grad_input;
}

template <class Device>
void backward_(const Tensor& grad_loss, const Tensor& input, const Tensor& target, const OptionalTensor& weight,
               const Tensor& stats, const OptionalTensor& total, int64_t reduction, int64_t ignore_index,
               double label_smoothing, double z_scale, double softcap) {
  run_backward<Device>(grad_loss, input, target, weight, stats, total,
                       {reduction, ignore_index, label_smoothing, z_scale, softcap}, nullptr);
}

// Shapes and dtypes of the above, for tracing.
ForwardOutputs forward_meta(const Tensor& input, const Tensor& target, const OptionalTensor&, int64_t reduction,
                            int64_t ignore_index, double label_smoothing, double z_scale, double softcap, bool wide) {
  return empty_outputs(input, target, {reduction, ignore_index, label_smoothing, z_scale, softcap}, wide);
}

Tensor backward_meta(const Tensor&, const Tensor& input, const Tensor&, const OptionalTensor&, const Tensor&,
                     const OptionalTensor&, int64_t, int64_t, double, double, double) {
  return empty_gradient(input);
}

void backward_meta_(const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&, const Tensor&,
                    const OptionalTensor&, int64_t, int64_t, double, double, double) {}

// The same, (loss, z_loss), from torch's own differentiable ops.
std::tuple<Tensor, Tensor> formula(const Tensor& input, const Tensor& target, const OptionalTensor& weight,
                                   const Options& options, bool wide) {
  const at::ScalarType type = input.scalar_type();
  const bool widen = is_supported(type) && (wide || (has(weight) && weight->scalar_type() != type));
  Tensor x = widen ? input.to(accumulate_type(type)) : input;
  const Tensor t = widen && target.is_floating_point() ? target.to(at::result_type(x, target)) : target;
  const OptionalTensor w = has(weight) && widen ? OptionalTensor(weight->to(x.scalar_type())) : weight;
  if (options.softcap != 0) x = at::tanh(x / options.softcap) * options.softcap;
  Tensor loss = at::cross_entropy_loss(x, t, w, options.reduction, options.ignore_index, options.label_smoothing),
         z_loss;
  if (options.z_scale != 0) {
    z_loss = options.z_scale * at::logsumexp(x, class_dim(x)).square();
    const bool ignores = !has_probabilities(input, target);
    const Tensor kept = ignores ? target != options.ignore_index : Tensor();
    if (ignores) z_loss = z_loss.masked_fill(kept.logical_not(), 0);
    if (options.reduction != 0) z_loss = z_loss.sum();
    if (options.reduction == 1)
      z_loss = ignores ? z_loss / kept.sum() : z_loss / (x.sym_numel() / x.sym_size(class_dim(x)));
    loss = loss + z_loss;
  }
  const auto narrow = [&](const Tensor& t) { return widen && !wide && t.defined() ? t.to(type) : t; };
  return {narrow(loss), narrow(z_loss)};
}

const auto& forward_op() {
  static const auto op = find_op<ForwardOp>("cross_entropy_forward");
  return op;
}

struct CrossEntropyBackward : SavingNode<CrossEntropyBackward, 5> {
  enum { Input, Target, Weight, Stats, Total };
  Options options{};
  bool wide = false, in_place = false, overwritten = false;

  std::string name() const override { return "DlkitCrossEntropyBackward"; }
  auto fields() const { return std::tuple_cat(options.fields(), std::tie(wide)); }

  variable_list apply(variable_list&& grads) override {
    TORCH_CHECK(!overwritten,
                "cross_entropy(): the first backward wrote the gradient over the logits (inplace_backward=True), so "
                "there is no second one through this graph: leave out inplace_backward, or run forward again");
    return SavingNode::apply(std::move(grads));
  }

  variable_list backward(const variable_list& grads, const Saved& saved) override {
    const Tensor& input = saved[Input];
    const auto call = [&](const auto& op) {
      return op.call(grads[0], input, saved[Target], saved[Weight], saved[Stats], saved[Total], options.reduction,
                     options.ignore_index, options.label_smoothing, options.z_scale, options.softcap);
    };
    if (in_place && is_plain(input) && is_plain(grads[0])) {
      static const auto op = find_op<BackwardInPlaceOp>("cross_entropy_backward_");
      call(op);
      overwritten = true;
      input.unsafeGetTensorImpl()->bump_version();  // nodes that saved the logits must notice
      return {input.detach()};
    }
    static const auto op = find_op<decltype(backward_meta)>("cross_entropy_backward");
    return {call(op)};
  }

  variable_list differentiable_backward(const variable_list& grads, const Saved& saved) override {
    const auto loss = std::get<0>(formula(saved[Input], saved[Target], saved[Weight], options, wide));
    return {differentiable_gradients(loss, grads[0], {saved[Input], Tensor(), Tensor()}, {true, false, false})[0]};
  }
};

void check(const Tensor& input, const Tensor& target, const OptionalTensor& weight, const Options& options) {
  TORCH_CHECK(options.label_smoothing >= 0 && options.label_smoothing <= 1, name,
              "(): expected label_smoothing between 0 and 1, got ", options.label_smoothing);
  TORCH_CHECK_VALUE(options.reduction >= 0 && options.reduction <= 2, name, "(): expected reduction 0, 1 or 2, got ",
                    options.reduction);
  TORCH_CHECK_VALUE(options.softcap >= 0 && std::isfinite(options.softcap), name, "(): expected softcap above 0, got ",
                    options.softcap);
  TORCH_CHECK_VALUE(std::isfinite(options.z_scale), name, "(): expected a finite lse_square_scale, got ",
                    options.z_scale);
  TORCH_CHECK_VALUE(input.dim() >= 1, name, "(): expected input of shape [C] or [N, C, ...], got a scalar");
  const c10::SymInt classes = input.sym_size(class_dim(input));
  if (has(weight)) {
    TORCH_CHECK(weight->dim() == 1 && weight->sym_size(0) == classes, name, "(): expected weight of shape [", classes,
                "] (one for each class), got ", weight->sym_sizes());
  }
  if (has_probabilities(input, target)) {
    TORCH_CHECK(target.is_floating_point(), name, "(): expected a floating type of target of the input's shape ",
                input.sym_sizes(), ", which holds probabilities, got ", target.scalar_type());
    TORCH_CHECK(options.ignore_index < 0, name, "(): ignore_index is for classes, and target has the input's shape ",
                input.sym_sizes(), ", which makes it probabilities: leave out ignore_index");
    return;
  }
  const auto rows = row_sizes(input);
  const bool fits = target.sym_sizes().equals(rows);
  // torch's types: ValueError where the batch differs, else RuntimeError.
  TORCH_CHECK_VALUE(fits || input.dim() == 1 || (target.dim() > 0 && target.sym_size(0) == input.sym_size(0)), name,
                    "(): expected target of shape ", c10::SymIntArrayRef(rows), " (classes) or ", input.sym_sizes(),
                    " (probabilities), got ", target.sym_sizes());
  TORCH_CHECK(fits, name, "(): expected target of shape ", c10::SymIntArrayRef(rows), " (classes) or ",
              input.sym_sizes(), " (probabilities), got ", target.sym_sizes());
  TORCH_CHECK(target.scalar_type() == at::kLong || target.scalar_type() == at::kByte, name,
              "(): expected target of Long for classes, got ", target.scalar_type());
}

// (loss, z_loss); z_loss is undefined without lse_square_scale, and has no gradient.
std::tuple<Tensor, Tensor> cross_entropy(const Tensor& input, const Tensor& target, const OptionalTensor& weight,
                                         int64_t reduction, int64_t ignore_index, double label_smoothing,
                                         double lse_square_scale, double softcap, bool inplace_backward, bool wide) {
  const Options options{reduction, ignore_index, label_smoothing, lse_square_scale, softcap};
  check(input, target, weight, options);
  const bool probabilities = has_probabilities(input, target);
  const auto differentiable = [](const Tensor& t) {
    return (t.requires_grad() && at::GradMode::is_enabled()) || has_tangent(t);
  };
  if (needs_native(forward_op(), input, weight) || differentiable(target) || (has(weight) && differentiable(*weight)) ||
      TORCH_GUARD_OR_FALSE(input.sym_numel().sym_eq(0)) ||
      (probabilities && target.scalar_type() != input.scalar_type())) {
    auto [loss, z_loss] = formula(input, target, weight, options, wide);
    return {loss, z_loss.defined() ? z_loss.detach() : z_loss};
  }
  check_parameter_types(name, input, weight, std::nullopt);
  const Tensor classes = target.scalar_type() == at::kByte ? target.to(at::kLong) : target;
  const auto node = node_for<CrossEntropyBackward>(input);
  if (node && inplace_backward && is_plain(input)) {
    check_written(name, input);
    TORCH_CHECK(view_of(input).x.const_data_ptr() == input.const_data_ptr(), name,
                "(): expected input whose classes lie side by side, or contiguous, for inplace_backward, got strides ",
                input.strides(), " for shape ", input.sizes(), ": call contiguous(), or leave out inplace_backward");
  }
  auto [loss, z_loss, stats, total] = below_autograd([&] {
    return forward_op().call(input, classes, weight, reduction, ignore_index, label_smoothing, lse_square_scale,
                             softcap, wide);
  });
  if (node) {
    torch::autograd::set_history(loss, node);
    node->save(CrossEntropyBackward::Input, input);
    node->save(CrossEntropyBackward::Target, classes);
    node->save(CrossEntropyBackward::Weight, or_undefined(weight));
    node->save(CrossEntropyBackward::Stats, stats);
    node->save(CrossEntropyBackward::Total, total);
    node->options = options;
    node->wide = wide;
    node->in_place = inplace_backward;
  }
  return {std::move(loss), std::move(z_loss)};
}

// Autocast runs torch's op in fp32. This one reads 16-bit logits as they are and gives the loss in fp32.
template <c10::DispatchKey kKey>
std::tuple<Tensor, Tensor> cross_entropy_autocast(const Tensor& input, const Tensor& target,
                                                  const OptionalTensor& weight, int64_t reduction, int64_t ignore_index,
                                                  double label_smoothing, double lse_square_scale, double softcap,
                                                  bool inplace_backward, bool) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(kKey);
  constexpr auto device = kKey == c10::DispatchKey::AutocastCPU ? c10::DeviceType::CPU : c10::DeviceType::CUDA;
  const auto wide = [](const auto& t) { return at::autocast::cached_cast(at::kFloat, t, device); };
  const bool mixed = target.is_floating_point() && target.scalar_type() != input.scalar_type();
  return find_op<PublicOp>(name).call(mixed ? wide(input) : input, mixed ? wide(target) : target, wide(weight),
                                      reduction, ignore_index, label_smoothing, lse_square_scale, softcap,
                                      inplace_backward, true);
}

template <class Device>
void implement_kernels(torch::Library& m) {
  implement_kernel<forward<Device>>(m, "cross_entropy_forward");
  implement_kernel<backward<Device>>(m, "cross_entropy_backward");
  implement_kernel<backward_<Device>>(m, "cross_entropy_backward_");
}

void implement_meta(torch::Library& m) {
  implement_kernel<forward_meta>(m, "cross_entropy_forward");
  implement_kernel<backward_meta>(m, "cross_entropy_backward");
  implement_kernel<backward_meta_>(m, "cross_entropy_backward_");
}

void implement_all(torch::Library& m) { implement_public<cross_entropy>(m, name); }

template <c10::DispatchKey kKey>
void implement_autocast(torch::Library& m) {
  m.impl(name, cross_entropy_autocast<kKey>);
}

}  // namespace
}  // namespace dlkit::cross_entropy

DLKIT_DEFINE_OPS(m) {
  m.def(
      "cross_entropy(Tensor input, Tensor target, Tensor? weight=None, int reduction=1, int ignore_index=-100,"
      " float label_smoothing=0., float lse_square_scale=0., float softcap=0., bool inplace_backward=False,"
      " bool wide=False) -> (Tensor loss, Tensor z_loss)",
      DLKIT_PURE);
  m.def(
      "cross_entropy_forward(Tensor input, Tensor target, Tensor? weight, int reduction, int ignore_index,"
      " float label_smoothing, float lse_square_scale, float softcap, bool wide)"
      " -> (Tensor loss, Tensor z_loss, Tensor stats, Tensor total)",
      DLKIT_PURE);
  m.def(
      "cross_entropy_backward(Tensor grad_loss, Tensor input, Tensor target, Tensor? weight, Tensor stats,"
      " Tensor? total, int reduction, int ignore_index, float label_smoothing, float lse_square_scale, float softcap)"
      " -> Tensor",
      DLKIT_PURE);
  m.def(
      "cross_entropy_backward_(Tensor grad_loss, Tensor(a!) input, Tensor target, Tensor? weight, Tensor stats,"
      " Tensor? total, int reduction, int ignore_index, float label_smoothing, float lse_square_scale, float softcap)"
      " -> ()",
      DLKIT_PURE);
}

DLKIT_IMPLEMENT_KERNELS(dlkit::cross_entropy::implement_kernels)
DLKIT_IMPLEMENT_OPS(Meta, m) { dlkit::cross_entropy::implement_meta(m); }
DLKIT_IMPLEMENT_PUBLIC_OPS(dlkit::cross_entropy::implement_all)
DLKIT_IMPLEMENT_OPS(AutocastCPU, m) { dlkit::cross_entropy::implement_autocast<c10::DispatchKey::AutocastCPU>(m); }
DLKIT_IMPLEMENT_OPS(AutocastCUDA, m) { dlkit::cross_entropy::implement_autocast<c10::DispatchKey::AutocastCUDA>(m); }
