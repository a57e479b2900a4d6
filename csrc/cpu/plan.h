// How a call is cut into pieces: by channels where that is enough, and each channel's values into splits where not.
#pragma once

#include "parallel.h"
#include "simd.h"

namespace brn {
namespace {

// `units` of `channels` each (the last may have fewer), cut into `splits` of `per_split` of its `items`. A unit of one
// split goes through all its passes at once, the later ones reading from the cache; otherwise each pass ends before the
// next begins.
struct Plan {
  int64_t all_channels, channels, units, items, splits, per_split;
  int64_t grain;  // units or splits for which another thread is worth its start
};

constexpr int64_t kGrainElements = 16384;
constexpr int64_t kGrainChannels = 128;

inline __attribute__((always_inline)) int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline __attribute__((always_inline)) int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
inline __attribute__((always_inline)) int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Into how many splits each unit is cut so that threads, which take neighbouring splits in equal numbers, end together.
inline __attribute__((always_inline)) int64_t splits_for(int64_t threads, int64_t units) {
  int64_t splits = 1;
  while (ceil_div(units * splits, threads) * threads * 8 > units * splits * 9) ++splits;  // an eighth is near enough
  return splits;
}

// `item_elements`: of one item of one unit; `at_most`: items in a split, a bound on the length of a sum.
inline __attribute__((always_inline)) Plan plan_of(int64_t all_channels, int64_t channels, int64_t items,
                                                   int64_t item_elements, int64_t at_most, bool fits_cache,
                                                   const Parallel& parallel) {
  const int64_t units = ceil_div(all_channels, channels);
  int64_t wanted = ceil_div(items, at_most);
  const bool few_units = units < 4 * parallel.threads;
  if (wanted > 1 || (few_units && !(fits_cache && units >= parallel.threads))) {
    const int64_t for_threads = few_units ? splits_for(parallel.threads, units) : 1;
    const int64_t worth = most(1, items * item_elements / kGrainElements);
    wanted = most(wanted, least(for_threads, worth));
  }
  Plan plan;
  plan.all_channels = all_channels;
  plan.channels = channels;
  plan.units = units;
  plan.items = items;
  plan.per_split = ceil_div(items, most(1, least(wanted, items)));
  plan.splits = ceil_div(items, plan.per_split);
  plan.grain = most(1, kGrainElements / most(1, plan.per_split * item_elements));
  return plan;
}

// Runs first, finish and second of `task` over a plan; second alone where its coefficients are given.
//   first(unit, split)     reads everything once
//   finish(channels)       knows the sums of all splits
//   second(unit, split)    writes what is not written yet, from the end, where the cache is still warm
template <typename Task>
inline __attribute__((always_inline)) void run_passes(const Plan& plan, Task& task, const Parallel& parallel) {
  if (plan.splits == 1) {
    auto all = [&](int64_t begin, int64_t end) {
      for (int64_t unit = begin; unit < end; ++unit) {
        if (!task.given()) {
          task.first(unit, 0);
          task.finish(unit * plan.channels, least((unit + 1) * plan.channels, plan.all_channels));
        }
        if (task.needs_second(unit)) task.second(unit, 0);
      }
      fence_streams();
    };
    for_each_task(parallel, plan.units, plan.grain, all);
    return;
  }
  auto first = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) task.first(i / plan.splits, i % plan.splits);
    fence_streams();
  };
  auto finish = [&](int64_t begin, int64_t end) { task.finish(begin, end); };
  if (!task.given()) {
    for_each_task(parallel, plan.units * plan.splits, plan.grain, first);
    for_each_task(parallel, plan.all_channels, kGrainChannels, finish);
  }
  auto second = [&](int64_t begin, int64_t end) {
    for (int64_t i = end - 1; i >= begin; --i) {
      if (task.needs_second(i / plan.splits)) task.second(i / plan.splits, i % plan.splits);
    }
    fence_streams();
  };
  for_each_task(parallel, plan.units * plan.splits, plan.grain, second);
}

}  // namespace
}  // namespace brn
