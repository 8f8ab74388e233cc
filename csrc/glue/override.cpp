// dlkit.override(): while it is on, dlkit's ops serve torch's own functions.
//
// Norms and dropouts are composite ops in torch, which have no kernel at the autograd keys of a device. While override
// is on they have one from this file at those keys, and at the device's own key for inference mode. It passes the call
// to dlkit's op, or declines and calls torch's composite function. Calls from C++ come here too, such as the dropout in
// attention that torch computes step by step. A declined call costs 0.01 us; a kernel in Python costs 0.6 us at least,
// and a TorchFunctionMode 0.9 us in every call of torch.
//
// It declines tensors that have no kernel, subclasses of Tensor, tracing (torch.compile keeps torch's ops), transforms
// of torch.func, forward-mode derivatives, and calls that dlkit's ops make themselves.
#include "override.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/alpha_dropout_compositeimplicitautograd_dispatch.h>
#include <ATen/ops/batch_norm_compositeimplicitautograd_dispatch.h>
#include <ATen/ops/cross_entropy_loss_compositeimplicitautograd_dispatch.h>
#include <ATen/ops/dropout_compositeimplicitautograd_dispatch.h>
#include <ATen/ops/feature_alpha_dropout_compositeimplicitautograd_dispatch.h>
#include <ATen/ops/feature_dropout_compositeimplicitautograd_dispatch.h>
#include <ATen/ops/group_norm_compositeimplicitautograd_dispatch.h>
#include <ATen/ops/instance_norm_compositeimplicitautograd_dispatch.h>
#include <ATen/ops/layer_norm_compositeimplicitautograd_dispatch.h>
#include <ATen/ops/rms_norm_compositeimplicitautograd_dispatch.h>

#include <atomic>
#include <memory>
#include <vector>

#include "autograd.h"
#include "torch_itself.h"

namespace dlkit {
namespace {

using at::Tensor;
using OptionalGenerator = std::optional<at::Generator>;

enum Function { LayerNorm, RmsNorm, BatchNorm, GroupNorm, InstanceNorm, Dropout, CrossEntropy, kFunctions };
constexpr struct {
  const char *name, *kernel;  // torch's function; the op that must have a kernel for the input
} kServed[kFunctions] = {
    {"layer_norm", "layer_norm_forward"},       {"rms_norm", "layer_norm_forward"},
    {"batch_norm", "batch_norm_forward"},       {"group_norm", "batch_norm_forward"},
    {"instance_norm", "batch_norm_forward"},    {"dropout", "dropout_forward"},
    {"cross_entropy", "cross_entropy_forward"},
};
std::atomic<int64_t> served[kFunctions], declined[kFunctions];

bool is_ordinary(const Tensor& input) {
  constexpr c10::DispatchKeySet odd{c10::DispatchKey::Python, c10::DispatchKey::Functionalize};
  return input.defined() && !input.key_set().has_any(odd) && !is_transformed() && !has_tangent(input);
}

template <class... Optionals>
bool serves(Function function, const Tensor& input, const Optionals&... others) {
  [[maybe_unused]] const auto has_odd = [](const OptionalTensor& t) { return has(t) && !is_ordinary(*t); };
  bool good = calls_of_torch_itself == 0 && is_ordinary(input) && !(has_odd(others) || ...);
  if (good) {
    static const std::vector<c10::OperatorHandle> kernels = [] {
      std::vector<c10::OperatorHandle> found;
      for (const auto& each : kServed) {
        const std::string op = std::string(DLKIT_STRING(DLKIT_LIBRARY)) + "::" + each.kernel;
        found.push_back(c10::Dispatcher::singleton().findSchemaOrThrow(op.c_str(), ""));
      }
      return found;
    }();
    good = has_kernel(kernels[function], input);
  }
  (good ? served : declined)[function].fetch_add(1, std::memory_order_relaxed);
  return good;
}

Tensor layer_norm(const Tensor& input, c10::SymIntArrayRef shape, const OptionalTensor& weight,
                  const OptionalTensor& bias, double eps, bool cudnn) {
  if (!serves(LayerNorm, input, weight, bias))
    return at::compositeimplicitautograd::layer_norm_symint(input, shape, weight, bias, eps, cudnn);
  static const auto op =
      find_op<Tensor(const Tensor&, c10::SymIntArrayRef, const OptionalTensor&, const OptionalTensor&, double)>(
          "layer_norm");
  const TorchItself inside;
  return op.call(input, shape, weight, bias, eps);
}

Tensor rms_norm(const Tensor& input, c10::SymIntArrayRef shape, const OptionalTensor& weight,
                std::optional<double> eps) {
  if (!serves(RmsNorm, input, weight)) return at::compositeimplicitautograd::rms_norm_symint(input, shape, weight, eps);
  static const auto op =
      find_op<Tensor(const Tensor&, c10::SymIntArrayRef, const OptionalTensor&, std::optional<double>)>("rms_norm");
  const TorchItself inside;
  return op.call(input, shape, weight, eps);
}

Tensor batch_norm(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                  const OptionalTensor& running_mean, const OptionalTensor& running_var, bool training, double momentum,
                  double eps, bool cudnn) {
  if (!serves(BatchNorm, input, weight, bias, running_mean, running_var))
    return at::compositeimplicitautograd::batch_norm(input, weight, bias, running_mean, running_var, training, momentum,
                                                     eps, cudnn);
  static const auto op =
      find_op<Tensor(const Tensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                     const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, bool, std::optional<double>,
                     double, int64_t, double)>("batch_norm");
  const TorchItself inside;
  return op.call(input, running_mean, running_var, weight, bias, {}, {}, training, momentum, eps, 0, 0);
}

Tensor group_norm(const Tensor& input, int64_t groups, const OptionalTensor& weight, const OptionalTensor& bias,
                  double eps, bool cudnn) {
  if (!serves(GroupNorm, input, weight, bias))
    return at::compositeimplicitautograd::group_norm(input, groups, weight, bias, eps, cudnn);
  static const auto op = find_op<Tensor(const Tensor&, c10::SymInt, const OptionalTensor&, const OptionalTensor&,
                                        double, const OptionalTensor&, int64_t, double)>("group_norm");
  const TorchItself inside;
  return op.call(input, groups, weight, bias, eps, {}, 0, 0);
}

Tensor instance_norm(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                     const OptionalTensor& running_mean, const OptionalTensor& running_var, bool use_input_stats,
                     double momentum, double eps, bool cudnn) {
  if (!serves(InstanceNorm, input, weight, bias, running_mean, running_var))
    return at::compositeimplicitautograd::instance_norm(input, weight, bias, running_mean, running_var, use_input_stats,
                                                        momentum, eps, cudnn);
  static const auto op =
      find_op<Tensor(const Tensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                     const OptionalTensor&, bool, double, double)>("instance_norm");
  const TorchItself inside;
  return op.call(input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps);
}

bool drops(const Tensor& input, double p, bool train) { return train && p > 0 && p <= 1 && serves(Dropout, input); }

// kChannels: the mask covers only the first two dimensions.
template <bool kChannels, bool kAlpha, Tensor (*kTorch)(const Tensor&, double, bool)>
Tensor dropout(const Tensor& input, double p, bool train) {
  if ((kChannels && input.dim() < 2) || !drops(input, p, train)) return kTorch(input, p, train);
  static const auto op =
      find_op<Tensor(const Tensor&, double, int64_t, bool, const OptionalGenerator&, const OptionalTensor&)>("dropout");
  const TorchItself inside;
  return op.call(input, p, kChannels ? 2 : -1, kAlpha, {}, {});
}

template <bool kChannels, bool kAlpha, Tensor& (*kTorch)(Tensor&, double, bool)>
Tensor& dropout_(Tensor& self, double p, bool train) {
  if ((kChannels && self.dim() < 2) || !drops(self, p, train)) return kTorch(self, p, train);
  static const auto op =
      find_op<void(Tensor&, double, int64_t, bool, const OptionalGenerator&, const OptionalTensor&)>("dropout_");
  const TorchItself inside;
  op.call(self, p, kChannels ? 2 : -1, kAlpha, {}, {});
  return self;
}

Tensor cross_entropy(const Tensor& input, const Tensor& target, const OptionalTensor& weight, int64_t reduction,
                     c10::SymInt ignore_index, double label_smoothing) {
  const auto by_torch = [&] {
    return at::compositeimplicitautograd::cross_entropy_loss_symint(input, target, weight, reduction, ignore_index,
                                                                    label_smoothing);
  };
  if (!is_ordinary(target) || !serves(CrossEntropy, input, weight)) return by_torch();
  static const auto op =
      find_op<std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const OptionalTensor&, int64_t, int64_t, double,
                                         double, double, bool, bool)>("cross_entropy");
  const TorchItself inside;
  try {
    const int64_t ignored = ignore_index.guard_int(__FILE__, __LINE__);
    return std::get<0>(op.call(input, target, weight, reduction, ignored, label_smoothing, 0, 0, false, false));
  } catch (const c10::Error&) {
    return by_torch();  // it raises as well, with the message its users know
  }
}

void implement(torch::Library& m) {
  m.impl("cross_entropy_loss", TORCH_FN(cross_entropy));
  m.impl("layer_norm", TORCH_FN(layer_norm));
  m.impl("rms_norm", TORCH_FN(rms_norm));
  m.impl("batch_norm", TORCH_FN(batch_norm));
  m.impl("group_norm", TORCH_FN(group_norm));
  m.impl("instance_norm", TORCH_FN(instance_norm));
  m.impl("dropout", TORCH_FN((dropout<false, false, at::compositeimplicitautograd::dropout>)));
  m.impl("dropout_", TORCH_FN((dropout_<false, false, at::compositeimplicitautograd::dropout_>)));
  m.impl("feature_dropout", TORCH_FN((dropout<true, false, at::compositeimplicitautograd::feature_dropout>)));
  m.impl("feature_dropout_", TORCH_FN((dropout_<true, false, at::compositeimplicitautograd::feature_dropout_>)));
  m.impl("alpha_dropout", TORCH_FN((dropout<false, true, at::compositeimplicitautograd::alpha_dropout>)));
  m.impl("alpha_dropout_", TORCH_FN((dropout_<false, true, at::compositeimplicitautograd::alpha_dropout_>)));
  m.impl("feature_alpha_dropout",
         TORCH_FN((dropout<true, true, at::compositeimplicitautograd::feature_alpha_dropout>)));
  m.impl("feature_alpha_dropout_",
         TORCH_FN((dropout_<true, true, at::compositeimplicitautograd::feature_alpha_dropout_>)));
}

// Destroying them removes the kernels.
std::vector<std::unique_ptr<torch::Library>> libraries;

void switch_on() {
  for (const auto key :
       {c10::DispatchKey::AutogradCPU, c10::DispatchKey::CPU, c10::DispatchKey::AutogradCUDA, c10::DispatchKey::CUDA}) {
    libraries.push_back(std::make_unique<torch::Library>(torch::Library::IMPL, "aten", key, __FILE__, __LINE__));
    implement(*libraries.back());
  }
}

}  // namespace

PyObject* override_torch(PyObject*, PyObject* on) {
  const bool wanted = PyObject_IsTrue(on) == 1;
  try {
    if (wanted && libraries.empty()) switch_on();
    if (!wanted) libraries.clear();
  } catch (const std::exception& error) {
    libraries.clear();
    return PyErr_Format(PyExc_RuntimeError, "dlkit.override(): %s", error.what());
  }
  Py_RETURN_NONE;
}

PyObject* override_calls(PyObject*, PyObject*) {
  PyObject* result = PyDict_New();
  for (int i = 0; result != nullptr && i < kFunctions; ++i) {
    PyObject* counts = Py_BuildValue("LL", static_cast<long long>(served[i]), static_cast<long long>(declined[i]));
    if (counts == nullptr || PyDict_SetItemString(result, kServed[i].name, counts) < 0) Py_CLEAR(result);
    Py_XDECREF(counts);
  }
  return result;
}

}  // namespace dlkit
