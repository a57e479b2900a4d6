// Values of any dtype, for host and device alike.
#pragma once

#include <cstdint>
#include <cstring>

#include "arguments.h"

// Internal linkage throughout: the CPU loops are compiled several times, each for another instruction set, and the
// linker must never merge a function of one with that of another.
#ifdef __CUDACC__
#define BRN_INLINE static __host__ __device__ __forceinline__
#else
#define BRN_INLINE static inline __attribute__((always_inline))
#endif

namespace brn {
namespace {

BRN_INLINE float bits_to_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

BRN_INLINE uint32_t float_to_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

BRN_INLINE float bfloat16_to_float(uint16_t bits) { return bits_to_float(static_cast<uint32_t>(bits) << 16); }

// To nearest, ties to even; NaN stays NaN.
BRN_INLINE uint16_t float_to_bfloat16(float value) {
  const uint32_t bits = float_to_bits(value);
  if (value != value) return 0x7fc0;
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

BRN_INLINE float float16_to_float(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16, rest = bits & 0x7fff;
  if (rest >= 0x7c00) return bits_to_float(sign | 0x7f800000 | (rest & 0x3ff) << 13);  // Inf, NaN
  // Shifted into place, the exponent is 112 too small; the product is exact, subnormals included.
  return bits_to_float(sign | float_to_bits(bits_to_float(rest << 13) * 5.192296858534828e33f));  // 2^112
}

// To nearest, ties to even; NaN stays NaN, what is too large becomes Inf.
BRN_INLINE uint16_t float_to_float16(float value) {
  const uint32_t bits = float_to_bits(value), magnitude = bits & 0x7fffffff;
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000);
  if (magnitude > 0x7f800000) return sign | 0x7e00;
  if (magnitude >= 0x477ff000) return sign | 0x7c00;
  if (magnitude < 0x38800000) {  // subnormal: adding 0.5 makes the hardware round at the last bit of a float16
    const float shifted = bits_to_float(magnitude) + 0.5f;
    return sign | static_cast<uint16_t>(float_to_bits(shifted) - 0x3f000000);
  }
  return sign | static_cast<uint16_t>((magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13);
}

// Value `channel` of `values`, or `otherwise` where there are none.
template <typename T>
BRN_INLINE T value_at(PerChannel values, int64_t channel, T otherwise) {
  if (values.data == nullptr) return otherwise;
  switch (values.dtype) {
    case DType::float32:
      return static_cast<T>(static_cast<const float*>(values.data)[channel]);
    case DType::float64:
      return static_cast<T>(static_cast<const double*>(values.data)[channel]);
    case DType::bfloat16:
      return static_cast<T>(bfloat16_to_float(static_cast<const uint16_t*>(values.data)[channel]));
    default:
      return static_cast<T>(float16_to_float(static_cast<const uint16_t*>(values.data)[channel]));
  }
}

template <typename T>
BRN_INLINE bool is_finite(T value) {
  return value - value == 0;
}

// Stores `value`, rounded to the dtype of `values`, unless that is not finite.
template <typename T>
BRN_INLINE void store_if_finite(PerChannel values, int64_t channel, T value) {
  switch (values.dtype) {
    case DType::float32:
      if (is_finite(static_cast<float>(value))) static_cast<float*>(values.data)[channel] = static_cast<float>(value);
      break;
    case DType::float64:
      if (is_finite(value)) static_cast<double*>(values.data)[channel] = static_cast<double>(value);
      break;
    case DType::bfloat16: {
      const uint16_t rounded = float_to_bfloat16(static_cast<float>(value));
      if (is_finite(bfloat16_to_float(rounded))) static_cast<uint16_t*>(values.data)[channel] = rounded;
      break;
    }
    default: {
      const uint16_t rounded = float_to_float16(static_cast<float>(value));
      if (is_finite(float16_to_float(rounded))) static_cast<uint16_t*>(values.data)[channel] = rounded;
    }
  }
}

}  // namespace
}  // namespace brn
