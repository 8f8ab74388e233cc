// The arguments of an optimizer's step, and their checks, which are the same for every backend.
#pragma once

#include <ATen/MemoryOverlap.h>

#include "../glue/op.h"
#include "kernel.h"

namespace dlkit::optim {
namespace {

using at::Tensor;
using at::TensorList;

// The options of a group, in the order of a row of `options`; optim_options() gives it to Python.
#define DLKIT_OPTIM_OPTIONS(option)                                                                          \
  option(lr) option(weight_decay) option(eps) option(beta1) option(beta2) option(momentum) option(dampening) \
      option(alpha) option(ema_decay) option(decoupled_weight_decay) option(nesterov) option(maximize)       \
          option(stochastic_rounding) option(stochastic_states)
#define DLKIT_OPTIM_MEMBER(name) double name;
#define DLKIT_OPTIM_NAME(name) #name,

struct Options {
  DLKIT_OPTIM_OPTIONS(DLKIT_OPTIM_MEMBER)
};
constexpr const char* kOptionNames[] = {DLKIT_OPTIM_OPTIONS(DLKIT_OPTIM_NAME)};
constexpr int64_t kOptions = std::size(kOptionNames);
static_assert(sizeof(Options) == kOptions * sizeof(double));

// The lists of a step's tensors. A list is empty where the step has no such array.
struct Lists {
  TensorList params, grads, states[kStates], scales[kStates], remainders, ema, steps;
};

// The other arguments. Without a seed nothing is rounded stochastically.
struct Settings {
  at::IntArrayRef groups;        // of each tensor
  at::ArrayRef<double> options;  // of each group
  TensorList lr;                 // on the device, one a group, or none
  const OptionalTensor& grad_norm = kNone;
  double max_norm = 0;
  const OptionalTensor& grad_scale = kNone;
  const OptionalTensor& found_inf = kNone;
  bool write_grads = false;
  std::optional<int64_t> seed = std::nullopt;

  int64_t group_count() const { return int64_t(options.size()) / kOptions; }
  Options group(int64_t g) const {
    Options row;
    std::memcpy(&row, options.data() + g * kOptions, sizeof(Options));
    return row;
  }
};

Algorithm algorithm_of(c10::string_view name) {
  if (name == "adam") return Algorithm::Adam;
  if (name == "sgd") return Algorithm::Sgd;
  TORCH_CHECK_VALUE(name == "rmsprop", "optim_step_(): expected algorithm of adam, sgd or rmsprop, got ", name);
  return Algorithm::RmsProp;
}

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

// The gradient's own type where the kernels can read it or a copy of it; else the parameter's.
at::ScalarType gradient_type(const Tensor& grad, at::ScalarType param) {
  const at::ScalarType type = grad.scalar_type();
  if (type == param) return type;
  return is_real_or_complex(type) && c10::isComplexType(type) == c10::isComplexType(param) ? type : param;
}

// The type in which an average of `type`'s values is kept.
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

// A tensor that is written must hold each element once. An expanded one would be copied, and copying back would raise
// too late.
void check_overlap(const char* list, size_t i, const Tensor& tensor) {
  if (tensor.is_contiguous()) return;
  TORCH_CHECK(tensor.is_non_overlapping_and_dense() || at::has_internal_overlap(tensor) != at::MemOverlap::Yes,
              "optim_step_(): expected ", list, "[", i,
              "] without elements that share memory; clone() it first; got strides ", tensor.strides(), " of shape ",
              tensor.sizes());
}

void check_lists(Algorithm algorithm, const Lists& lists, at::IntArrayRef groups, int64_t group_count) {
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
      // Its bits may be stored as the parameter's type, which tools for checkpoints and communication know.
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

void check_float(const char* name, const OptionalTensor& scalar, const Tensor& param) {
  if (!has(scalar)) return;
  TORCH_CHECK(scalar->numel() == 1 && scalar->scalar_type() == at::kFloat && scalar->device() == param.device(),
              "optim_step_(): expected ", name, " of one Float on ", param.device(), ", got ", scalar->scalar_type(),
              " ", scalar->sizes(), " on ", scalar->device());
}

void check_norm(const char* op, const Tensor& norm, const Tensor& tensor) {
  TORCH_CHECK(norm.numel() == 1 && (norm.scalar_type() == at::kFloat || norm.scalar_type() == at::kDouble) &&
                  norm.device() == tensor.device(),
              op, "(): expected grad_norm of one Float or Double on ", tensor.device(), ", got ", norm.scalar_type(),
              " ", norm.sizes(), " on ", norm.device());
}

// Checks all arguments of a step before anything is written.
void check(c10::string_view algorithm, const Lists& lists, const Settings& settings) {
  const int64_t group_count = settings.group_count();
  TORCH_CHECK(group_count * kOptions == int64_t(settings.options.size()), "optim_step_(): expected ", kOptions,
              " options a group, got ", settings.options.size());
  TORCH_CHECK(settings.lr.empty() || int64_t(settings.lr.size()) == group_count, "optim_step_(): expected lr of ",
              group_count, " tensors (one a group) or none, got ", settings.lr.size());
  check_lists(algorithm_of(algorithm), lists, settings.groups, group_count);
  for (size_t i = 0; settings.write_grads && i < lists.grads.size(); ++i) check_overlap("grads", i, lists.grads[i]);
  if (lists.params.empty()) return;
  const Tensor& first = lists.params[0];
  for (const Tensor& rate : settings.lr) check_float("lr", rate, first);
  check_float("grad_scale", settings.grad_scale, first);
  check_float("found_inf", settings.found_inf, first);
  if (has(settings.grad_norm)) check_norm("optim_step_", *settings.grad_norm, first);
}

// Checks the gradients of a norm or a scaling.
void check_gradients(const char* op, TensorList grads) {
  for (size_t i = 0; i < grads.size(); ++i) {
    const Tensor& grad = grads[i];
    TORCH_CHECK(grad.layout() == at::kStrided && is_real_or_complex(grad.scalar_type()), op, "(): expected grads[", i,
                "] dense, of a floating or complex type, got ", grad.layout(), " ", grad.scalar_type());
    TORCH_CHECK(grad.device() == grads[0].device(), op, "(): expected grads[", i, "] on ", grads[0].device(),
                " (where grads[0] is), got ", grad.device());
  }
}

}  // namespace
}  // namespace dlkit::optim
