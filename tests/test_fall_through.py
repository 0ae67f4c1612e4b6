"""Backends that fail at their first launch, and steps that fail in the middle."""

from __future__ import annotations

import types
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import (
    ADAMW,
    LAMB,
    Case,
    Target,
    build,
    for_every_class,
    make_params,
    on_every_target,
    random_grads,
    set_grads,
)
from compare import assert_equal, updates
from test_errors import frozen

from fused_optim import FusedAdamW, FusedLAMB, backends, clip_grad_norm_
from fused_optim.backends import trial
from fused_optim.engine import walk
from fused_optim.engine.backend import Backend
from fused_optim.recipes import clip

GPU = torch.device("cuda", 0)


# ---- kernels that fail at their first launch


class Broken(Exception):
    pass


def variant(backend: str, **attributes: Any) -> type[Backend]:
    """A subclass of the backend with these attributes."""
    return type("Variant", (backends.BACKENDS[backend],), attributes)


@pytest.fixture
def order(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """On CPU tensors "auto" tries two broken backends first, as it tries Triton and CUDA on GPUs. Returns the list of
    calls."""
    called: list[str] = []

    def fail(what: str) -> Callable[..., None]:
        def failing(*_: Any) -> None:
            called.append(what)
            raise Broken(f"no luck with {what}\nin the second line")

        return failing

    for name in ("uploads", "steps"):
        change = {"upload": fail("an upload")}
        if name == "steps":
            change = {"step": fail("a kernel"), "scale_grads": fail("one")}
        monkeypatch.setitem(backends.BACKENDS, name, variant("reference", name=name, **change))
    monkeypatch.setattr(backends, "ORDER", {"cpu": ("uploads", "steps")})
    monkeypatch.setattr(backends, "FAILED", {})
    monkeypatch.setattr(trial, "_passed", set())
    monkeypatch.setattr(trial, "is_tried", lambda backend, device: backend.name != "reference")
    monkeypatch.setattr(clip, "_kept", {})
    backends._warn.cache_clear()
    return called


@for_every_class
def test_auto_falls_through_before_anything_changes(case: Case, order: list[str]) -> None:
    ours, theirs = make_params(), make_params()
    optimizers = [
        case.ours(params, backend=name, **case.kwargs) for params, name in ((ours, "auto"), (theirs, "reference"))
    ]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(3):
            for params, optimizer in zip((ours, theirs), optimizers, strict=True):
                set_grads(params, random_grads(params, step))
                optimizer.step()
    for p, q in zip(ours, theirs, strict=True):
        assert_equal(p, q)
        assert_equal(optimizers[0].state[p], optimizers[1].state[q])
    assert order == ["an upload", "a kernel"], "each is tried once"
    texts = [str(warning.message) for warning in caught if "fused_optim" in str(warning.message)]
    assert len(texts) == 2
    assert (
        'with backend="steps", because uploads: its trial launch failed with Broken: no luck with an upload in'
        in texts[0]
    )
    assert "plain PyTorch" in texts[1] and "a kernel in the second line" in texts[1]
    assert {warning.filename for warning in caught if str(warning.message) in texts} == {__file__}


def test_the_next_optimizer_knows(order: list[str]) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            params = make_params()
            set_grads(params, random_grads(params, 0))
            FusedAdamW(params).step()
    assert len(order) == 2 and len({str(warning.message) for warning in caught}) == len(caught)


def test_a_named_backend_says_why_and_changes_nothing(order: list[str]) -> None:
    params = make_params()
    optimizer = FusedAdamW(params, backend="steps")
    set_grads(params, random_grads(params, 0))
    before = frozen(optimizer, params)
    for _ in range(2):  # it is tried again, because it may have been repaired
        with pytest.raises(RuntimeError, match="no luck with a kernel in the second line") as error:
            optimizer.step()
        assert isinstance(error.value.__cause__, Broken)
        assert_equal(frozen(optimizer, params), before)
    assert order == ["a kernel"] * 2 and not backends.FAILED


def test_lack_of_memory_is_no_fault_of_a_backend(order: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setitem(backends.BACKENDS, "uploads", variant("uploads", upload=full))
    params = make_params()
    optimizer = FusedAdamW(params)
    set_grads(params, random_grads(params, 0))
    with pytest.raises(torch.OutOfMemoryError):
        optimizer.step()
    assert not backends.FAILED and not optimizer.state


def test_clipping_falls_through_too(order: list[str]) -> None:
    params = make_params([(5,), (7, 3)])
    set_grads(params, random_grads(params, 0))
    before = [param.grad.clone() for param in params if param.grad is not None]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        norm = clip_grad_norm_(params, 0.5)
    assert "no luck with one" in str(caught[-1].message)
    exact = torch.cat([grad.flatten() for grad in before]).norm()
    torch.testing.assert_close(norm, exact)
    for param, grad in zip(params, before, strict=True):
        torch.testing.assert_close(param.grad, grad * 0.5 / (exact + 1e-6))
    with pytest.raises(RuntimeError, match="no luck with one"):
        clip_grad_norm_(params, 0.25, backend="steps")


@on_every_target
@for_every_class
def test_a_trial_touches_nothing(case: Case, target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trial's kernels leave their own zero tensors and the optimizer's tensors unchanged."""
    trials = []
    make = trial._table_of
    monkeypatch.setattr(trial, "_table_of", lambda *args: trials.append(make(*args)) or trials[-1])
    monkeypatch.setattr(trial, "is_tried", lambda backend, device: True)
    monkeypatch.setattr(trial, "_passed", set())
    params = make_params([(3,), (5,)], device=target.device) + make_params([(2,)], torch.bfloat16, target.device)
    options: dict[str, Any] = {"ema_decay": 0.5, "skip_nonfinite": True}
    optimizer = build(case, target, params, **options)
    set_grads(params, random_grads(params, 0))
    optimizer.step()
    assert {type(made) for made in trials} == {trial.Table}
    for table in trials:
        assert len(table.rows_list) == 2 and table.dtype_signatures == optimizer._tables[0].table.dtype_signatures
        for row in table.rows_list:
            assert all(bool((tensor == 0).all()) for tensor in (row.step, *row.tensors))
    assert updates(optimizer, params) == [1.0] * len(params)
    monkeypatch.setattr(clip, "_kept", {})
    clip_grad_norm_(params, 1.0, backend=target.backend)
    assert trials[-1].rule.name == "clip"
    assert all(bool((tensor == 0).all()) for row in trials[-1].rows_list for tensor in row.tensors)


OPTIONS: list[dict[str, Any]] = [{}, {"ema_decay": 0.5}, {"max_grad_norm": 1.0}, {"skip_nonfinite": True}]


@for_every_class
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_trial_launches_all_that_steps_launch(
    case: Case, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """So the trial has compiled every kernel that a step needs."""
    launch = pytest.importorskip("fused_optim.triton_kernels.launch")
    started: list[Any] = []
    monkeypatch.setattr(launch.Variant, "start", lambda variant, *_: started.append(variant))
    launching = variant("triton", why_not=staticmethod(lambda _: None))
    monkeypatch.setitem(backends.BACKENDS, "triton", launching)
    monkeypatch.setattr(trial, "is_tried", lambda backend, device: True)
    monkeypatch.setattr(trial, "_passed", set())
    params = make_params([(3,), (5000,)]) + make_params([(2,)], torch.bfloat16)
    optimizer = case.ours(params, backend="triton", **{**case.kwargs, **options})
    set_grads(params, random_grads(params, 0))
    optimizer.step()
    half = len(started) // 2
    assert started[:half] == started[half:] and len(started) == 2 * half >= 4

    started.clear()
    monkeypatch.setattr(clip, "_kept", {})
    clip_grad_norm_(params, 1.0, backend="triton")
    half = len(started) // 2
    assert started[:half] == started[half:] and len(started) == 2 * half >= 4


# ---- steps that fail in the middle


def broken(monkeypatch: pytest.MonkeyPatch, target: Target, **functions: Any) -> None:
    monkeypatch.setitem(backends.BACKENDS, target.backend, variant(target.backend, **functions))


def fail(*_: Any) -> None:
    raise Broken("a reason")


@on_every_target
def test_an_error_between_the_walks_of_lamb_says_what_has_changed(
    target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken(monkeypatch, target, apply_update=fail)
    params = make_params([(3,), (5,)], device=target.device)
    before = [param.detach().clone() for param in params]
    optimizer = build(LAMB, target, params)
    set_grads(params, random_grads(params, 0))
    with pytest.raises(RuntimeError, match="states and step counts updated, params not") as error:
        optimizer.step()
    assert isinstance(error.value.__cause__, Broken) and "Load a checkpoint" in str(error.value)
    for param, old in zip(params, before, strict=True):
        assert_equal(param.detach(), old)
        assert float(optimizer.state[param]["step"]) == 1 and optimizer.state[param]["exp_avg"].any()


@on_every_target
def test_a_collective_that_fails_between_the_walks(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(walk, "sum_over_processes", fail)
    params = make_params([(3,)], device=target.device)
    optimizer = build(LAMB, target, params)
    set_grads(params, random_grads(params, 0))
    with pytest.raises(RuntimeError, match=f"{params[0].device}: states and step counts updated, params not"):
        optimizer.step()


def test_an_interrupt_between_the_walks_remains_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(walk, "sum_over_processes", interrupt)
    params = make_params([(3,)])
    optimizer = FusedLAMB(params)
    set_grads(params, random_grads(params, 0))
    with (
        pytest.raises(KeyboardInterrupt),
        pytest.warns(UserWarning, match="states and step counts updated, params not"),
    ):
        optimizer.step()


@on_every_target
@pytest.mark.parametrize("where", ["poll", "upload", "sum_squares"])
def test_an_error_before_the_walks_changes_nothing(target: Target, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next step continues as if the failed one had not happened. It still notices all changes since the last
    step."""
    lists = [make_params([(3,), (5,)], device=target.device) for _ in range(2)]
    options: dict[str, Any] = {"max_grad_norm": 1.0, "ema_decay": lambda step: 0.5 + 0.1 * step}
    optimizers = [build(ADAMW, target, params, **options) for params in lists]
    for step in range(3):
        for params, optimizer in zip(lists, optimizers, strict=True):
            set_grads(params, random_grads(params, step))
            optimizer.param_groups[0]["lr"] = 0.1 / (1 + step)
            if step and optimizer is optimizers[0]:
                before = frozen(optimizer, params)
                with monkeypatch.context() as patch:
                    if where == "poll":  # it fails after it has detected the changes
                        poll = optimizer._detector.poll
                        optimizer._detector = types.SimpleNamespace(poll=lambda poll=poll: fail(poll()))
                    else:
                        failing = variant(target.backend, **{where: fail})
                        patch.setitem(backends.BACKENDS, target.backend, failing)
                        optimizer._tables = [failing(bound.table) for bound in optimizer._tables]
                    with pytest.raises(Broken):
                        optimizer.step()
                assert_equal(frozen(optimizer, params), before)
            optimizer.step()
    for p, q in zip(*lists, strict=True):
        assert_equal(p, q)
        assert_equal(optimizers[0].state[p], optimizers[1].state[q])
        assert_equal(optimizers[0].ema[p], optimizers[1].ema[q])
