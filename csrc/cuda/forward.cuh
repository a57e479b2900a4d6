// The forward's passes over x. `stream_kernel` reads x once: it gathers the statistics and, for channels predicted not
// to be clipped, already writes y from the running statistics. finish.cu then tells which channels that was right for;
// `repair_kernel` writes the others, from the end towards the beginning so that its first reads hit the L2 cache.
#pragma once

#include "activation.cuh"
#include "block_sums.cuh"
#include "launch.cuh"

namespace brn {
namespace {

// The one way in which either kernel computes y, so that its bits do not depend on which: explicit fma, one rounding
// each. Every thread of the warp calls it, and those that are to write do.
template <Activation A, typename E, int VEC, bool CHANNELS_LAST, typename W>
__device__ __forceinline__ void write(const ForwardArguments& a, const W& walk, const Place& place, bool writes,
                                      const Packed<E, VEC>& x, const Packed<E, VEC>& residual,
                                      const Coefficients<Arithmetic<E>> (&coefficients)[CHANNELS_LAST ? VEC : 1]) {
  using T = Arithmetic<E>;
  Vector<E, VEC> y;
  unsigned bits = 0;
#pragma unroll
  for (int i = 0; i < VEC; ++i) {
    const Coefficients<T>& c = coefficients[CHANNELS_LAST ? i : 0];
    T z = fma(value_of(x[i]) - c.pivot, c.scale, c.shift);
    if (a.residual.data != nullptr) z += value_of(residual[i]);
    if (A == Activation::relu) bits |= (z <= 0 ? 0u : 1u) << i;
    round_to(y.elements[i], activate<A>(z));
  }
  if (writes) store<E, VEC>(a.y.data, walk.offset(a.y, place), y);
  if (A == Activation::relu && a.bits != nullptr) {
    const unsigned byte = walk.gathered_bits(writes ? bits : 0, place);
    if (writes && place.column % kGroup == 0) a.bits[walk.bits_byte(place)] = static_cast<uint8_t>(byte);
  }
}

// A thread's sums of x over its first round, which it reads again at once: holding it would take many registers.
template <typename E, int VEC, typename W>
__device__ __forceinline__ Vector<Arithmetic<E>, VEC> first_sums(const ForwardArguments& a, W walk) {
  Packed<E, VEC> x[W::kUnroll] = {};
#pragma unroll
  for (int u = 0; u < W::kUnroll; ++u) {
    const Place place = walk.next();
    if (place.exists) x[u] = load_packed<E, VEC>(a.x.data, walk.offset(a.x, place));
  }
  Vector<Arithmetic<E>, VEC> sums = {};
#pragma unroll
  for (int u = 0; u < W::kUnroll; ++u) {
#pragma unroll
    for (int i = 0; i < VEC; ++i) sums.elements[i] += value_of(x[u][i]);
  }
  return sums;
}

template <typename E, int VEC, bool CHANNELS_LAST, Activation A>
__global__ void __launch_bounds__(kThreads, kResident)
    stream_kernel(const __grid_constant__ ForwardArguments a, const __grid_constant__ Geometry geometry,
                  const __grid_constant__ Workspace<Arithmetic<E>> workspace) {
  using T = Arithmetic<E>;
  constexpr int kUnroll = kLoadsAtOnce<E, VEC>, kChannels = CHANNELS_LAST ? VEC : 1;
  __shared__ SumBuffer<T> buffers[2];
  __shared__ T origins[kMaxTileChannels];
  __shared__ Coefficients<T> predictions[kMaxTileChannels];
  __shared__ bool predicted[kMaxTileChannels];
  Walk<VEC, CHANNELS_LAST, kUnroll, false> walk(geometry);
  const int thread = threadIdx.x, lane_channel = walk.lane_channel();
  const int64_t own_channel = walk.tile_channel() + thread;

  if (thread < geometry.tile_channels) {
    predicted[thread] = own_channel >= a.layout.channels || predicted_unclipped(a, own_channel, limits_of_all<T>(a));
    predictions[thread] = {0, 0, 0};
    if (own_channel < a.layout.channels && predicted[thread]) {
      predictions[thread] = predicted_coefficients<T>(a, own_channel);
    }
  }
  __syncthreads();
  // A group is written as a whole or not at all: its bits share a byte, and it is repaired as a whole.
  bool writes = walk.channel() < a.layout.channels;
  for (int i = 0; i < (CHANNELS_LAST ? kGroup : 1); ++i) {
    const int neighbour = lane_channel / kGroup * kGroup + i;
    if (neighbour < geometry.tile_channels) writes = writes && predicted[neighbour];
  }
  const bool speculates = __syncthreads_or(writes);
  Coefficients<T> coefficients[kChannels];
#pragma unroll
  for (int i = 0; i < kChannels; ++i) coefficients[i] = predictions[lane_channel + i];

  // Sums about the mean of the split's first round, `origin`. That mean is of a k-th of the values, so its square
  // distance from the mean of all is at most k variances: what cancels in s2 - s1^2 / count is bounded, however large
  // the mean is.
  const double first_total = block_sum<VEC, CHANNELS_LAST>(first_sums<E, VEC>(a, walk).elements, geometry, buffers[0]);
  if (thread < geometry.tile_channels) {
    const int64_t count = values_in_split<CHANNELS_LAST>(geometry, walk.split(), kUnroll * geometry.units_per_pass);
    origins[thread] = static_cast<T>(first_total / static_cast<double>(count));
  }
  __syncthreads();
  T origin[kChannels], s1[VEC] = {}, s2[VEC] = {};
#pragma unroll
  for (int i = 0; i < kChannels; ++i) origin[i] = origins[lane_channel + i];

  for (int64_t round = 0; round < walk.rounds(); ++round) {
    Place places[kUnroll];
    Packed<E, VEC> x[kUnroll] = {};
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      places[u] = walk.next();
      if (places[u].exists) x[u] = load_packed<E, VEC>(a.x.data, walk.offset(a.x, places[u]));
    }
    // The residual too before anything is stored: the compiler moves no load across a store.
    Packed<E, VEC> residual[kUnroll] = {};
    if (speculates && a.residual.data != nullptr) {
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const Place& place = places[u];
        if (place.exists && writes) residual[u] = load_packed<E, VEC>(a.residual.data, walk.offset(a.residual, place));
      }
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
#pragma unroll
      for (int i = 0; i < VEC; ++i) {
        const T distance = value_of(x[u][i]) - origin[CHANNELS_LAST ? i : 0];
        const T centered = places[u].exists ? distance : 0;
        s1[i] += centered;
        s2[i] = fma(centered, centered, s2[i]);
      }
      if (speculates) {
        write<A, E, VEC, CHANNELS_LAST>(a, walk, places[u], writes && places[u].exists, x[u], residual[u],
                                        coefficients);
      }
    }
  }

  const double total1 = block_sum<VEC, CHANNELS_LAST>(s1, geometry, buffers[0]);
  const double total2 = block_sum<VEC, CHANNELS_LAST>(s2, geometry, buffers[1]);
  if (thread < geometry.tile_channels && own_channel < a.layout.channels) {
    const int64_t count = values_in_split<CHANNELS_LAST>(geometry, walk.split(), geometry.units_per_split);
    const Moments moments = moments_of(static_cast<double>(count), origins[thread], total1, total2);
    const int64_t slot = walk.split() * a.layout.channels + own_channel;
    workspace.first[slot] = moments.mean;
    workspace.second[slot] = moments.m2;
    workspace.counts[slot] = predicted[thread] ? moments.count : -moments.count;
  }
}

template <typename E, int VEC, bool CHANNELS_LAST, Activation A>
__global__ void __launch_bounds__(kThreads, kResident)
    repair_kernel(const __grid_constant__ ForwardArguments a, const __grid_constant__ Geometry geometry,
                  const __grid_constant__ Workspace<Arithmetic<E>> workspace) {
  using T = Arithmetic<E>;
  constexpr int kUnroll = kLoadsAtOnce<E, VEC>, kChannels = CHANNELS_LAST ? VEC : 1;
  // Here nobody reads the counter any more.
  if (blockIdx.x == 0 && threadIdx.x == 0 && a.counter != nullptr) ++*a.counter;

  Walk<VEC, CHANNELS_LAST, kUnroll, true> walk(geometry);
  bool writes = false;
  if (walk.channel() < a.layout.channels) {
    if (CHANNELS_LAST) {
      writes = reinterpret_cast<const uint64_t*>(workspace.flags)[walk.channel() / kGroup] != 0;
    } else {
      writes = workspace.flags[walk.channel()] != 0;
    }
  }
  if (!__syncthreads_or(writes)) return;
  Coefficients<T> coefficients[kChannels] = {};
  if (writes) {
    const Vector<T, kChannels> pivot = load<T, kChannels>(workspace.coefficients, walk.channel());
    const Vector<T, kChannels> scale =
        load<T, kChannels>(workspace.coefficients, workspace.padded_channels + walk.channel());
    const Vector<T, kChannels> shift =
        load<T, kChannels>(workspace.coefficients, 2 * workspace.padded_channels + walk.channel());
#pragma unroll
    for (int i = 0; i < kChannels; ++i) coefficients[i] = {pivot.elements[i], scale.elements[i], shift.elements[i]};
  }

  for (int64_t round = 0; round < walk.rounds(); ++round) {
    Place places[kUnroll];
    Packed<E, VEC> x[kUnroll] = {}, residual[kUnroll] = {};
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      places[u] = walk.next();
      places[u].exists = places[u].exists && writes;
      if (places[u].exists) x[u] = load_packed<E, VEC>(a.x.data, walk.offset(a.x, places[u]));
    }
    if (a.residual.data != nullptr) {
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        if (places[u].exists) residual[u] = load_packed<E, VEC>(a.residual.data, walk.offset(a.residual, places[u]));
      }
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      write<A, E, VEC, CHANNELS_LAST>(a, walk, places[u], places[u].exists, x[u], residual[u], coefficients);
    }
  }
}

}  // namespace

template <typename E>
cudaError_t launch_forward(const ForwardArguments& a, const Plan& plan, void* memory, cudaStream_t stream) {
  using T = Arithmetic<E>;
  const int vector = vector_for({a.x, a.residual, a.y}, a.layout, sizeof(E));
  const int64_t blocks = plan.channel_tiles * plan.splits;
  const Workspace<T> workspace = workspace_at<T>(memory, plan, a.layout);
  return with_constants<sizeof(E)>(
      vector, a.layout.channels_last, a.activation, [&](auto vec, auto last, auto activation) {
        constexpr int kVector = decltype(vec)::value;
        constexpr bool kLast = decltype(last)::value;
        constexpr Activation kActivation = decltype(activation)::value;
        static std::atomic<uint64_t> devices{0};
        cudaError_t error = load_once(devices, [] {
          cudaError_t error = load_kernel(stream_kernel<E, kVector, kLast, kActivation>);
          if (error == cudaSuccess) error = load_forward_finish<T>();
          return error != cudaSuccess ? error : load_kernel(repair_kernel<E, kVector, kLast, kActivation>);
        });
        if (error == cudaSuccess && !a.given) {
          error = launch(stream_kernel<E, kVector, kLast, kActivation>, blocks, kThreads, stream, a,
                         geometry_of(a.layout, plan, kVector, false), workspace);
        }
        if (error == cudaSuccess) error = launch_forward_finish<T>(a, plan, memory, stream);
        if (error != cudaSuccess) return error;
        return launch(repair_kernel<E, kVector, kLast, kActivation>, blocks, kThreads, stream, a,
                      geometry_of(a.layout, plan, kVector, true), workspace);
      });
}

}  // namespace brn
