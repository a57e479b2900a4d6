// What a device offers. ops.cpp is compiled once for each, into a library of its own.
#pragma once

#include "arguments.h"

namespace brn {

#ifdef BRN_CUDA

// Bytes of scratch memory that either direction needs on that GPU, in memory the caller allocates on it.
int64_t workspace_bytes(const Layout& layout, DType dtype, int device);

// Launched on `stream` (a cudaStream_t) of the current device; nothing is waited for. Return a cudaError_t.
int forward(const ForwardArguments& arguments, int device, void* stream, void* workspace);
int backward(const BackwardArguments& arguments, int device, void* stream, void* workspace);

const char* error_message(int error);

#else

void forward(const ForwardArguments& arguments);
void backward(const BackwardArguments& arguments);

// The instruction set in use: "avx512bf16", "avx512", "avx2" or "baseline".
const char* instruction_set();

#endif

}  // namespace brn
