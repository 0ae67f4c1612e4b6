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
  out[0] = lr;
  out[1] = raw[kBeta1];
  out[2] = raw[kBeta2];
  out[3] = raw[kEps];
  out[4] = 1.0 - raw[kBeta1];
  out[5] = 1.0 - raw[kBeta2];
  out[6] = lr / memo.correction1;
  out[7] = 1.0 / ::sqrt(memo.correction2);
  out[8] = raw[kMaximize] != 0.0 ? -scale : scale;
  out[9] = raw[kDecoupled] != 0.0 ? 0.0 : raw[kWeightDecay];
  out[10] = raw[kDecoupled] != 0.0 ? lr * raw[kWeightDecay] : 0.0;
  out[12] = step == 1.0;
  out[13] = raw[kRawA];
  out[14] = raw[kRawB];
  out[15] = step;
}

template <class T>
FUSED_HD Hyper<T> read_hyper(const double* in) {
  return {T(in[0]), T(in[1]), T(in[2]),  T(in[3]),  T(in[4]),  T(in[5]),  T(in[6]),  T(in[7]),
          T(in[8]), T(in[9]), T(in[10]), T(in[11]), T(in[12]), T(in[13]), T(in[14]), T(in[15])};
}

// What every rule shares: gradient scale and L2 before it, decoupled decay and the subtraction after it.
template <class Rule, class T, int S>
FUSED_HD T apply(const Hyper<T>& h, T param, T grad, T (&state)[S > 0 ? S : 1]) {
  const T scaled = grad * h.grad_scale;
  // Without decay the param stays out of it: 0 * inf would put NaN into the states, and an infinite param (a mask, say)
  // must stay what it is.
  const T decayed = h.l2 != T(0) ? fma(h.l2, param, scaled) : scaled;
  const T update = Rule::template update<T, S>(h, param, decayed, state);
  return param - fma(h.decay, finite(param), update);
}

}  // namespace fused_optim
