// The CUDA walker's entry points.
#pragma once
#include "../tables.h"

namespace fused_optim {

constexpr int kUnknownRule = -1;

// These queue kernels on `stream`, a cudaStream_t, and return at once; arrays and tensors of `t` lie in the memory of
// `device`. 0, or what cuda_error_text explains.
// Prep and update of every tensor; of a rule with a trust ratio the first walk, which leaves `sums`.
int launch_step_cuda(const char* rule, const Tables& t, void* stream, int device);
// The second walk of a rule with a trust ratio: ratios from `sums` into `trust`, and the params. Nothing for other
// rules.
int launch_apply_update_cuda(const char* rule, const Tables& t, void* stream, int device);
// out[0]: the sum of the squares of all gradients whose groups are clipped, the same to the last bit at every run.
int launch_squares_cuda(const Tables& t, double* out, void* stream, int device);
// Multiplies each gradient in place by what clips its group to its bound, with `t.squares` for the norm; leaves those
// alone that stay as they are.
int launch_scale_cuda(const Tables& t, void* stream, int device);
const char* cuda_error_text(int error);

// The same kernels run by the CPU, one thread after the other, on tables and tensors in its memory. 0 or kUnknownRule.
int launch_step_emulated(const char* rule, const Tables& t);
int launch_apply_update_emulated(const char* rule, const Tables& t);
int launch_squares_emulated(const Tables& t, double* out);
int launch_scale_emulated(const Tables& t);

}  // namespace fused_optim
