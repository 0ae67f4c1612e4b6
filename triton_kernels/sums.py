"""Sums over whole tensors, in float64 and without atomics. The order of the additions depends only on sizes, dtypes and
the width of a warp, so every run gives the same bits."""

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

ROW_BLOCK = tl.constexpr(512)  # partial sums of one tensor that a program loads at once
TOTAL_THREADS = tl.constexpr(1024)


@triton.jit
def measure(
    h: TensorScalars | None,
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
    """A pass (see step.py) that stores nothing. Stream: the gradient."""
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
        None, pointers, (), count, grad & (ALIGNMENT - 1) == 0, (none,), measure, None, None, SIGNATURE, False, False
    )
    # A group with max_norm < 0 adds 0, or NaN if its gradients are not finite: 0 * inf and 0 * NaN are NaN.
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
    """The sum of the squares of one chunk's gradient per program, 0 if its group is not clipped. SIGNATURES: signatures
    of the gradient alone."""
    entry = tl.load(chunk_table + tl.program_id(0))
    for i in tl.static_range(len(SIGNATURES)):
        if signature_number(entry) == i:
            square_chunk(entry, rows, grads, group_hparams, group_index, partials, SIGNATURES[i])


@triton.jit(do_not_specialize_on_alignment=["row_offsets", "partials", "sums"])
def row_sums_kernel(row_offsets: tl.tensor, partials: tl.tensor, sums: tl.tensor) -> None:
    """Adds up the partial sums that `update_moments` wrote for each chunk, for one tensor per program."""
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
    """Adds up `count` numbers of `partials`, starting at `first`. Each program sums one share of SHARE consecutive
    numbers and writes the sum of share i to out[place + i]. Shares are the same on every machine, and a share is summed
    as one block, so the order of the additions depends only on the width of a warp (32, or 64 on some AMD GPUs)."""
    share = tl.program_id(0).to(tl.int64)
    at = share * SHARE + tl.arange(0, SHARE)
    numbers = tl.load(partials + first + at, mask=at < count, other=0.0)
    tl.store(out + place + share, tl.sum(numbers))
