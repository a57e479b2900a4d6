// From dtype and activation to the loops made for them.
#pragma once

#include "columns.h"
#include "planes.h"

// Compiled once for each instruction set, which gives its name to what is exported: forward_avx2, ...
#define BRN_JOIN_(a, b) a##_##b
#define BRN_JOIN(a, b) BRN_JOIN_(a, b)
#define BRN_EXPORTED(name) BRN_JOIN(name, BRN_ISA)

namespace brn {
namespace {

// Calls run(S{}) with S the element type of `dtype`.
template <typename Run>
BRN_INLINE void with_dtype(DType dtype, Run&& run) {
  switch (dtype) {
    case DType::float32:
      return run(float{});
    case DType::float64:
      return run(double{});
    case DType::bfloat16:
      return run(BFloat16{});
    case DType::float16:
      return run(Float16{});
  }
}

template <Activation ACTIVATION>
struct Constant {
  static constexpr Activation value = ACTIVATION;
};

// Calls run(Constant<activation>{}).
template <typename Run>
BRN_INLINE void with_activation(Activation activation, Run&& run) {
  switch (activation) {
    case Activation::none:
      return run(Constant<Activation::none>{});
    case Activation::relu:
      return run(Constant<Activation::relu>{});
    case Activation::leaky_relu:
      return run(Constant<Activation::leaky_relu>{});
    case Activation::silu:
      return run(Constant<Activation::silu>{});
    case Activation::hardswish:
      return run(Constant<Activation::hardswish>{});
  }
}

template <template <typename, Activation> class Columns, template <typename, Activation> class Planes,
          typename Arguments>
BRN_INLINE void run_call(const Arguments& arguments, bool all_dense, const Parallel& parallel) {
  with_dtype(arguments.dtype, [&](auto element) {
    with_activation(arguments.activation, [&](auto activation) {
      using S = decltype(element);
      constexpr Activation kActivation = decltype(activation)::value;
      Grid grid;
      if (grid_of(arguments.layout, all_dense, arguments.bits != nullptr, Columns<S, kActivation>::kWorthJoining,
                  grid)) {
        Columns<S, kActivation> task(arguments, grid, parallel);
        run_passes(task.plan(), task, parallel);
      } else {
        Planes<S, kActivation> task(arguments, parallel);
        run_passes(task.plan(), task, parallel);
      }
    });
  });
}

}  // namespace
}  // namespace brn
