// Maps run-time values (a rule's name, a row's signature) to template arguments.
#pragma once
#include <cstdint>
#include <type_traits>

#include "rules.h"
#include "tables.h"

namespace fused_optim {

// Calls f(Tag<Rule>{}) for the rule of this name. Returns false if there is none.
template <class F>
bool visit_rule(const char* name, F&& f) {
  return AllRules::visit(name, static_cast<F&&>(f));
}

// Calls f(std::integral_constant<int, S>{}), where S is the number of states in the signature, clamped to the rule's
// min_states and max_states.
template <class Rule, int S = Rule::min_states, class F>
FUSED_HD void visit_states(int64_t signature, F&& f) {
  if constexpr (S < Rule::max_states) {
    if (format_of(signature, kStreamState0 + S) != kAbsent) {
      visit_states<Rule, S + 1>(signature, static_cast<F&&>(f));
      return;
    }
  }
  f(std::integral_constant<int, S>{});
}

}  // namespace fused_optim
