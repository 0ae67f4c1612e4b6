// Runs a walker on random tables of every rule and compares it with plain loops in extended precision. It uses the
// interface in walk.h alone: link it with one walk_*.cpp and the source of that walker.
// Arguments: first seed, number of seeds.
//
// Whether a result is inf or NaN can depend on the order of operations. So if the expected number is not finite, the
// result only must not be finite. This proves little: for every rule three quarters of the comparisons must have a
// finite expected number.
#include <map>
#include <set>

#include "random_table.h"
#include "walk.h"

namespace {

// The comparisons of the present rule, and how many of them had a finite expected number.
int64_t compared = 0, finite_ones = 0;

// Compares element i of the tensor with the expected number, rounded to the dtype of the tensor.
void compare(const char* what, int64_t row, int64_t i, const Tensor& tensor, const Bounded& expected) {
  const long double got = tensor[i], wanted = expected.value;
  const Precision p = precision(tensor.dtype());
  const long double slack = p.relative * 1.001L * std::abs(wanted) + p.absolute + expected.error;
  const bool ok = std::isfinite(got)      ? std::abs(got - wanted) <= slack
                  : std::isfinite(wanted) ? std::abs(wanted) + slack > largest(tensor.dtype())
                                          : true;
  check(ok, what, row, i, tensor[i], static_cast<double>(wanted));
  ++compared;
  finite_ones += std::isfinite(wanted);
}

bool close(double got, long double wanted, long double slack) {
  return std::isfinite(wanted) ? std::abs(got - wanted) <= slack : !std::isfinite(got);
}

// Random parameters, their table for the walker, and the checks of a step.
class Run {
 public:
  Run(const Rule& rule, uint64_t seed)
      : rule_(rule), random_(seed), clipped_(chance(random_, 0.5)), averaged_(chance(random_, 0.5)) {
    // One infinite norm makes all results infinite or NaN, which leaves little to compare.
    const bool special = chance(random_, rule.trust || clipped_ ? 0.1 : 1.0);
    for (int64_t i = 1 + below(random_, 5); i > 0; --i) groups_.push_back(make_group(random_, rule));
    for (int64_t i = 1 + below(random_, 10); i > 0; --i)
      params_.push_back(make_parameter(random_, rule, static_cast<int>(groups_.size()), special, averaged_));
    make_table();
  }

  // Adds the formats of the params that steps update.
  void add_formats_to(std::set<Format>& formats) const {
    for (const Parameter& p : params_)
      if (p.has_grad && p.numel > 0) formats.insert(p.tensors[0].dtype());
  }

  // Number of updates compared.
  int64_t step() {
    const bool scaled = chance(random_, 0.5), overflow = scaled && chance(random_, 0.3);
    scale_ = scaled ? 256.0f : 1.0f, found_inf_ = overflow ? 2.0f : 0.0f;
    for (std::vector<double>* array : {&tensor_scalars_, &partials_, &sums_})
      std::fill(array->begin(), array->end(), NAN);
    std::vector<Values> before = values();
    std::vector<float> steps;
    std::vector<std::vector<float>> running;
    for (const Parameter& p : params_) steps.push_back(p.step), running.push_back(p.running);
    const std::vector<double> trust = trust_;

    Tables t = tables();
    t.grad_scale = scaled ? &scale_ : nullptr;
    t.found_inf = scaled ? &found_inf_ : nullptr;
    if (clipped_) {
      check_squares(t);
      t.squares = &squares_;
    }
    check(walk_step(rule_.name, t) == 0, "walk_step", 0, 0, 1, 0);
    check(walk_step("no such rule", t) != 0, "walk_step(\"no such rule\")", 0, 0, 0, 1);

    int64_t checked = 0;
    for (size_t r = 0; r < params_.size(); ++r) {
      Parameter& p = params_[r];
      const bool skipped = overflow || !p.has_grad;
      check(p.step == steps[r] + !skipped, "step", row(r), 0, p.step, steps[r] + !skipped);
      if (!skipped) check_update(row(r), before[r], running[r]);
      else if (rule_.trust) check(sums_[2 * r] == 0 && sums_[2 * r + 1] == 0, "sums", row(r), 0, sums_[2 * r], 0);
      if (skipped) check(p.running == running[r], "running scalars", row(r), 0, 0, 0);
      for (size_t i = 0; i < p.tensors.size(); ++i) {
        check(p.tensors[i].guards_whole(), "bytes around", row(r), static_cast<int64_t>(i), 0, 0);
        if (skipped || i == 1 || (rule_.trust && (i == 0 || i == p.first_after_states())))
          check_untouched(row(r), p.tensors[i], before[r][i]);
      }
      checked += skipped ? 0 : p.numel;
    }
    if (rule_.trust) check_apply_update(t, overflow, trust);
    if (clipped_) check_scale(t);
    return checked;
  }

 private:
  static int64_t row(size_t r) { return static_cast<int64_t>(r); }

  std::vector<Values> values() const {
    std::vector<Values> all;
    for (const Parameter& p : params_) {
      all.emplace_back();
      for (const Tensor& tensor : p.tensors) all.back().push_back(tensor.values());
    }
    return all;
  }

  void make_table() {
    const int64_t count = row(params_.size());
    rows_.assign(count * kRowWidth, 0), grads_.assign(count, 0), lr_.assign(groups_.size(), 0);
    group_hparams_.assign(groups_.size() * kGroupWidth, 0), tensor_scalars_.resize(count * kScalarWidth),
        group_index_.resize(count);
    sums_.resize(2 * count), trust_.assign(count, 1.0);
    std::map<int64_t, int64_t> numbers;
    for (int64_t r = 0; r < count; ++r) {
      Parameter& p = params_[r];
      int64_t signature = 0;
      const size_t streams = p.first_after_states();
      for (int i = 0; i < kStreamEma; ++i)
        signature |= in_signature(i < static_cast<int>(streams) ? int{p.tensors[i].dtype()} : kAbsent, i);
      signature |= in_signature(p.averaged ? int{p.tensors.back().dtype()} : kAbsent, kStreamEma);
      if (p.begun) signature |= kEmaBegun;
      bool unaligned = !p.tensors[0].aligned();
      int64_t* columns = &rows_[r * kRowWidth];
      columns[kRowNumel] = p.numel, columns[kRowParam] = p.tensors[0].address(),
      columns[kRowDtypeSignature] = signature;
      columns[kRowStep] = reinterpret_cast<int64_t>(&p.step);
      for (size_t i = 0; i < p.running.size(); ++i)
        columns[kRowRunning0 + i] = reinterpret_cast<int64_t>(&p.running[i]);
      for (size_t s = 2; s < p.tensors.size(); ++s) {
        columns[s < streams ? kRowState0 + s - kStreamState0 : size_t{kRowEma}] = p.tensors[s].address();
        unaligned = unaligned || !p.tensors[s].aligned();
      }
      grads_[r] = p.has_grad ? p.tensors[1].address() : 0;
      group_index_[r] = p.group;
      const int64_t number = numbers.emplace(signature, numbers.size()).first->second;
      row_offsets_.push_back(row(chunk_table_.size()));
      for (int64_t chunk = 0; chunk * kChunk < p.numel; ++chunk)
        chunk_table_.push_back(chunk_entry(chunk, r, number, unaligned));
      if (rule_.trust && any_order)
        std::shuffle(chunk_table_.begin() + row_offsets_.back(), chunk_table_.end(), random_);
    }
    row_offsets_.push_back(row(chunk_table_.size()));
    if (!rule_.trust && any_order)
      std::shuffle(chunk_table_.begin(), chunk_table_.end(), random_);  // row_offsets is not read then
    partials_.resize(2 * chunk_table_.size());
    for (size_t i = 0; i < groups_.size(); ++i) {
      Group& g = groups_[i];
      double* to = &group_hparams_[i * kGroupWidth];
      to[kGroupLr] = g.lr_kind ? NAN : g.lr, to[kGroupBeta1] = g.beta1, to[kGroupBeta2] = g.beta2,
      to[kGroupEps] = g.eps;
      to[kGroupWeightDecay] = g.weight_decay, to[kGroupDecoupled] = g.decoupled, to[kGroupMaximize] = g.maximize;
      to[kGroupBeta3] = g.beta3, to[kGroupOptionC] = g.c, to[kGroupOptionD] = g.d, to[kGroupFirstDecay] = g.first_decay,
      to[kGroupNoProx] = g.no_prox;
      to[kGroupOptionA] = g.a, to[kGroupOptionB] = g.b, to[kGroupLrReference] = g.lr_reference,
      to[kGroupDecayPeriod] = g.decay_period;
      to[kGroupMaxNorm] = g.max_norm, to[kGroupClipEps] = g.clip_eps;
      to[kGroupTrustLow] = g.trust_low, to[kGroupTrustHigh] = g.trust_high, to[kGroupTrustAlways] = g.trust_always;
      to[kGroupEmaDecay] = g.ema_decay;
      if (g.lr_kind)
        lr_[i] = g.lr_kind == 1 ? reinterpret_cast<int64_t>(&g.lr32) : reinterpret_cast<int64_t>(&g.lr) | 1;
    }
  }

  // Arrays that the rule does not need are null.
  Tables tables() {
    Tables t{};
    t.chunk_table = chunk_table_.data(), t.rows = rows_.data(), t.grads = grads_.data(), t.lr = lr_.data(),
    t.group_hparams = group_hparams_.data();
    t.group_index = group_index_.data(), t.tensor_scalars = tensor_scalars_.data();
    t.chunks = row(chunk_table_.size()), t.tensors = static_cast<int32_t>(params_.size()), t.ema = averaged_;
    if (rule_.trust || clipped_) t.partials = partials_.data();
    if (rule_.trust) t.row_offsets = row_offsets_.data(), t.sums = sums_.data(), t.trust = trust_.data();
    return t;
  }

  void check_squares(const Tables& t) {
    long double expected = 0;
    for (const Parameter& p : params_) {
      if (!p.has_grad || groups_[p.group].max_norm == 0) continue;
      for (double x : p.tensors[1].values()) expected += static_cast<long double>(x) * x;
    }
    const std::vector<int64_t> rows = rows_without_addresses();
    Tables gradients = t;
    gradients.rows = rows.data();
    squares_ = walk_squares(gradients);
    check(close(squares_, expected, squares_error * expected), "squares", 0, 0, squares_,
          static_cast<double>(expected));
    const double again = walk_squares(gradients);
    check(std::memcmp(&again, &squares_, sizeof again) == 0, "squares at the second time", 0, 0, again, squares_);
  }

  // The rows with invalid addresses of everything but gradients, which nothing may read.
  std::vector<int64_t> rows_without_addresses() const {
    std::vector<int64_t> rows = rows_;
    for (size_t r = 0; r < params_.size(); ++r) {
      for (const int column : {int{kRowParam}, int{kRowStep}, kRowState0 + 0, kRowState0 + 1})
        rows[r * kRowWidth + column] = 1;
    }
    return rows;
  }

  void check_scale(Tables t) {
    const std::vector<Values> before = values();
    const std::vector<int64_t> rows = rows_without_addresses();
    t.rows = rows.data(), t.squares = &squares_;
    t.tensor_scalars = t.partials = t.sums = t.trust = nullptr;
    walk_scale(t);
    for (size_t r = 0; r < params_.size(); ++r) {
      Parameter& p = params_[r];
      const Group& g = groups_[p.group];
      const long double coefficient = g.max_norm / (std::sqrt(static_cast<long double>(squares_)) + g.clip_eps);
      const bool clips = p.has_grad && g.max_norm > 0 && !(coefficient >= 1);
      set_unit(p);
      for (int64_t i = 0; i < p.numel && clips; ++i)
        compare("scaled gradient", row(r), i, p.tensors[1],
                Bounded::constant(coefficient) * Bounded::exact(before[r][1][i]));
      for (size_t i = 0; i < p.tensors.size(); ++i) {
        check(p.tensors[i].guards_whole(), "bytes around", row(r), static_cast<int64_t>(i), 0, 0);
        if (i != 1 || !clips) check_untouched(row(r), p.tensors[i], before[r][i]);
      }
    }
  }

  // The factor of the gradients of a group.
  long double grad_factor(const Group& g) const {
    long double scale = 1 / static_cast<long double>(scale_);
    if (clipped_ && g.max_norm != 0) {
      const long double norm = std::sqrt(static_cast<long double>(squares_)) * scale;
      const long double coefficient = g.max_norm / (norm + g.clip_eps);
      scale *= coefficient >= 1 ? 1 : coefficient;
    }
    return g.maximize ? -scale : scale;
  }

  static void set_unit(const Parameter& p) {
    Bounded::unit = p.tensors[0].dtype() == kFloat64 ? 0x1p-52L : 0x1p-23L;  // twice the error of one operation
  }

  static std::vector<Bounded> stored_states(const Parameter& p, int64_t i) {
    std::vector<Bounded> state;
    for (size_t s = 2; s < p.first_after_states(); ++s) state.push_back(Bounded::exact(p.tensors[s][i]));
    return state;
  }

  void check_update(int64_t r, const Values& before, const std::vector<float>& running) const {
    const Parameter& p = params_[r];
    const Group& g = groups_[p.group];
    set_unit(p);
    const Oracle oracle(rule_.name, g, static_cast<int>(p.step), running);
    for (size_t i = 0; i < running.size(); ++i) {
      const double wanted = static_cast<double>(oracle.running()[i]);
      check(close(p.running[i], wanted, 0x1p-23 * wanted), "running scalar", r, row(i), p.running[i], wanted);
    }
    const Bounded factor = Bounded::constant(grad_factor(g));
    long double sum[2] = {}, slack[2] = {};
    for (int64_t i = 0; i < p.numel; ++i) {
      const Bounded param = Bounded::exact(before[0][i]);
      std::vector<Bounded> state;
      for (size_t s = 2; s < p.first_after_states(); ++s) state.push_back(Bounded::exact(before[s][i]));
      const Bounded update = oracle.update(param, factor * Bounded::exact(before[1][i]), state);
      for (size_t s = 0; s < state.size(); ++s) compare("state", r, i, p.tensors[2 + s], state[s]);
      if (rule_.trust) {
        const auto measured = oracle.measured(param, factor * Bounded::exact(before[1][i]), stored_states(p, i));
        for (int k = 0; k < 2; ++k) {
          sum[k] += measured[k].value * measured[k].value;
          slack[k] += (2 * std::abs(measured[k].value) + measured[k].error) * measured[k].error;
        }
      } else {
        compare("param", r, i, p.tensors[0], oracle.moved(param, update));
        if (p.averaged) check_average(r, i, before.back()[i]);
      }
    }
    if (!rule_.trust) return;
    for (int k = 0; k < 2; ++k)
      check(close(sums_[2 * r + k], sum[k], 1e-13L * sum[k] + slack[k]), "sum", r, k, sums_[2 * r + k],
            static_cast<double>(sum[k]));
  }

  // Checks the average of a param that is stored already.
  void check_average(int64_t r, int64_t i, double before) const {
    const Parameter& p = params_[r];
    const bool copied = p.step == 1 && !p.begun;
    const Bounded param = Bounded::exact(p.tensors[0][i]), old = Bounded::exact(before);
    const Bounded weight = Bounded::constant(1 - static_cast<long double>(groups_[p.group].ema_decay));
    compare("average", r, i, p.tensors.back(), copied || weight.value == 1 ? param : old + weight * (param - old));
  }

  void check_apply_update(Tables t, bool overflow, const std::vector<double>& trust) {
    const std::vector<Values> before = values();
    const std::vector<int64_t> nowhere(grads_.size(), 1);  // invalid: gradients can be freed before this pass
    t.grads = nowhere.data();
    check(walk_apply_update(rule_.name, t) == 0, "walk_apply_update", 0, 0, 1, 0);
    for (size_t r = 0; r < params_.size(); ++r) {
      Parameter& p = params_[r];
      const Group& g = groups_[p.group];
      const bool skipped = overflow || !p.has_grad;
      const Oracle oracle(rule_.name, g, static_cast<int>(p.step), {});
      const double wanted = skipped ? trust[r] : oracle.ratio(sums_[2 * r], sums_[2 * r + 1]);
      const double slack = std::isfinite(wanted) ? 1e-15 * wanted : 0;
      check(close(trust_[r], wanted, slack), "trust ratio", row(r), 0, trust_[r], wanted);
      set_unit(p);
      const Bounded rate = Bounded::constant(static_cast<long double>(g.lr) * trust_[r]);
      for (int64_t i = 0; i < p.numel && !skipped; ++i) {
        const Bounded param = Bounded::exact(before[r][0][i]);
        compare("updated param", row(r), i, p.tensors[0], oracle.second_walk(param, stored_states(p, i), rate));
        if (p.averaged) check_average(row(r), i, before[r].back()[i]);
      }
      for (size_t i = 0; i < p.tensors.size(); ++i) {
        check(p.tensors[i].guards_whole(), "bytes around", row(r), static_cast<int64_t>(i), 0, 0);
        if (skipped || (i != 0 && i != p.first_after_states())) check_untouched(row(r), p.tensors[i], before[r][i]);
      }
    }
  }

  void check_untouched(int64_t r, const Tensor& tensor, const std::vector<double>& before) const {
    for (size_t e = 0; e < before.size(); ++e) {
      const double now = tensor[row(e)], then = before[e];
      check(now == then || (std::isnan(now) && std::isnan(then)), "untouched tensor", r, row(e), now, then);
    }
  }

  const Rule& rule_;
  Random random_;
  bool clipped_, averaged_;
  std::vector<Group> groups_;
  std::vector<Parameter> params_;
  std::vector<int64_t> chunk_table_, rows_, grads_, lr_, row_offsets_;
  std::vector<double> group_hparams_, tensor_scalars_, partials_, sums_, trust_;
  std::vector<int32_t> group_index_;
  float scale_ = 1, found_inf_ = 0;
  double squares_ = 0;
};

// Seeds of a rule do not change when another rule is added.
uint64_t seed_of(const char* name, uint64_t number) {
  for (; *name != 0; ++name) number = number * 131 + static_cast<unsigned char>(*name);
  return number;
}

}  // namespace

int main(int argc, char** argv) {
  const uint64_t first = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 0,
                 seeds = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 20;
  int64_t checked = 0;
  for (const Rule& rule : all_rules()) {
    compared = finite_ones = 0;
    std::set<Format> formats;
    for (uint64_t seed = first; seed < first + seeds; ++seed) {
      Run run(rule, seed_of(rule.name, seed));
      for (int step = 0; step < 3; ++step) run.step();
      run.add_formats_to(formats);
    }
    std::printf("%s: %ld comparisons, %ld of them with a finite number, dtypes of params: %ld\n", rule.name,
                long(compared), long(finite_ones), long(formats.size()));
    if (static_cast<double>(finite_ones) < 0.75 * static_cast<double>(compared))
      fail("too few finite numbers of", rule.name);
    checked += finite_ones;
  }
  std::printf("%ld numbers agree with extended precision\n", long(checked));
  return checked == 0;
}
