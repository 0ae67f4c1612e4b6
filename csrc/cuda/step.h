// The CUDA walker's entry points.
#pragma once
#include "../tables.h"

namespace fused_optim {

constexpr int kUnknownRule = -1;

// These functions queue kernels on `stream`, a cudaStream_t, and do not wait for them. They return 0, or an error code
// for cuda_error_text. Arrays and tensors of `t` must be in the memory of `device`.

// Preps and updates every tensor. For a rule with a trust ratio it is the first walk, which writes `sums`.
int launch_step_cuda(const char* rule, const Tables& t, void* stream, int device);
// The second walk of a rule with a trust ratio. Computes the ratios from `sums`, writes them to `trust`, and updates
// the params. Does nothing for other rules.
int launch_apply_update_cuda(const char* rule, const Tables& t, void* stream, int device);
// Writes the sum of the squares of all gradients whose groups are clipped to out[0]. Every run gives the same bits.
int launch_squares_cuda(const Tables& t, double* out, void* stream, int device);
// Multiplies each gradient in place by the clip coefficient of its group. The norm comes from `t.squares`. Gradients
// with a coefficient of 1 are not written.
int launch_scale_cuda(const Tables& t, void* stream, int device);
const char* cuda_error_text(int error);

// Run the same kernels on the CPU, one thread after the other, on tables and tensors in CPU memory. They return 0 or
// kUnknownRule.
int launch_step_emulated(const char* rule, const Tables& t);
int launch_apply_update_emulated(const char* rule, const Tables& t);
int launch_squares_emulated(const Tables& t, double* out);
int launch_scale_emulated(const Tables& t);

}  // namespace fused_optim
