// The CPU walker, without vector instructions of its own choice, as a walker for driver.cpp.
#include "../../csrc/cpu/step.h"

int walk(const char* rule, const fused_optim::Tables& t) { return fused_optim::baseline::step(rule, t, 2) ? 0 : -1; }
