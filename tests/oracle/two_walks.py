"""Optimizers whose update depends on the whole tensor: LAMB, StableAdamW, Muon."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .common import Pair, State, agreeing, correction, next_step, scalar, shrinkage


def lamb(
    param: Tensor,
    grad: Tensor,
    state: State,
    *,
    lr: float | Tensor,
    bias_correction: bool,
    betas: tuple[float | Tensor, float | Tensor],
    eps: float,
    weight_decay: float,
    adam_w_mode: bool,
    grad_averaging: bool,
    max_grad_norm: float | None,
    use_nvlamb: bool,
    trust_clip: tuple[float, float] | None,
    maximize: bool,
    grad_norm: float,
    stored: torch.dtype,
    **_: Any,
) -> tuple[Tensor, State]:
    """LAMB (arXiv:1904.00962) with the choices of NVIDIA Apex's FusedLAMB.

    The trust ratio is a ratio of norms of whole tensors, so the step has two passes. The update is computed from the
    averages as they are stored.
    """
    rate, beta1, beta2 = scalar(lr), scalar(betas[0]), scalar(betas[1])
    zeros = torch.zeros_like(param)
    step = next_step(state)
    if maximize:
        grad = -grad
    if max_grad_norm and grad_norm > max_grad_norm:
        grad = grad * (max_grad_norm / grad_norm)
    if not adam_w_mode:
        grad = grad + weight_decay * param
    new = {
        "step": step,
        "exp_avg": beta1 * state.get("exp_avg", zeros) + (1 - beta1 if grad_averaging else 1) * grad,
        "exp_avg_sq": beta2 * state.get("exp_avg_sq", zeros) + (1 - beta2) * grad**2,
    }
    mean, square = (new[name].to(stored).to(torch.float64) for name in ("exp_avg", "exp_avg_sq"))
    if bias_correction:
        mean, square = mean / correction(beta1, step), square / correction(beta2, step)
    update = mean / (square.sqrt() + eps)
    if adam_w_mode:
        update = update + weight_decay * param
    ratio = 1.0
    if weight_decay != 0 or use_nvlamb:
        param_norm, update_norm = param.norm().item(), update.norm().item()
        ratio = param_norm / update_norm if param_norm != 0 and update_norm != 0 else 1.0
        if trust_clip is not None:
            ratio = min(max(ratio, trust_clip[0]), trust_clip[1])
    if rate == 0:
        return param, new
    return param - rate * ratio * update, new


def stableadamw(
    param: Tensor,
    grad: Tensor,
    state: State,
    *,
    lr: float | Tensor,
    betas: Pair,
    eps: float,
    weight_decay: float,
    maximize: bool,
    stored: torch.dtype,
    lr_reference: float | None = None,
    decay_period: float | None = None,
    cautious_decay: bool = False,
    **_: Any,
) -> tuple[Tensor, State]:
    """StableAdamW (arXiv:2304.13013, algorithm 2). The update is made of the averages as they are stored."""
    rate, beta1, beta2 = scalar(lr), scalar(betas[0]), scalar(betas[1])
    zeros, step = torch.zeros_like(param), next_step(state)
    if maximize:
        grad = -grad
    rest1, rest2 = ((1 - beta) / correction(beta, step) for beta in (beta1, beta2))  # 1 - debiased beta
    # The debiased betas themselves. They are 0 in the first step.
    kept1, kept2 = (
        beta * correction(beta, step - 1) / correction(beta, step) if step > 1 else 0.0 for beta in (beta1, beta2)
    )
    new = {
        "step": step,
        "exp_avg": kept1 * state.get("exp_avg", zeros) + rest1 * grad,
        "exp_avg_sq": kept2 * state.get("exp_avg_sq", zeros) + rest2 * grad**2,
    }
    mean, square = (new[name].to(stored).to(torch.float64) for name in ("exp_avg", "exp_avg_sq"))
    rms = (grad / square.sqrt().clamp(min=eps)).square().mean().sqrt().item() if grad.numel() else 0.0
    if rate == 0:
        return param, new
    update = mean / (square.sqrt() + eps)
    decay = (1 - shrinkage(rate, weight_decay, lr_reference, decay_period)) * agreeing(param, update, cautious_decay)
    return param - (decay * param + rate * update) / max(1.0, rms), new


def newton_schulz(update: Tensor, coefficients: Sequence[float], steps: int, eps: float) -> Tensor:
    """Muon's iteration (Jordan et al., https://kellerjordan.github.io/posts/muon) on the singular values themselves:
    each step applies the polynomial to all of them."""
    left, values, right = torch.linalg.svd(update / max(update.norm().item(), eps), full_matrices=False)
    a, b, c = coefficients
    for _ in range(steps):
        values = a * values + b * values**3 + c * values**5
    return left @ torch.diag(values) @ right


def muon(
    param: Tensor,
    grad: Tensor,
    state: State,
    *,
    lr: float | Tensor,
    weight_decay: float,
    momentum: float,
    nesterov: bool,
    ns_coefficients: Sequence[float],
    ns_steps: int,
    eps: float,
    adjust_lr_fn: str | None,
    normuon: bool,
    normuon_beta2: float,
    maximize: bool,
    **hyper: Any,
) -> tuple[Tensor, State]:
    """Muon as torch.optim.Muon documents it, with the averages that the code has; NorMuon (arXiv:2510.05491). A tensor
    of more dimensions is a matrix of its first one and all others."""
    rate = scalar(lr)
    grad = -grad if maximize else grad
    buffer = momentum * state.get("momentum_buffer", torch.zeros_like(grad)) + (1 - momentum) * grad
    new = {"momentum_buffer": buffer}
    update = (momentum * buffer + (1 - momentum) * grad if nesterov else buffer).flatten(1)
    rows, columns = update.shape
    update = newton_schulz(update, ns_coefficients, ns_steps, eps)
    if normuon:
        old = state.get("second_momentum_buffer", torch.zeros(rows, 1, dtype=torch.float64))
        moments = normuon_beta2 * old + (1 - normuon_beta2) * update.square().mean(1, keepdim=True)
        new["second_momentum_buffer"] = moments
        normalized = update / (moments.sqrt() + 1e-8)
        update = normalized * (update.norm() / normalized.norm())
    scale = 0.2 * math.sqrt(max(rows, columns)) if adjust_lr_fn else math.sqrt(max(1, rows / columns))
    decay = 1 - shrinkage(rate, weight_decay, hyper.get("lr_reference"), hyper.get("decay_period"))
    decay = decay * agreeing(param, update.view_as(param), hyper.get("cautious_decay", False))
    return (1 - decay) * param - rate * scale * update.view_as(param), new
