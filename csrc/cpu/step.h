// The CPU walker's entry points, one set per instruction set.
#pragma once
#include "../tables.h"

namespace fused_optim {

// Prep and update for every tensor of `t`, in one parallel region of `threads` threads. False when there is no such
// rule.
using StepFunction = bool (*)(const char* rule, const Tables& t, int threads);

namespace baseline {
bool step(const char* rule, const Tables& t, int threads);
}
namespace avx2 {
bool step(const char* rule, const Tables& t, int threads);
}
namespace avx512 {
bool step(const char* rule, const Tables& t, int threads);
}

}  // namespace fused_optim
