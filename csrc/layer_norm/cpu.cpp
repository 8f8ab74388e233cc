// LayerNorm and RMSNorm on the CPU.
#include "cpu/backward.h"
#include "cpu/forward.h"
#include "cpu/long_rows.h"

namespace dlkit::layer_norm {
namespace DLKIT_ISA {
namespace {

template <class T, bool kAdds>
void forward_typed(const Forward& op) {
  if (has_long_rows(op)) return forward_long_rows<T, kAdds>(op);
  const bool nt_store = should_stream<T>(op.y, op.rows, op.cols) && (!kAdds || uintptr_t(op.sum) % 64 == 0);
  parallel_for(op.rows, max64(1, kGrain / op.cols), [&](int64_t begin, int64_t end) {
    if (op.cols <= kShortForward<accumulate_t<T>> && !op.dropout.active) {
      forward_all_short_rows<T, kAdds>(op, begin, end, nt_store);
    } else {
      forward_rows<T, kAdds>(op, begin, end, nt_store);
    }
    if (nt_store) streaming_fence();
  });
}

template <class T>
void backward_typed(const Backward& op) {
  if (has_long_rows(op)) return backward_long_rows<T>(op);
  using A = accumulate_t<T>;
  const bool nt_store = op.grad_input != nullptr && should_stream<T>(op.grad_input, op.rows, op.cols) &&
                        uintptr_t(op.grad_residual) % 64 == 0;
  const auto [blocks, tiles] = cut(op);
  const bool has_weight = op.grad_weight != nullptr, has_bias = op.grad_bias != nullptr;
  const int64_t periods = op.rows / op.period, parameters = op.period * op.cols;
  const int64_t block_stride = parameters * (int64_t(has_weight) + int64_t(has_bias));
  A* const weight_partials = has_weight ? static_cast<A*>(op.partials) : nullptr;
  A* const bias_partials = has_bias ? static_cast<A*>(op.partials) + (has_weight ? parameters : 0) : nullptr;
  parallel_for(blocks * tiles, 1, [&, blocks = blocks, tiles = tiles](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t block = i / tiles, tile = i % tiles;
      backward_rows<T>(op, periods * block / blocks, periods * (block + 1) / blocks, op.period * tile / tiles,
                       op.period * (tile + 1) / tiles, at<A>(weight_partials, block * block_stride),
                       at<A>(bias_partials, block * block_stride), nt_store);
    }
  });
  const auto finish = [&, blocks = blocks](const A* partials, void* gradient) {
    if (gradient == nullptr) return;
    if (op.parameter_dtype == op.dtype) {
      sum_partials<T>(partials, blocks, block_stride, parameters, gradient);
    } else {
      sum_partials<A>(partials, blocks, block_stride, parameters, gradient);
    }
  };
  finish(weight_partials, op.grad_weight);
  finish(bias_partials, op.grad_bias);
}

}  // namespace

void forward(const Forward& op) {
  write_state(read(op.dropout.source), op.dropout.rng_state);
  with_data_type(op.dtype, [&](auto type) {
    using T = decltype(type);
    op.residual != nullptr ? forward_typed<T, true>(op) : forward_typed<T, false>(op);
  });
}

void backward(const Backward& op) {
  if (op.grad_input == nullptr && op.grad_weight == nullptr && op.grad_bias == nullptr) return;
  with_data_type(op.dtype, [&](auto type) { backward_typed<decltype(type)>(op); });
}

#if defined(DLKIT_ISA_IS_BASELINE)
constexpr int64_t most_dropped = kScratch;  // columns: the keep bits of a group of rows lie on the stack
int64_t partials_bytes(const Backward& op) {
  const int64_t arrays = int64_t(op.grad_weight != nullptr) + int64_t(op.grad_bias != nullptr);
  const int64_t blocks = !has_long_rows(op) ? cut(op).blocks : op.rows > rows_of_batch(op) ? 1 : 0;
  return blocks * arrays * op.period * op.cols * accumulate_size(op.dtype);
}
#endif

}  // namespace DLKIT_ISA

DLKIT_CPU_ENTRY(forward_cpu, forward, Forward)
DLKIT_CPU_ENTRY(backward_cpu, backward, Backward)
#if defined(DLKIT_ISA_IS_BASELINE)
int64_t backward_partials_cpu(const Backward& op) { return baseline::partials_bytes(op); }
bool can_drop_cpu(const Forward& op) { return op.cols <= baseline::most_dropped; }
bool can_drop_cpu(const Backward& op) { return op.cols <= baseline::most_dropped; }
#endif

}  // namespace dlkit::layer_norm
