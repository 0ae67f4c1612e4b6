// Prep computes the scalars that a rule reads, from a group's hyperparameters and a tensor's step count. It runs once
// per tensor and step, in float64.
#pragma once
#include <type_traits>

#include "rules.h"
#include "tables.h"

namespace fused_optim {

// 1 - beta**step. It is computed from 1 - beta, because a subtraction of beta**step from 1 loses digits when beta is
// near 1. It does not call libm, so every device does the same operations. step is an integer below 2**31.
FUSED_HD double bias_correction(double beta, double step) {
  double result = 0.0, doubled = 1.0 - beta;  // doubled: 1 - beta**1, 1 - beta**2, 1 - beta**4, ...
  for (unsigned bits = static_cast<unsigned>(step); bits != 0; bits >>= 1) {
    if (bits & 1u) result += (1.0 - result) * doubled;
    doubled *= 2.0 - doubled;
  }
  return result;
}

FUSED_HD double device_lr(int64_t address) {
  if (address & 1) return *reinterpret_cast<const double*>(address & ~int64_t{1});
  return *reinterpret_cast<const float*>(address);
}

// The factor that scales a group's gradients so that the norm of all gradients is at most max_norm. torch's formula;
// Apex's if clip_eps is 0. A NaN norm gives a NaN factor, so NaN is not hidden.
FUSED_HD double clip_coefficient(const double* hparams, double squares, double scale) {
  if (!(hparams[kGroupMaxNorm] > 0.0)) return 1.0;
  const double coefficient = hparams[kGroupMaxNorm] / (::sqrt(squares) * scale + hparams[kGroupClipEps]);
  return coefficient >= 1.0 ? 1.0 : coefficient;
}

// The fraction of a param that decoupled decay subtracts in a step. `scaled`: without lr, because the second walk
// multiplies it by lr and the ratio.
FUSED_HD double decoupled_decay(const GroupHparams& group, bool scaled) {
  if (group.lr_reference == 0.0) return 0.0;
  if (scaled) return group.weight_decay / group.lr_reference / ::sqrt(group.decay_period);
  return group.lr / group.lr_reference * group.weight_decay / ::sqrt(group.decay_period);
}

// The share of its decay that a tensor keeps under corrected decay, arXiv:2506.02285: lr over the largest lr so far.
FUSED_HD double corrected_share(double lr, int64_t largest_address) {
  float* stored = reinterpret_cast<float*>(largest_address);
  const double largest = largest_lr(lr, *stored);
  *stored = static_cast<float>(largest);
  return largest > 0.0 ? lr / largest : 1.0;
}

template <class Rule, class = void>
struct HasScalars : std::false_type {};
template <class Rule>
struct HasScalars<Rule, std::void_t<decltype(&Rule::scalars)>> : std::true_type {};

// Whether beta1 and beta2 of a rule are decay rates of averages. A rule states it only if they are not.
template <class Rule, class = void>
struct HasBetas : std::true_type {};
template <class Rule>
struct HasBetas<Rule, std::void_t<decltype(Rule::has_betas)>> : std::bool_constant<Rule::has_betas> {};

// Whether the ratio of a rule multiplies decoupled decay.
template <class Rule>
constexpr bool scales_decay() {
  if constexpr (Rule::trust) return Rule::scales_decay;
  return false;
}

// The number of a rule's running scalars. A rule states it only if it has some.
template <class Rule, class = void>
struct RunningCount : std::integral_constant<int, 0> {};
template <class Rule>
struct RunningCount<Rule, std::void_t<decltype(Rule::running)>> : std::integral_constant<int, Rule::running> {};

// The rule's own scalars. Running scalars are stored as float32, and `scalars` gets them in double precision.
template <class Rule>
FUSED_HD OwnScalars own_scalars(const GroupHparams& group, const BiasCorrections& at, const int64_t* row) {
  constexpr int kCount = RunningCount<Rule>::value;
  if constexpr (kCount == 0) {
    return Rule::scalars(group, at);
  } else {
    double running[kCount];
    for (int i = 0; i < kCount; ++i) running[i] = *reinterpret_cast<const float*>(row[kRowRunning0 + i]);
    const OwnScalars own = Rule::scalars(group, at, running);
    for (int i = 0; i < kCount; ++i) *reinterpret_cast<float*>(row[kRowRunning0 + i]) = static_cast<float>(running[i]);
    return own;
  }
}

// Whether a tensor is not updated in this step.
FUSED_HD bool is_skipped(const Tables& t, int64_t row) {
  return t.grads[row] == 0 || (t.found_inf && *t.found_inf != 0.0f);
}

// What the scalars of a tensor are computed from, besides its running scalars.
struct Preparation {
  int64_t group;       // its row of group_hparams
  double step;         // counted from 1
  bool copies;         // whether the update copies the new param into its average
  int64_t largest_lr;  // address, or 0
};

// Increments the step count of tensor `row`, which is not skipped.
template <class Rule>
FUSED_HD Preparation count_step(const Tables& t, int64_t row) {
  const int64_t* columns = t.rows + row * kRowWidth;
  float* step_count = reinterpret_cast<float*>(columns[kRowStep]);
  *step_count += 1.0f;
  const double step = *step_count;
  // The first update copies the new param into its average, unless the average has had updates before.
  const bool copies = step == 1.0 && !(columns[kRowDtypeSignature] & kEmaBegun);
  return {t.group_index[row], step, copies, columns[kRowRunning0 + RunningCount<Rule>::value]};
}

// Writes the scalars of tensor `row` to `out`, and updates its running scalars. `memo` holds the bias corrections of
// the last tensor: tensors with the same betas and step reuse them.
template <class Rule>
FUSED_HD void write_scalars(const Tables& t, int64_t row, const Preparation& from, BiasCorrections& memo, double* out) {
  const double* hparams = t.group_hparams + from.group * kGroupWidth;
  const double step = from.step;
  GroupHparams group = read_group_hparams(hparams);
  if (const int64_t address = t.lr[from.group]) group.lr = device_lr(address);
  if (memo.beta1 != group.beta1 || memo.beta2 != group.beta2 || memo.beta3 != group.beta3 || memo.step != step) {
    memo = {group.beta1,
            group.beta2,
            group.beta3,
            step,
            bias_correction(group.beta1, step),
            bias_correction(group.beta2, step),
            bias_correction(group.beta3, step)};
  }
  double scale = t.grad_scale ? 1.0 / *t.grad_scale : 1.0;
  if (t.squares) scale *= clip_coefficient(hparams, *t.squares, scale);
  const bool decoupled = group.decoupled != 0.0;
  double decay = decoupled && step >= group.first_decay ? decoupled_decay(group, scales_decay<Rule>()) : 0.0;
  if (from.largest_lr) decay *= corrected_share(group.lr, from.largest_lr);
  if (group.no_prox == 0.0) {  // (param - update) / (1 + decay)
    decay /= 1.0 + decay;
    group.lr *= 1.0 - decay;
  }
  out[kScalarSkip] = 0.0;
  out[kScalarLr] = group.lr;
  out[kScalarEps] = group.eps;
  out[kScalarWeight1] = 1.0 - group.beta1;
  out[kScalarWeight2] = 1.0 - group.beta2;
  out[kScalarSmallBeta1] = HasBetas<Rule>::value && group.beta1 < 0.5 ? group.beta1 : 0.0;
  out[kScalarSmallBeta2] = HasBetas<Rule>::value && group.beta2 < 0.5 ? group.beta2 : 0.0;
  out[kScalarStepSize] = group.lr / memo.correction1;
  out[kScalarDebias] = 1.0 / memo.correction1;
  out[kScalarDenomScale] = 1.0 / ::sqrt(memo.correction2);
  out[kScalarGradFactor] = group.maximize != 0.0 ? -scale : scale;
  out[kScalarL2] = decoupled ? 0.0 : group.weight_decay;
  out[kScalarDecay] = decay;
  out[kScalarCautiousDecay] = group.cautious_decay;
  out[kScalarEmaWeight] = from.copies ? 1.0 : 1.0 - group.ema_decay;
  if constexpr (HasScalars<Rule>::value) {
    const OwnScalars own = own_scalars<Rule>(group, memo, t.rows + row * kRowWidth);
    out[kScalarOwnA] = own.a;
    out[kScalarOwnB] = own.b;
    out[kScalarOwnC] = own.c;
    out[kScalarOwnD] = own.d;
    out[kScalarOwnE] = own.e;
    out[kScalarOwnF] = own.f;
  }
}

// Increments the step count of tensor `row` and stores its scalars in the table. If the tensor is skipped, only the
// skip flag is written, and its running scalars do not change.
template <class Rule>
FUSED_HD void prepare(const Tables& t, int64_t row, BiasCorrections& memo) {
  double* out = t.tensor_scalars + row * kScalarWidth;
  if (is_skipped(t, row)) out[kScalarSkip] = 1.0;
  else write_scalars<Rule>(t, row, count_step<Rule>(t, row), memo, out);
}

// Tensors with small betas or cautious decay are walked by slower loops. In the fast loops these scalars are the
// constant 0, which adds no instruction.
template <class T>
FUSED_HD bool has_small_betas(const TensorScalars<T>& h) {
  return h.small_beta1 != T(0) || h.small_beta2 != T(0);
}

template <class T>
FUSED_HD TensorScalars<T> as_usual(TensorScalars<T> h) {
  h.small_beta1 = h.small_beta2 = h.cautious_decay = T(0);
  return h;
}

// The param as decoupled decay takes it: 0 where it is inf or NaN, and with cautious decay also where the update moves
// it away from 0.
template <class T>
FUSED_HD T decaying(const TensorScalars<T>& h, T param, T update) {
  // & and | in place of && and ||, which are branches that a compiler may not vectorise.
  const bool away = ((param > T(0)) & (update < T(0))) | ((param < T(0)) & (update > T(0)));
  return (h.cautious_decay != T(0)) & away ? T(0) : finite(param);
}

// The gradient that a rule gets: scaled, clipped, with L2 added.
template <class T>
FUSED_HD T gradient(const TensorScalars<T>& h, T param, T grad) {
  const T scaled = grad * h.grad_factor;
  // Without decay the param is not used. 0 * inf would put NaN into the states, and an infinite param (for example a
  // mask) must keep its value.
  return h.l2 != T(0) ? fma(h.l2, param, scaled) : scaled;
}

// The new param: the old one minus the rule's update and decoupled decay.
template <class Rule, class T, int S>
FUSED_HD T apply(const TensorScalars<T>& h, T param, T grad, T (&state)[S > 0 ? S : 1]) {
  const T update = Rule::template update<T, S>(h, param, gradient(h, param, grad), state);
  return param - fma(h.decay, decaying(h, param, update), update);
}

// The new param of a rule with a ratio, from the new states. h.lr includes the ratio.
template <class Rule, class T, int S>
FUSED_HD T apply_direction(const TensorScalars<T>& h, T param, const T (&state)[S]) {
  const T direction = Rule::template direction<T, S>(h, state);
  if constexpr (scales_decay<Rule>()) return param - h.lr * fma(h.decay, decaying(h, param, direction), direction);
  else return param - fma(h.decay, decaying(h, param, direction), h.lr * direction);
}

// The average of the weights after a step. `param` is the value as stored, after rounding. With weight 1 the old
// average has no effect, even if it is inf or NaN.
template <class T>
FUSED_HD T averaged(const TensorScalars<T>& h, T average, T param) {
  return h.ema_weight == T(1) ? param : lerp(average, param, h.ema_weight);
}

// The ratio of a tensor. `sums` must be complete.
template <class Rule>
FUSED_HD double ratio_of(const Tables& t, int64_t row) {
  const GroupHparams group = read_group_hparams(t.group_hparams + int64_t{t.group_index[row]} * kGroupWidth);
  return Rule::ratio(group, t.sums[2 * row], t.sums[2 * row + 1]);
}

}  // namespace fused_optim
