// What an operator hands to the loops: plain pointers and sizes, the same for CPU and CUDA.
//
// All tensors of a call are seen in one layout (brn_kernels/backends/layout.py): `outer` rows of `inner` contiguous
// elements, for each of `channels` unless channels_last, where a row is one position of all channels (inner ==
// channels).
#pragma once

#include <cstdint>

namespace brn {

enum class DType : int { float32, float64, bfloat16, float16 };

enum class Activation : int { none, relu, leaky_relu, silu, hardswish };  // order: native.py

struct Layout {
  bool channels_last;
  int64_t outer, channels, inner;
};

// An activation tensor; absent where data is null. Strides in elements; channel_stride is 0 in channels_last.
struct Side {
  void* data;
  int64_t outer_stride, channel_stride;
};

// One value for each channel, of any floating dtype; absent where data is null.
struct PerChannel {
  void* data;
  DType dtype;
};

constexpr int64_t kAutomaticRows = 5;  // of the state of automatic limits (backends/auto_limits.py)

// The clip limits in force: those of `automatic`, (kAutomaticRows, channels) of float or double, if there; else `given`
// (r_max, d_max) if there; else the ramps at the counter (schedule.py).
struct Schedule {
  PerChannel automatic, given;
  double r_max, d_max;
  int64_t hold, r_ramp, d_ramp;
};

struct ForwardArguments {
  DType dtype;
  Layout layout;
  Side x, residual, y;
  uint8_t* bits;  // packed sign of what the ReLU saw: a row of (inner + 7) / 8 bytes for each row of memory; or null
  PerChannel weight, bias, running_mean, running_var;
  int64_t* counter;  // num_batches_tracked, or null
  bool* clipped;     // (channels), or null
  Schedule schedule;
  bool cumulative;  // average: momentum is then 1 / (counter + 1)
  double momentum, eps;
  Activation activation;
  void* saved;  // (4, channels): batch_mean, inv_std, r, d; float, or double for float64
  // (3, channels), dtype of `saved`: pivot, scale, shift of y = activation((x - pivot) * scale + shift + residual).
  // Written if there; or, with `given`, read: then y is all that is written, and nothing else of a channel is needed.
  void* coefficients;
  bool given;
};

struct BackwardArguments {
  DType dtype;
  Layout layout;
  Side dy, x, residual, dx, dresidual;  // residual: only where the activation's argument cannot be had without it
  const uint8_t* bits;                  // where kept, they decide what the ReLU lets through
  PerChannel weight, bias;
  Activation activation;
  const void* saved;
  void *dweight, *dbias;  // (channels), dtype of saved
};

}  // namespace brn
