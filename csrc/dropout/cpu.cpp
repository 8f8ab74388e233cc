// Dropout on the CPU. Philox draws the keep bits of one step (256 elements with AVX-512), which then select among as
// many elements; outputs larger than the caches go past them. Bytes moved: x and y, each once; where whole channels or
// samples are dropped, only the kept part of x.
#include <memory>

#include "../common/cpu/bits.h"
#include "../common/cpu/parallel.h"
#include "../common/cpu/philox.h"
#include "../common/dispatch.h"
#include "kernel.h"

namespace dlkit::dropout {
namespace DLKIT_ISA {
namespace {

using namespace dlkit::DLKIT_ISA;

constexpr int64_t kStepElements = kKeepStep * kBlockElements;
constexpr int64_t kAhead = 256;         // elements
constexpr int64_t kShortRun = 128;      // elements: to read and drop them costs less than a branch foreseen wrongly
constexpr int64_t kSlack = 8;           // bytes past a vector's bits that a read of them may touch
constexpr int64_t kTileBits = 1 << 20;  // 128 KB: a part of the second-level cache

// The number of columns of pixels in a plane.
DLKIT_INLINE int64_t columns_of(const Dropout& op) {
  const int64_t spatial = op.inner / op.period, width = columns_at_once(spatial);
  return (spatial + width - 1) / width;
}

// The terms beside x * scale: none; a shift and the value of dropped elements; or a residual.
enum Form { kPlain, kAffine, kResidual };

template <class T>
struct Constants {
  using A = accumulate_t<T>;
  Vector<A> scale, shift, dropped;
  explicit Constants(const Dropout& op)
      : scale(broadcast<A>(A(op.scale))), shift(broadcast<A>(A(op.shift))), dropped(broadcast<A>(A(op.dropped))) {}
  template <bool kAffine>
  DLKIT_INLINE_MEMBER Vector<A> kept(Vector<A> x) const {
    if constexpr (kAffine) return fma(x, scale, shift);
    return x * scale;
  }
};

// The keep bits of two vectors.
constexpr int64_t kPair = 2 * kLanes<float>;
using PairBits = std::conditional_t<kPair == 32, uint32_t, std::conditional_t<kPair == 16, uint16_t, uint8_t>>;

// x * scale for kPair elements, 0 where a bit is not set. Even and odd elements are widened in place, which takes half
// the instructions of two widening loads.
DLKIT_INLINE VectorU32 scale_bf16(VectorU32 x, VectorF32 scale, PairBits keep) {
#if defined(__AVX512BF16__)  // the shuffle that joins them again also drops
  const __m512i in_order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                            21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const VectorF32 even = (VectorF32)(x << 16) * scale, odd = (VectorF32)(x & 0xffff0000) * scale;
  return (VectorU32)_mm512_maskz_permutexvar_epi16(keep, in_order,
                                                   (__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even));
#else
  const VectorU32 scaled = join_upper_halves(round_to_bf16((VectorF32)(x << 16) * scale),
                                             round_to_bf16((VectorF32)(x & 0xffff0000) * scale));
#if defined(__AVX512F__)
  return (VectorU32)_mm512_maskz_mov_epi16(keep, (__m512i)scaled);
#else
  using Halves = uint16_t __attribute__((vector_size(kVectorBytes)));
  return scaled & (VectorU32)lane_mask<Halves>(keep);
#endif
#endif
}

// The same for the elements of a step, written to y; their bits begin at `bits`.
DLKIT_INLINE void scale_step_bf16(const BFloat16* x, BFloat16* y, VectorF32 scale, const uint8_t* bits, bool nt_store) {
#pragma GCC unroll 8
  for (int64_t i = 0; i < kStepElements; i += kPair) {
    const VectorU32 v = scale_bf16(load_raw<VectorU32>(x + i), scale, load_raw<PairBits>(bits + i / 8));
    nt_store ? non_temporal_store(y + i, v) : store_raw(y + i, v);
  }
}

// The bits from one element to the end of its vector, which begins at a multiple of kLanes<A>. It reads no byte beside
// them: a load of bytes from several stores waits until all have reached the cache.
template <class A>
DLKIT_INLINE uint32_t lanes_from(const uint8_t* bits, int64_t element) {
  if constexpr (kLanes<A> == 16) return uint32_t(load_raw<uint16_t>(bits + element / 16 * 2)) >> element % 16;
  return uint32_t(bits[element / 8]) >> element % 8;
}

// Calls apply(i, nt_store, All()) for all vectors of a step. The branch is outside the loop: inside it costs bf16 with
// AVX2 a sixth of its time.
template <class A, class F>
DLKIT_INLINE void apply_step(bool nt_store, const F& apply) {
  if (nt_store) {
#pragma GCC unroll 16
    for (int64_t i = 0; i < kStepElements; i += kLanes<A>) apply(i, true, All{});
  } else {
#pragma GCC unroll 16
    for (int64_t i = 0; i < kStepElements; i += kLanes<A>) apply(i, false, All{});
  }
}

// Up to kStepElements elements with a bit each; that of element i is bit `lane` + i. `lane` and, in streaming, y must
// be at the beginning of a vector, unless the elements are only the end of one.
template <class T, Form kForm>
DLKIT_INLINE void select_range(const Constants<T>& constants, const T* x, T* y, int64_t count, const uint8_t* bits,
                               int64_t lane, bool nt_store) {
  using A = accumulate_t<T>;
  const auto apply = [&](int64_t i, bool nt_store, auto width) DLKIT_INLINE_LAMBDA {
    const Vector<A> kept = constants.template kept<kForm == kAffine>(load(x + i, width));
    const Vector<A> dropped = kForm == kAffine ? constants.dropped : Vector<A>{};
    write(y + i, select<A>(lanes_from<A>(bits, lane + i), kept, dropped), width, nt_store);
  };
  if (count < kStepElements) {
    for_columns<A, 1>(0, count, [&](int64_t i, int, auto width) DLKIT_INLINE_LAMBDA { apply(i, nt_store, width); });
  } else if constexpr (kForm == kPlain && std::is_same_v<T, BFloat16> && kLanes<A> % 8 == 0) {  // whole bytes of bits
    scale_step_bf16(x, y, constants.scale, bits + lane / 8, nt_store && uintptr_t(y) % kVectorBytes == 0);
  } else {
    apply_step<A>(nt_store, apply);
  }
}

// Every element has its own bit, and memory is in logical order. The bits are kept where op.bits has room for them.
// begin is a multiple of kStepElements. The loop repeats select_range's beside the Philox step: calling that function
// would make alpha dropout a tenth slower.
template <class T, Form kForm>
void drop_elements(const CpuDropout& op, const PhiloxState& state, int64_t begin, int64_t end, bool nt_store) {
  using A = accumulate_t<T>;
  const Constants<T> constants(op);
  const T* x = static_cast<const T*>(op.x);
  const T* residual = static_cast<const T*>(op.residual);
  T* y = static_cast<T*>(op.y);
  const PhiloxKeys keys(state);
  const uint64_t threshold = op.threshold;
  alignas(64) uint8_t of_step[kKeepStep + kSlack];
  for (int64_t first = begin; first < end; first += kStepElements) {
    uint8_t* const bits = op.bits.data == nullptr ? of_step : op.bits.data + first / kBlockElements;
    if (!op.bits.drawn) keep_step(keys, threshold, uint64_t(first / kBlockElements), bits);
    const auto apply = [&](int64_t i, bool nt_store, auto width) DLKIT_INLINE_LAMBDA {
      const Vector<A> v = load(x + first + i, width);
      Vector<A> kept, dropped = {};
      if constexpr (kForm == kResidual) {
        dropped = load(residual + first + i, width);
        kept = fma(v, constants.scale, dropped);
      } else {
        kept = constants.template kept<kForm == kAffine>(v);
        if constexpr (kForm == kAffine) dropped = constants.dropped;
      }
      write(y + first + i, select<A>(lanes_at<A>(bits, i), kept, dropped), width, nt_store);
    };
    if (first + kStepElements > end) {
      for_columns<A, 1>(0, end - first,
                        [&](int64_t i, int, auto width) DLKIT_INLINE_LAMBDA { apply(i, nt_store, width); });
    } else if constexpr (kForm == kPlain && std::is_same_v<T, BFloat16>) {
      scale_step_bf16(x + first, y + first, constants.scale, bits, nt_store);
    } else {
      apply_step<A>(nt_store, apply);
    }
  }
  if (nt_store) streaming_fence();
}

// A part of a plane in channels_last, and the keep bits of its channels in logical order: bit `lane` + c * stride + i
// is that of pixel i of channel c. The bits of a whole plane are one range of the stream; else each channel has its own
// range.
struct Tile {
  int64_t end;            // the first column after it
  int64_t pixel, pixels;  // the first pixel, counted over all samples, and how many
  int64_t lane, stride;
  const uint8_t* bits;
};

// The bits still to be drawn for a tile: `ranges` ranges of `length` bits, the first at `mask`, `spatial` bits apart.
struct Draws {
  int64_t ranges = 0, length, mask, spatial;
  int64_t at, stride;  // where the first is written, and the distance to the next, in bits
  uint8_t* bits;
  int64_t blocks = 0;  // of the first range that are drawn

  // Draws one step; returns false if none was left.
  bool step(const PhiloxKeys& keys, uint64_t threshold) {
    if (ranges == 0) return false;
    keep_step(keys, threshold, uint64_t(mask / kBlockElements + blocks), bits + at / 8 + blocks);
    blocks += kKeepStep;
    if (blocks * kBlockElements >= mask % kBlockElements + length) {
      --ranges;
      mask += spatial;
      at += stride;
      blocks = 0;
    }
    return true;
  }
};

// The bits to be kept, in logical order.
void draw_all(const CpuDropout& op, const PhiloxState& state) {
  parallel_for((op.numel + kStepElements - 1) / kStepElements, kGrain / kStepElements, [&](int64_t begin, int64_t end) {
    keep_bits(state, op.threshold, begin * kKeepStep, (end - begin) * kKeepStep, op.bits.data + begin * kKeepStep);
  });
}

// `period` channels are innermost in memory. Work is counted in columns of up to 64 pixels of a sample. A tile's bits
// are drawn in logical order and transposed a column at a time, which takes 0.02 to 0.03 ns an element in cache, some
// 0.05 for 28 x 28 x 256, beside Philox's 0.17. They are drawn while the previous tile is written, a step for each
// step's elements, to hide memory's latency: 2.1 ms instead of 2.4 for 28 x 28 x 256 in fp32.
template <class T, Form kForm>
void drop_turns(const CpuDropout& op, const PhiloxState& state, int64_t begin, int64_t end, bool nt_store) {
  const Constants<T> constants(op);
  const PhiloxKeys keys(state);
  const int64_t channels = op.period, spatial = op.inner / op.period, width = columns_at_once(spatial),
                plane = columns_of(op);
  // A tile is a plane, or as many columns as `steps` steps of 256 bits a channel cover from any lane of a block.
  const int64_t steps = max64(kTileBits / channels / 256, 1);
  const int64_t part = min64(plane, (steps * 256 - (kWordBits - width)) / width);
  const int64_t tile = channels * spatial <= kTileBits ? plane : part;
  const int64_t bytes = channels * (min64(spatial, tile * width) + 14) / 8 + kKeepStep + kBitsSlack;
  const std::unique_ptr<uint8_t[]> bits(new uint8_t[op.bits.data == nullptr ? 2 * bytes : 0]);
  const std::unique_ptr<uint64_t[]> words(new uint64_t[transpose_words(channels)]);
  const std::unique_ptr<uint8_t[]> in_order(new uint8_t[channels * kWordBits / 8 + kBitsSlack]);

  Draws draws;
  const auto tile_from = [&](int64_t first, uint8_t* to) {
    const int64_t sample = first / plane, pixel = first % plane * width;
    const int64_t last = min64(min64(end, (sample + 1) * plane), first + tile);
    const int64_t pixels = min64(spatial, (last - sample * plane) * width) - pixel;
    const int64_t mask = sample * channels * spatial + pixel, lane = mask % kBlockElements;
    if (op.bits.data != nullptr) return Tile{last, sample * spatial + pixel, pixels, mask, spatial, op.bits.data};
    const bool whole = pixels == spatial;
    // The channels' ranges may not overlap, and each must begin at the lane it has in the stream.
    const int64_t stride = whole ? spatial : pixels + 7 + (spatial - pixels + 1) % 8;
    draws = {whole ? 1 : channels, whole ? channels * spatial : pixels, mask, spatial, lane, stride, to};
    return Tile{last, sample * spatial + pixel, pixels, lane, stride, to};
  };
  Tile next = tile_from(begin, bits.get());
  for (int64_t column = begin; column < end;) {
    while (draws.step(keys, op.threshold)) {
    }
    const Tile now = next;
    column = now.end;
    if (column < end) next = tile_from(column, bits.get() + (now.bits == bits.get() ? bytes : 0));
    for (int64_t pixel = 0; pixel < now.pixels; pixel += width) {
      const int64_t columns = min64(width, now.pixels - pixel), count = columns * channels;
      const int64_t offset = (now.pixel + pixel) * channels;
      const T* x = static_cast<const T*>(op.x) + offset;
      T* y = static_cast<T*>(op.y) + offset;
      int64_t head = 0;  // elements up to the first aligned vector
      if (nt_store) head = min64(count, int64_t(-uintptr_t(y) % sizeof(Packed<T>) / sizeof(T)));
      const int64_t skip = head > 0 ? kLanes<accumulate_t<T>> - head : 0;
      transpose_bits(now.bits, now.lane + pixel, now.stride, channels, columns, words.get(), in_order.get(), skip);
      int64_t step = head > 0 ? head : kStepElements;
      for (int64_t i = 0; i < count; i += step, step = kStepElements) {
        select_range<T, kForm>(constants, x + i, y + i, min64(step, count - i), in_order.get(), skip + i, nt_store);
        draws.step(keys, op.threshold);
      }
    }
  }
  if (nt_store) streaming_fence();
}

// A vector of elements of T as they are stored: all bits of those that stay.
template <class T>
using StoredMask =
    std::conditional_t<sizeof(T) == 2, VectorU16, std::conditional_t<sizeof(T) == 4, VectorU32, VectorU64>>;

// `period` channels, innermost in memory, have one bit each: all rows of a sample have the same bits, which are drawn
// once, and kept as vectors of whole elements: to widen bits for every row would take as long as to scale bf16.
template <class T, Form kForm>
void drop_periods(const Dropout& op, const PhiloxState& state, int64_t begin, int64_t end, bool nt_store) {
  using A = accumulate_t<T>;
  const Constants<T> constants(op);
  const auto dropped = StoredMask<T>(pack(constants.dropped, T()));
  const T* x = static_cast<const T*>(op.x);
  T* y = static_cast<T*>(op.y);
  const std::unique_ptr<uint8_t[]> bits(new uint8_t[op.period / 8 + 2 + kKeepStep + kSlack]);
  const std::unique_ptr<T[]> masks(new T[op.period + kLanes<A>]);
  for (int64_t sample = begin / op.inner; sample * op.inner < end; ++sample) {
    const int64_t mask = sample * op.period, lane = mask % kBlockElements;
    keep_bits(state, op.threshold, mask / kBlockElements, (lane + op.period + 7) / kBlockElements, bits.get());
    for (int64_t c = 0; c < op.period; c += kLanes<A>) {
      store_raw(masks.get() + c, lane_mask<StoredMask<T>>(lanes_at<A>(bits.get(), lane + c)));
    }
    const int64_t last = min64(end, (sample + 1) * op.inner);
    int64_t i = max64(begin, sample * op.inner);
    while (i < last) {
      const int64_t column = i % op.period, columns = min64(op.period, column + last - i);
      const int64_t row = i - column;
      for_columns<A, 1>(column, columns, [&](int64_t c, int, auto width) DLKIT_INLINE_LAMBDA {
        const auto mask = load_raw<StoredMask<T>>(masks.get() + c);
        auto v = mask & StoredMask<T>(pack(constants.template kept<kForm == kAffine>(load(x + row + c, width)), T()));
        if constexpr (kForm == kAffine) v |= dropped & ~mask;
        write_packed(y + row + c, Packed<T>(v), width, nt_store);
      });
      i = row + columns;
    }
  }
  if (nt_store) streaming_fence();
}

// `inner` adjacent elements share a bit. The processor's prefetcher starts anew at every kept run; prefetching the
// beginning of the next one saves a tenth of the time for runs of 784.
template <class T, Form kForm>
void drop_runs(const Dropout& op, const PhiloxState& state, int64_t begin, int64_t end, bool nt_store) {
  if (op.period > 1) return drop_periods<T, kForm>(op, state, begin, end, nt_store);
  using A = accumulate_t<T>;
  const Constants<T> constants(op);
  const T* x = static_cast<const T*>(op.x);
  T* y = static_cast<T*>(op.y);
  const PhiloxKeys keys(state);
  alignas(64) uint8_t bits[kKeepStep + kSlack];
  const int64_t last_mask = (end - 1) / op.inner;
  int64_t known = -1;  // the step whose bits are drawn
  for (int64_t mask = begin / op.inner; mask <= last_mask; ++mask) {
    const int64_t step = mask / kStepElements, lane = mask % kStepElements;
    const auto kept = [&](int64_t of) DLKIT_INLINE_LAMBDA { return bits[of / 8] >> of % 8 & 1; };
    if (step != known) keep_step(keys, op.threshold, uint64_t(step * kKeepStep), bits);
    known = step;
    const int64_t first = max64(begin, mask * op.inner), last = min64(end, (mask + 1) * op.inner);
    if (op.inner >= kAhead && mask < last_mask && lane + 1 < kStepElements && kept(lane + 1))
      prefetch<kAhead>(x + last);
    // A part of a vector, never streamed, up to the first aligned one.
    const int64_t aligned = nt_store ? min64(last, (first + kLanes<A> - 1) / kLanes<A> * kLanes<A>) : first;
    const auto fill = [&](const auto& value) DLKIT_INLINE_LAMBDA {
      const auto one = [&](int64_t i, int, auto width)
                           DLKIT_INLINE_LAMBDA { write(y + i, value(i, width), width, nt_store); };
      if (nt_store) for_columns<A, 1>(first, aligned, one);
      for_columns<A, kSlots>(aligned, last, one);
    };
    if (op.inner <= kShortRun) {
      const uint32_t all = kept(lane) ? ~0u : 0;
      fill([&](int64_t i, auto width) DLKIT_INLINE_LAMBDA {
        return select<A>(all, constants.template kept<kForm == kAffine>(load(x + i, width)),
                         kForm == kAffine ? constants.dropped : Vector<A>{});
      });
    } else if (kept(lane)) {
      fill([&](int64_t i, auto width)
               DLKIT_INLINE_LAMBDA { return constants.template kept<kForm == kAffine>(load(x + i, width)); });
    } else {
      fill([&](int64_t, auto) DLKIT_INLINE_LAMBDA { return kForm == kAffine ? constants.dropped : Vector<A>{}; });
    }
  }
  if (nt_store) streaming_fence();
}

// Where every element's bit is drawn, stores past the caches pay only if memory is slower than Philox: with AVX-512
// from four bytes an element on (8192 x 4096 in fp32 takes 6.5 ms, 7.5 with plain stores), with AVX2 from eight. Else
// plain stores are better, which wait in the cache while the next bits are drawn: the same takes 7.4 ms with AVX2
// and 14.5 with SSE2, against 9.4 and 16.8 past the caches. Where the bits are there, memory is the limit: 128 x 64 x
// 56 x 56 in fp32 with AVX2 takes 5 ms, 7.8 with plain stores. Stores past the caches need aligned vectors at the start
// of every chunk of the loop, and of every period.
template <class T>
bool should_stream(const CpuDropout& op) {
  constexpr int64_t element = sizeof(T);
  const bool elementwise = op.inner == 1 || op.apart;
  return is_beyond_caches<T>(op.numel) && uintptr_t(op.y) % 64 == 0 &&
         (elementwise ? op.bits.drawn || element * kVectorBytes >= 256
                      : op.period == 1 || op.period * element % 64 == 0);
}

}  // namespace

void drop(const CpuDropout& op) {
  const PhiloxState state = read(op.source);
  write_state(state, op.rng_state);
  with_data_type(op.dtype, [&](auto type) {
    using T = decltype(type);
    const bool nt_store = should_stream<T>(op);
    const auto run = [&](auto form) {
      if constexpr (form != kResidual) {
        if (op.apart) {
          if (op.bits.data != nullptr && !op.bits.drawn) draw_all(op, state);
          const int64_t grain = max64(kGrain / (op.period * kWordBits), 1);
          return parallel_for(op.numel / op.inner * columns_of(op), grain, [&](int64_t begin, int64_t end) {
            drop_turns<T, form>(op, state, begin, end, nt_store);
          });
        }
      }
      // In units of steps: every task must begin at a step.
      parallel_for((op.numel + kStepElements - 1) / kStepElements, kGrain / kStepElements,
                   [&](int64_t begin, int64_t end) {
                     begin *= kStepElements;
                     end = min64(end * kStepElements, op.numel);
                     if (op.inner == 1) return drop_elements<T, form>(op, state, begin, end, nt_store);
                     if constexpr (form != kResidual) drop_runs<T, form>(op, state, begin, end, nt_store);
                   });
    };
    if (op.residual != nullptr) {
      run(std::integral_constant<Form, kResidual>());
    } else if (op.shift != 0 || op.dropped != 0) {
      run(std::integral_constant<Form, kAffine>());
    } else {
      run(std::integral_constant<Form, kPlain>());
    }
  });
}

}  // namespace DLKIT_ISA

DLKIT_CPU_ENTRY(dropout_cpu, drop, CpuDropout)

}  // namespace dlkit::dropout
