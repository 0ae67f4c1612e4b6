"""Packed formats: conversions between float32 values and codes. Mirrors csrc/formats.h."""

import triton
import triton.language as tl

# The sequences of rounding thresholds. SQUARE: exp_avg_sq and max_exp_avg_sq. AVERAGE: exp_avg and momentum_buffer.
# PARAM: params and averages of the weights. Each sequence has an increment per element and one per step.
SQUARE, AVERAGE, PARAM = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
DITHER_ELEMENT = tl.constexpr((0x6A09E667, 0xBB67AE85, 0x3C6EF372))
DITHER_STEP = tl.constexpr((0x9E3779B9, 0x32370B91, 0xA54FF53B))


@triton.jit
def threshold(WHICH: tl.constexpr, index: tl.tensor, step: tl.tensor) -> tl.tensor:
    """The rounding threshold, uint32, as a fraction of 2**32. index: the element's index in the whole param."""
    return index * DITHER_ELEMENT[WHICH] + step * DITHER_STEP[WHICH]


@triton.jit
def bits_of(x: tl.tensor) -> tl.tensor:
    return x.to(tl.float32).to(tl.uint32, bitcast=True)


@triton.jit
def float_of(bits: tl.tensor) -> tl.tensor:
    return bits.to(tl.uint32).to(tl.float32, bitcast=True)


@triton.jit
def encode_bf16(x: tl.tensor, at: tl.tensor) -> tl.tensor:
    """The bits of bfloat16, uint16, rounded with a threshold. Finite values stay finite."""
    bits = bits_of(x)
    magnitude = bits & 0x7FFFFFFF
    rounded = tl.minimum((magnitude + (at >> 16)) >> 16, 0x7F7F)
    special = tl.where(magnitude == 0x7F800000, 0x7F80, (magnitude >> 16) | 0x40)
    return (tl.where(magnitude < 0x7F800000, rounded, special) | ((bits >> 16) & 0x8000)).to(tl.uint16)


@triton.jit
def decode_bf16(code: tl.tensor) -> tl.tensor:
    return float_of(code.to(tl.uint32) << 16)


@triton.jit
def upper_half(master: tl.tensor) -> tl.tensor:
    """The bits of the bfloat16 param of a master weight, uint16."""
    bits = bits_of(master)
    nan = (bits & 0x7FFFFFFF) > 0x7F800000
    return tl.where(nan, (bits >> 16) | 0x40, (bits + 0x8000) >> 16).to(tl.uint16)


@triton.jit
def lower_half(master: tl.tensor) -> tl.tensor:
    return bits_of(master).to(tl.uint16).to(tl.int16, bitcast=True)


@triton.jit
def join_halves(upper: tl.tensor, lower: tl.tensor) -> tl.tensor:
    """upper: uint16. lower: int16."""
    return float_of((upper.to(tl.uint32) << 16) + lower.to(tl.int32).to(tl.uint32, bitcast=True))


@triton.jit
def lower_quarter(master: tl.tensor, at: tl.tensor) -> tl.tensor:
    """The upper eight bits of the lower half, rounded with a threshold, int8."""
    return tl.minimum((lower_half(master).to(tl.int32) + (at >> 24).to(tl.int32)) >> 8, 127).to(tl.int8)


@triton.jit
def join_quarter(upper: tl.tensor, lower: tl.tensor) -> tl.tensor:
    """upper: uint16. lower: int8."""
    return float_of((upper.to(tl.uint32) << 16) + (lower.to(tl.int32) * 256).to(tl.uint32, bitcast=True))


@triton.jit
def encode_e8m8(x: tl.tensor, at: tl.tensor) -> tl.tensor:
    """The code of a value that is not negative, uint16."""
    code = (tl.minimum(bits_of(x) & 0x7FFFFFFF, 0x7F000000) + (at >> 17)) >> 15
    return tl.where(code < 256, 0, code).to(tl.uint16)


@triton.jit
def decode_e8m8(code: tl.tensor) -> tl.tensor:
    return float_of(code.to(tl.uint32) << 15)


@triton.jit
def anchor_bits(square: tl.tensor, exponent: tl.tensor) -> tl.tensor:
    return ((((bits_of(square) >> 23) + 127) >> 1).to(tl.int32) + exponent).to(tl.uint32) << 23


@triton.jit
def encode_anchored8(x: tl.tensor, square: tl.tensor, exponent: tl.tensor, at: tl.tensor) -> tl.tensor:
    """The code of exp_avg, uint8. square: exp_avg_sq as it is stored."""
    anchor, bits = anchor_bits(square, exponent), bits_of(x)
    total = bits_of(float_of(bits & 0x7FFFFFFF) + float_of(anchor))
    code = tl.minimum((total - anchor + (at >> 13)) >> 19, 127) | ((bits >> 31) << 7)
    return tl.where((bits_of(square) >> 23) != 0, code, 0).to(tl.uint8)


@triton.jit
def decode_anchored8(code: tl.tensor, square: tl.tensor, exponent: tl.tensor) -> tl.tensor:
    anchor = anchor_bits(square, exponent)
    code = code.to(tl.uint32)
    magnitude = float_of(((code & 127) << 19) + anchor) - float_of(anchor)
    value = float_of(bits_of(magnitude) | ((code >> 7) << 31))
    return tl.where((bits_of(square) >> 23) != 0, value, 0.0)
