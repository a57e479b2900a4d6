// What the node (node.h) launches: the kernels of one direction of one kind of call, native or Triton's.
#pragma once

#include <Python.h>
#include <torch/csrc/Exceptions.h>

#include <ATen/core/Tensor.h>

#include <array>
#include <cstdint>
#include <memory>
#include <vector>

namespace brn {

using at::Tensor;

// The tensors of a call.
enum Slot : size_t {
  X,
  RESIDUAL,
  Y,
  BITS,
  WEIGHT,
  BIAS,
  RUNNING_MEAN,
  RUNNING_VAR,
  CLIPPED,
  COUNTER,
  LIMITS,
  AUTO,
  SAVED,
  DY,
  DX,
  DRESIDUAL,
  DWEIGHT,
  DBIAS,
  WORKSPACE,
  TICKETS,
  SLOTS,
};

// Those that are absent are undefined.
struct Tensors {
  std::array<Tensor, SLOTS> at;

  Tensor& operator[](Slot slot) { return at[slot]; }
  const Tensor& operator[](Slot slot) const { return at[slot]; }
};

// The numbers of a forward that are a layer's own, likewise.
struct Settings {
  double r_max, d_max, momentum, eps;
  int64_t hold, r_ramp, d_ramp;
  bool is_cumulative;  // momentum: None
};

class Kernels {
 public:
  virtual ~Kernels() = default;
  // False, and nothing done, if these are not what the kernels can be launched on.
  virtual bool run(const Tensors& tensors, const Settings* settings) const = 0;
};

// Of the tuples that backends/in_cpp.py makes. They hold what Python objects they need for good.
std::unique_ptr<Kernels> native_kernels(PyObject* made);
std::unique_ptr<Kernels> triton_kernels(PyObject* made);
std::unique_ptr<Kernels> kernels_of(PyObject* made_by);  // one of them, with its name: in_cpp.whose

// Python's error, taken along: the exception may be rethrown in another thread.
[[noreturn]] inline void throw_python_error() {
  python_error error;
  error.persist();
  throw error;
}

inline std::vector<int64_t> integers(PyObject* tuple) {
  std::vector<int64_t> found;
  for (Py_ssize_t i = 0; i < PyTuple_Size(tuple); ++i) found.push_back(PyLong_AsLongLong(PyTuple_GetItem(tuple, i)));
  if (PyErr_Occurred()) throw_python_error();
  return found;
}

}  // namespace brn
