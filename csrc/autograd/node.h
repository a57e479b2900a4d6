// The node of autograd that remembers a forward and runs its backward without interpreting any Python. PyTorch's stable
// ABI has no autograd: this library belongs to the versions of PyTorch and Python it was compiled for.
#pragma once

#include "kernels.h"

#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/jit/frontend/tracer.h>

#include <memory>
#include <optional>
#include <vector>

namespace brn {

// A tensor as it must still be when the backward reads it: t.data = ... leaves no trace.
struct Memory {
  std::vector<int64_t> sizes, strides;
  std::optional<at::ScalarType> dtype;  // none: there is no tensor

  explicit Memory(const Tensor& tensor);
  bool is_of(const Tensor& tensor, const at::Device& device) const;
};

// What follows from the kind of a call: made once for each, and never freed.
struct Plan {
  PyObject* gradients;               // what does all backwards but the ordinary: of autograd.py
  PyObject* unless;                  // None, or what says whether a call is Python's now
  Tensor y;                          // without memory
  Memory x, residual, weight, bias;  // as the backward reads them; of the residual, if it does
  bool has_residual;                 // whose gradient may be asked for
  bool passes_dy_on;                 // which is dy
  bool needs_dx, needs_dresidual;    // computed by the kernels
  std::vector<int64_t> bits;         // sizes of the packed bits, if there are any
  std::unique_ptr<const Kernels> forward, backward;
};

// Whether anybody must see the operators themselves: a trace, a dispatch mode, a transform (ops.is_observed).
inline bool is_watched() {
  return c10::impl::TorchDispatchModeTLS::any_modes_set() || torch::jit::tracer::isTracing() ||
         c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode);
}

// Its name is what users see of a node.
struct BatchRenormBackward : torch::autograd::Function<BatchRenormBackward> {
  static constexpr bool is_traceable = true;  // by compiled autograd: its tensors are not ordinary

  using MaybeTensor = std::optional<Tensor>;

  struct Done {
    const Plan* plan;
    const Tensor &y, &saved, &bits;
  };

  static Tensor forward(torch::autograd::AutogradContext* context, const Tensor& x, const MaybeTensor& residual,
                        const MaybeTensor& weight, const MaybeTensor& bias, const Done& done);
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 const torch::autograd::variable_list& gradients);
};

}  // namespace brn
