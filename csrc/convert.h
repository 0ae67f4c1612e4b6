// Converts bfloat16 and float16 to float and back. Rounds to nearest even, as torch does. The host versions are bit
// arithmetic with selects in place of branches, so the compiler vectorises loops over them and they need no instruction
// set extension. They are also correct if the CPU flushes denormals to zero.
#pragma once
#include "arithmetic.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace fused_optim {

FUSED_HD float bf16_to_float(uint16_t x) { return bits_float(static_cast<uint32_t>(x) << 16); }

// Adds 0x7fff, plus 1 if the last kept bit is odd. The sum carries into the upper half exactly if rounding to nearest
// even goes up. The upper half of the result is the bfloat16. Correct for numbers, and for NaNs with a lower half of 0.
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
  constexpr int32_t kBias = (127 - 15) << 23;  // difference of the exponent biases
  const uint32_t sign = static_cast<uint32_t>(x & 0x8000) << 16;
  const int32_t magnitude = static_cast<int32_t>(x & 0x7fff) << 13;
  const int32_t normal = magnitude + kBias;
  const int32_t special = normal + kBias;  // inf and NaN: an exponent of all ones stays all ones
  // A float16 denormal x is a multiple of 2**-24. The bits encode 2**-14 + x exactly; the subtraction gives x.
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
  // Float32 numbers in [0.5, 1) have a spacing of 2**-24, which is that of float16 denormals. So adding 0.5 rounds.
  const float aligned = bits_float(static_cast<uint32_t>(magnitude)) + 0.5f;
  const int32_t denormal = static_cast<int32_t>(float_bits(aligned)) - 0x3f000000;
  const int32_t normal = (magnitude - kBias + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  const int32_t finite = magnitude < kBias + (1 << 23) ? denormal : normal;
  const int32_t bounded = magnitude >= 0x47800000 || finite > kInf16 ? kInf16 : finite;
  return static_cast<uint16_t>(sign | static_cast<uint32_t>(magnitude > kInf32 ? kNan16 : bounded));
#endif
}

}  // namespace fused_optim
