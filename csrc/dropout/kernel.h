// The contract of dropout. All variants are one function with different mask indices and constants:
//
//   m = (i / inner * period + i % period) * spatial + i / period % spatial       i: the element's place in memory
//   y = keep(m) ? x * scale + shift : dropped
//   y = (keep(m) ? x * scale : 0) + residual      with a residual: inner 1, shift and dropped 0; rounded once
//
// where m is the logical index of the unit that is kept or dropped as a whole:
//
//                              inner        period   spatial
//   an element                 1            1        1
//     in channels_last         H * W * C    C        H * W
//   a channel or a sample      its size     1        1
//     in channels_last         H * W * C    C        1
//
// keep() is the stream of common/philox.h. Dropout: scale 1 / (1 - p), shift and dropped 0; alpha dropout: shift and
// dropped preserve mean and variance. Dropped elements are never multiplied: NaN and infinity do not pass. The function
// is linear in x: backward is the same function of grad_output, with shift and dropped 0 and forward's state. Only the
// state is saved; on the CPU also the keep bits, where each element has one. Bytes moved: x and y, each once.
//
// x, residual and y are dense, in the same order, and need only the alignment of the element type; y may be x. numel
// may be 0. Arithmetic is fp32 (fp64 where dtype is F64).
#pragma once

#include "../common/philox.h"

namespace dlkit::dropout {

struct Dropout {
  const void* x;
  const void* residual;  // or null
  void* y;
  int64_t numel;
  int64_t inner;  // at least 1
  PhiloxSource source;
  int64_t* rng_state;  // [2]: receives the seed and the offset that were read from source; or null
  uint64_t threshold;  // drop_threshold(p)
  double scale, shift, dropped;
  DType dtype;
  bool apart = false;  // spatial is inner / period, else 1; lies in padding: a larger struct makes ptxas spill
  int64_t period = 1;  // divides inner
};

struct CpuDropout : Dropout {
  KeptBits bits;  // in logical order; only where each element has a bit of its own
};

void dropout_cpu(const CpuDropout& op);

// `stream` is a cudaStream_t of the current device. Throws std::runtime_error when a launch fails.
void dropout_cuda(const Dropout& op, void* stream);

}  // namespace dlkit::dropout
