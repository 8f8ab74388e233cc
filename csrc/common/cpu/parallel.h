// torch's own thread pool, called through its C interface: kernels need no torch headers, and no second OpenMP runtime
// competes with torch's. Loops are cut into chunks of `grain` or more; no result depends on which thread runs a chunk.
#pragma once

#include <cstdint>

#include "../scalar.h"

namespace dlkit {

constexpr int64_t kGrain = 16 * 1024;  // elements a task: below this a second thread costs more than it saves

using ParallelBody = void (*)(int64_t begin, int64_t end, void* context);
void parallel_for_raw(int64_t count, int64_t grain, ParallelBody body, void* context);

template <class F>
DLKIT_HOST_DEVICE void parallel_for(int64_t count, int64_t grain, const F& f) {
  if (count <= grain) {
    if (count > 0) f(int64_t(0), count);
    return;
  }
  parallel_for_raw(
      count, grain, [](int64_t begin, int64_t end, void* context) { (*static_cast<const F*>(context))(begin, end); },
      const_cast<F*>(&f));
}

}  // namespace dlkit
