// What csrc/cuda uses of CUDA, for a C++ compiler: a launch runs its blocks one after the other, in random order, and
// the threads of each as fibers (fibers.h). So tests run the kernels on a machine without a GPU.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>

#include "fibers.h"

#define __global__
#define __device__
#define __host__
#define __shared__ static  // blocks do not run at the same time
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__

using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0, cudaErrorInvalidConfiguration = 9;
#define CUDART_VERSION 13000
constexpr int cudaDevAttrMultiProcessorCount = 16;

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct alignas(8) uint2 {
  unsigned x, y;
};

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

struct cudaFuncAttributes {
  int numRegs;
};

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

// runtime.cpp
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaDeviceGetAttribute(int* value, int attribute, int device);
cudaError_t cudaDriverGetVersion(int* version);
cudaError_t cudaGetLastError();
const char* cudaGetErrorString(cudaError_t error);

namespace emulation {

// Before each call of the runtime, and each block of a launch ("block"): a test may fail it with an error, or change
// memory, as another stream could at that moment.
cudaError_t before(const char* call);

cudaError_t run_blocks(const cudaLaunchConfig_t& config, const std::function<void()>& body);

struct ThreadIndex {
  struct {
    operator unsigned() const { return current_thread(); }
  } x;
};

}  // namespace emulation

extern dim3 blockIdx, gridDim;
constexpr emulation::ThreadIndex threadIdx = {};

inline void __syncthreads() { emulation::barrier(0); }
inline int __syncthreads_or(int predicate) { return emulation::barrier(predicate); }

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes) {
  if (mask != 0xffffffff) abort();
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof value);
  bits = emulation::shuffle_xor(bits, lanes);
  memcpy(&value, &bits, sizeof value);
  return value;
}

// A store as wide as a vector; on a GPU one that is not aligned is a fault.
template <typename T>
void __stcs(T* target, T value) {
  if (reinterpret_cast<uintptr_t>(target) % sizeof(T) != 0) abort();
  *target = value;
}

template <typename Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, Kernel*) {
  *attributes = {};
  return emulation::before("cudaFuncGetAttributes");
}

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               const Arguments&... arguments) {
  return emulation::run_blocks(*config, [&] { kernel(Parameters(arguments)...); });
}
