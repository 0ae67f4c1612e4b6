"""The average of the weights in the place of the params, its checkpoints and its copies."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from averaged import DECAY, REFERENCE, SHAPES, WEIGHT, make
from cases import (
    ADAMW,
    BY_NAME,
    Case,
    Target,
    build,
    build_torch,
    copies,
    for_every_rule,
    make_params,
    on_every_target,
    parameters,
    quick,
    random_grads,
    set_grads,
    train,
)
from compare import assert_equal, checked_average, checked_averages
from torch import Tensor

from fused_optim import FusedAdamW, FusedSGD
from fused_optim.lr_finder import put_back

# ---- the averages in the place of the params


def values(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [t.detach().clone() for t in tensors]


@on_every_target
@pytest.mark.parametrize(
    ("dtype", "ema_dtype"),
    [(torch.float32, None), (torch.bfloat16, torch.float32), (torch.float16, None), (torch.complex64, None)],
    ids=str,
)
def test_in_the_place_of_params(dtype: torch.dtype, ema_dtype: torch.dtype | None, target: Target) -> None:
    optimizer = make(target, dtype=dtype, ema_dtype=ema_dtype)
    params = parameters(optimizer)
    train([optimizer], 2)
    with torch.no_grad():
        params[3][:3] = torch.tensor([math.nan, math.inf, -0.0], dtype=dtype)
    own, averages = values(params), values([optimizer.ema[p] for p in params])
    addresses, versions = [p.data_ptr() for p in params], [p._version for p in params]
    with optimizer.ema_weights():
        assert torch.is_grad_enabled()
        assert_equal(values(params), [average.to(dtype) for average in averages])
        assert [p.data_ptr() for p in params] == addresses
        assert all(p._version > version for p, version in zip(params, versions, strict=True))
        versions = [p._version for p in params]
    assert_equal(values(params), own)
    assert params[3][2].real.signbit()
    assert_equal(values([optimizer.ema[p] for p in params]), averages)
    assert [p.data_ptr() for p in params] == addresses
    assert all(p._version > version for p, version in zip(params, versions, strict=True))


@on_every_target
@pytest.mark.parametrize("ema_dtype", [None, torch.bfloat16], ids=str)
def test_training_goes_on_as_if_nothing_had_been(ema_dtype: torch.dtype | None, target: Target) -> None:
    ours, theirs = make(target, ema_dtype=ema_dtype), make(target, ema_dtype=ema_dtype)

    def evaluate(_: int) -> None:
        with ours.ema_weights():
            pass

    train([ours, theirs], quick(target, 4, 2), each=evaluate)
    assert_equal([p.detach() for p in parameters(ours)], [p.detach() for p in parameters(theirs)])
    assert_equal(list(ours.ema.values()), list(theirs.ema.values()))


@pytest.mark.parametrize("ema_dtype", [None, torch.bfloat16], ids=str)
def test_params_come_back_after_errors(ema_dtype: torch.dtype | None) -> None:
    optimizer = make(REFERENCE, ema_dtype=ema_dtype)
    train([optimizer], 2)
    own = values(parameters(optimizer))
    with pytest.raises(ZeroDivisionError), optimizer.ema_weights():
        raise ZeroDivisionError
    assert_equal(values(parameters(optimizer)), own)

    # Halfway in, one param turns out to have another shape.
    last = parameters(optimizer)[-1]
    data = last.data
    last.data = torch.zeros(2)
    with pytest.raises(RuntimeError, match="size"), optimizer.ema_weights():
        pass
    last.data = data
    assert_equal(values(parameters(optimizer)), own)
    train([optimizer], 1, seed=5)


def test_what_is_refused_inside() -> None:
    optimizer = make(REFERENCE)
    train([optimizer], 2)
    own, saved = values(parameters(optimizer)), optimizer.ema_state_dict()
    states_ = optimizer.state_dict()
    refused: list[Callable[[], Any]] = [
        optimizer.step,
        optimizer.ema_weights().__enter__,
        optimizer.ema_state_dict,
        lambda: optimizer.load_ema_state_dict(saved),
        optimizer.state_dict,
        lambda: optimizer.load_state_dict(states_),
        lambda: copy.deepcopy(optimizer),
        lambda: pickle.dumps(optimizer),
    ]
    with optimizer.ema_weights():
        for call in refused:
            with pytest.raises(RuntimeError, match=r"inside of ema_weights\(\)"):
                call()
    assert_equal(values(parameters(optimizer)), own)
    train([optimizer], 1, seed=5)


def test_params_without_average_stay_as_they_are() -> None:
    optimizer = make(REFERENCE)
    params = parameters(optimizer)
    with optimizer.ema_weights():  # none has one
        pass
    grads = random_grads(params, 0)
    set_grads(params, [None, *grads[1:]])
    optimizer.step()
    optimizer.step()
    own = values(params)
    with optimizer.ema_weights():
        assert torch.equal(params[0], own[0])
        assert not torch.equal(params[3], own[3])
    assert set(optimizer.ema) == set(params[1:])


def test_optimizers_without_averages() -> None:
    optimizer = make(REFERENCE, ema_decay=None)
    calls: list[Callable[[], Any]] = [
        optimizer.ema_weights().__enter__,
        optimizer.ema_state_dict,
        lambda: optimizer.load_ema_state_dict({"steps": 0, "averages": {}}),
    ]
    for call in calls:
        with pytest.raises(RuntimeError, match="make it with an ema_decay"):
            call()


def test_the_mapping_is_to_be_read() -> None:
    optimizer = make(REFERENCE)
    train([optimizer], 1)
    with pytest.raises(TypeError, match="does not support item assignment"):
        optimizer.ema["a tensor would be tried as an index"] = torch.zeros(3, 5)


# ---- checkpoints and copies


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@on_every_target
@for_every_rule
def test_a_resumed_training_is_the_same(case: Case, target: Target) -> None:
    def decay(steps: int) -> float:
        return 0.5 + 0.1 * steps

    whole = make(target, case, ema_decay=decay, ema_dtype=torch.bfloat16)
    train([whole], 2)
    params = copies(parameters(whole))
    states_, averages = (through_a_file(x) for x in (whole.state_dict(), whole.ema_state_dict()))
    assert averages["steps"] == 2 and set(averages["averages"]) == set(range(len(SHAPES)))
    resumed = build(case, target, params, ema_decay=decay)  # dtypes are those that were saved
    resumed.load_state_dict(states_)
    resumed.load_ema_state_dict(averages)
    train([whole, resumed], 2, seed=2)
    assert_equal(list(resumed.ema.values()), list(whole.ema.values()))
    assert_equal(values(parameters(resumed)), values(parameters(whole)))


@on_every_target
@for_every_rule
def test_averages_go_on_without_the_states(case: Case, target: Target) -> None:
    saved = make(target, case)
    train([saved], 2)
    fresh = build(case, target, copies(parameters(saved)), ema_decay=DECAY)
    fresh.load_ema_state_dict(saved.ema_state_dict())
    assert all(fresh.ema[p] is not saved.ema[q] for p, q in zip(parameters(fresh), parameters(saved), strict=True))
    set_grads(parameters(fresh), random_grads(parameters(fresh), 5))
    checked_average(fresh, fresh.step, WEIGHT)


@on_every_target
def test_a_checkpoint_without_averages(target: Target) -> None:
    """They start with the params that are there."""
    theirs = build_torch(ADAMW, make_params(SHAPES, device=target.device))
    train([theirs], 3)
    ours = build(ADAMW, target, copies(parameters(theirs)), ema_decay=DECAY)
    ours.load_state_dict(theirs.state_dict())
    before = values(parameters(ours))
    train([ours], 1, seed=3)
    for p, old in zip(parameters(ours), before, strict=True):
        torch.testing.assert_close(ours.ema[p], old.lerp(p.detach(), WEIGHT))


def test_the_state_dict_is_torchs_and_the_averages() -> None:
    ours, theirs = make(REFERENCE), build_torch(ADAMW, make_params(SHAPES))
    train([ours, theirs], 1)
    mine, torchs = ours.state_dict(), theirs.state_dict()
    assert mine.keys() == torchs.keys() | {"ema_steps"}
    expected = [[*state, "ema"] for state in torchs["state"].values()]
    assert [list(state) for state in mine["state"].values()] == expected
    assert mine["param_groups"][0].keys() >= torchs["param_groups"][0].keys()
    assert not any("ema" in key for key in mine["param_groups"][0])


def test_averages_are_numbered_as_torch_does() -> None:
    params = make_params([(2,), (3,), (4,)])
    optimizer = FusedSGD([{"params": params[1:]}, {"params": params[:1]}], ema_decay=DECAY, backend="reference")
    set_grads(params, [None, torch.ones(3), torch.ones(4)])
    optimizer.step()
    saved = optimizer.ema_state_dict()
    assert {index: tuple(average.shape) for index, average in saved["averages"].items()} == {0: (3,), 1: (4,)}


def test_averages_of_other_params_are_refused() -> None:
    optimizer = make(REFERENCE)
    train([optimizer], 2)
    before, saved = values(list(optimizer.ema.values())), optimizer.ema_state_dict()
    for averages, message in [
        ({**saved["averages"], 5: torch.zeros(3)}, "the optimizer has 5 params"),
        ({0: saved["averages"][0], 3: torch.zeros(3)}, r"must have its shape, \(4500,\), but has \(3,\)"),
        ({-1: torch.zeros(7, 1, 9)}, "have one of param -1"),
    ]:
        with pytest.raises(ValueError, match=message):
            optimizer.load_ema_state_dict({"steps": 7, "averages": averages})
        assert_equal(list(optimizer.ema.values()), before)
        assert optimizer.ema_state_dict()["steps"] == 2


def test_loaded_dtypes_stay_where_they_can() -> None:
    for dtype, loaded, expected in [
        (torch.float32, torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float64, torch.float32, torch.float64),
    ]:
        optimizer = FusedAdamW(make_params([(4,)], dtype), ema_decay=DECAY, backend="reference")
        optimizer.load_ema_state_dict({"steps": 1, "averages": {0: torch.ones(4, dtype=loaded)}})
        checked_averages(optimizer, [WEIGHT, WEIGHT])
        assert {average.dtype for average in optimizer.ema.values()} == {expected}


@on_every_target
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))], ids=["deepcopy", "pickle"]
)
def test_copies_have_averages_of_their_own(copied: Callable[[Any], Any], target: Target) -> None:
    optimizer = make(target, BY_NAME["lion-paper-maximize"])
    train([optimizer], 2)
    twin = copied(optimizer)
    assert set(twin.ema) == set(parameters(twin)) and not set(twin.ema) & set(parameters(optimizer))
    before = values(list(optimizer.ema.values()))
    train([twin], 1, seed=2)
    assert_equal(values(list(optimizer.ema.values())), before)
    train([optimizer], 1, seed=2)
    assert_equal(list(twin.ema.values()), list(optimizer.ema.values()))


def test_trials_leave_the_averages_alone() -> None:
    """The lr finder's steps are taken back."""
    optimizer = make(REFERENCE)
    model = torch.nn.ParameterList(parameters(optimizer))
    train([optimizer], 2)
    before, saved = values(list(optimizer.ema.values())), optimizer.ema_state_dict()["steps"]
    with put_back(model, optimizer):
        train([optimizer], 3, seed=5)
    assert_equal(list(optimizer.ema.values()), before)
    assert optimizer.ema_state_dict()["steps"] == saved
    set_grads(parameters(optimizer), random_grads(parameters(optimizer), 9))
    checked_average(optimizer, optimizer.step, WEIGHT)
