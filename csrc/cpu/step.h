// The CPU walker's entry points, one set per instruction set.
#pragma once
#include <vector>

#include "../tables.h"
#include "probe.h"

namespace fused_optim {

struct CpuWalker {
  // Prep and update for every tensor of `t`, in one parallel region of `threads` threads; of a rule with a trust ratio
  // the first walk, which leaves `sums`. False when there is no such rule.
  bool (*step)(const char* rule, const Tables& t, int threads);
  // Its second walk: trust ratios from `sums`, and the params. Nothing for other rules.
  bool (*apply_update)(const char* rule, const Tables& t, int threads);
  // The sum of the squares of all gradients whose groups are clipped, the same to the last bit at every run.
  double (*squares)(const Tables& t, int threads);
  // Multiplies each gradient in place by what clips its group to its bound, with `t.squares` for the norm; leaves those
  // alone that stay as they are.
  void (*scale)(const Tables& t, int threads);
  // A pass with the reads and writes of a step and no arithmetic. False where there are none or too many streams.
  bool (*bandwidth_probe)(const std::vector<ProbeSpan>& spans, int written, int read, const ProbePattern& pattern);
};

namespace baseline {
extern const CpuWalker walker;
}
namespace avx2 {
extern const CpuWalker walker;
}
namespace avx512 {
extern const CpuWalker walker;
}

}  // namespace fused_optim
