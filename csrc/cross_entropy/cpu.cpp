// Cross entropy on the CPU.
//
// Bytes moved, in units of the logits: forward 1 (reads them), backward 2 (reads them, writes the gradient), the least
// there is; torch moves 7. A row is taken in chunks that stay in the first-level cache: their maximum first, then
// exp(x - max) and its sum, while what was summed before is rescaled where the maximum grew. That is one exp an element
// each way, 10 instructions a vector (12 on AVX2); bf16 has loops of its own (cpu/bf16.h). Where classes do not lie
// side by side ([N, C, H, W]), a lane is a pixel: blocks of pixels are copied class by class, because classes at a
// distance of 2^k bytes would push each other out of the cache. Rows of few classes are turned round and go the same
// way. All of a row is computed by one thread in one order; the losses of rows are added up in the order of the rows.
#include <atomic>
#include <cmath>
#include <limits>

#include "../common/cpu/cache.h"
#include "../common/cpu/math.h"
#include "../common/cpu/parallel.h"
#include "../common/dispatch.h"
#include "cpu/bf16.h"
#include "kernel.h"

namespace dlkit::cross_entropy {
namespace DLKIT_ISA {
namespace {

using namespace dlkit::DLKIT_ISA;

constexpr int64_t kRows = 64;  // rows whose losses are worked out together
constexpr int64_t kFew =
    104;  // adjacent classes up to which a lane is a row: 10 classes took 4 times as long otherwise
constexpr int64_t kPixels = 128, kClasses = 40;
constexpr int64_t kWritten = 512;  // pixels that backward takes together, where it copies none: longer runs of memory

template <class A>
constexpr int64_t kChunk = sizeof(A) == 8 ? 512 : 2048;  // adjacent classes
template <class A>
constexpr A kInfinity = std::numeric_limits<A>::infinity();

// Calls f(offset) for each vector of [0, count), the last one whole too: buffers have room for it.
template <class A, class F>
DLKIT_INLINE void for_vectors(int64_t count, const F& f) {
  for (int64_t i = 0; i < count; i += kLanes<A>) f(i);
}

// What is taken from a row's maximum in its exponents: 0 where all of it is -inf so far.
template <class V>
DLKIT_INLINE V shift_of(V max) {
  return max == -kInfinity<decltype(max[0] + 0)> ? V{} : max;
}

bool is_ignored(const Problem& op, int64_t row) { return op.target != nullptr && op.target[row] == op.ignore_index; }

template <class A>
A weight_of(const Problem& op, int64_t column) {
  return op.weight == nullptr ? A(1) : static_cast<const A*>(op.weight)[column];
}

// What a row's factors are worked out in, so that they are rounded once.
template <class A>
using wide_t = std::conditional_t<std::is_same_v<A, double>, long double, double>;

template <class A>
wide_t<A> sum_of_weights(const Problem& op) {
  if (op.weight == nullptr) return wide_t<A>(op.classes);
  wide_t<A> sum = 0;
  for (int64_t c = 0; c < op.classes && op.label_smoothing != 0; ++c) sum += weight_of<A>(op, c);
  return sum;
}

// The softcap.
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

// u_c of adjacent classes into `u`, or null where it is one constant: (1 - e) * probabilities_c + e / classes, times
// w_c; for classes w_c alone.
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

// What the passes over kCount rows leave, a lane a row.
template <class A, int64_t kCount>
struct Rows {
  alignas(64) A max[kCount], sum[kCount];
  alignas(64) A at_target[kCount], hit[kCount];  // x_t; (1 - e) w_t
  alignas(64) A dot[kCount], mass[kCount];  // sum_c u_c * (x_c - max), without hit and the factor `share`; sum_c u_c
};

// Reads the row's target. A wrong one is remembered, the smallest row of all threads.
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

// Adjacent classes.

// The larger of `max` and the logits; with a softcap of what is left in `staged`, capped.
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

// What a chunk adds to a row.
template <class A>
struct Sums {
  wide_t<A> sum = 0, dot = 0, mass = 0;
};

enum class Dot { None, Ones, Array };  // what x - shift is multiplied with

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
    int64_t done = 0;  // by pairs
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
  rows.sum[i] = A(sums.sum > 0 && sums.sum < 1 ? 1 : sums.sum);  // the largest logit adds 1, before rounding
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

// What backward multiplies with in one row: grad_c = exp(x_c - shift) * scale - rest_c + exp(x_c - shift) * z, where
// rest_c is share * u_c, or `hit` at the target. With z in the scale a small gradient of the z-loss would be lost
// beside the large terms that cancel where the target is certain.
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

// Writes the gradient of adjacent classes. kMore: with a softcap or a z-loss; then `staged` has x, and `slopes` its
// derivative.
template <class T, bool kArray, bool kMore>
void write_chunk(const T* x, T* grad, int64_t count, const Slope<accumulate_t<T>>& slope, const accumulate_t<T>* u,
                 const accumulate_t<T>* staged, const accumulate_t<T>* slopes, bool stream) {
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
    write(grad + i, v, width, stream);
  });
}

template <class T>
void write_row(const Backward& op, int64_t row, wide_t<accumulate_t<T>> weights, bool stream) {
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
        slope.share == 0 ? write_gradient<true>(x, grad, done, slope.shift, slope.scale, 0, stream)
                         : write_gradient<false>(x, grad, done, slope.shift, slope.scale, slope.share, stream);
      }
    }
    const auto write_as = [&](auto array, auto further) {
      write_chunk<T, array, further>(x + begin + done, grad + begin + done, count - done, slope, u, staged, slopes,
                                     stream);
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

// Pixels, and rows of few classes, which are turned round so that a lane is a row. What a pixel needs once goes through
// loops over arrays of lanes, without branches: of few classes it takes as long as all the rest.

// Whether rows of adjacent classes go this way: 10 classes take a quarter of the time so, 64 of 16 bits 0.9 of it;
// beyond 40 of 32 bits what is turned round no longer fits the first-level cache.
bool are_short(const Problem& op) {
  const bool narrow = op.dtype == DType::BF16 || op.dtype == DType::F16;
  return op.inner == 1 && op.classes <= (narrow ? kFew : 40);
}

template <class A>
using Pixels = Rows<A, kPixels>;

template <class A>
using Target = typename MathConstants<A>::Bits;

// The row's class 0 in a tensor that lies as the logits do; `stride` is that of rows of adjacent classes.
template <class T, class Pointer>
T* pixel_at(const Problem& op, Pointer* tensor, int64_t row, int64_t stride) {
  const int64_t image = row / op.inner;
  return static_cast<T*>(tensor) + (op.inner == 1 ? row * stride : image * op.inner * op.classes + row % op.inner);
}

// Rows of adjacent classes as lanes: logits [count, classes] <-> lanes [classes, kPixels].
template <class A>
struct Turned {
  static constexpr int64_t kStep = kLanes<A>;
  static constexpr int64_t kNarrow = 3;  // classes up to which single elements are as quick as vectors
  alignas(64) A lanes[kFew * kPixels], lines[kFew * kPixels + kStep];  // `lines` has the rows behind each other

  template <class T>
  void read(const T* x, int64_t count, int64_t classes, int64_t stride) {
    const auto widen_row = [&](const T* from, A* to, int64_t size) {
      for_columns<A, 1>(0, size, [&](int64_t i, int, auto width) DLKIT_INLINE_LAMBDA {
        store(to + i, load(from + i, width), All{});
      });
    };
    if (stride == classes) {
      widen_row(x, lines, count * classes);
    } else {
      for (int64_t i = 0; i < count; ++i) widen_row(x + i * stride, lines + i * classes, classes);
    }
    const int64_t end = (count + kStep - 1) / kStep * kStep;  // the lanes past the last row hold zeros
    memset(lines + count * classes, 0, size_t((end - count) * classes + (end < kPixels ? kStep : 0)) * sizeof(A));
    if (classes <= kNarrow) {
      for (int64_t c = 0; c < classes; ++c) {
        for (int64_t i = 0; i < end; ++i) lanes[c * kPixels + i] = lines[i * classes + c];
      }
      return;
    }
    for (int64_t i = 0; i < end; i += kStep) {
      for (int64_t c = 0; c < classes; c += kStep) {
        Vector<A> rows[kStep];
        for (int64_t r = 0; r < kStep; ++r) rows[r] = load(lines + (i + r) * classes + c, All{});
        transpose(rows);
        for (int64_t r = 0; r < min64(kStep, classes - c); ++r) store(lanes + (c + r) * kPixels + i, rows[r], All{});
      }
    }
  }

  template <class T>
  void write(T* to, int64_t count, int64_t classes, int64_t stride) {
    if (classes <= kNarrow) {
      for (int64_t c = 0; c < classes; ++c) {
        for (int64_t i = 0; i < count; ++i) lines[i * classes + c] = lanes[c * kPixels + i];
      }
    } else {
      // The last vector of a row reaches into the next one, which is written later.
      for (int64_t i = 0; i < count; i += kStep) {
        for (int64_t c = (classes - 1) / kStep * kStep; c >= 0; c -= kStep) {
          Vector<A> rows[kStep];
          for (int64_t r = 0; r < kStep; ++r) rows[r] = load(lanes + min64(c + r, classes - 1) * kPixels + i, All{});
          transpose(rows);
          for (int64_t r = 0; r < min64(kStep, count - i); ++r) store(lines + (i + r) * classes + c, rows[r], All{});
        }
      }
    }
    const auto narrow_row = [&](const A* from, T* row, int64_t size) {
      for_columns<A, 1>(0, size, [&](int64_t i, int, auto width) DLKIT_INLINE_LAMBDA {
        store(row + i, load(from + i, width), width);
      });
    };
    if (stride == classes) {
      narrow_row(lines, to, count * classes);
    } else {
      for (int64_t i = 0; i < count; ++i) narrow_row(lines + i * classes, to + i * stride, classes);
    }
  }
};

// Calls f(logits, probabilities or null, distance of two classes, turned or null) of some pixels: as they are, or
// turned round.
template <class T, class F>
void with_lanes(const Problem& op, int64_t first, int64_t count, const F& f) {
  using A = accumulate_t<T>;
  const T* const x = pixel_at<const T>(op, op.x, first, op.stride);
  const T* const probabilities =
      op.probabilities == nullptr ? nullptr : pixel_at<const T>(op, op.probabilities, first, op.classes);
  Turned<A> turned, shares;
  if (op.inner > 1) return f(x, probabilities, op.inner, static_cast<Turned<A>*>(nullptr));
  turned.read(x, count, op.classes, op.stride);
  if (probabilities != nullptr) shares.read(probabilities, count, op.classes, op.classes);
  const A* const none = nullptr;
  f(static_cast<const A*>(turned.lanes), probabilities == nullptr ? none : shares.lanes, kPixels, &turned);
}

// The targets of `count` rows, -1 where there is none or the row is ignored. Returns whether one is out of range.
template <class A>
bool read_targets(const Problem& op, int64_t first, int64_t count, Target<A>* targets) {
  if (op.target == nullptr) {
    for (int64_t i = 0; i < count; ++i) targets[i] = Target<A>(-1);
    return false;
  }
  const int64_t *const target = op.target + first, ignore_index = op.ignore_index;
  uint64_t wrong = 0;
  for (int64_t i = 0; i < count; ++i) {
    const bool ignored = target[i] == ignore_index;
    targets[i] = ignored ? Target<A>(-1) : Target<A>(target[i]);
    wrong |= uint64_t(!ignored) & uint64_t(uint64_t(target[i]) >= uint64_t(op.classes));
  }
  return wrong != 0;
}

// u of one class, without hit and the factor `share`.
template <class S, class Width>
DLKIT_INLINE Vector<accumulate_t<S>> pixel_share(const Problem& op, const S* probabilities, int64_t c, Width width) {
  using A = accumulate_t<S>;
  const Vector<A> weight = broadcast(weight_of<A>(op, c));
  if (probabilities == nullptr) return weight;
  return weight * fma(load(probabilities, width), broadcast(A(1 - op.label_smoothing)),
                      broadcast(A(op.label_smoothing / op.classes)));
}

// Pixels [first, first + count) of one image; their class c is at x + c * pitch.
template <class S>
void read_pixels(const Forward& op, int64_t first, int64_t count, const S* x, const S* probabilities, int64_t pitch) {
  using A = accumulate_t<S>;
  using V = Vector<A>;
  alignas(64) A staged[kClasses * kPixels];
  alignas(64) Target<A> targets[kPixels];
  Pixels<A> rows = {};
  const bool wrong = read_targets<A>(op, first, count, targets);
  if (wrong || op.weight != nullptr) {
    for (int64_t i = 0; i < count; ++i) {
      if (read_target(op, first + i, rows, i) < 0) targets[i] = Target<A>(-1);
    }
  } else {
    const A hit = A(1 - op.label_smoothing);
    for (int64_t i = 0; i < count; ++i) rows.hit[i] = targets[i] == Target<A>(-1) ? A(0) : hit;
  }
  const bool dots = probabilities != nullptr || op.label_smoothing != 0;
  const auto get = [](const A* values, int64_t i) DLKIT_INLINE_LAMBDA { return load(values + i, All{}); };
  alignas(64) A max[kPixels];
  for_vectors<A>(count, [&](int64_t i) { store(rows.max + i, broadcast(-kInfinity<A>), All{}); });
  for (int64_t begin = 0; begin < op.classes; begin += kClasses) {
    const int64_t classes = min64(kClasses, op.classes - begin);
    memcpy(max, rows.max, sizeof(max));
    const auto stage = [&](int64_t c, auto together) DLKIT_INLINE_LAMBDA {
      for_columns<A, 1>(0, count, [&](int64_t i, int, auto width) DLKIT_INLINE_LAMBDA {
        V largest = get(max, i);
        repeat(together, [&](int k) DLKIT_INLINE_LAMBDA {
          const V v = load(x + (begin + c + k) * pitch + i, width);
          store(staged + (c + k) * kPixels + i, v, All{});
          largest = maximum(v, largest);
        });
        store(max + i, largest, All{});
      });
    };
    int64_t staging = 0;
    if (op.softcap != 0) {
      const Cap<A> cap(op.softcap);
      for (; staging < classes; ++staging) {
        for_columns<A, 1>(0, count, [&](int64_t i, int, auto width) DLKIT_INLINE_LAMBDA {
          const V v = cap(load(x + (begin + staging) * pitch + i, width));
          store(staged + staging * kPixels + i, v, All{});
          store(max + i, maximum(v, get(max, i)), All{});
        });
      }
    }
    for (; staging + 4 <= classes; staging += 4) stage(staging, std::integral_constant<int, 4>());
    for (; staging < classes; ++staging) stage(staging, std::integral_constant<int, 1>());
    for_columns<A, 1>(0, count, [&](int64_t i, int, auto width) DLKIT_INLINE_LAMBDA {
      const V before = get(rows.max, i), shift = shift_of(get(max, i)), grown = shift_of(before) - shift;
      V sums[kSlots] = {}, dot = {}, mass = {};
      const auto add = [&](int64_t c, int slot) DLKIT_INLINE_LAMBDA {
        const V d = get(staged + c * kPixels, i) - shift;
        sums[slot] += exponential(d);
        if (!dots) return;
        const V u = pixel_share(op, at<const S>(probabilities, (begin + c) * pitch + i), begin + c, width);
        dot = fma(u, d, dot);
        mass += u;
      };
      int64_t c = 0;
      for (; c + kSlots <= classes; c += kSlots) {
#pragma GCC unroll 4
        for (int slot = 0; slot < kSlots; ++slot) add(c + slot, slot);
      }
      for (; c < classes; ++c) add(c, 0);
      V sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
      if (begin > 0) {
        const V old = get(rows.sum, i), old_mass = get(rows.mass, i);
        sum += old > A(0) ? old * exponential(grown) : old;
        dot += get(rows.dot, i) + (grown != A(0) ? old_mass * grown : V{});
        mass += old_mass;
      }
      store(rows.max + i, get(max, i), All{});
      store(rows.sum + i, sum, All{});
      store(rows.dot + i, dot, All{});
      store(rows.mass + i, mass, All{});
    });
    for (int64_t i = 0; i < count; ++i) {
      const Target<A> c = targets[i] - Target<A>(begin);
      const bool here = c < Target<A>(classes);
      const A found = staged[(here ? c : 0) * kPixels + i];
      rows.at_target[i] = here ? found : rows.at_target[i];
    }
  }
  finish(op, first, count, rows);
}

// What backward multiplies with in some pixels, and their targets.
template <class A>
struct PixelSlopes {
  alignas(64) A shift[kWritten], scale[kWritten], z[kWritten], share[kWritten], hit[kWritten];
  alignas(64) Target<A> target[kWritten];

  PixelSlopes(const Backward& op, int64_t first, int64_t count, wide_t<A> weights) {
    const size_t past = size_t((count + kLanes<A> - 1) / kLanes<A> * kLanes<A> - count);  // lanes of the last vector
    for (A* const lanes : {shift, scale, z, share, hit}) memset(lanes + count, 0, past * sizeof(A));
    memset(target + count, 0, past * sizeof(A));
    if (op.z_scale != 0) {
      for (int64_t i = 0; i < count; ++i) {
        const Slope<A> slope = slope_of<A>(op, first + i, weights);
        shift[i] = slope.shift, scale[i] = slope.scale, z[i] = slope.z, share[i] = slope.share, hit[i] = slope.hit;
        target[i] = Target<A>(slope.target);
      }
      return;
    }
    using W = wide_t<A>;  // slope_of() without z
    const auto of_row = [&](const void* values) { return at<const A>(values, first); };
    const A *const sum = of_row(op.sum), *const mass = of_row(op.mass);
    const A* const grad_loss = at<const A>(op.grad_loss, first * op.grad_loss_stride);
    const W divisor = op.total == nullptr ? W(1) : W(*static_cast<const A*>(op.total));
    const W part = op.target == nullptr ? W(1) : W(op.label_smoothing) / W(op.classes);
    const W keep = 1 - W(op.label_smoothing);
    read_targets<A>(op, first, count, target);
    memcpy(shift, of_row(op.max), size_t(count) * sizeof(A));
    A weight[kWritten];
    if (op.weight == nullptr || op.target == nullptr) {
      for (int64_t i = 0; i < count; ++i) weight[i] = 1;
    } else {
      for (int64_t i = 0; i < count; ++i) {
        weight[i] = target[i] == Target<A>(-1) ? A(1) : weight_of<A>(op, int64_t(target[i]));
      }
    }
    A grad[kWritten];
    if (op.grad_loss_stride == 0) {
      for (int64_t i = 0; i < count; ++i) grad[i] = A(*grad_loss / divisor);
    } else {
      for (int64_t i = 0; i < count; ++i) grad[i] = A(grad_loss[i] / divisor);
    }
    if (op.target != nullptr) {
      for (int64_t i = 0; i < count; ++i) grad[i] = target[i] == Target<A>(-1) ? A(0) : grad[i];
    }
    if (mass == nullptr) {
      for (int64_t i = 0; i < count; ++i) scale[i] = A(W(grad[i]) * (keep * weight[i] + part * weights) / W(sum[i]));
    } else {
      for (int64_t i = 0; i < count; ++i) scale[i] = A(W(grad[i]) * W(mass[i]) / W(sum[i]));
    }
    for (int64_t i = 0; i < count; ++i) share[i] = A(W(grad[i]) * part);
    for (int64_t i = 0; i < count; ++i) hit[i] = A(W(grad[i]) * (keep * weight[i] + part * weight[i]));
  }
};

// What the gradients of a pixel's classes are made of: one u for all but the target, one for each class, and softcap
// and z-loss too.
enum class Slopes { Equal, Each, All };

// The same pixels' gradient, to grad + c * pitch; grad may be x.
template <class S>
void write_pixels(const Backward& op, const PixelSlopes<accumulate_t<S>>& slopes, int64_t count, const S* x,
                  const S* probabilities, S* grad, int64_t pitch, bool stream) {
  using A = accumulate_t<S>;
  using V = Vector<A>;
  const Cap<A> cap(op.softcap == 0 ? 1 : op.softcap);
  const auto get = [](const A* values, int64_t i) DLKIT_INLINE_LAMBDA { return load(values + i, All{}); };
  const auto write_class = [&](int64_t c, auto kind) DLKIT_INLINE_LAMBDA {
    for_columns<A, 2>(0, count, [&](int64_t i, int, auto width) DLKIT_INLINE_LAMBDA {
      V v = load(x + c * pitch + i, width), derivative = broadcast(A(1));
      if (kind == Slopes::All && op.softcap != 0) v = cap(v, derivative);
      VectorBits<A> wanted;
      memcpy(&wanted, slopes.target + i, sizeof(wanted));
      V share = get(slopes.share, i);
      if (kind != Slopes::Equal) share *= pixel_share(op, at<const S>(probabilities, c * pitch + i), c, width);
      const V rest = wanted == Target<A>(c) ? get(slopes.hit, i) : share;
      const V e = exponential(v - get(slopes.shift, i));
      v = fma(e, get(slopes.scale, i), -rest);
      if (kind == Slopes::All) {
        if (op.z_scale != 0) v = fma(e, get(slopes.z, i), v);
        if (op.softcap != 0) v *= derivative;
      }
      write(grad + c * pitch + i, v, width, stream);
    });
  };
  const auto write_all_classes = [&](auto kind) {
    for (int64_t c = 0; c < op.classes; ++c) write_class(c, kind);
  };
  if (op.softcap != 0 || op.z_scale != 0) {
    write_all_classes(std::integral_constant<Slopes, Slopes::All>());
  } else if (probabilities != nullptr || (op.weight != nullptr && op.label_smoothing != 0)) {
    write_all_classes(std::integral_constant<Slopes, Slopes::Each>());
  } else {
    write_all_classes(std::integral_constant<Slopes, Slopes::Equal>());
  }
}

// Elements a task. Those of fp64 take four times as long.
int64_t grain_of(const Problem& op) { return op.dtype == DType::F64 ? kGrain / 4 : kGrain; }

// Calls f(first, count) for blocks of pixels, none of which lies in two images.
template <class F>
void for_pixels(const Problem& op, int64_t size, const F& f) {
  if (op.rows == 0) return;
  const int64_t length = op.inner == 1 ? op.rows : op.inner, blocks = (length + size - 1) / size;
  parallel_for(op.rows / length * blocks, max64(1, grain_of(op) / (size * op.classes)),
               [&](int64_t begin, int64_t end) {
                 for (int64_t block = begin; block < end; ++block) {
                   const int64_t first = block % blocks * size;
                   f(block / blocks * length + first, min64(size, length - first));
                 }
               });
}

// The sum or mean of rows, in their order.
template <class A>
double sum_rows(const void* values, int64_t rows) {
  double totals[1];
  sum_columns<A>(rows, totals, [&](int64_t i, int, auto width, auto* terms) DLKIT_INLINE_LAMBDA {
    terms[0] += load(static_cast<const A*>(values) + i, width);
  });
  return totals[0];
}

int64_t rows_that_count(const Problem& op) {
  int64_t count = 0;
  for (int64_t row = 0; row < op.rows; ++row) count += op.target[row] != op.ignore_index;
  return count;
}

template <class A>
wide_t<A> sum_of_target_weights(const Problem& op) {
  wide_t<A> sums[kSlots] = {};
  for (int64_t first = 0; first < op.rows; first += kSlots) {
#pragma GCC unroll 4
    for (int slot = 0; slot < kSlots; ++slot) {
      const int64_t row = min64(first + slot, op.rows - 1);
      const bool counts = first + slot < op.rows && !is_ignored(op, row);
      const A weight = weight_of<A>(op, counts ? op.target[row] : 0);
      sums[slot] += counts ? weight : A(0);
    }
  }
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

template <class A>
void reduce(const Forward& op) {
  double loss = sum_rows<A>(op.losses, op.rows), z = op.z == nullptr ? 0 : sum_rows<A>(op.z, op.rows);
  if (op.reduction == Reduction::Mean) {
    const wide_t<A> count = wide_t<A>(op.target == nullptr ? op.rows : rows_that_count(op));
    const wide_t<A> weights = op.target == nullptr || op.weight == nullptr ? count : sum_of_target_weights<A>(op);
    static_cast<A*>(op.total)[0] = A(weights);
    static_cast<A*>(op.total)[1] = A(count);
    loss = double((loss - z) / weights + (op.z == nullptr ? 0 : z / count));
    z = double(z / count);
  }
  with_type(op.loss_dtype, [&](auto type) {
    using L = decltype(type);
    *static_cast<L*>(op.loss) = narrow<L>(accumulate_t<L>(loss));
    if (op.z_loss != nullptr) *static_cast<L*>(op.z_loss) = narrow<L>(accumulate_t<L>(z));
  });
}

int64_t row_grain(const Problem& op) { return max64(1, grain_of(op) / op.classes); }

}  // namespace

void forward(const Forward& op) {
  *op.bad_row = -1;
  with_data_type(op.dtype, [&](auto type) {
    using T = decltype(type);
    if (op.inner == 1 && !are_short(op)) {
      parallel_for(op.rows, row_grain(op), [&](int64_t begin, int64_t end) { forward_rows<T>(op, begin, end); });
    } else {
      for_pixels(op, kPixels, [&](int64_t first, int64_t count) {
        with_lanes<T>(op, first, count, [&](const auto* x, const auto* probabilities, int64_t pitch, auto*) {
          read_pixels(op, first, count, x, probabilities, pitch);
        });
      });
    }
  });
  if (*op.bad_row >= 0 || op.loss == nullptr) return;
  with_accumulate(op.dtype, [&](auto type) { reduce<decltype(type)>(op); });
}

void backward(const Backward& op) {
  with_data_type(op.dtype, [&](auto type) {
    using T = decltype(type);
    const auto weights = sum_of_weights<accumulate_t<T>>(op);
    const int64_t run = (op.inner == 1 ? op.classes : op.inner) * int64_t(sizeof(T));
    const bool stream = op.grad_input != op.x &&
                        op.rows * op.classes * int64_t(sizeof(T)) >= streaming_threshold_bytes() &&
                        uintptr_t(op.grad_input) % 64 == 0 && run % 64 == 0;
    if (op.inner == 1 && !are_short(op)) {
      parallel_for(op.rows, row_grain(op), [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) write_row<T>(op, row, weights, stream);
        if (stream) streaming_fence();
      });
    } else {
      for_pixels(op, op.inner == 1 ? kPixels : kWritten, [&](int64_t first, int64_t count) {
        const PixelSlopes<accumulate_t<T>> slopes(op, first, count, weights);
        T* const grad = pixel_at<T>(op, op.grad_input, first, op.grad_stride);
        const auto write = [&]<class S>(const S* x, const S* probabilities, int64_t pitch, auto* turned) {
          void* const to = turned == nullptr ? static_cast<void*>(grad) : turned->lanes;
          write_pixels(op, slopes, count, x, probabilities, static_cast<S*>(to), pitch, stream && turned == nullptr);
          if (turned != nullptr) turned->write(grad, count, op.classes, op.grad_stride);
        };
        with_lanes<T>(op, first, count, write);
        if (stream) streaming_fence();
      });
    }
  });
}

}  // namespace DLKIT_ISA

DLKIT_CPU_ENTRY(forward_cpu, forward, Forward)
DLKIT_CPU_ENTRY(backward_cpu, backward, Backward)

}  // namespace dlkit::cross_entropy
