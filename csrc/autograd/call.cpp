#include "call.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/csrc/utils/object_ptr.h>
#include <torch/csrc/utils/pybind.h>

#include <c10/util/hash.h>

namespace brn {
namespace {

// Whether `is` holds for any of the memory formats of tensors of so many dimensions.
template <typename Is>
bool in_a_format(int64_t dimensions, const Is& is) {
  return is(at::MemoryFormat::Contiguous) || (dimensions == 4 && is(at::MemoryFormat::ChannelsLast)) ||
         (dimensions == 5 && is(at::MemoryFormat::ChannelsLast3d));
}

}  // namespace

int64_t activation_of(std::string_view name) {
  constexpr std::array<std::string_view, 4> names = {"relu", "leaky_relu", "silu", "hardswish"};
  for (size_t i = 0; i < names.size(); ++i) {
    if (name == names[i]) return 1 + static_cast<int64_t>(i);
  }
  return -1;
}

bool set_schedule(const std::array<double, 5>& numbers, Settings& settings) {
  for (size_t i = 2; i < numbers.size(); ++i) {
    if (!(numbers[i] >= 0 && numbers[i] < 0x1p62)) return false;
  }
  settings.r_max = numbers[0];
  settings.d_max = numbers[1];
  settings.hold = static_cast<int64_t>(numbers[2]);
  settings.r_ramp = static_cast<int64_t>(numbers[3]);
  settings.d_ramp = static_cast<int64_t>(numbers[4]);
  return true;
}

bool is_dense(const Tensor& tensor, at::IntArrayRef sizes) { return tensor.sizes() == sizes && tensor.is_contiguous(); }

bool are_alike(const Tensors& of, at::ArrayRef<Slot> slots) {
  const Tensor& x = of[X];
  for (const Slot slot : slots) {
    const Tensor& tensor = of[slot];
    if (tensor.defined() && (tensor.device() != x.device() || tensor.key_set() != x.key_set())) return false;
  }
  return true;
}

bool is_plain(const Tensors& of) {
  const Tensor &x = of[X], &residual = of[RESIDUAL], &counter = of[COUNTER], &clipped = of[CLIPPED];
  if (!x.defined() || x.dim() < 2 || !are_alike(of, given)) return false;
  const int64_t channels = x.size(1);
  for (const Slot slot : {WEIGHT, BIAS, RUNNING_MEAN, RUNNING_VAR, CLIPPED}) {
    if (of[slot].defined() && !is_dense(of[slot], {channels})) return false;
  }
  return of[RUNNING_MEAN].defined() == of[RUNNING_VAR].defined() &&
         (!residual.defined() || (residual.sizes() == x.sizes() && residual.scalar_type() == x.scalar_type())) &&
         (!counter.defined() || (counter.dim() == 0 && counter.scalar_type() == at::kLong)) &&
         (!clipped.defined() || clipped.scalar_type() == at::kBool) &&
         (!of[LIMITS].defined() || is_dense(of[LIMITS], {2})) &&
         (!of[AUTO].defined() || (of[AUTO].dim() == 2 && of[AUTO].is_contiguous()));
}

bool has_a_format(const Tensor& tensor) {
  return in_a_format(tensor.dim(), [&](at::MemoryFormat format) { return tensor.is_contiguous(format); });
}

bool lies_as(const Tensor& dy, const Tensor& y) {
  if (dy.sizes() != y.sizes()) return false;
  if (dy.strides() == y.strides()) return true;
  return in_a_format(y.dim(),
                     [&](at::MemoryFormat format) { return dy.is_contiguous(format) && y.is_contiguous(format); });
}

void allocate_results(Tensors& of, const std::vector<int64_t>& bits) {
  const Tensor& x = of[X];
  of[Y] = at::empty_like(x);
  of[SAVED] = at::empty({4, x.size(1)}, x.options().dtype(statistics_dtype(x)));
  if (!bits.empty()) of[BITS] = at::empty(bits, x.options().dtype(at::kByte));
}

void allocate_gradients(Tensors& of, bool needs_dx, bool needs_dresidual) {
  const Tensor &x = of[X], &saved = of[SAVED];
  const auto channels = {saved.size(1)};
  if (needs_dx) of[DX] = at::empty_like(x);
  if (needs_dresidual) of[DRESIDUAL] = at::empty_like(x);
  of[DWEIGHT] = at::empty(channels, saved.options());
  of[DBIAS] = at::empty(channels, saved.options());
}

size_t Hash::operator()(const Kind& kind) const {
  size_t found = 0;
  for (const int64_t each : kind) found = c10::hash_combine(found, static_cast<size_t>(each));
  return found;
}

bool is_pythons_now(PyObject* unless) {
  if (unless == Py_None) return false;
  const pybind11::gil_scoped_acquire gil;
  const THPObjectPtr refused(PyObject_CallNoArgs(unless));
  if (!refused) throw_python_error();
  return refused.get() != Py_False;
}

void append_dtypes(Kind& kind, const Tensors& of, at::ArrayRef<Slot> slots) {
  for (const Slot slot : slots) {
    kind.push_back(of[slot].defined() ? static_cast<int64_t>(of[slot].scalar_type()) : -1);
  }
}

Kind kind_of_forward(const Call& call) {
  const Tensor &x = call.tensors[X], &residual = call.tensors[RESIDUAL], &automatic = call.tensors[AUTO];
  Kind kind = {x.dim(), x.device().index(), static_cast<int64_t>(x.key_set().raw_repr()), call.activation,
               call.settings.is_cumulative};
  kind.append(x.sizes().begin(), x.sizes().end());
  kind.append(x.strides().begin(), x.strides().end());
  append_dtypes(kind, call.tensors, given);
  if (residual.defined()) kind.append(residual.strides().begin(), residual.strides().end());
  if (automatic.defined()) kind.append(automatic.sizes().begin(), automatic.sizes().end());
  return kind;
}

std::unique_ptr<Kernels> kernels_of(PyObject* made_by) {
  const char* whose = nullptr;
  PyObject* made = nullptr;
  if (!PyArg_ParseTuple(made_by, "sO!", &whose, &PyTuple_Type, &made)) throw_python_error();
  if (std::string_view(whose) == "native") return native_kernels(made);
  TORCH_CHECK_VALUE(std::string_view(whose) == "triton", "kernels of whom? ", whose);
  return triton_kernels(made);
}

}  // namespace brn
