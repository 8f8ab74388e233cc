// dropout(act(x + bias)) on CUDA. A thread takes the 8 elements that a Philox block decides, in accesses of up to 16
// bytes, or one element where rows do not consist of such groups. Bytes moved: x and y, each once; backward x,
// grad_output and grad_input, each once. For grad_bias a thread keeps its columns and walks down the rows of its block,
// with the sums in registers; the block's 8 rows of threads are added up in shared memory, blocks in a second kernel,
// all in an order that depends only on the shape. Not yet run on a GPU.
#include "../common/cuda/activation.cuh"
#include "../common/cuda/launch.cuh"
#include "../common/cuda/partials.cuh"
#include "../common/cuda/philox.cuh"
#include "../common/cuda/vec.cuh"
#include "../common/dispatch.h"
#include "kernel.h"

namespace dlkit::bias_act_dropout {
namespace {

using namespace dlkit::cuda;

constexpr int threads = 256, lanes = 32, thread_rows = threads / lanes;

__device__ __forceinline__ int64_t column_of(int64_t element, int64_t cols) {
  if ((element | cols) >> 32 == 0) return uint32_t(element) % uint32_t(cols);  // a fifth of a 64-bit division
  return element % cols;
}

// The keep bits of Count elements that one Philox block decides, from `element` on.
__device__ __forceinline__ uint32_t keep_of(const FusedDropout& dropout, const PhiloxState& state, int64_t element) {
  if (!dropout.active) return 0xff;
  return keep_bits(state, dropout.threshold, uint64_t(element / kBlockElements)) >> element % kBlockElements;
}

template <class T, int Count>
__device__ __forceinline__ void load_biased(const T* x, const accumulate_t<T>* bias, accumulate_t<T> (&values)[Count]) {
  load_values(x, values);
  if (bias == nullptr) return;
  accumulate_t<T> added[Count];
  load_values(bias, added);
#pragma unroll
  for (int k = 0; k < Count; ++k) values[k] += added[k];
}

template <class T, int Count>
__device__ __forceinline__ void store_narrow(T* to, const accumulate_t<T> (&values)[Count]) {
  constexpr int bytes = Count * sizeof(T) < 16 ? Count * sizeof(T) : 16, step = bytes / sizeof(T);
#pragma unroll
  for (int i = 0; i < Count; i += step) {
    accumulate_t<T> part[step];
#pragma unroll
    for (int k = 0; k < step; ++k) part[k] = values[i + k];
    // The compiler splits a plain store of 16 bytes into words in backward_columns, but not __stcs.
    store_once<bytes>(to + i, narrow<T, bytes>(part));
  }
}

// The bytes of one access, which are part of a kernel's name: 16 where a thread takes the elements of a Philox block
// together, else an element's.
template <class T, int Count>
constexpr int pack_bytes = Count > 1 ? 16 : int(sizeof(T));
template <int PackBytes>
constexpr int count_of = PackBytes == 16 ? kBlockElements : 1;

template <class T, int PackBytes, Activation Kind>
__global__ void __launch_bounds__(threads) forward_elements(const Forward op) {
  using A = accumulate_t<T>;
  constexpr int Count = count_of<PackBytes>;
  const PhiloxState state = op.dropout.active ? read(op.dropout.source) : PhiloxState{};
  if (blockIdx.x == 0 && threadIdx.x == 0) write_state(state, op.dropout.rng_state);
  const A* const bias = static_cast<const A*>(op.bias);
  const A scale = A(op.dropout.scale);
  const int64_t numel = op.rows * op.cols;
  for (int64_t i = (int64_t(blockIdx.x) * threads + threadIdx.x) * Count; i < numel;
       i += int64_t(gridDim.x) * threads * Count) {
    A values[Count];
    load_biased<T>(static_cast<const T*>(op.x) + i, bias == nullptr ? nullptr : bias + column_of(i, op.cols), values);
    const uint32_t keep = keep_of(op.dropout, state, i);
#pragma unroll
    for (int k = 0; k < Count; ++k) values[k] = keep >> k & 1 ? Act<A, Kind>::value(values[k]) * scale : A(0);
    store_narrow<T>(static_cast<T*>(op.y) + i, values);
  }
}

template <class T, Activation Kind, int Count>
__device__ __forceinline__ void backward_group(const Backward& op, const PhiloxState& state, int64_t i,
                                               const accumulate_t<T>* bias, accumulate_t<T> (&gradient)[Count]) {
  using A = accumulate_t<T>;
  A values[Count];
  load_values(static_cast<const T*>(op.grad_output) + i, gradient);
  load_biased<T>(static_cast<const T*>(op.x) + i, bias, values);
  const uint32_t keep = keep_of(op.dropout, state, i);
#pragma unroll
  for (int k = 0; k < Count; ++k) {
    gradient[k] = keep >> k & 1 ? Act<A, Kind>::gradient(gradient[k] * A(op.dropout.scale), values[k]) : A(0);
  }
  store_narrow<T>(static_cast<T*>(op.grad_input) + i, gradient);
}

template <class T, int PackBytes, Activation Kind>
__global__ void __launch_bounds__(threads) backward_elements(const Backward op) {
  using A = accumulate_t<T>;
  constexpr int Count = count_of<PackBytes>;
  const PhiloxState state = op.dropout.active ? read(op.dropout.source) : PhiloxState{};
  const A* const bias = static_cast<const A*>(op.bias);
  const int64_t numel = op.rows * op.cols;
  for (int64_t i = (int64_t(blockIdx.x) * threads + threadIdx.x) * Count; i < numel;
       i += int64_t(gridDim.x) * threads * Count) {
    A gradient[Count];
    backward_group<T, Kind, Count>(op, state, i, bias == nullptr ? nullptr : bias + column_of(i, op.cols), gradient);
  }
}

// Rows are cut into blocks, columns into tiles; each block writes a partial row.
struct Cut {
  int64_t blocks, tiles;
};

template <int Count>
Cut cut(const Backward& op) {
  const int64_t tiles = divide_up(op.cols, lanes * Count);
  return {std::max<int64_t>(1, std::min(divide_up(op.rows, 4 * thread_rows), 2048 / tiles)), tiles};
}

// Two blocks a multiprocessor: without that bound ptxas takes 80 registers for sm_80 and spills.
template <class T, int PackBytes, Activation Kind>
__global__ void __launch_bounds__(threads, 2) backward_columns(const Backward op, int64_t blocks, int64_t tiles) {
  using A = accumulate_t<T>;
  constexpr int Count = count_of<PackBytes>;
  __shared__ A sums[thread_rows][lanes * Count];
  const PhiloxState state = op.dropout.active ? read(op.dropout.source) : PhiloxState{};
  const int lane = threadIdx.x % lanes, thread_row = threadIdx.x / lanes;
  const int64_t block = blockIdx.x / tiles, column = (blockIdx.x % tiles * lanes + lane) * Count;
  A sum[Count] = {};
  if (column < op.cols) {
    const A* const bias = static_cast<const A*>(op.bias) + column;
    const int64_t end = op.rows * (block + 1) / blocks;
    for (int64_t row = op.rows * block / blocks + thread_row; row < end; row += thread_rows) {
      A gradient[Count];
      backward_group<T, Kind, Count>(op, state, row * op.cols + column, bias, gradient);
#pragma unroll
      for (int k = 0; k < Count; ++k) sum[k] += gradient[k];
    }
  }
#pragma unroll
  for (int k = 0; k < Count; ++k) sums[thread_row][lane * Count + k] = sum[k];
  __syncthreads();
  for (int i = threadIdx.x; i < lanes * Count; i += threads) {
    const int64_t at = blockIdx.x % tiles * lanes * Count + i;
    if (at >= op.cols) continue;
    A total = sums[0][i];
#pragma unroll
    for (int row = 1; row < thread_rows; ++row) total += sums[row][i];
    static_cast<A*>(op.partials)[block * op.cols + at] = total;
  }
}

// Calls f with the number of elements that a thread takes together: 8 where rows and addresses allow.
template <class F>
void with_count(bool whole, const F& f) {
  whole ? f(std::integral_constant<int, kBlockElements>()) : f(std::integral_constant<int, 1>());
}

bool whole_groups(int64_t cols) { return cols % kBlockElements == 0; }

bool is_whole(const Forward& op) { return whole_groups(op.cols) && are_aligned(16, op.x, op.bias, op.y); }
bool is_whole(const Backward& op) {
  return whole_groups(op.cols) && are_aligned(16, op.x, op.bias, op.grad_output, op.grad_input);
}

template <class Op, class F>
void dispatch(const Op& op, const F& f) {
  with_type(op.dtype, [&](auto type) {
    with_supported_activation(op.activation, [&](auto activation) {
      with_count(is_whole(op), [&](auto count) { f(type, activation, count); });
    });
  });
}

}  // namespace

void forward_cuda(const Forward& op, void* stream) {
  dispatch(op, [&](auto type, auto activation, auto count) {
    launch("bias_act_dropout forward",
           forward_elements<decltype(type), pack_bytes<decltype(type), count.value>, activation.value>,
           grid_of(divide_up(op.rows * op.cols, count.value * threads)), threads, 0, stream, op);
  });
}

void backward_cuda(const Backward& op, void* stream) {
  dispatch(op, [&](auto type, auto activation, auto count) {
    using T = decltype(type);
    using A = accumulate_t<T>;
    if (op.grad_bias == nullptr) {
      return launch("bias_act_dropout backward", backward_elements<T, pack_bytes<T, count.value>, activation.value>,
                    grid_of(divide_up(op.rows * op.cols, count.value * threads)), threads, 0, stream, op);
    }
    const Cut parts = cut<count.value>(op);
    launch("bias_act_dropout backward", backward_columns<T, pack_bytes<T, count.value>, activation.value>,
           unsigned(parts.blocks * parts.tiles), threads, 0, stream, op, parts.blocks, parts.tiles);
    launch_add_partials<A>("bias_act_dropout add_partials", op.partials, parts.blocks, op.cols,
                           static_cast<A*>(op.grad_bias), static_cast<A*>(nullptr), stream);
  });
}

int64_t backward_partials_cuda(const Backward& op) {
  int64_t blocks = 0;
  with_count(is_whole(op), [&](auto count) { blocks = cut<count.value>(op).blocks; });
  return op.grad_bias == nullptr ? 0 : blocks * op.cols * accumulate_size(op.dtype);
}

}  // namespace dlkit::bias_act_dropout
