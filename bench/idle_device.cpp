// A device whose kernels take no time and compute nothing, for PyTorch's "PrivateUse1": what is left of a call is the
// host's time. PyTorch runs its backwards in a thread of their own, as a GPU's. Only what BatchNorm and Batch
// Renormalization call is there.
#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <c10/core/Allocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <array>
#include <cstdlib>
#include <cstring>
#include <optional>
#include <tuple>

namespace {

using at::Tensor;
using MaybeTensor = std::optional<Tensor>;
using Three = std::tuple<Tensor, Tensor, Tensor>;

constexpr auto KIND = c10::DeviceType::PrivateUse1;
constexpr c10::DispatchKeySet KEYS({c10::DispatchKey::PrivateUse1});

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return KIND; }
  c10::Device exchangeDevice(c10::Device) const override { return {KIND, 0}; }
  c10::Device getDevice() const override { return {KIND, 0}; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device device) const override { return c10::Stream(c10::Stream::DEFAULT, device); }
  c10::Stream exchangeStream(c10::Stream stream) const override { return stream; }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
};

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* data = bytes > 0 ? std::malloc(bytes) : nullptr;
    return {data, data, &std::free, {KIND, 0}};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &std::free; }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
};

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
};

Guard guard;
Memory memory;
Hooks hooks;

Tensor empty(at::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
             std::optional<at::Device>, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(size, &memory, KEYS, dtype.value_or(at::kFloat), format);
}

Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride, std::optional<at::ScalarType> dtype,
                     std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(size, stride, &memory, KEYS, dtype.value_or(at::kFloat));
}

Three like_batch_norm(const Tensor& x) {
  return {at::empty_like(x), at::empty({x.size(1)}, x.options()), at::empty({x.size(1)}, x.options())};
}

Three batch_norm(const Tensor& x, const MaybeTensor&, const MaybeTensor&, const MaybeTensor&, const MaybeTensor&, bool,
                 double, double) {
  return like_batch_norm(x);
}

Three batch_norm_backward(const Tensor&, const Tensor& x, const MaybeTensor&, const MaybeTensor&, const MaybeTensor&,
                          const MaybeTensor&, const MaybeTensor&, bool, double, std::array<bool, 3>) {
  return like_batch_norm(x);
}

Tensor& add(Tensor& self, const Tensor&, const at::Scalar&) { return self; }
Tensor& fill(Tensor& self, const at::Scalar&) { return self; }
Tensor& zero(Tensor& self) { return self; }

// The CUDA driver's functions of these names.
int cuLaunchKernel(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*, void**, void**) {
  return 0;
}

int cuStreamIsCapturing(void*, int* status) { return *status = 0; }

int cuCtxGetCurrent(void** context) {
  *context = &memory;
  return 0;
}

// PyTorch's own.
int aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}

TORCH_LIBRARY(brn_idle, m) {
  m.def("cuLaunchKernel", [] { return reinterpret_cast<int64_t>(&cuLaunchKernel); });
  m.def("cuStreamIsCapturing", [] { return reinterpret_cast<int64_t>(&cuStreamIsCapturing); });
  m.def("cuCtxGetCurrent", [] { return reinterpret_cast<int64_t>(&cuCtxGetCurrent); });
  m.def("aoti_torch_get_current_cuda_stream",
        [] { return reinterpret_cast<int64_t>(&aoti_torch_get_current_cuda_stream); });
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("native_batch_norm", &batch_norm);
  m.impl("native_batch_norm_backward", &batch_norm_backward);
  m.impl("add_.Tensor", &add);
  m.impl("fill_.Scalar", &fill);
  m.impl("zero_", &zero);
}

c10::impl::DeviceGuardImplRegistrar registered_guard(KIND, &guard);
const int registered = [] {
  at::RegisterPrivateUse1HooksInterface(&hooks);
  c10::SetAllocator(KIND, &memory);
  return 0;
}();

}  // namespace
