// Backward of rows short enough that one block's shared memory holds two.
#pragma once

#include "shared.cuh"

namespace dlkit::layer_norm {
namespace {

using namespace dlkit::cuda;

// Threads that share a multiprocessor: the sums of a few columns fit in 64 registers a thread, those of more in 128.
template <class T, int PackBytes, int Packs>
constexpr int backward_resident = Packs * PackBytes <= 8 * int(sizeof(T)) && Packs <= 4 && sizeof(T) <= 4 ? 1024 : 512;

template <class T, int PackBytes, int Lanes, int Packs, bool Drop>
__global__ void __launch_bounds__(threads_of<Lanes>, backward_resident<T, PackBytes, Packs> / threads_of<Lanes>)
    backward_rows(const Backward op) {
  using A = accumulate_t<T>;
  constexpr int width = PackBytes / sizeof(T), threads = threads_of<Lanes>, rows_per_block = threads / Lanes;
  __shared__ A exchange[2][threads / 32][2];
  const int lane = threadIdx.x % Lanes, group = threadIdx.x / Lanes;
  const int row_packs = int(op.cols / width);
  const int64_t step = int64_t(gridDim.x) * rows_per_block;

  // Two stages of x, grad_output and grad_sum. Where rows are whole packs a thread reads only what it copied itself,
  // and stages need no barrier.
  constexpr bool whole_packs = PackBytes == 16;
  const int row_bytes = row_packs * PackBytes, tensor_bytes = rows_per_block * slot_bytes<PackBytes>(row_bytes);
  const int stage_bytes = (op.grad_sum != nullptr ? 3 : 2) * tensor_bytes;
  unsigned char* slots = dynamic_shared() + (whole_packs ? (group * row_packs + lane) * PackBytes
                                                         : group * slot_bytes<PackBytes>(row_bytes));
  const auto prefetch = [&](int64_t row, int stage) {
    unsigned char* to = slots + stage * stage_bytes;
    if constexpr (whole_packs) {
#pragma unroll
      for (int i = 0; i < Packs; ++i) {
        const int at = lane + i * Lanes;
        if (row >= op.rows || at >= row_packs) continue;
        unsigned char* slot = to + i * Lanes * PackBytes;
        copy_async<PackBytes>(slot, row_of<T>(op.x, row, op.x_stride) + at * width);
        copy_async<PackBytes>(slot + tensor_bytes, row_of<T>(op.grad_output, row, op.grad_output_stride) + at * width);
        if (op.grad_sum != nullptr) {
          copy_async<PackBytes>(slot + 2 * tensor_bytes, row_of<T>(op.grad_sum, row, op.grad_sum_stride) + at * width);
        }
      }
    } else if (row < op.rows) {
      copy_row_async<Lanes>(to, row_of<T>(op.x, row, op.x_stride), row_bytes, lane);
      copy_row_async<Lanes>(to + tensor_bytes, row_of<T>(op.grad_output, row, op.grad_output_stride), row_bytes, lane);
      if (op.grad_sum != nullptr) {
        copy_row_async<Lanes>(to + 2 * tensor_bytes, row_of<T>(op.grad_sum, row, op.grad_sum_stride), row_bytes, lane);
      }
    }
    copy_async_commit();
  };
  const auto phase = [&](const void* tensor, int64_t row, int64_t stride) {
    return whole_packs ? 0 : phase_of(row_of<T>(tensor, row, stride));
  };

  A grad_weight[Packs * width] = {}, grad_bias[Packs * width] = {};
  A next_mean = 0, next_rstd = 0;
  const auto prefetch_statistics = [&](int64_t row) {
    if (row >= op.rows) return;
    if (op.mean != nullptr) next_mean = static_cast<const A*>(op.mean)[row];
    next_rstd = static_cast<const A*>(op.rstd)[row];
  };

  int stage = 0;
  int64_t first = int64_t(blockIdx.x) * rows_per_block;
  prefetch(first + group, stage);
  prefetch_statistics(first + group);
  for (; first < op.rows; first += step, stage ^= 1) {
    const int64_t row = first + group;
    const int packs = row < op.rows ? row_packs : 0;
    const A mean = next_mean, rstd = next_rstd;
    if constexpr (!whole_packs) {
      copy_async_wait<0>();
      group_barrier<Lanes>();  // this row has arrived, and nobody reads the row that the next one overwrites
    }
    prefetch(row + step, stage ^ 1);
    prefetch_statistics(row + step);
    if constexpr (whole_packs) copy_async_wait<1>();

    const unsigned char* from = slots + stage * stage_bytes + (whole_packs ? 0 : lane * PackBytes);
    const int x_phase = phase(op.x, row, op.x_stride);
    const int grad_output_phase = phase(op.grad_output, row, op.grad_output_stride);
    const auto gradients = [&](int i) {
      const unsigned char* slot = from + i * Lanes * PackBytes;
      return Gradients<T, PackBytes>(op, load<PackBytes>(slot + x_phase),
                                     load<PackBytes>(slot + tensor_bytes + grad_output_phase),
                                     (lane + i * Lanes) * width, mean);
    };
    A sums[2] = {0, 0};
#pragma unroll
    for (int i = 0; i < Packs; ++i) {
      if (lane + i * Lanes >= packs) continue;
      const auto pack = gradients(i);
      pack.add_to(sums, rstd);
      pack.add_to(grad_weight + i * width, grad_bias + i * width, rstd);
    }
    if (op.grad_input == nullptr) continue;
    group_sum<Lanes>(sums, exchange[stage]);
    const A means[2] = {op.rms ? A(0) : sums[0] / A(op.cols), sums[1] / A(op.cols)};
#pragma unroll
    for (int i = 0; i < Packs; ++i) {
      const int at = lane + i * Lanes;
      if (at >= packs) continue;
      A grad_sum[width] = {};
      if (op.grad_sum != nullptr) {
        const unsigned char* slot = from + i * Lanes * PackBytes + phase(op.grad_sum, row, op.grad_sum_stride);
        widen<T, PackBytes>(load<PackBytes>(slot + 2 * tensor_bytes), grad_sum);
      }
      const Pack<PackBytes> grad_residual = gradients(i).input(means, rstd, grad_sum);
      const int64_t element = row * op.cols + at * width;
      store<PackBytes>(static_cast<T*>(Drop ? op.grad_residual : op.grad_input) + element, grad_residual);
      if constexpr (Drop) {
        const uint32_t keep = keep_pack(op.dropout, read(op.dropout.source), element);
        A dropped[width];
        widen<T, PackBytes>(grad_residual, dropped);
#pragma unroll
        for (int k = 0; k < width; ++k) dropped[k] = keep >> k & 1 ? dropped[k] * A(op.dropout.scale) : A(0);
        store<PackBytes>(static_cast<T*>(op.grad_input) + element, narrow<T, PackBytes>(dropped));
      }
    }
  }
  copy_async_wait<0>();
  if (op.partials == nullptr) return;

  // The block's groups are added up in order: within a warp by shuffles, then warps (or groups of several warps) one
  // after another in shared memory, which the stages no longer need.
#pragma unroll
  for (int offset = Lanes; offset < 32; offset *= 2) {
#pragma unroll
    for (int i = 0; i < Packs * width; ++i) {
      grad_weight[i] += __shfl_xor_sync(full_warp, grad_weight[i], offset);
      grad_bias[i] += __shfl_xor_sync(full_warp, grad_bias[i], offset);
    }
  }
  constexpr int owners = Lanes < 32 ? 32 : Lanes, turns = threads / owners;
  A* to = static_cast<A*>(op.partials) + blockIdx.x * op.cols;
  A* total = reinterpret_cast<A*>(dynamic_shared());
  const auto add_turn = [&](A* values, A* shared, A* partial, int turn) {
#pragma unroll
    for (int i = 0; i < Packs; ++i) {
      const int at = lane + i * Lanes;
      if (at >= row_packs) continue;
      if (turn > 0) {
        A before[width];
        load_values(shared + at * width, before);
#pragma unroll
        for (int k = 0; k < width; ++k) values[i * width + k] += before[k];
      }
      store_values<A, width>((turn < turns - 1 ? shared : partial) + at * width, values + i * width);
    }
  };
  for (int turn = 0; turn < turns; ++turn) {
    __syncthreads();
    if (int(threadIdx.x) / owners != turn || int(threadIdx.x) % owners >= Lanes) continue;
    if (op.grad_weight != nullptr) add_turn(grad_weight, total, to, turn);
    if (op.grad_weight != nullptr) to += gridDim.x * op.cols;
    if (op.grad_bias != nullptr) add_turn(grad_bias, total + op.cols, to, turn);
  }
}

}  // namespace
}  // namespace dlkit::layer_norm
