"""Checks of hyperparameters for the classes without a counterpart in torch. Where torch has an error for the same
fault, the wording is torch's."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor


def check_adam_like(
    lr: float | Tensor, betas: Sequence[float], weight_decay: float, eps: float = 0.0, count: int = 2
) -> None:
    """Raises ValueError for a hyperparameter out of range."""
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError("Tensor lr must be 1-element")
    if not lr >= 0.0:
        raise ValueError(f"Invalid learning rate: {lr}")
    if not eps >= 0.0:
        raise ValueError(f"Invalid epsilon value: {eps}")
    if len(betas) != count:
        raise ValueError(f"betas must be {count} numbers, but got {betas!r}")
    for index, beta in enumerate(betas):
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"Invalid beta parameter at index {index}: {beta}")
    if not weight_decay >= 0.0:
        raise ValueError(f"Invalid weight_decay value: {weight_decay}")


def check_not_negative(**options: float | None) -> None:
    """Raises ValueError unless every option is None or 0 or more."""
    for name, value in options.items():
        if value is not None and not value >= 0.0:
            raise ValueError(f"{name} must be 0 or more, but got {value}")


def check_nus(nus: Sequence[float]) -> None:
    """Raises ValueError unless nus are two finite numbers."""
    if len(nus) != 2:
        raise ValueError(f"nus must be two numbers, but got {nus!r}")
    for index, nu in enumerate(nus):
        if not math.isfinite(nu):
            raise ValueError(f"Invalid nu parameter at index {index}: {nu}")


def check_trust_clip(trust_clip: Sequence[float] | None) -> None:
    """Raises ValueError unless the bounds are None or two numbers with 0 <= lowest <= highest."""
    if trust_clip is not None and not (len(trust_clip) == 2 and 0.0 <= trust_clip[0] <= trust_clip[1]):
        raise ValueError(f"trust_clip must be (lowest, highest) with 0 <= lowest <= highest, but got {trust_clip!r}")
