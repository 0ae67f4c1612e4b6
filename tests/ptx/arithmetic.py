"""What instructions compute, on arrays: conversions, float arithmetic, comparisons."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .kernel import BYTES
from .lanes import Array, dtype_of
from .memory import lanes as native


def to_bf16(x: Array) -> Array:
    """The bits of float32 values rounded to bfloat16, to nearest even."""
    bits = np.asarray(x, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), rounded.astype(np.uint16))


def from_bf16(bits: Array) -> Array:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def conversion(rounding: list[str], to: str, of: str) -> Callable[[Any], Any] | None:
    floats = ("bf16", "f16", "f32", "f64")
    dtype = dtype_of(to)
    if to in floats and of in floats:
        narrows = BYTES[to] < BYTES[of] or (BYTES[to] == BYTES[of] and to != of)
        if rounding != (["rn"] if narrows else []):
            return None
        if of == "bf16":
            return lambda x: from_bf16(x).astype(dtype)
        if to == "bf16":
            return to_bf16 if of == "f32" else None
        return lambda x: x.astype(dtype)
    if to in floats:
        return (lambda x: x.astype(dtype)) if rounding == ["rn"] and to != "bf16" else None
    if of in floats:
        return truncation(dtype) if rounding == ["rzi"] and of != "bf16" else None
    return (lambda x: x.astype(dtype)) if rounding == [] else None


def truncation(dtype: np.dtype[Any]) -> Callable[[Any], Any]:
    """Converts to an integer towards zero. Out-of-range values become the nearest representable integer, NaN becomes
    0."""
    info = np.iinfo(dtype)

    def convert(x: Any) -> Any:
        wide = np.trunc(x.astype(np.float64))
        inside = np.clip(np.nan_to_num(wide), float(info.min), np.nextafter(float(info.max) + 1.0, 0.0))
        return np.where(wide > float(info.max), info.max, inside.astype(dtype))

    return convert


ROUNDED: dict[str, Callable[..., Any]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "sqrt": np.sqrt,
    "rcp": lambda x: x.dtype.type(1) / x,
}
EXACT: dict[str, Callable[..., Any]] = {"abs": np.abs, "neg": np.negative}
BOUNDS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {  # without and with the modifier .NaN
    "min": (np.fmin, np.minimum),
    "max": (np.fmax, np.maximum),
}
INTEGER: dict[str, Callable[..., Any]] = {
    "add": np.add,
    "sub": np.subtract,
    "min": np.minimum,
    "max": np.maximum,
    "abs": np.abs,
    "neg": np.negative,
}


def float_function(name: str, how: list[str], double: bool) -> Callable[..., Any] | None:
    if name == "rcp" and how == ["approx", "ftz"]:
        return gross_reciprocal if double else None
    if name in ROUNDED:
        return ROUNDED[name] if how == ["rn"] else None
    if name == "fma":
        return fused if how == ["rn"] else None
    if name in BOUNDS:
        return BOUNDS[name][how == ["NaN"]] if how in ([], ["NaN"]) else None
    if name == "abs" and how == ["ftz"]:
        return lambda x: np.where(np.abs(x) < np.finfo(x.dtype).tiny, x.dtype.type(0), np.abs(x))
    return EXACT.get(name) if how == [] else None


def gross_reciprocal(x: Any) -> Any:
    """The reciprocal, of which only the upper 32 bits are computed: the lower ones are 0."""
    return ((1.0 / x).view(np.int64) & ~0xFFFFFFFF).view(np.float64)


def fused(x: Any, y: Any, z: Any) -> Array:
    """x * y + z, rounded once."""
    arrays = [np.ascontiguousarray(array) for array in np.broadcast_arrays(x, y, z)]
    out = np.empty_like(arrays[0])
    function = native().fma32 if out.dtype == np.float32 else native().fma64
    function(out.size, *(array.ctypes.data for array in arrays), out.ctypes.data)
    return out


COMPARISONS: dict[str, Callable[..., Any]] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
OF_UNSIGNED = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}
COMBINED: dict[str, Callable[..., Any]] = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


def comparison(name: str, kind: str) -> Callable[[Any, Any], Any] | None:
    """Comparisons of floats with NaN are true if the name ends in u, otherwise false."""
    if kind not in ("f32", "f64"):
        return COMPARISONS.get(OF_UNSIGNED.get(name, name)) if kind in BYTES and kind[0] in "usb" else None
    if name in ("nan", "num"):
        return lambda x, y: (np.isnan(x) | np.isnan(y)) == (name == "nan")
    ordered = COMPARISONS.get(name.removesuffix("u"))
    if ordered is None:
        return None
    if name.endswith("u"):
        return lambda x, y: ordered(x, y) | np.isnan(x) | np.isnan(y)
    return lambda x, y: ordered(x, y) & ~(np.isnan(x) | np.isnan(y))
