// The scalars of a row on the CPU, computed once for consecutive rows of the same group and step.
#pragma once
#include "../prep.h"

#ifndef FUSED_ISA
#define FUSED_ISA baseline
#endif

namespace fused_optim::FUSED_ISA {
namespace {

// The scalars of the last row that a thread opened. Rows of the same group and step have the same scalars, unless they
// have running scalars.
struct LastRow {
  BiasCorrections at{};
  Preparation from{-1, 0.0, false, 0};
  double scalars[kScalarWidth]{};
};

constexpr struct Skipped {
  double scalars[kScalarWidth]{};
  constexpr Skipped() { scalars[kScalarSkip] = 1.0; }
} kSkipped;

// Counts the step of a row and returns its scalars.
template <class Rule>
const double* open_row(const Tables& t, int64_t row, LastRow& last) {
  if (is_skipped(t, row)) return kSkipped.scalars;
  const Preparation from = count_step<Rule>(t, row);
  const bool same = from.group == last.from.group && from.step == last.from.step && from.copies == last.from.copies &&
                    (from.largest_lr | last.from.largest_lr) == 0;
  if (RunningCount<Rule>::value > 0 || !same) write_scalars<Rule>(t, row, last.from = from, last.at, last.scalars);
  return last.scalars;
}

}  // namespace
}  // namespace fused_optim::FUSED_ISA
