"""The 1cycle schedule with a long constant top and a final phase that takes the learning rate to nearly 0."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from .groups import per_group

Strategy = Literal["linear", "cos"]


def anneal(start: float, end: float, fraction: float, strategy: Strategy = "linear") -> float:
    """The value at `fraction` (0 to 1) between start and end.

    Args:
        start, end: the values at 0 and 1.
        fraction: position between them.
        strategy: "linear", or "cos" for half a cosine wave.
    """
    if strategy == "cos":
        return end + (start - end) * 0.5 * (1 + math.cos(math.pi * fraction))
    return start + (end - start) * fraction


class Phases(NamedTuple):
    """Shares of a cycle, each in [0, 1]. The final phase, the annihilation, takes the rest.

    The defaults are those of the language models in the fast.ai article (see one_cycle): 7.5, 37.5, 37.5 and 7.5 of 90
    epochs. (0.45, 0, 0.45) is Smith's triangle: it has no top, and a tenth is left for the annihilation.

    Attributes:
        rise: share in which the learning rate rises.
        top: share in which it is constant.
        fall: share in which it falls.
    """

    rise: float = 1 / 12
    top: float = 5 / 12
    fall: float = 5 / 12

    def place(self, step: int, total_steps: int) -> tuple[int, float]:
        """The phase of a step, 0 to 3, and the fraction of the phase that has passed. Step total_steps - 1 ends the
        cycle."""
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
    """The learning rate of a 1cycle as a multiple of the largest one. It rises from 1 / div_factor to 1, is constant,
    falls to 1 / div_factor, and in the annihilation to 1 / (div_factor * final_div_factor).

    Args:
        step: number of updates so far, from 0. From total_steps - 1 on the value is constant.
        total_steps: number of updates of the cycle.
        phases: shares of rise, top and fall, as Phases or three numbers.
        div_factor: ratio of the largest learning rate to the first.
        final_div_factor: ratio of the first learning rate to the last; math.inf ends at 0.
        anneal_strategy: shape of rise and fall, "linear" or "cos".
        final_strategy: shape of the annihilation.

    Sources: Smith, arXiv:1803.09820; Smith and Topin, arXiv:1708.07120. The long top and the numbers are those of
    Gugger and Howard, "AdamW and Super-convergence is now the fastest way to train neural nets" (fast.ai, 2018). Their
    scripts divide by 10 and give 1/12, 5/12, 5/12 and 1/12 of a language model's training to the four phases. For
    images they end linearly at a hundredth of the first learning rate, the default here. For language models they end
    on a cosine at 0: final_div_factor=math.inf, final_strategy="cos".
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
    """The momentum of a 1cycle. It falls from max_momentum while the learning rate rises, is base_momentum at the top,
    rises while the learning rate falls, and is max_momentum in the annihilation.

    Args:
        step, total_steps, phases, anneal_strategy: as one_cycle's.
        base_momentum: the lowest momentum.
        max_momentum: the highest momentum.

    Sources: Smith, arXiv:1803.09820, section 4.3. The fast.ai article (see one_cycle) takes 0.95 and 0.85 for images,
    0.8 and 0.7 for language models.
    """
    low, high = base_momentum, max_momentum
    phase, fraction = Phases(*phases).place(step, total_steps)
    start, end = ((high, low), (low, low), (low, high), (high, high))[phase]
    return anneal(start, end, fraction, anneal_strategy)


class OneCycle(LRScheduler):
    """1cycle scheduler with a long constant top and a final annihilation, which torch's OneCycleLR does not have. Call
    step() after every update.

    Works with any torch optimizer. It also cycles `momentum`, or the first of `betas`. All values are functions of
    `last_epoch` alone, so training that loads its state_dict() continues exactly.

    Args:
        optimizer: the constructor already overwrites the lr, and the momentum or betas, of its groups.
        max_lr: largest learning rate, or one per group.
        total_steps: number of updates of the cycle.
        epochs, steps_per_epoch: in place of total_steps, which is their product.
        phases, div_factor, final_div_factor, anneal_strategy, final_strategy: as one_cycle's.
        cycle_momentum: whether to cycle momentum too.
        base_momentum, max_momentum: as one_cycle_momentum's, or one per group.
        last_epoch: number of updates done, or -1 for a new cycle.

    Raises:
        ValueError: a number is out of range, the length of a list is not the number of groups, a group has neither
            momentum nor betas although cycle_momentum is true, or step() is called more than total_steps times.

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
        self.max_lrs = per_group("max_lr", max_lr, optimizer)
        self.base_momentums = per_group("base_momentum", base_momentum, optimizer)
        self.max_momentums = per_group("max_momentum", max_momentum, optimizer)
        # Plain types only: torch.load with weights_only=True, its default, refuses classes such as Phases.
        self.shape: dict[str, Any] = {"phases": tuple(phases), "anneal_strategy": anneal_strategy}
        self.ends: dict[str, Any] = {"div_factor": div_factor, "final_div_factor": final_div_factor}
        self.ends["final_strategy"] = final_strategy
        if last_epoch == -1:
            for group, largest in zip(optimizer.param_groups, self.max_lrs, strict=True):
                group["initial_lr"] = largest / div_factor
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float | Tensor]:
        """The groups' learning rates at `last_epoch`. Also sets their momentum, as torch's OneCycleLR does."""
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
