// CUDA's runtime as far as csrc/cuda uses it, and what tests steer it by.
#include "cuda_runtime.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <numeric>

#define BRN_EXPORT extern "C" __attribute__((visibility("default")))

dim3 blockIdx, gridDim;

namespace {

using Hook = cudaError_t (*)(const char* call);
Hook hook = nullptr;
int multiprocessors = 4, current_device = 0;
cudaError_t last_error = cudaSuccess;

}  // namespace

// A null hook takes the one before it away.
BRN_EXPORT void emulation_set_hook(Hook called_before) { hook = called_before; }
BRN_EXPORT void emulation_set_multiprocessors(int count) { multiprocessors = count; }
BRN_EXPORT int emulation_last_error() { return last_error; }

namespace emulation {

cudaError_t before(const char* call) {
  const cudaError_t error = hook == nullptr ? cudaSuccess : hook(call);
  if (error != cudaSuccess) last_error = error;
  return error;
}

cudaError_t run_blocks(const cudaLaunchConfig_t& config, const std::function<void()>& body) {
  if (const cudaError_t error = before("cudaLaunchKernelEx")) return error;
  gridDim = config.gridDim;
  const uint64_t blocks = gridDim.x, first = random() % blocks;
  uint64_t step = 1 + random() % blocks;
  while (std::gcd(step, blocks) != 1) ++step;  // then every block has its turn
  for (uint64_t i = 0; i < blocks; ++i) {
    if (const cudaError_t error = before("block")) return error;
    blockIdx = dim3(static_cast<unsigned>((first + i * step) % blocks));
    run_block(static_cast<int>(config.blockDim.x), body);
  }
  return cudaSuccess;
}

}  // namespace emulation

cudaError_t cudaGetDevice(int* device) {
  *device = current_device;
  return emulation::before("cudaGetDevice");
}

cudaError_t cudaSetDevice(int device) {
  const cudaError_t error = emulation::before("cudaSetDevice");
  if (error == cudaSuccess) current_device = device;
  return error;
}

cudaError_t cudaDeviceGetAttribute(int* value, int, int) {
  *value = multiprocessors;
  return emulation::before("cudaDeviceGetAttribute");
}

cudaError_t cudaDriverGetVersion(int* version) {
  *version = 12080;
  return emulation::before("cudaDriverGetVersion");
}

cudaError_t cudaGetLastError() {
  const cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}

const char* cudaGetErrorString(cudaError_t error) { return error == cudaSuccess ? "no error" : "an emulated error"; }

// Of torch's CUDA part.
AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return AOTI_TORCH_SUCCESS;
}
