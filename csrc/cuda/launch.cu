// The interface of kernels.h: from arguments to the launches of their element type, on their device.
#include "launch.cuh"

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

template <typename Arguments>
using Launch = cudaError_t (*)(const Arguments&, const Plan&, void*, cudaStream_t);

// The plan of a call. Two calls for one layout come to the same, and so to the same workspace.
cudaError_t plan_on(int device, const Layout& layout, DType dtype, Plan* plan) {
  int multiprocessors = 0;
  const cudaError_t error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess) *plan = plan_for(layout, dtype, multiprocessors);
  return error;
}

// The runtime remembers an error until it is asked: one left behind would be taken for the next call's.
int forgotten(cudaError_t error) {
  const cudaError_t last = cudaGetLastError();
  return error != cudaSuccess ? error : last;
}

template <typename Arguments>
cudaError_t planned(Launch<Arguments> launch, const Arguments& arguments, int device, void* stream, void* workspace) {
  const CurrentDevice current(device);
  if (current.error() != cudaSuccess) return current.error();
  Plan plan;
  const cudaError_t error = plan_on(device, arguments.layout, arguments.dtype, &plan);
  if (error != cudaSuccess) return error;
  return launch(arguments, plan, workspace, static_cast<cudaStream_t>(stream));
}

template <typename Arguments>
int run(Launch<Arguments> launch, const Arguments& arguments, int device, void* stream, void* workspace) {
  return forgotten(planned(launch, arguments, device, stream, workspace));
}

}  // namespace

int workspace_bytes(const Layout& layout, DType dtype, int device, int64_t* bytes) {
  Plan plan;
  const cudaError_t error = plan_on(device, layout, dtype, &plan);
  if (error == cudaSuccess) *bytes = plan.bytes;
  return forgotten(error);
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

int try_device(int device) {
  const CurrentDevice current(device);
  return forgotten(current.error() != cudaSuccess ? current.error() : load_forward_finish<float>());
}

int compiled_version() { return CUDART_VERSION; }

int driver_version() {
  int version = 0;
  return forgotten(cudaDriverGetVersion(&version)) == cudaSuccess ? version : 0;
}

const char* error_message(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace brn
