// The optimizers as torch ops, which change lists of tensors in place. The public three check all arguments before
// anything is written, then call the kernels' ops, which every backend has. A step of dlkit.optim comes through Plan.
#include "../glue/op.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/view_as_real.h>
#include <c10/util/strides.h>

#include <cmath>

#include "arguments.h"
#include "kernel.h"
#include "plan.h"

namespace dlkit::optim {
namespace {

DLKIT_RUN(Step, step)
DLKIT_RUN(Norm, norm)
DLKIT_RUN(Clip, clip)
DLKIT_ASK(partials, Norm, norm_partials)

Group group_of(const Options& options, const float* lr_pointer, bool has_seed) {
  return {.lr = options.lr,
          .weight_decay = options.weight_decay,
          .eps = options.eps,
          .beta1 = options.beta1,
          .beta2 = options.beta2,
          .momentum = options.momentum,
          .dampening = options.dampening,
          .alpha = options.alpha,
          .ema_decay = options.ema_decay,
          .decoupled_weight_decay = options.decoupled_weight_decay != 0,
          .nesterov = options.nesterov != 0,
          .maximize = options.maximize != 0,
          .stochastic_rounding = has_seed && options.stochastic_rounding != 0,
          .stochastic_states = has_seed ? int32_t(options.stochastic_states) : 0,
          .lr_pointer = lr_pointer};
}

// Gives the addresses of a parameter's arrays in one common layout: the parameter's own strides where it is dense.
// Arrays in another layout are copied, and copied back by finish().
class Arranger {
 public:
  // Sets the parameter of the following place() calls. 8-bit states need their elements in logical order: a scale
  // belongs to 256 elements in that order, which lets a checkpoint mean the same in every memory format.
  void begin(const Tensor& param, bool logical_order) {
    param_ = &as_real(param);
    contiguous_ = logical_order || param_->is_contiguous();
    if (contiguous_) return;
    strides_ = param_->is_non_overlapping_and_dense() ? at::DimVector(param_->strides())
                                                      : c10::contiguous_strides(param_->sizes());
  }
  int64_t numel() const { return param_->numel(); }
  at::ScalarType type() const { return param_->scalar_type(); }

  // The address of a tensor's data, converted to the type `as` if one is given.
  void* place(const Tensor& tensor, bool changes, std::optional<at::ScalarType> as = std::nullopt) {
    const Tensor& real = as_real(tensor);
    const bool fits = contiguous_ ? real.is_contiguous() : real.strides() == at::IntArrayRef(strides_);
    if (fits && !as) return real.unsafeGetTensorImpl()->mutable_data();
    const auto options = as ? real.options().dtype(*as) : real.options();
    kept_.push_back(contiguous_ ? at::empty(real.sizes(), options)
                                : at::empty_strided(real.sizes(), strides_, options));
    kept_.back().copy_(real);
    if (changes) changed_.emplace_back(real, kept_.back());
    return kept_.back().mutable_data_ptr();
  }
  void finish() {
    for (auto& [original, copy] : changed_) original.copy_(copy);
  }

 private:
  const Tensor& as_real(const Tensor& tensor) {
    if (!tensor.is_complex()) return tensor;
    kept_.push_back(at::view_as_real(tensor));
    return kept_.back();
  }

  const Tensor* param_ = nullptr;
  bool contiguous_ = true;
  at::DimVector strides_;
  std::deque<Tensor> kept_;
  std::vector<std::pair<Tensor, Tensor>> changed_;
};

std::vector<int64_t> first_blocks(const auto& arrays) {
  std::vector<int64_t> first(arrays.size() + 1, 0);
  for (size_t i = 0; i < arrays.size(); ++i) first[i + 1] = first[i] + (arrays[i].numel + kBlock - 1) / kBlock;
  return first;
}

// autograd must notice that tensors it may have saved have changed.
void mark_changed(TensorList tensors) {
  for (const Tensor& tensor : tensors) {
    if (!tensor.is_inference()) tensor.unsafeGetTensorImpl()->bump_version();
  }
}

double read(const Tensor& scalar) {
  return scalar.scalar_type() == at::kDouble ? *scalar.const_data_ptr<double>()
                                             : double(*scalar.const_data_ptr<float>());
}

// Raises host counters by one and gives Adam's bias corrections, computed once for consecutive tensors with the same
// values.
class Counter {
 public:
  void advance(const Tensor& step, const Group& group, optim::Tensor& tensor) {
    double t = read(step) + 1;
    if (step.scalar_type() == at::kDouble) {
      *step.mutable_data_ptr<double>() = t;
    } else {
      t = *step.mutable_data_ptr<float>() = float(t);  // stops at 2^24, as in torch
    }
    if (&group != group_ || t != t_) {
      group_ = &group;
      t_ = t;
      correction1_ = 1 - std::pow(group.beta1, t);
      correction2_ = 1 - std::pow(group.beta2, t);
    }
    tensor.bias_correction1 = correction1_;
    tensor.bias_correction2 = correction2_;
  }

 private:
  const Group* group_ = nullptr;
  double t_ = 0, correction1_ = 1, correction2_ = 1;
};

template <class Device>
void step(Algorithm algorithm, const Lists& lists, const Settings& settings) {
  constexpr bool kHost = std::is_same_v<Device, CpuDevice>;
  const size_t count = lists.params.size();
  if (count == 0) return;
  const int64_t group_count = settings.group_count();
  const Tensor& first = lists.params[0];
  const Device device(first);
  std::vector<Group> groups;
  groups.reserve(group_count);
  for (int64_t g = 0; g < group_count; ++g) {
    groups.push_back(group_of(settings.group(g), settings.lr.empty() ? nullptr : settings.lr[g].const_data_ptr<float>(),
                              settings.seed.has_value()));
  }
  optim::Step op{};
  op.grad_scale = static_cast<const float*>(data_or_null(settings.grad_scale));
  op.found_inf = static_cast<const float*>(data_or_null(settings.found_inf));
  op.grad_norm = data_or_null(settings.grad_norm);
  if (has(settings.grad_norm)) op.norm_dtype = dtype_of(settings.grad_norm->scalar_type());

  const auto on_host = [&](const Tensor& step) { return kHost || step.device() != first.device(); };
  if (op.found_inf != nullptr && !lists.steps.empty() && on_host(lists.steps[0])) {
    // Host counters need found_inf now, which waits for the device; counters on the device (fused=True,
    // capturable=True) do not.
    if (settings.found_inf->item<float>() != 0) return;
    op.found_inf = nullptr;
  }
  if (kHost && op.found_inf != nullptr && *op.found_inf != 0) return;

  Arranger arranger;
  Counter counter;
  std::vector<optim::Tensor> tensors(count);
  for (size_t i = 0; i < count; ++i) {
    optim::Tensor& tensor = tensors[i];
    const bool coded = !lists.states[0].empty() && lists.states[0][i].scalar_type() == at::kByte;
    arranger.begin(lists.params[i], coded);
    tensor.param = arranger.place(lists.params[i], true);
    // Kernels read any gradient of up to 32 bits beside any such parameter.
    const at::ScalarType grad_dtype = c10::toRealValueType(lists.grads[i].scalar_type());
    std::optional<at::ScalarType> as;
    if (grad_dtype != arranger.type() && (grad_dtype == at::kDouble || arranger.type() == at::kDouble)) {
      as = arranger.type() == at::kDouble ? at::kDouble : at::kFloat;  // not 16 bits, which would round it more
    }
    tensor.grad = arranger.place(lists.grads[i], settings.write_grads, as);
    tensor.grad_dtype = dtype_of(as.value_or(grad_dtype));
    tensor.dtype = dtype_of(arranger.type());
    tensor.state_type = StateType(tensor.dtype);
    for (int s = 0; s < kStates; ++s) {
      if (lists.states[s].empty()) continue;
      const Tensor& state = lists.states[s][i];
      tensor.states[s] = arranger.place(state, true);
      const bool coded = state.scalar_type() == at::kByte;
      if (coded) tensor.scales[s] = lists.scales[s][i].mutable_data_ptr<float>();
      tensor.state_type = coded ? StateType::Int8 : StateType(dtype_of(c10::toRealValueType(state.scalar_type())));
    }
    if (!lists.remainders.empty()) tensor.remainder = static_cast<int16_t*>(arranger.place(lists.remainders[i], true));
    if (!lists.ema.empty()) tensor.ema = arranger.place(lists.ema[i], true);
    tensor.numel = arranger.numel();
    tensor.group = int32_t(settings.groups[i]);
    tensor.bias_correction1 = tensor.bias_correction2 = 1;
    if (!lists.steps.empty() && !on_host(lists.steps[i])) {
      tensor.step = lists.steps[i].mutable_data_ptr();
      tensor.step_dtype = dtype_of(lists.steps[i].scalar_type());
    }
  }
  if (!lists.steps.empty()) {  // from here on nothing raises
    for (size_t i = 0; i < count; ++i) {
      if (on_host(lists.steps[i])) counter.advance(lists.steps[i], groups[tensors[i].group], tensors[i]);
    }
  }
  const std::vector<int64_t> first_block = first_blocks(tensors);
  op.algorithm = algorithm;
  op.groups = groups.data();
  op.group_count = group_count;
  op.tensors = tensors.data();
  op.tensor_count = int64_t(count);
  op.first_block = first_block.data();
  op.max_norm = settings.max_norm;
  op.write_grads = settings.write_grads;
  op.seed = uint64_t(settings.seed.value_or(0));
  run(device, op);
  arranger.finish();
  mark_changed(lists.params);
  mark_changed(lists.ema);
  if (settings.write_grads) mark_changed(lists.grads);  // states are not saved by any node
}

// The gradients' arrays, made dense where they are not.
std::vector<Gradient> gradients(TensorList grads, Arranger& arranger, bool changes) {
  std::vector<Gradient> result;
  result.reserve(grads.size());
  for (const Tensor& grad : grads) {
    arranger.begin(grad, false);
    void* data = arranger.place(grad, changes);
    result.push_back({data, arranger.numel(), dtype_of(arranger.type())});
  }
  return result;
}

template <class Device>
Tensor norm(TensorList grads) {
  Arranger arranger;
  const std::vector<Gradient> arrays = gradients(grads, arranger, false);
  const std::vector<int64_t> first_block = first_blocks(arrays);
  bool wide = false;
  for (const Gradient& array : arrays) wide = wide || array.dtype == DType::F64;
  const auto options = at::TensorOptions().device(grads[0].device());
  const Tensor result = at::empty({}, options.dtype(wide ? at::kDouble : at::kFloat));
  const Device device(grads[0]);
  Norm op{.grads = arrays.data(),
          .first_block = first_block.data(),
          .count = int64_t(arrays.size()),
          .partials = nullptr,
          .norm = result.mutable_data_ptr(),
          .norm_dtype = wide ? DType::F64 : DType::F32};
  const Tensor sums = at::empty({partials(device, op)}, options.dtype(at::kDouble));
  op.partials = sums.mutable_data_ptr<double>();
  run(device, op);
  return result;
}

template <class Device>
void clip_(TensorList grads, const Tensor& grad_norm, double max_norm) {
  Arranger arranger;
  const std::vector<Gradient> arrays = gradients(grads, arranger, true);
  const std::vector<int64_t> first_block = first_blocks(arrays);
  const Clip op{.grads = arrays.data(),
                .first_block = first_block.data(),
                .count = int64_t(arrays.size()),
                .norm = grad_norm.const_data_ptr(),
                .norm_dtype = dtype_of(grad_norm.scalar_type()),
                .max_norm = max_norm};
  run(Device(grads[0]), op);
  arranger.finish();
  mark_changed(grads);
}

// The ops of a step have one argument for each list and number. kRun(algorithm, lists, settings) gets them by name.
template <auto kRun>
void step_(c10::string_view algorithm, TensorList params, TensorList grads, TensorList state1, TensorList state2,
           TensorList state3, TensorList scales1, TensorList scales2, TensorList scales3, TensorList remainders,
           TensorList ema, TensorList steps, at::IntArrayRef groups, at::ArrayRef<double> options, TensorList lr,
           const OptionalTensor& grad_norm, double max_norm, const OptionalTensor& grad_scale,
           const OptionalTensor& found_inf, bool write_grads, std::optional<int64_t> seed) {
  kRun(algorithm,
       {.params = params,
        .grads = grads,
        .states = {state1, state2, state3},
        .scales = {scales1, scales2, scales3},
        .remainders = remainders,
        .ema = ema,
        .steps = steps},
       {.groups = groups,
        .options = options,
        .lr = lr,
        .grad_norm = grad_norm,
        .max_norm = max_norm,
        .grad_scale = grad_scale,
        .found_inf = found_inf,
        .write_grads = write_grads,
        .seed = seed});
}

void run_step(c10::string_view algorithm, const Lists& lists, const Settings& settings) {
  static const auto op = find_op<decltype(step_<run_step>)>("optim_step_kernel_");
  const auto& [params, grads, states, scales, remainders, ema, steps] = lists;
  op.call(algorithm, params, grads, states[0], states[1], states[2], scales[0], scales[1], scales[2], remainders, ema,
          steps, settings.groups, settings.options, settings.lr, settings.grad_norm, settings.max_norm,
          settings.grad_scale, settings.found_inf, settings.write_grads, settings.seed);
}

void check_and_step(c10::string_view algorithm, const Lists& lists, const Settings& settings) {
  check(algorithm, lists, settings);
  run_step(algorithm, lists, settings);
}

template <class Device>
void step_kernel(c10::string_view algorithm, const Lists& lists, const Settings& settings) {
  step<Device>(algorithm_of(algorithm), lists, settings);
}

void no_step(c10::string_view, const Lists&, const Settings&) {}

Tensor grad_norm(TensorList grads) {
  static const auto op = find_op<Tensor(TensorList)>("optim_grad_norm_kernel");
  TORCH_CHECK_VALUE(!grads.empty(), "optim_grad_norm(): expected at least one gradient, got none");
  check_gradients("optim_grad_norm", grads);
  return op.call(grads);
}

void clip_grads_(TensorList grads, const Tensor& grad_norm, double max_norm) {
  static const auto op = find_op<decltype(clip_grads_)>("optim_clip_grads_kernel_");
  if (grads.empty()) return;
  check_norm("optim_clip_grads_", grad_norm, grads[0]);
  check_gradients("optim_clip_grads_", grads);
  op.call(grads, grad_norm, max_norm);
}

// The ops for tensors without data, for tracing.
Tensor norm_meta(TensorList grads) {
  bool wide = false;
  for (const Tensor& grad : grads) wide = wide || c10::toRealValueType(grad.scalar_type()) == at::kDouble;
  return at::empty({}, grads[0].options().dtype(wide ? at::kDouble : at::kFloat));
}

void clip_meta(TensorList, const Tensor&, double) {}

template <class Device>
void implement_kernels(torch::Library& m) {
  m.impl("optim_step_kernel_", step_<step_kernel<Device>>);
  m.impl("optim_grad_norm_kernel", norm<Device>);
  m.impl("optim_clip_grads_kernel_", clip_<Device>);
}

void implement_all(torch::Library& m) {
  m.impl("optim_step_", step_<check_and_step>);
  m.impl("optim_grad_norm", grad_norm);
  m.impl("optim_clip_grads_", clip_grads_);
}

void implement_meta(torch::Library& m) {
  for (const char* name : {"optim_step_", "optim_step_kernel_"}) m.impl(name, step_<no_step>);
  for (const char* name : {"optim_grad_norm", "optim_grad_norm_kernel"}) m.impl(name, norm_meta);
  for (const char* name : {"optim_clip_grads_", "optim_clip_grads_kernel_"}) m.impl(name, clip_meta);
}

// Defines an op and its kernels' op, named `name` and `kernel`.
void define(torch::Library& m, const std::string& name, const std::string& kernel, const std::string& arguments) {
  m.def((name + arguments).c_str());
  m.def((kernel + arguments).c_str());
}

}  // namespace
}  // namespace dlkit::optim

DLKIT_DEFINE_OPS(m) {
  dlkit::optim::define(
      m, "optim_step_", "optim_step_kernel_",
      "(str algorithm, Tensor(a!)[] params, Tensor(b!)[] grads, Tensor(c!)[] state1, Tensor(d!)[] state2, "
      "Tensor(e!)[] state3, Tensor(f!)[] scales1, Tensor(g!)[] scales2, Tensor(h!)[] scales3, "
      "Tensor(i!)[] remainders, Tensor(j!)[] ema, Tensor(k!)[] steps, int[] groups, float[] options, Tensor[] lr, "
      "Tensor? grad_norm, float max_norm, Tensor? grad_scale, Tensor? found_inf, bool write_grads, int? seed) -> ()");
  dlkit::optim::define(m, "optim_grad_norm", "optim_grad_norm_kernel", "(Tensor[] grads) -> Tensor");
  dlkit::optim::define(m, "optim_clip_grads_", "optim_clip_grads_kernel_",
                       "(Tensor(a!)[] grads, Tensor grad_norm, float max_norm) -> ()");
  m.def("optim_options() -> str[]", [] {
    return std::vector<std::string>(std::begin(dlkit::optim::kOptionNames), std::end(dlkit::optim::kOptionNames));
  });
  m.class_<dlkit::optim::Versions>("OptimVersions")
      .def(torch::init<>())
      .def("trust", &dlkit::optim::Versions::trust)
      .def("changed", &dlkit::optim::Versions::changed)
      .def("clear", &dlkit::optim::Versions::clear);
  m.class_<dlkit::optim::Plan>("OptimPlan")
      .def(torch::init<c10::intrusive_ptr<dlkit::optim::Versions>>())
      .def("add", &dlkit::optim::Plan::add)
      .def("watch", &dlkit::optim::Plan::watch)
      .def("gather", &dlkit::optim::Plan::gather)
      .def("idle", &dlkit::optim::Plan::idle)
      .def("written", &dlkit::optim::Plan::written)
      .def("norms", &dlkit::optim::Plan::norms)
      .def("step", &dlkit::optim::Plan::step)
      .def("step_default", &dlkit::optim::Plan::step_default)
      .def("release", &dlkit::optim::Plan::release);
}

DLKIT_IMPLEMENT_KERNELS(dlkit::optim::implement_kernels)
DLKIT_IMPLEMENT_OPS(CompositeExplicitAutograd, m) { dlkit::optim::implement_all(m); }
DLKIT_IMPLEMENT_OPS(Meta, m) { dlkit::optim::implement_meta(m); }
