// batch_norm, group_norm and instance_norm on the CPU.
//
// Both layouts and both directions run as the same three steps over units, which share no statistics, and parts of a
// unit: reduce (sums over a part), finish (what the unit's sums become), apply (elementwise, over a part). Contiguous,
// a unit is one statistic group: slices of adjacent elements; with channels_last it is a matrix of rows by channels,
// one a sample (group_norm) or one in all (batch_norm). Where there are units enough, one task takes a unit through all
// three steps, so that what fits a cache is read from memory once; else all parts take each step together. apply goes
// through a part backwards, block by block, from what the caches still hold. Backward's reduce writes the masked
// gradient where the residual wants it, which apply then reads in place of its sources; with given statistics it writes
// grad_input as well, and there is no apply.
//
// Statistics take one reading: deviations from a centre, which is the mean so far, go into fp32 sums over a run, and
// these, with their centre, into a double mean and sum of squared deviations. A run is at most four times what was
// seen before it: where the centre is far from the run's own mean, so are the elements seen from the mean of all, and
// nothing cancels.
//
// The division into parts is a function of the shape alone, so the number of threads never changes a bit.
#include <cmath>
#include <initializer_list>
#include <utility>

#include "../common/cpu/cache.h"
#include "../common/cpu/parallel.h"
#include "../common/cpu/simd.h"
#include "../common/dispatch.h"
#include "../layer_norm/kernel.h"
#include "kernel.h"

namespace dlkit::batch_norm {
namespace DLKIT_ISA {
namespace {

using namespace dlkit::DLKIT_ISA;

constexpr int64_t kFirstRun = 64, kRun = 4096;       // elements that are added up in fp32, at first and at most
constexpr int64_t kFirstRunRows = 8, kRunRows = 64;  // rows that are
constexpr int64_t kRowsTogether = 4;                 // rows that share one loading of what belongs to their channels
constexpr int64_t kBlockBytes = 128 * 1024;          // of the blocks that apply takes from the end

struct Plan {
  int64_t units, parts, unit_elements;
};

Plan plan(const Shape& shape) {
  const int64_t units = shape.channels_last ? (shape.groups > 0 ? shape.batch : 1)
                        : shape.groups > 0  ? shape.batch * shape.groups
                                            : shape.channels;
  const int64_t elements = shape.batch * shape.channels * shape.space;
  // Enough parts for many cores, each worth starting a thread for.
  const int64_t parts = units >= 16 ? 1 : max64(1, min64(64 / units, elements / units / (2 * kGrain)));
  return {units, parts, elements / units};
}

template <class Side>
void run(const Side& side, const Plan& plan, bool reduce, bool apply) {
  const auto [units, parts, unit_elements] = plan;
  if (parts == 1) {
    return parallel_for(units, max64(1, kGrain / unit_elements), [&](int64_t begin, int64_t end) {
      for (int64_t unit = begin; unit < end; ++unit) {
        if (reduce) side.reduce(unit, 0, 1);
        side.finish(unit, 1);
        if (apply) side.apply(unit, 0, 1);
      }
    });
  }
  if (reduce) {
    parallel_for(units * parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) side.reduce(i / parts, i % parts, parts);
    });
  }
  for (int64_t unit = 0; unit < units; ++unit) side.finish(unit, parts);
  if (apply) {
    parallel_for(units * parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = end; i-- > begin;) side.apply(i / parts, i % parts, parts);
    });
  }
}

// Elements of a small array whose type is known at run time.
double read(const void* array, DType type, int64_t i) {
  double value = 0;
  with_type(type, [&](auto t) { value = widen(static_cast<const decltype(t)*>(array)[i]); });
  return value;
}
void write_one(void* array, DType type, int64_t i, double value) {
  with_type(type, [&](auto t) {
    using T = decltype(t);
    static_cast<T*>(array)[i] = narrow<T>(accumulate_t<T>(value));
  });
}

// All of a small array, widened; `otherwise` where there is none.
template <class A>
void read_all(const void* array, DType type, A otherwise, int64_t count, A* output) {
  if (array == nullptr) {
    for (int64_t i = 0; i < count; ++i) output[i] = otherwise;
    return;
  }
  with_type(type, [&](auto t) {
    for (int64_t i = 0; i < count; ++i) output[i] = A(widen(static_cast<const decltype(t)*>(array)[i]));
  });
}
template <class A>
A read_or(const void* array, DType type, int64_t i, double otherwise) {
  return A(array == nullptr ? otherwise : read(array, type, i));
}

// Mean and sum of squared deviations of what was added so far.
struct Moments {
  double count = 0, mean = 0, m2 = 0;
  // n elements whose deviations from `centre` add up to `sum`, their squares to `squares`.
  void add(double n, double centre, double sum, double squares) { merge(n, centre + sum / n, squares - sum * sum / n); }
  void merge(double n, double other_mean, double other_m2) {
    const double total = count + n;
    other_m2 = other_m2 < 0 ? 0 : other_m2;  // what rounding can leave; a NaN stays
    if (count == 0) {
      mean = other_mean;
      m2 = other_m2;
    } else {
      const double delta = other_mean - mean;
      m2 += other_m2 + delta * delta * (count * n / total);
      mean = (mean * count + other_mean * n) / total;  // not by delta: an infinity is to stay one
    }
    count = total;
  }
};

double finite_or_zero(double value) { return value - value == 0 ? value : 0; }

// Writes what the moments of `groups` statistic groups, from `first` on, give, and the running statistics. Loops that
// the compiler makes vectors of: of 1024 channels one by one, the roots alone take 13 us.
template <class A>
void finish_groups(const Forward& op, int64_t first, int64_t groups, const double* means, const double* m2s,
                   double count, double factor) {
  A *const mean = static_cast<A*>(op.mean) + first, *const rstd = static_cast<A*>(op.rstd) + first;
  A* const var = at<A>(op.var, first);
  const double eps = op.eps;
  for (int64_t i = 0; i < groups; ++i) {
    mean[i] = A(means[i]);
    rstd[i] = A(1 / std::sqrt(m2s[i] / count + eps));
  }
  for (int64_t i = 0; var != nullptr && i < groups; ++i) var[i] = A(m2s[i] / count);
  with_type(op.running_dtype, [&](auto t) {
    using R = decltype(t);
    const auto move = [&](void* running, const double* found, double divisor) {
      R* const values = at<R>(running, first);
      for (int64_t i = 0; values != nullptr && i < groups; ++i) {
        values[i] = narrow<R>(accumulate_t<R>((1 - factor) * widen(values[i]) + factor * (found[i] / divisor)));
      }
    };
    move(op.running_mean, means, 1);
    move(op.running_var, m2s, count - 1);
  });
}

// The same where the statistics are given.
template <class A>
void finish_given_groups(const Forward& op, int64_t first, int64_t groups) {
  if (op.statistics != Statistics::Running) return;
  A *const mean = static_cast<A*>(op.mean) + first, *const rstd = static_cast<A*>(op.rstd) + first;
  const double eps = op.eps;
  with_type(op.running_dtype, [&](auto t) {
    using R = decltype(t);
    const R* const running_mean = static_cast<const R*>(op.running_mean) + first;
    const R* const running_var = static_cast<const R*>(op.running_var) + first;
    for (int64_t i = 0; i < groups; ++i) {
      mean[i] = A(widen(running_mean[i]));
      rstd[i] = A(1 / std::sqrt(widen(running_var[i]) + eps));
    }
  });
}

double running_factor(const Forward& op) {
  if (op.momentum >= 0) return op.momentum;
  return op.num_batches_tracked == nullptr ? 0 : 1 / double(*op.num_batches_tracked + 1);
}

// What belongs to a channel: z = (x - mean) * scale + bias, grad_input = g * scale - offset - (x - mean) * slope.
template <class V>
struct Channel {
  V mean, scale, bias, offset, slope;
};

template <class T, bool kResidual, bool kRelu, class Width>
DLKIT_INLINE Vector<accumulate_t<T>> forward_value(const T* x, const T* residual, int64_t i, Width width,
                                                   const Channel<Vector<accumulate_t<T>>>& c) {
  using V = Vector<accumulate_t<T>>;
  V z = fma(load(x + i, width) - c.mean, c.scale, c.bias);
  if constexpr (kResidual) z += load(residual + i, width);
  if constexpr (kRelu) z = z < 0 ? V{} : z;
  return z;
}

// Where the ReLU's mask comes from.
enum class Mask { None, FromX, FromY };

template <class T, Mask kMask, class Width>
DLKIT_INLINE Vector<accumulate_t<T>> masked_gradient(const T* grad_output, const T* y, int64_t i, Width width,
                                                     Vector<accumulate_t<T>> centred,
                                                     const Channel<Vector<accumulate_t<T>>>& c) {
  using V = Vector<accumulate_t<T>>;
  const V g = load(grad_output + i, width);
  if constexpr (kMask == Mask::None) return g;
  if constexpr (kMask == Mask::FromY) return load(y + i, width) > 0 ? g : V{};
  return fma(centred, c.scale, c.bias) > rounds_to_zero(T()) ? g : V{};
}

// Whether reduce left the masked gradient where the residual's goes, for apply to read.
bool is_masked(const Backward& op) { return op.grad_residual != nullptr && !op.sums_given; }
const void* applied_gradient(const Backward& op) { return is_masked(op) ? op.grad_residual : op.grad_output; }

// Calls f(mask, stream) with constants.
template <class F>
void with_mask(const Backward& op, bool is_masked, bool stream, const F& f) {
  const auto go_on = [&](auto mask) { stream ? f(mask, std::true_type()) : f(mask, std::false_type()); };
  if (!op.relu || is_masked) return go_on(std::integral_constant<Mask, Mask::None>());
  op.y != nullptr ? go_on(std::integral_constant<Mask, Mask::FromY>())
                  : go_on(std::integral_constant<Mask, Mask::FromX>());
}

// Whether outputs go past the caches: larger than these, and written in runs of `run` elements at a time.
template <class T>
bool should_stream(const Shape& shape, int64_t run) {
  const int64_t bytes = shape.batch * shape.channels * shape.space * int64_t(sizeof(T));
  return bytes >= streaming_threshold_bytes() && run * int64_t(sizeof(T)) >= 1024;
}

// The two outputs of backward are streamed together or not at all: where one is aligned, so is the other.
bool are_aligned_alike(const Backward& op) {
  return op.grad_input == nullptr || op.grad_residual == nullptr ||
         (uintptr_t(op.grad_input) - uintptr_t(op.grad_residual)) % 64 == 0;
}

// Calls f(i, slot, width) over [begin, end) with the vectors of `output`, where it has any, at aligned addresses.
template <class T, bool kStream, class F>
DLKIT_INLINE void for_elements(const T* output, int64_t begin, int64_t end, const F& f) {
  using A = accumulate_t<T>;
  if constexpr (kStream) {
    constexpr int64_t kBytes = kLanes<A> * int64_t(sizeof(T));
    const int64_t past = int64_t(uintptr_t(output + begin) % kBytes) / int64_t(sizeof(T));
    const int64_t head = past == 0 ? 0 : min64(kLanes<A> - past, end - begin);
    if (head > 0) f(begin, 0, First{head});
    begin += head;
  }
  for_columns<A, kSlots>(begin, end, f);
}

// ---------------------------------------------------------------------------------------------------------------------
// Contiguous: a unit is a statistic group, `slices` times `length` adjacent elements.

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

template <class T>
struct ForwardContiguous {
  using A = accumulate_t<T>;
  using V = Vector<A>;
  const Forward& op;
  double factor;
  Moments* moments;  // [units, parts]

  Moments* moments_of(int64_t unit, int64_t part, int64_t parts) const { return moments + unit * parts + part; }

  void reduce(int64_t unit, int64_t part, int64_t parts) const {
    Group group = group_of(op.shape, unit);
    if (group.pitch == group.length) group = {group.base, 1, 0, group.slices * group.length, 0, false};
    const T* const x = static_cast<const T*>(op.x) + group.base;
    Moments found;
    V sums[kSlots] = {}, squares[kSlots] = {};
    double centre = 0;
    int64_t pending = 0, run = 0;
    const auto flush = [&] {
      if (pending == 0) return;
      found.add(double(pending), centre, sum_lanes((sums[0] + sums[1]) + (sums[2] + sums[3])),
                sum_lanes((squares[0] + squares[1]) + (squares[2] + squares[3])));
      centre = double(A(finite_or_zero(found.mean)));
      run = min64(kRun, 4 * int64_t(found.count));
      for (int slot = 0; slot < kSlots; ++slot) sums[slot] = squares[slot] = V{};
      pending = 0;
    };
    bool started = false;
    for_slices(group, part, parts, false, [&](int64_t slice, int64_t begin, int64_t end) DLKIT_INLINE_LAMBDA {
      const T* const row = x + slice * group.pitch;
      if (!started) {
        const int64_t some = end - begin <= kRun ? end - begin : kFirstRun;
        double total[1];
        sum_columns<A>(some, total, [&](int64_t i, int, auto width, auto* terms) DLKIT_INLINE_LAMBDA {
          terms[0] += load(row + begin + i, width);
        });
        centre = double(A(finite_or_zero(total[0] / double(some))));
        run = min64(kRun, 4 * some);
        started = true;
      }
      while (begin < end) {
        const int64_t stop = min64(end, begin + run - pending);
        const V middle = broadcast<A>(A(centre));
        for_columns<A, kSlots>(begin, stop, [&](int64_t i, int slot, auto width) DLKIT_INLINE_LAMBDA {
          const V d = keep(load(row + i, width) - middle, width);
          if (slot == 0) prefetch<kSlots * kLanes<A>>(row + group.pitch + i);
          sums[slot] += d;
          squares[slot] = fma(d, d, squares[slot]);
        });
        pending += stop - begin;
        begin = stop;
        if (pending == run) flush();
      }
    });
    flush();
    *moments_of(unit, part, parts) = found;
  }

  void finish(int64_t unit, int64_t parts) const {
    if (op.statistics != Statistics::Compute) return finish_given_groups<A>(op, unit, 1);
    Moments all;
    for (int64_t part = 0; part < parts; ++part) {
      const Moments& some = *moments_of(unit, part, parts);
      if (some.count > 0) all.merge(some.count, some.mean, some.m2);
    }
    finish_groups<A>(op, unit, 1, &all.mean, &all.m2, all.count, factor);
  }

  void apply(int64_t unit, int64_t part, int64_t parts) const {
    with_flags([&](auto residual, auto relu,
                   auto stream) { this->template apply_as<residual, relu, stream>(unit, part, parts); },
               op.residual != nullptr, op.relu, should_stream<T>(op.shape, op.shape.space));
  }

  template <bool kResidual, bool kRelu, bool kStream>
  void apply_as(int64_t unit, int64_t part, int64_t parts) const {
    const Group group = group_of(op.shape, unit);
    const Channel<V> shared = channel_of(unit, group.channel);
    for_slices(group, part, parts, true, [&](int64_t slice, int64_t begin, int64_t end) {
      const Channel<V> c = group.own_channels ? channel_of(unit, group.channel_of(slice)) : shared;
      this->template apply_slice<kResidual, kRelu, kStream>(c, group.base + slice * group.pitch, begin, end);
    });
    if constexpr (kStream) streaming_fence();
  }

  Channel<V> channel_of(int64_t unit, int64_t channel) const {
    const A mean = static_cast<const A*>(op.mean)[unit], rstd = static_cast<const A*>(op.rstd)[unit];
    return {broadcast<A>(mean), broadcast<A>(rstd * read_or<A>(op.weight, op.parameter_dtype, channel, 1)),
            broadcast<A>(read_or<A>(op.bias, op.parameter_dtype, channel, 0)), V{}, V{}};
  }

  template <bool kResidual, bool kRelu, bool kStream>
  void apply_slice(const Channel<V>& c, int64_t base, int64_t begin, int64_t end) const {
    const T* const x = static_cast<const T*>(op.x) + base;
    const T* const residual = kResidual ? static_cast<const T*>(op.residual) + base : nullptr;
    T* const y = static_cast<T*>(op.y) + base;
    for_elements<T, kStream>(y, begin, end, [&](int64_t i, int, auto width) DLKIT_INLINE_LAMBDA {
      write<kStream>(y + i, forward_value<T, kResidual, kRelu>(x, residual, i, width, c), width);
    });
  }

  // Where nothing is to be found first: all slices as they lie in memory.
  void apply_in_memory_order() const {
    const auto [units, parts, unit_elements] = plan(op.shape);
    for (int64_t unit = 0; unit < units; ++unit) finish(unit, parts);
    with_flags(
        [&](auto residual, auto relu, auto stream) {
          parallel_for(op.shape.batch * op.shape.channels, max64(1, kGrain / op.shape.space),
                       [&](int64_t begin, int64_t end) {
                         for (int64_t i = begin; i < end; ++i) {
                           const int64_t channel = i % op.shape.channels;
                           this->template apply_slice<residual, relu, stream>(channel_of(channel, channel),
                                                                              i * op.shape.space, 0, op.shape.space);
                         }
                         if constexpr (stream) streaming_fence();
                       });
        },
        op.residual != nullptr, op.relu, should_stream<T>(op.shape, op.shape.space));
  }
};

// The sums over one channel's share of a unit: of g, and of g * (x - mean).
struct Sums {
  double g = 0, gx = 0;
};

// What the gradients of a group take from its sums, both weighted where weight counts.
template <class A>
struct GroupGradient {
  A offset = 0, slope = 0;
  GroupGradient(const Backward& op, double rstd, double g, double gx) {
    if (op.statistics_given) return;
    offset = A(rstd * g / op.count);
    slope = A(rstd * rstd * rstd * gx / op.count);
  }
};

template <class T>
struct BackwardContiguous {
  using A = accumulate_t<T>;
  using V = Vector<A>;
  const Backward& op;
  Sums* sums;  // [units, parts, slices] with group_norm, else [units, parts]

  bool streams() const { return are_aligned_alike(op) && should_stream<T>(op.shape, op.shape.space); }
  int64_t sums_a_part() const { return op.shape.groups > 0 ? op.shape.channels / op.shape.groups : 1; }

  Channel<V> channel_of(int64_t unit, int64_t channel, A offset, A slope) const {
    const A mean = static_cast<const A*>(op.mean)[unit], rstd = static_cast<const A*>(op.rstd)[unit];
    return {broadcast<A>(mean), broadcast<A>(rstd * read_or<A>(op.weight, op.parameter_dtype, channel, 1)),
            broadcast<A>(read_or<A>(op.bias, op.parameter_dtype, channel, 0)), broadcast<A>(offset),
            broadcast<A>(slope)};
  }

  void reduce(int64_t unit, int64_t part, int64_t parts) const {
    with_mask(op, false, streams(),
              [&](auto mask, auto stream) { this->template reduce_as<mask(), stream>(unit, part, parts); });
  }

  template <Mask kMask, bool kStream>
  void reduce_as(int64_t unit, int64_t part, int64_t parts) const {
    const Group group = group_of(op.shape, unit);
    Sums* const found = sums + (unit * parts + part) * sums_a_part();
    for (int64_t i = 0; i < sums_a_part(); ++i) found[i] = {};
    V g_sums[kSlots] = {}, gx_sums[kSlots] = {};
    int64_t pending = 0;
    const auto flush = [&](Sums& into) {
      into.g += sum_lanes((g_sums[0] + g_sums[1]) + (g_sums[2] + g_sums[3]));
      into.gx += sum_lanes((gx_sums[0] + gx_sums[1]) + (gx_sums[2] + gx_sums[3]));
      for (int slot = 0; slot < kSlots; ++slot) g_sums[slot] = gx_sums[slot] = V{};
      pending = 0;
    };
    const Channel<V> shared = channel_of(unit, group.channel, 0, 0);
    for_slices(group, part, parts, false, [&](int64_t slice, int64_t begin, int64_t end) DLKIT_INLINE_LAMBDA {
      const int64_t base = group.base + slice * group.pitch;
      const Channel<V> c = group.own_channels ? channel_of(unit, group.channel_of(slice), 0, 0) : shared;
      const T* const x = static_cast<const T*>(op.x) + base;
      const T* const grad_output = static_cast<const T*>(op.grad_output) + base;
      const T* const y = kMask == Mask::FromY ? static_cast<const T*>(op.y) + base : nullptr;
      T* const grad_input = op.statistics_given ? at<T>(op.grad_input, base) : nullptr;
      T* const grad_residual = at<T>(op.grad_residual, base);
      const T* const written = grad_input != nullptr ? grad_input : grad_residual;
      Sums& into = found[group.own_channels ? slice : 0];
      while (begin < end) {
        const int64_t stop = min64(end, begin + kRun - pending);
        const auto step = [&](int64_t i, int slot, auto width) DLKIT_INLINE_LAMBDA {
          if (slot == 0) {
            prefetch<kSlots * kLanes<A>>(x + group.pitch + i);
            prefetch<kSlots * kLanes<A>>(grad_output + group.pitch + i);
            if (kMask == Mask::FromY) prefetch<kSlots * kLanes<A>>(y + group.pitch + i);
          }
          const V centred = keep(load(x + i, width) - c.mean, width);
          const V g = masked_gradient<T, kMask>(grad_output, y, i, width, centred, c);
          if (grad_residual != nullptr) write<kStream>(grad_residual + i, g, width);
          if (grad_input != nullptr) write<kStream>(grad_input + i, g * c.scale, width);
          g_sums[slot] += g;
          gx_sums[slot] = fma(g, centred, gx_sums[slot]);
        };
        kStream&& written != nullptr ? for_elements<T, true>(written, begin, stop, step)
                                     : for_columns<A, kSlots>(begin, stop, step);
        pending += stop - begin;
        begin = stop;
        if (pending == kRun) flush(into);
      }
      if (group.own_channels) flush(into);
    });
    if (!group.own_channels) flush(found[0]);
    if constexpr (kStream) streaming_fence();
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
    const A rstd = static_cast<const A*>(op.rstd)[unit];
    if (op.grad_weight != nullptr) write_one(op.grad_weight, op.parameter_dtype, unit, all->gx * double(rstd));
    if (op.grad_bias != nullptr) write_one(op.grad_bias, op.parameter_dtype, unit, all->g);
    if (op.sums == nullptr) return;
    static_cast<A*>(op.sums)[unit] = A(all->g);
    static_cast<A*>(op.sums)[op.shape.channels + unit] = A(all->gx);
  }

  void apply(int64_t unit, int64_t part, int64_t parts) const {
    with_mask(op, is_masked(op), streams(),
              [&](auto mask, auto stream) { this->template apply_as<mask(), stream>(unit, part, parts); });
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

  template <Mask kMask, bool kStream>
  void apply_as(int64_t unit, int64_t part, int64_t parts) const {
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
                 const T* const y = kMask == Mask::FromY ? static_cast<const T*>(op.y) + base : nullptr;
                 T* const grad_input = at<T>(op.grad_input, base);
                 T* const grad_residual = op.sums_given ? at<T>(op.grad_residual, base) : nullptr;
                 for_elements<T, kStream>(grad_input != nullptr ? grad_input : grad_residual, begin, end,
                                          [&](int64_t i, int, auto width) DLKIT_INLINE_LAMBDA {
                                            const V centred = load(x + i, width) - c.mean;
                                            const V g = masked_gradient<T, kMask>(grad_output, y, i, width, centred, c);
                                            if (grad_residual != nullptr) write<kStream>(grad_residual + i, g, width);
                                            if (grad_input != nullptr) {
                                              write<kStream>(grad_input + i,
                                                             fma(centred, -c.slope, fma(g, c.scale, -c.offset)), width);
                                            }
                                          });
               });
    if constexpr (kStream) streaming_fence();
  }
};

// ---------------------------------------------------------------------------------------------------------------------
// channels_last: a unit is a matrix of rows by channels.

struct Matrix {
  int64_t rows, cols;
  int64_t pitch;  // of arrays with one value a channel: whole vectors of any type
  explicit Matrix(const Shape& shape)
      : rows(shape.groups > 0 ? shape.space : shape.batch * shape.space),
        cols(shape.channels),
        pitch((shape.channels + 15) / 16 * 16) {}
};

// f(0), f(1), ... unrolled.
template <class Count, class F>
DLKIT_INLINE void repeat(Count, const F& f) {
  [&]<int... I>(std::integer_sequence<int, I...>)
      DLKIT_INLINE_LAMBDA { (f(I), ...); }(std::make_integer_sequence<int, Count::value>());
}

// Calls f(row, count) for groups of up to kRowsTogether rows; count is a constant.
template <class F>
DLKIT_INLINE void for_rows(int64_t begin, int64_t end, const F& f) {
  int64_t row = begin;
  for (; row + kRowsTogether <= end; row += kRowsTogether) f(row, std::integral_constant<int, kRowsTogether>());
  for (; row < end; ++row) f(row, std::integral_constant<int, 1>());
}

// The same, block by block from the end; within a block forwards, which is what the processor fetches ahead.
template <class T, class F>
DLKIT_INLINE void for_rows_backwards(int64_t begin, int64_t end, int64_t cols, const F& f) {
  const int64_t block = max64(1, kBlockBytes / (cols * int64_t(sizeof(T)) * kRowsTogether)) * kRowsTogether;
  for (int64_t first = begin + (end - begin - 1) / block * block; first >= begin; first -= block) {
    for_rows(first, min64(end, first + block), f);
  }
}

// Room for one part: double sums and fp32 ones of each channel; the first part's fp32 arrays then serve the unit.
template <class A>
struct Scratch {
  double *first, *second;     // mean and m2, or sums of g and of g * (x - mean)
  A *centre, *sums, *others;  // while a part is reduced
  A *mean, *scale, *bias, *offset, *slope;
  static int64_t bytes(int64_t pitch) { return pitch * int64_t(2 * sizeof(double) + 5 * sizeof(A)); }
  Scratch(void* workspace, int64_t part, int64_t pitch) {
    char* const start = static_cast<char*>(workspace) + part * bytes(pitch);
    first = reinterpret_cast<double*>(start);
    second = first + pitch;
    mean = centre = reinterpret_cast<A*>(second + pitch);
    scale = sums = centre + pitch;
    bias = others = sums + pitch;
    offset = others + pitch;
    slope = offset + pitch;
  }
  DLKIT_INLINE_MEMBER Channel<Vector<A>> forward_channel(int64_t i) const {
    return {load(mean + i, All{}), load(scale + i, All{}), load(bias + i, All{}), Vector<A>{}, Vector<A>{}};
  }
  DLKIT_INLINE_MEMBER Channel<Vector<A>> channel(int64_t i) const {
    return {load(mean + i, All{}), load(scale + i, All{}), load(bias + i, All{}), load(offset + i, All{}),
            load(slope + i, All{})};
  }
};

// Mean, scale and bias of each channel of a unit.
template <class Op, class A>
void spread_statistics(const Op& op, const Scratch<A>& own, int64_t unit) {
  const Shape& shape = op.shape;
  const int64_t statistics = shape.groups > 0 ? shape.groups : shape.channels, size = shape.channels / statistics;
  const A* const mean = static_cast<const A*>(op.mean) + unit * shape.groups;
  const A* const rstd = static_cast<const A*>(op.rstd) + unit * shape.groups;
  read_all(op.weight, op.parameter_dtype, A(1), shape.channels, own.scale);
  read_all(op.bias, op.parameter_dtype, A(0), shape.channels, own.bias);
  for (int64_t g = 0; g < statistics; ++g) {
    for (int64_t i = g * size; i < (g + 1) * size; ++i) {
      own.mean[i] = mean[g];
      own.scale[i] *= rstd[g];
    }
  }
}

// Asks for the same columns of the next rows, each cache line once. Several rows at a time are more than the
// processor's own prefetching follows: 3.9 -> 2.5 ms for 64x256x28x28 bf16.
template <int kCount, class T>
DLKIT_INLINE void fetch_rows_ahead(const T* rows, int64_t i, int64_t cols) {
  constexpr int64_t kLine = 64 / int64_t(sizeof(T)), kStep = kLanes<accumulate_t<T>>;
  if (kCount == 1 || (kStep < kLine && i % kLine != 0)) return;
  repeat(std::integral_constant<int, kCount>(),
         [&](int r) DLKIT_INLINE_LAMBDA { prefetch<(kStep > kLine ? kStep : kLine)>(rows + (kCount + r) * cols + i); });
}

// Adds [cols] sums kept in A to ones kept in double.
template <class A>
void add_to(double* totals, A* sums, int64_t cols) {
  for (int64_t i = 0; i < cols; ++i) {
    totals[i] += double(sums[i]);
    sums[i] = 0;
  }
}

template <class T>
struct ForwardChannelsLast {
  using A = accumulate_t<T>;
  using V = Vector<A>;
  const Forward& op;
  double factor;
  Matrix matrix;

  Scratch<A> scratch(int64_t unit, int64_t part, int64_t parts) const {
    return {op.workspace, unit * parts + part, matrix.pitch};
  }
  const T* rows_of(const void* tensor, int64_t unit) const {
    return tensor == nullptr ? nullptr : static_cast<const T*>(tensor) + unit * matrix.rows * matrix.cols;
  }

  void reduce(int64_t unit, int64_t part, int64_t parts) const {
    const int64_t cols = matrix.cols, begin = matrix.rows * part / parts, end = matrix.rows * (part + 1) / parts;
    const T* const x = rows_of(op.x, unit);
    const Scratch<A> own = scratch(unit, part, parts);
    if (end - begin == 1) {  // group_norm of [N, C]
      for (int64_t i = 0; i < cols; ++i) own.first[i] = double(widen(x[begin * cols + i])), own.second[i] = 0;
      return;
    }
    const int64_t some = min64(end - begin, kFirstRunRows);
    for_columns<A, 1>(0, cols, [&](int64_t i, int, auto width) DLKIT_INLINE_LAMBDA {
      V total = {};
      for (int64_t row = begin; row < begin + some; ++row) total += load(x + row * cols + i, width);
      const V centre = total * A(1.0 / double(some));
      store(own.centre + i, centre - centre == 0 ? centre : V{}, All{});
    });
    for (double* zero : {own.first, own.second}) memset(zero, 0, size_t(matrix.pitch) * sizeof(double));
    for (int64_t first = begin, last; first < end; first = last) {
      last = min64(end, first + (first == begin ? kFirstRunRows : min64(kRunRows, 4 * (first - begin))));
      memset(own.sums, 0, size_t(matrix.pitch) * sizeof(A));
      memset(own.others, 0, size_t(matrix.pitch) * sizeof(A));
      for_rows(first, last, [&](int64_t row, auto together) DLKIT_INLINE_LAMBDA {
        for_columns<A, 1>(0, cols, [&](int64_t i, int, auto width) DLKIT_INLINE_LAMBDA {
          const V centre = load(own.centre + i, All{});
          // First among themselves: a quarter of the additions to what has grown large.
          fetch_rows_ahead<together()>(x + row * cols, i, cols);
          V sum = {}, squares = {};
          repeat(together, [&](int r) DLKIT_INLINE_LAMBDA {
            const V d = keep(load(x + (row + r) * cols + i, width) - centre, width);
            sum += d;
            squares = fma(d, d, squares);
          });
          store(own.sums + i, load(own.sums + i, All{}) + sum, All{});
          store(own.others + i, load(own.others + i, All{}) + squares, All{});
        });
      });
      merge(own, cols, double(first - begin), double(last - first));
    }
  }

  // Each channel's moments of `count` rows and the sums over n more, into the moments of all. The divisions are the
  // same for every channel.
  static void merge(const Scratch<A>& own, int64_t cols, double count, double n) {
    const double inverse = 1 / n, old_share = count / (count + n), share = n / (count + n), between = old_share * n;
    double *const means = own.first, *const m2s = own.second;
    A *const centres = own.centre, *const sums = own.sums, *const squares = own.others;
#pragma GCC ivdep
    for (int64_t i = 0; i < cols; ++i) {
      const double sum = double(sums[i]), mean = double(centres[i]) + sum * inverse, delta = mean - means[i];
      const double m2 = double(squares[i]) - sum * sum * inverse;
      m2s[i] += (m2 < 0 ? 0 : m2) + delta * delta * between;
      means[i] = means[i] * old_share + mean * share;
      centres[i] = means[i] - means[i] == 0 ? A(means[i]) : A(0);
    }
  }

  // Each channel's moments over all parts, into the first part's room.
  void merge_parts(int64_t unit, int64_t parts) const {
    const Scratch<A> all = scratch(unit, 0, parts);
    for (int64_t part = 1; part < parts; ++part) {
      const Scratch<A> some = scratch(unit, part, parts);
      const int64_t begin = matrix.rows * part / parts, end = matrix.rows * (part + 1) / parts;
      for (int64_t i = 0; i < matrix.cols; ++i) {
        Moments moments{double(begin), all.first[i], all.second[i]};
        moments.merge(double(end - begin), some.first[i], some.second[i]);
        all.first[i] = moments.mean;
        all.second[i] = moments.m2;
      }
    }
  }

  void finish(int64_t unit, int64_t parts) const {
    const Shape& shape = op.shape;
    const int64_t statistics = shape.groups > 0 ? shape.groups : shape.channels, size = shape.channels / statistics;
    const Scratch<A> own = scratch(unit, 0, parts);
    if (op.statistics == Statistics::Compute) {
      merge_parts(unit, parts);
      for (int64_t g = 0; g < statistics && size > 1; ++g) {
        double mean = 0, m2 = 0;
        for (int64_t i = g * size; i < (g + 1) * size; ++i) mean += own.first[i];
        mean /= double(size);
        for (int64_t i = g * size; i < (g + 1) * size; ++i) {
          const double delta = own.first[i] - mean;
          m2 += own.second[i] + delta * delta * double(matrix.rows);
        }
        own.first[g] = mean;
        own.second[g] = m2;
      }
      finish_groups<A>(op, unit * statistics, statistics, own.first, own.second, double(matrix.rows * size), factor);
    } else {
      finish_given_groups<A>(op, 0, statistics);
    }
    spread_statistics(op, own, unit);
  }

  void apply(int64_t unit, int64_t part, int64_t parts) const {
    const bool whole = matrix.cols % kLanes<A> == 0 && uintptr_t(op.y) % 64 == 0;
    with_flags([&](auto residual, auto relu,
                   auto stream) { this->template apply_as<residual, relu, stream>(unit, part, parts); },
               op.residual != nullptr, op.relu, whole && should_stream<T>(op.shape, matrix.rows * matrix.cols));
  }

  template <bool kResidual, bool kRelu, bool kStream>
  void apply_as(int64_t unit, int64_t part, int64_t parts) const {
    const int64_t cols = matrix.cols, begin = matrix.rows * part / parts, end = matrix.rows * (part + 1) / parts;
    const Scratch<A> own = scratch(unit, 0, parts);
    const T *const x = rows_of(op.x, unit), *const residual = rows_of(op.residual, unit);
    T* const y = const_cast<T*>(rows_of(op.y, unit));
    for_rows_backwards<T>(begin, end, cols, [&](int64_t row, auto together) DLKIT_INLINE_LAMBDA {
      for_columns<A, 1>(0, cols, [&](int64_t i, int, auto width) DLKIT_INLINE_LAMBDA {
        const Channel<V> c = own.forward_channel(i);
        fetch_rows_ahead<together()>(x + row * cols, i, cols);
        if constexpr (kResidual) fetch_rows_ahead<together()>(residual + row * cols, i, cols);
        repeat(together, [&](int r) DLKIT_INLINE_LAMBDA {
          const int64_t where = (row + r) * cols + i;
          write<kStream>(y + where, forward_value<T, kResidual, kRelu>(x, residual, where, width, c), width);
        });
      });
    });
    if constexpr (kStream) streaming_fence();
  }
};

template <class T>
struct BackwardChannelsLast {
  using A = accumulate_t<T>;
  using V = Vector<A>;
  const Backward& op;
  Matrix matrix;

  Scratch<A> scratch(int64_t unit, int64_t part, int64_t parts) const {
    return {op.workspace, unit * parts + part, matrix.pitch};
  }
  template <class Pointer>
  auto rows_of(Pointer* tensor, int64_t unit) const {
    using Element = std::conditional_t<std::is_const_v<Pointer>, const T, T>;
    return tensor == nullptr ? nullptr : static_cast<Element*>(tensor) + unit * matrix.rows * matrix.cols;
  }

  bool streams() const {
    const uintptr_t outputs = uintptr_t(op.grad_input) | uintptr_t(op.grad_residual);
    return matrix.cols % kLanes<A> == 0 && outputs % 64 == 0 && should_stream<T>(op.shape, matrix.rows * matrix.cols);
  }

  void reduce(int64_t unit, int64_t part, int64_t parts) const {
    with_mask(op, false, streams(),
              [&](auto mask, auto stream) { this->template reduce_as<mask(), stream>(unit, part, parts); });
  }

  template <Mask kMask, bool kStream>
  void reduce_as(int64_t unit, int64_t part, int64_t parts) const {
    const int64_t cols = matrix.cols, begin = matrix.rows * part / parts, end = matrix.rows * (part + 1) / parts;
    const T *const x = rows_of(op.x, unit), *const grad_output = rows_of(op.grad_output, unit);
    const T* const y = rows_of(op.y, unit);
    T* const grad_input = op.statistics_given ? rows_of(op.grad_input, unit) : nullptr;
    T* const grad_residual = rows_of(op.grad_residual, unit);
    const Scratch<A> own = scratch(unit, part, parts);
    A *const g_sums = own.offset, *const gx_sums = own.slope;  // not yet what they are named for
    spread_statistics(op, own, unit);
    for (double* sums : {own.first, own.second}) memset(sums, 0, size_t(matrix.pitch) * sizeof(double));
    for (A* sums : {g_sums, gx_sums}) memset(sums, 0, size_t(matrix.pitch) * sizeof(A));
    for (int64_t first = begin; first < end; first += kRunRows) {
      for_rows(first, min64(end, first + kRunRows), [&](int64_t row, auto together) DLKIT_INLINE_LAMBDA {
        for_columns<A, 1>(0, cols, [&](int64_t i, int, auto width) DLKIT_INLINE_LAMBDA {
          const Channel<V> c = own.forward_channel(i);
          fetch_rows_ahead<together()>(x + row * cols, i, cols);
          fetch_rows_ahead<together()>(grad_output + row * cols, i, cols);
          if constexpr (kMask == Mask::FromY) fetch_rows_ahead<together()>(y + row * cols, i, cols);
          V g_sum = {}, gx_sum = {};
          repeat(together, [&](int r) DLKIT_INLINE_LAMBDA {
            const int64_t where = (row + r) * cols + i;
            const V centred = load(x + where, width) - c.mean;
            const V g = masked_gradient<T, kMask>(grad_output, y, where, width, centred, c);
            if (grad_residual != nullptr) write<kStream>(grad_residual + where, g, width);
            if (grad_input != nullptr) write<kStream>(grad_input + where, g * c.scale, width);
            g_sum += g;
            gx_sum = fma(g, centred, gx_sum);
          });
          store(g_sums + i, load(g_sums + i, All{}) + g_sum, All{});
          store(gx_sums + i, load(gx_sums + i, All{}) + gx_sum, All{});
        });
      });
      add_to(own.first, g_sums, cols);
      add_to(own.second, gx_sums, cols);
    }
    if constexpr (kStream) streaming_fence();
  }

  void finish(int64_t unit, int64_t parts) const {
    const Shape& shape = op.shape;
    const Scratch<A> all = scratch(unit, 0, parts);
    if (op.sums_given) {
      const A* const given = static_cast<const A*>(op.sums);
      for (int64_t i = 0; i < matrix.cols; ++i) all.first[i] = given[i], all.second[i] = given[matrix.cols + i];
    } else {
      for (int64_t part = 1; part < parts; ++part) {
        const Scratch<A> some = scratch(unit, part, parts);
        for (int64_t i = 0; i < matrix.cols; ++i) all.first[i] += some.first[i], all.second[i] += some.second[i];
      }
    }
    spread_statistics(op, all, unit);
    const int64_t size = shape.groups > 0 ? shape.channels / shape.groups : 1;
    const A* const rstd = static_cast<const A*>(op.rstd) + unit * shape.groups;
    read_all(op.weight, op.parameter_dtype, A(1), matrix.cols, all.offset);  // the weight until the offset is known
    for (int64_t first = 0; first < matrix.cols; first += size) {
      double g = 0, gx = 0;
      for (int64_t i = first; i < first + size; ++i) {
        g += double(all.offset[i]) * all.first[i];
        gx += double(all.offset[i]) * all.second[i];
      }
      const auto [offset, slope] = GroupGradient<A>(op, rstd[first / size], g, gx);
      for (int64_t i = first; i < first + size; ++i) all.offset[i] = offset, all.slope[i] = slope;
    }
    if (shape.groups > 0 || op.sums_given) return;
    with_type(op.parameter_dtype, [&](auto t) {
      using P = decltype(t);
      P *const grad_weight = static_cast<P*>(op.grad_weight), *const grad_bias = static_cast<P*>(op.grad_bias);
      for (int64_t i = 0; grad_weight != nullptr && i < matrix.cols; ++i) {
        grad_weight[i] = narrow<P>(accumulate_t<P>(all.second[i] * double(rstd[i])));
      }
      for (int64_t i = 0; grad_bias != nullptr && i < matrix.cols; ++i) {
        grad_bias[i] = narrow<P>(accumulate_t<P>(all.first[i]));
      }
    });
    A* const sums = static_cast<A*>(op.sums);
    for (int64_t i = 0; sums != nullptr && i < matrix.cols; ++i) {
      sums[i] = A(all.first[i]);
      sums[matrix.cols + i] = A(all.second[i]);
    }
  }

  void apply(int64_t unit, int64_t part, int64_t parts) const {
    with_mask(op, is_masked(op), streams(),
              [&](auto mask, auto stream) { this->template apply_as<mask(), stream>(unit, part, parts); });
  }

  template <Mask kMask, bool kStream>
  void apply_as(int64_t unit, int64_t part, int64_t parts) const {
    const int64_t cols = matrix.cols, begin = matrix.rows * part / parts, end = matrix.rows * (part + 1) / parts;
    const Scratch<A> own = scratch(unit, 0, parts);
    const T *const x = rows_of(op.x, unit), *const grad_output = rows_of(applied_gradient(op), unit);
    const T* const y = rows_of(op.y, unit);
    T* const grad_input = rows_of(op.grad_input, unit);
    T* const grad_residual = op.sums_given ? rows_of(op.grad_residual, unit) : nullptr;
    for_rows_backwards<T>(begin, end, cols, [&](int64_t row, auto together) DLKIT_INLINE_LAMBDA {
      for_columns<A, 1>(0, cols, [&](int64_t i, int, auto width) DLKIT_INLINE_LAMBDA {
        const Channel<V> c = own.channel(i);
        fetch_rows_ahead<together()>(x + row * cols, i, cols);
        fetch_rows_ahead<together()>(grad_output + row * cols, i, cols);
        if constexpr (kMask == Mask::FromY) fetch_rows_ahead<together()>(y + row * cols, i, cols);
        repeat(together, [&](int r) DLKIT_INLINE_LAMBDA {
          const int64_t where = (row + r) * cols + i;
          const V centred = load(x + where, width) - c.mean;
          const V g = masked_gradient<T, kMask>(grad_output, y, where, width, centred, c);
          if (grad_residual != nullptr) write<kStream>(grad_residual + where, g, width);
          if (grad_input != nullptr) {
            write<kStream>(grad_input + where, fma(centred, -c.slope, fma(g, c.scale, -c.offset)), width);
          }
        });
      });
    });
    if constexpr (kStream) streaming_fence();
  }
};

// ---------------------------------------------------------------------------------------------------------------------

// The gradients of group_norm's parameters: over the batch in order, from each sample's sums, found by sums_of(n, c).
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

// ---------------------------------------------------------------------------------------------------------------------
// Groups of short slices, those of [N, C] among them: rows of layer_norm, whose weight has an element for each of the
// row's rather than one a slice. 8192x1024 in 32 groups, backward: 100 ms slice by slice, 3 so.

constexpr int64_t kShortSlice = 64;

bool groups_are_rows(const Shape& shape) {
  return shape.groups > 0 && (shape.space == 1 || (!shape.channels_last && shape.space <= kShortSlice));
}
bool groups_are_rows(const Forward& op) {
  return groups_are_rows(op.shape) && op.statistics == Statistics::Compute && op.y != nullptr && op.var == nullptr &&
         op.residual == nullptr && !op.relu;
}
bool groups_are_rows(const Backward& op) {
  return groups_are_rows(op.shape) && !op.statistics_given && !op.sums_given && op.grad_residual == nullptr && !op.relu;
}

// A parameter of the channels, or room for its gradient, for every element of a sample.
template <class A>
struct ElementParameters {
  A *weight, *bias;
  uintptr_t rest;  // of the workspace, which is still to be sized where it is null
  int64_t channels, space;
  static int64_t bytes(const Shape& shape) {
    return (shape.channels * shape.space * int64_t(sizeof(A)) + 63) / 64 * 64;
  }
  ElementParameters(void* workspace, const Shape& shape, bool has_weight, bool has_bias)
      : channels(shape.channels), space(shape.space) {
    rest = uintptr_t(workspace);
    const auto take = [&](bool wanted) {
      A* const taken = wanted ? reinterpret_cast<A*>(rest) : nullptr;
      if (wanted) rest += uintptr_t(bytes(shape));
      return taken;
    };
    weight = take(has_weight);
    bias = take(has_bias);
  }
  // For channels [begin, end), in whole vectors: what is too much of one, the next overwrites.
  template <class Op>
  void spread(const Op& op, int64_t begin, int64_t end) const {
    const auto fill = [&](const void* parameter, A* elements) {
      for (int64_t channel = begin; elements != nullptr && channel < end; ++channel) {
        const Vector<A> value = broadcast<A>(A(read(parameter, op.parameter_dtype, channel)));
        for (int64_t i = channel * space; i < (channel + 1) * space; i += kLanes<A>) {
          i + kLanes<A> <= end* space ? store(elements + i, value, All{})
                                      : store(elements + i, value, First{end * space - i});
        }
      }
    };
    fill(op.weight, weight);
    fill(op.bias, bias);
  }
  void gather(const Backward& op) const {
    parallel_for(channels, max64(1, kGrain / space), [&](int64_t begin, int64_t end) {
      const auto add_up = [&](const A* elements, void* gradient) {
        for (int64_t channel = begin; elements != nullptr && channel < end; ++channel) {
          Vector<A> total = {};
          for_columns<A, 1>(0, space, [&](int64_t i, int, auto width) DLKIT_INLINE_LAMBDA {
            total += load(elements + channel * space + i, width);
          });
          write_one(gradient, op.parameter_dtype, channel, sum_lanes(total));
        }
      };
      add_up(weight, op.grad_weight);
      add_up(bias, op.grad_bias);
    });
  }
};

template <class A>
void forward_rows(const Forward& op) {
  const Shape& shape = op.shape;
  const ElementParameters<A> wide(op.workspace, shape, op.weight != nullptr, op.bias != nullptr);
  const int64_t size = shape.channels / shape.groups, cols = size * shape.space;
  const auto normalize = [&](int64_t row, int64_t rows, int64_t first_group, int64_t groups) {
    const auto from = [&](auto* tensor, int64_t element) {
      using Byte = std::conditional_t<std::is_const_v<std::remove_pointer_t<decltype(tensor)>>, const char, char>;
      return static_cast<Byte*>(tensor) + element * size_of(op.dtype);
    };
    layer_norm::forward_cpu({from(op.x, row * cols),
                             nullptr,
                             at<A>(wide.weight, first_group * cols),
                             at<A>(wide.bias, first_group * cols),
                             from(op.y, row * cols),
                             nullptr,
                             static_cast<A*>(op.mean) + row,
                             static_cast<A*>(op.rstd) + row,
                             rows,
                             cols,
                             cols,
                             0,
                             op.eps,
                             op.dtype,
                             std::is_same_v<A, double> ? DType::F64 : DType::F32,
                             false,
                             {},
                             groups});
  };
  // What fits in caches: a tile of groups for the whole batch by the thread that spread their parameters, which are
  // slow to read from another core's cache (16x512x7x7: 155 us instead of 65). Larger batches go in the order of
  // memory.
  const int64_t tile = max64(1, 2048 / cols), tiles = (shape.groups + tile - 1) / tile;
  const bool fits = shape.batch * shape.groups * cols * size_of(op.dtype) <= int64_t(4) << 20;
  if (shape.space == 1 || tiles < 16 || cols < 256 || !fits) {
    wide.spread(op, 0, shape.channels);
    return normalize(0, shape.batch * shape.groups, 0, shape.groups);
  }
  parallel_for(tiles, max64(1, kGrain / (shape.batch * tile * cols)), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i * tile, groups = min64(tile, shape.groups - first);
      wide.spread(op, first * size, (first + groups) * size);
      for (int64_t n = 0; n < shape.batch; ++n) normalize(n * shape.groups + first, groups, first, groups);
    }
  });
}

// The rows of backward, and room: for the weight's elements, then their gradients, then layer_norm's partials.
template <class A>
layer_norm::Backward backward_rows_of(const Backward& op, const ElementParameters<A>& wide,
                                      const ElementParameters<A>& gradients) {
  const Shape& shape = op.shape;
  const int64_t cols = shape.channels / shape.groups * shape.space;
  return {op.grad_output,
          nullptr,
          op.x,
          op.mean,
          op.rstd,
          wide.weight,
          op.grad_input,
          gradients.weight,
          gradients.bias,
          reinterpret_cast<void*>(gradients.rest),
          shape.batch * shape.groups,
          cols,
          cols,
          0,
          cols,
          op.dtype,
          std::is_same_v<A, double> ? DType::F64 : DType::F32,
          false,
          {},
          nullptr,
          shape.groups};
}

// Calls f(wide, gradients, rows).
template <class F>
auto with_rows(const Backward& op, const F& f) {
  const auto go_on = [&](auto type) {
    using A = decltype(type);
    const ElementParameters<A> wide(op.workspace, op.shape, op.weight != nullptr, false);
    const ElementParameters<A> gradients(reinterpret_cast<void*>(wide.rest), op.shape, op.grad_weight != nullptr,
                                         op.grad_bias != nullptr);
    return f(wide, gradients, backward_rows_of(op, wide, gradients));
  };
  return op.dtype == DType::F64 ? go_on(double()) : go_on(float());
}

void backward_rows(const Backward& op) {
  with_rows(op, [&](const auto& wide, const auto& gradients, const layer_norm::Backward& rows) {
    wide.spread(op, 0, op.shape.channels);
    layer_norm::backward_cpu(rows);
    gradients.gather(op);
  });
}

}  // namespace

void forward(const Forward& op) {
  if (groups_are_rows(op)) return op.dtype == DType::F64 ? forward_rows<double>(op) : forward_rows<float>(op);
  const Plan p = plan(op.shape);
  const bool compute = op.statistics == Statistics::Compute;
  const double factor = running_factor(op);
  with_type(op.dtype, [&](auto t) {
    using T = decltype(t);
    if (op.shape.channels_last) {
      run(ForwardChannelsLast<T>{op, factor, Matrix(op.shape)}, p, compute, op.y != nullptr);
    } else {
      const ForwardContiguous<T> side{op, factor, static_cast<Moments*>(op.workspace)};
      !compute&& op.y != nullptr ? side.apply_in_memory_order() : run(side, p, compute, op.y != nullptr);
    }
  });
  if (compute && op.num_batches_tracked != nullptr) ++*op.num_batches_tracked;
}

void backward(const Backward& op) {
  if (groups_are_rows(op)) return backward_rows(op);
  const Plan p = plan(op.shape);
  // With given statistics reduce does everything.
  const bool reduce = !op.sums_given;
  const bool apply = !reduce || (op.grad_input != nullptr && !op.statistics_given);
  const bool parameters = op.shape.groups > 0 && (op.grad_weight != nullptr || op.grad_bias != nullptr);
  with_type(op.dtype, [&](auto t) {
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
  const int64_t pitch = Matrix(shape).pitch;
  return p.units * p.parts * (type == DType::F64 ? Scratch<double>::bytes(pitch) : Scratch<float>::bytes(pitch));
}

int64_t forward_bytes(const Forward& op) {
  if (groups_are_rows(op)) {
    return ElementParameters<double>::bytes(op.shape) * (int64_t(op.weight != nullptr) + int64_t(op.bias != nullptr));
  }
  if (op.shape.channels_last) return scratch_bytes(op.shape, op.dtype);
  const Plan p = plan(op.shape);
  return op.statistics == Statistics::Compute ? p.units * p.parts * int64_t(sizeof(Moments)) : 0;
}

int64_t backward_bytes(const Backward& op) {
  if (groups_are_rows(op)) {
    return with_rows(op, [&](const auto&, const auto& gradients, const layer_norm::Backward& rows) {
      return int64_t(gradients.rest - uintptr_t(op.workspace)) + layer_norm::backward_partials_cpu(rows);
    });
  }
  if (op.shape.channels_last) return scratch_bytes(op.shape, op.dtype);
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
