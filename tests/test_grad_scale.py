"""grad_scale, by which step() divides the gradients: valid values, and values that skip a step."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
from cases import AMSGRAD, INTERPRETED, LAMB, Case, Target, build, make_params, on_every_target, random_grads, set_grads
from compare import assert_equal
from torch import Tensor, nn

from fused_optim import FusedAdamW

SHAPES = [(3, 5), (4500,)]
USELESS = [0, math.nan, math.inf] if INTERPRETED else [0, -0.0, math.nan, math.inf, 1e-46, 1e39]
for_adam_and_lamb = pytest.mark.parametrize("case", [AMSGRAD, LAMB], ids=str)


def stepped(case: Case, target: Target, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """An optimizer after one step, with new gradients."""
    params = make_params(SHAPES, dtype, target.device)
    optimizer = build(case, target, params, **{**case.known(max_grad_norm=None), **options})
    for seed in range(2):
        set_grads(params, random_grads(params, seed))
        if seed == 0:
            optimizer.step()
    return optimizer


def contents(optimizer: Any) -> Any:
    return copy.deepcopy(
        [(p.detach(), dict(optimizer.state[p])) for group in optimizer.param_groups for p in group["params"]]
    )


def as_number(value: float, device: str) -> float:
    return value


def as_float32(value: float, device: str) -> Tensor:
    return torch.tensor(value, device=device)


def as_float64(value: float, device: str) -> Tensor:
    return torch.tensor([value], device=device, dtype=torch.float64)


@on_every_target
@for_adam_and_lamb
@pytest.mark.parametrize("value", USELESS)
@pytest.mark.parametrize("given", [as_number, as_float32, as_float64])
@pytest.mark.parametrize("bound", [None, 0.5])
def test_skips_where_the_scale_is_no_use(
    case: Case, value: float, given: Callable[[float, str], Any], bound: float | None, target: Target
) -> None:
    optimizer = stepped(case, target, skip_nonfinite=True, max_grad_norm=bound)
    before = contents(optimizer)
    optimizer.step(grad_scale=given(value, target.device))
    assert_equal(contents(optimizer), before)
    assert optimizer.skipped_steps.item() == 1
    optimizer.step(grad_scale=2)
    assert optimizer.skipped_steps.item() == 1
    assert not torch.equal(contents(optimizer)[0][0], before[0][0])


@on_every_target
@pytest.mark.parametrize("grad", [0.0, 1.0])
def test_the_mean_over_no_tokens(grad: float, target: Target) -> None:
    """Every token is masked, so the scale is 0. The step is skipped with zero and with nonzero gradients."""
    model = nn.Linear(4, 7).to(target.device)
    optimizer = FusedAdamW(model.parameters(), skip_nonfinite=True, backend=target.backend)
    before = [p.detach().clone() for p in model.parameters()]
    y = torch.full((5,), -100, device=target.device)
    logits = model(torch.randn(5, 4, device=target.device))
    (nn.functional.cross_entropy(logits, y, ignore_index=-100, reduction="sum") + grad * logits.sum()).backward()
    optimizer.step(grad_scale=(y != -100).sum())
    assert_equal([p.detach() for p in model.parameters()], before)
    assert optimizer.skipped_steps.item() == 1


@on_every_target
@pytest.mark.parametrize(
    ("dtype", "skips"), [(torch.float32, 1), (torch.bfloat16, 1), (torch.float64, 0)], ids=["f32", "bf16", "f64"]
)
def test_skips_what_the_division_lifts_out_of_range(dtype: torch.dtype, skips: int, target: Target) -> None:
    """1e10 / 1e-30 overflows float32, but not float64."""
    params = [torch.nn.Parameter(torch.ones(40, dtype=dtype, device=target.device))]
    optimizer = FusedAdamW(params, skip_nonfinite=True, backend=target.backend)
    params[0].grad = torch.full_like(params[0], 1e10)
    optimizer.step(grad_scale=1e-30)
    assert optimizer.skipped_steps.item() == skips
    assert torch.equal(params[0], torch.ones_like(params[0])) == bool(skips)


@on_every_target
def test_with_grad_scaler(target: Target) -> None:
    """The product of both scales decides whether the step is skipped."""
    optimizer = stepped(AMSGRAD, target, skip_nonfinite=True)
    before = contents(optimizer)
    optimizer.grad_scale = torch.tensor(65536.0, device=target.device)
    optimizer.found_inf = torch.tensor(0.0, device=target.device)
    optimizer.step(grad_scale=0)
    assert_equal(contents(optimizer), before)
    optimizer.step(grad_scale=4)
    assert optimizer.skipped_steps.item() == 1


@on_every_target
@for_adam_and_lamb
@pytest.mark.parametrize("value", [*USELESS, -2.0])
def test_useless_numbers_are_refused(case: Case, value: float, target: Target) -> None:
    optimizer = stepped(case, target)
    before = contents(optimizer)
    with pytest.raises(ValueError, match=r"grad_scale must be a finite float32 number above 0.*but got.*skip"):
        optimizer.step(grad_scale=value)
    assert_equal(contents(optimizer), before)


@on_every_target
@pytest.mark.parametrize(
    ("scale", "error", "message"),
    [
        ("4", TypeError, r"must be a number or a one-element tensor, but got '4'"),
        (True, TypeError, "must be a number or a one-element tensor, but got True"),
        ([4], TypeError, r"must be a number or a one-element tensor, but got \[4\]"),
        (torch.ones(2), ValueError, r"is a tensor of shape \(2,\) and torch.float32"),
        (torch.ones(1, dtype=torch.complex64), ValueError, "of a real dtype"),
        (torch.ones(1, dtype=torch.bool), ValueError, "of a real dtype"),
    ],
)
@pytest.mark.parametrize("skips", [False, True])
def test_what_is_no_number_is_refused(scale: Any, error: Any, message: str, skips: bool, target: Target) -> None:
    optimizer = stepped(AMSGRAD, target, skip_nonfinite=skips)
    before = contents(optimizer)
    with pytest.raises(error, match=message):
        optimizer.step(grad_scale=scale)
    assert_equal(contents(optimizer), before)
    assert optimizer.skipped_steps.item() == 0


@on_every_target
@for_adam_and_lamb
@pytest.mark.parametrize("bound", [None, 0.5])
def test_tensors_without_skipping(case: Case, bound: float | None, target: Target) -> None:
    """The value of a tensor is not checked. On every backend a scale of 0 on the device makes all params NaN, and the
    step is counted."""
    optimizer = stepped(case, target, max_grad_norm=bound)
    optimizer.step(grad_scale=torch.zeros((), device=target.device))
    for param, state in contents(optimizer):
        assert param.isnan().all() and state["step"].item() == 2


@on_every_target
@pytest.mark.parametrize("four", [4, 4.0, Fraction(4), torch.tensor(4), torch.tensor([4], dtype=torch.uint8)], ids=str)
def test_numbers_of_any_kind(four: Any, target: Target) -> None:
    ours, theirs = (stepped(AMSGRAD, target, max_grad_norm=0.5) for _ in range(2))
    for group in theirs.param_groups:
        for p in group["params"]:
            p.grad /= 4
    ours.step(grad_scale=four)
    theirs.step()
    torch.testing.assert_close(contents(ours), contents(theirs))
