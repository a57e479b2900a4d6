// The module brn_kernels_autograd: ordinary training calls without interpreting any Python (node.py). A call finds its
// plan by its kind; what is not ordinary, or has no plan, is left to Python, which knows everything.
#include "node.h"

#include <ATen/SavedTensorHooks.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/csrc/autograd/forward_grad.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/object_ptr.h>

#include <c10/util/SmallVector.h>
#include <c10/util/hash.h>

#include <array>
#include <bit>
#include <cstring>
#include <string_view>
#include <unordered_map>
#include <utility>

namespace brn {
namespace {

// The arguments of a call in Python, in turn: these tensors, then schedule, momentum, eps and activation.
constexpr std::array<Slot, 10> given = {X,           RESIDUAL, WEIGHT,  BIAS,   RUNNING_MEAN,
                                        RUNNING_VAR, COUNTER,  CLIPPED, LIMITS, AUTO};
constexpr size_t SCHEDULE = given.size(), MOMENTUM = SCHEDULE + 1, EPS = MOMENTUM + 1, ACTIVATION = EPS + 1,
                 ARGUMENTS = ACTIVATION + 1;

struct Call {
  Tensors tensors;
  Settings settings = {};
  int64_t activation = 0;
};

// All that a plan depends on.
using Kind = c10::SmallVector<int64_t, 40>;

struct Hash {
  size_t operator()(const Kind& kind) const {
    size_t found = 0;
    for (const int64_t each : kind) found = c10::hash_combine(found, static_cast<size_t>(each));
    return found;
  }
};

struct Entry {
  std::unique_ptr<const Plan> plan;  // null: none so far
  uint64_t without = 0;              // calls so far that there was none for
};

struct Plans {
  PyObject* observers;  // a list: who wants to know what calls find (observe.py)
  size_t most;
  std::unordered_map<Kind, Entry, Hash> of;
};

// -1: not one of functional.ACTIVATIONS.
int64_t activation_of(PyObject* name) {
  if (name == Py_None) return 0;
  constexpr std::array<const char*, 4> names = {"relu", "leaky_relu", "silu", "hardswish"};
  for (size_t i = 0; i < names.size(); ++i) {
    if (PyUnicode_Check(name) && PyUnicode_CompareWithASCIIString(name, names[i]) == 0) return 1 + static_cast<int>(i);
  }
  return -1;
}

bool is_number(PyObject* object) { return PyFloat_Check(object) || PyLong_Check(object); }

// False if these are not the arguments of a plain call; Python says what is wrong with them, if anything is.
bool unpack(PyObject* const* arguments, Call& call) {
  for (size_t i = 0; i < given.size(); ++i) {
    if (arguments[i] == Py_None) continue;
    if (!THPVariable_CheckExact(arguments[i])) return false;
    call.tensors[given[i]] = THPVariable_Unpack(arguments[i]);
  }
  PyObject *schedule = arguments[SCHEDULE], *momentum = arguments[MOMENTUM], *eps = arguments[EPS];
  call.settings.is_cumulative = momentum == Py_None;
  call.activation = activation_of(arguments[ACTIVATION]);
  if (!PyTuple_Check(schedule) || PyTuple_GET_SIZE(schedule) != 5 || call.activation < 0 || !PyFloat_Check(eps) ||
      !(call.settings.is_cumulative || is_number(momentum))) {
    return false;
  }
  std::array<double, 5> numbers = {};
  for (size_t i = 0; i < numbers.size(); ++i) {
    numbers[i] = PyFloat_AsDouble(PyTuple_GET_ITEM(schedule, static_cast<Py_ssize_t>(i)));
    if (i >= 2 && !(numbers[i] >= 0 && numbers[i] < 0x1p62)) return false;  // these are counts
  }
  call.settings.r_max = numbers[0];
  call.settings.d_max = numbers[1];
  call.settings.hold = static_cast<int64_t>(numbers[2]);
  call.settings.r_ramp = static_cast<int64_t>(numbers[3]);
  call.settings.d_ramp = static_cast<int64_t>(numbers[4]);
  call.settings.momentum = call.settings.is_cumulative ? 0 : PyFloat_AsDouble(momentum);
  call.settings.eps = PyFloat_AS_DOUBLE(eps);
  if (PyErr_Occurred() == nullptr) return true;
  PyErr_Clear();
  return false;
}

bool is_dense(const Tensor& tensor, at::IntArrayRef sizes) { return tensor.sizes() == sizes && tensor.is_contiguous(); }

// Whether the tensors are as kernels read them. Dtypes are part of the kind, and checked when its plan is made.
bool is_plain(const Tensors& of) {
  const Tensor &x = of[X], &residual = of[RESIDUAL], &counter = of[COUNTER], &clipped = of[CLIPPED];
  if (!x.defined() || x.dim() < 2) return false;
  for (const Slot slot : given) {
    const Tensor& tensor = of[slot];
    if (tensor.defined() && (tensor.device() != x.device() || tensor.key_set() != x.key_set())) return false;
  }
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

// functional._is_ordinary, of tensors that are plain.
bool is_ordinary(const Plans& plans) {
  return at::GradMode::is_enabled() && !is_watched() && PyList_GET_SIZE(plans.observers) == 0 &&
         torch::autograd::get_current_graph_task_id() == -1 &&
         torch::autograd::ForwardADLevel::try_get_by_idx(0) == nullptr &&
         !at::SavedTensorDefaultHooks::get_hooks().has_value();
}

Kind kind_of(const Call& call) {
  const Tensor &x = call.tensors[X], &residual = call.tensors[RESIDUAL];
  int64_t eps = 0;
  std::memcpy(&eps, &call.settings.eps, sizeof(eps));
  Kind kind = {x.dim(),
               x.device().index(),
               static_cast<int64_t>(x.key_set().raw_repr()),
               x.requires_grad(),
               call.activation,
               eps,
               call.settings.is_cumulative,
               residual.defined() && residual.requires_grad()};
  kind.append(x.sizes().begin(), x.sizes().end());
  kind.append(x.strides().begin(), x.strides().end());
  if (residual.defined()) kind.append(residual.strides().begin(), residual.strides().end());
  for (const Slot slot : given) {
    kind.push_back(call.tensors[slot].defined() ? static_cast<int64_t>(call.tensors[slot].scalar_type()) : -1);
  }
  if (call.tensors[AUTO].defined()) kind.append(call.tensors[AUTO].sizes().begin(), call.tensors[AUTO].sizes().end());
  return kind;
}

// Undefined, and nothing done, if the kernels cannot be launched on these.
Tensor run(const Plan& plan, Call& call) {
  Tensors& tensors = call.tensors;
  const Tensor& x = tensors[X];
  {
    const at::AutoDispatchBelowADInplaceOrView guard;
    const auto accumulated = x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
    tensors[Y] = at::empty_like(x);
    tensors[SAVED] = at::empty({4, x.size(1)}, x.options().dtype(accumulated));
    if (!plan.bits.empty()) tensors[BITS] = at::empty(plan.bits, x.options().dtype(at::kByte));
    if (!plan.forward->run(tensors, &call.settings)) return {};
  }
  const auto maybe = [&](Slot slot) { return tensors[slot].defined() ? std::optional(tensors[slot]) : std::nullopt; };
  return BatchRenormBackward::apply(x, maybe(RESIDUAL), maybe(WEIGHT), maybe(BIAS),
                                    BatchRenormBackward::Done{&plan, tensors[Y], tensors[SAVED], tensors[BITS]});
}

constexpr const char* capsule_name = "brn_kernels_autograd.Plans";

// new_plans(observers, most) -> plans: of one backend. They are never freed: nodes point to them.
PyObject* new_plans(PyObject*, PyObject* arguments) {
  PyObject* observers = nullptr;
  Py_ssize_t most = 0;
  if (!PyArg_ParseTuple(arguments, "O!n", &PyList_Type, &observers, &most)) return nullptr;
  Py_INCREF(observers);
  return PyCapsule_New(new Plans{observers, static_cast<size_t>(most), {}}, capsule_name, nullptr);
}

// forward(plans, *call) -> y, its statistics updated; or, and nothing done, None: it is Python's; NotImplemented: it is
// Python's, and there is no plan for such calls so far. That is said more and more rarely: preparing one takes time,
// and there may never be any.
PyObject* forward(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 1 + ARGUMENTS, "expected plans and the arguments of a call");
  auto* plans = static_cast<Plans*>(PyCapsule_GetPointer(arguments[0], capsule_name));
  if (plans == nullptr) return nullptr;
  Call call;
  if (!unpack(arguments + 1, call) || !is_plain(call.tensors) || !is_ordinary(*plans)) Py_RETURN_NONE;
  Kind kind = kind_of(call);
  auto found = plans->of.find(kind);
  if (found == plans->of.end()) {
    if (plans->of.size() >= plans->most) Py_RETURN_NONE;
    found = plans->of.emplace(std::move(kind), Entry{}).first;
  }
  const Plan* plan = found->second.plan.get();
  if (plan == nullptr) {
    if (std::has_single_bit(++found->second.without)) Py_RETURN_NOTIMPLEMENTED;
    Py_RETURN_NONE;
  }
  if (plan->unless != Py_None) {
    const THPObjectPtr refused(PyObject_CallNoArgs(plan->unless));
    if (!refused) return nullptr;
    if (refused.get() != Py_False) Py_RETURN_NONE;
  }
  Tensor y;
  {
    const pybind11::gil_scoped_release no_gil;
    y = run(*plan, call);
  }
  if (!y.defined()) Py_RETURN_NONE;
  return THPVariable_Wrap(std::move(y));
  END_HANDLE_TH_ERRORS
}

std::unique_ptr<const Kernels> kernels_of(PyObject* made) {
  const char* whose = nullptr;
  PyObject* of_them = nullptr;
  if (!PyArg_ParseTuple(made, "sO!", &whose, &PyTuple_Type, &of_them)) throw_python_error();
  if (std::string_view(whose) == "native") return native_kernels(of_them);
  TORCH_CHECK_VALUE(std::string_view(whose) == "triton", "kernels of whom? ", whose);
  return triton_kernels(of_them);
}

// prepare(plans, call, made): such calls have a plan from now on; `made` is what node.py makes.
PyObject* prepare(PyObject*, PyObject* arguments) {
  HANDLE_TH_ERRORS
  int saves_residual = 0, passes_dy_on = 0, needs_dresidual = 0;
  PyObject *capsule = nullptr, *of_call = nullptr, *gradients = nullptr, *unless = nullptr, *bits = nullptr,
           *forward = nullptr, *backward = nullptr;
  if (!PyArg_ParseTuple(arguments, "OO!(OOpppO!O!O!)", &capsule, &PyTuple_Type, &of_call, &gradients, &unless,
                        &saves_residual, &passes_dy_on, &needs_dresidual, &PyTuple_Type, &bits, &PyTuple_Type, &forward,
                        &PyTuple_Type, &backward)) {
    return nullptr;
  }
  auto* plans = static_cast<Plans*>(PyCapsule_GetPointer(capsule, capsule_name));
  if (plans == nullptr) return nullptr;
  TORCH_CHECK_TYPE(PyTuple_GET_SIZE(of_call) == ARGUMENTS, "expected the arguments of a call");
  Call call;
  TORCH_CHECK_VALUE(unpack(&PyTuple_GET_ITEM(of_call, 0), call) && is_plain(call.tensors), "not a plain call");
  const Tensors& of = call.tensors;
  auto plan =
      std::make_unique<Plan>(Plan{gradients, unless, at::empty_like(of[X], at::kMeta), Memory(of[X]),
                                  Memory(saves_residual != 0 ? of[RESIDUAL] : Tensor()), Memory(of[WEIGHT]),
                                  Memory(of[BIAS]), of[RESIDUAL].defined(), passes_dy_on != 0, of[X].requires_grad(),
                                  needs_dresidual != 0, integers(bits), kernels_of(forward), kernels_of(backward)});
  Py_INCREF(gradients);
  Py_INCREF(unless);
  Entry& entry = plans->of[kind_of(call)];
  if (entry.plan == nullptr) entry.plan = std::move(plan);  // else nodes point to another thread's, which was faster
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

PyMethodDef methods[] = {
    {"new_plans", new_plans, METH_VARARGS, nullptr},
    {"prepare", prepare, METH_VARARGS, nullptr},
    {"forward", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(forward)), METH_FASTCALL, nullptr},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "brn_kernels_autograd", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace
}  // namespace brn

PyMODINIT_FUNC PyInit_brn_kernels_autograd() { return PyModule_Create(&brn::definition); }
