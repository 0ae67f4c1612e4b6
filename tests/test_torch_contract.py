"""Our optimizers keep the contract of torch.optim: constructors, groups, states, hooks, schedulers, late params."""

from __future__ import annotations

import inspect
import math
from typing import Any

import pytest
import torch
from cases import (
    CLASSES,
    RUN,
    Case,
    Target,
    build,
    build_torch,
    every,
    for_every_case,
    for_every_case_of_torch,
    for_every_class,
    for_every_class_of_torch,
    for_every_rule,
    make_params,
    on_every_target,
    parameters,
    quick,
    random_grads,
    set_grads,
    train,
)
from compare import assert_equal, assert_like_torch, checked_step
from torch.optim import lr_scheduler

pytest.importorskip("expecttest", reason="torch's own lists of optimizer inputs need the package expecttest")
from torch.testing._internal import common_optimizers


def database(case: Case) -> common_optimizers.OptimizerInfo:
    return next(info for info in common_optimizers.optim_db if info.optim_cls is case.torch)


@on_every_target
@for_every_class_of_torch
def test_torchs_own_inputs(case: Case, target: Target) -> None:
    entries = database(case).optim_inputs_func(device=target.device, dtype=torch.float32)
    assert len(entries) > 3
    for entry in entries:
        ours = case.ours(make_params(device=target.device), backend=target.backend, **entry.kwargs)
        theirs = case.torch(make_params(device=target.device), foreach=False, **entry.kwargs)
        train([ours, theirs], quick(target, 5, 2))
        assert_like_torch(ours, theirs)


@for_every_class_of_torch
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


INVALID: list[tuple[str, Any, str]] = [
    ("lr", -1.0, "Invalid learning rate: -1.0"),
    ("lr", torch.zeros(2), "Tensor lr must be 1-element"),
    ("eps", -1.0, "Invalid epsilon value: -1.0"),
    ("betas", (0.9, 1.0), "Invalid beta parameter at index 1: 1.0"),
    ("betas", (-0.1, 0.9), "Invalid beta parameter at index 0: -0.1"),
    ("weight_decay", -1, "Invalid weight_decay value: -1"),
    ("momentum", -0.5, "(Invalid momentum value|Momentum must be between 0 and 1 exclusive): -0.5"),
    ("dampening", 0.5, "Nesterov momentum requires a momentum and zero dampening"),
    ("nus", (math.nan, 1.0), "Invalid nu parameter at index 0: nan"),
    ("nus", (0.7, math.inf), "Invalid nu parameter at index 1: inf"),
]


@pytest.mark.parametrize(
    ("case", "option", "value", "error"),
    [(case, *invalid) for case in CLASSES for invalid in INVALID if invalid[0] in case.options],
    ids=str,
)
def test_invalid_values(case: Case, option: str, value: Any, error: str) -> None:
    nesterov = {"momentum": 0.9, "nesterov": True} if option == "dampening" else {}
    with pytest.raises(ValueError, match=error):
        case.ours(make_params(), **case.known(**{option: value}), **nesterov)


@for_every_class
def test_refusals(case: Case) -> None:
    with pytest.raises(ValueError, match="optimizer got an empty parameter list"):
        case.ours([])
    with pytest.raises(ValueError, match="can't optimize a non-leaf Tensor"):
        case.ours([make_params()[0] * 2])
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        case.ours(make_params(), learning_rate=0.1)


@for_every_class_of_torch
def test_refusals_of_torchs_switches(case: Case) -> None:
    with pytest.raises(RuntimeError, match="does not support `differentiable`"):
        case.ours(make_params(), differentiable=True)
    if "fused" not in inspect.signature(case.torch).parameters:
        return
    with pytest.raises(RuntimeError, match="`fused` and `foreach` cannot be `True` together"):
        case.ours(make_params(), fused=True, foreach=True)


@for_every_class_of_torch
def test_constructor_is_torchs(case: Case) -> None:
    """Same arguments, order, defaults and kinds. Our additional arguments are keyword-only."""
    ours = inspect.signature(case.ours).parameters
    theirs = inspect.signature(case.torch).parameters
    keyword = inspect.Parameter.KEYWORD_ONLY

    def shape(parameters: Any) -> list[tuple[str, Any, Any]]:
        return [(p.name, p.kind, p.default) for p in parameters]

    positional = [p for p in ours.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert shape(positional) == shape([p for p in theirs.values() if p.kind is not keyword])
    shared = [p for p in ours.values() if p.kind is keyword and p.name in theirs]
    assert shape(shared) == shape([p for p in theirs.values() if p.kind is keyword])
    added = {"backend": "reference", "state_dtype": torch.float32}
    made = case.ours(make_params(), **added)
    assert isinstance(made, case.torch)
    assert {key: getattr(made, key) for key in added} == added
    assert not set(added) & set(theirs)


@for_every_case_of_torch
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
def test_states_before_the_first_step_are_torchs(case: Case, dtype: torch.dtype) -> None:
    """There are no states, except in classes that create them in the constructor."""
    ours, theirs = (kind(make_params(dtype=dtype), **case.kwargs) for kind in (case.ours, case.torch))
    assert case.is_eager == bool(theirs.state)
    assert_equal([*ours.state.values()], [*theirs.state.values()])


@every([case for case in CLASSES if case.is_eager])
def test_eager_states(case: Case) -> None:
    """A group that is added later has its own start value. The states have state_dtype and the param's memory format.
    Frozen params get no state."""
    first, late, frozen = make_params([(5, 3), (4, 6), (7,)], torch.bfloat16)
    late.data = late.data.t()
    (state, option), *_ = case.ours.rule.starts.items()
    optimizer = case.ours([{"params": [first], option: 2.0}], state_dtype=torch.float32, backend="reference")
    optimizer.add_param_group({"params": [late, frozen.requires_grad_(False)], option: 3.0})
    assert [*optimizer.state] == [first, late]
    for param, start in ((first, 2.0), (late, 3.0)):
        made = optimizer.state[param][state]
        assert made.dtype == torch.float32 and made.stride() == param.stride() and bool((made == start).all())
        assert optimizer.state[param]["step"] == 0


@for_every_class
def test_unknown_backend_is_refused(case: Case) -> None:
    with pytest.raises((RuntimeError, ValueError), match="quantum"):
        case.ours(make_params(), backend="quantum")


@pytest.mark.host
@on_every_target
@for_every_case_of_torch
def test_groups_and_states_are_torchs(case: Case, target: Target) -> None:
    ours = build(case, target, make_params(device=target.device))
    theirs = build_torch(case, make_params(device=target.device), foreach=None)
    assert [*ours.param_groups[0]] == [*theirs.param_groups[0]]
    for key, value in theirs.param_groups[0].items():
        assert key == "params" or ours.param_groups[0][key] == value
    train([ours, theirs], 1)
    assert len(ours.state) == len(theirs.state)
    for p, q in zip(ours.state, theirs.state, strict=True):
        assert [*ours.state[p]] == [*theirs.state[q]]
        for key, value in ours.state[p].items():
            expected = theirs.state[q][key]
            assert (value.dtype, value.shape, value.stride()) == (expected.dtype, expected.shape, expected.stride())
            assert value.device == p.device
            assert not value.requires_grad


def cycled(optimizer: Any) -> bool:
    return "momentum" in optimizer.defaults or "betas" in optimizer.defaults


SCHEDULERS = {
    "OneCycleLR": lambda opt: lr_scheduler.OneCycleLR(opt, max_lr=0.05, total_steps=40, cycle_momentum=cycled(opt)),
    "CosineAnnealingWarmRestarts": lambda opt: lr_scheduler.CosineAnnealingWarmRestarts(opt, T_0=5, T_mult=2),
    "LambdaLR": lambda opt: lr_scheduler.LambdaLR(opt, lambda epoch: 1 / (epoch + 1)),
    "SequentialLR": lambda opt: lr_scheduler.SequentialLR(
        opt, [lr_scheduler.LinearLR(opt, 0.1, total_iters=3), lr_scheduler.ExponentialLR(opt, 0.9)], milestones=[3]
    ),
}


@pytest.mark.shared
@pytest.mark.slow
@pytest.mark.host
@on_every_target
@for_every_rule
@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("tensor_lr", [False, True], ids=["float", "tensor"])
@pytest.mark.filterwarnings("ignore:The epoch parameter:UserWarning")
def test_schedulers(case: Case, target: Target, name: str, tensor_lr: bool) -> None:
    shapes = [(5, 3), (40,)]
    makers = [lambda p, **k: build(case, target, p, **k)]
    if case.torch:
        makers.append(lambda p, **k: build_torch(case, p, **k))
    optimizers = [
        make(make_params(shapes, device=target.device), lr=torch.tensor(0.01) if tensor_lr else 0.01) for make in makers
    ]
    schedulers = [SCHEDULERS[name](optimizer) for optimizer in optimizers]
    seen = set()
    for step in range(quick(target, 30, 4)):
        for optimizer in optimizers[1:]:
            set_grads(parameters(optimizer), random_grads(parameters(optimizer), step))
            optimizer.step()
        set_grads(parameters(optimizers[0]), random_grads(parameters(optimizers[0]), step))
        checked_step(optimizers[0], case.rule, 6.0)  # a larger lr makes the rounding errors of the step larger
        for scheduler in schedulers:
            scheduler.step()
            assert scheduler.get_last_lr() == schedulers[0].get_last_lr()
        group = optimizers[0].param_groups[0]
        momentum = group[case.momentum] if case.momentum else None
        seen.add((float(group["lr"]), momentum))
    assert len(seen) == quick(target, 30, 4) or name == "CosineAnnealingWarmRestarts"  # which repeats lrs
    assert len({momentum for _, momentum in seen}) > 1 or name != "OneCycleLR" or not case.momentum
    if case.torch:
        assert_like_torch(*optimizers)


@pytest.mark.shared
@on_every_target
@for_every_rule
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
@every(RUN, "betas")
def test_tensor_betas(case: Case, target: Target) -> None:
    params = make_params([(5, 3), (40,)], device=target.device)
    optimizer = build(case, target, params, **case.known(betas=(torch.tensor(0.75), torch.tensor([0.96875]))))
    for step in range(quick(target, 4, 2)):
        set_grads(params, random_grads(params, step))
        checked_step(optimizer, case.rule, 3.0)


@pytest.mark.host
@on_every_target
@for_every_case
def test_options_changed_between_steps(case: Case, target: Target) -> None:
    params = make_params([(5, 3), (40,)], device=target.device)
    optimizer = build(case, target, [{"params": params[:1]}, {"params": params[1:]}])
    changes: list[dict[str, Any]] = [{"lr": 0.3}, {"betas": (0.1, 0.2)}, {"eps": 0.1}, {"weight_decay": 0.7}]
    changes += [{"maximize": not case.kwargs.get("maximize", False)}, {"momentum": 0.3}, {"dampening": 0.6}]
    changes += [{"nus": (0.1, 0.6)}, {"max_grad_norm": 0.2}, {"grad_averaging": False}, {"adam_w_mode": False}]
    changes += [{"use_nvlamb": True, "weight_decay": 0.0}, {"trust_clip": (0.9, 1.1)}, {"bias_correction": False}]
    for step, change in enumerate(changes):
        optimizer.param_groups[1].update(case.known(**change))
        set_grads(params, random_grads(params, step))
        checked_step(optimizer, case.rule, 8.0)  # after a jump of betas a step is many times lr
