// Functions of the CPU walker that step.cpp does not define, one set per instruction set. step.h describes them.
#pragma once
#include <vector>

#include "../tables.h"
#include "formats.h"
#include "probe.h"

namespace fused_optim::FUSED_ISA {

double squares(const Tables& t, int threads);
void scale(const Tables& t, int threads);
bool bandwidth_probe(const std::vector<ProbeSpan>& spans, int written, int read, const ProbePattern& pattern);

}  // namespace fused_optim::FUSED_ISA
