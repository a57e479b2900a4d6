// The operators torch.ops.brn_kernels.forward and .backward, as compiled graphs call them, without interpreting any
// Python: registered for CPUs and CUDA by being loaded (cpp.py).
#pragma once

#include <Python.h>

namespace brn {

// on_new_kinds(prepare_forward, prepare_backward, most): what to ask for the plan of a kind of call (cpp.py), and how
// many kinds of each there may be.
PyObject* on_new_kinds(PyObject*, PyObject* arguments);

// forget_operators(): make no further use of the plans so far.
PyObject* forget_operators(PyObject*, PyObject*);

}  // namespace brn
