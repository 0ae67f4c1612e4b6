"""Invalid input is refused with a full sentence, before anything has changed."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import (
    ADAMW,
    AMSGRAD,
    HAS_CUDA,
    Case,
    Target,
    build,
    build_torch,
    for_every_class,
    for_every_class_of_torch,
    make_params,
    on_every_target,
    random_grads,
    set_grads,
)
from compare import assert_equal
from torch.optim import Optimizer
from torch.testing._internal.two_tensor import TwoTensor

SENTENCE = re.compile(r"(\S+\s+){8,}\S+")  # nine words: torch's messages have no capitals or full stops


def frozen(optimizer: Optimizer, params: list[torch.nn.Parameter]) -> Any:
    """A copy of everything that a failed step must leave unchanged."""
    return (
        [p.detach().clone() for p in params],
        [p._version for p in params],
        [{k: v.clone() for k, v in optimizer.state[p].items()} if p in optimizer.state else {} for p in params],
        len(optimizer.state),
    )


def wrong_shape(params: list[torch.nn.Parameter]) -> None:
    params[1].grad.data = torch.ones(3, device=params[1].device)  # type: ignore[union-attr]


def same_numel_wrong_shape(params: list[torch.nn.Parameter]) -> None:
    params[0].grad.data = torch.ones(3, 5, device=params[0].device)  # type: ignore[union-attr]


def wrong_dtype(params: list[torch.nn.Parameter]) -> None:
    params[1].grad.data = params[1].grad.data.double()  # type: ignore[union-attr]


def whole_numbers(params: list[torch.nn.Parameter]) -> None:
    params[1].grad.data = torch.ones(40, dtype=torch.int32, device=params[1].device)  # type: ignore[union-attr]


def complex_grad(params: list[torch.nn.Parameter]) -> None:
    params[1].grad.data = torch.ones(40, dtype=torch.complex64, device=params[1].device)  # type: ignore[union-attr]


def sparse(params: list[torch.nn.Parameter]) -> None:
    params[2].grad = torch.ones_like(params[2]).to_sparse()


def resized_param(params: list[torch.nn.Parameter]) -> None:
    params[1].data = torch.ones(41, device=params[1].device)


def other_device(params: list[torch.nn.Parameter]) -> None:
    grad = params[1].grad
    params[1].data = params[1].data.to("cpu" if params[1].is_cuda else "cuda")
    assert grad is not None
    assert params[1].grad is not None
    assert params[1].grad.device != params[1].device


SPOILS = [wrong_shape, same_numel_wrong_shape, wrong_dtype, whole_numbers, complex_grad, sparse, resized_param]
for_every_spoil = pytest.mark.parametrize("spoil", SPOILS, ids=lambda f: f.__name__)


@on_every_target
@for_every_spoil
@pytest.mark.parametrize("steps_before", [0, 1, 2])
@pytest.mark.parametrize("one_group", [True, False], ids=["one-group", "group-each"])
def test_refused_before_anything_changed(
    target: Target, spoil: Callable[[list[torch.nn.Parameter]], None], steps_before: int, one_group: bool
) -> None:
    params = make_params([(5, 3), (40,), (7,)], device=target.device)
    optimizer = build(AMSGRAD, target, params if one_group else [{"params": [p]} for p in params])
    for step in range(steps_before):
        set_grads(params, random_grads(params, step))
        optimizer.step()
    set_grads(params, random_grads(params, 9))
    spoil(params)
    before = frozen(optimizer, params)
    for _ in range(2):  # the next step must not use a table that a failed step left
        with pytest.raises((RuntimeError, ValueError, TypeError)) as error:
            optimizer.step()
        assert SENTENCE.search(str(error.value)), str(error.value)
        after = frozen(optimizer, params)
        assert_equal(after, before)
    if spoil is not resized_param:
        set_grads(params, random_grads(params, 10))
        optimizer.step()
        assert all(optimizer.state[p]["step"] == steps_before + 1 for p in params)


@for_every_class
def test_sparse_gradients_are_refused(case: Case) -> None:
    p = torch.nn.Parameter(torch.ones(3, 3))
    optimizer = case.ours([p], **case.kwargs)
    p.grad = torch.eye(3).to_sparse()
    with pytest.raises(RuntimeError, match="does not support sparse gradients") as error:
        optimizer.step()
    if case.torch in (torch.optim.Adam, torch.optim.AdamW):  # torch's message
        assert str(error.value) == "Adam does not support sparse gradients, please consider SparseAdam instead"


def test_wrapping_subclasses_are_refused() -> None:
    """The subclass itself has no memory: its data pointer is null. The memory belongs to the tensors inside."""
    inside = torch.ones(4)
    with pytest.raises(RuntimeError, match=r"must be plain tensors or DTensors.*TwoTensor.*tensors inside"):
        ADAMW.ours([TwoTensor(inside, inside.clone()).requires_grad_()])


@on_every_target
@for_every_class_of_torch
def test_gradient_without_memory_is_zero(case: Case, target: Target) -> None:
    """Autograd can produce zeros without storage."""
    p, q = (torch.nn.Parameter(torch.ones(5, device=target.device)) for _ in range(2))
    ours, torchs = build(case, target, [p]), build_torch(case, [q])
    for step in range(3):
        p.grad = torch._efficientzerotensor(5, device=target.device) if step else torch.ones(5, device=target.device)
        q.grad = torch.zeros_like(q) if step else torch.ones_like(q)
        ours.step()
        torchs.step()
    torch.testing.assert_close(p, q)


@on_every_target
@pytest.mark.skipif(not HAS_CUDA, reason="needs a GPU: a gradient on another device than its param")
def test_gradient_on_another_device(target: Target) -> None:
    params = make_params([(5, 3), (40,), (7,)], device=target.device)
    optimizer = build(AMSGRAD, target, params)
    set_grads(params, random_grads(params, 0))
    optimizer.step()
    other_device(params)
    before = frozen(optimizer, params)
    with pytest.raises(RuntimeError) as error:
        optimizer.step()
    assert SENTENCE.search(str(error.value)), str(error.value)
    assert_equal(frozen(optimizer, params), before)


BROKEN_STATES: dict[str, Callable[[dict[str, torch.Tensor]], Any]] = {
    "other-device": lambda state: state.update(exp_avg=state["exp_avg"].to("meta")),
    "too-short": lambda state: state.update(exp_avg_sq=state["exp_avg_sq"][:5].clone()),
    "too-long": lambda state: state.update(exp_avg_sq=torch.zeros(41, device=state["exp_avg_sq"].device)),
    "step-too-long": lambda state: state.update(step=torch.zeros(3, device=state["step"].device)),
    "step-elsewhere": lambda state: state.update(step=torch.zeros((), device="meta")),
}


@on_every_target
@pytest.mark.parametrize("spoil", BROKEN_STATES.values(), ids=BROKEN_STATES.keys())
def test_broken_states_are_refused(target: Target, spoil: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    params = make_params([(5, 3), (40,), (7,)], device=target.device)
    optimizer = build(AMSGRAD, target, params)
    set_grads(params, random_grads(params, 0))
    optimizer.step()
    spoil(optimizer.state[params[1]])
    before = [p.detach().clone() for p in params]
    with pytest.raises((RuntimeError, ValueError, TypeError), match=r'"(exp_avg|exp_avg_sq|step)"'):
        optimizer.step()
    assert_equal([p.detach() for p in params], before)
    assert all(optimizer.state[p]["step"] == 1 for p in (params[0], params[2]))


BROKEN_OPTIONS: list[dict[str, Any]] = [
    {"lr": "fast"},
    {"lr": None},
    {"lr": torch.zeros(2)},
    {"betas": (0.9,)},
    {"betas": None},
    {"eps": "small"},
    {"weight_decay": [1, 2]},
]


@on_every_target
@pytest.mark.parametrize("option", BROKEN_OPTIONS, ids=str)
@pytest.mark.parametrize("steps_before", [0, 1])
def test_broken_options_change_nothing(target: Target, option: dict[str, Any], steps_before: int) -> None:
    """The second group has an invalid option. The error must come before the first group is stepped."""
    params = make_params([(5, 3), (40,)], device=target.device)
    optimizer = build(AMSGRAD, target, [{"params": params[:1]}, {"params": params[1:]}])
    for step in range(steps_before):
        set_grads(params, random_grads(params, step))
        optimizer.step()
    set_grads(params, random_grads(params, 9))
    good = {key: optimizer.param_groups[1][key] for key in option}
    optimizer.param_groups[1].update(option)
    before = frozen(optimizer, params)
    with pytest.raises((ValueError, TypeError), match=f'"{next(iter(option))}"'):
        optimizer.step()
    assert_equal(frozen(optimizer, params), before)
    optimizer.param_groups[1].update(good)
    optimizer.step()
    assert all(optimizer.state[p]["step"] == steps_before + 1 for p in params)


@on_every_target
def test_failing_closure_changes_nothing(target: Target) -> None:
    params = make_params([(5, 3), (40,)], device=target.device)
    optimizer = build(AMSGRAD, target, params)
    set_grads(params, random_grads(params, 0))
    before = frozen(optimizer, params)

    def closure() -> float:
        raise ArithmeticError("the loss failed")

    with pytest.raises(ArithmeticError, match="the loss failed"):
        optimizer.step(closure)
    assert_equal(frozen(optimizer, params), before)


@on_every_target
def test_expanded_params_are_refused(target: Target) -> None:
    """Elements that share memory would be updated several times, in an undefined order."""
    p = torch.nn.Parameter(torch.zeros(1, 4, device=target.device).expand(3, 4))
    with pytest.raises((RuntimeError, ValueError)) as error:
        optimizer = build(AMSGRAD, target, [p])
        p.grad = torch.ones(p.shape, device=target.device)
        optimizer.step()
    assert SENTENCE.search(str(error.value)), str(error.value)
    assert not p.any()


def test_backends_refuse_devices_they_do_not_have() -> None:
    p = torch.nn.Parameter(torch.zeros(3, device="meta"))
    for backend in ("cpp", "triton", "cuda"):
        with pytest.raises(RuntimeError) as error:
            ADAMW.ours([p], backend=backend)
        assert SENTENCE.search(str(error.value)), str(error.value)


@on_every_target
def test_params_of_whole_numbers_are_refused(target: Target) -> None:
    p = torch.zeros(3, dtype=torch.int64, device=target.device)
    with pytest.raises((RuntimeError, ValueError, TypeError)) as error:
        optimizer = build(AMSGRAD, target, [p])
        p.grad = torch.ones(3, dtype=torch.int64, device=target.device)
        optimizer.step()
    assert SENTENCE.search(str(error.value)), str(error.value)
    assert not p.any()
