"""Gradient scaling: GradScaler, and the attributes grad_scale and found_inf that it sets."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from cases import (
    AMSGRAD,
    CLASSES,
    Case,
    Target,
    build,
    build_torch,
    copies,
    for_every_case,
    for_every_case_of_torch,
    for_every_class,
    for_every_rule,
    make_params,
    on_every_target,
    parameters,
    random_grads,
    set_grads,
    train,
)
from compare import assert_equal, assert_like_torch, checked_step, states, updates
from torch.optim import Optimizer

SHAPES = [(5, 3), (), (0,), (40,)]


def value(x: float, target: Target) -> torch.Tensor:
    return torch.tensor(x, device=target.device)


def set_scaling(optimizer: Optimizer, grad_scale: torch.Tensor | None, found_inf: torch.Tensor | None) -> None:
    optimizer.grad_scale = grad_scale  # type: ignore[attr-defined]
    optimizer.found_inf = found_inf  # type: ignore[attr-defined]


@on_every_target
@for_every_case_of_torch
@pytest.mark.parametrize("unscale", [False, True], ids=["step-unscales", "unscale_-called"])
def test_grad_scaler_like_torch(case: Case, target: Target, unscale: bool) -> None:
    """The first and a later step overflow. For torch's for-loop the scaler unscales the gradients itself."""
    params = make_params(SHAPES, device=target.device)
    pair = [build(case, target, params), build_torch(case, copies(params))]
    scalers = [torch.amp.GradScaler(target.device, init_scale=1024.0, growth_interval=2) for _ in pair]
    for step, overflow in enumerate([True, False, False, True, False]):
        for optimizer, scaler in zip(pair, scalers, strict=True):
            scale = scaler.scale(torch.ones((), device=target.device)).item()
            grads = [g * scale for g in random_grads(parameters(optimizer), step)]
            if overflow:
                grads[3][7] = math.inf
            set_grads(parameters(optimizer), grads)
            if unscale:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
        assert scalers[0].get_scale() == scalers[1].get_scale()
        if step == 0:
            for p, q in zip(*map(parameters, pair), strict=True):
                assert_equal(p, q)
        else:
            assert_like_torch(*pair)
    assert not hasattr(pair[0], "grad_scale")
    assert updates(pair[0], params) == [3.0] * len(params)


@pytest.mark.shared
@on_every_target
@for_every_class
@pytest.mark.parametrize("grad_scale", [65536.0, 3.0])
@pytest.mark.parametrize("found_inf", [None, 0.0], ids=["found_inf-None", "found_inf-0"])
def test_raw_grad_scale(case: Case, target: Target, grad_scale: float, found_inf: float | None) -> None:
    params = make_params(SHAPES, device=target.device)
    optimizer = build(case, target, params)
    set_scaling(optimizer, value(grad_scale, target), None if found_inf is None else value(found_inf, target))
    for step in range(2):
        set_grads(params, [g * grad_scale for g in random_grads(params, step)])
        # 1 / grad_scale adds one rounding error, which squares double.
        checked_step(optimizer, case.rule, 6.0, grad_scale=grad_scale)


@pytest.mark.shared
@on_every_target
@for_every_rule
@pytest.mark.parametrize(("found_inf", "grad_scale"), [(1.0, None), (1.0, 8.0), (2.0, 8.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_any_found_inf_skips(
    case: Case, target: Target, found_inf: float, grad_scale: float | None, dtype: torch.dtype
) -> None:
    """found_inf is a sum over devices: 2.0 if two overflow. No param, state or count changes."""
    params = make_params(SHAPES, dtype, target.device)
    optimizer = build(case, target, params)
    train([optimizer], 1)
    before = [p.detach().clone() for p in params]
    states_before = copy.deepcopy(states(optimizer))
    set_grads(params, [torch.full_like(p, math.nan) for p in params])
    set_scaling(optimizer, None if grad_scale is None else value(grad_scale, target), value(found_inf, target))
    optimizer.step()
    assert_equal([p.detach() for p in params], before)
    assert_equal(states(optimizer), states_before)


@on_every_target
@for_every_case
def test_skipped_first_step_leaves_nothing_behind(case: Case, target: Target) -> None:
    """The next step must equal a first step bit for bit. torch's fused SGD reads uninitialized memory in this case."""
    params = make_params(SHAPES, device=target.device)
    skipped, fresh = build(case, target, params), build(case, target, copies(params))
    set_grads(params, [torch.full_like(p, math.inf) for p in params])
    set_scaling(skipped, value(4.0, target), value(1.0, target))
    skipped.step()
    rule = case.ours.rule
    starts = {**rule.starts_of(case.group), **rule.running}
    for p, state in skipped.state.items():
        assert all((x == (p if key in rule.copies else starts.get(key, 0.0))).all() for key, x in state.items())
    set_scaling(skipped, None, None)
    train([skipped, fresh], 2)
    for p, q in zip(params, parameters(fresh), strict=True):
        assert_equal(p, q)
    assert_equal(states(skipped), states(fresh))


@on_every_target
def test_found_inf_zero_without_grad_scale_steps(target: Target) -> None:
    params = make_params(SHAPES, device=target.device)
    plain, flagged = build(AMSGRAD, target, params), build(AMSGRAD, target, copies(params))
    set_scaling(flagged, None, value(0.0, target))
    train([plain, flagged], 2)
    for p, q in zip(params, parameters(flagged), strict=True):
        assert_equal(p, q)


@on_every_target
def test_missing_gradients_under_scaling(target: Target) -> None:
    params = make_params(SHAPES, device=target.device)
    optimizer = build(AMSGRAD, target, params)
    train([optimizer], 1)
    set_scaling(optimizer, value(2.0, target), value(0.0, target))
    grads = random_grads(params, 5)
    set_grads(params, [grads[0], None, None, grads[3]])
    checked_step(optimizer, AMSGRAD.rule, 6.0, grad_scale=2.0)


@on_every_target
def test_scale_in_other_forms(target: Target) -> None:
    """One-element tensors of any shape and floating dtype are accepted."""
    params = make_params(SHAPES, device=target.device)
    optimizer = build(AMSGRAD, target, params)
    scale = torch.full((1,), 4.0, dtype=torch.float64, device=target.device)
    set_scaling(optimizer, scale, torch.zeros(1, device=target.device))
    set_grads(params, random_grads(params, 0))
    checked_step(optimizer, AMSGRAD.rule, 6.0, grad_scale=4.0)


def test_every_class_says_that_it_scales() -> None:
    for case in CLASSES:
        assert case.ours._step_supports_amp_scaling is True  # type: ignore[attr-defined]
