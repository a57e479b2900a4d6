// The arguments of a training call, wherever they come from, and what kind of call they make.
#pragma once

#include "kernels.h"

#include <c10/util/SmallVector.h>

#include <array>
#include <bit>
#include <string_view>
#include <unordered_map>
#include <utility>

namespace brn {

// The tensors of a forward, in the order in which Python gives them.
constexpr std::array<Slot, 10> given = {X,           RESIDUAL, WEIGHT,  BIAS,   RUNNING_MEAN,
                                        RUNNING_VAR, COUNTER,  CLIPPED, LIMITS, AUTO};

struct Call {
  Tensors tensors;
  Settings settings = {};
  int64_t activation = 0;
};

// -1: not one of functional.ACTIVATIONS.
int64_t activation_of(std::string_view name);

// False if what should be counts are none.
bool set_schedule(const std::array<double, 5>& numbers, Settings& settings);

bool is_dense(const Tensor& tensor, at::IntArrayRef sizes);

// Whether these are plain tensors like x, where they are defined.
bool are_alike(const Tensors& of, at::ArrayRef<Slot> slots);

// Whether the tensors of a forward are as kernels read them. Dtypes are part of the kind, and checked when its plan is
// made.
bool is_plain(const Tensors& of);

// Whether it is dense in one of PyTorch's memory formats.
bool has_a_format(const Tensor& tensor);

// Whether dy lies in memory as y does.
bool lies_as(const Tensor& dy, const Tensor& y);

inline at::ScalarType statistics_dtype(const Tensor& x) {
  return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// y, saved, and the packed bits, if there are any, of a forward.
void allocate_results(Tensors& of, const std::vector<int64_t>& bits);

// The gradients of a backward.
void allocate_gradients(Tensors& of, bool needs_dx, bool needs_dresidual);

// All that a plan depends on.
using Kind = c10::SmallVector<int64_t, 40>;

struct Hash {
  size_t operator()(const Kind& kind) const;
};

// The plans of kinds of calls. None is ever freed: calls and nodes point to them.
template <typename Plan>
class Kinds {
 public:
  // The plan; or none, and whether to ask for one. That is said more and more rarely: preparing one takes time, and
  // there may never be any. Of further kinds than so many there is none.
  std::pair<const Plan*, bool> find(const Kind& kind, size_t most) {
    auto found = of_.find(kind);
    if (found == of_.end()) {
      if (of_.size() >= most) return {nullptr, false};
      found = of_.emplace(kind, Entry{}).first;
    }
    Entry& entry = found->second;
    return {entry.plan, entry.plan == nullptr && std::has_single_bit(++entry.without)};
  }

  // From now on, unless another thread was faster.
  void keep(const Kind& kind, const Plan* plan) {
    Entry& entry = of_[kind];
    if (entry.plan == nullptr) entry.plan = plan;
  }

  void forget() { of_.clear(); }

 private:
  struct Entry {
    const Plan* plan = nullptr;
    uint64_t without = 0;  // calls so far that there was none for
  };

  std::unordered_map<Kind, Entry, Hash> of_;
};

// Of a plan's `unless`, which is None, or what says whether a call is Python's now.
bool is_pythons_now(PyObject* unless);

void append_dtypes(Kind& kind, const Tensors& of, at::ArrayRef<Slot> slots);

// What shapes, strides and dtypes of a forward decide.
Kind kind_of_forward(const Call& call);

}  // namespace brn
