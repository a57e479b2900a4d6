// Rows that cross channels: the channels_last layout, and the contiguous one where planes are small. A unit is a block
// of channels, an item a row, and there is one sum and one coefficient for each column.
#pragma once

#include "grid.h"

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
  ForwardColumns(const ForwardArguments& arguments, const Grid& grid, const Parallel& parallel)
      : a_(arguments),
        grid_(grid),
        limits_(limits_at<A>(arguments.schedule, arguments.counter)),
        plan_(grid.plan(2, sizeof(S), parallel)),
        past_cache_(goes_past_cache(parallel, arguments.layout, sizeof(S))),
        means_(grid.channels * plan_.splits),
        m2s_(grid.channels * plan_.splits),
        coefficients_(grid.channels),
        written_(grid.channels) {
    for (int64_t channel = 0; channel < grid.channels; ++channel) {
      written_[channel] = predicted_unclipped(a_, channel, limits_);
    }
  }

  const Plan& plan() const { return plan_; }

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
    const bool speculates = mark_groups(unit, true, writes);
    if (speculates) {
      const auto predicted = [&](int64_t channel) { return predicted_coefficients<A>(a_, channel); };
      expand_coefficients(unit, predicted, columns);
    }
    const auto gather = [&](int64_t row, int64_t rows, int64_t row_width) {
      gather_rows(unit, row, rows, row_width, columns);
    };
    const auto write = [&](int64_t row, int64_t, int64_t row_width) {
      write_row(unit, row, row_width, columns, writes);
    };
    for_chunks<false>(first, end, width, [&](int64_t begin_row, int64_t end_row) {
      for_rows(grid_, unit, begin_row, end_row, kRowsOfSums, gather);
      if (speculates) for_rows(grid_, unit, begin_row, end_row, 1, write);  // x comes from the cache
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
    mark_groups(unit, false, writes);
    expand_coefficients(unit, [&](int64_t channel) { return coefficients_[channel]; }, columns);
    for_chunks<true>(first, end, width, [&](int64_t begin_row, int64_t end_row) {
      for_rows(grid_, unit, begin_row, end_row, 1,
               [&](int64_t row, int64_t, int64_t row_width) { write_row(unit, row, row_width, columns, writes); });
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
      for_each_group<A>(row_width, [&](auto size, int64_t j, int64_t n) BRN_LAMBDA {
        Group<A> sum = load(Whole{}, columns[kS1] + j, n);
        for (int64_t r = row; r < row + some; ++r)
          sum = sum + load(size, grid_.template at<const S>(a_.x, unit, r) + j, n);
        store(Whole{}, columns[kS1] + j, sum, n);
      });
    });
    const A values = static_cast<A>(grid_.values(first, first + rows));
    grid_.collapse(unit, columns[kS1]);
    grid_.expand(unit, columns[kOrigin], [&](int64_t channel) { return columns[kS1][channel - begin] / values; });
  }

  template <typename Find>
  void expand_coefficients(int64_t unit, Find&& find, const ColumnScratch<A, 6>& columns) const {
    const int64_t begin = unit * plan_.channels, count = end_of(unit) - begin;
    const Scratch<Coefficients<A>> found(count);
    for (int64_t i = 0; i < count; ++i) found[i] = find(begin + i);
    grid_.expand(unit, columns[kPivot], [&](int64_t channel) { return found[channel - begin].pivot; });
    grid_.expand(unit, columns[kScale], [&](int64_t channel) { return found[channel - begin].scale; });
    grid_.expand(unit, columns[kShift], [&](int64_t channel) { return found[channel - begin].shift; });
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

  // x of a few rows into the sums of their columns.
  void gather_rows(int64_t unit, int64_t row, int64_t rows, int64_t width, const ColumnScratch<A, 6>& columns) const {
    const S* x = grid_.template at<const S>(a_.x, unit, row);
    const int64_t x_stride = stride(a_.x);
    for_each_group<A>(width, [&](auto size, int64_t j, int64_t n) BRN_LAMBDA {
      Sums<A> sums = no_sums<A>();
      const Group<A> origin = load(Whole{}, columns[kOrigin] + j, n);
      for (int64_t r = 0; r < rows; ++r) {
        prefetch(x + (r + rows) * x_stride + j);
        gather(size, sums, load(size, x + r * x_stride + j, n), origin, n);
      }
      add(columns[kS1] + j, columns[kS2] + j, sums);
    });
  }

  // y of a row, in the groups marked.
  void write_row(int64_t unit, int64_t row, int64_t width, const ColumnScratch<A, 6>& columns,
                 const bool* writes) const {
    const S* x = grid_.template at<const S>(a_.x, unit, row);
    const S* residual = grid_.template at<const S>(a_.residual, unit, row);
    S* y = grid_.template at<S>(a_.y, unit, row);
    uint8_t* bits = grid_.bits_at(a_.bits, unit, row);
    for_each_group<A>(width, [&](auto size, int64_t j, int64_t n) BRN_LAMBDA {
      if (!writes[j / kGroup<A>]) return;
      const GroupCoefficients<A> c = {load(Whole{}, columns[kPivot] + j, n), load(Whole{}, columns[kScale] + j, n),
                                      load(Whole{}, columns[kShift] + j, n)};
      prefetch(x + stride(a_.x) + j);
      write<ACTIVATION>(size, load(size, x + j, n), c, offset(residual, j), y + j, offset(bits, j / 8), past_cache_, n);
    });
  }

  int64_t stride(const Side& side) const { return grid_.row_stride == 0 ? side.outer_stride : grid_.row_stride; }

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
  bool needs_second(int64_t) const { return a_.dx.data != nullptr || a_.dresidual.data != nullptr; }

  void first(int64_t unit, int64_t split) {
    const int64_t first = split * plan_.per_split, end = least(first + plan_.per_split, plan_.items);
    const int64_t width = grid_.width(unit), begin = unit * plan_.channels;
    const int64_t count = least(plan_.channels, grid_.channels - begin);
    const ColumnScratch<A, 6> columns(width);
    expand_argument(unit, columns);
    zero(columns[kS1], width);
    zero(columns[kS2], width);
    for_chunks<false>(first, end, width, [&](int64_t begin_row, int64_t end_row) {
      for_rows(grid_, unit, begin_row, end_row, kRowsOfSums,
               [&](int64_t row, int64_t rows, int64_t row_width) { pass<false>(unit, row, rows, row_width, columns); });
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
    for_chunks<true>(first, end, grid_.width(unit), [&](int64_t begin_row, int64_t end_row) {
      for_rows(grid_, unit, begin_row, end_row, 1,
               [&](int64_t row, int64_t rows, int64_t row_width) { pass<true>(unit, row, rows, row_width, columns); });
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
  void pass(int64_t unit, int64_t row, int64_t rows, int64_t width, const ColumnScratch<A, 6>& columns) const {
    const S* dy = grid_.template at<const S>(a_.dy, unit, row);
    const S* x = grid_.template at<const S>(a_.x, unit, row);
    const S* residual = grid_.template at<const S>(a_.residual, unit, row);
    S* dx = grid_.template at<S>(a_.dx, unit, row);
    S* dresidual = grid_.template at<S>(a_.dresidual, unit, row);
    const uint8_t* bits = grid_.bits_at(a_.bits, unit, row);
    for_each_group<A>(width, [&](auto size, int64_t j, int64_t n) BRN_LAMBDA {
      const Group<A> mean = load(Whole{}, columns[kMean] + j, n), z_scale = load(Whole{}, columns[kZScale] + j, n);
      const Group<A> z_shift = load(Whole{}, columns[kZShift] + j, n);
      Group<A> of_g, of_x, shift;
      if constexpr (APPLY) {
        of_g = load(Whole{}, columns[kOfG] + j, n);
        of_x = load(Whole{}, columns[kOfX] + j, n);
        shift = load(Whole{}, columns[kDxShift] + j, n);
      }
      Sums<A> sums = no_sums<A>();
      for (int64_t r = 0; r < rows; ++r) {
        prefetch(dy + (r + rows) * stride(a_.dy) + j);
        prefetch(x + (r + rows) * stride(a_.x) + j);
        const Upstream<A> up = upstream<ACTIVATION>(
            size, dy + r * stride(a_.dy) + j, x + r * stride(a_.x) + j,
            residual == nullptr ? nullptr : residual + r * stride(a_.residual) + j,
            bits == nullptr ? nullptr : bits + r * grid_.row_bytes + j / 8, mean, z_scale, z_shift, n);
        if constexpr (APPLY) {
          if (dx != nullptr)
            put(size, dx + r * stride(a_.dx) + j, up.g * of_g + (up.centered * of_x + shift), past_cache_, n);
          if (dresidual != nullptr) put(size, dresidual + r * stride(a_.dresidual) + j, up.g, past_cache_, n);
        } else {
          sums.s1 = sums.s1 + zero_beyond(size, up.g, n);
          sums.s2 = sums.s2 + zero_beyond(size, up.g * up.centered, n);
        }
      }
      if constexpr (!APPLY) add(columns[kS1] + j, columns[kS2] + j, sums);
    });
  }

  int64_t stride(const Side& side) const { return grid_.row_stride == 0 ? side.outer_stride : grid_.row_stride; }

  const BackwardArguments& a_;
  const Grid grid_;
  const Plan plan_;
  const bool past_cache_;
  Scratch<double> s1s_, s2s_;  // (splits, channels)
  Scratch<BackwardCoefficients<A>> coefficients_;
};

}  // namespace
}  // namespace brn
