// The unit of work: a Group of four vectors, so that its elements are whole bytes of packed bits on every instruction
// set. Arithmetic, memory, and the lanes of a group that is not whole.
#pragma once

#include "simd.h"

namespace brn {
namespace {

template <typename A>
struct Group {
  Vector<A> a, b, c, d;

  Group() = default;
  __attribute__((always_inline)) Group(Vector<A> a_, Vector<A> b_, Vector<A> c_, Vector<A> d_)
      : a(a_), b(b_), c(c_), d(d_) {}
  // One by one: GCC keeps what is copied as a whole in memory.
  __attribute__((always_inline)) Group(const Group& other) : Group(other.a, other.b, other.c, other.d) {}
  Group& operator=(const Group& other) {
    a = other.a, b = other.b, c = other.c, d = other.d;
    return *this;
  }
};

template <typename A>
struct GroupMask {
  Mask<A> a, b, c, d;
};

template <typename A>
BRN_INLINE Group<A> operator+(const Group<A>& x, const Group<A>& y) {
  return {x.a + y.a, x.b + y.b, x.c + y.c, x.d + y.d};
}

template <typename A>
BRN_INLINE Group<A> operator-(const Group<A>& x, const Group<A>& y) {
  return {x.a - y.a, x.b - y.b, x.c - y.c, x.d - y.d};
}

template <typename A>
BRN_INLINE Group<A> operator*(const Group<A>& x, const Group<A>& y) {
  return {x.a * y.a, x.b * y.b, x.c * y.c, x.d * y.d};
}

template <typename A>
BRN_INLINE Group<A> operator/(const Group<A>& x, const Group<A>& y) {
  return {x.a / y.a, x.b / y.b, x.c / y.c, x.d / y.d};
}

template <typename A>
BRN_INLINE GroupMask<A> operator<=(const Group<A>& x, const Group<A>& y) {
  return {x.a <= y.a, x.b <= y.b, x.c <= y.c, x.d <= y.d};
}

template <typename A>
BRN_INLINE GroupMask<A> operator<(const Group<A>& x, const Group<A>& y) {
  return {x.a < y.a, x.b < y.b, x.c < y.c, x.d < y.d};
}

template <typename A>
BRN_INLINE Group<A> select(const GroupMask<A>& m, const Group<A>& yes, const Group<A>& no) {
  return {m.a ? yes.a : no.a, m.b ? yes.b : no.b, m.c ? yes.c : no.c, m.d ? yes.d : no.d};
}

template <typename A>
BRN_INLINE Group<A> everywhere(A value) {
  const Vector<A> v = broadcast(value);
  return {v, v, v, v};
}

// The first n lanes.
template <typename A>
BRN_INLINE GroupMask<A> first_lanes(int64_t n) {
  using Integer = decltype(Mask<A>{}[0] + 0);
  const Mask<A> lanes = lane_numbers<A>();
  const Integer count = static_cast<Integer>(n), step = kLanes<A>;
  return {lanes < count, lanes < count - step, lanes < count - 2 * step, lanes < count - 3 * step};
}

// The sum of all lanes, in a fixed order.
template <typename A>
BRN_INLINE double total(const Group<A>& x) {
  const Vector<A> v = (x.a + x.b) + (x.c + x.d);
  double sum = 0;
  for (int i = 0; i < kLanes<A>; ++i) sum += static_cast<double>(v[i]);
  return sum;
}

BRN_INLINE uint64_t lowest_bits(int64_t n) { return n < 64 ? (uint64_t{1} << n) - 1 : ~uint64_t{0}; }

// Whether a group is whole, or only its first n lanes exist in memory: known when compiled.
struct Whole {};
struct Partial {};

template <typename S>
BRN_INLINE Group<Accumulate<S>> load(Whole, const S* p, int64_t) {
  constexpr int step = kLanes<Accumulate<S>>;
  return {load_vector(p), load_vector(p + step), load_vector(p + 2 * step), load_vector(p + 3 * step)};
}

template <typename S>
BRN_INLINE void store(Whole, S* p, const Group<Accumulate<S>>& x, int64_t) {
  constexpr int step = kLanes<Accumulate<S>>;
  store_vector(p, x.a);
  store_vector(p + step, x.b);
  store_vector(p + 2 * step, x.c);
  store_vector(p + 3 * step, x.d);
}

template <typename S>
BRN_INLINE void stream(Whole, S* p, const Group<Accumulate<S>>& x, int64_t n) {
  constexpr int step = kLanes<Accumulate<S>>;
  if (reinterpret_cast<uintptr_t>(p) % 64 != 0) return store(Whole{}, p, x, n);
  stream_vector(p, x.a);
  stream_vector(p + step, x.b);
  stream_vector(p + 2 * step, x.c);
  stream_vector(p + 3 * step, x.d);
}

#if defined(__AVX512F__)

BRN_INLINE Vector<float> load_lanes(const float* p, uint64_t lanes) {
  return reinterpret_cast<Vector<float>>(_mm512_maskz_loadu_ps(static_cast<__mmask16>(lanes), p));
}
BRN_INLINE Vector<double> load_lanes(const double* p, uint64_t lanes) {
  return reinterpret_cast<Vector<double>>(_mm512_maskz_loadu_pd(static_cast<__mmask8>(lanes), p));
}
template <typename S>
BRN_INLINE Vector<float> load_lanes(const S* p, uint64_t lanes) {
  S buffer[kLanes<float>];
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(buffer), _mm256_maskz_loadu_epi16(static_cast<__mmask16>(lanes), p));
  return load_vector(static_cast<const S*>(buffer));
}

BRN_INLINE void store_lanes(float* p, Vector<float> v, uint64_t lanes) {
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>(lanes), reinterpret_cast<__m512>(v));
}
BRN_INLINE void store_lanes(double* p, Vector<double> v, uint64_t lanes) {
  _mm512_mask_storeu_pd(p, static_cast<__mmask8>(lanes), reinterpret_cast<__m512d>(v));
}
template <typename S>
BRN_INLINE void store_lanes(S* p, Vector<float> v, uint64_t lanes) {
  S buffer[kLanes<float>];
  store_vector(static_cast<S*>(buffer), v);
  _mm256_mask_storeu_epi16(p, static_cast<__mmask16>(lanes), _mm256_loadu_si256(reinterpret_cast<__m256i*>(buffer)));
}

// Lanes beyond n are 0.
template <typename S>
BRN_INLINE Group<Accumulate<S>> load(Partial, const S* p, int64_t n) {
  constexpr int step = kLanes<Accumulate<S>>;
  const uint64_t lanes = lowest_bits(n);
  return {load_lanes(p, lanes), load_lanes(p + step, lanes >> step), load_lanes(p + 2 * step, lanes >> 2 * step),
          load_lanes(p + 3 * step, lanes >> 3 * step)};
}

template <typename S>
BRN_INLINE void store(Partial, S* p, const Group<Accumulate<S>>& x, int64_t n) {
  constexpr int step = kLanes<Accumulate<S>>;
  const uint64_t lanes = lowest_bits(n);
  store_lanes(p, x.a, lanes);
  store_lanes(p + step, x.b, lanes >> step);
  store_lanes(p + 2 * step, x.c, lanes >> 2 * step);
  store_lanes(p + 3 * step, x.d, lanes >> 3 * step);
}

#else

// Lanes beyond n are 0.
template <typename S>
BRN_INLINE Group<Accumulate<S>> load(Partial, const S* p, int64_t n) {
  S buffer[kGroup<Accumulate<S>>];
  memset(buffer, 0, sizeof buffer);
  memcpy(buffer, p, static_cast<size_t>(n) * sizeof(S));
  return load(Whole{}, static_cast<const S*>(buffer), n);
}

template <typename S>
BRN_INLINE void store(Partial, S* p, const Group<Accumulate<S>>& x, int64_t n) {
  S buffer[kGroup<Accumulate<S>>];
  store(Whole{}, static_cast<S*>(buffer), x, n);
  memcpy(p, buffer, static_cast<size_t>(n) * sizeof(S));
}

#endif

// Asks for the lines of a group that is read soon, or WRITTEN: hardware prefetchers stop at every 4 KB page, and know
// nothing of short rows.
template <bool WRITTEN = false, typename S>
BRN_INLINE void prefetch(const S* p) {
  constexpr int bytes = kGroup<Accumulate<S>> * static_cast<int>(sizeof(S));
  const char* lines = reinterpret_cast<const char*>(p);
  for (int i = 0; i < bytes; i += 64) __builtin_prefetch(lines + i, WRITTEN, 2);
}

template <typename S>
BRN_INLINE void stream(Partial, S* p, const Group<Accumulate<S>>& x, int64_t n) {
  store(Partial{}, p, x, n);
}

// Bit i of the result: lane i.
BRN_INLINE uint64_t lane_bits(Mask<float> m) {
#if defined(__AVX512DQ__)
  return _mm512_movepi32_mask(reinterpret_cast<__m512i>(m));
#elif defined(__AVX2__)
  return static_cast<uint32_t>(_mm256_movemask_ps(reinterpret_cast<__m256>(m)));
#elif defined(__SSE2__)
  return static_cast<uint32_t>(_mm_movemask_ps(reinterpret_cast<__m128>(m)));
#else
  uint64_t bits = 0;
  for (int i = 0; i < kLanes<float>; ++i) bits |= static_cast<uint64_t>(m[i] & 1) << i;
  return bits;
#endif
}

BRN_INLINE uint64_t lane_bits(Mask<double> m) {
#if defined(__AVX512DQ__)
  return _mm512_movepi64_mask(reinterpret_cast<__m512i>(m));
#elif defined(__AVX2__)
  return static_cast<uint32_t>(_mm256_movemask_pd(reinterpret_cast<__m256d>(m)));
#elif defined(__SSE2__)
  return static_cast<uint32_t>(_mm_movemask_pd(reinterpret_cast<__m128d>(m)));
#else
  uint64_t bits = 0;
  for (int i = 0; i < kLanes<double>; ++i) bits |= static_cast<uint64_t>(m[i] & 1) << i;
  return bits;
#endif
}

template <typename A>
BRN_INLINE uint64_t group_bits(const GroupMask<A>& m) {
  constexpr int step = kLanes<A>;
  return lane_bits(m.a) | lane_bits(m.b) << step | lane_bits(m.c) << 2 * step | lane_bits(m.d) << 3 * step;
}

template <typename A>
BRN_INLINE GroupMask<A> mask_of_bits(uint64_t bits) {
  using Bits = typename VectorTypes<A>::Bits;
  using Word = decltype(Bits{}[0] + 0);
  constexpr int step = kLanes<A>;
  const Bits lane = (Bits{} + 1) << reinterpret_cast<Bits>(lane_numbers<A>());
  const Bits zero = {};
  const auto words = [&](int shift) { return (zero + static_cast<Word>(bits >> shift)) & lane; };
  return {words(0) != zero, words(step) != zero, words(2 * step) != zero, words(3 * step) != zero};
}

// The first n bytes of a word, 1 to 8, from and to memory: two accesses that overlap, where a call of memcpy would cost
// more than what is done with it.
template <typename Part>
BRN_INLINE uint64_t load_ends(const uint8_t* p, int64_t n) {
  Part low, high;
  memcpy(&low, p, sizeof low);
  memcpy(&high, p + n - sizeof high, sizeof high);
  return low | static_cast<uint64_t>(high) << 8 * (n - static_cast<int64_t>(sizeof high));
}

template <typename Part>
BRN_INLINE void store_ends(uint8_t* p, uint64_t word, int64_t n) {
  const Part low = static_cast<Part>(word);
  const Part high = static_cast<Part>(word >> 8 * (n - static_cast<int64_t>(sizeof high)));
  memcpy(p, &low, sizeof low);
  memcpy(p + n - sizeof high, &high, sizeof high);
}

BRN_INLINE uint64_t load_bytes(const uint8_t* p, int64_t n) {
  return n >= 4 ? load_ends<uint32_t>(p, n) : n >= 2 ? load_ends<uint16_t>(p, n) : *p;
}

BRN_INLINE void store_bytes(uint8_t* p, uint64_t word, int64_t n) {
  if (n >= 4) return store_ends<uint32_t>(p, word, n);
  if (n >= 2) return store_ends<uint16_t>(p, word, n);
  *p = static_cast<uint8_t>(word);
}

// Packed bits of the first n lanes (n == kGroup where Whole); bits beyond them in the last byte are 0.
template <typename A>
BRN_INLINE void store_bits(uint8_t* p, const GroupMask<A>& m, int64_t n) {
  store_bytes(p, group_bits(m) & lowest_bits(n), (n + 7) / 8);
}

template <typename A>
BRN_INLINE GroupMask<A> load_bits(const uint8_t* p, int64_t n) {
  return mask_of_bits<A>(load_bytes(p, (n + 7) / 8));
}

}  // namespace
}  // namespace brn
