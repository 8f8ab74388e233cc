// The kernels of a step: one for the tensors, and one for step counters on the device.
#pragma once

#include "../dynamic_map.h"
#include "../math.h"
#include "launcher.cuh"
#include "tile.cuh"

namespace dlkit::optim {
namespace {

using namespace dlkit::cuda;

enum Slot { kParam, kGrad, kState, kScale = kState + kStates, kRemainder = kScale + kStates, kEma, kStep, kSlots };

// Hyperparameters, and Adam's bias corrections where the host counts.
struct Record {
  Group group;
  double bias_correction1, root_bias_correction2;
};

// The data that the tensors of a launch have in common.
struct StepCommon {
  static constexpr int records_that_fit = 16;
  const void* grad_norm;
  const float* grad_scale;
  const float* found_inf;
  double max_norm;
  uint64_t seed;
  DType norm_dtype;
  bool write_grads;
  int8_t slot[kSlots];  // the word of an entry that holds this array, or -1: no tensor of the launch has it
  Record records[records_that_fit];
};
constexpr int kFixedWords = 3;  // before the arrays: first chunk and bits, numel, index of the tensor in the step
// Flags in an entry's `bits`, whose low 16 bits are the record's index; from kGradShift on they are the gradient's
// DType.
constexpr uint32_t kAligned = 1u << 16, kDoubleStep = 1u << 17;
constexpr int kGradShift = 18;

__device__ const DynamicMap kMaps[2] = {make_dynamic_map(false), make_dynamic_map(true)};

template <class A>
struct Math {
  static __device__ __forceinline__ A splat(A value) { return value; }
  static __device__ __forceinline__ A fma(A a, A b, A c) { return multiply_add(a, b, c); }
  static __device__ __forceinline__ float sqrt(float value) { return ::sqrtf(value); }
  static __device__ __forceinline__ double sqrt(double value) { return ::sqrt(value); }
  static __device__ __forceinline__ A choose(bool condition, A a, A b) { return condition ? a : b; }
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

// Writes the parameter, and leaves in p the value that the average of weights takes.
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

// Has2 and Has3 tell which optional states are there. They are constants, since a pointer that may be null would force
// the states out of registers into memory.
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

// The formulas on one tile. Scaled gradients and decoded states are products that are never fused into a following
// addition: the type of a gradient or a state then changes a result only by its own rounding. With 8-bit states all
// lanes of the warp must call, with a block of 256 elements, of which `count` of this lane's exist.
template <class T, class S, Algorithm Which>
__device__ __forceinline__ void update(const StepCommon& common, const Scalars<accumulate_t<T>>& k,
                                       const DynamicMap* maps, const Span<T, S>& span, Tile<T, S, Which>& tile, int at,
                                       int count) {
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
    return stochastic_block(common.seed, span.index, span.step, (span.first + at) / width, stream);
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
          // Drawn again for each part: keeping it for the next would cost every step registers.
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

// The code of an 8-bit state. A type of its own shows the state type in a kernel's name.
struct Code {
  uint8_t bits;
};
static_assert(sizeof(Code) == 1);

// Without a number of resident blocks in the launch bounds ptxas spills, on some architecture, where much is in flight:
// with 8-bit states, with 16-bit parameters, and in RMSprop with 16-bit states. Elsewhere ptxas chooses.
template <class T, class S, Algorithm Which>
constexpr int resident_blocks =
    sizeof(S) == 1 || sizeof(T) == 2 || (sizeof(S) == 2 && Which == Algorithm::RmsProp) ? 2 : 0;

template <class T, int PackBytes, class S, Algorithm Which, int ArgumentBytes>
__global__ void __launch_bounds__(kThreads, (resident_blocks<T, S, Which>))
    step_tensors(const __grid_constant__ TensorListMetadata<StepCommon, ArgumentBytes> metadata) {
  using A = accumulate_t<T>;
  constexpr int width = width_of<T, S>, warp_width = 32 * width;
  constexpr bool coded = sizeof(S) == 1;
  static_assert(PackBytes == 16);
  const StepCommon& common = metadata.common;
  if (common.found_inf != nullptr && *common.found_inf != 0) return;

  __shared__ Scalars<A> scalars_of_tensor;
  __shared__ DynamicMap maps[coded ? 2 : 1];
  if constexpr (coded) {
    for (int i = threadIdx.x; i < 2 * int(sizeof(DynamicMap) / sizeof(float)); i += kThreads) {
      reinterpret_cast<float*>(maps)[i] = reinterpret_cast<const float*>(kMaps)[i];
    }
  }
  const int entry = find_entry(metadata, blockIdx.x);
  const uint64_t first_word = metadata.words[entry];
  const uint32_t bits = uint32_t(first_word >> 32);
  const int64_t first = int64_t(blockIdx.x - uint32_t(first_word)) * metadata.chunk;
  const int64_t left = int64_t(metadata.words[entry + 1]) - first;
  const int numel = int(left < metadata.chunk ? left : metadata.chunk);

  // The address of this chunk in an array, or 0.
  const auto array = [&](int slot, int element_bytes) -> uint64_t {
    const int word = common.slot[slot];
    const uint64_t address = word < 0 ? 0 : metadata.words[entry + word];
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
  span.index = int64_t(metadata.words[entry + 2]);
  span.first = first;
  double t = 0;
  const uint64_t step = array(kStep, 0);
  if (step != 0) {
    t = (bits & kDoubleStep) != 0 ? *reinterpret_cast<double*>(step) + 1 : double(*reinterpret_cast<float*>(step) + 1);
  }
  span.step = uint32_t(t);

  const auto set_scalars = [&] {
    const Record& record = common.records[bits & 0xffff];
    double factor = 1;
    if (common.grad_scale != nullptr) factor /= double(*common.grad_scale);
    if (common.grad_norm != nullptr) {
      factor *= clip_coefficient(read(common.grad_norm, common.norm_dtype), common.max_norm);
    }
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

  // A warp's elements are adjacent; with 8-bit states they are one block.
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
    update(common, scalars_of_tensor, maps, span, tile, at, count);
    if (full) {
      tile.template store_to<true>(span, at, count, common.write_grads);
    } else {
      tile.template store_to<false>(span, at, count, common.write_grads);
    }
  }
}

struct CounterCommon {
  const float* found_inf;
};

// An entry is the counter's address, with the lowest bit set where it is fp64.
template <int ArgumentBytes>
__global__ void __launch_bounds__(kThreads)
    advance_steps(const __grid_constant__ TensorListMetadata<CounterCommon, ArgumentBytes> metadata) {
  if (metadata.common.found_inf != nullptr && *metadata.common.found_inf != 0) return;
  for (int i = threadIdx.x; i < metadata.tensor_count; i += kThreads) {
    const uint64_t word = metadata.words[i];
    if (word & 1) {
      *reinterpret_cast<double*>(word - 1) += 1;
    } else {
      *reinterpret_cast<float*>(word) += 1;
    }
  }
}

}  // namespace
}  // namespace dlkit::optim
