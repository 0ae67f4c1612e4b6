// The optimizers as in their papers, one element at a time, independent of csrc/rules/.
#pragma once
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "bounded.h"

[[noreturn]] inline void fail(const char* what, const char* which) {
  std::printf("FAILED: %s %s\n", what, which);
  std::exit(1);
}

struct Group {
  double lr, beta1, beta2, beta3, eps, weight_decay;
  bool decoupled, maximize;
  // sgd: dampening, nesterov; qhadam: the two nus; lamb: grad_averaging, bias_correction; nadam: its decay; ademamix:
  // alpha, alpha_warmup, beta3_warmup; adopt: factor and exponent of the bound; muon: momentum, nesterov;
  // schedule_free: warmup_steps, r, weight_lr_power, weight_decay
  double a, b, c, d;
  double lr_reference, decay_period, first_decay;
  bool no_prox;
  double max_norm, clip_eps;
  double trust_low, trust_high;
  bool trust_always;
  double ema_decay;
  int lr_kind;  // 0: a number, 1: a float32 tensor, 2: a float64 tensor
  float lr32;
};

// Update number `step` of one element.
class Oracle {
 public:
  // running: the running scalars before the update.
  Oracle(const char* rule, const Group& g, int step, const std::vector<float>& running)
      : rule_(rule),
        group_(g),
        step_(step),
        lr_(Bounded::constant(g.lr)),
        beta1_(Bounded::constant(g.beta1)),
        beta2_(Bounded::constant(g.beta2)),
        beta3_(Bounded::constant(g.beta3)),
        rest1_(Bounded::constant(1 - static_cast<long double>(g.beta1))),
        rest2_(Bounded::constant(1 - static_cast<long double>(g.beta2))),
        rest3_(Bounded::constant(1 - static_cast<long double>(g.beta3))),
        a_(Bounded::constant(g.a)),
        b_(Bounded::constant(g.b)),
        rest_a_(Bounded::constant(1 - static_cast<long double>(g.a))),
        rest_b_(Bounded::constant(1 - static_cast<long double>(g.b))),
        eps_(Bounded::constant(g.eps)),
        correction1_(correction(g.beta1, step)),
        correction2_(correction(g.beta2, step)),
        correction3_(correction(g.beta3, step)),
        running_(running.begin(), running.end()) {
    if (is_schedule_free()) {
      if (static_cast<float>(warm_lr()) >= running_[1]) running_[1] = warm_lr();
      weight_ = std::pow(static_cast<long double>(step), group_.b) * std::pow(running_[1], group_.c);
      running_[0] += weight_;
    }
    if (is("nadam")) running_[0] = static_cast<float>(running_[0]) * static_cast<float>(nadam_momentum(step));
  }

  // The running scalars after the update.
  const std::vector<long double>& running() const { return running_; }

  // Updates the states and returns what is subtracted from the param. For lamb and stableadamw it returns 0: `unscaled`
  // computes their update from the stored states.
  Bounded update(const Bounded& param, const Bounded& raw_grad, std::vector<Bounded>& state) const {
    Bounded grad = raw_grad;
    if (!group_.decoupled && group_.weight_decay != 0) grad = grad + Bounded::constant(group_.weight_decay) * param;
    if (is("adam")) return adam(grad, state);
    if (is("sgd")) return sgd(grad, state);
    if (is("qhadam")) return qhadam(grad, state);
    if (is("lion")) return lion(grad, state);
    if (is("adagrad")) return adagrad(grad, state);
    if (is("nadam")) return nadam(grad, state);
    if (is("radam")) return radam(grad, state);
    if (is_schedule_free()) return schedule_free(param, raw_grad, state);
    if (is("muon")) return muon(grad, state);
    if (is("ademamix")) return ademamix(grad, state);
    if (is("adopt")) return adopt(grad, state);
    if (is("adan")) return adan(grad, state);
    if (is("stableadamw")) return stableadamw(grad, state);
    if (!is("lamb")) fail("tests/cpp/rules.h has no oracle of the rule", rule_);
    state[0] = kept(state[0], beta1_) + (group_.a != 0 ? rest1_ * grad : grad);
    state[1] = beta2_ * state[1] + rest2_ * grad * grad;
    return Bounded::exact(0);
  }

  // The update of lamb or stableadamw with decay, before lr and ratio.
  Bounded unscaled(const Bounded& param, const std::vector<Bounded>& state) const {
    const bool debias = is("lamb") && group_.b != 0;
    const Bounded mean = debias ? state[0] / correction1_ : state[0];
    const Bounded update = mean / (square_root(debias ? state[1] / correction2_ : state[1]) + eps_);
    if (!std::isfinite(param.value)) return update;
    return update + Bounded::constant(decay_without_lr()) * param;
  }

  // The param after the second walk. rate: lr times the ratio.
  Bounded second_walk(const Bounded& param, const std::vector<Bounded>& state, const Bounded& rate) const {
    return is("muon") ? moved(param, rate * state[1]) : param - rate * unscaled(param, state);
  }

  // The two numbers whose squares are summed. grad: as it is before L2.
  std::vector<Bounded> measured(const Bounded& param, const Bounded& raw_grad,
                                const std::vector<Bounded>& state) const {
    if (is("lamb")) return {param, unscaled(param, state)};
    if (is("muon")) return {Bounded::exact(0), state[1]};
    Bounded grad = raw_grad;
    if (!group_.decoupled && group_.weight_decay != 0) grad = grad + Bounded::constant(group_.weight_decay) * param;
    return {Bounded::exact(1), grad / larger(square_root(state[1]), eps_)};
  }

  double ratio(double first, double second) const {
    if (is("muon")) return 1;
    if (is("stableadamw")) return second <= first ? 1 : std::sqrt(first / second);
    if (group_.weight_decay == 0 && !group_.trust_always) return 1;
    const double param = std::sqrt(first), update = std::sqrt(second);
    const double ratio = param == 0 || update == 0 ? 1 : param / update;
    return std::isnan(ratio) ? ratio : std::min(std::max(ratio, group_.trust_low), group_.trust_high);
  }

  // The param after an update with decay, where no ratio multiplies them.
  Bounded moved(const Bounded& param, const Bounded& update) const {
    const long double decay = group_.lr * decay_without_lr();
    if (group_.no_prox) return param - Bounded::constant(decay) * param - update;
    return param - Bounded::constant(decay / (1 + decay)) * param - Bounded::constant(1 / (1 + decay)) * update;
  }

 private:
  bool is(const char* rule) const { return std::strcmp(rule_, rule) == 0; }

  // 1 - beta**step. Long double has enough digits for the subtraction.
  long double decay_without_lr() const {
    if (!group_.decoupled || group_.lr_reference == 0 || step_ < group_.first_decay) return 0;
    const long double period = std::sqrt(static_cast<long double>(group_.decay_period));
    return static_cast<long double>(group_.weight_decay) / group_.lr_reference / period;
  }

  static Bounded correction(double beta, int step) {
    return Bounded::constant(1 - std::pow(static_cast<long double>(beta), step));
  }

  // beta * average. With a beta from 0.5 the walkers compute it with a subtraction, so inf becomes NaN.
  static Bounded kept(const Bounded& average, const Bounded& beta) {
    return std::isinf(average.value) && beta.value >= 0.5L ? average - average : beta * average;
  }

  Bounded adam(const Bounded& grad, std::vector<Bounded>& state) const {
    state[0] = kept(state[0], beta1_) + rest1_ * grad;
    state[1] = beta2_ * state[1] + rest2_ * grad * grad;
    if (state.size() == 3) state[2] = larger(state[2], state[1]);
    return lr_ * (state[0] / correction1_) / (square_root(state.back() / correction2_) + eps_);
  }

  // The first update ignores the old buffer, unless it is inf or NaN.
  Bounded sgd(const Bounded& grad, std::vector<Bounded>& state) const {
    if (state.empty()) return lr_ * grad;
    state[0] = step_ == 1 ? Bounded::exact(0) * state[0] + grad : beta1_ * state[0] + rest_a_ * grad;
    return lr_ * (group_.b != 0 ? grad + beta1_ * state[0] : state[0]);
  }

  Bounded qhadam(const Bounded& grad, std::vector<Bounded>& state) const {
    state[0] = kept(state[0], beta1_) + rest1_ * grad;
    state[1] = beta2_ * state[1] + rest2_ * grad * grad;
    const Bounded mean = rest_a_ * grad + a_ * (state[0] / correction1_);
    return lr_ * mean / (square_root(rest_b_ * grad * grad + b_ * (state[1] / correction2_)) + eps_);
  }

  // The second state is a workspace, which nothing orthogonalizes here.
  Bounded muon(const Bounded& grad, std::vector<Bounded>& state) const {
    state[0] = kept(state[0], a_) + rest_a_ * grad;
    state[1] = group_.b != 0 ? kept(state[0], a_) + rest_a_ * grad : state[0];
    return Bounded::exact(0);
  }

  Bounded adagrad(const Bounded& grad, std::vector<Bounded>& state) const {
    state[0] = state[0] + grad * grad;
    return lr_ / Bounded::constant(1 + (step_ - 1) * static_cast<long double>(group_.a)) * grad /
           (square_root(state[0]) + eps_);
  }

  long double nadam_momentum(int step) const {
    return group_.beta1 * (1 - 0.5L * std::pow(0.96L, static_cast<long double>(group_.a) * step));
  }

  Bounded nadam(const Bounded& grad, std::vector<Bounded>& state) const {
    state[0] = kept(state[0], beta1_) + rest1_ * grad;
    state[1] = beta2_ * state[1] + rest2_ * grad * grad;
    const long double now = nadam_momentum(step_), next = nadam_momentum(step_ + 1);
    const Bounded first = Bounded::rounded((1 - now) / (1 - running_[0]), 0x1p-47L);
    const Bounded mean = Bounded::rounded(next / (1 - running_[0] * next), 0x1p-47L) * state[0] + first * grad;
    return lr_ * mean / (square_root(state[1] / correction2_) + eps_);
  }

  Bounded radam(const Bounded& grad, std::vector<Bounded>& state) const {
    state[0] = kept(state[0], beta1_) + rest1_ * grad;
    state[1] = beta2_ * state[1] + rest2_ * grad * grad;
    const Bounded mean = lr_ * (state[0] / correction1_);
    const long double power = std::pow(static_cast<long double>(group_.beta2), step_);
    const long double limit = 2 / (1 - static_cast<long double>(group_.beta2)) - 1,
                      length = limit - 2 * step_ * power / (1 - power);
    if (length <= 5) return mean;
    const long double squared = (length - 4) * (length - 2) * limit / ((limit - 4) * (limit - 2) * length);
    // The difference of limit and the quotient loses digits.
    const Bounded rectified = Bounded::rounded(std::sqrt(squared), 0x1p-46L * limit * limit);
    return mean * rectified * square_root(correction2_) / (square_root(state[1]) + eps_);
  }

  bool is_schedule_free() const { return std::strncmp(rule_, "schedule_free", 13) == 0; }
  long double warm_lr() const {
    return step_ < group_.a ? group_.lr * (step_ / static_cast<long double>(group_.a)) : group_.lr;
  }

  // The change of y, of which the average x is no part.
  Bounded schedule_free(const Bounded& param, const Bounded& grad, std::vector<Bounded>& state) const {
    Bounded direction = grad;
    if (state.size() == 2) {
      state[1] = beta2_ * state[1] + rest2_ * grad * grad;
      direction = grad / (square_root(state[1] / correction2_) + eps_);
    }
    if (std::isfinite(param.value)) direction = direction + Bounded::constant(group_.d) * param;
    const Bounded rate = Bounded::constant(warm_lr());
    const long double share = weight_ / running_[0];
    const Bounded apart = param - state[0];
    const Bounded change = Bounded::constant(warm_lr() * (1 - group_.beta1 * (1 - share))) * direction;
    state[0] = state[0] - rate * direction;
    return std::isfinite(apart.value) ? change + Bounded::constant(share) * apart : change;
  }

  Bounded ademamix(const Bounded& grad, std::vector<Bounded>& state) const {
    const long double alpha = group_.a * std::min(step_ / static_cast<long double>(group_.b), 1.0L);
    long double beta3 = group_.beta3;
    if (step_ < group_.c) {  // half-lives, as the authors compute them
      const auto life = [](long double beta) { return std::log(0.5L) / std::log(beta + 1e-8L) - 1; };
      const long double start = life(group_.beta1), end = life(group_.beta3);
      beta3 = std::pow(0.5L, 1 / (start + (end - start) * step_ / group_.c + 1));
    }
    state[0] = kept(state[0], beta1_) + rest1_ * grad;
    state[1] = kept(state[1], Bounded::constant(beta3)) + Bounded::constant(1 - beta3) * grad;
    state[2] = beta2_ * state[2] + rest2_ * grad * grad;
    const Bounded mean = state[0] / correction1_ + Bounded::constant(alpha) * state[1];
    return lr_ * mean / (square_root(state[2] / correction2_) + eps_);
  }

  // The states of the first update are zeros.
  Bounded adopt(const Bounded& grad, std::vector<Bounded>& state) const {
    const bool first = step_ == 1;
    const Bounded bound = Bounded::constant(first ? 0 : group_.a * std::pow(step_ - 1.0L, group_.b));
    const Bounded normed = grad / larger(square_root(state[1]), first ? Bounded::exact(1) : eps_);
    const Bounded clipped = larger(-larger(-normed, -bound), -bound);
    state[0] = kept(state[0], beta1_) + rest1_ * clipped;
    state[1] = beta2_ * state[1] + (first ? grad * grad : rest2_ * grad * grad);
    return lr_ * state[0];
  }

  Bounded adan(const Bounded& grad, std::vector<Bounded>& state) const {
    const Bounded change = Bounded::exact(step_ == 1 ? 0 : 1) * (grad + state[2]);
    const Bounded ahead = grad + beta2_ * change;
    state[0] = kept(state[0], beta1_) + rest1_ * grad;
    state[1] = kept(state[1], beta2_) + rest2_ * change;
    state[2] = -grad;
    state[3] = beta3_ * state[3] + rest3_ * ahead * ahead;
    const Bounded mean = state[0] / correction1_ + beta2_ * state[1] / correction2_;
    return lr_ * mean / (square_root(state[3] / correction3_) + eps_);
  }

  // beta_hat = beta (1 - beta**(step - 1)) / (1 - beta**step), and 1 - beta_hat = (1 - beta) / (1 - beta**step).
  Bounded stableadamw(const Bounded& grad, std::vector<Bounded>& state) const {
    const Bounded weight1 = rest1_ / correction1_, weight2 = rest2_ / correction2_;
    state[0] = kept(state[0], debiased(group_.beta1)) + weight1 * grad;
    state[1] = debiased(group_.beta2) * state[1] + weight2 * grad * grad;
    return Bounded::exact(0);
  }

  Bounded debiased(double beta) const {
    const long double wide = beta;
    return Bounded::rounded(wide * (1 - std::pow(wide, step_ - 1)) / (1 - std::pow(wide, step_)), 0x1p-47L);
  }

  Bounded lion(const Bounded& grad, std::vector<Bounded>& state) const {
    const Bounded mixed = kept(state[0], beta1_) + rest1_ * grad;
    state[0] = kept(state[0], beta2_) + rest2_ * grad;
    return lr_ * sign(mixed);
  }

  const char* rule_;
  const Group& group_;
  int step_;
  Bounded lr_, beta1_, beta2_, beta3_, rest1_, rest2_, rest3_, a_, b_, rest_a_, rest_b_, eps_;
  Bounded correction1_, correction2_, correction3_;
  std::vector<long double> running_;
  long double weight_ = 0;
};
