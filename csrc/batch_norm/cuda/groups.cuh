// The values of columns and groups in memory, whatever their dtype; and the memory of a block that holds whole groups.
#pragma once

#include "../../common/cuda/activation.cuh"
#include "walk.cuh"

namespace dlkit::batch_norm {
namespace {

using namespace dlkit::cuda;

template <class A, int Count>
__device__ __forceinline__ void load_any(const void* from, DType dtype, int64_t index, A (&values)[Count]) {
  switch (dtype) {
    case DType::F32:
      return load_values(static_cast<const float*>(from) + index, values);
    case DType::F64:
      return load_values(static_cast<const double*>(from) + index, values);
    case DType::BF16:
      return load_values(static_cast<const BFloat16*>(from) + index, values);
    case DType::F16:
      return load_values(static_cast<const Float16*>(from) + index, values);
  }
}

__device__ __forceinline__ double load_one(const void* from, DType dtype, int64_t index) {
  double value[1];
  load_any(from, dtype, index, value);
  return value[0];
}

__device__ __forceinline__ void store_one(void* to, DType dtype, int64_t index, double value) {
  switch (dtype) {
    case DType::F32:
      static_cast<float*>(to)[index] = float(value);
      return;
    case DType::F64:
      static_cast<double*>(to)[index] = value;
      return;
    case DType::BF16:
      static_cast<BFloat16*>(to)[index] = dlkit::narrow<BFloat16>(float(value));
      return;
    case DType::F16:
      static_cast<Float16*>(to)[index] = dlkit::narrow<Float16>(float(value));
      return;
  }
}

// The values of adjacent columns in memory of one value a group.
template <class A, int Count>
__device__ __forceinline__ void load_of_groups(const void* from, const Walk& walk, int64_t column, A (&values)[Count]) {
  if (walk.per_group == 1) return load_values(static_cast<const A*>(from) + column, values);
#pragma unroll
  for (int k = 0; k < Count; ++k) values[k] = static_cast<const A*>(from)[divide(column + k, walk.per_group)];
}

// x to z without the residual, the same bits in forward and in backward.
template <class A, int Columns>
struct Affine {
  A mean[Columns], scale[Columns], bias[Columns];

  template <class T, class Op>
  __device__ __forceinline__ void load(const Op& op, const Walk& walk, int64_t column, A (&rstd)[Columns]) {
    load_of_groups(op.mean, walk, column, mean);
    load_of_groups(op.rstd, walk, column, rstd);
    load_parameters<T>(op, walk.channel(column), rstd);
  }
  template <class T, class Op>
  __device__ __forceinline__ void load_parameters(const Op& op, int64_t channel, const A (&rstd)[Columns]) {
    load_parameter<T>(op.weight, op.parameter_dtype, channel, A(1), scale);
    load_parameter<T>(op.bias, op.parameter_dtype, channel, A(0), bias);
#pragma unroll
    for (int k = 0; k < Columns; ++k) scale[k] *= rstd[k];
  }
  __device__ __forceinline__ A operator()(A x, int k) const { return multiply_add(x - mean[k], scale[k], bias[k]); }
};

// Calls f(Act()) for an activation that is not inline: any but None and Relu.
template <class A, class F>
__device__ __forceinline__ void with_act(Activation activation, const F& f) {
  with_activation<Activation::Gelu, Activation::GeluTanh, Activation::Silu, Activation::Hardswish, Activation::Relu6,
                  Activation::LeakyRelu>(activation, [&](auto kind) { f(Act<A, kind>()); });
}

__device__ __forceinline__ double lanes_sum(double value, int lanes) {
  for (int offset = lanes / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(full_warp, value, offset);
  return value;
}

// Calls f(group, in the block; sum over the group's columns) for each group of a block, by walk.group_lanes adjacent
// threads. sum(value) adds value(column, in the block) up.
template <class F>
__device__ __forceinline__ void each_group(const Walk& walk, int groups, const F& f) {
  const int lane = threadIdx.x % walk.group_lanes, side_by_side = walk.threads / walk.group_lanes;
  for (int first = 0; first < groups; first += side_by_side) {
    const int group = first + int(threadIdx.x) / walk.group_lanes;
    const auto sum = [&](const auto& value) {
      double total = 0;
      for (int i = lane; group < groups && i < walk.per_group; i += walk.group_lanes) {
        total += value(group * int(walk.per_group) + i);
      }
      return lanes_sum(total, walk.group_lanes);
    };
    f(group, lane == 0 && group < groups, sum);
  }
}

// Dynamic shared memory of a block that holds whole groups: `tensors` of walk.steps packs a thread, each of which only
// its owner touches; then three values for each column, two for each group, and what combine() exchanges.
template <class A, int PackBytes, int Columns>
struct BlockMemory {
  unsigned char* packs;
  A *columns, *groups, *exchange;
  int tensor_bytes, column_count, group_count;

  __device__ __forceinline__ BlockMemory(const Walk& walk, int tensors) {
    tensor_bytes = walk.steps * walk.threads * PackBytes;
    column_count = walk.units_per_block * Columns;
    group_count = column_count / int(walk.per_group);
    packs = dynamic_shared() + threadIdx.x * PackBytes;
    columns = reinterpret_cast<A*>(dynamic_shared() + tensors * tensor_bytes);
    groups = columns + 3 * column_count;
    exchange = groups + 2 * group_count;
  }
  __device__ __forceinline__ unsigned char* pack(const Walk& walk, int tensor, int step) const {
    return packs + tensor * tensor_bytes + step * walk.threads * PackBytes;
  }
  template <class T, class Position>
  __device__ __forceinline__ void fetch(int tensor, const void* from, Position cursor) const {
#pragma unroll 4
    for (int i = 0; i < cursor.steps; ++i) {
      copy_async<PackBytes>(pack(cursor.walk, tensor, i), static_cast<const T*>(from) + cursor.offset);
      cursor.advance();
    }
  }
  template <class Position>
  __device__ __forceinline__ void store_columns(int which, const A* values, const Position& cursor) const {
#pragma unroll
    for (int k = 0; k < Columns; ++k) columns[which * column_count + cursor.unit * Columns + k] = values[k];
  }
  template <class Position>
  __device__ __forceinline__ void load_groups(int which, const Position& cursor, A (&values)[Columns]) const {
#pragma unroll
    for (int k = 0; k < Columns; ++k) {
      values[k] = groups[which * group_count + (cursor.unit * Columns + k) / int(cursor.walk.per_group)];
    }
  }
};

}  // namespace
}  // namespace dlkit::batch_norm
