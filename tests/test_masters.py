"""bfloat16 params with exact master weights: the steps of float32 params, bit for bit, and lower halves that are never
joined with a param that somebody else has written to."""

from __future__ import annotations

import pytest
import torch
from cases import (
    ADAMW,
    AMSGRAD,
    Case,
    Target,
    build,
    copies,
    for_every_case,
    for_every_class,
    for_every_rule,
    make_params,
    on_every_target,
    parameters,
    quick,
    random_grads,
    set_grads,
)
from compare import assert_equal
from master_weights import BF16, LOW, assert_same_path, lowered, side_by_side
from torch import Tensor, nn

# ---- numbers


@pytest.mark.slow
@pytest.mark.compiled
@on_every_target
@for_every_case
def test_steps_are_those_of_float32_params(case: Case, target: Target) -> None:
    params = make_params()
    # The norm of bfloat16 gradients is summed in another order than that of float32 ones.
    ours, wide = (make(case, target, params, max_grad_norm=None) for make in (lowered, build))
    # Every step of plain PyTorch is the same code on equal bits, and slow.
    side_by_side(ours, wide, 20 if target.backend == "reference" else quick(target, 100, 3))
    assert_same_path(ours, wide)


@on_every_target
@for_every_rule
def test_with_all_that_a_step_can_do(case: Case, target: Target) -> None:
    """Averages of the weights are those of the masters; clipping, skipping and grad_scale change nothing."""
    extra = {"ema_decay": 0.9, "max_grad_norm": 0.5, "skip_nonfinite": True}
    params = make_params(((3, 5), (130,), (4099,)))
    ours, wide = lowered(case, target, params, **extra), build(case, target, params, **extra)
    for step in range(quick(target, 6, 3)):
        grads = random_grads(params, step, torch.float32)
        if step == 1:
            grads[0][0] = torch.inf
        for optimizer in (ours, wide):
            set_grads(parameters(optimizer), grads)
            optimizer.step(grad_scale=2.0)
    assert_same_path(ours, wide)
    assert_equal([ours.ema[p] for p in parameters(ours)], [wide.ema[p] for p in parameters(wide)])


@on_every_target
@for_every_class
def test_a_bfloat16_model_starts_at_what_it_shows(case: Case, target: Target) -> None:
    params = make_params(dtype=BF16)
    ours = build(case, target, copies(params), master_weights="exact", max_grad_norm=None)
    wide = build(case, target, [nn.Parameter(p.detach().float()) for p in params], max_grad_norm=None)
    side_by_side(ours, wide, quick(target, 5, 2))
    assert_same_path(ours, wide)


@on_every_target
@pytest.mark.parametrize("state_dtype", [BF16, torch.float16])
def test_narrow_states(state_dtype: torch.dtype, target: Target) -> None:
    params = make_params()
    ours, wide = (make(AMSGRAD, target, params, state_dtype=state_dtype) for make in (lowered, build))
    side_by_side(ours, wide, quick(target, 5, 2))
    assert_same_path(ours, wide)


@on_every_target
def test_float32_and_float16_gradients(target: Target) -> None:
    for dtype in (torch.float32, torch.float16):
        params = make_params(((40,), (5, 7)))
        ours, wide = lowered(ADAMW, target, params), build(ADAMW, target, params)
        for step in range(2):
            grads = random_grads(params, step, dtype)
            set_grads(parameters(ours), grads)
            set_grads(parameters(wide), [grad.float() for grad in grads])
            ours.step()
            wide.step()
        assert_same_path(ours, wide)


@on_every_target
def test_params_of_any_layout(target: Target) -> None:
    """Transposed, channels_last, with holes, and at odd addresses; nothing around a view is touched."""

    def laid_out() -> list[Tensor]:
        buffers = [torch.full((300,), 7.0), torch.full((300,), 7.0)]
        plain = torch.linspace(-2.0, 3.0, 120)
        return [
            plain.clone().view(10, 12).t(),
            plain.clone().view(2, 3, 4, 5).to(memory_format=torch.channels_last),
            buffers[0][3:123].copy_(plain),
            buffers[1][5:245:2].copy_(plain),
        ]

    wide_params = [nn.Parameter(x) for x in laid_out()]
    buffers = [torch.full((300,), 7.0, dtype=BF16) for _ in range(2)]
    narrow = [x.to(BF16) for x in laid_out()]
    narrow[2] = buffers[0][3:123].copy_(narrow[2])
    narrow[3] = buffers[1][5:245:2].copy_(narrow[3])
    for wide_param, param in zip(wide_params, narrow, strict=True):
        wide_param.data.copy_(param)
    ours = build(ADAMW, target, [nn.Parameter(x) for x in narrow], master_weights="exact")
    wide = build(ADAMW, target, wide_params)
    side_by_side(ours, wide, 3)
    assert_same_path(ours, wide)
    around = [buffers[0][:3], buffers[0][123:], buffers[1][:5], buffers[1][6:245:2], buffers[1][245:]]
    assert all(bool((x == 7).all()) for x in around)


@on_every_target
def test_other_dtypes_are_left_alone(target: Target) -> None:
    dtypes = [torch.float32, torch.float64, torch.complex64]
    params = [make_params(((9,),), dtype)[0] for dtype in dtypes]
    ours = build(ADAMW, target, copies(params), master_weights="exact")
    plain = build(ADAMW, target, copies(params))
    ours.lower_params()
    for optimizer in (ours, plain):
        for p in parameters(optimizer):
            p.grad = torch.ones_like(p)
    ours.master_params()
    low, *others = parameters(ours)
    assert low.dtype == BF16 and [p.dtype for p in others] == dtypes[1:]
    assert [p.dtype for p in ours.master_params()] == dtypes
    ours.step()
    plain.step()
    assert_equal([p.detach() for p in others], [p.detach() for p in parameters(plain)[1:]])
    assert all(LOW not in ours.state[p] for p in others)


# ---- lower_params and master_params


def test_lower_params_keeps_every_bit() -> None:
    values = torch.cat([torch.randn(1000), torch.tensor([0.0, -0.0, torch.inf, 1e-40, 3.4e38, 1 + 2**-8])])
    param = nn.Parameter(values.clone())
    ours = build(ADAMW, Target("reference", "cpu"), [param])
    same = param
    ours.lower_params()
    assert param is same and param.dtype == BF16 and ours.master_weights == "exact"
    assert torch.equal(param.detach()[:1000], values[:1000].to(BF16))
    assert torch.equal(ours.master_params()[0].view(torch.int32), values.view(torch.int32))
    ours.lower_params()  # nothing is left to do
    assert torch.equal(ours.master_params()[0].view(torch.int32), values.view(torch.int32))


def test_lower_params_in_the_middle_of_training() -> None:
    target = Target("reference", "cpu")
    params = make_params()
    ours, wide = build(AMSGRAD, target, copies(params)), build(AMSGRAD, target, params)
    for step in range(3):
        for optimizer in (ours, wide):
            set_grads(parameters(optimizer), random_grads(params, step))
            optimizer.step()
    ours.zero_grad()
    ours.lower_params()
    side_by_side(ours, wide, 3)
    assert_same_path(ours, wide)


def test_master_params_come_in_the_order_of_the_groups() -> None:
    params = make_params(((2,), (3,), (4,)), dtype=BF16)
    ours = build(
        ADAMW, Target("reference", "cpu"), [{"params": params[2:]}, {"params": params[:2]}], master_weights="exact"
    )
    assert [tuple(p.shape) for p in ours.master_params()] == [(4,), (2,), (3,)]
    assert all(p.dtype == torch.float32 and not p.requires_grad for p in ours.master_params())


# ---- errors


def test_bad_input() -> None:
    bf16, f16 = (nn.Parameter(torch.zeros(3, dtype=dtype)) for dtype in (BF16, torch.float16))
    with pytest.raises(ValueError, match='master_weights must be None or "exact" or "24bit", but got \'16bit'):
        ADAMW.ours([bf16], master_weights="16bit")
    with pytest.raises(TypeError, match=r'master_weights="exact" is for bfloat16 params, but got one of torch.float16'):
        ADAMW.ours([f16], master_weights="exact")
    ours = ADAMW.ours([bf16])
    with pytest.raises(ValueError, match=r"lower_params\(\) makes bfloat16 params, but got torch.float16"):
        ours.lower_params(torch.float16)
    with pytest.raises(ValueError, match="pass master_weights="):
        ours.lower_params(master_weights=None)
    with pytest.raises(TypeError, match="is for bfloat16 params"):
        ADAMW.ours([f16]).lower_params()
    wide = nn.Parameter(torch.zeros(3))
    wide.grad = torch.ones(3)
    ours = ADAMW.ours([nn.Parameter(torch.zeros(2)), wide])
    with pytest.raises(RuntimeError, match=r"params without gradients, but one of shape \(3,\) has a gradient"):
        ours.lower_params()
    assert {p.dtype for p in parameters(ours)} == {torch.float32} and ours.master_weights is None
