"""The walk over the elements of a table on a GPU, one chunk per program. It is the same for all optimizers. The
arithmetic is in rules/.

A pass gets pointers and values of one block of elements, for each stream. It stores the new values and returns the
values whose squares are summed.
"""

import triton
import triton.language as tl

from fused_optim.engine.layout import TensorScalars

from .arithmetic import finite, lerp
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
    """The scalars of one tensor, rounded once from float64. The compiler does not load scalars that the rule does not
    use. In the second walk of a rule with a trust ratio, lr is multiplied by the ratio."""
    columns: tl.tuple = ()
    for i in tl.static_range(SCALAR_WIDTH):
        scalar = tl.load(tensor_scalars + row * SCALAR_WIDTH + i)
        if trust is not None and i == column(SCALARS, "lr"):
            scalar *= tl.load(trust + row)
        columns += (scalar.to(dtype),)
    return TensorScalars(*columns)


@triton.jit
def as_usual(h: TensorScalars) -> TensorScalars:
    """The same scalars with the constant 0 for the small betas, which adds no instruction."""
    columns: tl.tuple = ()
    for i in tl.static_range(SCALAR_WIDTH):
        if i == column(SCALARS, "small_beta1") or i == column(SCALARS, "small_beta2"):
            columns += (tl.full((), 0.0, h[i].dtype),)
        else:
            columns += (h[i],)
    return TensorScalars(*columns)


@triton.jit
def gradient(h: TensorScalars, param: tl.tensor, grad: tl.tensor) -> tl.tensor:
    """The gradient that a rule gets: scaled, clipped, with the L2 penalty added."""
    scaled = grad * h.grad_factor
    # Without decay the param is not used: 0 * inf would put NaN into the states.
    return tl.where(h.l2 != 0.0, tl.fma(h.l2, param, scaled), scaled)


@triton.jit
def decaying(h: TensorScalars, param: tl.tensor, update: tl.tensor, CAUTIOUS: tl.constexpr) -> tl.tensor:
    """The param as decoupled decay takes it: 0 where it is inf or NaN, and with cautious decay also where the update
    moves it away from 0. CAUTIOUS: whether some tensor of the table has cautious decay."""
    if CAUTIOUS:
        away = ((param > 0.0) & (update < 0.0)) | ((param < 0.0) & (update > 0.0))
        return tl.where(away, tl.where(h.cautious_decay != 0.0, 0.0, finite(param)), finite(param))
    else:
        return finite(param)


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
    """Updates the average of the weights, which is the last stream, from the param as it is stored. With weight 1 the
    average becomes a copy."""
    new = tl.where(h.ema_weight == 1.0, param, lerp(average, param, h.ema_weight))
    store(pointers, len(pointers) - 1, new, packing, mask, SIGNATURE)


@triton.jit
def move_param(
    h: TensorScalars,
    pointers: tl.tuple,
    values: tl.tuple,
    change: tl.tensor,
    packing: tl.tuple,
    mask: tl.tensor | None,
    SIGNATURE: tl.constexpr,
    EMA: tl.constexpr,
) -> None:
    """Subtracts the change from the param. With EMA updates the average of the weights."""
    param = store(pointers, 0, values[0] - change, packing, mask, SIGNATURE)
    if EMA:
        follow(h, pointers, values[len(values) - 1], param, packing, mask, SIGNATURE)


@triton.jit
def update(
    h: TensorScalars,
    pointers: tl.tuple,
    values: tl.tuple,
    packing: tl.tuple,
    mask: tl.tensor | None,
    RULE: tl.constexpr,
    SECOND: tl.constexpr,
    SIGNATURE: tl.constexpr,
    EMA: tl.constexpr,
    CAUTIOUS: tl.constexpr,
) -> tl.tuple:
    """The whole step of rules without a trust ratio. Streams: param, grad, states; with EMA the average of the
    weights."""
    param = values[0]
    change, states = RULE(h, param, gradient(h, param, values[1]), values[2 : len(values) - EMA])
    store_states(pointers, 2, states, packing, mask, SIGNATURE)  # before the param, to free registers
    change = tl.fma(h.decay, decaying(h, param, change, CAUTIOUS), change)
    move_param(h, pointers, values, change, packing, mask, SIGNATURE, EMA)
    return ()


@triton.jit
def update_moments(
    h: TensorScalars,
    pointers: tl.tuple,
    values: tl.tuple,
    packing: tl.tuple,
    mask: tl.tensor | None,
    RULE: tl.constexpr,
    SECOND: tl.constexpr,
    SIGNATURE: tl.constexpr,
    EMA: tl.constexpr,
    CAUTIOUS: tl.constexpr,
) -> tl.tuple:
    """The first walk of a rule with a ratio. Updates the states. SECOND: the rule's function `measure`. Streams: param,
    grad, states."""
    param = values[0]
    grad = gradient(h, param, values[1])
    states = RULE(h, grad, values[2:])
    # `apply_update` computes its update from the stored states, so these are measured.
    return SECOND(h, param, grad, store_states(pointers, 2, states, packing, mask, SIGNATURE))


@triton.jit
def apply_update(
    h: TensorScalars,
    pointers: tl.tuple,
    values: tl.tuple,
    packing: tl.tuple,
    mask: tl.tensor | None,
    RULE: tl.constexpr,
    SECOND: tl.constexpr,
    SIGNATURE: tl.constexpr,
    EMA: tl.constexpr,
    CAUTIOUS: tl.constexpr,
) -> tl.tuple:
    """The second walk. Updates the param. The ratio multiplies decay, too. SECOND: the rule's function `direction`.
    Streams: param, states; with EMA the average of the weights."""
    change = SECOND(h, values[1 : len(values) - EMA])
    change = h.lr * tl.fma(h.decay, decaying(h, values[0], change, CAUTIOUS), change)
    move_param(h, pointers, values, change, packing, mask, SIGNATURE, EMA)
    return ()


@triton.jit
def apply_update_beside_decay(
    h: TensorScalars,
    pointers: tl.tuple,
    values: tl.tuple,
    packing: tl.tuple,
    mask: tl.tensor | None,
    RULE: tl.constexpr,
    SECOND: tl.constexpr,
    SIGNATURE: tl.constexpr,
    EMA: tl.constexpr,
    CAUTIOUS: tl.constexpr,
) -> tl.tuple:
    """The same where the ratio does not multiply decay."""
    change = SECOND(h, values[1 : len(values) - EMA])
    change = tl.fma(h.decay, decaying(h, values[0], change, CAUTIOUS), h.lr * change)
    move_param(h, pointers, values, change, packing, mask, SIGNATURE, EMA)
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
    SECOND: tl.constexpr,
    SIGNATURE: tl.constexpr,
    EMA: tl.constexpr,
    CAUTIOUS: tl.constexpr,
) -> tl.tuple:
    """Applies a pass to one block of elements. Returns the sums, with those of the block added."""
    values = load(pointers, packing, mask, SIGNATURE)
    measured = PASS(h, pointers, values, packing, mask, RULE, SECOND, SIGNATURE, EMA, CAUTIOUS)
    grown: tl.tuple = ()
    for i in tl.static_range(len(measured)):
        grown += (sums[i] + sum_squares(measured[i], mask),)
    return grown


@triton.jit
def sum_squares(x: tl.tensor, mask: tl.tensor | None) -> tl.tensor:
    """The sum over each thread's elements, float64 [THREADS]. No value moves between threads."""
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
    SECOND: tl.constexpr,
    SIGNATURE: tl.constexpr,
    EMA: tl.constexpr,
    CAUTIOUS: tl.constexpr,
) -> tl.tuple:
    """Applies a pass to `count` elements. Aligned streams are accessed in vectors: first whole blocks, then the rest,
    with a mask. Misaligned tensors and tensors with small betas are accessed element by element. Returns the sums, with
    those of the elements added."""
    WIDTH: tl.constexpr = vector_width(SIGNATURE)
    # One access per thread and stream: a larger block would take the vector width of another signature of the launch.
    BLOCK: tl.constexpr = THREADS * WIDTH
    usual = h
    if RULE is not None:  # without a rule h has no betas
        usual = as_usual(h)
        aligned = aligned & (h.small_beta1 == 0.0) & (h.small_beta2 == 0.0)
    # The compiler must see that this is a multiple of WIDTH. Then a mask is constant within a vector.
    vectored = tl.where(aligned, count // WIDTH, 0) * WIDTH
    blocks = vectored // BLOCK
    for i in range(blocks):
        at = i * BLOCK + tl.arange(0, BLOCK)
        here, packed = [pointer + at for pointer in pointers], at_elements(packing, at)
        sums = walk_block(usual, here, packed, None, sums, PASS, RULE, SECOND, SIGNATURE, EMA, CAUTIOUS)
    for i in range(blocks * BLOCK, vectored, BLOCK):
        at = i + tl.arange(0, BLOCK)
        mask = at < vectored
        here, packed = [pointer + at for pointer in pointers], at_elements(packing, at)
        sums = walk_block(usual, here, packed, mask, sums, PASS, RULE, SECOND, SIGNATURE, EMA, CAUTIOUS)
    # Sums must not depend on alignment: each element belongs to the same thread in both loops.
    TAIL: tl.constexpr = BLOCK if len(sums) > 0 else THREADS
    start = vectored // TAIL * TAIL if len(sums) > 0 else vectored
    for i in range(start, tl.where(vectored < count, count, 0), TAIL):
        at = i + tl.arange(0, TAIL)
        mask = (at >= vectored) & (at < count)
        here, packed = [pointer + at for pointer in pointers], at_elements(packing, at)
        sums = walk_block(h, here, packed, mask, sums, PASS, RULE, SECOND, SIGNATURE, EMA, CAUTIOUS)
    return sums


@triton.jit
def store_sums(partials: tl.tensor, sums: tl.tuple) -> None:
    """Stores the sums into this program's row of partials."""
    for i in tl.static_range(len(sums)):
        tl.store(partials + len(sums) * tl.program_id(0).to(tl.int64) + i, tl.sum(sums[i]))


@triton.jit
def read_packing(fields: tl.tensor, first: tl.tensor, SIGNATURE: tl.constexpr) -> tl.tuple:
    """The packing of a row at the first element of a chunk. fields: pointer to the row."""
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
    SECOND: tl.constexpr,
    SIGNATURE: tl.constexpr,
    EMA: tl.constexpr,
    CAUTIOUS: tl.constexpr,
) -> None:
    """Applies a pass to one chunk of one tensor."""
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
    # A skipped tensor has 0 elements. Without a branch all loads of scalars are issued at once.
    count = tl.where(h.skip == 0.0, tl.minimum(tl.load(fields + column(ROWS, "numel")) - first, CHUNK), 0).to(tl.int32)
    packing = read_packing(fields, first, SIGNATURE)
    if partials is None:
        walk(h, pointers, packing, count, aligned, (), PASS, RULE, SECOND, SIGNATURE, EMA, CAUTIOUS)
    else:
        none = tl.zeros((THREADS,), tl.float64)
        sums = walk(h, pointers, packing, count, aligned, (none, none), PASS, RULE, SECOND, SIGNATURE, EMA, CAUTIOUS)
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
    SECOND: tl.constexpr,
    SIGNATURES: tl.constexpr,
    EMA: tl.constexpr,
    CAUTIOUS: tl.constexpr,
) -> None:
    """One program per entry of chunk_table.

    RULE, SECOND: functions of the rule, or None. SIGNATURES: the streams that PASS walks, for every dtype signature of
    the table, by its number in chunk_table. EMA: whether the last stream is the average of the weights. CAUTIOUS:
    whether a tensor of the table has cautious decay. Arguments that PASS does not use are None: grads in
    `apply_update`, partials except in `update_moments`, trust except in `apply_update`."""
    entry = tl.load(chunk_table + tl.program_id(0))
    for i in tl.static_range(len(SIGNATURES)):
        if signature_number(entry) == i:
            step_chunk(
                entry, rows, grads, tensor_scalars, partials, trust, PASS, RULE, SECOND, SIGNATURES[i], EMA, CAUTIOUS
            )
