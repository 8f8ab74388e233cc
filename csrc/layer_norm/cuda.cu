// LayerNorm and RMSNorm on CUDA. What each pass moves, in units of one [rows, cols] tensor:
//
//   forward    reads x (and residual), writes y (and sum): 2 (4), the least there is. Rows of up to 32 KB stay in
//              registers between load and store, up to 227 KB in shared memory; only longer ones are read again.
//   backward   reads x and grad_output, writes grad_input: 3, the least there is, plus cols * 4 bytes per block and
//              parameter. Blocks stay for many rows. A thread owns the same columns in each, so grad_weight and
//              grad_bias grow in its registers; the next row is on its way into shared memory (cp.async, which holds no
//              registers) while this one reduces. A second kernel adds the blocks' sums up in a fixed order: no
//              atomics, the same bits every run. Rows of more than 16 K columns (or 14.5 K in fp32, where two rows of
//              inputs outgrow 227 KB) take a kernel for grad_input and one for the sums, and read twice: 5 units and
//              some from L2.
//
// Speed needs bytes in flight: at 4.8 TB/s and some 0.8 us of latency, 29 KB for each of an H200's 132 multiprocessors.
// Full packs give forward 32 to 64 KB (512 to 1024 resident threads with 32 to 128 bytes each) and backward 32 to 128
// KB (512 or 1024 threads with 64 to 256 bytes of the next row). Predicted from that: 0.88 and 0.80 of a copy. Not yet
// run on a GPU.
#include "../common/cuda/launch.cuh"
#include "../common/cuda/philox.cuh"
#include "../common/cuda/reduce.cuh"
#include "../common/cuda/vec.cuh"
#include "../common/dispatch.h"
#include "kernel.h"

namespace dlkit::layer_norm {
namespace {

using namespace dlkit::cuda;

// Kernels are templates of the input type, of PackBytes (16 in the fast paths, sizeof(T) where addresses or widths are
// odd) and of how a row is spread: Lanes threads a row, Packs packs a thread. Lanes below a block's threads: several
// rows a block.
template <int Lanes>
constexpr int threads_of = Lanes > 256 ? Lanes : 256;

template <class T>
__device__ __forceinline__ const T* row_of(const void* tensor, int64_t row, int64_t stride) {
  return static_cast<const T*>(tensor) + row * stride;
}

// x + residual, rounded to T.
template <class T, int PackBytes>
__device__ __forceinline__ Pack<PackBytes> add(const Pack<PackBytes>& x, const Pack<PackBytes>& residual) {
  accumulate_t<T> a[PackBytes / sizeof(T)], b[PackBytes / sizeof(T)];
  widen<T, PackBytes>(x, a);
  widen<T, PackBytes>(residual, b);
#pragma unroll
  for (int k = 0; k < int(PackBytes / sizeof(T)); ++k) a[k] += b[k];
  return narrow<T, PackBytes>(a);
}

// The keep bits of a pack of adjacent elements, the first a multiple of their number. Narrow packs share a block and
// each draw it again: with four tensors to move for every element there is time for that.
__device__ __forceinline__ uint32_t keep_pack(const FusedDropout& dropout, const PhiloxState& state, int64_t element) {
  return keep_bits(state, dropout.threshold, uint64_t(element / kBlockElements)) >> element % kBlockElements;
}

// drop(x) + residual, rounded to T: the bits of a dropout with a residual.
template <class T, int PackBytes>
__device__ __forceinline__ Pack<PackBytes> drop_add(const Pack<PackBytes>& x, const Pack<PackBytes>& residual,
                                                    uint32_t keep, accumulate_t<T> scale) {
  accumulate_t<T> a[PackBytes / sizeof(T)], b[PackBytes / sizeof(T)];
  widen<T, PackBytes>(x, a);
  widen<T, PackBytes>(residual, b);
#pragma unroll
  for (int k = 0; k < int(PackBytes / sizeof(T)); ++k) b[k] = keep >> k & 1 ? multiply_add(a[k], scale, b[k]) : b[k];
  return narrow<T, PackBytes>(b);
}

template <class T, int PackBytes>
__device__ __forceinline__ accumulate_t<T> pack_sum(const Pack<PackBytes>& pack) {
  accumulate_t<T> values[PackBytes / sizeof(T)], sum = 0;
  widen<T, PackBytes>(pack, values);
#pragma unroll
  for (accumulate_t<T> value : values) sum += value;
  return sum;
}

// Adds a pack's squared deviations from `mean` to sums[0] and, where T is fine enough for the mean's own rounding to
// show in small deviations from a large mean, the deviations themselves to sums[1].
template <class T, int PackBytes, int Count>
__device__ __forceinline__ void add_deviations(const Pack<PackBytes>& pack, accumulate_t<T> mean,
                                               accumulate_t<T> (&sums)[Count]) {
  accumulate_t<T> values[PackBytes / sizeof(T)];
  widen<T, PackBytes>(pack, values);
#pragma unroll
  for (accumulate_t<T> value : values) {
    const accumulate_t<T> deviation = value - mean;
    sums[0] += deviation * deviation;
    if constexpr (Count == 2) sums[1] += deviation;
  }
}

template <class T>
constexpr int deviation_sums = std::is_same_v<T, accumulate_t<T>> ? 2 : 1;

template <class A>
struct Statistics {
  A mean, rest, rstd;  // rest: what rounding took from the mean
};

template <class A, int Count>
__device__ __forceinline__ Statistics<A> statistics_of(const Forward& op, A mean, const A (&deviations)[Count]) {
  A rest = 0;
  if constexpr (Count == 2) rest = op.rms ? A(0) : deviations[1] / A(op.cols);
  return {mean, rest, A(1) / sqrt(deviations[0] / A(op.cols) - rest * rest + A(op.eps))};
}

template <class T, int PackBytes>
__device__ __forceinline__ Pack<PackBytes> normalize(const Forward& op, const Pack<PackBytes>& pack, int64_t column,
                                                     const Statistics<accumulate_t<T>>& statistics) {
  using A = accumulate_t<T>;
  constexpr int width = PackBytes / sizeof(T);
  A values[width], weight[width], bias[width];
  widen<T, PackBytes>(pack, values);
  load_parameter<T>(op.weight, op.parameter_dtype, column, A(1), weight);
#pragma unroll
  for (int k = 0; k < width; ++k) {
    values[k] -= statistics.mean;
    if constexpr (deviation_sums<T> == 2) values[k] -= statistics.rest;
    values[k] = values[k] * statistics.rstd * weight[k];
  }
  load_parameter<T>(op.bias, op.parameter_dtype, column, A(0), bias);
#pragma unroll
  for (int k = 0; k < width; ++k) values[k] += bias[k];
  return narrow<T, PackBytes>(values);
}

template <class A>
__device__ __forceinline__ void store_statistics(const Forward& op, int64_t row, A mean, A rstd) {
  if (op.mean != nullptr) static_cast<A*>(op.mean)[row] = mean;
  if (op.rstd != nullptr) static_cast<A*>(op.rstd)[row] = rstd;
}

// Blocks that share a multiprocessor, so that ptxas keeps to 64, 80 or 128 registers a thread. One step fewer spills on
// sm_100 or sm_120, where a dropout wants more of them for its bits.
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
  if (Drop && blockIdx.x == 0 && threadIdx.x == 0) write_state(read(op.dropout.source), op.dropout.state);
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

// Rows beyond what registers hold: kept in shared memory (`cached`), or read again, three times in all.
constexpr int long_threads = 512;

template <class T, int PackBytes>
__global__ void __launch_bounds__(long_threads, 2) forward_long(const Forward op, bool cached) {
  using A = accumulate_t<T>;
  constexpr int width = PackBytes / sizeof(T), batch = 4;
  constexpr int run = 32;  // packs that a thread sums by themselves: with all in one sum the error grows with the row
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
        if (cached) store<PackBytes>(cache + at * PackBytes, values[i]);
        run_sum += pack_sum<T, PackBytes>(values[i]);
      }
      if (step % (run / batch) == 0) {
        sum[0] += run_sum;
        run_sum = 0;
      }
    }
    sum[0] += run_sum;
    // A thread reads back only what it wrote or read itself, so this needs no barrier.
    const T* source = sum_row != nullptr ? sum_row : x;
    const auto again = [&](int64_t at) {
      return cached ? load<PackBytes>(cache + at * PackBytes) : load<PackBytes>(source + at * width);
    };
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

// What the row sums and the gradients need of one pack. The same bits with a dropout and without.
template <class T, int PackBytes>
struct Gradients {
  static constexpr int width = PackBytes / sizeof(T);
  accumulate_t<T> centered[width], grad_output[width], weight[width];

  __device__ __forceinline__ Gradients(const Backward& op, const Pack<PackBytes>& x_pack,
                                       const Pack<PackBytes>& grad_output_pack, int64_t column, accumulate_t<T> mean) {
    widen<T, PackBytes>(x_pack, centered);
    widen<T, PackBytes>(grad_output_pack, grad_output);
    load_parameter<T>(op.weight, op.parameter_dtype, column, accumulate_t<T>(1), weight);
#pragma unroll
    for (int k = 0; k < width; ++k) centered[k] -= mean;
  }

  // sums: of wdy, and of wdy * xhat.
  __device__ __forceinline__ void add_to(accumulate_t<T> (&sums)[2], accumulate_t<T> rstd) const {
#pragma unroll
    for (int k = 0; k < width; ++k) {
      const accumulate_t<T> wdy = multiply(grad_output[k], weight[k]);
      sums[0] += wdy;
      sums[1] = multiply_add(wdy, centered[k] * rstd, sums[1]);
    }
  }

  __device__ __forceinline__ void add_to(accumulate_t<T>* grad_weight, accumulate_t<T>* grad_bias,
                                         accumulate_t<T> rstd) const {
#pragma unroll
    for (int k = 0; k < width; ++k) {
      grad_weight[k] = multiply_add(grad_output[k], centered[k] * rstd, grad_weight[k]);
      grad_bias[k] += grad_output[k];
    }
  }

  __device__ __forceinline__ Pack<PackBytes> input(const accumulate_t<T> (&means)[2], accumulate_t<T> rstd,
                                                   const accumulate_t<T> (&grad_sum)[width]) const {
    accumulate_t<T> result[width];
#pragma unroll
    for (int k = 0; k < width; ++k) {
      const accumulate_t<T> wdy = multiply(grad_output[k], weight[k]);
      result[k] = multiply_add(rstd, multiply_add(-centered[k] * rstd, means[1], wdy - means[0]), grad_sum[k]);
    }
    return narrow<T, PackBytes>(result);
  }
};

// As above: 64 registers are enough for a few columns' sums, else 128.
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

  // Two stages of x, grad_output and grad_sum; a thread reads only what it copied itself, so they need no barrier.
  const int tensor_bytes = rows_per_block * row_packs * PackBytes;
  const int stage_bytes = (op.grad_sum != nullptr ? 3 : 2) * tensor_bytes;
  unsigned char* slots = dynamic_shared() + (group * row_packs + lane) * PackBytes;
  const auto prefetch = [&](int64_t row, int stage) {
    unsigned char* to = slots + stage * stage_bytes;
#pragma unroll
    for (int i = 0; i < Packs; ++i) {
      const int at = lane + i * Lanes, slot = i * Lanes * PackBytes;
      if (row >= op.rows || at >= row_packs) continue;
      copy_async<PackBytes>(to + slot, row_of<T>(op.x, row, op.x_stride) + at * width);
      copy_async<PackBytes>(to + slot + tensor_bytes,
                            row_of<T>(op.grad_output, row, op.grad_output_stride) + at * width);
      if (op.grad_sum != nullptr) {
        copy_async<PackBytes>(to + slot + 2 * tensor_bytes,
                              row_of<T>(op.grad_sum, row, op.grad_sum_stride) + at * width);
      }
    }
    copy_async_commit();
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
    prefetch(row + step, stage ^ 1);
    prefetch_statistics(row + step);
    copy_async_wait<1>();

    const unsigned char* from = slots + stage * stage_bytes;
    const auto gradients = [&](int i) {
      const unsigned char* slot = from + i * Lanes * PackBytes;
      return Gradients<T, PackBytes>(op, load<PackBytes>(slot), load<PackBytes>(slot + tensor_bytes),
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
        widen<T, PackBytes>(load<PackBytes>(from + i * Lanes * PackBytes + 2 * tensor_bytes), grad_sum);
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

// Rows too long for backward_rows: grad_input by a block a row, which reads x and grad_output twice (again from L2) ...
// Without a number of blocks to be resident ptxas spills for sm_100.
template <class T, int PackBytes>
__global__ void __launch_bounds__(long_threads, 1) backward_long(const Backward op) {
  using A = accumulate_t<T>;
  constexpr int width = PackBytes / sizeof(T);
  __shared__ A exchange[long_threads / 32][2];
  const int64_t packs = op.cols / width;
  for (int64_t row = blockIdx.x; row < op.rows; row += gridDim.x) {
    const A mean = op.mean != nullptr ? static_cast<const A*>(op.mean)[row] : A(0);
    const A rstd = static_cast<const A*>(op.rstd)[row];
    const auto gradients = [&](int64_t at) {
      return Gradients<T, PackBytes>(
          op, load<PackBytes>(row_of<T>(op.x, row, op.x_stride) + at * width),
          load<PackBytes>(row_of<T>(op.grad_output, row, op.grad_output_stride) + at * width), at * width, mean);
    };
    A sums[2] = {0, 0};
#pragma unroll 4
    for (int64_t at = threadIdx.x; at < packs; at += long_threads) gradients(at).add_to(sums, rstd);
    group_sum<long_threads>(sums, exchange);
    const A means[2] = {op.rms ? A(0) : sums[0] / A(op.cols), sums[1] / A(op.cols)};
#pragma unroll 4
    for (int64_t at = threadIdx.x; at < packs; at += long_threads) {
      A grad_sum[width] = {};
      if (op.grad_sum != nullptr) {
        widen<T, PackBytes>(load<PackBytes>(row_of<T>(op.grad_sum, row, op.grad_sum_stride) + at * width), grad_sum);
      }
      store<PackBytes>(static_cast<T*>(op.grad_input) + row * op.cols + at * width,
                       gradients(at).input(means, rstd, grad_sum));
    }
    __syncthreads();  // before the next row's exchange
  }
}

// ... and partial sums of the parameters' gradients by threads that walk down their columns, every gridDim.y-th row.
constexpr int column_threads = 256;

template <class T, int PackBytes>
__global__ void __launch_bounds__(column_threads) backward_columns(const Backward op) {
  using A = accumulate_t<T>;
  constexpr int width = PackBytes / sizeof(T), batch = PackBytes == 16 ? 2 : 8;
  const int64_t column = (int64_t(blockIdx.x) * column_threads + threadIdx.x) * width;
  if (column >= op.cols) return;
  A grad_weight[width] = {}, grad_bias[width] = {};
  for (int64_t first = blockIdx.y; first < op.rows; first += int64_t(gridDim.y) * batch) {
    Pack<PackBytes> x[batch], grad_output[batch];
    A mean[batch], rstd[batch];
#pragma unroll
    for (int i = 0; i < batch; ++i) {
      const int64_t row = first + int64_t(gridDim.y) * i;
      if (row >= op.rows) continue;
      x[i] = load_once<PackBytes>(row_of<T>(op.x, row, op.x_stride) + column);
      grad_output[i] = load_once<PackBytes>(row_of<T>(op.grad_output, row, op.grad_output_stride) + column);
      mean[i] = op.mean != nullptr ? static_cast<const A*>(op.mean)[row] : A(0);
      rstd[i] = static_cast<const A*>(op.rstd)[row];
    }
#pragma unroll
    for (int i = 0; i < batch; ++i) {
      if (first + int64_t(gridDim.y) * i >= op.rows) continue;
      Gradients<T, PackBytes>(op, x[i], grad_output[i], column, mean[i]).add_to(grad_weight, grad_bias, rstd[i]);
    }
  }
  A* to = static_cast<A*>(op.partials) + blockIdx.y * op.cols + column;
  if (op.grad_weight != nullptr) {
    store_values<A, width>(to, grad_weight);
    to += gridDim.y * op.cols;
  }
  if (op.grad_bias != nullptr) store_values<A, width>(to, grad_bias);
}

// The second stage: a block adds up the partial sums of 32 columns, each of its warps every 32nd of them, the same way
// whatever ran first. blockIdx.y tells grad_weight from grad_bias.
template <class A, class Out>
__global__ void __launch_bounds__(1024)
    add_partials(const A* partials, int64_t count, int64_t cols, void* first, void* second) {
  __shared__ A sums[32][33];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t column = int64_t(blockIdx.x) * 32 + lane;
  partials += blockIdx.y * count * cols;
  A sum = 0;
  if (column < cols) {
#pragma unroll 8
    for (int64_t i = warp; i < count; i += 32) sum += partials[i * cols + column];
  }
  sums[warp][lane] = sum;
  __syncthreads();
  A total[1] = {sums[lane][warp]};
  group_sum<32>(total, static_cast<A(*)[1]>(nullptr));
  const int64_t own = int64_t(blockIdx.x) * 32 + warp;
  if (lane == 0 && own < cols)
    static_cast<Out*>(blockIdx.y == 0 ? first : second)[own] = dlkit::narrow<Out>(accumulate_t<Out>(total[0]));
}

template <int Lanes, int Packs>
struct Spread {
  static constexpr int lanes = Lanes, packs = Packs;
};
template <class... Each>
struct Spreads {};

// Calls f with the first spread that a row of `packs` fits in; false where there is none.
template <class F, class... Each>
bool with_spread(int64_t packs, Spreads<Each...>, const F& f) {
  return ((packs <= Each::lanes * Each::packs && (f(Each()), true)) || ...);
}

using ForwardSpreads = Spreads<Spread<2, 2>, Spread<4, 2>, Spread<4, 4>, Spread<8, 4>, Spread<16, 4>, Spread<32, 4>,
                               Spread<32, 8>, Spread<128, 4>, Spread<256, 4>, Spread<512, 4>>;
// With a dropout, whose residual packs and random bits take registers of their own.
using DropSpreads =
    Spreads<Spread<4, 4>, Spread<16, 4>, Spread<32, 4>, Spread<64, 4>, Spread<128, 4>, Spread<256, 4>, Spread<512, 4>>;
using ShortSpreads = Spreads<Spread<2, 2>, Spread<8, 2>, Spread<16, 2>, Spread<32, 2>, Spread<32, 4>, Spread<64, 4>,
                             Spread<128, 4>, Spread<256, 4>, Spread<512, 4>>;
using LongSpreads = Spreads<Spread<2, 2>, Spread<8, 2>, Spread<16, 2>, Spread<32, 2>, Spread<32, 4>, Spread<64, 4>,
                            Spread<128, 4>, Spread<256, 4>, Spread<512, 4>, Spread<512, 8>>;
// 8 packs of 8 columns would be 128 sums a thread: too many registers.
template <int Width>
using BackwardSpreads = std::conditional_t<Width <= 4, LongSpreads, ShortSpreads>;

// Whether 16 bytes at a time will do.
bool wide_rows(const void* tensor, int64_t stride, int64_t element, int64_t rows) {
  return tensor == nullptr || (are_aligned(16, tensor) && (rows == 1 || stride * element % 16 == 0));
}

bool wide(const Forward& op, int64_t element) {
  return op.cols * element % 16 == 0 && wide_rows(op.x, op.x_stride, element, op.rows) &&
         wide_rows(op.residual, op.residual_stride, element, op.rows) &&
         are_aligned(16, op.weight, op.bias, op.y, op.sum);
}
bool wide(const Backward& op, int64_t element) {
  return op.cols * element % 16 == 0 && wide_rows(op.x, op.x_stride, element, op.rows) &&
         wide_rows(op.grad_output, op.grad_output_stride, element, op.rows) &&
         wide_rows(op.grad_sum, op.grad_sum_stride, element, op.rows) &&
         are_aligned(16, op.weight, op.grad_input, op.grad_dropped);
}

// Calls f(T(), std::integral_constant<int, PackBytes>()).
template <class Op, class F>
void with_types(const Op& op, const F& f) {
  with_type(op.dtype, [&](auto type) {
    constexpr int element = sizeof(type);
    if (wide(op, element)) {
      f(type, std::integral_constant<int, 16>());
    } else {
      f(type, std::integral_constant<int, element>());
    }
  });
}

template <class T, int PackBytes>
void forward(const Forward& op, void* stream) {
  const int64_t packs = op.cols * int64_t(sizeof(T)) / PackBytes;
  const auto rows = [&](auto spread, auto drop) {
    constexpr int threads = threads_of<spread.lanes>;
    launch("layer_norm forward_rows", forward_rows<T, PackBytes, spread.lanes, spread.packs, drop>,
           grid_of(divide_up(op.rows, threads / spread.lanes)), threads, 0, stream, op);
  };
  if (op.dropout.active) {
    with_spread(packs, DropSpreads(), [&](auto spread) { rows(spread, std::true_type()); });
    return;
  }
  if (with_spread(packs, ForwardSpreads(), [&](auto spread) { rows(spread, std::false_type()); })) return;
  const int64_t row_bytes = op.cols * int64_t(sizeof(T));
  const bool cached = row_bytes <= current_device().shared_per_block - 1024;  // less the static exchange
  launch("layer_norm forward_long", forward_long<T, PackBytes>, grid_of(op.rows), long_threads, cached ? row_bytes : 0,
         stream, op, cached);
}

// How backward runs: a pure function of the op and the device, because the caller allocates the partial sums by it.
struct BackwardPlan {
  bool long_rows;
  int blocks;  // each writes one row of partial sums; of backward_columns in y where long_rows
  int shared_bytes;
};

template <class T, int PackBytes>
BackwardPlan plan(const Backward& op) {
  constexpr int width = PackBytes / sizeof(T);
  const Device device = current_device();
  BackwardPlan result{true, 0, 0};
  with_spread(op.cols / width, BackwardSpreads<width>(), [&](auto spread) {
    constexpr int threads = threads_of<spread.lanes>, rows_per_block = threads / spread.lanes;
    constexpr int resident = backward_resident<T, PackBytes, spread.packs> / threads;
    const int64_t bytes = 2 * (op.grad_sum != nullptr ? 3 : 2) * rows_per_block * op.cols * int64_t(sizeof(T));
    constexpr int static_bytes = 2 * threads / 32 * 2 * sizeof(accumulate_t<T>), reserved_bytes = 1024;
    if (bytes + static_bytes > device.shared_per_block) return;
    const int fit = int(device.shared_per_multiprocessor / (bytes + static_bytes + reserved_bytes));
    const int64_t most = int64_t(device.multiprocessors) * std::max(1, std::min(resident, fit));
    result = {false, int(std::min(most, divide_up(op.rows, rows_per_block))), int(bytes)};
  });
  if (result.long_rows) {
    // Some 8 blocks for each multiprocessor, but partial sums stay a small part of the traffic: 16 rows or more to
    // each.
    const int64_t tiles = divide_up(op.cols / width, column_threads);
    const int64_t chunks = std::min(divide_up(int64_t(device.multiprocessors) * 8, tiles), divide_up(op.rows, 16));
    result.blocks = int(std::min<int64_t>(chunks, 65535));
  }
  return result;
}

template <class T, int PackBytes>
void backward(const Backward& op, void* stream) {
  using A = accumulate_t<T>;
  constexpr int width = PackBytes / sizeof(T);
  const bool parameters = op.grad_weight != nullptr || op.grad_bias != nullptr;
  BackwardPlan how{};
  if (op.rows > 0) {
    how = plan<T, PackBytes>(op);
    if (!how.long_rows) {
      with_spread(op.cols / width, BackwardSpreads<width>(), [&](auto spread) {
        const auto rows = [&](auto* kernel) {
          launch("layer_norm backward_rows", kernel, how.blocks, threads_of<spread.lanes>, how.shared_bytes, stream,
                 op);
        };
        op.dropout.active ? rows(backward_rows<T, PackBytes, spread.lanes, spread.packs, true>)
                          : rows(backward_rows<T, PackBytes, spread.lanes, spread.packs, false>);
      });
    } else {
      if (op.grad_input != nullptr) {
        launch("layer_norm backward_long", backward_long<T, PackBytes>, grid_of(op.rows), long_threads, 0, stream, op);
      }
      if (parameters) {
        const dim3 grid(unsigned(divide_up(op.cols / width, column_threads)), unsigned(how.blocks));
        launch("layer_norm backward_columns", backward_columns<T, PackBytes>, grid, column_threads, 0, stream, op);
      }
    }
  }
  if (!parameters) return;
  void* first = op.grad_weight != nullptr ? op.grad_weight : op.grad_bias;
  const dim3 grid(unsigned(divide_up(op.cols, 32)), op.grad_weight != nullptr && op.grad_bias != nullptr ? 2 : 1);
  const auto add = [&](auto out) {
    launch("layer_norm add_partials", add_partials<A, decltype(out)>, grid, 1024, 0, stream,
           static_cast<const A*>(op.partials), int64_t(how.blocks), op.cols, first, op.grad_bias);
  };
  if (op.parameter_dtype == DType::F32) {
    add(float());
  } else {
    add(T());
  }
}

}  // namespace

void forward_cuda(const Forward& op, void* stream) {
  if (op.rows == 0) return;
  with_types(op, [&](auto type, auto pack_bytes) { forward<decltype(type), pack_bytes>(op, stream); });
}

void backward_cuda(const Backward& op, void* stream) {
  with_types(op, [&](auto type, auto pack_bytes) { backward<decltype(type), pack_bytes>(op, stream); });
}

bool can_drop_cuda(const Forward& op) {
  bool found = false;
  with_types(op, [&](auto type, auto pack_bytes) {
    found = with_spread(op.cols * int64_t(sizeof(type)) / pack_bytes, DropSpreads(), [](auto) {});
  });
  return found;
}

bool can_drop_cuda(const Backward& op) {
  bool found = false;
  with_types(op, [&](auto type, auto pack_bytes) { found = !plan<decltype(type), pack_bytes>(op).long_rows; });
  return found;
}

int64_t backward_partials_cuda(const Backward& op) {
  const int parameters = (op.grad_weight != nullptr) + (op.grad_bias != nullptr);
  if (op.rows == 0 || parameters == 0) return 0;
  int64_t bytes = 0;
  with_types(op, [&](auto type, auto pack_bytes) {
    using T = decltype(type);
    bytes = parameters * plan<T, pack_bytes>(op).blocks * op.cols * int64_t(sizeof(accumulate_t<T>));
  });
  return bytes;
}

}  // namespace dlkit::layer_norm
