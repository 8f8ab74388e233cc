// The optimizers as torch ops, which change lists of tensors in place, and Plan, which keeps an optimizer's lists
// between steps so that a step costs Python nothing per parameter. An op checks all it is given before it writes
// anything.
#include "../glue/op.h"

#include <ATen/MemoryOverlap.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/view_as_real.h>
#include <Python.h>  // before the others, as it asks for
#include <c10/util/strides.h>
#include <torch/custom_class.h>

#include <atomic>
#include <cmath>
#include <deque>
#include <unordered_map>
#include <unordered_set>

#include "kernel.h"

namespace dlkit::optim {
namespace {

using at::Tensor;
using at::TensorList;

#if defined(DLKIT_WITH_CUDA) || defined(DLKIT_CUDA_ON_CPU)
void run(const CudaDevice& device, const Step& op) { step_cuda(op, device.stream()); }
void run(const CudaDevice& device, const Norm& op) { norm_cuda(op, device.stream()); }
void run(const CudaDevice& device, const Clip& op) { clip_cuda(op, device.stream()); }
int64_t partials(const CudaDevice&, const Norm& op) { return norm_partials_cuda(op); }
#endif
#if !defined(DLKIT_CUDA_ON_CPU)
void run(const CpuDevice&, const Step& op) { step_cpu(op); }
void run(const CpuDevice&, const Norm& op) { norm_cpu(op); }
void run(const CpuDevice&, const Clip& op) { clip_cpu(op); }
int64_t partials(const CpuDevice&, const Norm& op) { return norm_partials_cpu(op); }
#endif

Algorithm algorithm_of(c10::string_view name) {
  if (name == "adam") return Algorithm::Adam;
  if (name == "sgd") return Algorithm::Sgd;
  TORCH_CHECK_VALUE(name == "rmsprop", "optim_step_(): expected algorithm of adam, sgd or rmsprop, got ", name);
  return Algorithm::RmsProp;
}

// One row of `options` a group; dlkit/optim names the columns in the same order.
constexpr int64_t kOptions = 14;

// Without a seed nothing is rounded stochastically.
Group group_of(const double* row, const float* lr_pointer, bool has_seed) {
  return {row[0],
          row[1],
          row[2],
          row[3],
          row[4],
          row[5],
          row[6],
          row[7],
          row[8],
          row[9] != 0,
          row[10] != 0,
          row[11] != 0,
          has_seed && row[12] != 0,
          has_seed ? int32_t(row[13]) : 0,
          lr_pointer};
}

// Everything that belongs to the tensors of a step. A list is empty where the step has no such array.
struct Lists {
  TensorList params, grads, states[kStates], scales[kStates], remainders, ema, steps;
};

bool is_real_or_complex(at::ScalarType type) {
  return is_supported(type) || type == at::kComplexFloat || type == at::kComplexDouble;
}

void check_tensor(const char* list, size_t i, const Tensor& tensor, const Tensor& param, at::ScalarType type) {
  TORCH_CHECK(tensor.defined(), "optim_step_(): expected ", list, "[", i, "] to be a tensor, got None");
  TORCH_CHECK(tensor.layout() == at::kStrided, "optim_step_(): expected a dense ", list, "[", i, "], got ",
              tensor.layout());
  TORCH_CHECK(tensor.device() == param.device(), "optim_step_(): expected ", list, "[", i, "] on ", param.device(),
              " (where params[", i, "] is), got ", tensor.device());
  TORCH_CHECK(tensor.scalar_type() == type, "optim_step_(): expected ", list, "[", i, "] of ", type, " (params[", i,
              "] is ", param.scalar_type(), "), got ", tensor.scalar_type());
}

void check_like(const char* list, size_t i, const Tensor& tensor, const Tensor& param, at::ScalarType type) {
  check_tensor(list, i, tensor, param, type);
  TORCH_CHECK(tensor.sizes() == param.sizes(), "optim_step_(): expected ", list, "[", i, "] of shape ", param.sizes(),
              " (that of params[", i, "]), got ", tensor.sizes());
}

// The gradient's own type where the kernels, or a copy, can serve it; else the parameter's.
at::ScalarType gradient_type(const Tensor& grad, at::ScalarType param) {
  const at::ScalarType type = grad.scalar_type();
  if (type == param) return type;
  return is_real_or_complex(type) && c10::isComplexType(type) == c10::isComplexType(param) ? type : param;
}

// What an average of `type`'s values is kept in.
at::ScalarType average_type(at::ScalarType type) {
  return type == at::kBFloat16 || type == at::kHalf ? at::kFloat : type;
}

bool state_type_serves(at::ScalarType state, at::ScalarType param) {
  if (state == param) return true;
  if (param == at::kDouble || c10::isComplexType(param)) return false;
  return state == at::kFloat || state == at::kBFloat16 || state == at::kByte;
}

constexpr const char* kStateNames[kStates] = {"state1", "state2", "state3"};
constexpr const char* kScaleNames[kStates] = {"scales1", "scales2", "scales3"};

// What is written must hold each element once. An expanded one would be copied, and the copy back would raise too late.
void check_overlap(const char* list, size_t i, const Tensor& tensor) {
  if (tensor.is_contiguous()) return;
  TORCH_CHECK(tensor.is_non_overlapping_and_dense() || at::has_internal_overlap(tensor) != at::MemOverlap::Yes,
              "optim_step_(): expected ", list, "[", i,
              "] without elements that share memory; clone() it first; got strides ", tensor.strides(), " of shape ",
              tensor.sizes());
}

void check(Algorithm algorithm, const Lists& lists, at::IntArrayRef groups, int64_t group_count) {
  const size_t count = lists.params.size();
  const auto check_length = [&](const char* name, size_t length, bool optional) {
    TORCH_CHECK(length == count || (optional && length == 0), "optim_step_(): expected ", count, " tensors in ", name,
                " (as many as in params), got ", length);
  };
  check_length("grads", lists.grads.size(), false);
  check_length("groups", groups.size(), false);
  check_length("remainders", lists.remainders.size(), true);
  check_length("ema", lists.ema.size(), true);
  check_length("steps", lists.steps.size(), algorithm != Algorithm::Adam);
  const bool coded = count > 0 && !lists.states[0].empty() && lists.states[0][0].scalar_type() == at::kByte;
  for (int s = 0; s < kStates; ++s) {
    const bool needed = algorithm == Algorithm::Adam ? s < 2 : algorithm == Algorithm::RmsProp && s == 0;
    check_length(kStateNames[s], lists.states[s].size(), !needed);
    check_length(kScaleNames[s], lists.scales[s].size(), !coded || lists.states[s].empty());
  }
  for (size_t i = 0; i < count; ++i) {
    const Tensor& param = lists.params[i];
    const at::ScalarType type = param.scalar_type();
    TORCH_CHECK(is_real_or_complex(type), "optim_step_(): expected params[", i, "] of a floating or complex type, got ",
                type);
    check_tensor("params", i, param, lists.params[0], type);
    check_overlap("params", i, param);
    check_like("grads", i, lists.grads[i], param, gradient_type(lists.grads[i], type));
    TORCH_CHECK(groups[i] >= 0 && groups[i] < group_count, "optim_step_(): expected groups[", i, "] below ",
                group_count, ", got ", groups[i]);
    if (!lists.states[0].empty()) {
      const at::ScalarType state = lists.states[0][i].scalar_type();
      TORCH_CHECK(state_type_serves(state, type), "optim_step_(): expected state1[", i, "] of a type that goes with ",
                  type, ", got ", state);
      for (int s = 0; s < kStates; ++s) {
        if (lists.states[s].empty()) continue;
        check_like(kStateNames[s], i, lists.states[s][i], param, state);
        if (state != at::kByte) continue;
        TORCH_CHECK(!lists.scales[s].empty(), "optim_step_(): expected ", kScaleNames[s],
                    " with 8-bit states, got none");
        check_tensor(kScaleNames[s], i, lists.scales[s][i], param, at::kFloat);
        const int64_t blocks = (param.numel() + kBlock - 1) / kBlock;
        TORCH_CHECK(lists.scales[s][i].numel() == blocks && lists.scales[s][i].is_contiguous(),
                    "optim_step_(): expected ", kScaleNames[s], "[", i, "] contiguous, of ", blocks, " elements, got ",
                    lists.scales[s][i].sizes());
      }
    }
    if (!lists.remainders.empty()) {
      TORCH_CHECK(type == at::kBFloat16 || type == at::kHalf, "optim_step_(): expected params[", i,
                  "] of BFloat16 or Half with a remainder, got ", type);
      // Its bits may travel as a type that tools of checkpoints and communication know.
      check_like("remainders", i, lists.remainders[i], param,
                 lists.remainders[i].scalar_type() == type ? type : at::kShort);
    }
    if (!lists.ema.empty()) check_like("ema", i, lists.ema[i], param, average_type(type));
    if (!lists.steps.empty()) {
      const Tensor& step = lists.steps[i];
      TORCH_CHECK(step.defined() && step.numel() == 1 &&
                      (step.scalar_type() == at::kFloat || step.scalar_type() == at::kDouble),
                  "optim_step_(): expected steps[", i, "] of one Float or Double");
      TORCH_CHECK(step.device() == param.device() || step.is_cpu(), "optim_step_(): expected steps[", i, "] on ",
                  param.device(), " or the CPU, got ", step.device());
    }
  }
}

// Addresses of a parameter's arrays in one common layout: the parameter's own strides where it is dense. What lies
// otherwise is copied, and copied back by finish().
class Arranger {
 public:
  // Of the arrays that follow, until the next call. 8-bit states want their elements in logical order: a scale belongs
  // to 256 elements of that order, so that a checkpoint means the same in every memory format.
  void begin(const Tensor& param, bool logical_order) {
    param_ = &as_real(param);
    contiguous_ = logical_order || param_->is_contiguous();
    if (contiguous_) return;
    strides_ = param_->is_non_overlapping_and_dense() ? at::DimVector(param_->strides())
                                                      : c10::contiguous_strides(param_->sizes());
  }
  int64_t numel() const { return param_->numel(); }
  at::ScalarType type() const { return param_->scalar_type(); }

  // In the type `as`, where one is given.
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

// autograd must notice that what it may have saved has changed.
void mark_changed(TensorList tensors) {
  for (const Tensor& tensor : tensors) {
    if (!tensor.is_inference()) tensor.unsafeGetTensorImpl()->bump_version();
  }
}

double read(const Tensor& scalar) {
  return scalar.scalar_type() == at::kDouble ? *scalar.const_data_ptr<double>()
                                             : double(*scalar.const_data_ptr<float>());
}

const float* float_pointer(const char* name, const OptionalTensor& scalar, const Tensor& param) {
  if (!has(scalar)) return nullptr;
  TORCH_CHECK(scalar->numel() == 1 && scalar->scalar_type() == at::kFloat && scalar->device() == param.device(),
              "optim_step_(): expected ", name, " of one Float on ", param.device(), ", got ", scalar->scalar_type(),
              " ", scalar->sizes(), " on ", scalar->device());
  return scalar->const_data_ptr<float>();
}

struct Settings {
  at::IntArrayRef groups;
  at::ArrayRef<double> options;
  TensorList lr;
  OptionalTensor grad_norm;
  double max_norm;
  OptionalTensor grad_scale, found_inf;
  bool write_grads;
  std::optional<int64_t> seed;
};

// Host counters: one more step, and Adam's bias corrections, computed once for tensors in a row that agree.
class Counter {
 public:
  void advance(const Tensor& step, const Group& group, optim::Tensor& tensor) {
    double t = read(step) + 1;
    if (step.scalar_type() == at::kDouble) {
      *step.mutable_data_ptr<double>() = t;
    } else {
      t = *step.mutable_data_ptr<float>() = float(t);  // stays at 2^24, as in torch
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
void step_lists(Algorithm algorithm, const Lists& lists, const Settings& settings) {
  constexpr bool kHost = std::is_same_v<Device, CpuDevice>;
  const size_t count = lists.params.size();
  const int64_t group_count = int64_t(settings.options.size()) / kOptions;
  TORCH_CHECK(group_count * kOptions == int64_t(settings.options.size()), "optim_step_(): expected ", kOptions,
              " options a group, got ", settings.options.size());
  TORCH_CHECK(settings.lr.empty() || int64_t(settings.lr.size()) == group_count, "optim_step_(): expected lr of ",
              group_count, " tensors (one a group) or none, got ", settings.lr.size());
  check(algorithm, lists, settings.groups, group_count);
  for (size_t i = 0; settings.write_grads && i < count; ++i) check_overlap("grads", i, lists.grads[i]);
  if (count == 0) return;
  const Tensor& first = lists.params[0];
  const Device device(first);
  std::vector<Group> groups;
  groups.reserve(group_count);
  for (int64_t g = 0; g < group_count; ++g) {
    groups.push_back(group_of(settings.options.data() + g * kOptions,
                              settings.lr.empty() ? nullptr : float_pointer("lr", settings.lr[g], first),
                              settings.seed.has_value()));
  }
  optim::Step op{};
  op.grad_scale = float_pointer("grad_scale", settings.grad_scale, first);
  op.found_inf = float_pointer("found_inf", settings.found_inf, first);
  if (has(settings.grad_norm)) {
    const Tensor& norm = *settings.grad_norm;
    TORCH_CHECK(norm.numel() == 1 && (norm.scalar_type() == at::kFloat || norm.scalar_type() == at::kDouble) &&
                    norm.device() == first.device(),
                "optim_step_(): expected grad_norm of one Float or Double on ", first.device(), ", got ",
                norm.scalar_type(), " ", norm.sizes(), " on ", norm.device());
    op.grad_norm = norm.const_data_ptr();
    op.norm_type = dtype_of(norm.scalar_type());
  }

  const auto on_host = [&](const Tensor& step) { return kHost || step.device() != first.device(); };
  if (op.found_inf != nullptr && !lists.steps.empty() && on_host(lists.steps[0])) {
    // Host counters need the answer here; with counters on the device (fused=True, capturable=True) nothing waits.
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
    const at::ScalarType grad_type = c10::toRealValueType(lists.grads[i].scalar_type());
    std::optional<at::ScalarType> as;
    if (grad_type != arranger.type() && (grad_type == at::kDouble || arranger.type() == at::kDouble)) {
      as = arranger.type() == at::kDouble ? at::kDouble : at::kFloat;  // not 16 bits, which would round it more
    }
    tensor.grad = arranger.place(lists.grads[i], settings.write_grads, as);
    tensor.grad_dtype = dtype_of(as.value_or(grad_type));
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
      tensor.step_type = dtype_of(lists.steps[i].scalar_type());
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
  if (settings.write_grads) mark_changed(lists.grads);  // nothing saves states
}

template <class Device>
void step_(c10::string_view algorithm, TensorList params, TensorList grads, TensorList state1, TensorList state2,
           TensorList state3, TensorList scales1, TensorList scales2, TensorList scales3, TensorList remainders,
           TensorList ema, TensorList steps, at::IntArrayRef groups, at::ArrayRef<double> options, TensorList lr,
           const OptionalTensor& grad_norm, double max_norm, const OptionalTensor& grad_scale,
           const OptionalTensor& found_inf, bool write_grads, std::optional<int64_t> seed) {
  step_lists<Device>(algorithm_of(algorithm),
                     {params, grads, {state1, state2, state3}, {scales1, scales2, scales3}, remainders, ema, steps},
                     {groups, options, lr, grad_norm, max_norm, grad_scale, found_inf, write_grads, seed});
}

// Arrays of gradients, made dense where they are not.
std::vector<Gradient> gradients(const char* op, TensorList grads, Arranger& arranger, bool changes) {
  std::vector<Gradient> result;
  result.reserve(grads.size());
  for (size_t i = 0; i < grads.size(); ++i) {
    const Tensor& grad = grads[i];
    TORCH_CHECK(grad.layout() == at::kStrided && is_real_or_complex(grad.scalar_type()), op, "(): expected grads[", i,
                "] dense, of a floating or complex type, got ", grad.layout(), " ", grad.scalar_type());
    TORCH_CHECK(grad.device() == grads[0].device(), op, "(): expected grads[", i, "] on ", grads[0].device(),
                " (where grads[0] is), got ", grad.device());
    arranger.begin(grad, false);
    void* data = arranger.place(grad, changes);
    result.push_back({data, arranger.numel(), dtype_of(arranger.type())});
  }
  return result;
}

template <class Device>
Tensor norm(TensorList grads) {
  TORCH_CHECK_VALUE(!grads.empty(), "optim_grad_norm(): expected at least one gradient, got none");
  Arranger arranger;
  const std::vector<Gradient> arrays = gradients("optim_grad_norm", grads, arranger, false);
  const std::vector<int64_t> first_block = first_blocks(arrays);
  bool wide = false;
  for (const Gradient& array : arrays) wide = wide || array.dtype == DType::F64;
  const auto options = at::TensorOptions().device(grads[0].device());
  const Tensor result = at::empty({}, options.dtype(wide ? at::kDouble : at::kFloat));
  const Device device(grads[0]);
  Norm op{arrays.data(), first_block.data(),        int64_t(arrays.size()),
          nullptr,       result.mutable_data_ptr(), wide ? DType::F64 : DType::F32};
  const Tensor sums = at::empty({partials(device, op)}, options.dtype(at::kDouble));
  op.partials = sums.mutable_data_ptr<double>();
  run(device, op);
  return result;
}

template <class Device>
void clip_(TensorList grads, const Tensor& grad_norm, double max_norm) {
  if (grads.empty()) return;
  TORCH_CHECK(grad_norm.numel() == 1 &&
                  (grad_norm.scalar_type() == at::kFloat || grad_norm.scalar_type() == at::kDouble) &&
                  grad_norm.device() == grads[0].device(),
              "optim_clip_grads_(): expected grad_norm of one Float or Double on ", grads[0].device(), ", got ",
              grad_norm.scalar_type(), " ", grad_norm.sizes(), " on ", grad_norm.device());
  Arranger arranger;
  const std::vector<Gradient> arrays = gradients("optim_clip_grads_", grads, arranger, true);
  const std::vector<int64_t> first_block = first_blocks(arrays);
  run(Device(grads[0]), Clip{arrays.data(), first_block.data(), int64_t(arrays.size()), grad_norm.const_data_ptr(),
                             dtype_of(grad_norm.scalar_type()), max_norm});
  arranger.finish();
  mark_changed(grads);
}

Tensor norm_meta(TensorList grads) {
  bool wide = false;
  for (const Tensor& grad : grads) wide = wide || c10::toRealValueType(grad.scalar_type()) == at::kDouble;
  return at::empty({}, grads[0].options().dtype(wide ? at::kDouble : at::kFloat));
}

void step_meta(c10::string_view, TensorList, TensorList, TensorList, TensorList, TensorList, TensorList, TensorList,
               TensorList, TensorList, TensorList, TensorList, at::IntArrayRef, at::ArrayRef<double>, TensorList,
               const OptionalTensor&, double, const OptionalTensor&, const OptionalTensor&, bool,
               std::optional<int64_t>) {}

void clip_meta(TensorList, const Tensor&, double) {}

// Tensors that something else holds: no reference is counted. Safe to use only while that holds them.
class Unowned {
 public:
  Unowned() = default;
  explicit Unowned(const std::vector<Tensor>& tensors) {
    tensors_.reserve(tensors.size());
    for (const Tensor& tensor : tensors) add(tensor);
  }
  Unowned(Unowned&&) = default;
  Unowned& operator=(Unowned&& other) noexcept {
    std::swap(tensors_, other.tensors_);
    return *this;
  }
  ~Unowned() { clear(); }
  void clear() {
    for (Tensor& tensor : tensors_) c10::MaybeOwnedTraits<Tensor>::destroyBorrow(tensor);
    tensors_.clear();
  }
  void reserve(size_t count) { tensors_.reserve(count); }
  void add(const Tensor& tensor) { tensors_.push_back(c10::MaybeOwnedTraits<Tensor>::createBorrow(tensor)); }
  void replace(size_t i, const Tensor& tensor) {
    c10::MaybeOwnedTraits<Tensor>::destroyBorrow(tensors_[i]);
    tensors_[i] = c10::MaybeOwnedTraits<Tensor>::createBorrow(tensor);
  }
  bool empty() const { return tensors_.empty(); }
  size_t size() const { return tensors_.size(); }
  const Tensor& operator[](size_t i) const { return tensors_[i]; }
  auto begin() const { return tensors_.begin(); }
  auto end() const { return tensors_.end(); }
  operator TensorList() const { return tensors_; }

 private:
  std::vector<Tensor> tensors_;
};

// The version of each parameter with a remainder as the last step left it. Every change in place that autograd sees
// counts a tensor's version up. An optimizer keeps one of these for all its plans.
class Versions : public torch::CustomClassHolder {
 public:
  static constexpr int64_t kUnknown = -1;
  static int64_t of(const Tensor& param) { return param.is_inference() ? kUnknown : int64_t(param._version()); }
  int64_t& at(const Tensor& param) {
    return versions_.emplace(param.unsafeGetTensorImpl(), kUnknown).first->second;  // a map's values stay in place
  }
  void trust(const std::vector<Tensor>& params) {
    for (const Tensor& param : params) at(param) = of(param);
  }
  std::vector<bool> changed(const std::vector<Tensor>& params) {
    std::vector<bool> result;
    for (const Tensor& param : params) result.push_back(is_changed(at(param), param));
    return result;
  }
  static bool is_changed(int64_t seen, const Tensor& param) { return seen != kUnknown && seen != of(param); }
  void clear() {
    for (auto& [param, version] : versions_) version = kUnknown;
  }

 private:
  std::unordered_map<const at::TensorImpl*, int64_t> versions_;
};

// An optimizer's tensors between steps. A run is what one op can serve: one device, the same arrays in every tensor, no
// two parameters that overlap. The optimizer's groups and state hold the tensors; dlkit._C.holds() says before each
// step whether they still do.
class Plan : public torch::CustomClassHolder {
 public:
  explicit Plan(c10::intrusive_ptr<Versions> versions) : versions_(std::move(versions)) {}

  void add(std::string algorithm, const std::vector<Tensor>& params, const std::vector<std::vector<Tensor>>& states,
           const std::vector<std::vector<Tensor>>& scales, const std::vector<Tensor>& remainders,
           const std::vector<Tensor>& ema, const std::vector<Tensor>& steps, std::vector<int64_t> groups,
           std::vector<std::string> labels) {
    Run run;
    run.algorithm = std::move(algorithm);
    run.params = Unowned(params);
    for (int s = 0; s < kStates; ++s) {
      run.states[s] = Unowned(states.at(s));
      run.scales[s] = Unowned(scales.at(s));
    }
    run.remainders = Unowned(remainders);
    run.ema = Unowned(ema);
    run.steps = Unowned(steps);
    run.groups = std::move(groups);
    run.labels = std::move(labels);
    if (!remainders.empty()) {
      for (const Tensor& param : params) run.versions.push_back(&versions_->at(param));
    }
    runs_.push_back(std::move(run));
  }

  // Parameters that have no state yet, since they had no gradient.
  void watch(const std::vector<Tensor>& params) { stateless_ = Unowned(params); }

  // Takes hold of the gradients, or of those given, one for each parameter in the order of add(). 0: ready; 1: a
  // parameter without state has a gradient; 2: a gradient is not dense.
  int64_t gather(const std::optional<std::vector<std::optional<Tensor>>>& given) {
    const Turn turn(busy_);
    return gather_all(given);
  }

  int64_t gather_all(const std::optional<std::vector<std::optional<Tensor>>>& given) {
    const Interpreter interpreter;
    for (const Tensor& param : stateless_) {
      if (param.grad().defined()) return 1;
    }
    size_t next = 0;
    idle_.clear();
    for (Run& run : runs_) {
      const int64_t first = int64_t(next);
      run.let_go();
      run.grads.reserve(run.params.size());
      run.all = true;
      for (size_t i = 0; i < run.params.size(); ++i, ++next) {
        const Tensor& param = run.params[i];
        // Held, since other threads run during the step.
        const Tensor& held = run.keep(given ? or_undefined((*given)[next]) : param.grad());
        const bool lazy = held.defined() && (held.is_conj() || held.is_neg());
        if (lazy) run.resolved.emplace_back(held, held.resolve_conj().resolve_neg());
        const Tensor& grad = lazy ? run.resolved.back().second : held;
        run.grads.add(grad);
        if (!grad.defined()) {
          run.all = false;
          if (!run.ema.empty()) idle_.push_back(first + int64_t(i));
          continue;
        }
        if (grad.layout() != at::kStrided) return release(2);
        if (grad.scalar_type() == param.scalar_type() && grad.device() == param.device() &&
            grad.sizes() == param.sizes()) {
          continue;
        }
        if (!is_real_or_complex(grad.scalar_type()) || grad.is_complex() != param.is_complex() ||
            grad.device() != param.device() || grad.sizes() != param.sizes()) {
          const std::string found = c10::str(grad.scalar_type(), " ", grad.sizes(), " on ", grad.device());
          release(0);
          TORCH_CHECK(false, "step(): expected the gradient of ", run.labels.at(i), " to be ", param.scalar_type(), " ",
                      param.sizes(), " on ", param.device(), " as the parameter is, got ", found);
        }
      }
      if (!run.all) select(run);
    }
    return 0;
  }

  // Those that gather() found without a gradient and that have an average, in the order of add().
  std::vector<int64_t> idle() const { return idle_; }

  // Which parameters with a remainder were written since the last step, counted over those that have one.
  std::vector<int64_t> written() const {
    std::vector<int64_t> result;
    int64_t next = 0;
    for (const Run& run : runs_) {
      for (size_t i = 0; i < run.versions.size(); ++i, ++next) {
        if (Versions::is_changed(*run.versions[i], run.params[i])) result.push_back(next);
      }
    }
    return result;
  }

  // The norm of all gradients on each device.
  std::vector<Tensor> norms() {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    static const auto op = find_op<Tensor(TensorList)>("optim_grad_norm");
    std::vector<std::vector<Tensor>> devices;
    for (const Run& run : runs_) {
      const auto& grads = run.active().grads;
      if (grads.empty()) continue;
      auto same = std::find_if(devices.begin(), devices.end(),
                               [&](const auto& list) { return list[0].device() == grads[0].device(); });
      if (same == devices.end()) same = devices.insert(devices.end(), std::vector<Tensor>());
      same->insert(same->end(), grads.begin(), grads.end());
    }
    std::vector<Tensor> result;
    for (const auto& grads : devices) result.push_back(op.call(grads));
    return result;
  }

  // Runs the ops, after gather() or, with `gather_first`, after gathering itself: a call from Python is 3 us. What that
  // returned, if not 0, is returned, with nothing done.
  int64_t step(bool gather_first, const std::vector<double>& options, const std::vector<Tensor>& lr,
               const OptionalTensor& grad_norm, double max_norm, const OptionalTensor& grad_scale,
               const OptionalTensor& found_inf, bool write_grads, std::optional<int64_t> seed) {
    const Turn turn(busy_);
    if (gather_first) {
      const int64_t status = gather_all(std::nullopt);
      if (status != 0) return status;
    }
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    static const auto op = find_op<decltype(step_meta)>("optim_step_");
    const int64_t group_count = int64_t(options.size()) / kOptions;
    try {
      if (write_grads) prepare_writing();
      if (runs_.size() > 1) {
        for (const Run& run : runs_)
          check(algorithm_of(run.algorithm), run.active().lists(), run.active().groups, group_count);
      }
      for (const Run& whole : runs_) {
        const Run& run = whole.active();
        if (run.params.empty()) continue;
        const auto here = [&](const OptionalTensor& scalar) {
          return has(scalar) ? OptionalTensor(scalar->to(run.params[0].device(), true)) : std::nullopt;
        };
        std::vector<Tensor> rates;
        for (const Tensor& rate : lr) rates.push_back(*here(rate));
        op.call(run.algorithm, run.params, run.grads, run.states[0], run.states[1], run.states[2], run.scales[0],
                run.scales[1], run.scales[2], run.remainders, run.ema, run.steps, run.groups, options, rates,
                here(grad_norm), max_norm, here(grad_scale), here(found_inf), write_grads, seed);
      }
    } catch (...) {
      release(0);
      throw;
    }
    if (write_grads) {
      for (const Run& run : runs_) {
        for (const auto& [held, resolved] : run.resolved) held.copy_(resolved);
      }
    }
    for (const Run& run : runs_) {
      for (size_t i = 0; i < run.versions.size(); ++i) *run.versions[i] = Versions::of(run.params[i]);
    }
    return release(0);
  }

  // step() of what is asked for most: each argument of a call from Python takes 0.2 us to convert.
  int64_t step_plainly(const std::vector<double>& options) {
    return step(true, options, {}, std::nullopt, 0, std::nullopt, std::nullopt, false, std::nullopt);
  }

  // Lets go of the gradients.
  int64_t release(int64_t status) {
    const Interpreter interpreter;
    for (Run& run : runs_) {
      run.let_go();
    }
    return status;
  }

 private:
  struct Run {
    std::string algorithm;
    Unowned params, grads, states[kStates], scales[kStates], remainders, ema, steps;
    std::deque<Tensor> kept;                         // the gradients, during a step
    std::deque<std::pair<Tensor, Tensor>> resolved;  // conjugate or negated views, and what the kernels take instead
    std::vector<int64_t> groups;
    std::vector<std::string> labels;  // what errors call the parameters
    std::vector<int64_t*> versions;   // with remainders: the parameters' in Versions
    bool all = true;                  // every parameter has a gradient
    std::unique_ptr<Run> selected;    // those that have one, where not all do
    const Run& active() const { return selected ? *selected : *this; }
    Run& active() { return selected ? *selected : *this; }
    void let_go() {
      selected.reset();
      grads.clear();
      kept.clear();
      resolved.clear();
    }
    const Tensor& keep(Tensor tensor) { return kept.emplace_back(std::move(tensor)); }
    Lists lists() const {
      return {params, grads, {states[0], states[1], states[2]}, {scales[0], scales[1], scales[2]}, remainders,
              ema,    steps};
    }
  };

  // Before gradients are written: those that cannot be raise, and one that two parameters share is written once.
  void prepare_writing() {
    std::unordered_set<const at::TensorImpl*> seen;
    for (Run& whole : runs_) {
      Run& run = whole.active();
      for (size_t i = 0; i < run.grads.size(); ++i) {
        const Tensor& grad = run.grads[i];
        TORCH_CHECK(
            at::has_internal_overlap(grad) != at::MemOverlap::Yes,
            "step(): expected gradients that can be written, with clip_gradients_in_place=True or a loss scale, "
            "got one whose elements share memory; use its contiguous() or clone()");
        if (!seen.insert(grad.unsafeGetTensorImpl()).second) run.grads.replace(i, run.keep(grad.clone()));
      }
    }
  }

  static void select(Run& run) {
    auto some = std::make_unique<Run>();
    some->algorithm = run.algorithm;
    for (size_t i = 0; i < run.params.size(); ++i) {
      if (!run.grads[i].defined()) continue;
      const auto pick = [i](Unowned& to, const Unowned& from) {
        if (!from.empty()) to.add(from[i]);
      };
      pick(some->params, run.params);
      some->grads.add(run.grads[i]);
      for (int s = 0; s < kStates; ++s) {
        pick(some->states[s], run.states[s]);
        pick(some->scales[s], run.scales[s]);
      }
      pick(some->remainders, run.remainders);
      pick(some->ema, run.ema);
      pick(some->steps, run.steps);
      some->groups.push_back(run.groups[i]);
    }
    run.selected = std::move(some);
  }

  // Calls of a custom class let other Python threads run. None may take a gradient away while it is taken hold of.
  class Interpreter {
   public:
    Interpreter() : state_(PyGILState_Ensure()) {}
    ~Interpreter() { PyGILState_Release(state_); }

   private:
    PyGILState_STATE state_;
  };

  // One thread at a time: a second one would change what the first is reading.
  class Turn {
   public:
    explicit Turn(std::atomic_flag& busy) : busy_(busy) {
      TORCH_CHECK(!busy.test_and_set(), "step(): expected one thread at a time, and another one is in this optimizer");
    }
    ~Turn() { busy_.clear(); }

   private:
    std::atomic_flag& busy_;
  };

  std::atomic_flag busy_;
  c10::intrusive_ptr<Versions> versions_;
  std::vector<Run> runs_;
  Unowned stateless_;
  std::vector<int64_t> idle_;
};

template <class Device>
void implement_kernels(torch::Library& m) {
  m.impl("optim_step_", step_<Device>);
  m.impl("optim_grad_norm", norm<Device>);
  m.impl("optim_clip_grads_", clip_<Device>);
}

}  // namespace
}  // namespace dlkit::optim

DLKIT_DEFINE_OPS(m) {
  m.def(
      "optim_step_(str algorithm, Tensor(a!)[] params, Tensor(b!)[] grads, Tensor(c!)[] state1, Tensor(d!)[] state2, "
      "Tensor(e!)[] state3, Tensor(f!)[] scales1, Tensor(g!)[] scales2, Tensor(h!)[] scales3, "
      "Tensor(i!)[] remainders, Tensor(j!)[] ema, Tensor(k!)[] steps, int[] groups, float[] options, Tensor[] lr, "
      "Tensor? grad_norm, float max_norm, Tensor? grad_scale, Tensor? found_inf, bool write_grads, int? seed) -> ()");
  m.def("optim_grad_norm(Tensor[] grads) -> Tensor");
  m.def("optim_clip_grads_(Tensor(a!)[] grads, Tensor grad_norm, float max_norm) -> ()");
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
      .def("step_plainly", &dlkit::optim::Plan::step_plainly)
      .def("release", &dlkit::optim::Plan::release);
}

DLKIT_IMPLEMENT_KERNELS(dlkit::optim::implement_kernels)

DLKIT_IMPLEMENT_OPS(Meta, m) {
  m.impl("optim_step_", dlkit::optim::step_meta);
  m.impl("optim_grad_norm", dlkit::optim::norm_meta);
  m.impl("optim_clip_grads_", dlkit::optim::clip_meta);
}
