"""Formats in Triton: how the streams of a row store their values, and the only loads and stores of values.

A dtype signature is one integer here: the format of each stream that is walked, in order, then ABSENT. The average of
the weights comes right after the states, other than in `rows`. A new format is an entry of DTYPES and a branch in
`load` and in `store`.
"""

import triton
import triton.language as tl

from fused_optim.engine.layout import ABSENT, SIGNATURE_FIELD_BITS, Format

from .tables import ALIGNMENT

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
DTYPES: dict[int, tl.dtype] = {
    Format.FLOAT32: tl.float32,
    Format.BFLOAT16: tl.bfloat16,
    Format.FLOAT16: tl.float16,
    Format.FLOAT64: tl.float64,
}


def pack_signature(formats: tuple[int, ...]) -> int:
    """The signature of streams, in order."""
    return sum(code << SIGNATURE_FIELD_BITS * i for i, code in enumerate((*formats, ABSENT)))


@triton.constexpr_function
def format_of(signature: int, stream: int) -> int:
    return signature >> SIGNATURE_FIELD_BITS * stream & ABSENT


@triton.constexpr_function
def count_streams(signature: int) -> int:
    """How many tensors of a row are walked."""
    return next(i for i in range(16) if format_of(signature, i) == ABSENT)


@triton.constexpr_function
def stream_dtype(signature: int, stream: int) -> tl.dtype:
    return DTYPES[format_of(signature, stream)]


@triton.constexpr_function
def compute_dtype(signature: int) -> tl.dtype:
    """Of the arithmetic, by the first stream."""
    return tl.float64 if format_of(signature, 0) == Format.FLOAT64 else tl.float32


@triton.constexpr_function
def vector_width(signature: int) -> int:
    """Elements per thread and access: 16 bytes of the widest dtype. All streams have the same width: else values would
    have to change threads, through shared memory, on their way from one stream to another."""
    dtypes = (DTYPES[format_of(signature, i)] for i in range(count_streams(signature)))
    return 128 // max(dtype.primitive_bitwidth for dtype in dtypes)


@triton.jit
def pointer_to(address: tl.tensor, element: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """Pointer to an element of the tensor at an address. The hint of 16 bytes is lost unless it is put on the very
    value that the cast makes. On a misaligned tensor it is false, and harmless: there, accesses are of one element."""
    address += element * (dtype.primitive_bitwidth // 8)
    return tl.multiple_of(address.to(tl.pointer_type(dtype)), ALIGNMENT)


@triton.jit
def load(pointers: tl.tuple, mask: tl.tensor | None, SIGNATURE: tl.constexpr) -> tl.tuple:
    """The values of one block of elements, a stream each."""
    COMPUTE: tl.constexpr = compute_dtype(SIGNATURE)
    if mask is None:
        return [tl.load(pointer).to(COMPUTE) for pointer in pointers]
    else:  # Lanes past the end compute on ones, which no rule divides by zero, and store nothing.
        return [tl.load(pointer, mask=mask, other=1.0).to(COMPUTE) for pointer in pointers]


@triton.jit
def narrow(x: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """x in a storage dtype, rounded to nearest even."""
    if INTERPRETED and dtype == tl.bfloat16:  # The interpreter truncates: do the rounding on the bits before it.
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return x.to(dtype)


@triton.jit
def store(
    pointers: tl.tuple, first: tl.constexpr, values: tl.tuple, mask: tl.tensor | None, SIGNATURE: tl.constexpr
) -> tl.tuple:
    """values: what the streams from `first` on become. Returns them as they will be read again."""
    stored: tl.tuple = ()
    for i in tl.static_range(len(values)):
        value = narrow(values[i], stream_dtype(SIGNATURE, first + i))
        tl.store(pointers[first + i], value, mask=mask)
        stored += (value.to(values[i].dtype),)
    return stored
