// Rules of one walk with an average of squared gradients, or their sum.
#pragma once
#include "rule.h"

namespace fused_optim {

// Adam, arXiv:1412.6980. With a third state it is AMSGrad, Reddi et al., ICLR 2018. As in torch, the maximum is taken
// before bias correction.
struct Adam {
  static constexpr const char* name = "adam";
  static constexpr bool trust = false;
  static constexpr int signed_states = 1, min_states = 2, max_states = 3;  // exp_avg, exp_avg_sq, max_exp_avg_sq

  template <class T, int S>
  FUSED_HD static T update(const TensorScalars<T>& h, T /*param*/, T grad, T (&state)[S > 0 ? S : 1]) {
    T exp_avg = state[0] = move_average(state[0], grad, h.weight1, h.small_beta1);
    T exp_avg_sq = state[1] = move_average_square(state[1], grad, h.weight2, h.small_beta2);
    if constexpr (S == 3) exp_avg_sq = state[2] = maximum(state[2], exp_avg_sq);
    return h.step_size * (exp_avg / fma(square_root(exp_avg_sq), h.denom_scale, h.eps));
  }
};

// QHAdam, arXiv:1810.06801, section 4.2. Options: nu1, nu2.
struct QHAdam {
  static constexpr const char* name = "qhadam";
  static constexpr bool trust = false;
  static constexpr int signed_states = 1, min_states = 2, max_states = 2;  // exp_avg, exp_avg_sq

  // The weights of the gradient and of its square in the two means.
  FUSED_HD static OwnScalars scalars(const GroupHparams& group, const BiasCorrections&) {
    return {1.0 - group.option_a, 1.0 - group.option_b};
  }

  template <class T, int S>
  FUSED_HD static T update(const TensorScalars<T>& h, T /*param*/, T grad, T (&state)[S > 0 ? S : 1]) {
    const T exp_avg = state[0] = move_average(state[0], grad, h.weight1, h.small_beta1);
    const T exp_avg_sq = state[1] = move_average_square(state[1], grad, h.weight2, h.small_beta2);
    const T mean = lerp(h.debias * exp_avg, grad, h.own_a);
    const T mean_sq = lerp_square(h.denom_scale * h.denom_scale * exp_avg_sq, grad, h.own_b);
    return h.lr * (mean / (square_root(mean_sq) + h.eps));
  }
};

// Adagrad, Duchi et al., JMLR 2011, as in torch. Option: lr_decay.
struct Adagrad {
  static constexpr const char* name = "adagrad";
  static constexpr bool trust = false;
  static constexpr int signed_states = 0, min_states = 1, max_states = 1;  // sum

  // The decayed lr.
  FUSED_HD static OwnScalars scalars(const GroupHparams& group, const BiasCorrections& at) {
    return {group.lr / (1.0 + (at.step - 1.0) * group.option_a)};
  }

  template <class T, int S>
  FUSED_HD static T update(const TensorScalars<T>& h, T /*param*/, T grad, T (&state)[S > 0 ? S : 1]) {
    state[0] = fma(grad, grad, state[0]);
    return h.own_a * (grad / (square_root(state[0]) + h.eps));
  }
};

// NAdam, Dozat, ICLR 2016 workshop, as in torch. Option: momentum_decay. Running: the product of all momentums so far.
struct NAdam {
  static constexpr const char* name = "nadam";
  static constexpr bool trust = false;
  static constexpr int signed_states = 1, min_states = 2, max_states = 2;  // exp_avg, exp_avg_sq
  static constexpr int running = 1;                                        // mu_product

  FUSED_HD static double momentum(const GroupHparams& group, double step) {
    constexpr double kLog = -0.040821994520255166;  // of 0.96
    return group.beta1 * (1.0 - 0.5 * ::exp(kLog * group.option_a * step));
  }

  // The weights of the gradient and of exp_avg in the mean; the bias correction of exp_avg_sq, before the root.
  FUSED_HD static OwnScalars scalars(const GroupHparams& group, const BiasCorrections& at, double (&product)[1]) {
    const double now = momentum(group, at.step), next = momentum(group, at.step + 1.0);
    product[0] = static_cast<float>(product[0]) * static_cast<float>(now);  // in float32, as in torch
    return {(1.0 - now) / (1.0 - product[0]), next / (1.0 - product[0] * next), 1.0 / at.correction2};
  }

  template <class T, int S>
  FUSED_HD static T update(const TensorScalars<T>& h, T /*param*/, T grad, T (&state)[S > 0 ? S : 1]) {
    const T exp_avg = state[0] = move_average(state[0], grad, h.weight1, h.small_beta1);
    const T exp_avg_sq = state[1] = move_average_square(state[1], grad, h.weight2, h.small_beta2);
    const T mean = fma(h.own_b, exp_avg, h.own_a * grad);
    return h.lr * (mean / (square_root(h.own_c * exp_avg_sq) + h.eps));
  }
};

// RAdam, arXiv:1908.03265, as in torch.
struct RAdam {
  static constexpr const char* name = "radam";
  static constexpr bool trust = false;
  static constexpr int signed_states = 1, min_states = 2, max_states = 2;  // exp_avg, exp_avg_sq

  // The step size; whether exp_avg is divided by the root. It is not while the average of squares has few summands.
  FUSED_HD static OwnScalars scalars(const GroupHparams& group, const BiasCorrections& at) {
    const double longest = 2.0 / (1.0 - group.beta2) - 1.0, step_size = group.lr / at.correction1;
    const double length = longest - 2.0 * at.step * (1.0 - at.correction2) / at.correction2;
    if (!(length > 5.0)) return {step_size, 0.0};
    const double rectified = (length - 4.0) * (length - 2.0) * longest / ((longest - 4.0) * (longest - 2.0) * length);
    return {step_size * ::sqrt(rectified * at.correction2), 1.0};
  }

  template <class T, int S>
  FUSED_HD static T update(const TensorScalars<T>& h, T /*param*/, T grad, T (&state)[S > 0 ? S : 1]) {
    const T exp_avg = state[0] = move_average(state[0], grad, h.weight1, h.small_beta1);
    const T exp_avg_sq = state[1] = move_average_square(state[1], grad, h.weight2, h.small_beta2);
    const T root = square_root(exp_avg_sq) + h.eps;
    return h.own_a * (exp_avg / (h.own_b != T(0) ? root : T(1)));
  }
};

// AdEMAMix, arXiv:2409.03137, as in Apple's ml-ademamix. Options: alpha, alpha_warmup, beta3_warmup.
struct AdEMAMix {
  static constexpr const char* name = "ademamix";
  static constexpr bool trust = false;
  static constexpr int signed_states = 2, min_states = 3, max_states = 3;  // exp_avg_fast, exp_avg_slow, exp_avg_sq

  // 1 - beta3; beta3 if it is small; alpha. In the warm-up the half-life of the slow average grows linearly.
  FUSED_HD static OwnScalars scalars(const GroupHparams& group, const BiasCorrections& at) {
    const double alpha = group.option_a * (at.step < group.option_b ? at.step / group.option_b : 1.0);
    double beta3 = group.beta3;
    if (at.step < group.option_c) {
      const double done = at.step / group.option_c;
      beta3 = ::exp(1.0 / ((1.0 - done) / ::log(group.beta1 + 1e-8) + done / ::log(group.beta3 + 1e-8)));
    }
    return {1.0 - beta3, beta3 < 0.5 ? beta3 : 0.0, alpha};
  }

  template <class T, int S>
  FUSED_HD static T update(const TensorScalars<T>& h, T /*param*/, T grad, T (&state)[S > 0 ? S : 1]) {
    const T fast = state[0] = move_average(state[0], grad, h.weight1, h.small_beta1);
    const T slow = state[1] = move_average(state[1], grad, h.own_a, h.own_b);
    const T exp_avg_sq = state[2] = move_average_square(state[2], grad, h.weight2, h.small_beta2);
    return h.lr * (fma(h.own_c, slow, h.debias * fast) / fma(square_root(exp_avg_sq), h.denom_scale, h.eps));
  }
};

// ADOPT, arXiv:2411.02853. The first step only sets exp_avg_sq. Options: factor and exponent of the clipping bound.
struct Adopt {
  static constexpr const char* name = "adopt";
  static constexpr bool trust = false;
  static constexpr int signed_states = 1, min_states = 2, max_states = 2;  // exp_avg, exp_avg_sq

  // The weight of the square; the bound of the normalised gradient; the least divisor. With the bound 0 nothing moves.
  FUSED_HD static OwnScalars scalars(const GroupHparams& group, const BiasCorrections& at) {
    if (at.step == 1.0) return {1.0, 0.0, 1.0};
    return {1.0 - group.beta2, group.option_a * ::exp(group.option_b * ::log(at.step - 1.0)), group.eps};
  }

  template <class T, int S>
  FUSED_HD static T update(const TensorScalars<T>& h, T /*param*/, T grad, T (&state)[S > 0 ? S : 1]) {
    const T normed = grad / maximum(square_root(state[1]), h.own_c);
    const T clipped = normed > h.own_b ? h.own_b : normed < -h.own_b ? -h.own_b : normed;
    state[0] = move_average(state[0], clipped, h.weight1, h.small_beta1);
    state[1] = fma(h.own_a * grad, grad, keep(state[1], bounded(state[1]), h.weight2, h.small_beta2));
    return h.lr * state[0];
  }
};

// Adan, arXiv:2208.06677, as in sail-sg/Adan.
struct Adan {
  static constexpr const char* name = "adan";
  static constexpr bool trust = false;
  // exp_avg, exp_avg_diff, neg_pre_grad, exp_avg_sq
  static constexpr int signed_states = 3, min_states = 4, max_states = 4;

  // The rate of exp_avg_diff; 0 in the first step, which has no difference; the bias correction of the root of
  // exp_avg_sq; 1 - beta3; beta3 if it is small.
  FUSED_HD static OwnScalars scalars(const GroupHparams& group, const BiasCorrections& at) {
    return {group.lr * group.beta2 / at.correction2, at.step == 1.0 ? 0.0 : 1.0, 1.0 / ::sqrt(at.correction3),
            1.0 - group.beta3, group.beta3 < 0.5 ? group.beta3 : 0.0};
  }

  template <class T, int S>
  FUSED_HD static T update(const TensorScalars<T>& h, T /*param*/, T grad, T (&state)[S > 0 ? S : 1]) {
    const T change = h.own_b * (grad + state[2]);
    const T exp_avg = state[0] = move_average(state[0], grad, h.weight1, h.small_beta1);
    const T exp_avg_diff = state[1] = move_average(state[1], change, h.weight2, h.small_beta2);
    state[2] = -grad;
    const T ahead = grad + keep(change, change, h.weight2, h.small_beta2);
    const T exp_avg_sq = state[3] = move_average_square(state[3], ahead, h.own_d, h.own_e);
    return fma(h.own_a, exp_avg_diff, h.step_size * exp_avg) / fma(square_root(exp_avg_sq), h.own_c, h.eps);
  }
};

using AdaptiveRules = RuleList<Adam, QHAdam, Adagrad, NAdam, RAdam, AdEMAMix, Adopt, Adan>;

}  // namespace fused_optim
