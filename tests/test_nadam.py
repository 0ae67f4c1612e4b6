"""NAdam and RAdam beside torch's classes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import Target, copies, make_params, on_every_target, quick, train
from compare import assert_like_torch

from fused_optim import FusedNAdam, FusedRAdam

SHAPES = [(5, 3), (), (0,), (40,)]
PAIRS = {"nadam": (FusedNAdam, torch.optim.NAdam), "radam": (FusedRAdam, torch.optim.RAdam)}
OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("nadam", {}),
    ("nadam", {"weight_decay": 0.1, "maximize": True}),
    ("nadam", {"weight_decay": 0.1, "decoupled_weight_decay": True, "momentum_decay": 0.0}),
    ("nadam", {"betas": (0.0, 0.9), "eps": 1e-3, "momentum_decay": 1.0}),
    ("nadam", {"betas": (0.99, 0.5), "eps": 1e-3}),
    ("radam", {}),
    ("radam", {"weight_decay": 0.1, "maximize": True, "betas": (0.5, 0.95)}),
    ("radam", {"weight_decay": 0.1, "decoupled_weight_decay": True, "eps": 1e-3}),
    ("radam", {"betas": (0.9, 0.6)}),  # never divides by the root
]


@on_every_target
@pytest.mark.parametrize(("name", "options"), OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64], ids=str)
def test_a_hundred_steps_are_torchs(target: Target, name: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    """RAdam turns from plain to rectified updates on the way, by default at the sixth."""
    params = make_params(SHAPES, dtype, target.device)
    ours, theirs = PAIRS[name]
    other = theirs(copies(params), foreach=False, **options)
    mine = ours(params, backend=target.backend, **options)
    train([mine, other], quick(target, 100, 7))
    wide = dtype == torch.float64
    # torch computes the rectification of RAdam from a difference that loses digits, as beta2 is near 1.
    rtol = (1e-9 if name == "radam" else 1e-12) if wide else 1e-5
    assert_like_torch(mine, other, rtol=rtol, atol=rtol / 10)


@on_every_target
def test_lr_of_a_schedule_and_of_a_tensor(target: Target) -> None:
    """momentum_decay and the count of updates go on while lr changes."""
    for ours, theirs in PAIRS.values():
        params = make_params(SHAPES, device=target.device)
        mine = ours(params, lr=torch.tensor(0.01, device=target.device), backend=target.backend)
        other = theirs(copies(params), lr=0.01, foreach=False)
        for step in range(quick(target, 10, 2)):
            mine.param_groups[0]["lr"].fill_(0.01 / (1 + step))
            other.param_groups[0]["lr"] = 0.01 / (1 + step)
            train([mine, other], 1, seed=step)
        for p, q in zip(params, other.param_groups[0]["params"], strict=True):
            torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-5, atol=1e-6)
