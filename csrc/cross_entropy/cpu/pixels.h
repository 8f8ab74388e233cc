// Pixels, and rows of few classes, which are transposed: a lane is a pixel or a row. A pixel's target, factors and loss
// are computed in loops over arrays of lanes, without branches, since with few classes they take as long as the
// exponentials.
#pragma once

#include "shared.h"

namespace dlkit::cross_entropy::DLKIT_ISA {
namespace {

constexpr int64_t kPixels = 128;   // rows or pixels a block
constexpr int64_t kClasses = 40;   // classes of a block that forward copies at a time: 20 KB of fp32
constexpr int64_t kWritten = 512;  // pixels a block in backward, which copies none: longer runs of memory
constexpr int64_t kFew = 104;      // the most adjacent classes that are transposed

// Whether rows of adjacent classes are transposed. 10 classes then take a quarter of the time that rows.h takes, 64
// classes of 16 bits 0.9 of it. With more than 40 classes of 32 bits a block no longer fits the first-level cache.
bool are_short(const Problem& op) {
  const bool narrow = op.dtype == DType::BF16 || op.dtype == DType::F16;
  return op.inner == 1 && op.classes <= (narrow ? kFew : kClasses);
}

template <class A>
using Pixels = Rows<A, kPixels>;

template <class A>
using Target = typename MathConstants<A>::Bits;

// The row's class 0 in a tensor laid out as the logits; `stride` is that of rows of adjacent classes.
template <class T, class Pointer>
T* pixel_at(const Problem& op, Pointer* tensor, int64_t row, int64_t stride) {
  const int64_t image = row / op.inner;
  return static_cast<T*>(tensor) + (op.inner == 1 ? row * stride : image * op.inner * op.classes + row % op.inner);
}

// Transposes rows of adjacent classes: logits [count, classes] <-> lanes [classes, kPixels].
template <class A>
struct Turned {
  static constexpr int64_t kStep = kLanes<A>;
  static constexpr int64_t kNarrow = 3;  // classes up to which single elements are as quick as vectors
  alignas(64) A lanes[kFew * kPixels], lines[kFew * kPixels + kStep];  // `lines`: the rows in the accumulation type

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

// Calls f(logits, probabilities or null, distance of two classes, turned or null) for some pixels, transposed if they
// are rows of adjacent classes.
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

// u of one class; for class targets without the target's `hit` and the factor `share`.
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
    const auto stage = [&](int64_t c, auto together, const auto& logit) DLKIT_INLINE_LAMBDA {
      for_columns<A, 1>(0, count, [&](int64_t i, int, auto width) DLKIT_INLINE_LAMBDA {
        V largest = get(max, i);
        repeat(together, [&](int k) DLKIT_INLINE_LAMBDA {
          const V v = logit(load(x + (begin + c + k) * pitch + i, width));
          store(staged + (c + k) * kPixels + i, v, All{});
          largest = maximum(v, largest);
        });
        store(max + i, largest, All{});
      });
    };
    int64_t c = 0;
    if (op.softcap != 0) {
      for (const Cap<A> cap(op.softcap); c < classes; ++c) stage(c, std::integral_constant<int, 1>(), cap);
    }
    const auto plain = [](V v) DLKIT_INLINE_LAMBDA { return v; };
    for (; c + 4 <= classes; c += 4) stage(c, std::integral_constant<int, 4>(), plain);
    for (; c < classes; ++c) stage(c, std::integral_constant<int, 1>(), plain);
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

// The factors of slope_of() for some pixels, and their targets.
template <class A>
struct PixelSlopes {
  alignas(64) A shift[kWritten], scale[kWritten], z[kWritten], share[kWritten], hit[kWritten];
  alignas(64) Target<A> target[kWritten];

  PixelSlopes(const Backward& op, int64_t first, int64_t count, wide_t<A> weights) {
    const size_t past = size_t((count + kLanes<A> - 1) / kLanes<A> * kLanes<A> - count);  // unused lanes at the end
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

// Equal: u is the same for all classes but the target. Each: every class has its own. All: with a softcap or a z-loss.
enum class Slopes { Equal, Each, All };

// Writes these pixels' gradient to grad + c * pitch; grad may be x.
template <class S>
void write_pixels(const Backward& op, const PixelSlopes<accumulate_t<S>>& slopes, int64_t count, const S* x,
                  const S* probabilities, S* grad, int64_t pitch, bool nt_store) {
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
      write(grad + c * pitch + i, v, width, nt_store);
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

}  // namespace
}  // namespace dlkit::cross_entropy::DLKIT_ISA
