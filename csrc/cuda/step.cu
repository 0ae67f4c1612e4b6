// Launches the CUDA walker. This file does not include torch, so nvcc alone compiles it, also without a GPU.
#include <cuda_runtime.h>

#include "kernels.cuh"
#include "scale.cuh"
#include "step.h"

namespace fused_optim {
namespace {

// Makes `device` current and restores the previous device at the end of the scope.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) : error_(cudaGetDevice(&former_)) {
    if (error_ == cudaSuccess && former_ != device) error_ = cudaSetDevice(device);
  }
  ~DeviceGuard() { cudaSetDevice(former_); }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

  cudaError_t error() const { return error_; }

 private:
  int former_ = 0;
  cudaError_t error_;
};

// Calls queue(launch), where `launch` queues a kernel on `stream`.
template <class F>
cudaError_t queue_on(void* stream, int device, F&& queue) {
  DeviceGuard guard(device);
  if (guard.error() != cudaSuccess) return guard.error();
  queue([&](auto* kernel, int64_t blocks, int threads, const auto&... arguments) {
    // CUDA refuses a grid of 0 blocks. An empty table has no rows. A table of empty tensors has rows, whose steps
    // advance, but no chunks.
    if (blocks != 0)
      kernel<<<static_cast<unsigned>(blocks), threads, 0, static_cast<cudaStream_t>(stream)>>>(arguments...);
  });
  return cudaGetLastError();
}

}  // namespace

int launch_step_cuda(const char* rule, const Tables& t, void* stream, int device) {
  cudaError_t error = cudaSuccess;
  const bool known = visit_rule(rule, [&](auto tag) {
    error = queue_on(stream, device, [&](auto launch) { launch_step<typename decltype(tag)::type>(t, launch); });
  });
  return known ? static_cast<int>(error) : kUnknownRule;
}

int launch_apply_update_cuda(const char* rule, const Tables& t, void* stream, int device) {
  cudaError_t error = cudaSuccess;
  const bool known = visit_rule(rule, [&](auto tag) {
    error =
        queue_on(stream, device, [&](auto launch) { launch_apply_update<typename decltype(tag)::type>(t, launch); });
  });
  return known ? static_cast<int>(error) : kUnknownRule;
}

int launch_squares_cuda(const Tables& t, double* out, void* stream, int device) {
  return queue_on(stream, device, [&](auto launch) { launch_squares(t, out, launch); });
}

int launch_scale_cuda(const Tables& t, void* stream, int device) {
  return queue_on(stream, device, [&](auto launch) { launch_scale(t, launch); });
}

const char* cuda_error_text(int error) {
  return error == kUnknownRule ? "the CUDA kernels know no rule of this name"
                               : cudaGetErrorString(static_cast<cudaError_t>(error));
}

}  // namespace fused_optim
