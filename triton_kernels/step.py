"""The walk over the elements of a table on a GPU, a chunk per program. It knows nothing of any optimizer: the
arithmetic is a rule's (rules.py), and a pass says what becomes of it.

A pass gets the pointers and the values of one block of elements, a stream each, stores what it makes of them, and
returns the values whose squares are to be summed.
"""

import triton
import triton.language as tl

from .rules import Hyper, finite, lerp
from .tables import (
    CHUNK,
    HYPER_WIDTH,
    ROW_EMA,
    ROW_PARAM,
    ROW_STATE,
    ROW_WIDTH,
    THREADS,
    count_streams,
    stream_dtype,
    vector_width,
)

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def read_hyper(hyper: tl.tensor, trust: tl.tensor | None, row: tl.tensor, dtype: tl.constexpr) -> Hyper:
    """The scalars of one tensor, rounded once from float64. What the rule does not use, the compiler does not load.
    The second walk of a rule with a trust ratio takes the ratio with lr."""
    lr = tl.load(hyper + row * HYPER_WIDTH)
    if trust is not None:
        lr *= tl.load(trust + row)
    columns: tl.tuple = (lr.to(dtype),)
    for i in tl.static_range(1, HYPER_WIDTH):
        columns += (tl.load(hyper + row * HYPER_WIDTH + i).to(dtype),)
    return Hyper(*columns)


@triton.jit
def pointer_to(address: tl.tensor, element: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """Pointer to an element of the tensor at an address. The hint of 16 bytes is lost unless it is put on the very
    value that the cast makes. On a misaligned tensor it is false, and harmless: there, accesses are of one element."""
    return tl.multiple_of((address + element * (dtype.primitive_bitwidth // 8)).to(tl.pointer_type(dtype)), 16)


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
    pointers: tl.tuple, first: tl.constexpr, values: tl.tuple, mask: tl.tensor | None, KIND: tl.constexpr
) -> tl.tuple:
    """values: what the streams from `first` on become. Returns them as they will be read again."""
    stored: tl.tuple = ()
    for i in tl.static_range(len(values)):
        value = narrow(values[i], stream_dtype(KIND, first + i))
        tl.store(pointers[first + i], value, mask=mask)
        stored += (value.to(values[i].dtype),)
    return stored


@triton.jit
def gradient(h: Hyper, param: tl.tensor, grad: tl.tensor) -> tl.tensor:
    """The gradient that a rule sees: scaled, clipped, and with L2 in it."""
    scaled = grad * h.grad_scale
    # Without decay the param stays out of it: 0 * inf would put NaN into the states, and an infinite param must stay.
    return tl.where(h.l2 != 0.0, tl.fma(h.l2, param, scaled), scaled)


@triton.jit
def follow(
    h: Hyper, pointers: tl.tuple, average: tl.tensor, param: tl.tensor, mask: tl.tensor | None, KIND: tl.constexpr
) -> None:
    """Lets the average of the weights, which is the last stream, follow the param as it is stored. With weight 1 what
    was there before is gone."""
    new = tl.where(h.ema_weight == 1.0, param, lerp(average, param, h.ema_weight))
    store(pointers, len(pointers) - 1, (new,), mask, KIND)


@triton.jit
def update(
    h: Hyper,
    pointers: tl.tuple,
    values: tl.tuple,
    mask: tl.tensor | None,
    RULE: tl.constexpr,
    DIRECTION: tl.constexpr,
    KIND: tl.constexpr,
    EMA: tl.constexpr,
) -> tl.tuple:
    """The whole step of most rules. Streams: param, grad, states; with EMA the average of the weights."""
    param = values[0]
    change, states = RULE(h, param, gradient(h, param, values[1]), values[2 : len(values) - EMA])
    store(pointers, 2, states, mask, KIND)  # before the param, to free registers
    (param,) = store(pointers, 0, (param - tl.fma(h.decay, finite(param), change),), mask, KIND)
    if EMA:
        follow(h, pointers, values[len(values) - 1], param, mask, KIND)
    return ()


@triton.jit
def advance(
    h: Hyper,
    pointers: tl.tuple,
    values: tl.tuple,
    mask: tl.tensor | None,
    RULE: tl.constexpr,
    DIRECTION: tl.constexpr,
    KIND: tl.constexpr,
    EMA: tl.constexpr,
) -> tl.tuple:
    """The first walk of a rule with a trust ratio: the states, and the norms of param and update. Streams: param, grad,
    states."""
    param = values[0]
    states = RULE(h, gradient(h, param, values[1]), values[2:])
    states = store(pointers, 2, states, mask, KIND)  # The norm must be that of the update which `move` will make.
    return param, tl.fma(h.decay, finite(param), DIRECTION(h, states))


@triton.jit
def move(
    h: Hyper,
    pointers: tl.tuple,
    values: tl.tuple,
    mask: tl.tensor | None,
    RULE: tl.constexpr,
    DIRECTION: tl.constexpr,
    KIND: tl.constexpr,
    EMA: tl.constexpr,
) -> tl.tuple:
    """The second walk: the param. Streams: param, states; with EMA the average of the weights."""
    param = values[0]
    change = tl.fma(h.decay, finite(param), DIRECTION(h, values[1 : len(values) - EMA]))
    (param,) = store(pointers, 0, (param - h.lr * change,), mask, KIND)
    if EMA:
        follow(h, pointers, values[len(values) - 1], param, mask, KIND)
    return ()


@triton.jit
def walk_block(
    h: Hyper,
    pointers: tl.tuple,
    mask: tl.tensor | None,
    sums: tl.tuple,
    PASS: tl.constexpr,
    RULE: tl.constexpr,
    DIRECTION: tl.constexpr,
    KIND: tl.constexpr,
    EMA: tl.constexpr,
) -> tl.tuple:
    """One block of elements through a pass. Returns the sums, grown."""
    COMPUTE: tl.constexpr = tl.float64 if stream_dtype(KIND, 0) == tl.float64 else tl.float32
    if mask is None:
        values = [tl.load(pointer).to(COMPUTE) for pointer in pointers]
    else:  # Lanes past the end compute on ones, which no rule divides by zero, and store nothing.
        values = [tl.load(pointer, mask=mask, other=1.0).to(COMPUTE) for pointer in pointers]
    measured = PASS(h, pointers, values, mask, RULE, DIRECTION, KIND, EMA)
    grown: tl.tuple = ()
    for i in tl.static_range(len(measured)):
        grown += (sums[i] + sum_squares(measured[i], mask),)
    return grown


@triton.jit
def sum_squares(x: tl.tensor, mask: tl.tensor | None) -> tl.tensor:
    """float64 [THREADS]: of each thread's elements, so that nothing has to change threads."""
    wide = x.to(tl.float64)
    squares = wide * wide if mask is None else tl.where(mask, wide * wide, 0.0)
    return tl.sum(tl.reshape(squares, (THREADS, x.shape[0] // THREADS)), axis=1)


@triton.jit
def walk(
    h: Hyper,
    pointers: tl.tuple,
    count: tl.tensor,
    aligned: tl.tensor,
    sums: tl.tuple,
    PASS: tl.constexpr,
    RULE: tl.constexpr,
    DIRECTION: tl.constexpr,
    KIND: tl.constexpr,
    EMA: tl.constexpr,
) -> tl.tuple:
    """`count` elements of the streams of KIND. Of aligned streams all whole vectors: blocks of them, then what is left,
    by the threads that have a vector there. All else element by element. Returns the sums, grown."""
    WIDTH: tl.constexpr = vector_width(KIND)
    # One access per thread and stream: a larger block would take the vector width of another kind of the same launch.
    BLOCK: tl.constexpr = THREADS * WIDTH
    # The compiler must see that this is a multiple of WIDTH: then a mask is the same for all of a vector.
    vectored = tl.where(aligned, count // WIDTH, 0) * WIDTH
    blocks = vectored // BLOCK
    for i in range(blocks):
        at = i * BLOCK + tl.arange(0, BLOCK)
        sums = walk_block(h, [pointer + at for pointer in pointers], None, sums, PASS, RULE, DIRECTION, KIND, EMA)
    for i in range(blocks * BLOCK, vectored, BLOCK):
        at = i + tl.arange(0, BLOCK)
        mask = at < vectored
        sums = walk_block(h, [pointer + at for pointer in pointers], mask, sums, PASS, RULE, DIRECTION, KIND, EMA)
    # Sums must not depend on where tensors lie: there, an element belongs to the same thread either way.
    TAIL: tl.constexpr = BLOCK if len(sums) > 0 else THREADS
    start = vectored // TAIL * TAIL if len(sums) > 0 else vectored
    for i in range(start, tl.where(vectored < count, count, 0), TAIL):
        at = i + tl.arange(0, TAIL)
        mask = (at >= vectored) & (at < count)
        sums = walk_block(h, [pointer + at for pointer in pointers], mask, sums, PASS, RULE, DIRECTION, KIND, EMA)
    return sums


@triton.jit
def store_sums(partials: tl.tensor, sums: tl.tuple) -> None:
    """To this program's row of partials."""
    for i in tl.static_range(len(sums)):
        tl.store(partials + len(sums) * tl.program_id(0).to(tl.int64) + i, tl.sum(sums[i]))


@triton.jit
def step_chunk(
    entry: tl.tensor,
    rows: tl.tensor,
    grads: tl.tensor | None,
    hyper: tl.tensor,
    partials: tl.tensor | None,
    trust: tl.tensor | None,
    PASS: tl.constexpr,
    RULE: tl.constexpr,
    DIRECTION: tl.constexpr,
    KIND: tl.constexpr,
    EMA: tl.constexpr,
) -> None:
    """One chunk of one tensor."""
    COMPUTE: tl.constexpr = tl.float64 if stream_dtype(KIND, 0) == tl.float64 else tl.float32
    row = (entry >> 8) & 0xFFFFFF
    first = (entry >> 32) * CHUNK
    h = read_hyper(hyper, trust, row, COMPUTE)
    fields = rows + row * ROW_WIDTH
    pointers: tl.tuple = (pointer_to(tl.load(fields + ROW_PARAM), first, stream_dtype(KIND, 0)),)
    aligned = entry & 1 == 0
    if grads is not None:
        grad = tl.load(grads + row)
        pointers += (pointer_to(grad, first, stream_dtype(KIND, 1)),)
        aligned = aligned & (grad & 15 == 0)
    STATES: tl.constexpr = len(pointers)
    for i in tl.static_range(STATES, count_streams(KIND) - EMA):
        pointers += (pointer_to(tl.load(fields + ROW_STATE + i - STATES), first, stream_dtype(KIND, i)),)
    if EMA:
        pointers += (pointer_to(tl.load(fields + ROW_EMA), first, stream_dtype(KIND, len(pointers))),)
    # A skipped tensor has no elements: no branch, so that all the scalars above are on their way at once.
    count = tl.where(h.skip == 0.0, tl.minimum(tl.load(fields) - first, CHUNK), 0).to(tl.int32)
    if partials is None:
        walk(h, pointers, count, aligned, (), PASS, RULE, DIRECTION, KIND, EMA)
    else:
        none = tl.zeros((THREADS,), tl.float64)
        store_sums(partials, walk(h, pointers, count, aligned, (none, none), PASS, RULE, DIRECTION, KIND, EMA))


@triton.jit(do_not_specialize_on_alignment=["desc", "rows", "grads", "hyper", "partials", "trust"])
def step_kernel(
    desc: tl.tensor,
    rows: tl.tensor,
    grads: tl.tensor | None,
    hyper: tl.tensor,
    partials: tl.tensor | None,
    trust: tl.tensor | None,
    PASS: tl.constexpr,
    RULE: tl.constexpr,
    DIRECTION: tl.constexpr,
    KINDS: tl.constexpr,
    EMA: tl.constexpr,
) -> None:
    """One program per entry of desc. KINDS: the streams that PASS walks, of every kind of this table, in the order in
    which desc numbers them. EMA: whether the last of these is an average of the weights. What PASS has no use for is
    None: grads in `move`, partials but in `advance`, trust but in `move`."""
    entry = tl.load(desc + tl.program_id(0))
    for i in tl.static_range(len(KINDS)):
        if (entry >> 1) & 127 == i:
            step_chunk(entry, rows, grads, hyper, partials, trust, PASS, RULE, DIRECTION, KINDS[i], EMA)
