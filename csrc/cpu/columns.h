// Rows that cross channels: the channels_last layout, and the contiguous one where planes are small. A unit is a block
// of channels, an item a row, and there is one sum and one coefficient for each column.
#pragma once

#include "plane_bits.h"

namespace brn {
namespace {

template <typename A>
BRN_INLINE void zero(A* columns, int64_t width) {
  for (int64_t j = 0; j < width + kGroup<A>; ++j) columns[j] = 0;
}

// Room for a few values of every column of a unit.
template <typename A, int ROWS>
struct ColumnScratch {
  explicit ColumnScratch(int64_t width) : stride((width + kGroup<A> + 15) / 16 * 16), memory(ROWS * stride) {}
  A* operator[](int row) const { return memory + row * stride; }
  int64_t stride;
  Scratch<A> memory;
};

template <typename S, Activation ACTIVATION>
class ForwardColumns {
  using A = Accumulate<S>;

 public:
  static constexpr int64_t kWorthJoining = 6;  // measured

  ForwardColumns(const ForwardArguments& arguments, const Grid& grid, const Parallel& parallel)
      : a_(arguments),
        grid_(grid),
        limits_(limits_of_all<A>(arguments)),
        plan_(grid.plan(2, sizeof(S), parallel)),
        past_cache_(goes_past_cache(parallel, arguments.layout, sizeof(S))),
        means_(grid.channels * plan_.splits),
        m2s_(grid.channels * plan_.splits),
        coefficients_(grid.channels),
        written_(grid.channels) {
    for (int64_t channel = 0; channel < grid.channels; ++channel) {
      written_[channel] = predicted_unclipped(a_, channel, limits_);
      coefficients_[channel] = a_.given            ? given_coefficients<A>(a_, channel)
                               : written_[channel] ? predicted_coefficients<A>(a_, channel)
                                                   : Coefficients<A>{};
    }
  }

  const Plan& plan() const { return plan_; }
  bool given() const { return a_.given; }

  bool needs_second(int64_t unit) const {
    bool all = true;
    for (int64_t channel = unit * plan_.channels; channel < end_of(unit); ++channel) all = all && written_[channel];
    return !all;
  }

  void first(int64_t unit, int64_t split) {
    const int64_t first = split * plan_.per_split, end = least(first + plan_.per_split, plan_.items);
    const int64_t width = grid_.width(unit), begin = unit * plan_.channels, count = end_of(unit) - begin;
    const ColumnScratch<A, 6> columns(width);
    find_origins(unit, first, end, columns);
    zero(columns[kS1], width);
    zero(columns[kS2], width);
    const Scratch<bool> writes(width / kGroup<A> + 1);
    const PlaneBits bits(grid_, unit);
    if (mark_groups(unit, true, writes)) expand_coefficients(unit, columns);
    for_rows(grid_, unit, first, end, kRowsOfSums, [&](int64_t row, int64_t rows, int64_t row_width) {
      pass<true>(unit, row, rows, row_width, columns, bits, writes);
    });
    grid_.collapse(unit, columns[kS1]);
    grid_.collapse(unit, columns[kS2]);
    const double values = static_cast<double>(grid_.values(first, end));
    for (int64_t i = 0; i < count; ++i) {
      const A origin = columns[kOrigin][grid_.planes ? i * grid_.repeat : i];
      const Moments moments = moments_of(values, origin, columns[kS1][i], columns[kS2][i]);
      means_[split * grid_.channels + begin + i] = moments.mean;
      m2s_[split * grid_.channels + begin + i] = moments.m2;
    }
  }

  void finish(int64_t begin, int64_t end) {
    for (int64_t channel = begin; channel < end; ++channel) {
      Moments moments = {0, 0, 0};
      for (int64_t split = 0; split < plan_.splits; ++split) {
        const int64_t first = split * plan_.per_split, last = least(first + plan_.per_split, plan_.items);
        const int64_t at = split * grid_.channels + channel;
        const Moments more = {static_cast<double>(grid_.values(first, last)), means_[at], m2s_[at]};
        moments = split == 0 ? more : merged(moments, more);
      }
      const Correction<A> correction = finish_channel(a_, channel, moments, limits_);
      coefficients_[channel] = correction.coefficients;
      written_[channel] = written_[channel] && !correction.applies;
    }
  }

  void second(int64_t unit, int64_t split) {
    const int64_t first = split * plan_.per_split, end = least(first + plan_.per_split, plan_.items);
    const int64_t width = grid_.width(unit);
    const ColumnScratch<A, 6> columns(width);
    const Scratch<bool> writes(width / kGroup<A> + 1);
    const PlaneBits bits(grid_, unit);
    mark_groups(unit, false, writes);
    expand_coefficients(unit, columns);
    for_chunks_backwards(first, end, width, [&](int64_t begin_row, int64_t end_row) {
      for_rows(grid_, unit, begin_row, end_row, past_cache_ ? 1 : kRowsWritten,
               [&](int64_t row, int64_t rows, int64_t row_width) {
                 pass<false>(unit, row, rows, row_width, columns, bits, writes);
               });
    });
  }

 private:
  enum { kOrigin, kS1, kS2, kPivot, kScale, kShift };

  int64_t end_of(int64_t unit) const { return least((unit + 1) * plan_.channels, grid_.channels); }

  // The mean of a channel's first values in the split, for every column.
  void find_origins(int64_t unit, int64_t first, int64_t end, const ColumnScratch<A, 6>& columns) const {
    const int64_t width = grid_.width(unit), begin = unit * plan_.channels;
    const int64_t rows = least(end - first, ceil_div(kOriginValues, grid_.repeat));
    zero(columns[kS1], width);
    for_rows(grid_, unit, first, first + rows, kRowsOfSums, [&](int64_t row, int64_t some, int64_t row_width) {
      const auto x = Rows{grid_, unit, row}.template at<const S>(a_.x);
      for_each_group<A>(row_width, [&](auto size, int64_t j, int64_t n) BRN_LAMBDA {
        Group<A> sum = load(Whole{}, columns[kS1] + j, n);
        for (int64_t r = 0; r < some; ++r) sum = sum + load(size, x(r, j), n);
        store(Whole{}, columns[kS1] + j, sum, n);
      });
    });
    const A values = static_cast<A>(grid_.values(first, first + rows));
    grid_.collapse(unit, columns[kS1]);
    grid_.expand(unit, columns[kOrigin], [&](int64_t channel) { return columns[kS1][channel - begin] / values; });
  }

  void expand_coefficients(int64_t unit, const ColumnScratch<A, 6>& columns) const {
    grid_.expand(unit, columns[kPivot], [&](int64_t channel) { return coefficients_[channel].pivot; });
    grid_.expand(unit, columns[kScale], [&](int64_t channel) { return coefficients_[channel].scale; });
    grid_.expand(unit, columns[kShift], [&](int64_t channel) { return coefficients_[channel].shift; });
  }

  // Marks the groups with a channel that is (`predicted`), or is not yet, written rightly. Is there any?
  bool mark_groups(int64_t unit, bool predicted, bool* writes) const {
    const int64_t width = grid_.width(unit), begin = unit * plan_.channels, count = end_of(unit) - begin;
    int64_t marks = 0;
    for (int64_t i = 0; i < count; ++i) marks += written_[begin + i] == predicted;
    if (marks == 0 || marks == count) {
      for (int64_t group = 0; group * kGroup<A> < width; ++group) writes[group] = marks > 0;
      return marks > 0;
    }
    for (int64_t group = 0; group * kGroup<A> < width; ++group) {
      bool marked = false;
      const int64_t end = least(width, (group + 1) * kGroup<A>);
      for (int64_t j = group * kGroup<A>; j < end && !marked; ++j) {
        marked = written_[begin + (grid_.planes ? j / grid_.repeat : j % count)] == predicted;
      }
      writes[group] = marked;
    }
    return true;
  }

  // A few rows: x into the sums of their columns, if GATHER; and y, in the groups marked.
  template <bool GATHER>
  void pass(int64_t unit, int64_t row, int64_t rows, int64_t width, const ColumnScratch<A, 6>& columns,
            const PlaneBits& plane_bits, const bool* writes) const {
    const Rows of = {grid_, unit, row};
    const auto x = of.template at<const S>(a_.x), residual = of.template at<const S>(a_.residual);
    const auto y = of.template at<S>(a_.y);
    const auto bits = plane_bits.of(a_.bits, row);
    for_each_group<A>(width, [&](auto size, int64_t j, int64_t n) BRN_LAMBDA {
      const Group<A> origin = load(Whole{}, columns[kOrigin] + j, n);
      const GroupCoefficients<A> c = {load(Whole{}, columns[kPivot] + j, n), load(Whole{}, columns[kScale] + j, n),
                                      load(Whole{}, columns[kShift] + j, n)};
      Sums<A> sums = no_sums<A>();
      const auto rows_of_group = [&](auto marked, auto extras) BRN_LAMBDA {
        for (int64_t r = 0; r < rows; ++r) {
          prefetch(x(r + rows, j));
          if (decltype(marked)::value && !past_cache_) prefetch<true>(y(r + rows, j));
          const Group<A> values = load(size, x(r, j), n);
          if constexpr (GATHER) gather(size, sums, values, origin, n);
          if constexpr (decltype(marked)::value) {
            write<ACTIVATION, decltype(extras)::value>(size, values, c, residual(r, j), y(r, j), bits(r, j),
                                                       past_cache_, n);
          }
        }
      };
      if (!writes[j / kGroup<A>]) {
        if constexpr (GATHER) rows_of_group(No{}, No{});
      } else if (residual.there() || bits.there()) {
        rows_of_group(Yes{}, Yes{});
      } else {
        rows_of_group(Yes{}, No{});
      }
      if constexpr (GATHER) add(columns[kS1] + j, columns[kS2] + j, sums);
    });
    const int64_t begin = unit * plan_.channels;
    plane_bits.part(a_.bits, row, rows, [&](int64_t i) { return written_[begin + i] == GATHER; });
  }

  const ForwardArguments& a_;
  const Grid grid_;
  const Limits<A> limits_;
  const Plan plan_;
  const bool past_cache_;
  Scratch<double> means_, m2s_;  // (splits, channels)
  Scratch<Coefficients<A>> coefficients_;
  Scratch<bool> written_;
};

template <typename S, Activation ACTIVATION>
class BackwardColumns {
  using A = Accumulate<S>;

 public:
  static constexpr int64_t kWorthJoining = 24;  // measured

  BackwardColumns(const BackwardArguments& arguments, const Grid& grid, const Parallel& parallel)
      : a_(arguments),
        grid_(grid),
        plan_(grid.plan(3, sizeof(S), parallel)),
        past_cache_(goes_past_cache(parallel, arguments.layout, sizeof(S))),
        s1s_(grid.channels * plan_.splits),
        s2s_(grid.channels * plan_.splits),
        coefficients_(grid.channels) {
    for (int64_t channel = 0; channel < grid.channels; ++channel) {
      coefficients_[channel] = backward_coefficients<A>(a_, channel);
    }
  }

  const Plan& plan() const { return plan_; }
  bool given() const { return false; }
  bool needs_second(int64_t) const { return a_.dx.data != nullptr || a_.dresidual.data != nullptr; }

  void first(int64_t unit, int64_t split) {
    const int64_t first = split * plan_.per_split, end = least(first + plan_.per_split, plan_.items);
    const int64_t width = grid_.width(unit), begin = unit * plan_.channels;
    const int64_t count = least(plan_.channels, grid_.channels - begin);
    const ColumnScratch<A, 6> columns(width);
    expand_argument(unit, columns);
    zero(columns[kS1], width);
    zero(columns[kS2], width);
    const PlaneBits bits(grid_, unit);
    for_rows(grid_, unit, first, end, kRowsOfSums, [&](int64_t row, int64_t rows, int64_t row_width) {
      pass<false>(unit, row, rows, row_width, columns, bits);
    });
    grid_.collapse(unit, columns[kS1]);
    grid_.collapse(unit, columns[kS2]);
    for (int64_t i = 0; i < count; ++i) {
      s1s_[split * grid_.channels + begin + i] = columns[kS1][i];
      s2s_[split * grid_.channels + begin + i] = columns[kS2][i];
    }
  }

  void finish(int64_t begin, int64_t end) {
    const double count = static_cast<double>(grid_.values(0, grid_.rows));
    for (int64_t channel = begin; channel < end; ++channel) {
      double s1 = 0, s2 = 0;
      for (int64_t split = 0; split < plan_.splits; ++split) {
        s1 += s1s_[split * grid_.channels + channel];
        s2 += s2s_[split * grid_.channels + channel];
      }
      coefficients_[channel] = finish_backward_channel<A>(a_, channel, count, s1, s2);
    }
  }

  void second(int64_t unit, int64_t split) {
    const int64_t first = split * plan_.per_split, end = least(first + plan_.per_split, plan_.items);
    const ColumnScratch<A, 6> columns(grid_.width(unit));
    expand_argument(unit, columns);
    expand(unit, columns[kOfG], &BackwardCoefficients<A>::dx_of_g);
    expand(unit, columns[kOfX], &BackwardCoefficients<A>::dx_of_x);
    expand(unit, columns[kDxShift], &BackwardCoefficients<A>::dx_shift);
    const PlaneBits bits(grid_, unit);
    for_chunks_backwards(first, end, grid_.width(unit), [&](int64_t begin_row, int64_t end_row) {
      for_rows(
          grid_, unit, begin_row, end_row, past_cache_ ? 1 : kRowsWritten,
          [&](int64_t row, int64_t rows, int64_t row_width) { pass<true>(unit, row, rows, row_width, columns, bits); });
    });
  }

 private:
  enum { kMean, kZScale, kZShift, kS1, kS2, kOfG = kS1, kOfX, kDxShift };

  void expand(int64_t unit, A* columns, A BackwardCoefficients<A>::* member) const {
    grid_.expand(unit, columns, [&](int64_t channel) { return coefficients_[channel].*member; });
  }

  void expand_argument(int64_t unit, const ColumnScratch<A, 6>& columns) const {
    expand(unit, columns[kMean], &BackwardCoefficients<A>::mean);
    expand(unit, columns[kZScale], &BackwardCoefficients<A>::z_scale);
    expand(unit, columns[kZShift], &BackwardCoefficients<A>::z_shift);
  }

  template <bool APPLY>
  void pass(int64_t unit, int64_t row, int64_t rows, int64_t width, const ColumnScratch<A, 6>& columns,
            const PlaneBits& plane_bits) const {
    plane_bits.join(a_.bits, row, rows);
    const bool only_dx = a_.dx.data != nullptr && a_.dresidual.data == nullptr;
    if (a_.residual.data != nullptr || a_.bits != nullptr || (APPLY && !only_dx)) {
      pass<APPLY, true>(unit, row, rows, width, columns, plane_bits);
    } else {
      pass<APPLY, false>(unit, row, rows, width, columns, plane_bits);
    }
  }

  template <bool APPLY, bool EXTRAS>
  void pass(int64_t unit, int64_t row, int64_t rows, int64_t width, const ColumnScratch<A, 6>& columns,
            const PlaneBits& plane_bits) const {
    const Rows of = {grid_, unit, row};
    const auto dy = of.template at<const S>(a_.dy), x = of.template at<const S>(a_.x);
    const auto residual = of.template at<const S>(a_.residual);
    const auto dx = of.template at<S>(a_.dx), dresidual = of.template at<S>(a_.dresidual);
    const auto bits = plane_bits.of(a_.bits, row);
    for_each_group<A>(width, [&](auto size, int64_t j, int64_t n) BRN_LAMBDA {
      const Group<A> mean = load(Whole{}, columns[kMean] + j, n), z_scale = load(Whole{}, columns[kZScale] + j, n);
      const Group<A> z_shift = load(Whole{}, columns[kZShift] + j, n);
      const GroupGradient<A> c = {load(Whole{}, columns[kOfG] + j, n), load(Whole{}, columns[kOfX] + j, n),
                                  load(Whole{}, columns[kDxShift] + j, n)};
      Sums<A> sums = no_sums<A>();
      for (int64_t r = 0; r < rows; ++r) {
        prefetch(dy(r + rows, j));
        prefetch(x(r + rows, j));
        if (APPLY && !EXTRAS && !past_cache_) prefetch<true>(dx(r + rows, j));
        const Upstream<A> up = upstream<ACTIVATION, EXTRAS>(size, dy(r, j), x(r, j), residual(r, j), bits(r, j), mean,
                                                            z_scale, z_shift, n);
        if constexpr (APPLY) {
          write_gradients<EXTRAS>(size, up, c, dx(r, j), dresidual(r, j), past_cache_, n);
        } else {
          gather(size, sums, up, n);
        }
      }
      if constexpr (!APPLY) add(columns[kS1] + j, columns[kS2] + j, sums);
    });
  }

  const BackwardArguments& a_;
  const Grid grid_;
  const Plan plan_;
  const bool past_cache_;
  Scratch<double> s1s_, s2s_;  // (splits, channels)
  Scratch<BackwardCoefficients<A>> coefficients_;
};

}  // namespace
}  // namespace brn
