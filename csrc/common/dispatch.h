// From run-time dtypes and flags to template arguments. Internal linkage, for the reason given in scalar.h.
#pragma once

#include <type_traits>

#include "scalar.h"

namespace dlkit {

// Calls f(T(), P()): T the data's type, P the parameters' type, which is T or float.
template <class F>
static void with_types(DType data, DType parameters, const F& f) {
  const bool same = data == parameters;
  switch (data) {
    case DType::F32:
      return f(float(), float());
    case DType::F64:
      return f(double(), double());
    case DType::BF16:
      return same ? f(BFloat16(), BFloat16()) : f(BFloat16(), float());
    case DType::F16:
      return same ? f(Float16(), Float16()) : f(Float16(), float());
  }
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
