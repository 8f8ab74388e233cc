// DropBlock on the CPU. The first pass marks the dropped elements, a unit of planes a task: Philox's seeds are set in a
// bit string in memory order, and grow to squares along the rows, then down the columns, by shifts that double. The
// second pass reads x and writes y, each once.
#include <atomic>
#include <memory>

#include "../common/cpu/parallel.h"
#include "../common/cpu/philox.h"
#include "../common/dispatch.h"
#include "kernel.h"

namespace dlkit::dropblock2d {
namespace DLKIT_ISA {
namespace {

using namespace dlkit::DLKIT_ISA;

uint64_t* words_of(const DropBlock2d& op, int64_t unit) {
  return reinterpret_cast<uint64_t*>(op.dropped + unit * unit_words(op));
}

// words |= words << distance, from the last word to the first, since each must read words that have not changed yet.
void grow(uint64_t* words, int64_t count, int64_t distance) {
  const int64_t whole = distance / 64, bits = distance % 64;
  const auto shifted = [&](auto low, auto high)
                           DLKIT_INLINE_LAMBDA { return high << bits | (low >> 1) >> (63 - bits); };
  int64_t k = count;
  for (; k - kVectorBlocks > whole; k -= kVectorBlocks) {
    uint64_t* const at = words + k - kVectorBlocks;
    const VectorU64 grown =
        load_raw<VectorU64>(at) | shifted(load_raw<VectorU64>(at - whole - 1), load_raw<VectorU64>(at - whole));
    memcpy(at, &grown, sizeof(grown));
  }
  while (--k > whole) words[k] |= shifted(words[k - whole - 1], words[k - whole]);
  if (whole < count) words[whole] |= shifted(uint64_t(0), words[0]);
}

// Grows every set bit to `size` bits that are `step` apart.
void grow_to(uint64_t* words, int64_t count, int64_t step, int64_t size) {
  for (int64_t reach = 1; reach < size;) {
    const int64_t further = min64(reach, size - reach);
    grow(words, count, further * step);
    reach += further;
  }
}

// Sets the bits of a unit and returns how many are set.
int64_t mark(const DropBlock2d& op, const PhiloxState& state, int64_t unit, uint8_t* kept) {
  const int64_t first = unit * unit_planes(op), planes = min64(unit_planes(op), op.planes - first);
  const int64_t rows = op.rows, columns = op.columns, step = op.channels;
  const int64_t plane = op.height * op.width, begin = first * rows * columns, skipped = begin % kBlockElements;
  keep_bits(state, op.threshold, begin / kBlockElements, (skipped + planes * rows * columns + 7) / 8, kept);
  uint64_t* const words = words_of(op, unit);
  int64_t bit = skipped;
  for (int64_t p = 0; p < planes; ++p) {
    int64_t at = op.channels > 1 ? p : p * plane;
    for (int64_t row = 0; row < rows; ++row, at += op.width * step, bit += columns) {
      constexpr int64_t kRead = 56;  // bits in 8 bytes from any bit of the first byte on
      for (int64_t column = 0; column < columns; column += kRead) {
        const int64_t count = min64(kRead, columns - column), from = bit + column;
        uint64_t seeds = ~(load_raw<uint64_t>(kept + from / 8) >> from % 8) & ((uint64_t(1) << count) - 1);
        for (; seeds != 0; seeds &= seeds - 1) {
          const int64_t element = at + (column + __builtin_ctzll(seeds)) * step;
          words[element / 64] |= uint64_t(1) << element % 64;
        }
      }
    }
  }
  const int64_t count = (planes * plane + 63) / 64;
  grow_to(words, count, step, op.size);
  grow_to(words, count, step * op.width, op.size);
  int64_t dropped = 0;
  if (!op.known) {
    for (int64_t k = 0; k < count; ++k) dropped += __builtin_popcountll(words[k]);
  }
  return dropped;
}

template <class T>
void apply(const DropBlock2d& op, double scale_by, int64_t unit, bool nt_store) {
  using A = accumulate_t<T>;
  const Vector<A> scale = broadcast<A>(A(scale_by));
  const int64_t elements = unit_planes(op) * op.height * op.width, first = unit * elements;
  const int64_t count = min64(elements, numel(op) - first);
  const T* x = static_cast<const T*>(op.x) + first;
  T* y = static_cast<T*>(op.y) + first;
  const auto* dropped = reinterpret_cast<const uint8_t*>(words_of(op, unit));
  const auto one = [&](int64_t i, int, auto width) DLKIT_INLINE_LAMBDA {
    write(y + i, select<A>(lanes_at<A>(dropped, i), Vector<A>{}, load(x + i, width) * scale), width, nt_store);
  };
  // A part of a vector, never streamed, up to the first aligned one.
  const int64_t aligned = nt_store ? min64(count, (kLanes<A> - first % kLanes<A>) % kLanes<A>) : 0;
  if (nt_store) for_columns<A, 1>(0, aligned, one);
  for_columns<A, kSlots>(aligned, count, one);
  if (nt_store) streaming_fence();
}

template <class T>
bool should_stream(const DropBlock2d& op) {
  return is_beyond_caches<T>(numel(op)) && uintptr_t(op.y) % 64 == 0;
}

}  // namespace

void drop_blocks(const DropBlock2d& op) {
  const PhiloxState state = read(op.source);
  const int64_t unit_seeds = unit_planes(op) * op.rows * op.columns;
  const int64_t grain = max64(1, kGrain / (unit_planes(op) * op.height * op.width));
  std::atomic<int64_t> dropped{0};
  parallel_for(units(op), grain, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<uint8_t[]> kept(new uint8_t[unit_seeds / 8 + 2 + kKeepStep + 8]);
    int64_t marked = 0;
    for (int64_t unit = begin; unit < end; ++unit) marked += mark(op, state, unit, kept.get());
    dropped += marked;
  });
  if (!op.known) {
    write_state(state, op.rng_state);
    op.rng_state[2] = dropped;
  }
  const double scale = scale_of(op);
  with_data_type(op.dtype, [&](auto type) {
    using T = decltype(type);
    const bool nt_store = should_stream<T>(op);
    parallel_for(units(op), grain, [&](int64_t begin, int64_t end) {
      for (int64_t unit = begin; unit < end; ++unit) apply<T>(op, scale, unit, nt_store);
    });
  });
}

}  // namespace DLKIT_ISA

DLKIT_CPU_ENTRY(dropblock2d_cpu, drop_blocks, DropBlock2d)

}  // namespace dlkit::dropblock2d
