"""Clipping gradients where they stand."""

import triton
import triton.language as tl

from .prep import clip_coefficient
from .step import pointer_to, store, walk
from .tables import CHUNK, RAW_WIDTH, ROW_WIDTH, stream_dtype


@triton.jit
def scaled(
    factor: tl.tensor,
    pointers: tl.tuple,
    values: tl.tuple,
    mask: tl.tensor | None,
    RULE: tl.constexpr,
    DIRECTION: tl.constexpr,
    KIND: tl.constexpr,
    EMA: tl.constexpr,
) -> tl.tuple:
    """A pass (see step.py). Stream: the gradient."""
    store(pointers, 0, (values[0] * factor,), mask, KIND)
    return ()


@triton.jit
def scale_chunk(
    entry: tl.tensor,
    rows: tl.tensor,
    grads: tl.tensor,
    raw: tl.tensor,
    group: tl.tensor,
    squares: tl.tensor,
    KIND: tl.constexpr,
) -> None:
    COMPUTE: tl.constexpr = tl.float64 if stream_dtype(KIND, 0) == tl.float64 else tl.float32
    row = (entry >> 8) & 0xFFFFFF
    first = (entry >> 32) * CHUNK
    grad = tl.load(grads + row)
    settings = raw + tl.load(group + row).to(tl.int64) * RAW_WIDTH
    factor = clip_coefficient(settings, tl.load(squares), 1.0, grad != 0).to(COMPUTE)
    # What stays as it is has no elements here: it is neither read nor written.
    changes = (grad != 0) & (factor != 1.0)
    count = tl.where(changes, tl.minimum(tl.load(rows + row * ROW_WIDTH) - first, CHUNK), 0).to(tl.int32)
    pointers = (pointer_to(grad, first, stream_dtype(KIND, 0)),)
    walk(factor, pointers, count, grad & 15 == 0, (), scaled, None, None, KIND, False)


@triton.jit(do_not_specialize_on_alignment=["desc", "rows", "grads", "raw", "group", "squares"])
def scale_kernel(
    desc: tl.tensor,
    rows: tl.tensor,
    grads: tl.tensor,
    raw: tl.tensor,
    group: tl.tensor,
    squares: tl.tensor,
    KINDS: tl.constexpr,
) -> None:
    """One chunk's gradient per program. KINDS: of the gradient alone."""
    entry = tl.load(desc + tl.program_id(0))
    for i in tl.static_range(len(KINDS)):
        if (entry >> 1) & 127 == i:
            scale_chunk(entry, rows, grads, raw, group, squares, KINDS[i])
