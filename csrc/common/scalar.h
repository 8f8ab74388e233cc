// The scalar types that all kernels use: bf16 and fp16 as bits, their conversions, and each type's accumulation type.
// Header-only and free of torch, so that kernels compile in seconds. Every function has internal linkage: this header
// is compiled with AVX-512 flags in one object and without in another, and a shared inline copy would leak one into the
// other.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define DLKIT_HOST_DEVICE static __host__ __device__ __forceinline__
#else
#define DLKIT_HOST_DEVICE static inline __attribute__((always_inline))
#endif

namespace dlkit {

enum class DType : int32_t { F32 = 0, F64 = 1, BF16 = 2, F16 = 3 };

DLKIT_HOST_DEVICE int64_t size_of(DType type) { return type == DType::F64 ? 8 : type == DType::F32 ? 4 : 2; }

struct alignas(2) BFloat16 {
  uint16_t bits;
};

struct alignas(2) Float16 {
  uint16_t bits;
};

// The type in which statistics and sums of T are kept.
template <class T>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};
template <class T>
using accumulate_t = typename Accumulate<T>::type;
DLKIT_HOST_DEVICE int64_t accumulate_size(DType type) { return type == DType::F64 ? 8 : 4; }

template <class To, class From>
DLKIT_HOST_DEVICE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast needs equal sizes");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

DLKIT_HOST_DEVICE float widen(float value) { return value; }
DLKIT_HOST_DEVICE double widen(double value) { return value; }
DLKIT_HOST_DEVICE float widen(BFloat16 value) { return bit_cast<float>(uint32_t(value.bits) << 16); }
DLKIT_HOST_DEVICE float widen(Float16 value) {
#if defined(__CUDA_ARCH__)
  return __half2float(bit_cast<__half>(value.bits));
#else
  // Shift exponent and mantissa into place, then rescale by 2^112: the multiplication also normalises subnormals.
  const uint32_t shifted = uint32_t(value.bits & 0x7fff) << 13;
  const float scaled = bit_cast<float>(shifted) * bit_cast<float>(uint32_t(0x77800000));
  const uint32_t infinity_or_nan = (value.bits & 0x7c00) == 0x7c00 ? 0x7f800000 : 0;
  return bit_cast<float>(bit_cast<uint32_t>(scaled) | infinity_or_nan | uint32_t(value.bits & 0x8000) << 16);
#endif
}

// Rounds to nearest even. The second argument only names the type.
DLKIT_HOST_DEVICE float narrow(float value, float) { return value; }
DLKIT_HOST_DEVICE double narrow(double value, double) { return value; }
DLKIT_HOST_DEVICE BFloat16 narrow(float value, BFloat16) {
#if defined(__CUDA_ARCH__)
  return bit_cast<BFloat16>(__float2bfloat16_rn(value));
#else
  const uint32_t bits = bit_cast<uint32_t>(value);
  if (value != value) return BFloat16{uint16_t(0x7fc0)};
  return BFloat16{uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
#endif
}
DLKIT_HOST_DEVICE Float16 narrow(float value, Float16) {
#if defined(__CUDA_ARCH__)
  return bit_cast<Float16>(__float2half_rn(value));
#else
  const uint32_t bits = bit_cast<uint32_t>(value);
  const uint16_t sign = uint16_t(bits >> 16 & 0x8000);
  const uint32_t magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return Float16{uint16_t(sign | 0x7e00)};
  if (magnitude >= 0x477ff000) return Float16{uint16_t(sign | 0x7c00)};  // rounds to 2^16 or beyond
  if (magnitude < 0x38800000) {
    // Subnormal: adding 0.5 puts the last fp16 bit at the last fp32 bit, so the addition itself rounds.
    const float rounded = bit_cast<float>(magnitude) + 0.5f;
    return Float16{uint16_t(sign | (bit_cast<uint32_t>(rounded) - 0x3f000000))};
  }
  const uint32_t rebiased = magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1);
  return Float16{uint16_t(sign | rebiased >> 13)};
#endif
}

// The largest value that narrow() rounds to 0: half of the smallest subnormal.
DLKIT_HOST_DEVICE float rounds_to_zero(float) { return 0; }
DLKIT_HOST_DEVICE double rounds_to_zero(double) { return 0; }
DLKIT_HOST_DEVICE float rounds_to_zero(BFloat16) { return bit_cast<float>(uint32_t(1) << 15); }   // 2^-134
DLKIT_HOST_DEVICE float rounds_to_zero(Float16) { return bit_cast<float>(uint32_t(102) << 23); }  // 2^-25

template <class T>
DLKIT_HOST_DEVICE T narrow(accumulate_t<T> value) {
  return narrow(value, T());
}

}  // namespace dlkit
