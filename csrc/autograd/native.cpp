// The operators of csrc/ops.cpp.
#include "kernels.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>

#include <optional>

namespace brn {
namespace {

using MaybeTensor = std::optional<Tensor>;

MaybeTensor optional(const Tensor& tensor) { return tensor.defined() ? MaybeTensor(tensor) : std::nullopt; }

class NativeKernels final : public Kernels {
 public:
  NativeKernels(const char* direction, std::vector<int64_t> layout, std::vector<int64_t> strides, int64_t activation,
                int64_t workspace)
      : operator_(c10::Dispatcher::singleton().findSchemaOrThrow(direction, "")),
        layout_(std::move(layout)),
        strides_(std::move(strides)),
        activation_(activation),
        workspace_(workspace) {}

  bool run(const Tensors& of, const Settings* settings) const override {
    MaybeTensor workspace;
    if (workspace_ > 0) workspace = at::empty({workspace_}, of[X].options().dtype(at::kByte));
    torch::jit::Stack stack;
    stack.reserve(21);
    if (settings != nullptr) {
      const std::vector<double> schedule = {settings->r_max, settings->d_max, static_cast<double>(settings->hold),
                                            static_cast<double>(settings->r_ramp),
                                            static_cast<double>(settings->d_ramp)};
      torch::jit::push(stack, of[X], optional(of[RESIDUAL]), of[Y], optional(of[BITS]), optional(of[WEIGHT]),
                       optional(of[BIAS]), optional(of[RUNNING_MEAN]), optional(of[RUNNING_VAR]), optional(of[COUNTER]),
                       optional(of[CLIPPED]), optional(of[LIMITS]), optional(of[AUTO]), of[SAVED], layout_, strides_,
                       schedule, settings->is_cumulative ? std::nullopt : std::optional<double>(settings->momentum),
                       settings->eps, activation_, MaybeTensor(), workspace);
    } else {
      torch::jit::push(stack, of[DY], of[X], optional(of[RESIDUAL]), optional(of[BITS]), optional(of[WEIGHT]),
                       optional(of[BIAS]), of[SAVED], optional(of[DX]), optional(of[DRESIDUAL]), of[DWEIGHT], of[DBIAS],
                       layout_, strides_, activation_, workspace);
    }
    operator_.callBoxed(stack);
    return true;
  }

 private:
  c10::OperatorHandle operator_;
  std::vector<int64_t> layout_, strides_;
  int64_t activation_, workspace_;  // bytes
};

}  // namespace

std::unique_ptr<Kernels> native_kernels(PyObject* made) {
  const char* direction = nullptr;
  PyObject *layout = nullptr, *strides = nullptr;
  long long activation = 0, workspace = 0;
  if (!PyArg_ParseTuple(made, "sO!O!LL", &direction, &PyTuple_Type, &layout, &PyTuple_Type, &strides, &activation,
                        &workspace)) {
    throw_python_error();
  }
  return std::make_unique<NativeKernels>(direction, integers(layout), integers(strides), activation, workspace);
}

}  // namespace brn
