// Runs CUDA kernels on the CPU: g++ compiles a .cu file with -DDLKIT_CUDA_ON_CPU and -I of this folder, and every
// thread of a block becomes a fiber of the calling host thread. Blocks run one after another. A fiber runs until it
// waits at __syncthreads, __syncwarp or a shuffle; a switch costs nanoseconds, and results do not depend on timing.
//
// Errors that would be undefined or a fault on a GPU end the process with a message here: a barrier or shuffle that
// live threads never reach or reach on different lines, a shuffle that reads a lane outside its mask, a misaligned
// vector access (vec.cuh asks). Dynamic shared memory starts as NaN, and an asynchronous copy lands as late as it may.
// Every launch is checked against a device's limits (device_model.h) and refused with the runtime's error codes.
//
// DLKIT_CUDA_ON_CPU_ARCH=80|90|100|120 selects the device (90 if unset); its limits also decide the kernels' plans.
// DLKIT_CUDA_ON_CPU_SHUFFLE=<seed> permutes the order in which warps and their lanes run between barriers: if a barrier
// is missing, some order gives another result. DLKIT_CUDA_ON_CPU_SMS=<count> sets the number of multiprocessors (3
// unless set).
#pragma once

#include <math.h>  // as under nvcc, sqrt and similar functions have overloads for float in the global namespace
#include <sys/mman.h>

#include <cstdarg>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <type_traits>
#include <utility>
#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#define CUDA_ON_CPU_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define CUDA_ON_CPU_ASAN 1
#endif
#endif
#if defined(CUDA_ON_CPU_ASAN)
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __grid_constant__
#define __shared__ static thread_local

struct uint2 {
  unsigned x, y;
};
struct uint3 {
  unsigned x, y, z;
};
struct uint4 {
  unsigned x, y, z, w;
};
struct float2 {
  float x, y;
};
struct float4 {
  float x, y, z, w;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline thread_local uint3 threadIdx, blockIdx;
inline thread_local dim3 blockDim, gridDim;

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorLaunchOutOfResources = 701,
};
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor = 81,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
struct cudaFuncAttributes {
  size_t sharedSizeBytes;
  int maxThreadsPerBlock, maxDynamicSharedSizeBytes;
};
using cudaStream_t = void*;

namespace cuda_on_cpu {

[[noreturn]] __attribute__((format(printf, 1, 2))) inline void fail(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::fprintf(stderr, "cuda_on_cpu: block (%u, %u, %u), thread (%u, %u, %u): ", blockIdx.x, blockIdx.y, blockIdx.z,
               threadIdx.x, threadIdx.y, threadIdx.z);
  std::vfprintf(stderr, format, arguments);
  std::fprintf(stderr, "\n");
  va_end(arguments);
  std::abort();
}

inline void require_aligned(const void* address, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(address) % bytes != 0)
    fail("%zu-byte access at misaligned address %p", bytes, address);
}

inline int64_t environment(const char* name, int64_t otherwise) {
  const char* text = std::getenv(name);
  return text != nullptr && *text != '\0' ? std::strtoll(text, nullptr, 10) : otherwise;
}

}  // namespace cuda_on_cpu

#include "device_model.h"

namespace cuda_on_cpu {

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
  int group;
};

struct Fiber {
  uint3 thread;
  unsigned warp, lane;
  bool waiting;
  int copy_group;  // number of copy groups committed so far
  std::vector<Copy> copies;
#if defined(__x86_64__)
  void* stack_pointer;
#else
  ucontext_t context;
#endif
  void* fake_stack;  // ASan's
};

// The `ready` lanes can run; the arrays hold each lane's arguments of the shuffle or __syncwarp at which it waits.
struct Warp {
  uint32_t ready, arrived, live;
  uint32_t mask[32];
  int line[32];
  unsigned source[32];
  uint64_t value[32];
};

// One per host thread.
struct Machine {
#if defined(CUDA_ON_CPU_ASAN)
  static constexpr size_t stack_bytes = 256 << 10;
#else
  static constexpr size_t stack_bytes = 64 << 10;
#endif
  static constexpr size_t guard_bytes = 4 << 10, most_threads = most_threads_per_block;

  std::vector<Fiber> fibers;
  char* stacks = nullptr;
  std::vector<Warp> warps;
  std::vector<unsigned> order;  // warps, the first to run first
  bool barrier_released = false;
  Fiber* current = nullptr;
  Fiber scheduler{};
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_bytes = 0;
  unsigned live = 0, at_barrier = 0;
  int barrier_line = 0;
  uint64_t random = 0;  // state of the run-order shuffle, 0 when off
  const std::function<void()>* body = nullptr;
  unsigned char* dynamic_shared = nullptr;
  cudaError_t last_error = cudaSuccess;

  ~Machine() {
    if (stacks != nullptr) munmap(stacks, most_threads * stack_bytes);
  }
  char* stack_of(const Fiber& fiber) { return stacks + size_t(&fiber - fibers.data()) * stack_bytes; }
};

inline thread_local Machine machine;

inline void fiber_main();

#if defined(__x86_64__)
// Saves the registers that the System V ABI preserves and continues on another stack. noipa: callers must treat it as
// any opaque call.
#if defined(__clang__)
__attribute__((noinline))
#else
__attribute__((noipa))
#endif
inline void swap_stacks(void** save, void* load) {
  asm volatile(
      "leaq -128(%%rsp), %%rsp\n"  // past the red zone
      "pushq %%rbp\n"
      "leaq 1f(%%rip), %%rax\n"
      "pushq %%rax\n"
      "movq %%rsp, (%0)\n"
      "movq %1, %%rsp\n"
      "popq %%rax\n"
      "jmpq *%%rax\n"
      "1:\n"
      "popq %%rbp\n"
      "leaq 128(%%rsp), %%rsp\n"
      : "+D"(save), "+S"(load)
      :
      : "rax", "rbx", "rcx", "rdx", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "cc", "memory");
}
inline void prepare(Machine& m, Fiber& fiber) {
  void** top = reinterpret_cast<void**>(m.stack_of(fiber) + Machine::stack_bytes - 64);
  top[0] = reinterpret_cast<void*>(&fiber_main);
  top[1] = nullptr;  // ends a backtrace
  fiber.stack_pointer = top;
}
inline void swap_contexts(Fiber& from, Fiber& to) { swap_stacks(&from.stack_pointer, to.stack_pointer); }
#else
inline void prepare(Machine& m, Fiber& fiber) {
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = m.stack_of(fiber);
  fiber.context.uc_stack.ss_size = Machine::stack_bytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, &fiber_main, 0);
}
inline void swap_contexts(Fiber& from, Fiber& to) { swapcontext(&from.context, &to.context); }
#endif

inline void resume(Machine& m, Fiber& fiber) {
  m.current = &fiber;
  threadIdx = fiber.thread;
#if defined(CUDA_ON_CPU_ASAN)
  __sanitizer_start_switch_fiber(&m.scheduler.fake_stack, m.stack_of(fiber), Machine::stack_bytes);
#endif
  swap_contexts(m.scheduler, fiber);
#if defined(CUDA_ON_CPU_ASAN)
  __sanitizer_finish_switch_fiber(m.scheduler.fake_stack, nullptr, nullptr);
#endif
}

inline void yield(Machine& m) {
  Fiber& self = *m.current;
#if defined(CUDA_ON_CPU_ASAN)
  __sanitizer_start_switch_fiber(&self.fake_stack, m.scheduler_stack, m.scheduler_stack_bytes);
#endif
  swap_contexts(self, m.scheduler);
#if defined(CUDA_ON_CPU_ASAN)
  __sanitizer_finish_switch_fiber(self.fake_stack, &m.scheduler_stack, &m.scheduler_stack_bytes);
#endif
}

inline void release(Machine& m, Fiber& fiber) {
  fiber.waiting = false;
  m.warps[fiber.warp].ready |= 1u << fiber.lane;
}

inline void release_barrier(Machine& m) {
  m.at_barrier = 0;
  m.barrier_released = true;
  for (unsigned i = 0; i < blockDim.x * blockDim.y * blockDim.z; ++i) {
    if (m.fibers[i].waiting && m.warps[m.fibers[i].warp].mask[m.fibers[i].lane] == 0) release(m, m.fibers[i]);
  }
}

// The life of a fiber: one block after another, from launch to launch.
inline void fiber_main() {
  Machine& m = machine;
#if defined(CUDA_ON_CPU_ASAN)
  __sanitizer_finish_switch_fiber(nullptr, &m.scheduler_stack, &m.scheduler_stack_bytes);
#endif
  for (;;) {
    (*m.body)();
    Fiber& self = *m.current;
    m.warps[self.warp].live &= ~(1u << self.lane);
    --m.live;
    if (m.at_barrier != 0 && m.at_barrier == m.live) release_barrier(m);
    yield(m);
  }
}

inline void wait_or_go_on(Machine& m) {
  Fiber& self = *m.current;
  if (self.waiting || m.random != 0) {
    if (!self.waiting) release(m, self);  // the last to arrive has no priority over the others
    yield(m);
  }
}

inline void barrier(int line) {
  Machine& m = machine;
  if (m.at_barrier != 0 && m.barrier_line != line) {
    fail("__syncthreads on line %d while others wait on line %d", line, m.barrier_line);
  }
  m.barrier_line = line;
  m.warps[m.current->warp].mask[m.current->lane] = 0;
  if (++m.at_barrier == m.live) {
    release_barrier(m);
  } else {
    m.current->waiting = true;
  }
  wait_or_go_on(m);
}

// Waits until every lane of the mask has reached this line; returns lane `source`'s value.
inline uint64_t exchange(uint32_t mask, uint64_t value, unsigned source, int line) {
  Machine& m = machine;
  Fiber& self = *m.current;
  Warp& warp = m.warps[self.warp];
  const uint32_t bit = 1u << self.lane;
  if ((mask & bit) == 0) fail("line %d: mask %08x leaves out the calling lane %u", line, mask, self.lane);
  if ((mask & ~warp.live) != 0) fail("line %d: mask %08x names lanes that do not exist or have ended", line, mask);
  if ((mask >> source & 1) == 0)
    fail("line %d: lane %u reads lane %u outside mask %08x", line, self.lane, source, mask);
  for (unsigned lane = 0; lane < 32; ++lane) {
    if ((warp.arrived & mask) >> lane & 1 && (warp.mask[lane] != mask || warp.line[lane] != line)) {
      fail("lane %u on line %d with mask %08x meets lane %u on line %d with mask %08x", self.lane, line, mask, lane,
           warp.line[lane], warp.mask[lane]);
    }
  }
  warp.arrived |= bit;
  warp.mask[self.lane] = mask;
  warp.line[self.lane] = line;
  warp.source[self.lane] = source;
  warp.value[self.lane] = value;
  if ((warp.arrived & mask) == mask) {
    uint64_t brought[32];
    std::memcpy(brought, warp.value, sizeof(brought));
    warp.arrived &= ~mask;
    for (unsigned lane = 0; lane < 32; ++lane) {
      if ((mask >> lane & 1) == 0) continue;
      warp.value[lane] = brought[warp.source[lane]];
      Fiber& fiber = m.fibers[self.warp * 32 + lane];
      if (fiber.waiting) release(m, fiber);
    }
  } else {
    self.waiting = true;
  }
  wait_or_go_on(m);
  return warp.value[self.lane];
}

template <class T>
T shuffle(uint32_t mask, T value, unsigned source, int line) {
  static_assert(sizeof(T) <= 8, "a shuffle moves at most 64 bits");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = exchange(mask, bits, source, line);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

// cp.async: the copy happens at the wait; until then the destination holds NaN.
inline void copy_async(void* to, const void* from, size_t bytes) {
  require_aligned(to, bytes);
  require_aligned(from, bytes);
  std::memset(to, 0xff, bytes);
  machine.current->copies.push_back({to, from, bytes, machine.current->copy_group});
}
inline void copy_async_commit() { ++machine.current->copy_group; }
inline void copy_async_wait(int groups_left) {
  Fiber& self = *machine.current;
  size_t left = 0;
  for (const Copy& copy : self.copies) {
    if (copy.group < self.copy_group - groups_left) {
      std::memcpy(copy.to, copy.from, copy.bytes);
    } else {
      self.copies[left++] = copy;
    }
  }
  self.copies.resize(left);
}

inline unsigned draw(Machine& m, size_t below) {
  m.random = m.random * 6364136223846793005u + 1442695040888963407u;
  return unsigned((m.random >> 33) % below);
}

// A warp runs up to a barrier before the next one runs: as unfair as hardware may be.
inline void run_block(Machine& m, unsigned threads) {
  m.live = threads;
  m.at_barrier = 0;
  m.warps.assign((threads + 31) / 32, Warp{});
  m.order.resize(m.warps.size());
  for (unsigned i = 0; i < m.order.size(); ++i) m.order[i] = i;
  for (unsigned i = 0; i < threads; ++i) {
    Fiber& fiber = m.fibers[i];
    fiber.thread = {i % blockDim.x, i / blockDim.x % blockDim.y, i / (blockDim.x * blockDim.y)};
    fiber.warp = i / 32;
    fiber.lane = i % 32;
    fiber.copy_group = 0;
    fiber.copies.clear();
    m.warps[i / 32].live |= 1u << i % 32;
    release(m, fiber);
  }
  m.barrier_released = true;
  for (size_t at = 0; at < m.order.size();) {
    Warp& warp = m.warps[m.order[at]];
    if (m.barrier_released) {
      m.barrier_released = false;
      at = 0;
      for (size_t i = m.order.size(); m.random != 0 && i > 1; --i) std::swap(m.order[i - 1], m.order[draw(m, i)]);
    } else if (warp.ready == 0) {
      ++at;
    } else {
      unsigned lane = m.random != 0 ? draw(m, 32) : 0;
      while ((warp.ready >> lane & 1) == 0) lane = (lane + 1) % 32;
      warp.ready &= ~(1u << lane);
      resume(m, m.fibers[m.order[at] * 32 + lane]);
    }
  }
  if (m.live != 0) {
    fail("deadlock: %u of %u threads still live, %u of them at __syncthreads on line %d, the rest at a shuffle", m.live,
         threads, m.at_barrier, m.barrier_line);
  }
}

inline std::mutex attribute_mutex;
inline std::map<std::pair<const void*, int>, size_t> raised_shared;  // (kernel, arch) -> dynamic memory it may use

// The most dynamic shared memory that a launch may ask for.
inline size_t shared_limit(const void* kernel) {
  const std::lock_guard<std::mutex> lock(attribute_mutex);
  const auto found = raised_shared.find({kernel, device_model().arch});
  return found != raised_shared.end() ? found->second : shared_default - facts_of(kernel).static_shared;
}

inline cudaError_t refusal(const void* kernel, dim3 grid, dim3 block, size_t shared) {
  const uint64_t threads = uint64_t(block.x) * block.y * block.z;
  const bool sizes_fit = threads >= 1 && threads <= most_threads_per_block && block.z <= 64 && grid.x >= 1 &&
                         grid.y >= 1 && grid.z >= 1 && grid.x <= most_blocks_x && grid.y <= most_blocks_yz &&
                         grid.z <= most_blocks_yz;
  if (!sizes_fit) return cudaErrorInvalidConfiguration;
  if (threads > facts_of(kernel).most_threads) return cudaErrorLaunchOutOfResources;
  if (shared > shared_limit(kernel)) return cudaErrorInvalidValue;
  return cudaSuccess;
}

template <class... Parameters>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared,
            const std::common_type_t<Parameters>&... arguments) {
  Machine& m = machine;
  const unsigned threads = block.x * block.y * block.z;
  m.last_error = refusal(reinterpret_cast<const void*>(kernel), grid, block, shared);
  if (m.last_error != cudaSuccess) return;
  if (m.stacks == nullptr) {
    const size_t bytes = Machine::most_threads * Machine::stack_bytes;
    void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) fail("no memory for %zu bytes of stacks", bytes);
    m.stacks = static_cast<char*>(memory);
    m.fibers = std::vector<Fiber>(Machine::most_threads);
    for (Fiber& fiber : m.fibers) {
      mprotect(m.stack_of(fiber), Machine::guard_bytes, PROT_NONE);
      prepare(m, fiber);
    }
  }
  const std::function<void()> body = [&] { kernel(arguments...); };
  // Exactly the requested size: AddressSanitizer then sees an access beyond it.
  const std::unique_ptr<unsigned char, void (*)(unsigned char*)> memory(
      static_cast<unsigned char*>(::operator new(shared, std::align_val_t(16))),
      [](unsigned char* pointer) { ::operator delete(pointer, std::align_val_t(16)); });
  m.body = &body;
  m.dynamic_shared = memory.get();
  m.random = uint64_t(environment("DLKIT_CUDA_ON_CPU_SHUFFLE", 0));
  gridDim = grid;
  blockDim = block;
  for (blockIdx.z = 0; blockIdx.z < grid.z; ++blockIdx.z) {
    for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y) {
      for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) {
        std::memset(m.dynamic_shared, 0xff, shared);
        run_block(m, threads);
      }
    }
  }
}

}  // namespace cuda_on_cpu

inline void __syncthreads(int line = __builtin_LINE()) { cuda_on_cpu::barrier(line); }
inline void __syncwarp(uint32_t mask = 0xffffffff, int line = __builtin_LINE()) {
  cuda_on_cpu::exchange(mask, 0, cuda_on_cpu::machine.current->lane, line);
}
template <class T>
T __shfl_sync(uint32_t mask, T value, int source, int width = 32, int line = __builtin_LINE()) {
  const int lane = int(cuda_on_cpu::machine.current->lane);
  return cuda_on_cpu::shuffle(mask, value, unsigned((lane & ~(width - 1)) | (source & (width - 1))), line);
}
template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int lane_mask, int width = 32, int line = __builtin_LINE()) {
  const int lane = int(cuda_on_cpu::machine.current->lane), source = lane ^ lane_mask;
  // A lane may read from earlier groups of `width` lanes, not from later ones.
  return cuda_on_cpu::shuffle(mask, value, unsigned(source < (lane & ~(width - 1)) + width ? source : lane), line);
}
template <class T>
T __shfl_down_sync(uint32_t mask, T value, unsigned delta, int width = 32, int line = __builtin_LINE()) {
  const unsigned lane = cuda_on_cpu::machine.current->lane;
  return cuda_on_cpu::shuffle(mask, value, lane % width + delta < unsigned(width) ? lane + delta : lane, line);
}

template <class T>
T __ldg(const T* address) {
  return *address;
}

// Needs no atomic instruction: blocks run one after another, and a fiber runs until it waits.
template <class T>
T atomicAdd(T* address, T value) {
  const T old = *address;
  *address = old + value;
  return old;
}
template <class T>
T atomicOr(T* address, T value) {
  const T old = *address;
  *address = old | value;
  return old;
}
inline int __popc(unsigned value) { return __builtin_popcount(value); }

// Products that must not be fused with a sum; fmaf hides them from the compiler.
inline float __fmul_rn(float a, float b) { return fmaf(a, b, 0.0f); }
inline double __dmul_rn(double a, double b) { return fma(a, b, 0.0); }

inline float rsqrtf(float value) { return 1.0f / std::sqrt(value); }

inline cudaError_t cudaGetLastError() {
  const cudaError_t error = cuda_on_cpu::machine.last_error;
  cuda_on_cpu::machine.last_error = cudaSuccess;
  return error;
}
inline const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorLaunchOutOfResources:
      return "too many resources requested for launch";
  }
  return "unknown error";
}
// A device's index is its architecture: data cached for one device is then not used for another.
inline cudaError_t cudaGetDevice(int* device) {
  *device = cuda_on_cpu::device_model().arch;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = int(cuda_on_cpu::environment("DLKIT_CUDA_ON_CPU_SMS", 3));
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = int(cuda_on_cpu::device_model().shared_per_multiprocessor);
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = int(cuda_on_cpu::device_model().shared_opt_in);
      return cudaSuccess;
  }
  return cudaErrorInvalidValue;
}
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* kernel) {
  const cuda_on_cpu::KernelFacts facts = cuda_on_cpu::facts_of(kernel);
  *attributes = {facts.static_shared, int(facts.most_threads), int(cuda_on_cpu::shared_limit(kernel))};
  return cudaSuccess;
}
inline cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int value) {
  const cuda_on_cpu::DeviceModel& model = cuda_on_cpu::device_model();
  if (value < 0 || size_t(value) + cuda_on_cpu::facts_of(kernel).static_shared > model.shared_opt_in) {
    return cudaErrorInvalidValue;
  }
  const std::lock_guard<std::mutex> lock(cuda_on_cpu::attribute_mutex);
  cuda_on_cpu::raised_shared[{kernel, model.arch}] = size_t(value);
  return cudaSuccess;
}
