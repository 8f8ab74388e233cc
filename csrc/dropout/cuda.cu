// Dropout on CUDA. Reads x and writes y, each once, 16 bytes at a time; where whole channels or samples are dropped,
// only what is kept is read.
//
// Elements with bits of their own: a thread draws one Philox block, which decides 8 elements: 16 bytes of a 16-bit
// type, and for wider ones the 2 or 4 packs whose lanes neighbour each other, so that a warp's accesses stay 512
// adjacent bytes: the bits travel by shuffles. On sm_90 a bf16 block takes some 150 instructions, 85 of them for random
// bits: at 4.3 TB/s and 1.1e12 elements a second, 2.0e13 of the 3.3e13 instructions that an H200 issues in a second.
// Tiles tiles of loads go out before the arithmetic: 32 bytes a thread, 40 KB with the 1280 threads that 48 registers
// leave; 29 KB would do. Whole channels or samples: a group of lanes a run, each lane with the run's bit. Elements in
// channels_last: the 8 that a block decides are pixels of one channel, far apart; a thread takes those of a narrow pack
// of channels, so that a warp's accesses are 128 adjacent bytes of a pixel. Not yet run on a GPU.
#include "../common/cuda/launch.cuh"
#include "../common/cuda/philox.cuh"
#include "../common/cuda/vec.cuh"
#include "../common/dispatch.h"
#include "kernel.h"

namespace dlkit::dropout {
namespace {

using namespace dlkit::cuda;

constexpr int threads = 256, warps = threads / 32;

__device__ __forceinline__ PhiloxState begin(const Dropout& op) {
  const PhiloxState state = read(op.source);
  if (blockIdx.x == 0 && threadIdx.x == 0) write_state(state, op.rng_state);
  return state;
}

template <class T>
struct Constants {
  accumulate_t<T> scale, shift, dropped;
  __device__ __forceinline__ explicit Constants(const Dropout& op)
      : scale(accumulate_t<T>(op.scale)), shift(accumulate_t<T>(op.shift)), dropped(accumulate_t<T>(op.dropped)) {}
  __device__ __forceinline__ accumulate_t<T> apply(accumulate_t<T> x, bool keep) const {
    return keep ? multiply_add(x, scale, shift) : dropped;
  }
};

template <class T, int PackBytes>
__device__ __forceinline__ Pack<PackBytes> drop(const Pack<PackBytes>& pack, uint32_t keep,
                                                const Constants<T>& constants) {
  constexpr int width = PackBytes / sizeof(T);
  accumulate_t<T> values[width];
  widen<T, PackBytes>(pack, values);
#pragma unroll
  for (int k = 0; k < width; ++k) values[k] = constants.apply(values[k], keep >> k & 1);
  return narrow<T, PackBytes>(values);
}

// The same followed by a residual add, with one rounding.
template <class T, int PackBytes>
__device__ __forceinline__ Pack<PackBytes> drop(const Pack<PackBytes>& pack, uint32_t keep,
                                                const Constants<T>& constants, const Pack<PackBytes>& residual) {
  constexpr int width = PackBytes / sizeof(T);
  accumulate_t<T> values[width], added[width];
  widen<T, PackBytes>(pack, values);
  widen<T, PackBytes>(residual, added);
#pragma unroll
  for (int k = 0; k < width; ++k) {
    values[k] = keep >> k & 1 ? multiply_add(values[k], constants.scale, added[k]) : added[k];
  }
  return narrow<T, PackBytes>(values);
}

// Blocks on a multiprocessor: they hold ptxas to 48 registers, to 64 with twice as many packs, or to 128. Single
// elements, of which a thread has more, need 128 too.
template <class T, int PackBytes, bool Residual>
constexpr int resident_blocks = PackBytes < 16 || (sizeof(T) > 4 && Residual) ? 2
                                : sizeof(T) > 4 || Residual                   ? 4
                                                                              : 5;

// A warp's tile is 32 blocks, Packs packs a lane.
template <class T, int PackBytes, int Tiles, bool Residual>
__global__ void __launch_bounds__(threads, resident_blocks<T, PackBytes, Residual>) drop_elements(const Dropout op) {
  constexpr int width = PackBytes / sizeof(T), packs = kBlockElements / width;
  const PhiloxState state = begin(op);
  const Constants<T> constants(op);
  const int lane = threadIdx.x % 32;
  const T* x = static_cast<const T*>(op.x);
  const T* residual = static_cast<const T*>(op.residual);
  T* y = static_cast<T*>(op.y);
  const int64_t whole = op.numel / width;
  const int64_t step = int64_t(gridDim.x) * warps * Tiles;
  for (int64_t first = (int64_t(blockIdx.x) * warps + threadIdx.x / 32) * Tiles; first * 32 * kBlockElements < op.numel;
       first += step) {
    Pack<PackBytes> values[Tiles][packs];
#pragma unroll
    for (int tile = 0; tile < Tiles; ++tile) {
#pragma unroll
      for (int k = 0; k < packs; ++k) {
        const int64_t at = ((first + tile) * packs + k) * 32 + lane;
        if (at < whole) values[tile][k] = load_once<PackBytes>(x + at * width);
      }
    }
    [[maybe_unused]] Pack<PackBytes> added[Tiles][packs];
    if constexpr (Residual) {
#pragma unroll
      for (int tile = 0; tile < Tiles; ++tile) {
#pragma unroll
        for (int k = 0; k < packs; ++k) {
          const int64_t at = ((first + tile) * packs + k) * 32 + lane;
          if (at < whole) added[tile][k] = load_once<PackBytes>(residual + at * width);
        }
      }
    }
    uint32_t own[Tiles];
    keep_bits(state, op.threshold, uint64_t(first * 32 + lane), 32, own);
#pragma unroll
    for (int tile = 0; tile < Tiles; ++tile) {
#pragma unroll
      for (int k = 0; k < packs; ++k) {
        const int64_t at = ((first + tile) * packs + k) * 32 + lane;
        uint32_t keep = own[tile];
        if constexpr (packs > 1) {
          keep = __shfl_sync(0xffffffff, keep, (k * 32 + lane) / packs) >> lane % packs * width;
        }
        if (at >= whole) continue;
        if constexpr (Residual) {
          values[tile][k] = drop<T, PackBytes>(values[tile][k], keep, constants, added[tile][k]);
        } else {
          values[tile][k] = drop<T, PackBytes>(values[tile][k], keep, constants);
        }
        store<PackBytes>(y + at * width, values[tile][k]);
      }
    }
  }
  if (blockIdx.x == 0 && threadIdx.x < op.numel - whole * width) {  // less than a pack is left
    const int64_t i = whole * width + threadIdx.x;
    const uint32_t keep = keep_bits(state, op.threshold, uint64_t(i / kBlockElements)) >> i % kBlockElements;
    constexpr int one = sizeof(T);
    const Pack<one> value = load<one>(x + i);
    if constexpr (Residual) {
      store<one>(y + i, drop<T, one>(value, keep, constants, load<one>(residual + i)));
    } else {
      store<one>(y + i, drop<T, one>(value, keep, constants));
    }
  }
}

// `inner` adjacent elements share a bit: a group of lanes walks over a part of such a run.
constexpr int part_packs = 32 * 16;

template <class T, int PackBytes>
__global__ void __launch_bounds__(threads) drop_runs(const Dropout op, int64_t parts, int lanes) {
  constexpr int width = PackBytes / sizeof(T);
  const PhiloxState state = begin(op);
  const Constants<T> constants(op);
  const int64_t packs = op.inner / width, runs = op.numel / op.inner;
  const int groups = threads / lanes, lane = threadIdx.x % lanes;
  for (int64_t item = int64_t(blockIdx.x) * groups + threadIdx.x / lanes; item < runs * parts;
       item += int64_t(gridDim.x) * groups) {
    const int64_t run = item / parts, part = item - run * parts;
    const bool keep = keep_bits(state, op.threshold, uint64_t(run / kBlockElements)) >> run % kBlockElements & 1;
    const T* x = static_cast<const T*>(op.x) + run * op.inner;
    T* y = static_cast<T*>(op.y) + run * op.inner;
    const int64_t last = (part + 1) * part_packs, end = last < packs ? last : packs;
#pragma unroll 4
    for (int64_t at = part * part_packs + lane; at < end; at += lanes) {
      Pack<PackBytes> values{};
      if (keep) values = load_once<PackBytes>(x + at * width);
      store<PackBytes>(y + at * width, drop<T, PackBytes>(values, keep ? 0xffffffffu : 0u, constants));
    }
  }
}

// `period` channels, innermost in memory, have one bit each: a thread has the same pack of channels in several rows of
// a sample, and draws for it once. Neighbouring threads have neighbouring packs.
constexpr int part_rows = 16;

template <class T, int PackBytes>
__global__ void __launch_bounds__(threads) drop_periods(const Dropout op, int64_t parts) {
  constexpr int width = PackBytes / sizeof(T);
  const PhiloxState state = begin(op);
  const Constants<T> constants(op);
  const int64_t packs = op.period / width, rows = op.inner / op.period, items = op.numel / op.inner * parts * packs;
  for (int64_t item = int64_t(blockIdx.x) * threads + threadIdx.x; item < items; item += int64_t(gridDim.x) * threads) {
    const int64_t others = item / packs, column = (item - others * packs) * width;
    const int64_t sample = others / parts, part = others - sample * parts;
    const int64_t mask = sample * op.period + column;
    const int lane = int(mask % kBlockElements);
    uint32_t keep = keep_block(state, op.threshold, uint64_t(mask / kBlockElements)) >> lane;
    if (lane + width > kBlockElements) {
      keep |= keep_block(state, op.threshold, uint64_t(mask / kBlockElements + 1)) << (kBlockElements - lane);
    }
    keep &= (1u << width) - 1;
    const int64_t last = (part + 1) * part_rows, end = last < rows ? last : rows;
#pragma unroll 4
    for (int64_t row = part * part_rows; row < end; ++row) {
      const int64_t at = sample * op.inner + row * op.period + column;
      const Pack<PackBytes> values = load_once<PackBytes>(static_cast<const T*>(op.x) + at);
      // The compiler splits a plain store into words here, but not __stcs.
      store_once<PackBytes>(static_cast<T*>(op.y) + at, drop<T, PackBytes>(values, keep, constants));
    }
  }
}

// `period` channels are innermost in memory and every element has its own bit. A thread has a pack of channels in 8
// adjacent pixels, whose bits for a channel come from one Philox block, or two where a plane is not a multiple of 8.
// Neighbouring threads have neighbouring packs. Loads are plain: where channels are few, other threads read the rest of
// a line.
template <class T, int PackBytes>
__global__ void __launch_bounds__(threads) drop_turns(const Dropout op, int64_t groups) {
  constexpr int width = PackBytes / sizeof(T);
  const PhiloxState state = begin(op);
  const Constants<T> constants(op);
  const T* x = static_cast<const T*>(op.x);
  T* y = static_cast<T*>(op.y);
  const int64_t spatial = op.inner / op.period, packs = op.period / width;
  const int64_t items = op.numel / op.inner * groups * packs;
  for (int64_t item = int64_t(blockIdx.x) * threads + threadIdx.x; item < items; item += int64_t(gridDim.x) * threads) {
    const int64_t others = item / packs, channel = (item - others * packs) * width;
    const int64_t sample = others / groups, pixel = (others - sample * groups) * kBlockElements;
    const int64_t at = (sample * spatial + pixel) * op.period + channel, left = spatial - pixel;
    Pack<PackBytes> values[kBlockElements];
#pragma unroll
    for (int k = 0; k < kBlockElements; ++k) {
      if (k < left) values[k] = load<PackBytes>(x + at + k * op.period);
    }
    uint32_t kept[width];  // bit k: pixel k
#pragma unroll
    for (int w = 0; w < width; ++w) {
      const int64_t mask = (sample * op.period + channel + w) * spatial + pixel;
      const int lane = int(mask % kBlockElements);
      const uint64_t block = uint64_t(mask / kBlockElements);
      kept[w] = keep_bits(state, op.threshold, block) >> lane;
      if (lane > 0 && left > kBlockElements - lane) {
        kept[w] |= keep_bits(state, op.threshold, block + 1) << (kBlockElements - lane);
      }
    }
#pragma unroll
    for (int k = 0; k < kBlockElements; ++k) {
      if (k >= left) break;
      uint32_t keep = 0;
#pragma unroll
      for (int w = 0; w < width; ++w) keep |= (kept[w] >> k & 1) << w;
      store<PackBytes>(y + at + k * op.period, drop<T, PackBytes>(values[k], keep, constants));
    }
  }
}

bool aligned(const Dropout& op, uintptr_t bytes) { return are_aligned(bytes, op.x, op.residual, op.y); }

template <class T, int PackBytes>
void run(const Dropout& op, void* stream) {
  constexpr int width = PackBytes / sizeof(T);
  if (op.inner == 1) {
    constexpr int tiles = PackBytes == 16 && sizeof(T) == 2 ? 2 : 1;
    const unsigned grid = grid_of(divide_up(op.numel, int64_t(threads) * kBlockElements * tiles));
    if (op.residual != nullptr) {
      launch("dropout drop_elements", drop_elements<T, PackBytes, tiles, true>, grid, threads, 0, stream, op);
    } else {
      launch("dropout drop_elements", drop_elements<T, PackBytes, tiles, false>, grid, threads, 0, stream, op);
    }
  } else if (op.period > 1) {
    const int64_t parts = divide_up(op.inner / op.period, part_rows);
    launch("dropout drop_periods", drop_periods<T, PackBytes>,
           grid_of(divide_up(op.numel / op.inner * parts * (op.period / width), threads)), threads, 0, stream, op,
           parts);
  } else {
    const int64_t packs = op.inner / width, parts = divide_up(packs, part_packs);
    int lanes = 32;
    while (lanes > 1 && lanes / 2 >= packs) lanes /= 2;
    launch("dropout drop_runs", drop_runs<T, PackBytes>,
           grid_of(divide_up(op.numel / op.inner * parts, threads / lanes)), threads, 0, stream, op, parts, lanes);
  }
}

template <class T, int PackBytes>
void run_turns(const Dropout& op, void* stream) {
  const int64_t groups = divide_up(op.inner / op.period, kBlockElements);
  const unsigned grid =
      grid_of(divide_up(op.numel / op.inner * groups * (op.period * int64_t(sizeof(T)) / PackBytes), threads));
  launch("dropout drop_turns", drop_turns<T, PackBytes>, grid, threads, 0, stream, op, groups);
}

}  // namespace

void dropout_cuda(const Dropout& op, void* stream) {
  if (op.numel == 0) return;
  with_type(op.dtype, [&](auto type) {
    using T = decltype(type);
    if (op.apart) {
      constexpr int pair = sizeof(T) == 2 ? 4 : sizeof(T);
      return aligned(op, pair) && op.period * int64_t(sizeof(T)) % pair == 0 ? run_turns<T, pair>(op, stream)
                                                                             : run_turns<T, sizeof(T)>(op, stream);
    }
    const int64_t run_elements = op.period > 1 ? op.period : op.inner;
    const bool wide = aligned(op, 16) && (op.inner == 1 || run_elements * int64_t(sizeof(T)) % 16 == 0);
    if (wide) {
      run<T, 16>(op, stream);
    } else {
      run<T, sizeof(T)>(op, stream);
    }
  });
}

}  // namespace dlkit::dropout
