"""Training over several steps: late params, groups that are added and removed, closures, hooks, thousands of
tensors."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import (
    ADAMW,
    AMSGRAD,
    RUN,
    Case,
    Target,
    build,
    build_torch,
    copies,
    every,
    for_every_case,
    for_every_class,
    for_every_rule,
    make_params,
    on_every_target,
    parameters,
    quick,
    random_grads,
    set_grads,
    train,
)
from compare import assert_equal, assert_like_torch, checked_step, states, updates

from fused_optim.engine import modules


@on_every_target
@every(RUN, "amsgrad")
def test_amsgrad_switched_on_later(case: Case, target: Target) -> None:
    """The maximum starts as the current exp_avg_sq. It stays in the state after amsgrad is switched off."""
    params = make_params([(5, 3), (40,)], device=target.device)
    optimizer = build(case, target, params, amsgrad=False)
    for step, amsgrad in enumerate([False, False, True, True, False]):
        optimizer.param_groups[0]["amsgrad"] = amsgrad
        set_grads(params, [g / (step + 1) for g in random_grads(params, step)])
        checked_step(optimizer, case.rule, 3.0)
        assert all(("max_exp_avg_sq" in optimizer.state[p]) == (step >= 2) for p in params)


@on_every_target
@for_every_case
def test_late_params_and_missing_gradients(case: Case, target: Target) -> None:
    """A param counts from its first gradient, and is unchanged in steps without a gradient."""
    params = make_params([(5, 3), (40,), (), (7,)], device=target.device)
    ours, theirs = build(case, target, params), build_torch(case, copies(params)) if case.torch else None
    for step, present in enumerate(["1000", "1100", "0101", "1111", "0000", "0111"]):
        grads = [g if bit == "1" else None for g, bit in zip(random_grads(params, step), present, strict=True)]
        set_grads(params, grads)
        checked_step(ours, case.rule, 3.0)
        if theirs is not None:
            set_grads(parameters(theirs), grads)
            theirs.step()
            assert_like_torch(ours, theirs)
    assert updates(ours, params) == [3, 4, 2, 3]


@on_every_target
@for_every_class
def test_a_param_without_gradient_gets_no_state(case: Case, target: Target) -> None:
    params = make_params([(5,), (6,)], device=target.device)
    optimizer = build(case, target, params)
    optimizer.step()
    assert [*optimizer.state] == (params if case.is_eager else [])
    set_grads(params, [torch.ones_like(params[0]), None])
    optimizer.step()
    assert [*optimizer.state] == (params if case.is_eager else params[:1])


@on_every_target
@for_every_class
def test_add_param_group_in_mid_training(case: Case, target: Target) -> None:
    params = make_params([(5, 3), (40,), (9,)], device=target.device)
    optimizer = build(case, target, params[:1])
    set_grads(params, random_grads(params, 0))
    optimizer.step()
    optimizer.add_param_group({"params": params[1:], "lr": 0.3, "weight_decay": 0.0})
    for step in (1, 2):
        set_grads(params, random_grads(params, step))
        checked_step(optimizer, case.rule, 3.0)
    assert updates(optimizer, params) == [3, 2, 2]


@on_every_target
@for_every_class
def test_removing_a_param(case: Case, target: Target) -> None:
    params = make_params([(5, 3), (40,), (9,)], device=target.device)
    optimizer = build(case, target, params)
    set_grads(params, random_grads(params, 0))
    optimizer.step()
    optimizer.param_groups[0]["params"].pop(1)
    kept = params[1].detach().clone()
    set_grads(params, random_grads(params, 1))
    checked_step(optimizer, case.rule, 3.0)
    assert_equal(params[1].detach(), kept)


@on_every_target
@for_every_class
def test_named_parameters(case: Case, target: Target) -> None:
    model = torch.nn.Linear(3, 2).to(target.device)
    optimizer = build(case, target, model.named_parameters())
    assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]
    set_grads([*model.parameters()], random_grads([*model.parameters()], 0))
    checked_step(optimizer, case.rule, 3.0)
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == ["weight", "bias"]


@on_every_target
def test_closure(target: Target) -> None:
    (p,) = params = make_params([(4,)], device=target.device)
    optimizer = build(AMSGRAD, target, params)
    theirs = build_torch(AMSGRAD, copies(params))

    def closure_for(q: torch.Tensor, opt: Any) -> Any:
        def closure() -> torch.Tensor:
            assert torch.is_grad_enabled()
            opt.zero_grad()
            loss = (q * q).sum()
            loss.backward()
            return loss

        return closure

    expected = (p * p).sum().item()
    for context in (torch.no_grad(), torch.enable_grad()):
        with context:
            loss = optimizer.step(closure_for(p, optimizer))
            theirs.step(closure_for(parameters(theirs)[0], theirs))
    assert loss.item() < expected
    assert_like_torch(optimizer, theirs)
    assert optimizer.step() is None


@on_every_target
def test_hooks(target: Target) -> None:
    params = make_params([(4,)], device=target.device)
    optimizer = build(AMSGRAD, target, params)
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda opt, args, kwargs: calls.append("pre"))
    handle = optimizer.register_step_post_hook(lambda opt, args, kwargs: calls.append("post"))
    optimizer.register_state_dict_pre_hook(lambda opt: calls.append("save"))
    optimizer.register_state_dict_post_hook(lambda opt, state: calls.append("saved"))
    optimizer.register_load_state_dict_pre_hook(lambda opt, state: calls.append("load"))
    optimizer.register_load_state_dict_post_hook(lambda opt: calls.append("loaded"))
    set_grads(params, random_grads(params, 0))
    optimizer.step()
    handle.remove()
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    assert calls == ["pre", "post", "pre", "save", "saved", "load", "loaded"]


@on_every_target
def test_zero_grad(target: Target) -> None:
    params = make_params(device=target.device)
    optimizer = build(AMSGRAD, target, params)
    set_grads(params, random_grads(params, 0))
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    assert all(p.grad is not None and not p.grad.any() for p in params)
    checked_step(optimizer, AMSGRAD.rule, 3.0)
    optimizer.zero_grad()
    assert all(p.grad is None for p in params)
    checked_step(optimizer, AMSGRAD.rule, 3.0)


@on_every_target
@for_every_case
def test_gradients_are_only_read(case: Case, target: Target) -> None:
    params = make_params(device=target.device)
    optimizer = build(case, target, params)
    grads = random_grads(params, 0)
    set_grads(params, grads)
    versions = [p.grad._version for p in params if p.grad is not None]
    optimizer.step()
    for p, grad in zip(params, grads, strict=True):
        assert_equal(p.grad, grad)
    assert versions == [p.grad._version for p in params if p.grad is not None]


@on_every_target
@for_every_rule
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
def test_autograd_sees_the_update(case: Case, target: Target, dtype: torch.dtype) -> None:
    """Backward through a graph that saved the old values must raise, as after any in-place change."""
    (p,) = params = make_params([(4,)], dtype, target.device)
    optimizer = build(case, target, params)
    for step in range(2):
        set_grads(params, random_grads(params, step))
        loss = (p * p).abs().sum()
        optimizer.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@pytest.mark.slow
@on_every_target
@for_every_rule
def test_one_group_per_tensor_is_one_group(case: Case, target: Target) -> None:
    count = quick(target, 465, 6)
    one, many = (make_params([(i % 50,) for i in range(count)], device=target.device) for _ in range(2))
    pair = [build(case, target, one), build(case, target, [{"params": [p]} for p in many])]
    train(pair, 3)
    for p, q in zip(one, many, strict=True):
        assert_equal(p, q)
    assert_equal(states(pair[0]), states(pair[1]))


@pytest.mark.slow
@on_every_target
@for_every_rule
def test_thousands_of_tensors(case: Case, target: Target) -> None:
    params = make_params([(i % 7,) for i in range(quick(target, 600, 10))], device=target.device)
    optimizer = build(case, target, params)
    for step in range(2):
        set_grads(params, random_grads(params, step))
        checked_step(optimizer, case.rule, 3.0)


def calls_of(function: Callable[[], object]) -> Counter[str]:
    """How often each function is called, functions of C included."""
    calls: Counter[str] = Counter()

    def count(frame: Any, event: str, argument: Any) -> None:
        if event == "call":
            calls[frame.f_code.co_name] += 1
        elif event == "c_call":
            calls[argument.__qualname__] += 1

    sys.setprofile(count)
    try:
        function()
    finally:
        sys.setprofile(None)
    return calls


@pytest.mark.once
@on_every_target
def test_the_calls_of_a_step_do_not_depend_on_the_number_of_tensors(target: Target) -> None:
    """A steady step takes the same Python calls for 3 tensors and for 20,000, and builds no tables."""
    if target.backend == "reference":
        pytest.skip("the reference backend is a loop in Python over the tensors")
    if isinstance(reason := modules.poll(), str):
        pytest.skip(f"the change detector in Python goes over the tensors: {reason}")
    calls = []
    for count in (3, 20_000 if target.backend == "cpp" else 300):
        params = make_params([(8,)] * count, device=target.device)
        optimizer = build(ADAMW, target, params)
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
        optimizer.step()
        detector = optimizer._detector
        calls.append(calls_of(optimizer.step))
        assert optimizer._detector is detector
        assert all(optimizer.state[p]["step"] == 3 for p in params[:: max(1, count // 20)])
    assert calls[0] == calls[1] and calls[0].total() < 500
