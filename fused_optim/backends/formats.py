"""Formats in plain PyTorch: the only loads and stores of values in the reference backend."""

from __future__ import annotations

import torch
from torch import Tensor


def real_view(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def load(tensor: Tensor) -> Tensor:
    """The values, as reals of at least float32; shares memory where nothing has to change."""
    real = real_view(tensor.resolve_conj())
    return real if real.dtype == torch.float64 else real.float()


def store(tensor: Tensor, values: Tensor) -> None:
    """Rounds to nearest even. Unlike `load` it takes no conjugate views."""
    real_view(tensor).copy_(values)
