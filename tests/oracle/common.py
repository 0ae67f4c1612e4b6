"""What the formulas share: float64 values, bias corrections, weight decay."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

State = dict[str, Tensor]
Rule = Callable[..., tuple[Tensor, State]]
Pair = tuple[float | Tensor, float | Tensor]


@dataclass
class Slot:
    """One tensor and its states, in float64. stored: the real dtype in which the optimizer stores the states."""

    param: Tensor
    state: State = field(default_factory=dict)
    stored: torch.dtype = torch.float64


def as_real(x: Tensor) -> Tensor:
    """A float64 copy. A complex tensor of shape [...] becomes [..., 2]."""
    x = x.detach()
    return (torch.view_as_real(x.resolve_conj()) if x.is_complex() else x).to(torch.float64).cpu().clone()


def scalar(x: Any) -> float:
    return float(x)


def correction(beta: float, step: Tensor) -> float:
    """1 - beta**step, without a loss of digits if beta is near 1."""
    return -math.expm1(step.item() * math.log(beta)) if beta else 1.0


def next_step(state: State) -> Tensor:
    return state.get("step", torch.zeros((), dtype=torch.float64)) + 1


def shrinkage(rate: float, weight_decay: float, lr_reference: float | None, decay_period: float | None) -> float:
    """The factor of decoupled decay. Without lr_reference it is torch's, 1 - lr * weight_decay. With lr_reference it is
    the paper's (arXiv:1711.05101, algorithm 2: eta_t is the schedule alone). decay_period normalizes it (appendix B.1).
    """
    if lr_reference is None:
        return 1 - rate * weight_decay
    schedule = rate / lr_reference if lr_reference != 0 else 0.0
    return 1 - schedule * weight_decay / math.sqrt(1 if decay_period is None else decay_period)


def larger_lr(rate: float, before: Tensor | None) -> Tensor:
    """The largest lr so far. It is stored as float32, which rounds it: an lr that rounds to it is as large."""
    new = torch.tensor(rate, dtype=torch.float64)
    return new if before is None or new.float() >= before else before


def with_correction(state: State, hyper: dict[str, Any]) -> tuple[dict[str, Any], State]:
    """The options with the decay of this step where it is corrected (arXiv:2506.02285), and the state this needs."""
    if not hyper.get("corrected_decay"):
        return hyper, {}
    largest = larger_lr(scalar(hyper["lr"]), state.get("lr_max"))
    share = scalar(hyper["lr"]) / largest.item() if largest != 0 else 1.0
    return {**hyper, "weight_decay": hyper["weight_decay"] * share}, {"lr_max": largest}


def agreeing(param: Tensor, update: Tensor, cautious: bool) -> Tensor:
    """1 where cautious decay (arXiv:2510.12402) decays: where param and update have the same sign."""
    return (param * update >= 0).to(param.dtype) if cautious else torch.ones_like(param)


def with_decay(update: Rule) -> Rule:
    """Adds weight decay, lr and maximize to an update. L2 is added to the gradient. Decoupled decay shrinks the param
    before the update is subtracted."""

    @functools.wraps(update)
    def rule(param: Tensor, grad: Tensor, state: State, **hyper: Any) -> tuple[Tensor, State]:
        rate, weight_decay = scalar(hyper["lr"]), scalar(hyper["weight_decay"])
        if hyper["maximize"]:
            grad = -grad
        if weight_decay != 0:
            if hyper.get("decoupled_weight_decay") or hyper.get("decouple_weight_decay"):
                kept = shrinkage(rate, weight_decay, hyper.get("lr_reference"), hyper.get("decay_period"))
                if hyper.get("cautious_decay"):  # arXiv:2510.12402, algorithm 1: where update and param agree in sign
                    kept = 1 - (1 - kept) * agreeing(param, update(grad, state, **hyper)[0], True)
                param = param * kept
            else:
                grad = grad + weight_decay * param
        change, new = update(grad, state, **hyper)
        return (param if rate == 0 else param - rate * change), new

    return rule
