// LayerNorm and RMSNorm on CUDA. What each pass moves, in units of one [rows, cols] tensor:
//
//   forward    reads x (and residual), writes y (and sum): 2 (4), the least there is. Rows of up to 32 KB stay in
//              registers between load and store, up to 227 KB in shared memory; longer ones go in pieces, see
//              cuda/long_rows.cuh.
//   backward   reads x and grad_output, writes grad_input: 3, the least there is, plus cols * 4 bytes per block and
//              parameter. Blocks stay for many rows. A thread owns the same columns in each, so grad_weight and
//              grad_bias grow in its registers; the next row is on its way into shared memory (cp.async, which holds no
//              registers) while this one reduces. A second kernel adds the blocks' sums up in a fixed order: no
//              atomics, the same bits every run. Rows of more than 16 K columns (or 14.5 K in fp32, where two rows of
//              inputs outgrow 227 KB) go in pieces: 5 units.
//
// Bandwidth needs bytes in flight: at 4.8 TB/s and some 0.8 us of latency, 29 KB for each of an H200's 132
// multiprocessors. Full packs give forward 32 to 64 KB (512 to 1024 resident threads with 32 to 128 bytes each) and
// backward 32 to 128 KB (512 or 1024 threads with 64 to 256 bytes of the next row). Predicted from that: 0.88 and 0.80
// of a copy's bandwidth.
//
// Rows of odd width or address are copied into shared memory 16 bytes at a time (cp.async), and threads read them there
// an element at a time: 64 KB in flight, where loads of single elements gave 16 KB (fp32) and 8 KB (16 bits). The limit
// is then the issue slots: forward takes about 25 instructions an element, and a multiprocessor's four slots would be
// full at 5 elements a clock in 16 bits. Predicted: 0.8 of a copy's bandwidth in fp32, 0.65 in 16 bits. weight and bias
// are fetched into L1 while x is on its way.
//
// Not yet run on a GPU.
#include "../common/cuda/partials.cuh"
#include "../common/dispatch.h"
#include "cuda/backward.cuh"
#include "cuda/forward.cuh"
#include "cuda/long_rows.cuh"

namespace dlkit::layer_norm {
namespace {

template <int Lanes, int Packs>
struct Spread {
  static constexpr int lanes = Lanes, packs = Packs;
};
template <class... Each>
struct Spreads {};

// Calls f with the first spread that holds a row of `packs`; returns false where there is none.
template <class F, class... Each>
bool with_spread(int64_t packs, Spreads<Each...>, const F& f) {
  return ((packs <= Each::lanes * Each::packs && (f(Each()), true)) || ...);
}

using ForwardSpreads = Spreads<Spread<2, 2>, Spread<4, 2>, Spread<4, 4>, Spread<8, 4>, Spread<16, 4>, Spread<32, 4>,
                               Spread<32, 8>, Spread<128, 4>, Spread<256, 4>, Spread<512, 4>>;
// For rows of odd width or address; packs are single elements.
using OddSpreads = Spreads<Spread<8, 8>, Spread<32, 16>, Spread<128, 16>, Spread<512, 1 << 16>>;
// With a dropout, since the residual's packs and the random bits take registers too.
using DropSpreads =
    Spreads<Spread<4, 4>, Spread<16, 4>, Spread<32, 4>, Spread<64, 4>, Spread<128, 4>, Spread<256, 4>, Spread<512, 4>>;
using ShortSpreads = Spreads<Spread<2, 2>, Spread<8, 2>, Spread<16, 2>, Spread<32, 2>, Spread<32, 4>, Spread<64, 4>,
                             Spread<128, 4>, Spread<256, 4>, Spread<512, 4>>;
using LongSpreads = Spreads<Spread<2, 2>, Spread<8, 2>, Spread<16, 2>, Spread<32, 2>, Spread<32, 4>, Spread<64, 4>,
                            Spread<128, 4>, Spread<256, 4>, Spread<512, 4>, Spread<512, 8>>;
// 8 packs of 8 columns would need 128 sums a thread: too many registers.
template <int Width>
using BackwardSpreads = std::conditional_t<Width <= 4, LongSpreads, ShortSpreads>;

// Whether the address and the distance of rows allow accesses of 16 bytes.
bool wide_rows(const void* tensor, int64_t stride, int64_t element, int64_t rows) {
  return tensor == nullptr || (are_aligned(16, tensor) && (rows == 1 || stride * element % 16 == 0));
}

bool wide(const Forward& op, int64_t element) {
  return op.cols * element % 16 == 0 && wide_rows(op.x, op.x_stride, element, op.rows) &&
         wide_rows(op.residual, op.residual_stride, element, op.rows) &&
         are_aligned(16, op.weight, op.bias, op.y, op.sum);
}
bool wide(const Backward& op, int64_t element) {
  return op.cols * element % 16 == 0 && wide_rows(op.x, op.x_stride, element, op.rows) &&
         wide_rows(op.grad_output, op.grad_output_stride, element, op.rows) &&
         wide_rows(op.grad_sum, op.grad_sum_stride, element, op.rows) &&
         are_aligned(16, op.weight, op.grad_input, op.grad_residual);
}

// Calls f(T(), std::integral_constant<int, PackBytes>()).
template <class Op, class F>
void with_types(const Op& op, const F& f) {
  with_type(op.dtype, [&](auto type) {
    constexpr int element = sizeof(type);
    if (wide(op, element)) {
      f(type, std::integral_constant<int, 16>());
    } else {
      f(type, std::integral_constant<int, element>());
    }
  });
}

// How forward runs without a dropout.
struct ForwardPlan {
  bool in_registers;
  int64_t shared_bytes;  // of a block; 0: in registers, or in pieces
  Pieces pieces;
};

template <class T, int PackBytes>
ForwardPlan plan(const Forward& op) {
  ForwardPlan result{};
  const int64_t packs = op.cols * int64_t(sizeof(T)) / PackBytes, row_bytes = op.cols * int64_t(sizeof(T));
  const int64_t most = current_device().shared_per_block - 1024;  // less the kernels' static shared memory
  if (PackBytes == 16) {
    result.in_registers = with_spread(packs, ForwardSpreads(), [](auto) {});
    if (!result.in_registers && row_bytes <= most) result.shared_bytes = row_bytes;
  } else if (row_bytes <= most) {
    with_spread(packs, OddSpreads(), [&](auto spread) {
      const int64_t rows = threads_of<spread.lanes> / spread.lanes * (op.residual != nullptr ? 2 : 1);
      const int64_t bytes = rows * slot_bytes<PackBytes>(int(row_bytes));
      if (bytes <= most) result.shared_bytes = bytes;
    });
  }
  if (!result.in_registers && result.shared_bytes == 0) result.pieces = pieces_of<T, PackBytes>(packs);
  return result;
}

template <class T, int PackBytes>
void forward(const Forward& op, void* stream) {
  const int64_t packs = op.cols * int64_t(sizeof(T)) / PackBytes;
  const auto rows = [&](const char* name, auto* kernel, auto spread, int64_t shared_bytes) {
    constexpr int threads = threads_of<spread.lanes>;
    launch(name, kernel, grid_of(divide_up(op.rows, threads / spread.lanes)), threads, shared_bytes, stream, op);
  };
  if (op.dropout.active) {
    with_spread(packs, DropSpreads(), [&](auto spread) {
      rows("layer_norm forward_rows", forward_rows<T, PackBytes, spread.lanes, spread.packs, true>, spread, 0);
    });
    return;
  }
  const ForwardPlan how = plan<T, PackBytes>(op);
  if (how.pieces.count > 0) {
    const unsigned grid = grid_of(op.rows * how.pieces.count);
    launch("layer_norm forward_moments", forward_moments<T, PackBytes>, grid, long_threads, 0, stream, op, how.pieces);
    launch("layer_norm forward_apply", forward_apply<T, PackBytes>, grid, long_threads, 0, stream, op, how.pieces);
  } else if constexpr (PackBytes < 16) {
    with_spread(packs, OddSpreads(), [&](auto spread) {
      rows("layer_norm forward_odd", forward_odd<T, spread.lanes>, spread, how.shared_bytes);
    });
  } else if (how.in_registers) {
    with_spread(packs, ForwardSpreads(), [&](auto spread) {
      rows("layer_norm forward_rows", forward_rows<T, PackBytes, spread.lanes, spread.packs, false>, spread, 0);
    });
  } else {
    launch("layer_norm forward_shared", forward_shared<T, PackBytes>, grid_of(op.rows), long_threads, how.shared_bytes,
           stream, op);
  }
}

// How backward runs: it depends only on the op and the device, because the caller allocates the partial sums from it.
struct BackwardPlan {
  bool long_rows;
  int blocks;  // each writes one row of partial sums; of backward_columns in y where long_rows
  int shared_bytes;
  Pieces pieces;              // of long rows
  int64_t partial, row_sums;  // values in the workspace: sums of columns; sums of pieces
};

template <class T, int PackBytes>
BackwardPlan plan(const Backward& op) {
  constexpr int width = PackBytes / sizeof(T);
  const Device device = current_device();
  const int parameters = (op.grad_weight != nullptr) + (op.grad_bias != nullptr);
  BackwardPlan result{};
  result.long_rows = true;
  if (op.rows == 0) return result;
  with_spread(op.cols / width, BackwardSpreads<width>(), [&](auto spread) {
    constexpr int threads = threads_of<spread.lanes>, rows_per_block = threads / spread.lanes;
    constexpr int resident = backward_resident<T, PackBytes, spread.packs> / threads;
    const int64_t bytes =
        2 * (op.grad_sum != nullptr ? 3 : 2) * rows_per_block * slot_bytes<PackBytes>(int(op.cols * sizeof(T)));
    constexpr int static_bytes = 2 * threads / 32 * 2 * sizeof(accumulate_t<T>), reserved_bytes = 1024;
    if (bytes + static_bytes > device.shared_per_block) return;
    const int fit = int(device.shared_per_multiprocessor / (bytes + static_bytes + reserved_bytes));
    const int64_t most = int64_t(device.multiprocessors) * std::max(1, std::min(resident, fit));
    result.long_rows = false;
    result.blocks = int(std::min(most, divide_up(op.rows, rows_per_block)));
    result.shared_bytes = int(bytes);
    result.partial = parameters * result.blocks * op.cols;
  });
  if (result.long_rows) {
    // About 8 blocks for each multiprocessor, but at least 16 rows a block, which keeps partial sums a small part of
    // the traffic. A single block's sums are final.
    const int64_t tiles = divide_up(op.cols / width, column_threads);
    const int64_t chunks =
        std::min(divide_up(int64_t(device.multiprocessors) * 8, tiles), divide_up(op.rows, parameters > 0 ? 16 : 1));
    result.blocks = int(std::min<int64_t>(chunks, 65535));
    result.pieces = pieces_of<T, PackBytes>(op.cols / width);
    if (result.blocks > 1) result.partial = parameters * result.blocks * op.cols;
    if (op.grad_input != nullptr) result.row_sums = 2 * op.rows * result.pieces.count;
  }
  return result;
}

template <class T, int PackBytes>
void backward(const Backward& op, void* stream) {
  using A = accumulate_t<T>;
  constexpr int width = PackBytes / sizeof(T);
  const BackwardPlan how = plan<T, PackBytes>(op);
  if (op.rows > 0 && !how.long_rows) {
    with_spread(op.cols / width, BackwardSpreads<width>(), [&](auto spread) {
      const auto rows = [&](auto* kernel) {
        launch("layer_norm backward_rows", kernel, how.blocks, threads_of<spread.lanes>, how.shared_bytes, stream, op);
      };
      op.dropout.active ? rows(backward_rows<T, PackBytes, spread.lanes, spread.packs, true>)
                        : rows(backward_rows<T, PackBytes, spread.lanes, spread.packs, false>);
    });
  } else if (op.rows > 0) {
    A* row_sums = static_cast<A*>(op.partials) + how.partial;
    if (op.grad_input != nullptr) {
      launch("layer_norm backward_sums", backward_sums<PackBytes, T>, grid_of(op.rows * how.pieces.count), long_threads,
             0, stream, op, how.pieces, row_sums);
    }
    const dim3 grid(unsigned(divide_up(op.cols / width, column_threads)), unsigned(how.blocks));
    launch("layer_norm backward_columns", backward_columns<T, PackBytes>, grid, column_threads, 0, stream, op,
           how.pieces, row_sums);
    if (how.blocks == 1) return;
  }
  if (op.grad_weight == nullptr && op.grad_bias == nullptr) return;
  const auto add = [&](auto out) {
    using Out = decltype(out);
    launch_add_partials<A>("layer_norm add_partials", op.partials, how.blocks, op.cols,
                           static_cast<Out*>(op.grad_weight), static_cast<Out*>(op.grad_bias), stream);
  };
  if (op.parameter_dtype == DType::F32) {
    add(float());
  } else {
    add(T());
  }
}

}  // namespace

void forward_cuda(const Forward& op, void* stream) {
  if (op.rows == 0) return;
  with_types(op, [&](auto type, auto pack_bytes) { forward<decltype(type), pack_bytes>(op, stream); });
}

void backward_cuda(const Backward& op, void* stream) {
  with_types(op, [&](auto type, auto pack_bytes) { backward<decltype(type), pack_bytes>(op, stream); });
}

bool can_drop_cuda(const Forward& op) {
  bool found = false;
  with_types(op, [&](auto type, auto pack_bytes) {
    found = with_spread(op.cols * int64_t(sizeof(type)) / pack_bytes, DropSpreads(), [](auto) {});
  });
  return found;
}

bool can_drop_cuda(const Backward& op) {
  bool found = false;
  with_types(op, [&](auto type, auto pack_bytes) { found = !plan<decltype(type), pack_bytes>(op).long_rows; });
  return found;
}

int64_t forward_partials_cuda(const Forward& op) {
  int64_t bytes = 0;
  with_types(op, [&](auto type, auto pack_bytes) {
    const ForwardPlan how = plan<decltype(type), pack_bytes>(op);
    bytes = 3 * op.rows * how.pieces.count * int64_t(sizeof(accumulate_t<decltype(type)>));
  });
  return op.dropout.active ? 0 : bytes;
}

int64_t backward_partials_cuda(const Backward& op) {
  int64_t bytes = 0;
  with_types(op, [&](auto type, auto pack_bytes) {
    const BackwardPlan how = plan<decltype(type), pack_bytes>(op);
    bytes = (how.partial + how.row_sums) * int64_t(sizeof(accumulate_t<decltype(type)>));
  });
  return bytes;
}

}  // namespace dlkit::layer_norm
