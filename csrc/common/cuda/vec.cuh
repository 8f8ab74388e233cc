// A Pack is the memory that one instruction moves: 16 bytes in the fast paths, one element where addresses are odd.
// Kernels keep packs in registers as they were loaded (a bf16 row takes half the registers of its fp32 values) and
// widen at use. Data that is read once bypasses L1, which leaves it to the parameters, which every row reads again.
// copy_async moves a pack into shared memory without a register in between (cp.async; elements of two bytes, too small
// for it, are copied at once).
#pragma once

#include <type_traits>

#include "../scalar.h"
#include "launch.cuh"

namespace dlkit::cuda {

template <int Bytes>
struct PackOf;
template <>
struct PackOf<16> {
  using type = uint4;
};
template <>
struct PackOf<8> {
  using type = uint64_t;
};
template <>
struct PackOf<4> {
  using type = uint32_t;
};
template <>
struct PackOf<2> {
  using type = uint16_t;
};
template <int Bytes>
using Pack = typename PackOf<Bytes>::type;

template <int Bytes>
__device__ __forceinline__ Pack<Bytes> load(const void* address) {
#if defined(DLKIT_CUDA_ON_CPU)
  cuda_on_cpu::require_aligned(address, Bytes);
#endif
  return *static_cast<const Pack<Bytes>*>(address);
}

// For memory that the kernel does not write and reads only once.
template <int Bytes>
__device__ __forceinline__ Pack<Bytes> load_once(const void* address) {
#if defined(DLKIT_CUDA_ON_CPU)
  return load<Bytes>(address);
#else
  Pack<Bytes> pack;
  if constexpr (Bytes == 16) {
    asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(pack.x), "=r"(pack.y), "=r"(pack.z), "=r"(pack.w)
        : "l"(__cvta_generic_to_global(address)));
  } else if constexpr (Bytes == 8) {
    asm("ld.global.nc.L1::no_allocate.u64 %0, [%1];" : "=l"(pack) : "l"(__cvta_generic_to_global(address)));
  } else if constexpr (Bytes == 4) {
    asm("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(pack) : "l"(__cvta_generic_to_global(address)));
  } else {
    asm("ld.global.nc.L1::no_allocate.u16 %0, [%1];" : "=h"(pack) : "l"(__cvta_generic_to_global(address)));
  }
  return pack;
#endif
}

template <int Bytes>
__device__ __forceinline__ void store(void* address, Pack<Bytes> pack) {
#if defined(DLKIT_CUDA_ON_CPU)
  cuda_on_cpu::require_aligned(address, Bytes);
#endif
  *static_cast<Pack<Bytes>*>(address) = pack;
}

// Marks the line as the first to leave L2: data that is not read soon makes room for data that is.
template <int Bytes>
__device__ __forceinline__ void store_once(void* address, Pack<Bytes> pack) {
#if defined(DLKIT_CUDA_ON_CPU)
  store<Bytes>(address, pack);
#else
  __stcs(static_cast<Pack<Bytes>*>(address), pack);
#endif
}

// Fetches the line of an address into L1, without a register that waits for it.
__device__ __forceinline__ void prefetch(const void* address) {
#if defined(DLKIT_CUDA_ON_CPU)
  (void)address;
#else
  asm volatile("prefetch.global.L1 [%0];" ::"l"(__cvta_generic_to_global(address)));
#endif
}

template <int Bytes>
__device__ __forceinline__ void copy_async(void* shared, const void* global) {
  if constexpr (Bytes < 4) {
    store<Bytes>(shared, load_once<Bytes>(global));
  } else {
#if defined(DLKIT_CUDA_ON_CPU)
    cuda_on_cpu::copy_async(shared, global, Bytes);
#else
    const uint32_t to = uint32_t(__cvta_generic_to_shared(shared));
    const size_t from = __cvta_generic_to_global(global);
    if constexpr (Bytes == 16) {
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
    } else {
      asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to), "l"(from), "n"(Bytes) : "memory");
    }
#endif
  }
}

__device__ __forceinline__ void copy_async_commit() {
#if defined(DLKIT_CUDA_ON_CPU)
  cuda_on_cpu::copy_async_commit();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most GroupsLeft of this thread's committed groups are under way.
template <int GroupsLeft>
__device__ __forceinline__ void copy_async_wait() {
#if defined(DLKIT_CUDA_ON_CPU)
  cuda_on_cpu::copy_async_wait(GroupsLeft);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(GroupsLeft) : "memory");
#endif
}

// For kernels that must give the same bits whatever the compiler fuses: a * b + c rounded once, and a * b never fused.
__device__ __forceinline__ float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
__device__ __forceinline__ double multiply_add(double a, double b, double c) { return fma(a, b, c); }

__device__ __forceinline__ float multiply(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ double multiply(double a, double b) { return __dmul_rn(a, b); }

template <class T, int Bytes>
struct Elements {
  T at[Bytes / sizeof(T)];
};

template <class T, int Bytes, int Count>
__device__ __forceinline__ void widen(const Pack<Bytes>& pack, accumulate_t<T> (&values)[Count]) {
  static_assert(Count * sizeof(T) == Bytes, "a pack holds Bytes / sizeof(T) values");
  const auto elements = bit_cast<Elements<T, Bytes>>(pack);
#pragma unroll
  for (int i = 0; i < Count; ++i) values[i] = dlkit::widen(elements.at[i]);
}

template <class T, int Bytes, int Count>
__device__ __forceinline__ Pack<Bytes> narrow(const accumulate_t<T> (&values)[Count]) {
  static_assert(Count * sizeof(T) == Bytes, "a pack holds Bytes / sizeof(T) values");
#if defined(__CUDA_ARCH__)
  // One instruction rounds two values to 16 bits.
  if constexpr (sizeof(T) == 2 && Count % 2 == 0) {
    Elements<uint32_t, Bytes> pairs;
#pragma unroll
    for (int i = 0; i < Count / 2; ++i) {
      if constexpr (std::is_same_v<T, BFloat16>) {
        pairs.at[i] = bit_cast<uint32_t>(__floats2bfloat162_rn(values[2 * i], values[2 * i + 1]));
      } else {
        pairs.at[i] = bit_cast<uint32_t>(__floats2half2_rn(values[2 * i], values[2 * i + 1]));
      }
    }
    return bit_cast<Pack<Bytes>>(pairs);
  } else
#endif
  {
    Elements<T, Bytes> elements;
#pragma unroll
    for (int i = 0; i < Count; ++i) elements.at[i] = dlkit::narrow<T>(values[i]);
    return bit_cast<Pack<Bytes>>(elements);
  }
}

// Count adjacent values of T, read in accesses of up to 16 bytes.
template <class T, class A, int Count>
__device__ __forceinline__ void load_values(const T* from, A (&values)[Count]) {
  constexpr int bytes = Count * sizeof(T) < 16 ? Count * sizeof(T) : 16, step = bytes / sizeof(T);
#pragma unroll
  for (int i = 0; i < Count; i += step) {
    accumulate_t<T> part[step];
    widen<T, bytes>(load<bytes>(from + i), part);
#pragma unroll
    for (int k = 0; k < step; ++k) values[i + k] = part[k];
  }
}

// Count adjacent values to memory of their own type, written in accesses of up to 16 bytes.
template <class A, int Count>
__device__ __forceinline__ void store_values(A* to, const A* values) {
  constexpr int bytes = Count * sizeof(A) < 16 ? Count * sizeof(A) : 16, step = bytes / sizeof(A);
#pragma unroll
  for (int i = 0; i < Count; i += step) {
    A part[step];
#pragma unroll
    for (int k = 0; k < step; ++k) part[k] = values[i + k];
    store<bytes>(to + i, narrow<A, bytes>(part));
  }
}

// Loads weight or bias, of type T or float, from column or channel `first` on; `absent` where there is none.
template <class T, class A, int Count>
__device__ __forceinline__ void load_parameter(const void* parameter, DType dtype, int64_t first, A absent,
                                               A (&values)[Count]) {
  if (parameter == nullptr) {
#pragma unroll
    for (int k = 0; k < Count; ++k) values[k] = absent;
  } else if (dtype == DType::F32) {
    load_values(static_cast<const float*>(parameter) + first, values);
  } else {
    load_values(static_cast<const T*>(parameter) + first, values);
  }
}

// Fetches a parameter into L1 for load_parameter.
template <class T>
__device__ __forceinline__ void prefetch_parameter(const void* parameter, DType dtype, int64_t first) {
  if (parameter != nullptr) {
    prefetch(static_cast<const char*>(parameter) + first * (dtype == DType::F32 ? sizeof(float) : sizeof(T)));
  }
}

}  // namespace dlkit::cuda
