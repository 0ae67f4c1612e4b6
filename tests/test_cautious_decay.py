"""cautious_decay (arXiv:2510.12402): decoupled decay only where the update does not move the param away from 0."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from cases import (
    ADAMW,
    BY_NAME,
    DECOUPLED,
    Case,
    Target,
    build,
    copies,
    every,
    make_params,
    on_every_target,
    parameters,
    quick,
    random_grads,
    set_grads,
    train,
)
from compare import assert_equal, checked_averages, checked_step
from test_numbers import one_step_bound

from fused_optim import FusedAdamW, FusedAdan, FusedLion

CAUTIOUS: dict[str, Any] = {"weight_decay": 0.5, "cautious_decay": True}


@on_every_target
@every([case for case in DECOUPLED if case.name != "muon"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_against_the_oracle(case: Case, target: Target, dtype: torch.dtype) -> None:
    params = make_params(dtype=dtype, device=target.device)
    optimizer = build(case, target, params, **CAUTIOUS, **case.known(no_prox=True))
    for step in range(quick(target, 4, 2)):
        set_grads(params, random_grads(params, step))
        checked_step(optimizer, case.rule, one_step_bound(dtype))


@pytest.mark.compiled
@on_every_target
def test_signs(target: Target) -> None:
    """Lion moves each element by lr. Where it moves away from 0 nothing is decayed; an update of 0 decays."""
    inf = math.inf
    p = torch.nn.Parameter(torch.tensor([2.0, 2.0, -2.0, -2.0, 2.0, inf, -inf], device=target.device))
    optimizer = FusedLion([p], lr=0.25, backend=target.backend, **CAUTIOUS)
    p.grad = torch.tensor([1.0, -1.0, 1.0, -1.0, 0.0, 1.0, 1.0], device=target.device)
    optimizer.step()
    assert p.tolist() == [1.5, 2.25, -2.25, -1.5, 1.75, inf, -inf]


@on_every_target
def test_a_group_of_its_own_and_switched_later(target: Target) -> None:
    """Only the group that has it is cautious, beside other groups in the same table. Its value may change."""
    params = make_params([(70,), (70,)], device=target.device)
    groups = [{"params": params[:1]}, {"params": params[1:], "cautious_decay": True}]
    optimizer = FusedAdamW(groups, lr=0.01, weight_decay=0.5, backend=target.backend)
    for step in range(quick(target, 4, 3)):
        if step == 2:
            optimizer.param_groups[1]["cautious_decay"] = False
            optimizer.param_groups[0]["cautious_decay"] = True
        set_grads(params, random_grads(params, step))
        checked_step(optimizer, ADAMW.rule, 3.0)
    assert "cautious_decay" not in FusedAdamW(copies(params)).param_groups[0]


@on_every_target
@pytest.mark.parametrize("weight_decay", [0.0, 0.5])
def test_off_changes_no_bit(target: Target, weight_decay: float) -> None:
    """Without decay it has no effect. A table with a cautious group steps the other groups as before."""
    params = make_params([(5000,), (33,)], device=target.device)
    plain = FusedAdamW(params, lr=0.01, weight_decay=weight_decay, backend=target.backend)
    groups = [{"params": [p]} for p in copies(params)]
    groups[1] |= {"cautious_decay": True}
    other = FusedAdamW(groups, lr=0.01, weight_decay=weight_decay, backend=target.backend)
    train([plain, other], quick(target, 4, 2))
    first, second = (list(zip(parameters(o), strict=True)) for o in (plain, other))
    assert_equal(first[0][0].detach(), second[0][0].detach())
    assert torch.equal(first[1][0], second[1][0]) == (weight_decay == 0)


@on_every_target
@every([BY_NAME[name] for name in ("adamw-amsgrad", "stableadamw", "lion-paper-maximize")])
def test_with_averages_of_the_weights(case: Case, target: Target) -> None:
    optimizer = build(case, target, make_params(device=target.device), ema_decay=0.75, **CAUTIOUS)
    checked_averages(optimizer, [1.0, 0.25, 0.25])


@on_every_target
def test_master_weights_take_the_steps_of_float32(target: Target) -> None:
    """Bit for bit, with packed formats in the table."""
    wide = make_params([(300,), (7, 5)], device=target.device)
    narrow = [torch.nn.Parameter(p.detach().bfloat16()) for p in wide]
    with torch.no_grad():
        for p, q in zip(wide, narrow, strict=True):
            p.copy_(q)
    pair = [
        FusedAdamW(wide, lr=0.01, backend=target.backend, **CAUTIOUS),
        FusedAdamW(narrow, lr=0.01, backend=target.backend, master_weights="exact", **CAUTIOUS),
    ]
    for step in range(quick(target, 4, 2)):
        grads = [grad.bfloat16() for grad in random_grads(wide, step)]
        set_grads(narrow, grads)
        set_grads(wide, [grad.float() for grad in grads])
        for optimizer in pair:
            optimizer.step()
    assert_equal(pair[1].master_params(), [p.detach() for p in wide])


def test_checkpoints_and_copies_keep_it() -> None:
    optimizer = FusedAdamW(make_params(), **CAUTIOUS)
    assert copy.deepcopy(optimizer).param_groups[0]["cautious_decay"] is True
    other = FusedAdamW(make_params())
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["cautious_decay"] is True
    optimizer.add_param_group({"params": make_params([(3,)])})
    assert optimizer.param_groups[1]["cautious_decay"] is True


def test_adan_divides_all_elements_or_none() -> None:
    with pytest.raises(ValueError, match="no_prox=False divides all elements after it; pass no_prox=True"):
        FusedAdan(make_params(), **CAUTIOUS)
