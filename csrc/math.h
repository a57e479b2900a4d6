// The arithmetic of one channel, for host and device alike: the formulas of backends/reference.py.
#pragma once

#include <math.h>

#include "clip_limits.h"

namespace brn {
namespace {

// What is known of some of a channel's values: how many, their mean, and the sum of squares about it.
struct Moments {
  double count, mean, m2;
};

// From sums of (x - origin) and its square.
template <typename T>
BRN_INLINE Moments moments_of(double count, T origin, double s1, double s2) {
  const double shift = s1 / count, m2 = s2 - s1 * shift;
  return {count, static_cast<double>(origin) + shift, m2 < 0 ? 0 : m2};  // below zero by a rounding; NaN stays
}

// Chan's formula: the moments of two sets of values together.
BRN_INLINE Moments merged(const Moments& a, const Moments& b) {
  const double count = a.count + b.count, share = b.count / count, delta = b.mean - a.mean;
  return {count, a.mean + delta * share, a.m2 + b.m2 + delta * delta * a.count * share};
}

// y = (x - pivot) * scale + shift
template <typename T>
struct Coefficients {
  T pivot, scale, shift;
};

// Those of a channel that is not clipped: known before x is read.
template <typename T>
BRN_INLINE Coefficients<T> unclipped_coefficients(T running_mean, T running_var, T gamma, T beta, T eps) {
  return {running_mean, gamma / sqrt(running_var + eps), beta};
}

template <typename T>
struct Correction {
  T inv_std, r, d;
  bool finite;   // are the batch statistics?
  bool applies;  // r or d was clipped, or the statistics are not finite: y comes of the batch statistics
  Coefficients<T> coefficients;
};

template <typename T>
BRN_INLINE T clamped(T value, T low, T high) {
  return value > high ? high : value < low ? low : value;  // NaN stays NaN
}

// r and d of a channel, and all that follows from them (paper, algorithm 1).
template <typename T>
BRN_INLINE Correction<T> correction(T batch_mean, T batch_var, T running_mean, T running_var, Limits<T> limits, T gamma,
                                    T beta, T eps) {
  const T batch_std = sqrt(batch_var + eps), running_std = sqrt(running_var + eps);
  const T r = batch_std / running_std, d = (batch_mean - running_mean) / running_std;
  const bool clipped = r > limits.r_max || r < 1 / limits.r_max || d > limits.d_max || d < -limits.d_max;
  Correction<T> it;
  it.inv_std = 1 / batch_std;
  it.r = clamped(r, 1 / limits.r_max, limits.r_max);
  it.d = clamped(d, -limits.d_max, limits.d_max);
  it.finite = is_finite(batch_mean) && is_finite(batch_var);
  it.applies = clipped || !it.finite;
  if (it.applies) {
    it.coefficients = {batch_mean, gamma * it.r / batch_std, gamma * it.d + beta};
  } else {
    it.coefficients = unclipped_coefficients(running_mean, running_var, gamma, beta, eps);
  }
  return it;
}

// Without running statistics there is nothing to correct: BatchNorm on the batch.
template <typename T>
BRN_INLINE Correction<T> no_correction(T batch_mean, T batch_var, T gamma, T beta, T eps) {
  const T batch_std = sqrt(batch_var + eps);
  return {1 / batch_std, 1, 0, true, true, {batch_mean, gamma / batch_std, beta}};
}

// The weight of a batch in the running statistics.
template <typename T>
BRN_INLINE T momentum_at(const ForwardArguments& a) {
  if (a.cumulative) return 1 / static_cast<T>(*a.counter + 1);
  return a.schedule.automatic.data != nullptr ? automatic::momentum<T>(a) : static_cast<T>(a.momentum);
}

// Everything that follows from a channel's moments: r, d, what the backward needs, the running statistics (moved), the
// clipped flag, the state of automatic limits. `limits` are limits_of_all; *a.counter is not moved yet.
template <typename T>
BRN_INLINE Correction<T> finish_channel(const ForwardArguments& a, int64_t channel, const Moments& moments,
                                        const Limits<T>& limits) {
  const T gamma = value_at<T>(a.weight, channel, 1), beta = value_at<T>(a.bias, channel, 0);
  const T batch_mean = static_cast<T>(moments.mean), batch_var = static_cast<T>(moments.m2 / moments.count);
  const T eps = static_cast<T>(a.eps);
  Correction<T> it;
  if (a.running_mean.data == nullptr) {
    it = no_correction(batch_mean, batch_var, gamma, beta, eps);
  } else {
    const T running_mean = value_at<T>(a.running_mean, channel, 0),
            running_var = value_at<T>(a.running_var, channel, 1);
    it = correction(batch_mean, batch_var, running_mean, running_var, limits_of(a, channel, limits), gamma, beta, eps);
    if (moments.count >= 2) {  // one value says nothing about a variance
      if (a.schedule.automatic.data != nullptr) {
        automatic::observe(a, channel, batch_mean, batch_var, running_var, eps);
      }
      if (it.finite) {
        const T momentum = momentum_at<T>(a);
        const T unbiased_var = batch_var * static_cast<T>(moments.count / (moments.count - 1));
        store_if_finite(a.running_mean, channel, running_mean + momentum * (batch_mean - running_mean));
        store_if_finite(a.running_var, channel, running_var + momentum * (unbiased_var - running_var));
      }
      if (a.clipped != nullptr) a.clipped[channel] = it.applies;
    }
  }
  T* saved = static_cast<T*>(a.saved) + channel;
  saved[0] = batch_mean;
  saved[a.layout.channels] = it.inv_std;
  saved[2 * a.layout.channels] = it.r;
  saved[3 * a.layout.channels] = it.d;
  if (a.coefficients != nullptr) {
    T* coefficients = static_cast<T*>(a.coefficients) + channel;
    coefficients[0] = it.coefficients.pivot;
    coefficients[a.layout.channels] = it.coefficients.scale;
    coefficients[2 * a.layout.channels] = it.coefficients.shift;
  }
  return it;
}

template <typename T>
BRN_INLINE Coefficients<T> given_coefficients(const ForwardArguments& a, int64_t channel) {
  const T* coefficients = static_cast<const T*>(a.coefficients) + channel;
  return {coefficients[0], coefficients[a.layout.channels], coefficients[2 * a.layout.channels]};
}

// Whether y of a channel is written before its batch statistics are known: it is, if the limits are open and the
// channel was not clipped at the last step. `limits` are limits_of_all.
template <typename T>
BRN_INLINE bool predicted_unclipped(const ForwardArguments& a, int64_t channel, const Limits<T>& limits) {
  if (a.running_mean.data == nullptr || !are_open(a, channel, limits)) return false;
  return a.clipped == nullptr || !a.clipped[channel];
}

template <typename T>
BRN_INLINE Coefficients<T> predicted_coefficients(const ForwardArguments& a, int64_t channel) {
  return unclipped_coefficients<T>(value_at<T>(a.running_mean, channel, 0), value_at<T>(a.running_var, channel, 1),
                                   value_at<T>(a.weight, channel, 1), value_at<T>(a.bias, channel, 0),
                                   static_cast<T>(a.eps));
}

// The backward of a channel. z is the activation's argument, g = dy * activation'(z):
//   z  = (x - mean) * z_scale + z_shift
//   dx = g * dx_of_g + (x - mean) * dx_of_x + dx_shift
template <typename T>
struct BackwardCoefficients {
  T mean, z_scale, z_shift, dx_of_g, dx_of_x, dx_shift;
};

// Those known before the sums are.
template <typename T>
BRN_INLINE BackwardCoefficients<T> backward_coefficients(const BackwardArguments& a, int64_t channel) {
  const T* saved = static_cast<const T*>(a.saved) + channel;
  const int64_t channels = a.layout.channels;
  const T inv_std = saved[channels], r = saved[2 * channels], d = saved[3 * channels];
  const T gamma = value_at<T>(a.weight, channel, 1), beta = value_at<T>(a.bias, channel, 0);
  const T scale = gamma * r * inv_std;
  return {saved[0], scale, gamma * d + beta, scale, 0, 0};
}

// From s1 = sum(g) and s2 = sum(g * (x - mean)) over `count` values: the gradients of weight and bias, and dx's terms.
template <typename T>
BRN_INLINE BackwardCoefficients<T> finish_backward_channel(const BackwardArguments& a, int64_t channel, double count,
                                                           double s1, double s2) {
  const T* saved = static_cast<const T*>(a.saved) + channel;
  const int64_t channels = a.layout.channels;
  const T inv_std = saved[channels], r = saved[2 * channels], d = saved[3 * channels];
  const T S1 = static_cast<T>(s1), S2 = static_cast<T>(s2 * static_cast<double>(inv_std));
  static_cast<T*>(a.dbias)[channel] = S1;
  static_cast<T*>(a.dweight)[channel] = r * S2 + d * S1;
  BackwardCoefficients<T> it = backward_coefficients<T>(a, channel);
  it.dx_of_x = -it.dx_of_g * inv_std * static_cast<T>(S2 / static_cast<T>(count));
  it.dx_shift = -it.dx_of_g * static_cast<T>(S1 / static_cast<T>(count));
  return it;
}

}  // namespace
}  // namespace brn
