// Rules of two walks. Between the walks the ratio of each tensor is computed, or torch orthogonalizes the update.
#pragma once
#include "rule.h"

namespace fused_optim {

// LAMB, arXiv:1904.00962, as in NVIDIA Apex. Options: grad_averaging, bias_correction.
struct Lamb {
  static constexpr const char* name = "lamb";
  static constexpr bool trust = true, scales_decay = true;
  static constexpr int signed_states = 1, min_states = 2, max_states = 2;  // exp_avg, exp_avg_sq

  // The weight of the gradient in exp_avg; debias and denom_scale, or 1 without bias correction.
  FUSED_HD static OwnScalars scalars(const GroupHparams& group, const BiasCorrections& at) {
    const bool debias = group.option_b != 0.0;
    return {group.option_a != 0.0 ? 1.0 - group.beta1 : 1.0, debias ? 1.0 / at.correction1 : 1.0,
            debias ? 1.0 / ::sqrt(at.correction2) : 1.0};
  }

  template <class T, int S>
  FUSED_HD static void update_moments(const TensorScalars<T>& h, T grad, T (&state)[S]) {
    state[0] = fma(h.own_a, grad, keep(state[0], state[0], h.weight1, h.small_beta1));
    state[1] = move_average_square(state[1], grad, h.weight2, h.small_beta2);
  }

  template <class T, int S>
  FUSED_HD static T direction(const TensorScalars<T>& h, const T (&state)[S]) {
    return h.own_b * (state[0] / fma(square_root(state[1]), h.own_c, h.eps));
  }

  // The param, and the update with decay.
  template <class T, int S>
  FUSED_HD static Measured<T> measure(const TensorScalars<T>& h, T param, T /*grad*/, const T (&state)[S]) {
    return {param, fma(h.decay, finite(param), direction<T, S>(h, state))};
  }

  FUSED_HD static double ratio(const GroupHparams& group, double params, double updates) {
    if (group.weight_decay == 0.0 && group.trust_always == 0.0) return 1.0;
    const double param = ::sqrt(params), update = ::sqrt(updates);
    const double ratio = param != 0.0 && update != 0.0 ? param / update : 1.0;
    const double least = ratio < group.trust_low ? group.trust_low : ratio;
    return least > group.trust_high ? group.trust_high : least;
  }
};

// StableAdamW, arXiv:2304.13013, algorithm 2.
struct StableAdamW {
  static constexpr const char* name = "stableadamw";
  static constexpr bool trust = true, scales_decay = true;
  static constexpr int signed_states = 1, min_states = 2, max_states = 2;  // exp_avg, exp_avg_sq

  // A debiased beta: beta (1 - beta**(step - 1)) / (1 - beta**step), if it is small. weight: 1 minus it.
  FUSED_HD static double small(double beta, double step, double correction, double weight) {
    if (weight <= 0.5) return 0.0;
    // 1 - weight loses digits for a small beta, and 1 - beta**(step - 1) for a large one.
    return beta < 0.5 ? beta * (1.0 - positive_power(beta, step - 1.0)) / correction : 1.0 - weight;
  }

  // 1 - beta of the debiased betas; these betas if they are small.
  FUSED_HD static OwnScalars scalars(const GroupHparams& group, const BiasCorrections& at) {
    const double weight1 = (1.0 - group.beta1) / at.correction1, weight2 = (1.0 - group.beta2) / at.correction2;
    return {weight1, weight2, small(group.beta1, at.step, at.correction1, weight1),
            small(group.beta2, at.step, at.correction2, weight2)};
  }

  template <class T, int S>
  FUSED_HD static void update_moments(const TensorScalars<T>& h, T grad, T (&state)[S]) {
    state[0] = move_average(state[0], grad, h.own_a, h.own_c);
    state[1] = move_average_square(state[1], grad, h.own_b, h.own_d);
  }

  template <class T, int S>
  FUSED_HD static T direction(const TensorScalars<T>& h, const T (&state)[S]) {
    return state[0] / (square_root(state[1]) + h.eps);
  }

  // 1, which counts the elements, and the gradient over the root of exp_avg_sq.
  template <class T, int S>
  FUSED_HD static Measured<T> measure(const TensorScalars<T>& h, T /*param*/, T grad, const T (&state)[S]) {
    return {T(1), grad / maximum(square_root(state[1]), h.eps)};
  }

  FUSED_HD static double ratio(const GroupHparams&, double count, double squares) {
    const double rms = count > 0.0 ? ::sqrt(squares / count) : 0.0;
    return rms <= 1.0 ? 1.0 : 1.0 / rms;
  }
};

// Muon, Jordan et al., 2024, as in torch. The first walk puts the update into the second state, a workspace, and torch
// orthogonalizes it there. Options: momentum, nesterov.
struct Muon {
  static constexpr const char* name = "muon";
  static constexpr bool trust = true, scales_decay = false;
  static constexpr bool has_betas = false;
  static constexpr int signed_states = 2, min_states = 2, max_states = 2;  // momentum_buffer, workspace

  // 1 - momentum; momentum if it is below 0.5, otherwise 0; nesterov.
  FUSED_HD static OwnScalars scalars(const GroupHparams& group, const BiasCorrections&) {
    return {1.0 - group.option_a, group.option_a < 0.5 ? group.option_a : 0.0, group.option_b};
  }

  template <class T, int S>
  FUSED_HD static void update_moments(const TensorScalars<T>& h, T grad, T (&state)[S]) {
    state[0] = move_average(state[0], grad, h.own_a, h.own_b);
    state[1] = h.own_c != T(0) ? move_average(state[0], grad, h.own_a, h.own_b) : state[0];
  }

  template <class T, int S>
  FUSED_HD static T direction(const TensorScalars<T>& /*h*/, const T (&state)[S]) {
    return state[1];
  }

  // The update, whose norm the orthogonalization needs.
  template <class T, int S>
  FUSED_HD static Measured<T> measure(const TensorScalars<T>& /*h*/, T /*param*/, T /*grad*/, const T (&state)[S]) {
    return {T(0), state[1]};
  }

  FUSED_HD static double ratio(const GroupHparams&, double, double) { return 1.0; }
};

using TwoWalkRules = RuleList<Lamb, StableAdamW, Muon>;

}  // namespace fused_optim
