// Cross entropy on CUDA. Bytes moved, in units of the logits' size: forward 1, backward 2, the least there is.
//
//   rows      Lanes threads a row: 8 (up to 64 classes), a warp (up to 1024), or 512, in packs of 16 bytes, four in
//             flight a thread. A thread has its own running maximum and sum of exponentials, rescaled at most once for
//             four packs; threads meet at the end of the row, in a fixed order. One exp an element, some 10
//             instructions: bf16 at 4.8 TB/s leaves an H200 14 an element.
//   pixels    classes at a distance ([N, C, H, W]): a thread has 16 bytes of adjacent pixels and walks the classes.
//
// A second kernel adds up the rows' losses, in two stages for many rows, in an order that depends only on the shape.
// Not yet run on a GPU.
#include <cassert>
#include <cmath>

#include "../common/cuda/launch.cuh"
#include "../common/cuda/reduce.cuh"
#include "../common/cuda/vec.cuh"
#include "../common/dispatch.h"
#include "kernel.h"

namespace dlkit::cross_entropy {
namespace {

using namespace dlkit::cuda;

constexpr int flight = 4;  // packs
constexpr int reduce_threads = 256, most_slices = 64;

template <int Lanes>
constexpr int threads_of = Lanes > 256 ? Lanes : 256;

template <class A>
__device__ __forceinline__ A infinity() {
  return A(INFINITY);
}

// The number subtracted in exponents: the maximum, or 0 where all values so far are -inf.
template <class A>
__device__ __forceinline__ A shift_of(A max) {
  return max == -infinity<A>() ? A(0) : max;
}

template <class A>
__device__ __forceinline__ A larger(A a, A b) {
  return a > b ? a : b;  // b where a is NaN
}

template <class A>
__device__ __forceinline__ A weight_of(const Problem& op, int64_t column) {
  return op.weight == nullptr ? A(1) : static_cast<const A*>(op.weight)[column];
}

// The softcap and its derivative, which 1 - tanh^2 would round to 0 for a large x.
template <class A>
__device__ __forceinline__ A capped(A x, A cap, A& derivative) {
  const A u = x / cap, t = tanh(u), e = exp(A(-2) * (u < A(0) ? -u : u));
  derivative = e < A(0.3) ? A(4) * e / ((A(1) + e) * (A(1) + e)) : A(1) - t * t;
  return cap * t;
}
template <class A>
__device__ __forceinline__ A capped(A x, double softcap) {
  A derivative;
  return softcap == 0 ? x : capped(x, A(softcap), derivative);
}

// u_c; for class targets without the target's extra part and without the factor e / classes, which is applied later.
template <class T>
__device__ __forceinline__ accumulate_t<T> share_of(const Problem& op, const T* probabilities, int64_t column,
                                                    int64_t at) {
  using A = accumulate_t<T>;
  const A weight = weight_of<A>(op, column);
  if (probabilities == nullptr) return weight;
  return weight * multiply_add(A(widen(probabilities[at])), A(1 - op.label_smoothing),
                               A(op.label_smoothing / double(op.classes)));
}

// The sums over the part of a row read so far: the maximum, the sums of exp(x - max) and u * (x - max), and that of u.
template <class A>
struct Sums {
  A max, sum, dot, mass;
};

// Rescales the sums to a larger maximum.
template <class A>
__device__ __forceinline__ void grow(Sums<A>& sums, A max) {
  const A grown = shift_of(sums.max) - shift_of(max);
  if (sums.sum > A(0)) sums.sum *= exp(grown);
  if (sums.mass != A(0)) sums.dot += sums.mass * grown;
  sums.max = max;
}

template <class A>
__device__ __forceinline__ bool is_ignored(const Problem& op, int64_t row) {
  return op.target != nullptr && op.target[row] == op.ignore_index;
}

// Writes the outputs of one row. x_t is read again: it is in the caches.
template <class T>
__device__ __forceinline__ void finish(const Forward& op, int64_t row, const T* x, int64_t distance,
                                       const Sums<accumulate_t<T>>& sums) {
  using A = accumulate_t<T>;
  const A log_sum = log(sums.sum);
  A loss = 0, square = 0;
  if (op.target == nullptr) {
    loss = sums.mass * log_sum - sums.dot;
    static_cast<A*>(op.mass)[row] = sums.mass;
  } else {
    const int64_t target = op.target[row];
    const bool inside = uint64_t(target) < uint64_t(op.classes);
    assert((inside || target == op.ignore_index) && "cross_entropy: a target is out of range");
    if (target != op.ignore_index && inside) {
      const A at_target = capped(A(widen(x[target * distance])), op.softcap);
      loss = (log_sum - (at_target - sums.max)) * (A(1 - op.label_smoothing) * weight_of<A>(op, target));
      if (op.label_smoothing != 0) {
        loss += A(op.label_smoothing / double(op.classes)) * (sums.mass * log_sum - sums.dot);
      }
    }
  }
  if (op.z_scale != 0 && !is_ignored<A>(op, row)) {
    const double lse = double(sums.max) + double(log_sum);
    square = A(op.z_scale * lse * lse);
    loss += square;
  }
  static_cast<A*>(op.losses)[row] = loss;
  if (op.z != nullptr) static_cast<A*>(op.z)[row] = square;
  static_cast<A*>(op.max)[row] = sums.max;
  static_cast<A*>(op.sum)[row] = sums.sum;
}

// The maximum over a group of Lanes threads, like group_sum of reduce.cuh.
template <int Lanes, class A>
__device__ __forceinline__ A group_max(A value, A* exchange) {
#pragma unroll
  for (int offset = (Lanes < 32 ? Lanes : 32) / 2; offset > 0; offset /= 2) {
    value = larger(__shfl_xor_sync(full_warp, value, offset), value);
  }
  if constexpr (Lanes > 32) {
    constexpr int warps = Lanes / 32;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (lane == 0) exchange[warp] = value;
    __syncthreads();
    value = exchange[warp / warps * warps + lane % warps];
#pragma unroll
    for (int offset = warps / 2; offset > 0; offset /= 2) {
      value = larger(__shfl_xor_sync(full_warp, value, offset), value);
    }
  }
  return value;
}

// Dots: sums of u * (x - max) are needed. Without a number of resident blocks in the launch bounds ptxas spills, here
// and below.
template <class T, int Lanes, int PackBytes, bool Dots>
__global__ void __launch_bounds__(threads_of<Lanes>, 1) forward_rows(const Forward op) {
  using A = accumulate_t<T>;
  constexpr int width = PackBytes / sizeof(T), threads = threads_of<Lanes>, rows_per_block = threads / Lanes;
  __shared__ A max_exchange[threads / 32], exchange[threads / 32][3];
  const int lane = threadIdx.x % Lanes;
  for (int64_t first = int64_t(blockIdx.x) * rows_per_block; first < op.rows;
       first += int64_t(gridDim.x) * rows_per_block) {
    const int64_t row = first + threadIdx.x / Lanes;
    const int64_t packs = row < op.rows ? op.classes / width : 0;
    const T* const x = static_cast<const T*>(op.x) + row * op.stride;
    const T* const probabilities =
        op.probabilities == nullptr ? nullptr : static_cast<const T*>(op.probabilities) + row * op.classes;
    Sums<A> sums{-infinity<A>(), 0, 0, 0};
    for (int64_t begin = lane; begin < packs; begin += flight * Lanes) {
      Pack<PackBytes> loaded[flight];
#pragma unroll
      for (int i = 0; i < flight; ++i) {
        if (begin + i * Lanes < packs) loaded[i] = load_once<PackBytes>(x + (begin + i * Lanes) * width);
      }
      A values[flight][width], max = sums.max;
#pragma unroll
      for (int i = 0; i < flight; ++i) {
        if (begin + i * Lanes >= packs) continue;
        widen<T, PackBytes>(loaded[i], values[i]);
#pragma unroll
        for (int k = 0; k < width; ++k) {
          if (op.softcap != 0) values[i][k] = capped(values[i][k], op.softcap);
          max = larger(values[i][k], max);
        }
      }
      if (max != sums.max) grow(sums, max);
      const A shift = shift_of(max);
#pragma unroll
      for (int i = 0; i < flight; ++i) {
        if (begin + i * Lanes >= packs) continue;
#pragma unroll
        for (int k = 0; k < width; ++k) {
          const A d = values[i][k] - shift;
          sums.sum += exp(d);
          if constexpr (Dots) {
            const int64_t column = (begin + i * Lanes) * width + k;
            const A u = share_of(op, probabilities, column, column);
            sums.dot = multiply_add(u, d, sums.dot);
            sums.mass += u;
          }
        }
      }
    }
    const A max = group_max<Lanes>(sums.max, max_exchange);
    grow(sums, max);
    A totals[3] = {sums.sum, sums.dot, sums.mass};
    group_sum<Lanes>(totals, exchange);
    if (lane == 0 && row < op.rows) finish(op, row, x, 1, Sums<A>{max, totals[0], totals[1], totals[2]});
    if constexpr (Lanes > 32) __syncthreads();  // the exchanges are used again
  }
}

// PackBytes comes first, since check_sass.py expects wide stores where it comes second; this kernel has none.
template <int PackBytes, class T>
__global__ void __launch_bounds__(256, 1) forward_pixels(const Forward op, int64_t packs, bool dots) {
  using A = accumulate_t<T>;
  constexpr int width = PackBytes / sizeof(T);
  for (int64_t pack = int64_t(blockIdx.x) * 256 + threadIdx.x; pack < packs; pack += int64_t(gridDim.x) * 256) {
    const int64_t row = pack * width, offset = row / op.inner * op.inner * op.classes + row % op.inner;
    const T* const x = static_cast<const T*>(op.x) + offset;
    const T* const probabilities =
        op.probabilities == nullptr ? nullptr : static_cast<const T*>(op.probabilities) + offset;
    Sums<A> sums[width];
#pragma unroll
    for (int k = 0; k < width; ++k) sums[k] = {-infinity<A>(), 0, 0, 0};
    for (int64_t begin = 0; begin < op.classes; begin += flight) {
      Pack<PackBytes> loaded[flight];
#pragma unroll
      for (int i = 0; i < flight; ++i) {
        if (begin + i < op.classes) loaded[i] = load_once<PackBytes>(x + (begin + i) * op.inner);
      }
#pragma unroll
      for (int i = 0; i < flight; ++i) {
        if (begin + i >= op.classes) continue;
        A values[width];
        widen<T, PackBytes>(loaded[i], values);
#pragma unroll
        for (int k = 0; k < width; ++k) {
          const A v = capped(values[k], op.softcap), max = larger(v, sums[k].max);
          if (max != sums[k].max) grow(sums[k], max);
          const A d = v - shift_of(max);
          sums[k].sum += exp(d);
          if (!dots) continue;
          const A u = share_of(op, probabilities, begin + i, (begin + i) * op.inner + k);
          sums[k].dot = multiply_add(u, d, sums[k].dot);
          sums[k].mass += u;
        }
      }
    }
#pragma unroll
    for (int k = 0; k < width; ++k) finish(op, row + k, x + k, op.inner, sums[k]);
  }
}

// Writes the loss and z-loss from the totals of all rows, in double: loss, z, weights, count.
template <class A>
__device__ __forceinline__ void write_loss(const Forward& op, const double (&totals)[4]) {
  double loss = totals[0], z = totals[1];
  if (op.reduction == Reduction::Mean) {
    static_cast<A*>(op.total)[0] = A(totals[2]);
    static_cast<A*>(op.total)[1] = A(totals[3]);
    loss = (loss - z) / totals[2] + (op.z == nullptr ? 0 : z / totals[3]);
    z /= totals[3];
  }
  const auto write = [&](void* to, double value) {
    if (op.loss_dtype == DType::F64) {
      *static_cast<double*>(to) = value;
    } else if (op.loss_dtype == DType::F32) {
      *static_cast<float*>(to) = float(value);
    } else if (op.loss_dtype == DType::BF16) {
      *static_cast<BFloat16*>(to) = narrow<BFloat16>(float(value));
    } else {
      *static_cast<Float16*>(to) = narrow<Float16>(float(value));
    }
  };
  write(op.loss, loss);
  if (op.z_loss != nullptr) write(op.z_loss, z);
}

template <class A>
__global__ void __launch_bounds__(reduce_threads) sum_losses(const Forward op) {
  __shared__ double exchange[reduce_threads / 32][4];
  double totals[4] = {0, 0, 0, 0};
  const int64_t begin = op.rows * blockIdx.x / gridDim.x, end = op.rows * (blockIdx.x + 1) / gridDim.x;
  for (int64_t row = begin + threadIdx.x; row < end; row += reduce_threads) {
    totals[0] += double(static_cast<const A*>(op.losses)[row]);
    if (op.z != nullptr) totals[1] += double(static_cast<const A*>(op.z)[row]);
    if (op.reduction != Reduction::Mean || is_ignored<A>(op, row)) continue;
    totals[2] += op.target == nullptr ? 1 : double(weight_of<A>(op, op.target[row]));
    totals[3] += 1;
  }
  group_sum<reduce_threads>(totals, exchange);
  if (threadIdx.x != 0) return;
  if (gridDim.x == 1) return write_loss<A>(op, totals);
#pragma unroll
  for (int i = 0; i < 4; ++i) op.slices[blockIdx.x * 4 + i] = totals[i];
}

template <class A>
__global__ void __launch_bounds__(32) sum_slices(const Forward op, int slices) {
  double totals[4] = {0, 0, 0, 0};
  for (int slice = threadIdx.x; slice < slices; slice += 32) {
#pragma unroll
    for (int i = 0; i < 4; ++i) totals[i] += op.slices[slice * 4 + i];
  }
  double (*const unused)[4] = nullptr;  // a warp needs no shared memory
  group_sum<32>(totals, unused);
  if (threadIdx.x == 0) write_loss<A>(op, totals);
}

// The factors of backward in one row, as in cpu/shared.h. Computed in double: it is a handful of operations, and the
// result is rounded once.
template <class A>
struct Slope {
  A shift, scale, z, share, hit;
  int64_t target;  // -1: none
};

template <class A>
__device__ __forceinline__ Slope<A> slope_of(const Backward& op, int64_t row, double weights) {
  const A max = static_cast<const A*>(op.max)[row];
  const double inverse = 1 / double(static_cast<const A*>(op.sum)[row]);
  if (is_ignored<A>(op, row)) return {max, A(0 * inverse), 0, 0, 0, -1};
  const A* const total = static_cast<const A*>(op.total);
  const double grad = double(static_cast<const A*>(op.grad_loss)[row * op.grad_loss_stride]);
  const double g = double(A(total == nullptr ? grad : grad / double(total[0])));
  Slope<A> slope{max, 0, 0, A(g), 0, -1};
  if (op.target == nullptr) {
    slope.scale = A(g * double(static_cast<const A*>(op.mass)[row]) * inverse);
  } else {
    const double share = op.label_smoothing / double(op.classes);
    slope.target = op.target[row];
    const double weight = double(weight_of<A>(op, slope.target)), hit = (1 - op.label_smoothing) * weight;
    slope.share = A(g * share);
    slope.hit = A(g * (hit + share * weight));
    slope.scale = A(g * (hit + share * weights) * inverse);
  }
  if (op.z_scale != 0) {
    const double lse = double(max) - log(inverse);
    slope.z = A((total == nullptr ? grad : grad / double(total[1])) * 2 * op.z_scale * lse * inverse);
  }
  return slope;
}

template <class T>
__device__ __forceinline__ accumulate_t<T> gradient(const Backward& op, const Slope<accumulate_t<T>>& slope,
                                                    accumulate_t<T> x, const T* probabilities, int64_t column,
                                                    int64_t at, bool shares) {
  using A = accumulate_t<T>;
  A derivative = 1;
  if (op.softcap != 0) x = capped(x, A(op.softcap), derivative);
  const A rest = column == slope.target ? slope.hit
                 : shares               ? slope.share * share_of(op, probabilities, column, at)
                                        : slope.share;
  const A e = exp(x - slope.shift);
  A result = multiply_add(e, slope.scale, -rest);
  if (op.z_scale != 0) result = multiply_add(e, slope.z, result);
  return op.softcap != 0 ? result * derivative : result;
}

// The sum of class weights, if smoothing needs it: every block computes the same bits.
template <class A>
__device__ __forceinline__ double sum_of_weights(const Problem& op, double (*exchange)[1]) {
  if (op.weight == nullptr) return double(op.classes);
  if (op.target == nullptr || op.label_smoothing == 0) return 0;
  double sum[1] = {0};
  for (int64_t c = threadIdx.x; c < op.classes; c += 256) sum[0] += double(static_cast<const A*>(op.weight)[c]);
  group_sum<256>(sum, exchange);
  __syncthreads();
  return sum[0];
}

// A group of Lanes threads takes a row, or one of the `tiles` tiles into which it is cut.
template <class T, int PackBytes, int Lanes>
__global__ void __launch_bounds__(256, 1) backward_rows(const Backward op, int64_t tiles, bool shares) {
  using A = accumulate_t<T>;
  constexpr int width = PackBytes / sizeof(T), groups = 256 / Lanes;
  __shared__ double exchange[256 / 32][1];
  const double weights = sum_of_weights<A>(op, exchange);
  const int lane = threadIdx.x % Lanes;
  const int64_t packs = op.classes / width, tile_packs = (packs + tiles - 1) / tiles;
  for (int64_t item = int64_t(blockIdx.x) * groups + threadIdx.x / Lanes; item < op.rows * tiles;
       item += int64_t(gridDim.x) * groups) {
    const int64_t row = item / tiles, begin = item % tiles * tile_packs;
    const int64_t end = begin + tile_packs < packs ? begin + tile_packs : packs;
    const T* const x = static_cast<const T*>(op.x) + row * op.stride;
    T* const grad = static_cast<T*>(op.grad_input) + row * op.grad_stride;
    const T* const probabilities =
        op.probabilities == nullptr ? nullptr : static_cast<const T*>(op.probabilities) + row * op.classes;
    const Slope<A> slope = slope_of<A>(op, row, weights);
    for (int64_t at = begin + lane; at < end; at += flight * Lanes) {
      Pack<PackBytes> loaded[flight];
#pragma unroll
      for (int i = 0; i < flight; ++i) {
        if (at + i * Lanes < end) loaded[i] = load<PackBytes>(x + (at + i * Lanes) * width);
      }
#pragma unroll
      for (int i = 0; i < flight; ++i) {
        if (at + i * Lanes >= end) continue;
        A values[width];
        widen<T, PackBytes>(loaded[i], values);
#pragma unroll
        for (int k = 0; k < width; ++k) {
          const int64_t column = (at + i * Lanes) * width + k;
          values[k] = gradient(op, slope, values[k], probabilities, column, column, shares);
        }
        store_once<PackBytes>(grad + (at + i * Lanes) * width, narrow<T, PackBytes>(values));
      }
    }
  }
}

template <class T, int PackBytes>
__global__ void __launch_bounds__(256, 1) backward_pixels(const Backward op, int64_t packs, bool shares) {
  using A = accumulate_t<T>;
  constexpr int width = PackBytes / sizeof(T);
  __shared__ double exchange[256 / 32][1];
  const double weights = sum_of_weights<A>(op, exchange);
  for (int64_t pack = int64_t(blockIdx.x) * 256 + threadIdx.x; pack < packs; pack += int64_t(gridDim.x) * 256) {
    const int64_t row = pack * width, offset = row / op.inner * op.inner * op.classes + row % op.inner;
    const T* const x = static_cast<const T*>(op.x) + offset;
    T* const grad = static_cast<T*>(op.grad_input) + offset;
    const T* const probabilities =
        op.probabilities == nullptr ? nullptr : static_cast<const T*>(op.probabilities) + offset;
    Slope<A> slopes[width];
#pragma unroll
    for (int k = 0; k < width; ++k) slopes[k] = slope_of<A>(op, row + k, weights);
    for (int64_t begin = 0; begin < op.classes; begin += flight) {
      Pack<PackBytes> loaded[flight];
#pragma unroll
      for (int i = 0; i < flight; ++i) {
        if (begin + i < op.classes) loaded[i] = load<PackBytes>(x + (begin + i) * op.inner);
      }
#pragma unroll
      for (int i = 0; i < flight; ++i) {
        if (begin + i >= op.classes) continue;
        A values[width];
        widen<T, PackBytes>(loaded[i], values);
#pragma unroll
        for (int k = 0; k < width; ++k) {
          values[k] = gradient(op, slopes[k], values[k], probabilities, begin + i, (begin + i) * op.inner + k, shares);
        }
        store_once<PackBytes>(grad + (begin + i) * op.inner, narrow<T, PackBytes>(values));
      }
    }
  }
}

// Whether accesses of 16 bytes are possible: runs of adjacent elements, the distance of rows and all addresses must
// allow them.
bool is_wide(const Problem& op, const void* other, int64_t other_stride) {
  const int64_t width = 16 / size_of(op.dtype), run = op.inner == 1 ? op.classes : op.inner;
  const bool rows = op.inner > 1 || (op.stride % width == 0 && other_stride % width == 0);
  return run % width == 0 && rows && are_aligned(16, op.x, other);
}

// Calls f(T(), PackBytes).
template <class F>
void with_pack(const Problem& op, bool wide, const F& f) {
  with_type(op.dtype, [&](auto type) {
    wide ? f(type, std::integral_constant<int, 16>()) : f(type, std::integral_constant<int, sizeof(type)>());
  });
}

// Calls f(Lanes) with one of three numbers of threads for a row.
template <int Most, class F>
void with_lanes(const Problem& op, const F& f) {
  if (op.classes <= 64) return f(std::integral_constant<int, 8>());
  if (op.classes <= 1024) return f(std::integral_constant<int, 32>());
  f(std::integral_constant<int, Most>());
}

}  // namespace

void forward_cuda(const Forward& op, void* stream) {
  const bool dots = op.probabilities != nullptr || op.label_smoothing != 0;
  with_pack(op, is_wide(op, nullptr, 0), [&](auto type, auto bytes) {
    using T = decltype(type);
    if (op.rows == 0) return;
    if (op.inner > 1) {
      const int64_t packs = op.rows / (bytes.value / int64_t(sizeof(T)));
      return launch("cross_entropy forward", forward_pixels<bytes.value, T>, grid_of(divide_up(packs, 256)), 256, 0,
                    stream, op, packs, dots);
    }
    with_lanes<512>(op, [&](auto lanes) {
      constexpr int threads = threads_of<lanes.value>;
      const auto rows = [&](auto* kernel) {
        launch("cross_entropy forward", kernel, grid_of(divide_up(op.rows, threads / lanes.value)), threads, 0, stream,
               op);
      };
      dots ? rows(forward_rows<T, lanes.value, bytes.value, true>)
           : rows(forward_rows<T, lanes.value, bytes.value, false>);
    });
  });
  if (op.loss == nullptr) return;
  with_accumulate(op.dtype, [&](auto type) {
    using A = decltype(type);
    const int slices =
        int(std::min<int64_t>(most_slices, std::max<int64_t>(1, divide_up(op.rows, 4 * reduce_threads))));
    launch("cross_entropy sum_losses", sum_losses<A>, unsigned(slices), reduce_threads, 0, stream, op);
    if (slices > 1) launch("cross_entropy sum_slices", sum_slices<A>, 1, 32, 0, stream, op, slices);
  });
}

void backward_cuda(const Backward& op, void* stream) {
  if (op.rows == 0) return;
  const bool shares = op.probabilities != nullptr || (op.weight != nullptr && op.label_smoothing != 0);
  with_pack(op, is_wide(op, op.grad_input, op.grad_stride), [&](auto type, auto bytes) {
    using T = decltype(type);
    constexpr int width = bytes.value / int(sizeof(T));
    if (op.inner > 1) {
      const int64_t packs = op.rows / width;
      return launch("cross_entropy backward", backward_pixels<T, bytes.value>, grid_of(divide_up(packs, 256)), 256, 0,
                    stream, op, packs, shares);
    }
    with_lanes<256>(op, [&](auto lanes) {
      // Tiles of two rounds each: a long row has many, which lets even few rows fill the device.
      const int64_t tiles = std::max<int64_t>(1, op.classes / width / (2 * flight * lanes.value));
      launch("cross_entropy backward", backward_rows<T, bytes.value, lanes.value>,
             grid_of(divide_up(op.rows * tiles, 256 / lanes.value)), 256, 0, stream, op, tiles, shares);
    });
  });
}

}  // namespace dlkit::cross_entropy
