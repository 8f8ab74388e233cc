#include "parallel.h"

#include <torch/csrc/stable/c/shim.h>

#include <stdexcept>

namespace dlkit {

void parallel_for_raw(int64_t count, int64_t grain, ParallelBody body, void* context) {
  if (torch_parallel_for(0, count, grain, body, context) != AOTI_TORCH_SUCCESS) {
    throw std::runtime_error("dlkit: torch's parallel-for failed");
  }
}

}  // namespace dlkit
