// The limits of r and d in force: a schedule's, a tensor's, or automatic ones, whose state is also kept up here.
#pragma once

#include <math.h>

#include "values.h"

namespace brn {
namespace {

template <typename T>
struct Limits {
  T r_max, d_max;
};

// A limit `since` steps after the hold: `closed` before it, `final` after `ramp` more.
template <typename T>
BRN_INLINE T ramp_at(int64_t since, T closed, T final, int64_t ramp) {
  if (since < 0) return closed;
  if (since >= ramp) return final;
  return closed + (final - closed) * (static_cast<T>(since) / static_cast<T>(ramp));
}

// What automatic limits are computed of: backends/auto_limits.py, whose constants and rows these are.
namespace automatic {

constexpr double kNoiseWidths = 2, kRate = 0.02, kMinBatches = 10, kWarmup = 3;
constexpr int64_t kCount = 0, kBatchMean = 1, kBatchLogStd = 2, kNoiseD = 3, kNoiseR = 4;

template <typename T>
BRN_INLINE T row(const ForwardArguments& a, int64_t channel, int64_t row) {
  return value_at<T>(a.schedule.automatic, row * a.layout.channels + channel, 0);
}

template <typename T>
BRN_INLINE bool are_believed(const ForwardArguments& a, int64_t channel) {
  return row<T>(a, channel, kCount) >= static_cast<T>(kMinBatches);
}

template <typename T>
BRN_INLINE Limits<T> limits(const ForwardArguments& a, int64_t channel) {
  if (!are_believed<T>(a, channel)) return {1, 0};
  const T widths = static_cast<T>(kNoiseWidths);
  return {exp(widths * sqrt(row<T>(a, channel, kNoiseR))), widths * sqrt(row<T>(a, channel, kNoiseD))};
}

// The weight of a batch in the running statistics, if these are no cumulative average.
template <typename T>
BRN_INLINE T momentum(const ForwardArguments& a) {
  const T given = static_cast<T>(a.momentum), warmup = static_cast<T>(kWarmup);
  if (a.counter == nullptr || !(given > 0)) return given;
  const T at_least = warmup / (static_cast<T>(*a.counter) + warmup);
  return at_least > given ? at_least : given;
}

template <typename S, typename T>
BRN_INLINE void store_if_finite(S* state, int64_t channels, const T (&rows)[kAutomaticRows]) {
  for (const T value : rows) {
    if (!is_finite(static_cast<S>(value))) return;
  }
  for (int64_t i = 0; i < kAutomaticRows; ++i) state[i * channels] = static_cast<S>(rows[i]);
}

// Takes a batch into the state, unless its statistics are not finite; `running_var` is that from before its update.
template <typename T>
BRN_INLINE void observe(const ForwardArguments& a, int64_t channel, T batch_mean, T batch_var, T running_var, T eps) {
  const T count = row<T>(a, channel, kCount), noise_d = row<T>(a, channel, kNoiseD),
          noise_r = row<T>(a, channel, kNoiseR), log_std = log(batch_var + eps) / 2;
  const T by_mean = batch_mean - row<T>(a, channel, kBatchMean),
          by_log_std = log_std - row<T>(a, channel, kBatchLogStd);
  const T change_d = by_mean * by_mean / (2 * (running_var + eps)), change_r = by_log_std * by_log_std / 2;
  const T least = static_cast<T>(kRate);
  const T rate = count > 0 ? (1 / count > least ? 1 / count : least) : 0;  // the first batch differs from nothing
  const T rows[kAutomaticRows] = {count + 1, batch_mean, log_std, noise_d + rate * (change_d - noise_d),
                                  noise_r + rate * (change_r - noise_r)};
  const PerChannel state = a.schedule.automatic;
  if (state.dtype == DType::float64) {
    store_if_finite(static_cast<double*>(state.data) + channel, a.layout.channels, rows);
  } else {
    store_if_finite(static_cast<float*>(state.data) + channel, a.layout.channels, rows);
  }
}

}  // namespace automatic

// Those of all channels, unless they are automatic; *a.counter is not moved yet.
template <typename T>
BRN_INLINE Limits<T> limits_of_all(const ForwardArguments& a) {
  const Schedule& schedule = a.schedule;
  if (schedule.given.data != nullptr) {
    return {value_at<T>(schedule.given, 0, 1), value_at<T>(schedule.given, 1, 0)};
  }
  const int64_t since = (a.counter == nullptr ? 0 : *a.counter) - schedule.hold;
  return {ramp_at<T>(since, 1, static_cast<T>(schedule.r_max), schedule.r_ramp),
          ramp_at<T>(since, 0, static_cast<T>(schedule.d_max), schedule.d_ramp)};
}

// Those in force for a channel; the state of automatic ones is not moved yet.
template <typename T>
BRN_INLINE Limits<T> limits_of(const ForwardArguments& a, int64_t channel, const Limits<T>& of_all) {
  return a.schedule.automatic.data != nullptr ? automatic::limits<T>(a, channel) : of_all;
}

// Whether these are open.
template <typename T>
BRN_INLINE bool are_open(const ForwardArguments& a, int64_t channel, const Limits<T>& of_all) {
  if (a.schedule.automatic.data != nullptr) return automatic::are_believed<T>(a, channel);  // noise is hardly ever 0
  return of_all.r_max > 1 && of_all.d_max > 0;
}

}  // namespace
}  // namespace brn
