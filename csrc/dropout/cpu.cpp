// Dropout on the CPU. Philox runs ahead by one step (256 elements with AVX-512) into a few bytes of keep bits, which
// select among as many elements; outputs larger than the caches go past them. Bytes moved: x and y, each once; where
// whole channels or samples are dropped, of x only what is kept.
#include <memory>

#include "../common/cpu/cache.h"
#include "../common/cpu/parallel.h"
#include "../common/cpu/philox.h"
#include "../common/dispatch.h"
#include "kernel.h"

namespace dlkit::dropout {
namespace DLKIT_ISA {
namespace {

using namespace dlkit::DLKIT_ISA;

constexpr int64_t kStepElements = kKeepStep * kBlockElements;
constexpr int64_t kAhead = 256;  // elements
constexpr int64_t kSlack = 8;    // bytes that a read of a vector's bits may go past them

// What there is beside x * scale: a shift and what dropped elements become, or a residual.
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

#if defined(__AVX512BF16__)
// x * scale of 32 elements, 0 where a bit is not set: half the instructions of two loads that widen, as even and odd
// elements are widened in place and the shuffle that brings them together again also drops.
DLKIT_INLINE __m512i scale_bf16(__m512i x, VectorF32 scale, uint32_t keep) {
  const __m512i in_order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                            21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const __m512i high_halves = _mm512_set1_epi32(int(0xffff0000));
  const __m512 even = _mm512_mul_ps((__m512)_mm512_slli_epi32(x, 16), (__m512)scale);
  const __m512 odd = _mm512_mul_ps((__m512)_mm512_and_si512(x, high_halves), (__m512)scale);
  return _mm512_maskz_permutexvar_epi16(keep, in_order, (__m512i)_mm512_cvtne2ps_pbh(odd, even));
}
#endif

// Every element has a bit of its own. begin is a multiple of kStepElements.
template <class T, Form kForm, bool kStream>
void drop_elements(const Dropout& op, const PhiloxState& state, int64_t begin, int64_t end) {
  using A = accumulate_t<T>;
  const Constants<T> constants(op);
  const T* x = static_cast<const T*>(op.x);
  const T* residual = static_cast<const T*>(op.residual);
  T* y = static_cast<T*>(op.y);
  const PhiloxKeys keys(state);
  const uint64_t threshold = op.threshold;
  alignas(64) uint8_t bits[kKeepStep + kSlack];
  for (int64_t first = begin; first < end; first += kStepElements) {
    keep_step(keys, threshold, uint64_t(first / kBlockElements), bits);
    const auto apply = [&](int64_t i, int, auto width) DLKIT_INLINE_LAMBDA {
      const Vector<A> v = load(x + first + i, width);
      Vector<A> kept, dropped = {};
      if constexpr (kForm == kResidual) {
        dropped = load(residual + first + i, width);
        kept = fma(v, constants.scale, dropped);
      } else {
        kept = constants.template kept<kForm == kAffine>(v);
        if constexpr (kForm == kAffine) dropped = constants.dropped;
      }
      write<kStream>(y + first + i, select<A>(lanes_at<A>(bits, i), kept, dropped), width);
    };
    if (first + kStepElements > end) {
      for_columns<A, 1>(0, end - first, apply);
#if defined(__AVX512BF16__)
    } else if constexpr (kForm == kPlain && std::is_same_v<T, BFloat16>) {
#pragma GCC unroll 8
      for (int64_t i = 0; i < kStepElements; i += 32) {
        const __m512i scaled = scale_bf16(load_raw<__m512i>(x + first + i), constants.scale,
                                          load_raw<uint32_t>(bits + i / kBlockElements));
        memcpy(y + first + i, &scaled, sizeof(scaled));
      }
#endif
    } else {
#pragma GCC unroll 16
      for (int64_t i = 0; i < kStepElements; i += kLanes<A>) apply(i, 0, All{});
    }
  }
  if constexpr (kStream) streaming_fence();
}

// `period` elements take turns: rows of as many, in each of which they have the same bits, drawn once for a sample.
template <class T, Form kForm, bool kStream>
void drop_periods(const Dropout& op, const PhiloxState& state, int64_t begin, int64_t end) {
  using A = accumulate_t<T>;
  const Constants<T> constants(op);
  const T* x = static_cast<const T*>(op.x);
  T* y = static_cast<T*>(op.y);
  const std::unique_ptr<uint8_t[]> bits(new uint8_t[op.period / 8 + 2 + kKeepStep + kSlack]);
  for (int64_t sample = begin / op.inner; sample * op.inner < end; ++sample) {
    const int64_t mask = sample * op.period, lane = mask % kBlockElements;
    keep_bits(state, op.threshold, mask / kBlockElements, (lane + op.period + 7) / kBlockElements, bits.get());
    const int64_t last = min64(end, (sample + 1) * op.inner);
    int64_t i = max64(begin, sample * op.inner);
    while (i < last) {
      const int64_t column = i % op.period, columns = min64(op.period, column + last - i);
      const int64_t row = i - column;
      for_columns<A, 1>(column, columns, [&](int64_t c, int, auto width) DLKIT_INLINE_LAMBDA {
        const Vector<A> kept = constants.template kept<kForm == kAffine>(load(x + row + c, width));
        write<kStream>(
            y + row + c,
            select<A>(lanes_at<A>(bits.get(), lane + c), kept, kForm == kAffine ? constants.dropped : Vector<A>{}),
            width);
      });
      i = row + columns;
    }
  }
  if constexpr (kStream) streaming_fence();
}

// `inner` adjacent elements share a bit. The processor's own prefetcher starts anew at every run that is kept, so the
// front of the next one is asked for ahead: a tenth of the time of runs of 784.
template <class T, Form kForm, bool kStream>
void drop_runs(const Dropout& op, const PhiloxState& state, int64_t begin, int64_t end) {
  if (op.period > 1) return drop_periods<T, kForm, kStream>(op, state, begin, end);
  using A = accumulate_t<T>;
  const Constants<T> constants(op);
  const T* x = static_cast<const T*>(op.x);
  T* y = static_cast<T*>(op.y);
  const PhiloxKeys keys(state);
  alignas(64) uint8_t bits[kKeepStep + kSlack];
  const int64_t last_mask = (end - 1) / op.inner;
  int64_t known = -1;  // the step whose bits are at hand
  for (int64_t mask = begin / op.inner; mask <= last_mask; ++mask) {
    const int64_t step = mask / kStepElements, lane = mask % kStepElements;
    const auto kept = [&](int64_t of) DLKIT_INLINE_LAMBDA { return bits[of / 8] >> of % 8 & 1; };
    if (step != known) keep_step(keys, op.threshold, uint64_t(step * kKeepStep), bits);
    known = step;
    const int64_t first = max64(begin, mask * op.inner), last = min64(end, (mask + 1) * op.inner);
    if (op.inner >= kAhead && mask < last_mask && lane + 1 < kStepElements && kept(lane + 1))
      prefetch<kAhead>(x + last);
    // A part of a vector, never streamed, up to where whole ones are aligned.
    const int64_t aligned = kStream ? min64(last, (first + kLanes<A> - 1) / kLanes<A> * kLanes<A>) : first;
    const auto fill = [&](const auto& value) DLKIT_INLINE_LAMBDA {
      const auto one = [&](int64_t i, int, auto width)
                           DLKIT_INLINE_LAMBDA { write<kStream>(y + i, value(i, width), width); };
      if constexpr (kStream) for_columns<A, 1>(first, aligned, one);
      for_columns<A, kSlots>(aligned, last, one);
    };
    if (kept(lane)) {
      fill([&](int64_t i, auto width)
               DLKIT_INLINE_LAMBDA { return constants.template kept<kForm == kAffine>(load(x + i, width)); });
    } else {
      fill([&](int64_t, auto) DLKIT_INLINE_LAMBDA { return kForm == kAffine ? constants.dropped : Vector<A>{}; });
    }
  }
  if constexpr (kStream) streaming_fence();
}

// Where every element has a bit, stores past the caches pay only if memory is slower than Philox is: with AVX-512 from
// four bytes an element on (fp32 6.5 ms against 7.5 with plain stores), with AVX2 from eight. Else plain stores wait in
// the cache while the next bits are drawn: 8192 x 4096 in fp32 takes 7.4 ms with AVX2 against 9.4, 14.5 against 16.8
// with SSE2. They need aligned vectors at the start of every chunk of the loop, and of every period.
bool should_stream(const Dropout& op, int64_t element) {
  return op.numel * element >= streaming_threshold_bytes() && uintptr_t(op.y) % 64 == 0 &&
         (op.inner > 1 || element * kVectorBytes >= 256) && (op.period == 1 || op.period * element % 64 == 0);
}

}  // namespace

void drop(const Dropout& op) {
  const PhiloxState state = read(op.source);
  if (op.state != nullptr) {
    op.state[0] = int64_t(state.seed);
    op.state[1] = int64_t(state.offset);
  }
  with_type(op.dtype, [&](auto type) {
    using T = decltype(type);
    const auto run = [&](auto form, auto stream) {
      // In units of steps, so that every task starts at one.
      parallel_for((op.numel + kStepElements - 1) / kStepElements, kGrain / kStepElements,
                   [&](int64_t begin, int64_t end) {
                     begin *= kStepElements;
                     end = min64(end * kStepElements, op.numel);
                     if (op.inner == 1) return drop_elements<T, form, stream>(op, state, begin, end);
                     if constexpr (form != kResidual) drop_runs<T, form, stream>(op, state, begin, end);
                   });
    };
    with_flags(
        [&](auto stream) {
          if (op.residual != nullptr) return run(std::integral_constant<Form, kResidual>(), stream);
          op.shift != 0 || op.dropped != 0 ? run(std::integral_constant<Form, kAffine>(), stream)
                                           : run(std::integral_constant<Form, kPlain>(), stream);
        },
        should_stream(op, sizeof(T)));
  });
}

}  // namespace DLKIT_ISA

DLKIT_CPU_ENTRY(dropout_cpu, drop, Dropout)

}  // namespace dlkit::dropout
