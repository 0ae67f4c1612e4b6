"""Schedules as pure functions of the step, and thin schedulers that write their values into an optimizer's groups:
1cycle with a long top and a final annihilation, and warm restarts with normalized weight decay (AdamWR, SGDWR)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from .adam import FusedAdamW
from .sgd import FusedSGDW

Strategy = Literal["linear", "cos"]


def anneal(start: float, end: float, fraction: float, strategy: Strategy = "linear") -> float:
    """What lies `fraction` (0 to 1) of the way from start to end; strategy: "linear", on a line, or "cos", on half a
    cosine wave."""
    if strategy == "cos":
        return end + (start - end) * 0.5 * (1 + math.cos(math.pi * fraction))
    return start + (end - start) * fraction


# ---- 1cycle


class Phases(NamedTuple):
    """The shares of a cycle that rise, top and fall take, each in [0, 1]; the annihilation takes what is left of 1.

    The defaults are those of the article's language models: 7.5, 37.5, 37.5 and 7.5 of 90 epochs. Without a top, (0.45,
    0, 0.45) is Smith's triangle with a tenth for the annihilation.
    """

    rise: float = 1 / 12
    top: float = 5 / 12
    fall: float = 5 / 12

    def place(self, step: int, total_steps: int) -> tuple[int, float]:
        """The phase of a step, 0 to 3, and the fraction of it that has passed; the last step, total_steps - 1, ends
        the cycle."""
        last = total_steps - 1
        start = 0.0
        for phase, share in enumerate(self):
            if step < start + share * last:
                return phase, (step - start) / (share * last)
            start += share * last
        return 3, 1.0 if step >= last else (step - start) / (last - start)


ARTICLE = Phases()


def one_cycle(
    step: int,
    total_steps: int,
    *,
    phases: Sequence[float] = ARTICLE,
    div_factor: float = 10.0,
    final_div_factor: float = 100.0,
    anneal_strategy: Strategy = "linear",
    final_strategy: Strategy = "linear",
) -> float:
    """The learning rate of a 1cycle, as a multiple of the largest: it rises from 1 / div_factor to 1, stays there,
    falls back to where it began, and is annihilated: down to 1 / (div_factor * final_div_factor).

    Args:
        step: number of updates so far, from 0; from total_steps - 1 on the value stays what it is there.
        total_steps: number of updates of the cycle.
        phases: shares of rise, top and fall, as Phases or three numbers.
        div_factor: largest learning rate over the first.
        final_div_factor: first learning rate over the last; math.inf ends at 0.
        anneal_strategy: shape of rise and fall, "linear" or "cos".
        final_strategy: shape of the annihilation.

    Sources: Smith, arXiv:1803.09820 and (with Topin) arXiv:1708.07120; the long top and the numbers: Gugger and Howard,
    "AdamW and Super-convergence is now the fastest way to train neural nets" (fast.ai, 2018), whose scripts divide by
    10, spend 1/12, 5/12, 5/12 and 1/12 of a language model's training in the four phases, and end either on a line at a
    hundredth of the first learning rate (images; the default here) or on a cosine at 0 (language:
    final_div_factor=math.inf, final_strategy="cos").
    """
    low = 1 / div_factor
    phase, fraction = Phases(*phases).place(step, total_steps)
    if phase == 3:
        return anneal(low, low / final_div_factor, fraction, final_strategy)
    start, end = ((low, 1.0), (1.0, 1.0), (1.0, low))[phase]
    return anneal(start, end, fraction, anneal_strategy)


def one_cycle_momentum(
    step: int,
    total_steps: int,
    *,
    phases: Sequence[float] = ARTICLE,
    base_momentum: float = 0.85,
    max_momentum: float = 0.95,
    anneal_strategy: Strategy = "linear",
) -> float:
    """The momentum of a 1cycle: down from max_momentum while the learning rate rises, base_momentum at the top, up
    while it falls, and max_momentum throughout the annihilation.

    Args as one_cycle's. Sources: Smith, arXiv:1803.09820, section 4.3; 0.95 and 0.85 are the article's for images (its
    language models take 0.8 and 0.7).
    """
    low, high = base_momentum, max_momentum
    phase, fraction = Phases(*phases).place(step, total_steps)
    start, end = ((high, low), (low, low), (low, high), (high, high))[phase]
    return anneal(start, end, fraction, anneal_strategy)


def _per_group(name: str, value: float | Sequence[float], optimizer: Optimizer) -> list[float]:
    groups = len(optimizer.param_groups)
    if not isinstance(value, list | tuple):
        return [value] * groups  # type: ignore[list-item]
    if len(value) != groups:
        raise ValueError(
            f"{name} must be a number or one number for each of the optimizer's {groups} param groups, "
            f"but got {len(value)} numbers"
        )
    return list(value)


class OneCycle(LRScheduler):
    """1cycle with a long constant top and a final annihilation, which torch's OneCycleLR does not have; called after
    every update.

    Cycles `momentum`, or the first of `betas` (the others stay as they are), of any torch optimizer. Its values are
    functions of `last_epoch` alone, so a loaded state_dict() goes on where it was saved. total_steps may also come as
    epochs * steps_per_epoch.

    Args:
        optimizer: its groups' lr, and momentum or betas, are overwritten at once.
        max_lr: largest learning rate, or one per group.
        total_steps, or epochs and steps_per_epoch: updates of the cycle.
        phases, div_factor, final_div_factor, anneal_strategy, final_strategy: as one_cycle's.
        cycle_momentum: whether to cycle momentum too.
        base_momentum, max_momentum: as one_cycle_momentum's, or one per group.
        last_epoch: number of updates done, or -1 for a new cycle.

    Raises:
        ValueError: a number is out of range, the group counts do not fit, a group has neither momentum nor betas while
            cycle_momentum is true, or step() is called more than total_steps times.

    Sources: see one_cycle.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        max_lr: float | Sequence[float],
        total_steps: int | None = None,
        *,
        epochs: int | None = None,
        steps_per_epoch: int | None = None,
        phases: Sequence[float] = ARTICLE,
        div_factor: float = 10.0,
        final_div_factor: float = 100.0,
        anneal_strategy: Strategy = "linear",
        final_strategy: Strategy = "linear",
        cycle_momentum: bool = True,
        base_momentum: float | Sequence[float] = 0.85,
        max_momentum: float | Sequence[float] = 0.95,
        last_epoch: int = -1,
    ) -> None:
        if total_steps is None:
            if epochs is None or steps_per_epoch is None:
                raise ValueError("OneCycle needs total_steps, or both epochs and steps_per_epoch")
            total_steps = epochs * steps_per_epoch
        if not isinstance(total_steps, int) or total_steps < 1:
            raise ValueError(f"the number of steps of a cycle must be a positive integer, but is {total_steps!r}")
        phases = Phases(*phases)
        if min(phases) < 0 or sum(phases) > 1 + 1e-9:
            raise ValueError(
                f"rise, top and fall must be shares of the cycle, none below 0 and together at most 1, but are {phases}"
            )
        for name, factor in (("div_factor", div_factor), ("final_div_factor", final_div_factor)):
            if not factor > 0:
                raise ValueError(f"{name} must be larger than 0, but is {factor}")
        for strategy in (anneal_strategy, final_strategy):
            if strategy not in ("linear", "cos"):
                raise ValueError(f'a strategy must be "linear" or "cos", but is {strategy!r}')
        if cycle_momentum and any("betas" not in g and "momentum" not in g for g in optimizer.param_groups):
            raise ValueError(
                f'{type(optimizer).__name__} has neither "momentum" nor "betas" to cycle; pass cycle_momentum=False'
            )
        self.total_steps = total_steps
        self.cycle_momentum = cycle_momentum
        self.max_lrs = _per_group("max_lr", max_lr, optimizer)
        self.base_momentums = _per_group("base_momentum", base_momentum, optimizer)
        self.max_momentums = _per_group("max_momentum", max_momentum, optimizer)
        # Plain types only: torch.load reads nothing else from a checkpoint unless it is told to trust it.
        self.shape: dict[str, Any] = {"phases": tuple(phases), "anneal_strategy": anneal_strategy}
        self.ends: dict[str, Any] = {"div_factor": div_factor, "final_div_factor": final_div_factor}
        self.ends["final_strategy"] = final_strategy
        if last_epoch == -1:
            for group, largest in zip(optimizer.param_groups, self.max_lrs, strict=True):
                group["initial_lr"] = largest / div_factor
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float | Tensor]:
        """The groups' learning rates at `last_epoch`; sets their momentum, as torch's OneCycleLR does here."""
        if self.last_epoch > self.total_steps:
            raise ValueError(
                f"a cycle of {self.total_steps} steps is over, but step() was called {self.last_epoch} times; "
                "make total_steps the number of all updates"
            )
        step, total = self.last_epoch, self.total_steps
        if self.cycle_momentum:
            ends = zip(self.base_momentums, self.max_momentums, strict=True)
            for group, (low, high) in zip(self.optimizer.param_groups, ends, strict=True):
                momentum = one_cycle_momentum(step, total, base_momentum=low, max_momentum=high, **self.shape)
                _set_momentum(group, momentum)
        factor = one_cycle(step, total, **self.shape, **self.ends)
        return [largest * factor for largest in self.max_lrs]


def _set_momentum(group: dict[str, Any], momentum: float) -> None:
    if "betas" not in group:
        group["momentum"] = momentum
    elif isinstance(group["betas"][0], Tensor):
        group["betas"][0].fill_(momentum)
    else:
        group["betas"] = (momentum, *group["betas"][1:])


# ---- warm restarts


class Period(NamedTuple):
    """One run between two restarts: its number, from 0, its start and its length."""

    number: int
    start: int
    length: int


def restart_period(step: int, T_0: int, T_mult: int = 2) -> Period:
    """The period that a step lies in: the first takes T_0, each next one T_mult times the last."""
    if T_mult == 1:
        return Period(step // T_0, step - step % T_0, T_0)
    number, start, length = 0, 0, T_0
    while step >= start + length:
        number, start, length = number + 1, start + length, length * T_mult
    return Period(number, start, length)


def cosine_restarts(step: int, T_0: int, T_mult: int = 2) -> float:
    """The multiplier of a cosine with warm restarts: (1 + cos(pi T_cur / T_i)) / 2, from 1 down to nearly 0 in each
    period, and 1 again at the next one's first step.

    Args:
        step: number of updates so far, from 0.
        T_0: length of the first period, in updates.
        T_mult: each period's length over the last one's, an integer from 1.

    Source: Loshchilov and Hutter, arXiv:1608.03983, equation 5; arXiv:1711.05101, equation 15.
    """
    _, start, length = restart_period(step, T_0, T_mult)
    return 0.5 * (1 + math.cos(math.pi * (step - start) / length))


def normalized_decay(wd_norm: float, batches_per_epoch: int, epochs: float) -> float:
    """The weight decay wd_norm * sqrt(1 / (batches_per_epoch * epochs)): the longer the period, the weaker each of its
    steps (arXiv:1711.05101, appendix B.1, where batches_per_epoch is B / b)."""
    return wd_norm * math.sqrt(1 / (batches_per_epoch * epochs))


class WarmRestarts(LRScheduler):
    """Cosine learning rate with warm restarts and normalized weight decay; called after every update (batch).

    At each restart the decay is normalized anew: groups with a "decay_period" (this package's decay="normalized") get
    the period's number of updates there; other optimizers' "weight_decay" is set where wd_norm is given, and their own
    convention (torch's multiplies it by lr) holds. All values are functions of `last_epoch` alone, so a loaded
    state_dict() goes on where it was saved.

    Args:
        optimizer: its groups' lr are where every period starts from.
        T_0: epochs of the first period, an integer from 1.
        T_mult: each period's epochs over the last one's, an integer from 1.
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
                'wd_norm is for optimizers that do not normalize; these groups have a "decay_period" and do it '
                "themselves, so set their weight_decay to the normalized decay and leave wd_norm out"
            )
        self.T_0, self.T_mult, self.eta_min = T_0, T_mult, eta_min
        self.batches_per_epoch = batches_per_epoch
        self.wd_norm = None if wd_norm is None else _per_group("wd_norm", wd_norm, optimizer)
        super().__init__(optimizer, last_epoch)

    @property
    def period(self) -> Period:
        """The current period, in epochs."""
        first = self.T_0 * self.batches_per_epoch
        number, start, length = restart_period(self.last_epoch, first, self.T_mult)
        return Period(number, start // self.batches_per_epoch, length // self.batches_per_epoch)

    def get_lr(self) -> list[float | Tensor]:
        """The groups' learning rates at `last_epoch`; sets the period or the weight decay of the groups."""
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
        weight_decay: the normalized one, multiplied by sqrt(1 / (batches_per_epoch * epochs of the period)).
        T_0, T_mult, eta_min: as WarmRestarts'.
        lr, betas, eps, options: as FusedAdamW's.

    Source: Loshchilov and Hutter, arXiv:1711.05101 ("Decoupled Weight Decay Regularization"): lr 0.001 (section 4.3),
    T_0 = 100 and T_mult = 2 (appendix C; B.2 advises 1 % to 10 % of the expected budget for T_0), weight_decay 0.025
    (appendix D finds 0.025 and 0.05 best; the authors' example command takes 0.025), eta_min 0 (equation 15), betas and
    eps Adam's.
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

    The learning rate multiplies the momentum buffer, as in torch and in the authors' code; the paper's algorithm 1
    multiplies the gradient before it enters the buffer, which is the same only while lr is constant.

    Args:
        params: as FusedSGDW's.
        batches_per_epoch, weight_decay, T_0, T_mult, eta_min: as adamwr's.
        lr, momentum, nesterov, options: as FusedSGDW's.

    Sources: Loshchilov and Hutter, arXiv:1711.05101, for weight_decay, T_0, T_mult and eta_min as in adamwr; lr 0.05
    from their example command for SGDW, the learning rate of all restarted runs of arXiv:1608.03983 too (whose best
    ones took T_0 = 10, T_mult = 2); momentum 0.9 without Nesterov as both programs of the authors run, though
    arXiv:1608.03983 speaks of Nesterov's.
    """
    normalized: dict[str, Any] = {"decay": "normalized", "decay_period": batches_per_epoch * T_0}
    optimizer = FusedSGDW(params, lr, momentum, 0, weight_decay, nesterov, **normalized, **options)
    return optimizer, WarmRestarts(optimizer, T_0, T_mult, eta_min, batches_per_epoch=batches_per_epoch)
