"""Schedule-Free AdamW and SGD beside the package schedulefree: steps, modes and checkpoints."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from cases import (
    BY_NAME,
    Target,
    build,
    copies,
    make_params,
    on_every_target,
    parameters,
    quick,
    random_grads,
    set_grads,
    train,
)
from compare import assert_equal
from torch import Tensor

from fused_optim import FusedScheduleFreeAdamW, FusedScheduleFreeSGD, release_gradients
from fused_optim.convert import to_schedulefree

package = pytest.importorskip("schedulefree", reason="the comparison is with the package schedulefree")

SHAPES = [(5, 3), (), (0,), (40,)]
PAIRS = {
    "adamw": (FusedScheduleFreeAdamW, package.AdamWScheduleFree),
    "sgd": (FusedScheduleFreeSGD, package.SGDScheduleFree),
}
OPTIONS: list[dict[str, Any]] = [
    {},
    {"weight_decay": 0.1, "warmup_steps": 7},
    {"r": 1.5, "weight_lr_power": 0.0, "warmup_steps": 40},
]
every_pair = pytest.mark.parametrize("name", PAIRS)


def pair(name: str, target: Target, dtype: torch.dtype = torch.float64, **options: Any) -> tuple[Any, Any]:
    """Ours, and the package's in train mode."""
    params = make_params(SHAPES, dtype, target.device)
    ours, theirs = PAIRS[name]
    options = {"lr": 0.02, **options}
    other = theirs(copies(params), foreach=False, **options)
    other.train()
    return ours(params, backend=target.backend, **options), other


def assert_like_package(ours: Any, theirs: Any, rtol: float = 1e-6, atol: float = 1e-7) -> None:
    """weight_sum is float32 here."""
    for p, q in zip(parameters(ours), parameters(theirs), strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=rtol, atol=atol)
        for key, value in theirs.state[q].items():
            torch.testing.assert_close(ours.state[p][key], value, rtol=rtol, atol=atol)


@on_every_target
@every_pair
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_steps_and_modes_of_the_package(name: str, target: Target, options: dict[str, Any]) -> None:
    ours, theirs = pair(name, target, **options)
    for part in range(quick(target, 4, 1)):
        train([ours, theirs], quick(target, 25, 2), seed=100 * part)
        ours.param_groups[0]["lr"] = theirs.param_groups[0]["lr"] = 0.02 / (part + 1)
        assert_like_package(ours, theirs)
        for optimizer in (ours, theirs):
            optimizer.eval()
        assert_like_package(ours, theirs)
        for optimizer in (ours, theirs):
            optimizer.train()
    assert_like_package(ours, theirs)


@on_every_target
@every_pair
def test_checkpoints_of_the_package(name: str, target: Target) -> None:
    """In both directions, in train and in eval mode."""
    ours, theirs = pair(name, target, weight_decay=0.1, warmup_steps=5, r=0.5)
    train([ours, theirs], 8)
    for mode in ("train", "eval"):
        for optimizer in (ours, theirs):
            getattr(optimizer, mode)()
        back, other = pair(name, target)
        for optimizer, saved, source in (
            (back, theirs.state_dict(), theirs),
            (other, to_schedulefree(ours.state_dict()), ours),
        ):
            optimizer.load_state_dict(copy.deepcopy(saved))
            with torch.no_grad():
                for p, q in zip(parameters(optimizer), parameters(source), strict=True):
                    p.copy_(q)
        assert back.train_mode == (mode == "train") == other.param_groups[0]["train_mode"]
        assert not {"k", "weight_sum", "lr_max", "scheduled_lr"} & back.param_groups[0].keys()
        assert other.param_groups[0].keys() == theirs.param_groups[0].keys()
        again = copy.deepcopy(ours)
        for optimizer in (back, other, again):
            optimizer.train()
        train([back, other, again], 4, seed=7)
        assert_like_package(back, other)
        assert_like_package(again, other)


@every_pair
def test_checkpoints_of_the_package_before_the_first_step(name: str) -> None:
    ours, theirs = pair(name, Target("reference", "cpu"))
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(to_schedulefree(ours.state_dict()))
    train([ours, theirs], 2)
    assert_like_package(ours, theirs)


@on_every_target
@every_pair
@pytest.mark.parametrize("way", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_the_mode_is_saved(name: str, target: Target, way: Any) -> None:
    ours, _ = pair(name, target)
    train([ours], 2)
    ours.eval()
    back = way(ours)
    assert not back.train_mode
    fresh, _ = pair(name, target)
    fresh.load_state_dict(copy.deepcopy(ours.state_dict()))
    assert not fresh.train_mode
    for optimizer in (ours, back):
        optimizer.train()
        optimizer.train()  # does nothing
        train([optimizer], 1, seed=3)
    assert_equal([p.detach() for p in parameters(ours)], [p.detach() for p in parameters(back)])


@every_pair
def test_a_step_in_eval_mode_is_refused(name: str) -> None:
    ours, _ = pair(name, Target("reference", "cpu"))
    train([ours], 2)
    ours.eval()
    before = copy.deepcopy(ours.state_dict())
    params = [p.detach().clone() for p in parameters(ours)]
    with pytest.raises(
        RuntimeError, match=r"needs train mode, but the optimizer is in eval mode.*call optimizer.train"
    ):
        ours.step(lambda: pytest.fail("the closure was called"))
    assert_equal([p.detach() for p in parameters(ours)], params)
    assert_equal(ours.state_dict()["state"], before["state"])


def test_gradient_release_in_eval_mode_is_refused() -> None:
    """The update is part of backward() then."""
    model = torch.nn.Linear(3, 2)
    ours = FusedScheduleFreeSGD(model.parameters(), backend="reference")
    release_gradients(model, ours)
    model(torch.ones(1, 3)).sum().backward()
    ours.step()
    ours.eval()
    before = model.weight.detach().clone()
    with pytest.raises(RuntimeError, match="needs train mode, but the optimizer is in eval mode"):
        model(torch.ones(1, 3)).sum().backward()
    assert_equal(model.weight.detach(), before)
    ours.train()


def test_errors() -> None:
    params = make_params([(3,)])
    for options, text in (
        ({"momentum": 0.0}, "Momentum must be between 0 and 1 exclusive: 0.0"),
        ({"momentum": 1.0}, "Momentum must be between 0 and 1 exclusive: 1.0"),
        ({"warmup_steps": -1}, "warmup_steps must be 0 or more, but got -1"),
        ({"lr": -1.0}, "Invalid learning rate: -1.0"),
        ({"weight_decay": -1.0}, "Invalid weight_decay value: -1.0"),
    ):
        with pytest.raises(ValueError, match=text):
            FusedScheduleFreeSGD(params, **options)
    with pytest.raises(
        ValueError, match=r"betas\[0\] must be between 0 and 1 exclusive, or the average cannot be comp"
    ):
        FusedScheduleFreeAdamW(params, betas=(0.0, 0.9)).eval()
    ours = FusedScheduleFreeSGD(params, ema_decay=0.9)
    with pytest.raises(ValueError, match="a new param group must have the mode of the optimizer"):
        ours.add_param_group({"params": make_params([(2,)]), "train_mode": False})
    assert len(ours.param_groups) == 1
    train([ours], 1)
    with (
        ours.ema_weights(),
        pytest.raises(RuntimeError, match=r"train\(\) and eval\(\) cannot be called inside of ema"),
    ):
        ours.eval()
    ours.add_param_group({"params": make_params([(2,)])})
    saved = copy.deepcopy(ours.state_dict())
    saved["param_groups"][1]["train_mode"] = False
    with pytest.raises(ValueError, match="must be all in train mode or all in eval mode"):
        ours.load_state_dict(saved)
    ours.param_groups[1]["momentum"] = 0.0
    before = [p.detach().clone() for p in parameters(ours)]
    with pytest.raises(
        ValueError, match=r"momentum must be between 0 and 1 exclusive, or the average cannot be computed: 0.0"
    ):
        ours.eval()
    assert ours.train_mode
    assert_equal([p.detach() for p in parameters(ours)], before)
    with pytest.raises(ValueError, match="must be of FusedScheduleFreeAdamW or FusedScheduleFreeSGD"):
        to_schedulefree(torch.optim.Adam(params).state_dict())


def test_different_counts_are_reported() -> None:
    ours = FusedScheduleFreeSGD(make_params([(3,), (2,)]), backend="reference")
    params = parameters(ours)
    for grads in ([*random_grads(params[:1], 0), None], random_grads(params, 1)):
        set_grads(params, grads)
        ours.step()
    with pytest.warns(UserWarning, match="the params of a group have had different numbers of updates"):
        saved = to_schedulefree(ours.state_dict())
    assert saved["param_groups"][0]["k"] == 2


# ---- bfloat16, infinite params, layouts


def x_of(y: Tensor, z: Tensor, momentum: float = 0.9) -> Tensor:
    return (y.double() - (1 - momentum) * z.double()) / momentum


@on_every_target
@every_pair
@pytest.mark.parametrize("kind", ["exact", "24bit"])
def test_modes_move_master_weights(name: str, target: Target, kind: Any) -> None:
    """In float32, so that a change of mode costs no more than a float32 rounding, and without a warning."""
    params = make_params(SHAPES, torch.bfloat16, target.device)
    ours = PAIRS[name][0](params, lr=0.02, master_weights=kind, backend=target.backend)
    train([ours], 3)
    masters = [master.clone() for master in ours.master_params()]
    unit = 2.0**-22 if kind == "exact" else 2.0**-14
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours.eval()
        for p, y, x in zip(params, masters, ours.master_params(), strict=True):
            assert ours.state[p]["z"].dtype == torch.float32
            torch.testing.assert_close(x.double(), x_of(y, ours.state[p]["z"]), rtol=unit, atol=unit)
            assert_equal(p.detach(), x.bfloat16())
        ours.train()
        for y, again in zip(masters, ours.master_params(), strict=True):
            torch.testing.assert_close(again, y, rtol=2 * unit, atol=2 * unit)
        train([ours], 1, seed=9)


@on_every_target
@every_pair
def test_z_starts_from_the_master_weights(name: str, target: Target) -> None:
    params = make_params(SHAPES, device=target.device)
    wanted = [p.detach().clone() for p in params]
    ours = PAIRS[name][0](params, lr=0.0, backend=target.backend)
    ours.lower_params()
    train([ours], 1)
    for p, value in zip(params, wanted, strict=True):
        assert_equal(ours.state[p]["z"], value)


@on_every_target
@every_pair
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.complex64], ids=str)
def test_modes_keep_infinite_params(name: str, target: Target, dtype: torch.dtype) -> None:
    params = make_params([(5, 3), (8,)], dtype, target.device)
    with torch.no_grad():
        params[1][:2] = -torch.inf
    params[0].data = params[0].data.t()
    ours = PAIRS[name][0](params, lr=0.02, backend=target.backend)
    train([ours], 2)
    y = [p.detach().clone() for p in params]
    for mode in (ours.eval, ours.train):
        mode()
        assert not any(p.isnan().any() for p in params)
        assert params[1][:2].isinf().all()
    rtol = 2.0**-6 if dtype == torch.bfloat16 else 1e-5
    for p, before in zip(params, y, strict=True):
        torch.testing.assert_close(p.detach(), before, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("state_dtype", ["compact", torch.float32, {"z": torch.bfloat16}], ids=str)
def test_formats_of_z(state_dtype: Any) -> None:
    """z is stored as weights are: "compact" is for the average of squares."""
    params = make_params(SHAPES, torch.float32)
    ours = build(BY_NAME["schedule-free-adamw"], Target("auto", "cpu"), params, state_dtype=state_dtype)
    train([ours], 2)
    state = ours.state[params[0]]
    assert state["z"].dtype == (torch.bfloat16 if isinstance(state_dtype, dict) else torch.float32)
    assert state["exp_avg_sq"].dtype == (torch.uint16 if state_dtype == "compact" else torch.float32)
    for wrong in ("e8m8", "anchored8"):
        with pytest.raises(ValueError, match=f'"{wrong}" stores'):
            FusedScheduleFreeAdamW(params, state_dtype={"z": wrong})
