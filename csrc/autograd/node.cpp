// The module brn_kernels_autograd: the node of autograd that remembers a forward (autograd.py) and runs its backward
// without interpreting any Python, which in the threads that PyTorch runs backwards in takes a fifth of a small layer's
// time (brn bench host). What a backward meets that is not ordinary (create_graph, a dispatch mode, another memory of
// dy) goes to the one in Python, `gradients` of autograd.py.
//
// PyTorch's stable ABI has no autograd: this library belongs to the versions of PyTorch and Python it was compiled for.
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/jit/frontend/tracer.h>
#include <torch/csrc/utils/object_ptr.h>

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>

#include <array>
#include <optional>
#include <utility>
#include <vector>

namespace brn {
namespace {

using at::Tensor;
using MaybeTensor = std::optional<Tensor>;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr uintptr_t alignment = 16;  // of every address that Triton's kernels were compiled for

// Python's error, taken along: the exception may be rethrown in another thread.
[[noreturn]] void throw_python_error() {
  python_error error;
  error.persist();
  throw error;
}

MaybeTensor optional(const Tensor& tensor) { return tensor.defined() ? MaybeTensor(tensor) : std::nullopt; }

// The operator of csrc/ops.cpp.
struct NativeKernels {
  std::vector<int64_t> layout, strides;  // of dy, x, the residual, dx and dresidual
  int64_t activation, workspace;         // bytes
};

// One launch by Triton's own launcher: run(*head, stream, *middle, *addresses, *tail). The references are kept for
// good.
struct TritonKernel {
  PyObject *is_profiled, *run, *stream_of, *device, *head, *middle, *tail;
};

// A tensor as it must still be when the backward reads it: t.data = ... leaves no trace.
struct Memory {
  std::vector<int64_t> sizes, strides;
  std::optional<at::ScalarType> dtype;  // none: there is no tensor

  explicit Memory(const Tensor& tensor) {
    if (!tensor.defined()) return;
    sizes = tensor.sizes().vec();
    strides = tensor.strides().vec();
    dtype = tensor.scalar_type();
  }

  bool is_of(const Tensor& tensor) const {
    if (!dtype.has_value() || !tensor.defined()) return dtype.has_value() == tensor.defined();
    return tensor.scalar_type() == *dtype && tensor.sizes() == sizes && tensor.strides() == strides;
  }
};

// What follows from shapes, strides and dtypes: node.py makes one for each kind of call, and none is ever freed.
struct Plan {
  PyObject* gradients;               // what does all but the ordinary
  Memory x, residual, weight, bias;  // as the kernels read them; of the residual, if they do
  bool has_residual;                 // whose gradient may be asked for
  bool passes_dy_on;                 // the residual's gradient is dy
  bool needs_dx, needs_dresidual;    // computed by the kernels
  std::optional<NativeKernels> native;
  std::optional<TritonKernel> triton;
};

struct Saved {
  const Tensor &x, &residual, &weight, &bias, &saved, &bits;
};

struct Gradients {
  Tensor dx, dresidual, dweight, dbias;
};

bool lies_as(const Tensor& dy, const Tensor& x) {
  if (dy.sizes() != x.sizes()) return false;
  if (dy.strides() == x.strides()) return true;
  const auto both = [&](at::MemoryFormat format) { return dy.is_contiguous(format) && x.is_contiguous(format); };
  return both(at::MemoryFormat::Contiguous) || (x.dim() == 4 && both(at::MemoryFormat::ChannelsLast)) ||
         (x.dim() == 5 && both(at::MemoryFormat::ChannelsLast3d));
}

// Whether the plan's kernels can be called at once; ops.is_observed says it of a forward.
bool is_ordinary(const Plan& plan, const Tensor& dy, const Saved& kept) {
  return !at::GradMode::is_enabled() && !c10::impl::TorchDispatchModeTLS::any_modes_set() &&
         !torch::jit::tracer::isTracing() &&
         !c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode) &&
         dy.key_set() == kept.saved.key_set() && dy.scalar_type() == kept.x.scalar_type() && plan.x.is_of(kept.x) &&
         plan.residual.is_of(kept.residual) && plan.weight.is_of(kept.weight) && plan.bias.is_of(kept.bias) &&
         lies_as(dy, kept.x);
}

void run(const NativeKernels& kernels, const Tensor& dy, const Saved& kept, const Gradients& found) {
  static const auto backward = c10::Dispatcher::singleton().findSchemaOrThrow("brn_kernels_native::backward", "");
  MaybeTensor workspace;
  if (kernels.workspace > 0) workspace = at::empty({kernels.workspace}, kept.x.options().dtype(at::kByte));
  torch::jit::Stack stack;
  stack.reserve(15);
  torch::jit::push(stack, dy, kept.x, optional(kept.residual), optional(kept.bits), optional(kept.weight),
                   optional(kept.bias), kept.saved, optional(found.dx), optional(found.dresidual), found.dweight,
                   found.dbias, kernels.layout, kernels.strides, kernels.activation, workspace);
  backward.callBoxed(stack);
}

// False, and nothing done, if an address is not aligned, or a profiler must hear of the launch.
bool run(const TritonKernel& kernel, const Tensor& dy, const Saved& kept, const Gradients& found) {
  const std::array<const Tensor*, 10> pointers = {&dy,        &kept.x,         &kept.bits,     &kept.weight,
                                                  &kept.bias, &kept.saved,     &found.dweight, &found.dbias,
                                                  &found.dx,  &found.dresidual};
  std::array<uintptr_t, 10> addresses = {};
  uintptr_t all = 0;
  for (size_t i = 0; i < pointers.size(); ++i) {
    if (pointers[i]->defined()) all |= addresses[i] = reinterpret_cast<uintptr_t>(pointers[i]->data_ptr());
  }
  if (all % alignment != 0) return false;
  const c10::DeviceGuard current(kept.x.device());
  const pybind11::gil_scoped_acquire gil;
  const THPObjectPtr profiled(PyObject_CallNoArgs(kernel.is_profiled));
  if (!profiled) throw_python_error();
  if (profiled.get() != Py_False) return false;
  std::vector<THPObjectPtr> owned;
  std::vector<PyObject*> arguments;
  const auto borrow = [&](PyObject* tuple) {
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(tuple); ++i) arguments.push_back(PyTuple_GET_ITEM(tuple, i));
  };
  const auto own = [&](PyObject* object) {
    if (object == nullptr) throw_python_error();
    owned.emplace_back(object);
    arguments.push_back(object);
  };
  owned.reserve(pointers.size() + 1);
  arguments.reserve(64);
  borrow(kernel.head);
  own(PyObject_CallOneArg(kernel.stream_of, kernel.device));
  borrow(kernel.middle);
  for (size_t i = 0; i < pointers.size(); ++i) {
    if (pointers[i]->defined()) {
      own(PyLong_FromUnsignedLongLong(addresses[i]));
    } else {
      arguments.push_back(Py_None);
    }
  }
  borrow(kernel.tail);
  const THPObjectPtr nothing(PyObject_Vectorcall(kernel.run, arguments.data(), arguments.size(), nullptr));
  if (!nothing) throw_python_error();
  return true;
}

}  // namespace

// Its name is what users see of a node.
struct BatchRenormBackward : torch::autograd::Function<BatchRenormBackward> {
  static constexpr bool is_traceable = true;  // by compiled autograd: its tensors are not ordinary

  struct Done {
    const Plan* plan;
    const Tensor &y, &saved, &bits;
  };

  static Tensor forward(AutogradContext* context, const Tensor& x, const MaybeTensor& residual,
                        const MaybeTensor& weight, const MaybeTensor& bias, const Done& done) {
    context->set_materialize_grads(false);
    context->saved_data["plan"] = reinterpret_cast<int64_t>(done.plan);
    context->save_for_backward({x, done.plan->residual.dtype ? *residual : Tensor(), weight.value_or(Tensor()),
                                bias.value_or(Tensor()), done.saved, done.bits});
    return done.y;
  }

  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    variable_list found(5);  // one for each argument of forward
    const Tensor& dy = gradients[0];
    if (!dy.defined()) return found;
    const Plan& plan = *reinterpret_cast<const Plan*>(context->saved_data["plan"].toInt());
    const variable_list tensors = context->get_saved_variables();
    const Saved kept = {tensors[0], tensors[1], tensors[2], tensors[3], tensors[4], tensors[5]};
    size_t edge = 0;
    const auto needed = [&](bool present) { return present && context->needs_input_grad(edge++); };
    const bool x = needed(true), residual = needed(plan.has_residual), weight = needed(kept.weight.defined()),
               bias = needed(kept.bias.defined());
    const bool dresidual = residual && !plan.passes_dy_on;
    if (x == plan.needs_dx && dresidual == plan.needs_dresidual && is_ordinary(plan, dy, kept)) {
      Gradients computed;
      if (launched(plan, dy, kept, computed)) {
        found[0] = computed.dx;  // autograd brings each into the dtype of its tensor
        if (residual) found[1] = plan.passes_dy_on ? dy : computed.dresidual;
        if (weight) found[2] = computed.dweight;
        if (bias) found[3] = computed.dbias;
        return found;
      }
    }
    by_python(plan, dy, tensors, {x, residual, weight, bias}, found);
    return found;
  }

 private:
  static bool launched(const Plan& plan, const Tensor& dy, const Saved& kept, Gradients& found) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    if (plan.needs_dx) found.dx = at::empty_like(kept.x);
    if (plan.needs_dresidual) found.dresidual = at::empty_like(kept.x);
    found.dweight = at::empty({kept.saved.size(1)}, kept.saved.options());
    found.dbias = at::empty({kept.saved.size(1)}, kept.saved.options());
    if (plan.triton) return run(*plan.triton, dy, kept, found);
    run(*plan.native, dy, kept, found);
    return true;
  }

  static void by_python(const Plan& plan, const Tensor& dy, const variable_list& tensors,
                        const std::array<bool, 4>& needs, variable_list& found) {
    const pybind11::gil_scoped_acquire gil;
    THPObjectPtr arguments(PyTuple_New(3)), kept(PyTuple_New(6)), wanted(PyTuple_New(4));
    if (!arguments || !kept || !wanted) throw_python_error();
    for (size_t i = 0; i < tensors.size(); ++i) PyTuple_SET_ITEM(kept.get(), i, THPVariable_Wrap(tensors[i]));
    for (size_t i = 0; i < needs.size(); ++i) PyTuple_SET_ITEM(wanted.get(), i, PyBool_FromLong(needs[i]));
    PyTuple_SET_ITEM(arguments.get(), 0, THPVariable_Wrap(dy));
    PyTuple_SET_ITEM(arguments.get(), 1, Py_NewRef(kept.get()));
    PyTuple_SET_ITEM(arguments.get(), 2, Py_NewRef(wanted.get()));
    THPObjectPtr results(PyObject_CallObject(plan.gradients, arguments.get()));
    if (!results) throw_python_error();
    for (size_t i = 0; i < needs.size(); ++i) {
      PyObject* gradient = PyTuple_GetItem(results.get(), static_cast<Py_ssize_t>(i));
      if (gradient == nullptr) throw_python_error();
      if (gradient != Py_None) found[i] = THPVariable_Unpack(gradient);
    }
  }
};

namespace {

std::vector<int64_t> numbers(PyObject* tuple) {
  std::vector<int64_t> found;
  for (Py_ssize_t i = 0; i < PyTuple_Size(tuple); ++i) found.push_back(PyLong_AsLongLong(PyTuple_GetItem(tuple, i)));
  if (PyErr_Occurred()) throw_python_error();
  return found;
}

const Tensor& tensor_of(PyObject* object) {
  static const Tensor* const nothing = new Tensor();
  if (object == Py_None) return *nothing;
  TORCH_CHECK_TYPE(THPVariable_Check(object), "expected a tensor or None");
  return THPVariable_Unpack(object);
}

// new_plan(gradients, x, residual, weight, bias, saves_residual, passes_dy_on, needs_dx, needs_dresidual, kernels) ->
// int: of calls like that one; kernels are those of a backend's `backward_kernels`.
PyObject* new_plan(PyObject*, PyObject* arguments) {
  HANDLE_TH_ERRORS
  int saves_residual = 0, passes_dy_on = 0, needs_dx = 0, needs_dresidual = 0;
  PyObject *gradients = nullptr, *x = nullptr, *residual = nullptr, *weight = nullptr, *bias = nullptr,
           *kernels = nullptr;
  if (!PyArg_ParseTuple(arguments, "OOOOOppppO!", &gradients, &x, &residual, &weight, &bias, &saves_residual,
                        &passes_dy_on, &needs_dx, &needs_dresidual, &PyTuple_Type, &kernels)) {
    return nullptr;
  }
  Plan plan = {gradients,
               Memory(tensor_of(x)),
               Memory(saves_residual != 0 ? tensor_of(residual) : Tensor()),
               Memory(tensor_of(weight)),
               Memory(tensor_of(bias)),
               residual != Py_None,
               passes_dy_on != 0,
               needs_dx != 0,
               needs_dresidual != 0,
               std::nullopt,
               std::nullopt};
  if (PyTuple_GET_SIZE(kernels) == 4) {
    PyObject *layout = nullptr, *strides = nullptr;
    long long activation = 0, workspace = 0;
    if (!PyArg_ParseTuple(kernels, "O!O!LL", &PyTuple_Type, &layout, &PyTuple_Type, &strides, &activation,
                          &workspace)) {
      return nullptr;
    }
    plan.native = NativeKernels{numbers(layout), numbers(strides), activation, workspace};
  } else {
    TritonKernel kernel = {};
    if (!PyArg_ParseTuple(kernels, "OOOOO!O!O!", &kernel.is_profiled, &kernel.run, &kernel.stream_of, &kernel.device,
                          &PyTuple_Type, &kernel.head, &PyTuple_Type, &kernel.middle, &PyTuple_Type, &kernel.tail)) {
      return nullptr;
    }
    plan.triton = kernel;
    Py_INCREF(kernels);
  }
  Py_INCREF(gradients);
  return PyLong_FromLongLong(reinterpret_cast<int64_t>(new Plan(std::move(plan))));
  END_HANDLE_TH_ERRORS
}

// remember(plan, y, x, residual, weight, bias, saved, bits) -> y, with the node behind it.
PyObject* remember(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 8, "expected 8 arguments");
  const auto* plan = reinterpret_cast<const Plan*>(PyLong_AsLongLong(arguments[0]));
  if (PyErr_Occurred()) return nullptr;
  const Tensor &y = tensor_of(arguments[1]), &x = tensor_of(arguments[2]), &saved = tensor_of(arguments[6]);
  const MaybeTensor residual = optional(tensor_of(arguments[3])), weight = optional(tensor_of(arguments[4])),
                    bias = optional(tensor_of(arguments[5]));
  TORCH_CHECK(residual.has_value() == plan->has_residual, "the plan is another call's");
  return THPVariable_Wrap(BatchRenormBackward::apply(
      x, residual, weight, bias, BatchRenormBackward::Done{plan, y, saved, tensor_of(arguments[7])}));
  END_HANDLE_TH_ERRORS
}

PyMethodDef methods[] = {
    {"new_plan", new_plan, METH_VARARGS, nullptr},
    {"remember", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(remember)), METH_FASTCALL, nullptr},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "brn_kernels_autograd", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace
}  // namespace brn

PyMODINIT_FUNC PyInit_brn_kernels_autograd() { return PyModule_Create(&brn::definition); }
