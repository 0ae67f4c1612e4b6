"""The averages of the weights in the optimizer's own checkpoint: what resumes, and what torch's classes make of it."""

from __future__ import annotations

import copy
import io
import warnings
from typing import Any

import pytest
import torch
from averaged import DECAY, REFERENCE, SHAPES, WEIGHT, make
from cases import (
    BY_NAME,
    Case,
    Target,
    build,
    build_torch,
    copies,
    for_every_class_of_torch,
    for_every_rule,
    make_params,
    on_every_target,
    parameters,
    random_grads,
    set_grads,
    train,
)
from compare import assert_equal, checked_average
from looks import LOOKS, choose
from torch import Tensor

from fused_optim import FusedAdamW, FusedLAMB, FusedQHAdam, FusedSGD, convert


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def values(tensors: Any) -> list[Tensor]:
    return [t.detach().clone() for t in tensors]


def averages_of(optimizer: Any) -> list[Tensor]:
    return [optimizer.state[p]["ema"] for p in parameters(optimizer)]


@on_every_target
@for_every_rule
def test_a_resumed_training_is_the_same(case: Case, target: Target) -> None:
    def decay(steps: int) -> float:
        return 0.5 + 0.1 * steps

    whole = make(target, case, ema_decay=decay, ema_dtype=torch.bfloat16)
    train([whole], 2)
    saved = through_a_file(whole.state_dict())
    assert saved["ema_steps"] == 2
    resumed = build(case, target, copies(parameters(whole)), ema_decay=decay)  # dtypes are those that were saved
    resumed.load_state_dict(saved)
    assert_equal(list(resumed.ema.values()), list(whole.ema.values()))
    train([whole, resumed], 2, seed=2)
    assert_equal(list(resumed.ema.values()), list(whole.ema.values()))
    assert_equal(values(parameters(resumed)), values(parameters(whole)))


@on_every_target
@for_every_class_of_torch
def test_torchs_classes_load_and_ignore_them(case: Case, target: Target) -> None:
    ours, without = make(target, case), make(target, case, ema_decay=None)
    train([ours, without], 2)
    theirs, expected = (build_torch(case, copies(parameters(ours))) for _ in range(2))
    theirs.load_state_dict(through_a_file(ours.state_dict()))
    expected.load_state_dict(without.state_dict())
    train([theirs, expected], 2, seed=2)
    assert_equal(values(parameters(theirs)), values(parameters(expected)))

    back = build(case, target, copies(parameters(expected)), ema_decay=DECAY)
    back.load_state_dict(expected.state_dict())
    assert not back.ema and back.ema_state_dict()["steps"] == 0
    before = values(parameters(back))
    train([back], 1, seed=4)
    for p, old in zip(parameters(back), before, strict=True):
        torch.testing.assert_close(back.ema[p], old.lerp(p.detach(), WEIGHT))


@on_every_target
@for_every_rule
def test_an_average_that_no_update_has_reached_is_not_saved(case: Case, target: Target) -> None:
    optimizer = make(target, case, skip_nonfinite=True)
    set_grads(parameters(optimizer), random_grads(parameters(optimizer), 0))
    optimizer.step(grad_scale=0)
    saved = optimizer.state_dict()
    assert not any("ema" in state for state in saved["state"].values())
    assert saved["ema_steps"] == 1
    resumed = build(case, target, copies(parameters(optimizer)), ema_decay=DECAY)
    resumed.load_state_dict(saved)
    set_grads(parameters(resumed), random_grads(parameters(resumed), 1))
    resumed.step()
    assert_equal(list(resumed.ema.values()), values(parameters(resumed)))
    train([optimizer], 1, seed=3)
    assert all("ema" in state for state in optimizer.state_dict()["state"].values())


@on_every_target
def test_an_average_stays_where_counting_begins_anew(target: Target) -> None:
    """SGD counts from 0 where momentum is switched on. The next step is skipped, so its buffer is not saved."""
    optimizer = make(target, BY_NAME["sgd-plain"], skip_nonfinite=True)
    train([optimizer], 2)
    optimizer.param_groups[0]["momentum"] = 0.9
    set_grads(parameters(optimizer), random_grads(parameters(optimizer), 2))
    optimizer.step(grad_scale=0)
    saved = optimizer.state_dict()
    assert [list(state) for state in saved["state"].values()] == [["ema"]] * len(SHAPES)
    resumed = build(BY_NAME["sgd-plain"], target, copies(parameters(optimizer)), ema_decay=DECAY, momentum=0.9)
    resumed.load_state_dict(saved)
    set_grads(parameters(resumed), random_grads(parameters(resumed), 3))
    checked_average(resumed, resumed.step, WEIGHT)


def test_optimizers_without_a_decay_drop_them() -> None:
    ours = make(REFERENCE)
    train([ours], 2)
    saved = ours.state_dict()
    other = make(REFERENCE, ema_decay=None)
    other.load_state_dict(saved)
    assert "ema" in saved["state"][0] and not any("ema" in state for state in other.state.values())
    other.ema_decay = DECAY
    assert not other.ema

    ours.ema_decay = None
    assert not any("ema" in state for state in ours.state.values())
    train([ours], 1)
    assert "ema_steps" not in ours.state_dict() and "ema" not in ours.state_dict()["state"][0]
    plain = make(REFERENCE, BY_NAME["sgd-plain"])
    train([plain], 1)
    plain.ema_decay = None
    assert not plain.state_dict()["state"]  # as torch, whose SGD has no state without momentum


@for_every_class_of_torch
def test_averages_alone_make_a_checkpoint_that_torch_loads(case: Case) -> None:
    trained = make(REFERENCE, case)
    train([trained], 2)
    fresh = make(REFERENCE, case)
    fresh.load_ema_state_dict(trained.ema_state_dict())
    theirs, expected = (build_torch(case, make_params(SHAPES)) for _ in range(2))
    theirs.load_state_dict(fresh.state_dict())
    train([theirs, expected], 2)
    assert_equal(values(parameters(theirs)), values(parameters(expected)))
    again = make(REFERENCE, case)
    again.load_state_dict(copy.deepcopy(fresh.state_dict()))
    set_grads(parameters(again), random_grads(parameters(again), 0))
    checked_average(again, again.step, WEIGHT)


def test_a_checkpoint_that_does_not_count() -> None:
    """As torch.distributed.checkpoint and FSDP1 give it: states and groups alone."""
    for kind, steps in [(FusedAdamW, 2), (FusedSGD, 0)]:
        optimizer = kind(make_params(SHAPES), ema_decay=DECAY, backend="reference")
        train([optimizer], 2)
        saved = optimizer.state_dict()
        del saved["ema_steps"]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            optimizer.load_state_dict(saved)
        assert optimizer.ema_state_dict()["steps"] == steps
        optimizer.ema_decay = lambda steps: 0.5
        if kind is FusedSGD:
            with pytest.warns(UserWarning, match='not their "ema_steps"'):
                optimizer.load_state_dict(saved)
            optimizer.load_ema_state_dict({**optimizer.ema_state_dict(), "steps": 2})
            assert optimizer.state_dict()["ema_steps"] == 2


@pytest.mark.parametrize("look", LOOKS)
def test_a_replaced_average_is_seen(look: str, monkeypatch: pytest.MonkeyPatch) -> None:
    choose(monkeypatch, look)
    optimizer = make(REFERENCE)
    train([optimizer], 2)
    p = parameters(optimizer)[3]
    for replaced in (torch.zeros(4500), torch.ones(4500, dtype=torch.bfloat16)):
        optimizer.state[p]["ema"] = replaced
        set_grads(parameters(optimizer), random_grads(parameters(optimizer), 5))
        checked_average(optimizer, optimizer.step, WEIGHT)
        assert optimizer.ema[p].data_ptr() == replaced.data_ptr()
    optimizer.state[p]["ema"].data = torch.zeros(4500, dtype=torch.bfloat16)
    checked_average(optimizer, optimizer.step, WEIGHT)


def test_an_average_of_another_shape_is_refused() -> None:
    optimizer = make(REFERENCE)
    train([optimizer], 1)
    optimizer.state[parameters(optimizer)[0]]["ema"] = torch.zeros(3)
    before = values(parameters(optimizer))
    with pytest.raises(RuntimeError, match=r'state "ema" must have its param\'s shape, \(3, 5\), but has \(3,\)'):
        optimizer.step()
    assert_equal(values(parameters(optimizer)), before)


# ---- checkpoints that are converted


def test_converters_carry_them() -> None:
    """As of an optimizer that was taken over from Apex and saved in its form again."""
    lamb = FusedLAMB(make_params(SHAPES), ema_decay=DECAY, backend="reference")
    train([lamb], 2)
    saved = lamb.state_dict()
    counted = [{**group, "step": 2} for group in saved["param_groups"]]
    without = {i: {k: v for k, v in state.items() if k != "step"} for i, state in saved["state"].items()}
    apex = {**saved, "state": without, "param_groups": counted}
    for checkpoint in (apex, convert.apex(apex)):
        again = FusedLAMB(make_params(SHAPES), ema_decay=DECAY, backend="reference")
        again.load_state_dict(checkpoint)
        assert_equal(averages_of(again), averages_of(lamb))
        assert again.ema_state_dict()["steps"] == 2
        assert [float(again.state[p]["step"]) for p in parameters(again)] == [2.0] * len(SHAPES)


def test_qhoptims_checkpoints_carry_them() -> None:
    qhadam = FusedQHAdam(make_params(SHAPES), ema_decay=DECAY, backend="reference")
    train([qhadam], 2)
    saved = qhadam.state_dict()
    beta1, beta2 = saved["param_groups"][0]["betas"]
    states = {
        index: {
            "exp_avg": state["exp_avg"] / (1 - beta1**2),
            "exp_avg_sq": state["exp_avg_sq"] / (1 - beta2**2),
            "beta1_weight": 1 + beta1,
            "beta2_weight": 1 + beta2,
            "ema": state["ema"],
        }
        for index, state in saved["state"].items()
    }
    again = FusedQHAdam(make_params(SHAPES), ema_decay=DECAY, backend="reference")
    again.load_state_dict({**saved, "state": states})
    assert_equal(averages_of(again), averages_of(qhadam))
    assert sorted(again.state[parameters(again)[0]]) == ["ema", "exp_avg", "exp_avg_sq", "step"]


@on_every_target
def test_averages_before_the_first_step_of_compact_states(target: Target) -> None:
    """load_ema_state_dict makes the other states, and what their formats need."""
    saved, params = (make_params([(5,), (4, 3)], device=target.device) for _ in range(2))
    first, second = (
        FusedAdamW(members, backend=target.backend, state_dtype="compact", ema_decay=0.9) for members in (saved, params)
    )
    set_grads(saved, random_grads(saved, 0))
    first.step()
    second.load_ema_state_dict(first.ema_state_dict())
    set_grads(params, random_grads(params, 0))
    second.step()
    for p, q in zip(saved, params, strict=True):
        assert_equal(p, q)
        for name in ("exp_avg", "exp_avg_sq", "anchor"):
            assert_equal(first.state[p][name], second.state[q][name])
