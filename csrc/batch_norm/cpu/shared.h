// What both layouts share: the division into parts, moments and what statistics become, a channel's arithmetic.
#pragma once

#include <atomic>
#include <cmath>
#include <limits>

#include "../../common/cpu/activation.h"
#include "../../common/cpu/moments.h"
#include "../../common/cpu/parallel.h"
#include "../../common/cpu/simd.h"
#include "../../common/dispatch.h"
#include "../kernel.h"

namespace dlkit::batch_norm::DLKIT_ISA {
namespace {

using namespace dlkit::DLKIT_ISA;

constexpr int64_t kFirstRun = 64, kRun = 4096;       // elements that are added up in fp32, at first and at most
constexpr int64_t kFirstRunRows = 8, kRunRows = 64;  // rows that are
constexpr int64_t kRowsTogether = 4;                 // rows that share one loading of what belongs to their channels
constexpr int64_t kBlockBytes = 128 * 1024;          // of the blocks that apply takes from the end

// Equal terms, as a mean over the loss gives, leave an error of one epsilon for some ten additions to a lane. So slots
// are added up after a block of elements, 16 to 32 additions to each lane, and a run of blocks goes on in fp64. Short
// slices add to one lane as often as long ones to all. A block is whole slices where it can be: to cut 14 x 14 elements
// in two takes a tenth more time.
template <class A>
int64_t block_of(int64_t slice) {
  constexpr int64_t kBlock = 32 * kSlots * kLanes<A>;
  return slice < 64 ? 16 * slice : slice < kBlock ? kBlock / slice * slice : kBlock;
}
int64_t longest_run(int64_t slice) { return slice < 64 ? kRun / 64 * slice : kRun; }

struct Plan {
  int64_t units, parts, unit_elements;
};

Plan plan(const Shape& shape, int64_t units) {
  const int64_t elements = shape.batch * shape.channels * shape.space;
  // Enough parts for many cores, each worth starting a thread for.
  const int64_t parts = units >= 16 ? 1 : max64(1, min64(64 / units, elements / units / (2 * kGrain)));
  return {units, parts, elements / units};
}
Plan plan(const Shape& shape) {
  return plan(shape, shape.channels_last ? (shape.groups > 0 ? shape.batch : 1)
                     : shape.groups > 0  ? shape.batch * shape.groups
                                         : shape.channels);
}

template <class Side>
void run(const Side& side, const Plan& plan, bool reduce, bool apply) {
  const int64_t units = plan.units, parts = plan.parts;
  if (parts == 1) {
    return parallel_for(units, max64(1, kGrain / plan.unit_elements), [&](int64_t begin, int64_t end) {
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

template <class A>
constexpr DType kDType = std::is_same_v<A, double> ? DType::F64 : DType::F32;

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
// array[first + i] = values[i], if there is an array.
[[gnu::noinline]] void write_values(void* array, DType type, int64_t first, int64_t count, const double* values) {
  if (array == nullptr) return;
  with_type(type, [&](auto t) {
    using T = decltype(t);
    T* const output = static_cast<T*>(array) + first;
    for (int64_t i = 0; i < count; ++i) output[i] = narrow<T>(accumulate_t<T>(values[i]));
  });
}

// All of a small array, widened; `otherwise` where there is none.
template <class A>
[[gnu::noinline]] void read_all(const void* array, DType type, A otherwise, int64_t count, A* output) {
  if (array == nullptr) {
    for (int64_t i = 0; i < count; ++i) output[i] = otherwise;
    return;
  }
  with_type(type, [&](auto t) {
    using P = decltype(t);
    const P* const values = static_cast<const P*>(array);
    if constexpr (std::is_same_v<accumulate_t<P>, A>) {
      for_columns<A, 1>(0, count, [&](int64_t i, int, auto width) DLKIT_INLINE_LAMBDA {
        store(output + i, load(values + i, width), width);
      });
    } else {
      for (int64_t i = 0; i < count; ++i) output[i] = A(widen(values[i]));
    }
  });
}
template <class A>
A read_or(const void* array, DType type, int64_t i, double otherwise) {
  if (array == nullptr) return A(otherwise);
  return type == kDType<A> ? static_cast<const A*>(array)[i] : A(read(array, type, i));
}

// The moments of a group whose squares are too large to be added up in fp32, from about 1e19 on; others are kept.
// element(i) gives the group's elements as doubles.
template <class A, class F>
void add_large_in_double(double count, double& mean, double& m2, const F& element) {
  if (std::is_same_v<A, double> || is_finite(m2)) return;
  double sum = 0;
  for (int64_t i = 0; i < int64_t(count); ++i) sum += element(i);
  mean = sum / count;
  m2 = 0;
  for (int64_t i = 0; i < int64_t(count); ++i) {
    const double deviation = element(i) - mean;
    m2 += deviation * deviation;
  }
}

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

template <class A>
struct AfterNorm {
  Activation activation;
  A negative_slope;
  template <class Op>
  explicit AfterNorm(const Op& op) : activation(op.activation), negative_slope(A(op.negative_slope)) {}
};

// Forward's results for several vectors of a channel each, the r-th at index(r), go to write(); `residual` may be null.
// Flags that are the same for a whole pass are branches here, in forward and backward, one for all of these vectors: a
// loop for each combination of them was half of the library. Of the activations the ReLU alone is inline.
template <int kCount, class T, class Width, class Index, class Write>
DLKIT_INLINE void forward_values(const T* x, const T* residual, const AfterNorm<accumulate_t<T>>& after, Width width,
                                 const Channel<Vector<accumulate_t<T>>>& c, const Index& index, const Write& write) {
  using V = Vector<accumulate_t<T>>;
  constexpr std::integral_constant<int, kCount> kAll;
  V z[kCount];
  repeat(kAll, [&](int r) DLKIT_INLINE_LAMBDA { z[r] = fma(load(x + index(r), width) - c.mean, c.scale, c.bias); });
  if (residual != nullptr) {
    repeat(kAll, [&](int r) DLKIT_INLINE_LAMBDA { z[r] += load(residual + index(r), width); });
  }
  if (after.activation != Activation::None) {
    if (after.activation == Activation::Relu) {
      repeat(kAll, [&](int r) DLKIT_INLINE_LAMBDA { z[r] = z[r] < 0 ? V{} : z[r]; });
    } else [[unlikely]] {
      V called[kCount];  // a copy: what a call takes the address of stays in memory, in the other branches too
      repeat(kAll, [&](int r) DLKIT_INLINE_LAMBDA { called[r] = z[r]; });
      activate<accumulate_t<T>>(after.activation, after.negative_slope, called, kCount);
      repeat(kAll, [&](int r) DLKIT_INLINE_LAMBDA { z[r] = called[r]; });
    }
  }
  write(z);
}

// Where the gradients that pass the activation come from: a ReLU's mask from y, or from x where y follows from it;
// others from z, which is worked out again.
enum class Mask { None, FromX, FromY, FromZ };

// How backward finds them: `source` is y or the residual, or null.
template <class T>
struct Passing {
  Mask mask;
  AfterNorm<accumulate_t<T>> after;
  const T* source;
  Passing(const Backward& op, Mask mask)
      : mask(mask),
        after(op),
        source(mask == Mask::FromY || mask == Mask::FromZ ? static_cast<const T*>(op.y_or_residual) : nullptr) {}
  // The same for what begins at an offset.
  DLKIT_INLINE_MEMBER Passing from(int64_t offset) const {
    Passing passing = *this;
    passing.source = at<const T>(source, offset);
    return passing;
  }
};

// The gradients that pass the activation, of vectors as in forward_values.
template <class T, int kCount, class V, class Width, class Index>
DLKIT_INLINE void masked_gradients(const Passing<T>& passing, const T* grad_output, Width width,
                                   const V (&centred)[kCount], const Channel<V>& c, V (&g)[kCount],
                                   const Index& index) {
  constexpr std::integral_constant<int, kCount> kAll;
  repeat(kAll, [&](int r) DLKIT_INLINE_LAMBDA { g[r] = load(grad_output + index(r), width); });
  if (passing.mask == Mask::None) return;
  // Where the result is NaN the gradient passes, as through torch's ReLU.
  if (passing.mask == Mask::FromY) {
    repeat(kAll, [&](int r) DLKIT_INLINE_LAMBDA { g[r] = load(passing.source + index(r), width) <= 0 ? V{} : g[r]; });
  } else if (passing.mask == Mask::FromX) {
    repeat(kAll, [&](int r) DLKIT_INLINE_LAMBDA {
      g[r] = fma(centred[r], c.scale, c.bias) <= rounds_to_zero(T()) ? V{} : g[r];
    });
  } else if (passing.mask == Mask::FromZ) [[unlikely]] {
    V z[kCount], called[kCount];  // copies, as in forward_values
    repeat(kAll, [&](int r) DLKIT_INLINE_LAMBDA { called[r] = g[r]; });
    repeat(kAll, [&](int r) DLKIT_INLINE_LAMBDA { z[r] = fma(centred[r], c.scale, c.bias); });
    if (passing.source != nullptr) {
      repeat(kAll, [&](int r) DLKIT_INLINE_LAMBDA { z[r] += load(passing.source + index(r), width); });
    }
    const auto& after = passing.after;
    activation_gradients<accumulate_t<T>>(after.activation, after.negative_slope, z, called, kCount);
    repeat(kAll, [&](int r) DLKIT_INLINE_LAMBDA { g[r] = called[r]; });
  }
}

// Backward's apply of vectors as in forward_values: the gradients that pass the activation go to write_residual(), then
// those of the input to write_input().
template <int kCount, class T, class Width, class Index, class WriteResidual, class WriteInput>
DLKIT_INLINE void backward_values(const Passing<T>& passing, const T* x, const T* grad_output, Width width,
                                  const Channel<Vector<accumulate_t<T>>>& c, const Index& index,
                                  const WriteResidual& write_residual, const WriteInput& write_input) {
  constexpr std::integral_constant<int, kCount> kAll;
  Vector<accumulate_t<T>> centred[kCount], g[kCount];
  repeat(kAll, [&](int r) DLKIT_INLINE_LAMBDA { centred[r] = load(x + index(r), width) - c.mean; });
  masked_gradients(passing, grad_output, width, centred, c, g, index);
  write_residual(g);
  repeat(kAll, [&](int r) DLKIT_INLINE_LAMBDA { g[r] = fma(centred[r], -c.slope, fma(g[r], c.scale, -c.offset)); });
  write_input(g);
}

Mask mask_of(const Backward& op) {
  if (op.activation == Activation::None) return Mask::None;
  if (op.activation != Activation::Relu) return Mask::FromZ;
  return op.y_or_residual != nullptr ? Mask::FromY : Mask::FromX;
}

// Where reduce leaves the gradient that passed the activation for apply to read, or null: where the residual's goes, or
// where grad_input goes if to work it out again takes longer.
void* passed_gradient(const Backward& op) {
  if (op.sums_given || op.grad_residual != nullptr) return op.sums_given ? nullptr : op.grad_residual;
  return mask_of(op) == Mask::FromZ && !op.statistics_given ? op.grad_input : nullptr;
}
bool is_applied_in_place(const Backward& op) {
  return op.grad_input != nullptr && passed_gradient(op) == op.grad_input;
}
const void* applied_gradient(const Backward& op) {
  const void* const passed = passed_gradient(op);
  return passed != nullptr ? passed : op.grad_output;
}
Mask applied_mask(const Backward& op) { return passed_gradient(op) != nullptr ? Mask::None : mask_of(op); }

// Whether outputs go past the caches: larger than these, and written in runs of `run` elements at a time.
template <class T>
bool should_stream(const Shape& shape, int64_t run) {
  return is_beyond_caches<T>(shape.batch * shape.channels * shape.space) && run * int64_t(sizeof(T)) >= 1024;
}

// Calls f(i, count, width) over [begin, end). With nt_store the vectors of `output` begin at aligned addresses.
template <class T, class F>
DLKIT_INLINE void for_elements(const T* output, bool nt_store, int64_t begin, int64_t end, const F& f) {
  using A = accumulate_t<T>;
  constexpr int64_t kBytes = kLanes<A> * int64_t(sizeof(T));
  const int64_t past = int64_t(uintptr_t(output + begin) % kBytes) / int64_t(sizeof(T));
  if (nt_store && past > 0) {
    const int64_t head = min64(kLanes<A> - past, end - begin);
    f(begin, std::integral_constant<int, 1>(), First{head});
    begin += head;
  }
  for_vectors<A, kSlots>(begin, end, f);
}

// The sums over one channel's share of a unit: of g, and of g * (x - mean).
struct Sums {
  double g = 0, gx = 0;
};

// Tells the caller where A does not hold a value, at either end of its range.
template <class A>
void check_range(const Backward& op, double value) {
  using Limits = std::numeric_limits<A>;
  const double size = std::abs(value);
  if (op.out_of_range == nullptr || (size <= double(Limits::max()) && (size == 0 || size >= Limits::min()))) return;
  std::atomic_ref<bool>(*op.out_of_range).store(true, std::memory_order_relaxed);
}

// What the gradients of a group take from its sums, both weighted where weight counts.
template <class A>
struct GroupGradient {
  A offset = 0, slope = 0;
  GroupGradient(const Backward& op, double rstd, double g, double gx) {
    if (op.statistics_given) return;
    const double exact_offset = rstd * g / op.count, exact_slope = rstd * rstd * rstd * gx / op.count;
    check_range<A>(op, exact_offset);
    check_range<A>(op, exact_slope);
    offset = A(exact_offset);
    slope = A(exact_slope);
  }
};

}  // namespace
}  // namespace dlkit::batch_norm::DLKIT_ISA
