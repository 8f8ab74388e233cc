// Every kernel is launched here: by <<<>>> under nvcc, by fibers on the CPU where tests compile with
// -DDLKIT_CUDA_ON_CPU. Each launch is checked, and dynamic shared memory beyond the default is requested. Nothing waits
// for the device.
#pragma once

#if defined(DLKIT_CUDA_ON_CPU)
#include "cuda_on_cpu.h"
#else
#include <cuda_runtime.h>
#endif

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <set>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

namespace dlkit::cuda {

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string("dlkit: ") + what + " failed: " + cudaGetErrorString(error));
}

// The most bytes of arguments a kernel may take: 4 KB on every device, 32 KB from CUDA 12.1 on. On the CPU every fiber
// copies them, which is why the limit there is only a little higher.
constexpr int kFewArgumentBytes = 4096;
#if defined(DLKIT_CUDA_ON_CPU)
constexpr int kArgumentBytes = 6144;
#elif CUDART_VERSION >= 12010
constexpr int kArgumentBytes = 32764;
#else
constexpr int kArgumentBytes = kFewArgumentBytes;
#endif

// A launch gets 48 KB of shared memory by default, less the kernel's static part. A kernel with dynamic shared memory
// is allowed, once, all that the device has: if each launch set its own limit, host threads that launch the same kernel
// with different sizes would lower it for each other.
inline void allow_shared(const void* kernel, const char* name) {
  static std::mutex mutex;
  static std::set<std::pair<const void*, int>> allowed;  // (kernel, device)
  int device = 0, most = 0;
  check(cudaGetDevice(&device), name);
  const std::lock_guard<std::mutex> lock(mutex);
  if (allowed.count({kernel, device}) != 0) return;
  cudaFuncAttributes attributes{};
  check(cudaFuncGetAttributes(&attributes, kernel), name);
  check(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), name);
  check(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most - int(attributes.sharedSizeBytes)),
      name);
  allowed.insert({kernel, device});
}

template <class... Parameters>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, void* stream,
            std::common_type_t<Parameters>... arguments) {
  static_assert((size_t(0) + ... + ((sizeof(Parameters) + 7) / 8 * 8)) <= kArgumentBytes,
                "more than a kernel may take");
  if (shared_bytes > 0) allow_shared(reinterpret_cast<const void*>(kernel), name);
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

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Blocks loop over the work that exceeds the largest grid.
inline unsigned grid_of(int64_t blocks) { return unsigned(std::min<int64_t>(blocks, 0x7fffffff)); }

// Whether each address allows accesses of that many bytes. A null pointer does.
template <class... Pointers>
bool are_aligned(uintptr_t bytes, Pointers... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) % bytes == 0) && ...);
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
