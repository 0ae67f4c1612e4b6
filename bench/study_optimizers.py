"""The optimizers of the study, the start points of the search for their lr and decay, and the schedules."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ConstantLR, LRScheduler, MultiStepLR, OneCycleLR

from fused_optim import FusedAdam, FusedAdamW, FusedLAMB, FusedQHAdamW, FusedSGDW
from fused_optim.schedules import WarmRestarts

Groups = list[dict[str, Any]]


@dataclass(frozen=True)
class Contender:
    """An optimizer of the study.

    decay: start point of the search. lr: start points by kind of task. momentum: smallest and largest value that 1cycle
    gives to betas[0] or momentum. torch_class: torch's own class, with the arguments torch_options; None if torch has
    none.
    """

    name: str
    make: Callable[[Groups, float], Optimizer]
    decay: float
    lr: dict[str, float]
    schedule: str = "1cycle"
    momentum: tuple[float, float] = (0.85, 0.95)
    torch_class: Callable[..., Optimizer] | None = None
    torch_options: dict[str, Any] = field(default_factory=dict)

    def peers(self, params: list[Tensor], lr: float, decay: float) -> dict[str, Optimizer]:
        """torch's own class, in its default and in its fused implementation."""
        if self.torch_class is None:
            return {}
        options = {**self.torch_options, "lr": lr, "weight_decay": decay}
        return {
            "torch": self.torch_class(params, **options),
            "torch fused": self.torch_class(params, fused=True, **options),
        }


# The start points are round numbers near peak lrs of 1cycle that are known to work for nets of this size.
ADAM = {"images": 1e-2, "finetune": 1e-2, "language": 3e-2}
SGD = {"images": 1e-1, "finetune": 3e-1, "language": 10.0}
LAMB = {"images": 3e-2, "finetune": 3e-2, "language": 3e-2}

CONTENDERS = {
    contender.name: contender
    for contender in (
        Contender(
            "Adam",
            lambda groups, decay: FusedAdam(groups, weight_decay=decay),
            1e-4,
            ADAM,
            torch_class=torch.optim.Adam,
        ),
        Contender(
            "Adam amsgrad",
            lambda groups, decay: FusedAdam(groups, weight_decay=decay, amsgrad=True),
            1e-4,
            ADAM,
            torch_class=torch.optim.Adam,
            torch_options={"amsgrad": True},
        ),
        Contender(
            "AdamW",
            lambda groups, decay: FusedAdamW(groups, weight_decay=decay),
            1e-1,
            ADAM,
            torch_class=torch.optim.AdamW,
        ),
        Contender(
            "AdamW amsgrad",
            lambda groups, decay: FusedAdamW(groups, weight_decay=decay, amsgrad=True),
            1e-1,
            ADAM,
            torch_class=torch.optim.AdamW,
            torch_options={"amsgrad": True},
        ),
        Contender(
            "SGDW",
            lambda groups, decay: FusedSGDW(groups, momentum=0.9, weight_decay=decay, decay="paper"),
            1e-3,
            SGD,
        ),
        Contender(
            "AdamWR",
            lambda groups, decay: FusedAdamW(groups, weight_decay=decay, decay="normalized", decay_period=1),
            1e-2,
            ADAM,
            schedule="restarts",
            torch_class=torch.optim.AdamW,
        ),
        Contender(
            "QHAdamW",
            lambda groups, decay: FusedQHAdamW(groups, weight_decay=decay, betas=(0.9, 0.999), nus=(0.7, 1.0)),
            1e-1,
            ADAM,
            momentum=(0.95, 0.995),
        ),
        Contender(
            "LAMB",
            lambda groups, decay: FusedLAMB(groups, weight_decay=decay),
            1e-2,
            LAMB,
        ),
    )
}


def scheduler_for(
    schedule: str,
    optimizer: Optimizer,
    contender: Contender,
    epochs: int,
    batches: int,
    restart: int,
) -> LRScheduler:
    """The scheduler, to be stepped after every batch.

    "1cycle": torch's OneCycleLR. "restarts": cosine from each group's lr; the first period has `restart` epochs, and
    each further one is twice as long. "step": a tenth of the lr after one half and again after three quarters.
    "constant": the lr does not change.

    Raises:
        ValueError: the schedule is none of these.
    """
    total = epochs * batches
    if schedule == "1cycle":
        peaks = [float(group["lr"]) for group in optimizer.param_groups]
        least, most = contender.momentum
        return OneCycleLR(optimizer, peaks, total_steps=total, base_momentum=least, max_momentum=most)
    if schedule == "restarts":
        return WarmRestarts(optimizer, restart, batches_per_epoch=batches)
    if schedule == "step":
        return MultiStepLR(optimizer, [math.ceil(total / 2), math.ceil(total * 3 / 4)], gamma=0.1)
    if schedule == "constant":
        return ConstantLR(optimizer, factor=1.0)
    raise ValueError(f"The schedule must be 1cycle, restarts, step or constant, but got {schedule!r}")


class Clock:
    """Times the optimizer and torch's own class in the same training.

    At every EVERY-th step torch's class also steps, on copies of the params with the same gradients. They take turns in
    going first, so that none always finds the gradients in cache. The copies do not affect the model.
    """

    EVERY = 4

    def __init__(self, optimizer: Optimizer, contender: Contender | None, lr: float, decay: float) -> None:
        self.optimizer = optimizer
        self.params = [param for group in optimizer.param_groups for param in group["params"]]
        self.steps: list[tuple[str, list[Tensor], Callable[[], Any]]] = [("ours", [], optimizer.step)]
        self.count = 0
        self.step_ms: dict[str, list[float]] = {}
        self.whole_ms: list[float] = []
        if contender is not None:
            copies = [[param.detach().clone().requires_grad_() for param in self.params] for _ in range(2)]
            for number, name in enumerate(contender.peers(copies[0], lr, decay)):
                twins = copies[number]
                self.steps.append((name, twins, contender.peers(twins, lr, decay)[name].step))

    @property
    def compares(self) -> bool:
        """Whether all optimizers take the next step. The duration of such a training step is not recorded."""
        return self.count % self.EVERY == self.EVERY - 1

    def step(self) -> None:
        if not self.compares:
            self.optimizer.step()
        else:
            turn = self.count // self.EVERY % len(self.steps)
            for name, twins, step in self.steps[turn:] + self.steps[:turn]:
                for twin, param in zip(twins, self.params, strict=bool(twins)):
                    twin.grad = param.grad
                self.step_ms.setdefault(name, []).append(milliseconds(step, self.params[0].device))
        self.count += 1

    def summary(self) -> dict[str, float]:
        """Medians in milliseconds: "whole" is the training step; the other keys name the optimizers' steps. The first
        tenth is left out, because states are created and caches fill there."""
        measured = {"whole": self.whole_ms, **self.step_ms}
        return {name: median(times[math.ceil(len(times) / 10) :] or times) for name, times in measured.items() if times}


def milliseconds(work: Callable[[], Any], device: torch.device) -> float:
    synchronize(device)
    begin = time.perf_counter()
    work()
    synchronize(device)
    return 1e3 * (time.perf_counter() - begin)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
