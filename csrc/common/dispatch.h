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

// f(A()): A the type in which statistics and sums of `type` are kept.
template <class F>
static auto with_accumulate(DType type, const F& f) {
  return type == DType::F64 ? f(double()) : f(float());
}

// Calls f(T(), P()): T the data's type, P the parameters' type, which is T or float.
template <class F>
static void with_types(DType data, DType parameters, const F& f) {
  with_type(data, [&](auto type) {
    if constexpr (sizeof(type) == 2) {
      if (data != parameters) return f(type, float());
    }
    f(type, type);
  });
}

// Calls f with one std::bool_constant a flag.
template <class F>
static void with_flags(const F& f) {
  f();
}
template <class F, class... Flags>
static void with_flags(const F& f, bool first, Flags... rest) {
  if (first) {
    with_flags([&](auto... constants) { f(std::true_type(), constants...); }, rest...);
  } else {
    with_flags([&](auto... constants) { f(std::false_type(), constants...); }, rest...);
  }
}

}  // namespace dlkit
