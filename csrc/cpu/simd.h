// Which instruction set the CPU walker runs with on this machine.
#pragma once
#include "step.h"

namespace fused_optim {

struct InstructionSet {
  const char* name;
  StepFunction step;
};

// The widest one that the processor has and the build holds; FUSED_OPTIM_ISA names a narrower one. Chosen once.
const InstructionSet& instruction_set();

// A pass with the reads and writes of a step and no arithmetic: what the memory allows. Sizes in bytes, the same for
// all streams of one tensor.
void floor_pass(const int64_t* addresses, const int64_t* sizes, int64_t tensors, int written, int read, int threads);

}  // namespace fused_optim
