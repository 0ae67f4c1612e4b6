// The rules of Schedule-Free.
#pragma once
#include "rule.h"

namespace fused_optim {

// Schedule-Free, arXiv:2405.15682, as in the package schedulefree. The param is y, at which gradients are taken, and a
// state is z. The average x is not stored. Options: warmup_steps, r, weight_lr_power, and weight_decay at y. Running:
// weight_sum, lr_max.
struct ScheduleFree {
  static constexpr int running = 2;

  // The weight of z in the average; lr after its warm-up; the step of y; weight decay.
  FUSED_HD static OwnScalars scalars(const GroupHparams& group, const BiasCorrections& at, double (&running)[2]) {
    const double lr = at.step < group.option_a ? group.lr * (at.step / group.option_a) : group.lr;
    running[1] = largest_lr(lr, running[1]);
    const double weight = positive_power(at.step, group.option_b) * positive_power(running[1], group.option_c);
    running[0] += weight;
    const double share = running[0] > 0.0 ? weight / running[0] : 0.0;
    return {share, lr, lr * (1.0 - group.beta1 * (1.0 - share)), group.option_d};
  }

  // Moves z, and returns what y is moved by.
  template <class T>
  FUSED_HD static T move(const TensorScalars<T>& h, T y, T& z, T direction) {
    const T change = fma(h.own_c, direction, h.own_a * finite(y - z));
    z = fma(-h.own_b, direction, z);
    return change;
  }
};

struct ScheduleFreeAdamW : ScheduleFree {
  static constexpr const char* name = "schedule_free_adamw";
  static constexpr bool trust = false;
  static constexpr int signed_states = 1, min_states = 2, max_states = 2;  // z, exp_avg_sq

  template <class T, int S>
  FUSED_HD static T update(const TensorScalars<T>& h, T param, T grad, T (&state)[S > 0 ? S : 1]) {
    const T exp_avg_sq = state[1] = move_average_square(state[1], grad, h.weight2, h.small_beta2);
    const T direction = grad / fma(square_root(exp_avg_sq), h.denom_scale, h.eps);
    return move(h, param, state[0], fma(h.own_d, finite(param), direction));
  }
};

struct ScheduleFreeSgd : ScheduleFree {
  static constexpr const char* name = "schedule_free_sgd";
  static constexpr bool trust = false;
  static constexpr bool has_betas = false;
  static constexpr int signed_states = 1, min_states = 1, max_states = 1;  // z

  template <class T, int S>
  FUSED_HD static T update(const TensorScalars<T>& h, T param, T grad, T (&state)[S > 0 ? S : 1]) {
    return move(h, param, state[0], fma(h.own_d, finite(param), grad));
  }
};

using ScheduleFreeRules = RuleList<ScheduleFreeAdamW, ScheduleFreeSgd>;

}  // namespace fused_optim
