// How a call is cut into blocks, and where in the workspace blocks leave what others read.
//
// The units of a channel tile are divided among `splits` blocks. channels_last: a tile is `tile_channels` neighbouring
// channels, a unit is a row. Contiguous: a tile is one channel, a unit is eight neighbours in a row (a byte of packed
// bits), the last of a row perhaps fewer. Nothing here depends on how wide the accesses are.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../arguments.h"

namespace brn {

constexpr int kThreads = 128;
constexpr int kAccessBytes = 16;
constexpr int kMaxTileChannels = 64;  // rows of 128 bytes in half precision: whole cache lines
constexpr int kGroup = 8;             // neighbours that share a byte of packed bits
constexpr int kAlignment = 64;        // of the parts of the workspace

// Blocks that a multiprocessor holds at once. For sm_90 the compiler makes do with the 128 registers a thread that four
// leave each other; for others, where some kernels for half precision would spill, with the 168 of three. Twelve in all
// is a whole number of waves of three, four or six.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
constexpr int kResident = 4;
#else
constexpr int kResident = 3;
#endif
constexpr int kBlocksPerMultiprocessor = 12;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr int itemsize(DType dtype) { return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2; }

// Loads that a thread issues before it waits for the first, of accesses of so many bytes.
constexpr int loads_at_once(int bytes) { return bytes == kAccessBytes ? 4 : 8; }

// Elements in an access: the widest; where rows or pointers are not whole ones of those, 8 bytes of half precision
// (planes of 14 x 14); or a single one.
constexpr int widest_vector(int itemsize) { return kAccessBytes / itemsize; }
constexpr int narrower_vector(int vector, int itemsize) { return itemsize == 2 && vector == 8 ? 4 : 1; }

struct Plan {
  int tile_channels;
  int64_t channel_tiles, units, units_per_row, units_per_split, splits;
  // Of the workspace below.
  int64_t padded_channels, coefficients_offset, flags_offset, bytes;
};

// Channels that share a block: as many as there are, but rather half or a quarter of that than many idle lanes.
inline int tile_channels_for(int64_t channels) {
  int tile = 1;
  while (tile < channels && tile < kMaxTileChannels) tile *= 2;
  if (tile < kMaxTileChannels) return tile;
  int best = tile;
  for (int narrower = tile / 2; narrower >= kMaxTileChannels / 4; narrower /= 2) {
    if (ceil_div(channels, narrower) * narrower * 8 < ceil_div(channels, best) * best * 7) best = narrower;
  }
  return best;
}

inline Plan plan_for(const Layout& layout, DType dtype, int multiprocessors) {
  Plan plan;
  int64_t elements_per_unit;
  if (layout.channels_last) {
    plan.tile_channels = tile_channels_for(layout.channels);
    plan.channel_tiles = ceil_div(layout.channels, plan.tile_channels);
    plan.units_per_row = 1;
    plan.units = layout.outer;
    elements_per_unit = plan.tile_channels;
  } else {
    plan.tile_channels = 1;
    plan.channel_tiles = layout.channels;
    plan.units_per_row = ceil_div(layout.inner, kGroup);
    plan.units = layout.outer * plan.units_per_row;
    elements_per_unit = kGroup;
  }
  // At least one round of loads for every thread of a block.
  int vector = widest_vector(itemsize(dtype));
  while (layout.inner % vector != 0) vector = narrower_vector(vector, itemsize(dtype));
  const int64_t loads = loads_at_once(vector * itemsize(dtype));
  const int64_t least_units = ceil_div(kThreads * loads * vector, elements_per_unit);
  const int64_t wanted = ceil_div(int64_t{multiprocessors} * kBlocksPerMultiprocessor, plan.channel_tiles);
  const int64_t splits = std::min(wanted, ceil_div(plan.units, least_units));
  plan.units_per_split = ceil_div(plan.units, splits);
  plan.splits = ceil_div(plan.units, plan.units_per_split);

  const int64_t coefficient_bytes = dtype == DType::float64 ? 8 : 4;
  plan.padded_channels = ceil_div(layout.channels, kGroup) * kGroup;
  plan.coefficients_offset = ceil_div(3 * plan.splits * layout.channels * 8, kAlignment) * kAlignment;
  plan.flags_offset = plan.coefficients_offset + 6 * plan.padded_channels * coefficient_bytes;
  plan.bytes = plan.flags_offset + plan.padded_channels;
  return plan;
}

// What blocks leave for others.
template <typename T>
struct Workspace {
  double *first, *second;  // (splits, channels): mean and sum of squares about it, or the backward's two sums
  // (splits, channels), forward: how many values they are of; negative where the split has not written their y. Kept,
  // for another stream's call of the same layer may move what that was decided from.
  double* counts;
  T* coefficients;  // (up to 6, padded_channels): a struct's members in their order
  uint8_t* flags;   // (padded_channels): whether y of the channel is to be repaired
  int64_t padded_channels;
};

template <typename T>
Workspace<T> workspace_at(void* memory, const Plan& plan, const Layout& layout) {
  char* bytes = static_cast<char*>(memory);
  double* partials = static_cast<double*>(memory);
  const int64_t of_each = plan.splits * layout.channels;
  return {partials,
          partials + of_each,
          partials + 2 * of_each,
          reinterpret_cast<T*>(bytes + plan.coefficients_offset),
          reinterpret_cast<uint8_t*>(bytes + plan.flags_offset),
          plan.padded_channels};
}

}  // namespace brn
