// Elements in memory, and accesses to one or to neighbours at once.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <initializer_list>
#include <type_traits>

#include "../math.h"
#include "plan.h"

namespace brn {

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

namespace {

// The type of the arithmetic on elements E.
template <typename E>
struct ArithmeticOf {
  using type = float;
};

template <>
struct ArithmeticOf<double> {
  using type = double;
};

template <typename E>
using Arithmetic = typename ArithmeticOf<E>::type;

BRN_INLINE float value_of(float element) { return element; }
BRN_INLINE double value_of(double element) { return element; }
BRN_INLINE float value_of(BFloat16 element) { return bfloat16_to_float(element.bits); }

BRN_INLINE float value_of(Float16 element) {
#ifdef __CUDA_ARCH__
  return __half2float(__ushort_as_half(element.bits));
#else
  return float16_to_float(element.bits);
#endif
}

// Rounds to nearest, ties to even; NaN stays NaN.
BRN_INLINE void round_to(float& element, float value) { element = value; }
BRN_INLINE void round_to(double& element, double value) { element = value; }

BRN_INLINE void round_to(BFloat16& element, float value) {
#ifdef __CUDA_ARCH__
  element.bits = __bfloat16_as_ushort(__float2bfloat16_rn(value));
#else
  element.bits = float_to_bfloat16(value);
#endif
}

BRN_INLINE void round_to(Float16& element, float value) {
#ifdef __CUDA_ARCH__
  element.bits = __half_as_ushort(__float2half_rn(value));
#else
  element.bits = float_to_float16(value);
#endif
}

// Neighbours in a row, read and written by one access of 16, 8 or sizeof(E) bytes.
template <typename E, int VEC>
struct alignas(sizeof(E) * VEC) Vector {
  E elements[VEC];
};

// The same between a load and its use: whole 32-bit words. Of 16-bit elements, what is loaded under a condition would
// be put together from its halves at once, and the next load waits for that.
template <typename E, int VEC>
struct Packed {
  uint32_t words[sizeof(E) * VEC / 4];

  __device__ __forceinline__ E operator[](int i) const {
    Vector<E, VEC> it;
    memcpy(&it, words, sizeof it);
    return it.elements[i];
  }
};

template <typename E>
struct Packed<E, 1> {
  E element;

  __device__ __forceinline__ E operator[](int) const { return element; }
};

template <typename E, int VEC>
constexpr int kLoadsAtOnce = loads_at_once(VEC * sizeof(E));

template <typename E, int VEC>
__device__ __forceinline__ Packed<E, VEC> load_packed(const void* data, int64_t offset) {
  const E* const source = static_cast<const E*>(data) + offset;
  if constexpr (VEC == 1) {
    return {*source};
  } else if constexpr (VEC * sizeof(E) == sizeof(uint2)) {
    const uint2 whole = *reinterpret_cast<const uint2*>(source);
    return {{whole.x, whole.y}};
  } else {
    const uint4 whole = *reinterpret_cast<const uint4*>(source);
    return {{whole.x, whole.y, whole.z, whole.w}};
  }
}

template <typename E, int VEC>
__device__ __forceinline__ Vector<E, VEC> load(const void* data, int64_t offset) {
  return *reinterpret_cast<const Vector<E, VEC>*>(static_cast<const E*>(data) + offset);
}

template <typename E, int VEC>
__device__ __forceinline__ void store(void* data, int64_t offset, const Vector<E, VEC>& values) {
  E* const target = static_cast<E*>(data) + offset;
  if constexpr (VEC > 1) {
    using Whole = std::conditional_t<sizeof(values) == sizeof(uint2), uint2, uint4>;
    Whole whole;
    memcpy(&whole, &values, sizeof whole);
    // Streaming: written lines leave the L2 cache before those that the second pass reads again. (And one access: an
    // assignment the compiler takes apart here and there.)
    __stcs(reinterpret_cast<Whole*>(target), whole);
  } else {
    *reinterpret_cast<Vector<E, VEC>*>(target) = values;
  }
}

// Whether accesses of so many elements to a tensor are aligned, and whole vectors make up its rows.
inline bool is_aligned(const Side& side, const Layout& layout, int vector, int itemsize) {
  if (side.data == nullptr) return true;
  const int bytes = vector * itemsize;
  return reinterpret_cast<uintptr_t>(side.data) % bytes == 0 && layout.inner % vector == 0 &&
         (layout.outer == 1 || side.outer_stride % vector == 0) &&
         (layout.channels_last || layout.channels == 1 || side.channel_stride % vector == 0);
}

// Elements in the widest access that all tensors of a call allow.
inline int vector_for(std::initializer_list<Side> sides, const Layout& layout, int itemsize) {
  int vector = widest_vector(itemsize);
  for (const Side& side : sides) {
    while (!is_aligned(side, layout, vector, itemsize)) vector = narrower_vector(vector, itemsize);
  }
  return vector;
}

}  // namespace
}  // namespace brn
