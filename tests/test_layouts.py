"""Random memory layouts with Hypothesis: sizes, offsets, strides, dtypes. The memory around a view must not change."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from cases import (
    ADAMW,
    AMSGRAD,
    BY_NAME,
    INTERPRETED,
    ONE_EACH,
    SCALARS,
    Case,
    Target,
    build,
    build_torch,
    every,
    for_every_case,
    for_every_rule,
    on_every_target,
    set_grads,
)
from compare import assert_equal, assert_like_torch, checked_step
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

LARGEST = 300 if INTERPRETED else 5000


def examples(number: int) -> settings:
    quiet = [HealthCheck.too_slow, HealthCheck.data_too_large]
    number = 3 if INTERPRETED else number
    return settings(max_examples=number, deadline=None, derandomize=True, suppress_health_check=quiet)


DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64]
LAYOUTS = ["flat", "transposed", "channels_last", "sliced", "columns", "scalar"]
GRADS = ["alike", "contiguous", "reversed", "unaligned", "expanded", "sliced"]
BOUNDS = {torch.bfloat16: 0.6, torch.float16: 0.6, torch.float64: 12.0}  # explained in test_numbers.py


@dataclass(frozen=True)
class Spec:
    """The memory layout of one param and its gradient."""

    layout: str
    size: int
    offset: int
    dtype: torch.dtype
    grad: str


specs = st.builds(
    Spec,
    layout=st.sampled_from(LAYOUTS),
    size=st.one_of(st.integers(0, 40), st.integers(0, LARGEST)),
    offset=st.integers(0, 9),
    dtype=st.sampled_from(DTYPES),
    grad=st.sampled_from(GRADS),
)


def shape_and_stride(spec: Spec) -> tuple[tuple[int, ...], tuple[int, ...]]:
    n, root = spec.size, math.isqrt(spec.size)
    if spec.layout == "transposed":
        return (root, root + 3), (1, max(root, 1))
    if spec.layout == "channels_last":
        channels, width = 3, max(1, root // 3)
        return (2, channels, width, 2), (channels * width * 2, 1, channels * 2, channels)
    if spec.layout == "sliced":
        return (n // 3,), (3,)
    if spec.layout == "columns":
        return (root, 3), (5, 1)
    return ((), ()) if spec.layout == "scalar" else ((n,), (1,))


class Guarded:
    """A param that is a view into a larger block of memory. It keeps a copy of the memory around the view."""

    def __init__(self, spec: Spec, device: str, generator: torch.Generator) -> None:
        shape, stride = shape_and_stride(spec)
        extent = 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
        block = torch.randn(spec.offset + max(extent, 0) + 17, generator=generator, dtype=torch.float64)
        self.block = block.to(device, spec.dtype)
        self.param = self.block.as_strided(shape, stride, spec.offset)
        self.param.requires_grad_()
        outside = torch.ones(self.block.numel(), dtype=torch.bool)
        outside.as_strided(shape, stride, spec.offset).fill_(False)
        self.outside = outside.to(device)
        self.around = self.block.detach()[self.outside].clone()

    def assert_nothing_around_moved(self) -> None:
        assert_equal(self.block.detach()[self.outside], self.around)


def in_layout(values: Tensor, kind: str, like: Tensor) -> Tensor:
    """The same values with other strides. "expanded" repeats the first value."""
    if kind == "alike":
        return torch.empty_like(like, dtype=values.dtype, requires_grad=False).copy_(values)
    if kind == "reversed":
        axes = tuple(reversed(range(values.dim())))
        return values.permute(axes).contiguous().permute(axes)
    if kind == "unaligned":
        block = torch.empty(values.numel() + 1, dtype=values.dtype, device=values.device)
        return block[1:].view(values.shape).copy_(values)
    if kind == "sliced":
        block = torch.full((*values.shape, 2), math.nan, dtype=values.dtype, device=values.device)
        return block[..., 0].copy_(values)
    if kind == "expanded":
        first = values.flatten()[:1] if values.numel() else torch.zeros(1, dtype=values.dtype, device=values.device)
        return first.reshape([1] * values.dim()).expand(values.shape)
    return values.contiguous()


def gradient(guarded: Guarded, spec: Spec, generator: torch.Generator) -> Tensor:
    p = guarded.param
    values = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.device, spec.dtype)
    return in_layout(values, spec.grad, p)


hyperparameters = st.fixed_dictionaries(
    {
        "lr": st.sampled_from([0.0, 1e-4, 0.01, 0.5]),
        "betas": st.tuples(st.sampled_from([0.0, 0.5, 0.9, 0.99]), st.sampled_from([0.5, 0.9, 0.999, 0.9999])),
        "eps": st.sampled_from([1e-3, 1e-6]),
        "weight_decay": st.sampled_from([0.0, 0.01, 0.3]),
        "amsgrad": st.booleans(),
        "maximize": st.booleans(),
        "nus": st.tuples(st.sampled_from([0.0, 0.7, 1.0]), st.sampled_from([0.5, 1.0])),
        "max_grad_norm": st.sampled_from([None, 0.5]),
        "use_nvlamb": st.booleans(),
    }
)


@pytest.mark.slow
@on_every_target
@for_every_case
@examples(12)
@given(
    layouts=st.lists(specs, min_size=1, max_size=2 if INTERPRETED else 6),
    options=hyperparameters,
    momentum=st.sampled_from([0.0, 0.5, 0.9]),  # set in the groups: a constructor refuses nesterov without momentum
    seed=st.integers(0, 2**16),
    data=st.data(),
)
def test_any_layout(
    case: Case,
    target: Target,
    layouts: list[Spec],
    options: dict[str, Any],
    momentum: float,
    seed: int,
    data: st.DataObject,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    guards = [Guarded(spec, target.device, generator) for spec in layouts]
    params = [guard.param for guard in guards]
    own = case.known(momentum=momentum)
    groups = [{"params": [p], "lr": options["lr"] / (i + 1), **own} for i, p in enumerate(params)]
    optimizer = build(case, target, groups, **case.known(**options))
    for _ in range(2 if INTERPRETED else 3):
        present = data.draw(st.lists(st.booleans(), min_size=len(params), max_size=len(params)))
        for guard, spec, has_grad in zip(guards, layouts, present, strict=True):
            guard.param.grad = gradient(guard, spec, generator) if has_grad else None
        # The bound depends on the dtype. A step with several dtypes gets the largest of their bounds.
        kinds = {spec.dtype for spec in layouts}
        # 6 is more than in other tests: lr is up to 0.5, and gradients can cancel against L2 decay.
        checked_step(optimizer, case.rule, max(BOUNDS.get(kind, 6.0) for kind in kinds))
        for guard in guards:
            guard.assert_nothing_around_moved()


@pytest.mark.slow
@on_every_target
@for_every_rule
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@examples(12)
@given(spec=specs, seed=st.integers(0, 2**16))
def test_one_tensor_of_each_dtype(case: Case, target: Target, dtype: torch.dtype, spec: Spec, seed: int) -> None:
    """Like test_any_layout with one tensor, so the bound is that of its dtype."""
    if INTERPRETED and case is not AMSGRAD:
        pytest.skip("one case is enough in Triton's interpreter")
    generator = torch.Generator().manual_seed(seed)
    spec = Spec(spec.layout, spec.size, spec.offset, dtype, spec.grad)
    guard = Guarded(spec, target.device, generator)
    optimizer = build(case, target, [guard.param], **case.known(eps=1e-3))
    for _ in range(2):
        guard.param.grad = gradient(guard, spec, generator)
        checked_step(optimizer, case.rule, BOUNDS.get(dtype, 4.0))
        guard.assert_nothing_around_moved()


@on_every_target
@pytest.mark.parametrize("grad_layout", GRADS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradient_strides_unlike_the_params(target: Target, layout: str, grad_layout: str) -> None:
    """Gradients are brought into the layout of the param before the rule sees them, so one case is enough. In this case
    torch 2.13's fused CPU kernels pair elements by address and give wrong results without an error."""
    spec = Spec(layout, 400, 1, torch.float32, grad_layout)
    pair = []
    for make in (lambda p: build(AMSGRAD, target, p), lambda p: build_torch(AMSGRAD, p)):
        guard = Guarded(spec, target.device, torch.Generator().manual_seed(5))
        optimizer = make([guard.param])
        generator = torch.Generator().manual_seed(6)
        for _ in range(2):
            guard.param.grad = gradient(guard, spec, generator)
            optimizer.step()
        pair.append(optimizer)
    assert_like_torch(*pair)


@pytest.mark.shared
@on_every_target
@for_every_rule
@pytest.mark.parametrize("layout", LAYOUTS)
def test_states_have_the_layout_of_torchs(case: Case, target: Target, layout: str) -> None:
    guard = Guarded(Spec(layout, 400, 1, torch.float32, "alike"), target.device, torch.Generator())
    optimizer = build(case, target, [guard.param])
    guard.param.grad = torch.ones_like(guard.param)
    optimizer.step()
    for key, value in optimizer.state[guard.param].items():
        assert key in SCALARS or value.stride() == torch.zeros_like(guard.param).stride()


# Each rule, and Adam and SGD with fewer states. Other options of a case do not change how a kernel walks over a tensor.
@pytest.mark.slow
@pytest.mark.compiled
@on_every_target
@every([*ONE_EACH, ADAMW, BY_NAME["sgd-plain"]])
def test_sizes_around_the_chunk(case: Case, target: Target) -> None:
    """Sizes around vector widths and chunk boundaries in one step, aligned and off by one element."""
    if INTERPRETED and case is not AMSGRAD:
        pytest.skip("one case is enough in Triton's interpreter")
    near = [1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 31, 33, 127, 129, 1023, 1025, 4095, 4096, 4097, 8191, 8192, 8193]
    sizes = [3, 4096, 4097] if INTERPRETED else [*near, *range(3 * 4096 - 2, 3 * 4096 + 3)]
    for offset in (0, 1):
        generator = torch.Generator().manual_seed(offset)
        layouts = [Spec("flat", n, offset, torch.float32, "alike") for n in sizes]
        guards = [Guarded(spec, target.device, generator) for spec in layouts]
        optimizer = build(case, target, [guard.param for guard in guards], **case.known(eps=1e-3))
        for guard, spec in zip(guards, layouts, strict=True):
            guard.param.grad = gradient(guard, spec, generator)
        checked_step(optimizer, case.rule, 3.0)
        for guard in guards:
            guard.assert_nothing_around_moved()


@pytest.mark.compiled
@on_every_target
def test_conjugate_views(target: Target) -> None:
    """A lazy conjugate or negative view stores other values than it represents: the step must use its flag."""
    p = torch.nn.Parameter(torch.randn(50, dtype=torch.complex64, device=target.device))
    optimizer = build(AMSGRAD, target, [p])
    grad = torch.randn(50, dtype=torch.complex64, device=target.device)
    p.grad = grad.conj()
    assert p.grad.is_conj()
    checked_step(optimizer, AMSGRAD.rule, 4.0)
    q = torch.nn.Parameter(torch.randn(50, device=target.device))
    optimizer = build(AMSGRAD, target, [q])
    q.grad = torch.randn(50, dtype=torch.complex64, device=target.device).conj().imag
    assert q.grad.is_neg()
    checked_step(optimizer, AMSGRAD.rule, 4.0)


@on_every_target
def test_layout_changes_between_steps(target: Target) -> None:
    """First the gradient's strides change between steps, then the param's, so that those of the states no longer
    match."""
    p = torch.nn.Parameter(torch.randn(6, 8, device=target.device))
    optimizer = build(AMSGRAD, target, [p])
    for kind in ("alike", "reversed", "expanded", "unaligned", "alike"):
        p.grad = in_layout(torch.randn(6, 8, device=target.device), kind, p)
        checked_step(optimizer, AMSGRAD.rule, 4.0)
    p.data = p.data.t().contiguous().t()
    set_grads([p], [torch.randn(6, 8, device=target.device)])
    checked_step(optimizer, AMSGRAD.rule, 4.0)


@on_every_target
@pytest.mark.skipif(
    os.environ.get("FUSED_OPTIM_BIG") != "1", reason="needs 16 GB of memory on the device: set FUSED_OPTIM_BIG=1"
)
def test_more_than_two_to_the_31_elements(target: Target) -> None:
    """Offsets exceed 32 bits. The gradient is the param itself, which saves a quarter of the memory."""
    if INTERPRETED or target.backend == "reference":
        pytest.skip("the interpreter would take days, and plain PyTorch makes copies that do not fit in memory")
    n = 2**31 + 5000
    p = torch.nn.Parameter(torch.full((n,), 0.5, dtype=torch.bfloat16, device=target.device))
    places = torch.tensor([0, 1, 4096, 2**31 - 1, 2**31, 2**31 + 1, 2**31 + 4097, n - 1], device=target.device)
    small = torch.nn.Parameter(torch.arange(1, 9, device=target.device).to(torch.bfloat16))
    with torch.no_grad():
        p[places] = small
    p.grad, small.grad = p.detach(), small.detach().clone()
    build(ADAMW, target, [p]).step()
    build(ADAMW, target, [small]).step()
    assert_equal(p.detach()[places], small.detach())
    elsewhere = torch.nn.Parameter(torch.full((1,), 0.5, dtype=torch.bfloat16, device=target.device))
    elsewhere.grad = elsewhere.detach().clone()
    build(ADAMW, target, [elsewhere]).step()
    assert (p.detach() == elsewhere.detach()).sum().item() >= n - len(places)
