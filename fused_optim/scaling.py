"""What a step multiplies the gradients by, and whether it takes place at all: GradScaler, a plain divisor, clipping by
the norm of all gradients, skipping where they are not finite. All on the device: nothing here waits for it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .backends import Backend, Scaling
from .table import MAX_NORM, Table

UNSCALED = Scaling()
Tables = Sequence[tuple[Table, Backend]]


def check_options(max_grad_norm: float | None, norm_type: float) -> None:
    """Raises ValueError for bounds that bound nothing, and norms that nobody computes."""
    if max_grad_norm is not None and not max_grad_norm >= 0.0:
        raise ValueError(f"max_grad_norm must be 0 or more, or None for no clipping, but got {max_grad_norm}")
    if norm_type not in (2, math.inf):
        raise ValueError(f"norm_type must be 2 or inf, but got {norm_type}")


def largest_square(tables: Tables, home: torch.device) -> Tensor:
    """The square of the largest magnitude among the gradients that are clipped: float64 [1]. NaN where one of those
    that are only looked at is not finite."""
    found = []
    for table, _ in tables:
        bounds = table.scalars.raw[:, MAX_NORM].tolist()
        rows = [(row.param.grad, bounds[row.group]) for row in table.rows_list]
        for counts in (True, False):
            grads = [grad for grad, bound in rows if grad is not None and bound and (bound > 0) == counts]
            norms = torch._foreach_norm([grad for grad in grads if grad.numel()], math.inf) if grads else []
            if norms:
                largest = torch.stack([norm.double() for norm in norms]).amax().to(home, non_blocking=True)
                found.append(largest if counts else largest * 0.0)
    return torch.stack(found).amax().square().reshape(1) if found else torch.zeros(1, dtype=torch.float64, device=home)


class Scaler:
    """Norm, clipping and skipping of one optimizer.

    norm: of the last step's gradients, after unscaling: float32 [], on the first param's device; None before.
    skipped: how many steps were skipped because a gradient was not finite or GradScaler had found one: int64 [].
    """

    def __init__(self, norm_type: float = 2.0, skip_nonfinite: bool = False) -> None:
        self.norm_type = norm_type
        self.skip_nonfinite = skip_nonfinite
        self.norm: Tensor | None = None
        self.skipped = torch.zeros((), dtype=torch.int64)

    def looks_at(self, groups: Sequence[dict[str, Any]]) -> bool:
        return self.skip_nonfinite or self._clips(groups)

    def bound_without_key(self, groups: Sequence[dict[str, Any]]) -> float:
        """What stands for max_grad_norm in a group that has none, see csrc/tables.h."""
        if not self.skip_nonfinite:
            return 0.0
        return -1.0 if self._clips(groups) else math.inf

    @staticmethod
    def _clips(groups: Sequence[dict[str, Any]]) -> bool:
        return any(group.get("max_grad_norm") for group in groups)

    @torch.no_grad()
    def __call__(self, tables: Tables, looks: bool, scales: Sequence[Any], found_inf: Tensor | None) -> list[Scaling]:
        """One Scaling per table. scales: numbers, one-element tensors or None; gradients are divided by all of them."""
        given = [scale for scale in scales if scale is not None]
        if not looks and not given and found_inf is None:
            return [UNSCALED] * len(tables)
        home = tables[0][0].device if tables else torch.device("cpu")
        scale = None
        for factor in given:
            factor = torch.as_tensor(factor, dtype=torch.float32).to(home, non_blocking=True)
            scale = factor if scale is None else scale * factor
        if found_inf is not None:
            found_inf = found_inf.to(home, torch.float32, non_blocking=True)
        squares = self._squares(tables, home) if looks and tables else None
        if squares is not None:
            norm = squares.sqrt().reshape(())
            self.norm = (norm if scale is None else norm / scale.reshape(())).float()
            if self.skip_nonfinite:
                bad = (~squares.isfinite()).float()
                found_inf = bad if found_inf is None else bad + found_inf
                self.skipped = self.skipped.to(home) + (found_inf != 0).reshape(())
        numbers = (scale, found_inf, squares)
        return [
            Scaling(*(None if x is None else x.to(table.device, non_blocking=True) for x in numbers))
            for table, _ in tables
        ]

    def _squares(self, tables: Tables, home: torch.device) -> Tensor:
        if self.norm_type != 2:
            return largest_square(tables, home)
        for table, backend in tables:
            backend.squares(table, table.squares)
        first, *others = [table.squares for table, _ in tables]
        return sum((other.to(home, non_blocking=True) for other in others), start=first)
