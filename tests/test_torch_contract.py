"""What torch.optim promises, ours keep: constructors, groups, states, hooks, schedulers, late params."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from cases import (
    CASES,
    Case,
    Target,
    assert_like_torch,
    build,
    build_torch,
    checked_step,
    for_every_case,
    for_every_class,
    make_params,
    on_every_target,
    parameters,
    quick,
    random_grads,
    set_grads,
    train,
)
from torch.optim import lr_scheduler

pytest.importorskip("expecttest", reason="torch's own lists of optimizer inputs need the package expecttest")
from torch.testing._internal import common_optimizers

AMSGRAD = CASES[5]  # has every state


def database(case: Case) -> common_optimizers.OptimizerInfo:
    return next(info for info in common_optimizers.optim_db if info.optim_cls is case.torch)


@on_every_target
@for_every_class
def test_torchs_own_inputs(case: Case, target: Target) -> None:
    for entry in database(case).optim_inputs_func(device=target.device, dtype=torch.float32):
        ours = case.ours(make_params(device=target.device), backend=target.backend, **entry.kwargs)
        theirs = case.torch(make_params(device=target.device), foreach=False, **entry.kwargs)
        train([ours, theirs], quick(target, 5, 2))
        assert_like_torch(ours, theirs)


@for_every_class
@pytest.mark.parametrize("device", ["cpu"] + ["cuda"] * torch.cuda.is_available())
def test_torchs_own_errors(case: Case, device: str) -> None:
    entries = database(case).optim_error_inputs_func(device=device, dtype=torch.float32)
    assert entries
    for entry in entries:
        made = entry.optimizer_error_input
        if issubclass(entry.error_type, Warning):
            with pytest.warns(entry.error_type, match=entry.error_regex):
                case.ours(made.params, **made.kwargs)
        elif entry.error_on is common_optimizers.OptimizerErrorEnum.CONSTRUCTION_ERROR:
            with pytest.raises(entry.error_type, match=entry.error_regex):
                case.ours(made.params, **made.kwargs)
        else:
            optimizer = case.ours(made.params, **made.kwargs)
            with pytest.raises(entry.error_type, match=entry.error_regex):
                optimizer.step()


@for_every_class
@pytest.mark.parametrize(
    ("kwargs", "error"),
    [
        ({"lr": -1.0}, "Invalid learning rate: -1.0"),
        ({"eps": -1.0}, "Invalid epsilon value: -1.0"),
        ({"betas": (0.9, 1.0)}, "Invalid beta parameter at index 1: 1.0"),
        ({"betas": (-0.1, 0.9)}, "Invalid beta parameter at index 0: -0.1"),
        ({"weight_decay": -1}, "Invalid weight_decay value: -1"),
    ],
    ids=str,
)
def test_invalid_values(case: Case, kwargs: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        case.ours(make_params(), **kwargs)


@for_every_class
def test_refusals(case: Case) -> None:
    with pytest.raises(ValueError, match="optimizer got an empty parameter list"):
        case.ours([])
    with pytest.raises(RuntimeError, match="does not support `differentiable`"):
        case.ours(make_params(), differentiable=True)
    with pytest.raises(RuntimeError, match="`fused` and `foreach` cannot be `True` together"):
        case.ours(make_params(), fused=True, foreach=True)
    with pytest.raises(ValueError, match="can't optimize a non-leaf Tensor"):
        case.ours([make_params()[0] * 2])


@for_every_class
def test_constructor_is_torchs(case: Case) -> None:
    """Same arguments, same order, same defaults, same kinds; what ours add is keyword-only."""
    ours = inspect.signature(case.ours).parameters
    theirs = inspect.signature(case.torch).parameters
    keyword = inspect.Parameter.KEYWORD_ONLY

    def shape(parameters: Any) -> list[tuple[str, Any, Any]]:
        return [(p.name, p.kind, p.default) for p in parameters]

    positional = [p for p in ours.values() if p.kind is not keyword]
    assert shape(positional) == shape([p for p in theirs.values() if p.kind is not keyword])
    shared = [p for p in ours.values() if p.kind is keyword and p.name in theirs]
    assert shape(shared) == shape([p for p in theirs.values() if p.kind is keyword])
    added = {p.name for p in ours.values()} - set(theirs)
    assert added == {"backend", "state_dtype"}
    assert issubclass(case.ours, case.torch)


@for_every_class
def test_unknown_backend_is_refused(case: Case) -> None:
    with pytest.raises((RuntimeError, ValueError), match="quantum"):
        case.ours(make_params(), backend="quantum")


@on_every_target
@for_every_case
def test_groups_and_states_are_torchs(case: Case, target: Target) -> None:
    ours = build(case, target, make_params(device=target.device))
    theirs = build_torch(case, make_params(device=target.device), foreach=None)
    assert [*ours.param_groups[0]] == [*theirs.param_groups[0]]
    for key, value in theirs.param_groups[0].items():
        assert key == "params" or ours.param_groups[0][key] == value
    train([ours, theirs], 1)
    for p, q in zip(parameters(ours), parameters(theirs), strict=True):
        assert [*ours.state[p]] == [*theirs.state[q]]
        for key, value in ours.state[p].items():
            expected = theirs.state[q][key]
            assert (value.dtype, value.shape, value.stride()) == (expected.dtype, expected.shape, expected.stride())
            assert value.device == p.device
            assert not value.requires_grad


SCHEDULERS = {
    "OneCycleLR": lambda opt: lr_scheduler.OneCycleLR(opt, max_lr=0.05, total_steps=40, cycle_momentum=True),
    "CosineAnnealingWarmRestarts": lambda opt: lr_scheduler.CosineAnnealingWarmRestarts(opt, T_0=5, T_mult=2),
    "LambdaLR": lambda opt: lr_scheduler.LambdaLR(opt, lambda epoch: 1 / (epoch + 1)),
    "SequentialLR": lambda opt: lr_scheduler.SequentialLR(
        opt, [lr_scheduler.LinearLR(opt, 0.1, total_iters=3), lr_scheduler.ExponentialLR(opt, 0.9)], milestones=[3]
    ),
}


@on_every_target
@for_every_class
@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("tensor_lr", [False, True], ids=["float", "tensor"])
@pytest.mark.filterwarnings("ignore:The epoch parameter:UserWarning")
def test_schedulers(case: Case, target: Target, name: str, tensor_lr: bool) -> None:
    shapes = [(5, 3), (40,)]
    pair = [
        make(make_params(shapes, device=target.device), lr=torch.tensor(0.01) if tensor_lr else 0.01)
        for make in (lambda p, **k: build(case, target, p, **k), lambda p, **k: build_torch(case, p, **k))
    ]
    schedulers = [SCHEDULERS[name](optimizer) for optimizer in pair]

    def each(_: int) -> None:
        for scheduler in schedulers:
            scheduler.step()
        assert schedulers[0].get_last_lr() == schedulers[1].get_last_lr()

    train(pair, quick(target, 30, 4), each=each)
    assert_like_torch(*pair)


@on_every_target
@for_every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(), (1,)], ids=str)
def test_tensor_lr_filled_between_steps(case: Case, target: Target, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    lr = torch.full(shape, 0.01, dtype=dtype)
    params = make_params([(5, 3), (40,)], device=target.device)
    optimizer = build(case, target, params, lr=lr)
    for step in range(quick(target, 4, 2)):
        lr.fill_(0.01 / (1 + step))
        set_grads(params, random_grads(params, step))
        checked_step(optimizer, case.rule, 3.0)
    optimizer.param_groups[0]["lr"] = 0.5
    checked_step(optimizer, case.rule, 3.0)
    assert optimizer.param_groups[0]["lr"] == 0.5


@on_every_target
@for_every_case
def test_tensor_betas(case: Case, target: Target) -> None:
    params = make_params([(5, 3), (40,)], device=target.device)
    optimizer = build(case, target, params, betas=(torch.tensor(0.75), torch.tensor([0.96875])))
    for step in range(quick(target, 4, 2)):
        set_grads(params, random_grads(params, step))
        checked_step(optimizer, case.rule, 3.0)


@on_every_target
@for_every_case
def test_options_changed_between_steps(case: Case, target: Target) -> None:
    params = make_params([(5, 3), (40,)], device=target.device)
    optimizer = build(case, target, [{"params": params[:1]}, {"params": params[1:]}])
    changes: list[dict[str, Any]] = [{"lr": 0.3}, {"betas": (0.1, 0.2)}, {"eps": 0.1}, {"weight_decay": 0.7}]
    changes += [{"maximize": not case.kwargs.get("maximize", False)}]
    for step, change in enumerate(changes):
        optimizer.param_groups[1].update(change)
        set_grads(params, random_grads(params, step))
        checked_step(optimizer, case.rule, 8.0)  # steps of many times lr, once betas jump
