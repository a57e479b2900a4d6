// A fault for each tool of compute-sanitizer, which it must find: faults TOOL. Without one of its name, nothing is done.
#include <cstdio>
#include <cstring>

__global__ void out_of_bounds(volatile int* values) { values[1024 + threadIdx.x] = 1; }

__global__ void race(volatile int* values) {
  __shared__ volatile int shared[64];
  shared[threadIdx.x] = values[threadIdx.x];
  values[threadIdx.x] = shared[63 - threadIdx.x];  // the other warp's, without a barrier
}

__global__ void diverged(volatile int* values) {
  if (threadIdx.x % 32 < 16) __syncthreads();  // half of each warp
  values[threadIdx.x] = 1;
}

__global__ void uninitialized(const volatile int* values, volatile int* sums) {
  sums[threadIdx.x] = values[threadIdx.x] + 1;
}

int main(int argc, char** argv) {
  const char* tool = argc > 1 ? argv[1] : "";
  int *values, *sums;
  if (cudaMalloc(&values, 256 * sizeof(int)) != cudaSuccess || cudaMalloc(&sums, 256 * sizeof(int)) != cudaSuccess) {
    std::puts("no memory, or no GPU");
    return 2;
  }
  if (std::strcmp(tool, "initcheck") != 0) cudaMemset(values, 0, 256 * sizeof(int));
  if (std::strcmp(tool, "memcheck") == 0) out_of_bounds<<<1, 64>>>(values);
  if (std::strcmp(tool, "racecheck") == 0) race<<<1, 64>>>(values);
  if (std::strcmp(tool, "synccheck") == 0) diverged<<<1, 64>>>(values);
  if (std::strcmp(tool, "initcheck") == 0) uninitialized<<<1, 64>>>(values, sums);
  cudaDeviceSynchronize();
  std::puts("done");
  return 0;
}
