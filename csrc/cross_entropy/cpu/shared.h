// Shared by rows of adjacent classes (rows.h) and pixels (pixels.h): a row's sums, its loss and the factors of its
// gradient.
#pragma once

#include <atomic>
#include <cmath>
#include <limits>

#include "../../common/cpu/math.h"
#include "../../common/cpu/parallel.h"
#include "../kernel.h"

namespace dlkit::cross_entropy::DLKIT_ISA {
namespace {

using namespace dlkit::DLKIT_ISA;

constexpr int64_t kRows = 64;  // rows whose losses are computed together

template <class A>
constexpr A kInfinity = std::numeric_limits<A>::infinity();

// Calls f(offset) for each vector of [0, count). The last one is whole too: buffers have room for it.
template <class A, class F>
DLKIT_INLINE void for_vectors(int64_t count, const F& f) {
  for (int64_t i = 0; i < count; i += kLanes<A>) f(i);
}

// The number subtracted in exponents: the row's maximum, or 0 where all values so far are -inf.
template <class V>
DLKIT_INLINE V shift_of(V max) {
  return max == -kInfinity<decltype(max[0] + 0)> ? V{} : max;
}

bool is_ignored(const Problem& op, int64_t row) { return op.target != nullptr && op.target[row] == op.ignore_index; }

template <class A>
A weight_of(const Problem& op, int64_t column) {
  return op.weight == nullptr ? A(1) : static_cast<const A*>(op.weight)[column];
}

// The type in which a row's factors are computed, to round them only once.
template <class A>
using wide_t = std::conditional_t<std::is_same_v<A, double>, long double, double>;

template <class A>
wide_t<A> sum_of_weights(const Problem& op) {
  if (op.weight == nullptr) return wide_t<A>(op.classes);
  wide_t<A> sum = 0;
  for (int64_t c = 0; c < op.classes && op.label_smoothing != 0; ++c) sum += weight_of<A>(op, c);
  return sum;
}

// The softcap and its derivative.
template <class A>
struct Cap {
  Vector<A> cap;
  explicit Cap(double softcap) : cap(broadcast(A(softcap))) {}
  DLKIT_INLINE_MEMBER Vector<A> operator()(Vector<A> v, Vector<A>& derivative) const {
    return cap * hyperbolic_tangent(v / cap, derivative);
  }
  DLKIT_INLINE_MEMBER Vector<A> operator()(Vector<A> v) const {
    Vector<A> derivative;
    return (*this)(v, derivative);
  }
};

template <class T>
accumulate_t<T> capped(T x, double softcap) {
  using A = accumulate_t<T>;
  return softcap == 0 ? A(widen(x)) : A(Cap<A>(softcap)(broadcast(A(widen(x))))[0]);
}

// u_c of adjacent classes. For probabilities ((1 - e) * probabilities_c + e / classes) * w_c, written to `u`. For class
// targets w_c, or null where that is 1 or has no effect.
template <class T>
const accumulate_t<T>* shares(const Problem& op, int64_t row, int64_t begin, int64_t count, accumulate_t<T>* u) {
  using A = accumulate_t<T>;
  const A* const weight = at<const A>(op.weight, begin);
  if (op.target != nullptr) return op.label_smoothing == 0 ? nullptr : weight;
  const T* const probabilities = static_cast<const T*>(op.probabilities) + row * op.classes + begin;
  const Vector<A> keep = broadcast(A(1 - op.label_smoothing)), rest = broadcast(A(op.label_smoothing / op.classes));
  for_columns<A, 1>(0, count, [&](int64_t i, int, auto width) DLKIT_INLINE_LAMBDA {
    const Vector<A> v = fma(load(probabilities + i, width), keep, rest);
    store(u + i, weight == nullptr ? v : v * load(weight + i, width), width);
  });
  return u;
}

// The results of the passes over kCount rows, a lane a row.
template <class A, int64_t kCount>
struct Rows {
  alignas(64) A max[kCount], sum[kCount];
  alignas(64) A at_target[kCount], hit[kCount];  // x_t; (1 - e) w_t
  alignas(64) A dot[kCount], mass[kCount];  // sum_c u_c * (x_c - max), without hit and the factor `share`; sum_c u_c
};

// Reads the row's target. Of rows with a wrong target, the first among all threads is recorded.
template <class A, int64_t kCount>
DLKIT_INLINE int64_t read_target(const Forward& op, int64_t row, Rows<A, kCount>& rows, int64_t i) {
  rows.hit[i] = rows.at_target[i] = 0;
  if (op.target == nullptr || is_ignored(op, row)) return -1;
  const int64_t target = op.target[row];
  if (uint64_t(target) >= uint64_t(op.classes)) {
    std::atomic_ref<int64_t> bad(*op.bad_row);
    int64_t seen = bad.load();
    while (uint64_t(seen) > uint64_t(row) && !bad.compare_exchange_weak(seen, row)) {
    }
    return -1;
  }
  rows.hit[i] = A((1 - op.label_smoothing) * weight_of<A>(op, target));
  return target;
}

// The losses of `count` rows from `first` on.
template <class A, int64_t kCount>
void finish(const Forward& op, int64_t first, int64_t count, Rows<A, kCount>& rows) {
  alignas(64) A losses[kCount], logs[kCount], squares[kCount] = {};
  const Vector<A> share = broadcast(op.target == nullptr ? A(1) : A(op.label_smoothing / op.classes));
  for_vectors<A>(count, [&](int64_t i) DLKIT_INLINE_LAMBDA {
    const auto get = [&](const A* values) DLKIT_INLINE_LAMBDA { return load(values + i, All{}); };
    const Vector<A> max = get(rows.max), log = logarithm<A>(get(rows.sum));
    const Vector<A> smooth = fma(get(rows.mass), log, -get(rows.dot));
    Vector<A> loss = op.target == nullptr ? smooth : (log - (get(rows.at_target) - max)) * get(rows.hit);
    if (op.target != nullptr && op.label_smoothing != 0) loss = fma(share, smooth, loss);
    store(losses + i, loss, All{});
    store(logs + i, log, All{});
  });
  if (op.z_scale != 0) {
    for (int64_t i = 0; i < count; ++i) {
      const wide_t<A> lse = wide_t<A>(rows.max[i]) + logs[i];
      squares[i] = is_ignored(op, first + i) ? A(0) : A(op.z_scale * lse * lse);
      losses[i] += squares[i];
    }
  }
  if (op.target != nullptr) {
    const int64_t *const target = op.target + first, ignore_index = op.ignore_index;
    for (int64_t i = 0; i < count; ++i) losses[i] = target[i] == ignore_index ? A(0) : losses[i];
  }
  const auto save = [&](void* to, const A* values) {
    if (to != nullptr) memcpy(static_cast<A*>(to) + first, values, size_t(count) * sizeof(A));
  };
  save(op.losses, losses);
  save(op.z, squares);
  save(op.max, rows.max);
  save(op.sum, rows.sum);
  save(op.mass, rows.mass);
}

// Elements a task; those of fp64 take four times as long.
int64_t grain_of(const Problem& op) { return op.dtype == DType::F64 ? kGrain / 4 : kGrain; }

// The factors of backward in one row: grad_c = exp(x_c - shift) * scale - rest_c + exp(x_c - shift) * z, where rest_c
// is share * u_c, or `hit` at the target. z is not added to the scale: a small gradient of the z-loss would be lost
// beside the large terms, which cancel where the target is certain.
template <class A>
struct Slope {
  A shift, scale, z, share, hit;
  int64_t target;  // -1: none
};

template <class A>
Slope<A> slope_of(const Backward& op, int64_t row, wide_t<A> weights) {
  using W = wide_t<A>;
  const A max = static_cast<const A*>(op.max)[row];
  const W inverse = 1 / W(static_cast<const A*>(op.sum)[row]);
  if (is_ignored(op, row)) return {max, A(0 * inverse), 0, 0, 0, -1};
  const A* const total = static_cast<const A*>(op.total);
  const W grad = static_cast<const A*>(op.grad_loss)[row * op.grad_loss_stride];
  const W g = A(total == nullptr ? grad : grad / W(total[0]));
  Slope<A> slope{max, 0, 0, A(g), 0, -1};
  if (op.target == nullptr) {
    slope.scale = A(g * W(static_cast<const A*>(op.mass)[row]) * inverse);
  } else {
    const W share = W(op.label_smoothing) / W(op.classes);
    slope.target = op.target[row];
    const W weight = weight_of<A>(op, slope.target), hit = (1 - W(op.label_smoothing)) * weight;
    slope.share = A(g * share);
    slope.hit = A(g * (hit + share * weight));
    slope.scale = A(g * (hit + share * weights) * inverse);
  }
  if (op.z_scale != 0) {
    const W lse = W(max) - std::log(inverse);
    slope.z = A((total == nullptr ? grad : grad / W(total[1])) * 2 * W(op.z_scale) * lse * inverse);
  }
  return slope;
}

}  // namespace
}  // namespace dlkit::cross_entropy::DLKIT_ISA
