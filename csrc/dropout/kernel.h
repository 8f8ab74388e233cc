// The contract of dropout, all of whose variants are one function with another mask index and other constants:
//
//   m = (i / inner * period + i % period) * spatial + i / period % spatial       i: where the element lies in memory
//   y = keep(m) ? x * scale + shift : dropped
//   y = (keep(m) ? x * scale : 0) + residual      with a residual: inner 1, shift and dropped 0; rounded once
//
// where m is the logical index of what has a fate of its own:
//
//                              inner        period   spatial
//   an element                 1            1        1
//     in channels_last         H * W * C    C        H * W
//   a channel or a sample      its size     1        1
//     in channels_last         H * W * C    C        1
//
// keep() is the stream of common/philox.h. Dropout: scale 1 / (1 - p), shift and dropped 0; alpha dropout: shift and
// dropped such that mean and variance stay. What is dropped is never multiplied: NaN and infinity do not pass. Linear
// in x, so backward is the same function of grad_output, with shift and dropped 0 and the state that forward drew,
// which is all that is kept; on the CPU the keep bits as well, where each element has one. Bytes moved: x and y, each
// once.
//
// x, residual and y are dense, in the same order, of any alignment that the element type has; y may be x. numel may be
// 0. Arithmetic is fp32 (fp64 where dtype is F64).
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
  bool apart = false;  // spatial is inner / period, else 1; in the padding: a larger struct makes ptxas spill
  int64_t period = 1;  // divides inner
};

struct CpuDropout : Dropout {
  KeptBits bits;  // only where inner is 1
};

void dropout_cpu(const CpuDropout& op);

// `stream` is a cudaStream_t of the current device. Throws std::runtime_error when a launch fails.
void dropout_cuda(const Dropout& op, void* stream);

}  // namespace dlkit::dropout
