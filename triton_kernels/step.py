"""The walk on a GPU: prep_kernel turns hyperparameters into the scalars of this step, step_kernel updates every tensor.

Both read the table (csrc/tables.h) and know nothing of any optimizer: the arithmetic is a rule's (rules.py).
A kind, the dtype signature of a row, is one integer as in the table: a nibble each for param, grad and states, then 15.
"""

import triton
import triton.language as tl

from .rules import Hyper, finite

CHUNK = tl.constexpr(4096)  # elements of one tensor that one program handles: kChunk
THREADS = tl.constexpr(128)  # of one program
PREP_TENSORS = tl.constexpr(32)  # tensors that one program of prep handles, with one warp

# Columns of the table: RowColumn, RawColumn, and the order of Hyper.
ROW_WIDTH, ROW_PARAM, ROW_STEP, ROW_STATE = (tl.constexpr(i) for i in (8, 1, 2, 4))
RAW_WIDTH, RAW_LR, RAW_BETA1, RAW_BETA2, RAW_EPS, RAW_WEIGHT_DECAY, RAW_DECOUPLED, RAW_MAXIMIZE, RAW_A, RAW_B = (
    tl.constexpr(i) for i in (12, 0, 1, 2, 3, 4, 5, 6, 7, 8)
)
HYPER_WIDTH = tl.constexpr(16)

DTYPES = (tl.float32, tl.bfloat16, tl.float16, tl.float64)
ABSENT = 15

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


def pack_kind(codes: tuple[int, ...]) -> int:
    """The table's signature of dtype codes (param, grad, *states)."""
    return sum(code << 4 * i for i, code in enumerate((*codes, ABSENT)))


@triton.constexpr_function
def count_streams(kind: int) -> int:
    """How many tensors a row of this kind has: param, grad and states."""
    return next(i for i in range(16) if kind >> 4 * i & 15 == ABSENT)


@triton.constexpr_function
def stream_dtype(kind: int, stream: int) -> tl.dtype:
    return DTYPES[kind >> 4 * stream & 15]


@triton.constexpr_function
def vector_width(kind: int) -> int:
    """Elements per thread and access: 16 bytes of the widest dtype. All streams have the same width: else values would
    have to change threads, through shared memory, on their way from one stream to another."""
    return 128 // max(DTYPES[kind >> 4 * i & 15].primitive_bitwidth for i in range(count_streams(kind)))


@triton.jit
def power(base: tl.tensor, exponent: tl.tensor) -> tl.tensor:
    """base**exponent by squaring, as csrc/prep.h. exponent: whole numbers below 2**31."""
    bits = exponent.to(tl.int32)
    result = tl.full(base.shape, 1.0, base.dtype)
    for _ in range(31):
        result = tl.where(bits & 1 != 0, result * base, result)
        base = base * base
        bits = bits >> 1
    return result


@triton.jit
def read_lr(address: tl.tensor, otherwise: tl.tensor, mask: tl.tensor) -> tl.tensor:
    """lr from device memory, float64 where the address is odd, else float32; `otherwise` where the address is 0."""
    wide = mask & (address & 1 != 0)
    narrow = mask & (address & 1 == 0) & (address != 0)
    lr64 = tl.load((address & -2).to(tl.pointer_type(tl.float64)), mask=wide, other=0.0)
    lr32 = tl.load(address.to(tl.pointer_type(tl.float32)), mask=narrow, other=0.0)
    return tl.where(wide, lr64, tl.where(narrow, lr32.to(tl.float64), otherwise))


@triton.jit(
    do_not_specialize=["tensors"],
    do_not_specialize_on_alignment=["rows", "grads", "lr", "raw", "group", "hyper", "grad_scale", "found_inf"],
)
def prep_kernel(
    rows: tl.tensor,
    grads: tl.tensor,
    lr: tl.tensor,
    raw: tl.tensor,
    group: tl.tensor,
    hyper: tl.tensor,
    grad_scale: tl.tensor,
    found_inf: tl.tensor,
    tensors: tl.tensor,
) -> None:
    """`prepare` of csrc/prep.h for 32 tensors per program: advances their steps, writes their hyper, in float64."""
    row = tl.program_id(0) * PREP_TENSORS + tl.arange(0, PREP_TENSORS)
    inside = row < tensors
    grad = tl.load(grads + row, mask=inside, other=0)
    skip = tl.where(tl.load(found_inf) != 0.0, 0, grad) == 0
    out = hyper + row.to(tl.int64) * HYPER_WIDTH
    tl.store(out + 11, skip.to(tl.float64), mask=inside)
    go = inside & ~skip

    owner = tl.load(group + row, mask=go, other=0)
    settings = raw + owner.to(tl.int64) * RAW_WIDTH
    beta1 = tl.load(settings + RAW_BETA1, mask=go, other=0.0)
    beta2 = tl.load(settings + RAW_BETA2, mask=go, other=0.0)
    weight_decay = tl.load(settings + RAW_WEIGHT_DECAY, mask=go, other=0.0)
    decoupled = tl.load(settings + RAW_DECOUPLED, mask=go, other=0.0) != 0.0
    maximize = tl.load(settings + RAW_MAXIMIZE, mask=go, other=0.0) != 0.0
    rate = read_lr(tl.load(lr + owner, mask=go, other=0), tl.load(settings + RAW_LR, mask=go, other=0.0), go)

    counter = tl.load(rows + row.to(tl.int64) * ROW_WIDTH + ROW_STEP, mask=go, other=0).to(tl.pointer_type(tl.float32))
    count = tl.load(counter, mask=go, other=0.0) + 1.0
    tl.store(counter, count, mask=go)
    step = count.to(tl.float64)
    scale = 1.0 / tl.load(grad_scale).to(tl.float64)

    tl.store(out + 0, rate, mask=go)
    tl.store(out + 1, beta1, mask=go)
    tl.store(out + 2, beta2, mask=go)
    tl.store(out + 3, tl.load(settings + RAW_EPS, mask=go, other=0.0), mask=go)
    tl.store(out + 4, 1.0 - beta1, mask=go)
    tl.store(out + 5, 1.0 - beta2, mask=go)
    tl.store(out + 6, rate / (1.0 - power(beta1, step)), mask=go)
    tl.store(out + 7, 1.0 / tl.sqrt(1.0 - power(beta2, step)), mask=go)
    tl.store(out + 8, tl.where(maximize, -scale, scale), mask=go)
    tl.store(out + 9, tl.where(decoupled, 0.0, weight_decay), mask=go)
    tl.store(out + 10, tl.where(decoupled, rate * weight_decay, 0.0), mask=go)
    tl.store(out + 12, (step == 1.0).to(tl.float64), mask=go)
    tl.store(out + 13, tl.load(settings + RAW_A, mask=go, other=0.0), mask=go)
    tl.store(out + 14, tl.load(settings + RAW_B, mask=go, other=0.0), mask=go)
    tl.store(out + 15, step, mask=go)


@triton.jit
def read_hyper(hyper: tl.tensor, row: tl.tensor, dtype: tl.constexpr) -> Hyper:
    """The scalars of one tensor, rounded once from float64. What the rule does not use, the compiler does not load."""
    columns: tl.tuple = ()
    for i in tl.static_range(HYPER_WIDTH):
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
def update_block(
    h: Hyper, pointers: tl.tuple, mask: tl.tensor | None, RULE: tl.constexpr, KIND: tl.constexpr, COMPUTE: tl.constexpr
) -> None:
    """`apply` of csrc/prep.h on one block of elements. pointers: param, grad, states."""
    if mask is None:
        values = [tl.load(pointer).to(COMPUTE) for pointer in pointers]
    else:  # Lanes past the end compute on ones, which no rule divides by zero, and store nothing.
        values = [tl.load(pointer, mask=mask, other=1.0).to(COMPUTE) for pointer in pointers]
    param = values[0]
    # Without decay the param stays out of it: 0 * inf would put NaN into the states, and an infinite param must stay.
    scaled = values[1] * h.grad_scale
    grad = tl.where(h.l2 != 0.0, tl.fma(h.l2, param, scaled), scaled)
    update, states = RULE(h, param, grad, values[2:])
    for i in tl.static_range(count_streams(KIND) - 2):
        tl.store(pointers[2 + i], narrow(states[i], stream_dtype(KIND, 2 + i)), mask=mask)
    param -= tl.fma(h.decay, finite(param), update)
    tl.store(pointers[0], narrow(param, stream_dtype(KIND, 0)), mask=mask)


@triton.jit
def walk_chunk(
    entry: tl.tensor, rows: tl.tensor, grads: tl.tensor, hyper: tl.tensor, RULE: tl.constexpr, KIND: tl.constexpr
) -> None:
    """Updates one chunk of one tensor: whole aligned blocks by full vectors, all else element by element."""
    COMPUTE: tl.constexpr = tl.float64 if stream_dtype(KIND, 0) == tl.float64 else tl.float32
    # One access per thread and stream: a larger block would take the vector width of another kind of the same launch.
    BLOCK: tl.constexpr = THREADS * vector_width(KIND)

    row = (entry >> 8) & 0xFFFFFF
    first = (entry >> 32) * CHUNK
    h = read_hyper(hyper, row, COMPUTE)
    fields = rows + row * ROW_WIDTH
    grad = tl.load(grads + row)
    pointers: tl.tuple = (
        pointer_to(tl.load(fields + ROW_PARAM), first, stream_dtype(KIND, 0)),
        pointer_to(grad, first, stream_dtype(KIND, 1)),
    )
    for i in tl.static_range(count_streams(KIND) - 2):
        pointers += (pointer_to(tl.load(fields + ROW_STATE + i), first, stream_dtype(KIND, 2 + i)),)

    # A skipped tensor has no elements: no branch, so that all the scalars above are on their way at once.
    remaining = tl.where(h.skip == 0.0, tl.minimum(tl.load(fields) - first, CHUNK), 0).to(tl.int32)
    aligned = (entry & 1 == 0) & (grad & 15 == 0)
    blocks = tl.where(aligned, remaining // BLOCK, 0)

    for i in range(blocks):
        at = i * BLOCK + tl.arange(0, BLOCK)
        update_block(h, [pointer + at for pointer in pointers], None, RULE, KIND, COMPUTE)
    for i in range(blocks * BLOCK, remaining, THREADS):
        at = i + tl.arange(0, THREADS)
        update_block(h, [pointer + at for pointer in pointers], at < remaining, RULE, KIND, COMPUTE)


@triton.jit(do_not_specialize_on_alignment=["desc", "rows", "grads", "hyper"])
def step_kernel(
    desc: tl.tensor, rows: tl.tensor, grads: tl.tensor, hyper: tl.tensor, RULE: tl.constexpr, KINDS: tl.constexpr
) -> None:
    """One program per entry of desc. KINDS: every kind of this table, in the order in which desc numbers them."""
    entry = tl.load(desc + tl.program_id(0))
    for i in tl.static_range(len(KINDS)):
        if (entry >> 1) & 127 == i:
            walk_chunk(entry, rows, grads, hyper, RULE, KINDS[i])
