// The optimizers on CUDA. A step reads each array once and writes each but the gradients once: 28 bytes a parameter for
// AdamW in fp32, the least there is. Clipping adds the 4 bytes of the norm's pass; the coefficient, the loss scale,
// found_inf and step counters are read where they lie, so nothing waits for the device.
//
// One launch serves many tensors: their addresses travel in its arguments, never through a copy to the device. From
// CUDA 12.1 on these may be 32 KB, some 550 tensors of AdamW. The driver copies all declared arguments at every launch,
// which for 32 KB takes 5 to 8 us by others' measurements: some 40 tensors or fewer get a kernel that declares 4 KB. A
// launch holds tensors of one dtype and state type; step counters on the device, which every block reads, are raised in
// a launch of their own. A block takes one chunk of one tensor, which it finds by binary search in the arguments. A
// chunk is 2 K to 16 K elements: even a small model has some eight chunks a multiprocessor, and the setup (search,
// hyperparameters in fp64, one barrier: about a microsecond) stays small against the 50 us of 16 K elements' traffic. A
// thread requests its first elements before that barrier, which shortens a step of few tensors by that wait.
//
// A thread holds one pack of 16 bytes of the narrowest array, and as many elements of the others: AdamW in fp32 has 64
// bytes a thread on their way at once. At 4.8 TB/s and some 0.8 us of latency an H200 wants 29 KB for each of its 132
// multiprocessors: 768 resident threads have 48 KB. Not yet run on a GPU.
#include <algorithm>
#include <cmath>
#include <type_traits>

#include "../common/dispatch.h"
#include "cuda/norm.cuh"
#include "cuda/step.cuh"

namespace dlkit::optim {
namespace {

constexpr int kLeastChunk = 2048, kMostChunk = 16384;  // elements; multiples of what a block handles at once
constexpr int kChunksPerMultiprocessor = 8;

struct Arrays {
  const void* at[kSlots];
};
Arrays arrays_of(const Tensor& t) {
  return {{t.param, t.grad, t.states[0], t.states[1], t.states[2], t.scales[0], t.scales[1], t.scales[2], t.remainder,
           t.ema, t.step}};
}

// Steps the tensors of one dtype and one state type.
template <class T, class S, Algorithm Which>
void step_kind(const Step& op, DType dtype, StateType state_type, int64_t chunk, void* stream) {
  constexpr size_t width = width_of<T, S>;
  const auto belongs = [&](const Tensor& tensor) {
    return tensor.dtype == dtype && tensor.state_type == state_type && tensor.numel > 0;
  };
  bool present[kSlots] = {};
  for (int64_t i = 0; i < op.tensor_count; ++i) {
    if (!belongs(op.tensors[i])) continue;
    const Arrays arrays = arrays_of(op.tensors[i]);
    for (int slot = 0; slot < kSlots; ++slot) present[slot] = present[slot] || arrays.at[slot] != nullptr;
  }
  int stride = kFixedWords;
  StepCommon common{};
  for (int slot = 0; slot < kSlots; ++slot) common.slot[slot] = int8_t(present[slot] ? stride++ : -1);
  if (stride == kFixedWords) return;  // no tensor is of this kind
  common.grad_norm = op.grad_norm;
  common.grad_scale = op.grad_scale;
  common.found_inf = op.found_inf;
  common.max_norm = op.max_norm;
  common.seed = op.seed;
  common.norm_dtype = op.norm_dtype;
  common.write_grads = op.write_grads;

  MultiTensorLauncher<StepCommon> launcher(
      stride, chunk,
      {"optim_step_", step_tensors<T, 16, S, Which, kArgumentBytes>, step_tensors<T, 16, S, Which, kFewArgumentBytes>},
      stream);
  launcher.metadata.common = common;
  int records = 0;
  const Tensor* last = nullptr;  // whose record is the last one
  for (int64_t i = 0; i < op.tensor_count; ++i) {
    const Tensor& tensor = op.tensors[i];
    if (!belongs(tensor)) continue;
    const bool same = last != nullptr && tensor.group == last->group &&
                      tensor.bias_correction1 == last->bias_correction1 &&
                      tensor.bias_correction2 == last->bias_correction2;
    if (launcher.is_full() || (!same && records == StepCommon::records_that_fit)) {
      launcher.flush();
      records = 0;
    }
    if (!same || records == 0) {
      launcher.metadata.common.records[records++] = {op.groups[tensor.group], tensor.bias_correction1,
                                                     std::sqrt(tensor.bias_correction2)};
      last = &tensor;
    }
    const Arrays arrays = arrays_of(tensor);
    const size_t element_bytes[kSlots] = {sizeof(T),
                                          size_t(size_of(tensor.grad_dtype)),
                                          sizeof(S),
                                          sizeof(S),
                                          sizeof(S),
                                          0,
                                          0,
                                          0,
                                          sizeof(int16_t),
                                          sizeof(accumulate_t<T>),
                                          0};
    bool aligned = true;
    for (int slot = 0; slot < kSlots; ++slot) {
      aligned = aligned &&
                are_aligned(std::min<size_t>(16, std::max<size_t>(1, width * element_bytes[slot])), arrays.at[slot]);
    }
    const uint32_t bits = uint32_t(records - 1) | (aligned ? kAligned : 0) |
                          (tensor.step_dtype == DType::F64 ? kDoubleStep : 0) |
                          uint32_t(tensor.grad_dtype) << kGradShift;
    uint64_t* entry = launcher.add(divide_up(tensor.numel, chunk), bits);
    entry[1] = uint64_t(tensor.numel);
    entry[2] = uint64_t(i);
    for (int slot = 0; slot < kSlots; ++slot) {
      if (common.slot[slot] >= 0) entry[common.slot[slot]] = reinterpret_cast<uint64_t>(arrays.at[slot]);
    }
  }
  launcher.flush();
}

template <Algorithm Which>
void step_all(const Step& op, int64_t chunk, void* stream) {
  for (const DType dtype : {DType::F32, DType::F64, DType::BF16, DType::F16}) {
    with_type(dtype, [&](auto type) {
      using T = decltype(type);
      if constexpr (std::is_same_v<T, double>) {
        step_kind<T, double, Which>(op, dtype, StateType::F64, chunk, stream);
      } else {
        step_kind<T, float, Which>(op, dtype, StateType::F32, chunk, stream);
        step_kind<T, BFloat16, Which>(op, dtype, StateType::BF16, chunk, stream);
        step_kind<T, Code, Which>(op, dtype, StateType::Int8, chunk, stream);
      }
      if constexpr (std::is_same_v<T, Float16>) step_kind<T, T, Which>(op, dtype, StateType::F16, chunk, stream);
    });
  }
}

void advance_counters(const Step& op, void* stream) {
  MultiTensorLauncher<CounterCommon> launcher(
      1, 1, {"optim_step_", advance_steps<kArgumentBytes>, advance_steps<kFewArgumentBytes>}, stream);
  launcher.metadata.common = {op.found_inf};
  for (int64_t i = 0; i < op.tensor_count; ++i) {
    const Tensor& tensor = op.tensors[i];
    if (tensor.step == nullptr) continue;
    if (launcher.is_full()) launcher.flush();
    *launcher.add(0, 0) = reinterpret_cast<uint64_t>(tensor.step) | (tensor.step_dtype == DType::F64 ? 1 : 0);
  }
  launcher.flush();
}

// Launches a kernel on the gradients of T. An entry has first chunk and alignment, numel, address, and the number of
// chunks of all gradients before it.
template <class T, class Common>
void launch_grads(const Gradient* grads, int64_t count, DType dtype, const Common& common, int64_t chunk,
                  const typename MultiTensorLauncher<Common>::Kernels& kernels, void* stream) {
  MultiTensorLauncher<Common> launcher(4, chunk, kernels, stream);
  launcher.metadata.common = common;
  int64_t chunks_before = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t chunks = divide_up(grads[i].numel, chunk);
    if (grads[i].dtype == dtype && chunks > 0) {
      if (launcher.is_full()) launcher.flush();
      uint64_t* entry = launcher.add(chunks, are_aligned(16, grads[i].data) ? 1 : 0);
      entry[1] = uint64_t(grads[i].numel);
      entry[2] = reinterpret_cast<uint64_t>(grads[i].data);
      entry[3] = uint64_t(chunks_before);
    }
    chunks_before += chunks;
  }
  launcher.flush();
}

// Elements a block takes: few enough to give every multiprocessor blocks, many enough to make their setup negligible.
int64_t chunk_for(int64_t blocks) {
  const int64_t wanted = blocks * kBlock / (int64_t(current_device().multiprocessors) * kChunksPerMultiprocessor);
  return std::clamp((wanted + kLeastChunk - 1) / kLeastChunk * kLeastChunk, int64_t(kLeastChunk), int64_t(kMostChunk));
}

constexpr DType kDTypes[] = {DType::F32, DType::F64, DType::BF16, DType::F16};

}  // namespace

void step_cuda(const Step& op, void* stream) {
  const int64_t blocks = op.first_block[op.tensor_count];
  if (blocks > 0) {
    const int64_t chunk = chunk_for(blocks);
    switch (op.algorithm) {
      case Algorithm::Adam:
        step_all<Algorithm::Adam>(op, chunk, stream);
        break;
      case Algorithm::Sgd:
        step_all<Algorithm::Sgd>(op, chunk, stream);
        break;
      case Algorithm::RmsProp:
        step_all<Algorithm::RmsProp>(op, chunk, stream);
        break;
    }
  }
  advance_counters(op, stream);
}

int64_t norm_partials_cuda(const Norm& op) {
  int64_t chunks = 0;
  for (int64_t i = 0; i < op.count; ++i) chunks += divide_up(op.grads[i].numel, kNormChunk);
  return chunks;
}

void norm_cuda(const Norm& op, void* stream) {
  for (const DType dtype : kDTypes) {
    with_type(dtype, [&](auto type) {
      using T = decltype(type);
      launch_grads<T>(op.grads, op.count, dtype, NormCommon{op.partials}, kNormChunk,
                      {"optim_grad_norm", sum_squares<kArgumentBytes, T>, sum_squares<kFewArgumentBytes, T>}, stream);
    });
  }
  launch("optim_grad_norm", finish_norm, dim3(1), dim3(1024), 0, stream, op.partials, norm_partials_cuda(op), op.norm,
         op.norm_dtype);
}

void clip_cuda(const Clip& op, void* stream) {
  const int64_t chunk = chunk_for(op.first_block[op.count]);
  for (const DType dtype : kDTypes) {
    with_type(dtype, [&](auto type) {
      using T = decltype(type);
      launch_grads<T>(op.grads, op.count, dtype, ClipCommon{op.norm, op.norm_dtype, op.max_norm}, chunk,
                      {"optim_clip_grads_", scale_grads<T, 16, kArgumentBytes>, scale_grads<T, 16, kFewArgumentBytes>},
                      stream);
    });
  }
}

}  // namespace dlkit::optim
