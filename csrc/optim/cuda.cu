// The optimizers on CUDA. What a step moves is each array once in and, but for gradients, once out: 28 bytes a
// parameter for AdamW in fp32, the least there is. Clipping adds the 4 bytes of the norm's pass; the coefficient, the
// loss scale, found_inf and step counters are read where they lie, so nothing waits for the device.
//
// One launch serves many tensors: their addresses travel in its arguments, never through a copy to the device. From
// CUDA 12.1 on they may be 32 KB, some 550 tensors of AdamW. The driver copies all that a kernel declares, at every
// launch, which takes 5 to 8 us by others' measurements: some 40 tensors or fewer get a kernel that declares 4 KB. A
// launch holds tensors of one dtype and state type; step counters on the device, which every block reads, go up in a
// launch of their own. A block takes one chunk of one tensor, which it finds by binary search in the arguments: 2 K to
// 16 K elements, so that there are some eight chunks a multiprocessor even of a small model, and the setup (search,
// hyperparameters in fp64, one barrier: about a microsecond) stays small against the 50 us of 16 K elements' traffic. A
// thread's first elements are on their way before that barrier: a step of few tensors, a chunk or two a block, is that
// much shorter.
//
// A thread holds one pack of 16 bytes of the narrowest array, and as many elements of the others: AdamW in fp32 has 64
// bytes a thread on their way at once. At 4.8 TB/s and some 0.8 us of latency an H200 wants 29 KB for each of its 132
// multiprocessors: 768 resident threads have 48 KB. Not yet run on a GPU.
#include <algorithm>
#include <cmath>
#include <vector>

#include "../common/cuda/launch.cuh"
#include "../common/cuda/reduce.cuh"
#include "../common/cuda/vec.cuh"
#include "../common/dispatch.h"
#include "dynamic_map.h"
#include "kernel.h"
#include "math.h"

namespace dlkit::optim {
namespace {

using namespace dlkit::cuda;

constexpr int kThreads = 256;
constexpr int kLeastChunk = 2048, kMostChunk = 16384;  // elements; multiples of what a block handles at once
constexpr int kChunksPerMultiprocessor = 8;

// A launch's arguments: what all its tensors share, and an entry of `stride` words for each of them. The low half of an
// entry's first word is the first chunk of the tensor.
template <class Head, int Bytes = kArgumentBytes>
struct Arguments {
  static constexpr int words_that_fit = (Bytes - int(sizeof(Head)) - 16) / 8;
  Head head;
  int32_t count, stride;
  int64_t chunk;  // elements
  uint64_t words[words_that_fit];
};

// Where in `words` the entry of the tensor that has this chunk begins.
template <class Head, int Bytes>
__device__ __forceinline__ int find_entry(const Arguments<Head, Bytes>& arguments, uint32_t chunk) {
  int low = 0, high = arguments.count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (uint32_t(arguments.words[middle * arguments.stride]) <= chunk) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low * arguments.stride;
}

// Fills arguments entry by entry and launches when they are full.
template <class Head>
class Launcher {
 public:
  using Many = Arguments<Head>;
  using Few = Arguments<Head, kFewArgumentBytes>;
  // The same kernel for many arguments and for few.
  struct Kernels {
    const char* name;
    void (*many)(Many);
    void (*few)(Few);
  };

  Launcher(int stride, int64_t chunk, const Kernels& kernels, void* stream) : kernels_(kernels), stream_(stream) {
    arguments.stride = stride;
    arguments.chunk = chunk;
  }
  bool is_full() const {
    return (arguments.count + 1) * arguments.stride > Many::words_that_fit || blocks_ > (1u << 30);
  }
  // The next entry, for a tensor of that many chunks; its first word's upper half is `bits`.
  uint64_t* add(int64_t chunks, uint32_t bits) {
    uint64_t* entry = arguments.words + arguments.count++ * arguments.stride;
    *entry = uint64_t(bits) << 32 | uint32_t(blocks_);
    blocks_ += chunks;
    return entry;
  }
  void flush() {
    const int words = arguments.count * arguments.stride;
    if (words > 0 && words <= Few::words_that_fit) {
      Few few;
      few.head = arguments.head;
      few.count = arguments.count;
      few.stride = arguments.stride;
      few.chunk = arguments.chunk;
      std::copy_n(arguments.words, words, few.words);
      launch(kernels_.name, kernels_.few, grid(), kThreads, 0, stream_, few);
    } else if (words > 0) {
      launch(kernels_.name, kernels_.many, grid(), kThreads, 0, stream_, arguments);
    }
    arguments.count = 0;
    blocks_ = 0;
  }

  Many arguments{};

 private:
  dim3 grid() const { return dim3(unsigned(std::max<int64_t>(blocks_, 1))); }  // counters take no blocks of their own

  Kernels kernels_;
  void* stream_;
  int64_t blocks_ = 0;
};

// The elements a thread handles at once: one access of 16 bytes of the narrowest type, but eight where 8-bit states
// have a warp share a scale.
template <class T, class S>
constexpr int width_of = sizeof(S) == 1 ? 8 : 16 / int(sizeof(S) < sizeof(T) ? sizeof(S) : sizeof(T));

template <class A>
struct Math {
  static __device__ __forceinline__ A splat(A value) { return value; }
  static __device__ __forceinline__ A fma(A a, A b, A c) { return multiply_add(a, b, c); }
  static __device__ __forceinline__ float sqrt(float value) { return ::sqrtf(value); }
  static __device__ __forceinline__ double sqrt(double value) { return ::sqrt(value); }
  static __device__ __forceinline__ A choose(bool condition, A a, A b) { return condition ? a : b; }
};

// Wide accesses of global memory. The addresses come from the launch's words, where the compiler does not see by itself
// that they are global, and generic accesses take an instruction more to find out.
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

// Elements of which the formulas take so many at once: eight of them in flight need half as many registers again.
template <class T>
constexpr int part_of = sizeof(T) == 8 ? 2 : 4;

// Width adjacent elements of one array as they came, in parts: widened at use, so that nothing waits for one load
// before the next is on its way. Full: all are there, at an address that allows wide accesses; else the first
// `present`, one by one.
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

// The step.

enum Slot { kParam, kGrad, kState, kScale = kState + kStates, kRemainder = kScale + kStates, kEma, kStep, kSlots };

// Hyperparameters, and Adam's bias corrections where the host counts.
struct Record {
  Group group;
  double bias_correction1, root_bias_correction2;
};

struct StepHead {
  static constexpr int records_that_fit = 16;
  const void* grad_norm;
  const float* grad_scale;
  const float* found_inf;
  double max_norm;
  uint64_t seed;
  DType norm_type;
  bool write_grads;
  int8_t slot[kSlots];  // the word of an entry that holds this array, or -1: no tensor of the launch has it
  Record records[records_that_fit];
};
constexpr int kFixedWords = 3;  // before the arrays: first chunk and bits, numel, index of the tensor in the step
// Of the bits; below them the record's index, from kGradShift on the gradient's DType.
constexpr uint32_t kAligned = 1u << 16, kDoubleStep = 1u << 17;
constexpr int kGradShift = 18;

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

__device__ const DynamicMap kMaps[2] = {make_dynamic_map(false), make_dynamic_map(true)};

struct Absent {};

// Calls f(G()): G the gradient's type beside a parameter of T.
template <class T, class F>
__device__ __forceinline__ void with_grad_type(DType type, const F& f) {
  if constexpr (std::is_same_v<T, double>) {
    f(double());
  } else if (type == DType::F32) {
    f(float());
  } else if (type == DType::BF16) {
    f(BFloat16());
  } else {
    f(Float16());
  }
}

// A thread's elements of the gradient, widened as they come: of what type they are, only the launch knows. Loaded last,
// since this waits for them.
template <class T, int Width, int Part>
struct Grads {
  accumulate_t<T> parts[Width / Part][Part];

  template <bool Full>
  __device__ __forceinline__ void load_from(const void* from, DType type, int at, int present) {
    with_grad_type<T>(type, [&](auto kind) {
      Packs<decltype(kind), Width, Part> packs;
      packs.template load_from<Full>(static_cast<const decltype(kind)*>(from) + at, present);
#pragma unroll
      for (int i = 0; i < Width / Part; ++i) packs.widen_to(parts[i], i);
    });
  }
  template <bool Full>
  __device__ __forceinline__ void store_to(void* to, DType type, int at, int present) const {
    with_grad_type<T>(type, [&](auto kind) {
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
  // All but the gradient, for which load_grad waits.
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

template <class T, class S, Algorithm Which, int Part>
__device__ __forceinline__ void widen_param(const Tile<T, S, Which>& tile, const Span<T, S>& span, int part,
                                            accumulate_t<T> (&p)[Part]) {
  if constexpr (sizeof(T) == 2) {
    if (span.remainder != nullptr) {
      const auto high = tile.param.elements(part);
      const auto low = tile.remainder.elements(part);
#pragma unroll
      for (int j = 0; j < Part; ++j) p[j] = join(high.at[j], low.at[j]);
      return;
    }
  }
  tile.param.widen_to(p, part);
}

template <class T, int Width, int Part, class A>
__device__ __forceinline__ void narrow_stochastically(const PhiloxBlock& random, Packs<T, Width, Part>& packs, int part,
                                                      const A (&values)[Part]) {
  if constexpr (sizeof(T) == 2) {
    auto elements = packs.elements(part);
#pragma unroll
    for (int j = 0; j < Part; ++j) {
      elements.at[j] = round_stochastically(values[j], lane_bits(random, part * Part + j), T());
    }
    packs.set(part, elements);
  }
}

// Leaves in p what the average of weights takes.
template <class T, class S, Algorithm Which, int Part>
__device__ __forceinline__ void narrow_param(const Scalars<accumulate_t<T>>& k, const PhiloxBlock& random,
                                             Tile<T, S, Which>& tile, const Span<T, S>& span, int part,
                                             accumulate_t<T> (&p)[Part]) {
  if constexpr (sizeof(T) == 2) {
    if (span.remainder != nullptr) {
      auto high = tile.param.elements(part);
      auto low = tile.remainder.elements(part);
#pragma unroll
      for (int j = 0; j < Part; ++j) high.at[j] = split(p[j], T(), &low.at[j]);
      tile.param.set(part, high);
      tile.remainder.set(part, low);
      return;
    }
    if (k.stochastic_rounding) {
      narrow_stochastically(random, tile.param, part, p);
    } else {
      tile.param.narrow_from(p, part);
    }
    if (span.ema != nullptr) tile.param.widen_to(p, part);
  } else {
    tile.param.narrow_from(p, part);
  }
}

// Has2 and Has3: whether the second and third states are there. Constants, since a pointer to a register that may be
// null would move the registers to memory.
template <Algorithm Which, bool Has2, bool Has3, class A, int Width>
__device__ __forceinline__ void apply(const Scalars<A>& k, const A (&g)[Width], A (&p)[Width],
                                      A (&states)[kStates][Width]) {
  using M = Math<A>;
#pragma unroll
  for (int j = 0; j < Width; ++j) {
    if constexpr (Which == Algorithm::Adam) {
      adam<M>(k, g[j], p[j], states[0][j], states[1][j], Has3 ? &states[2][j] : nullptr);
    } else if constexpr (Which == Algorithm::Sgd) {
      sgd<M>(k, g[j], p[j], Has2 ? &states[0][j] : nullptr);
    } else {
      rmsprop<M>(k, g[j], p[j], states[0][j], Has2 ? &states[1][j] : nullptr, Has3 ? &states[2][j] : nullptr);
    }
  }
}

template <Algorithm Which, class A, int Width>
__device__ __forceinline__ void apply(const Scalars<A>& k, const bool (&has)[kStates], const A (&g)[Width],
                                      A (&p)[Width], A (&states)[kStates][Width]) {
  if constexpr (Which == Algorithm::Adam) {
    if (has[2]) {
      apply<Which, true, true>(k, g, p, states);
    } else {
      apply<Which, true, false>(k, g, p, states);
    }
  } else if constexpr (Which == Algorithm::Sgd) {
    if (has[0]) {
      apply<Which, true, false>(k, g, p, states);
    } else {
      apply<Which, false, false>(k, g, p, states);
    }
  } else if (has[1]) {
    if (has[2]) {
      apply<Which, true, true>(k, g, p, states);
    } else {
      apply<Which, true, false>(k, g, p, states);
    }
  } else if (has[2]) {
    apply<Which, false, true>(k, g, p, states);
  } else {
    apply<Which, false, false>(k, g, p, states);
  }
}

__device__ __forceinline__ float larger_or_nan(float a, float b) { return !(b <= a) && a == a ? b : a; }

// The formulas on one tile. Products that a difference follows are not fused to it, so that a state's or a gradient's
// type changes no bit but by its own rounding. With 8-bit states all lanes of the warp must come, with a block of 256
// elements; `count` of this lane's are there.
template <class T, class S, Algorithm Which>
__device__ __forceinline__ void update(const StepHead& head, const Scalars<accumulate_t<T>>& k, const DynamicMap* maps,
                                       const Span<T, S>& span, Tile<T, S, Which>& tile, int at, int count) {
  using A = accumulate_t<T>;
  using TileT = Tile<T, S, Which>;
  constexpr int width = TileT::width, part = TileT::part, used = TileT::used;
  constexpr bool coded = sizeof(S) == 1;
  bool has[kStates];
  float scales[used];
  A values[coded ? used : 1][coded ? width : 1];  // of 8-bit states, until their new scale is known
#pragma unroll
  for (int s = 0; s < kStates; ++s) has[s] = TileT::has(span, s);
#pragma unroll
  for (int s = 0; s < used; ++s) {
    if (coded && has[s]) scales[s] = span.scales[s][at / kBlock];
  }
  const auto draw = [&](int stream) {
    static_assert(width == 8 || (sizeof(T) != 2 && sizeof(S) != 2), "as many as a Philox block has 16-bit words");
    return stochastic_block(head.seed, span.index, span.step, (span.first + at) / width, stream);
  };
  PhiloxBlock random{};
  if (sizeof(T) == 2 && k.stochastic_rounding) random = draw(0);
#pragma unroll
  for (int i = 0; i < width / part; ++i) {
    A p[part], states[kStates][part];
    A(&g)[part] = tile.grad.parts[i];
#pragma unroll
    for (int j = 0; j < part; ++j) g[j] = multiply(g[j], k.grad_factor);
    widen_param(tile, span, i, p);
#pragma unroll
    for (int s = 0; s < used; ++s) {
      if (!has[s]) continue;
      if constexpr (coded) {
        const auto codes = tile.states[s].elements(i);
#pragma unroll
        for (int j = 0; j < part; ++j) {
          states[s][j] = multiply(maps[has_sign(Which, s)].values[codes.at[j].bits], scales[s]);
        }
      } else {
        tile.states[s].widen_to(states[s], i);
      }
    }
    apply<Which>(k, has, g, p, states);
#pragma unroll
    for (int s = 0; s < used; ++s) {
      if (!has[s]) continue;
      if constexpr (coded) {
#pragma unroll
        for (int j = 0; j < part; ++j) values[s][i * part + j] = states[s][j];
      } else {
        if (sizeof(S) == 2 && (k.stochastic_states >> s & 1) != 0) {
          // Drawn for each part anew: kept for the next one it would cost every step registers.
          narrow_stochastically(draw(s + 1), tile.states[s], i, states[s]);
        } else {
          tile.states[s].narrow_from(states[s], i);
        }
      }
    }
    narrow_param(k, random, tile, span, i, p);
    if (span.ema != nullptr) {
      A ema[part];
      tile.ema.widen_to(ema, i);
#pragma unroll
      for (int j = 0; j < part; ++j) ema[j] = lerp<Math<A>>(ema[j], p[j], k.ema_rest);
      tile.ema.narrow_from(ema, i);
    }
  }
  if constexpr (coded) {
#pragma unroll
    for (int s = 0; s < used; ++s) {
      if (!has[s]) continue;
      float scale = 0;
#pragma unroll
      for (int j = 0; j < width; ++j) {
        if (j < count) scale = larger_or_nan(scale, fabsf(values[s][j]));
      }
#pragma unroll
      for (int offset = 16; offset > 0; offset /= 2) {
        scale = larger_or_nan(scale, __shfl_xor_sync(full_warp, scale, offset));
      }
      const float divisor = scale == 0 ? 1 : scale;
#pragma unroll
      for (int i = 0; i < width / part; ++i) {
        auto codes = tile.states[s].elements(i);
#pragma unroll
        for (int j = 0; j < part; ++j) {
          const bool sign = has_sign(Which, s);
          const A value = values[s][i * part + j];
          const int code = encode(maps[sign].midpoints, sign, value / divisor);
          const int least = least_code(sign, value, scale);
          codes.at[j].bits = uint8_t(code < least ? least : code);
        }
        tile.states[s].set(i, codes);
      }
      if (threadIdx.x % 32 == 0) span.scales[s][at / kBlock] = scale;
    }
  }
}

// Codes of 8-bit states, so that a kernel's name tells its state type.
struct Code {
  uint8_t bits;
};
static_assert(sizeof(Code) == 1);

// Without a number of blocks to be resident ptxas spills where much is in flight, for one architecture or another:
// where states are codes, with 16-bit parameters, and in RMSprop with 16-bit states. Others keep its own choice.
template <class T, class S, Algorithm Which>
constexpr int resident_blocks =
    sizeof(S) == 1 || sizeof(T) == 2 || (sizeof(S) == 2 && Which == Algorithm::RmsProp) ? 2 : 0;

template <class T, int PackBytes, class S, Algorithm Which, int ArgumentBytes>
__global__ void __launch_bounds__(kThreads, (resident_blocks<T, S, Which>))
    step_tensors(const __grid_constant__ Arguments<StepHead, ArgumentBytes> arguments) {
  using A = accumulate_t<T>;
  constexpr int width = width_of<T, S>, warp_width = 32 * width;
  constexpr bool coded = sizeof(S) == 1;
  static_assert(PackBytes == 16);
  const StepHead& head = arguments.head;
  if (head.found_inf != nullptr && *head.found_inf != 0) return;

  __shared__ Scalars<A> scalars_of_tensor;
  __shared__ DynamicMap maps[coded ? 2 : 1];
  if constexpr (coded) {
    for (int i = threadIdx.x; i < 2 * int(sizeof(DynamicMap) / sizeof(float)); i += kThreads) {
      reinterpret_cast<float*>(maps)[i] = reinterpret_cast<const float*>(kMaps)[i];
    }
  }
  const int entry = find_entry(arguments, blockIdx.x);
  const uint64_t first_word = arguments.words[entry];
  const uint32_t bits = uint32_t(first_word >> 32);
  const int64_t first = int64_t(blockIdx.x - uint32_t(first_word)) * arguments.chunk;
  const int64_t left = int64_t(arguments.words[entry + 1]) - first;
  const int numel = int(left < arguments.chunk ? left : arguments.chunk);

  // The array's part in this chunk, or 0.
  const auto array = [&](int slot, int element_bytes) -> uint64_t {
    const int word = head.slot[slot];
    const uint64_t address = word < 0 ? 0 : arguments.words[entry + word];
    return address == 0 ? 0 : address + uint64_t(first) * element_bytes;
  };
  Span<T, S> span;
  span.param = reinterpret_cast<T*>(array(kParam, sizeof(T)));
  span.grad_dtype = DType(bits >> kGradShift);
  span.grad = reinterpret_cast<void*>(array(kGrad, int(size_of(span.grad_dtype))));
#pragma unroll
  for (int s = 0; s < kStates; ++s) {
    span.states[s] = reinterpret_cast<S*>(array(kState + s, sizeof(S)));
    span.scales[s] = reinterpret_cast<float*>(array(kScale + s, 0)) + first / kBlock;
  }
  span.remainder = reinterpret_cast<int16_t*>(array(kRemainder, sizeof(int16_t)));
  span.ema = reinterpret_cast<A*>(array(kEma, sizeof(A)));
  span.index = int64_t(arguments.words[entry + 2]);
  span.first = first;
  double t = 0;
  const uint64_t step = array(kStep, 0);
  if (step != 0) {
    t = (bits & kDoubleStep) != 0 ? *reinterpret_cast<double*>(step) + 1 : double(*reinterpret_cast<float*>(step) + 1);
  }
  span.step = uint32_t(t);

  const auto set_scalars = [&] {
    const Record& record = head.records[bits & 0xffff];
    double factor = 1;
    if (head.grad_scale != nullptr) factor /= double(*head.grad_scale);
    if (head.grad_norm != nullptr) factor *= clip_coefficient(read(head.grad_norm, head.norm_type), head.max_norm);
    const double lr = record.group.lr_pointer != nullptr ? double(*record.group.lr_pointer) : record.group.lr;
    double bias_correction1 = record.bias_correction1, root_bias_correction2 = record.root_bias_correction2;
    if constexpr (Which == Algorithm::Adam) {
      if (step != 0) {
        bias_correction1 = 1 - pow(record.group.beta1, t);
        root_bias_correction2 = sqrt(1 - pow(record.group.beta2, t));
      }
    }
    scalars_of_tensor = scalars<A>(Which, record.group, lr, bias_correction1, root_bias_correction2, factor);
  };

  // A warp's elements are adjacent: with 8-bit states, one block of them.
  const bool aligned = (bits & kAligned) != 0;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll 1
  for (int base = 0; base < numel; base += kThreads / 32 * warp_width) {
    const int start = base + warp * warp_width, at = start + lane * width;
    const int count = numel - at;  // may be more than `width`, or below 0
    const bool any = start < numel, full = aligned && start + warp_width <= numel;
    Tile<T, S, Which> tile;
    if (full) {
      tile.template load_from<true>(span, at, count);
    } else if (any) {
      tile.template load_from<false>(span, at, count);
    }
    if (base == 0 && threadIdx.x == 0) set_scalars();
    if (full) {
      tile.template load_grad<true>(span, at, count);
    } else if (any) {
      tile.template load_grad<false>(span, at, count);
    }
    if (base == 0) __syncthreads();
    if (!any) continue;
    update(head, scalars_of_tensor, maps, span, tile, at, count);
    if (full) {
      tile.template store_to<true>(span, at, count, head.write_grads);
    } else {
      tile.template store_to<false>(span, at, count, head.write_grads);
    }
  }
}

struct CounterHead {
  const float* found_inf;
};

// An entry is the counter's address, the lowest bit set where it is fp64.
template <int ArgumentBytes>
__global__ void __launch_bounds__(kThreads)
    advance_steps(const __grid_constant__ Arguments<CounterHead, ArgumentBytes> arguments) {
  if (arguments.head.found_inf != nullptr && *arguments.head.found_inf != 0) return;
  for (int i = threadIdx.x; i < arguments.count; i += kThreads) {
    const uint64_t word = arguments.words[i];
    if (word & 1) {
      *reinterpret_cast<double*>(word - 1) += 1;
    } else {
      *reinterpret_cast<float*>(word) += 1;
    }
  }
}

struct Arrays {
  const void* at[kSlots];
};
Arrays arrays_of(const Tensor& t) {
  return {{t.param, t.grad, t.states[0], t.states[1], t.states[2], t.scales[0], t.scales[1], t.scales[2], t.remainder,
           t.ema, t.step}};
}

// The tensors of one dtype and one state type.
template <class T, class S, Algorithm Which>
void step_kind(const Step& op, DType dtype, StateType state_type, int64_t chunk, void* stream) {
  constexpr size_t width = width_of<T, S>;
  const auto belongs = [&](const Tensor& tensor) {
    return tensor.dtype == dtype && tensor.state_type == state_type && tensor.numel > 0;
  };
  bool present[kSlots] = {};
  for (int64_t i = 0; i < op.tensor_count; ++i) {
    if (!belongs(op.tensors[i])) continue;
    const Arrays arrays = arrays_of(op.tensors[i]);
    for (int slot = 0; slot < kSlots; ++slot) present[slot] = present[slot] || arrays.at[slot] != nullptr;
  }
  int stride = kFixedWords;
  StepHead head{};
  for (int slot = 0; slot < kSlots; ++slot) head.slot[slot] = int8_t(present[slot] ? stride++ : -1);
  if (stride == kFixedWords) return;  // no tensor is of this kind
  head.grad_norm = op.grad_norm;
  head.grad_scale = op.grad_scale;
  head.found_inf = op.found_inf;
  head.max_norm = op.max_norm;
  head.seed = op.seed;
  head.norm_type = op.norm_type;
  head.write_grads = op.write_grads;

  Launcher<StepHead> launcher(
      stride, chunk,
      {"optim_step_", step_tensors<T, 16, S, Which, kArgumentBytes>, step_tensors<T, 16, S, Which, kFewArgumentBytes>},
      stream);
  launcher.arguments.head = head;
  int records = 0;
  const Tensor* last = nullptr;  // whose record is the last one
  for (int64_t i = 0; i < op.tensor_count; ++i) {
    const Tensor& tensor = op.tensors[i];
    if (!belongs(tensor)) continue;
    const bool same = last != nullptr && tensor.group == last->group &&
                      tensor.bias_correction1 == last->bias_correction1 &&
                      tensor.bias_correction2 == last->bias_correction2;
    if (launcher.is_full() || (!same && records == StepHead::records_that_fit)) {
      launcher.flush();
      records = 0;
    }
    if (!same || records == 0) {
      launcher.arguments.head.records[records++] = {op.groups[tensor.group], tensor.bias_correction1,
                                                    std::sqrt(tensor.bias_correction2)};
      last = &tensor;
    }
    const Arrays arrays = arrays_of(tensor);
    const size_t element_bytes[kSlots] = {sizeof(T),
                                          size_t(size_of(tensor.grad_dtype)),
                                          sizeof(S),
                                          sizeof(S),
                                          sizeof(S),
                                          0,
                                          0,
                                          0,
                                          sizeof(int16_t),
                                          sizeof(accumulate_t<T>),
                                          0};
    bool aligned = true;
    for (int slot = 0; slot < kSlots; ++slot) {
      aligned = aligned &&
                are_aligned(std::min<size_t>(16, std::max<size_t>(1, width * element_bytes[slot])), arrays.at[slot]);
    }
    const uint32_t bits = uint32_t(records - 1) | (aligned ? kAligned : 0) |
                          (tensor.step_type == DType::F64 ? kDoubleStep : 0) |
                          uint32_t(tensor.grad_dtype) << kGradShift;
    uint64_t* entry = launcher.add(divide_up(tensor.numel, chunk), bits);
    entry[1] = uint64_t(tensor.numel);
    entry[2] = uint64_t(i);
    for (int slot = 0; slot < kSlots; ++slot) {
      if (head.slot[slot] >= 0) entry[head.slot[slot]] = reinterpret_cast<uint64_t>(arrays.at[slot]);
    }
  }
  launcher.flush();
}

template <Algorithm Which>
void step_all(const Step& op, int64_t chunk, void* stream) {
  for (const DType dtype : {DType::F32, DType::F64, DType::BF16, DType::F16}) {
    with_type(dtype, [&](auto type) {
      using T = decltype(type);
      if constexpr (std::is_same_v<T, double>) {
        step_kind<T, double, Which>(op, dtype, StateType::F64, chunk, stream);
      } else {
        step_kind<T, float, Which>(op, dtype, StateType::F32, chunk, stream);
        step_kind<T, BFloat16, Which>(op, dtype, StateType::BF16, chunk, stream);
        step_kind<T, Code, Which>(op, dtype, StateType::Int8, chunk, stream);
      }
      if constexpr (std::is_same_v<T, Float16>) step_kind<T, T, Which>(op, dtype, StateType::F16, chunk, stream);
    });
  }
}

void advance_counters(const Step& op, void* stream) {
  Launcher<CounterHead> launcher(1, 1, {"optim_step_", advance_steps<kArgumentBytes>, advance_steps<kFewArgumentBytes>},
                                 stream);
  launcher.arguments.head = {op.found_inf};
  for (int64_t i = 0; i < op.tensor_count; ++i) {
    const Tensor& tensor = op.tensors[i];
    if (tensor.step == nullptr) continue;
    if (launcher.is_full()) launcher.flush();
    *launcher.add(0, 0) = reinterpret_cast<uint64_t>(tensor.step) | (tensor.step_type == DType::F64 ? 1 : 0);
  }
  launcher.flush();
}

// The norm: a block adds up one chunk of one tensor, threads in fp32 (64 squares each), then the block in fp64; one
// block adds up the chunks. Chunks do not depend on the device, so neither does the sum.

constexpr int64_t kNormChunk = 16384;

struct NormHead {
  double* partials;
};

template <int ArgumentBytes, class T>
__global__ void __launch_bounds__(kThreads)
    sum_squares(const __grid_constant__ Arguments<NormHead, ArgumentBytes> arguments) {
  using A = accumulate_t<T>;
  constexpr int width = 16 / sizeof(T), batch = 4;
  __shared__ double exchange[kThreads / 32][1];
  const int entry = find_entry(arguments, blockIdx.x);
  const uint64_t first_word = arguments.words[entry];
  const int64_t chunk = blockIdx.x - uint32_t(first_word), first = chunk * kNormChunk;
  const int64_t left = int64_t(arguments.words[entry + 1]) - first;
  const int numel = int(left < kNormChunk ? left : kNormChunk);
  const T* grad = reinterpret_cast<const T*>(arguments.words[entry + 2]) + first;
  A sum = 0;
  int done = 0;  // elements read in wide accesses
  if ((first_word >> 32 & 1) != 0) {
    const int packs = numel / width;
    done = packs * width;
#pragma unroll 1
    for (int start = threadIdx.x; start < packs; start += batch * kThreads) {
      Pack<16> values[batch];
#pragma unroll
      for (int i = 0; i < batch; ++i) {
        const int at = start + i * kThreads;
        values[i] = at < packs ? load_once<16>(grad + at * width) : Pack<16>{};
      }
#pragma unroll
      for (int i = 0; i < batch; ++i) {
        A g[width];
        widen<T, 16>(values[i], g);
#pragma unroll
        for (int j = 0; j < width; ++j) sum = Math<A>::fma(g[j], g[j], sum);
      }
    }
  }
#pragma unroll 4
  for (int at = done + threadIdx.x; at < numel; at += kThreads) {
    const A g = dlkit::widen(grad[at]);
    sum = Math<A>::fma(g, g, sum);
  }
  double sums[1] = {double(sum)};
  group_sum<kThreads>(sums, exchange);
  if (threadIdx.x == 0) arguments.head.partials[int64_t(arguments.words[entry + 3]) + chunk] = sums[0];
}

__global__ void __launch_bounds__(1024) finish_norm(const double* partials, int64_t count, void* norm, DType type) {
  __shared__ double exchange[32][1];
  double sums[1] = {0};
#pragma unroll 4
  for (int64_t i = threadIdx.x; i < count; i += 1024) sums[0] += partials[i];
  group_sum<1024>(sums, exchange);
  if (threadIdx.x != 0) return;
  if (type == DType::F64) {
    *static_cast<double*>(norm) = sqrt(sums[0]);
  } else {
    *static_cast<float*>(norm) = float(sqrt(sums[0]));
  }
}

struct ClipHead {
  const void* norm;
  DType norm_type;
  double max_norm;
};

template <class T, int PackBytes, int ArgumentBytes>
__global__ void __launch_bounds__(kThreads)
    scale_grads(const __grid_constant__ Arguments<ClipHead, ArgumentBytes> arguments) {
  using A = accumulate_t<T>;
  constexpr int width = PackBytes / sizeof(T), batch = 4;
  const ClipHead& head = arguments.head;
  const double coefficient = clip_coefficient(read(head.norm, head.norm_type), head.max_norm);
  if (coefficient == 1) return;
  const A factor = A(coefficient);
  const int entry = find_entry(arguments, blockIdx.x);
  const uint64_t first_word = arguments.words[entry];
  const int64_t first = int64_t(blockIdx.x - uint32_t(first_word)) * arguments.chunk;
  const int64_t left = int64_t(arguments.words[entry + 1]) - first;
  const int numel = int(left < arguments.chunk ? left : arguments.chunk);
  T* grad = reinterpret_cast<T*>(arguments.words[entry + 2]) + first;
  int done = 0;
  if ((first_word >> 32 & 1) != 0) {
    const int packs = numel / width;
    done = packs * width;
#pragma unroll 1
    for (int start = threadIdx.x; start < packs; start += batch * kThreads) {
      Pack<PackBytes> values[batch];
#pragma unroll
      for (int i = 0; i < batch; ++i) {
        const int at = start + i * kThreads;
        if (at < packs) values[i] = load<PackBytes>(grad + at * width);
      }
#pragma unroll
      for (int i = 0; i < batch; ++i) {
        const int at = start + i * kThreads;
        if (at >= packs) continue;
        A g[width];
        widen<T, PackBytes>(values[i], g);
#pragma unroll
        for (int j = 0; j < width; ++j) g[j] *= factor;
        store<PackBytes>(grad + at * width, narrow<T, PackBytes>(g));
      }
    }
  }
#pragma unroll 4
  for (int at = done + threadIdx.x; at < numel; at += kThreads) {
    grad[at] = dlkit::narrow<T>(dlkit::widen(grad[at]) * factor);
  }
}

// The gradients of T through a launcher: entries of first chunk and alignment, numel, address, and the number of chunks
// that all gradients before it have.
template <class T, class Head>
void launch_grads(const Gradient* grads, int64_t count, DType dtype, const Head& head, int64_t chunk,
                  const typename Launcher<Head>::Kernels& kernels, void* stream) {
  Launcher<Head> launcher(4, chunk, kernels, stream);
  launcher.arguments.head = head;
  int64_t chunks_before = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t chunks = divide_up(grads[i].numel, chunk);
    if (grads[i].dtype == dtype && chunks > 0) {
      if (launcher.is_full()) launcher.flush();
      uint64_t* entry = launcher.add(chunks, are_aligned(16, grads[i].data) ? 1 : 0);
      entry[1] = uint64_t(grads[i].numel);
      entry[2] = reinterpret_cast<uint64_t>(grads[i].data);
      entry[3] = uint64_t(chunks_before);
    }
    chunks_before += chunks;
  }
  launcher.flush();
}

// Elements a block takes: enough blocks for every multiprocessor, few enough that their setup does not show.
int64_t chunk_for(int64_t blocks) {
  const int64_t wanted = blocks * kBlock / (int64_t(current_device().multiprocessors) * kChunksPerMultiprocessor);
  return std::clamp((wanted + kLeastChunk - 1) / kLeastChunk * kLeastChunk, int64_t(kLeastChunk), int64_t(kMostChunk));
}

constexpr DType kDTypes[] = {DType::F32, DType::F64, DType::BF16, DType::F16};

}  // namespace

void step_cuda(const Step& op, void* stream) {
  const int64_t blocks = op.first_block[op.tensor_count];
  if (blocks > 0) {
    const int64_t chunk = chunk_for(blocks);
    switch (op.algorithm) {
      case Algorithm::Adam:
        step_all<Algorithm::Adam>(op, chunk, stream);
        break;
      case Algorithm::Sgd:
        step_all<Algorithm::Sgd>(op, chunk, stream);
        break;
      case Algorithm::RmsProp:
        step_all<Algorithm::RmsProp>(op, chunk, stream);
        break;
    }
  }
  advance_counters(op, stream);
}

int64_t norm_partials_cuda(const Norm& op) {
  int64_t chunks = 0;
  for (int64_t i = 0; i < op.count; ++i) chunks += divide_up(op.grads[i].numel, kNormChunk);
  return chunks;
}

void norm_cuda(const Norm& op, void* stream) {
  for (const DType dtype : kDTypes) {
    with_type(dtype, [&](auto type) {
      using T = decltype(type);
      launch_grads<T>(op.grads, op.count, dtype, NormHead{op.partials}, kNormChunk,
                      {"optim_grad_norm", sum_squares<kArgumentBytes, T>, sum_squares<kFewArgumentBytes, T>}, stream);
    });
  }
  launch("optim_grad_norm", finish_norm, dim3(1), dim3(1024), 0, stream, op.partials, norm_partials_cuda(op), op.norm,
         op.norm_type);
}

void clip_cuda(const Clip& op, void* stream) {
  const int64_t chunk = chunk_for(op.first_block[op.count]);
  for (const DType dtype : kDTypes) {
    with_type(dtype, [&](auto type) {
      using T = decltype(type);
      launch_grads<T>(op.grads, op.count, dtype, ClipHead{op.norm, op.norm_type, op.max_norm}, chunk,
                      {"optim_clip_grads_", scale_grads<T, 16, kArgumentBytes>, scale_grads<T, 16, kFewArgumentBytes>},
                      stream);
    });
  }
}

}  // namespace dlkit::optim
