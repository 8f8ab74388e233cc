// The second stage of sums over rows. The blocks of the first stage wrote `count` rows of partial sums for each output;
// this kernel adds them up in an order that depends only on `count`.
#pragma once

#include "../scalar.h"
#include "launch.cuh"

namespace dlkit::cuda {
namespace {  // a kernel for each op: g++ drops the launch bounds, which tests read, of a kernel that several ops share

constexpr int partials_threads = 1024;

// `parts` threads (a power of two) share a column, each with every parts-th row of its partial sums; blockIdx.y is the
// output.
template <class A, class Out>
__global__ void __launch_bounds__(partials_threads)
    add_partials(const A* partials, int64_t count, int64_t cols, int parts, Out* first, Out* second) {
  __shared__ A sums[partials_threads];
  const int columns = partials_threads / parts, part = threadIdx.x / columns;
  const int64_t column = int64_t(blockIdx.x) * columns + threadIdx.x % columns;
  partials += blockIdx.y * count * cols + column;
  A sum = 0;
  if (column < cols) {
#pragma unroll 8
    for (int64_t i = part; i < count; i += parts) sum += partials[i * cols];
  }
  for (int half = parts / 2; half > 0; half /= 2) {
    sums[threadIdx.x] = sum;
    __syncthreads();
    if (part < half) sum += sums[threadIdx.x + half * columns];
    __syncthreads();
  }
  if (part == 0 && column < cols) {
    (blockIdx.y == 0 ? first : second)[column] = dlkit::narrow<Out>(accumulate_t<Out>(sum));
  }
}

// Writes `first` and `second`, [cols] each; either may be null, and then has no partial sums. `parts` is such that a
// thread adds up about 8 of them. With always 32 parts a block would have 32 columns and read only 128 bytes of a row,
// and a row of a million columns would take 32 K blocks.
template <class A, class Out>
void launch_add_partials(const char* name, const void* partials, int64_t count, int64_t cols, Out* first, Out* second,
                         void* stream) {
  int parts = 1;
  while (parts < 32 && parts * 8 < count) parts *= 2;
  const dim3 grid(unsigned(divide_up(cols, partials_threads / parts)), first != nullptr && second != nullptr ? 2 : 1);
  launch(name, add_partials<A, Out>, grid, partials_threads, 0, stream, static_cast<const A*>(partials), count, cols,
         parts, first != nullptr ? first : second, second);
}

}  // namespace
}  // namespace dlkit::cuda
