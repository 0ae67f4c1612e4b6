"""The scaling of gradients in a step: GradScaler's scale, a plain divisor, clipping by the norm of all gradients, and
skipping of steps with non-finite gradients. All of it is computed on the device. Only copies to the host wait for it,
which are needed if tensors are on several devices."""

from __future__ import annotations

import ctypes
import math
import pickle
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .backend import Scaling, Tables
from .dtensor import device_for, is_sharded, largest_over, reduce_over
from .table import Table

UNSCALED = Scaling()
SQUARES = "last_grad_squares"  # key in a checkpoint


def largest_square(table: Table) -> Tensor:
    """The square of the largest magnitude among the clipped gradients: float64 [1]. NaN if a gradient that is checked
    but not clipped (its bound is below 0) is not finite."""
    bounds = table.hparams.column("max_norm").tolist()
    rows = [(row.grad, bounds[row.group_index]) for row in table.rows_list]
    found = [torch.zeros((), dtype=torch.float64, device=table.device)]
    for counts in (True, False):
        grads = [grad for grad, bound in rows if grad is not None and bound and (bound > 0) == counts]
        norms = torch._foreach_norm([grad for grad in grads if grad.numel()], math.inf) if grads else []
        if norms:
            largest = torch.stack([norm.double() for norm in norms]).amax()
            found.append(largest if counts else largest * 0.0)
    return torch.stack(found).amax().square().reshape(1)


def _moved(number: Tensor, device: torch.device) -> Tensor:
    if number.device == device:  # `to` takes a microsecond even if it has nothing to do
        return number
    return number.to(device, non_blocking=device.type != "cpu")  # the host reads its copy at once


class Shared:
    """A value that copies of its owner share, because it cannot be copied. If it cannot be pickled either, the error
    calls it `name`."""

    def __init__(self, value: Any, name: str) -> None:
        self.value = value
        self.name = name

    def __deepcopy__(self, memo: dict[int, Any]) -> Shared:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        try:
            pickle.dumps(self.value)
        except Exception as error:
            raise pickle.PicklingError(
                f"this optimizer cannot be pickled, because its {self.name}, {self.value!r}, cannot be pickled "
                f"({error}); save state_dict() instead, or use a {self.name} that can be pickled"
            ) from error
        return type(self), (self.value, self.name)


class Scaler:
    """The norm, the clipping and the skipping of one optimizer.

    skipped: number of steps that were skipped because a gradient was not finite, here or for GradScaler: int64 [].
    """

    def __init__(self, norm_type: float = 2.0, skip_nonfinite: bool = False, norm_group: Any = None) -> None:
        self.norm_type = norm_type
        self._group = Shared(norm_group, "norm_group")
        self.skip_nonfinite = skip_nonfinite
        self.skipped = torch.zeros((), dtype=torch.int64, device="cpu")
        self._last: tuple[Tensor, Tensor | None] | None = None  # squares and scale of the last step

    @property
    def norm_group(self) -> Any:
        return self._group.value

    @property
    def norm(self) -> Tensor | None:
        """The norm of the last step's gradients, after unscaling: float32 [], on the first param's device. None before
        the first such step."""
        if self._last is None:
            return None
        squares, scale = self._last
        norm = squares.sqrt().reshape(())
        return (norm if scale is None else norm / scale).float()

    @property
    def last_squares(self) -> Tensor | None:
        """The square of `norm`: float64 [1]."""
        if self._last is None:
            return None
        squares, scale = self._last
        return squares.reshape(1) if scale is None else squares.reshape(1) / scale.double().square()

    def set_last_squares(self, squares: Tensor) -> None:
        self._last = squares.detach().double().reshape(1), None

    def set_skipped(self, count: Any) -> None:
        """Sets the count in place, because captured graphs write to its tensor."""
        self.skipped.copy_(torch.as_tensor(count))

    def looks_at(self, groups: Sequence[dict[str, Any]]) -> bool:
        """Whether a step computes the norm of all gradients before the update."""
        return self.skip_nonfinite or self._clips(groups)

    def bound_without_key(self, groups: Sequence[dict[str, Any]]) -> float:
        """The bound for a group without max_grad_norm, see layout.py."""
        if not self.skip_nonfinite:
            return 0.0
        return -1.0 if self._clips(groups) else math.inf

    @staticmethod
    def _clips(groups: Sequence[dict[str, Any]]) -> bool:
        return any(group.get("max_grad_norm") for group in groups)

    def __call__(self, tables: Tables, looks: bool, scales: Sequence[Any], found_inf: Tensor | None) -> list[Scaling]:
        """One Scaling per table.

        looks: the result of looks_at.
        scales: numbers, one-element tensors or None; gradients are divided by all of them.
        """
        given = [scale for scale in scales if scale is not None]
        real = [bound for bound in tables if not bound.table.is_meta]
        waited_for = looks and self.norm_group is not None  # other processes wait, even if this one has no tables
        if not (real or waited_for) or not (looks or given or found_inf is not None):
            return [UNSCALED] * len(tables)
        with torch.no_grad():
            home = real[0].table.device if real else device_for(self.norm_group)
            scale = self._product(given, home)
            if found_inf is not None:
                found_inf = _moved(found_inf, home).float()
            squares = None
            if looks:
                squares = self._squares(real, home)
                # A clone, because GradScaler changes its tensor in place after the step.
                self._last = squares, None if scale is None else scale.clone()
            if self.skip_nonfinite and squares is not None:
                bad = (~self._is_finite(squares, scale, real)).float()
                found_inf = bad if found_inf is None else bad + found_inf
                self.skipped = self.skipped.to(home)
                self.skipped += (found_inf != 0).reshape(())  # in place, because captured graphs write to it
            numbers = (scale, found_inf, squares)
            return [
                UNSCALED
                if bound.table.is_meta
                else Scaling(*(number if number is None else _moved(number, bound.table.device) for number in numbers))
                for bound in tables
            ]

    @staticmethod
    def _product(scales: Sequence[Any], home: torch.device) -> Tensor | None:
        product = None
        for scale in scales:
            if isinstance(scale, Tensor):
                factor = _moved(scale, home).float().reshape(())
            else:  # filled on the device: a copy from the host would wait for it and could not be captured
                number = ctypes.c_float(scale).value  # inf if out of range, where torch.full would raise
                factor = torch.full((), number, dtype=torch.float32, device=home)
            product = factor if product is None else product * factor
        return product

    @staticmethod
    def _is_finite(squares: Tensor, scale: Tensor | None, tables: Tables) -> Tensor:
        """Whether rules get finite gradients. Rules multiply each gradient by 1 / scale in their own precision. So this
        factor must be finite and not 0 (the factor of an infinite scale), and the scaled norm must be in the range of
        the dtype."""
        if scale is None:
            return squares.isfinite()
        wide = tables and all(bound.table.is_wide for bound in tables)
        dtype = torch.float64 if wide else torch.float32
        factor = scale.double().reciprocal()
        norm = squares.sqrt() * factor
        return squares.isfinite() & norm.to(dtype).isfinite() & factor.to(dtype).isfinite() & (factor != 0)

    def _squares(self, tables: Tables, home: torch.device) -> Tensor:
        sums = self.norm_type == 2
        over = reduce_over if sums else largest_over
        squares = []
        for bound in tables:
            if not sums:
                squares.append(largest_square(bound.table))
            elif bound.table.squares is not None:
                bound.sum_squares(bound.table.squares)
                squares.append(bound.table.squares)
        squares = over(squares, [bound.table.process_groups for bound in tables])
        if self.norm_group is not None:
            spread = [is_sharded(bound.table.rows_list[0].param) for bound in tables]
            plain = [square for square, it_is in zip(squares, spread, strict=True) if not it_is]
            rest = [square for square, it_is in zip(squares, spread, strict=True) if it_is]
            squares = rest + over([self._together(plain, home)], [(self.norm_group,)])
        return self._together(squares, home)

    def _together(self, squares: Sequence[Tensor], home: torch.device) -> Tensor:
        if not squares:
            return torch.zeros(1, dtype=torch.float64, device=home)
        if len(squares) == 1:
            return squares[0]
        both = torch.stack([_moved(square, home) for square in squares])
        return both.sum(0) if self.norm_type == 2 else both.amax(0)


class BucketScaler:
    """The scaling of gradients where params are stepped in buckets, each as soon as it has its gradients.

    The norm of all gradients is not known yet then. A bucket is clipped by the larger of two norms: that of the whole
    last step, and that of the buckets of this step so far, its own gradients included. With skip_nonfinite a bucket
    with non-finite gradients is skipped alone and is in no norm. The step counts as skipped then.

    squares: of the buckets of this step so far, float64 [1]. scale: what the gradients of this step are divided by.
    skips: whether a bucket of this step was skipped, float32 [1].
    """

    def __init__(self, scaler: Scaler) -> None:
        self.scaler = scaler
        self.squares: Tensor | None = None
        self.scale: Tensor | None = None
        self.skips: Tensor | None = None

    @torch.no_grad()
    def __call__(self, tables: Tables, looks: bool, grad_scale: Any) -> list[Scaling]:
        """One Scaling per table of the bucket. looks, grad_scale: see Scaler."""
        scaler = self.scaler
        real = [bound for bound in tables if not bound.table.is_meta]
        if not real or not (looks or grad_scale is not None):
            return [UNSCALED] * len(tables)
        home = real[0].table.device
        scale = None if grad_scale is None else scaler._product([grad_scale], home)
        found_inf = bound = None
        if looks:
            own = scaler._squares(real, home)
            before = torch.zeros_like(own) if self.squares is None else _moved(self.squares, home)
            seen = scaler._together([before, own], home)
            if scaler.skip_nonfinite:
                bad = ~scaler._is_finite(own, scale, real)
                seen, found_inf = torch.where(bad, before, seen), bad.float()
                self.skips = found_inf if self.skips is None else _moved(self.skips, home).maximum(found_inf)
            self.squares, self.scale = seen, scale
            bound = seen.maximum(self._last_squares(scale, home))
        numbers = (scale, found_inf, bound)
        return [
            UNSCALED
            if table.table.is_meta
            else Scaling(*(number if number is None else _moved(number, table.table.device) for number in numbers))
            for table in tables
        ]

    def _last_squares(self, scale: Tensor | None, home: torch.device) -> Tensor:
        """Those of the last step, as if its gradients had had the scale of this one. 0 if they were not finite."""
        squares = self.scaler.last_squares
        if squares is None:
            return torch.zeros(1, dtype=torch.float64, device=home)
        squares = _moved(squares, home)
        if scale is not None:
            squares = squares * scale.double().square()
        return torch.where(squares.isfinite(), squares, 0.0)

    def end(self) -> None:
        """Ends the step: its norm becomes that of the last step."""
        if self.squares is not None:
            self.scaler._last = self.squares, None if self.scale is None else self.scale.clone()
        if self.skips is not None:
            self.scaler.skipped = self.scaler.skipped.to(self.skips.device)
            self.scaler.skipped += (self.skips != 0).reshape(())
        self.squares = self.scale = self.skips = None
