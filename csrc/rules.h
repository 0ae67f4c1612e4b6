// Rules: the arithmetic of each optimizer, on values. Rules use no pointers, torch or CUDA headers, so g++ and nvcc
// compile the same code. A rule gets the scalars of the tensor, and the param, the gradient and the S states of one
// element. It changes the states and returns the update that the walker subtracts from the param. T is float, or double
// for float64 tensors.
//
// A rule with `trust` is walked twice, because the update of each tensor is multiplied by a ratio that depends on the
// whole tensor. The first walk calls `update_moments`, which changes the states, and sums the squares of the two
// numbers that `measure` makes of each element. `ratio` makes the ratio of both sums. In the second walk `direction`
// computes the update from the states alone, before lr and decay. `scales_decay`: whether the ratio multiplies
// decoupled decay, too.
//
// A rule declares its minimum and maximum number of states, and how many of its states can be negative. Those come
// first. A rule can have a function `scalars`, which computes the rule's own scalars from the options of the tensor's
// group. A rule that declares a number of `running` scalars gets these as a third argument of `scalars`, which may
// change them: numbers of the tensor that carry over from step to step.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "layout.h"

namespace fused_optim {

FUSED_HD uint32_t float_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

FUSED_HD float bits_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// A rule's own scalars. Its function `scalars` computes them in double precision, once per tensor and step. The rule
// reads them as own_a to own_f.
struct OwnScalars {
  double a = 0.0, b = 0.0, c = 0.0, d = 0.0, e = 0.0, f = 0.0;
};

// Two numbers of an element, whose squares are summed over its tensor.
template <class T>
struct Measured {
  T first, second;
};

// The step of a tensor, counted from 1, and 1 - beta**step of the betas.
struct BiasCorrections {
  double beta1, beta2, beta3, step, correction1, correction2, correction3;
};

// The larger of lr and the largest lr before, which is stored as float32. A constant lr stays the largest.
FUSED_HD double largest_lr(double lr, double before) { return static_cast<float>(lr) >= before ? lr : before; }

// base**exponent for base >= 0. nvcc makes a call of ::pow, and inlines these.
FUSED_HD double positive_power(double base, double exponent) {
  return exponent == 0.0 ? 1.0 : ::exp(exponent * ::log(base));
}

// GCC vectorises these builtins. Without FMA hardware they would be one library call per element, so the product is
// rounded separately instead.
template <class T>
FUSED_HD T fma(T a, T b, T c) {
#if defined(__CUDACC__) || defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  if constexpr (sizeof(T) == 4) return __builtin_fmaf(a, b, c);
  else return __builtin_fma(a, b, c);
#else
  return a * b + c;
#endif
}

template <class T>
FUSED_HD T square_root(T x) {
  if constexpr (sizeof(T) == 4) return __builtin_sqrtf(x);
  else return __builtin_sqrt(x);
}

template <class T>
FUSED_HD constexpr T largest() {
  return std::numeric_limits<T>::max();
}

template <class T>
FUSED_HD T absolute(T x) {
  if constexpr (sizeof(T) == 4) return __builtin_fabsf(x);
  else return __builtin_fabs(x);
}

// x, or 0 where it is inf or NaN: 0 * inf would be NaN.
template <class T>
FUSED_HD T finite(T x) {
  return absolute(x) <= largest<T>() ? x : T(0);
}

// min(x, largest finite number), for x >= 0. Non-negative floats have the same order as their bits read as integers.
// The minimum of two integers is one instruction; a select of floats is two.
template <class T>
FUSED_HD T bounded(T x) {
  if constexpr (sizeof(T) == 4) {
    const int32_t bits = static_cast<int32_t>(float_bits(x)), most = static_cast<int32_t>(float_bits(largest<float>()));
    return bits_float(static_cast<uint32_t>(bits < most ? bits : most));
  } else {
    return x < largest<T>() ? x : largest<T>();
  }
}

// (1 - weight) * average + weight * x. `weight` is 1 - beta, rounded once from float64. For beta from 0.5, 1 - weight
// is closer to beta than beta rounded to float, and the two weights sum to 1. With weight 1 (beta 0) the result is x if
// the average is finite.
template <class T>
FUSED_HD T lerp(T average, T x, T weight) {
  return fma(weight, x, fma(-weight, average, average));
}

// (1 - weight) * average + weight * x * x. x * x alone is not computed, because it can overflow where weight * x * x
// does not. An infinite average stays inf: unbounded, inf - inf would give NaN.
template <class T>
FUSED_HD T lerp_square(T average, T x, T weight) {
  return fma(weight * x, x, fma(-weight, bounded(average), average));
}

// beta * average. For beta from 0.5, small_beta is 0 and beta is computed as 1 - weight, as in lerp. Below 0.5 the
// rounding error of the weight is large relative to beta. Then small_beta is beta, rounded once. It is constant for a
// tensor. factor: the average, or a finite number in place of an infinite average.
template <class T>
FUSED_HD T keep(T average, T factor, T weight, T small_beta) {
  return small_beta != T(0) ? small_beta * average : fma(-weight, factor, average);
}

// beta * average + (1 - beta) * x, with an error of a few ulp for any beta in [0, 1).
template <class T>
FUSED_HD T move_average(T average, T x, T weight, T small_beta) {
  return fma(weight, x, keep(average, average, weight, small_beta));
}

// beta * average + (1 - beta) * x * x. As in lerp_square, x * x alone is not computed, and an infinite average stays
// inf.
template <class T>
FUSED_HD T move_average_square(T average, T x, T weight, T small_beta) {
  return fma(weight * x, x, keep(average, bounded(average), weight, small_beta));
}

// The maximum; NaN if either argument is NaN, as in torch.maximum.
template <class T>
FUSED_HD T maximum(T a, T b) {
  return (b > a || b != b) ? b : a;
}

// The sign of NaN is 0, as in torch.sign.
template <class T>
FUSED_HD T sign(T x) {
  return T(x > T(0)) - T(x < T(0));
}

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

template <class T>
struct Tag {
  using type = T;
};

template <class... Rules>
struct RuleList {
  template <class F>
  static bool visit(const char* name, F&& f) {
    return ((std::strcmp(name, Rules::name) == 0 && (f(Tag<Rules>{}), true)) || ...);
  }

  template <class F>
  static void each(F&& f) {
    (f(Tag<Rules>{}), ...);
  }
};

// All rules. Kernels, modules and tests iterate over this list.
using AllRules = RuleList<Adam, Sgd, QHAdam, Lamb, Lion, Adagrad, NAdam, RAdam, ScheduleFreeAdamW, ScheduleFreeSgd,
                          AdEMAMix, Adopt, Adan, StableAdamW, Muon>;

}  // namespace fused_optim
