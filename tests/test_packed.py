"""States, params and averages in packed formats: every stored code is that of the float32 value that the rule has made,
on every backend. Checkpoints in each format load into each other one."""

from __future__ import annotations

from typing import Any

import format_oracle as oracle
import numpy as np
import pytest
import torch
from cases import (
    ADAMW,
    Case,
    Target,
    build,
    copies,
    for_every_rule,
    make_params,
    on_every_target,
    parameters,
    quick,
    random_grads,
    set_grads,
)
from compare import assert_equal
from packed import BF16, REFERENCE, SHAPES, STORED, Array, array, fill, values_of
from torch import Tensor, nn

# ---- what is stored, by the oracle


def check_codes(optimizer: Any, param: Tensor, name: str, wide: Array, step: int, dithered: bool) -> None:
    """That what is stored of `wide`, float32 values, is what the formats say."""
    state = optimizer.state[param]
    tensor = param if name == "param" else state[name]
    # The first state of a rule has the thresholds "average", the others have "square".
    kind = "param" if name in ("param", "ema") else "average" if name == optimizer.rule.states[0] else "square"
    at = oracle.threshold(kind, range(tensor.numel()), step)
    codes, low = array(tensor), state.get("param_low") if name == "param" else None
    if low is not None:
        assert np.array_equal(codes, oracle.halves(wide)[0]), name
        lower = oracle.halves(wide)[1] if low.dtype == torch.int16 else oracle.quarter(wide, at)
        assert np.array_equal(array(low), lower), name
    elif tensor.dtype == BF16 and dithered:
        assert np.array_equal(codes, oracle.bf16(wide, at)), name
    elif tensor.dtype == torch.uint16:
        assert np.array_equal(codes, oracle.e8m8(wide, at)), name
    elif tensor.dtype == torch.uint8:
        square = values_of(optimizer, param)["exp_avg_sq"]
        assert np.array_equal(codes, oracle.anchored8(wide, square, state["anchor"], at)), name
    elif tensor.dtype == torch.float32:
        assert np.array_equal(oracle.bits(codes), oracle.bits(wide)), name


def checked_steps(case: Case, target: Target, params: list[nn.Parameter], steps: int, **options: Any) -> Any:
    """Steps an optimizer beside one of float32 params and states, which starts each step at what the first one has
    stored, and checks every code. Returns the first one."""
    rounding, compact = options.get("rounding"), options.get("state_dtype") == "compact"
    ours = build(case, target, params, max_grad_norm=None, **options)
    averages = {"ema_decay": options["ema_decay"]} if "ema_decay" in options else {}
    wide_params = [nn.Parameter(p.detach().float().clone(memory_format=torch.preserve_format)) for p in params]
    wide = build(case, target, wide_params, max_grad_norm=None, **averages)
    for step in range(1, steps + 1):
        # Gradients of the two dtypes are walked by different loops.
        grads = random_grads(params, step, (BF16, torch.float32)[step % 2])
        for p, q in zip(params, wide_params, strict=True):
            if step > 1:
                for name, values in values_of(ours, p).items():
                    fill(q if name == "param" else wide.state[q][name], values)
        for p in params:
            p.grad, p.grad_dtype = None, None
        set_grads(params, grads)
        set_grads(wide_params, [grad.float() for grad in grads])
        ours.step()
        wide.step()
        for p, q in zip(params, wide_params, strict=True):
            made = values_of(wide, q)
            if case.ours.rule.trust:
                made.pop("param")  # computed from the stored states
                made.pop("ema", None)
            for name, values in made.items():
                state = name not in ("param", "ema")
                if name == "ema":  # follows the param as it is stored
                    weight = np.float32(1 - options["ema_decay"]) if step > 1 else np.float32(1)
                    if weight != 1 or options.get("master_weights") != "exact":
                        continue
                check_codes(ours, p, name, values, step, rounding == "dithered" or (compact and state))
    return ours


@pytest.mark.slow
@pytest.mark.compiled
@on_every_target
@for_every_rule
@pytest.mark.parametrize("stored", STORED)
def test_what_is_stored(case: Case, stored: str, target: Target) -> None:
    options = dict(STORED[stored])
    if isinstance(options.get("state_dtype"), dict):
        options["state_dtype"] = {k: v for k, v in options["state_dtype"].items() if k in case.ours.rule.states}
    case = Case(
        case.name,
        case.ours,
        None,
        case.rule,
        {**case.kwargs, **({"betas": (0.9, 0.999)} if "adam" in case.name else {})},
    )
    checked_steps(case, target, make_params(SHAPES[: quick(target, 6, 4)], BF16), quick(target, 4, 2), **options)


@on_every_target
def test_compact_states_of_float32_and_float16_params(target: Target) -> None:
    for dtype in (torch.float32, torch.float16):
        ours = checked_steps(ADAMW, target, make_params(((130,), (3, 4)), dtype), 3, state_dtype="compact")
        assert {s["exp_avg"].dtype for s in ours.state.values()} == {torch.uint8}


@on_every_target
def test_any_layout(target: Target) -> None:
    """The index of an element is that of its place in memory. Bytes around a view stay."""
    plain = torch.linspace(-2.0, 3.0, 120).to(BF16)
    buffer = torch.full((300,), 7.0, dtype=BF16)
    params = [
        nn.Parameter(plain.clone().view(10, 12).t()),
        nn.Parameter(plain.clone().view(2, 3, 4, 5).to(memory_format=torch.channels_last)),
        nn.Parameter(buffer[3:123].copy_(plain)),
    ]
    checked_steps(ADAMW, target, params, 3, master_weights="exact", state_dtype="compact")
    assert bool((buffer[:3] == 7).all()) and bool((buffer[123:] == 7).all())


@on_every_target
def test_params_with_holes(target: Target) -> None:
    buffer = torch.full((300,), 7.0, dtype=BF16)
    param = nn.Parameter(buffer[5:245:2].copy_(torch.linspace(-2.0, 3.0, 120)))
    options = {"master_weights": "exact", "state_dtype": "compact"}
    ours, dense = (
        build(ADAMW, target, [param], **options),
        build(ADAMW, target, copies([param.contiguous()]), **options),
    )
    for step in range(3):
        for optimizer in (ours, dense):
            set_grads(parameters(optimizer), random_grads([param], step, BF16))
            optimizer.step()
    assert_equal(ours.master_params(), dense.master_params())
    assert bool((buffer[:5] == 7).all()) and bool((buffer[6:245:2] == 7).all())


@on_every_target
@for_every_rule
def test_training_stays_near_that_in_float32(case: Case, target: Target) -> None:
    usual = case.known(betas=(0.9, 0.999)) if case.ours.rule.name != "lion" else {}
    kwargs = {**case.kwargs, **usual}
    params = make_params(((200,), (20, 7)))
    ours = build(Case(case.name, case.ours, None, case.rule, kwargs), target, copies(params), state_dtype="compact")
    wide = build(Case(case.name, case.ours, None, case.rule, kwargs), target, copies(params))
    ours.lower_params()
    for step in range(quick(target, 20, 3)):
        for optimizer in (ours, wide):
            set_grads(parameters(optimizer), random_grads(params, step, BF16))
            optimizer.step()
    for master, other, start in zip(ours.master_params(), parameters(wide), params, strict=True):
        assert (master - other).abs().mean() < 0.1 * (other - start).abs().mean()


def test_small_updates_are_not_lost() -> None:
    """Where nearest rounding keeps every param at 1, dithering takes them as far as float32 would."""
    found = {}
    for rounding in ("nearest", "dithered"):
        param = nn.Parameter(torch.ones(1000, dtype=BF16))
        ours = build(ADAMW, REFERENCE, [param], lr=1e-5, weight_decay=0, rounding=rounding)
        for _ in range(500):
            param.grad = torch.ones_like(param)
            ours.step()
        found[rounding] = 1 - float(param.detach().float().mean())
    assert found["nearest"] == 0
    assert abs(found["dithered"] - 500e-5) < 3e-4
