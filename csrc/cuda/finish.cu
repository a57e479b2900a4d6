// Between the two passes of either direction: one small launch that combines the partial results of all splits of a
// channel, in double and in a fixed order.
#include "launch.cuh"
#include "walk.cuh"

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

struct Pair {
  double first, second;
};

// The sum of the block's pairs that belong to a channel, for the first `channels` threads.
__device__ __forceinline__ Pair sum_over_splits(Pair own, int channels) {
  __shared__ Pair pairs[kFinishThreads];
  const int thread = threadIdx.x;
  pairs[thread] = own;
  __syncthreads();
  for (int distance = kFinishThreads / 2; distance >= channels; distance /= 2) {
    if (thread < distance) {
      own.first += pairs[thread + distance].first;
      own.second += pairs[thread + distance].second;
      pairs[thread] = own;
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
    forward_finish_kernel(const __grid_constant__ ForwardArguments a, const __grid_constant__ Geometry geometry,
                          const __grid_constant__ Workspace<T> workspace, const int block_channels) {
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
  Pair sums = {0, 0};
  if (exists) {
    origin = workspace.first[channel];
#pragma unroll 4
    for (int64_t split = threadIdx.x / block_channels; split < geometry.splits;
         split += kFinishThreads / block_channels) {
      const double count = static_cast<double>(a.layout.channels_last
                                                   ? values_in_split<true>(geometry, split, geometry.units_per_split)
                                                   : values_in_split<false>(geometry, split, geometry.units_per_split));
      const double distance = workspace.first[split * channels + channel] - origin;
      sums.first += count * distance;
      sums.second += workspace.second[split * channels + channel] + count * distance * distance;
    }
  }
  sums = sum_over_splits(sums, block_channels);
  if (static_cast<int>(threadIdx.x) >= block_channels || channel >= workspace.padded_channels) return;
  if (!exists) {
    workspace.flags[channel] = 0;
    return;
  }

  const double count = static_cast<double>(a.layout.outer) * (a.layout.channels_last ? 1 : a.layout.inner);
  const Limits<T> limits = limits_at<T>(a.schedule, a.counter);
  const bool predicted = predicted_unclipped(a, channel, limits);  // before `clipped` is overwritten
  const Correction<T> it = finish_channel(a, channel, moments_of(count, origin, sums.first, sums.second), limits);
  store_coefficients(workspace, channel, it.coefficients);
  workspace.flags[channel] = it.applies || !predicted;
}

template <typename T>
__global__ void __launch_bounds__(kFinishThreads)
    backward_finish_kernel(const __grid_constant__ BackwardArguments a, const __grid_constant__ Workspace<T> workspace,
                           const int64_t splits, const int block_channels) {
  const int64_t channels = a.layout.channels;
  const int64_t channel = int64_t{blockIdx.x} * block_channels + threadIdx.x % block_channels;
  Pair sums = {0, 0};
  if (channel < channels) {
#pragma unroll 4
    for (int64_t split = threadIdx.x / block_channels; split < splits; split += kFinishThreads / block_channels) {
      sums.first += workspace.first[split * channels + channel];
      sums.second += workspace.second[split * channels + channel];
    }
  }
  sums = sum_over_splits(sums, block_channels);
  if (static_cast<int>(threadIdx.x) >= block_channels || channel >= channels) return;

  const double count = static_cast<double>(a.layout.outer) * (a.layout.channels_last ? 1 : a.layout.inner);
  const BackwardCoefficients<T> it = finish_backward_channel<T>(a, channel, count, sums.first, sums.second);
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
                geometry_of(a.layout, plan, 1, false), workspace_at<T>(memory, plan, a.layout), shape.channels);
}

template <typename T>
cudaError_t launch_backward_finish(const BackwardArguments& a, const Plan& plan, void* memory, cudaStream_t stream) {
  const FinishShape shape = finish_shape(plan);
  return launch(backward_finish_kernel<T>, shape.blocks, kFinishThreads, stream, a,
                workspace_at<T>(memory, plan, a.layout), plan.splits, shape.channels);
}

template cudaError_t launch_forward_finish<float>(const ForwardArguments&, const Plan&, void*, cudaStream_t);
template cudaError_t launch_forward_finish<double>(const ForwardArguments&, const Plan&, void*, cudaStream_t);
template cudaError_t launch_backward_finish<float>(const BackwardArguments&, const Plan&, void*, cudaStream_t);
template cudaError_t launch_backward_finish<double>(const BackwardArguments&, const Plan&, void*, cudaStream_t);

}  // namespace brn
