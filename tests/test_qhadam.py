"""QHAdam and QHAdamW beside their authors' own package, step by step and from its checkpoints."""

from __future__ import annotations

import copy
import functools
import inspect
import io
import math
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
from compare import assert_like_torch, checked_step
from oracle import qhadam

from fused_optim import FusedAdam, FusedAdamW, FusedQHAdam, FusedQHAdamW

pyt = pytest.importorskip("qhoptim.pyt", reason="the comparison is with the package qhoptim")
# The package calls add_(number, tensor), which still works.
pytestmark = pytest.mark.filterwarnings("ignore:This overload of add_ is deprecated:UserWarning")

F64 = torch.float64
SHAPES = [(5, 3), (), (0,), (40,)]
ADAM: dict[str, Any] = {"betas": (0.9, 0.999), "nus": (1.0, 1.0)}  # the package's defaults
OPTIONS: list[dict[str, Any]] = [
    {},
    {"nus": (0.7, 1.0)},
    {"nus": (0.7, 0.6), "betas": (0.95, 0.98), "weight_decay": 0.1},
    {"nus": (0.0, 1.0), "weight_decay": 0.1, "decouple_weight_decay": True},
    {"nus": (1.3, 0.5), "eps": 1e-3},
    {"nus": (-0.2, 1.0), "betas": (0.5, 0.9)},
    {"nus": (0.7, 0.9), "betas": (0.0, 0.999)},
    {"nus": (0.7, 0.9), "betas": (0.9, 0.0), "eps": 1e-3},
]


def assert_like_package(ours: Any, theirs: Any, rtol: float = 1e-11) -> None:
    """The package's averages are ours over their bias corrections."""
    for p, q in zip(parameters(ours), parameters(theirs), strict=True):
        torch.testing.assert_close(p.detach().cpu(), q.detach().cpu(), rtol=rtol, atol=1e-13)
        assert (p in ours.state) == (q in theirs.state)
        for index, key in enumerate(("exp_avg", "exp_avg_sq") if q in theirs.state else ()):
            beta = theirs.param_groups[0]["betas"][index]
            corrected = ours.state[p][key] / (1 - beta ** ours.state[p]["step"].item())
            torch.testing.assert_close(corrected.cpu(), theirs.state[q][key].cpu(), rtol=rtol, atol=1e-18)


@on_every_target
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_like_the_package(target: Target, options: dict[str, Any]) -> None:
    params = make_params(SHAPES, F64, target.device)
    theirs = pyt.QHAdam(copies(params), lr=0.01, **options)
    ours = FusedQHAdam(params, lr=0.01, backend=target.backend, **{**ADAM, **options})
    train([ours, theirs], quick(target, 60, 3))
    assert_like_package(ours, theirs)


@on_every_target
def test_qhadamw_like_the_package(target: Target) -> None:
    options: dict[str, Any] = {**ADAM, "lr": 0.01, "nus": (0.7, 0.9), "weight_decay": 0.2}
    params = make_params(SHAPES, F64, target.device)
    theirs = pyt.QHAdamW(copies(params), **options)
    ours = FusedQHAdamW(params, backend=target.backend, **options)
    train([ours, theirs], quick(target, 20, 3))
    assert_like_package(ours, theirs)
    assert ours.param_groups[0]["decouple_weight_decay"] is True


@on_every_target
@pytest.mark.parametrize("classes", [(FusedQHAdam, FusedAdam), (FusedQHAdamW, FusedAdamW)], ids=["l2", "decoupled"])
def test_nus_of_one_are_adam(target: Target, classes: tuple[Any, Any]) -> None:
    pair = [
        cls(make_params(SHAPES, F64, target.device), lr=0.01, weight_decay=0.1, backend=target.backend, **options)
        for cls, options in zip(classes, (ADAM, {}), strict=True)
    ]
    train(pair, quick(target, 20, 3))
    assert_like_torch(pair[0], pair[1], rtol=1e-12, atol=1e-14)


@on_every_target
def test_nus_of_zero_are_the_gradient_alone(target: Target) -> None:
    """Both averages are out of the step: p - lr * g / (|g| + eps)."""
    (p,) = params = make_params([(40,)], F64, target.device)
    ours = FusedQHAdam(params, lr=0.01, nus=(0.0, 0.0), eps=1e-3, backend=target.backend)
    for step in range(3):
        (grad,) = random_grads(params, step)
        wanted = p.detach() - 0.01 * grad / (grad.abs() + 1e-3)
        set_grads(params, [grad])
        ours.step()
        torch.testing.assert_close(p.detach(), wanted, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("arguments", [{}, {"lr": 0.3, "betas": (0.8, 0.95)}], ids=str)
def test_from_nadam(arguments: dict[str, Any]) -> None:
    for ours, theirs in ((FusedQHAdam, pyt.QHAdam), (FusedQHAdamW, pyt.QHAdam)):
        options = ours.from_nadam(**arguments)
        assert options == theirs.from_nadam(**arguments)
        assert ours(make_params(), **options).param_groups[0]["nus"] == (options["betas"][0], 1.0)


def test_arguments_and_groups_are_the_packages() -> None:
    ours, theirs = (inspect.signature(cls).parameters for cls in (FusedQHAdam, pyt.QHAdam))
    positional = [(p.name, p.default) for p in ours.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    recommended = {"betas": (0.995, 0.999), "nus": (0.7, 1.0)}  # in arXiv:1810.06801
    assert positional == [(p.name, recommended.get(p.name, p.default)) for p in theirs.values()]
    assert {name: theirs[name].default for name in recommended} == ADAM
    for cls in (FusedQHAdam, FusedQHAdamW):
        assert {name: inspect.signature(cls).parameters[name].default for name in recommended} == recommended
    group, reference = FusedQHAdam(make_params(), **ADAM).param_groups[0], pyt.QHAdam(make_params()).param_groups[0]
    assert {key: group[key] for key in reference if key != "params"} == {
        key: value for key, value in reference.items() if key != "params"
    }


def test_a_loaded_group_keeps_its_values() -> None:
    """Those of the package's defaults, and of checkpoints from when they were the defaults here."""
    theirs, older = pyt.QHAdam(make_params(SHAPES)), FusedQHAdam(make_params(SHAPES), **ADAM)
    train([theirs, older], 1)
    for saved in (theirs.state_dict(), older.state_dict()):
        ours = FusedQHAdam(make_params(SHAPES))
        ours.load_state_dict(saved)
        assert {name: tuple(ours.param_groups[0][name]) for name in ADAM} == ADAM


@functools.cache
def trained_by_package(steps: int, betas: tuple[float, float], device: str) -> Any:
    """Params of 1, 2, half of and all `steps` updates."""
    params = make_params([(3,), (2, 2), (), (5,)], F64, device)
    theirs = pyt.QHAdam(params, lr=0.01, nus=(0.7, 0.9), betas=betas, weight_decay=0.01)
    for step in range(steps):
        left = steps - step
        present = [left <= 1, left <= 2, left <= (steps + 1) // 2, True]
        grads = zip(random_grads(params, step), present, strict=True)
        set_grads(params, [g if has else None for g, has in grads])
        theirs.step()
    return theirs


BETAS = [(0.9, 0.999), (0.99, 0.9), (0.0, 0.999), (0.9, 0.0), (0.0, 0.0), (0.5, 0.5)]


@pytest.mark.slow
@on_every_target
@pytest.mark.parametrize("steps", [2, 3, 50, 3000])
@pytest.mark.parametrize("betas", BETAS, ids=str)
def test_checkpoints_of_the_package(target: Target, steps: int, betas: tuple[float, float]) -> None:
    """Its counters are geometric sums, its averages bias-corrected; after loading both go on side by side."""
    if steps > quick(target, 3000, 50):
        pytest.skip("the counters are converted on the host, alike for every backend")
    theirs = copy.deepcopy(trained_by_package(steps, betas, target.device))
    buffer = io.BytesIO()
    torch.save(theirs.state_dict(), buffer)
    buffer.seek(0)
    ours = FusedQHAdam(copies(parameters(theirs)), lr=7.0, backend=target.backend)
    ours.load_state_dict(torch.load(buffer, weights_only=True))
    assert (ours.param_groups[0]["lr"], ours.param_groups[0]["nus"]) == (0.01, (0.7, 0.9))
    if 0.0 not in betas or steps == 2:
        counts = [ours.state[p]["step"].item() for p in parameters(ours)]
        for count, true in zip(counts, [1, min(2, steps), (steps + 1) // 2, steps], strict=True):
            assert count == true or max(betas) ** count < 1e-9 or max(betas) == 0.0
    assert_like_package(ours, theirs)
    train([ours, theirs], quick(target, 10, 2), seed=70)
    # A count that the geometric sum no longer tells from its limit is off by some steps, which no average feels.
    assert_like_package(ours, theirs, rtol=1e-8 if steps == 3000 else 1e-11)


@on_every_target
def test_a_converted_checkpoint_is_ours_from_then_on(target: Target) -> None:
    theirs = copy.deepcopy(trained_by_package(4, (0.9, 0.999), target.device))
    saved = theirs.state_dict()
    kept = copy.deepcopy(saved)
    ours = FusedQHAdam(copies(parameters(theirs)), backend=target.backend)
    ours.load_state_dict(saved)
    assert [*ours.state[parameters(ours)[0]]] == ["step", "exp_avg", "exp_avg_sq"]
    set_grads(parameters(ours), random_grads(parameters(ours), 1))
    checked_step(ours, qhadam, 200.0)
    for index, state in kept["state"].items():  # the dict that was loaded is still what it was
        assert saved["state"][index].keys() == state.keys()
        assert torch.equal(saved["state"][index]["exp_avg"], state["exp_avg"])
    again = FusedQHAdam(copies(parameters(ours)), backend=target.backend)
    again.load_state_dict(copy.deepcopy(ours.state_dict()))
    train([ours, again], 2)
    assert_like_torch(ours, again, rtol=0, atol=0)


@pytest.mark.parametrize("nus", [(0.7,), (0.7, 0.8, 0.9), (math.nan, 1.0), (1.0, -math.inf)], ids=str)
def test_nus_that_are_refused(nus: Any) -> None:
    for cls in (FusedQHAdam, FusedQHAdamW):
        with pytest.raises(ValueError, match="nu"):
            cls(make_params(), nus=nus)
