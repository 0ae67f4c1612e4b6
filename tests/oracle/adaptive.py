"""Optimizers with an average of squared gradients, or their sum."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .common import Pair, State, agreeing, correction, next_step, scalar, shrinkage, with_decay


@with_decay
def adam(grad: Tensor, state: State, *, betas: Pair, eps: float, amsgrad: bool, **_: Any) -> tuple[Tensor, State]:
    """Adam (arXiv:1412.6980), AdamW (arXiv:1711.05101), AMSGrad (Reddi et al., ICLR 2018; before bias correction)."""
    beta1, beta2 = scalar(betas[0]), scalar(betas[1])
    zeros = torch.zeros_like(grad)
    step = next_step(state)
    exp_avg, exp_avg_sq = state.get("exp_avg", zeros), state.get("exp_avg_sq", zeros)
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
    exp_avg_hat = new["exp_avg"] / correction(beta1, step)
    second_moment_hat = second_moment / correction(beta2, step)
    return exp_avg_hat / (second_moment_hat.sqrt() + eps), new


@with_decay
def qhadam(grad: Tensor, state: State, *, betas: Pair, nus: Pair, eps: float, **_: Any) -> tuple[Tensor, State]:
    """QHAdam (arXiv:1810.06801, section 4.2), with averages that start at zero and are corrected when they are read."""
    beta1, beta2 = scalar(betas[0]), scalar(betas[1])
    zeros = torch.zeros_like(grad)
    step = next_step(state)
    new = {
        "step": step,
        "exp_avg": beta1 * state.get("exp_avg", zeros) + (1 - beta1) * grad,
        "exp_avg_sq": beta2 * state.get("exp_avg_sq", zeros) + (1 - beta2) * grad**2,
    }
    mean = nus[0] * new["exp_avg"] / correction(beta1, step) + (1 - nus[0]) * grad
    square = nus[1] * new["exp_avg_sq"] / correction(beta2, step) + (1 - nus[1]) * grad**2
    return mean / (square.sqrt() + eps), new


@with_decay
def adagrad(grad: Tensor, state: State, *, lr_decay: float, eps: float, **hyper: Any) -> tuple[Tensor, State]:
    """Adagrad (Duchi, Hazan and Singer, JMLR 2011) as torch.optim.Adagrad documents it."""
    step = next_step(state)
    total = state.get("sum", torch.full_like(grad, hyper["initial_accumulator_value"])) + grad**2
    return grad / (total.sqrt() + eps) / (1 + (step.item() - 1) * lr_decay), {"step": step, "sum": total}


@with_decay
def nadam(
    grad: Tensor, state: State, *, betas: Pair, eps: float, momentum_decay: float, **_: Any
) -> tuple[Tensor, State]:
    """NAdam (Dozat, ICLR 2016 workshop) as torch.optim.NAdam documents it."""
    beta1, beta2 = scalar(betas[0]), scalar(betas[1])
    zeros = torch.zeros_like(grad)
    step = next_step(state)
    now, after = (beta1 * (1 - 0.5 * 0.96 ** (momentum_decay * t)) for t in (step.item(), step.item() + 1))
    new = {
        "step": step,
        "mu_product": (state.get("mu_product", torch.ones_like(step)).float() * now).double(),  # torch's is float32
        "exp_avg": beta1 * state.get("exp_avg", zeros) + (1 - beta1) * grad,
        "exp_avg_sq": beta2 * state.get("exp_avg_sq", zeros) + (1 - beta2) * grad**2,
    }
    product = new["mu_product"].item()
    mean = after * new["exp_avg"] / (1 - product * after) + (1 - now) * grad / (1 - product)
    return mean / ((new["exp_avg_sq"] / correction(beta2, step)).sqrt() + eps), new


@with_decay
def radam(grad: Tensor, state: State, *, betas: Pair, eps: float, **_: Any) -> tuple[Tensor, State]:
    """RAdam (arXiv:1908.03265, algorithm 2), with torch's bound of 5 and its eps, which is added before the bias
    correction."""
    beta1, beta2 = scalar(betas[0]), scalar(betas[1])
    zeros, step = torch.zeros_like(grad), next_step(state)
    new = {
        "step": step,
        "exp_avg": beta1 * state.get("exp_avg", zeros) + (1 - beta1) * grad,
        "exp_avg_sq": beta2 * state.get("exp_avg_sq", zeros) + (1 - beta2) * grad**2,
    }
    mean = new["exp_avg"] / correction(beta1, step)
    limit = 2 / (1 - beta2) - 1
    length = limit - 2 * step.item() * beta2 ** step.item() / correction(beta2, step)
    if length <= 5:
        return mean, new
    rectification = math.sqrt((length - 4) * (length - 2) * limit / ((limit - 4) * (limit - 2) * length))
    return rectification * mean * math.sqrt(correction(beta2, step)) / (new["exp_avg_sq"].sqrt() + eps), new


@with_decay
def ademamix(
    grad: Tensor,
    state: State,
    *,
    betas: tuple[float, float, float],
    eps: float,
    alpha: float,
    alpha_warmup: float | None,
    beta3_warmup: float | None,
    **_: Any,
) -> tuple[Tensor, State]:
    """AdEMAMix (arXiv:2409.03137, algorithm 1), with the schedules of the authors' code."""
    beta1, beta2, beta3 = map(scalar, betas)
    zeros, step = torch.zeros_like(grad), next_step(state)
    t = step.item()
    if alpha_warmup is not None:
        alpha = alpha * min(t / alpha_warmup, 1)
    if beta3_warmup is not None and t < beta3_warmup:
        start, end = (math.log(0.5) / math.log(beta + 1e-8) - 1 for beta in (beta1, beta3))  # half-lives
        beta3 = 0.5 ** (1 / (start + (end - start) * t / beta3_warmup + 1))
    new = {
        "step": step,
        "exp_avg_fast": beta1 * state.get("exp_avg_fast", zeros) + (1 - beta1) * grad,
        "exp_avg_slow": beta3 * state.get("exp_avg_slow", zeros) + (1 - beta3) * grad,
        "exp_avg_sq": beta2 * state.get("exp_avg_sq", zeros) + (1 - beta2) * grad**2,
    }
    mean = new["exp_avg_fast"] / correction(beta1, step) + alpha * new["exp_avg_slow"]
    return mean / ((new["exp_avg_sq"] / correction(beta2, step)).sqrt() + eps), new


def adopt(
    param: Tensor,
    grad: Tensor,
    state: State,
    *,
    lr: float | Tensor,
    betas: Pair,
    eps: float,
    clip_power: tuple[float, float],
    weight_decay: float,
    decouple: bool,
    maximize: bool,
    **_: Any,
) -> tuple[Tensor, State]:
    """ADOPT (arXiv:2411.02853, algorithm 2), with the choices of its authors' code for weight decay."""
    rate, beta1, beta2 = scalar(lr), scalar(betas[0]), scalar(betas[1])
    zeros, step = torch.zeros_like(param), next_step(state)
    if maximize:
        grad = -grad
    if not decouple:
        grad = grad + weight_decay * param
    if step == 1:
        return param, {"step": step, "exp_avg": zeros, "exp_avg_sq": grad**2}
    bound = clip_power[0] * (step.item() - 1) ** clip_power[1]
    normed = (grad / state["exp_avg_sq"].sqrt().clamp(min=eps)).clamp(-bound, bound)
    exp_avg = beta1 * state["exp_avg"] + (1 - beta1) * normed
    new = {"step": step, "exp_avg": exp_avg, "exp_avg_sq": beta2 * state["exp_avg_sq"] + (1 - beta2) * grad**2}
    if rate == 0:
        return param, new
    return param * (1 - rate * weight_decay * decouple) - rate * exp_avg, new


def adan(
    param: Tensor,
    grad: Tensor,
    state: State,
    *,
    lr: float | Tensor,
    betas: tuple[float, float, float],
    eps: float,
    weight_decay: float,
    no_prox: bool,
    maximize: bool,
    lr_reference: float | None = None,
    decay_period: float | None = None,
    cautious_decay: bool = False,
    **_: Any,
) -> tuple[Tensor, State]:
    """Adan (arXiv:2208.06677, algorithm 1). Here a beta is the share that an average keeps."""
    rate, (beta1, beta2, beta3) = scalar(lr), map(scalar, betas)
    zeros, step = torch.zeros_like(param), next_step(state)
    if maximize:
        grad = -grad
    change = zeros if step == 1 else grad + state["neg_pre_grad"]
    new = {
        "step": step,
        "exp_avg": beta1 * state.get("exp_avg", zeros) + (1 - beta1) * grad,
        "exp_avg_diff": beta2 * state.get("exp_avg_diff", zeros) + (1 - beta2) * change,
        "neg_pre_grad": -grad,
        "exp_avg_sq": beta3 * state.get("exp_avg_sq", zeros) + (1 - beta3) * (grad + beta2 * change) ** 2,
    }
    mean = new["exp_avg"] / correction(beta1, step) + beta2 * new["exp_avg_diff"] / correction(beta2, step)
    update = mean / ((new["exp_avg_sq"] / correction(beta3, step)).sqrt() + eps)
    if rate == 0:
        return param, new
    decay = (1 - shrinkage(rate, weight_decay, lr_reference, decay_period)) * agreeing(param, update, cautious_decay)
    return (param * (1 - decay) - rate * update if no_prox else (param - rate * update) / (1 + decay)), new
