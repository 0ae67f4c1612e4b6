// Random parameters and groups for the driver.
#pragma once
#include <cmath>
#include <cstring>
#include <vector>

#include "../../csrc/prep.h"
#include "rules.h"
#include "tensor.h"

struct Rule {
  const char* name;
  int signed_states, min_states, max_states, running;
  bool trust;
};

inline std::vector<Rule> all_rules() {
  std::vector<Rule> rules;
  AllRules::each([&](auto tag) {
    using R = typename decltype(tag)::type;
    rules.push_back({R::name, R::signed_states, R::min_states, R::max_states, RunningCount<R>::value, R::trust});
  });
  return rules;
}

// A parameter. tensors: param, gradient, states and, if `averaged`, the average of the weights. step: its step count.
struct Parameter {
  int64_t numel;
  int group;
  bool has_grad;
  std::vector<Tensor> tensors;
  float step;
  bool averaged, begun;
  std::vector<float> running;

  size_t first_after_states() const { return tensors.size() - averaged; }
};

using Values = std::vector<std::vector<double>>;  // the values of each tensor of a parameter

inline Parameter make_parameter(Random& random, const Rule& rule, int groups, bool special, bool averaged) {
  static const int64_t telling[] = {0, 1, 7, 8, 9, 511, 512, 513, 1023, 1024, 1025, 4095, 4096, 4097, 8192};
  const int64_t numel = chance(random, 0.5) ? telling[below(random, 15)] : below(random, 9001);
  Parameter p{numel,
              static_cast<int>(below(random, groups)),
              chance(random, 0.9),
              {},
              static_cast<float>(chance(random, 0.2) ? 0 : below(random, 50)),
              averaged,
              chance(random, 0.5),
              {}};
  for (int i = 0; i < rule.running; ++i) p.running.push_back(0.05f * static_cast<float>(1 + below(random, 19)));
  const Format usual = static_cast<Format>(below(random, 4));
  const bool mixed = usual != kFloat64 && chance(random, 0.5);
  const int streams = 2 + rule.min_states + static_cast<int>(below(random, rule.max_states - rule.min_states + 1));
  for (int i = 0; i < streams; ++i)
    p.tensors.emplace_back(random, mixed ? static_cast<Format>(below(random, 3)) : usual, numel,
                           i >= 2 + rule.signed_states, special && i > 0);
  if (averaged)  // any dtype that the arithmetic allows
    p.tensors.emplace_back(random,
                           usual == kFloat64 || chance(random, 0.5) ? usual : static_cast<Format>(below(random, 3)),
                           numel, false, special);
  return p;
}

inline bool is_muon(const Rule& rule) { return std::strcmp(rule.name, "muon") == 0; }

inline Group make_group(Random& random, const Rule& rule) {
  Group g{};
  const bool switches = rule.trust || rule.max_states == 1;  // option b is a switch
  g.lr = 1e-2 * (1 + below(random, 9));
  const auto small = [&] { return std::pow(10.0, -1.0 - below(random, 7)); };
  g.beta1 = chance(random, 0.2) ? small() : 0.8 + 0.01 * below(random, 19);
  g.beta2 = chance(random, 0.2) ? small() : 0.9 + 0.001 * below(random, 99);
  g.beta3 = chance(random, 0.2) ? small() : 0.9 + 0.001 * below(random, 99);
  g.eps = 1e-8;
  g.weight_decay = 0.1 * below(random, 3);
  g.decoupled = chance(random, 0.5);
  g.maximize = chance(random, 0.3);
  g.a = rule.trust && !is_muon(rule) ? below(random, 2) : 0.2 * below(random, 6);
  g.b = switches ? below(random, 2) : 0.2 * (1 + below(random, 5));  // not 0: 0 * inf can be NaN or not be computed
  g.c = 10 * below(random, 6), g.d = 0.1 * below(random, 3);
  if (std::strncmp(rule.name, "schedule_free", 13) == 0)
    g.a = 10 * below(random, 3), g.c = below(random, 3);  // warmup_steps, weight_lr_power
  g.first_decay = 1 + below(random, 2), g.no_prox = rule.trust || chance(random, 0.5);
  g.lr_reference = chance(random, 0.5) ? 1 : 0.05 * below(random, 3);
  g.decay_period = chance(random, 0.5) ? 1 : 1 + below(random, 100);
  g.max_norm = chance(random, 0.7) ? 0.5 * (1 + below(random, 9)) : 0;
  g.clip_eps = chance(random, 0.5) ? 1e-6 : 0;
  g.trust_low = chance(random, 0.3) ? 0.9 : 0;
  g.trust_high = chance(random, 0.3) ? 1.1 : INFINITY;
  g.trust_always = chance(random, 0.5);
  g.ema_decay = 0.1 * below(random, 11);
  g.lr_kind = static_cast<int>(below(random, 3));
  g.lr32 = static_cast<float>(g.lr);
  if (g.lr_kind == 1) g.lr = g.lr32;
  if (std::strncmp(rule.name, "schedule_free", 13) == 0) g.weight_decay = 0, g.no_prox = true;  // it has its own decay
  return g;
}
