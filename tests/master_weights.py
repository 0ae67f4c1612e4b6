"""Optimizers with master weights beside optimizers of float32 params."""

from __future__ import annotations

from typing import Any

import torch
from cases import (
    Case,
    Target,
    build,
    copies,
    parameters,
    random_grads,
    set_grads,
)
from compare import assert_equal
from torch import nn

LOW = "param_low"
BF16 = torch.bfloat16


def lowered(case: Case, target: Target, params: list[nn.Parameter], **kwargs: Any) -> Any:
    """An optimizer of bfloat16 params whose masters are these numbers."""
    ours = build(case, target, copies(params), **kwargs)
    ours.lower_params()
    return ours


def side_by_side(ours: Any, wide: Any, steps: int, seed: int = 0) -> None:
    """Steps an optimizer with masters and one of float32 params with the same bfloat16 gradients."""
    for step in range(steps):
        grads = random_grads(parameters(wide), seed + step, BF16)
        set_grads(parameters(ours), grads)
        set_grads(parameters(wide), [grad.float() for grad in grads])
        ours.step()
        wide.step()


def assert_same_path(ours: Any, wide: Any) -> None:
    """Params and states, to the bit."""
    assert_equal(ours.master_params(), [p.detach() for p in parameters(wide)])
    for low, high in zip(parameters(ours), parameters(wide), strict=True):
        assert low.dtype == BF16
        assert_equal({k: v for k, v in ours.state[low].items() if k != LOW}, wide.state[high])
