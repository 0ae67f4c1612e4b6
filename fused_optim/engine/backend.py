"""What the engine asks of a backend: `Backend`, which the classes in fused_optim/backends implement."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor
from typing_extensions import Self

from .table import Table


@dataclass(frozen=True)
class Scaling:
    """What changes from step to step, a number each on the table's device: float32 grad_scale and found_inf, and
    float64 `squares`, the sum of the squares of all gradients, where they are to be clipped."""

    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None
    squares: Tensor | None = None


class Backend(Protocol):
    """One way to step a table. An instance is bound to one table for as long as that table is used.

    name: the value of the option `backend` that chooses it.
    compiles: whether kernels are compiled or loaded at their first launch on a GPU, which may fail (see trial.py).
    reads_tensors: whether gradients are read as tensors, through table.rows_list, and not by their addresses in
        table.grads.
    captured: whether a CUDA graph reads the table at every replay.
    """

    name: ClassVar[str]
    compiles: ClassVar[bool] = False
    reads_tensors: ClassVar[bool] = False
    captured: bool = False
    table: Table

    def __init__(self, table: Table) -> None:
        self.table = table

    @classmethod
    def bind(cls, table: Table) -> Self:
        return cls(table)

    @staticmethod
    @abstractmethod
    def why_not(device: torch.device | None) -> str | None:
        """None where it can step tensors of that device (None: of any device), else the reason."""

    def upload(self, changes: int) -> None:
        """Brings over what has changed since the last step (see changes.py)."""

    @abstractmethod
    def sum_squares(self, out: Tensor) -> None:
        """Writes the sum of the squares of all gradients that are clipped; float64 [1]."""

    @abstractmethod
    def step(self, scaling: Scaling) -> None:
        """The whole step of the table; of a rule with a trust ratio the first walk, which updates the moments."""

    @abstractmethod
    def apply_update(self) -> None:
        """The second walk of a rule with a trust ratio, which updates the params. Nothing for other rules."""

    @abstractmethod
    def scale_grads(self, squares: Tensor) -> None:
        """Multiplies every gradient in place by what clips its group to its bound. Gradients within their bound are not
        written. squares: the sum over all tables of what sum_squares wrote."""

    def release(self) -> None:
        """No CUDA graph reads the table any longer."""


Tables = Sequence[Backend]
