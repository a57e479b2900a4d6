// The module brn_kernels_autograd: ordinary training calls without interpreting any Python (node.py). A call finds its
// plan by its kind; what is not ordinary, or has no plan, is left to Python, which knows everything.
#include "call.h"
#include "node.h"
#include "operators.h"

#include <ATen/SavedTensorHooks.h>
#include <ATen/ops/empty_like.h>
#include <torch/csrc/autograd/forward_grad.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/object_ptr.h>

#include <array>
#include <bit>
#include <utility>

namespace brn {
namespace {

// The arguments of a call in Python, in turn: the given tensors, then schedule, momentum, eps and activation.
constexpr size_t SCHEDULE = given.size(), MOMENTUM = SCHEDULE + 1, EPS = MOMENTUM + 1, ACTIVATION = EPS + 1,
                 ARGUMENTS = ACTIVATION + 1;

struct Plans {
  PyObject* observers;  // a list: who wants to know what calls find (observe.py)
  size_t most;
  Kinds<Plan> of;
};

int64_t activation_in(PyObject* name) {
  if (name == Py_None) return 0;
  const char* text = PyUnicode_Check(name) ? PyUnicode_AsUTF8(name) : nullptr;
  if (text != nullptr) return activation_of(text);
  PyErr_Clear();
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
  call.activation = activation_in(arguments[ACTIVATION]);
  if (!PyTuple_Check(schedule) || PyTuple_GET_SIZE(schedule) != 5 || call.activation < 0 || !PyFloat_Check(eps) ||
      !(call.settings.is_cumulative || is_number(momentum))) {
    return false;
  }
  std::array<double, 5> numbers = {};
  for (size_t i = 0; i < numbers.size(); ++i) {
    numbers[i] = PyFloat_AsDouble(PyTuple_GET_ITEM(schedule, static_cast<Py_ssize_t>(i)));
  }
  const bool are_counts = set_schedule(numbers, call.settings);
  call.settings.momentum = call.settings.is_cumulative ? 0 : PyFloat_AsDouble(momentum);
  call.settings.eps = PyFloat_AS_DOUBLE(eps);
  if (PyErr_Occurred() == nullptr) return are_counts;
  PyErr_Clear();
  return false;
}

// functional._is_ordinary, of tensors that are plain.
bool is_ordinary(const Plans& plans) {
  return at::GradMode::is_enabled() && !is_watched() && PyList_GET_SIZE(plans.observers) == 0 &&
         torch::autograd::get_current_graph_task_id() == -1 &&
         torch::autograd::ForwardADLevel::try_get_by_idx(0) == nullptr &&
         !at::SavedTensorDefaultHooks::get_hooks().has_value();
}

Kind kind_of(const Call& call) {
  const Tensor& residual = call.tensors[RESIDUAL];
  Kind kind = kind_of_forward(call);
  kind.push_back(call.tensors[X].requires_grad());
  kind.push_back(residual.defined() && residual.requires_grad());
  kind.push_back(std::bit_cast<int64_t>(call.settings.eps));
  return kind;
}

// Undefined, and nothing done, if the kernels cannot be launched on these.
Tensor run(const Plan& plan, Call& call) {
  Tensors& tensors = call.tensors;
  {
    const at::AutoDispatchBelowADInplaceOrView guard;
    allocate_results(tensors, plan.bits);
    if (!plan.forward->run(tensors, &call.settings)) return {};
  }
  const auto maybe = [&](Slot slot) { return tensors[slot].defined() ? std::optional(tensors[slot]) : std::nullopt; };
  return BatchRenormBackward::apply(tensors[X], maybe(RESIDUAL), maybe(WEIGHT), maybe(BIAS),
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
// Python's, and there is no plan for such calls so far, which may be changed (Kinds).
PyObject* forward(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 1 + ARGUMENTS, "expected plans and the arguments of a call");
  auto* plans = static_cast<Plans*>(PyCapsule_GetPointer(arguments[0], capsule_name));
  if (plans == nullptr) return nullptr;
  Call call;
  if (!unpack(arguments + 1, call) || !is_plain(call.tensors) || !is_ordinary(*plans)) Py_RETURN_NONE;
  const auto [plan, asks] = plans->of.find(kind_of(call), plans->most);
  if (asks) Py_RETURN_NOTIMPLEMENTED;
  if (plan == nullptr || is_pythons_now(plan->unless)) Py_RETURN_NONE;
  Tensor y;
  {
    const pybind11::gil_scoped_release no_gil;
    y = run(*plan, call);
  }
  if (!y.defined()) Py_RETURN_NONE;
  return THPVariable_Wrap(std::move(y));
  END_HANDLE_TH_ERRORS
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
  plans->of.keep(kind_of(call), plan.release());
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

PyMethodDef methods[] = {
    {"new_plans", new_plans, METH_VARARGS, nullptr},
    {"prepare", prepare, METH_VARARGS, nullptr},
    {"forward", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(forward)), METH_FASTCALL, nullptr},
    {"on_new_kinds", on_new_kinds, METH_VARARGS, nullptr},
    {"forget_operators", forget_operators, METH_NOARGS, nullptr},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "brn_kernels_autograd", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace
}  // namespace brn

PyMODINIT_FUNC PyInit_brn_kernels_autograd() { return PyModule_Create(&brn::definition); }
