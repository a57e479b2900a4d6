// Activations and their derivatives, with PyTorch's conventions at kinks and NaN (kernels_common.py).
#pragma once

#include "../math.h"

namespace brn {
namespace {

template <Activation A, typename T>
BRN_INLINE T activate(T z) {
  if constexpr (A == Activation::relu) {
    return z <= 0 ? T(0) : z;
  } else if constexpr (A == Activation::leaky_relu) {
    return z > 0 ? z : z * T(0.01);
  } else if constexpr (A == Activation::silu) {
    return z / (1 + exp(-z));
  } else if constexpr (A == Activation::hardswish) {
    return z * clamped(z + 3, T(0), T(6)) * T(1.0 / 6);
  } else {
    return z;
  }
}

// dy times the derivative at z.
template <Activation A, typename T>
BRN_INLINE T activation_backward(T dy, T z) {
  if constexpr (A == Activation::relu) {
    return z <= 0 ? T(0) : dy;
  } else if constexpr (A == Activation::leaky_relu) {
    return z > 0 ? dy : dy * T(0.01);
  } else if constexpr (A == Activation::silu) {
    const T gate = 1 / (1 + exp(-z));
    return dy * (gate * (1 + z * (1 - gate)));
  } else if constexpr (A == Activation::hardswish) {
    return z <= -3 ? T(0) : z < 3 ? dy * (z * T(1.0 / 3) + T(0.5)) : dy;
  } else {
    return dy;
  }
}

}  // namespace
}  // namespace brn
