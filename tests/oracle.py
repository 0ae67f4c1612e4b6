"""The truth the tests compare with: each optimizer in float64, plain PyTorch, straight from its paper.

Nothing here is derived from the implementation, and nothing of it is imported. Complex tensors are pairs of reals.
One function per optimizer works on one tensor; `step` applies it to a list. An optimizer's param_groups can be handed
in as they are: a rule picks the hyperparameters it knows and ignores the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

State = dict[str, Tensor]
Rule = Callable[..., tuple[Tensor, State]]


@dataclass
class Slot:
    """One tensor and its optimizer state, all float64."""

    param: Tensor
    state: State = field(default_factory=dict)


def as_real(x: Tensor) -> Tensor:
    """A float64 copy of x; complex x of shape [...] becomes [..., 2]."""
    x = x.detach()
    return (torch.view_as_real(x.resolve_conj()) if x.is_complex() else x).to(torch.float64).cpu().clone()


def scalar(x: Any) -> float:
    return float(x)


def adam(
    param: Tensor,
    grad: Tensor,
    state: State,
    *,
    lr: float | Tensor,
    betas: tuple[float | Tensor, float | Tensor],
    eps: float,
    weight_decay: float,
    amsgrad: bool,
    maximize: bool,
    decoupled_weight_decay: bool,
    **_: Any,
) -> tuple[Tensor, State]:
    """Adam (arXiv:1412.6980), AdamW (arXiv:1711.05101), AMSGrad (Reddi et al., ICLR 2018; before bias correction)."""
    rate, beta1, beta2 = scalar(lr), scalar(betas[0]), scalar(betas[1])
    zeros = torch.zeros_like(param)
    step = state.get("step", torch.zeros((), dtype=torch.float64)) + 1
    exp_avg, exp_avg_sq = state.get("exp_avg", zeros), state.get("exp_avg_sq", zeros)
    if maximize:
        grad = -grad
    if weight_decay != 0:
        if decoupled_weight_decay:
            param = param * (1 - rate * weight_decay)
        else:
            grad = grad + weight_decay * param
    new = {
        "step": step,
        "exp_avg": beta1 * exp_avg + (1 - beta1) * grad,
        "exp_avg_sq": beta2 * exp_avg_sq + (1 - beta2) * grad**2,
    }
    second_moment = new["exp_avg_sq"]
    if amsgrad:
        second_moment = torch.maximum(state.get("max_exp_avg_sq", exp_avg_sq), second_moment)
        new["max_exp_avg_sq"] = second_moment
    elif "max_exp_avg_sq" in state:
        new["max_exp_avg_sq"] = state["max_exp_avg_sq"]
    exp_avg_hat = new["exp_avg"] / (1 - beta1 ** step.item())
    second_moment_hat = second_moment / (1 - beta2 ** step.item())
    if rate == 0:
        return param, new
    return param - rate * exp_avg_hat / (second_moment_hat.sqrt() + eps), new


def step(
    rule: Rule,
    slots: Sequence[Slot],
    grads: Sequence[Tensor | None],
    hypers: Sequence[dict[str, Any]],
    grad_scale: float = 1.0,
    found_inf: float = 0.0,
) -> list[Slot]:
    """One optimizer step over a list of tensors, each with the hyperparameters of its own group.

    A tensor without a gradient keeps its param, its state and its step count, and so do all when found_inf is not 0.
    Gradients are divided by grad_scale.
    """
    if found_inf != 0:
        return [Slot(slot.param, dict(slot.state)) for slot in slots]
    result = []
    for slot, grad, hyper in zip(slots, grads, hypers, strict=True):
        if grad is None:
            result.append(Slot(slot.param, dict(slot.state)))
        else:
            result.append(Slot(*rule(slot.param, as_real(grad) / grad_scale, slot.state, **hyper)))
    return result
