"""Stream formats narrower than float32, in plain PyTorch. Mirrors csrc/formats.h: all backends store the same bits.

The bits of a float32 are held as int64, because torch has few operations on unsigned integers.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

MAGNITUDE, INFINITY, WORD = 0x7FFFFFFF, 0x7F800000, 0xFFFFFFFF


class Dither(NamedTuple):
    """The constants of a sequence of rounding thresholds: the increments per element and per step."""

    element: int
    step: int


DITHER_SQUARE = Dither(0x6A09E667, 0x9E3779B9)  # the other states
DITHER_AVERAGE = Dither(0xBB67AE85, 0x32370B91)  # the first state of a rule
DITHER_PARAM = Dither(0x3C6EF372, 0xA54FF53B)  # params, and averages of the weights
NEAREST = 0x80000000  # the threshold that rounds to nearest


def bits_of(x: Tensor) -> Tensor:
    return x.float().view(torch.int32).long() & WORD


def float_of(bits: Tensor) -> Tensor:
    return (bits - ((bits & 0x80000000) << 1)).int().view(torch.float32)


def signed(bits: Tensor, dtype: torch.dtype) -> Tensor:
    """The lower bits, as integers of a dtype."""
    width = 8 * dtype.itemsize
    bits = bits & ((1 << width) - 1)
    return (bits - ((bits >> (width - 1)) << width)).to(dtype)


def thresholds(dither: Dither, index: Tensor, step: int) -> Tensor:
    """Rounding thresholds, as fractions of 2**32. index: int64, the elements' indices in the whole param."""
    return ((index & WORD) * dither.element + step * dither.step) & WORD


def encode_bf16(x: Tensor, at: Tensor | int) -> Tensor:
    """bfloat16, rounded with thresholds. Finite values stay finite."""
    bits = bits_of(x)
    magnitude = bits & MAGNITUDE
    rounded = ((magnitude + (at >> 16)) >> 16).clamp(max=0x7F7F)
    special = torch.where(magnitude == INFINITY, 0x7F80, (magnitude >> 16) | 0x40)
    code = torch.where(magnitude < INFINITY, rounded, special) | ((bits >> 16) & 0x8000)
    return signed(code, torch.int16).view(torch.bfloat16)


def split(master: Tensor) -> tuple[Tensor, Tensor]:
    """Splits master weights into bfloat16 params and int16 lower halves. Loses no bit."""
    bits = bits_of(master)
    upper = torch.where((bits & MAGNITUDE) > INFINITY, (bits >> 16) | 0x40, (bits + 0x8000) >> 16)
    return signed(upper, torch.int16).view(torch.bfloat16), signed(bits, torch.int16)


def join(param: Tensor, lower: Tensor) -> Tensor:
    """Joins params and lower halves to master weights, float32. lower: int16, or int8 for 24-bit master weights."""
    unit = 1 if lower.dtype == torch.int16 else 256
    return float_of((bits_of(param) + lower.long() * unit) & WORD)


def convert_lower(lower: Tensor, dtype: torch.dtype) -> Tensor:
    """Converts lower halves to int16 or int8, with rounding to nearest."""
    if lower.dtype == dtype:
        return lower
    return lower.to(dtype) * 256 if dtype == torch.int16 else ((lower.int() + 128) >> 8).clamp(max=127).to(dtype)


def lower_quarter(master: Tensor, at: Tensor | int) -> Tensor:
    """The upper eight bits of the lower halves, rounded with thresholds, as int8."""
    lower = signed(bits_of(master), torch.int16).long()
    return ((lower + (at >> 24)) >> 8).clamp(max=127).to(torch.int8)


def encode_e8m8(x: Tensor, at: Tensor | int) -> Tensor:
    """The codes of values that are not negative, uint16."""
    bits = (bits_of(x) & MAGNITUDE).clamp(max=0x7F000000)
    code = (bits + (at >> 17)) >> 15
    return torch.where(code < 256, 0, code).to(torch.uint16)


def decode_e8m8(code: Tensor) -> Tensor:
    return float_of(code.long() << 15)


def anchor_bits(square: Tensor, exponent: int) -> Tensor:
    return (((bits_of(square) >> 23) + 127) // 2 + exponent) << 23


def encode_anchored8(x: Tensor, square: Tensor, exponent: int, at: Tensor | int) -> Tensor:
    """The codes of exp_avg, uint8. square: exp_avg_sq as it is stored."""
    anchor, bits = anchor_bits(square, exponent), bits_of(x)
    total = bits_of(float_of(bits & MAGNITUDE) + float_of(anchor))
    code = ((total - anchor + (at >> 13)) >> 19).clamp(max=127) | ((bits >> 31) << 7)
    return torch.where(bits_of(square) >> 23 == 0, 0, code).to(torch.uint8)


def decode_anchored8(code: Tensor, square: Tensor, exponent: int) -> Tensor:
    anchor, code = anchor_bits(square, exponent), code.long()
    magnitude = float_of(((code & 127) << 19) + anchor) - float_of(anchor)
    value = float_of(bits_of(magnitude) | ((code >> 7) << 31))
    return torch.where(bits_of(square) >> 23 == 0, 0.0, value)


def anchor_exponents(beta1: Tensor, beta2: Tensor) -> Tensor:
    """The smallest exponents with which anchored8 holds every exp_avg that these betas can make. By Cauchy and Schwarz
    the magnitude of exp_avg is at most C * sqrt(exp_avg_sq), and the largest code stands for 123.5 anchors. inf unless
    beta1**2 < beta2, because otherwise there is no such bound. All are float64."""
    bound = (1 - beta1) / ((1 - beta2) * (1 - beta1**2 / beta2)).sqrt()
    return torch.where(beta1**2 < beta2, (2 * bound / 247).log2().ceil(), math.inf)


def anchor_exponent(beta1: float, beta2: float) -> int | None:
    """The same for two numbers; None if there is no bound."""
    exponent = float(anchor_exponents(*(torch.tensor(beta, dtype=torch.float64) for beta in (beta1, beta2))))
    return int(exponent) if math.isfinite(exponent) else None
