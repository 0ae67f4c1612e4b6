"""Formats in Triton. All loads and stores of values are here.

A dtype signature is one integer: the formats of the walked streams, in order, then ABSENT. The average of the weights
comes directly after the states; in `rows` it has a fixed place. A new format needs an entry of DTYPES, and a branch in
`decode` and in `store_one`.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from fused_optim.engine.layout import ABSENT, SIGNATURE_FIELD_BITS, Format

from .packed import (
    AVERAGE,
    PARAM,
    SQUARE,
    decode_anchored8,
    decode_bf16,
    decode_e8m8,
    encode_anchored8,
    encode_bf16,
    encode_e8m8,
    join_halves,
    join_quarter,
    lower_half,
    lower_quarter,
    threshold,
    upper_half,
)
from .tables import ALIGNMENT

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
DTYPES: dict[int, tl.dtype] = {
    Format.FLOAT32: tl.float32,
    Format.BFLOAT16: tl.bfloat16,
    Format.FLOAT16: tl.float16,
    Format.FLOAT64: tl.float64,
    # Codes of packed formats.
    Format.BFLOAT16_DITHERED: tl.uint16,
    Format.SPLIT16: tl.uint16,
    Format.SPLIT8: tl.uint16,
    Format.E8M8: tl.uint16,
    Format.ANCHORED8: tl.uint8,
}
LOW_DTYPES = {Format.SPLIT16: tl.int16, Format.SPLIT8: tl.int8}
# The value of lanes past the end. With 1 no rule divides by zero. In ANCHORED8 the code 1 is close to 0.
FILL = {
    Format.BFLOAT16_DITHERED: 0x3F80,
    Format.SPLIT16: 0x3F80,
    Format.SPLIT8: 0x3F80,
    Format.E8M8: 0x3F800000 >> 15,
}
DITHERED, SPLIT16, SPLIT8, E8M8, ANCHORED8 = (
    tl.constexpr(int(code))
    for code in (Format.BFLOAT16_DITHERED, Format.SPLIT16, Format.SPLIT8, Format.E8M8, Format.ANCHORED8)
)


class Packing(NamedTuple):
    """Additional arguments of packed formats. It is an empty tuple if no stream is packed.

    low: pointers to the lower halves of the param; not used if its format has none. index: of the elements within the
    whole param, uint32. step: of the param, uint32. exponent: of the anchors.
    """

    low: tl.tensor
    index: tl.tensor
    step: tl.tensor
    exponent: tl.tensor


def pack_signature(formats: tuple[int, ...]) -> int:
    """The signature of streams, in order."""
    return sum(code << SIGNATURE_FIELD_BITS * i for i, code in enumerate((*formats, ABSENT)))


@triton.constexpr_function
def format_of(signature: int, stream: int) -> int:
    return signature >> SIGNATURE_FIELD_BITS * stream & ABSENT


@triton.constexpr_function
def count_streams(signature: int) -> int:
    """The number of tensors of a row that are walked."""
    return next(i for i in range(16) if format_of(signature, i) == ABSENT)


@triton.constexpr_function
def stream_dtype(signature: int, stream: int) -> tl.dtype:
    return DTYPES[format_of(signature, stream)]


@triton.constexpr_function
def fill_of(signature: int, stream: int) -> float:
    code = format_of(signature, stream)
    return FILL[code] if code in FILL else 1  # noqa: SIM401 (Triton knows no dict.get)


@triton.constexpr_function
def is_packed(signature: int) -> bool:
    return any(format_of(signature, i) >= Format.BFLOAT16_DITHERED for i in range(count_streams(signature)))


@triton.constexpr_function
def low_dtype(signature: int) -> tl.dtype:
    """The dtype of the param's second array; int8 if the param has none."""
    code = format_of(signature, 0)
    return LOW_DTYPES[code] if code in LOW_DTYPES else tl.int8  # noqa: SIM401


@triton.constexpr_function
def anchored_stream(signature: int) -> int:
    """The number of the stream in ANCHORED8, or -1. Its exp_avg_sq is the next stream."""
    found = [i for i in range(count_streams(signature)) if format_of(signature, i) == Format.ANCHORED8]
    return found[0] if found else -1


@triton.constexpr_function
def compute_dtype(signature: int) -> tl.dtype:
    """The dtype of the arithmetic, which follows from the first stream."""
    return tl.float64 if format_of(signature, 0) == Format.FLOAT64 else tl.float32


@triton.constexpr_function
def vector_width(signature: int) -> int:
    """Elements per thread and access: 16 bytes of the widest dtype. All streams have the same width. With different
    widths values would move between threads, through shared memory."""
    dtypes = (DTYPES[format_of(signature, i)] for i in range(count_streams(signature)))
    return 128 // max(dtype.primitive_bitwidth for dtype in dtypes)


@triton.jit
def pointer_to(address: tl.tensor, element: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """Pointer to an element of the tensor at an address. The alignment hint must be put on the result of the cast, or
    it is lost. For a misaligned tensor the hint is false and harmless, because its accesses are of one element."""
    address += element * (dtype.primitive_bitwidth // 8)
    return tl.multiple_of(address.to(tl.pointer_type(dtype)), ALIGNMENT)


@triton.jit
def at_elements(packing: tl.tuple, at: tl.tensor) -> tl.tuple:
    """The packing of the elements `at` of a chunk, given that of its first element."""
    if len(packing) == 0:
        return ()
    else:
        return Packing(packing.low + at, packing.index + at.to(tl.uint32), packing.step, packing.exponent)


@triton.jit
def load_codes(pointer: tl.tensor, mask: tl.tensor | None, FILL: tl.constexpr) -> tl.tensor:
    if mask is None:
        return tl.load(pointer)
    else:
        return tl.load(pointer, mask=mask, other=FILL)


@triton.jit
def decode(
    code: tl.tensor, packing: Packing, mask: tl.tensor | None, FORMAT: tl.constexpr, COMPUTE: tl.constexpr
) -> tl.tensor:
    """The values of one stream. For ANCHORED8 these are the codes. Plain formats do not use `packing`."""
    if FORMAT == DITHERED:
        return decode_bf16(code)
    elif FORMAT == SPLIT16:
        return join_halves(code, load_codes(packing.low, mask, 0))
    elif FORMAT == SPLIT8:
        return join_quarter(code, load_codes(packing.low, mask, 0))
    elif FORMAT == E8M8:
        return decode_e8m8(code)
    elif FORMAT == ANCHORED8:
        return code
    else:
        return code.to(COMPUTE)


@triton.jit
def load(pointers: tl.tuple, packing: Packing, mask: tl.tensor | None, SIGNATURE: tl.constexpr) -> tl.tuple:
    """The values of one block of elements, for each stream."""
    COMPUTE: tl.constexpr = compute_dtype(SIGNATURE)
    values: tl.tuple = ()
    for i in tl.static_range(len(pointers)):
        code = load_codes(pointers[i], mask, fill_of(SIGNATURE, i))
        values += (decode(code, packing, mask, format_of(SIGNATURE, i), COMPUTE),)
    ANCHORED: tl.constexpr = anchored_stream(SIGNATURE)
    if ANCHORED >= 0:
        value = decode_anchored8(values[ANCHORED], values[ANCHORED + 1], packing.exponent)
        values = values[:ANCHORED] + (value,) + values[ANCHORED + 1 :]  # noqa: RUF005
    return values


@triton.jit
def narrow(x: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """x in a storage dtype, rounded to nearest even."""
    if INTERPRETED and dtype == tl.bfloat16:  # The interpreter truncates, so the bits are rounded first.
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return x.to(dtype)


@triton.jit
def store_one(
    pointers: tl.tuple,
    stream: tl.constexpr,
    value: tl.tensor,
    square: tl.tensor | None,
    packing: Packing,
    mask: tl.tensor | None,
    SIGNATURE: tl.constexpr,
    WHICH: tl.constexpr,
) -> tl.tensor:
    """Stores one stream. Returns the values as they are stored. square: the stored exp_avg_sq, for ANCHORED8. WHICH:
    the sequence of thresholds."""
    FORMAT: tl.constexpr = format_of(SIGNATURE, stream)
    if FORMAT == DITHERED:
        code = encode_bf16(value, threshold(WHICH, packing.index, packing.step))
        stored = decode_bf16(code)
    elif FORMAT == SPLIT16:
        code = upper_half(value)
        tl.store(packing.low, lower_half(value), mask=mask)
        stored = value
    elif FORMAT == SPLIT8:
        code, low = upper_half(value), lower_quarter(value, threshold(WHICH, packing.index, packing.step))
        tl.store(packing.low, low, mask=mask)
        stored = join_quarter(code, low)
    elif FORMAT == E8M8:
        code = encode_e8m8(value, threshold(WHICH, packing.index, packing.step))
        stored = decode_e8m8(code)
    elif FORMAT == ANCHORED8:
        code = encode_anchored8(value, square, packing.exponent, threshold(WHICH, packing.index, packing.step))
        stored = decode_anchored8(code, square, packing.exponent)
    else:
        code = narrow(value, stream_dtype(SIGNATURE, stream))
        stored = code.to(value.dtype)
    tl.store(pointers[stream], code, mask=mask)
    return stored


@triton.jit
def store(
    pointers: tl.tuple,
    stream: tl.constexpr,
    value: tl.tensor,
    packing: Packing,
    mask: tl.tensor | None,
    SIGNATURE: tl.constexpr,
) -> tl.tensor:
    """Stores the param or the average of the weights. Returns the values as they are stored."""
    return store_one(pointers, stream, value, None, packing, mask, SIGNATURE, PARAM)


@triton.constexpr_function
def sequence_of(state: int) -> int:
    """The sequence of thresholds for a state, by its place in the rule."""
    return AVERAGE.value if state == 0 else SQUARE.value


@triton.jit
def store_states(
    pointers: tl.tuple,
    first: tl.constexpr,
    values: tl.tuple,
    packing: Packing,
    mask: tl.tensor | None,
    SIGNATURE: tl.constexpr,
) -> tl.tuple:
    """Stores the states. first: the number of their first stream. Returns the values as they are stored."""
    stored: tl.tuple = ()
    if anchored_stream(SIGNATURE) == first:
        for i in tl.static_range(1, len(values)):
            stored += (store_one(pointers, first + i, values[i], None, packing, mask, SIGNATURE, SQUARE),)
        exp_avg = store_one(pointers, first, values[0], stored[0], packing, mask, SIGNATURE, AVERAGE)
        return (exp_avg,) + stored  # noqa: RUF005 (Triton compiles no *stored)
    else:
        for i in tl.static_range(len(values)):
            stored += (store_one(pointers, first + i, values[i], None, packing, mask, SIGNATURE, sequence_of(i)),)
        return stored
