"""Shared by the EMA tests: an optimizer that keeps an average of the weights."""

from __future__ import annotations

from typing import Any

import torch
from cases import ADAMW, Case, Target, build, make_params

SHAPES = [(3, 5), (), (0,), (4500,), (7, 1, 9)]
DECAY, WEIGHT = 0.9, 1 - 0.9
REFERENCE = Target("reference", "cpu")


def make(target: Target, case: Case = ADAMW, dtype: torch.dtype = torch.float32, **kwargs: Any) -> Any:
    params = make_params(SHAPES, dtype, target.device)
    return build(case, target, params, **{"ema_decay": DECAY, **kwargs})
