"""The interface between engine and backends: `Backend`, which the classes in fused_optim/backends implement."""

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
    """The inputs of a step that change at every step. Each is one number on the table's device, or None.

    grad_scale: float32; gradients are divided by it. found_inf: float32; the step is skipped if it is not 0. squares:
    float64, the sum of the squares of all gradients; None: gradients are not clipped.
    """

    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None
    squares: Tensor | None = None


class Backend(Protocol):
    """One way to step a table. An instance is bound to one table for as long as that table is used.

    name: the value of the option `backend` that chooses it.
    compiles: whether the first launch on a GPU compiles or loads kernels. That can fail (see trial.py).
    reads_tensors: whether gradients are read as tensors, through table.rows_list, and not by their addresses in
        table.grads.
    captured: whether a captured CUDA graph reads the table.
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
        """The reason why the backend cannot step tensors on this device, or None if it can. device None: asks whether
        it runs at all."""

    def upload(self, changes: int) -> None:
        """Copies what has changed since the last step to the table's device. changes: flags of changes.py."""

    @abstractmethod
    def sum_squares(self, out: Tensor) -> None:
        """Writes the sum of the squares of all gradients that are clipped to out, float64 [1]. Gradients of groups with
        max_norm < 0 add 0, or NaN if they are not finite."""

    @abstractmethod
    def step(self, scaling: Scaling) -> None:
        """The whole step of the table. For a rule with a trust ratio it is the first walk, which updates the
        moments."""

    @abstractmethod
    def apply_update(self) -> None:
        """The second walk of a rule with a trust ratio, which updates the params. Does nothing for other rules."""

    @abstractmethod
    def scale_grads(self, squares: Tensor) -> None:
        """Multiplies every gradient in place by the clip coefficient of its group. Gradients with a coefficient of 1
        are not written. squares: the sum of what sum_squares wrote for all tables."""

    def release(self) -> None:
        """Called when no CUDA graph reads the table any more."""


Tables = Sequence[Backend]
