// Which elements a thread visits, in what order, and where their packed bits lie.
#pragma once

#include "element.cuh"

namespace brn {
namespace {

// What kernels know of a plan. Passed by value.
struct Geometry {
  int64_t channels, inner, row_bytes;  // row_bytes: of packed bits
  int64_t channel_tiles, units, units_per_row, units_per_split, splits;
  int tile_channels;
  int lanes_log2;                   // channels_last: threads side by side in a row, tile_channels / VEC
  int units_per_pass;               // that a block visits at once
  int64_t pass_rows, pass_columns;  // contiguous: the way from one pass to the next, or back
};

// Of a launch that walks backwards if `reverse`.
inline Geometry geometry_of(const Layout& layout, const Plan& plan, int vector, bool reverse) {
  Geometry geometry = {};
  geometry.channels = layout.channels;
  geometry.inner = layout.inner;
  geometry.row_bytes = ceil_div(layout.inner, kGroup);
  geometry.channel_tiles = plan.channel_tiles;
  geometry.units = plan.units;
  geometry.units_per_row = plan.units_per_row;
  geometry.units_per_split = plan.units_per_split;
  geometry.splits = plan.splits;
  geometry.tile_channels = plan.tile_channels;
  if (layout.channels_last) {
    while (vector << geometry.lanes_log2 < plan.tile_channels) ++geometry.lanes_log2;
    geometry.units_per_pass = kThreads >> geometry.lanes_log2;
  } else {
    geometry.units_per_pass = kThreads / (kGroup / vector);
    // Modulo a row, a step back is a step forward and more than that many rows back.
    const int64_t rows = geometry.units_per_pass / plan.units_per_row,
                  units = geometry.units_per_pass % plan.units_per_row;
    geometry.pass_rows = !reverse ? rows : units == 0 ? -rows : -rows - 1;
    geometry.pass_columns = kGroup * (!reverse || units == 0 ? units : plan.units_per_row - units);
  }
  return geometry;
}

// Values of a channel in a row of units [0, unit).
template <bool CHANNELS_LAST>
BRN_INLINE int64_t values_before(const Geometry& geometry, int64_t unit) {
  if (CHANNELS_LAST) return unit;
  return unit / geometry.units_per_row * geometry.inner + unit % geometry.units_per_row * kGroup;
}

// Values of a channel among the first `units` (or all there are) of a split.
template <bool CHANNELS_LAST>
BRN_INLINE int64_t values_in_split(const Geometry& geometry, int64_t split, int64_t units) {
  const int64_t first = split * geometry.units_per_split;
  const int64_t in_split = units < geometry.units_per_split ? units : geometry.units_per_split;
  const int64_t end = in_split < geometry.units - first ? first + in_split : geometry.units;
  return values_before<CHANNELS_LAST>(geometry, end) - values_before<CHANNELS_LAST>(geometry, first);
}

// A vector of the tensor: its row, its column, and whether it exists.
struct Place {
  int64_t row, column;
  bool exists;
};

// A thread's way through the split of its block: UNROLL passes in each of `rounds`.
template <int VEC, bool CHANNELS_LAST, int UNROLL, bool REVERSE>
class Walk {
 public:
  static constexpr int kUnroll = UNROLL;

  __device__ __forceinline__ explicit Walk(const Geometry& geometry) : geometry_(geometry) {
    // Tiles vary fastest: blocks that run at the same time read neighbouring memory.
    const int64_t block = REVERSE ? gridDim.x - 1 - blockIdx.x : blockIdx.x;
    tile_ = block % geometry.channel_tiles;
    split_ = block / geometry.channel_tiles;
    const int64_t first = split_ * geometry.units_per_split, left = geometry.units - first;
    const int64_t units = left < geometry.units_per_split ? left : geometry.units_per_split;
    rounds_ = (units + UNROLL * geometry.units_per_pass - 1) / (UNROLL * geometry.units_per_pass);
    const int64_t start = first + (REVERSE ? rounds_ * UNROLL - 1 : 0) * geometry.units_per_pass;
    end_ = first + units;
    if (CHANNELS_LAST) {
      unit_ = start + (threadIdx.x >> geometry.lanes_log2);
      row_ = 0;  // the unit is the row
      lane_channel_ = (threadIdx.x & ((1 << geometry.lanes_log2) - 1)) * VEC;
      column_ = tile_ * geometry.tile_channels + lane_channel_;
      if (column_ >= geometry.inner) end_ = 0;
    } else {
      constexpr int kLanes = kGroup / VEC;
      unit_ = start + threadIdx.x / kLanes;
      row_ = unit_ / geometry.units_per_row;
      lane_channel_ = 0;
      column_ = unit_ % geometry.units_per_row * kGroup + threadIdx.x % kLanes * VEC;
    }
  }

  __device__ __forceinline__ int64_t tile() const { return tile_; }
  __device__ __forceinline__ int64_t split() const { return split_; }
  __device__ __forceinline__ int64_t rounds() const { return rounds_; }

  // The first channel of the block, the thread's first one within the block, and the same in all of the tensor.
  __device__ __forceinline__ int64_t tile_channel() const { return tile_ * geometry_.tile_channels; }
  __device__ __forceinline__ int lane_channel() const { return lane_channel_; }
  __device__ __forceinline__ int64_t channel() const { return tile_channel() + lane_channel_; }

  __device__ __forceinline__ Place next() {
    const Place place = {CHANNELS_LAST ? unit_ : row_, column_,
                         unit_ < end_ && (CHANNELS_LAST || column_ < geometry_.inner)};
    unit_ += REVERSE ? -geometry_.units_per_pass : geometry_.units_per_pass;
    if (!CHANNELS_LAST) {
      row_ += geometry_.pass_rows;
      column_ += geometry_.pass_columns;
      if (column_ >= geometry_.units_per_row * kGroup) {
        column_ -= geometry_.units_per_row * kGroup;
        ++row_;
      }
    }
    return place;
  }

  // Of the thread's tile in a tensor: the offset of a place.
  __device__ __forceinline__ int64_t offset(const Side& side, const Place& place) const {
    const int64_t in_rows = place.row * side.outer_stride + place.column;
    return CHANNELS_LAST ? in_rows : in_rows + tile_ * side.channel_stride;
  }

  // The byte of a place in the packed bits (layout.py); the place begins at bit column % 8.
  __device__ __forceinline__ int64_t bits_byte(const Place& place) const {
    const int64_t row = CHANNELS_LAST ? place.row : place.row * geometry_.channels + tile_;
    return row * geometry_.row_bytes + place.column / kGroup;
  }

  // The bits of all threads that share a byte, `own` at their places; every thread of the warp takes part.
  __device__ __forceinline__ unsigned gathered_bits(unsigned own, const Place& place) const {
    unsigned byte = own << (place.column % kGroup);
#pragma unroll
    for (int lanes = 1; lanes < kGroup / VEC; lanes *= 2) {
      // With fewer lanes than that in a row, the neighbours belong to another.
      const unsigned others = __shfl_xor_sync(0xffffffff, byte, lanes);
      if (!CHANNELS_LAST || lanes >> geometry_.lanes_log2 == 0) byte |= others;
    }
    return byte;
  }

 private:
  const Geometry& geometry_;
  int64_t tile_, split_, rounds_, end_, unit_, row_, column_;
  int lane_channel_;
};

}  // namespace
}  // namespace brn
