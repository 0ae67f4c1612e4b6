// Rules: the arithmetic of each optimizer, on values. No pointers, no torch, no CUDA headers: g++ and nvcc compile the
// same lines. A rule gets the hyperparameters, the param, the gradient and the S states of one element, changes the
// states, and returns the update that the walker subtracts from the param. T is float, or double for float64 tensors.
//
// A rule with `trust` is walked twice, because each tensor's update is scaled by the ratio of two norms: `advance`
// changes the states, `direction` makes the update of them alone, before lr and decay.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#ifdef __CUDACC__
#define FUSED_HD __host__ __device__ __forceinline__
#else
#define FUSED_HD inline __attribute__((always_inline))
#endif

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

// What a rule reads. One per tensor, written by prep in float64, rounded once to T. The order is that of `hyper` in the
// table.
template <class T>
struct Hyper {
  T lr;
  T beta1;
  T ema_weight;  // of the new param in the average of the weights
  T eps;
  T weight1;      // 1 - beta1
  T weight2;      // 1 - beta2
  T step_size;    // lr / bias_correction1
  T denom_scale;  // 1 / sqrt(bias_correction2)
  T grad_scale;   // multiplies the gradient: unscaling, and the sign of maximize
  T l2;           // weight decay that goes into the gradient
  T decay;        // weight decay that goes past it, lr included (but where a trust ratio follows)
  T skip;         // 1: leave this tensor alone
  T first;        // 1 on the first update of this tensor
  T weight_a;     // 1 - a and 1 - b, of the rule's own numbers
  T weight_b;
  T debias;  // 1 / bias_correction1
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
  FUSED_HD static T update(const Hyper<T>& h, T /*param*/, T grad, T (&state)[S > 0 ? S : 1]) {
    T exp_avg = state[0] = lerp(state[0], grad, h.weight1);
    T exp_avg_sq = state[1] = lerp_square(state[1], grad, h.weight2);
    if constexpr (S == 3) exp_avg_sq = state[2] = maximum(state[2], exp_avg_sq);
    return h.step_size * (exp_avg / fma(square_root(exp_avg_sq), h.denom_scale, h.eps));
  }
};

// SGD as in torch: the first buffer is the gradient itself. beta1: momentum, a: dampening, b: nesterov.
struct Sgd {
  static constexpr const char* name = "sgd";
  static constexpr bool trust = false;
  static constexpr int min_states = 0, max_states = 1;  // momentum_buffer

  template <class T, int S>
  FUSED_HD static T update(const Hyper<T>& h, T /*param*/, T grad, T (&state)[S > 0 ? S : 1]) {
    if constexpr (S == 0) {
      return h.lr * grad;
    } else {
      const T weight = h.first != T(0) ? T(1) : h.weight_a;
      const T momentum = h.first != T(0) ? T(0) : h.beta1;
      const T buffer = state[0] = fma(momentum, state[0], weight * grad);
      return h.lr * (h.weight_b == T(0) ? fma(h.beta1, buffer, grad) : buffer);
    }
  }
};

// QHAdam, arXiv:1810.06801, section 4.2. a, b: nu1, nu2.
struct QHAdam {
  static constexpr const char* name = "qhadam";
  static constexpr bool trust = false;
  static constexpr int min_states = 2, max_states = 2;  // exp_avg, exp_avg_sq

  template <class T, int S>
  FUSED_HD static T update(const Hyper<T>& h, T /*param*/, T grad, T (&state)[S > 0 ? S : 1]) {
    const T exp_avg = state[0] = lerp(state[0], grad, h.weight1);
    const T exp_avg_sq = state[1] = lerp_square(state[1], grad, h.weight2);
    const T mean = lerp(h.debias * exp_avg, grad, h.weight_a);
    const T mean_sq = lerp_square(h.denom_scale * h.denom_scale * exp_avg_sq, grad, h.weight_b);
    return h.lr * (mean / (square_root(mean_sq) + h.eps));
  }
};

// LAMB, arXiv:1904.00962, with the choices of NVIDIA Apex. a: grad_averaging, b: bias_correction.
struct Lamb {
  static constexpr const char* name = "lamb";
  static constexpr bool trust = true;
  static constexpr int min_states = 2, max_states = 2;  // exp_avg, exp_avg_sq

  template <class T, int S>
  FUSED_HD static void advance(const Hyper<T>& h, T grad, T (&state)[S]) {
    const T weight = h.weight_a != T(0) ? T(1) : h.weight1;
    state[0] = fma(weight, grad, fma(-h.weight1, state[0], state[0]));
    state[1] = lerp_square(state[1], grad, h.weight2);
  }

  template <class T, int S>
  FUSED_HD static T direction(const Hyper<T>& h, const T (&state)[S]) {
    const T debias = h.weight_b != T(0) ? T(1) : h.debias;
    const T scale = h.weight_b != T(0) ? T(1) : h.denom_scale;
    return debias * (state[0] / fma(square_root(state[1]), scale, h.eps));
  }
};

// Lion, arXiv:2302.06675.
struct Lion {
  static constexpr const char* name = "lion";
  static constexpr bool trust = false;
  static constexpr int min_states = 1, max_states = 1;  // exp_avg

  template <class T, int S>
  FUSED_HD static T update(const Hyper<T>& h, T /*param*/, T grad, T (&state)[S > 0 ? S : 1]) {
    const T mixed = lerp(state[0], grad, h.weight1);
    state[0] = lerp(state[0], grad, h.weight2);
    return h.lr * sign(mixed);
  }
};

}  // namespace fused_optim
