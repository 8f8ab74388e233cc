// Shared by cross entropy and linear + cross entropy: the options, and the signatures of the ops that the latter calls.
#pragma once

#include <tuple>

#include "../glue/op.h"

namespace dlkit::cross_entropy {

struct Options {
  int64_t reduction, ignore_index;
  double label_smoothing, z_scale, softcap;

  auto fields() const { return std::tie(reduction, ignore_index, label_smoothing, z_scale, softcap); }
};

// (input, target, weight, options, inplace_backward, wide) -> (loss, z_loss)
using PublicOp = std::tuple<at::Tensor, at::Tensor>(const at::Tensor&, const at::Tensor&, const OptionalTensor&,
                                                    int64_t, int64_t, double, double, double, bool, bool);
// (input, target, weight, options, wide) -> (loss, z_loss, stats, total)
using ForwardOp = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>(const at::Tensor&, const at::Tensor&,
                                                                             const OptionalTensor&, int64_t, int64_t,
                                                                             double, double, double, bool);
// (grad_loss, input, target, weight, stats, total, options); writes the gradient over the input
using BackwardInPlaceOp = void(const at::Tensor&, const at::Tensor&, const at::Tensor&, const OptionalTensor&,
                               const at::Tensor&, const OptionalTensor&, int64_t, int64_t, double, double, double);

}  // namespace dlkit::cross_entropy
