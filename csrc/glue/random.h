// The source of an op's random numbers. A call draws seed and offset once: from the device's torch generator, or from a
// state it was given. The result is an int64 [2] tensor, (seed, offset), on the input's device, which is all that
// backward needs. On CUDA the kernel itself writes it: nothing waits for the device, and a captured graph reads the
// generator's memory anew at each replay.
#pragma once

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Context.h>
#include <ATen/SavedTensorHooks.h>
#include <ATen/core/Generator.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/ones.h>
#include <torch/csrc/autograd/graph_task.h>

#include <atomic>

#include "../common/philox.h"
#include "op.h"

#if defined(DLKIT_WITH_CUDA)
#include <ATen/cuda/CUDAGeneratorImpl.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#endif

namespace dlkit {

using OptionalGenerator = std::optional<at::Generator>;

// torch.utils.checkpoint restores only torch's default generators before it recomputes. Draws from other sources inside
// it are recorded and replayed (the rest is in dlkit.random).
enum class From : int { Default, Generator, Stream };
struct Draw {
  From from;
  uint64_t seed, offset;
};
struct WatchedDraws {
  std::optional<Draw> (*replay)(Draw draw) = nullptr;
  void (*record)(Draw draw) = nullptr;
};
inline WatchedDraws watched_draws;
inline std::atomic<bool> others_draw{false};  // whether a source other than a default generator ever drew

// Whether a checkpoint may be running: it has hooks, computes without grad, or recomputes in a backward pass.
inline bool may_be_checkpointed() {
  return others_draw && watched_draws.replay != nullptr &&
         (!at::GradMode::is_enabled() || !at::SavedTensorDefaultHooks::get_tls_state().stack.empty() ||
          torch::autograd::get_current_graph_task_id() != -1);
}

// The result of draw(), or its earlier result where a checkpoint recomputes.
template <class F>
PhiloxSource drawn_once(From from, const F& draw) {
  if (from != From::Default) others_draw = true;
  if (!may_be_checkpointed()) return draw();
  if (const auto before = watched_draws.replay({from, 0, 0})) return {nullptr, nullptr, before->seed, before->offset};
  const PhiloxSource source = draw();
  TORCH_CHECK(source.seed_at == nullptr || from == From::Default,
              "dropout: a torch.Generator that is not the default one cannot be captured in a CUDA graph inside "
              "torch.utils.checkpoint");
  watched_draws.record({from, source.seed, source.offset});
  return source;
}

inline From from_generator(const OptionalGenerator& generator) {
  const bool is_default = !generator.has_value() || !generator->defined() ||
                          *generator == at::globalContext().defaultGenerator(generator->device());
  return is_default ? From::Default : From::Generator;
}

// The CPU's generator has no offset: each call draws a seed from it.
inline PhiloxSource draw_cpu(const OptionalGenerator& generator) {
  auto* const cpu = at::get_generator_or_default<at::CPUGeneratorImpl>(generator, at::detail::getDefaultCPUGenerator());
  return drawn_once(from_generator(generator), [&]() -> PhiloxSource {
    const std::lock_guard<std::mutex> lock(cpu->mutex_);
    return {nullptr, nullptr, cpu->random64(), 0};
  });
}

inline PhiloxSource draw(const CpuDevice&, const at::Tensor&, const OptionalGenerator& generator) {
  return draw_cpu(generator);
}

#if defined(DLKIT_CUDA_ON_CPU)
inline PhiloxSource draw(const CudaDevice&, const at::Tensor&, const OptionalGenerator& generator) {
  return draw_cpu(generator);
}
#elif defined(DLKIT_WITH_CUDA)
inline PhiloxSource draw(const CudaDevice&, const at::Tensor& input, const OptionalGenerator& generator) {
  auto* const cuda = at::get_generator_or_default<at::CUDAGeneratorImpl>(
      generator, at::cuda::detail::getDefaultCUDAGenerator(input.device().index()));
  return drawn_once(from_generator(generator), [&]() -> PhiloxSource {
    const std::lock_guard<std::mutex> lock(cuda->mutex_);
    const at::PhiloxCudaState state = cuda->philox_cuda_state(kDrawn);
    if (state.captured_) return {state.seed_.ptr, state.offset_.ptr, 0, state.offset_intragraph_};
    return {nullptr, nullptr, state.seed_.val, state.offset_.val};
  });
}
#endif

// A state on the CPU (drawn from a dlkit.random.Philox) serves any device, but a captured graph would replay its value.
inline PhiloxSource source_of(const at::Tensor& rng_state, const at::Tensor& input) {
  TORCH_CHECK(rng_state.numel() >= 2 && rng_state.is_contiguous(),
              "dropout: expected rng_state of 2 adjacent elements or more, got ", rng_state.sizes(), " with strides ",
              rng_state.strides());
  const int64_t* data = rng_state.const_data_ptr<int64_t>();
  if (rng_state.device() == input.device()) return {data, data + 1, 0, 0};
  TORCH_CHECK(rng_state.device().is_cpu(), "dropout: expected rng_state on ", input.device(),
              " (the device of input) or cpu, got ", rng_state.device());
#if defined(DLKIT_WITH_CUDA)
  TORCH_CHECK(
      c10::cuda::currentStreamCaptureStatusMayInitCtx() == c10::cuda::CaptureStatus::None,
      "dropout: a dlkit.random.Philox cannot be captured in a CUDA graph, whose replays would all draw the same "
      "mask; use a torch.Generator of the device");
#endif
  return {nullptr, nullptr, uint64_t(data[0]), uint64_t(data[1])};
}

// Words that the keep bits of that many elements take after seed and offset, with room for the vectors at their end.
template <class Int>
Int keep_words(const Int& numel) {
  return (numel + 255) / 256 * 4 + 1;
}

inline at::Tensor empty_rng_state(const at::Tensor& input, bool keep_bits = false) {
  const auto options = at::TensorOptions().device(input.device()).dtype(at::kLong);
  return keep_bits ? at::empty_symint({keep_words(input.sym_numel()) + 2}, options) : at::empty({2}, options);
}

// Whether a call that is differentiated keeps its bits, which take a 32nd of the bytes of fp32 input. Not where it is
// traced, nor where saved tensors pass through hooks: a checkpoint compares the sizes of saved tensors, and offloading
// wants them small.
inline bool should_keep_bits(const at::Tensor& input, double p) {
  return p > 0 && p < 1 && input.is_cpu() && !input.unsafeGetTensorImpl()->is_python_dispatch() &&
         at::SavedTensorDefaultHooks::get_tls_state().stack.empty();
}

// The bits in a state, if it has bits for that many elements.
inline KeptBits bits_in(const at::Tensor& rng_state, int64_t numel, bool drawn) {
  if (!rng_state.is_cpu() || rng_state.numel() != keep_words(numel) + 2) return {};
  return {reinterpret_cast<uint8_t*>(const_cast<int64_t*>(rng_state.const_data_ptr<int64_t>()) + 2), drawn};
}

// The checks that torch makes of a dropout call.
inline void check_dropout(const char* name, const at::Tensor& input, double p, const OptionalGenerator& generator,
                          const OptionalTensor& stream) {
  TORCH_CHECK(input.defined(), name, "(): expected input to be a Tensor, got None");
  TORCH_CHECK_VALUE(!(p < 0 || p > 1), name, "(): expected p between 0 and 1, got ", p);
  TORCH_CHECK(p == p, name, "(): expected p between 0 and 1, got ", p);
  TORCH_CHECK(!has(stream) || (stream->is_cpu() && stream->scalar_type() == at::kLong && stream->dim() == 1), name,
              "(): expected stream to be int64 [2] on cpu, got ", stream->scalar_type(), " on ", stream->device());
  if (!generator.has_value() || !generator->defined()) return;
  TORCH_CHECK(generator->device().type() == input.device().type() || input.is_meta(), name,
              "(): expected generator on ", input.device(), " (the device of input), got ", generator->device());
  TORCH_CHECK(!has(stream), name, "(): expected generator or stream, got both");
}

// The state of this call drawn from the stream, if there is one; else none, and the kernel's op draws. Like a
// generator, a stream advances only if there is something to draw.
inline OptionalTensor draw_for(const at::Tensor& input, double p, const OptionalTensor& stream) {
  if (!has(stream) || p == 1 || TORCH_GUARD_OR_FALSE(input.sym_numel().sym_eq(0))) return std::nullopt;
  static const auto op = find_op<at::Tensor(at::Tensor&)>("philox_draw");
  at::Tensor tensor = *stream;
  return op.call(tensor);
}

// 1 where an element stays and 0 where it is dropped, with probability p: the mask of a kernel as a tensor, for
// torch.func's transforms and forward-mode derivatives. Its vmap follows `randomness`.
inline at::Tensor draw_mask(c10::SymIntArrayRef sizes, const at::Tensor& input, double p,
                            const OptionalGenerator& generator, const OptionalTensor& stream) {
  static const auto op =
      find_op<at::Tensor(const at::Tensor&, double, const OptionalGenerator&, const OptionalTensor&)>("dropout_mask");
  return op.call(at::ones_symint(sizes, input.options().dtype(at::kFloat)), p, generator, stream);
}

}  // namespace dlkit
