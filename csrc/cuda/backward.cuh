// The backward's passes. `reduce_kernel` reads dy and x for the two sums of each channel; finish.cu turns them into the
// gradients of weight and bias and into dx's coefficients; `apply_kernel` reads dy and x again, from the end towards
// the beginning so that its first reads hit the L2 cache, and writes dx and dresidual.
#pragma once

#include "activation.cuh"
#include "block_sums.cuh"
#include "launch.cuh"

namespace brn {
namespace {

// What a thread has read of a place.
template <typename E, int VEC>
struct Read {
  Place place;
  Packed<E, VEC> dy, x, residual;
  unsigned bits;  // from the place's own on
};

template <Activation A, typename E, int VEC, int UNROLL, typename W>
__device__ __forceinline__ void read_round(const BackwardArguments& a, W& walk, Read<E, VEC> (&reads)[UNROLL]) {
#pragma unroll
  for (int u = 0; u < UNROLL; ++u) {
    Read<E, VEC>& read = reads[u];
    read = {walk.next(), {}, {}, {}, 0};
    if (read.place.exists) {
      read.dy = load_packed<E, VEC>(a.dy.data, walk.offset(a.dy, read.place));
      read.x = load_packed<E, VEC>(a.x.data, walk.offset(a.x, read.place));
    }
  }
  if (A == Activation::relu && a.bits != nullptr) {
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
      const Place& place = reads[u].place;
      if (place.exists) reads[u].bits = a.bits[walk.bits_byte(place)] >> (place.column % kGroup);
    }
  } else if (A != Activation::none && a.residual.data != nullptr) {
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
      const Place& place = reads[u].place;
      if (place.exists) reads[u].residual = load_packed<E, VEC>(a.residual.data, walk.offset(a.residual, place));
    }
  }
}

// g of element i: dy behind the activation.
template <Activation A, typename E, int VEC, typename T>
__device__ __forceinline__ T gradient(const BackwardArguments& a, const Read<E, VEC>& read, int i, T centered,
                                      T z_scale, T z_shift) {
  const T dy = value_of(read.dy[i]);
  if (A == Activation::none) return dy;
  if (A == Activation::relu && a.bits != nullptr) return (read.bits >> i & 1) != 0 ? dy : 0;
  T z = fma(centered, z_scale, z_shift);
  if (a.residual.data != nullptr) z += value_of(read.residual[i]);
  return activation_backward<A>(dy, z);
}

template <typename E, int VEC, bool CHANNELS_LAST, Activation A>
__global__ void __launch_bounds__(kThreads, kResident)
    reduce_kernel(const __grid_constant__ BackwardArguments a, const __grid_constant__ Geometry geometry,
                  const __grid_constant__ Workspace<Arithmetic<E>> workspace) {
  using T = Arithmetic<E>;
  constexpr int kUnroll = kLoadsAtOnce<E, VEC> / 2, kChannels = CHANNELS_LAST ? VEC : 1;
  __shared__ SumBuffer<T> buffers[2];
  __shared__ BackwardCoefficients<T> of_tile[kMaxTileChannels];
  Walk<VEC, CHANNELS_LAST, kUnroll, false> walk(geometry);
  const int thread = threadIdx.x;
  const int64_t own_channel = walk.tile_channel() + thread;

  if (thread < geometry.tile_channels) {
    of_tile[thread] = {};
    if (own_channel < a.layout.channels) of_tile[thread] = backward_coefficients<T>(a, own_channel);
  }
  __syncthreads();
  T mean[kChannels], z_scale[kChannels], z_shift[kChannels];
#pragma unroll
  for (int i = 0; i < kChannels; ++i) {
    const BackwardCoefficients<T>& c = of_tile[walk.lane_channel() + i];
    mean[i] = c.mean, z_scale[i] = c.z_scale, z_shift[i] = c.z_shift;
  }

  T s1[VEC] = {}, s2[VEC] = {};
  for (int64_t round = 0; round < walk.rounds(); ++round) {
    Read<E, VEC> reads[kUnroll];
    read_round<A>(a, walk, reads);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
#pragma unroll
      for (int i = 0; i < VEC; ++i) {
        const int c = CHANNELS_LAST ? i : 0;
        const T centered = value_of(reads[u].x[i]) - mean[c];
        const T g = gradient<A>(a, reads[u], i, centered, z_scale[c], z_shift[c]);
        if (reads[u].place.exists) {
          s1[i] += g;
          s2[i] = fma(g, centered, s2[i]);
        }
      }
    }
  }

  const double total1 = block_sum<VEC, CHANNELS_LAST>(s1, geometry, buffers[0]);
  const double total2 = block_sum<VEC, CHANNELS_LAST>(s2, geometry, buffers[1]);
  if (thread < geometry.tile_channels && own_channel < a.layout.channels) {
    workspace.first[walk.split() * a.layout.channels + own_channel] = total1;
    workspace.second[walk.split() * a.layout.channels + own_channel] = total2;
  }
}

template <typename E, int VEC, bool CHANNELS_LAST, Activation A>
__global__ void __launch_bounds__(kThreads, kResident)
    apply_kernel(const __grid_constant__ BackwardArguments a, const __grid_constant__ Geometry geometry,
                 const __grid_constant__ Workspace<Arithmetic<E>> workspace) {
  using T = Arithmetic<E>;
  constexpr int kUnroll = kLoadsAtOnce<E, VEC> / 2, kChannels = CHANNELS_LAST ? VEC : 1;
  Walk<VEC, CHANNELS_LAST, kUnroll, true> walk(geometry);
  // The members of BackwardCoefficients.
  Vector<T, kChannels> mean = {}, z_scale = {}, z_shift = {}, dx_of_g = {}, dx_of_x = {}, dx_shift = {};
  if (walk.channel() < a.layout.channels) {
    const T* coefficients = workspace.coefficients + walk.channel();
    const int64_t next = workspace.padded_channels;
    mean = load<T, kChannels>(coefficients, 0);
    z_scale = load<T, kChannels>(coefficients, next);
    z_shift = load<T, kChannels>(coefficients, 2 * next);
    dx_of_g = load<T, kChannels>(coefficients, 3 * next);
    dx_of_x = load<T, kChannels>(coefficients, 4 * next);
    dx_shift = load<T, kChannels>(coefficients, 5 * next);
  }

  for (int64_t round = 0; round < walk.rounds(); ++round) {
    Read<E, VEC> reads[kUnroll];
    read_round<A>(a, walk, reads);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      Vector<E, VEC> dx, dresidual;
#pragma unroll
      for (int i = 0; i < VEC; ++i) {
        const int c = CHANNELS_LAST ? i : 0;
        const T centered = value_of(reads[u].x[i]) - mean.elements[c];
        const T g = gradient<A>(a, reads[u], i, centered, z_scale.elements[c], z_shift.elements[c]);
        round_to(dresidual.elements[i], g);
        round_to(dx.elements[i], fma(g, dx_of_g.elements[c], fma(centered, dx_of_x.elements[c], dx_shift.elements[c])));
      }
      const Place& place = reads[u].place;
      if (place.exists && a.dx.data != nullptr) store<E, VEC>(a.dx.data, walk.offset(a.dx, place), dx);
      if (place.exists && a.dresidual.data != nullptr) {
        store<E, VEC>(a.dresidual.data, walk.offset(a.dresidual, place), dresidual);
      }
    }
  }
}

}  // namespace

template <typename E>
cudaError_t launch_backward(const BackwardArguments& a, const Plan& plan, void* memory, cudaStream_t stream) {
  using T = Arithmetic<E>;
  const int vector = vector_for({a.dy, a.x, a.residual, a.dx, a.dresidual}, a.layout, sizeof(E));
  const int64_t blocks = plan.channel_tiles * plan.splits;
  const Workspace<T> workspace = workspace_at<T>(memory, plan, a.layout);
  return with_constants<sizeof(E)>(
      vector, a.layout.channels_last, a.activation, [&](auto vec, auto last, auto activation) {
        constexpr int kVector = decltype(vec)::value;
        constexpr bool kLast = decltype(last)::value;
        constexpr Activation kActivation = decltype(activation)::value;
        static std::atomic<uint64_t> devices{0};
        cudaError_t error = load_once(devices, [] {
          cudaError_t error = load_kernel(reduce_kernel<E, kVector, kLast, kActivation>);
          if (error == cudaSuccess) error = load_backward_finish<T>();
          return error != cudaSuccess ? error : load_kernel(apply_kernel<E, kVector, kLast, kActivation>);
        });
        if (error != cudaSuccess) return error;
        error = launch(reduce_kernel<E, kVector, kLast, kActivation>, blocks, kThreads, stream, a,
                       geometry_of(a.layout, plan, kVector, false), workspace);
        if (error == cudaSuccess) error = launch_backward_finish<T>(a, plan, memory, stream);
        if (error != cudaSuccess || (a.dx.data == nullptr && a.dresidual.data == nullptr)) return error;
        return launch(apply_kernel<E, kVector, kLast, kActivation>, blocks, kThreads, stream, a,
                      geometry_of(a.layout, plan, kVector, true), workspace);
      });
}

}  // namespace brn
