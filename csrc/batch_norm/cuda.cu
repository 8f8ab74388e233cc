// Batch norm and group norm on CUDA, with the residual add and the activation behind them. What each way moves, in
// units of one tensor of x's shape (a residual or a y that is read adds one where it is read):
//
//   forward    one block holds whole groups in shared memory where they fit: 2, the least there is. Else a pass for
//              the statistics and a pass that applies them: 3, less what the second still finds in L2. It walks from
//              the end for that, and y is written so that it leaves L2 first.
//   backward   likewise 3 where whole groups fit. Else a pass for the sums and one for grad_input: 5, less L2 hits. A
//              grad_residual is written in the first pass and is what the second reads in place of grad_output and y.
//              With given statistics (evaluation) grad_input needs no sums: one pass, 2, or 3 with parameter gradients.
//
// The two layouts differ only in who owns what. A column is what has sums of its own: a channel, in group norm a
// channel of one sample. Contiguous: the planes of a column are runs of memory, and a team of adjacent threads, up to a
// block, owns one column. channels_last: a thread owns a pack of adjacent columns and walks down rows. A pass cuts each
// column into pieces by the shape alone; a thread's moments of a few packs at a time are computed in two passes over
// registers, merged by Chan's formula along fixed trees to one entry a piece, and a small kernel merges the pieces in
// double: no atomics, the same bits every run.
//
// Small groups share a block only while there are two blocks for each multiprocessor: 64 groups of 1 KB, 16 threads
// each, would otherwise be 4 blocks, 128 of an H200's 132 multiprocessors idle; apart they are 64 blocks of one warp,
// which moves the same bytes with 16 times as many multiprocessors' loads in flight. No kernel changes by it.
//
// Activations other than the ReLU are in kernels of their own (Acts), the passes alone: a switch inside, and the code
// of all of them, would cost the others registers.
//
// In flight are 4 packs of 16 bytes a thread (backward: 2 of each tensor), 32 KB and more a multiprocessor, where 4.8
// TB/s and 0.8 us of latency ask for 29 KB on an H200. Not yet run on a GPU.
#include <algorithm>

#include "../common/cuda/activation.cuh"
#include "../common/cuda/launch.cuh"
#include "../common/cuda/reduce.cuh"
#include "../common/cuda/vec.cuh"
#include "../common/dispatch.h"
#include "kernel.h"

namespace dlkit::batch_norm {
namespace {

using namespace dlkit::cuda;

constexpr int pass_threads = 256, block_threads = 512, finish_threads = 1024, finish_lanes = 8;

// Quotient of numbers that are not negative; 32-bit division is several times cheaper.
__host__ __device__ __forceinline__ int64_t divide(int64_t a, int64_t b) {
  return ((a | b) >> 32) == 0 ? int64_t(uint32_t(a) / uint32_t(b)) : a / b;
}

// How threads share out a tensor. A unit is a column, or in channels_last a pack of them; its positions are packs, in
// `slices` of `slice_positions` each.
struct Walk {
  int64_t columns, channels, per_group, groups;  // per_group: columns of a statistic group
  int64_t units, positions, slice_positions;
  int64_t position_stride, slice_stride, channel_stride, sample_stride;  // elements
  int64_t piece, pieces;                                                 // positions of a piece, pieces of a unit
  int64_t tiles;                                                         // blocks that cover all units
  int threads, lane_bits, units_per_block;  // 2^lane_bits threads: of a unit, in channels_last side by side in a row
  int steps;                                // positions of a thread, at most
  int64_t step_position, step_offset, wrap_offset;  // to a thread's next position
  int64_t middle_offset, last_offset;               // of positions, from where a column begins
  int group_lanes;                                  // threads that add up the columns of a group

  __host__ __device__ int64_t blocks() const { return tiles * pieces; }
  __device__ __forceinline__ int64_t channel(int64_t column) const {
    return column - divide(column, channels) * channels;
  }
  // Where a column begins.
  __device__ __forceinline__ int64_t offset(int64_t column) const {
    return divide(column, channels) * sample_stride + channel(column) * channel_stride;
  }
};

// What a thread owns in one block's share of the tensor, and where it stands in it.
template <class T, int PackBytes, bool ChannelsLast>
struct Cursor {
  static constexpr int width = PackBytes / sizeof(T), columns = ChannelsLast ? width : 1;
  const Walk& walk;
  int64_t column, piece, offset, position;  // column: the first it owns
  int unit, slot;                           // in the block; in the unit
  int steps;

  __device__ __forceinline__ Cursor(const Walk& walk, int64_t block) : walk(walk) {
    const int lanes = 1 << walk.lane_bits, fast = threadIdx.x & (lanes - 1), slow = threadIdx.x >> walk.lane_bits;
    unit = ChannelsLast ? fast : slow;
    slot = ChannelsLast ? slow : fast;
    const int step = ChannelsLast ? walk.threads >> walk.lane_bits : lanes;
    piece = divide(block, walk.tiles);
    const int64_t index = (block - piece * walk.tiles) * walk.units_per_block + unit;
    column = index * columns;
    const int64_t begin = piece * walk.piece + slot, end = piece * walk.piece + walk.piece;
    const int64_t left = (end < walk.positions ? end : walk.positions) - begin;
    steps = unit < walk.units_per_block && index < walk.units && left > 0 ? int(divide(left + step - 1, step)) : 0;
    const int64_t slice = ChannelsLast ? 0 : divide(begin, walk.slice_positions);
    position = begin - slice * walk.slice_positions;
    offset = walk.offset(column) + slice * walk.slice_stride + position * walk.position_stride;
  }

  __device__ __forceinline__ void advance() {
    offset += walk.step_offset;
    if (ChannelsLast) return;
    position += walk.step_position;
    if (position >= walk.slice_positions) {
      position -= walk.slice_positions;
      offset += walk.wrap_offset;
    }
  }

  // Whether this thread speaks for its columns.
  __device__ __forceinline__ bool owner() const { return slot == 0 && steps > 0; }

  // Merges the states of a unit's threads; the result is slot 0's. All threads of the block must call. `exchange`
  // holds a State for each thread of a block, or half as many in channels_last.
  template <class State, class A>
  __device__ __forceinline__ void combine(State& state, A* exchange) const {
    const int lanes = 1 << walk.lane_bits, row_warps = lanes > 32 ? lanes / 32 : 1;
    if (ChannelsLast) {
      merge_threads(state, lanes, 32, row_warps, walk.threads / 32 / row_warps, exchange);
    } else {
      merge_threads(state, 1, lanes < 32 ? lanes : 32, 1, row_warps, exchange);
    }
  }
};

// Calls f(offsets, valid) for up to Batch positions at a time, the first `valid` of which exist.
template <int Batch, class Position, class F>
__device__ __forceinline__ void each_batch(Position cursor, const F& f) {
  for (int left = cursor.steps; left > 0; left -= Batch) {
    int64_t offsets[Batch];
#pragma unroll
    for (int i = 0; i < Batch; ++i) {
      offsets[i] = cursor.offset;
      cursor.advance();
    }
    f(offsets, left < Batch ? left : Batch);
  }
}

template <class T, int PackBytes, int Batch>
__device__ __forceinline__ void load_batch(const void* tensor, const int64_t (&offsets)[Batch], int valid,
                                           Pack<PackBytes> (&packs)[Batch]) {
#pragma unroll
  for (int i = 0; i < Batch; ++i) {
    if (i < valid) packs[i] = load_once<PackBytes>(static_cast<const T*>(tensor) + offsets[i]);
  }
}

// Where values are as fine as sums, a mean's own rounding would show in small deviations from a large mean. So their
// moments are of what differs from a pivot: the median of a column's first, middle and last value.
template <class A>
__device__ __forceinline__ A pivot_of(const void* x, const Walk& walk, int64_t column) {
  const A* at = static_cast<const A*>(x) + walk.offset(column);
  const A first = at[0], middle = at[walk.middle_offset], last = at[walk.last_offset];
  const A low = first < middle ? first : middle, high = first < middle ? middle : first;
  return last < low ? low : high < last ? high : last;
}

template <class T, int Columns, class A>
__device__ __forceinline__ void load_pivots(const Forward& op, const Walk& walk, int64_t column, A (&pivots)[Columns]) {
#pragma unroll
  for (int k = 0; k < Columns; ++k) pivots[k] = std::is_same_v<T, A> ? pivot_of<A>(op.x, walk, column + k) : A(0);
}

// Count, mean and sum of squared deviations of each column.
template <class A, int Columns>
struct Moments {
  static constexpr int size = 1 + 2 * Columns;
  A at[size];

  __device__ __forceinline__ void merge(const Moments& other) {
    const A total = at[0] + other.at[0];
    if (other.at[0] == A(0)) return;
    const A share = other.at[0] / total, keep = A(1) - share, cross = at[0] * share;
#pragma unroll
    for (int k = 0; k < Columns; ++k) {
      const A delta = other.at[1 + k] - at[1 + k];
      at[1 + k] = at[1 + k] * keep + other.at[1 + k] * share;  // not by delta: an infinity is to stay one
      at[1 + Columns + k] += other.at[1 + Columns + k] + delta * (delta * cross);
    }
    at[0] = total;
  }

  // The first `valid` packs: their mean first, then their deviations from it.
  template <class T, int PackBytes, int Batch>
  __device__ __forceinline__ void add(const Pack<PackBytes> (&packs)[Batch], int valid, const A (&pivots)[Columns]) {
    if (valid == Batch) {
      add<T, PackBytes, true>(packs, valid, pivots);
    } else {
      add<T, PackBytes, false>(packs, valid, pivots);
    }
  }
  template <class T, int PackBytes, bool Full, int Batch>
  __device__ __forceinline__ void add(const Pack<PackBytes> (&packs)[Batch], int valid, const A (&pivots)[Columns]) {
    constexpr int width = PackBytes / sizeof(T);
    Moments part{};
    part.at[0] = A(valid * (width / Columns));
#pragma unroll
    for (int i = 0; i < Batch; ++i) {
      A values[width];
      widen<T, PackBytes>(packs[i], values);
#pragma unroll
      for (int k = 0; k < width; ++k)
        part.at[1 + k % Columns] += Full || i < valid ? values[k] - pivots[k % Columns] : A(0);
    }
    const A scale = A(1) / part.at[0];
#pragma unroll
    for (int k = 0; k < Columns; ++k) part.at[1 + k] *= scale;
#pragma unroll
    for (int i = 0; i < Batch; ++i) {
      A values[width];
      widen<T, PackBytes>(packs[i], values);
#pragma unroll
      for (int k = 0; k < width; ++k) {
        const A deviation = Full || i < valid ? values[k] - pivots[k % Columns] - part.at[1 + k % Columns] : A(0);
        part.at[1 + Columns + k % Columns] += deviation * deviation;
      }
    }
    merge(part);
  }
};

// Of each column the sum of g and the sum of g * (x - mean).
template <class A, int Columns>
struct Sums {
  static constexpr int size = 2 * Columns;
  A at[size];

  __device__ __forceinline__ void merge(const Sums& other) {
#pragma unroll
    for (int i = 0; i < size; ++i) at[i] += other.at[i];
  }
};

__device__ __forceinline__ double lanes_sum(double value, int lanes) {
  for (int offset = lanes / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(full_warp, value, offset);
  return value;
}

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
  switch (activation) {
    case Activation::Gelu:
      return f(Act<A, Activation::Gelu>());
    case Activation::GeluTanh:
      return f(Act<A, Activation::GeluTanh>());
    case Activation::Silu:
      return f(Act<A, Activation::Silu>());
    case Activation::Hardswish:
      return f(Act<A, Activation::Hardswish>());
    case Activation::Relu6:
      return f(Act<A, Activation::Relu6>());
    case Activation::LeakyRelu:
      return f(Act<A, Activation::LeakyRelu>());
    default:
      return;
  }
}

template <class T, int PackBytes, int Columns, bool Acts, class A>
__device__ __forceinline__ Pack<PackBytes> normalize(const Forward& op, const Affine<A, Columns>& affine,
                                                     const Pack<PackBytes>& x, const Pack<PackBytes>& residual) {
  constexpr int width = PackBytes / sizeof(T);
  A values[width], added[width];
  widen<T, PackBytes>(x, values);
#pragma unroll
  for (int k = 0; k < width; ++k) values[k] = affine(values[k], k % Columns);
  if (op.residual != nullptr) {
    widen<T, PackBytes>(residual, added);
#pragma unroll
    for (int k = 0; k < width; ++k) values[k] += added[k];
  }
  if constexpr (Acts) {
    with_act<A>(op.activation, [&](auto act) {
#pragma unroll
      for (int k = 0; k < width; ++k) values[k] = act.value(values[k], A(op.negative_slope));
    });
  } else if (op.activation == Activation::Relu) {
#pragma unroll
    for (int k = 0; k < width; ++k) values[k] = values[k] < A(0) ? A(0) : values[k];
  }
  return narrow<T, PackBytes>(values);
}

template <class A>
struct GroupStatistics {
  A mean, rstd;
};

// Writes a group's statistics and brings its running ones up to date.
template <class A>
__device__ __forceinline__ GroupStatistics<A> finish_group(const Forward& op, int64_t group, double count, double mean,
                                                           double var) {
  const GroupStatistics<A> result{A(mean), A(1.0 / sqrt(var + op.eps))};
  static_cast<A*>(op.mean)[group] = result.mean;
  static_cast<A*>(op.rstd)[group] = result.rstd;
  if (op.var != nullptr) static_cast<A*>(op.var)[group] = A(var);
  const auto update = [&](void* running, double value) {
    if (running == nullptr) return;
    const double factor = op.momentum < 0 ? 1.0 / double(*op.num_batches_tracked) : op.momentum;
    const double before = load_one(running, op.running_dtype, group);
    store_one(running, op.running_dtype, group, (1 - factor) * before + factor * value);
  };
  update(op.running_mean, mean);
  update(op.running_var, var * (count / (count - 1)));
  return result;
}

// Workspace is [2, pieces, columns]: means and deviations, or the two sums.
template <class A, class State, class Position>
__device__ __forceinline__ void store_partial(const State& state, int first, const Position& cursor, A* partial) {
  constexpr int columns = Position::columns;
  const Walk& walk = cursor.walk;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    store_values<A, columns>(partial + (i * walk.pieces + cursor.piece) * walk.columns + cursor.column,
                             state.at + first + i * columns);
  }
}

template <int PackBytes>
constexpr int batch_of = PackBytes == 16 ? 4 : 8;

// Threads with 8 columns, or with doubles, need more registers than others: one resident block fewer. So does backward
// of an activation.
template <class T, int PackBytes, bool ChannelsLast>
constexpr bool heavy = sizeof(T) > 4 || (ChannelsLast && PackBytes / sizeof(T) == 8);

// PackBytes is last, unlike in kernels that also store tensors: what is loaded here 16 bytes at a time is not stored.
template <class T, bool ChannelsLast, int PackBytes>
__global__ void __launch_bounds__(pass_threads, heavy<T, PackBytes, ChannelsLast> ? 3 : 4)
    forward_statistics(const Forward op, const Walk walk, accumulate_t<T>* partial) {
  using A = accumulate_t<T>;
  using Position = Cursor<T, PackBytes, ChannelsLast>;
  using State = Moments<A, Position::columns>;
  constexpr int batch = batch_of<PackBytes>;
  __shared__ A exchange[pass_threads / (ChannelsLast ? 2 : 1) * State::size];
  for (int64_t block = blockIdx.x; block < walk.blocks(); block += gridDim.x) {
    const Position cursor(walk, block);
    State moments{};
    A pivots[Position::columns] = {};
    if (cursor.steps > 0) load_pivots<T>(op, walk, cursor.column, pivots);
    each_batch<batch>(cursor, [&](const int64_t (&offsets)[batch], int valid) {
      Pack<PackBytes> packs[batch] = {};
      load_batch<T, PackBytes>(op.x, offsets, valid, packs);
      moments.template add<T, PackBytes>(packs, valid, pivots);
    });
    cursor.combine(moments, exchange);
    if (cursor.owner()) store_partial(moments, 1, cursor, partial);
  }
  // Here, because the next kernel's blocks all read it.
  if (op.num_batches_tracked != nullptr && blockIdx.x == 0 && threadIdx.x == 0) ++*op.num_batches_tracked;
}

// The second stage, finish_lanes groups or channels a block: f(entry) adds an entry to the calling thread's state.
// `exchange` holds a State for every other thread of the block.
template <class State, class F>
__device__ __forceinline__ void add_entries(State& state, int64_t index, int64_t end, int64_t entries, double* exchange,
                                            const F& f) {
  if (index < end) {
    for (int64_t entry = threadIdx.x / finish_lanes; entry < entries; entry += finish_threads / finish_lanes) f(entry);
  }
  merge_threads(state, finish_lanes, 32, 1, finish_threads / 32, exchange);
}

template <class A>
__global__ void __launch_bounds__(finish_threads)
    forward_finish(const Forward op, const Walk walk, int64_t elements, const A* partial) {
  using State = Moments<double, 1>;
  __shared__ double exchange[finish_threads / 2 * State::size];
  for (int64_t first = int64_t(blockIdx.x) * finish_lanes; first < walk.groups;
       first += int64_t(gridDim.x) * finish_lanes) {
    const int64_t group = first + threadIdx.x % finish_lanes;
    const bool has_pivots = op.dtype == DType::F32 || op.dtype == DType::F64;
    State total{};
    add_entries(total, group, walk.groups, walk.per_group * walk.pieces, exchange, [&](int64_t entry) {
      const int64_t piece = divide(entry, walk.per_group), left = walk.positions - piece * walk.piece;
      const int64_t column = group * walk.per_group + entry - piece * walk.per_group;
      const A* from = partial + piece * walk.columns + column;
      const double pivot = has_pivots ? pivot_of<A>(op.x, walk, column) : A(0);
      total.merge({{double((left < walk.piece ? left : walk.piece) * elements), pivot + double(from[0]),
                    double(from[walk.pieces * walk.columns])}});
    });
    if (threadIdx.x < finish_lanes && group < walk.groups) {
      finish_group<A>(op, group, total.at[0], total.at[1], total.at[2] / total.at[0]);
    }
  }
}

template <class T, int PackBytes, bool ChannelsLast, bool Acts>
__global__ void __launch_bounds__(pass_threads, heavy<T, PackBytes, ChannelsLast> ? 2 : 3)
    forward_apply(const Forward op, const Walk walk) {
  using A = accumulate_t<T>;
  using Position = Cursor<T, PackBytes, ChannelsLast>;
  constexpr int columns = Position::columns, batch = batch_of<PackBytes>;
  for (int64_t block = blockIdx.x; block < walk.blocks(); block += gridDim.x) {
    Position cursor(walk, walk.blocks() - 1 - block);
    if (cursor.steps == 0) continue;
    Affine<A, columns> affine{};
    A rstd[columns];
    if (op.statistics == Statistics::Running) {
      load_any(op.running_mean, op.running_dtype, cursor.column, affine.mean);
      load_any(op.running_var, op.running_dtype, cursor.column, rstd);
#pragma unroll
      for (int k = 0; k < columns; ++k) rstd[k] = A(1) / sqrt(rstd[k] + A(op.eps));
      if (cursor.owner() && cursor.piece == 0) {
        store_values<A, columns>(static_cast<A*>(op.mean) + cursor.column, affine.mean);
        store_values<A, columns>(static_cast<A*>(op.rstd) + cursor.column, rstd);
      }
      if (op.y == nullptr) continue;
      affine.template load_parameters<T>(op, cursor.column, rstd);
    } else {
      affine.template load<T>(op, walk, cursor.column, rstd);
    }
    each_batch<batch>(cursor, [&](const int64_t (&offsets)[batch], int valid) {
      Pack<PackBytes> x[batch], residual[batch];
      load_batch<T, PackBytes>(op.x, offsets, valid, x);
      if (op.residual != nullptr) load_batch<T, PackBytes>(op.residual, offsets, valid, residual);
#pragma unroll
      for (int i = 0; i < batch; ++i) {
        if (i >= valid) continue;
        store_once<PackBytes>(static_cast<T*>(op.y) + offsets[i],
                              normalize<T, PackBytes, columns, Acts>(op, affine, x[i], residual[i]));
      }
    });
  }
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

template <class T, int PackBytes, bool ChannelsLast>
__global__ void __launch_bounds__(block_threads, sizeof(T) > 4 ? 1 : 2)
    forward_block(const Forward op, const Walk walk, int64_t elements) {
  using A = accumulate_t<T>;
  using Position = Cursor<T, PackBytes, ChannelsLast>;
  constexpr int columns = Position::columns, batch = columns == 8 ? 2 : 4;
  using State = Moments<A, columns>;
  const BlockMemory<A, PackBytes, columns> memory(walk, 1);
  for (int64_t block = blockIdx.x; block < walk.blocks(); block += gridDim.x) {
    Position cursor(walk, block);
    memory.template fetch<T>(0, op.x, cursor);
    copy_async_commit();
    copy_async_wait<0>();
    State moments{};
    A pivots[columns] = {};
    if (cursor.steps > 0) load_pivots<T>(op, walk, cursor.column, pivots);
    for (int first = 0; first < cursor.steps; first += batch) {
      Pack<PackBytes> packs[batch] = {};
      const int valid = cursor.steps - first < batch ? cursor.steps - first : batch;
#pragma unroll
      for (int i = 0; i < batch; ++i) {
        if (i < valid) packs[i] = load<PackBytes>(memory.pack(walk, 0, first + i));
      }
      moments.template add<T, PackBytes>(packs, valid, pivots);
    }
    cursor.combine(moments, memory.exchange);
    if (cursor.owner()) {
      memory.store_columns(0, moments.at + 1, cursor);
      memory.store_columns(1, moments.at + 1 + columns, cursor);
      memory.store_columns(2, pivots, cursor);
    }
    __syncthreads();

    const int64_t first_group = block * memory.group_count;
    const double count = double(walk.positions * elements);
    each_group(walk, memory.group_count, [&](int local, bool writes, const auto& sum) {
      writes = writes && first_group + local < walk.groups;
      const auto column_mean = [&](int i) {
        return double(memory.columns[2 * memory.column_count + i]) + double(memory.columns[i]);
      };
      const double mean = sum(column_mean) / double(walk.per_group);
      const double deviations = sum([&](int i) {
        const double deviation = column_mean(i) - mean;
        return double(memory.columns[memory.column_count + i]) + count * deviation * deviation;
      });
      if (!writes) return;
      const double group_elements = count * double(walk.per_group);
      const auto statistics =
          finish_group<A>(op, first_group + local, group_elements, mean, deviations / group_elements);
      memory.groups[local] = statistics.mean;
      memory.groups[memory.group_count + local] = statistics.rstd;
    });
    __syncthreads();

    if (cursor.steps > 0) {
      Affine<A, columns> affine;
      A rstd[columns];
      memory.load_groups(0, cursor, affine.mean);
      memory.load_groups(1, cursor, rstd);
      affine.template load_parameters<T>(op, walk.channel(cursor.column), rstd);
#pragma unroll 2
      for (int i = 0; i < cursor.steps; ++i) {
        Pack<PackBytes> residual = {};
        if (op.residual != nullptr) residual = load_once<PackBytes>(static_cast<const T*>(op.residual) + cursor.offset);
        store<PackBytes>(
            static_cast<T*>(op.y) + cursor.offset,
            normalize<T, PackBytes, columns, false>(op, affine, load<PackBytes>(memory.pack(walk, 0, i)), residual));
        cursor.advance();
      }
    }
  }
  if (op.num_batches_tracked != nullptr && blockIdx.x == 0 && threadIdx.x == 0) ++*op.num_batches_tracked;
}

// What passes the activation of grad_output. Behind a ReLU, 0 where y <= 0, y being what forward gave or found from x
// again; where y is NaN the gradient passes. Else `known` is the residual.
template <class T, int PackBytes, int Columns, bool Acts, class A>
__device__ __forceinline__ void load_gradient(const Backward& op, const Affine<A, Columns>& affine,
                                              const Pack<PackBytes>& grad_output, const Pack<PackBytes>& known,
                                              const A (&x)[PackBytes / sizeof(T)], A (&g)[PackBytes / sizeof(T)]) {
  constexpr int width = PackBytes / sizeof(T);
  widen<T, PackBytes>(grad_output, g);
  const bool reads = op.y_or_residual != nullptr;
  if constexpr (Acts) {
    A z[width], residual[width];
    if (reads) widen<T, PackBytes>(known, residual);
#pragma unroll
    for (int k = 0; k < width; ++k) z[k] = affine(x[k], k % Columns) + (reads ? residual[k] : A(0));
    with_act<A>(op.activation, [&](auto act) {
#pragma unroll
      for (int k = 0; k < width; ++k) g[k] = act.gradient(g[k], z[k], A(op.negative_slope));
    });
  } else {
    if (op.activation != Activation::Relu) return;
    A y[width];
    if (reads) {
      widen<T, PackBytes>(known, y);
    } else {
#pragma unroll
      for (int k = 0; k < width; ++k) y[k] = affine(x[k], k % Columns);
      widen<T, PackBytes>(narrow<T, PackBytes>(y), y);
    }
#pragma unroll
    for (int k = 0; k < width; ++k) g[k] = y[k] <= A(0) ? A(0) : g[k];
  }
}

template <class T, int PackBytes, int Columns, class A>
__device__ __forceinline__ void add_gradient(Sums<A, Columns>& sums, const Affine<A, Columns>& affine,
                                             const A (&x)[PackBytes / sizeof(T)], const A (&g)[PackBytes / sizeof(T)]) {
#pragma unroll
  for (int k = 0; k < int(PackBytes / sizeof(T)); ++k) {
    sums.at[k % Columns] += g[k];
    sums.at[Columns + k % Columns] += g[k] * (x[k] - affine.mean[k % Columns]);
  }
}

// grad_input = rstd * (weight * g - mean(wg) - xhat * mean(wg * xhat)) with the factors of each column ready.
template <class A, int Columns>
struct InputTerms {
  A constant[Columns], slope[Columns];

  // From mean(wg) and mean(wg * xhat).
  __device__ __forceinline__ void finish(const A (&rstd)[Columns]) {
#pragma unroll
    for (int k = 0; k < Columns; ++k) {
      constant[k] *= rstd[k];
      slope[k] *= rstd[k] * rstd[k];
    }
  }
  template <class T, int PackBytes>
  __device__ __forceinline__ Pack<PackBytes> input(const Affine<A, Columns>& affine,
                                                   const A (&x)[PackBytes / sizeof(T)],
                                                   const A (&g)[PackBytes / sizeof(T)]) const {
    A values[PackBytes / sizeof(T)];
#pragma unroll
    for (int k = 0; k < int(PackBytes / sizeof(T)); ++k) {
      const int c = k % Columns;
      values[k] = g[k] * affine.scale[c] - constant[c] - (x[k] - affine.mean[c]) * slope[c];
    }
    return narrow<T, PackBytes>(values);
  }
};

// Sum: the pass that adds up, and writes what needs no sums. Otherwise the pass that writes grad_input from `means`:
// the two sums of each channel in batch norm, mean(wg) and mean(wg * xhat) of each group in group norm.
template <class T, int PackBytes, bool ChannelsLast, bool Sum, bool Acts>
__global__ void __launch_bounds__(pass_threads, (heavy<T, PackBytes, ChannelsLast> ? 2 : 3) - int(Acts))
    backward_pass(const Backward op, const Walk walk, accumulate_t<T>* partial, const accumulate_t<T>* means) {
  using A = accumulate_t<T>;
  using Position = Cursor<T, PackBytes, ChannelsLast>;
  constexpr int width = Position::width, columns = Position::columns, batch = batch_of<PackBytes> / 2;
  using State = Sums<A, columns>;
  __shared__ A exchange[Sum ? pass_threads / (ChannelsLast ? 2 : 1) * State::size : 1];
  const bool activates = op.activation != Activation::None, reads_known = activates && op.y_or_residual != nullptr;
  const bool reads_x =
      Sum || (op.grad_input != nullptr && !op.statistics_given) || (activates && (Acts || !reads_known));
  for (int64_t block = blockIdx.x; block < walk.blocks(); block += gridDim.x) {
    const Position cursor(walk, Sum ? block : walk.blocks() - 1 - block);
    Affine<A, columns> affine{};
    InputTerms<A, columns> terms{};
    if (cursor.steps > 0) {
      A rstd[columns];
      affine.template load<T>(op, walk, cursor.column, rstd);
      if (!Sum && !op.statistics_given && op.grad_input != nullptr) {
        load_of_groups(means, walk, cursor.column, terms.constant);
        load_of_groups(means + walk.groups, walk, cursor.column, terms.slope);
        if (op.shape.groups == 0) {
          A weight[columns];
          load_parameter<T>(op.weight, op.parameter_dtype, cursor.column, A(1), weight);
#pragma unroll
          for (int k = 0; k < columns; ++k) {
            terms.constant[k] *= weight[k] / A(op.count);
            terms.slope[k] *= rstd[k] * weight[k] / A(op.count);
          }
        }
        terms.finish(rstd);
      }
    }
    State sums{};
    each_batch<batch>(cursor, [&](const int64_t (&offsets)[batch], int valid) {
      Pack<PackBytes> grad_output[batch], x[batch] = {}, known[batch];
      load_batch<T, PackBytes>(op.grad_output, offsets, valid, grad_output);
      if (reads_x) load_batch<T, PackBytes>(op.x, offsets, valid, x);
      if (reads_known) load_batch<T, PackBytes>(op.y_or_residual, offsets, valid, known);
#pragma unroll
      for (int i = 0; i < batch; ++i) {
        if (i >= valid) continue;
        A values[width], g[width];
        widen<T, PackBytes>(x[i], values);
        load_gradient<T, PackBytes, columns, Acts>(op, affine, grad_output[i], known[i], values, g);
        if (op.grad_residual != nullptr) {
          store<PackBytes>(static_cast<T*>(op.grad_residual) + offsets[i], narrow<T, PackBytes>(g));
        }
        if (Sum) add_gradient<T, PackBytes>(sums, affine, values, g);
        if (op.grad_input == nullptr || (Sum && !op.statistics_given)) continue;
        Pack<PackBytes> result;
        if (op.statistics_given) {
#pragma unroll
          for (int k = 0; k < width; ++k) g[k] *= affine.scale[k % columns];
          result = narrow<T, PackBytes>(g);
        } else {
          result = terms.template input<T, PackBytes>(affine, values, g);
        }
        store_once<PackBytes>(static_cast<T*>(op.grad_input) + offsets[i], result);
      }
    });
    if constexpr (Sum) {
      cursor.combine(sums, exchange);
      if (cursor.owner()) store_partial(sums, 0, cursor, partial);
    }
  }
}

// Sums of each channel over samples and pieces.
template <class A>
__global__ void __launch_bounds__(finish_threads)
    backward_channels(const Backward op, const Walk walk, const A* partial, A* sums) {
  using State = Sums<double, 1>;
  __shared__ double exchange[finish_threads / 2 * State::size];
  const int64_t samples = walk.columns / walk.channels;
  const A* rstd = static_cast<const A*>(op.rstd);
  for (int64_t first = int64_t(blockIdx.x) * finish_lanes; first < walk.channels;
       first += int64_t(gridDim.x) * finish_lanes) {
    const int64_t channel = first + threadIdx.x % finish_lanes;
    State total{};
    add_entries(total, channel, walk.channels, samples * walk.pieces, exchange, [&](int64_t entry) {
      const int64_t sample = divide(entry, walk.pieces), column = sample * walk.channels + channel;
      const A* from = partial + (entry - sample * walk.pieces) * walk.columns + column;
      const double scale = op.shape.groups > 0 ? double(rstd[divide(column, walk.per_group)]) : 1.0;
      total.merge({{double(from[0]), double(from[walk.pieces * walk.columns]) * scale}});
    });
    if (threadIdx.x >= finish_lanes || channel >= walk.channels) continue;
    if (sums != nullptr) {
      sums[channel] = A(total.at[0]);
      sums[walk.channels + channel] = A(total.at[1]);
    }
    const double scale = op.shape.groups > 0 ? 1.0 : double(rstd[channel]);
    if (op.grad_weight != nullptr) store_one(op.grad_weight, op.parameter_dtype, channel, total.at[1] * scale);
    if (op.grad_bias != nullptr) store_one(op.grad_bias, op.parameter_dtype, channel, total.at[0]);
  }
}

// mean(wg) and mean(wg * xhat) of each group of group norm.
template <class A>
__global__ void __launch_bounds__(finish_threads)
    backward_groups(const Backward op, const Walk walk, const A* partial, A* means) {
  using State = Sums<double, 1>;
  __shared__ double exchange[finish_threads / 2 * State::size];
  for (int64_t first = int64_t(blockIdx.x) * finish_lanes; first < walk.groups;
       first += int64_t(gridDim.x) * finish_lanes) {
    const int64_t group = first + threadIdx.x % finish_lanes;
    State total{};
    add_entries(total, group, walk.groups, walk.per_group * walk.pieces, exchange, [&](int64_t entry) {
      const int64_t piece = divide(entry, walk.per_group);
      const int64_t column = group * walk.per_group + entry - piece * walk.per_group;
      const A* from = partial + piece * walk.columns + column;
      const double weight = op.weight != nullptr ? load_one(op.weight, op.parameter_dtype, walk.channel(column)) : 1.0;
      total.merge({{double(from[0]) * weight, double(from[walk.pieces * walk.columns]) * weight}});
    });
    if (threadIdx.x >= finish_lanes || group >= walk.groups) continue;
    means[group] = A(total.at[0] / op.count);
    means[walk.groups + group] = A(total.at[1] * double(static_cast<const A*>(op.rstd)[group]) / op.count);
  }
}

template <class T, int PackBytes, bool ChannelsLast>
__global__ void __launch_bounds__(block_threads, sizeof(T) > 4 || (ChannelsLast && PackBytes == 16) ? 1 : 2)
    backward_block(const Backward op, const Walk walk, accumulate_t<T>* partial) {
  using A = accumulate_t<T>;
  using Position = Cursor<T, PackBytes, ChannelsLast>;
  constexpr int width = Position::width, columns = Position::columns;
  using State = Sums<A, columns>;
  const bool masks = op.activation == Activation::Relu, reads_y = masks && op.y_or_residual != nullptr;
  const BlockMemory<A, PackBytes, columns> memory(walk, reads_y ? 3 : 2);
  for (int64_t block = blockIdx.x; block < walk.blocks(); block += gridDim.x) {
    Position cursor(walk, block), again = cursor;
    memory.template fetch<T>(0, op.x, cursor);
    memory.template fetch<T>(1, op.grad_output, cursor);
    if (reads_y) memory.template fetch<T>(2, op.y_or_residual, cursor);
    copy_async_commit();
    Affine<A, columns> affine{};
    A rstd[columns] = {};
    if (cursor.steps > 0) affine.template load<T>(op, walk, cursor.column, rstd);
    copy_async_wait<0>();
    State sums{};
#pragma unroll 2
    for (int i = 0; i < cursor.steps; ++i) {
      A x[width], g[width];
      Pack<PackBytes> y = {};
      if (reads_y) y = load<PackBytes>(memory.pack(walk, 2, i));
      widen<T, PackBytes>(load<PackBytes>(memory.pack(walk, 0, i)), x);
      load_gradient<T, PackBytes, columns, false>(op, affine, load<PackBytes>(memory.pack(walk, 1, i)), y, x, g);
      if (masks) store<PackBytes>(memory.pack(walk, 1, i), narrow<T, PackBytes>(g));
      if (op.grad_residual != nullptr) {
        store<PackBytes>(static_cast<T*>(op.grad_residual) + again.offset, narrow<T, PackBytes>(g));
        again.advance();
      }
      add_gradient<T, PackBytes>(sums, affine, x, g);
    }
    cursor.combine(sums, memory.exchange);
    if (cursor.owner()) {
      memory.store_columns(0, sums.at, cursor);
      memory.store_columns(1, sums.at + columns, cursor);
      if (partial != nullptr) store_partial(sums, 0, cursor, partial);
    }
    __syncthreads();

    each_group(walk, memory.group_count, [&](int local, bool writes, const auto& sum) {
      const int64_t group = block * memory.group_count + local;
      const auto weight = [&](int i) {
        const int64_t channel = walk.channel(block * memory.column_count + i);
        return op.weight != nullptr ? load_one(op.weight, op.parameter_dtype, channel) : 1.0;
      };
      const double of_g = sum([&](int i) { return double(memory.columns[i]) * weight(i); });
      const double of_gx = sum([&](int i) { return double(memory.columns[memory.column_count + i]) * weight(i); });
      if (!writes || group >= walk.groups) return;
      const double group_rstd = double(static_cast<const A*>(op.rstd)[group]);
      memory.groups[local] = A(of_g / op.count);
      memory.groups[memory.group_count + local] = A(of_gx * group_rstd / op.count);
      if (op.shape.groups > 0) return;
      const double channel_gx = double(memory.columns[memory.column_count + local]) * group_rstd;
      if (op.grad_weight != nullptr) store_one(op.grad_weight, op.parameter_dtype, group, channel_gx);
      if (op.grad_bias != nullptr) store_one(op.grad_bias, op.parameter_dtype, group, double(memory.columns[local]));
    });
    __syncthreads();

    if (cursor.steps > 0) {
      InputTerms<A, columns> terms;
      memory.load_groups(0, cursor, terms.constant);
      memory.load_groups(1, cursor, terms.slope);
      terms.finish(rstd);
#pragma unroll 2
      for (int i = 0; i < cursor.steps; ++i) {
        A x[width], g[width];
        widen<T, PackBytes>(load<PackBytes>(memory.pack(walk, 0, i)), x);
        widen<T, PackBytes>(load<PackBytes>(memory.pack(walk, 1, i)), g);
        store<PackBytes>(static_cast<T*>(op.grad_input) + cursor.offset,
                         terms.template input<T, PackBytes>(affine, x, g));
        cursor.advance();
      }
    }
  }
}

int ceil_log2(int64_t n) {
  int bits = 0;
  while (int64_t(1) << bits < n) ++bits;
  return bits;
}
int floor_log2(int64_t n) { return ceil_log2(n / 2 + 1); }

template <class T, int PackBytes, bool ChannelsLast>
Walk walk_of(const Shape& shape) {
  constexpr int width = PackBytes / sizeof(T);
  const int64_t slices = shape.groups > 0 ? 1 : shape.batch;
  Walk walk{};
  walk.channels = shape.channels;
  walk.columns = shape.groups > 0 ? shape.batch * shape.channels : shape.channels;
  walk.per_group = shape.groups > 0 ? shape.channels / shape.groups : 1;
  walk.groups = walk.columns / walk.per_group;
  walk.group_lanes = 1 << std::min(5, ceil_log2(walk.per_group));
  if (ChannelsLast) {
    walk.units = walk.columns / width;
    walk.positions = walk.slice_positions = slices * shape.space;
    walk.position_stride = shape.channels;
    walk.channel_stride = 1;
  } else {
    walk.units = walk.columns;
    walk.slice_positions = shape.space / width;
    walk.positions = slices * walk.slice_positions;
    walk.position_stride = width;
    walk.slice_stride = shape.channels * shape.space;
    walk.channel_stride = shape.space;
  }
  walk.sample_stride = shape.channels * shape.space;
  const auto offset = [&](int64_t position) {
    return position / walk.slice_positions * walk.slice_stride + position % walk.slice_positions * walk.position_stride;
  };
  walk.middle_offset = offset(walk.positions / 2);
  walk.last_offset = offset(walk.positions - 1);
  return walk;
}

int64_t step_of(const Walk& walk, bool channels_last) {
  return channels_last ? walk.threads >> walk.lane_bits : int64_t(1) << walk.lane_bits;
}

// Completes a walk whose threads, lane_bits, units_per_block and piece are set.
void complete(Walk& walk, bool channels_last) {
  const int64_t step = step_of(walk, channels_last), slices = step / walk.slice_positions;
  walk.pieces = divide_up(walk.positions, walk.piece);
  walk.tiles = divide_up(walk.units, walk.units_per_block);
  walk.steps = int(divide_up(walk.piece, step));
  if (channels_last) {
    walk.step_offset = step * walk.position_stride;
  } else {
    walk.step_position = step - slices * walk.slice_positions;
    walk.step_offset = slices * walk.slice_stride + walk.step_position * walk.position_stride;
    walk.wrap_offset = walk.slice_stride - walk.slice_positions * walk.position_stride;
  }
}

// For the passes: some 2048 blocks, but 8 to 64 packs a thread; 16 in group norm, where a sample's bits must not depend
// on how many others there are.
template <class T, int PackBytes, bool ChannelsLast>
void cut_into_pieces(Walk& walk, int64_t groups) {
  constexpr int columns = ChannelsLast ? PackBytes / sizeof(T) : 1;
  walk.threads = pass_threads;
  walk.lane_bits = ChannelsLast ? std::min(5, ceil_log2(walk.channels / columns))
                                : std::min(8, floor_log2(std::max<int64_t>(1, walk.positions / 2)));
  walk.units_per_block = ChannelsLast ? 1 << walk.lane_bits : pass_threads >> walk.lane_bits;
  const int64_t step = step_of(walk, ChannelsLast);
  const int64_t depth =
      groups > 0 ? 16 : std::clamp<int64_t>(walk.units * walk.positions / (pass_threads * 2048), 8, 64);
  walk.piece = step * divide_up(divide_up(walk.positions, divide_up(walk.positions, step * depth)), step);
  complete(walk, ChannelsLast);
}

// For the kernels whose blocks hold whole groups: the dynamic shared memory they need, or 0 where they cannot.
template <class T, int PackBytes, bool ChannelsLast>
int64_t fit_into_blocks(Walk& walk, int tensors) {
  constexpr int columns = ChannelsLast ? PackBytes / sizeof(T) : 1;
  constexpr int exchanged = Moments<accumulate_t<T>, columns>::size;
  const Device device = current_device();
  const int64_t limit = device.shared_per_block;
  const auto try_lanes = [&](int lane_bits, int64_t units, int64_t threads) -> int64_t {
    walk.lane_bits = lane_bits;
    walk.units_per_block = int(units);
    walk.threads = int(threads);
    walk.piece = walk.positions;
    complete(walk, ChannelsLast);
    const int64_t values =
        3 * units * columns + 2 * (units * columns / walk.per_group) + threads * exchanged / (ChannelsLast ? 2 : 1);
    const int64_t bytes = int64_t(tensors) * walk.steps * threads * PackBytes + values * sizeof(accumulate_t<T>);
    return bytes <= limit ? bytes : 0;
  };
  if (walk.positions > limit) return 0;
  if (!ChannelsLast) {
    if (walk.per_group > block_threads) return 0;
    // Some 8 packs a thread, but adjacent threads in 128 bytes.
    const int coalesced = std::min(ceil_log2(walk.positions), PackBytes == 16 ? 3 : 5);
    const int lane_bits =
        std::min(floor_log2(block_threads / walk.per_group), std::max(coalesced, ceil_log2(walk.positions / 8)));
    // Several small groups a block, but two blocks a multiprocessor come first. A group's threads are the same either
    // way.
    const int64_t packed =
        std::min<int64_t>(256 / (walk.per_group << lane_bits), walk.groups / (2 * int64_t(device.multiprocessors)));
    const int64_t units = walk.per_group * std::max<int64_t>(1, packed);
    return try_lanes(lane_bits, units, divide_up(units << lane_bits, 32) * 32);
  }
  // 128 bytes of a row at a time, more where there are few rows or a group is wider, 64 where that does not fit.
  const int row_bits = ceil_log2(walk.positions);
  for (const int lane_bits : {std::clamp(8 - row_bits, 3, 7), 3, 4, 5, 6, 7, 2}) {
    if ((columns << lane_bits) % walk.per_group != 0) continue;
    const int64_t threads =
        std::clamp<int64_t>(int64_t(1) << std::max(lane_bits, lane_bits + row_bits - 2), 64, block_threads);
    const int64_t bytes = try_lanes(lane_bits, int64_t(1) << lane_bits, threads);
    if (bytes > 0) return bytes;
  }
  return 0;
}

// Whether 16 bytes at a time will do.
bool wide(const Forward& op, bool channels_last) {
  return are_aligned(16, op.x, op.residual, op.y) &&
         (!channels_last || are_aligned(16, op.weight, op.bias, op.mean, op.rstd, op.running_mean, op.running_var));
}
bool wide(const Backward& op, bool channels_last) {
  return are_aligned(16, op.grad_output, op.x, op.y_or_residual, op.grad_input, op.grad_residual) &&
         (!channels_last || are_aligned(16, op.weight, op.bias, op.mean, op.rstd, op.sums));
}

// Calls f(T(), PackBytes, ChannelsLast), the latter two as integral constants. Where space is 1 both layouts are the
// same memory, and a thread to a channel suits it better; so they are with one channel, and the other way round.
template <class Op, class F>
void with_types(const Op& op, const F& f) {
  const bool channels_last = op.shape.channels > 1 && (op.shape.channels_last || op.shape.space == 1);
  const auto with_layout = [&](auto type, auto pack_bytes) {
    channels_last ? f(type, pack_bytes, std::true_type()) : f(type, pack_bytes, std::false_type());
  };
  with_type(op.dtype, [&](auto type) {
    constexpr int element = sizeof(type);
    const bool whole = (channels_last ? op.shape.channels : op.shape.space) * element % 16 == 0;
    if (whole && wide(op, channels_last)) {
      with_layout(type, std::integral_constant<int, 16>());
    } else {
      with_layout(type, std::integral_constant<int, element>());
    }
  });
}

// Whether the op's activation takes kernels of its own.
template <class Op>
bool acts(const Op& op) {
  return op.activation != Activation::None && op.activation != Activation::Relu;
}

// How an op runs: a pure function of the op and the device, because the caller allocates the workspace by it.
struct Plan {
  Walk walk;
  bool sums;               // statistics, or sums of gradients, are to be computed
  int64_t shared_bytes;    // of a block that holds whole groups; 0: in passes
  int64_t partial, total;  // values in the workspace: of the pieces; of sums or means
};

template <class T, int PackBytes, bool ChannelsLast>
Plan plan(const Forward& op) {
  Plan result{walk_of<T, PackBytes, ChannelsLast>(op.shape), op.statistics == Statistics::Compute, 0, 0, 0};
  // A cumulative average has to count the batch before any block uses the count.
  if (result.sums && op.y != nullptr && op.momentum >= 0 && !acts(op)) {
    result.shared_bytes = fit_into_blocks<T, PackBytes, ChannelsLast>(result.walk, 1);
  }
  if (result.shared_bytes == 0) {
    cut_into_pieces<T, PackBytes, ChannelsLast>(result.walk, op.shape.groups);
    if (result.sums) result.partial = 2 * result.walk.pieces * result.walk.columns;
  }
  return result;
}

template <class T, int PackBytes, bool ChannelsLast>
void forward(const Forward& op, void* stream) {
  using A = accumulate_t<T>;
  const Plan how = plan<T, PackBytes, ChannelsLast>(op);
  const Walk& walk = how.walk;
  const unsigned grid = grid_of(walk.blocks());
  constexpr int64_t elements = ChannelsLast ? 1 : PackBytes / sizeof(T);  // of a column at a position
  A* partial = static_cast<A*>(op.workspace);
  if (how.shared_bytes > 0) {
    launch("batch_norm forward_block", forward_block<T, PackBytes, ChannelsLast>, grid, walk.threads, how.shared_bytes,
           stream, op, walk, elements);
    return;
  }
  if (how.sums) {
    launch("batch_norm forward_statistics", forward_statistics<T, ChannelsLast, PackBytes>, grid, pass_threads, 0,
           stream, op, walk, partial);
    launch("batch_norm forward_finish", forward_finish<A>, grid_of(divide_up(walk.groups, finish_lanes)),
           finish_threads, 0, stream, op, walk, elements, partial);
  }
  if (op.y != nullptr || op.statistics == Statistics::Running) {
    const auto apply =
        acts(op) ? forward_apply<T, PackBytes, ChannelsLast, true> : forward_apply<T, PackBytes, ChannelsLast, false>;
    launch("batch_norm forward_apply", apply, grid, pass_threads, 0, stream, op, walk);
  }
}

template <class T, int PackBytes, bool ChannelsLast>
Plan plan(const Backward& op) {
  const bool through_statistics = op.grad_input != nullptr && !op.statistics_given;
  const bool parameters = op.grad_weight != nullptr || op.grad_bias != nullptr;
  Plan result{walk_of<T, PackBytes, ChannelsLast>(op.shape),
              !op.sums_given && (through_statistics || parameters || op.sums != nullptr), 0, 0, 0};
  Walk& walk = result.walk;
  if (result.sums && through_statistics && op.sums == nullptr && !acts(op)) {
    result.shared_bytes = fit_into_blocks<T, PackBytes, ChannelsLast>(walk, op.y_or_residual != nullptr ? 3 : 2);
  }
  if (result.shared_bytes > 0) {
    if (op.shape.groups > 0 && parameters) result.partial = 2 * walk.columns;
  } else {
    cut_into_pieces<T, PackBytes, ChannelsLast>(walk, op.shape.groups);
    if (result.sums) {
      result.partial = 2 * walk.pieces * walk.columns;
      if (through_statistics && op.sums == nullptr) result.total = 2 * walk.groups;
    }
  }
  return result;
}

template <class T, int PackBytes, bool ChannelsLast>
void backward(const Backward& op, void* stream) {
  using A = accumulate_t<T>;
  const Plan how = plan<T, PackBytes, ChannelsLast>(op);
  const Walk& walk = how.walk;
  const unsigned grid = grid_of(walk.blocks());
  A* partial = how.partial > 0 ? static_cast<A*>(op.workspace) : nullptr;
  A* total = how.total > 0 ? static_cast<A*>(op.workspace) + how.partial : static_cast<A*>(op.sums);
  const auto channels = [&](A* sums) {
    launch("batch_norm backward_channels", backward_channels<A>, grid_of(divide_up(walk.channels, finish_lanes)),
           finish_threads, 0, stream, op, walk, partial, sums);
  };
  if (how.shared_bytes > 0) {
    launch("batch_norm backward_block", backward_block<T, PackBytes, ChannelsLast>, grid, walk.threads,
           how.shared_bytes, stream, op, walk, partial);
    if (partial != nullptr) channels(nullptr);
    return;
  }
  Backward rest = op;
  if (how.sums) {
    const auto pass = acts(op) ? backward_pass<T, PackBytes, ChannelsLast, true, true>
                               : backward_pass<T, PackBytes, ChannelsLast, true, false>;
    launch("batch_norm backward_pass", pass, grid, pass_threads, 0, stream, op, walk, partial, nullptr);
    if (op.shape.groups == 0) channels(total);
    if (op.shape.groups > 0 && (op.grad_weight != nullptr || op.grad_bias != nullptr)) channels(nullptr);
    if (op.shape.groups > 0 && total != nullptr) {
      launch("batch_norm backward_groups", backward_groups<A>, grid_of(divide_up(walk.groups, finish_lanes)),
             finish_threads, 0, stream, op, walk, partial, total);
    }
    if (op.grad_residual != nullptr) {
      rest.grad_output = op.grad_residual;
      rest.grad_residual = nullptr;
      rest.activation = Activation::None;
    }
    if (op.statistics_given) rest.grad_input = nullptr;
  }
  if (rest.grad_input != nullptr || rest.grad_residual != nullptr) {
    const auto pass = acts(rest) ? backward_pass<T, PackBytes, ChannelsLast, false, true>
                                 : backward_pass<T, PackBytes, ChannelsLast, false, false>;
    launch("batch_norm backward_pass", pass, grid, pass_threads, 0, stream, rest, walk, nullptr, total);
  }
}

template <class Op>
int64_t workspace(const Op& op) {
  int64_t bytes = 0;
  with_types(op, [&](auto type, auto pack_bytes, auto channels_last) {
    using T = decltype(type);
    const Plan how = plan<T, pack_bytes, channels_last>(op);
    bytes = (how.partial + how.total) * int64_t(sizeof(accumulate_t<T>));
  });
  return bytes;
}

}  // namespace

void forward_cuda(const Forward& op, void* stream) {
  with_types(op, [&](auto type, auto pack_bytes, auto channels_last) {
    forward<decltype(type), pack_bytes, channels_last>(op, stream);
  });
}

void backward_cuda(const Backward& op, void* stream) {
  with_types(op, [&](auto type, auto pack_bytes, auto channels_last) {
    backward<decltype(type), pack_bytes, channels_last>(op, stream);
  });
}

int64_t forward_workspace_cuda(const Forward& op) { return workspace(op); }
int64_t backward_workspace_cuda(const Backward& op) { return workspace(op); }

}  // namespace dlkit::batch_norm
