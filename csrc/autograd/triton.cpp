// Kernels that Triton compiled, launched as Triton's own launcher does, by the CUDA driver's cuLaunchKernel: their
// parameters in turn, and after them two addresses of memory that these kernels need none of. To go by way of Triton's
// launcher takes Python objects of all of them, and so Python's lock in the threads that run backwards.
#include "kernels.h"

#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>
#include <c10/util/SmallVector.h>
#include <torch/csrc/Device.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/object_ptr.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <mutex>
#include <string>
#include <unordered_map>
#include <utility>
#include <variant>

namespace brn {
namespace {

constexpr uintptr_t alignment = 16;  // of every address that Triton's kernels were compiled for
constexpr size_t most_streams = 64;  // whose counters are found without asking Python

// The CUDA driver's functions of these names (cuda.h would be needed for nothing else) and PyTorch's that finds the
// current stream, which only builds for CUDA have. They return 0 if they succeed.
struct Driver {
  int (*launch_kernel)(void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                       unsigned block_y, unsigned block_z, unsigned shared_bytes, void* stream, void** parameters,
                       void** extra);
  int (*stream_is_capturing)(void* stream, int* status);
  int (*get_error_string)(int error, const char** text);
  int (*get_current_context)(void** context);
  int (*get_device)(int* device, int index);
  int (*retain_primary_context)(void** context, int device);
  int (*set_current_context)(void* context);
  int (*get_current_stream)(int32_t device, void** stream);

  void check(int error) const {
    const char* text = nullptr;
    TORCH_CHECK(error == 0, "a Triton kernel could not be launched: CUDA driver error ", error, ", ",
                get_error_string(error, &text) == 0 ? text : "unknown");
  }

  // A thread that runs backwards has no context before CUDA's runtime has worked in it, which need not be so here.
  void ensure_context(int index) const {
    void* context = nullptr;
    check(get_current_context(&context));
    if (context != nullptr) return;
    int device = 0;
    check(get_device(&device, index));
    check(retain_primary_context(&context, device));  // the runtime's; for good
    check(set_current_context(context));
  }
};

// Where a parameter's value comes from: an address, a setting of the layer's, or what it always is. Triton's kernels
// have 32-bit integers and 64-bit floats.
using Source = std::variant<Slot, double Settings::*, int64_t Settings::*, int32_t, double>;

Source source_of(const std::string& name, PyObject* value) {
  if (PyFloat_Check(value)) return PyFloat_AS_DOUBLE(value);
  if (PyLong_Check(value)) {
    const long long integer = PyLong_AsLongLong(value);
    TORCH_CHECK(integer == static_cast<int32_t>(integer), name, ": not of 32 bits");
    return static_cast<int32_t>(integer);
  }
  TORCH_CHECK(value == Py_None, name, ": expected a number or None");
  static const std::unordered_map<std::string, Source> sources = {
      {"x", X},
      {"residual", RESIDUAL},
      {"y", Y},
      {"bits", BITS},
      {"weight", WEIGHT},
      {"bias", BIAS},
      {"running_mean", RUNNING_MEAN},
      {"running_var", RUNNING_VAR},
      {"clipped", CLIPPED},
      {"counter", COUNTER},
      {"limits", LIMITS},
      {"auto", AUTO},
      {"saved", SAVED},
      {"dy", DY},
      {"dx", DX},
      {"dresidual", DRESIDUAL},
      {"dweight", DWEIGHT},
      {"dbias", DBIAS},
      {"workspace", WORKSPACE},
      {"tickets", TICKETS},
      {"r_max", &Settings::r_max},
      {"d_max", &Settings::d_max},
      {"momentum", &Settings::momentum},
      {"eps", &Settings::eps},
      {"hold", &Settings::hold},
      {"r_ramp", &Settings::r_ramp},
      {"d_ramp", &Settings::d_ramp},
  };
  const auto found = sources.find(name);
  TORCH_CHECK(found != sources.end(), name, ": no call has that");
  return found->second;
}

union Value {
  uintptr_t address;
  int32_t integer;
  double real;
};

struct Arguments {
  const std::array<uintptr_t, SLOTS>& addresses;
  const Settings* settings;

  Value operator()(Slot slot) const { return {.address = addresses[slot]}; }
  Value operator()(double Settings::* setting) const { return {.real = settings->*setting}; }
  Value operator()(int64_t Settings::* setting) const { return {.integer = static_cast<int32_t>(settings->*setting)}; }
  Value operator()(int32_t integer) const { return {.integer = integer}; }
  Value operator()(double real) const { return {.real = real}; }
};

struct Launch {
  void* function;
  unsigned grid_x, grid_y, threads, shared_bytes;
  std::vector<Source> parameters;

  explicit Launch(PyObject* made) {
    PyObject *compiled = nullptr, *each = nullptr;
    unsigned long long address = 0;
    if (!PyArg_ParseTuple(made, "OKIIIIO!", &compiled, &address, &grid_x, &grid_y, &threads, &shared_bytes,
                          &PyTuple_Type, &each)) {
      throw_python_error();
    }
    function = reinterpret_cast<void*>(address);
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(each); ++i) {
      const char* name = nullptr;
      PyObject* value = nullptr;
      if (!PyArg_ParseTuple(PyTuple_GET_ITEM(each, i), "sO", &name, &value)) throw_python_error();
      parameters.push_back(source_of(name, value));
    }
  }

  void on(void* stream, const Arguments& given, const Driver& driver) const {
    c10::SmallVector<Value, 48> values;
    c10::SmallVector<void*, 48> pointers;
    for (const Source& each : parameters) values.push_back(std::visit(given, each));
    values.append(2, Value{.address = 0});  // the two addresses
    for (Value& value : values) pointers.push_back(&value);
    driver.check(driver.launch_kernel(function, grid_x, grid_y, 1, threads, 1, 1, shared_bytes, stream, pointers.data(),
                                      nullptr));
  }
};

class TritonKernels final : public Kernels {
 public:
  TritonKernels(Driver driver, std::vector<Launch> launches, int64_t workspace, int64_t tickets, PyObject* tickets_of)
      : driver_(driver),
        launches_(std::move(launches)),
        workspace_(workspace),
        tickets_(tickets),
        tickets_of_(tickets_of) {}

  bool run(const Tensors& of, const Settings* settings) const override {
    if (settings != nullptr && !fits(*settings)) return false;
    std::array<uintptr_t, SLOTS> addresses = {};
    uintptr_t all = 0;
    for (size_t i = 0; i < SLOTS; ++i) {
      if (of.at[i].defined()) all |= addresses[i] = reinterpret_cast<uintptr_t>(of.at[i].data_ptr());
    }
    if (all % alignment != 0) return false;
    const Tensor& x = of[X];
    const c10::DeviceGuard current(x.device());
    const int device = x.device().index();
    driver_.ensure_context(device);
    void* stream = nullptr;
    TORCH_CHECK(driver_.get_current_stream(device, &stream) == 0, "there is no current stream");
    Tensor workspace, counters;
    if (workspace_ > 0) {
      workspace = at::empty({workspace_}, of[SAVED].options());
      addresses[WORKSPACE] = reinterpret_cast<uintptr_t>(workspace.data_ptr());
    }
    if (tickets_ > 0) {
      counters = counters_on(stream, x);
      addresses[TICKETS] = reinterpret_cast<uintptr_t>(counters.data_ptr());
    }
    for (const Launch& each : launches_) each.on(stream, {addresses, settings}, driver_);
    return true;
  }

 private:
  static bool fits(const Settings& settings) {
    return std::max({settings.hold, settings.r_ramp, settings.d_ramp}) <= std::numeric_limits<int32_t>::max();
  }

  // tickets.py's, which are the same at each call on a stream but for captured ones.
  Tensor counters_on(void* stream, const Tensor& x) const {
    int status = 0;
    const bool may_keep = driver_.stream_is_capturing(stream, &status) == 0 && status == 0;
    if (may_keep) {
      const std::lock_guard<std::mutex> guard(kept_lock_);
      for (const auto& [its_stream, counters] : kept_) {
        if (its_stream == stream) return counters;
      }
    }
    Tensor found = asked_of_python(x);
    if (may_keep) {
      const std::lock_guard<std::mutex> guard(kept_lock_);
      if (kept_.size() < most_streams) kept_.emplace_back(stream, found);
    }
    return found;
  }

  Tensor asked_of_python(const Tensor& x) const {
    const pybind11::gil_scoped_acquire gil;
    const THPObjectPtr device(THPDevice_New(x.device())), count(PyLong_FromLongLong(tickets_));
    if (!device || !count) throw_python_error();
    THPObjectPtr found(PyObject_CallFunctionObjArgs(tickets_of_, device.get(), count.get(), nullptr));
    if (!found) throw_python_error();
    return THPVariable_Unpack(found.get());
  }

  Driver driver_;
  std::vector<Launch> launches_;
  int64_t workspace_, tickets_;  // numbers of the statistics' dtype, and counters
  PyObject* tickets_of_;
  mutable std::mutex kept_lock_;
  mutable std::vector<std::pair<void*, Tensor>> kept_;  // of one device, as is the plan
};

}  // namespace

std::unique_ptr<Kernels> triton_kernels(PyObject* made) {
  PyObject *addresses = nullptr, *launches = nullptr, *tickets_of = nullptr;
  long long workspace = 0, tickets = 0;
  if (!PyArg_ParseTuple(made, "O!O!LLO", &PyTuple_Type, &addresses, &PyTuple_Type, &launches, &workspace, &tickets,
                        &tickets_of)) {
    throw_python_error();
  }
  Driver driver = {};
  const std::vector<int64_t> functions = integers(addresses);
  TORCH_CHECK(functions.size() * sizeof(int64_t) == sizeof(driver), "addresses of the driver's functions");
  std::memcpy(&driver, functions.data(), sizeof(driver));
  std::vector<Launch> all;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(launches); ++i) all.emplace_back(PyTuple_GET_ITEM(launches, i));
  Py_INCREF(made);  // the kernels' code stays loaded as long as Triton's objects in it live
  return std::make_unique<TritonKernels>(driver, std::move(all), workspace, tickets, tickets_of);
}

}  // namespace brn
