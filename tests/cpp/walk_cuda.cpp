// Connects driver.cpp to the emulated CUDA kernels.
#include <cmath>

#include "../../csrc/cuda/step.h"
#include "walk.h"

using fused_optim::Tables;

const bool any_order = true;
int walk_step(const char* rule, const Tables& t) { return fused_optim::launch_step_emulated(rule, t); }
int walk_apply_update(const char* rule, const Tables& t) { return fused_optim::launch_apply_update_emulated(rule, t); }
const double squares_error = 1e-13;
double walk_squares(const Tables& t) {
  double out = NAN;
  return fused_optim::launch_squares_emulated(t, &out) == 0 ? out : NAN;
}
void walk_scale(const Tables& t) { fused_optim::launch_scale_emulated(t); }
