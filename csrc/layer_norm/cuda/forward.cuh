// Forward of rows that one block holds: in registers, or in shared memory.
#pragma once

#include "shared.cuh"

namespace dlkit::layer_norm {
namespace {

using namespace dlkit::cuda;

// Blocks that share a multiprocessor; they hold ptxas to 64, 80 or 128 registers a thread. With the next smaller number
// it spills on sm_100 or sm_120, since a dropout's bits take registers too.
template <class T, int PackBytes, int Lanes, int Packs, bool Drop>
constexpr int forward_resident() {
  constexpr int threads = threads_of<Lanes>, bytes = Packs * PackBytes, words = 16 * int(sizeof(T));
  if (Packs > 4 || sizeof(T) > 4) return (512 + threads - 1) / threads;
  if (Drop && Packs == 4 && PackBytes == 16) return threads > 256 ? 1 : 768 / threads;
  return ((bytes > words ? 768 : 1024) + threads - 1) / threads;
}

template <class T, int PackBytes, int Lanes, int Packs, bool Drop>
__global__ void __launch_bounds__(threads_of<Lanes>, forward_resident<T, PackBytes, Lanes, Packs, Drop>())
    forward_rows(const Forward op) {
  using A = accumulate_t<T>;
  constexpr int width = PackBytes / sizeof(T), threads = threads_of<Lanes>, rows_per_block = threads / Lanes;
  __shared__ A exchange[threads / 32][1], deviation_exchange[threads / 32][deviation_sums<T>];
  const int lane = threadIdx.x % Lanes;
  if (Drop && blockIdx.x == 0 && threadIdx.x == 0) write_state(read(op.dropout.source), op.dropout.rng_state);
  for (int64_t first = int64_t(blockIdx.x) * rows_per_block; first < op.rows;
       first += int64_t(gridDim.x) * rows_per_block) {
    const int64_t row = first + threadIdx.x / Lanes;
    const int packs = row < op.rows ? int(op.cols / width) : 0;
    Pack<PackBytes> values[Packs];
#pragma unroll
    for (int i = 0; i < Packs; ++i) {
      const int at = lane + i * Lanes;
      if (at < packs) values[i] = load_once<PackBytes>(row_of<T>(op.x, row, op.x_stride) + at * width);
    }
#pragma unroll 1
    for (int at = lane; at < packs; at += Lanes) {
      prefetch_parameter<T>(op.weight, op.parameter_dtype, at * width);
      prefetch_parameter<T>(op.bias, op.parameter_dtype, at * width);
    }
    if (op.residual != nullptr) {
      Pack<PackBytes> residual[Packs];
#pragma unroll
      for (int i = 0; i < Packs; ++i) {
        const int at = lane + i * Lanes;
        if (at < packs)
          residual[i] = load_once<PackBytes>(row_of<T>(op.residual, row, op.residual_stride) + at * width);
      }
      if constexpr (Drop) {
        const PhiloxState state = read(op.dropout.source);
#pragma unroll
        for (int i = 0; i < Packs; ++i) {
          const int at = lane + i * Lanes;
          if (at >= packs) continue;
          const uint32_t keep = keep_pack(op.dropout, state, row * op.cols + at * width);
          values[i] = drop_add<T, PackBytes>(values[i], residual[i], keep, A(op.dropout.scale));
        }
      }
#pragma unroll
      for (int i = 0; i < Packs; ++i) {
        const int at = lane + i * Lanes;
        if (at >= packs) continue;
        if constexpr (!Drop) values[i] = add<T, PackBytes>(values[i], residual[i]);
        store<PackBytes>(static_cast<T*>(op.sum) + row * op.cols + at * width, values[i]);
      }
    }
    A mean = 0;
    if (!op.rms) {
      A sum[1] = {0};
#pragma unroll
      for (int i = 0; i < Packs; ++i) {
        if (lane + i * Lanes < packs) sum[0] += pack_sum<T, PackBytes>(values[i]);
      }
      group_sum<Lanes>(sum, exchange);
      mean = sum[0] / A(op.cols);
    }
    A deviations[deviation_sums<T>] = {0};
#pragma unroll
    for (int i = 0; i < Packs; ++i) {
      if (lane + i * Lanes < packs) add_deviations<T, PackBytes>(values[i], mean, deviations);
    }
    group_sum<Lanes>(deviations, deviation_exchange);
    const Statistics<A> statistics = statistics_of(op, mean, deviations);
    if (lane == 0 && packs > 0) store_statistics(op, row, mean, statistics.rstd);
#pragma unroll
    for (int i = 0; i < Packs; ++i) {
      const int at = lane + i * Lanes;
      if (at >= packs) continue;
      store<PackBytes>(static_cast<T*>(op.y) + row * op.cols + at * width,
                       normalize<T, PackBytes>(op, values[i], at * width, statistics));
    }
    if (Lanes > 32) __syncthreads();  // before the next row's exchange
  }
}

// Rows that registers cannot hold, kept in shared memory.
template <class T, int PackBytes>
__global__ void __launch_bounds__(long_threads, 2) forward_shared(const Forward op) {
  using A = accumulate_t<T>;
  constexpr int width = PackBytes / sizeof(T), batch = 4;
  constexpr int run = 32;  // packs in a sum of their own: with one sum for all, the error grows with the row
  __shared__ A exchange[long_threads / 32][1], deviation_exchange[long_threads / 32][deviation_sums<T>];
  unsigned char* cache = dynamic_shared();
  const int64_t packs = op.cols / width;
  for (int64_t row = blockIdx.x; row < op.rows; row += gridDim.x) {
    const T* x = row_of<T>(op.x, row, op.x_stride);
    T* sum_row = op.residual != nullptr ? static_cast<T*>(op.sum) + row * op.cols : nullptr;
    A sum[1] = {0}, run_sum = 0;
    for (int64_t start = threadIdx.x, step = 1; start < packs; start += batch * long_threads, ++step) {
      Pack<PackBytes> values[batch];
#pragma unroll
      for (int i = 0; i < batch; ++i) {
        const int64_t at = start + i * long_threads;
        if (at < packs) values[i] = load_once<PackBytes>(x + at * width);
      }
#pragma unroll
      for (int i = 0; i < batch; ++i) {
        const int64_t at = start + i * long_threads;
        if (at >= packs) continue;
        if (sum_row != nullptr) {
          const T* residual = row_of<T>(op.residual, row, op.residual_stride);
          values[i] = add<T, PackBytes>(values[i], load_once<PackBytes>(residual + at * width));
          store<PackBytes>(sum_row + at * width, values[i]);
        }
        store<PackBytes>(cache + at * PackBytes, values[i]);
        run_sum += pack_sum<T, PackBytes>(values[i]);
      }
      if (step % (run / batch) == 0) {
        sum[0] += run_sum;
        run_sum = 0;
      }
    }
    sum[0] += run_sum;
    // A thread reads back only its own writes: no barrier is needed.
    const auto again = [&](int64_t at) { return load<PackBytes>(cache + at * PackBytes); };
    A mean = 0;
    if (!op.rms) {
      group_sum<long_threads>(sum, exchange);
      mean = sum[0] / A(op.cols);
    }
    A deviations[deviation_sums<T>] = {0};
    for (int64_t start = threadIdx.x; start < packs; start += run * long_threads) {
      A part[deviation_sums<T>] = {0};
#pragma unroll 4
      for (int64_t at = start; at < packs && at < start + run * long_threads; at += long_threads) {
        add_deviations<T, PackBytes>(again(at), mean, part);
      }
#pragma unroll
      for (int i = 0; i < deviation_sums<T>; ++i) deviations[i] += part[i];
    }
    group_sum<long_threads>(deviations, deviation_exchange);
    const Statistics<A> statistics = statistics_of(op, mean, deviations);
    if (threadIdx.x == 0) store_statistics(op, row, mean, statistics.rstd);
#pragma unroll 4
    for (int64_t at = threadIdx.x; at < packs; at += long_threads) {
      store<PackBytes>(static_cast<T*>(op.y) + row * op.cols + at * width,
                       normalize<T, PackBytes>(op, again(at), at * width, statistics));
    }
    __syncthreads();  // before the next row's exchange
  }
}

// Rows of odd width or address, kept in shared memory: [2, rows_per_block] slots, the second half for residuals. A
// thread takes every Lanes-th element, in each pass the same ones.
template <class T, int Lanes>
__global__ void __launch_bounds__(threads_of<Lanes>, (sizeof(T) > 4 ? 1024 : 1536) / threads_of<Lanes>)
    forward_odd(const Forward op) {
  using A = accumulate_t<T>;
  constexpr int pack_bytes = sizeof(T), threads = threads_of<Lanes>, rows_per_block = threads / Lanes;
  constexpr int run = 32;  // elements in a sum of their own
  __shared__ A exchange[threads / 32][1], deviation_exchange[threads / 32][deviation_sums<T>];
  const int lane = threadIdx.x % Lanes, group = threadIdx.x / Lanes;
  const int row_bytes = int(op.cols * sizeof(T)), slot = slot_bytes<pack_bytes>(row_bytes);
  unsigned char* const slots = dynamic_shared() + group * slot;
  for (int64_t first = int64_t(blockIdx.x) * rows_per_block; first < op.rows;
       first += int64_t(gridDim.x) * rows_per_block) {
    const int64_t row = first + group;
    const int cols = row < op.rows ? int(op.cols) : 0;
    const T* x_row = row_of<T>(op.x, row, op.x_stride);
    const T* residual_row = row_of<T>(op.residual, row, op.residual_stride);
    if (cols > 0) {
      copy_row_async<Lanes>(slots, x_row, row_bytes, lane);
      if (op.residual != nullptr) {
        copy_row_async<Lanes>(slots + rows_per_block * slot, residual_row, row_bytes, lane);
      }
    }
    copy_async_commit();
#pragma unroll 1
    for (int at = lane; at < cols; at += Lanes) {
      prefetch_parameter<T>(op.weight, op.parameter_dtype, at);
      prefetch_parameter<T>(op.bias, op.parameter_dtype, at);
    }
    copy_async_wait<0>();
    group_barrier<Lanes>();
    T* const x = reinterpret_cast<T*>(slots + phase_of(x_row));
    const auto each_run = [&](auto& sums, const auto& add) {
      for (int start = lane; start < cols; start += run * Lanes) {
        std::remove_reference_t<decltype(sums)> part = {};
#pragma unroll 4
        for (int at = start; at < cols && at < start + run * Lanes; at += Lanes)
          add(load<pack_bytes>(x + at), at, part);
#pragma unroll
        for (int i = 0; i < int(sizeof(sums) / sizeof(A)); ++i) sums[i] += part[i];
      }
    };
    A sum[1] = {0};
    const T* const residual = reinterpret_cast<const T*>(slots + rows_per_block * slot +
                                                         (op.residual != nullptr ? phase_of(residual_row) : 0));
    each_run(sum, [&](Pack<pack_bytes> pack, int at, A(&part)[1]) {
      if (op.residual != nullptr) {
        pack = add<T, pack_bytes>(pack, load<pack_bytes>(residual + at));
        store<pack_bytes>(x + at, pack);
        store<pack_bytes>(static_cast<T*>(op.sum) + row * op.cols + at, pack);
      }
      part[0] += pack_sum<T, pack_bytes>(pack);
    });
    A mean = 0;
    if (!op.rms) {
      group_sum<Lanes>(sum, exchange);
      mean = sum[0] / A(op.cols);
    }
    A deviations[deviation_sums<T>] = {};
    each_run(deviations, [&](Pack<pack_bytes> pack, int, A(&part)[deviation_sums<T>]) {
      add_deviations<T, pack_bytes>(pack, mean, part);
    });
    group_sum<Lanes>(deviations, deviation_exchange);
    const Statistics<A> statistics = statistics_of(op, mean, deviations);
    if (lane == 0 && cols > 0) store_statistics(op, row, mean, statistics.rstd);
#pragma unroll 4
    for (int at = lane; at < cols; at += Lanes) {
      store<pack_bytes>(static_cast<T*>(op.y) + row * op.cols + at,
                        normalize<T, pack_bytes>(op, load<pack_bytes>(x + at), at, statistics));
    }
    group_barrier<Lanes>();  // before the next row takes this one's place
  }
}

}  // namespace
}  // namespace dlkit::layer_norm
