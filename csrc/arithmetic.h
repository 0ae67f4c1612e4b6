// The arithmetic that rules and stream formats share, on values. It uses no pointers, torch or CUDA headers, so g++ and
// nvcc compile the same code. T is float, or double for float64 tensors.
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

}  // namespace fused_optim
