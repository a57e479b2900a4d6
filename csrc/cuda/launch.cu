// The interface of kernels.h: from arguments to the launches of their element type, on their device.
#include "launch.cuh"

#include <atomic>

#include "../kernels.h"
#include "element.cuh"

namespace brn {
namespace {

// Makes a device current, and the one before it again at the end.
class CurrentDevice {
 public:
  explicit CurrentDevice(int device) {
    error_ = cudaGetDevice(&before_);
    if (error_ != cudaSuccess || before_ == device) return;
    error_ = cudaSetDevice(device);
    changed_ = error_ == cudaSuccess;
  }

  ~CurrentDevice() {
    if (changed_) cudaSetDevice(before_);
  }

  CurrentDevice(const CurrentDevice&) = delete;
  CurrentDevice& operator=(const CurrentDevice&) = delete;

  cudaError_t error() const { return error_; }

 private:
  int before_ = 0;
  bool changed_ = false;
  cudaError_t error_;
};

// Asked for once on each device: every plan must come to the same workspace.
int multiprocessors_of(int device) {
  constexpr int kKnownDevices = 64, kUnknown = 64;
  static std::atomic<int> known[kKnownDevices] = {};
  int count = device < kKnownDevices ? known[device].load(std::memory_order_relaxed) : 0;
  if (count > 0) return count;
  if (cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) != cudaSuccess || count < 1) {
    count = kUnknown;
  }
  if (device < kKnownDevices) {
    int before = 0;
    if (!known[device].compare_exchange_strong(before, count, std::memory_order_relaxed)) return before;
  }
  return count;
}

template <typename Arguments>
using Launch = cudaError_t (*)(const Arguments&, const Plan&, void*, cudaStream_t);

template <typename Arguments>
int run(Launch<Arguments> launch, const Arguments& arguments, int device, void* stream, void* workspace) {
  const CurrentDevice current(device);
  if (current.error() != cudaSuccess) return current.error();
  const Plan plan = plan_for(arguments.layout, arguments.dtype, multiprocessors_of(device));
  const cudaError_t error = launch(arguments, plan, workspace, static_cast<cudaStream_t>(stream));
  const cudaError_t last = cudaGetLastError();  // taken off the list even where `error` says the same
  return error != cudaSuccess ? error : last;
}

}  // namespace

int64_t workspace_bytes(const Layout& layout, DType dtype, int device) {
  return plan_for(layout, dtype, multiprocessors_of(device)).bytes;
}

int forward(const ForwardArguments& arguments, int device, void* stream, void* workspace) {
  switch (arguments.dtype) {
    case DType::float32:
      return run(launch_forward<float>, arguments, device, stream, workspace);
    case DType::float64:
      return run(launch_forward<double>, arguments, device, stream, workspace);
    case DType::bfloat16:
      return run(launch_forward<BFloat16>, arguments, device, stream, workspace);
    default:
      return run(launch_forward<Float16>, arguments, device, stream, workspace);
  }
}

int backward(const BackwardArguments& arguments, int device, void* stream, void* workspace) {
  switch (arguments.dtype) {
    case DType::float32:
      return run(launch_backward<float>, arguments, device, stream, workspace);
    case DType::float64:
      return run(launch_backward<double>, arguments, device, stream, workspace);
    case DType::bfloat16:
      return run(launch_backward<BFloat16>, arguments, device, stream, workspace);
    default:
      return run(launch_backward<Float16>, arguments, device, stream, workspace);
  }
}

const char* error_message(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace brn
