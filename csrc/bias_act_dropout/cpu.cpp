// dropout(act(x + bias)) on the CPU. Work goes in chunks of kChunk elements: first their keep bits, then their parts of
// rows. Bytes moved: x and y, each once; backward x, grad_output and grad_input, each once, and one partial row of
// grad_bias a block of rows, summed in a fixed order.
#include "../common/cpu/activation.h"
#include "../common/cpu/parallel.h"
#include "../common/cpu/partials.h"
#include "../common/cpu/philox.h"
#include "../common/dispatch.h"
#include "kernel.h"

namespace dlkit::bias_act_dropout {
namespace DLKIT_ISA {
namespace {

using namespace dlkit::DLKIT_ISA;

constexpr int64_t kStepElements = kKeepStep * kBlockElements;
constexpr int64_t kChunk = 2048;

// Calls f(element, column, width, the element's keep bits) for each vector of elements [begin, end).
template <class A, class F>
DLKIT_INLINE void for_elements(const FusedDropout& dropout, int64_t cols, int64_t begin, int64_t end, const F& f) {
  const KeptBits& kept = dropout.bits;
  alignas(64) uint8_t of_chunk[kChunk / kBlockElements + 8];
  const PhiloxState state = dropout.active ? read(dropout.source) : PhiloxState{};
  const PhiloxKeys keys(state);
  const bool draws = dropout.active && !kept.drawn;
  if (!dropout.active) memset(of_chunk, 0xff, sizeof(of_chunk));
  for (int64_t i = begin; i < end;) {
    const int64_t first = i / kStepElements * kStepElements, last = min64(end, first + kChunk);
    uint8_t* const bits = kept.data == nullptr ? of_chunk : kept.data + first / kBlockElements;
    for (int64_t step = first; draws && step < last; step += kStepElements) {
      keep_step(keys, dropout.threshold, uint64_t(step / kBlockElements), bits + (step - first) / kBlockElements);
    }
    while (i < last) {
      const int64_t column = i % cols, count = min64(cols - column, last - i);
      for_columns<A, 2>(0, count, [&](int64_t k, int, auto width) DLKIT_INLINE_LAMBDA {
        f(i + k, column + k, width, lanes_at<A>(bits, i + k - first));
      });
      i += count;
    }
  }
}

template <class A, class T, class Width>
DLKIT_INLINE Vector<A> biased(const T* x, int64_t i, const A* bias, int64_t column, Width width) {
  const Vector<A> v = load(x + i, width);
  return bias == nullptr ? v : v + load(bias + column, width);
}

template <class T, Activation kActivation>
void forward_elements(const Forward& op, int64_t begin, int64_t end, bool nt_store) {
  using A = accumulate_t<T>;
  const A* const bias = static_cast<const A*>(op.bias);
  const Vector<A> scale = broadcast<A>(A(op.dropout.scale));
  for_elements<A>(op.dropout, op.cols, begin, end,
                  [&](int64_t i, int64_t column, auto width, uint32_t keep) DLKIT_INLINE_LAMBDA {
                    const Vector<A> x = biased(static_cast<const T*>(op.x), i, bias, column, width);
                    write(static_cast<T*>(op.y) + i,
                          select<A>(keep, Act<A, kActivation>::value(x) * scale, Vector<A>{}), width, nt_store);
                  });
  if (nt_store) streaming_fence();
}

// `sums` receives the gradient's sums over the rows, or is null.
template <class T, Activation kActivation>
void backward_elements(const Backward& op, int64_t begin, int64_t end, accumulate_t<T>* sums, bool nt_store) {
  using A = accumulate_t<T>;
  const A* const bias = static_cast<const A*>(op.bias);
  const Vector<A> scale = broadcast<A>(A(op.dropout.scale));
  if (sums != nullptr) memset(sums, 0, size_t(op.cols) * sizeof(A));
  for_elements<A>(op.dropout, op.cols, begin, end,
                  [&](int64_t i, int64_t column, auto width, uint32_t keep) DLKIT_INLINE_LAMBDA {
                    const Vector<A> x = biased(static_cast<const T*>(op.x), i, bias, column, width);
                    const Vector<A> g = load(static_cast<const T*>(op.grad_output) + i, width) * scale;
                    const Vector<A> gradient = select<A>(keep, Act<A, kActivation>::gradient(g, x), Vector<A>{});
                    write(static_cast<T*>(op.grad_input) + i, gradient, width, nt_store);
                    if (sums != nullptr) store(sums + column, load(sums + column, width) + gradient, width);
                  });
  if (nt_store) streaming_fence();
}

// Outputs larger than the caches go past them, if their vectors are whole and aligned.
template <class T>
bool should_stream(const void* output, int64_t rows, int64_t cols) {
  return is_beyond_caches<T>(rows * cols) && uintptr_t(output) % 64 == 0 &&
         (rows == 1 || cols * int64_t(sizeof(T)) % 64 == 0);
}

// The number of blocks of rows for the sums of grad_bias. It depends only on the shape.
int64_t row_blocks(const Backward& op) {
  const int64_t by_work = op.rows * op.cols / kGrain, by_rows = max64(op.rows / 8, min64(op.rows, 2));
  return max64(1, min64(64, min64(by_work, by_rows)));
}

// Rows that are added up before their sum is added to the block's: the sum of 32,000 equal terms one after the other is
// off by 5e-4. At least a chunk of elements, up to 512 rows.
int64_t run_of(const Backward& op) { return max64(64, min64(512, kChunk / op.cols)); }

bool has_runs(const Backward& op, int64_t blocks) { return op.rows > run_of(op) * blocks; }

// The gradient of rows [first, last), and its sums over them. `run_sums` has room for the sums of a run, or is null
// where all rows are one run.
template <class T, Activation kActivation>
void backward_rows(const Backward& op, int64_t first, int64_t last, accumulate_t<T>* sums, accumulate_t<T>* run_sums,
                   bool nt_store) {
  using A = accumulate_t<T>;
  const int64_t run = run_sums == nullptr ? last - first : run_of(op);
  for (int64_t row = first; row < last; row += run) {
    A* const to = row == first ? sums : run_sums;
    backward_elements<T, kActivation>(op, row * op.cols, min64(row + run, last) * op.cols, to, nt_store);
    if (to == sums) continue;
    for_columns<A, 1>(0, op.cols, [&](int64_t i, int, auto width) DLKIT_INLINE_LAMBDA {
      store(sums + i, load(sums + i, width) + load(run_sums + i, width), width);
    });
  }
}

template <class F>
void for_chunks(int64_t numel, const F& f) {
  parallel_for((numel + kChunk - 1) / kChunk, kGrain / kChunk,
               [&](int64_t begin, int64_t end) { f(begin * kChunk, min64(end * kChunk, numel)); });
}

}  // namespace

void forward(const Forward& op) {
  write_state(read(op.dropout.source), op.dropout.rng_state);
  with_data_type(op.dtype, [&](auto type) {
    using T = decltype(type);
    const bool nt_store = should_stream<T>(op.y, op.rows, op.cols);
    with_supported_activation(op.activation, [&](auto activation) {
      for_chunks(op.rows * op.cols,
                 [&](int64_t begin, int64_t end) { forward_elements<T, activation>(op, begin, end, nt_store); });
    });
  });
}

void backward(const Backward& op) {
  with_data_type(op.dtype, [&](auto type) {
    using T = decltype(type);
    using A = accumulate_t<T>;
    const bool nt_store = should_stream<T>(op.grad_input, op.rows, op.cols);
    with_supported_activation(op.activation, [&](auto activation) {
      if (op.grad_bias == nullptr) {
        return for_chunks(op.rows * op.cols, [&](int64_t begin, int64_t end) {
          backward_elements<T, activation>(op, begin, end, nullptr, nt_store);
        });
      }
      const int64_t blocks = row_blocks(op);
      A* const partials = static_cast<A*>(op.partials);
      parallel_for(blocks, 1, [&](int64_t begin, int64_t end) {
        for (int64_t block = begin; block < end; ++block) {
          const int64_t first = op.rows * block / blocks, last = op.rows * (block + 1) / blocks;
          A* const run_sums = has_runs(op, blocks) ? partials + (blocks + block) * op.cols : nullptr;
          backward_rows<T, activation>(op, first, last, partials + block * op.cols, run_sums, nt_store);
        }
      });
      sum_partials<A>(partials, blocks, op.cols, op.cols, op.grad_bias);
    });
  });
}

#if defined(DLKIT_ISA_IS_BASELINE)
int64_t partials_bytes(const Backward& op) {
  const int64_t blocks = row_blocks(op), rows = has_runs(op, blocks) ? 2 * blocks : blocks;
  return op.grad_bias == nullptr ? 0 : rows * op.cols * accumulate_size(op.dtype);
}
#endif

}  // namespace DLKIT_ISA

DLKIT_CPU_ENTRY(forward_cpu, forward, Forward)
DLKIT_CPU_ENTRY(backward_cpu, backward, Backward)
#if defined(DLKIT_ISA_IS_BASELINE)
int64_t backward_partials_cpu(const Backward& op) { return baseline::partials_bytes(op); }
#endif

}  // namespace dlkit::bias_act_dropout
