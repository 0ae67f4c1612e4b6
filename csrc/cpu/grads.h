// Functions of the CPU walker that step.cpp does not define, one set per instruction set. step.h describes them.
#pragma once
#include "stream.h"

namespace fused_optim::FUSED_ISA {

double squares(const Tables& t, int threads);
void scale(const Tables& t, int threads);
bool floor_pass(const std::vector<FloorSpan>& spans, int written, int read, const FloorPattern& pattern);

}  // namespace fused_optim::FUSED_ISA
