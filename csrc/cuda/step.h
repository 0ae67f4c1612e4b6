// The CUDA walker's entry points.
#pragma once
#include "../tables.h"

namespace fused_optim {

constexpr int kUnknownRule = -1;

// Queues prep and update of every tensor of `t` (arrays and tensors in the memory of `device`) on `stream`, a
// cudaStream_t, and returns at once. 0, or what cuda_error_text explains.
int launch_step_cuda(const char* rule, const Tables& t, void* stream, int device);
const char* cuda_error_text(int error);

// The same kernels run by the CPU, one thread after the other, on tables and tensors in its memory. 0 or kUnknownRule.
int launch_step_emulated(const char* rule, const Tables& t);

}  // namespace fused_optim
