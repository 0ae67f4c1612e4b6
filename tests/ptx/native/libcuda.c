// A stand-in for libcuda.so.1: the functions that Triton's driver.c calls. Launches go to a callback. Its only device
// resembles an H100. Streams, contexts and modules are plain numbers.
#include <stddef.h>
#include <stdint.h>

typedef int CUresult;
typedef struct {
  unsigned grid[3], block[3], shared;
  void *stream, *attributes;
  unsigned attribute_count;
} CUlaunchConfig;
typedef int (*Launch)(uint64_t function, const unsigned* grid, const unsigned* block, unsigned shared, uint64_t stream,
                      void** parameters);

enum { FAILED = 719 };
static Launch launch;
static uint64_t functions;

void set_launch(Launch callback) { launch = callback; }

CUresult cuLaunchKernelEx(const CUlaunchConfig* config, void* function, void** parameters, void** extra) {
  return launch && launch((uint64_t)function, config->grid, config->block, config->shared, (uint64_t)config->stream,
                          parameters)
             ? FAILED
             : 0;
}

CUresult cuModuleLoadData(void** module, const void* image) {
  *module = (void*)++functions;
  return 0;
}
CUresult cuModuleGetFunction(void** function, void* module, const char* name) {
  *function = module;
  return 0;
}
CUresult cuModuleUnload(void* module) { return 0; }

CUresult cuFuncGetAttribute(int* value, int attribute, void* function) {
  *value = attribute == 0 ? 1024 : 0;  // threads per block
  return 0;
}
CUresult cuFuncSetAttribute(void* function, int attribute, int value) { return FAILED; }
CUresult cuFuncSetCacheConfig(void* function, int config) { return FAILED; }
CUresult cuOccupancyMaxActiveClusters(int* clusters, void* function, const void* config) { return FAILED; }

CUresult cuPointerGetAttribute(uint64_t* out, int attribute, uint64_t pointer) {
  *out = pointer;
  return 0;
}
CUresult cuPointerGetAttributes(unsigned count, int* attributes, void** out, uint64_t pointer) {
  for (unsigned i = 0; i < count; ++i) *(uint64_t*)out[i] = pointer;
  return 0;
}

CUresult cuCtxGetCurrent(void** context) {
  *context = (void*)1;
  return 0;
}
CUresult cuCtxSetCurrent(void* context) { return 0; }
CUresult cuCtxGetDevice(int* device) {
  *device = 0;
  return 0;
}
CUresult cuCtxGetLimit(size_t* value, int limit) {
  *value = 1 << 20;
  return 0;
}
CUresult cuCtxSetLimit(int limit, size_t value) { return 0; }
CUresult cuDeviceGet(int* device, int ordinal) {
  *device = ordinal;
  return 0;
}
CUresult cuDevicePrimaryCtxRetain(void** context, int device) { return cuCtxGetCurrent(context); }
CUresult cuDeviceGetAttribute(int* value, int attribute, int device) {
  switch (attribute) {
    case 10:
      *value = 32;
      break;  // threads per warp
    case 12:
      *value = 65536;
      break;  // registers per block
    case 16:
      *value = 132;
      break;  // multiprocessors
    case 75:
      *value = 9;
      break;  // compute capability
    case 76:
      *value = 0;
      break;
    case 97:
      *value = 232448;
      break;  // bytes of shared memory per block
    default:
      *value = 0;
  }
  return 0;
}
CUresult cuDriverGetVersion(int* version) {
  *version = 13000;
  return 0;
}
CUresult cuGetErrorString(int error, const char** text) {
  *text = "the interpreter of the kernel has failed";
  return 0;
}
CUresult cuInit(unsigned flags) { return 0; }
CUresult cuStreamIsCapturing(void* stream, int* status) {
  *status = 0;
  return 0;
}
CUresult cuTensorMapEncodeTiled(void) { return FAILED; }
CUresult cuTensorMapEncodeIm2col(void) { return FAILED; }
