// The contract of DropBlock: squares of `size` x `size` in each plane become 0, and the rest is scaled to preserve the
// mean.
//
//   seed(s)  s: the logical index in [planes, rows, columns], the corners at which a whole square fits:
//            rows = height - size + 1, columns = width - size + 1; a seed is what common/philox.h's stream drops
//   y = dropped ? 0 : x * numel / max(kept, 1)      dropped: in the square right of and below some seed
//
// In memory a square's elements lie `step` apart along a row and width * step from row to row, where step is 1, or the
// number of channels where these are innermost (channels_last). Seeds lie only where a square fits: a bit string of all
// elements in memory order, shifted by these distances and combined, therefore never carries a square into the next row
// or plane. The scale depends on how many elements are dropped: two passes are needed, of which the first moves a bit
// an element. The function is linear in x: backward is the same with grad_output and forward's state. Bytes moved: x
// and y, each once.
//
// x and y are dense, in the same order, and need only the alignment of the element type; y may be x. numel may be 0.
#pragma once

#include "../common/philox.h"

namespace dlkit::dropblock2d {

struct DropBlock2d {
  const void* x;
  void* y;
  int64_t planes, height, width;
  int64_t rows, columns;  // possible corners in a plane
  int64_t channels;       // 1: a plane's elements are adjacent. Else this many planes of a sample are interleaved
  int64_t size;           // from 1 to the smaller of height and width
  PhiloxSource source;
  int64_t* rng_state;  // [3]: seed, offset, number of dropped elements. Zero at first if not `known`, and then written
  bool known;          // rng_state is an input, as in backward
  uint64_t threshold;  // drop_threshold(the probability of a seed)
  uint32_t* dropped;   // [mask_words()], zero at first: scratch, a bit an element
  DType dtype;
};

DLKIT_HOST_DEVICE int64_t numel(const DropBlock2d& op) { return op.planes * op.height * op.width; }

DLKIT_HOST_DEVICE double scale_of(const DropBlock2d& op) {
  const int64_t kept = numel(op) - op.rng_state[2];
  return double(numel(op)) / double(kept > 0 ? kept : 1);
}

// Each unit of planes begins at a new word and has one to spare, since tasks must not share a word.
DLKIT_HOST_DEVICE int64_t unit_planes(const DropBlock2d& op) {
  constexpr int64_t kElements = 16 * 1024;
  const int64_t plane = op.height * op.width;
  return op.channels > 1 ? op.channels : (kElements + plane - 1) / plane;
}
DLKIT_HOST_DEVICE int64_t units(const DropBlock2d& op) { return (op.planes + unit_planes(op) - 1) / unit_planes(op); }
DLKIT_HOST_DEVICE int64_t unit_words(const DropBlock2d& op) {  // even: the CPU's words have 64 bits
  return (unit_planes(op) * op.height * op.width + 63) / 64 * 2 + 2;
}
DLKIT_HOST_DEVICE int64_t mask_words(const DropBlock2d& op) { return units(op) * unit_words(op); }

void dropblock2d_cpu(const DropBlock2d& op);

// Treats all planes as one unit. `stream` is a cudaStream_t of the current device. Throws std::runtime_error when a
// launch fails.
void dropblock2d_cuda(const DropBlock2d& op, void* stream);

}  // namespace dlkit::dropblock2d
