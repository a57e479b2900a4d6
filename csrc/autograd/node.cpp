// What a backward meets that is not ordinary (create_graph, a dispatch mode, another memory of dy) goes to the one in
// Python, `gradients` of autograd.py.
#include "node.h"

#include "call.h"

#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/object_ptr.h>

#include <array>

namespace brn {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// In the order in which the node saves them.
struct Kept {
  const Tensor &x, &residual, &weight, &bias, &saved, &bits;
};

// Whether the plan's kernels can be called at once.
bool is_ordinary(const Plan& plan, const Tensor& dy, const Kept& kept) {
  const at::Device device = kept.saved.device();
  const auto is_as_planned = [&](const Memory& memory, const Tensor& tensor) { return memory.is_of(tensor, device); };
  return !at::GradMode::is_enabled() && !is_watched() && dy.key_set() == kept.saved.key_set() &&
         dy.scalar_type() == kept.x.scalar_type() && is_as_planned(plan.x, kept.x) &&
         is_as_planned(plan.residual, kept.residual) && is_as_planned(plan.weight, kept.weight) &&
         is_as_planned(plan.bias, kept.bias) && lies_as(dy, plan.y);
}

// False, and nothing done, if the kernels cannot be launched on these.
bool launched(const Plan& plan, const Tensor& dy, const Kept& kept, Tensors& tensors) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  tensors[DY] = dy;
  tensors[X] = kept.x;
  tensors[RESIDUAL] = kept.residual;
  tensors[WEIGHT] = kept.weight;
  tensors[BIAS] = kept.bias;
  tensors[SAVED] = kept.saved;
  tensors[BITS] = kept.bits;
  allocate_gradients(tensors, plan.needs_dx, plan.needs_dresidual);
  return plan.backward->run(tensors, nullptr);
}

void by_python(const Plan& plan, const Tensor& dy, const variable_list& tensors, const std::array<bool, 4>& needs,
               variable_list& found) {
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

}  // namespace

Memory::Memory(const Tensor& tensor) {
  if (!tensor.defined()) return;
  sizes = tensor.sizes().vec();
  strides = tensor.strides().vec();
  dtype = tensor.scalar_type();
}

bool Memory::is_of(const Tensor& tensor, const at::Device& device) const {
  if (!dtype.has_value() || !tensor.defined()) return dtype.has_value() == tensor.defined();
  return tensor.device() == device && tensor.scalar_type() == *dtype && tensor.sizes() == sizes &&
         tensor.strides() == strides;
}

Tensor BatchRenormBackward::forward(AutogradContext* context, const Tensor& x, const MaybeTensor& residual,
                                    const MaybeTensor& weight, const MaybeTensor& bias, const Done& done) {
  context->set_materialize_grads(false);
  context->saved_data["plan"] = reinterpret_cast<int64_t>(done.plan);
  context->save_for_backward({x, done.plan->residual.dtype ? *residual : Tensor(), weight.value_or(Tensor()),
                              bias.value_or(Tensor()), done.saved, done.bits});
  return done.y;
}

variable_list BatchRenormBackward::backward(AutogradContext* context, const variable_list& gradients) {
  variable_list found(5);  // one for each argument of forward
  const Tensor& dy = gradients[0];
  if (!dy.defined()) return found;
  const Plan& plan = *reinterpret_cast<const Plan*>(context->saved_data["plan"].toInt());
  const variable_list tensors = context->get_saved_variables();
  const Kept kept = {tensors[0], tensors[1], tensors[2], tensors[3], tensors[4], tensors[5]};
  size_t edge = 0;
  const auto needed = [&](bool present) { return present && context->needs_input_grad(edge++); };
  const bool x = needed(true), residual = needed(plan.has_residual), weight = needed(kept.weight.defined()),
             bias = needed(kept.bias.defined());
  const bool dresidual = residual && !plan.passes_dy_on;
  if (x == plan.needs_dx && dresidual == plan.needs_dresidual && is_ordinary(plan, dy, kept)) {
    Tensors computed;
    if (launched(plan, dy, kept, computed)) {
      found[0] = computed[DX];  // autograd brings each into the dtype of its tensor
      if (residual) found[1] = plan.passes_dy_on ? dy : computed[DRESIDUAL];
      if (weight) found[2] = computed[DWEIGHT];
      if (bias) found[3] = computed[DBIAS];
      return found;
    }
  }
  by_python(plan, dy, tensors, {x, residual, weight, bias}, found);
  return found;
}

}  // namespace brn
