"""The walk over the elements of a table on a GPU, a chunk per program. It knows nothing of any optimizer: the
arithmetic is a rule's (rules.py), and a pass says what becomes of it.

A pass gets the pointers and the values of one block of elements, a stream each, stores what it makes of them, and
returns the values whose squares are to be summed.
"""

import triton
import triton.language as tl

from fused_optim.engine.layout import TensorScalars

from .formats import (
    Packing,
    at_elements,
    compute_dtype,
    count_streams,
    is_packed,
    load,
    low_dtype,
    pointer_to,
    store,
    store_states,
    stream_dtype,
    vector_width,
)
from .rules import finite, lerp
from .tables import (
    ALIGNMENT,
    CHUNK,
    ROW_WIDTH,
    ROWS,
    SCALAR_WIDTH,
    SCALARS,
    THREADS,
    column,
    first_element,
    is_aligned,
    row_of,
    signature_number,
)


@triton.jit
def read_scalars(
    tensor_scalars: tl.tensor, trust: tl.tensor | None, row: tl.tensor, dtype: tl.constexpr
) -> TensorScalars:
    """The scalars of one tensor, rounded once from float64. What the rule does not use, the compiler does not load.
    The second walk of a rule with a trust ratio takes the ratio with lr."""
    columns: tl.tuple = ()
    for i in tl.static_range(SCALAR_WIDTH):
        scalar = tl.load(tensor_scalars + row * SCALAR_WIDTH + i)
        if trust is not None and i == column(SCALARS, "lr"):
            scalar *= tl.load(trust + row)
        columns += (scalar.to(dtype),)
    return TensorScalars(*columns)


@triton.jit
def without_small_betas(h: TensorScalars) -> TensorScalars:
    """The same scalars with the constant 0 for the small betas, which then add no instruction."""
    columns: tl.tuple = ()
    for i in tl.static_range(SCALAR_WIDTH):
        if i == column(SCALARS, "small_beta1") or i == column(SCALARS, "small_beta2"):
            columns += (tl.full((), 0.0, h[i].dtype),)
        else:
            columns += (h[i],)
    return TensorScalars(*columns)


@triton.jit
def gradient(h: TensorScalars, param: tl.tensor, grad: tl.tensor) -> tl.tensor:
    """The gradient that a rule sees: scaled, clipped, and with L2 in it."""
    scaled = grad * h.grad_factor
    # Without decay the param stays out of it: 0 * inf would put NaN into the states, and an infinite param must stay.
    return tl.where(h.l2 != 0.0, tl.fma(h.l2, param, scaled), scaled)


@triton.jit
def follow(
    h: TensorScalars,
    pointers: tl.tuple,
    average: tl.tensor,
    param: tl.tensor,
    packing: tl.tuple,
    mask: tl.tensor | None,
    SIGNATURE: tl.constexpr,
) -> None:
    """Lets the average of the weights, which is the last stream, follow the param as it is stored. With weight 1 what
    was there before is gone."""
    new = tl.where(h.ema_weight == 1.0, param, lerp(average, param, h.ema_weight))
    store(pointers, len(pointers) - 1, new, packing, mask, SIGNATURE)


@triton.jit
def update(
    h: TensorScalars,
    pointers: tl.tuple,
    values: tl.tuple,
    packing: tl.tuple,
    mask: tl.tensor | None,
    RULE: tl.constexpr,
    DIRECTION: tl.constexpr,
    SIGNATURE: tl.constexpr,
    EMA: tl.constexpr,
) -> tl.tuple:
    """The whole step of most rules. Streams: param, grad, states; with EMA the average of the weights."""
    param = values[0]
    change, states = RULE(h, param, gradient(h, param, values[1]), values[2 : len(values) - EMA])
    store_states(pointers, 2, states, packing, mask, SIGNATURE)  # before the param, to free registers
    param = store(pointers, 0, param - tl.fma(h.decay, finite(param), change), packing, mask, SIGNATURE)
    if EMA:
        follow(h, pointers, values[len(values) - 1], param, packing, mask, SIGNATURE)
    return ()


@triton.jit
def update_moments(
    h: TensorScalars,
    pointers: tl.tuple,
    values: tl.tuple,
    packing: tl.tuple,
    mask: tl.tensor | None,
    RULE: tl.constexpr,
    DIRECTION: tl.constexpr,
    SIGNATURE: tl.constexpr,
    EMA: tl.constexpr,
) -> tl.tuple:
    """The first walk of a rule with a trust ratio: the states, and the norms of param and update. Streams: param, grad,
    states."""
    param = values[0]
    states = RULE(h, gradient(h, param, values[1]), values[2:])
    # The norm must be that of the update which `apply_update` will make.
    states = store_states(pointers, 2, states, packing, mask, SIGNATURE)
    return param, tl.fma(h.decay, finite(param), DIRECTION(h, states))


@triton.jit
def apply_update(
    h: TensorScalars,
    pointers: tl.tuple,
    values: tl.tuple,
    packing: tl.tuple,
    mask: tl.tensor | None,
    RULE: tl.constexpr,
    DIRECTION: tl.constexpr,
    SIGNATURE: tl.constexpr,
    EMA: tl.constexpr,
) -> tl.tuple:
    """The second walk: the param. Streams: param, states; with EMA the average of the weights."""
    param = values[0]
    change = tl.fma(h.decay, finite(param), DIRECTION(h, values[1 : len(values) - EMA]))
    param = store(pointers, 0, param - h.lr * change, packing, mask, SIGNATURE)
    if EMA:
        follow(h, pointers, values[len(values) - 1], param, packing, mask, SIGNATURE)
    return ()


@triton.jit
def walk_block(
    h: TensorScalars,
    pointers: tl.tuple,
    packing: tl.tuple,
    mask: tl.tensor | None,
    sums: tl.tuple,
    PASS: tl.constexpr,
    RULE: tl.constexpr,
    DIRECTION: tl.constexpr,
    SIGNATURE: tl.constexpr,
    EMA: tl.constexpr,
) -> tl.tuple:
    """One block of elements through a pass. Returns the sums, grown."""
    values = load(pointers, packing, mask, SIGNATURE)
    measured = PASS(h, pointers, values, packing, mask, RULE, DIRECTION, SIGNATURE, EMA)
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
    h: TensorScalars,
    pointers: tl.tuple,
    packing: tl.tuple,
    count: tl.tensor,
    aligned: tl.tensor,
    sums: tl.tuple,
    PASS: tl.constexpr,
    RULE: tl.constexpr,
    DIRECTION: tl.constexpr,
    SIGNATURE: tl.constexpr,
    EMA: tl.constexpr,
) -> tl.tuple:
    """`count` elements of the streams of SIGNATURE. Aligned streams by vectors: whole blocks, then the rest, by the
    threads that have a vector there. All else element by element, also tensors with small betas. Returns the sums,
    grown."""
    WIDTH: tl.constexpr = vector_width(SIGNATURE)
    # One access per thread and stream: a larger block would take the vector width of another signature of the launch.
    BLOCK: tl.constexpr = THREADS * WIDTH
    usual = h
    if RULE is not None:  # without a rule h has no betas
        usual = without_small_betas(h)
        aligned = aligned & (h.small_beta1 == 0.0) & (h.small_beta2 == 0.0)
    # The compiler must see that this is a multiple of WIDTH: then a mask is the same for all of a vector.
    vectored = tl.where(aligned, count // WIDTH, 0) * WIDTH
    blocks = vectored // BLOCK
    for i in range(blocks):
        at = i * BLOCK + tl.arange(0, BLOCK)
        here, packed = [pointer + at for pointer in pointers], at_elements(packing, at)
        sums = walk_block(usual, here, packed, None, sums, PASS, RULE, DIRECTION, SIGNATURE, EMA)
    for i in range(blocks * BLOCK, vectored, BLOCK):
        at = i + tl.arange(0, BLOCK)
        mask = at < vectored
        here, packed = [pointer + at for pointer in pointers], at_elements(packing, at)
        sums = walk_block(usual, here, packed, mask, sums, PASS, RULE, DIRECTION, SIGNATURE, EMA)
    # Sums must not depend on where tensors lie: there, an element belongs to the same thread either way.
    TAIL: tl.constexpr = BLOCK if len(sums) > 0 else THREADS
    start = vectored // TAIL * TAIL if len(sums) > 0 else vectored
    for i in range(start, tl.where(vectored < count, count, 0), TAIL):
        at = i + tl.arange(0, TAIL)
        mask = (at >= vectored) & (at < count)
        here, packed = [pointer + at for pointer in pointers], at_elements(packing, at)
        sums = walk_block(h, here, packed, mask, sums, PASS, RULE, DIRECTION, SIGNATURE, EMA)
    return sums


@triton.jit
def store_sums(partials: tl.tensor, sums: tl.tuple) -> None:
    """To this program's row of partials."""
    for i in tl.static_range(len(sums)):
        tl.store(partials + len(sums) * tl.program_id(0).to(tl.int64) + i, tl.sum(sums[i]))


@triton.jit
def read_packing(fields: tl.tensor, first: tl.tensor, SIGNATURE: tl.constexpr) -> tl.tuple:
    """What the packed formats of a row need, at the first element of a chunk. fields: the row."""
    if is_packed(SIGNATURE):
        step = tl.load(tl.load(fields + column(ROWS, "step")).to(tl.pointer_type(tl.float32)))
        index = (tl.load(fields + column(ROWS, "first_element")) + first).to(tl.uint32)
        exponent = tl.load(fields + column(ROWS, "anchor")).to(tl.int32)
        low = pointer_to(tl.load(fields + column(ROWS, "param_low")), first, low_dtype(SIGNATURE))
        return Packing(low, index, step.to(tl.uint32), exponent)
    else:
        return ()  # Triton 3.5 and 3.6 cannot return None


@triton.jit
def step_chunk(
    entry: tl.tensor,
    rows: tl.tensor,
    grads: tl.tensor | None,
    tensor_scalars: tl.tensor,
    partials: tl.tensor | None,
    trust: tl.tensor | None,
    PASS: tl.constexpr,
    RULE: tl.constexpr,
    DIRECTION: tl.constexpr,
    SIGNATURE: tl.constexpr,
    EMA: tl.constexpr,
) -> None:
    """One chunk of one tensor."""
    row, first = row_of(entry), first_element(entry)
    h = read_scalars(tensor_scalars, trust, row, compute_dtype(SIGNATURE))
    fields = rows + row * ROW_WIDTH
    pointers: tl.tuple = (pointer_to(tl.load(fields + column(ROWS, "param")), first, stream_dtype(SIGNATURE, 0)),)
    aligned = is_aligned(entry)
    if grads is not None:
        grad = tl.load(grads + row)
        pointers += (pointer_to(grad, first, stream_dtype(SIGNATURE, 1)),)
        aligned = aligned & (grad & (ALIGNMENT - 1) == 0)
    STATES: tl.constexpr = len(pointers)
    for i in tl.static_range(STATES, count_streams(SIGNATURE) - EMA):
        address = tl.load(fields + column(ROWS, "state0") + i - STATES)
        pointers += (pointer_to(address, first, stream_dtype(SIGNATURE, i)),)
    if EMA:
        address = tl.load(fields + column(ROWS, "ema"))
        pointers += (pointer_to(address, first, stream_dtype(SIGNATURE, len(pointers))),)
    # A skipped tensor has no elements: no branch, so that all the scalars above are on their way at once.
    count = tl.where(h.skip == 0.0, tl.minimum(tl.load(fields + column(ROWS, "numel")) - first, CHUNK), 0).to(tl.int32)
    packing = read_packing(fields, first, SIGNATURE)
    if partials is None:
        walk(h, pointers, packing, count, aligned, (), PASS, RULE, DIRECTION, SIGNATURE, EMA)
    else:
        none = tl.zeros((THREADS,), tl.float64)
        sums = walk(h, pointers, packing, count, aligned, (none, none), PASS, RULE, DIRECTION, SIGNATURE, EMA)
        store_sums(partials, sums)


@triton.jit(do_not_specialize_on_alignment=["chunk_table", "rows", "grads", "tensor_scalars", "partials", "trust"])
def step_kernel(
    chunk_table: tl.tensor,
    rows: tl.tensor,
    grads: tl.tensor | None,
    tensor_scalars: tl.tensor,
    partials: tl.tensor | None,
    trust: tl.tensor | None,
    PASS: tl.constexpr,
    RULE: tl.constexpr,
    DIRECTION: tl.constexpr,
    SIGNATURES: tl.constexpr,
    EMA: tl.constexpr,
) -> None:
    """One program per entry of chunk_table. SIGNATURES: the streams that PASS walks, of every dtype signature of this
    table, in the order in which chunk_table numbers them. EMA: whether the last of these is an average of the weights.
    What PASS has no use for is None: grads in `apply_update`, partials but in `update_moments`, trust but in
    `apply_update`."""
    entry = tl.load(chunk_table + tl.program_id(0))
    for i in tl.static_range(len(SIGNATURES)):
        if signature_number(entry) == i:
            step_chunk(entry, rows, grads, tensor_scalars, partials, trust, PASS, RULE, DIRECTION, SIGNATURES[i], EMA)
