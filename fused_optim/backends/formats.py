"""Formats in plain PyTorch: the only loads and stores of values in the reference backend."""

from __future__ import annotations

import torch
from torch import Tensor

from ..engine import formats
from ..engine.table import Row


def real_view(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def load(tensor: Tensor) -> Tensor:
    """The values, as reals of at least float32; shares memory where nothing has to change."""
    real = real_view(tensor.resolve_conj())
    return real if real.dtype == torch.float64 else real.float()


def store(tensor: Tensor, values: Tensor) -> None:
    """Rounds to nearest even. Unlike `load` it takes no conjugate views."""
    real_view(tensor).copy_(values)


def load_param(row: Row) -> Tensor:
    """As the rule sees it: its master where it has one."""
    return load(row.target) if row.low is None else formats.join(row.target, row.low)


def store_param(row: Row, values: Tensor) -> None:
    if row.low is None:
        store(row.target, values)
        return
    upper, lower = formats.split(values)
    row.target.copy_(upper)
    row.low.copy_(lower)
