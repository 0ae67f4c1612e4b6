// Stream formats narrower than float32. Each element is stored by itself; rules see float32 values only. The code is
// integer arithmetic on the bits of float32 (and one exact float addition), with selects in place of branches. So the
// compiler vectorises loops over it, and every backend stores the same bits.
#pragma once
#include "arithmetic.h"
#include "tables.h"

namespace fused_optim {

constexpr uint32_t kMagnitude = 0x7fffffffu, kInfinity = 0x7f800000u;

FUSED_HD uint32_t smaller(uint32_t a, uint32_t b) {  // both below 2**31, because SSE2 compares signed integers only
  return static_cast<int32_t>(a) < static_cast<int32_t>(b) ? a : b;
}

// Dithered rounding. The dropped part of a value rounds up if it is above a threshold in [0, 1), a fraction of 2**32.
// Thresholds are a low-discrepancy sequence of the element's index in the whole param and the param's step, so the
// roundings of one element over time, and of neighbours, cancel. Each stream has its own pair of constants.
struct Dither {
  uint32_t element, step;
};
constexpr Dither kDitherSquare{0x6A09E667u, 0x9E3779B9u};   // exp_avg_sq, max_exp_avg_sq
constexpr Dither kDitherAverage{0xBB67AE85u, 0x32370B91u};  // exp_avg, momentum_buffer
constexpr Dither kDitherParam{0x3C6EF372u, 0xA54FF53Bu};    // params, and averages of the weights
constexpr uint32_t kNearest = 0x80000000u;                  // the threshold that rounds to nearest

FUSED_HD uint32_t threshold(Dither dither, uint32_t index, uint32_t step) {
  return index * dither.element + step * dither.step;
}

// The thresholds of one stream in one step, starting at an element.
struct Thresholds {
  uint32_t first, element;

  FUSED_HD uint32_t operator[](int i) const { return first + static_cast<uint32_t>(i) * element; }
};

// For a row whose step has been counted. begin: the index of the row's element that gets the first threshold.
FUSED_HD Thresholds thresholds_of(const int64_t* row, int stream, int64_t begin) {
  const Dither dither = stream == kStreamParam || stream == kStreamEma ? kDitherParam
                        : stream == kStreamState0                      ? kDitherAverage
                                                                       : kDitherSquare;
  const uint32_t step = static_cast<uint32_t>(*reinterpret_cast<const float*>(row[kRowStep]));
  return {threshold(dither, static_cast<uint32_t>(row[kRowFirstElement] + begin), step), dither.element};
}

// bfloat16, rounded with a threshold. Finite values stay finite, infinity stays infinity, NaN becomes quiet.
FUSED_HD uint16_t encode_bf16(float x, uint32_t at) {
  const uint32_t bits = float_bits(x), magnitude = bits & kMagnitude;
  const uint32_t rounded = smaller((magnitude + (at >> 16)) >> 16, 0x7f7fu);
  const uint32_t special = magnitude == kInfinity ? 0x7f80u : (magnitude >> 16) | 0x40u;
  const uint32_t code = static_cast<int32_t>(magnitude) < static_cast<int32_t>(kInfinity) ? rounded : special;
  return static_cast<uint16_t>(code | ((bits >> 16) & 0x8000u));
}

// Exact master weights. The upper half, rounded half away from zero, is the bfloat16 param. The lower half holds the
// master's own lower bits. Joined they give the master, bit for bit.
FUSED_HD uint16_t upper_half(float master) {
  const uint32_t bits = float_bits(master);
  const bool nan = static_cast<int32_t>(bits & kMagnitude) > static_cast<int32_t>(kInfinity);
  return static_cast<uint16_t>(nan ? (bits >> 16) | 0x40u : (bits + 0x8000u) >> 16);
}

FUSED_HD int16_t lower_half(float master) { return static_cast<int16_t>(float_bits(master) & 0xffffu); }

FUSED_HD float join_halves(uint16_t upper, int16_t lower) {
  return bits_float((static_cast<uint32_t>(upper) << 16) + static_cast<uint32_t>(int32_t{lower}));
}

// 24-bit master weights: the upper eight bits of the lower half, rounded with a threshold.
FUSED_HD int8_t lower_quarter(float master, uint32_t at) {
  const int32_t lower = (int32_t{lower_half(master)} + static_cast<int32_t>(at >> 24)) >> 8;
  return static_cast<int8_t>(lower < 127 ? lower : 127);
}

FUSED_HD float join_quarter(uint16_t upper, int8_t lower) {
  return bits_float((static_cast<uint32_t>(upper) << 16) + static_cast<uint32_t>(int32_t{lower} * 256));
}

// e8m8, for values that are not negative: float32's exponent and the upper eight bits of its mantissa. Values below the
// smallest normal number become 0. Infinity and NaN become the largest code, 2**127.
FUSED_HD uint16_t encode_e8m8(float x, uint32_t at) {
  const uint32_t bits = smaller(float_bits(x) & kMagnitude, 0x7f000000u);
  const uint32_t code = (bits + (at >> 17)) >> 15;
  return static_cast<uint16_t>(static_cast<int32_t>(code) < 256 ? 0 : code);
}

FUSED_HD float decode_e8m8(uint16_t code) { return bits_float(static_cast<uint32_t>(code) << 15); }

// anchored8: a sign and seven bits of |x|, on a scale that is linear near 0 and logarithmic above. Its unit, the
// anchor, is the power of two next to sqrt(square) times 2**exponent, where `square` is exp_avg_sq as it is stored. The
// bits of the float32 sum |x| + anchor are the scale. If the square is 0 or denormal, the code is 0.
FUSED_HD uint32_t anchor_bits(float square, int32_t exponent) {
  const int32_t root = (static_cast<int32_t>(float_bits(square) >> 23) + 127) >> 1;
  return static_cast<uint32_t>(root + exponent) << 23;
}

FUSED_HD bool has_anchor(float square) { return (float_bits(square) >> 23) != 0; }

FUSED_HD uint8_t encode_anchored8(float x, float square, int32_t exponent, uint32_t at) {
  const uint32_t anchor = anchor_bits(square, exponent), bits = float_bits(x);
  const uint32_t sum = float_bits(bits_float(bits & kMagnitude) + bits_float(anchor));
  const uint32_t code = smaller((sum - anchor + (at >> 13)) >> 19, 127u) | ((bits >> 31) << 7);
  return static_cast<uint8_t>(has_anchor(square) ? code : 0u);
}

FUSED_HD float decode_anchored8(uint8_t code, float square, int32_t exponent) {
  const uint32_t anchor = anchor_bits(square, exponent);
  const float magnitude = bits_float(((code & 127u) << 19) + anchor) - bits_float(anchor);
  const uint32_t bits = float_bits(magnitude) | (static_cast<uint32_t>(code >> 7) << 31);
  return has_anchor(square) ? bits_float(bits) : 0.0f;
}

}  // namespace fused_optim
