// A stand-in for the CUDA runtime: the functions that the compiled host code of csrc/cuda/step.cu calls. Launches go to
// a callback, with the name of the kernel.
#include <stddef.h>
#include <stdint.h>

typedef struct {
  unsigned x, y, z;
} dim3;
typedef int (*Launch)(const char* name, unsigned blocks, unsigned threads, size_t shared, uint64_t stream,
                      void** parameters);

enum { KERNELS = 256, FAILED = 719 };
static Launch launch;
static struct {
  const void* host;
  const char* name;
} kernels[KERNELS];
static int kernel_count, device, error;
static struct {
  dim3 grid, block;
  size_t shared;
  void* stream;
} configured;

void set_launch(Launch callback) { launch = callback; }
int current_device(void) { return device; }

void** __cudaRegisterFatBinary(void* binary) { return &configured.stream; }
void __cudaRegisterFatBinaryEnd(void** handle) {}
void __cudaUnregisterFatBinary(void** handle) {}
void __cudaRegisterFunction(void** handle, const char* host, char* device_function, const char* name, int threads,
                            void* thread, void* block, void* block_size, void* grid_size, int* warp_size) {
  if (kernel_count < KERNELS) {
    kernels[kernel_count].host = host;
    kernels[kernel_count++].name = name;
  }
}

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void* stream) {
  configured.grid = grid;
  configured.block = block;
  configured.shared = shared;
  configured.stream = stream;
  return 0;
}
int __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void** stream) {
  *grid = configured.grid;
  *block = configured.block;
  *shared = configured.shared;
  *stream = configured.stream;
  return 0;
}

int cudaLaunchKernel(const void* host, dim3 grid, dim3 block, void** parameters, size_t shared, void* stream) {
  for (int i = 0; i < kernel_count; ++i)
    if (kernels[i].host == host)
      return error = grid.y == 1 && grid.z == 1 && block.y == 1 && block.z == 1 &&
                             !launch(kernels[i].name, grid.x, block.x, shared, (uint64_t)stream, parameters)
                         ? 0
                         : FAILED;
  return error = 98;  // cudaErrorInvalidDeviceFunction
}
// CUDA 13 uses these two instead.
int __cudaGetKernel(const void** kernel, const void* host) {
  *kernel = host;
  return 0;
}
int __cudaLaunchKernel(const void* kernel, dim3 grid, dim3 block, void** parameters, size_t shared, void* stream) {
  return cudaLaunchKernel(kernel, grid, block, parameters, shared, stream);
}

int cudaGetDevice(int* out) {
  *out = device;
  return 0;
}
int cudaSetDevice(int to) {
  device = to;
  return 0;
}
int cudaGetLastError(void) {
  int last = error;
  error = 0;
  return last;
}
const char* cudaGetErrorString(int code) { return "the interpreter of the kernel has failed"; }
