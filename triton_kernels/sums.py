"""Sums over whole tensors: float64, in an order that nothing but the sizes decides, without atomics. So they are the
same to the last bit at every run."""

import triton
import triton.language as tl

from .rules import Hyper
from .step import pointer_to, store_sums, walk
from .tables import CHUNK, RAW_MAX_NORM, RAW_WIDTH, ROW_WIDTH, THREADS, stream_dtype

SPAN_BLOCK = tl.constexpr(512)  # partial sums that a program adds up at once: of one tensor,
TOTAL_BLOCK = tl.constexpr(4096)  # of all of them, which is one program's work
TOTAL_THREADS = tl.constexpr(1024)


@triton.jit
def measure(
    h: Hyper | None,
    pointers: tl.tuple,
    values: tl.tuple,
    mask: tl.tensor | None,
    RULE: tl.constexpr,
    DIRECTION: tl.constexpr,
    KIND: tl.constexpr,
    EMA: tl.constexpr,
) -> tl.tuple:
    """A pass (see step.py) that only looks. Stream: the gradient."""
    return values


@triton.jit
def square_chunk(
    entry: tl.tensor,
    rows: tl.tensor,
    grads: tl.tensor,
    raw: tl.tensor,
    group: tl.tensor,
    partials: tl.tensor,
    KIND: tl.constexpr,
) -> None:
    row = (entry >> 8) & 0xFFFFFF
    first = (entry >> 32) * CHUNK
    grad = tl.load(grads + row)
    max_norm = tl.load(raw + tl.load(group + row).to(tl.int64) * RAW_WIDTH + RAW_MAX_NORM)
    wanted = (grad != 0) & (max_norm != 0.0)
    count = tl.where(wanted, tl.minimum(tl.load(rows + row * ROW_WIDTH) - first, CHUNK), 0).to(tl.int32)
    pointers = (pointer_to(grad, first, stream_dtype(KIND, 0)),)
    none = tl.zeros((THREADS,), tl.float64)
    (squares,) = walk(None, pointers, count, grad & 15 == 0, (none,), measure, None, None, KIND, False)
    # Below 0 a group only shows whether its gradients are finite: 0 times what is not is NaN.
    store_sums(partials, (squares * tl.where(max_norm > 0.0, 1.0, 0.0),))


@triton.jit(do_not_specialize_on_alignment=["desc", "rows", "grads", "raw", "group", "partials"])
def squares_kernel(
    desc: tl.tensor,
    rows: tl.tensor,
    grads: tl.tensor,
    raw: tl.tensor,
    group: tl.tensor,
    partials: tl.tensor,
    KINDS: tl.constexpr,
) -> None:
    """The sum of the squares of one chunk's gradient per program, of those that are clipped. KINDS: of the gradient
    alone."""
    entry = tl.load(desc + tl.program_id(0))
    for i in tl.static_range(len(KINDS)):
        if (entry >> 1) & 127 == i:
            square_chunk(entry, rows, grads, raw, group, partials, KINDS[i])


@triton.jit
def sum_partials(
    partials: tl.tensor, COLUMNS: tl.constexpr, begin: tl.tensor, end: tl.tensor, BLOCK: tl.constexpr
) -> tl.tensor:
    """The sum of the first of `partials`' columns, rows `begin` up to `end`."""
    total = tl.zeros((BLOCK,), tl.float64)
    for i in range(begin, end, BLOCK):
        at = i + tl.arange(0, BLOCK)
        total += tl.load(partials + COLUMNS * at, mask=at < end, other=0.0)
    return tl.sum(total)


@triton.jit(do_not_specialize_on_alignment=["spans", "partials", "sums"])
def spans_kernel(spans: tl.tensor, partials: tl.tensor, sums: tl.tensor) -> None:
    """What `advance` has left of each chunk, added up for one tensor per program."""
    row = tl.program_id(0).to(tl.int64)
    begin, end = tl.load(spans + row), tl.load(spans + row + 1)
    for i in tl.static_range(2):
        tl.store(sums + 2 * row + i, sum_partials(partials + i, 2, begin, end, SPAN_BLOCK))


@triton.jit(do_not_specialize=["chunks"], do_not_specialize_on_alignment=["partials", "out"])
def total_kernel(partials: tl.tensor, out: tl.tensor, chunks: tl.tensor) -> None:
    """What squares_kernel has left of each chunk, added up by a single program."""
    tl.store(out, sum_partials(partials, 1, tl.zeros((), tl.int64), chunks.to(tl.int64), TOTAL_BLOCK))
