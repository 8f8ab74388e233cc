// Shared by every op.cpp: the library's name, dtypes and row layouts of tensors, and running a kernel on a tensor's
// device.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cstdlib>
#include <cstring>

#include "../common/scalar.h"

#if defined(DLKIT_WITH_CUDA)
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

// The tests build the same sources a second time, under another name, with the CUDA kernels serving CPU tensors.
#if !defined(DLKIT_LIBRARY)
#define DLKIT_LIBRARY dlkit
#endif
#define DLKIT_STRING_(x) #x
#define DLKIT_STRING(x) DLKIT_STRING_(x)
#define DLKIT_DEFINE_OPS_(library, m) TORCH_LIBRARY_FRAGMENT(library, m)
#define DLKIT_DEFINE_OPS(m) DLKIT_DEFINE_OPS_(DLKIT_LIBRARY, m)
#define DLKIT_IMPLEMENT_OPS_(library, key, m) TORCH_LIBRARY_IMPL(library, key, m)
#define DLKIT_IMPLEMENT_OPS(key, m) DLKIT_IMPLEMENT_OPS_(DLKIT_LIBRARY, key, m)
// Registers the public ops for calls with gradients, without, and under torch.vmap. Random ops use FuncTorchVmapMode,
// since under vmap a call is random even where no input has a batch dimension.
#define DLKIT_IMPLEMENT_BY_KEYS(implement, VmapKey)                   \
  DLKIT_IMPLEMENT_OPS(Autograd, m) { implement(m); }                  \
  DLKIT_IMPLEMENT_OPS(CompositeExplicitAutograd, m) { implement(m); } \
  DLKIT_IMPLEMENT_OPS(VmapKey, m) { implement(m); }
#define DLKIT_IMPLEMENT_PUBLIC_OPS(implement) DLKIT_IMPLEMENT_BY_KEYS(implement, FuncTorchBatched)
#define DLKIT_IMPLEMENT_RANDOM_OPS(implement) DLKIT_IMPLEMENT_BY_KEYS(implement, FuncTorchVmapMode)

// The tags of ops: whether two calls with the same arguments give the same result.
#define DLKIT_PURE {at::Tag::pt2_compliant_tag}
#define DLKIT_RANDOM {at::Tag::pt2_compliant_tag, at::Tag::nondeterministic_seeded}

// Code for the devices that this build has kernels for.
#if defined(DLKIT_WITH_CUDA) || defined(DLKIT_CUDA_ON_CPU)
#define DLKIT_FOR_CUDA(...) __VA_ARGS__
#else
#define DLKIT_FOR_CUDA(...)
#endif
#if defined(DLKIT_CUDA_ON_CPU)
#define DLKIT_FOR_CPU(...)
#else
#define DLKIT_FOR_CPU(...) __VA_ARGS__
#endif
// run(device, op) for an op's struct: kernel##_cpu or kernel##_cuda.
#define DLKIT_RUN(Op, kernel)                                                   \
  DLKIT_FOR_CPU(void run(const CpuDevice&, const Op& op) { kernel##_cpu(op); }) \
  DLKIT_FOR_CUDA(void run(const CudaDevice& device, const Op& op) { kernel##_cuda(op, device.stream()); })
// run(device, op, more), where the CPU's kernel takes more.
#define DLKIT_RUN_WITH(More, Op, kernel)                                                                  \
  DLKIT_FOR_CPU(void run(const CpuDevice&, const Op& op, const More& more) { kernel##_cpu({op, more}); }) \
  DLKIT_FOR_CUDA(void run(const CudaDevice& device, const Op& op, const More&) { kernel##_cuda(op, device.stream()); })
// ask(device, op) for a property that depends on the kernel: question##_cpu or question##_cuda.
#define DLKIT_ASK(ask, Op, question)                                                     \
  DLKIT_FOR_CPU(auto ask(const CpuDevice&, const Op& op) { return question##_cpu(op); }) \
  DLKIT_FOR_CUDA(auto ask(const CudaDevice&, const Op& op) { return question##_cuda(op); })

namespace dlkit {

template <class Signature>
c10::TypedOperatorHandle<Signature> find_op(const char* name) {
  const std::string qualified = std::string(DLKIT_STRING(DLKIT_LIBRARY)) + "::" + name;
  return c10::Dispatcher::singleton().findSchemaOrThrow(qualified.c_str(), "").typed<Signature>();
}

inline bool is_supported(at::ScalarType type) {
  return type == at::kFloat || type == at::kDouble || type == at::kBFloat16 || type == at::kHalf;
}

inline DType dtype_of(at::ScalarType type) {
  switch (type) {
    case at::kFloat:
      return DType::F32;
    case at::kDouble:
      return DType::F64;
    case at::kBFloat16:
      return DType::BF16;
    case at::kHalf:
      return DType::F16;
    default:
      TORCH_CHECK_NOT_IMPLEMENTED(false, "dlkit: no kernel for ", type);
  }
}

inline at::ScalarType accumulate_type(at::ScalarType type) { return type == at::kDouble ? at::kDouble : at::kFloat; }

using OptionalTensor = std::optional<at::Tensor>;

// A nested tensor of strided layout, which has no sizes(). One of jagged layout has them as other tensors do.
inline bool is_strided_nested(const at::Tensor& tensor) {
  return tensor.is_nested() && tensor.layout() == at::kStrided;
}

inline bool has(const OptionalTensor& tensor) { return tensor.has_value() && tensor->defined(); }

inline const OptionalTensor kNone;

inline at::Tensor or_undefined(const OptionalTensor& tensor) { return tensor.value_or(at::Tensor()); }
inline const at::Tensor& or_undefined(const at::Tensor& tensor) { return tensor; }

inline at::Tensor contiguous_or_undefined(const OptionalTensor& tensor) {
  return has(tensor) ? tensor->contiguous() : at::Tensor();
}

// Whether a + b neither broadcasts nor promotes.
inline bool has_form_of(const at::Tensor& a, const at::Tensor& b) {
  return !a.is_nested() && !b.is_nested() && a.scalar_type() == b.scalar_type() && a.device() == b.device() &&
         a.sym_sizes().equals(b.sym_sizes());
}

// The type of a norm's weight and bias.
inline at::ScalarType parameter_type(const at::Tensor& input, const OptionalTensor& weight,
                                     const OptionalTensor& bias) {
  return has(weight) ? weight->scalar_type() : has(bias) ? bias->scalar_type() : input.scalar_type();
}

// Kernels take weight and bias in one type: the input's or fp32.
inline void check_parameter_types(const char* name, const at::Tensor& input, const OptionalTensor& weight,
                                  const OptionalTensor& bias) {
  const at::ScalarType type = input.scalar_type();
  const auto check = [&](const char* argument, const OptionalTensor& p) {
    if (!has(p)) return;
    const at::ScalarType got = p->scalar_type();
    TORCH_CHECK(got == type || (got == at::kFloat && type != at::kDouble), name, "(): expected ", argument, " of ",
                type, type == at::kDouble || type == at::kFloat ? "" : " or Float", " (input is ", type, "), got ",
                got);
  };
  check("weight", weight);
  check("bias", bias);
  TORCH_CHECK(!has(weight) || !has(bias) || weight->scalar_type() == bias->scalar_type(), name, "(): expected bias of ",
              weight->scalar_type(), " (the type of weight), got ", bias->scalar_type());
}

// f(x, weight, bias) by torch's own ops, in the accumulation type, the result in x's: torch refuses fp32 parameters
// with 16-bit input on some devices, and its double backward overflows in fp16 from rstd = 40 on.
template <class F>
at::Tensor in_accumulate_type(const at::Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                              const F& f) {
  const at::ScalarType own = input.scalar_type(), type = is_supported(own) ? accumulate_type(own) : own;
  const auto convert = [&](const OptionalTensor& p) { return has(p) ? OptionalTensor(p->to(type)) : std::nullopt; };
  return f(input.to(type), convert(weight), convert(bias)).to(input.scalar_type());
}

inline const void* data_or_null(const std::optional<at::Tensor>& tensor) {
  return tensor.has_value() && tensor->defined() ? tensor->const_data_ptr() : nullptr;
}
inline void* mutable_data_or_null(const at::Tensor& tensor) {
  return tensor.defined() ? tensor.mutable_data_ptr() : nullptr;
}

// A tensor seen as rows of adjacent elements with one row stride: the last `row_ndim` dimensions are a row. It is
// copied only where its strides do not allow that. Undefined stays undefined.
struct Rows {
  at::Tensor tensor;
  int64_t stride = 0;
  const void* data() const { return tensor.defined() ? tensor.const_data_ptr() : nullptr; }
};

inline Rows as_rows(const at::Tensor& tensor, int64_t row_ndim) {
  if (!tensor.defined()) return {};
  const auto sizes = tensor.sizes();
  const auto strides = tensor.strides();
  int64_t cols = 1;
  bool adjacent = true;
  int64_t dim = tensor.dim() - 1;
  for (; dim >= tensor.dim() - row_ndim; --dim) {
    adjacent = adjacent && (sizes[dim] == 1 || strides[dim] == cols);
    cols *= sizes[dim];
  }
  int64_t row_stride = -1, next = 0;
  for (; dim >= 0; --dim) {
    if (sizes[dim] == 1) continue;
    if (row_stride < 0) {
      row_stride = strides[dim];
    } else {
      adjacent = adjacent && strides[dim] == next;
    }
    next = strides[dim] * sizes[dim];
  }
  if (!adjacent && tensor.numel() > 0) return {tensor.contiguous(), cols};
  return {tensor, row_stride < 0 ? cols : row_stride};
}

// The device a kernel runs on. Made from a tensor, it makes that tensor's device current for its lifetime.
struct CpuDevice {
  explicit CpuDevice(const at::Tensor&) {}
};

#if defined(DLKIT_CUDA_ON_CPU)
struct CudaDevice {
  explicit CudaDevice(const at::Tensor&) {}
  void* stream() const { return nullptr; }
};
#elif defined(DLKIT_WITH_CUDA)
struct CudaDevice {
  explicit CudaDevice(const at::Tensor& tensor) : guard(tensor.device()) {}
  void* stream() const { return c10::cuda::getCurrentCUDAStream().stream(); }
  c10::cuda::CUDAGuard guard;
};
#endif

// DLKIT_BACKEND=cuda|triton|native selects the kernels for CUDA tensors; if unset, the compiled ones serve where they
// were built. native leaves every device to torch's own ops.
inline bool backend_is(const char* name) {
  const char* backend = std::getenv("DLKIT_BACKEND");
  return std::strcmp(backend == nullptr ? "" : backend, name) == 0;
}
inline bool cpu_kernels_wanted() { return !backend_is("native"); }
inline bool cuda_kernels_wanted() { return backend_is("") || backend_is("cuda"); }

}  // namespace dlkit

// Registers implement<Device>(library) for the devices that this build has kernels for.
#if defined(DLKIT_CUDA_ON_CPU)
#define DLKIT_IMPLEMENT_KERNELS(implement) \
  DLKIT_IMPLEMENT_OPS(CPU, m) { implement<dlkit::CudaDevice>(m); }
#else
#define DLKIT_IMPLEMENT_CPU_KERNELS(implement)                       \
  DLKIT_IMPLEMENT_OPS(CPU, m) {                                      \
    if (dlkit::cpu_kernels_wanted()) implement<dlkit::CpuDevice>(m); \
  }
#if defined(DLKIT_WITH_CUDA)
#define DLKIT_IMPLEMENT_KERNELS(implement)                             \
  DLKIT_IMPLEMENT_CPU_KERNELS(implement)                               \
  DLKIT_IMPLEMENT_OPS(CUDA, m) {                                       \
    if (dlkit::cuda_kernels_wanted()) implement<dlkit::CudaDevice>(m); \
  }
#else
#define DLKIT_IMPLEMENT_KERNELS(implement) DLKIT_IMPLEMENT_CPU_KERNELS(implement)
#endif
#endif
