// Batch norm and group norm on CUDA, with the residual add and the activation after them. What each way moves, in
// units of one tensor of x's shape (a residual or a y that is read adds one where it is read):
//
//   forward    one block holds whole groups in shared memory where they fit: 2, the least there is. Else a pass for
//              the statistics and a pass that applies them: 3, less what the second still finds in L2. It walks from
//              the end for that, and y is written so that it leaves L2 first.
//   backward   likewise 3 where whole groups fit. Else a pass for the sums and one for grad_input: 5, less L2 hits. A
//              grad_residual is written in the first pass and is what the second reads in place of grad_output and y.
//              With given statistics (evaluation) grad_input needs no sums: one pass, 2, or 3 with parameter gradients.
//
// The two layouts differ only in who owns what. A column is what has sums of its own: a channel, in group norm a
// channel of one sample. Contiguous: the planes of a column are runs of memory, and a team of adjacent threads, up to a
// block, owns one column. channels_last: a thread owns a pack of adjacent columns and walks down rows. A pass cuts each
// column into pieces by the shape alone; a thread's moments of a few packs at a time are computed in two passes over
// registers, merged by Chan's formula along fixed trees to one entry a piece, and a small kernel merges the pieces in
// double: no atomics, the same bits every run.
//
// Small groups share a block only while there are two blocks for each multiprocessor: 64 groups of 1 KB, 16 threads
// each, would otherwise be 4 blocks, 128 of an H200's 132 multiprocessors idle; apart they are 64 blocks of one warp,
// which moves the same bytes with 16 times as many multiprocessors' loads in flight. No kernel changes by it.
//
// Activations other than the ReLU are in kernels of their own (Acts), the passes alone: a switch inside, and the code
// of all of them, would cost the others registers.
//
// In flight are 4 packs of 16 bytes a thread (backward: 2 of each tensor), 32 KB and more a multiprocessor, where 4.8
// TB/s and 0.8 us of latency ask for 29 KB on an H200. Not yet run on a GPU.
#include <algorithm>

#include "../common/dispatch.h"
#include "cuda/backward.cuh"
#include "cuda/forward.cuh"
#include "kernel.h"

namespace dlkit::batch_norm {
namespace {

using namespace dlkit::cuda;

int ceil_log2(int64_t n) {
  int bits = 0;
  while (int64_t(1) << bits < n) ++bits;
  return bits;
}
int floor_log2(int64_t n) { return ceil_log2(n / 2 + 1); }

template <class T, int PackBytes, bool ChannelsLast>
Walk walk_of(const Shape& shape) {
  constexpr int width = PackBytes / sizeof(T);
  const int64_t slices = shape.groups > 0 ? 1 : shape.batch;
  Walk walk{};
  walk.channels = shape.channels;
  walk.columns = shape.groups > 0 ? shape.batch * shape.channels : shape.channels;
  walk.per_group = shape.groups > 0 ? shape.channels / shape.groups : 1;
  walk.groups = walk.columns / walk.per_group;
  walk.group_lanes = 1 << std::min(5, ceil_log2(walk.per_group));
  if (ChannelsLast) {
    walk.units = walk.columns / width;
    walk.positions = walk.slice_positions = slices * shape.space;
    walk.position_stride = shape.channels;
    walk.channel_stride = 1;
  } else {
    walk.units = walk.columns;
    walk.slice_positions = shape.space / width;
    walk.positions = slices * walk.slice_positions;
    walk.position_stride = width;
    walk.slice_stride = shape.channels * shape.space;
    walk.channel_stride = shape.space;
  }
  walk.sample_stride = shape.channels * shape.space;
  const auto offset = [&](int64_t position) {
    return position / walk.slice_positions * walk.slice_stride + position % walk.slice_positions * walk.position_stride;
  };
  walk.middle_offset = offset(walk.positions / 2);
  walk.last_offset = offset(walk.positions - 1);
  return walk;
}

int64_t step_of(const Walk& walk, bool channels_last) {
  return channels_last ? walk.threads >> walk.lane_bits : int64_t(1) << walk.lane_bits;
}

// Completes a walk whose threads, lane_bits, units_per_block and piece are set.
void complete(Walk& walk, bool channels_last) {
  const int64_t step = step_of(walk, channels_last), slices = step / walk.slice_positions;
  walk.pieces = divide_up(walk.positions, walk.piece);
  walk.tiles = divide_up(walk.units, walk.units_per_block);
  walk.steps = int(divide_up(walk.piece, step));
  if (channels_last) {
    walk.step_offset = step * walk.position_stride;
  } else {
    walk.step_position = step - slices * walk.slice_positions;
    walk.step_offset = slices * walk.slice_stride + walk.step_position * walk.position_stride;
    walk.wrap_offset = walk.slice_stride - walk.slice_positions * walk.position_stride;
  }
}

// For the passes: some 2048 blocks, but 8 to 64 packs a thread; 16 in group norm, where a sample's bits must not depend
// on how many others there are.
template <class T, int PackBytes, bool ChannelsLast>
void cut_into_pieces(Walk& walk, int64_t groups) {
  constexpr int columns = ChannelsLast ? PackBytes / sizeof(T) : 1;
  walk.threads = pass_threads;
  walk.lane_bits = ChannelsLast ? std::min(5, ceil_log2(walk.channels / columns))
                                : std::min(8, floor_log2(std::max<int64_t>(1, walk.positions / 2)));
  walk.units_per_block = ChannelsLast ? 1 << walk.lane_bits : pass_threads >> walk.lane_bits;
  const int64_t step = step_of(walk, ChannelsLast);
  const int64_t depth =
      groups > 0 ? 16 : std::clamp<int64_t>(walk.units * walk.positions / (pass_threads * 2048), 8, 64);
  walk.piece = step * divide_up(divide_up(walk.positions, divide_up(walk.positions, step * depth)), step);
  complete(walk, ChannelsLast);
}

// For the kernels whose blocks hold whole groups: the dynamic shared memory they need, or 0 where they cannot.
template <class T, int PackBytes, bool ChannelsLast>
int64_t fit_into_blocks(Walk& walk, int tensors) {
  constexpr int columns = ChannelsLast ? PackBytes / sizeof(T) : 1;
  constexpr int exchanged = Moments<accumulate_t<T>, columns, std::is_same_v<T, accumulate_t<T>>>::size;
  const Device device = current_device();
  const int64_t limit = device.shared_per_block;
  const auto try_lanes = [&](int lane_bits, int64_t units, int64_t threads) -> int64_t {
    walk.lane_bits = lane_bits;
    walk.units_per_block = int(units);
    walk.threads = int(threads);
    walk.piece = walk.positions;
    complete(walk, ChannelsLast);
    const int64_t values =
        3 * units * columns + 2 * (units * columns / walk.per_group) + threads * exchanged / (ChannelsLast ? 2 : 1);
    const int64_t bytes = int64_t(tensors) * walk.steps * threads * PackBytes + values * sizeof(accumulate_t<T>);
    return bytes <= limit ? bytes : 0;
  };
  if (walk.positions > limit) return 0;
  if (!ChannelsLast) {
    if (walk.per_group > block_threads) return 0;
    // Some 8 packs a thread, but adjacent threads in 128 bytes.
    const int coalesced = std::min(ceil_log2(walk.positions), PackBytes == 16 ? 3 : 5);
    const int lane_bits =
        std::min(floor_log2(block_threads / walk.per_group), std::max(coalesced, ceil_log2(walk.positions / 8)));
    // Several small groups a block, but two blocks a multiprocessor come first. A group's threads are the same either
    // way.
    const int64_t packed =
        std::min<int64_t>(256 / (walk.per_group << lane_bits), walk.groups / (2 * int64_t(device.multiprocessors)));
    const int64_t units = walk.per_group * std::max<int64_t>(1, packed);
    return try_lanes(lane_bits, units, divide_up(units << lane_bits, 32) * 32);
  }
  // 128 bytes of a row at a time, more where there are few rows or a group is wider, 64 where that does not fit.
  const int row_bits = ceil_log2(walk.positions);
  for (const int lane_bits : {std::clamp(8 - row_bits, 3, 7), 3, 4, 5, 6, 7, 2}) {
    if ((columns << lane_bits) % walk.per_group != 0) continue;
    const int64_t threads =
        std::clamp<int64_t>(int64_t(1) << std::max(lane_bits, lane_bits + row_bits - 2), 64, block_threads);
    const int64_t bytes = try_lanes(lane_bits, int64_t(1) << lane_bits, threads);
    if (bytes > 0) return bytes;
  }
  return 0;
}

// Whether 16 bytes at a time will do.
bool wide(const Forward& op, bool channels_last) {
  return are_aligned(16, op.x, op.residual, op.y) &&
         (!channels_last || are_aligned(16, op.weight, op.bias, op.mean, op.rstd, op.running_mean, op.running_var));
}
bool wide(const Backward& op, bool channels_last) {
  return are_aligned(16, op.grad_output, op.x, op.y_or_residual, op.grad_input, op.grad_residual) &&
         (!channels_last || are_aligned(16, op.weight, op.bias, op.mean, op.rstd, op.sums));
}

// Calls f(T(), PackBytes, ChannelsLast), the latter two as integral constants. Where space is 1 both layouts are the
// same memory, and a thread to a channel suits it better; so they are with one channel, and the other way round.
template <class Op, class F>
void with_types(const Op& op, const F& f) {
  const bool channels_last = op.shape.channels > 1 && (op.shape.channels_last || op.shape.space == 1);
  const auto with_layout = [&](auto type, auto pack_bytes) {
    channels_last ? f(type, pack_bytes, std::true_type()) : f(type, pack_bytes, std::false_type());
  };
  with_type(op.dtype, [&](auto type) {
    constexpr int element = sizeof(type);
    const bool whole = (channels_last ? op.shape.channels : op.shape.space) * element % 16 == 0;
    if (whole && wide(op, channels_last)) {
      with_layout(type, std::integral_constant<int, 16>());
    } else {
      with_layout(type, std::integral_constant<int, element>());
    }
  });
}

// Whether the op's activation takes kernels of its own.
template <class Op>
bool acts(const Op& op) {
  return op.activation != Activation::None && op.activation != Activation::Relu;
}

// How an op runs: a pure function of the op and the device, because the caller allocates the workspace by it.
struct Plan {
  Walk walk;
  bool sums;               // statistics, or sums of gradients, are to be computed
  int64_t shared_bytes;    // of a block that holds whole groups; 0: in passes
  int64_t partial, total;  // values in the workspace: of the pieces; of sums or means
};

template <class T, int PackBytes, bool ChannelsLast>
Plan plan(const Forward& op) {
  Plan result{walk_of<T, PackBytes, ChannelsLast>(op.shape), op.statistics == Statistics::Compute, 0, 0, 0};
  // A cumulative average has to count the batch before any block uses the count.
  if (result.sums && op.y != nullptr && op.momentum >= 0 && !acts(op)) {
    result.shared_bytes = fit_into_blocks<T, PackBytes, ChannelsLast>(result.walk, 1);
  }
  if (result.shared_bytes == 0) {
    cut_into_pieces<T, PackBytes, ChannelsLast>(result.walk, op.shape.groups);
    if (result.sums) result.partial = 2 * result.walk.pieces * result.walk.columns;
  }
  return result;
}

template <class T, int PackBytes, bool ChannelsLast>
void forward(const Forward& op, void* stream) {
  using A = accumulate_t<T>;
  const Plan how = plan<T, PackBytes, ChannelsLast>(op);
  const Walk& walk = how.walk;
  const unsigned grid = grid_of(walk.blocks());
  constexpr int64_t elements = ChannelsLast ? 1 : PackBytes / sizeof(T);  // of a column at a position
  A* partial = static_cast<A*>(op.workspace);
  if (how.shared_bytes > 0) {
    const double count = double(walk.positions * elements);
    launch("batch_norm forward_block", forward_block<T, PackBytes, ChannelsLast>, grid, walk.threads, how.shared_bytes,
           stream, op, walk, count, 1 / count);
    return;
  }
  if (how.sums) {
    launch("batch_norm forward_statistics", forward_statistics<T, ChannelsLast, PackBytes>, grid, pass_threads, 0,
           stream, op, walk, partial);
    launch("batch_norm forward_finish", forward_finish<A>, grid_of(divide_up(walk.groups, finish_lanes)),
           finish_threads, 0, stream, op, walk, elements, partial);
  }
  if (op.y != nullptr || op.statistics == Statistics::Running) {
    const auto apply =
        acts(op) ? forward_apply<T, PackBytes, ChannelsLast, true> : forward_apply<T, PackBytes, ChannelsLast, false>;
    launch("batch_norm forward_apply", apply, grid, pass_threads, 0, stream, op, walk);
  }
}

template <class T, int PackBytes, bool ChannelsLast>
Plan plan(const Backward& op) {
  const bool through_statistics = op.grad_input != nullptr && !op.statistics_given;
  const bool parameters = op.grad_weight != nullptr || op.grad_bias != nullptr;
  Plan result{walk_of<T, PackBytes, ChannelsLast>(op.shape),
              !op.sums_given && (through_statistics || parameters || op.sums != nullptr), 0, 0, 0};
  Walk& walk = result.walk;
  if (result.sums && through_statistics && op.sums == nullptr && !acts(op)) {
    result.shared_bytes = fit_into_blocks<T, PackBytes, ChannelsLast>(walk, op.y_or_residual != nullptr ? 3 : 2);
  }
  if (result.shared_bytes > 0) {
    if (op.shape.groups > 0 && parameters) result.partial = 2 * walk.columns;
  } else {
    cut_into_pieces<T, PackBytes, ChannelsLast>(walk, op.shape.groups);
    if (result.sums) {
      result.partial = 2 * walk.pieces * walk.columns;
      if (through_statistics && op.sums == nullptr) result.total = 2 * walk.groups;
    }
  }
  return result;
}

template <class T, int PackBytes, bool ChannelsLast>
void backward(const Backward& op, void* stream) {
  using A = accumulate_t<T>;
  const Plan how = plan<T, PackBytes, ChannelsLast>(op);
  const Walk& walk = how.walk;
  const unsigned grid = grid_of(walk.blocks());
  A* partial = how.partial > 0 ? static_cast<A*>(op.workspace) : nullptr;
  A* total = how.total > 0 ? static_cast<A*>(op.workspace) + how.partial : static_cast<A*>(op.sums);
  const auto channels = [&](A* sums) {
    launch("batch_norm backward_channels", backward_channels<A>, grid_of(divide_up(walk.channels, finish_lanes)),
           finish_threads, 0, stream, op, walk, partial, sums);
  };
  if (how.shared_bytes > 0) {
    launch("batch_norm backward_block", backward_block<T, PackBytes, ChannelsLast>, grid, walk.threads,
           how.shared_bytes, stream, op, walk, partial);
    if (partial != nullptr) channels(nullptr);
    return;
  }
  Backward rest = op;
  if (how.sums) {
    const auto pass = acts(op) ? backward_pass<T, PackBytes, ChannelsLast, true, true>
                               : backward_pass<T, PackBytes, ChannelsLast, true, false>;
    launch("batch_norm backward_pass", pass, grid, pass_threads, 0, stream, op, walk, partial, nullptr);
    if (op.shape.groups == 0) channels(total);
    if (op.shape.groups > 0 && (op.grad_weight != nullptr || op.grad_bias != nullptr)) channels(nullptr);
    if (op.shape.groups > 0 && total != nullptr) {
      launch("batch_norm backward_groups", backward_groups<A>, grid_of(divide_up(walk.groups, finish_lanes)),
             finish_threads, 0, stream, op, walk, partial, total);
    }
    if (op.grad_residual != nullptr) {
      rest.grad_output = op.grad_residual;
      rest.grad_residual = nullptr;
      rest.activation = Activation::None;
    }
    if (op.statistics_given) rest.grad_input = nullptr;
  }
  if (rest.grad_input != nullptr || rest.grad_residual != nullptr) {
    const auto pass = acts(rest) ? backward_pass<T, PackBytes, ChannelsLast, false, true>
                                 : backward_pass<T, PackBytes, ChannelsLast, false, false>;
    launch("batch_norm backward_pass", pass, grid, pass_threads, 0, stream, rest, walk, nullptr, total);
  }
}

template <class Op>
int64_t workspace(const Op& op) {
  int64_t bytes = 0;
  with_types(op, [&](auto type, auto pack_bytes, auto channels_last) {
    using T = decltype(type);
    const Plan how = plan<T, pack_bytes, channels_last>(op);
    bytes = (how.partial + how.total) * int64_t(sizeof(accumulate_t<T>));
  });
  return bytes;
}

}  // namespace

void forward_cuda(const Forward& op, void* stream) {
  with_types(op, [&](auto type, auto pack_bytes, auto channels_last) {
    forward<decltype(type), pack_bytes, channels_last>(op, stream);
  });
}

void backward_cuda(const Backward& op, void* stream) {
  with_types(op, [&](auto type, auto pack_bytes, auto channels_last) {
    backward<decltype(type), pack_bytes, channels_last>(op, stream);
  });
}

int64_t forward_workspace_cuda(const Forward& op) { return workspace(op); }
int64_t backward_workspace_cuda(const Backward& op) { return workspace(op); }

}  // namespace dlkit::batch_norm
