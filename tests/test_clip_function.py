"""clip_grad_norm_ compared with torch's function of the same name."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import Target, make_params, on_every_target, quick
from gradients import (
    SHAPES,
    alone,  # noqa: F401
    assert_bits,
    clipped,
    grads_of,
    holding,
    random_params,
    whole_numbers,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fused_optim import clip_grad_norm_

REAL = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
EVERY = [*REAL, torch.complex64, torch.complex128]
torchs = torch.nn.utils.clip_grad_norm_


@on_every_target
@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("dtype", EVERY, ids=str)
@pytest.mark.parametrize("bound", [0.5, 1e6])
def test_clips_as_torch(bound: float, dtype: torch.dtype, target: Target) -> None:
    params = random_params(target, dtype)
    before = grads_of(params)
    others = holding([g.clone() for g in before])
    wide = holding([g.to(torch.complex128 if dtype.is_complex else torch.float64) for g in before])
    norm = clip_grad_norm_(params, bound, backend=target.backend)
    torch.testing.assert_close(norm, torchs(others, bound))  # compares dtype and device too
    torch.testing.assert_close(norm, torchs(wide, bound).to(norm.dtype), rtol=1e-6 if norm.itemsize > 2 else 0, atol=0)
    for ours, theirs, exact in zip(params, others, wide, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
        eps = torch.finfo(dtype).eps
        tiny = torch.finfo(dtype.to_real()).smallest_normal * eps
        wanted = exact.grad.to(dtype)
        # In float64 torch's sum also has several rounding errors.
        torch.testing.assert_close(ours.grad, wanted, rtol=(8 if eps < 1e-12 else 1.5) * eps, atol=tiny)
    if bound > 1:
        assert_bits(grads_of(params), before)


offsets = st.integers(0, 9)
tensors = st.tuples(st.sampled_from(REAL), st.sampled_from([0, 1, 3, 130, 511, 513, 4095, 4097, 8200]), offsets)


@pytest.mark.slow
@pytest.mark.compiled
@on_every_target
@pytest.mark.parametrize("bound", [0.25, 1e9])
def test_to_the_bit_and_not_a_byte_around(bound: float, target: Target) -> None:
    """Gradients are views at any offset into longer tensors, in any mixture of dtypes. The bytes around them must not
    change."""
    most = quick(target, 60, 6)

    @settings(max_examples=most, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(specs=st.lists(tensors, min_size=1, max_size=quick(target, 12, 5)))
    def check(specs: list[tuple[torch.dtype, int, int]]) -> None:
        around, views = [], []
        for index, (dtype, size, offset) in enumerate(specs):
            around.append(whole_numbers([64 + offset + size + 64], dtype, target.device, index))
            views.append(around[-1][64 + offset : 64 + offset + size])
        wanted = [x.clone() for x in around]
        for x, y, view in zip(wanted, clipped(views, bound), views, strict=True):
            x[view.storage_offset() : view.storage_offset() + view.numel()] = y
        norm = clip_grad_norm_(holding(views), bound, backend=target.backend)
        assert_bits(around, wanted)
        assert norm.dtype == torchs(holding([v.clone() for v in views]), 1.0).dtype

    check()


@on_every_target
@pytest.mark.usefixtures("alone")
def test_memory_formats(target: Target) -> None:
    """Dense layouts of any order, conjugate views and negative views: elements are processed in memory order."""
    image = whole_numbers((2, 3, 4, 5), torch.float32, target.device)
    waves = torch.complex(whole_numbers((30,), torch.float32, target.device), torch.ones(30, device=target.device))
    grads = [
        image.to(memory_format=torch.channels_last),
        whole_numbers((6, 7), torch.bfloat16, target.device).t(),
        whole_numbers((5,), torch.float64, target.device).as_strided((5, 1, 1), (1, 77, 3)),
        waves.conj(),
        torch._neg_view(whole_numbers((9,), torch.float16, target.device)),
    ]
    wanted = clipped([g.resolve_conj().resolve_neg() for g in grads], 2.0)
    clip_grad_norm_(holding(grads), 2.0, backend=target.backend)
    assert_bits([g.resolve_conj().resolve_neg() for g in grads], wanted)


@on_every_target
@pytest.mark.usefixtures("alone")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy warns in Triton's interpreter
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", REAL, ids=str)
@pytest.mark.parametrize("bound", [0.5, math.inf])
def test_what_is_not_finite(bound: float, dtype: torch.dtype, bad: float, target: Target) -> None:
    params = random_params(target, dtype)
    params[3].grad[4321] = bad
    others = holding(grads_of(params))
    norm = clip_grad_norm_(params, bound, backend=target.backend)
    torch.testing.assert_close(norm, torchs(others, bound), equal_nan=True)
    assert_bits(grads_of(params), grads_of(others))


@on_every_target
@pytest.mark.usefixtures("alone")
def test_norms_that_overflow_their_dtype(target: Target) -> None:
    """torch computes an infinite norm here and sets all gradients to 0."""
    for dtype, size in ((torch.float16, 1e4), (torch.float32, 1e30)):
        params = holding([torch.full((100,), size, dtype=dtype, device=target.device)])
        norm = clip_grad_norm_(params, 1.0, backend=target.backend)
        assert norm.item() == (math.inf if dtype == torch.float16 else pytest.approx(10 * size))
        torch.testing.assert_close(params[0].grad, torch.full_like(params[0], 0.1).detach())


@on_every_target
@pytest.mark.parametrize("bad", [None, math.nan, math.inf])
def test_error_if_nonfinite(bad: float | None, target: Target) -> None:
    params = random_params(target)
    if bad is None:
        norm = clip_grad_norm_(params, 1.0, error_if_nonfinite=True, backend=target.backend)
        assert norm.isfinite()
        return
    params[3].grad[7] = bad
    before = grads_of(params)
    with pytest.raises(RuntimeError) as theirs:
        torchs(params, 1.0, error_if_nonfinite=True)
    with pytest.raises(RuntimeError) as ours:
        clip_grad_norm_(params, 1.0, error_if_nonfinite=True, backend=target.backend)
    assert str(ours.value) == str(theirs.value)
    assert_bits(grads_of(params), before)


@on_every_target
def test_promoted_dtypes(target: Target) -> None:
    for one in EVERY:
        for other in EVERY:
            grads = [torch.ones(3, dtype=dtype, device=target.device) for dtype in (one, other)]
            norm = clip_grad_norm_(holding(grads), 100.0, backend=target.backend)
            assert norm.dtype == torchs(holding(grads), 100.0).dtype, (one, other)


def test_forms_of_parameters() -> None:
    """The same arguments as torch: one tensor, any iterable, an empty one, and params without gradients."""
    params = random_params(Target("cpp", "cpu"))
    params[1].grad = None
    forms: list[Callable[[], Any]] = [
        lambda: params,
        lambda: tuple(params),
        lambda: iter(params),
        lambda: (p for p in params),
        lambda: params[0],
        lambda: params[1],
        lambda: [],
    ]
    for form in forms:
        torch.testing.assert_close(clip_grad_norm_(form(), 1e9), torchs(form(), 1e9))
    with pytest.warns(UserWarning) as theirs:
        torchs((p for p in []), 1.0)
    with pytest.warns(UserWarning) as ours:
        norm = clip_grad_norm_((p for p in []), 1.0)
    assert norm.item() == 0.0
    assert [(str(w.message), w.filename) for w in ours] == [(str(w.message), w.filename) for w in theirs]


@pytest.mark.parametrize("foreach", [None, True, False])
@pytest.mark.parametrize(
    ("max_norm", "norm_type"),
    [
        (0.5, math.inf),
        (0.5, "inf"),
        (0.5, 1),
        (0.5, 3.0),
        (0.0, 2.0),
        (-1.0, 2.0),
        (math.nan, 2.0),
        (torch.ones(()), 2),
    ],
    ids=str,
)
def test_what_the_kernels_do_not_know(max_norm: Any, norm_type: Any, foreach: bool | None) -> None:
    params = random_params(Target("cpp", "cpu"))
    params[2].grad = None  # removes the empty gradient: torch's inf norm raises for it
    others = holding(grads_of(params))
    norm = clip_grad_norm_(params, max_norm, norm_type, foreach=foreach)
    torch.testing.assert_close(norm, torchs(others, max_norm, norm_type, foreach=foreach))
    torch.testing.assert_close(grads_of(params), grads_of(others), equal_nan=True)


class Wrapped(torch.Tensor):
    """A subclass that can give its elements any meaning."""


def odd_gradients() -> dict[str, list[Tensor]]:
    base = torch.arange(60.0)
    twice = torch.arange(8.0)
    return {
        "sparse": [torch.eye(4).to_sparse(), torch.ones(3)],
        "holes": [base[::2], base.view(6, 10)[1:2, 1::2], torch.ones(3)],
        "overlap": [base[:40], base[20:]],
        "the same twice": [twice, twice],
        "subclass": [torch.arange(4.0).as_subclass(Wrapped)],
        "one of them empty": [torch.ones(0), base[:40:2]],
        "float8": [torch.ones(4).to(torch.float8_e4m3fn)],
    }


@pytest.mark.parametrize("name", odd_gradients())
def test_odd_gradients(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """These gradients are passed to torch's function and otherwise left alone."""
    ours, theirs = odd_gradients()[name], odd_gradients()[name]
    asked = []
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *args: asked.append(args) or torchs(*args))
    outcome = []
    for function, grads in ((clip_grad_norm_, ours), (torchs, theirs)):
        try:
            outcome.append(function(holding(grads), 1.5))
        except RuntimeError as error:
            outcome.append(str(error))
    assert len(asked) == 1
    if isinstance(outcome[1], str):
        assert outcome[0] == outcome[1]
        return
    torch.testing.assert_close(*outcome)
    for x, y in zip(ours, theirs, strict=True):
        assert type(x) is type(y)
        torch.testing.assert_close(x._base if x._base is not None else x, y._base if y._base is not None else y)


def test_expanded_gradients_are_refused_as_by_torch() -> None:
    params = [torch.zeros(5, requires_grad=True)]
    params[0].grad = torch.ones(1).expand(5)
    for function in (clip_grad_norm_, torchs):
        with pytest.raises(RuntimeError, match="more than one element of the written-to tensor"):
            function(params, 1.0)


@on_every_target
@pytest.mark.usefixtures("alone")
def test_gradients_that_move(target: Target) -> None:
    """Every step has new gradient memory. Bounds change, a gradient is missing in one step, and two models of the same
    shape alternate."""
    models = [make_params(SHAPES, torch.float32, target.device, seed) for seed in range(2)]
    kept = []
    for step, bound in enumerate([0.5, 0.5, 0.1, 1e9, 0.7, 0.7][: quick(target, 6, 3)]):
        for model in models:
            grads: list[Any] = [whole_numbers(p.shape, torch.float32, target.device, step) for p in model]
            if step == 2:
                grads[3] = None
            kept.append(grads)  # so that no address is reused
            wanted = clipped([g for g in grads if g is not None], bound)
            for p, grad in zip(model, grads, strict=True):
                p.grad = grad
            clip_grad_norm_(model, bound, backend=target.backend)
            assert_bits([p.grad for p in model if p.grad is not None], wanted)
