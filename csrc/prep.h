// Prep: from a group's raw hyperparameters and a tensor's step count to the numbers its rule reads, in float64, once
// per tensor.
#pragma once
#include "rules.h"
#include "tables.h"

namespace fused_optim {

// base**exponent by squaring: the same few multiplications on every device, no libm. exponent is a whole number below
// 2**31.
FUSED_HD double power(double base, double exponent) {
  double result = 1.0;
  for (unsigned bits = static_cast<unsigned>(exponent); bits != 0; bits >>= 1) {
    if (bits & 1u) result *= base;
    base *= base;
  }
  return result;
}

FUSED_HD double device_lr(int64_t address) {
  if (address & 1) return *reinterpret_cast<const double*>(address & ~int64_t{1});
  return *reinterpret_cast<const float*>(address);
}

// By what a group's gradients are multiplied so that the norm of all stays within its bound: torch's formula, and with
// kClipEps 0 Apex's. A norm that is NaN goes on into the params.
FUSED_HD double clip_coefficient(const double* raw, double squares, double scale) {
  if (!(raw[kMaxNorm] > 0.0)) return 1.0;
  const double coefficient = raw[kMaxNorm] / (::sqrt(squares) * scale + raw[kClipEps]);
  return coefficient >= 1.0 ? 1.0 : coefficient;
}

// Of a decoupled group: what each step takes off its params, per unit. A trust ratio and lr come to it later, where
// there is one.
FUSED_HD double decoupled_decay(const double* raw, double lr, bool trust) {
  if (trust) return raw[kWeightDecay];
  if (raw[kLrReference] == 0.0) return 0.0;
  return lr / raw[kLrReference] * raw[kWeightDecay] / ::sqrt(raw[kDecayPeriod]);
}

struct BiasCorrections {
  double beta1, beta2, step, correction1, correction2;
};

// Advances the step of tensor `row` and writes its hyper row. `memo` spares the powers where the last tensor had the
// same betas and step.
FUSED_HD void prepare(const Tables& t, int64_t row, BiasCorrections& memo) {
  double* out = t.hyper + row * kHyperWidth;
  bool skip = t.grads[row] == 0 || (t.found_inf && *t.found_inf != 0.0f);
  out[kSkip] = skip;
  if (skip) return;

  const double* raw = t.raw + int64_t{t.group[row]} * kRawWidth;
  int64_t lr_address = t.lr[t.group[row]];
  double lr = lr_address ? device_lr(lr_address) : raw[kLr];
  float* step_count = reinterpret_cast<float*>(t.rows[row * kRowWidth + kStep]);
  *step_count += 1.0f;
  double step = *step_count;

  if (memo.beta1 != raw[kBeta1] || memo.beta2 != raw[kBeta2] || memo.step != step) {
    memo = {raw[kBeta1], raw[kBeta2], step, 1.0 - power(raw[kBeta1], step), 1.0 - power(raw[kBeta2], step)};
  }
  double scale = t.grad_scale ? 1.0 / *t.grad_scale : 1.0;
  if (t.squares) scale *= clip_coefficient(raw, *t.squares, scale);
  const bool decoupled = raw[kDecoupled] != 0.0;
  out[0] = lr;
  out[1] = raw[kBeta1];
  // An average begins as a copy of what its param's first update has made.
  const bool copies = step == 1.0 && !(t.rows[row * kRowWidth + kSignature] & kEmaBegun);
  out[2] = copies ? 1.0 : 1.0 - raw[kEmaDecay];
  out[3] = raw[kEps];
  out[4] = 1.0 - raw[kBeta1];
  out[5] = 1.0 - raw[kBeta2];
  out[6] = lr / memo.correction1;
  out[7] = 1.0 / ::sqrt(memo.correction2);
  out[8] = raw[kMaximize] != 0.0 ? -scale : scale;
  out[9] = decoupled ? 0.0 : raw[kWeightDecay];
  out[10] = decoupled ? decoupled_decay(raw, lr, t.trust != nullptr) : 0.0;
  out[12] = step == 1.0;
  out[13] = 1.0 - raw[kRawA];
  out[14] = 1.0 - raw[kRawB];
  out[15] = 1.0 / memo.correction1;
}

template <class T>
FUSED_HD Hyper<T> read_hyper(const double* in) {
  return {T(in[0]), T(in[1]), T(in[2]),  T(in[3]),  T(in[4]),  T(in[5]),  T(in[6]),  T(in[7]),
          T(in[8]), T(in[9]), T(in[10]), T(in[11]), T(in[12]), T(in[13]), T(in[14]), T(in[15])};
}

// What every rule shares. The gradient that it sees: scaled, clipped, and with L2 in it.
template <class T>
FUSED_HD T gradient(const Hyper<T>& h, T param, T grad) {
  const T scaled = grad * h.grad_scale;
  // Without decay the param stays out of it: 0 * inf would put NaN into the states, and an infinite param (a mask, say)
  // must stay what it is.
  return h.l2 != T(0) ? fma(h.l2, param, scaled) : scaled;
}

// The new param: the rule's update and decoupled decay taken off.
template <class Rule, class T, int S>
FUSED_HD T apply(const Hyper<T>& h, T param, T grad, T (&state)[S > 0 ? S : 1]) {
  const T update = Rule::template update<T, S>(h, param, gradient(h, param, grad), state);
  return param - fma(h.decay, finite(param), update);
}

// Of a rule with trust: the update made of states that have advanced, decay in it and lr not yet.
template <class Rule, class T, int S>
FUSED_HD T trusted_update(const Hyper<T>& h, T param, const T (&state)[S]) {
  return fma(h.decay, finite(param), Rule::template direction<T, S>(h, state));
}

// The average of the weights after a step, of a param as it is stored. With weight 1 whatever was there before is gone.
template <class T>
FUSED_HD T averaged(const Hyper<T>& h, T average, T param) {
  return h.ema_weight == T(1) ? param : lerp(average, param, h.ema_weight);
}

// The trust ratio of a tensor from `sums`, which is final by then.
FUSED_HD double trust_ratio(const Tables& t, int64_t row) {
  const double* raw = t.raw + int64_t{t.group[row]} * kRawWidth;
  if (raw[kWeightDecay] == 0.0 && raw[kTrustAlways] == 0.0) return 1.0;
  const double param = ::sqrt(t.sums[2 * row]), update = ::sqrt(t.sums[2 * row + 1]);
  const double ratio = param != 0.0 && update != 0.0 ? param / update : 1.0;
  const double least = ratio < raw[kTrustLow] ? raw[kTrustLow] : ratio;
  return least > raw[kTrustHigh] ? raw[kTrustHigh] : least;
}

}  // namespace fused_optim
