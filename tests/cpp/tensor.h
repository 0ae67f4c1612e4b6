// Tensors of any dtype with random numbers, at aligned and odd addresses, between guard bytes. A build with the address
// sanitizer poisons the guard bytes.
#pragma once
#include <sanitizer/asan_interface.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "../../csrc/tables.h"

using namespace fused_optim;

constexpr int64_t kGuard = 64;  // bytes on either side
constexpr unsigned char kGuardByte = 0xa5;

using Random = std::mt19937_64;

inline int64_t below(Random& random, int64_t end) {
  return static_cast<int64_t>(random() % static_cast<uint64_t>(end));
}
inline bool chance(Random& random, double p) { return std::uniform_real_distribution<double>(0, 1)(random) < p; }

inline void check(bool ok, const char* what, int64_t row, int64_t element, double got, double expected) {
  if (ok) return;
  std::printf("FAILED: %s of tensor %ld, element %ld: %.17g, expected %.17g\n", what, long(row), long(element), got,
              expected);
  std::exit(1);
}

// The value of a two-byte float with the given numbers of exponent and mantissa bits.
inline double decode(uint16_t bits, int exponent_bits, int mantissa_bits) {
  const int mantissa = bits & ((1 << mantissa_bits) - 1),
            exponent = (bits >> mantissa_bits) & ((1 << exponent_bits) - 1);
  const int bias = (1 << (exponent_bits - 1)) - 1;
  double magnitude = exponent == 0 ? std::ldexp(mantissa, 1 - bias - mantissa_bits)
                                   : std::ldexp(mantissa + (1 << mantissa_bits), exponent - bias - mantissa_bits);
  if (exponent == (1 << exponent_bits) - 1) magnitude = mantissa ? std::nan("") : INFINITY;
  return bits & 0x8000 ? -magnitude : magnitude;
}

// The largest rounding error of a dtype: relative to a normal number, and absolute for denormal ones.
struct Precision {
  double relative, absolute;
};

inline Precision precision(Format dtype) {
  if (dtype == kBfloat16) return {0x1p-8, 0x1p-133};
  if (dtype == kFloat16) return {0x1p-11, 0x1p-25};
  if (dtype == kFloat32) return {0x1p-24, 0x1p-149};
  return {0x1p-53, 0};
}

inline double largest(Format dtype) {
  if (dtype == kFloat16) return 65504;
  return dtype == kFloat64 ? std::numeric_limits<double>::max() : 0x1.fep127;  // of bfloat16, and nearly of float32
}

class Tensor {
 public:
  Tensor(Random& random, Format dtype, int64_t numel, bool positive, bool special) : dtype_(dtype), numel_(numel) {
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
  Format dtype() const { return dtype_; }
  int64_t address() const { return reinterpret_cast<int64_t>(bytes_.data() + base_); }
  bool aligned() const { return address() % 16 == 0; }

  double operator[](int64_t i) const {
    const unsigned char* from = bytes_.data() + base_ + i * itemsize();
    if (dtype_ == kFloat64) return get<double>(from);
    if (dtype_ == kFloat32) return get<float>(from);
    return dtype_ == kBfloat16 ? decode(get<uint16_t>(from), 8, 7) : decode(get<uint16_t>(from), 5, 10);
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

  // Normally distributed numbers. If `special`, one in a thousand is inf or NaN.
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
    if (dtype_ == kBfloat16 && std::isnan(x)) half = 0x7fc0;
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

  Format dtype_;
  int64_t numel_, offset_, base_;
  std::vector<unsigned char> bytes_;
};
