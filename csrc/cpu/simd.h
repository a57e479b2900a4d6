// Vectors of the instruction set this file is compiled for, and how each dtype gets in and out of them. Everything has
// internal linkage (see values.h).
#pragma once

#include <stddef.h>

#ifdef __SSE2__
#include <immintrin.h>
#endif

#include "../math.h"

// After a lambda's parameters: it is part of the loop it is given to, never a call.
#define BRN_LAMBDA __attribute__((always_inline))

namespace brn {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// The dtype in which elements of dtype S are computed.
template <typename S>
struct AccumulateOf {
  using type = float;
};
template <>
struct AccumulateOf<double> {
  using type = double;
};
template <typename S>
using Accumulate = typename AccumulateOf<S>::type;

template <typename A>
struct VectorTypes;
template <>
struct VectorTypes<float> {
  typedef float Vector __attribute__((vector_size(kVectorBytes)));
  typedef int32_t Mask __attribute__((vector_size(kVectorBytes)));  // -1: true, as comparisons give it
  typedef uint32_t Bits __attribute__((vector_size(kVectorBytes)));
  typedef uint16_t Halves __attribute__((vector_size(kVectorBytes / 2)));
};
template <>
struct VectorTypes<double> {
  typedef double Vector __attribute__((vector_size(kVectorBytes)));
  typedef int64_t Mask __attribute__((vector_size(kVectorBytes)));
  typedef uint64_t Bits __attribute__((vector_size(kVectorBytes)));
};
template <typename A>
using Vector = typename VectorTypes<A>::Vector;
template <typename A>
using Mask = typename VectorTypes<A>::Mask;

template <typename A>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(A));
template <typename A>
constexpr int kGroup = 4 * kLanes<A>;

template <typename A>
BRN_INLINE Vector<A> broadcast(A value) {
  return value - Vector<A>{};
}

template <typename A>
BRN_INLINE Mask<A> lane_numbers() {
  Mask<A> numbers = {};
  for (int i = 0; i < kLanes<A>; ++i) numbers[i] = i;
  return numbers;
}

// Vectors from and to memory.

BRN_INLINE Vector<float> load_vector(const float* p) {
  Vector<float> v;
  memcpy(&v, p, sizeof v);
  return v;
}

BRN_INLINE Vector<double> load_vector(const double* p) {
  Vector<double> v;
  memcpy(&v, p, sizeof v);
  return v;
}

// 16-bit lanes to 32 and back. The compiler's own conversions split vectors; "maskz" with a full mask, because GCC 12
// warns of its own header otherwise.
BRN_INLINE VectorTypes<float>::Bits widened(VectorTypes<float>::Halves halves) {
#if defined(__AVX512F__)
  return reinterpret_cast<VectorTypes<float>::Bits>(
      _mm512_maskz_cvtepu16_epi32(0xffff, reinterpret_cast<__m256i>(halves)));
#elif defined(__AVX2__)
  return reinterpret_cast<VectorTypes<float>::Bits>(_mm256_cvtepu16_epi32(reinterpret_cast<__m128i>(halves)));
#else
  return __builtin_convertvector(halves, VectorTypes<float>::Bits);
#endif
}

BRN_INLINE VectorTypes<float>::Halves narrowed(VectorTypes<float>::Bits bits) {
#if defined(__AVX512F__)
  return reinterpret_cast<VectorTypes<float>::Halves>(
      _mm512_maskz_cvtepi32_epi16(0xffff, reinterpret_cast<__m512i>(bits)));
#elif defined(__AVX2__)
  const __m256i it = reinterpret_cast<__m256i>(bits);
  return reinterpret_cast<VectorTypes<float>::Halves>(
      _mm256_castsi256_si128(_mm256_permute4x64_epi64(_mm256_packus_epi32(it, it), 0xd8)));
#else
  return __builtin_convertvector(bits, VectorTypes<float>::Halves);
#endif
}

BRN_INLINE Vector<float> load_vector(const BFloat16* p) {
  VectorTypes<float>::Halves halves;
  memcpy(&halves, p, sizeof halves);
  return reinterpret_cast<Vector<float>>(widened(halves) << 16);
}

BRN_INLINE Vector<float> load_vector(const Float16* p) {
#if defined(__AVX512F__)
  const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return reinterpret_cast<Vector<float>>(_mm512_maskz_cvtph_ps(0xffff, halves));
#elif defined(__F16C__)
  return reinterpret_cast<Vector<float>>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
  Vector<float> v = {};
  for (int i = 0; i < kLanes<float>; ++i) v[i] = float16_to_float(p[i].bits);
  return v;
#endif
}

BRN_INLINE void store_vector(float* p, Vector<float> v) { memcpy(p, &v, sizeof v); }

BRN_INLINE void store_vector(double* p, Vector<double> v) { memcpy(p, &v, sizeof v); }

BRN_INLINE VectorTypes<float>::Halves rounded(BFloat16, Vector<float> v) {
#if defined(__AVX512BF16__)
  return reinterpret_cast<VectorTypes<float>::Halves>(_mm512_cvtneps_pbh(reinterpret_cast<__m512>(v)));
#else
  using Bits = VectorTypes<float>::Bits;
  const Bits bits = reinterpret_cast<Bits>(v);
  const Bits nearest = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return narrowed(v == v ? nearest : Bits{} + 0x7fc0);
#endif
}

BRN_INLINE VectorTypes<float>::Halves rounded(Float16, Vector<float> v) {
#if defined(__AVX512F__)
  return reinterpret_cast<VectorTypes<float>::Halves>(
      _mm512_maskz_cvtps_ph(0xffff, reinterpret_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  return reinterpret_cast<VectorTypes<float>::Halves>(
      _mm256_cvtps_ph(reinterpret_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT));
#else
  VectorTypes<float>::Halves halves = {};
  for (int i = 0; i < kLanes<float>; ++i) halves[i] = float_to_float16(v[i]);
  return halves;
#endif
}

template <typename S>
BRN_INLINE void store_vector(S* p, Vector<float> v) {
  const VectorTypes<float>::Halves halves = rounded(S{}, v);
  memcpy(p, &halves, sizeof halves);
}

// Past the caches, for what is too large to stay there: its lines are then not read before they are written, and push
// out nothing that does fit. p is aligned to 64 bytes. A fence must follow before others read it.
template <typename S, typename V>
BRN_INLINE void stream_bytes(S* p, const V& v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(V) == 64)
    return _mm512_stream_si512(reinterpret_cast<__m512i*>(p), reinterpret_cast<__m512i>(v));
#endif
#if defined(__AVX__)
  if constexpr (sizeof(V) == 32)
    return _mm256_stream_si256(reinterpret_cast<__m256i*>(p), reinterpret_cast<__m256i>(v));
#endif
#if defined(__SSE2__)
  if constexpr (sizeof(V) == 16) return _mm_stream_si128(reinterpret_cast<__m128i*>(p), reinterpret_cast<__m128i>(v));
#endif
  memcpy(p, &v, sizeof v);
}

BRN_INLINE void stream_vector(float* p, Vector<float> v) { stream_bytes(p, v); }
BRN_INLINE void stream_vector(double* p, Vector<double> v) { stream_bytes(p, v); }
template <typename S>
BRN_INLINE void stream_vector(S* p, Vector<float> v) {
  stream_bytes(p, rounded(S{}, v));
}

BRN_INLINE void fence_streams() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

}  // namespace
}  // namespace brn
