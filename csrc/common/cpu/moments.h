// Mean and variance of elements that are added in parts.
#pragma once

#include "simd.h"

namespace dlkit::DLKIT_ISA {

DLKIT_INLINE bool is_finite(double value) { return value - value == 0; }
DLKIT_INLINE double finite_or_zero(double value) { return is_finite(value) ? value : 0; }

// The rounding error of sum = a + b.
DLKIT_INLINE double rounding_error(double a, double b, double sum) {
  const double added = sum - a;
  return (a - (sum - added)) + (b - added);
}

// Mean and sum of squared deviations of the elements added so far. The mean is mean + low: with means rounded to one
// double, the variance of fp64 elements whose mean is 1e7 standard deviations would be wrong by 1e-10 of itself.
struct Moments {
  double count = 0, mean = 0, low = 0, m2 = 0;
  // Adds n elements whose deviations from `centre` sum to `sum`, and the squares of these to `squares`.
  void add(double n, double centre, double sum, double squares) {
    const double above = sum / n, other = centre + above;
    merge({n, other, finite_or_zero(rounding_error(centre, above, other)), squares - sum * sum / n});
  }
  void merge(const Moments& other) {
    const double other_m2 = other.m2 < 0 ? 0 : other.m2;  // rounding can leave it negative; a NaN stays
    const double total = count + other.count, delta = (other.mean - mean) + (other.low - low);
    if (count == 0) {
      *this = other;
      m2 = other_m2;
      return;
    }
    m2 += other_m2 + delta * delta * (count * other.count / total);
    const double step = delta * (other.count / total), before = mean;
    if (is_finite(delta)) {
      mean = before + step;
      low += rounding_error(before, step, mean);
    } else {  // not by delta: an infinite mean must stay infinite
      mean = (mean * count + other.mean * other.count) / total;
      low = 0;
    }
    count = total;
  }
};

}  // namespace dlkit::DLKIT_ISA
