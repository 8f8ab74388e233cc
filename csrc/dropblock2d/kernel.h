// The contract of DropBlock: squares of `size` in each plane become 0, what is left grows so that the mean stays.
//
//   seed(s)  s: the logical index in [planes, rows, columns], the corners at which a whole square fits:
//            rows = height - size + 1, columns = width - size + 1; a seed is what common/philox.h's stream drops
//   y = dropped ? 0 : x * numel / max(kept, 1)      dropped: in the square right of and below some seed
//
// In memory a square's elements lie `step` apart along a row and width * step from row to row, where step is 1, or the
// number of channels where these are innermost (channels_last). As seeds lie only where a square fits, a bit string of
// all elements in memory order, shifted by these distances and combined, never carries a square into the next row or
// plane. How many are dropped is known only when all are: two passes, of which the first moves a bit an element. Linear
// in x: backward is the same with grad_output and forward's state, in one pass over x. Bytes moved: x and y, each once.
//
// x and y are dense, both in the same order, of any alignment that the element type has; y may be x. numel may be 0.
#pragma once

#include "../common/philox.h"

namespace dlkit::dropblock2d {

struct DropBlock2d {
  const void* x;
  void* y;
  int64_t planes, height, width;
  int64_t rows, columns;  // corners of a plane
  int64_t channels;       // 1: a plane's elements are adjacent. Else the planes of a sample take turns, so many of them
  int64_t size;           // from 1 to the smaller of height and width
  PhiloxSource source;
  int64_t* rng_state;  // [3]: seed, offset, how many elements are dropped. Zero at first where not `known`, and written
  bool known;          // what rng_state says, as backward does
  uint64_t threshold;  // drop_threshold(the probability of a seed)
  uint32_t* dropped;   // [mask_words()], zero at first: scratch, a bit an element
  DType dtype;
};

DLKIT_HOST_DEVICE int64_t numel(const DropBlock2d& op) { return op.planes * op.height * op.width; }

DLKIT_HOST_DEVICE double scale_of(const DropBlock2d& op) {
  const int64_t kept = numel(op) - op.rng_state[2];
  return double(numel(op)) / double(kept > 0 ? kept : 1);
}

// Bits begin anew at every unit of planes, with a word to spare, so that tasks share none.
DLKIT_HOST_DEVICE int64_t unit_planes(const DropBlock2d& op) {
  constexpr int64_t kElements = 16 * 1024;
  const int64_t plane = op.height * op.width;
  return op.channels > 1 ? op.channels : (kElements + plane - 1) / plane;
}
DLKIT_HOST_DEVICE int64_t units(const DropBlock2d& op) { return (op.planes + unit_planes(op) - 1) / unit_planes(op); }
DLKIT_HOST_DEVICE int64_t unit_words(const DropBlock2d& op) {  // even: the CPU's are of 64 bits
  return (unit_planes(op) * op.height * op.width + 63) / 64 * 2 + 2;
}
DLKIT_HOST_DEVICE int64_t mask_words(const DropBlock2d& op) { return units(op) * unit_words(op); }

void dropblock2d_cpu(const DropBlock2d& op);

// Takes the bits as one unit. `stream` is a cudaStream_t of the current device. Throws std::runtime_error when a launch
// fails.
void dropblock2d_cuda(const DropBlock2d& op, void* stream);

}  // namespace dlkit::dropblock2d
