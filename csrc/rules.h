// All rules. rules/rule.h says what a rule is.
#pragma once
#include "rules/adaptive.h"
#include "rules/momentum.h"
#include "rules/schedule_free.h"
#include "rules/two_walks.h"

namespace fused_optim {

// Kernels, modules and tests iterate over this list.
using AllRules = Joined<AdaptiveRules, MomentumRules, ScheduleFreeRules, TwoWalkRules>;

}  // namespace fused_optim
