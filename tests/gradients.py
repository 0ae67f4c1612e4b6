"""Gradients for the clipping tests, and the expected results."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from cases import Target, make_params, random_grads, set_grads
from torch import Tensor

SHAPES = [(3, 5), (), (0,), (5000,), (7, 1, 9)]


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Removes torch's clip_grad_norm_, so that ours cannot delegate to it."""
    monkeypatch.delattr(torch.nn.utils, "clip_grad_norm_")


def holding(grads: Sequence[Tensor | None]) -> list[Tensor]:
    """Params whose .grad are these tensors themselves, not copies."""
    params = []
    for grad in grads:
        params.append(torch.zeros(()) if grad is None else torch.empty_like(grad, requires_grad=True))
        params[-1].grad = grad
    return params


def random_params(target: Target, dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    params = make_params(SHAPES, dtype, target.device)
    set_grads(params, random_grads(params, 0))
    return params


def grads_of(params: Sequence[Tensor]) -> list[Tensor]:
    return [p.grad.clone() for p in params if p.grad is not None]


def whole_numbers(shape: Sequence[int], dtype: torch.dtype, device: str, seed: int = 0) -> Tensor:
    """Integers: every sum of their squares is exact, so the order of summation does not matter."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-64, 65, tuple(shape), generator=generator).to(device, dtype)


def clipped(grads: Sequence[Tensor], max_norm: float) -> list[Tensor]:
    """torch's formula in float64. The coefficient is rounded once, and the result once more."""
    reals = [torch.view_as_real(g) if g.is_complex() else g for g in grads]
    norm = math.sqrt(sum(x.double().square().sum().item() for x in reals))
    scaled = [(x if x.dtype == torch.float64 else x.float()) * min(1.0, max_norm / (norm + 1e-6)) for x in reals]
    rounded = [x.to(real.dtype) for x, real in zip(scaled, reals, strict=True)]
    return [torch.view_as_complex(x) if g.is_complex() else x for x, g in zip(rounded, grads, strict=True)]


def assert_bits(ours: Sequence[Tensor], wanted: Sequence[Tensor]) -> None:
    for x, y in zip(ours, wanted, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)
