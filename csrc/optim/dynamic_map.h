// 8-bit states: the scale of a block of kBlock elements is its largest magnitude, and an element is the code of the
// nearest of 256 values in [-1, 1] (moments) or [0, 1] (moments of squares). The values are the dynamic map of Dettmers
// et al. 2022, "8-bit optimizers via block-wise quantization": decades from 1e-6 to 1, each with twice as many evenly
// spaced values as the one below it. In [0, 1] a value above zero never gets the code of 0, however small it is: a
// moment of squares of 0 would make its element's step almost infinite.
#pragma once

#include "kernel.h"

namespace dlkit::optim {

DLKIT_HOST_DEVICE constexpr bool has_sign(Algorithm algorithm, int state) {
  return algorithm == Algorithm::Adam ? state == 0 : algorithm == Algorithm::Sgd || state > 0;
}

struct DynamicMap {
  float values[256];     // ascending
  float midpoints[256];  // between a value and the next; the last is infinite
};

constexpr DynamicMap make_dynamic_map(bool with_sign) {
  DynamicMap map{};
  const double decades[7] = {1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1};
  const int zero = with_sign ? 127 : 0;
  map.values[zero] = 0;
  map.values[255] = 1;
  int next = zero + 1;
  for (int decade = 0; decade < 7; ++decade) {
    const int count = (with_sign ? 1 : 2) << decade;
    for (int i = 0; i < count; ++i, ++next) {
      map.values[next] = float(decades[decade] * (0.1 + 0.9 * (i + 0.5) / count));
      if (with_sign) map.values[2 * zero - next] = -map.values[next];
    }
  }
  for (int i = 0; i < 255; ++i) map.midpoints[i] = (map.values[i] + map.values[i + 1]) / 2;
  map.midpoints[255] = __builtin_inff();
  return map;
}

constexpr DynamicMap kSignedMap = make_dynamic_map(true), kUnsignedMap = make_dynamic_map(false);
constexpr uint8_t kSignedZero = 127, kUnsignedZero = 0;

// The code of value / scale: how many midpoints lie below it. A scale of 0 counts as 1; a block with a NaN or an
// infinity has that as its scale and is NaN throughout. The value's decade and its place there give a code that is at
// most one off, which two midpoints correct: two lookups, where a binary search has eight that wait for one another.
// For GPUs; on a CPU the table in cpu.cpp takes a third of the time.
DLKIT_HOST_DEVICE int encode(const float* midpoints, bool with_sign, float value) {
  const float magnitude = with_sign && value < 0 ? -value : value;
  float power = 1e6f;  // 1 / the decade
  int count = with_sign ? 1 : 2;
  if (magnitude > 1e-6f) power = 1e5f, count *= 2;
  if (magnitude > 1e-5f) power = 1e4f, count *= 2;
  if (magnitude > 1e-4f) power = 1e3f, count *= 2;
  if (magnitude > 1e-3f) power = 1e2f, count *= 2;
  if (magnitude > 1e-2f) power = 1e1f, count *= 2;
  if (magnitude > 1e-1f) power = 1, count *= 2;
  const float place = (magnitude * power - 0.1f) * (float(count) * (1 / 0.9f));
  const int rank = count + (place > 0 ? int(place) : 0);  // among the values above zero
  const int guess = with_sign ? (value < 0 ? 127 - rank : 127 + rank) : rank - 1;
  const int code = guess < 0 ? 0 : guess;
  const int below = code - (code > 0 && !(midpoints[code > 0 ? code - 1 : 0] < value));
  return value != value ? 0 : below + (midpoints[code] < value);
}

// The least code that an element may get. It depends on the value, since value / scale may underflow. A block with an
// infinity stays NaN.
DLKIT_HOST_DEVICE int least_code(bool with_sign, float value, float scale) {
  return !with_sign && value > 0 && scale - scale == 0 ? 1 : 0;
}

}  // namespace dlkit::optim
