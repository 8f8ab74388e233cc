// Groups of [N, C] (one element a channel): rows of layer_norm, whose weight has a period of as many rows as a sample
// has groups. 8192x1024 in 32 groups, backward: 100 ms slice by slice, 3 so.
#pragma once

#include "../../layer_norm/kernel.h"
#include "shared.h"

namespace dlkit::batch_norm::DLKIT_ISA {
namespace {

bool groups_are_rows(const Forward& op) {
  return op.shape.groups > 0 && op.shape.space == 1 && op.statistics == Statistics::Compute && op.y != nullptr &&
         op.var == nullptr && op.running_mean == nullptr && op.residual == nullptr && op.activation == Activation::None;
}
bool groups_are_rows(const Backward& op) {
  return op.shape.groups > 0 && op.shape.space == 1 && !op.statistics_given && !op.sums_given &&
         op.grad_residual == nullptr && op.activation == Activation::None;
}

// Where things lie in the workspace, in bytes from its start. It is made of presence, types and sizes alone, so that it
// is the same before there is a workspace and after. layer_norm takes a period's parameters in the type it accumulates
// in; where they are of another, they are converted here, and their gradients back.
template <class A>
struct Room {
  static constexpr int64_t kInPlace = -1;
  int64_t weight, bias, grad_weight, grad_bias;
  int64_t end = 0;  // layer_norm's partials begin here

  Room(const Forward& op)
      : Room(op.shape, op.parameter_dtype, op.weight != nullptr, op.bias != nullptr, false, false) {}
  Room(const Backward& op)
      : Room(op.shape, op.parameter_dtype, op.weight != nullptr, false, op.grad_weight != nullptr,
             op.grad_bias != nullptr) {}

  const void* converted(void* workspace, int64_t offset, const void* parameter, const Shape& shape, DType type) const {
    if (offset == kInPlace) return parameter;
    A* const taken = reinterpret_cast<A*>(static_cast<char*>(workspace) + offset);
    read_all(parameter, type, A(1), shape.channels, taken);
    return taken;
  }
  static void* for_gradient(void* workspace, int64_t offset, void* gradient) {
    return offset == kInPlace ? gradient : static_cast<char*>(workspace) + offset;
  }

 private:
  Room(const Shape& shape, DType type, bool has_weight, bool has_bias, bool has_grad_weight, bool has_grad_bias) {
    const auto take = [&](bool present) {
      if (!present || type == kDType<A>) return kInPlace;
      const int64_t offset = end;
      end += (shape.channels * int64_t(sizeof(A)) + 63) / 64 * 64;
      return offset;
    };
    weight = take(has_weight);
    bias = take(has_bias);
    grad_weight = take(has_grad_weight);
    grad_bias = take(has_grad_bias);
  }
};

template <class A>
void forward_rows(const Forward& op) {
  const Shape& shape = op.shape;
  const int64_t cols = shape.channels / shape.groups;
  const Room<A> room(op);
  layer_norm::forward_cpu({
      .x = op.x,
      .residual = nullptr,
      .weight = room.converted(op.workspace, room.weight, op.weight, shape, op.parameter_dtype),
      .bias = room.converted(op.workspace, room.bias, op.bias, shape, op.parameter_dtype),
      .y = op.y,
      .sum = nullptr,
      .mean = op.mean,
      .rstd = op.rstd,
      .rows = shape.batch * shape.groups,
      .cols = cols,
      .x_stride = cols,
      .residual_stride = 0,
      .eps = op.eps,
      .dtype = op.dtype,
      .parameter_dtype = kDType<A>,
      .rms = false,
      .dropout = {},
      .period = shape.groups,
  });
}

// Backward as layer_norm sees it, with `op`'s own parameters and gradients: what the size of its partials takes.
template <class A>
layer_norm::Backward rows_of(const Backward& op) {
  const Shape& shape = op.shape;
  const int64_t cols = shape.channels / shape.groups;
  return {
      .grad_output = op.grad_output,
      .grad_sum = nullptr,
      .x = op.x,
      .mean = op.mean,
      .rstd = op.rstd,
      .weight = op.weight,
      .grad_input = op.grad_input,
      .grad_residual = nullptr,
      .grad_weight = op.grad_weight,
      .grad_bias = op.grad_bias,
      .partials = nullptr,
      .rows = shape.batch * shape.groups,
      .cols = cols,
      .grad_output_stride = cols,
      .grad_sum_stride = 0,
      .x_stride = cols,
      .dtype = op.dtype,
      .parameter_dtype = kDType<A>,
      .rms = false,
      .dropout = {},
      .period = shape.groups,
  };
}

template <class A>
void backward_rows(const Backward& op) {
  const Room<A> room(op);
  layer_norm::Backward rows = rows_of<A>(op);
  rows.weight = room.converted(op.workspace, room.weight, op.weight, op.shape, op.parameter_dtype);
  rows.grad_weight = room.for_gradient(op.workspace, room.grad_weight, op.grad_weight);
  rows.grad_bias = room.for_gradient(op.workspace, room.grad_bias, op.grad_bias);
  rows.partials = op.workspace == nullptr ? nullptr : static_cast<char*>(op.workspace) + room.end;
  layer_norm::backward_cpu(rows);
  const auto convert = [&](const void* found, void* gradient) {
    if (found == gradient) return;
    with_type(op.parameter_dtype, [&](auto t) {
      using P = decltype(t);
      for (int64_t i = 0; i < op.shape.channels; ++i) {
        static_cast<P*>(gradient)[i] = narrow<P>(accumulate_t<P>(static_cast<const A*>(found)[i]));
      }
    });
  };
  convert(rows.grad_weight, op.grad_weight);
  convert(rows.grad_bias, op.grad_bias);
}

template <class A>
int64_t forward_rows_bytes(const Forward& op) {
  return Room<A>(op).end;
}

template <class A>
int64_t backward_rows_bytes(const Backward& op) {
  return Room<A>(op).end + layer_norm::backward_partials_cpu(rows_of<A>(op));
}

}  // namespace
}  // namespace dlkit::batch_norm::DLKIT_ISA
