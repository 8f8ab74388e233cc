// Contiguous batch_norm of short slices, [N, C, 7, 7] say. A unit is a block of adjacent channels, whose slices fill
// whole cache lines together. A single slice shares its first and last line with its neighbours: channel by channel,
// such a line is fetched twice, and written twice in part. The sums of a vector of slices are found together.
#pragma once

#include "slices.h"

namespace dlkit::batch_norm::DLKIT_ISA {
namespace {

constexpr int64_t kShortSpace = 64;  // elements of a slice, up to which channels go in blocks
template <class T>
constexpr int64_t kBlockChannels = 64 / int64_t(sizeof(T));

bool has_short_channels(const Shape& shape) {
  return shape.groups == 0 && !shape.channels_last && shape.space > 1 && shape.space <= kShortSpace;
}
bool has_channel_blocks(const Forward& op) { return has_short_channels(op.shape) && op.y != nullptr; }
bool has_channel_blocks(const Backward& op) {
  return has_short_channels(op.shape) && !op.statistics_given && !op.sums_given && op.sums == nullptr;
}

template <class T>
Plan plan_of_blocks(const Shape& shape) {
  return plan(shape, (shape.channels + kBlockChannels<T> - 1) / kBlockChannels<T>);
}

// The channels of a unit, and the samples of a part.
template <class T>
struct Block {
  const Shape& shape;
  int64_t first, channels, begin, end;
  Block(const Shape& shape, int64_t unit, int64_t part = 0, int64_t parts = 1)
      : shape(shape),
        first(unit * kBlockChannels<T>),
        channels(min64(kBlockChannels<T>, shape.channels - first)),
        begin(shape.batch * part / parts),
        end(shape.batch * (part + 1) / parts) {}
  int64_t base(int64_t sample) const { return (sample * shape.channels + first) * shape.space; }
  int64_t elements() const { return channels * shape.space; }
  // The distances to the next sample and from the one before, 0 where there is none: lines to ask for.
  int64_t ahead(int64_t sample) const { return sample + 1 < end ? shape.channels * shape.space : 0; }
  int64_t behind(int64_t sample) const { return sample > begin ? shape.channels * shape.space : 0; }
};

// Whether outputs go past the caches: where every block is whole lines.
template <class T>
bool should_stream_blocks(const Shape& shape, const void* output) {
  return is_beyond_caches<T>(shape.batch * shape.channels * shape.space) && uintptr_t(output) % 64 == 0 &&
         shape.channels % kBlockChannels<T> == 0;
}

// What belongs to each channel of a block, as in Channel. Forward has no offset and slope.
template <class T>
struct BlockParameters {
  using A = accumulate_t<T>;
  using V = Vector<A>;
  A mean[kBlockChannels<T>], scale[kBlockChannels<T>], bias[kBlockChannels<T>];
  A offset[kBlockChannels<T>] = {}, slope[kBlockChannels<T>] = {};
  template <class Op>
  BlockParameters(const Op& op, const Block<T>& block) {
    for (int64_t c = 0; c < block.channels; ++c) {
      const int64_t channel = block.first + c;
      mean[c] = static_cast<const A*>(op.mean)[channel];
      scale[c] = static_cast<const A*>(op.rstd)[channel] * read_or<A>(op.weight, op.parameter_dtype, channel, 1);
      bias[c] = read_or<A>(op.bias, op.parameter_dtype, channel, 0);
    }
  }
  DLKIT_INLINE_MEMBER Channel<V> operator[](int64_t c) const {
    return {broadcast<A>(mean[c]), broadcast<A>(scale[c]), broadcast<A>(bias[c]), broadcast<A>(offset[c]),
            broadcast<A>(slope[c])};
  }
};

// A block's output in one sample: put together in the first-level cache where it goes past the caches.
template <class T>
struct BlockOutput {
  alignas(64) T kept[kBlockChannels<T> * kShortSpace];
  bool nt_store;
  explicit BlockOutput(bool nt_store) : nt_store(nt_store) {}
  DLKIT_INLINE_MEMBER T* at(T* output) { return nt_store ? kept : output; }
  DLKIT_INLINE_MEMBER void done(T* output, int64_t count) const {
    if (nt_store) stream_copy(kept, output, count);
  }
};

template <class T>
DLKIT_INLINE void fetch(const T* p, int64_t count) {
  for (int64_t i = 0; i < count; i += 64 / int64_t(sizeof(T))) __builtin_prefetch(p + i, 0, 2);
}

// totals[k][c] += the sum over channel c's slice of what f(c)(i, count, width, terms) adds to terms[k][0, count). Lanes
// past the end must add zero.
template <class A, int kTotals, int64_t kChannels, class F>
DLKIT_INLINE void add_block(int64_t channels, int64_t space, double (&totals)[kTotals][kChannels], const F& f) {
  constexpr int kCount = int(kLanes<A>);
  alignas(64) A found[kTotals][kCount];
  for (int64_t first = 0; first < channels; first += kCount) {
    Vector<A> sums[kTotals][kCount] = {};
    const int64_t count = min64(kCount, channels - first);
    for (int64_t r = 0; r < count; ++r) {
      Vector<A> terms[kTotals][kSlots] = {};
      for_vectors<A, kSlots>(0, space, f(first + r, terms));
      for (int k = 0; k < kTotals; ++k) sums[k][r] = (terms[k][0] + terms[k][1]) + (terms[k][2] + terms[k][3]);
    }
    for (int k = 0; k < kTotals; ++k) {
      store(found[k], sums_of_lanes(sums[k]), All{});
      for (int64_t r = 0; r < kCount; ++r) totals[k][first + r] += double(found[k][r]);
    }
  }
}

template <class T>
struct ForwardBlocks {
  using A = accumulate_t<T>;
  using V = Vector<A>;
  static constexpr int64_t kChannels = kBlockChannels<T>;
  const Forward& op;
  double factor;
  Moments* moments;                                                        // [units, parts, kChannels]
  static int64_t bytes() { return kChannels * int64_t(sizeof(Moments)); }  // of a part

  // As in ForwardContiguous, a run of samples is at most four times as long as all runs before it.
  void reduce(int64_t unit, int64_t part, int64_t parts) const {
    const Block<T> block(op.shape, unit, part, parts);
    const int64_t space = op.shape.space;
    Moments* const found = moments + (unit * parts + part) * kChannels;
    for (int64_t c = 0; c < kChannels; ++c) found[c] = {};
    if (block.begin == block.end) return;
    const T* x = static_cast<const T*>(op.x) + block.base(block.begin);
    double first[1][kChannels] = {}, sums[2][kChannels] = {};
    add_block<A>(block.channels, space, first, [&](int64_t c, auto& terms) DLKIT_INLINE_LAMBDA {
      return [&, row = x + c * space](int64_t i, auto count, auto width) DLKIT_INLINE_LAMBDA {
        repeat(count, [&](int r) DLKIT_INLINE_LAMBDA { terms[0][r] += load(row + i + r * kLanes<A>, width); });
      };
    });
    A centres[kChannels];
    for (int64_t c = 0; c < kChannels; ++c) centres[c] = A(finite_or_zero(first[0][c] / double(space)));
    int64_t run = 1, taken = 0;
    for (int64_t sample = block.begin; sample < block.end; ++sample, x += op.shape.channels * space) {
      const T* const next = x + block.ahead(sample);
      add_block<A>(block.channels, space, sums, [&](int64_t c, auto& terms) DLKIT_INLINE_LAMBDA {
        fetch(next + c * space, space);
        return [&, row = x + c * space, centre = broadcast<A>(centres[c])](int64_t i, auto count, auto width)
                   DLKIT_INLINE_LAMBDA {
                     repeat(count, [&](int r) DLKIT_INLINE_LAMBDA {
                       const V d = keep(load(row + i + r * kLanes<A>, width) - centre, width);
                       terms[0][r] += d;
                       terms[1][r] = fma(d, d, terms[1][r]);
                     });
                   };
      });
      if (++taken < run && sample + 1 < block.end) continue;
      for (int64_t c = 0; c < block.channels; ++c) {
        found[c].add(double(taken * space), double(centres[c]), sums[0][c], sums[1][c]);
        centres[c] = A(finite_or_zero(found[c].mean));
        sums[0][c] = sums[1][c] = 0;
      }
      run = 4 * (sample + 1 - block.begin);
      taken = 0;
    }
  }

  void finish(int64_t unit, int64_t parts) const {
    const Block<T> block(op.shape, unit);
    double means[kChannels], m2s[kChannels];
    const double count = double(op.shape.batch * op.shape.space);
    for (int64_t c = 0; c < block.channels; ++c) {
      Moments all;
      for (int64_t part = 0; part < parts; ++part) {
        const Moments& some = moments[(unit * parts + part) * kChannels + c];
        if (some.count > 0) all.merge(some);
      }
      const T* const x = static_cast<const T*>(op.x) + block.base(0) + c * op.shape.space;
      const int64_t pitch = op.shape.channels * op.shape.space;
      add_large_in_double<A>(count, all.mean, all.m2, [&](int64_t i) {
        return double(widen(x[i / op.shape.space * pitch + i % op.shape.space]));
      });
      means[c] = all.mean;
      m2s[c] = all.m2;
    }
    finish_groups<A>(op, block.first, block.channels, means, m2s, count, factor);
  }

  void apply(int64_t unit, int64_t part, int64_t parts) const {
    const Block<T> block(op.shape, unit, part, parts);
    const BlockParameters<T> parameters(op, block);
    BlockOutput<T> output(should_stream_blocks<T>(op.shape, op.y));
    for (int64_t sample = block.end; sample-- > block.begin;) {
      if (op.residual != nullptr) {
        fetch(static_cast<const T*>(op.residual) + block.base(sample) - block.behind(sample), block.elements());
      }
      apply_to(block, sample, parameters, output);
    }
  }

  void apply_to(const Block<T>& block, int64_t sample, const BlockParameters<T>& parameters,
                BlockOutput<T>& output) const {
    const int64_t base = block.base(sample), space = op.shape.space;
    const AfterNorm<A> after(op);
    T *const y = static_cast<T*>(op.y) + base, *to = output.at(y);
    const T *x = static_cast<const T*>(op.x) + base, *residual = at<const T>(op.residual, base);
    for (int64_t c = 0; c < block.channels; ++c, x += space, to += space) {
      const Channel<V> channel = parameters[c];
      for_vectors<A, kSlots>(0, space, [&](int64_t i, auto count, auto width) DLKIT_INLINE_LAMBDA {
        const auto index = [&](int r) DLKIT_INLINE_LAMBDA { return i + r * kLanes<A>; };
        forward_values<count()>(x, residual, after, width, channel, index, [&](const auto& z) DLKIT_INLINE_LAMBDA {
          write_all(z, width, false, [&](int r) DLKIT_INLINE_LAMBDA { return to + index(r); });
        });
      });
      if (residual != nullptr) residual += space;
    }
    output.done(y, block.elements());
  }

  // Where nothing is to be found first: all samples as they lie in memory.
  void apply_in_memory_order(int64_t units) const {
    auto* const parameters = static_cast<BlockParameters<T>*>(op.workspace);
    for (int64_t unit = 0; unit < units; ++unit) {
      const Block<T> block(op.shape, unit);
      finish_given_groups<A>(op, block.first, block.channels);
      parameters[unit] = BlockParameters<T>(op, block);
    }
    const int64_t grain = max64(1, kGrain / (kChannels * op.shape.space));
    parallel_for(op.shape.batch * units, grain, [&](int64_t begin, int64_t end) {
      BlockOutput<T> output(should_stream_blocks<T>(op.shape, op.y));
      for (int64_t i = begin; i < end; ++i) {
        apply_to(Block<T>(op.shape, i % units), i / units, parameters[i % units], output);
      }
    });
  }
};

template <class T>
struct BackwardBlocks {
  using A = accumulate_t<T>;
  using V = Vector<A>;
  static constexpr int64_t kChannels = kBlockChannels<T>;
  const Backward& op;
  double* sums;  // [units, parts, 2, kChannels]: of g, and of g * (x - mean)
  static int64_t bytes() { return 2 * kChannels * int64_t(sizeof(double)); }  // of a part

  void reduce(int64_t unit, int64_t part, int64_t parts) const {
    const Block<T> block(op.shape, unit, part, parts);
    const int64_t space = op.shape.space;
    const BlockParameters<T> parameters(op, block);
    const Passing<T> whole(op, mask_of(op));
    T* const passed = static_cast<T*>(passed_gradient(op));
    double found[2][kChannels] = {};
    for (int64_t sample = block.begin; sample < block.end; ++sample) {
      const int64_t base = block.base(sample), ahead = block.ahead(sample);
      const T* const x = static_cast<const T*>(op.x) + base;
      const T* const grad_output = static_cast<const T*>(op.grad_output) + base;
      T* const to = at<T>(passed, base);
      const Passing<T> here = whole.from(base);
      add_block<A>(block.channels, space, found, [&](int64_t c, auto& terms) DLKIT_INLINE_LAMBDA {
        const int64_t slice = c * space;
        fetch(x + ahead + slice, space);
        fetch(grad_output + ahead + slice, space);
        if (here.source != nullptr) fetch(here.source + ahead + slice, space);
        return [&, slice, channel = parameters[c], passing = here.from(slice)](int64_t i, auto count, auto width)
                   DLKIT_INLINE_LAMBDA {
                     const auto index = [&](int r) DLKIT_INLINE_LAMBDA { return i + r * kLanes<A>; };
                     V centred[count()], g[count()];
                     repeat(count, [&](int r) DLKIT_INLINE_LAMBDA {
                       centred[r] = keep(load(x + slice + index(r), width) - channel.mean, width);
                     });
                     masked_gradients(passing, grad_output + slice, width, centred, channel, g, index);
                     repeat(count, [&](int r) DLKIT_INLINE_LAMBDA {
                       terms[0][r] += g[r];
                       terms[1][r] = fma(g[r], centred[r], terms[1][r]);
                     });
                     if (to == nullptr) return;
                     write_all(g, width, false, [&](int r) DLKIT_INLINE_LAMBDA { return to + slice + index(r); });
                   };
      });
    }
    memcpy(sums + (unit * parts + part) * 2 * kChannels, found, sizeof(found));
  }

  // Adds the parts up into the first, and writes the parameters' gradients.
  void finish(int64_t unit, int64_t parts) const {
    const Block<T> block(op.shape, unit);
    double* const all = sums + unit * parts * 2 * kChannels;
    for (int64_t i = 2 * kChannels; i < parts * 2 * kChannels; ++i) all[i % (2 * kChannels)] += all[i];
    double of_weight[kChannels];
    for (int64_t c = 0; c < block.channels; ++c) {
      check_range<A>(op, all[c]);
      check_range<A>(op, all[kChannels + c]);
      of_weight[c] = all[kChannels + c] * double(static_cast<const A*>(op.rstd)[block.first + c]);
    }
    write_values(op.grad_weight, op.parameter_dtype, block.first, block.channels, of_weight);
    write_values(op.grad_bias, op.parameter_dtype, block.first, block.channels, all);
  }

  void apply(int64_t unit, int64_t part, int64_t parts) const {
    const Block<T> block(op.shape, unit, part, parts);
    const int64_t space = op.shape.space;
    const double* const all = sums + unit * parts * 2 * kChannels;
    BlockParameters<T> parameters(op, block);
    for (int64_t c = 0; c < block.channels; ++c) {
      const double weight = read_or<A>(op.weight, op.parameter_dtype, block.first + c, 1);
      const double rstd = double(static_cast<const A*>(op.rstd)[block.first + c]);
      const GroupGradient<A> gradient(op, rstd, weight * all[c], weight * all[kChannels + c]);
      parameters.offset[c] = gradient.offset;
      parameters.slope[c] = gradient.slope;
    }
    const Passing<T> whole(op, applied_mask(op));
    BlockOutput<T> output(!is_applied_in_place(op) && should_stream_blocks<T>(op.shape, op.grad_input));
    for (int64_t sample = block.end; sample-- > block.begin;) {
      const int64_t base = block.base(sample);
      T *const grad_input = static_cast<T*>(op.grad_input) + base, *const to = output.at(grad_input);
      for (int64_t c = 0; c < block.channels; ++c) {
        const int64_t slice = c * space;
        const T* const x = static_cast<const T*>(op.x) + base + slice;
        const T* const gradients = static_cast<const T*>(applied_gradient(op)) + base + slice;
        const Channel<V> channel = parameters[c];
        const Passing<T> passing = whole.from(base + slice);
        for_vectors<A, kSlots>(0, space, [&](int64_t i, auto count, auto width) DLKIT_INLINE_LAMBDA {
          const auto index = [&](int r) DLKIT_INLINE_LAMBDA { return i + r * kLanes<A>; };
          backward_values<count()>(
              passing, x, gradients, width, channel, index, [](const auto&) {},
              [&](const auto& g) DLKIT_INLINE_LAMBDA {
                write_all(g, width, false, [&](int r) DLKIT_INLINE_LAMBDA { return to + slice + index(r); });
              });
        });
      }
      output.done(grad_input, block.elements());
    }
  }
};

}  // namespace
}  // namespace dlkit::batch_norm::DLKIT_ISA
