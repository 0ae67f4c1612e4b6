"""Betas anywhere in [0, 1): states are exact to a few ulp of beta * |average| + (1 - beta) * |x|.

compare.scales also allows for an error of the state before the step. That hides an inexact beta: with a small beta the
step removes nearly all of that state.
"""

from __future__ import annotations

import random
from fractions import Fraction
from typing import Any

import oracle
import pytest
import torch
from cases import (
    ONE_EACH,
    Case,
    Target,
    every,
    hypers,
    make_params,
    on_every_target,
    parameters,
    quick,
    random_grads,
    set_grads,
)
from compare import MORE, errors, scales, snapshot, stored_dtypes

from fused_optim.backends.reference import bias_correction

# Bounds in ulp. A new state has four roundings. The update adds a division and a root.
STATES, PARAMS = 3.0, 6.0
EDGES = [(3e-6, 0.999999), (0.999999, 1e-7), (0.5, 0.4999999), (0.4999999, 0.5), (0.0, 0.0), (0.0, 3e-6), (3e-6, 0.0)]


def some_beta(numbers: random.Random) -> float:
    """beta from 1e-7 to 0.5, or 1 - beta from 1e-6 to 0.5. Every order of magnitude is equally likely."""
    return 10.0 ** numbers.uniform(-7, -0.3) if numbers.random() < 0.5 else 1 - 10.0 ** numbers.uniform(-6, -0.3)


def strict_scales(case: Case, optimizer: Any, grads: list[Any]) -> list[dict[str, Any]]:
    """The states that the rule computes from absolute values, so that nothing cancels. The maximum of two states is as
    exact as the states."""
    absolute = [
        oracle.Slot(slot.param.abs(), {k: v.abs() for k, v in slot.state.items()}) for slot in snapshot(optimizer)
    ]
    hyper = [{**options, "maximize": False} for options in hypers(optimizer)]
    return [slot.state for slot in oracle.step(case.rule, absolute, [oracle.as_real(g).abs() for g in grads], hyper)]


def test_bias_correction_is_exact() -> None:
    """1 - beta**t loses up to seven digits for these betas if beta**t is computed first."""
    numbers = random.Random(0)
    for beta in (0.0, 0.5, *(some_beta(numbers) for _ in range(300))):
        for step in (1, 2, 3, 7, 100, 1023, 4096):
            exact = 1 - Fraction(beta) ** step
            for computed in (bias_correction(beta, step), oracle.correction(beta, torch.tensor(step))):
                assert abs(Fraction(computed) - exact) <= exact * Fraction(8, 2**53), (beta, step)


@pytest.mark.slow
@pytest.mark.compiled
@on_every_target
@every(ONE_EACH, "betas")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_states_are_exact_for_all_betas(case: Case, dtype: torch.dtype, target: Target) -> None:
    """state_dtype is float32 for params of every dtype. Later gradients are much smaller, so the old average dominates
    the new one."""
    numbers = random.Random(case.name)
    betas = EDGES + [(some_beta(numbers), some_beta(numbers)) for _ in range(quick(target, 41, 5))]
    params = [make_params([(40,)], dtype, target.device, seed)[0] for seed in range(len(betas))]
    groups = [{"params": [p], **case.known(betas=pair)} for p, pair in zip(params, betas, strict=True)]
    # The schedule of beta3 rounds 1 - beta3 by more than these bounds.
    options = {**case.kwargs, **case.known(weight_decay=0.0, max_grad_norm=None, beta3_warmup=None)}
    optimizer = case.ours(groups, backend=target.backend, state_dtype=torch.float32, **options)
    for number in range(quick(target, 4, 3)):
        grads = [grad * 1e-3**number for grad in random_grads(params, number)]
        set_grads(params, grads)
        before = snapshot(optimizer)
        want = oracle.step(case.rule, before, grads, hypers(optimizer))
        sizes = scales(case.rule, before, want, grads, hypers(optimizer))
        for size, strict in zip(sizes, strict_scales(case, optimizer, grads), strict=True):
            size.state |= {name: value for name, value in strict.items() if name not in case.ours.rule.copies}
        optimizer.step()
        got = snapshot(optimizer)
        for index, pair in enumerate(betas):
            each = slice(index, index + 1)
            worst = errors(got[each], want[each], sizes[each], stored_dtypes(optimizer)[each])
            param = worst.pop("param")
            assert max(worst.values()) <= STATES + MORE.get(case.rule, 0.0), (pair, worst)
            assert param <= PARAMS + MORE.get(case.rule, 0.0), (pair, param)
    assert len(parameters(optimizer)) == len(betas)
