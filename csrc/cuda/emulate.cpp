// Runs the CUDA kernels on the CPU. g++ compiles the same source, and loops replace blocks and threads. It is slow and
// meant for tests: it checks indices, alignment and memory accesses on machines without a GPU.
#define __global__ static
#define __device__ static
#define __shared__  // becomes a local variable of the block, uninitialized as on a GPU
#define __launch_bounds__(...)

namespace fused_optim {

struct Index {
  unsigned x;
};
static thread_local Index blockIdx, blockDim;

template <int kCount, class F>
void each_thread(F&& share);

// The next phase begins after all shares of this one are done, as with __syncthreads().
template <int kCount, class F>
void then_each_thread(F&& share) {
  each_thread<kCount>(share);
}

}  // namespace fused_optim

#include "kernels.cuh"
#include "scale.cuh"
#include "step.h"

namespace fused_optim {

// Every other block runs its threads in reverse order, so tests detect a share that depends on another one of the same
// phase.
template <int kCount, class F>
void each_thread(F&& share) {
  assert(kCount == blockDim.x);
  for (int i = 0; i < kCount; ++i) share(blockIdx.x % 2 == 0 ? i : kCount - 1 - i);
}

namespace {

const auto launch = [](auto* kernel, int64_t blocks, int threads, const auto&... arguments) {
  blockDim.x = static_cast<unsigned>(threads);
  for (int64_t block = 0; block < blocks; ++block) {
    blockIdx.x = static_cast<unsigned>(block);
    kernel(arguments...);
  }
};

}  // namespace

int launch_step_emulated(const char* rule, const Tables& t) {
  return visit_rule(rule, [&](auto tag) { launch_step<typename decltype(tag)::type>(t, launch); }) ? 0 : kUnknownRule;
}

int launch_apply_update_emulated(const char* rule, const Tables& t) {
  return visit_rule(rule, [&](auto tag) { launch_apply_update<typename decltype(tag)::type>(t, launch); })
             ? 0
             : kUnknownRule;
}

int launch_squares_emulated(const Tables& t, double* out) {
  launch_squares(t, out, launch);
  return 0;
}

int launch_scale_emulated(const Tables& t) {
  launch_scale(t, launch);
  return 0;
}

}  // namespace fused_optim
