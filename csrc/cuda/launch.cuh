// From runtime arguments to template arguments, and onto a stream.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <climits>
#include <type_traits>

#include "../arguments.h"
#include "plan.h"

namespace brn {

// The kernels of one element type: one .cu file each, so that they compile side by side.
template <typename E>
cudaError_t launch_forward(const ForwardArguments& arguments, const Plan& plan, void* workspace, cudaStream_t stream);

template <typename E>
cudaError_t launch_backward(const BackwardArguments& arguments, const Plan& plan, void* workspace, cudaStream_t stream);

// finish.cu: from the partial results of all splits to the coefficients of each channel, T float or double.
template <typename T>
cudaError_t launch_forward_finish(const ForwardArguments& arguments, const Plan& plan, void* workspace,
                                  cudaStream_t stream);

template <typename T>
cudaError_t launch_backward_finish(const BackwardArguments& arguments, const Plan& plan, void* workspace,
                                   cudaStream_t stream);

template <typename T>
cudaError_t load_forward_finish();

template <typename T>
cudaError_t load_backward_finish();

namespace {

// Puts a kernel on the current device, which it otherwise is at its first launch. That can fail: no code for this GPU,
// no memory. All of a call are there before the first is launched, lest one fails when statistics have moved.
template <typename Kernel>
cudaError_t load_kernel(Kernel* kernel) {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, kernel);
}

// load() on the current device, unless it has succeeded there before; `devices` remembers, a bit each.
template <typename F>
cudaError_t load_once(std::atomic<uint64_t>& devices, F load) {
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  const uint64_t own = device >= 0 && device < 64 ? uint64_t{1} << device : 0;
  if ((devices.load(std::memory_order_relaxed) & own) != 0) return cudaSuccess;
  error = load();
  if (error == cudaSuccess) devices.fetch_or(own, std::memory_order_relaxed);
  return error;
}

template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), int64_t blocks, int threads, cudaStream_t stream,
                   const Arguments&... arguments) {
  if (blocks > INT_MAX) return cudaErrorInvalidConfiguration;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

template <typename F>
cudaError_t with_activation(Activation activation, F f) {
  switch (activation) {
    case Activation::relu:
      return f(std::integral_constant<Activation, Activation::relu>());
    case Activation::leaky_relu:
      return f(std::integral_constant<Activation, Activation::leaky_relu>());
    case Activation::silu:
      return f(std::integral_constant<Activation, Activation::silu>());
    case Activation::hardswish:
      return f(std::integral_constant<Activation, Activation::hardswish>());
    default:
      return f(std::integral_constant<Activation, Activation::none>());
  }
}

// f(elements in an access, channels_last, activation), as constants.
template <int ITEMSIZE, int VECTOR = widest_vector(ITEMSIZE), typename F>
cudaError_t with_constants(int vector, bool channels_last, Activation activation, F f) {
  if constexpr (VECTOR > 1) {
    constexpr int kNarrower = narrower_vector(VECTOR, ITEMSIZE);
    if (vector != VECTOR) return with_constants<ITEMSIZE, kNarrower>(vector, channels_last, activation, f);
  }
  return with_activation(activation, [&](auto constant) {
    const std::integral_constant<int, VECTOR> elements;
    return channels_last ? f(elements, std::true_type(), constant) : f(elements, std::false_type(), constant);
  });
}

}  // namespace
}  // namespace brn
