// bfloat16 and float16 to float and back, rounding to nearest even, as torch does it. The host's versions are bit
// arithmetic with selects in place of branches, so that the compiler vectorises loops over them and no instruction set
// is required; they hold with denormals flushed, too.
#pragma once
#include "rules.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace fused_optim {

FUSED_HD float bf16_to_float(uint16_t x) { return bits_float(static_cast<uint32_t>(x) << 16); }

// Just under half of the last kept place, and one more where that place is odd: it carries when rounding must go up.
// The upper half of what comes is the bfloat16, for numbers and for NaNs whose lower half is 0.
FUSED_HD uint32_t round_to_upper_half(float x) {
  const uint32_t bits = float_bits(x);
  return bits + 0x7fffu + ((bits >> 16) & 1u);
}

FUSED_HD uint16_t float_to_bf16(float x) {
#ifdef __CUDA_ARCH__
  return __bfloat16_as_ushort(__float2bfloat16_rn(x));
#else
  return static_cast<uint16_t>(x != x ? 0x7fc0u : round_to_upper_half(x) >> 16);
#endif
}

FUSED_HD float f16_to_float(uint16_t x) {
#ifdef __CUDA_ARCH__
  return __half2float(__ushort_as_half(x));
#else
  constexpr int32_t kBias = (127 - 15) << 23;  // between the two exponents
  const uint32_t sign = static_cast<uint32_t>(x & 0x8000) << 16;
  const int32_t magnitude = static_cast<int32_t>(x & 0x7fff) << 13;
  const int32_t normal = magnitude + kBias;
  const int32_t special = normal + kBias;  // inf and NaN: all ones again
  // A denormal is a whole number of 2**-24: as the lowest bits of 2**-14 + x it is exact, and the subtraction leaves x.
  const float denormal = bits_float(static_cast<uint32_t>(normal + (1 << 23))) - 0x1p-14f;
  const int32_t finite = magnitude < (1 << 23) ? static_cast<int32_t>(float_bits(denormal)) : normal;
  return bits_float(sign | static_cast<uint32_t>(magnitude >= (31 << 23) ? special : finite));
#endif
}

FUSED_HD uint16_t float_to_f16(float x) {
#ifdef __CUDA_ARCH__
  return __half_as_ushort(__float2half_rn(x));
#else
  constexpr int32_t kBias = (127 - 15) << 23, kInf16 = 0x7c00, kNan16 = 0x7e00, kInf32 = 0x7f800000;
  const uint32_t bits = float_bits(x);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const int32_t magnitude = static_cast<int32_t>(bits & 0x7fffffffu);
  // The last place of numbers just above 0.5 is 2**-24, float16's smallest step: the addition does the rounding.
  const float aligned = bits_float(static_cast<uint32_t>(magnitude)) + 0.5f;
  const int32_t denormal = static_cast<int32_t>(float_bits(aligned)) - 0x3f000000;
  const int32_t normal = (magnitude - kBias + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  const int32_t finite = magnitude < kBias + (1 << 23) ? denormal : normal;
  const int32_t bounded = magnitude >= 0x47800000 || finite > kInf16 ? kInf16 : finite;
  return static_cast<uint16_t>(sign | static_cast<uint32_t>(magnitude > kInf32 ? kNan16 : bounded));
#endif
}

}  // namespace fused_optim
