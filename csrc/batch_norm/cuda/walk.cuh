// How threads share out a tensor: who owns which columns, the packs that a thread walks over, and how the threads of a
// block merge what they found.
#pragma once

#include "../../common/cuda/launch.cuh"
#include "../../common/cuda/reduce.cuh"
#include "../../common/cuda/vec.cuh"
#include "../kernel.h"

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

// Workspace is [2, pieces, columns]: sums and squared deviations, or the two sums of gradients.
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

}  // namespace
}  // namespace dlkit::batch_norm
