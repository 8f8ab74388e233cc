// Transposes of bit matrices for the CPU's kernels, since keep bits come in logical order and memory may have another.
// A block of 64 x 64 bits is transposed by halves: squares of 32 bits change places, then those of 16 within them, down
// to single bits, each time for whole vectors of rows.
#pragma once

#include "philox.h"

namespace dlkit::DLKIT_ISA {

constexpr int64_t kWordBits = 64;
constexpr int64_t kBitsSlack = 16;  // bytes past the bits that a read or write of them may touch

// A mask of every other run of kSize bits: 0x00000000ffffffff for 32, 0x5555555555555555 for 1.
template <int kSize>
constexpr uint64_t kLowBits = ~uint64_t(0) / ((uint64_t(1) << kSize) + 1);

// Lane i of the result is lane i ^ kDistance of v.
template <int kDistance, class V>
DLKIT_INLINE V swap_lanes(V v) {
  return [&]<int... I>(std::integer_sequence<int, I...>) DLKIT_INLINE_LAMBDA {
#if __has_builtin(__builtin_shufflevector)
    return __builtin_shufflevector(v, v, (I ^ kDistance)...);
#else
    return __builtin_shuffle(v, V{(I ^ kDistance)...});
#endif
  }(std::make_integer_sequence<int, sizeof(V) / sizeof(v[0])>());
}

// Swaps squares of kSize bits and rows with those kSize bits and rows away, where a vector has more than kSize rows.
template <int kSize>
DLKIT_INLINE VectorU64 swap_squares(VectorU64 rows) {
  // Which bits a row keeps, and takes from its partner.
  const auto in_turns = [](uint64_t upper, uint64_t lower) DLKIT_INLINE_LAMBDA {
    return constant<VectorU64>([&](int i) DLKIT_INLINE_LAMBDA { return i / kSize % 2 == 0 ? upper : lower; });
  };
  const VectorU64 own = in_turns(kLowBits<kSize>, ~kLowBits<kSize>);
  const VectorU64 from_below = in_turns(~kLowBits<kSize>, 0), from_above = in_turns(0, kLowBits<kSize>);
  const VectorU64 partner = swap_lanes<kSize>(rows);
  return (rows & own) | (partner << kSize & from_below) | (partner >> kSize & from_above);
}

// The same where a square has one or more whole vectors of rows.
template <int kSize>
DLKIT_INLINE void swap_squares(uint64_t* words, int64_t count) {
  for (int64_t base = 0; base < count; base += 2 * kSize) {
    for (int64_t i = base; i < base + kSize; i += kVectorBlocks) {
      const auto upper = load_raw<VectorU64>(words + i), lower = load_raw<VectorU64>(words + i + kSize);
      const VectorU64 changed = ((upper >> kSize) ^ lower) & kLowBits<kSize>;
      const VectorU64 new_upper = upper ^ changed << kSize, new_lower = lower ^ changed;
      memcpy(words + i, &new_upper, sizeof(VectorU64));
      memcpy(words + i + kSize, &new_lower, sizeof(VectorU64));
    }
  }
}

// Transposes `count` words as squares of count x count bits side by side; count is a power of two from a vector's
// number of words to 64.
DLKIT_INLINE void transpose_squares(uint64_t* words, int64_t count) {
  if (count > 32) swap_squares<32>(words, count);
  if (count > 16) swap_squares<16>(words, count);
  if (count > 8) swap_squares<8>(words, count);
  if (kVectorBlocks <= 4 && count > 4) swap_squares<4>(words, count);
  if (kVectorBlocks <= 2 && count > 2) swap_squares<2>(words, count);
  for (int64_t i = 0; i < count; i += kVectorBlocks) {
    auto rows = load_raw<VectorU64>(words + i);
    if constexpr (kVectorBlocks > 4) rows = swap_squares<4>(rows);
    if constexpr (kVectorBlocks > 2) rows = swap_squares<2>(rows);
    rows = swap_squares<1>(rows);
    memcpy(words + i, &rows, sizeof(rows));
  }
}

// Appends to a string of bits; writes words, so up to 8 bytes past its end.
struct BitWriter {
  uint8_t* to;
  uint64_t pending = 0;
  int64_t filled = 0;  // how many bits `pending` holds

  // Appends the low `count` bits of a word whose other bits are 0.
  DLKIT_INLINE_MEMBER void put(uint64_t word, int64_t count) {
    pending |= word << filled;
    if (filled + count < kWordBits) {
      filled += count;
      return;
    }
    memcpy(to, &pending, sizeof(pending));
    to += sizeof(pending);
    pending = word >> 1 >> (kWordBits - 1 - filled);
    filled += count - kWordBits;
  }
  DLKIT_INLINE_MEMBER void finish() { memcpy(to, &pending, sizeof(pending)); }
};

// How many columns transpose_bits takes at once: as many as one read of 64 bits holds at any bit where a row may begin.
DLKIT_INLINE int64_t columns_at_once(int64_t stride) { return stride % 8 == 0 ? kWordBits : kWordBits - 8; }

// Words that transpose_bits needs for as many rows.
DLKIT_INLINE int64_t transpose_words(int64_t rows) { return (rows + kWordBits - 1) / kWordBits * kWordBits; }

// The first bits of up to kVectorBlocks rows. Words go into the vector through registers: had they been stored one by
// one, a load of the whole vector would wait until they, and all stores before them, have reached the cache.
template <bool kWhole>
DLKIT_INLINE VectorU64 rows_at(const uint8_t* bits, int64_t first, int64_t stride, int64_t rows) {
  VectorU64 words = {}, at = {};
#pragma GCC unroll 8
  for (int64_t i = 0; i < kVectorBlocks; ++i) {
    if (!kWhole && i >= rows) break;
    words[i] = load_raw<uint64_t>(bits + (first + i * stride) / 8);
    at[i] = uint64_t(first + i * stride);
  }
  return words >> (at & 7);
}

// Bit skip + c * rows + r of `to` = bit first + r * stride + c of `bits`; `first` is a multiple of 8 if stride is, skip
// 0 if rows is a multiple of 64.
DLKIT_INLINE void transpose_bits(const uint8_t* bits, int64_t first, int64_t stride, int64_t rows, int64_t columns,
                                 uint64_t* words, uint8_t* to, int64_t skip) {
  const int64_t whole = rows / kWordBits * kWordBits, rest = rows - whole;
  int64_t side = kVectorBlocks;  // of the squares that take the remaining rows
  while (side < rest) side *= 2;
  const int64_t padded = rest > 0 ? whole + side : whole;
  for (int64_t row = 0; row < padded; row += kVectorBlocks) {
    const int64_t at = first + row * stride;
    const VectorU64 loaded = row + kVectorBlocks <= rows ? rows_at<true>(bits, at, stride, kVectorBlocks)
                                                         : rows_at<false>(bits, at, stride, rows - row);
    memcpy(words + row, &loaded, sizeof(loaded));
  }
  for (int64_t row = 0; row < whole; row += kWordBits) transpose_squares(words + row, kWordBits);
  if (rest == 0) {
    for (int64_t c = 0; c < columns; ++c) {
      for (int64_t row = 0; row < whole; row += kWordBits, to += sizeof(uint64_t))
        memcpy(to, words + row + c, sizeof(uint64_t));
    }
    return;
  }
  transpose_squares(words + whole, side);
  BitWriter writer{to, 0, skip};
  const uint64_t square = ~uint64_t(0) >> (kWordBits - side);
  for (int64_t base = 0; base < columns; base += side) {
    for (int64_t c = base; c < min64(columns, base + side); ++c) {
      for (int64_t row = 0; row < whole; row += kWordBits) writer.put(words[row + c], kWordBits);
      writer.put(words[whole + c - base] >> base & square, rest);
    }
  }
  writer.finish();
}

}  // namespace dlkit::DLKIT_ISA
