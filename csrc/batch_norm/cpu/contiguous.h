// Contiguous: a unit is a statistic group, `slices` times `length` adjacent elements.
#pragma once

#include "shared.h"

namespace dlkit::batch_norm::DLKIT_ISA {
namespace {

struct Group {
  int64_t base, slices, pitch, length, channel;
  bool own_channels;  // each slice is a channel of its own, else all are the same
  int64_t channel_of(int64_t slice) const { return own_channels ? channel + slice : channel; }
};

Group group_of(const Shape& shape, int64_t unit) {
  if (shape.groups == 0) {
    return {unit * shape.space, shape.batch, shape.channels * shape.space, shape.space, unit, false};
  }
  const int64_t size = shape.channels / shape.groups;
  return {unit * size * shape.space, size, shape.space, shape.space, unit % shape.groups * size, true};
}

// Calls f(slice, begin, end) for each slice's share of a part, forwards or backwards.
template <class F>
DLKIT_INLINE void for_slices(const Group& group, int64_t part, int64_t parts, bool backwards, const F& f) {
  const int64_t total = group.slices * group.length;
  if (parts == 1) {
    for (int64_t k = 0; k < group.slices; ++k) f(backwards ? group.slices - 1 - k : k, int64_t(0), group.length);
    return;
  }
  const int64_t first = total * part / parts, last = total * (part + 1) / parts;
  if (first == last) return;
  const int64_t first_slice = first / group.length, last_slice = (last - 1) / group.length;
  for (int64_t k = 0; k <= last_slice - first_slice; ++k) {
    const int64_t slice = backwards ? last_slice - k : first_slice + k;
    f(slice, max64(0, first - slice * group.length), min64(group.length, last - slice * group.length));
  }
}

constexpr int64_t kBytesAhead = 4096, kShortSliceAhead = 256;

// How many slices ahead lines are asked for: so far that memory's latency is covered. One slice ahead, 64x2048x8x8 in
// fp32 took half as long again.
template <class T>
int64_t slices_ahead(const Group& group) {
  return max64(1, min64(group.slices, kBytesAhead / (group.length * int64_t(sizeof(T)))));
}

// Where the slice begins, counted from the group's base, that is `ahead` slices after `slice`: after the last ones of
// this group come the first ones of the next.
DLKIT_INLINE int64_t begin_ahead(const Group& group, int64_t slice, int64_t ahead) {
  if (group.slices == 1) return 0;
  const int64_t next = slice + ahead;
  return next < group.slices ? next * group.pitch : (next - group.slices) * group.pitch + group.length;
}

// Whether the first pass asks for the output's lines as well, which the second one writes. Lines that short slices fill
// in part are read from memory first: backward of 64x2048x7x7 in fp32 takes 8.5 ms by it, else 11.
template <class T>
bool fetches_output(const Shape& shape, const void* output) {
  return output != nullptr && shape.groups == 0 && shape.space <= kShortSliceAhead &&
         shape.batch * shape.channels * shape.space * int64_t(sizeof(T)) >= int64_t(8) << 20;
}

// Asks for a vector's cache lines, each once where vectors come in whole blocks of slots. Whole blocks at each vector
// of a short slice, as before, were 32 requests for 49 elements.
template <class T>
DLKIT_INLINE void fetch_ahead(const T* p, int slot) {
  constexpr int64_t kBytes = kLanes<accumulate_t<T>> * int64_t(sizeof(T));
  if (kBytes >= 64 || slot % (64 / kBytes) == 0) prefetch<kLanes<accumulate_t<T>>>(p);
}

template <class T>
struct ForwardContiguous {
  using A = accumulate_t<T>;
  using V = Vector<A>;
  const Forward& op;
  double factor;
  Moments* moments;  // [units, parts]

  Moments* moments_of(int64_t unit, int64_t part, int64_t parts) const { return moments + unit * parts + part; }
  bool nt_stores() const { return should_stream<T>(op.shape, op.shape.space); }

  void reduce(int64_t unit, int64_t part, int64_t parts) const {
    Group group = group_of(op.shape, unit);
    if (group.pitch == group.length) group = {group.base, 1, 0, group.slices * group.length, 0, false};
    const T* const x = static_cast<const T*>(op.x) + group.base;
    const bool fetches_y = fetches_output<T>(op.shape, op.y);
    const int64_t further = slices_ahead<T>(group);
    Moments found;
    V sums[kSlots] = {}, squares[kSlots] = {}, run_sums = {}, run_squares = {};
    double centre = 0;
    const int64_t block = block_of<A>(group.length), longest = longest_run(group.length);
    int64_t run = 0, pending = 0, taken = 0, room = 0;  // the run; what it has without the block; the block; its rest
    const auto end_run = [&]() DLKIT_INLINE_LAMBDA {
      if (pending == 0) return;
      found.add(double(pending), centre, sum_lanes(run_sums), sum_lanes(run_squares));
      centre = double(A(finite_or_zero(found.mean)));
      run = min64(longest, 4 * int64_t(found.count));
      run_sums = run_squares = V{};
      pending = 0;
    };
    const auto end_block = [&]() DLKIT_INLINE_LAMBDA {
      run_sums += (sums[0] + sums[1]) + (sums[2] + sums[3]);
      run_squares += (squares[0] + squares[1]) + (squares[2] + squares[3]);
#pragma GCC unroll 4  // as every loop over slots: else they are in memory, where the next step waits for them
      for (int slot = 0; slot < kSlots; ++slot) sums[slot] = squares[slot] = V{};
      pending += taken - room;
      if (pending == run) end_run();
      taken = room = min64(block, run - pending);
    };
    bool started = false;
    for_slices(group, part, parts, false, [&](int64_t slice, int64_t begin, int64_t end) DLKIT_INLINE_LAMBDA {
      const T *const row = x + slice * group.pitch, *const ahead = x + begin_ahead(group, slice, further);
      const T* const y_ahead = at<const T>(op.y, ahead - static_cast<const T*>(op.x));
      if (!started) {
        const int64_t some = end - begin <= kRun ? end - begin : kFirstRun;
        double total[1];
        sum_columns<A>(some, total, [&](int64_t i, int, auto width, auto* terms) DLKIT_INLINE_LAMBDA {
          terms[0] += load(row + begin + i, width);
        });
        centre = double(A(finite_or_zero(total[0] / double(some))));
        run = min64(longest, 4 * some);
        taken = room = min64(block, run);
        started = true;
      }
      while (begin < end) {
        const int64_t stop = min64(end, begin + room);
        const V middle = broadcast<A>(A(centre));
        for_vectors<A, kSlots>(begin, stop, [&](int64_t first, auto count, auto width) DLKIT_INLINE_LAMBDA {
          const auto index = [&](int r) DLKIT_INLINE_LAMBDA { return first + r * kLanes<A>; };
          repeat(count, [&](int r) DLKIT_INLINE_LAMBDA {
            const V d = keep(load(row + index(r), width) - middle, width);
            fetch_ahead(ahead + index(r), r);
            sums[r] += d;
            squares[r] = fma(d, d, squares[r]);
          });
          if (!fetches_y) return;
          repeat(count, [&](int r) DLKIT_INLINE_LAMBDA { fetch_ahead(y_ahead + index(r), r); });
        });
        room -= stop - begin;
        begin = stop;
        if (room == 0) end_block();
      }
    });
    end_block();
    end_run();
    *moments_of(unit, part, parts) = found;
  }

  void finish(int64_t unit, int64_t parts) const {
    if (op.statistics != Statistics::Compute) return finish_given_groups<A>(op, unit, 1);
    Moments all;
    for (int64_t part = 0; part < parts; ++part) {
      const Moments& some = *moments_of(unit, part, parts);
      if (some.count > 0) all.merge(some);
    }
    const Group group = group_of(op.shape, unit);
    const T* const x = static_cast<const T*>(op.x) + group.base;
    add_large_in_double<A>(all.count, all.mean, all.m2, [&](int64_t i) {
      return double(widen(x[i / group.length * group.pitch + i % group.length]));
    });
    finish_groups<A>(op, unit, 1, &all.mean, &all.m2, all.count, factor);
  }

  void apply(int64_t unit, int64_t part, int64_t parts) const {
    const bool nt_store = nt_stores();
    const Group group = group_of(op.shape, unit);
    const Channel<V> shared = channel_of(unit, group.channel);
    for_slices(group, part, parts, true, [&](int64_t slice, int64_t begin, int64_t end) DLKIT_INLINE_LAMBDA {
      const Channel<V> c = group.own_channels ? channel_of(unit, group.channel_of(slice)) : shared;
      apply_slice(c, group.base + slice * group.pitch, begin, end, nt_store);
    });
    if (nt_store) streaming_fence();
  }

  Channel<V> channel_of(int64_t unit, int64_t channel) const {
    const A mean = static_cast<const A*>(op.mean)[unit], rstd = static_cast<const A*>(op.rstd)[unit];
    return {broadcast<A>(mean), broadcast<A>(rstd * read_or<A>(op.weight, op.parameter_dtype, channel, 1)),
            broadcast<A>(read_or<A>(op.bias, op.parameter_dtype, channel, 0)), V{}, V{}};
  }

  void apply_slice(const Channel<V>& c, int64_t base, int64_t begin, int64_t end, bool nt_store) const {
    const T *const x = static_cast<const T*>(op.x) + base, *const residual = at<const T>(op.residual, base);
    T* const y = static_cast<T*>(op.y) + base;
    const AfterNorm<A> after(op);
    for_elements(y, nt_store, begin, end, [&](int64_t i, auto count, auto width) DLKIT_INLINE_LAMBDA {
      const auto index = [&](int r) DLKIT_INLINE_LAMBDA { return i + r * kLanes<A>; };
      forward_values<count()>(x, residual, after, width, c, index, [&](const auto& z) DLKIT_INLINE_LAMBDA {
        write_all(z, width, nt_store, [&](int r) DLKIT_INLINE_LAMBDA { return y + index(r); });
      });
    });
  }

  // Where nothing is to be found first: all slices as they lie in memory.
  void apply_in_memory_order() const {
    const auto [units, parts, unit_elements] = plan(op.shape);
    for (int64_t unit = 0; unit < units; ++unit) finish(unit, parts);
    const bool nt_store = nt_stores();
    parallel_for(op.shape.batch * op.shape.channels, max64(1, kGrain / op.shape.space),
                 [&](int64_t begin, int64_t end) {
                   for (int64_t i = begin; i < end; ++i) {
                     const int64_t channel = i % op.shape.channels;
                     apply_slice(channel_of(channel, channel), i * op.shape.space, 0, op.shape.space, nt_store);
                   }
                   if (nt_store) streaming_fence();
                 });
  }
};

template <class T>
struct BackwardContiguous {
  using A = accumulate_t<T>;
  using V = Vector<A>;
  const Backward& op;
  Sums* sums;  // [units, parts, slices] with group_norm, else [units, parts]

  // A pass with two outputs turns from one to the other after a few vectors. Past the caches it goes only where these
  // are whole lines: where a vector is one, and both outputs are aligned alike.
  bool nt_stores() const {
    const bool two = op.grad_residual != nullptr && op.grad_input != nullptr && (op.statistics_given || op.sums_given);
    const bool are_lines = kLineVectors<T> == 1 && (uintptr_t(op.grad_input) - uintptr_t(op.grad_residual)) % 64 == 0;
    return (!two || are_lines) && !is_applied_in_place(op) && should_stream<T>(op.shape, op.shape.space);
  }
  int64_t sums_a_part() const { return op.shape.groups > 0 ? op.shape.channels / op.shape.groups : 1; }

  Channel<V> channel_of(int64_t unit, int64_t channel, A offset, A slope) const {
    const A mean = static_cast<const A*>(op.mean)[unit], rstd = static_cast<const A*>(op.rstd)[unit];
    return {broadcast<A>(mean), broadcast<A>(rstd * read_or<A>(op.weight, op.parameter_dtype, channel, 1)),
            broadcast<A>(read_or<A>(op.bias, op.parameter_dtype, channel, 0)), broadcast<A>(offset),
            broadcast<A>(slope)};
  }

  void reduce(int64_t unit, int64_t part, int64_t parts) const {
    const Passing<T> whole(op, mask_of(op));
    const bool nt_store = nt_stores();
    const Group group = group_of(op.shape, unit);
    const bool fetches_grad_input = !op.statistics_given && fetches_output<T>(op.shape, op.grad_input);
    const int64_t further = slices_ahead<T>(group);
    Sums* const found = sums + (unit * parts + part) * sums_a_part();
    for (int64_t i = 0; i < sums_a_part(); ++i) found[i] = {};
    V g_sums[kSlots] = {}, gx_sums[kSlots] = {}, run_g = {}, run_gx = {};
    const int64_t block = block_of<A>(group.length), longest = longest_run(group.length);
    int64_t pending = 0, room = block;  // of the run the elements in whole blocks, of the block those that it lacks
    const auto end_block = [&]() DLKIT_INLINE_LAMBDA {
      run_g += (g_sums[0] + g_sums[1]) + (g_sums[2] + g_sums[3]);
      run_gx += (gx_sums[0] + gx_sums[1]) + (gx_sums[2] + gx_sums[3]);
#pragma GCC unroll 4
      for (int slot = 0; slot < kSlots; ++slot) g_sums[slot] = gx_sums[slot] = V{};
      pending += block;
      room = block;
    };
    const auto end_run = [&](Sums& into) DLKIT_INLINE_LAMBDA {
      into.g += sum_lanes(run_g);
      into.gx += sum_lanes(run_gx);
      run_g = run_gx = V{};
      pending = 0;
    };
    const Channel<V> shared = channel_of(unit, group.channel, 0, 0);
    for_slices(group, part, parts, false, [&](int64_t slice, int64_t begin, int64_t end) DLKIT_INLINE_LAMBDA {
      const int64_t base = group.base + slice * group.pitch;
      const int64_t ahead = begin_ahead(group, slice, further) - slice * group.pitch;
      const Channel<V> c = group.own_channels ? channel_of(unit, group.channel_of(slice), 0, 0) : shared;
      const T* const x = static_cast<const T*>(op.x) + base;
      const T* const grad_output = static_cast<const T*>(op.grad_output) + base;
      const T* const to_be_written = at<const T>(op.grad_input, base);
      const Passing<T> passing = whole.from(base);
      T* const grad_input = op.statistics_given ? at<T>(op.grad_input, base) : nullptr;
      T* const passed = at<T>(passed_gradient(op), base);
      const T* const written = grad_input != nullptr ? grad_input : passed;
      Sums& into = found[group.own_channels ? slice : 0];
      while (begin < end) {
        const int64_t stop = min64(end, begin + room);
        const auto step = [&](int64_t i, auto count, auto width) DLKIT_INLINE_LAMBDA {
          const auto index = [&](int r) DLKIT_INLINE_LAMBDA { return i + r * kLanes<A>; };
          V centred[count()], g[count()];
          repeat(count, [&](int r) DLKIT_INLINE_LAMBDA {
            fetch_ahead(x + ahead + index(r), r);
            fetch_ahead(grad_output + ahead + index(r), r);
            centred[r] = keep(load(x + index(r), width) - c.mean, width);
          });
          if (fetches_grad_input) {
            repeat(count, [&](int r) DLKIT_INLINE_LAMBDA { fetch_ahead(to_be_written + ahead + index(r), r); });
          }
          if (passing.source != nullptr) {
            repeat(count, [&](int r) DLKIT_INLINE_LAMBDA { fetch_ahead(passing.source + ahead + index(r), r); });
          }
          masked_gradients(passing, grad_output, width, centred, c, g, index);
          repeat(count, [&](int r) DLKIT_INLINE_LAMBDA {
            g_sums[r] += g[r];
            gx_sums[r] = fma(g[r], centred[r], gx_sums[r]);
          });
          if (written == nullptr) return;
          if (passed != nullptr) {
            write_all(g, width, nt_store, [&](int r) DLKIT_INLINE_LAMBDA { return passed + index(r); });
          }
          if (grad_input != nullptr) {
            repeat(count, [&](int r) DLKIT_INLINE_LAMBDA { g[r] *= c.scale; });
            write_all(g, width, nt_store, [&](int r) DLKIT_INLINE_LAMBDA { return grad_input + index(r); });
          }
        };
        for_elements(written, nt_store && written != nullptr, begin, stop, step);
        room -= stop - begin;
        begin = stop;
        if (room > 0) continue;
        end_block();
        if (pending >= longest) end_run(into);
      }
      if (!group.own_channels) return;
      end_block();
      end_run(into);
    });
    end_block();
    end_run(found[0]);
    if (nt_store) streaming_fence();
  }

  // Adds the parts up into the first, and writes what a channel of batch_norm gives.
  void finish(int64_t unit, int64_t parts) const {
    if (op.sums_given) return;
    const int64_t count = sums_a_part();
    Sums* const all = sums + unit * parts * count;
    for (int64_t i = count; i < parts * count; ++i) {
      all[i % count].g += all[i].g;
      all[i % count].gx += all[i].gx;
    }
    if (op.shape.groups > 0) return;
    check_range<A>(op, all->g);
    check_range<A>(op, all->gx);
    const A rstd = static_cast<const A*>(op.rstd)[unit];
    if (op.grad_weight != nullptr) write_one(op.grad_weight, op.parameter_dtype, unit, all->gx * double(rstd));
    if (op.grad_bias != nullptr) write_one(op.grad_bias, op.parameter_dtype, unit, all->g);
    if (op.sums == nullptr) return;
    static_cast<A*>(op.sums)[unit] = A(all->g);
    static_cast<A*>(op.sums)[op.shape.channels + unit] = A(all->gx);
  }

  GroupGradient<A> gradient_of(const Group& group, int64_t unit, int64_t parts) const {
    double g = 0, gx = 0;
    for (int64_t i = 0; i < sums_a_part() && !op.statistics_given; ++i) {
      const double weight = read_or<A>(op.weight, op.parameter_dtype, group.channel_of(i), 1);
      const A* const given = static_cast<const A*>(op.sums);
      const Sums some =
          op.sums_given ? Sums{given[unit], given[op.shape.channels + unit]} : sums[unit * parts * sums_a_part() + i];
      g += weight * some.g;
      gx += weight * some.gx;
    }
    return {op, static_cast<const A*>(op.rstd)[unit], g, gx};
  }

  void apply(int64_t unit, int64_t part, int64_t parts) const {
    const Passing<T> whole(op, applied_mask(op));
    const bool nt_store = nt_stores();
    const Group group = group_of(op.shape, unit);
    const auto [offset, slope] = gradient_of(group, unit, parts);
    const Channel<V> shared = channel_of(unit, group.channel, offset, slope);
    for_slices(group, part, parts, true,
               [&, offset = offset, slope = slope](int64_t slice, int64_t begin, int64_t end) DLKIT_INLINE_LAMBDA {
                 const int64_t base = group.base + slice * group.pitch;
                 const Channel<V> c =
                     group.own_channels ? channel_of(unit, group.channel_of(slice), offset, slope) : shared;
                 const T* const x = static_cast<const T*>(op.x) + base;
                 const T* const grad_output = static_cast<const T*>(applied_gradient(op)) + base;
                 const Passing<T> passing = whole.from(base);
                 T* const grad_input = at<T>(op.grad_input, base);
                 T* const grad_residual = op.sums_given ? at<T>(op.grad_residual, base) : nullptr;
                 for_elements(grad_input != nullptr ? grad_input : grad_residual, nt_store, begin, end,
                              [&](int64_t i, auto count, auto width) DLKIT_INLINE_LAMBDA {
                                const auto index = [&](int r) DLKIT_INLINE_LAMBDA { return i + r * kLanes<A>; };
                                const auto write_to = [&](T* output) DLKIT_INLINE_LAMBDA {
                                  return [&, output](const auto& g) DLKIT_INLINE_LAMBDA {
                                    if (output == nullptr) return;
                                    write_all(g, width, nt_store,
                                              [&](int r) DLKIT_INLINE_LAMBDA { return output + index(r); });
                                  };
                                };
                                backward_values<count()>(passing, x, grad_output, width, c, index,
                                                         write_to(grad_residual), write_to(grad_input));
                              });
               });
    if (nt_store) streaming_fence();
  }
};

}  // namespace
}  // namespace dlkit::batch_norm::DLKIT_ISA
