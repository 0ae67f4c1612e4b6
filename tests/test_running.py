"""Running scalars: numbers of one tensor that carry over from step to step, such as NAdam's mu_product."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from cases import (
    CASES,
    Case,
    Target,
    build,
    copies,
    every,
    make_params,
    on_every_target,
    random_grads,
    set_grads,
    train,
)
from compare import assert_equal, states

from fused_optim import FusedNAdam

SHAPES = [(5, 3), (), (0,), (40,)]
RUNNING = [case for case in CASES if case.ours.rule.running]
for_every_running = every(RUNNING)


def running_of(optimizer: Any, case: Case) -> list[dict[str, float]]:
    names = case.ours.rule.running
    return [{name: float(state[name]) for name in names if name in state} for state in states(optimizer)]


@on_every_target
@for_every_running
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.complex64], ids=str)
def test_they_are_float32_numbers_beside_step(case: Case, target: Target, dtype: torch.dtype) -> None:
    optimizer = build(case, target, make_params(SHAPES, dtype, target.device))
    train([optimizer], 2)
    for p, state in optimizer.state.items():
        for name in case.ours.rule.running:
            assert (state[name].dtype, state[name].shape, state[name].device) == (torch.float32, (), p.device)
    values = running_of(optimizer, case)
    assert values == [values[0]] * len(SHAPES)  # a tensor without elements counts its steps, too


@on_every_target
@for_every_running
@pytest.mark.parametrize("why", ["no gradient", "found_inf", "skip_nonfinite"])
def test_skipped_tensors_keep_them(case: Case, target: Target, why: str) -> None:
    optimizer = build(case, target, make_params(SHAPES, device=target.device), skip_nonfinite=why == "skip_nonfinite")
    params = optimizer.param_groups[0]["params"]
    train([optimizer], 2)
    before = running_of(optimizer, case)
    if why == "no gradient":
        set_grads(params, [None, *random_grads(params[1:], 7)])
    else:
        set_grads(params, [torch.full_like(p, torch.inf) for p in params])
    if why == "found_inf":
        optimizer.found_inf = torch.ones((), device=target.device)
    optimizer.step()
    after = running_of(optimizer, case)
    assert after[0] == before[0] and states(optimizer)[0]["step"] == 2
    if why == "no gradient":
        assert after[1] != before[1]
    else:
        assert after == before


@on_every_target
@for_every_running
@pytest.mark.parametrize("change", ["replaced", "filled", "memory"])
def test_a_change_of_the_state_holds(case: Case, target: Target, change: str) -> None:
    """The step reads the tensor that is in the state now."""
    optimizer = build(case, target, make_params(SHAPES, device=target.device))
    other = build(case, target, copies(optimizer.param_groups[0]["params"]))
    train([optimizer, other], 2)
    name = next(iter(case.ours.rule.running))
    for p in optimizer.param_groups[0]["params"]:
        state = optimizer.state[p]
        if change == "replaced":
            state[name] = torch.tensor(0.25, device=target.device)
        elif change == "filled":
            state[name].fill_(0.25)
        else:
            state[name].data = torch.tensor(0.25, device=target.device)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train([optimizer, other], 2, seed=7)
    assert_equal(states(optimizer), states(other))
    for p, q in zip(optimizer.param_groups[0]["params"], other.param_groups[0]["params"], strict=True):
        assert_equal(p, q)
    assert running_of(optimizer, case)[0][name] != 0.25


@on_every_target
@for_every_running
def test_missing_ones_start_anew(case: Case, target: Target) -> None:
    """A checkpoint of another optimizer lacks them, and numbers may be no tensors."""
    optimizer = build(case, target, make_params(SHAPES, device=target.device))
    train([optimizer], 2)
    saved = copy.deepcopy(optimizer.state_dict())
    for number, state in saved["state"].items():
        for name in case.ours.rule.running:
            if number == 0:
                del state[name]
            else:
                state[name] = 0.5
    optimizer.load_state_dict(saved)
    found = running_of(optimizer, case)
    assert found[0] == case.ours.rule.running and found[1] == dict.fromkeys(found[1], 0.5)
    train([optimizer], 1)


def test_wrong_shapes_are_refused() -> None:
    (param,) = params = make_params([(3,)])
    optimizer = FusedNAdam(params, backend="reference")
    train([optimizer], 1)
    before = param.detach().clone()
    optimizer.state[param]["mu_product"] = torch.ones(2)
    set_grads(params, random_grads(params, 1))
    with pytest.raises(RuntimeError, match=r'state "mu_product" must have one element, but has shape \(2,\)'):
        optimizer.step()
    assert_equal(param.detach(), before)
