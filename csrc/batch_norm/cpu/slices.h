// Contiguous groups of short slices, [N, C, 14, 14] say: a tile of whole groups goes through all steps while it is in
// the caches. The sums of a vector of slices are found together, by a tree of shuffles, and what a group's statistics
// become in vectors: for a group at a time these take longer than the elements (16x512x7x7, a group a channel, forward:
// 380 us, so 95).
#pragma once

#include "shared.h"

namespace dlkit::batch_norm::DLKIT_ISA {
namespace {

constexpr int64_t kShortSlice = 256, kShortGroup = 64;
constexpr int64_t kTile = 4096, kTileGroups = 64;  // elements of a tile where a group has fewer; groups at most

bool has_short_slices(const Shape& shape) {
  return shape.groups > 0 && !shape.channels_last && shape.space > 1 && shape.space <= kShortSlice;
}
// An activation is applied to a whole tile, and so where a group is no larger.
template <class Op>
bool fits_tile(const Op& op) {
  return op.activation == Activation::None || op.shape.channels / op.shape.groups * op.shape.space <= kTile;
}
bool has_short_slices(const Forward& op) {
  return has_short_slices(op.shape) && op.statistics == Statistics::Compute && op.y != nullptr &&
         op.residual == nullptr && fits_tile(op);
}
bool has_short_slices(const Backward& op) {
  return has_short_slices(op.shape) && !op.statistics_given && !op.sums_given && op.grad_residual == nullptr &&
         op.y_or_residual == nullptr && fits_tile(op);
}

// outputs[k][slice] = the sum over a slice of what f(slice)(i, width, terms) adds to terms[k]. Lanes past the end must
// add zero.
template <class A, int kTotals, class F>
DLKIT_INLINE void sum_slices(int64_t slices, int64_t space, A* const (&outputs)[kTotals], const F& f) {
  constexpr int kCount = int(kLanes<A>);
  for (int64_t first = 0; first < slices; first += kCount) {
    Vector<A> sums[kTotals][kCount] = {};
    const int64_t count = min64(kCount, slices - first);
    for (int64_t r = 0; r < count; ++r) {
      Vector<A> terms[kTotals] = {};
      const auto add = f(first + r);
      for_columns<A, 1>(0, space, [&](int64_t i, int, auto width) DLKIT_INLINE_LAMBDA { add(i, width, terms); });
      for (int k = 0; k < kTotals; ++k) sums[k][r] = terms[k];
    }
    for (int k = 0; k < kTotals; ++k) {
      const Vector<A> found = sums_of_lanes(sums[k]);
      count == kCount ? store(outputs[k] + first, found, All{}) : store(outputs[k] + first, found, First{count});
    }
  }
}

// Copies past the caches. Slices are no whole vectors, so a tile of output is put together in the first-level cache.
template <class T>
DLKIT_INLINE void stream_copy(const T* from, T* to, int64_t count) {
  for_columns<accumulate_t<T>, 4>(0, count, [&](int64_t i, int, auto width) DLKIT_INLINE_LAMBDA {
    write(to + i, load(from + i, width), width, true);
  });
  streaming_fence();
}

// The parameters of each channel and two values of each slice, in the workspace.
template <class A>
struct SliceValues {
  A *weight, *bias, *first, *second;
  static int64_t pitch(const Shape& shape) { return (shape.channels + 15) / 16 * 16; }
  static int64_t bytes(const Shape& shape) {
    return 2 * (pitch(shape) + shape.batch * shape.channels) * int64_t(sizeof(A));
  }
  template <class Op>
  explicit SliceValues(const Op& op) {
    weight = static_cast<A*>(op.workspace);
    bias = weight + pitch(op.shape);
    first = bias + pitch(op.shape);
    second = first + op.shape.batch * op.shape.channels;
    read_all(op.weight, op.parameter_dtype, A(1), op.shape.channels, weight);
    read_all(op.bias, op.parameter_dtype, A(0), op.shape.channels, bias);
  }
};

// Calls f(group, groups) for tiles of whole groups.
template <class F>
void for_tiles(const Shape& shape, const F& f) {
  const int64_t groups = shape.batch * shape.groups, elements = shape.channels / shape.groups * shape.space;
  const int64_t tile = max64(1, min64(kTileGroups, kTile / elements)), tiles = (groups + tile - 1) / tile;
  parallel_for(tiles, max64(1, kGrain / (tile * elements)), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) f(i * tile, min64(tile, groups - i * tile));
  });
}

// totals[k][group] = the same over each of these groups, which are adjacent elements too.
template <class A, int kTotals, class F>
DLKIT_INLINE void sum_groups(int64_t groups, int64_t elements, double (&totals)[kTotals][kTileGroups], const F& f) {
  if (elements > kShortGroup) {
    for (int64_t group = 0; group < groups; ++group) {
      double found[kTotals];
      const auto add = f(group);
      sum_columns<A>(elements, found,
                     [&](int64_t i, int, auto width, auto* terms) DLKIT_INLINE_LAMBDA { add(i, width, terms); });
      for (int k = 0; k < kTotals; ++k) totals[k][group] = found[k];
    }
    return;
  }
  A sums[kTotals][kTileGroups];
  [&]<int... K>(std::integer_sequence<int, K...>) DLKIT_INLINE_LAMBDA {
    sum_slices<A, kTotals>(groups, elements, {sums[K]...}, f);
  }(std::make_integer_sequence<int, kTotals>());
  for (int k = 0; k < kTotals; ++k) {
    for (int64_t group = 0; group < groups; ++group) totals[k][group] = double(sums[k][group]);
  }
}

// The activation of a tile's z, and what passes it of the gradient g: in place, vectors and all.
constexpr int64_t kTileRoom = kTile + kVectorBytes;
template <class A>
void activate_tile(const Forward& op, A* z, int64_t count) {
  const int vectors = int((count + kLanes<A> - 1) / kLanes<A>);
  activate<A>(op.activation, A(op.negative_slope), reinterpret_cast<Vector<A>*>(z), vectors);
}
template <class A>
void pass_tile(const Backward& op, const A* z, A* g, int64_t count) {
  const int vectors = int((count + kLanes<A> - 1) / kLanes<A>);
  activation_gradients<A>(op.activation, A(op.negative_slope), reinterpret_cast<const Vector<A>*>(z),
                          reinterpret_cast<Vector<A>*>(g), vectors);
}

template <class T>
void forward_slices(const Forward& op) {
  using A = accumulate_t<T>;
  using V = Vector<A>;
  const SliceValues<A> values(op);
  const int64_t space = op.shape.space, size = op.shape.channels / op.shape.groups, elements = size * space;
  A *const means = static_cast<A*>(op.mean), *const rstds = static_cast<A*>(op.rstd);
  const bool past_caches = is_beyond_caches<T>(op.shape.batch * op.shape.channels * space);
  for_tiles(op.shape, [&](int64_t first_group, int64_t groups) {
    const int64_t first = first_group * elements;
    const T* const x = static_cast<const T*>(op.x) + first;
    double sums[1][kTileGroups], deviations[2][kTileGroups];
    A centres[kTileGroups];
    sum_groups<A>(groups, elements, sums, [&](int64_t group) DLKIT_INLINE_LAMBDA {
      return [row = x + group * elements](int64_t i, auto width, auto* terms)
                 DLKIT_INLINE_LAMBDA { terms[0] += load(row + i, width); };
    });
    for (int64_t g = 0; g < groups; ++g) centres[g] = A(finite_or_zero(sums[0][g] / double(elements)));
    sum_groups<A>(groups, elements, deviations, [&](int64_t group) DLKIT_INLINE_LAMBDA {
      return [row = x + group * elements, groups, elements, centre = broadcast<A>(centres[group])](
                 int64_t i, auto width, auto* terms) DLKIT_INLINE_LAMBDA {
        prefetch<kLanes<A>>(row + groups * elements + i);  // 64x2048x7x7 in 32 groups: 1.8 to 1.2 ms
        const V d = keep(load(row + i, width) - centre, width);
        terms[0] += d;
        terms[1] = fma(d, d, terms[1]);
      };
    });
    auto& [exact_means, m2s] = deviations;
    for (int64_t g = 0; g < groups; ++g) {
      const double sum = exact_means[g], m2 = m2s[g] - sum * sum / double(elements);
      exact_means[g] = double(centres[g]) + sum / double(elements);
      m2s[g] = m2 < 0 ? 0 : m2;  // what rounding can leave; a NaN stays
      add_large_in_double<A>(double(elements), exact_means[g], m2s[g],
                             [&](int64_t i) { return double(widen(x[g * elements + i])); });
    }
    finish_groups<A>(op, first_group, groups, exact_means, m2s, double(elements), running_factor(op));
    T* const y = static_cast<T*>(op.y) + first;
    alignas(64) T kept[kTile];
    const bool nt_store = past_caches && groups * elements <= kTile && uintptr_t(y) % 64 == 0;
    const auto normalize = [&](auto* output) {
      for (int64_t slice = 0, g = 0; g < groups; ++g) {
        const V mean = broadcast<A>(means[first_group + g]);
        const A rstd = rstds[first_group + g];
        const int64_t channel = (first_group + g) % op.shape.groups * size;
        for (int64_t k = 0; k < size; ++k, ++slice) {
          const V scale = broadcast<A>(rstd * values.weight[channel + k]),
                  bias = broadcast<A>(values.bias[channel + k]);
          for_columns<A, 1>(slice * space, (slice + 1) * space, [&](int64_t i, int, auto width) DLKIT_INLINE_LAMBDA {
            store(output + i, fma(load(x + i, width) - mean, scale, bias), width);
          });
        }
      }
    };
    T* const output = nt_store ? kept : y;
    if (op.activation == Activation::None) {
      normalize(output);
    } else {
      alignas(64) A z[kTileRoom];
      normalize(z);
      activate_tile(op, z, groups * elements);
      for_columns<A, 1>(0, groups * elements, [&](int64_t i, int, auto width) DLKIT_INLINE_LAMBDA {
        store(output + i, load(z + i, width), width);
      });
    }
    if (nt_store) stream_copy(kept, y, groups * elements);
  });
}

// A parameter's gradient from those of the slices, over the batch in order.
template <class A>
void add_slices(const Backward& op, const A* of_slices, void* gradient) {
  if (gradient == nullptr) return;
  constexpr int64_t kChannels = 64;
  const int64_t channels = op.shape.channels, blocks = (channels + kChannels - 1) / kChannels;
  parallel_for(blocks, max64(1, kGrain / (op.shape.batch * kChannels)), [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * kChannels, count = min64(kChannels, channels - first);
      double totals[kChannels] = {};
      for (int64_t n = 0; n < op.shape.batch; ++n) {
        for (int64_t i = 0; i < count; ++i) totals[i] += double(of_slices[n * channels + first + i]);
      }
      write_values(gradient, op.parameter_dtype, first, count, totals);
    }
  });
}

template <class T>
void backward_slices(const Backward& op) {
  using A = accumulate_t<T>;
  const SliceValues<A> values(op);
  const Shape& shape = op.shape;
  const int64_t space = shape.space, size = shape.channels / shape.groups;
  const A *const means = static_cast<const A*>(op.mean), *const rstds = static_cast<const A*>(op.rstd);
  for_tiles(shape, [&](int64_t first_group, int64_t groups) {
    const int64_t first = first_group * size;
    const T* x = static_cast<const T*>(op.x) + first * space;
    const T* given = static_cast<const T*>(op.grad_output) + first * space;
    const int64_t ahead = groups * size * space;  // the next tile: memory would rest while this one is worked on
    const auto backward_tile = [&](const auto* gradients) {
      A *const g_sums = values.first + first, *const gx_sums = values.second + first;
      sum_slices<A, 2>(groups * size, space, {g_sums, gx_sums}, [&](int64_t slice) DLKIT_INLINE_LAMBDA {
        const Vector<A> mean = broadcast<A>(means[first_group + (size == 1 ? slice : slice / size)]);
        return [x = x + slice * space, g = gradients + slice * space, mean](int64_t i, auto width, auto* terms)
                   DLKIT_INLINE_LAMBDA {
                     const Vector<A> gradient = load(g + i, width);
                     terms[0] += gradient;
                     terms[1] = fma(gradient, keep(load(x + i, width) - mean, width), terms[1]);
                   };
      });
      T* grad_input = at<T>(op.grad_input, first * space);
      for (int64_t group = 0; group < groups; ++group) {
        const A mean = means[first_group + group], rstd = rstds[first_group + group];
        const A* const weight = values.weight + (first_group + group) % shape.groups * size;
        A *const g_sum = g_sums + group * size, *const gx_sum = gx_sums + group * size;
        double g = 0, gx = 0;
        for (int64_t k = 0; k < size; ++k) {
          g += double(weight[k]) * double(g_sum[k]);
          gx += double(weight[k]) * double(gx_sum[k]);
          gx_sum[k] *= rstd;  // grad_weight's share
        }
        if (grad_input == nullptr) continue;
        const auto [offset, slope] = GroupGradient<A>(op, double(rstd), g, gx);
        for (int64_t k = 0; k < size; ++k) {
          const Vector<A> scale = broadcast<A>(rstd * weight[k]), tilt = broadcast<A>(-slope);
          for_columns<A, 1>(0, space, [&, offset = offset](int64_t i, int, auto width) DLKIT_INLINE_LAMBDA {
            prefetch<kLanes<A>>(x + ahead + i);
            prefetch<kLanes<A>>(given + ahead + i);
            const Vector<A> centred = load(x + i, width) - mean;
            store(grad_input + i, fma(centred, tilt, fma(load(gradients + i, width), scale, broadcast<A>(-offset))),
                  width);
          });
          x += space;
          given += space;
          gradients += space;
          grad_input += space;
        }
      }
    };
    if (op.activation == Activation::None) return backward_tile(given);
    alignas(64) A z[kTileRoom], g[kTileRoom];
    for (int64_t slice = 0; slice < groups * size; ++slice) {
      const int64_t group = first_group + slice / size, channel = group % shape.groups * size + slice % size;
      const Vector<A> mean = broadcast<A>(means[group]), scale = broadcast<A>(rstds[group] * values.weight[channel]);
      const Vector<A> bias = broadcast<A>(values.bias[channel]);
      for_columns<A, 1>(slice * space, (slice + 1) * space, [&](int64_t i, int, auto width) DLKIT_INLINE_LAMBDA {
        store(z + i, fma(load(x + i, width) - mean, scale, bias), width);
        store(g + i, load(given + i, width), width);
      });
    }
    pass_tile(op, z, g, groups * size * space);
    backward_tile(static_cast<const A*>(g));
  });
  add_slices(op, values.second, op.grad_weight);
  add_slices(op, values.first, op.grad_bias);
}

}  // namespace
}  // namespace dlkit::batch_norm::DLKIT_ISA
