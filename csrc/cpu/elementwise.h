// What happens to a group of elements in each pass. The coefficients are groups too: the same value in every lane where
// a row belongs to one channel, one value for each lane where it crosses channels.
#pragma once

#include "group.h"

namespace brn {
namespace {

constexpr double kLeakyReluSlope = 0.01;  // reference.LEAKY_RELU_SLOPE

// e^x to about one unit in the last place.
BRN_INLINE Vector<float> exponential(Vector<float> x) {
  using Bits = VectorTypes<float>::Bits;
  const Vector<float> low = broadcast(-87.0f), high = broadcast(88.0f), infinity = broadcast(__builtin_inff());
  Vector<float> v = x < low ? low : x;
  v = v > high ? high : v;
  const float shifter = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const Vector<float> shifted = v * 1.44269504088896341f + shifter;
  const Vector<float> k = shifted - shifter;
  v = v - k * 0.693359375f;
  v = v - k * -2.12194440e-4f;
  Vector<float> p = v * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * v + 8.3334519073e-3f;
  p = p * v + 4.1665795894e-2f;
  p = p * v + 1.6666665459e-1f;
  p = p * v + 5.0000001201e-1f;
  p = p * (v * v) + v + 1.0f;
  const Bits exponent = reinterpret_cast<Bits>(shifted) << 23;  // the integer sits in the lowest bits
  p = reinterpret_cast<Vector<float>>(reinterpret_cast<Bits>(p) + exponent);
  p = x > high ? infinity : p;
  return x == x ? p : x;
}

BRN_INLINE Vector<double> exponential(Vector<double> x) {
  Vector<double> v = {};
  for (int i = 0; i < kLanes<double>; ++i) v[i] = exp(static_cast<double>(x[i]));
  return v;
}

template <typename A>
BRN_INLINE Group<A> sigmoid(const Group<A>& z) {
  const Group<A> one = everywhere<A>(1);
  const Group<A> e = {exponential(-z.a), exponential(-z.b), exponential(-z.c), exponential(-z.d)};
  return one / (one + e);
}

// NaN stays NaN.
template <Activation ACTIVATION, typename A>
BRN_INLINE Group<A> activate(const Group<A>& z) {
  const Group<A> zero = everywhere<A>(0);
  if constexpr (ACTIVATION == Activation::relu) return select(z <= zero, zero, z);
  if constexpr (ACTIVATION == Activation::leaky_relu) {
    return select(zero < z, z, z * everywhere<A>(static_cast<A>(kLeakyReluSlope)));
  }
  if constexpr (ACTIVATION == Activation::silu) return z * sigmoid(z);
  if constexpr (ACTIVATION == Activation::hardswish) {
    const Group<A> three = everywhere<A>(3), six = everywhere<A>(6);
    Group<A> gate = z + three;
    gate = select(gate < zero, zero, gate);
    gate = select(six < gate, six, gate);
    return z * gate * everywhere<A>(static_cast<A>(1.0 / 6));
  }
  return z;
}

// dy times the activation's derivative at z, with PyTorch's conventions at the kinks.
template <Activation ACTIVATION, typename A>
BRN_INLINE Group<A> activation_backward(const Group<A>& dy, const Group<A>& z) {
  const Group<A> zero = everywhere<A>(0), one = everywhere<A>(1);
  if constexpr (ACTIVATION == Activation::relu) return select(z <= zero, zero, dy);
  if constexpr (ACTIVATION == Activation::leaky_relu) {
    return select(zero < z, dy, dy * everywhere<A>(static_cast<A>(kLeakyReluSlope)));
  }
  if constexpr (ACTIVATION == Activation::silu) {
    const Group<A> gate = sigmoid(z);
    return dy * (gate * (one + z * (one - gate)));
  }
  if constexpr (ACTIVATION == Activation::hardswish) {
    const Group<A> slope = z * everywhere<A>(static_cast<A>(1.0 / 3)) + everywhere<A>(static_cast<A>(0.5));
    return select(z <= everywhere<A>(-3), zero, select(z < everywhere<A>(3), dy * slope, dy));
  }
  return dy;
}

// Calls step(size, offset, n) for the groups of a row.
template <typename A, typename Step>
BRN_INLINE void for_each_group(int64_t length, Step&& step) {
  int64_t i = 0;
  for (; i + kGroup<A> <= length; i += kGroup<A>) step(Whole{}, i, kGroup<A>);
  if (i < length) step(Partial{}, i, length - i);
}

template <typename T>
BRN_INLINE T* offset(T* p, int64_t elements) {
  return p == nullptr ? p : p + elements;
}

// Two sums over groups: of values, and of values times something.
template <typename A>
struct Sums {
  Group<A> s1, s2;
};

template <typename A>
BRN_INLINE Sums<A> no_sums() {
  return {everywhere<A>(0), everywhere<A>(0)};
}

// Sums of a few rows into those of many: two levels keep rounding errors from growing with the number of rows.
template <typename A>
BRN_INLINE void add(Sums<A>& many, const Sums<A>& few) {
  many.s1 = many.s1 + few.s1;
  many.s2 = many.s2 + few.s2;
}

template <typename A>
BRN_INLINE void add(A* s1, A* s2, const Sums<A>& few) {
  constexpr int64_t n = kGroup<A>;
  store(Whole{}, s1, load(Whole{}, static_cast<const A*>(s1), n) + few.s1, n);
  store(Whole{}, s2, load(Whole{}, static_cast<const A*>(s2), n) + few.s2, n);
}

template <typename A>
BRN_INLINE Group<A> zero_beyond(Whole, const Group<A>& x, int64_t) {
  return x;
}

template <typename A>
BRN_INLINE Group<A> zero_beyond(Partial, const Group<A>& x, int64_t n) {
  return select(first_lanes<A>(n), x, everywhere<A>(0));
}

// x into the sums of (x - origin) and its square.
template <typename SIZE, typename A>
BRN_INLINE void gather(SIZE size, Sums<A>& sums, const Group<A>& x, const Group<A>& origin, int64_t n) {
  const Group<A> centered = zero_beyond(size, x - origin, n);
  sums.s1 = sums.s1 + centered;
  sums.s2 = sums.s2 + centered * centered;
}

template <typename A>
struct GroupCoefficients {
  Group<A> pivot, scale, shift;
};

template <typename SIZE, typename S, typename A>
BRN_INLINE void put(SIZE size, S* p, const Group<A>& x, bool past_cache, int64_t n) {
  if (past_cache) {
    stream(size, p, x, n);
  } else {
    store(size, p, x, n);
  }
}

// The one way in which y is computed, so that its bits do not depend on the pass that writes it. Without EXTRAS there
// is neither residual nor bits.
template <Activation ACTIVATION, bool EXTRAS, typename SIZE, typename S, typename A>
BRN_INLINE void write(SIZE size, const Group<A>& x, const GroupCoefficients<A>& c, const S* residual, S* y,
                      uint8_t* bits, bool past_cache, int64_t n) {
  Group<A> z = (x - c.pivot) * c.scale + c.shift;
  if constexpr (EXTRAS) {
    if (residual != nullptr) z = z + load(size, residual, n);
    if (bits != nullptr) {
      const GroupMask<A> stopped = z <= everywhere<A>(0);
      store_bits<A>(bits, {~stopped.a, ~stopped.b, ~stopped.c, ~stopped.d}, n);
    }
  }
  put(size, y, activate<ACTIVATION>(z), past_cache, n);
}

// What the backward reads of a group: g = dy * activation'(z), and x - mean.
template <typename A>
struct Upstream {
  Group<A> g, centered;
};

template <Activation ACTIVATION, bool EXTRAS, typename SIZE, typename S, typename A>
BRN_INLINE Upstream<A> upstream(SIZE size, const S* dy, const S* x, const S* residual, const uint8_t* bits,
                                const Group<A>& mean, const Group<A>& z_scale, const Group<A>& z_shift, int64_t n) {
  const Group<A> g = load(size, dy, n), centered = load(size, x, n) - mean;
  if constexpr (EXTRAS) {
    if (bits != nullptr) return {select(load_bits<A>(bits, n), g, everywhere<A>(0)), centered};
  }
  if constexpr (ACTIVATION == Activation::none) return {g, centered};
  Group<A> z = centered * z_scale + z_shift;
  if constexpr (EXTRAS) {
    if (residual != nullptr) z = z + load(size, residual, n);
  }
  return {activation_backward<ACTIVATION>(g, z), centered};
}

// g and g * (x - mean) into their sums. Lanes beyond n hold 0, or NaN times 0.
template <typename SIZE, typename A>
BRN_INLINE void gather(SIZE size, Sums<A>& sums, const Upstream<A>& up, int64_t n) {
  sums.s1 = sums.s1 + zero_beyond(size, up.g, n);
  sums.s2 = sums.s2 + zero_beyond(size, up.g * up.centered, n);
}

template <typename A>
struct GroupGradient {
  Group<A> of_g, of_x, shift;
};

// Without EXTRAS dx is wanted, and nothing else.
template <bool EXTRAS, typename SIZE, typename S, typename A>
BRN_INLINE void write_gradients(SIZE size, const Upstream<A>& up, const GroupGradient<A>& c, S* dx, S* dresidual,
                                bool past_cache, int64_t n) {
  if constexpr (EXTRAS) {
    if (dresidual != nullptr) put(size, dresidual, up.g, past_cache, n);
    if (dx == nullptr) return;
  }
  put(size, dx, up.g * c.of_g + (up.centered * c.of_x + c.shift), past_cache, n);
}

// Known when compiled.
struct Yes {
  static constexpr bool value = true;
};
struct No {
  static constexpr bool value = false;
};

}  // namespace
}  // namespace brn
