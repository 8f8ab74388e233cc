// The checks that every op makes of its tensor arguments first: one device, one layout, and below autograd the dtypes
// that its kernels read. Ops are registered through this header, which means that no argument can be forgotten.
// Messages name an argument as the op's schema does.
#pragma once

#include <array>
#include <string>
#include <vector>

#include "op.h"

namespace dlkit {

// Public: a user's call, which may still go to torch's own ops. Kernel: the next step takes the tensors' addresses.
enum class Level { Public, Kernel };

inline const at::Tensor* tensor_or_null(const at::Tensor& tensor) { return tensor.defined() ? &tensor : nullptr; }
inline const at::Tensor* tensor_or_null(const OptionalTensor& tensor) { return has(tensor) ? &*tensor : nullptr; }
template <class Other>
const at::Tensor* tensor_or_null(const Other&) {
  return nullptr;
}

// The role of an argument, derived from its name in the schema.
enum class Role {
  Other,      // only the device is checked: a statistic, a sum
  LikeInput,  // of the input's dtype, where a kernel reads it
  Residual,   // the same; in a user's call a number on the CPU too, as in an addition
  Parameter,  // of the input's dtype or fp32, where a kernel reads it
  Counter,    // one int64 where a kernel reads it; in a user's call of any type and on any device
  RngState    // (seed, offset) of a random stream: int64, on the CPU or on the input's device
};

struct Arguments {
  std::vector<std::string> names;
  std::vector<Role> roles;
  size_t input = 0;  // the argument whose device and dtype the others must have

  explicit Arguments(const char* op) {
    const std::string qualified = std::string(DLKIT_STRING(DLKIT_LIBRARY)) + "::" + op;
    const auto handle = c10::Dispatcher::singleton().findSchemaOrThrow(qualified.c_str(), "");
    for (const c10::Argument& argument : handle.schema().arguments()) {
      const std::string& name = argument.name();
      if (name == "input") input = names.size();
      const auto is = [&](auto... options) { return ((name == options) || ...); };
      roles.push_back(is("rng_state", "stream")                                 ? Role::RngState
                      : is("num_batches_tracked")                               ? Role::Counter
                      : is("residual")                                          ? Role::Residual
                      : is("weight", "bias")                                    ? Role::Parameter
                      : is("input", "grad_output", "grad_sum", "y_or_residual") ? Role::LikeInput
                                                                                : Role::Other);
      names.push_back(name);
    }
  }
};

template <Level kLevel>
void check_argument(const char* op, const Arguments& arguments, size_t i, const at::Tensor& tensor,
                    const at::Tensor& input) {
  const char* const name = arguments.names[i].c_str();
  const Role role = arguments.roles[i];
  if (tensor.device() != input.device()) {
    const bool allowed =
        role == Role::RngState
            ? tensor.device().is_cpu()
            : kLevel == Level::Public &&
                  (role == Role::Counter || (role == Role::Residual && tensor.dim() == 0 && tensor.is_cpu()));
    TORCH_CHECK(allowed, op, "(): expected ", name, " on ", input.device(), " (the device of ",
                arguments.names[arguments.input], "), got ", tensor.device());
  }
  TORCH_CHECK(tensor.layout() == at::kStrided || input.layout() != at::kStrided, op, "(): expected a strided ", name,
              " (as ", arguments.names[arguments.input], " is), got one of layout ", tensor.layout());
  const at::ScalarType type = tensor.scalar_type(), wanted = input.scalar_type();
  if (role == Role::RngState) {
    TORCH_CHECK(type == at::kLong && tensor.dim() == 1, op, "(): expected ", name,
                " of one dimension and of Long, got ", type, " ", tensor.sym_sizes());
  }
  if constexpr (kLevel == Level::Kernel) {
    TORCH_CHECK(role != Role::Counter || (type == at::kLong && tensor.dim() == 0), op, "(): expected ", name,
                " to be one Long, got ", type, " ", tensor.sym_sizes());
    TORCH_CHECK((role != Role::LikeInput && role != Role::Residual) || type == wanted, op, "(): expected ", name,
                " of ", wanted, " (the type of input), got ", type);
    TORCH_CHECK(role != Role::Parameter || type == wanted || (type == at::kFloat && wanted != at::kDouble), op,
                "(): expected ", name, " of ", wanted, " (the type of input) or Float, got ", type);
  }
}

// The ops whose torch formulas accept nested tensors.
inline bool takes_nested(const std::string& op, bool strided) {
  for (const char* name : {"layer_norm", "add_layer_norm", "dropout", "dropout_add", "dropout_add_layer_norm"}) {
    if (op == name) return true;
  }
  if (strided) return false;
  for (const char* name : {"rms_norm", "add_rms_norm", "dropout_", "dropout_add_rms_norm", "bias_act_dropout"}) {
    if (op == name) return true;
  }
  return false;
}

inline void check_nested(const char* op, const std::string& argument, const at::Tensor& tensor) {
  TORCH_CHECK_NOT_IMPLEMENTED(!tensor.is_nested() || takes_nested(op, is_strided_nested(tensor)), op, "(): expected ",
                              argument, " that is not a nested tensor, got one of layout ", tensor.layout(),
                              ": call it on each tensor of unbind(), or on torch.nested.to_padded_tensor()");
}

template <Level kLevel, auto kFunction>
struct Checked;
template <Level kLevel, class Result, class... A, Result (*kFunction)(A...)>
struct Checked<kLevel, kFunction> {
  static inline const char* name = nullptr;

  static Result call(A... values) {
    static const Arguments arguments(name);
    const std::array<const at::Tensor*, sizeof...(A)> tensors{tensor_or_null(values)...};
    const at::Tensor* const input = tensors[arguments.input];
    if (kLevel == Level::Public && input != nullptr) check_nested(name, arguments.names[arguments.input], *input);
    for (size_t i = 0; input != nullptr && i < sizeof...(A); ++i) {
      if (tensors[i] != nullptr && i != arguments.input) {
        check_argument<kLevel>(name, arguments, i, *tensors[i], *input);
      }
    }
    return kFunction(std::forward<A>(values)...);
  }
};

// library.impl(name, kFunction), with the checks first.
template <auto kFunction>
void implement_public(torch::Library& library, const char* name) {
  Checked<Level::Public, kFunction>::name = name;
  library.impl(name, Checked<Level::Public, kFunction>::call);
}
template <auto kFunction>
void implement_kernel(torch::Library& library, const char* name) {
  Checked<Level::Kernel, kFunction>::name = name;
  library.impl(name, Checked<Level::Kernel, kFunction>::call);
}

}  // namespace dlkit
