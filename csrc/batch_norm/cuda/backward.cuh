// Backward: sums of the columns' gradients, and grad_input from them.
#pragma once

#include "groups.cuh"

namespace dlkit::batch_norm {
namespace {

using namespace dlkit::cuda;

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
      values[k] = multiply_add(affine.mean[c] - x[k], slope[c], multiply_add(g[k], affine.scale[c], -constant[c]));
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

}  // namespace
}  // namespace dlkit::batch_norm
