// Rules of one walk with momentum alone.
#pragma once
#include "rule.h"

namespace fused_optim {

// SGD as in torch: the first update sets the buffer to the gradient. beta1 is the momentum. Options: dampening,
// nesterov.
struct Sgd {
  static constexpr const char* name = "sgd";
  static constexpr bool trust = false;
  static constexpr bool has_betas = false;
  static constexpr int signed_states = 1, min_states = 0, max_states = 1;  // momentum_buffer

  // The weights of gradient and old buffer in the new buffer; momentum; nesterov.
  FUSED_HD static OwnScalars scalars(const GroupHparams& group, const BiasCorrections& at) {
    const bool first = at.step == 1.0;
    return {first ? 1.0 : 1.0 - group.option_a, first ? 0.0 : group.beta1, group.beta1, group.option_b};
  }

  template <class T, int S>
  FUSED_HD static T update(const TensorScalars<T>& h, T /*param*/, T grad, T (&state)[S > 0 ? S : 1]) {
    if constexpr (S == 0) {
      return h.lr * grad;
    } else {
      const T buffer = state[0] = fma(h.own_b, state[0], h.own_a * grad);
      return h.lr * (h.own_d != T(0) ? fma(h.own_c, buffer, grad) : buffer);
    }
  }
};

// Lion, arXiv:2302.06675.
struct Lion {
  static constexpr const char* name = "lion";
  static constexpr bool trust = false;
  static constexpr int signed_states = 1, min_states = 1, max_states = 1;  // exp_avg

  template <class T, int S>
  FUSED_HD static T update(const TensorScalars<T>& h, T /*param*/, T grad, T (&state)[S > 0 ? S : 1]) {
    const T mixed = move_average(state[0], grad, h.weight1, h.small_beta1);
    state[0] = move_average(state[0], grad, h.weight2, h.small_beta2);
    return h.lr * sign(mixed);
  }
};

using MomentumRules = RuleList<Sgd, Lion>;

}  // namespace fused_optim
