// A number with a bound on the error of a result computed in the walker's arithmetic: running error analysis (Higham,
// Accuracy and Stability of Numerical Algorithms, section 3.3). Each element of each rule gets its own tolerance.
#pragma once
#include <algorithm>
#include <cmath>

struct Bounded {
  long double value, error;

  // Twice the rounding error of one operation, because the walker can order and fuse operations differently.
  static inline thread_local long double unit = 0x1p-23L;

  // A hyperparameter. The walker computes it in double precision and rounds it once.
  static Bounded constant(long double x) { return rounded(x, 0x1p-48L * std::abs(x)); }
  static Bounded exact(long double x) { return {x, 0}; }
  static Bounded rounded(long double value, long double error) {
    constexpr long double kDenormal = 0x1p-148L;
    return std::isfinite(value) ? Bounded{value, error + unit * std::abs(value) + kDenormal} : Bounded{value, 0};
  }
};

inline Bounded operator-(const Bounded& a) { return {-a.value, a.error}; }

inline Bounded operator+(const Bounded& a, const Bounded& b) {
  return Bounded::rounded(a.value + b.value, a.error + b.error);
}

inline Bounded operator-(const Bounded& a, const Bounded& b) { return a + -b; }

inline Bounded operator*(const Bounded& a, const Bounded& b) {
  return Bounded::rounded(a.value * b.value,
                          std::abs(a.value) * b.error + std::abs(b.value) * a.error + a.error * b.error);
}

inline Bounded operator/(const Bounded& a, const Bounded& b) {
  const long double value = a.value / b.value, least = std::abs(b.value) - b.error;
  return Bounded::rounded(value, least > 0 ? (a.error + std::abs(value) * b.error) / least : INFINITY);
}

inline Bounded square_root(const Bounded& a) {
  const long double value = std::sqrt(a.value), least = std::sqrt(std::max(a.value - a.error, 0.0L));
  return Bounded::rounded(value,
                          value > 0 ? std::min(a.error / (value + least), std::sqrt(a.error)) : std::sqrt(a.error));
}

// The maximum; NaN if either is NaN.
inline Bounded larger(const Bounded& a, const Bounded& b) {
  const Bounded& most = std::isnan(a.value) || a.value > b.value ? a : b;
  return {most.value, std::max(a.error, b.error)};
}

// The sign of NaN is 0, as in torch.sign.
inline Bounded sign(const Bounded& a) {
  if (std::isnan(a.value)) return {0, 0};
  if (std::abs(a.value) <= a.error) return {0, 1};
  return {a.value > 0 ? 1.0L : -1.0L, 0};
}
