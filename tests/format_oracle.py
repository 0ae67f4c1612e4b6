"""The stream formats once more, from their definition, in integers of numpy: nothing of the library is used here."""

from __future__ import annotations

from typing import Any

import numpy as np

Array = Any  # numpy arrays; int64 where bits or codes are meant

SEQUENCES = {  # what an element and what a step adds to a threshold
    "square": (0x6A09E667, 0x9E3779B9),
    "average": (0xBB67AE85, 0x32370B91),
    "param": (0x3C6EF372, 0xA54FF53B),
}


def bits(x: Array) -> Array:
    return np.asarray(x, np.float32).view(np.uint32).astype(np.int64)


def floats(b: Array) -> Array:
    return np.asarray(b % 2**32, np.int64).astype(np.uint32).view(np.float32)


def threshold(kind: str, index: Array, step: int) -> Array:
    element, per_step = SEQUENCES[kind]
    return np.array([(int(i) * element + step * per_step) % 2**32 for i in index], np.int64)


def bf16(x: Array, at: Array) -> Array:
    """Codes of bfloat16: the dropped half rounds up where half and threshold together reach one."""
    sign, magnitude = bits(x) >> 31, bits(x) % 2**31
    rounded = np.minimum((magnitude + at // 2**16) // 2**16, 0x7F7F)
    code = np.where(np.isnan(x), magnitude // 2**16 | 0x40, np.where(np.isinf(x), 0x7F80, rounded))
    return code + sign * 2**15


def halves(x: Array) -> tuple[Array, Array]:
    """Codes of the param, and the lower halves from -32768 to 32767."""
    upper = np.where(np.isnan(x), bits(x) // 2**16 | 0x40, (bits(x) + 2**15) // 2**16 % 2**16)
    lower = bits(x) % 2**16
    return upper, np.where(lower >= 2**15, lower - 2**16, lower)


def quarter(x: Array, at: Array) -> Array:
    return np.minimum((halves(x)[1] + at // 2**24) // 2**8, 127)


def joined(upper: Array, lower: Array, unit: int = 1) -> Array:
    return floats(upper * 2**16 + lower * unit)


def e8m8(x: Array, at: Array) -> Array:
    code = (np.minimum(bits(x) % 2**31, 0x7F000000) + at // 2**17) // 2**15
    return np.where(code < 256, 0, code)


def from_e8m8(code: Array) -> Array:
    return floats(code * 2**15)


def anchor(square: Array, exponent: int) -> tuple[Array, Array]:
    """Bits of the anchor, and whether there is one."""
    biased = bits(square) // 2**23
    return ((biased + 127) // 2 + exponent) * 2**23, biased > 0


def anchored8(x: Array, square: Array, exponent: int, at: Array) -> Array:
    unit, there = anchor(square, exponent)
    total = bits((np.abs(np.asarray(x, np.float32)) + floats(unit)).astype(np.float32))
    code = np.minimum((total - unit + at // 2**13) // 2**19, 127) + (bits(x) >> 31) * 128
    return np.where(there, code, 0)


def from_anchored8(code: Array, square: Array, exponent: int) -> Array:
    unit, there = anchor(square, exponent)
    magnitude = floats(code % 128 * 2**19 + unit) - floats(unit)
    return np.where(there, np.where(code >= 128, -magnitude, magnitude), np.float32(0)).astype(np.float32)
