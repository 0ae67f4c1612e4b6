// Which instruction set the CPU walker runs with on this machine.
#pragma once
#include "step.h"

namespace fused_optim {

struct InstructionSet {
  const char* name;
  const CpuWalker& walker;
};

// The widest one that the processor has and the build holds; FUSED_OPTIM_ISA names a narrower one. Chosen once.
const InstructionSet& instruction_set();

}  // namespace fused_optim
