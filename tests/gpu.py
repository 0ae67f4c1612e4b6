"""Shared by the tests that need a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fused_optim import FusedAdamW, FusedLAMB, FusedLion, FusedQHAdam, FusedSGD, backends

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
SHAPES = [(1000, 1000), (7,), (), (4096,), (33, 129), (0,), (3, 5, 7)]
FAMILY: list[tuple[Any, dict[str, Any]]] = [
    (FusedAdamW, {}),
    (FusedAdamW, {"max_grad_norm": 0.5, "skip_nonfinite": True, "ema_decay": 0.9}),
    (FusedSGD, {"momentum": 0.9, "max_grad_norm": 0.5}),
    (FusedQHAdam, {"nus": (0.7, 0.9)}),
    (FusedLAMB, {"ema_decay": 0.9}),
    (FusedLion, {"skip_nonfinite": True}),
    (FusedAdamW, {"amsgrad": True, "ema_decay": 0.9}),
]
for_the_family = pytest.mark.parametrize(("build", "options"), FAMILY, ids=lambda x: getattr(x, "__name__", None))
on_gpu_backends = pytest.mark.parametrize("backend", ["triton", "cuda"])


def require(backend: str) -> None:
    reason = backends.BACKENDS[backend].why_not(torch.device("cuda"))
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")


def params(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)
    made = [torch.randn(shape, device="cuda", generator=generator).to(dtype) for shape in SHAPES]
    return [param.requires_grad_() for param in made]


def set_grads(*lists: list[Tensor], seed: int) -> None:
    generator = torch.Generator("cuda").manual_seed(seed)
    for same in zip(*lists, strict=True):
        grad = torch.randn(same[0].shape, device="cuda", generator=generator)
        for param in same:
            param.grad = grad.to(param.dtype).clone()
