"""Checkpoints: exchange with torch's classes in both directions, bit for bit; checkpoints of old versions of torch;
deepcopy and pickle. Training continues identically."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import (
    ADAMW,
    AMSGRAD,
    SCALARS,
    Case,
    Target,
    build,
    build_torch,
    copies,
    for_every_class,
    for_every_class_of_torch,
    make_params,
    on_every_target,
    parameters,
    random_grads,
    set_grads,
    train,
)
from compare import assert_equal, assert_like_torch, checked_step, states, updates
from torch import Tensor

pytestmark = pytest.mark.host
SHAPES = [(5, 3), (), (0,), (40,)]

WAYS: dict[str, Callable[[Any], Any]] = {"as-is": lambda state: state, "deepcopy": copy.deepcopy}


def through_file(state: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


WAYS["file"] = through_file
every_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())


def assert_same_checkpoint(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert a.keys() == b.keys()
    assert a["state"].keys() == b["state"].keys()
    for key, state in a["state"].items():
        assert state.keys() == b["state"][key].keys()
        for name, value in state.items():
            other = b["state"][key][name]
            assert (value.dtype, value.shape, value.stride()) == (other.dtype, other.shape, other.stride())
            assert_equal(value.cpu(), other.cpu())
    assert a["param_groups"] == b["param_groups"]


def cast_by_torch(saved: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """A checkpoint after torch's load_state_dict, which casts every state but `step` to the dtype of its param. Of the
    states here this changes running scalars beside bfloat16 params."""
    cast = {name for name in SCALARS if name != "step" and dtype == torch.bfloat16}
    states = {
        key: {name: value.to(dtype) if name in cast else value for name, value in state.items()}
        for key, state in saved["state"].items()
    }
    return {**saved, "state": states}


@on_every_target
@for_every_class_of_torch
@every_way
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
def test_torch_to_ours_to_torch(case: Case, target: Target, way: Callable[[Any], Any], dtype: torch.dtype) -> None:
    params = make_params(SHAPES, dtype, target.device)
    theirs = build_torch(case, params)
    train([theirs], 3)
    saved = copy.deepcopy(theirs.state_dict())
    ours = build(case, target, copies(params), lr=0.5)
    ours.load_state_dict(way(theirs.state_dict()))
    assert_same_checkpoint(ours.state_dict(), saved)
    back = build_torch(case, copies(params), lr=0.7)
    back.load_state_dict(way(ours.state_dict()))
    assert_same_checkpoint(back.state_dict(), cast_by_torch(saved, dtype))
    if dtype == torch.float32 and way is not WAYS["as-is"]:  # without a copy the optimizers share tensors, as in torch
        train([theirs, ours, back], 2, seed=7)
        assert_like_torch(ours, theirs)
        assert_like_torch(back, theirs, rtol=0, atol=0)


@on_every_target
@for_every_class_of_torch
@every_way
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ours_to_torch_to_ours(case: Case, target: Target, way: Callable[[Any], Any], dtype: torch.dtype) -> None:
    params = make_params(SHAPES, dtype, target.device)
    ours = build(case, target, params)
    train([ours], 3)
    saved = copy.deepcopy(ours.state_dict())
    theirs = build_torch(case, copies(params))
    theirs.load_state_dict(way(ours.state_dict()))
    back = build(case, target, copies(params))
    back.load_state_dict(way(theirs.state_dict()))
    cast = cast_by_torch(saved, dtype)
    assert_same_checkpoint(back.state_dict(), {**cast, "param_groups": theirs.state_dict()["param_groups"]})
    if way is WAYS["as-is"] or (dtype == torch.bfloat16 and case.ours.rule.running):
        return
    train([ours, back], 2, seed=7)
    for p, q in zip(parameters(ours), parameters(back), strict=True):
        assert_equal(p, q)
    assert_equal(states(ours), states(back))


@on_every_target
@for_every_class
@pytest.mark.parametrize("way", [copy.deepcopy, through_file], ids=["deepcopy", "file"])
@pytest.mark.parametrize("loads_into", [None, torch.float32], ids=["plain", "float32-states"])
def test_loading_never_changes_a_dtype(
    case: Case, target: Target, way: Callable[[Any], Any], loads_into: torch.dtype | None
) -> None:
    """torch casts states to the dtype of their param, which would round the float32 states of a bfloat16 param."""
    params = make_params(SHAPES, torch.bfloat16, target.device)
    ours = build(case, target, params, state_dtype=torch.float32)
    train([ours], 3)
    back = build(case, target, copies(params), state_dtype=loads_into)
    back.load_state_dict(way(ours.state_dict()))
    assert_same_checkpoint(back.state_dict(), ours.state_dict())
    train([ours, back], 2, seed=7)
    for p, q in zip(parameters(ours), parameters(back), strict=True):
        assert {value.dtype for value in back.state[q].values()} == {torch.float32}
        assert_equal(p, q)
    assert_equal(states(ours), states(back))
    assert back.state_dtype == loads_into


@on_every_target
@pytest.mark.parametrize(
    "as_saved",
    [int, float, lambda step: step.cpu(), lambda step: step.cpu().to(torch.int64), lambda step: step.cpu().double()],
    ids=["int", "float", "cpu-tensor", "int64-tensor", "float64-tensor"],
)
def test_old_checkpoints(target: Target, as_saved: Callable[[Tensor], Any]) -> None:
    """torch once saved `step` as an int, and as tensors of other dtypes and devices. Groups had fewer options."""
    params = make_params(SHAPES, device=target.device)
    theirs = build_torch(AMSGRAD, params)
    train([theirs], 3)
    old = copy.deepcopy(theirs.state_dict())
    for state in old["state"].values():
        state["step"] = as_saved(state["step"])
    for group in old["param_groups"]:
        for key in ("maximize", "foreach", "capturable", "differentiable", "fused", "decoupled_weight_decay"):
            group.pop(key, None)
    ours = build(AMSGRAD, target, copies(params), state_dtype=torch.float32)
    ours.load_state_dict(old)
    train([theirs, ours], 2, seed=7)
    for p in parameters(ours):
        step = ours.state[p]["step"]
        assert (step.dtype, step.shape, step.device, step.item()) == (torch.float32, (), p.device, 5)
    assert_like_torch(ours, theirs)
    assert (ours.backend, ours.state_dtype) == (target.backend, torch.float32)


@on_every_target
@for_every_class
def test_group_options_survive(case: Case, target: Target) -> None:
    params = make_params(SHAPES, device=target.device)
    groups = [{"params": params[:2], "lr": 0.3, "note": "head"}, {"params": params[2:], "weight_decay": 0.7}]
    ours = build(case, target, groups)
    train([ours], 1)
    other = copies(params)
    back = build(case, target, [{"params": other[:2]}, {"params": other[2:]}])
    back.load_state_dict(through_file(ours.state_dict()))
    assert back.param_groups[0]["note"] == "head"
    assert [group["lr"] for group in back.param_groups] == [0.3, ours.defaults["lr"]]
    assert back.param_groups[1]["weight_decay"] == 0.7
    train([back], 1)
    set_grads(parameters(back), random_grads(parameters(back), 5))
    checked_step(back, case.rule, 3.0)


@on_every_target
@for_every_class
def test_loading_does_not_share_memory_with_file_or_other_optimizer(case: Case, target: Target) -> None:
    """As in torch, a loaded optimizer may share tensors with the dict. A deep copy of the dict must stay unchanged."""
    params = make_params(SHAPES, device=target.device)
    ours = build(case, target, params)
    train([ours], 2)
    kept = copy.deepcopy(ours.state_dict())
    reference = copy.deepcopy(kept)
    back = build(case, target, copies(params))
    back.load_state_dict(copy.deepcopy(kept))
    train([ours, back], 2, seed=3)
    assert_same_checkpoint(kept, reference)


@on_every_target
@for_every_class
def test_loading_after_steps_forgets_the_old_states(case: Case, target: Target) -> None:
    params = make_params(SHAPES, device=target.device)
    ours = build(case, target, params)
    train([ours], 2)
    early, early_params = copy.deepcopy(ours.state_dict()), copies(params)
    train([ours], 3, seed=4)
    after = copies(params)
    for p, q in zip(params, early_params, strict=True):
        p.data.copy_(q.data)
    ours.load_state_dict(early)
    train([ours], 3, seed=4)
    for p, q in zip(params, after, strict=True):
        assert_equal(p, q)
    if case.ours.rule.counted:  # of other rules a checkpoint holds no counts
        assert updates(ours, params) == [5] * len(params)


def test_checkpoint_of_another_model_is_refused() -> None:
    ours = ADAMW.ours(make_params([(3,), (4,)]))
    with pytest.raises(ValueError, match="different number of parameter groups"):
        ours.load_state_dict({"state": {}, "param_groups": []})
    other = ADAMW.ours(make_params([(3,)]))
    with pytest.raises(ValueError, match="doesn't match the size of optimizer's group"):
        ours.load_state_dict(other.state_dict())


def clone(optimizer: Any, how: str) -> Any:
    return copy.deepcopy(optimizer) if how == "deepcopy" else pickle.loads(pickle.dumps(optimizer))


@on_every_target
@for_every_class
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("steps_before", [0, 2])
def test_deepcopy_and_pickle(case: Case, target: Target, how: str, steps_before: int) -> None:
    """A copy has its own params and states, keeps our options and trains identically. Training one does not change the
    other."""
    dtype = torch.bfloat16 if case is AMSGRAD else torch.float32
    ours = build(case, target, make_params(SHAPES, dtype, target.device), state_dtype=torch.float32)
    train([ours], steps_before)
    other = clone(ours, how)
    assert type(other) is type(ours)
    assert (other.backend, other.state_dtype) == (target.backend, torch.float32)
    assert other._step_supports_amp_scaling
    addresses, others = (
        {value.data_ptr() for state in optimizer.state.values() for value in state.values() if value.numel()}
        for optimizer in (ours, other)
    )
    assert addresses.isdisjoint(others)
    before = copy.deepcopy(states(ours))
    frozen = [p.detach().clone() for p in parameters(ours)]
    train([other], 2, seed=9)
    for p, kept in zip(parameters(ours), frozen, strict=True):
        assert_equal(p.detach(), kept)
    assert_equal(states(ours), before)
    train([ours], 2, seed=9)
    for p, q in zip(parameters(ours), parameters(other), strict=True):
        assert_equal(p, q)
    assert_equal(states(ours), states(other))


@on_every_target
def test_step_counters_are_independent(target: Target) -> None:
    """Users see each `step` as a separate tensor, even if the tensors share one buffer."""
    params = make_params([(3,), (4,), (5,)], device=target.device)
    ours = build(AMSGRAD, target, params)
    train([ours], 1)
    ours.state[params[1]]["step"].add_(5)
    assert [ours.state[p]["step"].item() for p in params] == [1, 6, 1]
    set_grads(params, random_grads(params, 1))
    checked_step(ours, AMSGRAD.rule, 3.0)
    assert [ours.state[p]["step"].item() for p in params] == [2, 7, 2]


@pytest.mark.slow
@on_every_target
def test_saving_one_state_saves_only_it(target: Target) -> None:
    if target.backend == "triton" and target.device == "cpu":
        pytest.skip("Triton's interpreter takes a minute per thousand tensors")
    params = make_params([(1,)] * 5000, device=target.device)
    ours = build(ADAMW, target, params)
    train([ours], 1)
    buffer = io.BytesIO()
    torch.save({"step": ours.state_dict()["state"][17]["step"]}, buffer)
    assert buffer.tell() < 4096
