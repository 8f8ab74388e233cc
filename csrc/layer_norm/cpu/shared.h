// Shared by both directions: when to fetch ahead and to write past the caches, and memory for widened rows and
// parameters.
#pragma once

#include <memory>

#include "../../common/cpu/parallel.h"
#include "../../common/cpu/philox.h"
#include "../../common/cpu/simd.h"
#include "../../common/dispatch.h"
#include "../kernel.h"

namespace dlkit::layer_norm::DLKIT_ISA {
namespace {

using namespace dlkit::DLKIT_ISA;

// Whether the input is likely to come from beyond the second-level cache, so that fetching rows ahead pays.
template <class T>
bool is_far(int64_t rows, int64_t cols) {
  return rows * cols * int64_t(sizeof(T)) >= int64_t(1) << 20;
}

// Only rows of whole aligned lines are written past the caches.
template <class T>
bool should_stream(const void* output, int64_t rows, int64_t cols) {
  return is_beyond_caches<T>(rows * cols) && cols * int64_t(sizeof(T)) % 64 == 0 && uintptr_t(output) % 64 == 0;
}

constexpr int kGroup = 4;            // rows taken together
constexpr int64_t kScratch = 16384;  // columns up to which a row, or a parameter, is kept widened on the stack

// Not inlined into every kernel: it is long.
__attribute__((noinline)) void draw_bits(const PhiloxState& state, uint64_t threshold, int64_t first, int64_t blocks,
                                         uint8_t* bits) {
  keep_bits(state, threshold, first, blocks, bits);
}

// The keep bits of a few consecutive rows, at most kElements in all: those that the call has kept, else drawn here, and
// kept where it wants that. Other threads write the bytes before and after.
template <int64_t kElements>
struct RowBits {
  alignas(64) uint8_t drawn[kElements / kBlockElements + kKeepStep + 16];
  const uint8_t* bits = drawn;
  int64_t first = 0;  // the element that bit 0 belongs to
  DLKIT_INLINE_MEMBER void find(const FusedDropout& dropout, const PhiloxState& state, int64_t begin, int64_t end) {
    const int64_t block = begin / kBlockElements, blocks = (end + kBlockElements - 1) / kBlockElements - block;
    first = block * kBlockElements;
    if (dropout.bits.drawn) {
      bits = dropout.bits.data + block;
      return;
    }
    draw_bits(state, dropout.threshold, block, blocks, drawn);
    if (dropout.bits.data != nullptr) memcpy(dropout.bits.data + block, drawn, size_t(blocks));
  }
  template <class A>
  DLKIT_INLINE_MEMBER uint32_t lanes(int64_t element) const {
    return lanes_at<A>(bits, element - first);
  }
};

// `count` values: on the stack where they are few.
template <class A>
class Scratch {
  alignas(64) A near_[kScratch];
  std::unique_ptr<A[]> far_;

 public:
  A* data;
  explicit Scratch(int64_t count) : far_(count > kScratch ? new A[size_t(count)] : nullptr) {
    data = count > kScratch ? far_.get() : near_;
  }
};

// The columns of a row as whole vectors.
template <class A>
int64_t padded(int64_t cols) {
  return (cols + kLanes<A> - 1) / kLanes<A> * kLanes<A>;
}

// v * weight + bias; either may be absent.
template <class V, class A, class Width>
DLKIT_INLINE V scaled(V v, const A* weight, const A* bias, int64_t i, Width width) {
  if (weight != nullptr) return fma(v, load(weight + i, width), bias != nullptr ? load(bias + i, width) : V{});
  return bias != nullptr ? v + load(bias + i, width) : v;
}

// weight or bias as the inner loops read it: of T it is widened once a task, else used as it is.
template <class T>
struct Widened {
  using A = accumulate_t<T>;
  static constexpr bool kIsWide = std::is_same_v<T, A>;
  Scratch<A> scratch;
  const A* data;
  Widened(const void* source, DType type, int64_t cols)
      : scratch(kIsWide ? 0 : padded<A>(cols)), data(static_cast<const A*>(source)) {
    if (kIsWide || source == nullptr || type == DType::F32) return;
    data = scratch.data;
    for_columns<A, 1>(0, cols, [&](int64_t i, int, auto width) DLKIT_INLINE_LAMBDA {
      store(scratch.data + i, load(static_cast<const T*>(source) + i, width), All{});
    });
  }
};

}  // namespace
}  // namespace dlkit::layer_norm::DLKIT_ISA
