"""Clips gradients in place."""

import triton
import triton.language as tl

from .formats import compute_dtype, pointer_to, store, stream_dtype
from .prep import clip_coefficient
from .step import walk
from .tables import ALIGNMENT, CHUNK, ROW_WIDTH, ROWS, column, first_element, read_group, row_of, signature_number


@triton.jit
def scaled(
    factor: tl.tensor,
    pointers: tl.tuple,
    values: tl.tuple,
    packing: tl.tuple,
    mask: tl.tensor | None,
    RULE: tl.constexpr,
    DIRECTION: tl.constexpr,
    SIGNATURE: tl.constexpr,
    EMA: tl.constexpr,
    CAUTIOUS: tl.constexpr,
) -> tl.tuple:
    """A pass (see step.py). Stream: the gradient."""
    store(pointers, 0, values[0] * factor, None, mask, SIGNATURE)
    return ()


@triton.jit
def scale_chunk(
    entry: tl.tensor,
    rows: tl.tensor,
    grads: tl.tensor,
    group_hparams: tl.tensor,
    group_index: tl.tensor,
    squares: tl.tensor,
    SIGNATURE: tl.constexpr,
) -> None:
    row, first = row_of(entry), first_element(entry)
    grad = tl.load(grads + row)
    group = read_group(group_hparams, None, tl.load(group_index + row), grad != 0)
    factor = clip_coefficient(group, tl.load(squares), 1.0).to(compute_dtype(SIGNATURE))
    # A gradient that does not change gets a count of 0: none of its elements is read or written.
    changes = (grad != 0) & (factor != 1.0)
    count = tl.where(changes, tl.minimum(tl.load(rows + row * ROW_WIDTH + column(ROWS, "numel")) - first, CHUNK), 0).to(
        tl.int32
    )
    pointers = (pointer_to(grad, first, stream_dtype(SIGNATURE, 0)),)
    walk(factor, pointers, (), count, grad & (ALIGNMENT - 1) == 0, (), scaled, None, None, SIGNATURE, False, False)


@triton.jit(do_not_specialize_on_alignment=["chunk_table", "rows", "grads", "group_hparams", "group_index", "squares"])
def scale_kernel(
    chunk_table: tl.tensor,
    rows: tl.tensor,
    grads: tl.tensor,
    group_hparams: tl.tensor,
    group_index: tl.tensor,
    squares: tl.tensor,
    SIGNATURES: tl.constexpr,
) -> None:
    """Clips one chunk's gradient per program. SIGNATURES: signatures of the gradient alone."""
    entry = tl.load(chunk_table + tl.program_id(0))
    for i in tl.static_range(len(SIGNATURES)):
        if signature_number(entry) == i:
            scale_chunk(entry, rows, grads, group_hparams, group_index, squares, SIGNATURES[i])
