// The second stage of a sum over rows: blocks of rows were summed in parallel, each into its own row of partial sums.
#pragma once

#include "parallel.h"
#include "simd.h"

namespace dlkit::DLKIT_ISA {

// output[i] = the sum of partials[block * block_stride + i], always in the blocks' order, for any number of threads.
template <class P, class A>
static void sum_partials(const A* partials, int64_t blocks, int64_t block_stride, int64_t cols, void* output) {
  parallel_for(cols, max64(64, kGrain / max64(1, blocks)), [&](int64_t begin, int64_t end) {
    for_columns<A, 1>(begin, end, [&](int64_t i, int, auto width) DLKIT_INLINE_LAMBDA {
      Vector<A> sum = {};
      for (int64_t block = 0; block < blocks; ++block) sum += load(partials + block * block_stride + i, width);
      store(static_cast<P*>(output) + i, sum, width);
    });
  });
}

}  // namespace dlkit::DLKIT_ISA
