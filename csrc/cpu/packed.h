// Packed formats (../formats.h) on the CPU: loads and stores of the elements of one block, to float32 and back. Loops
// over them are vectorised. `square` is exp_avg_sq as it is stored, which anchored8 needs.
#pragma once
#include "../formats.h"
#include "prefetch.h"

#ifndef FUSED_ISA
#define FUSED_ISA baseline
#endif

namespace fused_optim::FUSED_ISA {
namespace {

struct DitheredCodes {
  static constexpr bool anchored = false;
  uint16_t* code;
  Thresholds at;

  FUSED_HD float load(int i) const { return bits_float(static_cast<uint32_t>(code[i]) << 16); }
  FUSED_HD void store(int i, float x) const { code[i] = encode_bf16(x, at[i]); }
  FUSED_HD void prefetch(int i, int count) const { prefetch_ahead(code + i, count); }
};

struct Split16Codes {
  static constexpr bool anchored = false;
  uint16_t* upper;
  int16_t* lower;

  FUSED_HD float load(int i) const { return join_halves(upper[i], lower[i]); }
  FUSED_HD void store(int i, float x) const {
    upper[i] = upper_half(x);
    lower[i] = lower_half(x);
  }
  FUSED_HD void prefetch(int i, int count) const {
    prefetch_ahead(upper + i, count);
    prefetch_ahead(lower + i, count);
  }
};

struct Split8Codes {
  static constexpr bool anchored = false;
  uint16_t* upper;
  int8_t* lower;
  Thresholds at;

  FUSED_HD float load(int i) const { return join_quarter(upper[i], lower[i]); }
  FUSED_HD void store(int i, float x) const {
    upper[i] = upper_half(x);
    lower[i] = lower_quarter(x, at[i]);
  }
  FUSED_HD void prefetch(int i, int count) const {
    prefetch_ahead(upper + i, count);
    prefetch_ahead(lower + i, count);
  }
};

struct E8m8Codes {
  static constexpr bool anchored = false;
  uint16_t* code;
  Thresholds at;

  FUSED_HD float load(int i) const { return decode_e8m8(code[i]); }
  FUSED_HD void store(int i, float x) const { code[i] = encode_e8m8(x, at[i]); }
  FUSED_HD void prefetch(int i, int count) const { prefetch_ahead(code + i, count); }
};

struct Anchored8Codes {
  static constexpr bool anchored = true;
  uint8_t* code;
  int exponent;
  Thresholds at;

  FUSED_HD float load(int i, float square) const { return decode_anchored8(code[i], square, exponent); }
  FUSED_HD void store(int i, float x, float square) const { code[i] = encode_anchored8(x, square, exponent, at[i]); }
  FUSED_HD void prefetch(int i, int count) const { prefetch_ahead(code + i, count); }
};

// Calls f with the codes of a stream of a row, starting at an element. data: the address of that element.
template <class F>
void visit_codes(const int64_t* row, int stream, int64_t element, char* data, F&& f) {
  const Thresholds at = thresholds_of(row, stream, element);
  auto* const halves = reinterpret_cast<uint16_t*>(data);
  switch (format_of(row[kRowDtypeSignature], stream)) {
    case kBfloat16Dithered:
      return f(DitheredCodes{halves, at});
    case kSplit16:
      return f(Split16Codes{halves, reinterpret_cast<int16_t*>(row[kRowParamLow]) + element});
    case kSplit8:
      return f(Split8Codes{halves, reinterpret_cast<int8_t*>(row[kRowParamLow]) + element, at});
    case kE8m8:
      return f(E8m8Codes{halves, at});
    default:
      return f(Anchored8Codes{reinterpret_cast<uint8_t*>(data), static_cast<int>(row[kRowAnchor]), at});
  }
}

template <class Codes>
void decode_block(const Codes& from, int count, const float* square, float* out) {
  const Codes codes = from;
#pragma omp simd
  for (int i = 0; i < count; ++i) {
    if constexpr (Codes::anchored) out[i] = codes.load(i, square[i]);
    else out[i] = codes.load(i);
  }
}

template <class Codes>
void encode_block(const float* in, int count, const float* square, const Codes& to) {
  const Codes codes = to;
#pragma omp simd
  for (int i = 0; i < count; ++i) {
    if constexpr (Codes::anchored) codes.store(i, in[i], square[i]);
    else codes.store(i, in[i]);
  }
}

// The states of a rule, for a loop over all streams at once: two packed states, or any number in float32.
struct CompactStates {
  Anchored8Codes exp_avg;
  E8m8Codes exp_avg_sq;

  FUSED_HD void load(int i, float (&value)[2]) const {
    value[1] = exp_avg_sq.load(i);
    value[0] = exp_avg.load(i, value[1]);
  }
  FUSED_HD void store(int i, const float (&value)[2]) const {
    const uint16_t code = encode_e8m8(value[1], exp_avg_sq.at[i]);
    exp_avg_sq.code[i] = code;
    exp_avg.store(i, value[0], decode_e8m8(code));
  }
  FUSED_HD void prefetch(int i, int count) const {
    exp_avg.prefetch(i, count);
    exp_avg_sq.prefetch(i, count);
  }
};

template <int S>
struct FloatStates {
  float* state[S > 0 ? S : 1];

  FUSED_HD void load(int i, float (&value)[S > 0 ? S : 1]) const {
    for (int s = 0; s < S; ++s) value[s] = state[s][i];
  }
  FUSED_HD void store(int i, const float (&value)[S > 0 ? S : 1]) const {
    for (int s = 0; s < S; ++s) state[s][i] = value[s];
  }
  FUSED_HD void prefetch(int i, int count) const {
    for (int s = 0; s < S; ++s) prefetch_ahead(state[s] + i, count);
  }
};

}  // namespace
}  // namespace fused_optim::FUSED_ISA
