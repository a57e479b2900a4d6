// How the memory of a call is seen as rows of columns, each of which belongs to one channel.
#pragma once

#include "elementwise.h"
#include "plan.h"

namespace brn {
namespace {

constexpr int64_t kUnitColumns = 2048;
constexpr int64_t kNarrowRow = 128;        // channels: rows of fewer are joined with their neighbours
constexpr int64_t kNarrowPlane = 64;       // positions: planes of fewer are seen by columns
constexpr int64_t kSplitValues = 4096;     // of a channel: bounds the length of a sum, and its distance from the origin
constexpr int64_t kSplitPlanes = 512;      // likewise, where a row has one plane of each channel
constexpr int64_t kRowsOfSums = 16;        // for each load and store of a column's sums
constexpr int64_t kRowsWritten = 4;        // for each load of a column's coefficients, where nothing is summed
constexpr int64_t kChunkElements = 16384;  // of a backward walk, within which rows go forwards
constexpr int64_t kOriginValues = 32;      // of a channel, for the origin of its sums

struct Grid {
  int64_t channels, unit_channels;
  bool planes;     // a channel's columns are neighbours: row n of the contiguous layout. Otherwise they alternate.
  int64_t repeat;  // columns of a channel in a row: positions of a plane, or positions side by side in channels_last
  int64_t rows, last_row_repeat;  // the last row may be shorter
  int64_t row_stride;             // 0: that of the tensor
  int64_t row_bytes;              // of packed bits, unless
  bool bits_apart;                // there are some, and each plane's begin with a byte of their own (plane_bits.h)

  int64_t width(int64_t unit) const { return least(unit_channels, channels - unit * unit_channels) * repeat; }
  // Values of one channel in rows [first, end).
  int64_t values(int64_t first, int64_t end) const {
    return (end - first) * repeat - (end == rows ? repeat - last_row_repeat : 0);
  }
  int64_t start(int64_t unit) const { return unit * unit_channels * (planes ? repeat : 1); }

  // `value(channel)` for every column of a unit.
  template <typename A, typename Value>
  void expand(int64_t unit, A* columns, Value&& value) const {
    const int64_t first = unit * unit_channels, count = least(unit_channels, channels - first);
    for (int64_t i = 0; i < count; ++i) {
      const A it = value(first + i);
      if (planes) {
        for (int64_t k = 0; k < repeat; ++k) columns[i * repeat + k] = it;
      } else {
        columns[i] = it;
      }
    }
    if (planes) return;
    for (int64_t j = count; j < count * repeat; ++j) columns[j] = columns[j - count];
  }

  // The sums of each channel's columns, in place: columns[i] becomes that of channel i of the unit.
  template <typename A>
  void collapse(int64_t unit, A* columns) const {
    const int64_t count = least(unit_channels, channels - unit * unit_channels);
    if (planes) {
      for (int64_t i = 0; i < count; ++i) {
        Group<A> sum = everywhere<A>(0);
        for_each_group<A>(repeat, [&](auto size, int64_t k, int64_t n) BRN_LAMBDA {
          sum = sum + load(size, static_cast<const A*>(columns) + i * repeat + k, n);
        });
        columns[i] = static_cast<A>(total(sum));
      }
    } else {
      for (int64_t k = 1; k < repeat; ++k) {
        for (int64_t i = 0; i < count; ++i) columns[i] += columns[k * count + i];
      }
    }
  }

  Plan plan(int tensors, int64_t itemsize, const Parallel& parallel) const {
    const int64_t columns = least(unit_channels, channels) * repeat;
    const bool fits_cache = rows * columns * tensors * itemsize <= parallel.cache_bytes;
    const int64_t at_most = planes ? kSplitPlanes : most(kRowsOfSums, kSplitValues / repeat);
    return plan_of(channels, unit_channels, rows, columns, at_most, fits_cache, parallel);
  }
};

// Element (r, j) of the rows of an activation tensor; null where the tensor is absent.
template <typename T>
struct RowPointer {
  T* start;
  int64_t stride;

  bool there() const { return start != nullptr; }
  T* operator()(int64_t r, int64_t j) const { return there() ? start + (r * stride + j) : nullptr; }
};

// The same of packed bits, a byte for eight elements.
template <typename Byte>
struct BitRowPointer {
  Byte* start;
  int64_t stride;

  bool there() const { return start != nullptr; }
  Byte* operator()(int64_t r, int64_t j) const { return there() ? start + (r * stride + j / 8) : nullptr; }
};

// The rows of a unit from `row` on.
struct Rows {
  const Grid& grid;
  int64_t unit, row;

  template <typename T>
  RowPointer<T> at(const Side& side) const {
    const int64_t stride = grid.row_stride == 0 ? side.outer_stride : grid.row_stride;
    if (side.data == nullptr) return {nullptr, 0};
    return {static_cast<T*>(side.data) + row * stride + grid.start(unit), stride};
  }
  template <typename Byte>
  BitRowPointer<Byte> bits(Byte* data) const {
    if (data == nullptr) return {nullptr, 0};
    return {data + row * grid.row_bytes + grid.start(unit) / 8, grid.row_bytes};
  }
};

// Whether rows that grid_of may join lie side by side.
inline __attribute__((always_inline)) bool is_dense(const Layout& layout, const Side& side) {
  if (side.data == nullptr) return true;
  if (layout.channels_last) return side.outer_stride == layout.inner;
  return side.channel_stride == layout.inner;
}

// Whether a call is better seen by columns, and how. `worth`: planes whose bits are no whole bytes are joined from a
// worth-th of as many rows on as a plane has positions: what is done for each column must pay.
inline __attribute__((always_inline)) bool grid_of(const Layout& layout, bool all_dense, bool bits, int64_t worth,
                                                   Grid& grid) {
  const bool narrow = layout.inner < (layout.channels_last ? kNarrowRow : kNarrowPlane);
  const bool whole_bytes = !bits || layout.inner % 8 == 0;
  const bool may_join = whole_bytes || (!layout.channels_last && layout.outer * worth >= layout.inner);
  const bool joins = narrow && all_dense && may_join;
  grid.channels = layout.channels;
  grid.repeat = grid.last_row_repeat = 1;
  grid.rows = layout.outer;
  grid.row_stride = 0;
  grid.row_bytes = (layout.inner + 7) / 8;
  grid.planes = !layout.channels_last;
  grid.bits_apart = grid.planes && !whole_bytes;
  if (grid.planes) {
    if (!joins) return false;
    grid.repeat = grid.last_row_repeat = layout.inner;
    grid.unit_channels = most(1, kUnitColumns / layout.inner);
    grid.row_bytes = layout.channels * layout.inner / 8;
  } else {
    grid.unit_channels = kUnitColumns;
    if (joins && layout.outer > 1) {
      grid.repeat = least(layout.outer, most(1, 4 * kNarrowRow / layout.inner));
      grid.rows = ceil_div(layout.outer, grid.repeat);
      grid.last_row_repeat = layout.outer - (grid.rows - 1) * grid.repeat;
      grid.row_stride = grid.repeat * layout.inner;
      grid.row_bytes = grid.row_stride / 8;
    }
  }
  return true;
}

// Calls step(first_row, end_row) for pieces of [first, end), the last one first. Within a piece rows go forwards all
// the same: that is what prefetching is good at.
template <typename Step>
BRN_INLINE void for_chunks_backwards(int64_t first, int64_t end, int64_t width, Step&& step) {
  const int64_t rows = ceil_div(kChunkElements, width * kRowsOfSums) * kRowsOfSums;
  for (int64_t k = ceil_div(end - first, rows) - 1; k >= 0; --k) {
    step(first + k * rows, least(first + (k + 1) * rows, end));
  }
}

// Calls step(row, rows, width) for [first, end), `at_once` rows at a time. The last row of all comes alone if it is
// shorter.
template <typename Step>
BRN_INLINE void for_rows(const Grid& grid, int64_t unit, int64_t first, int64_t end, int64_t at_once, Step&& step) {
  const int64_t width = grid.width(unit);
  const bool short_row = end == grid.rows && grid.last_row_repeat < grid.repeat;
  const int64_t whole = short_row ? end - 1 : end;
  for (int64_t row = first; row < whole; row += at_once) step(row, least(at_once, whole - row), width);
  if (short_row) step(whole, int64_t{1}, width / grid.repeat * grid.last_row_repeat);
}

}  // namespace
}  // namespace brn
