// The elements of a tensor's arrays that a thread holds in a step, and their loads and stores.
#pragma once

#include <type_traits>

#include "../../common/cuda/vec.cuh"
#include "../kernel.h"

namespace dlkit::optim {
namespace {

using namespace dlkit::cuda;

// The elements a thread handles at once: one access of 16 bytes of the narrowest type, but 8 with 8-bit states, where a
// warp shares a scale.
template <class T, class S>
constexpr int width_of = sizeof(S) == 1 ? 8 : 16 / int(sizeof(S) < sizeof(T) ? sizeof(S) : sizeof(T));

// Wide accesses of global memory. The addresses come from the launch's words, and the compiler cannot tell that they
// are global; a generic access would take one more instruction.
template <int Bytes>
__device__ __forceinline__ Pack<Bytes> load_global(const void* address) {
#if defined(DLKIT_CUDA_ON_CPU)
  return load<Bytes>(address);
#else
  Pack<Bytes> pack;
  const size_t from = __cvta_generic_to_global(address);
  if constexpr (Bytes == 16) {
    asm("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(pack.x), "=r"(pack.y), "=r"(pack.z), "=r"(pack.w)
        : "l"(from));
  } else {
    static_assert(Bytes == 8);
    asm("ld.global.L1::no_allocate.u64 %0, [%1];" : "=l"(pack) : "l"(from));
  }
  return pack;
#endif
}
template <int Bytes>
__device__ __forceinline__ void store_global(void* address, Pack<Bytes> pack) {
#if defined(DLKIT_CUDA_ON_CPU)
  store<Bytes>(address, pack);
#else
  const size_t to = __cvta_generic_to_global(address);
  if constexpr (Bytes == 16) {
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(pack.x), "r"(pack.y), "r"(pack.z),
                 "r"(pack.w)
                 : "memory");
  } else {
    static_assert(Bytes == 8);
    asm volatile("st.global.u64 [%0], %1;" ::"l"(to), "l"(pack) : "memory");
  }
#endif
}

// The elements that the formulas take at once: eight would need half as many registers again.
template <class T>
constexpr int part_of = sizeof(T) == 8 ? 2 : 4;

// Width adjacent elements of one array as they were loaded, in parts. They are widened at use: nothing waits for one
// load before the next is issued. Full: all elements exist, at an address that allows wide accesses; else the first
// `present` do and are loaded one by one.
template <class T, int Width, int Part>
struct Packs {
  static constexpr int all_bytes = Width * int(sizeof(T)), part_bytes = Part * int(sizeof(T));
  static constexpr int bytes = all_bytes < 16 ? all_bytes : 16;
  using Tile = Elements<T, all_bytes>;
  struct Accesses {
    Pack<bytes> at[all_bytes / bytes];
  };
  Pack<part_bytes> at[Width / Part];

  template <bool Full>
  __device__ __forceinline__ void load_from(const T* from, int present) {
    if constexpr (Full) {
      Accesses accesses;
#pragma unroll
      for (int i = 0; i < all_bytes / bytes; ++i) accesses.at[i] = load_global<bytes>(from + i * (bytes / sizeof(T)));
      *this = bit_cast<Packs>(accesses);
    } else {
      Tile tile{};
#pragma unroll
      for (int j = 0; j < Width; ++j) {
        if (j < present) tile.at[j] = from[j];
      }
      *this = bit_cast<Packs>(tile);
    }
  }
  template <bool Full>
  __device__ __forceinline__ void store_to(T* to, int present) const {
    if constexpr (Full) {
      const auto accesses = bit_cast<Accesses>(*this);
#pragma unroll
      for (int i = 0; i < all_bytes / bytes; ++i) store_global<bytes>(to + i * (bytes / sizeof(T)), accesses.at[i]);
    } else {
      const auto tile = bit_cast<Tile>(*this);
#pragma unroll
      for (int j = 0; j < Width; ++j) {
        if (j < present) to[j] = tile.at[j];
      }
    }
  }

  __device__ __forceinline__ Elements<T, part_bytes> elements(int part) const {
    return bit_cast<Elements<T, part_bytes>>(at[part]);
  }
  __device__ __forceinline__ void set(int part, const Elements<T, part_bytes>& elements) {
    at[part] = bit_cast<Pack<part_bytes>>(elements);
  }
  template <class A>
  __device__ __forceinline__ void widen_to(A (&values)[Part], int part) const {
    widen<T, part_bytes>(at[part], values);
  }
  template <class A>
  __device__ __forceinline__ void narrow_from(const A (&values)[Part], int part) {
    at[part] = narrow<T, part_bytes>(values);
  }
};

// One chunk of one tensor.
template <class T, class S>
struct Span {
  T* param;
  void* grad;
  DType grad_dtype;
  S* states[kStates];
  float* scales[kStates];
  int16_t* remainder;
  accumulate_t<T>* ema;
  int64_t index, first;  // of the tensor in the step, of the chunk's first element in the tensor
  uint32_t step;         // t where the device counts, else 0
};

struct Absent {};

// Calls f(G()), where G is the gradient's type for a parameter of T.
template <class T, class F>
__device__ __forceinline__ void with_grad_dtype(DType dtype, const F& f) {
  if constexpr (std::is_same_v<T, double>) {
    f(double());
  } else if (dtype == DType::F32) {
    f(float());
  } else if (dtype == DType::BF16) {
    f(BFloat16());
  } else {
    f(Float16());
  }
}

// A thread's elements of the gradient. They are widened when loaded, since their type is known only at run time, and
// loaded last, since widening waits for them.
template <class T, int Width, int Part>
struct Grads {
  accumulate_t<T> parts[Width / Part][Part];

  template <bool Full>
  __device__ __forceinline__ void load_from(const void* from, DType dtype, int at, int present) {
    with_grad_dtype<T>(dtype, [&](auto kind) {
      Packs<decltype(kind), Width, Part> packs;
      packs.template load_from<Full>(static_cast<const decltype(kind)*>(from) + at, present);
#pragma unroll
      for (int i = 0; i < Width / Part; ++i) packs.widen_to(parts[i], i);
    });
  }
  template <bool Full>
  __device__ __forceinline__ void store_to(void* to, DType dtype, int at, int present) const {
    with_grad_dtype<T>(dtype, [&](auto kind) {
      Packs<decltype(kind), Width, Part> packs;
#pragma unroll
      for (int i = 0; i < Width / Part; ++i) packs.narrow_from(parts[i], i);
      packs.template store_to<Full>(static_cast<decltype(kind)*>(to) + at, present);
    });
  }
};

// All of a thread's elements. Arrays that are absent are neither read nor written.
template <class T, class S, Algorithm Which>
struct Tile {
  static constexpr int width = width_of<T, S>, part = part_of<T>;
  static constexpr int used = Which == Algorithm::Sgd ? 1 : kStates;
  static constexpr int required = Which == Algorithm::Adam ? 2 : Which == Algorithm::RmsProp ? 1 : 0;
  Grads<T, width, part> grad;
  Packs<T, width, part> param;
  Packs<S, width, part> states[used];
  std::conditional_t<sizeof(T) == 2, Packs<int16_t, width, part>, Absent> remainder;
  Packs<accumulate_t<T>, width, part> ema;

  __device__ __forceinline__ static bool has(const Span<T, S>& span, int state) {
    return state < required || (state < used && span.states[state] != nullptr);
  }
  // Loads all arrays but the gradient; load_grad loads that and waits for it.
  template <bool Full>
  __device__ __forceinline__ void load_from(const Span<T, S>& span, int at, int count) {
    param.template load_from<Full>(span.param + at, count);
#pragma unroll
    for (int s = 0; s < used; ++s) {
      if (has(span, s)) states[s].template load_from<Full>(span.states[s] + at, count);
    }
    if constexpr (sizeof(T) == 2) {
      if (span.remainder != nullptr) remainder.template load_from<Full>(span.remainder + at, count);
    }
    if (span.ema != nullptr) ema.template load_from<Full>(span.ema + at, count);
  }
  template <bool Full>
  __device__ __forceinline__ void load_grad(const Span<T, S>& span, int at, int count) {
    grad.template load_from<Full>(span.grad, span.grad_dtype, at, count);
  }
  template <bool Full>
  __device__ __forceinline__ void store_to(const Span<T, S>& span, int at, int count, bool write_grads) const {
    param.template store_to<Full>(span.param + at, count);
#pragma unroll
    for (int s = 0; s < used; ++s) {
      if (has(span, s)) states[s].template store_to<Full>(span.states[s] + at, count);
    }
    if constexpr (sizeof(T) == 2) {
      if (span.remainder != nullptr) remainder.template store_to<Full>(span.remainder + at, count);
    }
    if (span.ema != nullptr) ema.template store_to<Full>(span.ema + at, count);
    if (write_grads) grad.template store_to<Full>(span.grad, span.grad_dtype, at, count);
  }
};

}  // namespace
}  // namespace dlkit::optim
