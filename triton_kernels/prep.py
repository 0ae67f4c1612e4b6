"""Prep computes the scalars that a rule reads, from a group's hyperparameters and a tensor's step count. It uses
float64 and one thread per tensor. Mirrors csrc/prep.h."""

import triton
import triton.language as tl

from fused_optim.engine.layout import GroupHparams

from .arithmetic import largest_lr
from .rules.rule import BiasCorrections
from .tables import EMA_BEGUN, GROUP_WIDTH, GROUPS, ROW_WIDTH, ROWS, SCALAR_WIDTH, SCALARS, column, read_group

PREP_TENSORS = tl.constexpr(32)  # tensors per program, which is one warp


@triton.jit
def bias_correction(beta: tl.tensor, step: tl.tensor) -> tl.tensor:
    """1 - beta**step, computed from 1 - beta: a subtraction of beta**step from 1 loses digits when beta is near 1.
    step: integers below 2**31."""
    bits = step.to(tl.int32)
    result = tl.zeros(beta.shape, beta.dtype)
    doubled = 1.0 - beta  # 1 - beta**1, 1 - beta**2, 1 - beta**4, ...
    for _ in range(31):
        # The `where` between product and sum keeps the compiler from fusing them, so the bits are those of csrc/prep.h.
        result += tl.where(bits & 1 != 0, (1.0 - result) * doubled, 0.0)
        doubled *= 2.0 - doubled
        bits = bits >> 1
    return result


@triton.jit
def clip_coefficient(group: GroupHparams, squares: tl.tensor, scale: tl.tensor) -> tl.tensor:
    """The factor that scales a group's gradients so that the norm of all gradients is at most max_norm. A NaN norm
    gives a NaN factor, so NaN is not hidden."""
    # The divisor 1 avoids 0 / 0 in groups that are not clipped.
    bound = tl.where(group.max_norm <= 0.0, 1.0, tl.sqrt(squares) * scale + group.clip_eps)
    coefficient = group.max_norm / bound
    return tl.where((group.max_norm <= 0.0) | (coefficient >= 1.0), 1.0, coefficient)


@triton.jit
def decoupled_decay(group: GroupHparams, SCALED: tl.constexpr) -> tl.tensor:
    """The fraction of a param that decoupled decay subtracts in a step. SCALED: without lr, because the second walk
    multiplies it by lr and the ratio."""
    none = group.lr_reference == 0.0
    reference = tl.where(none, 1.0, group.lr_reference)
    if SCALED:
        share = group.weight_decay / reference / tl.sqrt(group.decay_period)
    else:
        share = group.lr / reference * group.weight_decay / tl.sqrt(group.decay_period)
    return tl.where(none, 0.0, share)


@triton.jit
def with_lr(group: GroupHparams, lr: tl.tensor) -> GroupHparams:
    """The same hyperparameters with another lr."""
    columns: tl.tuple = ()
    for i in tl.static_range(GROUP_WIDTH):
        if i == column(GROUPS, "lr"):
            columns += (lr,)
        else:
            columns += (group[i],)
    return GroupHparams(*columns)


@triton.jit
def corrected_share(fields: tl.tensor, lr: tl.tensor, mask: tl.tensor, RUNNING: tl.constexpr) -> tl.tensor:
    """The share of its decay that a tensor keeps under corrected decay, arXiv:2506.02285: lr over the largest lr so
    far, which is the running scalar after those of the rule. 1 without one."""
    address = tl.load(fields + column(ROWS, "running0") + RUNNING, mask=mask, other=0)
    stored, corrects = address.to(tl.pointer_type(tl.float32)), mask & (address != 0)
    largest = largest_lr(lr, tl.load(stored, mask=corrects, other=0.0).to(tl.float64))
    tl.store(stored, largest.to(tl.float32), mask=corrects)
    return tl.where(corrects & (largest > 0.0), lr / tl.where(largest > 0.0, largest, 1.0), 1.0)


@triton.jit
def own_scalars(
    fields: tl.tensor,
    group: GroupHparams,
    at: BiasCorrections,
    mask: tl.tensor,
    OWN_SCALARS: tl.constexpr,
    RUNNING: tl.constexpr,
) -> tl.tuple:
    """The rule's own scalars. Running scalars are stored as float32, and `scalars` gets them in float64. fields:
    pointers to the rows."""
    if RUNNING == 0:
        return OWN_SCALARS(group, at)
    else:
        pointers: tl.tuple = ()
        running: tl.tuple = ()
        for i in tl.static_range(RUNNING):
            address = tl.load(fields + column(ROWS, "running0") + i, mask=mask, other=0)
            pointers += (address.to(tl.pointer_type(tl.float32)),)
            running += (tl.load(pointers[i], mask=mask, other=0.5).to(tl.float64),)
        own, running = OWN_SCALARS(group, at, running)
        for i in tl.static_range(RUNNING):
            tl.store(pointers[i], running[i].to(tl.float32), mask=mask)
        return own


@triton.jit(
    do_not_specialize=["tensors"],
    do_not_specialize_on_alignment=[
        "rows",
        "grads",
        "lr",
        "group_hparams",
        "group_index",
        "tensor_scalars",
        "grad_scale",
        "found_inf",
        "squares",
    ],
)
def prep_kernel(
    rows: tl.tensor,
    grads: tl.tensor,
    lr: tl.tensor,
    group_hparams: tl.tensor,
    group_index: tl.tensor,
    tensor_scalars: tl.tensor,
    grad_scale: tl.tensor,
    found_inf: tl.tensor,
    squares: tl.tensor | None,
    tensors: tl.tensor,
    OWN_SCALARS: tl.constexpr,
    SCALES_DECAY: tl.constexpr,
    RUNNING: tl.constexpr,
) -> None:
    """`prepare` of csrc/prep.h for 32 tensors per program: increments their step counts and writes their scalars.
    OWN_SCALARS: the rule's function `scalars`, or None. SCALES_DECAY: whether the rule's ratio multiplies decay.
    RUNNING: the number of the rule's running scalars."""
    row = tl.program_id(0) * PREP_TENSORS + tl.arange(0, PREP_TENSORS)
    inside = row < tensors
    grad = tl.load(grads + row, mask=inside, other=0)
    skip = tl.where(tl.load(found_inf) != 0.0, 0, grad) == 0
    out = tensor_scalars + row.to(tl.int64) * SCALAR_WIDTH
    tl.store(out + column(SCALARS, "skip"), skip.to(tl.float64), mask=inside)
    go = inside & ~skip

    owner = tl.load(group_index + row, mask=go, other=0)
    group = read_group(group_hparams, lr, owner, go)
    decoupled = group.decoupled != 0.0

    fields = rows + row.to(tl.int64) * ROW_WIDTH
    counter = tl.load(fields + column(ROWS, "step"), mask=go, other=0).to(tl.pointer_type(tl.float32))
    count = tl.load(counter, mask=go, other=0.0) + 1.0
    tl.store(counter, count, mask=go)
    step = count.to(tl.float64)
    at = BiasCorrections(
        step,
        bias_correction(group.beta1, step),
        bias_correction(group.beta2, step),
        bias_correction(group.beta3, step),
    )
    scale = 1.0 / tl.load(grad_scale).to(tl.float64)
    if squares is not None:
        scale *= clip_coefficient(group, tl.load(squares), scale)
    decay = tl.where(decoupled & (step >= group.first_decay), decoupled_decay(group, SCALES_DECAY), 0.0)
    decay *= corrected_share(fields, group.lr, go, RUNNING)
    proximal = group.no_prox == 0.0  # (param - update) / (1 + decay)
    decay = tl.where(proximal, decay / (1.0 + decay), decay)
    group = with_lr(group, tl.where(proximal, group.lr * (1.0 - decay), group.lr))
    signature = tl.load(fields + column(ROWS, "dtype_signature"), mask=go, other=0)
    copies = (step == 1.0) & (signature & EMA_BEGUN == 0)

    tl.store(out + column(SCALARS, "lr"), group.lr, mask=go)
    tl.store(out + column(SCALARS, "eps"), group.eps, mask=go)
    tl.store(out + column(SCALARS, "weight1"), 1.0 - group.beta1, mask=go)
    tl.store(out + column(SCALARS, "weight2"), 1.0 - group.beta2, mask=go)
    tl.store(out + column(SCALARS, "small_beta1"), tl.where(group.beta1 < 0.5, group.beta1, 0.0), mask=go)
    tl.store(out + column(SCALARS, "small_beta2"), tl.where(group.beta2 < 0.5, group.beta2, 0.0), mask=go)
    tl.store(out + column(SCALARS, "step_size"), group.lr / at.correction1, mask=go)
    tl.store(out + column(SCALARS, "debias"), 1.0 / at.correction1, mask=go)
    tl.store(out + column(SCALARS, "denom_scale"), 1.0 / tl.sqrt(at.correction2), mask=go)
    tl.store(out + column(SCALARS, "grad_factor"), tl.where(group.maximize != 0.0, -scale, scale), mask=go)
    tl.store(out + column(SCALARS, "l2"), tl.where(decoupled, 0.0, group.weight_decay), mask=go)
    tl.store(out + column(SCALARS, "decay"), decay, mask=go)
    tl.store(out + column(SCALARS, "cautious_decay"), group.cautious_decay, mask=go)
    tl.store(out + column(SCALARS, "ema_weight"), tl.where(copies, 1.0, 1.0 - group.ema_decay), mask=go)
    if OWN_SCALARS is not None:
        own = own_scalars(fields, group, at, go, OWN_SCALARS, RUNNING)
        for i in tl.static_range(len(own)):
            tl.store(out + column(SCALARS, "own_a") + i, own[i], mask=go)


@triton.jit(
    do_not_specialize=["tensors"],
    do_not_specialize_on_alignment=["group_hparams", "group_index", "tensor_scalars", "sums", "trust"],
)
def trust_kernel(
    group_hparams: tl.tensor,
    group_index: tl.tensor,
    tensor_scalars: tl.tensor,
    sums: tl.tensor,
    trust: tl.tensor,
    tensors: tl.tensor,
    RATIO: tl.constexpr,
) -> None:
    """The ratios of 32 tensors per program. The ratio of a skipped tensor does not change. RATIO: the rule's function
    `ratio`."""
    row = tl.program_id(0) * PREP_TENSORS + tl.arange(0, PREP_TENSORS)
    inside = row < tensors
    skips = tensor_scalars + row.to(tl.int64) * SCALAR_WIDTH + column(SCALARS, "skip")
    go = inside & (tl.load(skips, mask=inside, other=1.0) == 0.0)
    group = read_group(group_hparams, None, tl.load(group_index + row, mask=go, other=0), go)

    first = tl.load(sums + 2 * row, mask=go, other=1.0)
    second = tl.load(sums + 2 * row + 1, mask=go, other=1.0)
    tl.store(trust + row, RATIO(group, first, second), mask=go)
