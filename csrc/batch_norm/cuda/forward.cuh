// Forward: moments of the columns, statistics of the groups, and what applies them.
#pragma once

#include "groups.cuh"

namespace dlkit::batch_norm {
namespace {

using namespace dlkit::cuda;

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

// Count, sum and sum of squared deviations from the mean of each column. The sum and not the mean: a mean is rounded
// several times where two are merged, a sum once, and an infinity stays one. Where values are as fine as sums
// (Compensated), what that rounding takes is added up beside it until settle().
template <class A, int Columns, bool Compensated>
struct Moments {
  static constexpr int sum = 1, deviations = sum + Columns, lost = deviations + Columns;
  static constexpr int size = lost + (Compensated ? Columns : 0);
  A at[size];

  __device__ __forceinline__ void merge(const Moments& other) {
    if (other.at[0] == A(0)) return;
    const A count = at[0] + other.at[0], scale = at[0] > A(0) ? A(1) / (at[0] * other.at[0] * count) : A(0);
#pragma unroll
    for (int k = 0; k < Columns; ++k) {
      const A ours = at[sum + k], theirs = other.at[sum + k];
      const A difference = theirs * at[0] - ours * other.at[0];  // of the means, times both counts
      at[deviations + k] += other.at[deviations + k] + difference * (difference * scale);
      at[sum + k] = ours + theirs;
      if constexpr (Compensated) {
        const A of_theirs = at[sum + k] - ours, of_ours = at[sum + k] - of_theirs;
        at[lost + k] += other.at[lost + k] + ((ours - of_ours) + (theirs - of_theirs));
      }
    }
    at[0] = count;
  }

  __device__ __forceinline__ void settle() {
    if constexpr (Compensated) {
#pragma unroll
      for (int k = 0; k < Columns; ++k) {
        if (isfinite(at[lost + k])) at[sum + k] += at[lost + k];  // it is NaN after an infinity
      }
    }
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
        part.at[sum + k % Columns] += Full || i < valid ? values[k] - pivots[k % Columns] : A(0);
    }
    const A inverse = A(1) / part.at[0];
#pragma unroll
    for (int i = 0; i < Batch; ++i) {
      A values[width];
      widen<T, PackBytes>(packs[i], values);
#pragma unroll
      for (int k = 0; k < width; ++k) {
        const int c = k % Columns;
        const A deviation = Full || i < valid ? multiply_add(-part.at[sum + c], inverse, values[k] - pivots[c]) : A(0);
        part.at[deviations + c] += deviation * deviation;
      }
    }
    merge(part);
  }
};

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

// PackBytes is last, unlike in kernels that also store tensors: what is loaded here 16 bytes at a time is not stored.
template <class T, bool ChannelsLast, int PackBytes>
__global__ void __launch_bounds__(pass_threads, heavy<T, PackBytes, ChannelsLast> ? 3 : 4)
    forward_statistics(const Forward op, const Walk walk, accumulate_t<T>* partial) {
  using A = accumulate_t<T>;
  using Position = Cursor<T, PackBytes, ChannelsLast>;
  using State = Moments<A, Position::columns, std::is_same_v<T, A>>;
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
    moments.settle();
    if (cursor.owner()) store_partial(moments, State::sum, cursor, partial);
  }
  // Here, because the next kernel's blocks all read it.
  if (op.num_batches_tracked != nullptr && blockIdx.x == 0 && threadIdx.x == 0) ++*op.num_batches_tracked;
}

template <class A>
__global__ void __launch_bounds__(finish_threads)
    forward_finish(const Forward op, const Walk walk, int64_t elements, const A* partial) {
  using State = Moments<double, 1, false>;
  __shared__ double exchange[finish_threads / 2 * State::size];
  for (int64_t first = int64_t(blockIdx.x) * finish_lanes; first < walk.groups;
       first += int64_t(gridDim.x) * finish_lanes) {
    const int64_t group = first + threadIdx.x % finish_lanes;
    const bool has_pivots = op.dtype == DType::F32 || op.dtype == DType::F64;
    State total{};  // of what differs from the first column's pivot
    const bool pivoted = has_pivots && group < walk.groups;
    const double origin = pivoted ? double(pivot_of<A>(op.x, walk, group * walk.per_group)) : 0.0;
    add_entries(total, group, walk.groups, walk.per_group * walk.pieces, exchange, [&](int64_t entry) {
      const int64_t piece = divide(entry, walk.per_group), left = walk.positions - piece * walk.piece;
      const int64_t column = group * walk.per_group + entry - piece * walk.per_group;
      const A* from = partial + piece * walk.columns + column;
      const double pivot = pivoted ? double(pivot_of<A>(op.x, walk, column)) : 0.0;
      const double count = double((left < walk.piece ? left : walk.piece) * elements);
      total.merge({{count, count * (pivot - origin) + double(from[0]), double(from[walk.pieces * walk.columns])}});
    });
    if (threadIdx.x < finish_lanes && group < walk.groups) {
      finish_group<A>(op, group, total.at[0], origin + total.at[1] / total.at[0], total.at[2] / total.at[0]);
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

// `count` is a column's. It comes as an argument because a number worked out here would take registers that are
// needed.
template <class T, int PackBytes, bool ChannelsLast>
__global__ void __launch_bounds__(block_threads, sizeof(T) > 4 ? 1 : 2)
    forward_block(const Forward op, const Walk walk, double count, double inverse_count) {
  using A = accumulate_t<T>;
  using Position = Cursor<T, PackBytes, ChannelsLast>;
  constexpr int columns = Position::columns, batch = columns == 8 ? 2 : 4;
  using State = Moments<A, columns, std::is_same_v<T, A>>;
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
    moments.settle();
    if (cursor.owner()) {
      memory.store_columns(0, moments.at + State::sum, cursor);
      memory.store_columns(1, moments.at + State::deviations, cursor);
      memory.store_columns(2, pivots, cursor);
    }
    __syncthreads();

    const int64_t first_group = block * memory.group_count;
    each_group(walk, memory.group_count, [&](int local, bool writes, const auto& sum) {
      writes = writes && first_group + local < walk.groups;
      const auto column_mean = [&](int i) {
        return double(memory.columns[2 * memory.column_count + i]) + double(memory.columns[i]) * inverse_count;
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
      // cursor.column again, which would take registers from there to here.
      const int64_t column = (block * walk.units_per_block + cursor.unit) * columns;
      affine.template load_parameters<T>(op, walk.channel(column), rstd);
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

}  // namespace
}  // namespace dlkit::batch_norm
