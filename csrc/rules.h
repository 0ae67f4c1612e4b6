// Rules: the arithmetic of each optimizer, on values. No pointers, no torch, no CUDA headers: g++ and nvcc compile the
// same lines. A rule gets the scalars of the tensor, and the param, the gradient and the S states of one element. It
// changes the states and returns the update that the walker subtracts from the param. T is float, or double for float64
// tensors.
//
// A rule with `trust` is walked twice, because each tensor's update is scaled by the ratio of two norms:
// `update_moments` changes the states, `direction` makes the update of them alone, before lr and decay.
//
// A rule may have a function `scalars`, which makes scalars of its own from the options of the tensor's group.
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

// Numbers of a rule's own that `scalars` makes: once per tensor and step, in double precision. A rule reads them as
// own_a to own_d.
struct OwnScalars {
  double a = 0.0, b = 0.0, c = 0.0, d = 0.0;
};

// The step of a tensor, counted from 1, and 1 - beta**step of both betas.
struct BiasCorrections {
  double beta1, beta2, step, correction1, correction2;
};

// GCC vectorises these builtins; without FMA hardware a call per element would cost more than the second rounding.
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

// x, which is not negative, or the largest number where it is inf. As whole numbers floats keep their order, and the
// smaller of two is one instruction; a select of floats is two.
template <class T>
FUSED_HD T bounded(T x) {
  if constexpr (sizeof(T) == 4) {
    const int32_t bits = static_cast<int32_t>(float_bits(x)), most = static_cast<int32_t>(float_bits(largest<float>()));
    return bits_float(static_cast<uint32_t>(bits < most ? bits : most));
  } else {
    return x < largest<T>() ? x : largest<T>();
  }
}

// (1 - weight) * average + weight * x. `weight` is rounded once from float64: 1 - float(weight) is closer to the truth
// than float(beta), and the two still sum to 1. With weight 1 (beta 0) the old average is gone without a trace.
template <class T>
FUSED_HD T lerp(T average, T x, T weight) {
  return fma(weight, x, fma(-weight, average, average));
}

// The same of x * x: finite where weight * x * x is, and inf (not NaN) once the average is inf.
template <class T>
FUSED_HD T lerp_square(T average, T x, T weight) {
  return fma(weight * x, x, fma(-weight, bounded(average), average));
}

// beta * average. A beta of 0.5 or more is 1 - weight, as in lerp, and small_beta is 0. Below 0.5 the rounding of the
// weight is large beside beta, and small_beta is beta, rounded once. It is the same for a whole tensor.
// factor: the average, or a finite number in the place of inf.
template <class T>
FUSED_HD T keep(T average, T factor, T weight, T small_beta) {
  return small_beta != T(0) ? small_beta * average : fma(-weight, factor, average);
}

// beta * average + (1 - beta) * x, exact to a few ulp for any beta in [0, 1).
template <class T>
FUSED_HD T move_average(T average, T x, T weight, T small_beta) {
  return fma(weight, x, keep(average, average, weight, small_beta));
}

// The same of x * x: finite where weight * x * x is, and inf (not NaN) once the average is inf.
template <class T>
FUSED_HD T move_average_square(T average, T x, T weight, T small_beta) {
  return fma(weight * x, x, keep(average, bounded(average), weight, small_beta));
}

// The larger of the two; NaN if either is, as torch.maximum.
template <class T>
FUSED_HD T maximum(T a, T b) {
  return (b > a || b != b) ? b : a;
}

// 0 of NaN, as torch.sign.
template <class T>
FUSED_HD T sign(T x) {
  return T(x > T(0)) - T(x < T(0));
}

// Adam, arXiv:1412.6980; with a third state amsgrad, Reddi et al., ICLR 2018, whose maximum torch takes before bias
// correction.
struct Adam {
  static constexpr const char* name = "adam";
  static constexpr bool trust = false;
  static constexpr int min_states = 2, max_states = 3;  // exp_avg, exp_avg_sq, max_exp_avg_sq

  template <class T, int S>
  FUSED_HD static T update(const TensorScalars<T>& h, T /*param*/, T grad, T (&state)[S > 0 ? S : 1]) {
    T exp_avg = state[0] = move_average(state[0], grad, h.weight1, h.small_beta1);
    T exp_avg_sq = state[1] = move_average_square(state[1], grad, h.weight2, h.small_beta2);
    if constexpr (S == 3) exp_avg_sq = state[2] = maximum(state[2], exp_avg_sq);
    return h.step_size * (exp_avg / fma(square_root(exp_avg_sq), h.denom_scale, h.eps));
  }
};

// SGD as in torch: the first buffer is the gradient itself. Options: beta1 is the momentum; dampening, nesterov.
struct Sgd {
  static constexpr const char* name = "sgd";
  static constexpr bool trust = false;
  static constexpr bool has_betas = false;
  static constexpr int min_states = 0, max_states = 1;  // momentum_buffer

  // Weights of gradient and buffer in the new buffer, momentum, nesterov.
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

// QHAdam, arXiv:1810.06801, section 4.2. Options: the two nus.
struct QHAdam {
  static constexpr const char* name = "qhadam";
  static constexpr bool trust = false;
  static constexpr int min_states = 2, max_states = 2;  // exp_avg, exp_avg_sq

  // Weights of the gradient beside the two averages.
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

// LAMB, arXiv:1904.00962, with the choices of NVIDIA Apex. Options: grad_averaging, bias_correction.
struct Lamb {
  static constexpr const char* name = "lamb";
  static constexpr bool trust = true;
  static constexpr int min_states = 2, max_states = 2;  // exp_avg, exp_avg_sq

  // Weight of the gradient in exp_avg; debias and denom_scale, 1 without bias correction.
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
};

// Lion, arXiv:2302.06675.
struct Lion {
  static constexpr const char* name = "lion";
  static constexpr bool trust = false;
  static constexpr int min_states = 1, max_states = 1;  // exp_avg

  template <class T, int S>
  FUSED_HD static T update(const TensorScalars<T>& h, T /*param*/, T grad, T (&state)[S > 0 ? S : 1]) {
    const T mixed = move_average(state[0], grad, h.weight1, h.small_beta1);
    state[0] = move_average(state[0], grad, h.weight2, h.small_beta2);
    return h.lr * sign(mixed);
  }
};

}  // namespace fused_optim
