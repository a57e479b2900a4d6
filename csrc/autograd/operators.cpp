// As in calls.cpp a call finds its plan by its kind, and is Python's where there is none; but Python's lock need not be
// held here.
#include "operators.h"

#include "call.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/object_ptr.h>
#include <torch/library.h>

#include <mutex>
#include <optional>
#include <string>
#include <utility>

namespace brn {
namespace {

using torch::jit::Stack;

// What follows from the kind of a call, of one direction.
struct OperatorPlan {
  PyObject* unless;           // None, or what says whether a call is Python's now; never freed
  std::vector<int64_t> bits;  // sizes of the packed bits that a forward makes and a backward is given, if any
  Tensor y;                   // without memory
  std::unique_ptr<const Kernels> kernels;
};

// The plans of a direction, and what is asked for new ones.
class Plans {
 public:
  // Null if there is none.
  template <typename Arguments>
  const OperatorPlan* of(const Kind& kind, const Arguments& arguments) {
    std::unique_lock<std::mutex> guard(lock_);
    const auto [plan, asks] = kinds_.find(kind, most_);
    if (!asks) return plan;
    PyObject* const prepare = prepare_;
    const uint64_t generation = generation_;
    guard.unlock();  // this takes Python's, whose holder may wait for it
    const OperatorPlan* made = prepared(prepare, arguments);
    guard.lock();
    if (made != nullptr && generation == generation_) kinds_.keep(kind, made);
    return made;
  }

  void ask(PyObject* prepare, size_t most) {
    Py_INCREF(prepare);
    const std::lock_guard<std::mutex> guard(lock_);
    prepare_ = prepare;
    most_ = most;
  }

  void forget() {
    const std::lock_guard<std::mutex> guard(lock_);
    kinds_.forget();
    ++generation_;
  }

 private:
  template <typename Arguments>
  static const OperatorPlan* prepared(PyObject* prepare, const Arguments& arguments) {
    const pybind11::gil_scoped_acquire gil;
    THPObjectPtr given_to_it(arguments());
    if (!given_to_it) throw_python_error();
    THPObjectPtr made(PyObject_CallObject(prepare, given_to_it.get()));
    if (!made) throw_python_error();
    if (made.get() == Py_None) return nullptr;
    PyObject *unless = nullptr, *bits = nullptr, *y = nullptr, *kernels = nullptr;
    if (!PyArg_ParseTuple(made.get(), "OO!OO!", &unless, &PyTuple_Type, &bits, &y, &PyTuple_Type, &kernels)) {
      throw_python_error();
    }
    Py_INCREF(unless);
    return new OperatorPlan{unless, integers(bits), THPVariable_Unpack(y), kernels_of(kernels)};
  }

  std::mutex lock_;
  PyObject* prepare_ = nullptr;
  size_t most_ = 0;  // 0: nobody has said what to ask
  uint64_t generation_ = 0;
  Kinds<OperatorPlan> kinds_;
};

// These are not freed either: calls may end after all else has.
Plans& forwards = *new Plans;
Plans& backwards = *new Plans;

// The arguments of an operator, by their places in its schema (ops.py).
class Given {
 public:
  Given(const Stack& stack, size_t count) : first_(stack.data() + stack.size() - count) {}

  bool has(size_t i) const { return !first_[i].isNone(); }
  const c10::IValue& operator[](size_t i) const { return first_[i]; }
  Tensor tensor(size_t i) const { return has(i) ? first_[i].toTensor() : Tensor(); }
  int64_t activation(size_t i) const { return has(i) ? activation_of(first_[i].toStringView()) : 0; }

 private:
  const c10::IValue* first_;
};

PyObject* text_or_none(const c10::IValue& value) {
  if (value.isNone()) Py_RETURN_NONE;
  const std::string_view text = value.toStringView();
  return PyUnicode_FromStringAndSize(text.data(), static_cast<Py_ssize_t>(text.size()));
}

void append_text(Kind& kind, std::string_view text) { kind.append(text.begin(), text.end()); }

Tensor or_empty(Tensor& tensor, const at::TensorOptions& options) {
  return tensor.defined() ? std::move(tensor) : at::empty({0}, options);
}

namespace of_forward {

enum : size_t {
  SCHEDULE = 10,
  MOMENTUM,
  EPS,
  ACTIVATION,
  BACKEND,
  TRACED,
  PROCESS_GROUP,
  COEFFICIENTS,
  AUTO_STATE,
  COUNT
};
constexpr size_t MASK = 2;
constexpr std::array<size_t, given.size()> places = {0, 1, 3, 4, 5, 6, 7, 8, 9, AUTO_STATE};

// False if it is Python's.
bool unpack(const Given& from, Call& call) {
  if (from.has(MASK) || from.has(PROCESS_GROUP) || from.has(COEFFICIENTS)) return false;
  for (size_t i = 0; i < places.size(); ++i) call.tensors[given[i]] = from.tensor(places[i]);
  // checkpointing within a compiled graph: Python's, which refuses it
  if (from[TRACED].toBool() && call.tensors[RUNNING_MEAN].defined() &&
      torch::autograd::get_current_graph_task_id() != -1) {
    return false;
  }
  const auto schedule = from[SCHEDULE].toDoubleList();
  std::array<double, 5> numbers = {};
  if (schedule.size() != numbers.size()) return false;
  for (size_t i = 0; i < numbers.size(); ++i) numbers[i] = schedule.get(i);
  call.activation = from.activation(ACTIVATION);
  call.settings.is_cumulative = !from.has(MOMENTUM);
  call.settings.momentum = from.has(MOMENTUM) ? from[MOMENTUM].toDouble() : 0;
  call.settings.eps = from[EPS].toDouble();
  return call.activation >= 0 && set_schedule(numbers, call.settings) && is_plain(call.tensors);
}

PyObject* for_python(const Given& from, const Call& call) {
  const Settings& its = call.settings;
  THPObjectPtr found(PyTuple_New(static_cast<Py_ssize_t>(given.size() + 6)));
  if (!found) return nullptr;
  Py_ssize_t i = 0;
  const auto push = [&](PyObject* object) { PyTuple_SET_ITEM(found.get(), i++, object); };
  push(text_or_none(from[BACKEND]));
  push(PyBool_FromLong(from[TRACED].toBool()));
  for (const Slot slot : given) push(THPVariable_Wrap(call.tensors[slot]));
  push(Py_BuildValue("(ddddd)", its.r_max, its.d_max, static_cast<double>(its.hold), static_cast<double>(its.r_ramp),
                     static_cast<double>(its.d_ramp)));
  push(its.is_cumulative ? Py_NewRef(Py_None) : PyFloat_FromDouble(its.momentum));
  push(PyFloat_FromDouble(its.eps));
  push(text_or_none(from[ACTIVATION]));
  return PyErr_Occurred() == nullptr ? found.release() : nullptr;
}

bool done(Stack& stack) {
  const Given from(stack, COUNT);
  Call call;
  if (!unpack(from, call)) return false;
  Kind kind = kind_of_forward(call);
  kind.push_back(from[TRACED].toBool());
  append_text(kind, from[BACKEND].toStringView());
  const OperatorPlan* plan = forwards.of(kind, [&] { return for_python(from, call); });
  if (plan == nullptr || is_pythons_now(plan->unless)) return false;
  const at::AutoDispatchBelowADInplaceOrView guard;
  Tensors& of = call.tensors;
  allocate_results(of, plan->bits);
  if (!plan->kernels->run(of, &call.settings)) return false;
  Tensor bits = or_empty(of[BITS], of[X].options().dtype(at::kByte));
  torch::jit::drop(stack, COUNT);
  torch::jit::push(stack, std::move(of[Y]), std::move(of[SAVED]), std::move(bits));
  return true;
}

}  // namespace of_forward

namespace of_backward {

enum : size_t { MASK = 3, ACTIVATION = 8, NEEDS_DX, NEEDS_DRESIDUAL, BACKEND, PROCESS_GROUP, COUNT };
constexpr std::array<Slot, 7> slots = {DY, X, RESIDUAL, WEIGHT, BIAS, SAVED, BITS};
constexpr std::array<size_t, slots.size()> places = {0, 1, 2, 4, 5, 6, 7};

// False if it is Python's.
bool unpack(const Given& from, Call& call) {
  if (from.has(MASK) || from.has(PROCESS_GROUP)) return false;
  Tensors& of = call.tensors;
  for (size_t i = 0; i < places.size(); ++i) of[slots[i]] = from.tensor(places[i]);
  call.activation = from.activation(ACTIVATION);
  const Tensor &x = of[X], &dy = of[DY], &saved = of[SAVED];
  if (call.activation < 0 || !x.defined() || x.dim() < 2 || !are_alike(of, slots)) return false;
  if (of[BITS].defined() && of[BITS].numel() == 0) of[BITS] = Tensor();     // forward returns an empty one
  if (call.activation == 0 || of[BITS].defined()) of[RESIDUAL] = Tensor();  // not read
  const int64_t channels = x.size(1);
  for (const Slot slot : {WEIGHT, BIAS}) {
    if (of[slot].defined() && !is_dense(of[slot], {channels})) return false;
  }
  for (const Slot slot : {DY, RESIDUAL}) {
    if (of[slot].defined() && (of[slot].sizes() != x.sizes() || of[slot].scalar_type() != x.scalar_type()))
      return false;
  }
  return dy.defined() && is_dense(saved, {4, channels}) && saved.scalar_type() == statistics_dtype(x);
}

Kind kind_of(const Given& from, const Call& call) {
  const Tensor &x = call.tensors[X], &residual = call.tensors[RESIDUAL];
  Kind kind = {x.dim(),         x.device().index(),      static_cast<int64_t>(x.key_set().raw_repr()),
               call.activation, from[NEEDS_DX].toBool(), from[NEEDS_DRESIDUAL].toBool()};
  kind.append(x.sizes().begin(), x.sizes().end());
  kind.append(x.strides().begin(), x.strides().end());
  append_dtypes(kind, call.tensors, slots);
  if (residual.defined()) kind.append(residual.strides().begin(), residual.strides().end());
  append_text(kind, from[BACKEND].toStringView());
  return kind;
}

PyObject* for_python(const Given& from, const Call& call) {
  const Tensors& of = call.tensors;
  return Py_BuildValue("(NNNNNNNNN)", text_or_none(from[BACKEND]), THPVariable_Wrap(of[X]),
                       THPVariable_Wrap(of[RESIDUAL]), THPVariable_Wrap(of[WEIGHT]), THPVariable_Wrap(of[BIAS]),
                       text_or_none(from[ACTIVATION]), PyBool_FromLong(of[BITS].defined()),
                       PyBool_FromLong(from[NEEDS_DX].toBool()), PyBool_FromLong(from[NEEDS_DRESIDUAL].toBool()));
}

bool done(Stack& stack) {
  const Given from(stack, COUNT);
  Call call;
  if (!unpack(from, call)) return false;
  Tensors& of = call.tensors;
  const OperatorPlan* plan = backwards.of(kind_of(from, call), [&] { return for_python(from, call); });
  const bool fits = plan != nullptr && lies_as(of[DY], plan->y);
  if (plan == nullptr || is_pythons_now(plan->unless) || !(fits || has_a_format(of[DY]))) return false;
  const Tensor& bits = of[BITS];
  if (bits.defined() && !(bits.scalar_type() == at::kByte && is_dense(bits, plan->bits))) return false;
  const at::AutoDispatchBelowADInplaceOrView guard;
  if (!fits) of[DY] = at::empty_like(of[X]).copy_(of[DY]);  // x was laid out anew, the graph's own arguments are not
  allocate_gradients(of, from[NEEDS_DX].toBool(), from[NEEDS_DRESIDUAL].toBool());
  if (!plan->kernels->run(of, nullptr)) return false;
  Tensor dx = or_empty(of[DX], of[X].options()), dresidual = or_empty(of[DRESIDUAL], of[X].options());
  torch::jit::drop(stack, COUNT);
  torch::jit::push(stack, std::move(dx), std::move(of[DWEIGHT]), std::move(of[DBIAS]), std::move(dresidual));
  return true;
}

}  // namespace of_backward

void forward(const c10::OperatorHandle&, c10::DispatchKeySet keys, Stack* stack) {
  static const auto in_python = c10::Dispatcher::singleton().findSchemaOrThrow("brn_kernels::forward_in_python", "");
  if (!of_forward::done(*stack)) in_python.redispatchBoxed(keys, stack);
}

void backward(const c10::OperatorHandle&, c10::DispatchKeySet keys, Stack* stack) {
  static const auto in_python = c10::Dispatcher::singleton().findSchemaOrThrow("brn_kernels::backward_in_python", "");
  if (!of_backward::done(*stack)) in_python.redispatchBoxed(keys, stack);
}

void add_to(torch::Library& library) {
  library.impl("forward", torch::CppFunction::makeFromBoxedFunction<&forward>());
  library.impl("backward", torch::CppFunction::makeFromBoxedFunction<&backward>());
}

}  // namespace

TORCH_LIBRARY_IMPL(brn_kernels, CPU, library) { add_to(library); }
TORCH_LIBRARY_IMPL(brn_kernels, CUDA, library) { add_to(library); }

PyObject* on_new_kinds(PyObject*, PyObject* arguments) {
  PyObject *prepare_forward = nullptr, *prepare_backward = nullptr;
  Py_ssize_t most = 0;
  if (!PyArg_ParseTuple(arguments, "OOn", &prepare_forward, &prepare_backward, &most)) return nullptr;
  forwards.ask(prepare_forward, static_cast<size_t>(most));
  backwards.ask(prepare_backward, static_cast<size_t>(most));
  Py_RETURN_NONE;
}

PyObject* forget_operators(PyObject*, PyObject*) {
  forwards.forget();
  backwards.forget();
  Py_RETURN_NONE;
}

}  // namespace brn
