// The ops of dropout that other ops call. Each signature is written only here, since its many numbers are easy to
// confuse.
#pragma once

#include "../common/philox.h"
#include "../glue/random.h"

namespace dlkit::dropout {

// (input, p, mask_ndim, alpha, generator, stream)
using PublicOp = at::Tensor(const at::Tensor&, double, int64_t, bool, const OptionalGenerator&, const OptionalTensor&);
using PublicOpInPlace = void(at::Tensor&, double, int64_t, bool, const OptionalGenerator&, const OptionalTensor&);
// (input, residual, p, generator, stream)
using AddOp = at::Tensor(const at::Tensor&, const at::Tensor&, double, const OptionalGenerator&, const OptionalTensor&);
// (input, residual, state, p, generator, keep_bits) -> (y, state)
using AddForwardOp = std::tuple<at::Tensor, at::Tensor>(const at::Tensor&, const at::Tensor&, const OptionalTensor&,
                                                        double, const OptionalGenerator&, bool);
// (input, state, p, inner, scale, shift, dropped)
using ApplyOp = at::Tensor(const at::Tensor&, const at::Tensor&, double, c10::SymInt, double, double, double);

// Calls the op that drops single elements.
inline at::Tensor drop(const at::Tensor& input, double p, const OptionalGenerator& generator,
                       const OptionalTensor& stream) {
  static const auto op = find_op<PublicOp>("dropout");
  return op.call(input, p, -1, false, generator, stream);
}

// The same with the mask of a state; also its own backward.
inline at::Tensor drop_again(const at::Tensor& input, const at::Tensor& rng_state, double p) {
  static const auto op = find_op<ApplyOp>("dropout_apply");
  return op.call(input, rng_state, p, 1, dropout_scale(p), 0, 0);
}

}  // namespace dlkit::dropout
