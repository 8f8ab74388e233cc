// Rows of adjacent classes, one after the other, in chunks that stay in the first-level cache.
#pragma once

#include "bf16.h"
#include "shared.h"

namespace dlkit::cross_entropy::DLKIT_ISA {
namespace {

template <class A>
constexpr int64_t kChunk = sizeof(A) == 8 ? 512 : 2048;

// The largest of `max` and the logits; with a softcap, of the capped logits, which it writes to `staged`.
template <class T>
accumulate_t<T> largest_of(const T* x, int64_t count, double softcap, accumulate_t<T>* staged, accumulate_t<T> max) {
  using A = accumulate_t<T>;
  Vector<A> largest[kSlots];
  for (Vector<A>& v : largest) v = broadcast(max);
  const auto take = [&](Vector<A> v, int slot, auto width) DLKIT_INLINE_LAMBDA {
    largest[slot] = maximum(keep(v, width, broadcast(-kInfinity<A>)), largest[slot]);
  };
  if (softcap == 0) {
    for_columns<A, kSlots>(
        0, count, [&](int64_t i, int slot, auto width) DLKIT_INLINE_LAMBDA { take(load(x + i, width), slot, width); });
  } else {
    const Cap<A> cap(softcap);
    for_columns<A, 1>(0, count, [&](int64_t i, int slot, auto width) DLKIT_INLINE_LAMBDA {
      const Vector<A> v = cap(load(x + i, width));
      store(staged + i, v, All{});
      take(v, slot, width);
    });
  }
  return largest_lane(maximum(maximum(largest[0], largest[1]), maximum(largest[2], largest[3])));
}

// The sums of a chunk.
template <class A>
struct Sums {
  wide_t<A> sum = 0, dot = 0, mass = 0;
};

enum class Dot { None, Ones, Array };  // the factor of x - shift

template <Dot kDot, class T, class A>
void add_chunk(const T* values, const A* u, int64_t count, A shift, Sums<A>& sums) {
  Vector<A> sum[kSlots] = {}, dot[kSlots] = {}, mass[kSlots] = {};
  for_columns<A, kSlots>(0, count, [&](int64_t i, int slot, auto width) DLKIT_INLINE_LAMBDA {
    const Vector<A> d = load(values + i, width) - shift;
    sum[slot] += keep(exponential(d), width);
    if constexpr (kDot == Dot::Ones) dot[slot] += keep(d, width);
    if constexpr (kDot == Dot::Array) {
      const Vector<A> v = load(u + i, width);
      dot[slot] += keep(d * v, width);
      mass[slot] += v;
    }
  });
  sums.sum += sum_lanes((sum[0] + sum[1]) + (sum[2] + sum[3]));
  if constexpr (kDot != Dot::None) sums.dot += sum_lanes((dot[0] + dot[1]) + (dot[2] + dot[3]));
  if constexpr (kDot == Dot::Array) sums.mass += sum_lanes((mass[0] + mass[1]) + (mass[2] + mass[3]));
  if constexpr (kDot == Dot::Ones) sums.mass += wide_t<A>(count);
}

template <class T>
void read_row(const Forward& op, int64_t row, Rows<accumulate_t<T>, kRows>& rows, int64_t i) {
  using A = accumulate_t<T>;
  alignas(64) A staged[kChunk<A> + kLanes<A>], buffer[kChunk<A> + kLanes<A>];
  const T* const x = static_cast<const T*>(op.x) + row * op.stride;
  A max = -kInfinity<A>, shift = 0;
  Sums<A> sums;
  for (int64_t begin = 0; begin < op.classes; begin += kChunk<A>) {
    const int64_t count = min64(kChunk<A>, op.classes - begin);
    int64_t done = 0;  // elements done by pairs
    if constexpr (std::is_same_v<T, BFloat16>) {
      const A largest = op.softcap == 0 ? largest_of_pairs(x + begin, count / kPair * kPair) : A(NAN);
      if (largest == largest) done = count / kPair * kPair, max = max > largest ? max : largest;
    }
    if (done < count) max = largest_of(x + begin + done, count - done, op.softcap, staged, max);
    const A* const u = shares<T>(op, row, begin, count, buffer);
    const A next = max == -kInfinity<A> ? A(0) : max;
    if (next != shift) {
      const wide_t<A> grown = wide_t<A>(shift) - next;
      if (sums.sum > 0) sums.sum *= std::exp(grown);
      if (sums.mass != 0) sums.dot += sums.mass * grown;
      shift = next;
    }
    done = 0;
    if constexpr (std::is_same_v<T, BFloat16>) {
      if (op.softcap == 0 && u == nullptr && fits(shift)) {
        done = count / kPair * kPair;
        const PairSums found = op.label_smoothing != 0 ? sum_pairs<true>(x + begin, done, shift)
                                                       : sum_pairs<false>(x + begin, done, shift);
        sums.sum += found.sum;
        sums.dot += found.dot;
        if (op.label_smoothing != 0) sums.mass += wide_t<A>(done);
      }
    }
    const auto add = [&](const auto* values) {
      if (u != nullptr) {
        add_chunk<Dot::Array>(values, u, count, shift, sums);
      } else if (op.label_smoothing != 0) {
        add_chunk<Dot::Ones>(values, u, count - done, shift, sums);
      } else {
        add_chunk<Dot::None>(values, u, count - done, shift, sums);
      }
    };
    op.softcap == 0 ? add(x + begin + done) : add(staged);
  }
  rows.max[i] = max;
  rows.sum[i] = A(sums.sum > 0 && sums.sum < 1 ? 1 : sums.sum);  // the largest logit adds 1 before rounding
  rows.dot[i] = A(sums.dot);
  rows.mass[i] = A(sums.mass);
  const int64_t target = read_target(op, row, rows, i);
  if (target >= 0) rows.at_target[i] = capped(x[target], op.softcap);
}

template <class T>
void forward_rows(const Forward& op, int64_t begin, int64_t end) {
  Rows<accumulate_t<T>, kRows> rows = {};
  for (int64_t first = begin; first < end; first += kRows) {
    const int64_t count = min64(kRows, end - first);
    for (int64_t i = 0; i < count; ++i) read_row<T>(op, first + i, rows, i);
    finish(op, first, count, rows);
  }
}

// Writes the gradient of adjacent classes. kMore: with a softcap or a z-loss; then `staged` holds x and `slopes` the
// softcap's derivative.
template <class T, bool kArray, bool kMore>
void write_chunk(const T* x, T* grad, int64_t count, const Slope<accumulate_t<T>>& slope, const accumulate_t<T>* u,
                 const accumulate_t<T>* staged, const accumulate_t<T>* slopes, bool nt_store) {
  using A = accumulate_t<T>;
  const Vector<A> scale = broadcast(slope.scale), share = broadcast(slope.share), z = broadcast(slope.z);
  for_columns<A, 2>(0, count, [&](int64_t i, int, auto width) DLKIT_INLINE_LAMBDA {
    Vector<A> v;
    if constexpr (kMore) {
      v = load(staged + i, width);
    } else {
      v = load(x + i, width);
    }
    const Vector<A> rest = kArray ? share * load(u + i, width) : share;
    const Vector<A> e = exponential(v - slope.shift);
    v = fma(e, scale, -rest);
    if constexpr (kMore) v = fma(e, z, v) * load(slopes + i, width);
    write(grad + i, v, width, nt_store);
  });
}

template <class T>
void write_row(const Backward& op, int64_t row, wide_t<accumulate_t<T>> weights, bool nt_store) {
  using A = accumulate_t<T>;
  alignas(64) A u_buffer[kChunk<A> + kLanes<A>], staged[kChunk<A> + kLanes<A>], slopes[kChunk<A> + kLanes<A>];
  const T* const x = static_cast<const T*>(op.x) + row * op.stride;
  T* const grad = static_cast<T*>(op.grad_input) + row * op.grad_stride;
  const Slope<A> slope = slope_of<A>(op, row, weights);
  if (slope.target < 0 && slope.scale == 0 && slope.share == 0) {  // ignored
    memset(static_cast<void*>(grad), 0, size_t(op.classes) * sizeof(T));
    return;
  }
  const T at_target = slope.target < 0 ? T{} : x[slope.target];  // grad may be x
  const bool more = op.softcap != 0 || op.z_scale != 0;
  const bool plain = !more && op.target != nullptr && (op.weight == nullptr || op.label_smoothing == 0);
  const int64_t step = plain ? op.classes : kChunk<A>;
  const Cap<A> cap(op.softcap == 0 ? 1 : op.softcap);
  for (int64_t begin = 0; begin < op.classes; begin += step) {
    const int64_t count = min64(step, op.classes - begin);
    const A* const u = plain ? nullptr : shares<T>(op, row, begin, count, u_buffer);
    if (more) {
      for_columns<A, 1>(0, count, [&](int64_t i, int, auto width) DLKIT_INLINE_LAMBDA {
        Vector<A> v = load(x + begin + i, width), derivative = broadcast(A(1));
        if (op.softcap != 0) v = cap(v, derivative);
        store(staged + i, v, All{});
        store(slopes + i, derivative, All{});
      });
    }
    int64_t done = 0;
    if constexpr (std::is_same_v<T, BFloat16>) {
      if (plain && fits(slope.shift, slope.scale, slope.share)) {
        done = count / kPair * kPair;
        slope.share == 0 ? write_gradient<true>(x, grad, done, slope.shift, slope.scale, 0, nt_store)
                         : write_gradient<false>(x, grad, done, slope.shift, slope.scale, slope.share, nt_store);
      }
    }
    const auto write_as = [&](auto array, auto further) {
      write_chunk<T, array, further>(x + begin + done, grad + begin + done, count - done, slope, u, staged, slopes,
                                     nt_store);
    };
    const std::true_type yes;
    const std::false_type no;
    if (more) {
      u != nullptr ? write_as(yes, yes) : write_as(no, yes);
    } else {
      u != nullptr ? write_as(yes, no) : write_as(no, no);
    }
  }
  if (slope.target < 0) return;
  Vector<A> v = broadcast(A(widen(at_target))), derivative = broadcast(A(1));
  if (op.softcap != 0) v = cap(v, derivative);
  const Vector<A> e = exponential(v - slope.shift);
  v = fma(e, broadcast(slope.scale), broadcast(-slope.hit));
  grad[slope.target] = narrow<T>((fma(e, broadcast(slope.z), v) * derivative)[0]);
}

int64_t row_grain(const Problem& op) { return max64(1, grain_of(op) / op.classes); }

}  // namespace
}  // namespace dlkit::cross_entropy::DLKIT_ISA
