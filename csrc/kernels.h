// What a device offers. ops.cpp is compiled once for each, into a library of its own.
#pragma once

#include "arguments.h"

namespace brn {

#ifdef BRN_CUDA

// All return a cudaError_t.

// Bytes of scratch memory that either direction needs on that GPU, in memory the caller allocates on it.
int workspace_bytes(const Layout& layout, DType dtype, int device, int64_t* bytes);

// Launched on `stream` (a cudaStream_t) of the device; nothing is waited for.
int forward(const ForwardArguments& arguments, int device, void* stream, void* workspace);
int backward(const BackwardArguments& arguments, int device, void* stream, void* workspace);

const char* error_message(int error);

// Whether kernels run on that GPU: cudaSuccess if so. The CUDA version they were compiled with, and the newest that the
// driver knows: 13000 for 13.0.
int try_device(int device);
int compiled_version();
int driver_version();

#else

void forward(const ForwardArguments& arguments);
void backward(const BackwardArguments& arguments);

// The instruction set in use: "avx512bf16", "avx512", "avx2" or "baseline".
const char* instruction_set();

#endif

}  // namespace brn
