// DropBlock on CUDA. Two kernels. In the first a thread draws a Philox block of 8 seeds and sets the bits of their
// squares, of which there are few (p / size^2), by atomic or. Its old value tells how many bits are new; these are
// whole numbers, whose sum is the same in any order. The second reads x and a bit an element and writes y, 16 bytes at
// a time. Not yet run on a GPU.
#include <algorithm>

#include "../common/cuda/launch.cuh"
#include "../common/cuda/philox.cuh"
#include "../common/cuda/vec.cuh"
#include "../common/dispatch.h"
#include "kernel.h"

namespace dlkit::dropblock2d {
namespace {

using namespace dlkit::cuda;

constexpr int threads = 256;

// Sets `count` adjacent bits; returns how many were not set before.
__device__ __forceinline__ int set_bits(uint32_t* words, int64_t first, int64_t count) {
  int fresh = 0;
  while (count > 0) {
    const int from = int(first % 32), here = int(count < 32 - from ? count : 32 - from);
    const uint32_t mask = 0xffffffffu >> (32 - here) << from;
    fresh += __popc(mask & ~atomicOr(words + first / 32, mask));
    first += here;
    count -= here;
  }
  return fresh;
}

__device__ __forceinline__ int set_square(const DropBlock2d& op, int64_t seed) {
  const int64_t row = seed / op.columns, column = seed - row * op.columns;
  const int64_t plane = row / op.rows, top = row - plane * op.rows;
  int64_t corner;
  if (op.channels > 1) {
    const int64_t sample = plane / op.channels;
    corner = ((sample * op.height + top) * op.width + column) * op.channels + (plane - sample * op.channels);
  } else {
    corner = (plane * op.height + top) * op.width + column;
  }
  const int64_t down = op.width * op.channels;
  int fresh = 0;
  for (int64_t i = 0; i < op.size; ++i, corner += down) {
    if (op.channels == 1) {
      fresh += set_bits(op.dropped, corner, op.size);
    } else {
      for (int64_t j = 0; j < op.size; ++j) fresh += set_bits(op.dropped, corner + j * op.channels, 1);
    }
  }
  return fresh;
}

// Without a number of resident blocks in the launch bounds ptxas takes 40 registers for sm_80 and spills.
__global__ void __launch_bounds__(threads, 4) mark(const DropBlock2d op, int64_t seeds) {
  const PhiloxState state = read(op.source);
  unsigned long long fresh = 0;
  for (int64_t block = int64_t(blockIdx.x) * threads + threadIdx.x; block * kBlockElements < seeds;
       block += int64_t(gridDim.x) * threads) {
    const uint32_t drawn = ~keep_bits(state, op.threshold, uint64_t(block));
#pragma unroll 1
    for (int lane = 0; lane < kBlockElements; ++lane) {
      const int64_t seed = block * kBlockElements + lane;
      if ((drawn >> lane & 1) != 0 && seed < seeds) fresh += set_square(op, seed);
    }
  }
  if (op.known) return;
  if (blockIdx.x == 0 && threadIdx.x == 0) write_state(state, op.rng_state);
  if (fresh > 0) atomicAdd(reinterpret_cast<unsigned long long*>(op.rng_state + 2), fresh);
}

template <class T, int PackBytes, int Packs>
__global__ void __launch_bounds__(threads) apply(const DropBlock2d op) {
  using A = accumulate_t<T>;
  constexpr int width = PackBytes / sizeof(T);
  __shared__ double shared_scale;
  if (threadIdx.x == 0) shared_scale = scale_of(op);
  __syncthreads();
  const A scale = A(shared_scale);
  const T* x = static_cast<const T*>(op.x);
  T* y = static_cast<T*>(op.y);
  const auto dropped = [&](int64_t i) { return op.dropped[i / 32] >> i % 32; };
  const int64_t count = numel(op), whole = count / width, step = int64_t(gridDim.x) * threads * Packs;
  for (int64_t first = int64_t(blockIdx.x) * threads * Packs + threadIdx.x; first < whole; first += step) {
    Pack<PackBytes> values[Packs];
    uint32_t gone[Packs];
#pragma unroll
    for (int k = 0; k < Packs; ++k) {
      const int64_t at = first + k * threads;
      if (at >= whole) continue;
      values[k] = load_once<PackBytes>(x + at * width);
      gone[k] = dropped(at * width);  // of one word, as width divides 32
    }
#pragma unroll
    for (int k = 0; k < Packs; ++k) {
      const int64_t at = first + k * threads;
      if (at >= whole) continue;
      A wide[width];
      widen<T, PackBytes>(values[k], wide);
#pragma unroll
      for (int j = 0; j < width; ++j) wide[j] = gone[k] >> j & 1 ? A(0) : wide[j] * scale;
      store<PackBytes>(y + at * width, narrow<T, PackBytes>(wide));
    }
  }
  if (blockIdx.x == 0 && threadIdx.x < count - whole * width) {  // less than a pack is left
    const int64_t i = whole * width + threadIdx.x;
    y[i] = dlkit::narrow<T>(dropped(i) & 1 ? A(0) : dlkit::widen(x[i]) * scale);
  }
}

template <class T, int PackBytes>
void run(const DropBlock2d& op, void* stream) {
  constexpr int64_t packs = 4, width = PackBytes / sizeof(T);
  const int64_t blocks = std::max<int64_t>(1, divide_up(numel(op) / (packs * width), threads));
  launch("dropblock2d apply", apply<T, PackBytes, packs>, grid_of(blocks), threads, 0, stream, op);
}

}  // namespace

void dropblock2d_cuda(const DropBlock2d& op, void* stream) {
  if (numel(op) == 0) return;
  const int64_t seeds = op.planes * op.rows * op.columns;
  launch("dropblock2d mark", mark, grid_of(divide_up(seeds, int64_t(kBlockElements) * threads)), threads, 0, stream, op,
         seeds);
  with_type(op.dtype, [&](auto type) {
    using T = decltype(type);
    if (are_aligned(16, op.x, op.y)) {
      run<T, 16>(op, stream);
    } else {
      run<T, sizeof(T)>(op, stream);
    }
  });
}

}  // namespace dlkit::dropblock2d
