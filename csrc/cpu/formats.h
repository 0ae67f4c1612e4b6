// Formats on the CPU. All loads and stores of values are here. A new format is a type with `widen` and `narrow`, a line
// in visit_format, and its bytes in fused_optim/engine/layout.py. Rows without a loop for their formats (update_row in
// step.cpp) use Stream::load and Stream::store, which support all formats. Each instruction set has its own copy, in
// the namespace FUSED_ISA.
#pragma once
#include "../convert.h"
#include "../tables.h"
#include "packed.h"
#include "prefetch.h"

#ifdef __F16C__
#include <immintrin.h>
#endif

#ifndef FUSED_ISA
#define FUSED_ISA baseline
#endif

namespace fused_optim::FUSED_ISA {
namespace {

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

// Two neighbouring bfloat16 values in one word, at any even address. Masking gives the odd one as float32, a shift the
// even one. Nothing moves between vector lanes, as it would with two-byte loads and stores.
using Pair = uint32_t __attribute__((may_alias, aligned(2)));

FUSED_HD float even(uint32_t pair) { return bits_float(pair << 16); }
FUSED_HD float odd(uint32_t pair) { return bits_float(pair & 0xffff0000u); }

// Calls f with a value of the format's storage type. Not for float64, whose arithmetic is float64 too, and not for
// packed formats.
template <class F>
void visit_format(Format format, F&& f) {
  if (format == kFloat32) f(float{});
  else if (format == kBfloat16) f(BFloat16{});
  else f(Float16{});
}

template <class P>
void widen_block(const P* in, int count, float* out) {
  for (int i = 0; i < count; ++i) out[i] = widen(in[i]);
}

template <class P>
void narrow_block(const float* in, int count, P* out) {
  for (int i = 0; i < count; ++i) narrow(in[i], out[i]);
}

#ifdef __F16C__
// F16C's conversions, which the compiler does not use by itself: about eight times as fast as integer arithmetic. They
// keep the lower bits of a NaN; `narrow` does not.
inline __m256 widen_eight(const Float16* in) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in)));
}

inline void narrow_eight(__m256 in, Float16* out) {
  const __m256 sign = _mm256_and_ps(in, _mm256_set1_ps(-0.0f));
  const __m256 nan = _mm256_or_ps(sign, _mm256_castsi256_ps(_mm256_set1_epi32(0x7fc00000)));
  const __m256 plain = _mm256_blendv_ps(in, nan, _mm256_cmp_ps(in, in, _CMP_UNORD_Q));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm256_cvtps_ph(plain, _MM_FROUND_TO_NEAREST_INT));
}

inline void widen_block(const Float16* in, int count, float* out) {
  const int whole = count - count % 8;
  for (int i = 0; i < whole; i += 8) _mm256_storeu_ps(out + i, widen_eight(in + i));
  widen_block<Float16>(in + whole, count - whole, out + whole);
}

inline void narrow_block(const float* in, int count, Float16* out) {
  const int whole = count - count % 8;
  for (int i = 0; i < whole; i += 8) narrow_eight(_mm256_loadu_ps(in + i), out + i);
  narrow_block<Float16>(in + whole, count - whole, out + whole);
}
#endif

// One stream of a row: its address and format. The address of a format's second array is in the row, too
// (kRowParamLow).
struct Stream {
  char* data;
  Format format;
  int bytes;  // of an element

  Stream(const int64_t* row, int stream) : Stream(row, row[address_column(stream)], stream) {}
  static Stream of_grad(const int64_t* row, int64_t address) { return {row, address, kStreamGrad}; }

  char* at(int64_t element) const { return data + element * bytes; }

  void prefetch(int64_t element, int count) const {
    prefetch_ahead(at(element), count * bytes);
    if (format == kSplit16 || format == kSplit8) prefetch_low(element, count);
  }

  // Convert `count` elements to float32 in `scratch`, and back. square: exp_avg_sq as it is stored, for anchored8.
  void load(int64_t element, int count, float* scratch, const float* square = nullptr) const {
    if (is_packed(format)) return visit_packed(element, [&](auto x) { decode_block(x, count, square, scratch); });
    visit_format(format,
                 [&](auto type) { widen_block(reinterpret_cast<const decltype(type)*>(at(element)), count, scratch); });
  }
  void store(int64_t element, int count, const float* scratch, const float* square = nullptr) const {
    if (is_packed(format)) return visit_packed(element, [&](auto x) { encode_block(scratch, count, square, x); });
    visit_format(format,
                 [&](auto type) { narrow_block(scratch, count, reinterpret_cast<decltype(type)*>(at(element))); });
  }

  // Calls f with the codes of a packed format, starting at an element.
  template <class F>
  void visit_packed(int64_t element, F&& f) const {
    visit_codes(row_, stream_, element, at(element), f);
  }

 private:
  Stream(const int64_t* row, int64_t address, int stream)
      : data(reinterpret_cast<char*>(address)),
        format(format_of(row[kRowDtypeSignature], stream)),
        bytes(bytes_of(format)),
        row_(row),
        stream_(stream) {}

  void prefetch_low(int64_t element, int count) const {
    const int width = format == kSplit16 ? 2 : 1;
    prefetch_ahead(reinterpret_cast<const char*>(row_[kRowParamLow]) + element * width, count * width);
  }

  const int64_t* row_;
  int stream_;
};

}  // namespace
}  // namespace fused_optim::FUSED_ISA
