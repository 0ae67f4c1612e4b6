// Launches the CUDA walker. No torch here: nvcc alone compiles this file, on any machine.
#include <cuda_runtime.h>

#include "kernels.cuh"
#include "step.h"

namespace fused_optim {
namespace {

// Makes `device` current and gives the former one back at the end of the scope.
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

}  // namespace

int launch_step_cuda(const char* rule, const Tables& t, void* stream, int device) {
  cudaError_t error = cudaSuccess;
  const bool known = visit_rule(rule, [&](auto tag) {
    using Rule = typename decltype(tag)::type;
    DeviceGuard guard(device);
    error = guard.error();
    if (error != cudaSuccess || t.tensors == 0) return;
    const auto queue = static_cast<cudaStream_t>(stream);
    prep_kernel<<<static_cast<unsigned>((t.tensors + kPrepThreads - 1) / kPrepThreads), kPrepThreads, 0, queue>>>(t);
    // A list of empty tensors has rows, whose steps advance, and no chunks.
    if (t.chunks != 0) step_kernel<Rule><<<static_cast<unsigned>(t.chunks), kThreads, 0, queue>>>(t);
    error = cudaGetLastError();
  });
  return known ? static_cast<int>(error) : kUnknownRule;
}

const char* cuda_error_text(int error) {
  return error == kUnknownRule ? "the CUDA kernels know no rule of this name"
                               : cudaGetErrorString(static_cast<cudaError_t>(error));
}

}  // namespace fused_optim
