// From run-time dtypes and flags to template arguments. Internal linkage, for the reason given in scalar.h.
#pragma once

#include <type_traits>

#include "scalar.h"

namespace dlkit {

// Calls f(T()).
template <class F>
static void with_type(DType type, const F& f) {
  switch (type) {
    case DType::F32:
      return f(float());
    case DType::F64:
      return f(double());
    case DType::BF16:
      return f(BFloat16());
    case DType::F16:
      return f(Float16());
  }
}

// The same for the type of the tensors that an op works on. The object for AVX-512 with BF16 has kernels for bf16 only;
// DLKIT_CPU_ENTRY sends it no other type.
template <class F>
static void with_data_type(DType type, const F& f) {
#if defined(DLKIT_BF16_ONLY)
  f(BFloat16());
#else
  with_type(type, f);
#endif
}

// Calls f(A()), where A is the type in which statistics and sums of `type` are kept.
template <class F>
static auto with_accumulate(DType type, const F& f) {
  return type == DType::F64 ? f(double()) : f(float());
}

}  // namespace dlkit
