// Backward of rows of which one block holds two.
#pragma once

#include "shared.cuh"

namespace dlkit::layer_norm {
namespace {

using namespace dlkit::cuda;

// Blocks that share a multiprocessor: 64 registers are enough for a few columns' sums, else 128.
template <class T, int PackBytes, int Packs>
constexpr int backward_resident = Packs * PackBytes <= 8 * int(sizeof(T)) && Packs <= 4 && sizeof(T) <= 4 ? 1024 : 512;

// A row of odd width or address begins anywhere in a line. Element by element it would be on its way in accesses of 2
// or 4 bytes, and 2 are too few for cp.async. So its lanes fetch whole 16 bytes, but for its ends, and keep its place
// in them: the row lies in shared memory as many bytes behind a multiple of 16 as in global memory. What a thread owns
// and adds up is the same, wherever the row begins.
template <int Lanes, int Turns>
__device__ __forceinline__ void copy_row_async(unsigned char* slot, const void* row, int row_bytes, int element,
                                               int lane) {
  const int phase = int(reinterpret_cast<uintptr_t>(row) % 16), end = phase + row_bytes;
  const char* from = static_cast<const char*>(row) - phase;
#pragma unroll
  for (int i = 0; i < Turns; ++i) {
    const int at = (lane + i * Lanes) * 16;
    if (at >= phase && at + 16 <= end) {
      copy_async<16>(slot + at, from + at);
    } else {
      for (int k = at < phase ? phase : at; k < end && k < at + 16; k += element) {
        if (element == 2) *reinterpret_cast<uint16_t*>(slot + k) = *reinterpret_cast<const uint16_t*>(from + k);
        if (element == 4) *reinterpret_cast<uint32_t*>(slot + k) = *reinterpret_cast<const uint32_t*>(from + k);
        if (element == 8) *reinterpret_cast<uint64_t*>(slot + k) = *reinterpret_cast<const uint64_t*>(from + k);
      }
    }
  }
}

// Bytes of shared memory for a row.
template <int PackBytes>
__host__ __device__ constexpr int slot_bytes(int row_bytes) {
  return PackBytes == 16 ? row_bytes : (row_bytes + 16 - PackBytes + 15) / 16 * 16;
}

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
  unsigned char* slots = dynamic_shared() + group * slot_bytes<PackBytes>(row_bytes);
  const auto prefetch = [&](int64_t row, int stage) {
    const auto copy = [&](int tensor, const void* from, int64_t stride) {
      unsigned char* to = slots + stage * stage_bytes + tensor * tensor_bytes;
      if constexpr (whole_packs) {
#pragma unroll
        for (int i = 0; i < Packs; ++i) {
          const int at = lane + i * Lanes;
          if (at < row_packs) copy_async<PackBytes>(to + at * PackBytes, row_of<T>(from, row, stride) + at * width);
        }
      } else {
        copy_row_async<Lanes, (Packs * PackBytes + 15) / 16 + 1>(to, row_of<T>(from, row, stride), row_bytes, sizeof(T),
                                                                 lane);
      }
    };
    if (row < op.rows) {
      copy(0, op.x, op.x_stride);
      copy(1, op.grad_output, op.grad_output_stride);
      if (op.grad_sum != nullptr) copy(2, op.grad_sum, op.grad_sum_stride);
    }
    copy_async_commit();
  };
  // Where in its slot a row begins.
  const auto phase = [&](const void* tensor, int64_t row, int64_t stride) {
    return whole_packs ? 0 : int(reinterpret_cast<uintptr_t>(row_of<T>(tensor, row, stride)) % 16);
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
    if constexpr (whole_packs) {
      prefetch(row + step, stage ^ 1);
      copy_async_wait<1>();
    } else {
      copy_async_wait<0>();
      // This row is there for all of its lanes, and all have done with the one that the next takes the place of.
      Lanes > 32 ? __syncthreads() : __syncwarp();
      prefetch(row + step, stage ^ 1);
    }
    prefetch_statistics(row + step);

    const unsigned char* from = slots + stage * stage_bytes + lane * PackBytes;
    const unsigned char* from_x = from + phase(op.x, row, op.x_stride);
    const unsigned char* from_grad_output = from + tensor_bytes + phase(op.grad_output, row, op.grad_output_stride);
    const auto gradients = [&](int i) {
      return Gradients<T, PackBytes>(op, load<PackBytes>(from_x + i * Lanes * PackBytes),
                                     load<PackBytes>(from_grad_output + i * Lanes * PackBytes),
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
        const unsigned char* from_grad_sum = from + 2 * tensor_bytes + phase(op.grad_sum, row, op.grad_sum_stride);
        widen<T, PackBytes>(load<PackBytes>(from_grad_sum + i * Lanes * PackBytes), grad_sum);
      }
      const Pack<PackBytes> grad_input = gradients(i).input(means, rstd, grad_sum);
      store<PackBytes>(static_cast<T*>(op.grad_input) + row * op.cols + at * width, grad_input);
      if constexpr (Drop) {
        const int64_t element = row * op.cols + at * width;
        const uint32_t keep = keep_pack(op.dropout, read(op.dropout.source), element);
        A dropped[width];
        widen<T, PackBytes>(grad_input, dropped);
#pragma unroll
        for (int k = 0; k < width; ++k) dropped[k] = keep >> k & 1 ? dropped[k] * A(op.dropout.scale) : A(0);
        store<PackBytes>(static_cast<T*>(op.grad_dropped) + element, narrow<T, PackBytes>(dropped));
      }
    }
  }
  copy_async_wait<0>();
  if (op.partials == nullptr) return;

  // The block's groups add up in order: within a warp by shuffles, then warps (or groups of several) one after another
  // in shared memory, which the stages no longer need.
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
