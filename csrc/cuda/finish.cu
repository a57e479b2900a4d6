// Between the two passes of either direction: one small launch that combines the partial results of all splits of a
// channel, in double and in a fixed order.
#include "../math.h"
#include "launch.cuh"

namespace brn {
namespace {

constexpr int kFinishThreads = 512;
constexpr int kLeastChannels = 4;  // of a block: a sector of 32 bytes

// A block's threads: `channels` side by side, the rest along the splits.
struct FinishShape {
  int channels;
  int64_t blocks;
};

FinishShape finish_shape(const Plan& plan) {
  int channels = kFinishThreads;
  while (channels > kLeastChannels && kFinishThreads / channels < plan.splits) channels /= 2;
  while (channels / 2 >= plan.padded_channels) channels /= 2;
  return {channels, ceil_div(plan.padded_channels, channels)};
}

template <int N>
struct Sums {
  double values[N];
};

// The sums of the block's threads that belong to a channel, for the first `channels` threads.
template <int N>
__device__ __forceinline__ Sums<N> sum_over_splits(Sums<N> own, int channels) {
  __shared__ Sums<N> all[kFinishThreads];
  const int thread = threadIdx.x;
  all[thread] = own;
  __syncthreads();
  for (int distance = kFinishThreads / 2; distance >= channels; distance /= 2) {
    if (thread < distance) {
#pragma unroll
      for (int i = 0; i < N; ++i) own.values[i] += all[thread + distance].values[i];
      all[thread] = own;
    }
    __syncthreads();
  }
  return own;
}

template <typename T>
__device__ __forceinline__ void store_coefficients(const Workspace<T>& workspace, int64_t channel,
                                                   const Coefficients<T>& it) {
  T* coefficients = workspace.coefficients + channel;
  coefficients[0] = it.pivot;
  coefficients[workspace.padded_channels] = it.scale;
  coefficients[2 * workspace.padded_channels] = it.shift;
}

template <typename T>
__global__ void __launch_bounds__(kFinishThreads)
    forward_finish_kernel(const __grid_constant__ ForwardArguments a, const __grid_constant__ Workspace<T> workspace,
                          const int64_t splits, const int block_channels) {
  const int64_t channels = a.layout.channels;
  const int64_t channel = int64_t{blockIdx.x} * block_channels + threadIdx.x % block_channels;
  const bool exists = channel < channels;
  if (a.given) {
    if (static_cast<int>(threadIdx.x) >= block_channels || channel >= workspace.padded_channels) return;
    workspace.flags[channel] = exists;
    if (exists) store_coefficients(workspace, channel, given_coefficients<T>(a, channel));
    return;
  }
  // Sums about the mean of one split: what cancels is bounded, as in the stream kernel.
  double origin = 0;
  Sums<3> sums = {};  // of distances, of squares, of splits whose y is not written
  if (exists) {
    origin = workspace.first[channel];
#pragma unroll 4
    for (int64_t split = threadIdx.x / block_channels; split < splits; split += kFinishThreads / block_channels) {
      const int64_t slot = split * channels + channel;
      const double signed_count = workspace.counts[slot], count = fabs(signed_count);
      const double distance = workspace.first[slot] - origin;
      sums.values[0] += count * distance;
      sums.values[1] += workspace.second[slot] + count * distance * distance;
      sums.values[2] += signed_count < 0 ? 1 : 0;
    }
  }
  sums = sum_over_splits(sums, block_channels);
  if (static_cast<int>(threadIdx.x) >= block_channels || channel >= workspace.padded_channels) return;
  if (!exists) {
    workspace.flags[channel] = 0;
    return;
  }

  const double count = static_cast<double>(a.layout.outer) * (a.layout.channels_last ? 1 : a.layout.inner);
  const Correction<T> it =
      finish_channel(a, channel, moments_of(count, origin, sums.values[0], sums.values[1]), limits_of_all<T>(a));
  store_coefficients(workspace, channel, it.coefficients);
  workspace.flags[channel] = it.applies || sums.values[2] > 0;
}

template <typename T>
__global__ void __launch_bounds__(kFinishThreads)
    backward_finish_kernel(const __grid_constant__ BackwardArguments a, const __grid_constant__ Workspace<T> workspace,
                           const int64_t splits, const int block_channels) {
  const int64_t channels = a.layout.channels;
  const int64_t channel = int64_t{blockIdx.x} * block_channels + threadIdx.x % block_channels;
  Sums<2> sums = {};
  if (channel < channels) {
#pragma unroll 4
    for (int64_t split = threadIdx.x / block_channels; split < splits; split += kFinishThreads / block_channels) {
      sums.values[0] += workspace.first[split * channels + channel];
      sums.values[1] += workspace.second[split * channels + channel];
    }
  }
  sums = sum_over_splits(sums, block_channels);
  if (static_cast<int>(threadIdx.x) >= block_channels || channel >= channels) return;

  const double count = static_cast<double>(a.layout.outer) * (a.layout.channels_last ? 1 : a.layout.inner);
  const BackwardCoefficients<T> it = finish_backward_channel<T>(a, channel, count, sums.values[0], sums.values[1]);
  T* coefficients = workspace.coefficients + channel;
  const int64_t next = workspace.padded_channels;
  coefficients[0] = it.mean;
  coefficients[next] = it.z_scale;
  coefficients[2 * next] = it.z_shift;
  coefficients[3 * next] = it.dx_of_g;
  coefficients[4 * next] = it.dx_of_x;
  coefficients[5 * next] = it.dx_shift;
}

}  // namespace

template <typename T>
cudaError_t launch_forward_finish(const ForwardArguments& a, const Plan& plan, void* memory, cudaStream_t stream) {
  const FinishShape shape = finish_shape(plan);
  return launch(forward_finish_kernel<T>, shape.blocks, kFinishThreads, stream, a,
                workspace_at<T>(memory, plan, a.layout), plan.splits, shape.channels);
}

template <typename T>
cudaError_t launch_backward_finish(const BackwardArguments& a, const Plan& plan, void* memory, cudaStream_t stream) {
  const FinishShape shape = finish_shape(plan);
  return launch(backward_finish_kernel<T>, shape.blocks, kFinishThreads, stream, a,
                workspace_at<T>(memory, plan, a.layout), plan.splits, shape.channels);
}

template <typename T>
cudaError_t load_forward_finish() {
  return load_kernel(forward_finish_kernel<T>);
}

template <typename T>
cudaError_t load_backward_finish() {
  return load_kernel(backward_finish_kernel<T>);
}

template cudaError_t load_forward_finish<float>();
template cudaError_t load_forward_finish<double>();
template cudaError_t load_backward_finish<float>();
template cudaError_t load_backward_finish<double>();
template cudaError_t launch_forward_finish<float>(const ForwardArguments&, const Plan&, void*, cudaStream_t);
template cudaError_t launch_forward_finish<double>(const ForwardArguments&, const Plan&, void*, cudaStream_t);
template cudaError_t launch_backward_finish<float>(const BackwardArguments&, const Plan&, void*, cudaStream_t);
template cudaError_t launch_backward_finish<double>(const BackwardArguments&, const Plan&, void*, cudaStream_t);

}  // namespace brn
