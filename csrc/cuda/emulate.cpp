// The CUDA kernels on the CPU: g++ compiles their very lines, and loops stand in for blocks and threads. Slow, and
// meant for tests: it proves indices, alignment and memory where no GPU is.
#define __global__ static
#define __device__ static
#define __shared__  // a block's own variables, nothing in them at its start
#define __launch_bounds__(...)

namespace fused_optim {

struct Index {
  unsigned x;
};
static thread_local Index blockIdx, blockDim;

template <int kCount, class F>
void each_thread(F&& share);

// All shares of one phase are done before the next begins.
template <int kCount, class F>
void then_each_thread(F&& share) {
  each_thread<kCount>(share);
}

}  // namespace fused_optim

#include "kernels.cuh"
#include "scale.cuh"
#include "step.h"

namespace fused_optim {

// Every other block backwards: no share may count on another one of the same phase being done.
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
