"""Params and every state against the float64 oracle, and against torch's for-loop classes."""

from __future__ import annotations

import functools
import math
from typing import Any

import oracle
import pytest
import torch
from cases import (
    BY_NAME,
    CLASSES,
    DECOUPLED,
    ONE_EACH,
    RUN,
    SHAPES,
    Case,
    Target,
    build,
    build_torch,
    copies,
    every,
    for_every_case,
    for_every_case_of_torch,
    for_every_class,
    for_every_rule,
    hypers,
    make_params,
    on_every_target,
    parameters,
    quick,
    random_grads,
    set_grads,
    train,
)
from compare import (
    assert_equal,
    assert_like_torch,
    checked_step,
    errors,
    larger_scales,
    scales,
    snapshot,
    states,
    stored_dtypes,
    updates,
)
from torch import Tensor

# Bounds in ulps, in the units of compare.scales, which grants LAMB one more; measured values in brackets (C++ with FMA
# and plain PyTorch, the 7 cases of Adam).
# One step from stored numbers to stored numbers: a handful of operations that round once each [2.9]. The store of a
# 16-bit dtype adds half an ulp, and the others are small in comparison [0.50].
ONE_STEP = 3.0
ONE_STEP_16BIT = 0.6
# Float64 has no wider arithmetic above it, so the errors of the kernel and of the oracle add up [LAMB 4.7, others < 3].
ONE_STEP_FLOAT64 = 6.0
# 100 steps from the same start, each side on its own path: roundings add up like a random walk [params 8.9,
# exp_avg_sq 10.7].
HUNDRED_STEPS = 16.0
FREE_RUN = (1000,), (3, 5)  # shapes


def one_step_bound(dtype: torch.dtype) -> float:
    if dtype in (torch.bfloat16, torch.float16):
        return ONE_STEP_16BIT
    return ONE_STEP_FLOAT64 if dtype in (torch.float64, torch.complex128) else ONE_STEP


@functools.cache
def free_run(name: str, steps: int) -> tuple[list[oracle.Slot], list[oracle.Slot]]:
    """`steps` steps of the oracle, which never sees rounded numbers: the last values, and the largest scales on the
    way. All backends are compared with the same run."""
    case = BY_NAME[name]
    optimizer = build(case, Target("reference", "cpu"), make_params(FREE_RUN))
    truth = peak = snapshot(optimizer)
    for step in range(steps):
        grads = random_grads(parameters(optimizer), step)
        before, truth = truth, oracle.step(case.rule, truth, grads, hypers(optimizer))
        peak = larger_scales(peak, scales(case.rule, before, truth, grads, hypers(optimizer)))
    return truth, peak


@pytest.mark.arithmetic
@pytest.mark.slow
@on_every_target
@for_every_case
def test_hundred_steps_stay_at_the_oracle(case: Case, target: Target) -> None:
    params, steps = make_params(FREE_RUN, device=target.device), quick(target, 100, 4)
    optimizer = build(case, target, params)
    for step in range(steps):
        set_grads(params, random_grads(params, step))
        optimizer.step()
    truth, peak = free_run(case.name, steps)
    worst = errors(snapshot(optimizer), truth, peak, stored_dtypes(optimizer))
    assert max(worst.values()) <= HUNDRED_STEPS, worst


@pytest.mark.arithmetic
@on_every_target
@for_every_case
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.complex64, torch.complex128, torch.bfloat16, torch.float16], ids=str
)
def test_every_step_rounds_once(case: Case, target: Target, dtype: torch.dtype) -> None:
    params = make_params(dtype=dtype, device=target.device)
    eps = 1e-3 if dtype == torch.float16 else 1e-8
    optimizer = build(case, target, params, **case.known(eps=eps))
    bound = one_step_bound(dtype)
    for step in range(quick(target, 4, 2)):
        set_grads(params, random_grads(params, step))
        checked_step(optimizer, case.rule, bound)


@pytest.mark.arithmetic
@on_every_target
@for_every_case_of_torch
def test_like_torch_for_loop(case: Case, target: Target) -> None:
    ours = build(case, target, make_params(device=target.device))
    theirs = build_torch(case, make_params(device=target.device))
    train([ours, theirs], quick(target, 8, 2))
    assert_like_torch(ours, theirs)


@on_every_target
@for_every_case_of_torch
def test_float64_like_torch_for_loop(case: Case, target: Target) -> None:
    """With 29 more bits than float32 the formulas must agree, not only the rounding."""
    ours = build(case, target, make_params(dtype=torch.float64, device=target.device))
    theirs = build_torch(case, make_params(dtype=torch.float64, device=target.device))
    train([ours, theirs], quick(target, 8, 2))
    assert_like_torch(ours, theirs, rtol=1e-12, atol=1e-13)


MIXED = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64, torch.float32, torch.bfloat16]


@pytest.mark.compiled
@on_every_target
@for_every_case
def test_mixed_dtypes_in_one_optimizer(case: Case, target: Target) -> None:
    mixed = [p for i, dtype in enumerate(MIXED) for p in make_params([(11, 3)], dtype, target.device, seed=i)]
    options = case.known(eps=1e-3, max_grad_norm=None)  # LAMB clips by the norm of all gradients together
    optimizer = build(case, target, mixed, **options)
    alone = [build(case, target, [p], **options) for p in copies(mixed)]
    for step in range(quick(target, 4, 2)):
        grads = random_grads(mixed, step)
        set_grads(mixed, grads)
        optimizer.step()
        for single, grad in zip(alone, grads, strict=True):
            set_grads(parameters(single), [grad])
            single.step()
    for p, single in zip(mixed, alone, strict=True):
        assert_equal(p, parameters(single)[0])
    assert_equal(states(optimizer), [state for single in alone for state in states(single)])


@pytest.mark.compiled
@on_every_target
@for_every_case
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_states_for_16bit_params(case: Case, target: Target, dtype: torch.dtype) -> None:
    params = make_params(dtype=dtype, device=target.device)
    optimizer = build(case, target, params, state_dtype=torch.float32, **case.known(eps=1e-3))
    for step in range(quick(target, 4, 2)):
        set_grads(params, random_grads(params, step))
        worst = checked_step(optimizer, case.rule, ONE_STEP)
        assert worst["param"] <= ONE_STEP_16BIT
    for state in states(optimizer):
        assert all(value.dtype == torch.float32 for value in state.values())


@pytest.mark.slow
@on_every_target
@for_every_rule
@pytest.mark.parametrize("param_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gradients_of_another_dtype(
    case: Case, target: Target, param_dtype: torch.dtype, grad_dtype: torch.dtype
) -> None:
    if not hasattr(Tensor, "grad_dtype"):
        pytest.skip("this torch has no Tensor.grad_dtype: gradients have the dtype of their params")
    params = make_params(dtype=param_dtype, device=target.device)
    optimizer = build(case, target, params, **case.known(eps=1e-3))
    for step in range(quick(target, 5, 2)):
        set_grads(params, random_grads(params, step, grad_dtype))
        checked_step(optimizer, case.rule, one_step_bound(param_dtype))


SPECIAL = [math.inf, -math.inf, math.nan, 0.0, -0.0, 1e-45, 1e-30, -1e-20, 1.0, 1e18, 1e19, -3e19, 1e20, -1e20]


def special_pair(values: list[float], device: str) -> tuple[Tensor, Tensor]:
    """Every value beside every gradient, as one tensor of each."""
    x = torch.tensor(values, device=device)
    return x.repeat_interleave(len(SPECIAL)), torch.tensor(SPECIAL, device=device).repeat(len(values))


@pytest.mark.compiled
@on_every_target
@for_every_case_of_torch
def test_special_gradients_propagate_as_in_torch(case: Case, target: Target) -> None:
    """Infinite, NaN, subnormal and huge gradients, then ordinary ones: what has become NaN or infinite stays it."""
    start, grad = special_pair([0.0, 1.0, -2.5], target.device)
    ours = build(case, target, [torch.nn.Parameter(start.clone())])
    theirs = build_torch(case, [torch.nn.Parameter(start.clone())])
    for gradient in (grad, torch.ones_like(grad), grad.flip(0), torch.zeros_like(grad)):
        for optimizer in (ours, theirs):
            set_grads(parameters(optimizer), [gradient])
            optimizer.step()
        assert_like_torch(ours, theirs)


@on_every_target
@for_every_case_of_torch
def test_special_params_as_in_torch(case: Case, target: Target) -> None:
    """Infinite params (masks of attention, for one) stay what torch lets them be."""
    start, grad = special_pair([math.inf, -math.inf, math.nan, 3e38, -3e38, 1e-45, -0.0], target.device)
    grad = grad.clamp(-1, 1)
    ours = build(case, target, [torch.nn.Parameter(start.clone())])
    theirs = build_torch(case, [torch.nn.Parameter(start.clone())])
    for _ in range(3):
        for optimizer in (ours, theirs):
            set_grads(parameters(optimizer), [grad])
            optimizer.step()
        assert_like_torch(ours, theirs)


@pytest.mark.arithmetic
@on_every_target
@every(DECOUPLED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_infinite_params_with_zero_gradients_stay(
    case: Case, target: Target, dtype: torch.dtype, weight_decay: float
) -> None:
    """Where decay is decoupled; elsewhere it makes the gradient infinite too."""
    p = torch.nn.Parameter(torch.tensor([-math.inf, math.inf, 1.0], dtype=dtype, device=target.device))
    optimizer = build(case, target, [p], weight_decay=weight_decay)
    for _ in range(3):
        p.grad = torch.zeros_like(p)
        optimizer.step()
        assert p[0] == -math.inf
        assert p[1] == math.inf
        assert p[2].isfinite()


@pytest.mark.arithmetic
@on_every_target
@for_every_class
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_lr_zero_moves_nothing(case: Case, target: Target, dtype: torch.dtype) -> None:
    """Distributed checkpointing makes states by one step with lr 0 and zero gradients."""
    params = make_params(SHAPES, dtype, target.device)
    before = copies(params)
    optimizer = build(case, target, params, lr=0.0)
    for grads in ([torch.zeros_like(p) for p in params], random_grads(params, 0)):
        set_grads(params, grads)
        optimizer.step()
        for p, q in zip(params, before, strict=True):
            assert_equal(p, q)
    assert updates(optimizer, params) == [2.0] * len(params)


@pytest.mark.arithmetic
@pytest.mark.slow
@on_every_target
@pytest.mark.parametrize("case", [case for case in RUN if case.divides], ids=str)
def test_eps_zero(case: Case, target: Target) -> None:
    """Nothing but the elements themselves may be divided: a zero past the end of a tensor would make NaN."""
    params = make_params([(n,) for n in (1, 3, 17, 255, 257)], device=target.device)
    optimizer = build(case, target, params, eps=0.0)
    for step in range(quick(target, 4, 2)):
        set_grads(params, [g.sign() * (g.abs() + 1e-3) for g in random_grads(params, step)])
        checked_step(optimizer, case.rule, ONE_STEP)
        assert all(p.isfinite().all() for p in params)


@pytest.mark.slow
@on_every_target
@pytest.mark.parametrize("case", [case for case in ONE_EACH if case.has_betas], ids=str)
@pytest.mark.parametrize("betas", [(0.0, 0.999), (0.9, 0.0), (0.0, 0.0), (0.99, 0.99999), (0.5, 0.9)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_unusual_betas(case: Case, target: Target, betas: tuple[float, float], dtype: torch.dtype) -> None:
    params = make_params(dtype=dtype, device=target.device)
    # Without AdEMAMix's schedule of beta3, whose rounding is large beside 1 - beta3.
    optimizer = build(case, target, params, weight_decay=0.0, **case.known(betas=betas, beta3_warmup=None))
    for step in range(quick(target, 4, 2)):
        set_grads(params, random_grads(params, step))
        # With beta1 = 0.9 and beta2 = 0 a step can be much larger than the average of the gradients.
        checked_step(optimizer, case.rule, ONE_STEP + 2)


@on_every_target
@pytest.mark.parametrize("case", [case for case in ONE_EACH if case.ours.rule.counted], ids=str)
@pytest.mark.parametrize("step", [999, 10_000, 1_000_000, 2**24 - 2])
def test_late_steps(case: Case, target: Target, step: int) -> None:
    """Bias corrections far into a training; float32 counts exactly up to 2**24."""
    params = make_params([(100,)], device=target.device)
    optimizer = build(case, target, params)
    set_grads(params, random_grads(params, 0))
    optimizer.step()
    optimizer.state[params[0]]["step"].fill_(step)
    set_grads(params, random_grads(params, 1))
    checked_step(optimizer, case.rule, ONE_STEP)
    assert optimizer.state[params[0]]["step"] == step + 1


@pytest.mark.arithmetic
@on_every_target
@for_every_class
def test_every_group_has_its_own_numbers(case: Case, target: Target) -> None:
    """One group per tensor, every option different, in one step."""
    params = make_params([(n,) for n in (5, 70, 1, 300)], device=target.device)
    options: list[dict[str, Any]] = [
        {"lr": 0.1, "betas": (0.5, 0.6), "amsgrad": True, "momentum": 0.5, "nus": (1.0, 0.5), "use_nvlamb": True},
        {"lr": 0.01, "eps": 1e-2, "weight_decay": 0.5, "nesterov": True, "grad_averaging": False},
        {"lr": 0.001, "maximize": True, "betas": (0.0, 0.9), "momentum": 0, "nus": (0.2, 1.0), "adam_w_mode": False},
        {
            "lr": 0.2,
            "weight_decay": 0.01,
            "amsgrad": True,
            "maximize": True,
            "dampening": 0.9,
            "bias_correction": False,
        },
    ]
    groups = [{"params": [p], **case.known(**option)} for p, option in zip(params, options, strict=True)]
    optimizer = build(case, target, groups)
    for step in range(quick(target, 4, 2)):
        set_grads(params, random_grads(params, step))
        checked_step(optimizer, case.rule, ONE_STEP)


@on_every_target
@pytest.mark.parametrize("case", [case for case in CLASSES if case.ours.rule.counted], ids=str)
def test_state_step_is_float32(case: Case, target: Target) -> None:
    params = make_params(dtype=torch.float64, device=target.device)
    optimizer = build(case, target, params)
    set_grads(params, random_grads(params, 0))
    optimizer.step()
    for p in params:
        step = optimizer.state[p]["step"]
        assert (step.dtype, step.shape, step.device) == (torch.float32, (), p.device)
