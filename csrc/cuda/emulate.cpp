// The CUDA kernels on the CPU: g++ compiles their very lines, and two loops stand in for blocks and threads, which
// never speak to each other here. Slow, and meant for tests: it proves indices, alignment and memory where no GPU is.
#define __global__ static
#define __launch_bounds__(...)

namespace fused_optim {
struct Index {
  unsigned x;
};
static thread_local Index blockIdx, threadIdx;
}  // namespace fused_optim

#include "kernels.cuh"
#include "step.h"

namespace fused_optim {
namespace {

template <class Kernel>
void launch(Kernel kernel, int64_t blocks, int threads, const Tables& t) {
  for (int64_t block = 0; block < blocks; ++block) {
    for (int thread = 0; thread < threads; ++thread) {
      blockIdx.x = static_cast<unsigned>(block);
      threadIdx.x = static_cast<unsigned>(thread);
      kernel(t);
    }
  }
}

}  // namespace

int launch_step_emulated(const char* rule, const Tables& t) {
  const bool known = visit_rule(rule, [&](auto tag) {
    using Rule = typename decltype(tag)::type;
    launch(prep_kernel, (t.tensors + kPrepThreads - 1) / kPrepThreads, kPrepThreads, t);
    launch(step_kernel<Rule>, t.chunks, kThreads, t);
  });
  return known ? 0 : kUnknownRule;
}

}  // namespace fused_optim
