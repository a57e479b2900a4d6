// Stands in for libcuda.so.1: what is launched goes to a listener.
#include <stddef.h>

typedef int (*Listener)(void* function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned shared_bytes,
                        void* stream, void** parameters);
static Listener listener;

void listen_to_launches(Listener given) { listener = given; }

int cuLaunchKernel(void* function, unsigned x, unsigned y, unsigned z, unsigned threads_x, unsigned threads_y,
                   unsigned threads_z, unsigned shared_bytes, void* stream, void** parameters, void** extra) {
  if (threads_y != 1 || threads_z != 1 || extra != NULL) return 1;
  return listener(function, x, y, z, threads_x, shared_bytes, stream, parameters);
}

typedef struct {
  unsigned grid[3], threads[3], shared_bytes;
  void *stream, *attributes;
  unsigned number_of_attributes;
} LaunchConfig;

int cuLaunchKernelEx(const LaunchConfig* config, void* function, void** parameters, void** extra) {
  if (config->threads[1] != 1 || config->threads[2] != 1 || config->number_of_attributes != 0 || extra != NULL)
    return 1;
  return listener(function, config->grid[0], config->grid[1], config->grid[2], config->threads[0], config->shared_bytes,
                  config->stream, parameters);
}

int aoti_torch_get_current_cuda_stream(int device, void** stream) {  // of PyTorch's library
  (void)device;
  *stream = NULL;
  return 0;
}

int cuStreamIsCapturing(void* stream, int* status) {
  (void)stream;
  return *status = 0;
}

int cuCtxGetCurrent(void** context) {
  *context = &listener;
  return 0;
}

int cuGetErrorString(int error, const char** text) {
  (void)error;
  *text = "of the stand-in";
  return 0;
}

// Of the CPU's memory, which is launched on here.
int cuPointerGetAttribute(void* data, int attribute, unsigned long long pointer) {
  (void)attribute;
  *(unsigned long long*)data = pointer;
  return 0;
}

// What else Triton's launcher is linked with, and does not call.
#define NOTHING(name) \
  int name(void) { return 1; }
NOTHING(cuCtxGetDevice)
NOTHING(cuCtxGetLimit)
NOTHING(cuCtxSetCurrent)
NOTHING(cuCtxSetLimit)
NOTHING(cuDeviceGet)
NOTHING(cuDeviceGetAttribute)
NOTHING(cuDevicePrimaryCtxRetain)
NOTHING(cuDriverGetVersion)
NOTHING(cuFuncGetAttribute)
NOTHING(cuFuncSetAttribute)
NOTHING(cuFuncSetCacheConfig)
NOTHING(cuModuleGetFunction)
NOTHING(cuModuleLoadData)
NOTHING(cuModuleUnload)
