// Connects driver.cpp to the CPU walker, compiled for the baseline instruction set.
#include "../../csrc/cpu/step.h"
#include "walk.h"

using fused_optim::Tables;
using fused_optim::baseline::walker;

const bool any_order = false;
int walk_step(const char* rule, const Tables& t) { return walker.step(rule, t, 2) ? 0 : -1; }
int walk_apply_update(const char* rule, const Tables& t) { return walker.apply_update(rule, t, 2) ? 0 : -1; }
const double squares_error = 1e-7;  // a few squares are summed in float32
double walk_squares(const Tables& t) { return walker.squares(t, 2); }
void walk_scale(const Tables& t) { walker.scale(t, 2); }
