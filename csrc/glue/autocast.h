// The casts of torch.autocast, for those ops whose torch equivalents it casts.
#pragma once

#include <ATen/autocast_mode.h>

#include "op.h"

namespace dlkit {

// The op with its 16-bit tensors cast to fp32, as autocast on a GPU runs torch's op of that name.
template <auto kFunction>
struct InFp32;
template <class Result, class... A, Result (*kFunction)(A...)>
struct InFp32<kFunction> {
  static inline const char* name = nullptr;

  static Result call(A... values) {
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::DispatchKey::AutocastCUDA);
    static const auto op = find_op<Result(A...)>(name);
    return op.call(at::autocast::cached_cast(at::kFloat, values, at::kCUDA)...);
  }
};

// library.impl(name, kFunction) with the casts, for AutocastCUDA.
template <auto kFunction>
void implement_in_fp32(torch::Library& library, const char* name) {
  InFp32<kFunction>::name = name;
  library.impl(name, InFp32<kFunction>::call);
}

}  // namespace dlkit
