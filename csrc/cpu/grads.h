// The CPU walker's passes over gradients alone, one set per instruction set; step.h says what they do.
#pragma once
#include "stream.h"

namespace fused_optim::FUSED_ISA {

double squares(const Tables& t, int threads);
void scale(const Tables& t, int threads);

}  // namespace fused_optim::FUSED_ISA
