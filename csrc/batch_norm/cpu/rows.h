// Groups of [N, C] (one element a channel): rows of layer_norm, whose weight has a period of as many rows as a sample
// has groups. 8192x1024 in 32 groups, backward: 100 ms slice by slice, 3 so.
#pragma once

#include "../../layer_norm/kernel.h"
#include "shared.h"

namespace dlkit::batch_norm::DLKIT_ISA {
namespace {

bool groups_are_rows(const Forward& op) {
  return op.shape.groups > 0 && op.shape.space == 1 && op.statistics == Statistics::Compute && op.y != nullptr &&
         op.var == nullptr && op.residual == nullptr && !op.relu;
}
bool groups_are_rows(const Backward& op) {
  return op.shape.groups > 0 && op.shape.space == 1 && !op.statistics_given && !op.sums_given &&
         op.grad_residual == nullptr && !op.relu;
}

// Hands out the workspace. layer_norm takes a period's parameters in the type it accumulates in; where they are of
// another, they are converted here, and their gradients back.
template <class A>
struct Room {
  uintptr_t next;  // from null on where the workspace is still to be sized
  const Shape& shape;
  A* take() {
    A* const taken = reinterpret_cast<A*>(next);
    next += uintptr_t(shape.channels * int64_t(sizeof(A)) + 63) / 64 * 64;
    return taken;
  }
  const void* converted(const void* parameter, DType type, bool sizing = false) {
    if (parameter == nullptr || type == kDType<A>) return parameter;
    A* const taken = take();
    if (!sizing) read_all(parameter, type, A(1), shape.channels, taken);
    return taken;
  }
  void* for_gradient(void* gradient, DType type) {
    return gradient == nullptr || type == kDType<A> ? gradient : take();
  }
};

template <class A>
void forward_rows(const Forward& op) {
  const Shape& shape = op.shape;
  const int64_t cols = shape.channels / shape.groups;
  Room<A> room{uintptr_t(op.workspace), shape};
  const void* const weight = room.converted(op.weight, op.parameter_dtype);
  const void* const bias = room.converted(op.bias, op.parameter_dtype);
  layer_norm::forward_cpu({op.x,
                           nullptr,
                           weight,
                           bias,
                           op.y,
                           nullptr,
                           op.mean,
                           op.rstd,
                           shape.batch * shape.groups,
                           cols,
                           cols,
                           0,
                           op.eps,
                           op.dtype,
                           kDType<A>,
                           false,
                           {},
                           shape.groups});
}

// Backward's rows; layer_norm's partials begin where the room ends.
template <class A>
layer_norm::Backward rows_of(const Backward& op, Room<A>& room, bool sizing) {
  const Shape& shape = op.shape;
  const int64_t cols = shape.channels / shape.groups;
  const void* const weight = room.converted(op.weight, op.parameter_dtype, sizing);
  void* const grad_weight = room.for_gradient(op.grad_weight, op.parameter_dtype);
  void* const grad_bias = room.for_gradient(op.grad_bias, op.parameter_dtype);
  return {op.grad_output,
          nullptr,
          op.x,
          op.mean,
          op.rstd,
          weight,
          op.grad_input,
          grad_weight,
          grad_bias,
          reinterpret_cast<void*>(room.next),
          shape.batch * shape.groups,
          cols,
          cols,
          0,
          cols,
          op.dtype,
          kDType<A>,
          false,
          {},
          nullptr,
          shape.groups};
}

template <class A>
void backward_rows(const Backward& op) {
  Room<A> room{uintptr_t(op.workspace), op.shape};
  const layer_norm::Backward rows = rows_of(op, room, false);
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
  Room<A> room{0, op.shape};
  room.converted(op.weight, op.parameter_dtype, true);
  room.converted(op.bias, op.parameter_dtype, true);
  return int64_t(room.next);
}

template <class A>
int64_t backward_rows_bytes(const Backward& op) {
  Room<A> room{0, op.shape};
  const layer_norm::Backward rows = rows_of(op, room, true);
  return int64_t(room.next) + layer_norm::backward_partials_cpu(rows);
}

}  // namespace
}  // namespace dlkit::batch_norm::DLKIT_ISA
