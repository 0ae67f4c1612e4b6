"""Inside the step: clipping by the norm of all gradients, skipping nonfinite gradients, and scaling."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from cases import Target, make_params, on_every_target, parameters, quick, random_grads, set_grads
from torch import Tensor

import fused_optim
from fused_optim import FusedAdamW, FusedLAMB, FusedLion, FusedQHAdam, FusedSGD

SHAPES = [(3, 5), (), (0,), (5000,), (7, 1, 9)]
CLASSES: list[tuple[Callable[..., Any], dict[str, Any]]] = [
    (FusedAdamW, {"lr": 0.1}),
    (FusedSGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}),
    (FusedQHAdam, {"lr": 0.1, "nus": (0.7, 0.9)}),
    (FusedLion, {"lr": 0.1}),
    (FusedLAMB, {"lr": 0.1, "max_grad_norm": None}),
]
on_every_class = pytest.mark.parametrize(("build", "kwargs"), CLASSES, ids=[build.__name__ for build, _ in CLASSES])


def make(build: Any, kwargs: dict[str, Any], target: Target, dtype: torch.dtype = torch.float64, **more: Any) -> Any:
    params = make_params(SHAPES, dtype, target.device)
    return build(params, backend=target.backend, **{**kwargs, **more})


def clipped(grads: Sequence[Tensor], bound: float, norm_type: float, eps: float = 1e-6) -> list[Tensor]:
    """torch's formula, in float64."""
    norm = torch.linalg.vector_norm(torch.cat([g.double().abs().flatten() for g in grads]), norm_type)
    return [g * min(1.0, bound / (float(norm) + eps)) for g in grads]


def assert_same(ours: Any, theirs: Any, rtol: float = 1e-11, atol: float = 1e-12) -> None:
    for p, q in zip(parameters(ours), parameters(theirs), strict=True):
        torch.testing.assert_close(p, q, rtol=rtol, atol=atol)
        for key, value in theirs.state[q].items():
            torch.testing.assert_close(ours.state[p][key], value, rtol=rtol, atol=atol)


@on_every_target
@on_every_class
@pytest.mark.parametrize("norm_type", [2.0, math.inf])
@pytest.mark.parametrize("bound", [0.5, 1e6])
def test_clips_as_torch(build: Any, kwargs: dict[str, Any], norm_type: float, bound: float, target: Target) -> None:
    ours = make(build, kwargs, target, max_grad_norm=bound, norm_type=norm_type)
    theirs = make(build, kwargs, target)
    eps = 0.0 if build is FusedLAMB else 1e-6  # Apex adds no eps to the norm
    for step in range(quick(target, 4, 2)):
        grads = random_grads(parameters(ours), step)
        set_grads(parameters(ours), grads)
        set_grads(parameters(theirs), clipped(grads, bound, norm_type, eps))
        ours.step()
        theirs.step()
        flat = torch.cat([g.flatten() for g in grads])
        torch.testing.assert_close(ours.last_grad_norm, torch.linalg.vector_norm(flat, norm_type).float())
        for p, grad in zip(parameters(ours), grads, strict=True):
            assert torch.equal(p.grad, grad), "p.grad must be left alone"
    assert_same(ours, theirs)


@pytest.mark.compiled
@on_every_target
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.complex64], ids=str)
@pytest.mark.parametrize("magnitude", [1.0, 1e25, 1e-25])  # their squares overflow or underflow float32
def test_the_norm_in_every_dtype(dtype: torch.dtype, magnitude: float, target: Target) -> None:
    magnitude = min(max(magnitude, 1e-3), 1e3) if dtype == torch.float16 else magnitude
    optimizer = make(FusedAdamW, {}, target, dtype, max_grad_norm=1.0)
    grads = [grad * magnitude for grad in random_grads(parameters(optimizer), 0)]
    set_grads(parameters(optimizer), grads)
    optimizer.step()
    wide = torch.cat([g.to(torch.complex128 if dtype.is_complex else torch.float64).flatten() for g in grads])
    torch.testing.assert_close(optimizer.last_grad_norm, torch.linalg.vector_norm(wide).float(), rtol=1.5e-7, atol=0)


@on_every_target
def test_the_norm_is_the_same_at_every_run(target: Target) -> None:
    norms = set()
    for _ in range(quick(target, 10, 2)):
        optimizer = make(FusedSGD, {"lr": 0.0}, target, torch.float32, max_grad_norm=1.0)
        set_grads(parameters(optimizer), random_grads(parameters(optimizer), 0))
        optimizer.step()
        norms.add(optimizer.last_grad_norm.item())
    assert len(norms) == 1


@on_every_target
@pytest.mark.parametrize("excluded", [None, 0])
def test_groups_may_be_left_out(excluded: float | None, target: Target) -> None:
    def groups() -> list[dict[str, Any]]:
        params = make_params(SHAPES, torch.float64, target.device)
        return [
            {"params": params[:2]},
            {"params": params[2:4], "max_grad_norm": 0.1},
            {"params": params[4:], "max_grad_norm": excluded},
        ]

    ours = FusedSGD(groups(), lr=0.1, backend=target.backend, max_grad_norm=0.5)
    theirs = FusedSGD([{"params": g["params"]} for g in groups()], lr=0.1, backend=target.backend)
    grads = random_grads(parameters(ours), 0)
    norm = float(torch.cat([g.flatten() for g in grads[:4]]).norm())
    factors = [0.5 / (norm + 1e-6)] * 2 + [0.1 / (norm + 1e-6)] * 2 + [1.0]
    set_grads(parameters(ours), grads)
    set_grads(parameters(theirs), [g * min(1.0, factor) for g, factor in zip(grads, factors, strict=True)])
    ours.step()
    theirs.step()
    assert_same(ours, theirs)
    assert ours.last_grad_norm.item() == pytest.approx(norm, rel=1e-6)


@on_every_target
def test_missing_gradients_have_no_norm(target: Target) -> None:
    optimizer = make(FusedAdamW, {}, target, max_grad_norm=1.0)
    grads = random_grads(parameters(optimizer), 0)
    for missing in (3, 0):
        partial = [None if index == missing else grad for index, grad in enumerate(grads)]
        set_grads(parameters(optimizer), partial)
        optimizer.step()
        flat = torch.cat([g.flatten() for g in partial if g is not None])
        assert optimizer.last_grad_norm.item() == pytest.approx(float(flat.norm()), rel=1e-6)


@on_every_target
def test_switched_on_and_off(target: Target) -> None:
    ours, theirs = make(FusedSGD, {"lr": 0.1}, target), make(FusedSGD, {"lr": 0.1}, target)
    for step, bound in enumerate((None, 0.5, None, 0.25, 2.0)):
        grads = random_grads(parameters(ours), step)
        ours.param_groups[0]["max_grad_norm"] = bound
        set_grads(parameters(ours), grads)
        set_grads(parameters(theirs), grads if bound is None else clipped(grads, bound, 2.0))
        ours.step()
        theirs.step()
        assert_same(ours, theirs)


BAD = [math.nan, math.inf, -math.inf]


@pytest.mark.compiled
@on_every_target
@on_every_class
@pytest.mark.parametrize("bound", [None, 0.5])
def test_skips_what_is_not_finite(build: Any, kwargs: dict[str, Any], bound: float | None, target: Target) -> None:
    options = {} if bound is None else {"max_grad_norm": bound}
    ours = make(build, kwargs, target, torch.float32, skip_nonfinite=True, **options)
    theirs = make(build, kwargs, target, torch.float32, **options)
    for step, bad in enumerate([*BAD[:1], None, *BAD[1:], None]):
        grads = random_grads(parameters(ours), step)
        if bad is not None:
            grads[3][4321] = bad
            before = copy.deepcopy([p.detach() for p in parameters(ours)])
            states = copy.deepcopy([dict(ours.state[p]) for p in parameters(ours) if p in ours.state])
        set_grads(parameters(ours), grads)
        ours.step()
        if bad is None:
            set_grads(parameters(theirs), grads)
            theirs.step()
            continue
        assert all(torch.equal(p, q) for p, q in zip(parameters(ours), before, strict=True))
        for p, state in zip(parameters(ours), states, strict=False):
            torch.testing.assert_close(dict(ours.state[p]), state, rtol=0, atol=0)
    assert ours.skipped_steps.item() == 3
    assert_same(ours, theirs, rtol=0, atol=0)


@on_every_target
def test_skips_for_groups_that_are_not_clipped(target: Target) -> None:
    params = make_params(SHAPES, device=target.device)
    groups = [{"params": params[:3]}, {"params": params[3:], "max_grad_norm": 1.0}]
    optimizer = FusedAdamW(groups, backend=target.backend, skip_nonfinite=True)
    for bad in BAD:
        grads = random_grads(params, 0)
        grads[0][0, 0] = bad
        before = [p.detach().clone() for p in params]
        set_grads(params, grads)
        optimizer.step()
        assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))
    grads = random_grads(params, 0)
    set_grads(params, grads)
    optimizer.step()
    assert optimizer.skipped_steps.item() == 3
    assert optimizer.last_grad_norm.item() == pytest.approx(float(torch.cat([g.flatten() for g in grads[3:]]).norm()))


@on_every_target
@pytest.mark.parametrize(
    ("unscale", "overflow", "clip", "skip"), list(itertools.product([False, True], repeat=4)), ids=str
)
def test_with_grad_scaler(unscale: bool, overflow: bool, clip: bool, skip: bool, target: Target) -> None:
    """All combinations of unscale_, overflow, clipping and skipping: a step equals one without a scaler, or does
    nothing."""
    options = {"max_grad_norm": 0.5} if clip else {}
    ours = make(FusedAdamW, {"lr": 0.1}, target, torch.float32, skip_nonfinite=skip, **options)
    theirs = make(FusedAdamW, {"lr": 0.1}, target, torch.float32, **options)
    scaler = torch.amp.GradScaler(target.device, init_scale=1024.0)
    for step in range(3):
        grads = random_grads(parameters(ours), step)
        scaler.scale(torch.zeros((), device=target.device))  # the scaler creates its scale at the first loss
        scaled = [g * scaler.get_scale() for g in grads]
        overflows = overflow and step == 1
        if overflows:
            scaled[3][17] = math.inf
        set_grads(parameters(ours), scaled)
        if unscale:
            scaler.unscale_(ours)
        scaler.step(ours)
        scaler.update()
        if not overflows:
            set_grads(parameters(theirs), grads)
            theirs.step()
            if clip:
                torch.testing.assert_close(ours.last_grad_norm, theirs.last_grad_norm, rtol=1e-6, atol=0)
    assert_same(ours, theirs, rtol=1e-5, atol=1e-6)
    assert ours.skipped_steps.item() == (overflow and skip)


@pytest.mark.compiled
@on_every_target
@on_every_class
def test_accumulated_gradients(build: Any, kwargs: dict[str, Any], target: Target) -> None:
    """Gradients are summed over four micro-batches and divided inside the step. Clipping uses the mean."""
    ours, theirs = (make(build, kwargs, target, max_grad_norm=0.5) for _ in range(2))
    for step, scale in enumerate((4, torch.tensor(4.0), torch.tensor([4.0], dtype=torch.float64))):
        grads = random_grads(parameters(ours), step)
        set_grads(parameters(ours), [g * 4 for g in grads])
        set_grads(parameters(theirs), grads)
        ours.step(grad_scale=scale)
        theirs.step()
        torch.testing.assert_close(ours.last_grad_norm, theirs.last_grad_norm)
    assert_same(ours, theirs, rtol=1e-6 if build is FusedLion else 1e-11)


@on_every_target
def test_options_travel(target: Target) -> None:
    optimizer = make(FusedAdamW, {}, target, max_grad_norm=0.5, norm_type=math.inf, skip_nonfinite=True)
    grads = random_grads(parameters(optimizer), 0)
    grads[3][0] = math.nan
    set_grads(parameters(optimizer), grads)
    optimizer.step()
    twin = copy.deepcopy(optimizer)
    set_grads(parameters(twin), grads)
    twin.step()
    assert (optimizer.skipped_steps.item(), twin.skipped_steps.item()) == (1, 2)
    assert twin.state_dict()["param_groups"][0]["max_grad_norm"] == 0.5
    plain = make(FusedAdamW, {}, target)
    assert "max_grad_norm" not in plain.param_groups[0]
    plain.load_state_dict(optimizer.state_dict())
    assert plain.param_groups[0]["max_grad_norm"] == 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_grad_norm": -1.0}, "max_grad_norm must be 0 or more"),
        ({"max_grad_norm": math.nan}, "max_grad_norm must be 0 or more"),
        ({"norm_type": 1.0}, "norm_type must be 2 or inf"),
    ],
)
@pytest.mark.parametrize("name", ["FusedAdamW", "FusedSGD", "FusedLAMB", "FusedLion", "FusedQHAdamW"])
def test_bad_options(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        getattr(fused_optim, name)([torch.zeros(3)], **options)
