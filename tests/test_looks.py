"""The change detectors: the same tests for each implementation. None of them may miss a change."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cases import AMSGRAD, BY_NAME, LAMB, Case, Target, build, make_params, random_grads, set_grads
from compare import checked_step
from looks import LOOKS, choose, class_of
from test_changes import SHAPES, for_every_rule_and_change
from test_changes import test_changes_between_steps_are_noticed as check_changes
from test_changes import test_gradients_in_reused_memory as check_gradients_in_reused_memory
from test_changes import test_params_in_reused_memory as check_params_in_reused_memory

from fused_optim import FusedAdamW, FusedSGD
from fused_optim.engine import changes, modules
from fused_optim.optim import plans as optimizer_module

REFERENCE = Target("reference", "cpu")


@pytest.fixture
def look(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of the change detector. During the test no other one is used."""
    choose(monkeypatch, request.param)
    kinds = set()

    def watched(*arguments: Any) -> Any:
        made = changes.detect_changes(*arguments)
        kinds.add(type(made))
        return made

    monkeypatch.setattr(optimizer_module, "detect_changes", watched)
    yield str(request.param)
    assert kinds == {class_of(request.param)}


on_every_look = pytest.mark.parametrize("look", LOOKS, indirect=True)
USED = getattr(modules.poll(), "ChangeDetector", class_of("python"))  # the one that all other tests use
on_other_looks = pytest.mark.parametrize("look", [look for look in LOOKS if class_of(look) is not USED], indirect=True)


@pytest.mark.shared
@pytest.mark.slow
@on_other_looks  # test_changes.py covers the one that is used
@for_every_rule_and_change
def test_changes_are_noticed(case: Case, change: Callable[..., None], look: str) -> None:
    check_changes(case, REFERENCE, change)


@on_every_look
def test_memory_that_is_used_again(look: str) -> None:
    check_gradients_in_reused_memory(REFERENCE)
    check_params_in_reused_memory(REFERENCE)


@on_every_look
def test_late_params_and_a_stale_graph(look: str) -> None:
    params = make_params(SHAPES)
    optimizer = build(AMSGRAD, REFERENCE, params)
    for step, present in enumerate(["1000", "0000", "0101", "1111", "0110"]):
        grads = random_grads(params, step)
        set_grads(params, [g if bit == "1" else None for g, bit in zip(grads, present, strict=True)])
        checked_step(optimizer, AMSGRAD.rule, 3.0)
    loss = (params[1] ** 2).sum()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    unstepped = (params[0] ** 2).sum()  # has no gradient, so it does not change and its graph stays valid
    optimizer.step()
    unstepped.backward()


Bits = Callable[[torch.Tensor], torch.Tensor]
UNUSUAL: dict[str, Bits] = {
    "neg": lambda g: torch._neg_view(-g),
    "transposed": lambda g: g.t().contiguous().t() if g.dim() == 2 else g,
    "strided": lambda g: torch.stack([g, g], dim=-1)[..., 0],
    "expanded": lambda g: (
        g.flatten()[:1].expand(g.numel()).reshape(g.shape) if g.numel() < 2 else g.mean().expand_as(g)
    ),
    "parameter": lambda g: torch.nn.Parameter(g, requires_grad=False),
    "zero": lambda g: torch._efficientzerotensor(g.shape, dtype=g.dtype),
}


@on_every_look
@pytest.mark.parametrize("kind", UNUSUAL)
@pytest.mark.parametrize("steps", [(0,), (1,), (2,)], ids=str)
def test_unusual_gradients(kind: str, steps: tuple[int, ...], look: str) -> None:
    """In the first step or in a later one."""
    params = make_params([(5, 3), (), (1,), (40,)])
    optimizer = build(AMSGRAD, REFERENCE, params)
    for step in range(3):
        grads = random_grads(params, step)
        set_grads(params, [UNUSUAL[kind](g) for g in grads] if step in steps else grads)
        checked_step(optimizer, AMSGRAD.rule, 3.0)


@on_every_look
def test_the_sign_of_a_gradient_that_stays_where_it_is(look: str) -> None:
    """The memory stays the same; the negation flag changes."""
    for shape in [(6,), (1,), (3, 2)]:
        p, q = (torch.nn.Parameter(torch.zeros(shape)) for _ in range(2))
        ours, theirs = FusedSGD([p], lr=0.1, backend="reference"), torch.optim.SGD([q], lr=0.1)
        memory = torch.rand(shape)
        for negated in (False, True, False, True, True, False):
            p.grad = torch._neg_view(memory) if negated else memory
            q.grad = -memory if negated else memory.clone()
            ours.step()
            theirs.step()
            torch.testing.assert_close(p, q)
            p.grad = None


@on_every_look
@pytest.mark.parametrize("keeps_the_object", [True, False])
def test_the_sign_of_a_gradient_whose_python_object_was_seen(keeps_the_object: bool, look: str) -> None:
    """The gradient gets new data, or it is freed and the next one can get its address."""
    p, q = (torch.nn.Parameter(torch.zeros(6)) for _ in range(2))
    ours, theirs = FusedSGD([p], lr=0.1, backend="reference"), torch.optim.SGD([q], lr=0.1)
    memory = torch.rand(6)
    for negated in (False, True) * 3:
        seen = torch._neg_view(memory) if negated else memory.detach()
        if keeps_the_object and p.grad is not None:
            p.grad.data = seen
        else:
            p.grad = None
            p.grad = torch._neg_view(memory) if negated else memory.detach()
        q.grad = -memory if negated else memory.clone()
        ours.step()
        theirs.step()
        torch.testing.assert_close(p, q)


@on_every_look
def test_conjugate_gradients(look: str) -> None:
    p, q = (torch.nn.Parameter(torch.ones(4, dtype=torch.complex64)) for _ in range(2))
    ours, theirs = FusedAdamW([p], backend="reference"), torch.optim.AdamW([q])
    memory = torch.randn(4, dtype=torch.complex64)
    for conjugate in (False, True, False, True):
        p.grad = memory.conj() if conjugate else memory
        q.grad = memory.conj().resolve_conj() if conjugate else memory.clone()
        ours.step()
        theirs.step()
        torch.testing.assert_close(p, q)


def reshape_param(p: torch.nn.Parameter, state: dict[str, Any]) -> None:
    p.data = p.data.view(2, 6)
    p.grad = torch.ones(2, 6)
    for key, value in state.items():
        if key != "step":
            state[key] = value.view(2, 6)


def transpose_param(p: torch.nn.Parameter, state: dict[str, Any]) -> None:
    p.data = p.data.t()  # the same memory with another shape and order
    p.grad = torch.ones(4, 3)
    for key, value in state.items():
        if key != "step":
            state[key] = value.t().contiguous()


def read_as_bfloat16(p: torch.nn.Parameter, state: dict[str, Any]) -> None:
    p.data = p.data.view(torch.bfloat16)[:, :4]
    p.grad = torch.ones(3, 4, dtype=torch.bfloat16)


def move_step_data(p: torch.nn.Parameter, state: dict[str, Any]) -> None:
    state["step"].data = state["step"].data + 3


@on_every_look
@pytest.mark.parametrize("change", [reshape_param, transpose_param, read_as_bfloat16, move_step_data])
def test_changes_in_place(change: Callable[..., None], look: str) -> None:
    params = make_params([(3, 4), (7,)])
    optimizer = build(AMSGRAD, REFERENCE, params)
    for step in range(2):
        set_grads(params, random_grads(params, step))
        checked_step(optimizer, AMSGRAD.rule, 3.0)
    before = optimizer._detector
    change(params[0], optimizer.state[params[0]])
    checked_step(optimizer, AMSGRAD.rule, 3.0)
    assert optimizer._detector is not before


@on_every_look
def test_params_that_change_groups_in_place(look: str) -> None:
    """The last param of one group becomes the first of the next, so the order of all params stays the same."""
    params = make_params(SHAPES)
    optimizer = FusedAdamW([{"params": params[:2]}, {"params": params[2:], "lr": 0.5}], backend="reference")
    for step in range(2):
        set_grads(params, random_grads(params, step))
        checked_step(optimizer, BY_NAME["adamw"].rule, 3.0)
    first, second = (group["params"] for group in optimizer.param_groups)
    second.insert(0, first.pop())
    checked_step(optimizer, BY_NAME["adamw"].rule, 3.0)


@on_every_look
def test_hyperparameters_of_every_kind(look: str) -> None:
    params, others = make_params(SHAPES), make_params(SHAPES)
    ours = FusedAdamW(params, lr=torch.tensor(0.1), betas=(0.9, 0.99), backend="reference")
    theirs = torch.optim.AdamW(others, lr=torch.tensor(0.1), betas=(0.9, 0.99), foreach=False)
    changes: list[dict[str, Any]] = [
        {},
        {"lr": 0.2},
        {"lr": torch.tensor(0.3, dtype=torch.float64)},
        {"betas": [0.8, 0.9]},
        {"betas": (torch.tensor(0.7), torch.tensor(0.95)), "lr": 0.1},
        {"weight_decay": 0.3, "eps": 1e-3},
        {"maximize": True},
    ]
    for number, change in enumerate(changes):
        grads = random_grads(params, number)
        for optimizer, ps in ((ours, params), (theirs, others)):
            set_grads(ps, [grad.clone() for grad in grads])
            optimizer.param_groups[0].update(copy.deepcopy(change))
            for value in optimizer.param_groups[0].values():
                if isinstance(value, torch.Tensor):
                    value.mul_(1.5)  # in place
            if isinstance(change.get("betas"), list):
                optimizer.param_groups[0]["betas"][0] = 0.85
            if optimizer is theirs and isinstance(change.get("betas"), tuple):
                optimizer.param_groups[0]["betas"] = tuple(float(beta) for beta in change["betas"])
            optimizer.step()
        torch.testing.assert_close(params, others, rtol=1e-5, atol=1e-6)


@on_every_look
def test_what_decides_nothing_may_change_at_every_step(look: str) -> None:
    """Wrappers such as timm's Lookahead keep counters in the param groups. A change of these must not rebuild the
    tables."""
    params = make_params()
    optimizer = FusedAdamW(params, backend="reference")
    group = optimizer.param_groups[0]
    group["lookahead_step"] = 0
    set_grads(params, random_grads(params, 0))
    optimizer.step()
    before = optimizer._detector
    for _ in range(3):
        group["lookahead_step"] += 1
        optimizer.step()
    assert optimizer._detector is before
    group["amsgrad"] = True
    optimizer.step()
    assert optimizer._detector is not before


@on_every_look
def test_gradients_are_let_go_after_the_step(look: str) -> None:
    import weakref

    params = make_params()
    optimizer = build(LAMB, REFERENCE, params)
    for step in range(3):
        set_grads(params, random_grads(params, step))
        seen = [weakref.ref(p.grad.untyped_storage()) for p in params if p.grad is not None]
        optimizer.step()
        optimizer.zero_grad()
        assert not any(storage() is not None for storage in seen)


class Wrapper(torch.Tensor):
    """A subclass with its own operations and without memory."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Wrapper:
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)  # type: ignore[attr-defined]

    def __init__(self, inner: torch.Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotImplementedError(f"{function} of a wrapper")


@on_every_look
def test_gradients_that_cannot_be_stepped(look: str) -> None:
    """The step raises an error and changes nothing."""
    params = make_params([(4,), (4,)])
    optimizer = FusedAdamW(params, backend="reference")
    set_grads(params, random_grads(params, 0))
    optimizer.step()
    before = [p.detach().clone() for p in params]
    grads = random_grads(params, 1)
    for wrong, message in (
        (grads[1].to_sparse(), "sparse gradients"),
        (Wrapper(grads[1]), "is a Wrapper, which overrides"),
    ):
        set_grads(params, grads)
        params[1].grad = wrong
        with pytest.raises(RuntimeError, match=message):
            optimizer.step()
        assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))
    set_grads(params, grads)
    checked_step(optimizer, BY_NAME["adamw"].rule, 3.0)


def test_the_compiled_look_is_the_one_that_is_used() -> None:
    """Unless it is not available in this installation."""
    optimizer = FusedAdamW(make_params())
    set_grads(optimizer.param_groups[0]["params"], random_grads(optimizer.param_groups[0]["params"], 0))
    optimizer.step()
    module = modules.poll()
    assert type(optimizer._detector) is (changes.ChangeDetector if isinstance(module, str) else module.ChangeDetector)
    titles = "compiled, through DLPack", "compiled with torch's headers"
    assert modules.poll_title() in titles or isinstance(module, str)


@on_every_look
def test_params_whose_contents_are_swapped(look: str) -> None:
    """model.half() does this with DTensors. torch refuses to swap if C++ code holds a reference to one of the
    tensors."""
    params = make_params([(5, 3), (), (40,)])
    optimizer = build(AMSGRAD, REFERENCE, params)
    for step in range(3):
        set_grads(params, random_grads(params, step))
        checked_step(optimizer, AMSGRAD.rule, 3.0)
        for p, other in zip(params[:2], make_params([(5, 3), ()], seed=step + 5), strict=True):
            p.grad = None
            torch.utils.swap_tensors(p, other)


@on_every_look
def test_params_that_become_conjugate_in_the_same_memory(look: str) -> None:
    p, q = (torch.nn.Parameter(torch.tensor([1 + 2j, 3 - 1j])) for _ in range(2))
    ours, theirs = FusedSGD([p], lr=0.5, backend="reference"), torch.optim.SGD([q], lr=0.5, foreach=False)
    for _ in range(3):
        for param, optimizer in ((p, ours), (q, theirs)):
            param.grad = torch.tensor([1j, 2 + 1j])
            optimizer.step()
            param.data = param.data.conj()
        torch.testing.assert_close(p, q)


@pytest.mark.skipif(class_of("dlpack") is None or isinstance(class_of("dlpack"), str), reason=str(class_of("dlpack")))
def test_a_torch_that_the_look_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's DLPack exchange table may have another version. Then the Python implementation is used, and the report
    names the reason."""

    def check() -> None:
        raise RuntimeError("another major version than 1")

    poll = modules.load("_poll")
    monkeypatch.setattr(modules, "load", lambda name: poll if name == "_poll" else "not built")
    monkeypatch.setattr(poll, "check", check)
    modules.poll.cache_clear()
    try:
        assert "does not support torch" in str(modules.poll()) and "another major version" in modules.poll_title()
    finally:
        modules.poll.cache_clear()


@on_every_look
def test_nothing_to_step(look: str) -> None:
    params = make_params([(5, 3), (40,)])
    optimizer = build(AMSGRAD, REFERENCE, params, max_grad_norm=1.0, skip_nonfinite=True, ema_decay=0.9)
    optimizer.step()
    assert not optimizer.state
    set_grads(params, random_grads(params, 0))
    optimizer.step()
    optimizer.zero_grad()
    optimizer.state.clear()
    optimizer.step()
    assert not optimizer.state
    optimizer.param_groups.clear()
    optimizer.step()


@on_every_look
@pytest.mark.parametrize("taken", [1, 2])
@pytest.mark.parametrize("what", ["param", "grad", "exp_avg"])
def test_tensors_without_memory_are_refused(what: str, taken: int, look: str) -> None:
    """Sharding engines free storages like this. A kernel that reads them would crash the process."""
    params = make_params([(5, 3), (40,)])
    optimizer = build(AMSGRAD, REFERENCE, params)
    for step in range(2):
        set_grads(params, random_grads(params, step))
        if step < taken:
            optimizer.step()
    tensor = {"param": params[1], "grad": params[1].grad, "exp_avg": optimizer.state[params[1]]["exp_avg"]}[what]
    assert tensor is not None
    kept, size = tensor.detach().clone(), tensor.untyped_storage().nbytes()
    tensor.untyped_storage().resize_(0)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"has 40 elements but no memory .* before the step"):
            optimizer.step()
    tensor.untyped_storage().resize_(size)
    tensor.detach().copy_(kept)
    optimizer.step()
    assert optimizer.state[params[0]]["step"].item() == taken + 1
