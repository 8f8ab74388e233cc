// batch_norm, group_norm and instance_norm on the CPU.
//
// Both layouts and both directions run as the same three steps over units, which share no statistics, and parts of a
// unit: reduce (sums over a part), finish (statistics or factors from the unit's sums), apply (elementwise, over a
// part). Contiguous, a unit is one statistic group: slices of adjacent elements, or a block of channels where these are
// short; with channels_last it is a matrix of rows by channels, one for each sample (group_norm) or one in all
// (batch_norm). Where there are units enough, one task takes a unit through all three steps, and a unit that fits a
// cache is read from memory only once; else all parts take each step together. apply goes through a part backwards,
// block by block, beginning with the blocks that the caches still hold. Backward's reduce writes the activation's
// gradient into the residual's gradient if there is one, and apply reads it there; with given statistics reduce writes
// grad_input as well, and there is no apply.
//
// A ReLU is part of the loops. Other activations are calls on a few vectors at a time, which need no loops of their
// own. Backward computes z again, only once: the activation's gradient is kept for apply where grad_input will be.
//
// Statistics take one pass: deviations from a centre, which is the mean so far, go into fp32 sums over a run, and
// these, with their centre, into a double mean and sum of squared deviations. A run is at most four times as long as
// all runs before it: if its centre is far from its own mean, its elements are also far from the mean of all, and
// nothing cancels.
//
// The division into parts depends only on the shape: the number of threads never changes a bit.
#include "cpu/channel_blocks.h"
#include "cpu/channels_last.h"
#include "cpu/contiguous.h"
#include "cpu/rows.h"
#include "cpu/slices.h"

namespace dlkit::batch_norm {
namespace DLKIT_ISA {
namespace {

// The gradients of group_norm's parameters: each sample's sums, from sums_of(n, c), added up in the batch's order.
template <class A, class F>
void finish_parameters(const Backward& op, const F& sums_of) {
  const Shape& shape = op.shape;
  const int64_t size = shape.channels / shape.groups;
  parallel_for(shape.channels, max64(1, kGrain / shape.batch), [&](int64_t begin, int64_t end) {
    for (int64_t channel = begin; channel < end; ++channel) {
      Sums total;
      for (int64_t sample = 0; sample < shape.batch; ++sample) {
        const Sums some = sums_of(sample, channel);
        total.g += some.g;
        total.gx += some.gx * double(static_cast<const A*>(op.rstd)[sample * shape.groups + channel / size]);
      }
      if (op.grad_weight != nullptr) write_one(op.grad_weight, op.parameter_dtype, channel, total.gx);
      if (op.grad_bias != nullptr) write_one(op.grad_bias, op.parameter_dtype, channel, total.g);
    }
  });
}

}  // namespace

void forward(const Forward& op) {
  if (groups_are_rows(op)) return with_accumulate(op.dtype, [&](auto a) { forward_rows<decltype(a)>(op); });
  if (has_short_slices(op)) return with_data_type(op.dtype, [&](auto t) { forward_slices<decltype(t)>(op); });
  const Plan p = plan(op.shape);
  const bool compute = op.statistics == Statistics::Compute;
  const double factor = running_factor(op);
  with_data_type(op.dtype, [&](auto t) {
    using T = decltype(t);
    if (op.shape.channels_last) {
      run(ForwardChannelsLast<T>{op, factor, Matrix(op.shape)}, p, compute, op.y != nullptr);
    } else if (has_channel_blocks(op)) {
      const ForwardBlocks<T> side{op, factor, static_cast<Moments*>(op.workspace)};
      const Plan blocks = plan_of_blocks<T>(op.shape);
      compute ? run(side, blocks, true, true) : side.apply_in_memory_order(blocks.units);
    } else {
      const ForwardContiguous<T> side{op, factor, static_cast<Moments*>(op.workspace)};
      !compute&& op.y != nullptr ? side.apply_in_memory_order() : run(side, p, compute, op.y != nullptr);
    }
  });
  if (compute && op.num_batches_tracked != nullptr) ++*op.num_batches_tracked;
}

void backward(const Backward& op) {
  if (groups_are_rows(op)) return with_accumulate(op.dtype, [&](auto a) { backward_rows<decltype(a)>(op); });
  if (has_short_slices(op)) return with_data_type(op.dtype, [&](auto t) { backward_slices<decltype(t)>(op); });
  const Plan p = plan(op.shape);
  // With given statistics reduce does everything.
  const bool reduce = !op.sums_given;
  const bool apply = !reduce || (op.grad_input != nullptr && !op.statistics_given);
  const bool parameters = op.shape.groups > 0 && (op.grad_weight != nullptr || op.grad_bias != nullptr);
  with_data_type(op.dtype, [&](auto t) {
    using T = decltype(t);
    using A = accumulate_t<T>;
    if (op.shape.channels_last) {
      const BackwardChannelsLast<T> side{op, Matrix(op.shape)};
      run(side, p, reduce, apply);
      if (!parameters) return;
      finish_parameters<A>(op, [&](int64_t sample, int64_t channel) {
        const Scratch<A> own = side.scratch(sample, 0, p.parts);
        return Sums{own.first[channel], own.second[channel]};
      });
    } else if (has_channel_blocks(op)) {
      run(BackwardBlocks<T>{op, static_cast<double*>(op.workspace)}, plan_of_blocks<T>(op.shape), true, apply);
    } else {
      const BackwardContiguous<T> side{op, static_cast<Sums*>(op.workspace)};
      run(side, p, reduce, apply);
      if (!parameters) return;
      const int64_t size = op.shape.channels / op.shape.groups;
      finish_parameters<A>(op, [&](int64_t sample, int64_t channel) {
        return side.sums[(sample * op.shape.groups + channel / size) * p.parts * size + channel % size];
      });
    }
  });
}

#if defined(DLKIT_ISA_IS_BASELINE)
static int64_t scratch_bytes(const Shape& shape, DType type) {
  const Plan p = plan(shape);
  return with_accumulate(type,
                         [&](auto a) { return p.units * p.parts * Scratch<decltype(a)>::bytes(Matrix(shape).pitch); });
}

static int64_t slices_bytes(const Shape& shape, DType type) {
  return with_accumulate(type, [&](auto a) { return SliceValues<decltype(a)>::bytes(shape); });
}

// bytes(T(), the number of blocks, that of parts).
template <class F>
static int64_t blocks_bytes(const Shape& shape, DType type, const F& bytes) {
  int64_t found = 0;
  with_data_type(type, [&](auto t) {
    const Plan p = plan_of_blocks<decltype(t)>(shape);
    found = bytes(t, p.units, p.parts);
  });
  return found;
}

int64_t forward_bytes(const Forward& op) {
  if (groups_are_rows(op)) {
    return with_accumulate(op.dtype, [&](auto a) { return forward_rows_bytes<decltype(a)>(op); });
  }
  if (has_short_slices(op)) return slices_bytes(op.shape, op.dtype);
  if (op.shape.channels_last) return scratch_bytes(op.shape, op.dtype);
  if (has_channel_blocks(op)) {
    return blocks_bytes(op.shape, op.dtype, [&](auto t, int64_t blocks, int64_t parts) -> int64_t {
      return op.statistics == Statistics::Compute ? blocks * parts * ForwardBlocks<decltype(t)>::bytes()
                                                  : blocks * int64_t(sizeof(BlockParameters<decltype(t)>));
    });
  }
  const Plan p = plan(op.shape);
  return op.statistics == Statistics::Compute ? p.units * p.parts * int64_t(sizeof(Moments)) : 0;
}

int64_t backward_bytes(const Backward& op) {
  if (groups_are_rows(op)) {
    return with_accumulate(op.dtype, [&](auto a) { return backward_rows_bytes<decltype(a)>(op); });
  }
  if (has_short_slices(op)) return slices_bytes(op.shape, op.dtype);
  if (op.shape.channels_last) return scratch_bytes(op.shape, op.dtype);
  if (has_channel_blocks(op)) {
    return blocks_bytes(op.shape, op.dtype, [](auto t, int64_t blocks, int64_t parts) {
      return blocks * parts * BackwardBlocks<decltype(t)>::bytes();
    });
  }
  const Plan p = plan(op.shape);
  const int64_t sums = op.shape.groups > 0 ? op.shape.channels / op.shape.groups : 1;
  return p.units * p.parts * sums * int64_t(sizeof(Sums));
}
#endif

}  // namespace DLKIT_ISA

DLKIT_CPU_ENTRY(forward_cpu, forward, Forward)
DLKIT_CPU_ENTRY(backward_cpu, backward, Backward)
#if defined(DLKIT_ISA_IS_BASELINE)
int64_t forward_workspace_cpu(const Forward& op) { return baseline::forward_bytes(op); }
int64_t backward_workspace_cpu(const Backward& op) { return baseline::backward_bytes(op); }
#endif

}  // namespace dlkit::batch_norm
