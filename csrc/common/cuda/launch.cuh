// The one way to launch a kernel: <<<>>> under nvcc, fibers on the CPU where tests compile with -DDLKIT_CUDA_ON_CPU.
// Every launch is checked, and dynamic shared memory beyond the default 48 KB is asked for here. Nothing waits for the
// device.
#pragma once

#if defined(DLKIT_CUDA_ON_CPU)
#include "cuda_on_cpu.h"
#else
#include <cuda_runtime.h>
#endif

#include <cstddef>
#include <stdexcept>
#include <string>
#include <type_traits>

namespace dlkit::cuda {

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string("dlkit: ") + what + " failed: " + cudaGetErrorString(error));
}

template <class... Parameters>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, void* stream,
            std::common_type_t<Parameters>... arguments) {
  if (shared_bytes > (48 << 10)) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes)), name);
  }
#if defined(DLKIT_CUDA_ON_CPU)
  (void)stream;
  cuda_on_cpu::launch(kernel, grid, block, shared_bytes, arguments...);
#else
  // clang-format off
  kernel<<<grid, block, shared_bytes, static_cast<cudaStream_t>(stream)>>>(arguments...);
  // clang-format on
#endif
  check(cudaGetLastError(), name);
}

struct Device {
  int multiprocessors;
  int shared_per_block;  // the most dynamic shared memory a block may ask for
  int shared_per_multiprocessor;
};

inline Device current_device() {
  int index = 0;
  check(cudaGetDevice(&index), "cudaGetDevice");
  const auto attribute = [index](cudaDeviceAttr which) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, which, index), "cudaDeviceGetAttribute");
    return value;
  };
  return {attribute(cudaDevAttrMultiProcessorCount), attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin),
          attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor)};
}

// The dynamic shared memory of the block, 16-byte aligned.
__device__ __forceinline__ unsigned char* dynamic_shared() {
#if defined(DLKIT_CUDA_ON_CPU)
  return cuda_on_cpu::machine.dynamic_shared;
#else
  extern __shared__ __align__(16) unsigned char memory[];
  return memory;
#endif
}

}  // namespace dlkit::cuda
