"""From a group's raw hyperparameters and a tensor's step count to the scalars that its rule reads. Mirrors
csrc/prep.h: float64, a tensor per thread."""

import triton
import triton.language as tl

from .tables import (
    EMA_BEGUN,
    HYPER_SKIP,
    HYPER_WIDTH,
    RAW_A,
    RAW_B,
    RAW_BETA1,
    RAW_BETA2,
    RAW_CLIP_EPS,
    RAW_DECAY_PERIOD,
    RAW_DECOUPLED,
    RAW_EMA_DECAY,
    RAW_EPS,
    RAW_LR,
    RAW_LR_REFERENCE,
    RAW_MAX_NORM,
    RAW_MAXIMIZE,
    RAW_TRUST_ALWAYS,
    RAW_TRUST_HIGH,
    RAW_TRUST_LOW,
    RAW_WEIGHT_DECAY,
    RAW_WIDTH,
    ROW_SIGNATURE,
    ROW_STEP,
    ROW_WIDTH,
)

PREP_TENSORS = tl.constexpr(32)  # tensors that one program handles, with one warp


@triton.jit
def power(base: tl.tensor, exponent: tl.tensor) -> tl.tensor:
    """base**exponent by squaring. exponent: whole numbers below 2**31."""
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


@triton.jit
def clip_coefficient(settings: tl.tensor, squares: tl.tensor, scale: tl.tensor, mask: tl.tensor) -> tl.tensor:
    """By what gradients are multiplied so that the norm of all stays within its bound. A norm that is NaN goes on into
    the params."""
    max_norm = tl.load(settings + RAW_MAX_NORM, mask=mask, other=0.0)
    # Where nothing is clipped, 0 / 1 does no harm.
    bound = tl.where(max_norm <= 0.0, 1.0, tl.sqrt(squares) * scale + tl.load(settings + RAW_CLIP_EPS, mask, 1.0))
    coefficient = max_norm / bound
    return tl.where((max_norm <= 0.0) | (coefficient >= 1.0), 1.0, coefficient)


@triton.jit
def decoupled_decay(
    settings: tl.tensor, weight_decay: tl.tensor, rate: tl.tensor, mask: tl.tensor, TRUST: tl.constexpr
) -> tl.tensor:
    """What each step takes off the params, per unit. A trust ratio and lr come to it later, where there is one."""
    if TRUST:
        return weight_decay
    else:
        reference = tl.load(settings + RAW_LR_REFERENCE, mask=mask, other=0.0)
        period = tl.load(settings + RAW_DECAY_PERIOD, mask=mask, other=1.0)
        share = rate / tl.where(reference == 0.0, 1.0, reference) * weight_decay / tl.sqrt(period)
        return tl.where(reference == 0.0, 0.0, share)


@triton.jit(
    do_not_specialize=["tensors"],
    do_not_specialize_on_alignment=[
        "rows",
        "grads",
        "lr",
        "raw",
        "group",
        "hyper",
        "grad_scale",
        "found_inf",
        "squares",
    ],
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
    squares: tl.tensor | None,
    tensors: tl.tensor,
    TRUST: tl.constexpr,
) -> None:
    """`prepare` of csrc/prep.h for 32 tensors per program: advances their steps, writes their hyper. TRUST: whether
    their rule has a trust ratio."""
    row = tl.program_id(0) * PREP_TENSORS + tl.arange(0, PREP_TENSORS)
    inside = row < tensors
    grad = tl.load(grads + row, mask=inside, other=0)
    skip = tl.where(tl.load(found_inf) != 0.0, 0, grad) == 0
    out = hyper + row.to(tl.int64) * HYPER_WIDTH
    tl.store(out + HYPER_SKIP, skip.to(tl.float64), mask=inside)
    go = inside & ~skip

    owner = tl.load(group + row, mask=go, other=0)
    settings = raw + owner.to(tl.int64) * RAW_WIDTH
    beta1 = tl.load(settings + RAW_BETA1, mask=go, other=0.0)
    beta2 = tl.load(settings + RAW_BETA2, mask=go, other=0.0)
    weight_decay = tl.load(settings + RAW_WEIGHT_DECAY, mask=go, other=0.0)
    decoupled = tl.load(settings + RAW_DECOUPLED, mask=go, other=0.0) != 0.0
    ema_decay = tl.load(settings + RAW_EMA_DECAY, mask=go, other=0.0)
    maximize = tl.load(settings + RAW_MAXIMIZE, mask=go, other=0.0) != 0.0
    rate = read_lr(tl.load(lr + owner, mask=go, other=0), tl.load(settings + RAW_LR, mask=go, other=0.0), go)

    fields = rows + row.to(tl.int64) * ROW_WIDTH
    counter = tl.load(fields + ROW_STEP, mask=go, other=0).to(tl.pointer_type(tl.float32))
    count = tl.load(counter, mask=go, other=0.0) + 1.0
    tl.store(counter, count, mask=go)
    step = count.to(tl.float64)
    correction1 = 1.0 - power(beta1, step)
    correction2 = 1.0 - power(beta2, step)
    scale = 1.0 / tl.load(grad_scale).to(tl.float64)
    if squares is not None:
        scale *= clip_coefficient(settings, tl.load(squares), scale, go)
    decay = decoupled_decay(settings, weight_decay, rate, go, TRUST)

    tl.store(out + 0, rate, mask=go)
    tl.store(out + 1, beta1, mask=go)
    copies = (step == 1.0) & (tl.load(fields + ROW_SIGNATURE, mask=go, other=0) & EMA_BEGUN == 0)
    tl.store(out + 2, tl.where(copies, 1.0, 1.0 - ema_decay), mask=go)
    tl.store(out + 3, tl.load(settings + RAW_EPS, mask=go, other=0.0), mask=go)
    tl.store(out + 4, 1.0 - beta1, mask=go)
    tl.store(out + 5, 1.0 - beta2, mask=go)
    tl.store(out + 6, rate / correction1, mask=go)
    tl.store(out + 7, 1.0 / tl.sqrt(correction2), mask=go)
    tl.store(out + 8, tl.where(maximize, -scale, scale), mask=go)
    tl.store(out + 9, tl.where(decoupled, 0.0, weight_decay), mask=go)
    tl.store(out + 10, tl.where(decoupled, decay, 0.0), mask=go)
    tl.store(out + 12, (step == 1.0).to(tl.float64), mask=go)
    tl.store(out + 13, 1.0 - tl.load(settings + RAW_A, mask=go, other=0.0), mask=go)
    tl.store(out + 14, 1.0 - tl.load(settings + RAW_B, mask=go, other=0.0), mask=go)
    tl.store(out + 15, 1.0 / correction1, mask=go)


@triton.jit(do_not_specialize=["tensors"], do_not_specialize_on_alignment=["raw", "group", "hyper", "sums", "trust"])
def trust_kernel(
    raw: tl.tensor, group: tl.tensor, hyper: tl.tensor, sums: tl.tensor, trust: tl.tensor, tensors: tl.tensor
) -> None:
    """`trust_ratio` of csrc/prep.h for 32 tensors per program. That of a skipped tensor stays what it is."""
    row = tl.program_id(0) * PREP_TENSORS + tl.arange(0, PREP_TENSORS)
    inside = row < tensors
    go = inside & (tl.load(hyper + row.to(tl.int64) * HYPER_WIDTH + HYPER_SKIP, mask=inside, other=1.0) == 0.0)
    settings = raw + tl.load(group + row, mask=go, other=0).to(tl.int64) * RAW_WIDTH
    weight_decay = tl.load(settings + RAW_WEIGHT_DECAY, mask=go, other=0.0)
    always = tl.load(settings + RAW_TRUST_ALWAYS, mask=go, other=0.0)
    low = tl.load(settings + RAW_TRUST_LOW, mask=go, other=0.0)
    high = tl.load(settings + RAW_TRUST_HIGH, mask=go, other=0.0)

    param = tl.sqrt(tl.load(sums + 2 * row, mask=go, other=1.0))
    update = tl.sqrt(tl.load(sums + 2 * row + 1, mask=go, other=1.0))
    ratio = param / tl.where(update == 0.0, 1.0, update)
    ratio = tl.where((param == 0.0) | (update == 0.0), 1.0, ratio)
    ratio = tl.where(ratio < low, low, ratio)
    ratio = tl.where(ratio > high, high, ratio)
    tl.store(trust + row, tl.where((weight_decay == 0.0) & (always == 0.0), 1.0, ratio), mask=go)
