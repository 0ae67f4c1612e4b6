// What the CPU walker's files share: one tensor of a row, whatever its dtype, and how its work is split. Each
// instruction set has its own, in the namespace that FUSED_ISA names.
#pragma once
#include <algorithm>

#include "../convert.h"
#include "../dispatch.h"
#include "step.h"

#ifndef FUSED_ISA
#define FUSED_ISA baseline
#endif

namespace fused_optim::FUSED_ISA {
namespace {

constexpr int kPrefetchBytes = 512;  // how far ahead of what is being worked on

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

FUSED_HD float widen(float x) { return x; }
FUSED_HD double widen(double x) { return x; }
FUSED_HD float widen(BFloat16 x) { return bf16_to_float(x.bits); }
FUSED_HD float widen(Float16 x) { return f16_to_float(x.bits); }

FUSED_HD void narrow(float x, float& out) { out = x; }
FUSED_HD void narrow(double x, double& out) { out = x; }
FUSED_HD void narrow(float x, BFloat16& out) { out.bits = float_to_bf16(x); }
FUSED_HD void narrow(float x, Float16& out) { out.bits = float_to_f16(x); }

// Two neighbouring bfloat16 values in one word, at any even address: the odd one is a float32 with a lower half to be
// masked away, the even one has to be shifted. So nothing moves between lanes, which two-byte loads and stores cost.
using Pair = uint32_t __attribute__((may_alias, aligned(2)));

FUSED_HD float even(uint32_t pair) { return bits_float(pair << 16); }
FUSED_HD float odd(uint32_t pair) { return bits_float(pair & 0xffff0000u); }

// Calls f with a value of the type that `dtype` stands for.
template <class F>
void visit_dtype(Dtype dtype, F&& f) {
  if (dtype == kFloat32) f(float{});
  else if (dtype == kBFloat16) f(BFloat16{});
  else f(Float16{});
}

// One tensor of a row: where it lies and what it holds.
struct Stream {
  char* data;
  Dtype dtype;
  int itemsize;

  Stream(int64_t address, int64_t signature, int position)
      : data(reinterpret_cast<char*>(address)), dtype(dtype_of(signature, position)) {
    itemsize = dtype == kFloat64 ? 8 : dtype == kFloat32 ? 4 : 2;
  }

  char* at(int64_t element) const { return data + element * itemsize; }

  void prefetch(int64_t element, int count) const {
    const char* ahead = at(element) + kPrefetchBytes;
    const int bytes = count * itemsize;
#pragma GCC unroll 8
    for (int byte = 0; byte < bytes; byte += 64) __builtin_prefetch(ahead + byte);
  }

  // `count` elements as float32, in `scratch`; and back again.
  void load(int64_t element, int count, float* scratch) const {
    visit_dtype(dtype, [&](auto type) {
      const auto* in = reinterpret_cast<const decltype(type)*>(at(element));
      for (int i = 0; i < count; ++i) scratch[i] = widen(in[i]);
    });
  }
  void store(int64_t element, int count, const float* scratch) const {
    visit_dtype(dtype, [&](auto type) {
      auto* out = reinterpret_cast<decltype(type)*>(at(element));
      for (int i = 0; i < count; ++i) narrow(scratch[i], out[i]);
    });
  }
};

// Small pieces taken as they come: a static split waits for the slower core as soon as one is shared.
int grain(const Tables& t, int threads) {
  return static_cast<int>(std::clamp<int64_t>(t.chunks / (int64_t{threads} * 64), 1, 4));
}

}  // namespace
}  // namespace fused_optim::FUSED_ISA
