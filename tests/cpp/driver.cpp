// Drives a walker through hand-made tables and compares it with Adam in double precision, written here straight from
// the paper. It knows nothing of the walker but `walk`: link it with one walk_*.cpp and that walker's source.
// Arguments: first seed, number of seeds. Every tensor lies between guard bytes (poisoned where the build has an
// address sanitizer), at aligned and odd addresses, in all dtypes.
#include <sanitizer/asan_interface.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <map>
#include <random>
#include <vector>

#include "../../csrc/tables.h"

using namespace fused_optim;

int walk(const char* rule, const Tables& t);  // 0: done

namespace {

constexpr int64_t kGuard = 64;  // bytes on either side
constexpr unsigned char kGuardByte = 0xa5;

using Random = std::mt19937_64;

int64_t below(Random& random, int64_t end) { return static_cast<int64_t>(random() % static_cast<uint64_t>(end)); }
bool chance(Random& random, double p) { return std::uniform_real_distribution<double>(0, 1)(random) < p; }

void check(bool ok, const char* what, int64_t row, int64_t element, double got, double expected) {
  if (ok) return;
  std::printf("FAILED: %s of tensor %ld, element %ld: %.17g, expected %.17g\n", what, long(row), long(element), got,
              expected);
  std::exit(1);
}

// Bits of a two-byte float with that many exponent and mantissa bits, by the definition of the format.
double decode(uint16_t bits, int exponent_bits, int mantissa_bits) {
  const int mantissa = bits & ((1 << mantissa_bits) - 1),
            exponent = (bits >> mantissa_bits) & ((1 << exponent_bits) - 1);
  const int bias = (1 << (exponent_bits - 1)) - 1;
  double magnitude = exponent == 0 ? std::ldexp(mantissa, 1 - bias - mantissa_bits)
                                   : std::ldexp(mantissa + (1 << mantissa_bits), exponent - bias - mantissa_bits);
  if (exponent == (1 << exponent_bits) - 1) magnitude = mantissa ? std::nan("") : INFINITY;
  return bits & 0x8000 ? -magnitude : magnitude;
}

// What a dtype can tell apart: relative step between neighbours, and the step among its denormals.
struct Precision {
  double relative, absolute;
};

Precision precision(Dtype dtype) {
  if (dtype == kBFloat16) return {0x1p-8, 0x1p-133};
  if (dtype == kFloat16) return {0x1p-11, 0x1p-25};
  if (dtype == kFloat32) return {0x1p-24, 0x1p-149};
  return {0x1p-53, 0};
}

class Tensor {
 public:
  Tensor(Random& random, Dtype dtype, int64_t numel, bool positive, bool special) : dtype_(dtype), numel_(numel) {
    offset_ = chance(random, 0.6) ? 0 : below(random, 8) * itemsize();
    bytes_.assign(2 * kGuard + offset_ + numel * itemsize() + 16, kGuardByte);
    base_ = (16 - reinterpret_cast<uintptr_t>(bytes_.data()) % 16) % 16 + kGuard + offset_;
    for (int64_t i = 0; i < numel; ++i) fill(i, random, positive, special);
    guard(true);
  }
  Tensor(Tensor&&) = default;
  ~Tensor() {
    if (!bytes_.empty()) guard(false);
  }

  int itemsize() const { return dtype_ == kFloat64 ? 8 : dtype_ == kFloat32 ? 4 : 2; }
  Dtype dtype() const { return dtype_; }
  int64_t address() const { return reinterpret_cast<int64_t>(bytes_.data() + base_); }
  bool aligned() const { return address() % 16 == 0; }

  double operator[](int64_t i) const {
    const unsigned char* from = bytes_.data() + base_ + i * itemsize();
    if (dtype_ == kFloat64) return get<double>(from);
    if (dtype_ == kFloat32) return get<float>(from);
    return dtype_ == kBFloat16 ? decode(get<uint16_t>(from), 8, 7) : decode(get<uint16_t>(from), 5, 10);
  }

  std::vector<double> values() const {
    std::vector<double> all;
    for (int64_t i = 0; i < numel_; ++i) all.push_back((*this)[i]);
    return all;
  }

  bool guards_whole() {
    guard(false);
    const auto whole = [&](int64_t from, int64_t to) {
      return std::all_of(bytes_.begin() + from, bytes_.begin() + to,
                         [](unsigned char byte) { return byte == kGuardByte; });
    };
    const bool ok = whole(0, base_) && whole(base_ + numel_ * itemsize(), static_cast<int64_t>(bytes_.size()));
    guard(true);
    return ok;
  }

 private:
  template <class T>
  static T get(const unsigned char* from) {
    T x;
    std::memcpy(&x, from, sizeof x);
    return x;
  }

  // Normal numbers, but one in a thousand infinite or NaN where `special`.
  void fill(int64_t i, Random& random, bool positive, bool special) {
    double x = std::normal_distribution<double>()(random);
    if (positive) x = x * x;
    if (special && chance(random, 1e-3)) x = chance(random, 0.5) ? NAN : INFINITY;
    const float narrow = static_cast<float>(x);
    uint32_t bits;
    std::memcpy(&bits, &narrow, sizeof bits);
    uint16_t half = static_cast<uint16_t>(bits >> 16);
    if (dtype_ == kFloat16)
      half = static_cast<uint16_t>(std::isfinite(x) ? random() & (positive ? 0x3fff : 0xbfff) : 0x7c00 + std::isnan(x));
    if (dtype_ == kBFloat16 && std::isnan(x)) half = 0x7fc0;
    const void* from = dtype_ == kFloat64   ? static_cast<const void*>(&x)
                       : dtype_ == kFloat32 ? static_cast<const void*>(&narrow)
                                            : &half;
    std::memcpy(bytes_.data() + base_ + i * itemsize(), from, static_cast<size_t>(itemsize()));
  }

  void guard(bool on) {
    const int64_t end = base_ + numel_ * itemsize();
    if (on) {
      ASAN_POISON_MEMORY_REGION(bytes_.data(), static_cast<size_t>(base_));
      ASAN_POISON_MEMORY_REGION(bytes_.data() + end, bytes_.size() - static_cast<size_t>(end));
    } else {
      ASAN_UNPOISON_MEMORY_REGION(bytes_.data(), bytes_.size());
    }
  }

  Dtype dtype_;
  int64_t numel_, offset_, base_;
  std::vector<unsigned char> bytes_;
};

// One parameter: its tensors, and its step count.
struct Parameter {
  int64_t numel;
  int group;
  bool has_grad;
  std::vector<Tensor> tensors;  // param, grad, states
  float step;
};

struct Group {
  double lr, beta1, beta2, eps, weight_decay;
  bool decoupled, maximize;
  int lr_kind;  // 0: a number, 1: a float32 tensor, 2: a float64 tensor
  float lr32;
};

Parameter make_parameter(Random& random, int groups) {
  static const int64_t telling[] = {0, 1, 7, 8, 9, 511, 512, 513, 1023, 1024, 1025, 4095, 4096, 4097, 8192};
  const int64_t numel = chance(random, 0.5) ? telling[below(random, 15)] : below(random, 9001);
  Parameter p{
      numel, static_cast<int>(below(random, groups)), chance(random, 0.9), {}, static_cast<float>(below(random, 50))};
  const Dtype usual = static_cast<Dtype>(below(random, 4));
  const bool mixed = usual != kFloat64 && chance(random, 0.5);
  const int streams = 4 + static_cast<int>(below(random, 2));
  for (int i = 0; i < streams; ++i)
    p.tensors.emplace_back(random, mixed ? static_cast<Dtype>(below(random, 3)) : usual, numel, i > 2, i > 0);
  return p;
}

Group make_group(Random& random) {
  Group g{1e-2 * (1 + below(random, 9)),
          0.8 + 0.01 * below(random, 19),
          0.9 + 0.001 * below(random, 99),
          1e-8,
          0.1 * below(random, 3),
          chance(random, 0.5),
          chance(random, 0.3),
          static_cast<int>(below(random, 3)),
          0};
  g.lr32 = static_cast<float>(g.lr);
  if (g.lr_kind == 1) g.lr = g.lr32;
  return g;
}

// got is expected, rounded to the dtype, after an error of `slack` on the way.
void compare(const char* what, int64_t row, int64_t i, const Tensor& tensor, double expected, double slack) {
  const double got = tensor[i];
  const Precision p = precision(tensor.dtype());
  const bool same = (std::isnan(got) && std::isnan(expected)) || got == expected;
  check(same || std::abs(got - expected) <= p.relative * 1.001 * std::abs(expected) + p.absolute + slack, what, row, i,
        got, expected);
}

// Adam of arXiv:1412.6980 with torch's decay, amsgrad and maximize, for one tensor; `before` are its tensors' values
// before the step.
void check_tensor(int64_t row, const Parameter& p, const Group& g, double scale,
                  const std::vector<std::vector<double>>& before) {
  const double t = p.step, correction1 = 1 - std::pow(g.beta1, t), correction2 = 1 - std::pow(g.beta2, t);
  const double rounding =
      p.tensors[0].dtype() == kFloat64 ? 0x1p-50 : 0x1p-21;  // of a handful of operations in the walker's arithmetic
  for (int64_t i = 0; i < p.numel; ++i) {
    const double param = before[0][i];
    if (!std::isfinite(
            param)) {  // is lost, and must not come back as a number; what becomes of its states is nobody's concern
      check(!std::isfinite(p.tensors[0][i]), "param", row, i, p.tensors[0][i], param);
      continue;
    }
    double grad = before[1][i] / scale * (g.maximize ? -1 : 1);
    if (!g.decoupled && g.weight_decay != 0) grad += g.weight_decay * param;
    const double exp_avg = g.beta1 * before[2][i] + (1 - g.beta1) * grad;
    const double exp_avg_sq = g.beta2 * before[3][i] + (1 - g.beta2) * grad * grad;
    double second = exp_avg_sq;
    if (p.tensors.size() == 5) second = std::isnan(before[4][i]) || before[4][i] > second ? before[4][i] : second;
    const double denominator = std::sqrt(second) / std::sqrt(correction2) + g.eps,
                 update = g.lr / correction1 * exp_avg / denominator;
    const double decayed = g.decoupled ? param - g.lr * g.weight_decay * param : param;
    const double slack_grad =
        rounding * (std::abs(before[1][i] / scale) + (g.weight_decay != 0 ? g.weight_decay * std::abs(param) : 0));
    const double slack_avg = rounding * std::abs(before[2][i]) + slack_grad;
    const double slack_sq = 4 * rounding * exp_avg_sq + 2 * std::abs(grad) * slack_grad;
    const double slack =
        rounding * (std::abs(param) + 4 * std::abs(update)) + g.lr / correction1 * slack_avg / denominator;
    // Between inf and NaN the order of operations decides, and every order is right.
    if (std::isfinite(exp_avg)) compare("exp_avg", row, i, p.tensors[2], exp_avg, slack_avg);
    else check(!std::isfinite(p.tensors[2][i]), "exp_avg", row, i, p.tensors[2][i], exp_avg);
    compare("exp_avg_sq", row, i, p.tensors[3], exp_avg_sq, slack_sq);
    if (p.tensors.size() == 5) compare("max_exp_avg_sq", row, i, p.tensors[4], second, slack_sq);
    if (std::isfinite(update)) compare("param", row, i, p.tensors[0], decayed - update, slack);
    else check(!std::isfinite(p.tensors[0][i]), "param", row, i, p.tensors[0][i], decayed - update);
  }
}

int64_t run(uint64_t seed) {
  Random random(seed);
  std::vector<Group> groups;
  for (int64_t i = 1 + below(random, 5); i > 0; --i) groups.push_back(make_group(random));
  std::vector<Parameter> params;
  for (int64_t i = 1 + below(random, 40); i > 0; --i)
    params.push_back(make_parameter(random, static_cast<int>(groups.size())));

  const int64_t count = static_cast<int64_t>(params.size());
  std::vector<int64_t> desc, rows(count * kRowWidth, 0), grads(count, 0), lr(groups.size(), 0);
  std::vector<double> raw(groups.size() * kRawWidth, 0), hyper(count * kHyperWidth);
  std::vector<int32_t> group(count);
  std::map<int64_t, int64_t> kinds;
  for (int64_t r = 0; r < count; ++r) {
    Parameter& p = params[r];
    int64_t signature = 0;
    for (int i = 0; i < 6; ++i)
      signature |= int64_t{i < static_cast<int>(p.tensors.size()) ? p.tensors[i].dtype() : kAbsent} << (4 * i);
    bool slow = !p.tensors[0].aligned();
    int64_t* row = &rows[r * kRowWidth];
    row[kNumel] = p.numel, row[kParam] = p.tensors[0].address(), row[kSignature] = signature;
    row[kStep] = reinterpret_cast<int64_t>(&p.step);
    for (size_t s = 2; s < p.tensors.size(); ++s) {
      row[kFirstState + s - 2] = p.tensors[s].address();
      slow = slow || !p.tensors[s].aligned();
    }
    grads[r] = p.has_grad ? p.tensors[1].address() : 0;
    group[r] = p.group;
    const int64_t kind = kinds.emplace(signature, kinds.size()).first->second;
    for (int64_t chunk = 0; chunk * kChunk < p.numel; ++chunk) desc.push_back(chunk << 32 | r << 8 | kind << 1 | slow);
  }
  std::shuffle(desc.begin(), desc.end(), random);  // the order must not matter
  for (size_t i = 0; i < groups.size(); ++i) {
    Group& g = groups[i];
    double* to = &raw[i * kRawWidth];
    to[kLr] = g.lr_kind ? NAN : g.lr, to[kBeta1] = g.beta1, to[kBeta2] = g.beta2, to[kEps] = g.eps;
    to[kWeightDecay] = g.weight_decay, to[kDecoupled] = g.decoupled, to[kMaximize] = g.maximize;
    if (g.lr_kind) lr[i] = g.lr_kind == 1 ? reinterpret_cast<int64_t>(&g.lr32) : reinterpret_cast<int64_t>(&g.lr) | 1;
  }

  int64_t checked = 0;
  for (int step = 0; step < 3; ++step) {
    const bool scaled = chance(random, 0.5), overflow = scaled && chance(random, 0.3);
    const float scale = scaled ? 256.0f : 1.0f, found_inf = overflow ? 2.0f : 0.0f;
    std::fill(hyper.begin(), hyper.end(), NAN);  // as memory nobody has written yet
    std::vector<std::vector<std::vector<double>>> before;
    for (const Parameter& p : params) {
      before.emplace_back();
      for (const Tensor& tensor : p.tensors) before.back().push_back(tensor.values());
    }
    std::vector<float> steps;
    for (const Parameter& p : params) steps.push_back(p.step);

    const Tables t{desc.data(),
                   rows.data(),
                   grads.data(),
                   lr.data(),
                   raw.data(),
                   group.data(),
                   hyper.data(),
                   scaled ? &scale : nullptr,
                   scaled ? &found_inf : nullptr,
                   static_cast<int64_t>(desc.size()),
                   count};
    check(walk("adam", t) == 0, "walk(\"adam\")", 0, 0, 1, 0);
    check(walk("no such rule", t) != 0, "walk(\"no such rule\")", 0, 0, 0, 1);

    for (int64_t r = 0; r < count; ++r) {
      Parameter& p = params[r];
      const bool skipped = overflow || !p.has_grad;
      check(p.step == steps[r] + !skipped, "step", r, 0, p.step, steps[r] + !skipped);
      if (!skipped) check_tensor(r, p, groups[p.group], scale, before[r]);
      for (size_t i = 0; i < p.tensors.size(); ++i) {
        check(p.tensors[i].guards_whole(), "bytes around", r, static_cast<int64_t>(i), 0, 0);
        if (!skipped && i != 1) continue;
        for (int64_t e = 0; e < p.numel; ++e) {
          const double now = p.tensors[i][e], then = before[r][i][e];
          check(now == then || (std::isnan(now) && std::isnan(then)), "untouched tensor", r, e, now, then);
        }
      }
      checked += skipped ? 0 : p.numel;
    }
  }
  return checked;
}

}  // namespace

int main(int argc, char** argv) {
  const uint64_t first = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 0,
                 seeds = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 20;
  int64_t checked = 0;
  for (uint64_t seed = first; seed < first + seeds; ++seed) checked += run(seed);
  std::printf("%ld updates of single elements agree with double precision\n", long(checked));
  return checked == 0;
}
