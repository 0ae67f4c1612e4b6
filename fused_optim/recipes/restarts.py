"""Warm restarts with normalized weight decay: AdamWR, SGDWR."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ..optim.adam import FusedAdamW
from ..optim.sgd import FusedSGDW
from .groups import per_group


class Period(NamedTuple):
    """The steps between two restarts.

    Attributes:
        number: index of the period, from 0.
        start: its first step.
        length: its number of steps.
    """

    number: int
    start: int
    length: int


def restart_period(step: int, T_0: int, T_mult: int = 2) -> Period:
    """The period of a step. The first period has length T_0, each next one T_mult times the length of the one
    before."""
    if T_mult == 1:
        return Period(step // T_0, step - step % T_0, T_0)
    number, start, length = 0, 0, T_0
    while step >= start + length:
        number, start, length = number + 1, start + length, length * T_mult
    return Period(number, start, length)


def cosine_restarts(step: int, T_0: int, T_mult: int = 2) -> float:
    """The factor of a cosine with warm restarts: (1 + cos(pi T_cur / T_i)) / 2. It falls from 1 to nearly 0 in each
    period and is 1 again at the first step of the next one.

    Args:
        step: number of updates so far, from 0.
        T_0: length of the first period, in updates.
        T_mult: ratio of the lengths of two consecutive periods, an integer from 1.

    Source: Loshchilov and Hutter, arXiv:1608.03983, equation 5; arXiv:1711.05101, equation 15.
    """
    _, start, length = restart_period(step, T_0, T_mult)
    return 0.5 * (1 + math.cos(math.pi * (step - start) / length))


def normalized_decay(wd_norm: float, batches_per_epoch: int, epochs: float) -> float:
    """The weight decay wd_norm * sqrt(1 / (batches_per_epoch * epochs)): the longer the period, the weaker the decay of
    a step.

    Source: arXiv:1711.05101, appendix B.1, where batches_per_epoch is B / b.
    """
    return wd_norm * math.sqrt(1 / (batches_per_epoch * epochs))


class WarmRestarts(LRScheduler):
    """Scheduler: cosine learning rate with warm restarts and normalized weight decay. Call step() after every update.

    Each restart normalizes the decay for its period. Groups with a "decay_period" (decay="normalized" of this package)
    get the number of updates of the period. For other optimizers, wd_norm sets "weight_decay"; the optimizer applies it
    by its own convention, which in torch multiplies it by lr. All values are functions of `last_epoch` alone, so
    training that loads its state_dict() continues exactly.

    Args:
        optimizer: the lr of its groups is the learning rate at the start of every period.
        T_0: epochs of the first period, an integer from 1.
        T_mult: ratio of the epochs of two consecutive periods, an integer from 1.
        eta_min: learning rate at the end of every period.
        batches_per_epoch: updates in one epoch.
        wd_norm: normalized weight decay of all groups, or one number per group (0 for groups that do not decay); None
            leaves weight_decay alone.
        last_epoch: number of updates done, or -1 for a new run.

    Raises:
        ValueError: a number is out of range, or wd_norm is given for groups that have a decay_period.

    Sources: Loshchilov and Hutter, arXiv:1608.03983 and arXiv:1711.05101.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        T_0: int,
        T_mult: int = 2,
        eta_min: float = 0.0,
        *,
        batches_per_epoch: int,
        wd_norm: float | Sequence[float] | None = None,
        last_epoch: int = -1,
    ) -> None:
        for name, number in (("T_0", T_0), ("T_mult", T_mult), ("batches_per_epoch", batches_per_epoch)):
            if not isinstance(number, int) or number < 1:
                raise ValueError(f"{name} must be an integer from 1, but is {number!r}")
        if wd_norm is not None and any("decay_period" in group for group in optimizer.param_groups):
            raise ValueError(
                'wd_norm is for optimizers without normalized decay, but these groups have a "decay_period" and '
                "normalize it themselves; set their weight_decay to the normalized decay and leave wd_norm out"
            )
        self.T_0, self.T_mult, self.eta_min = T_0, T_mult, eta_min
        self.batches_per_epoch = batches_per_epoch
        self.wd_norm = None if wd_norm is None else per_group("wd_norm", wd_norm, optimizer)
        super().__init__(optimizer, last_epoch)

    @property
    def period(self) -> Period:
        """The current period, in epochs."""
        first = self.T_0 * self.batches_per_epoch
        number, start, length = restart_period(self.last_epoch, first, self.T_mult)
        return Period(number, start // self.batches_per_epoch, length // self.batches_per_epoch)

    def get_lr(self) -> list[float | Tensor]:
        """The groups' learning rates at `last_epoch`. Also sets the decay period or the weight decay of the groups."""
        epochs = self.period.length
        for number, group in enumerate(self.optimizer.param_groups):
            if "decay_period" in group:
                group["decay_period"] = self.batches_per_epoch * epochs
            elif self.wd_norm is not None:
                group["weight_decay"] = normalized_decay(self.wd_norm[number], self.batches_per_epoch, epochs)
        factor = cosine_restarts(self.last_epoch, self.T_0 * self.batches_per_epoch, self.T_mult)
        return [self.eta_min + (base - self.eta_min) * factor for base in self.base_lrs]


def adamwr(
    params: Any,
    *,
    batches_per_epoch: int,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.025,
    T_0: int = 100,
    T_mult: int = 2,
    eta_min: float = 0.0,
    **options: Any,
) -> tuple[FusedAdamW, WarmRestarts]:
    """AdamWR: AdamW with normalized weight decay and warm restarts. Returns the optimizer and its scheduler; call
    scheduler.step() after every optimizer.step().

    Args:
        params: as FusedAdamW's.
        batches_per_epoch: updates in one epoch, len(loader).
        weight_decay: normalized weight decay. It is multiplied by sqrt(1 / (batches_per_epoch * epochs of the period)).
        T_0, T_mult, eta_min: as WarmRestarts'.
        lr, betas, eps, options: as FusedAdamW's.

    Source: Loshchilov and Hutter, "Decoupled Weight Decay Regularization", arXiv:1711.05101. lr 0.001: section 4.3.
    T_0 = 100 and T_mult = 2: appendix C (B.2 advises 1 % to 10 % of the expected budget for T_0). weight_decay 0.025:
    appendix D finds 0.025 and 0.05 best, and the authors' example command has 0.025. eta_min 0: equation 15. betas and
    eps are Adam's.
    """
    normalized: dict[str, Any] = {"decay": "normalized", "decay_period": batches_per_epoch * T_0}
    optimizer = FusedAdamW(params, lr, betas, eps, weight_decay, **normalized, **options)
    return optimizer, WarmRestarts(optimizer, T_0, T_mult, eta_min, batches_per_epoch=batches_per_epoch)


def sgdwr(
    params: Any,
    *,
    batches_per_epoch: int,
    lr: float = 0.05,
    momentum: float = 0.9,
    weight_decay: float = 0.025,
    nesterov: bool = False,
    T_0: int = 100,
    T_mult: int = 2,
    eta_min: float = 0.0,
    **options: Any,
) -> tuple[FusedSGDW, WarmRestarts]:
    """SGDWR: SGDW with normalized weight decay and warm restarts. Returns the optimizer and its scheduler; call
    scheduler.step() after every optimizer.step().

    The learning rate multiplies the momentum buffer, as in torch and in the authors' code. The paper's algorithm 1
    multiplies the gradient before it enters the buffer, which is the same only if lr is constant.

    Args:
        params: as FusedSGDW's.
        batches_per_epoch, weight_decay, T_0, T_mult, eta_min: as adamwr's.
        lr, momentum, nesterov, options: as FusedSGDW's.

    Sources: Loshchilov and Hutter, arXiv:1711.05101. weight_decay, T_0, T_mult and eta_min as in adamwr. lr 0.05: their
    example command for SGDW, and all restarted runs of arXiv:1608.03983 (the best of which had T_0 = 10, T_mult = 2).
    momentum 0.9 without Nesterov: both programs of the authors, although arXiv:1608.03983 names Nesterov's.
    """
    normalized: dict[str, Any] = {"decay": "normalized", "decay_period": batches_per_epoch * T_0}
    optimizer = FusedSGDW(params, lr, momentum, 0, weight_decay, nesterov, **normalized, **options)
    return optimizer, WarmRestarts(optimizer, T_0, T_mult, eta_min, batches_per_epoch=batches_per_epoch)
