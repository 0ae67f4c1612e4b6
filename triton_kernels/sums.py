"""Sums over whole tensors: float64, in an order that nothing but the sizes decides, without atomics. So they are the
same to the last bit at every run."""

import triton
import triton.language as tl

from .rules import Hyper
from .step import pointer_to, store_sums, walk
from .tables import CHUNK, RAW_MAX_NORM, RAW_WIDTH, ROW_WIDTH, SHARE, THREADS, stream_dtype

SPAN_BLOCK = tl.constexpr(512)  # partial sums of one tensor that a program adds up at once
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


@triton.jit(do_not_specialize_on_alignment=["spans", "partials", "sums"])
def spans_kernel(spans: tl.tensor, partials: tl.tensor, sums: tl.tensor) -> None:
    """What `advance` has left of each chunk, added up for one tensor per program."""
    row = tl.program_id(0).to(tl.int64)
    begin, end = tl.load(spans + row), tl.load(spans + row + 1)
    for column in tl.static_range(2):
        total = tl.zeros((SPAN_BLOCK,), tl.float64)
        for i in range(begin, end, SPAN_BLOCK):
            at = i + tl.arange(0, SPAN_BLOCK)
            total += tl.load(partials + 2 * at + column, mask=at < end, other=0.0)
        tl.store(sums + 2 * row + column, tl.sum(total))


@triton.jit(do_not_specialize=["first", "count", "place"], do_not_specialize_on_alignment=["partials", "out"])
def total_kernel(partials: tl.tensor, out: tl.tensor, first: tl.tensor, count: tl.tensor, place: tl.tensor) -> None:
    """Adds up `count` numbers of `partials`, those from `first` on, a share of SHARE neighbours per program:
    out[place + i] becomes the sum of share i. A share has the same numbers on every machine, and all of them are added
    up as one block, so that only the width of a warp (32; 64 on AMD) decides the order of the additions."""
    share = tl.program_id(0).to(tl.int64)
    at = share * SHARE + tl.arange(0, SHARE)
    numbers = tl.load(partials + first + at, mask=at < count, other=0.0)
    tl.store(out + place + share, tl.sum(numbers))
