// The operators torch.ops.brn_kernels_native.forward, .apply and .backward, on PyTorch's stable ABI: from tensors to
// plain arguments. Compiled once for each device. native.py is their only caller: it allocates, and brings every tensor
// into the layout of the call. What is checked here guards memory, not users.
#include "kernels.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <string>
#include <vector>

#ifdef BRN_CUDA
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#endif

// The emulated CUDA part (csrc/emulation) runs on CPUs, beside the real one's operators.
#ifdef BRN_EMULATED
#define BRN_OPERATORS brn_kernels_emulated
#define BRN_DEVICE CPU
#else
#define BRN_OPERATORS brn_kernels_native
#ifdef BRN_CUDA
#define BRN_DEVICE CUDA
#else
#define BRN_DEVICE CPU
#endif
#endif

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

brn::DType dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return brn::DType::float32;
    case ScalarType::Double:
      return brn::DType::float64;
    case ScalarType::BFloat16:
      return brn::DType::bfloat16;
    case ScalarType::Half:
      return brn::DType::float16;
    default:
      STD_TORCH_CHECK(false, "a floating dtype is needed");
  }
}

brn::Layout layout_of(const std::vector<int64_t>& sizes, const Tensor& x) {
  STD_TORCH_CHECK(sizes.size() == 4, "layout: channels_last, outer, channels, inner");
  const brn::Layout layout = {sizes[0] != 0, sizes[1], sizes[2], sizes[3]};
  const int64_t values = layout.outer * (layout.channels_last ? 1 : layout.channels) * layout.inner;
  STD_TORCH_CHECK(values == x.numel() && values > 0, "layout: of another tensor than x");
  return layout;
}

brn::Activation activation_of(int64_t code) {
  STD_TORCH_CHECK(code >= 0 && code <= static_cast<int64_t>(brn::Activation::hardswish), "activation: unknown");
  return static_cast<brn::Activation>(code);
}

uint8_t* bits_of(const MaybeTensor& bits, const brn::Layout& layout) {
  if (!bits.has_value()) return nullptr;
  const int64_t rows = layout.outer * (layout.channels_last ? 1 : layout.channels);
  STD_TORCH_CHECK(bits->scalar_type() == ScalarType::Byte && bits->is_contiguous() &&
                      bits->numel() == rows * ((layout.inner + 7) / 8),
                  "bits: whole bytes for each row");
  return static_cast<uint8_t*>(bits->data_ptr());
}

// Strides 2 * i and 2 * i + 1 are those of activation tensor i.
brn::Side side(const MaybeTensor& tensor, const Tensor& x, const std::vector<int64_t>& strides, size_t i) {
  if (!tensor.has_value()) return {nullptr, 0, 0};
  STD_TORCH_CHECK(tensor->scalar_type() == x.scalar_type() && tensor->numel() == x.numel(), "unlike x");
  return {tensor->data_ptr(), strides.at(2 * i), strides.at(2 * i + 1)};
}

brn::PerChannel per_channel(const MaybeTensor& values, int64_t channels) {
  if (!values.has_value()) return {nullptr, brn::DType::float32};
  STD_TORCH_CHECK(values->numel() == channels && values->is_contiguous(), "one value for each channel");
  return {values->data_ptr(), dtype_of(*values)};
}

brn::PerChannel state_of(const MaybeTensor& auto_state, int64_t channels) {
  STD_TORCH_CHECK(!auto_state.has_value() || auto_state->scalar_type() == ScalarType::Float ||
                      auto_state->scalar_type() == ScalarType::Double,
                  "auto_state: float or double");
  return per_channel(auto_state, brn::kAutomaticRows * channels);
}

template <typename T>
T* data_or_null(const MaybeTensor& tensor) {
  return tensor.has_value() ? static_cast<T*>(tensor->data_ptr()) : nullptr;
}

void check_saved(const Tensor& saved, const Tensor& x, const brn::Layout& layout) {
  const ScalarType expected = x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  STD_TORCH_CHECK(saved.scalar_type() == expected && saved.is_contiguous() && saved.numel() == 4 * layout.channels,
                  "saved: (4, channels) of the statistics' dtype");
}

void* coefficients_of(const Tensor& coefficients, const Tensor& x, const brn::Layout& layout) {
  const ScalarType expected = x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  STD_TORCH_CHECK(coefficients.scalar_type() == expected && coefficients.is_contiguous() &&
                      coefficients.numel() == 3 * layout.channels,
                  "coefficients: (3, channels) of the statistics' dtype");
  return coefficients.data_ptr();
}

#ifdef BRN_CUDA
void check_cuda(int error) { STD_TORCH_CHECK(error == 0, brn::error_message(error)); }

int64_t workspace_bytes(Tensor x, std::vector<int64_t> layout) {
  STD_TORCH_CHECK(layout.size() == 4, "layout: channels_last, outer, channels, inner");
  int64_t bytes = 0;
  const brn::Layout shape = {layout[0] != 0, layout[1], layout[2], layout[3]};
  check_cuda(brn::workspace_bytes(shape, dtype_of(x), x.get_device_index(), &bytes));
  return bytes;
}

template <typename Arguments>
void run(int (*launch)(const Arguments&, int, void*, void*), const Arguments& arguments, const Tensor& x,
         const MaybeTensor& workspace) {
  const int device = x.get_device_index();
  int64_t bytes = 0;
  check_cuda(brn::workspace_bytes(arguments.layout, arguments.dtype, device, &bytes));
  STD_TORCH_CHECK(workspace.has_value() && workspace->scalar_type() == ScalarType::Byte && workspace->is_contiguous() &&
                      workspace->get_device_index() == device && workspace->numel() >= bytes,
                  "workspace: of workspace_bytes bytes");
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(device, &stream) == AOTI_TORCH_SUCCESS, "no current stream");
  check_cuda(launch(arguments, device, stream, workspace->data_ptr()));
}
#else
int64_t workspace_bytes(Tensor, std::vector<int64_t>) { return 0; }

template <typename Arguments>
void run(void (*loops)(const Arguments&), const Arguments& arguments, const Tensor&, const MaybeTensor&) {
  loops(arguments);
}
#endif

void forward(Tensor x, MaybeTensor residual, Tensor y, MaybeTensor bits, MaybeTensor weight, MaybeTensor bias,
             MaybeTensor running_mean, MaybeTensor running_var, MaybeTensor num_batches_tracked, MaybeTensor clipped,
             MaybeTensor limits, MaybeTensor auto_state, Tensor saved, std::vector<int64_t> layout,
             std::vector<int64_t> strides, std::vector<double> schedule, std::optional<double> momentum, double eps,
             int64_t activation, MaybeTensor coefficients, MaybeTensor workspace) {
  const brn::Layout shape = layout_of(layout, x);
  check_saved(saved, x, shape);
  STD_TORCH_CHECK(schedule.size() == 5, "schedule: r_max, d_max, hold, r_ramp, d_ramp");
  for (size_t i = 2; i < schedule.size(); ++i) {
    STD_TORCH_CHECK(schedule[i] >= 0 && schedule[i] < 0x1p62, "schedule: hold, r_ramp and d_ramp count batches");
  }
  STD_TORCH_CHECK(!num_batches_tracked.has_value() || num_batches_tracked->scalar_type() == ScalarType::Long,
                  "num_batches_tracked: int64");
  STD_TORCH_CHECK(!clipped.has_value() || (clipped->scalar_type() == ScalarType::Bool && clipped->is_contiguous() &&
                                           clipped->numel() == shape.channels),
                  "clipped: bool, one for each channel");
  STD_TORCH_CHECK(running_mean.has_value() == running_var.has_value(), "running_mean and running_var: both or neither");
  STD_TORCH_CHECK(momentum.has_value() || num_batches_tracked.has_value() || !running_mean.has_value(),
                  "a cumulative average needs num_batches_tracked");
  brn::ForwardArguments arguments = {};
  arguments.dtype = dtype_of(x);
  arguments.layout = shape;
  arguments.x = side(x, x, strides, 0);
  arguments.residual = side(residual, x, strides, 1);
  arguments.y = side(y, x, strides, 2);
  arguments.bits = bits_of(bits, shape);
  arguments.weight = per_channel(weight, shape.channels);
  arguments.bias = per_channel(bias, shape.channels);
  arguments.running_mean = per_channel(running_mean, shape.channels);
  arguments.running_var = per_channel(running_var, shape.channels);
  arguments.counter = data_or_null<int64_t>(num_batches_tracked);
  arguments.clipped = data_or_null<bool>(clipped);
  arguments.schedule = {state_of(auto_state, shape.channels),
                        per_channel(limits, 2),
                        schedule[0],
                        schedule[1],
                        static_cast<int64_t>(schedule[2]),
                        static_cast<int64_t>(schedule[3]),
                        static_cast<int64_t>(schedule[4])};
  arguments.cumulative = !momentum.has_value();
  arguments.momentum = momentum.value_or(0);
  arguments.eps = eps;
  arguments.activation = activation_of(activation);
  arguments.saved = saved.data_ptr();
  if (coefficients.has_value()) arguments.coefficients = coefficients_of(*coefficients, x, shape);
  run(brn::forward, arguments, x, workspace);
}

// y of coefficients that a forward wrote, with the same bits.
void apply(Tensor x, Tensor y, Tensor coefficients, std::vector<int64_t> layout, std::vector<int64_t> strides,
           int64_t activation, MaybeTensor workspace) {
  brn::ForwardArguments arguments = {};
  arguments.dtype = dtype_of(x);
  arguments.layout = layout_of(layout, x);
  arguments.x = side(x, x, strides, 0);
  arguments.y = side(y, x, strides, 1);
  arguments.activation = activation_of(activation);
  arguments.coefficients = coefficients_of(coefficients, x, arguments.layout);
  arguments.given = true;
  run(brn::forward, arguments, x, workspace);
}

void backward(Tensor dy, Tensor x, MaybeTensor residual, MaybeTensor bits, MaybeTensor weight, MaybeTensor bias,
              Tensor saved, MaybeTensor dx, MaybeTensor dresidual, Tensor dweight, Tensor dbias,
              std::vector<int64_t> layout, std::vector<int64_t> strides, int64_t activation, MaybeTensor workspace) {
  const brn::Layout shape = layout_of(layout, x);
  check_saved(saved, x, shape);
  brn::BackwardArguments arguments;
  arguments.dtype = dtype_of(x);
  arguments.layout = shape;
  arguments.dy = side(dy, x, strides, 0);
  arguments.x = side(x, x, strides, 1);
  arguments.residual = side(residual, x, strides, 2);
  arguments.dx = side(dx, x, strides, 3);
  arguments.dresidual = side(dresidual, x, strides, 4);
  arguments.bits = bits_of(bits, shape);
  arguments.weight = per_channel(weight, shape.channels);
  arguments.bias = per_channel(bias, shape.channels);
  arguments.activation = activation_of(activation);
  arguments.saved = saved.data_ptr();
  for (const Tensor& gradient : {dweight, dbias}) {
    STD_TORCH_CHECK(
        gradient.scalar_type() == saved.scalar_type() && gradient.numel() == shape.channels && gradient.is_contiguous(),
        "dweight, dbias: one for each channel, of the statistics' dtype");
  }
  arguments.dweight = dweight.data_ptr();
  arguments.dbias = dbias.data_ptr();
  run(brn::backward, arguments, x, workspace);
}

}  // namespace

#if !defined(BRN_CUDA) || defined(BRN_EMULATED)

STABLE_TORCH_LIBRARY(BRN_OPERATORS, m) {
  m.def(
      "forward(Tensor x, Tensor? residual, Tensor(a!) y, Tensor(b!)? bits, Tensor? weight, Tensor? bias,"
      " Tensor(c!)? running_mean, Tensor(d!)? running_var, Tensor(e!)? num_batches_tracked, Tensor(f!)? clipped,"
      " Tensor? limits, Tensor(g!)? auto_state, Tensor(h!) saved, int[] layout, int[] strides, float[] schedule,"
      " float? momentum, float eps, int activation, Tensor(i!)? coefficients, Tensor(j!)? workspace) -> ()");
  m.def(
      "apply(Tensor x, Tensor(a!) y, Tensor coefficients, int[] layout, int[] strides, int activation,"
      " Tensor(b!)? workspace) -> ()");
  m.def(
      "backward(Tensor dy, Tensor x, Tensor? residual, Tensor? bits, Tensor? weight, Tensor? bias, Tensor saved,"
      " Tensor(a!)? dx, Tensor(b!)? dresidual, Tensor(c!) dweight, Tensor(d!) dbias, int[] layout, int[] strides,"
      " int activation, Tensor(e!)? workspace) -> ()");
  m.def("workspace_bytes(Tensor x, int[] layout) -> int");
  m.def("instruction_set() -> str");
  m.def("device_error(int device) -> str");
}

#endif

STABLE_TORCH_LIBRARY_IMPL(BRN_OPERATORS, BRN_DEVICE, m) {
  m.impl("forward", TORCH_BOX(&forward));
  m.impl("apply", TORCH_BOX(&apply));
  m.impl("backward", TORCH_BOX(&backward));
  m.impl("workspace_bytes", TORCH_BOX(&workspace_bytes));
}

#ifndef BRN_CUDA

std::string instruction_set() { return brn::instruction_set(); }

STABLE_TORCH_LIBRARY_IMPL(BRN_OPERATORS, CompositeExplicitAutograd, m) {
  m.impl("instruction_set", TORCH_BOX(&instruction_set));
}

#else

std::string version_name(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

// Why no kernel runs on that GPU; empty if they do.
std::string device_error(int64_t device) {
  const int error = brn::try_device(static_cast<int>(device));
  if (error == 0) return "";
  return std::string(brn::error_message(error)) + " (compiled by CUDA " + version_name(brn::compiled_version()) +
         ", the driver is for " + version_name(brn::driver_version()) + ")";
}

STABLE_TORCH_LIBRARY_IMPL(BRN_OPERATORS, CompositeExplicitAutograd, m) {
  m.impl("device_error", TORCH_BOX(&device_error));
}

#endif
