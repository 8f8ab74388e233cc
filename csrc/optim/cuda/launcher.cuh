// One launch for many tensors: the metadata that its argument carries, and the class that fills them.
#pragma once

#include <algorithm>

#include "../../common/cuda/launch.cuh"

namespace dlkit::optim {
namespace {

using namespace dlkit::cuda;

constexpr int kThreads = 256;  // of a block

// A launch's argument: the data that all its tensors have in common, and an entry of `stride` words for each of them.
// The low half of an entry's first word is the tensor's first chunk.
template <class Common, int Bytes = kArgumentBytes>
struct TensorListMetadata {
  static constexpr int words_that_fit = (Bytes - int(sizeof(Common)) - 16) / 8;
  Common common;
  int32_t tensor_count, stride;
  int64_t chunk;  // elements
  uint64_t words[words_that_fit];
};

// The index in `words` of the entry of the tensor that has this chunk.
template <class Common, int Bytes>
__device__ __forceinline__ int find_entry(const TensorListMetadata<Common, Bytes>& metadata, uint32_t chunk) {
  int low = 0, high = metadata.tensor_count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (uint32_t(metadata.words[middle * metadata.stride]) <= chunk) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low * metadata.stride;
}

// Fills the metadata entry by entry and launches when they are full.
template <class Common>
class MultiTensorLauncher {
 public:
  using Many = TensorListMetadata<Common>;
  using Few = TensorListMetadata<Common, kFewArgumentBytes>;
  // Two variants of a kernel, for many tensors and for few.
  struct Kernels {
    const char* name;
    void (*many)(Many);
    void (*few)(Few);
  };

  MultiTensorLauncher(int stride, int64_t chunk, const Kernels& kernels, void* stream)
      : kernels_(kernels), stream_(stream) {
    metadata.stride = stride;
    metadata.chunk = chunk;
  }
  bool is_full() const {
    return (metadata.tensor_count + 1) * metadata.stride > Many::words_that_fit || blocks_ > (1u << 30);
  }
  // Adds an entry for a tensor of `chunks` chunks; the upper half of its first word is `bits`.
  uint64_t* add(int64_t chunks, uint32_t bits) {
    uint64_t* entry = metadata.words + metadata.tensor_count++ * metadata.stride;
    *entry = uint64_t(bits) << 32 | uint32_t(blocks_);
    blocks_ += chunks;
    return entry;
  }
  void flush() {
    const int words = metadata.tensor_count * metadata.stride;
    if (words > 0 && words <= Few::words_that_fit) {
      Few few;
      few.common = metadata.common;
      few.tensor_count = metadata.tensor_count;
      few.stride = metadata.stride;
      few.chunk = metadata.chunk;
      std::copy_n(metadata.words, words, few.words);
      launch(kernels_.name, kernels_.few, grid(), kThreads, 0, stream_, few);
    } else if (words > 0) {
      launch(kernels_.name, kernels_.many, grid(), kThreads, 0, stream_, metadata);
    }
    metadata.tensor_count = 0;
    blocks_ = 0;
  }

  Many metadata{};

 private:
  dim3 grid() const { return dim3(unsigned(std::max<int64_t>(blocks_, 1))); }  // counters take no blocks of their own

  Kernels kernels_;
  void* stream_;
  int64_t blocks_ = 0;
};

}  // namespace
}  // namespace dlkit::optim
