"""The reference that the tests compare with: each optimizer in float64 and plain PyTorch, written from its paper.

Nothing is derived or imported from the implementation. Complex tensors are pairs of reals. Each optimizer is a function
of one tensor; `step` applies it to a list of tensors. It accepts the param_groups of an optimizer: a rule reads the
options that it knows and ignores the others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

# Star imports: a new rule needs no line here.
from .adaptive import *  # noqa: F403
from .common import Rule, Slot, as_real, with_correction
from .common import correction as correction
from .momentum import *  # noqa: F403
from .two_walks import *  # noqa: F403
from .two_walks import lamb

Hypers = Sequence[dict[str, Any]]


def grad_norm(grads: Sequence[Tensor | None], hypers: Hypers) -> dict[str, float]:
    """The norm of all gradients whose groups are clipped."""
    clipped = [g for g, hyper in zip(grads, hypers, strict=True) if g is not None and hyper["max_grad_norm"]]
    return {"grad_norm": math.sqrt(sum(g.square().sum().item() for g in clipped))}


# Further keyword arguments of a rule, computed from all gradients of a step.
OF_ALL: dict[Rule, Callable[[Sequence[Tensor | None], Hypers], dict[str, Any]]] = {lamb: grad_norm}


def step(
    rule: Rule,
    slots: Sequence[Slot],
    grads: Sequence[Tensor | None],
    hypers: Hypers,
    grad_scale: float = 1.0,
    found_inf: float = 0.0,
) -> list[Slot]:
    """One optimizer step over a list of tensors. hypers: the options of each tensor's group.

    Gradients are divided by grad_scale. A tensor without a gradient does not change, and neither does its step count.
    If found_inf is not 0, no tensor changes.
    """
    if found_inf != 0:
        return [Slot(slot.param, dict(slot.state), slot.stored) for slot in slots]
    unscaled = [None if grad is None else as_real(grad) / grad_scale for grad in grads]
    shared = OF_ALL[rule](unscaled, hypers) if rule in OF_ALL else {}
    result = []
    for slot, grad, hyper in zip(slots, unscaled, hypers, strict=True):
        if grad is None:
            result.append(Slot(slot.param, dict(slot.state), slot.stored))
        else:
            options, kept = with_correction(slot.state, hyper)
            param, state = rule(slot.param, grad, slot.state, **options, **shared, stored=slot.stored)
            result.append(Slot(param, state | kept, slot.stored))
    return result
