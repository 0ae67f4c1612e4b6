"""SGD and SGDW: they must match torch's for-loop. The momentum buffer starts as the param's first gradient, even if
that comes late."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import (
    Target,
    copies,
    make_params,
    on_every_target,
    parameters,
    quick,
    random_grads,
    set_grads,
    train,
)
from compare import assert_equal, assert_like_torch, states

from fused_optim import FusedSGD, FusedSGDW

OPTIONS: list[dict[str, Any]] = [
    {},
    {"weight_decay": 0.1, "maximize": True},
    {"momentum": 0.9},
    {"momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1},
    {"momentum": 0.8, "dampening": 1.0},
    {"momentum": 0.9, "dampening": -0.5, "maximize": True},
    {"momentum": 0.9, "nesterov": True},
    {"momentum": 0.7, "nesterov": True, "weight_decay": 0.1, "maximize": True},
    {"momentum": 1.5},
]
DAMPED: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}
SHAPES = [(5, 3), (), (0,), (40,)]


def pair(target: Target, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[FusedSGD, torch.optim.SGD]:
    params = make_params(SHAPES, dtype, target.device)
    theirs = torch.optim.SGD(copies(params), foreach=False, **options)
    return FusedSGD(params, backend=target.backend, **options), theirs


def skip_a_step(optimizer: Any) -> None:
    """A step with an overflow, as GradScaler makes it."""
    params = parameters(optimizer)
    set_grads(params, [torch.full_like(p, torch.inf) for p in params])
    optimizer.found_inf = torch.ones((), device=params[0].device)
    optimizer.step()
    del optimizer.found_inf


@on_every_target
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64], ids=str)
def test_like_torch(target: Target, options: dict[str, Any], dtype: torch.dtype) -> None:
    ours, theirs = pair(target, dtype, lr=0.05, **options)
    train([ours, theirs], quick(target, 10, 2))
    tolerance = 1e-13 if dtype == torch.float64 else 1e-6
    assert_like_torch(ours, theirs, rtol=10 * tolerance, atol=tolerance)


@on_every_target
def test_nesterov_with_dampening(target: Target) -> None:
    """The constructor refuses this combination, but a group can be set to it later."""
    ours, theirs = pair(target, **DAMPED)
    for optimizer in (ours, theirs):
        optimizer.param_groups[0]["nesterov"] = True
    train([ours, theirs], 3)
    assert_like_torch(ours, theirs)
    for optimizer in (ours, theirs):
        optimizer.param_groups[0]["nesterov"] = False
    train([ours, theirs], 2, seed=5)
    assert_like_torch(ours, theirs)


@on_every_target
@pytest.mark.parametrize("skips", [1, 3])
def test_a_skipped_first_step_was_none(target: Target, skips: int) -> None:
    """The buffer is allocated by then, but the first real gradient must enter it undamped. torch's fused SGD reads
    uninitialized memory in this case."""
    ours, theirs = pair(target, **DAMPED)
    for _ in range(skips):
        skip_a_step(ours)
    assert ours.state_dict()["state"] == {}
    train([ours, theirs], 3)
    assert_like_torch(ours, theirs)
    skip_a_step(ours)
    train([ours, theirs], 2, seed=9)
    assert_like_torch(ours, theirs)


def through_file(optimizer: FusedSGD) -> FusedSGD:
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    loaded = FusedSGD(copies(parameters(optimizer)), lr=7.0, backend=optimizer.backend)
    loaded.load_state_dict(torch.load(buffer, weights_only=True))
    return loaded


def through_torch(optimizer: FusedSGD) -> FusedSGD:
    params = parameters(optimizer)
    theirs = torch.optim.SGD(copies(params), lr=7.0)
    theirs.load_state_dict(optimizer.state_dict())
    loaded = FusedSGD(copies(params), lr=7.0, backend=optimizer.backend)
    loaded.load_state_dict(copy.deepcopy(theirs.state_dict()))
    return loaded


@on_every_target
@pytest.mark.parametrize(
    "clone",
    [copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer)), through_file, through_torch],
    ids=["deepcopy", "pickle", "file", "torch"],
)
@pytest.mark.parametrize("skips", [0, 1])
@pytest.mark.parametrize("steps", [0, 2])
def test_copies_know_what_has_begun(
    target: Target, clone: Callable[[FusedSGD], FusedSGD], skips: int, steps: int
) -> None:
    """The last param gets its first gradient only in the copy. The copy must know for each of the others whether its
    momentum has started."""
    ours, theirs = pair(target, **DAMPED)
    for _ in range(skips):
        skip_a_step(ours)
    for step in range(steps):
        for optimizer in (ours, theirs):
            params = parameters(optimizer)
            set_grads(params, [*random_grads(params, step)[:3], None])
            optimizer.step()
    other = clone(ours)
    assert [state.keys() for state in states(other)] == [state.keys() for state in states(theirs)]
    train([other, theirs], 2, seed=3)
    assert_like_torch(other, theirs)
    train([ours], 2, seed=3)
    assert_equal([p.detach() for p in parameters(ours)], [p.detach() for p in parameters(other)])


@on_every_target
def test_buffers_that_begin_at_different_times(target: Target) -> None:
    ours, theirs = pair(target, **DAMPED)
    for step, present in enumerate(["1000", "0100", "1101", "0010", "1111"]):
        if step in (0, 2):
            skip_a_step(ours)
        for optimizer in (ours, theirs):
            params = parameters(optimizer)
            grads = zip(random_grads(params, step), present, strict=True)
            set_grads(params, [g if bit == "1" else None for g, bit in grads])
            optimizer.step()
        assert_like_torch(ours, theirs)


@on_every_target
@pytest.mark.parametrize(
    "schedule", [[0.0, 0.9, 0.9], [0.9, 0.0, 0.0, 0.9], [0.0, 0.0, 0.5, 0.0, 0.7], [0.9, 0.1]], ids=str
)
def test_momentum_switched_on_and_off(target: Target, schedule: list[float]) -> None:
    """Without momentum torch leaves an existing buffer unchanged and creates none."""
    ours, theirs = pair(target, lr=0.1, dampening=0.5)
    for step, momentum in enumerate(schedule):
        for optimizer in (ours, theirs):
            optimizer.param_groups[0]["momentum"] = momentum
        train([ours, theirs], 2, seed=10 * step)
        assert_like_torch(ours, theirs)


@on_every_target
def test_momentum_from_zero_by_a_scheduler(target: Target) -> None:
    """OneCycleLR starts in the middle of training and sets a momentum that the constructor did not have."""
    both = pair(target, lr=0.1)
    train(both, 2, seed=50)
    schedulers = [
        torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=12, base_momentum=0.5, max_momentum=0.9)
        for optimizer in both
    ]

    def each(_: int) -> None:
        for scheduler in schedulers:
            scheduler.step()

    train(both, quick(target, 10, 3), each=each)
    assert both[0].param_groups[0]["momentum"] == both[1].param_groups[0]["momentum"] != 0
    assert_like_torch(*both)


@on_every_target
@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1}], ids=str)
def test_no_state_without_momentum(target: Target, options: dict[str, Any]) -> None:
    ours, theirs = pair(target, lr=0.1, **options)
    train([ours, theirs], 3)
    skip_a_step(ours)
    assert len(ours.state) == 0
    assert ours.state_dict()["state"] == theirs.state_dict()["state"] == {}
    other = through_file(ours)
    assert len(other.state) == 0
    train([other, theirs], 2, seed=4)
    assert_like_torch(other, theirs)


@on_every_target
def test_checkpoints_with_absent_buffers(target: Target) -> None:
    """Some params have had no gradient. Exchange with torch is bit for bit in both directions. Older versions of torch
    saved None for their buffers."""
    _, theirs = pair(target, **DAMPED)
    params = parameters(theirs)
    set_grads(params, [*random_grads(params, 0)[:2], None, None])
    theirs.step()
    saved = copy.deepcopy(theirs.state_dict())
    for old in (saved, {**saved, "state": {**saved["state"], 3: {"momentum_buffer": None}}}):
        ours = FusedSGD(copies(params), lr=7.0, backend=target.backend)
        ours.load_state_dict(copy.deepcopy(old))
        back = torch.optim.SGD(copies(params), foreach=False)
        back.load_state_dict(copy.deepcopy(ours.state_dict()))
        present = [{key: x for key, x in state.items() if x is not None} for state in states(back)]
        assert_equal(present, states(theirs))
        assert back.state_dict()["param_groups"] == saved["param_groups"]
        train([ours, back], 2, seed=2)
        assert_like_torch(ours, back)


@on_every_target
def test_a_buffer_put_there_counts(target: Target) -> None:
    ours, theirs = pair(target, **DAMPED)
    for optimizer in (ours, theirs):
        for p in parameters(optimizer):
            optimizer.state[p]["momentum_buffer"] = torch.ones_like(p, requires_grad=False)
    train([ours, theirs], 2)
    assert_like_torch(ours, theirs)


@on_every_target
@pytest.mark.parametrize("options", [{}, {"momentum": 0.9, "dampening": 0.3}, {"momentum": 0.9, "nesterov": True}])
def test_sgdw_is_sgd_on_shrunk_params(target: Target, options: dict[str, Any]) -> None:
    params = make_params(SHAPES, torch.float64, target.device)
    ours = FusedSGDW(params, lr=0.1, weight_decay=0.2, backend=target.backend, **options)
    theirs = torch.optim.SGD(copies(params), lr=0.1, foreach=False, **options)
    for step in range(3):
        with torch.no_grad():
            for q in parameters(theirs):
                q.mul_(1 - 0.1 * 0.2)
        train([ours, theirs], 1, seed=step)
        assert_like_torch(ours, theirs, rtol=1e-12, atol=1e-13)


def test_sgdw_says_that_its_decay_is_decoupled() -> None:
    ours = FusedSGDW(make_params())
    assert isinstance(ours, FusedSGD) and isinstance(ours, torch.optim.SGD)
    plain = torch.optim.SGD(make_params(), lr=1e-3, weight_decay=1e-2).param_groups[0]
    group = ours.param_groups[0]
    assert {key: group[key] for key in group if key not in ("params", "decoupled_weight_decay")} == {
        key: plain[key] for key in plain if key != "params"
    }
    assert group["decoupled_weight_decay"] is True


@on_every_target
def test_a_broken_option_changes_nothing(target: Target) -> None:
    params = make_params(SHAPES, device=target.device)
    ours = FusedSGD([{"params": params[:2]}, {"params": params[2:]}], backend=target.backend, **DAMPED)
    set_grads(params, random_grads(params, 0))
    before = copies(params)
    for option in ({"momentum": "much"}, {"dampening": None}, {"momentum": (0.1, 0.2)}):
        kept = dict(ours.param_groups[1])
        ours.param_groups[1].update(option)
        with pytest.raises((TypeError, ValueError), match=f'"{next(iter(option))}"'):
            ours.step()
        ours.param_groups[1].update(kept)
        assert_equal([p.detach() for p in params], [p.detach() for p in before])
    ours.step()
    assert all((p != q).any() for p, q in zip(params, before, strict=True) if p.numel())
