"""SGD, Lion and Schedule-Free."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .common import Pair, State, correction, larger_lr, next_step, scalar, with_decay


@with_decay
def sgd(
    grad: Tensor, state: State, *, momentum: float | Tensor, dampening: float, nesterov: bool, **_: Any
) -> tuple[Tensor, State]:
    """SGD as torch.optim.SGD documents it: the first buffer is the gradient, undamped; SGDW (arXiv:1711.05101)."""
    mu = scalar(momentum)
    if mu == 0:
        return grad, dict(state)
    buffer = mu * state["momentum_buffer"] + (1 - dampening) * grad if "momentum_buffer" in state else grad
    return grad + mu * buffer if nesterov else buffer, {"momentum_buffer": buffer}


@with_decay
def lion(grad: Tensor, state: State, *, betas: Pair, **_: Any) -> tuple[Tensor, State]:
    """Lion (arXiv:2302.06675, algorithm 2)."""
    beta1, beta2 = scalar(betas[0]), scalar(betas[1])
    exp_avg = state.get("exp_avg", torch.zeros_like(grad))
    direction = (beta1 * exp_avg + (1 - beta1) * grad).sign()
    return direction, {"exp_avg": beta2 * exp_avg + (1 - beta2) * grad}


def schedule_free(
    param: Tensor,
    grad: Tensor,
    state: State,
    *,
    adam: bool,
    lr: float | Tensor,
    weight_decay: float,
    warmup_steps: int,
    r: float,
    weight_lr_power: float,
    maximize: bool,
    **hyper: Any,
) -> tuple[Tensor, State]:
    """Schedule-Free (arXiv:2405.15682, algorithm 1 for AdamW, equations 1 to 3 for SGD) with the average x made of y,
    which is the param, and z."""
    beta = scalar(hyper["betas"][0] if adam else hyper["momentum"])
    step = next_step(state)
    t, y, z = step.item(), param, state.get("z", param)
    beta_x = y - (1 - beta) * z
    rate = scalar(lr) * (min(1.0, t / warmup_steps) if warmup_steps else 1.0)
    new = {"step": step, "lr_max": larger_lr(rate, state.get("lr_max"))}
    weight = t**r * new["lr_max"].item() ** weight_lr_power
    new["weight_sum"] = state.get("weight_sum", torch.zeros_like(step)) + weight
    update = -grad if maximize else grad
    if adam:
        beta2 = scalar(hyper["betas"][1])
        new["exp_avg_sq"] = beta2 * state.get("exp_avg_sq", torch.zeros_like(grad)) + (1 - beta2) * grad**2
        update = update / ((new["exp_avg_sq"] / correction(beta2, step)).sqrt() + hyper["eps"])
    new["z"] = z - rate * (update + weight_decay * y)
    share = weight / new["weight_sum"].item() if new["weight_sum"] != 0 else 0.0
    beta_x = (1 - share) * beta_x + beta * share * new["z"]
    return (1 - beta) * new["z"] + beta_x, new


def schedule_free_adamw(param: Tensor, grad: Tensor, state: State, **hyper: Any) -> tuple[Tensor, State]:
    return schedule_free(param, grad, state, adam=True, **hyper)


def schedule_free_sgd(param: Tensor, grad: Tensor, state: State, **hyper: Any) -> tuple[Tensor, State]:
    return schedule_free(param, grad, state, adam=False, **hyper)
