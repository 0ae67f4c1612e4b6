// The CUDA kernels, emulated, as a walker for driver.cpp.
#include "../../csrc/cuda/step.h"

int walk(const char* rule, const fused_optim::Tables& t) { return fused_optim::launch_step_emulated(rule, t); }
