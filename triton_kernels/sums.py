"""Sums over whole tensors: float64, in an order that nothing but the sizes decides, without atomics. So they are the
same to the last bit at every run."""

import triton
import triton.language as tl

from fused_optim.engine.layout import TensorScalars

from .formats import pointer_to, stream_dtype
from .step import store_sums, walk
from .tables import (
    ALIGNMENT,
    CHUNK,
    GROUP_WIDTH,
    GROUPS,
    ROW_WIDTH,
    ROWS,
    SHARE,
    THREADS,
    column,
    first_element,
    row_of,
    signature_number,
)

ROW_BLOCK = tl.constexpr(512)  # partial sums of one tensor that a program adds up at once
TOTAL_THREADS = tl.constexpr(1024)


@triton.jit
def measure(
    h: TensorScalars | None,
    pointers: tl.tuple,
    values: tl.tuple,
    mask: tl.tensor | None,
    RULE: tl.constexpr,
    DIRECTION: tl.constexpr,
    SIGNATURE: tl.constexpr,
    EMA: tl.constexpr,
) -> tl.tuple:
    """A pass (see step.py) that only looks. Stream: the gradient."""
    return values


@triton.jit
def square_chunk(
    entry: tl.tensor,
    rows: tl.tensor,
    grads: tl.tensor,
    group_hparams: tl.tensor,
    group_index: tl.tensor,
    partials: tl.tensor,
    SIGNATURE: tl.constexpr,
) -> None:
    row, first = row_of(entry), first_element(entry)
    grad = tl.load(grads + row)
    max_norm = tl.load(
        group_hparams + tl.load(group_index + row).to(tl.int64) * GROUP_WIDTH + column(GROUPS, "max_norm")
    )
    wanted = (grad != 0) & (max_norm != 0.0)
    count = tl.where(wanted, tl.minimum(tl.load(rows + row * ROW_WIDTH + column(ROWS, "numel")) - first, CHUNK), 0).to(
        tl.int32
    )
    pointers = (pointer_to(grad, first, stream_dtype(SIGNATURE, 0)),)
    none = tl.zeros((THREADS,), tl.float64)
    (squares,) = walk(
        None, pointers, count, grad & (ALIGNMENT - 1) == 0, (none,), measure, None, None, SIGNATURE, False
    )
    # Below 0 a group only shows whether its gradients are finite: 0 times what is not is NaN.
    store_sums(partials, (squares * tl.where(max_norm > 0.0, 1.0, 0.0),))


@triton.jit(do_not_specialize_on_alignment=["chunk_table", "rows", "grads", "group_hparams", "group_index", "partials"])
def squares_kernel(
    chunk_table: tl.tensor,
    rows: tl.tensor,
    grads: tl.tensor,
    group_hparams: tl.tensor,
    group_index: tl.tensor,
    partials: tl.tensor,
    SIGNATURES: tl.constexpr,
) -> None:
    """The sum of the squares of one chunk's gradient per program, of those that are clipped. SIGNATURES: of the
    gradient alone."""
    entry = tl.load(chunk_table + tl.program_id(0))
    for i in tl.static_range(len(SIGNATURES)):
        if signature_number(entry) == i:
            square_chunk(entry, rows, grads, group_hparams, group_index, partials, SIGNATURES[i])


@triton.jit(do_not_specialize_on_alignment=["row_offsets", "partials", "sums"])
def row_sums_kernel(row_offsets: tl.tensor, partials: tl.tensor, sums: tl.tensor) -> None:
    """What `update_moments` has left of each chunk, added up for one tensor per program."""
    row = tl.program_id(0).to(tl.int64)
    begin, end = tl.load(row_offsets + row), tl.load(row_offsets + row + 1)
    for i in tl.static_range(2):
        total = tl.zeros((ROW_BLOCK,), tl.float64)
        for first in range(begin, end, ROW_BLOCK):
            at = first + tl.arange(0, ROW_BLOCK)
            total += tl.load(partials + 2 * at + i, mask=at < end, other=0.0)
        tl.store(sums + 2 * row + i, tl.sum(total))


@triton.jit(do_not_specialize=["first", "count", "place"], do_not_specialize_on_alignment=["partials", "out"])
def total_kernel(partials: tl.tensor, out: tl.tensor, first: tl.tensor, count: tl.tensor, place: tl.tensor) -> None:
    """Adds up `count` numbers of `partials`, those from `first` on, a share of SHARE neighbours per program:
    out[place + i] becomes the sum of share i. A share has the same numbers on every machine, and all of them are added
    up as one block, so that only the width of a warp (32; 64 on AMD) decides the order of the additions."""
    share = tl.program_id(0).to(tl.int64)
    at = share * SHARE + tl.arange(0, SHARE)
    numbers = tl.load(partials + first + at, mask=at < count, other=0.0)
    tl.store(out + place + share, tl.sum(numbers))
