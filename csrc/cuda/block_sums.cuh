// Sums over a block, in an order that is always the same.
#pragma once

#include "walk.cuh"

namespace brn {
namespace {

constexpr int kWarpSize = 32;
constexpr int kSumRows = kThreads / kWarpSize;

template <typename T>
struct SumBuffer {
  T values[kSumRows][kMaxTileChannels];
};

// For thread t < tile_channels: the sum over the block of what belongs to channel t of its tile. Every thread brings
// VEC sums, of neighbouring channels in channels_last, of the one channel otherwise.
template <int VEC, bool CHANNELS_LAST, typename T>
__device__ __forceinline__ double block_sum(const T (&sums)[VEC], const Geometry& geometry, SumBuffer<T>& buffer) {
  const int lanes = CHANNELS_LAST ? 1 << geometry.lanes_log2 : 1;
  constexpr int kKept = CHANNELS_LAST ? VEC : 1;
  T kept[kKept];
  if (CHANNELS_LAST) {
#pragma unroll
    for (int i = 0; i < kKept; ++i) kept[i] = sums[i];
  } else {
    kept[0] = sums[0];
#pragma unroll
    for (int i = 1; i < VEC; ++i) kept[0] += sums[i];
  }
  for (int distance = kWarpSize / 2; distance >= lanes; distance /= 2) {
#pragma unroll
    for (int i = 0; i < kKept; ++i) kept[i] += __shfl_xor_sync(0xffffffff, kept[i], distance);
  }
  // Now each warp holds one row of sums, or each run of `lanes` threads does if that is longer.
  const int lane = threadIdx.x % lanes, run = lanes < kWarpSize ? kWarpSize : lanes;
  if (static_cast<int>(threadIdx.x) % run < lanes) {
#pragma unroll
    for (int i = 0; i < kKept; ++i) buffer.values[threadIdx.x / run][lane * kKept + i] = kept[i];
  }
  __syncthreads();
  double total = 0;
  if (static_cast<int>(threadIdx.x) < geometry.tile_channels) {
    for (int row = 0; row < kThreads / run; ++row) total += buffer.values[row][threadIdx.x];
  }
  return total;
}

}  // namespace
}  // namespace brn
