// Rules: the arithmetic of each optimizer, on values. No pointers, no torch, no CUDA headers: g++ and nvcc compile the
// same lines. A rule gets the hyperparameters, the param, the gradient and the S states of one element, changes the
// states, and returns the update that the walker subtracts from the param. T is float, or double for float64 tensors.
#pragma once
#include <cmath>
#include <limits>

#ifdef __CUDACC__
#define FUSED_HD __host__ __device__ __forceinline__
#else
#define FUSED_HD inline __attribute__((always_inline))
#endif

namespace fused_optim {

// What a rule reads. One per tensor, written by prep in float64, rounded once to T. The order is that of `hyper` in the
// table.
template <class T>
struct Hyper {
  T lr;
  T beta1;
  T beta2;
  T eps;
  T weight1;      // 1 - beta1
  T weight2;      // 1 - beta2
  T step_size;    // lr / bias_correction1
  T denom_scale;  // 1 / sqrt(bias_correction2)
  T grad_scale;   // multiplies the gradient: unscaling, and the sign of maximize
  T l2;           // weight decay that goes into the gradient
  T decay;        // weight decay that goes past it: lr * weight_decay
  T skip;         // 1: leave this tensor alone
  T first;        // 1 on the first update of this tensor
  T a;            // the rule's own numbers
  T b;
  T step;  // number of this update, from 1
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

// (1 - weight) * average + weight * x. `weight` is rounded once from float64: 1 - float(weight) is closer to the truth
// than float(beta), and the two still sum to 1. With weight 1 (beta 0) the old average is gone without a trace.
template <class T>
FUSED_HD T lerp(T average, T x, T weight) {
  return fma(weight, x, fma(-weight, average, average));
}

// The same of x * x: finite where weight * x * x is, and inf (not NaN) once the average is inf.
template <class T>
FUSED_HD T lerp_square(T average, T x, T weight) {
  T forget = weight * average;
  forget = forget < largest<T>() ? forget : largest<T>();
  return fma(weight * x, x, average - forget);
}

// The larger of the two; NaN if either is, as torch.maximum.
template <class T>
FUSED_HD T maximum(T a, T b) {
  return (b > a || b != b) ? b : a;
}

// Adam, arXiv:1412.6980; with a third state amsgrad, Reddi et al., ICLR 2018, whose maximum torch takes before bias
// correction.
struct Adam {
  static constexpr const char* name = "adam";
  static constexpr int min_states = 2, max_states = 3;  // exp_avg, exp_avg_sq, max_exp_avg_sq

  template <class T, int S>
  FUSED_HD static T update(const Hyper<T>& h, T /*param*/, T grad, T (&state)[S > 0 ? S : 1]) {
    T exp_avg = state[0] = lerp(state[0], grad, h.weight1);
    T exp_avg_sq = state[1] = lerp_square(state[1], grad, h.weight2);
    if constexpr (S == 3) exp_avg_sq = state[2] = maximum(state[2], exp_avg_sq);
    return h.step_size * (exp_avg / fma(square_root(exp_avg_sq), h.denom_scale, h.eps));
  }
};

}  // namespace fused_optim
