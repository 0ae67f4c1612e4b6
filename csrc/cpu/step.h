// The entry points of the CPU walker. There is one CpuWalker per instruction set.
#pragma once
#include <vector>

#include "../tables.h"
#include "probe.h"

namespace fused_optim {

struct CpuWalker {
  // Preps and updates every tensor of `t`, in one parallel region of at most `threads` threads. For a rule with a
  // trust ratio it is the first walk, which writes `sums`. Returns false if there is no such rule.
  bool (*step)(const char* rule, const Tables& t, int threads);
  // The second walk of a rule with a trust ratio: computes the ratios from `sums` and updates the params. Does nothing
  // for other rules. Returns false if there is no such rule.
  bool (*apply_update)(const char* rule, const Tables& t, int threads);
  // Returns the sum of the squares of all gradients whose groups are clipped. Every run gives the same bits.
  double (*squares)(const Tables& t, int threads);
  // Multiplies each gradient in place by the clip coefficient of its group. The norm comes from `t.squares`. Gradients
  // with a coefficient of 1 are not written.
  void (*scale)(const Tables& t, int threads);
  // A pass with the reads and writes of a step, without arithmetic. Returns false if `written` or `read` is out of
  // range.
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
