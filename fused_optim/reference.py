"""The reference backend: the rules in plain PyTorch, one tensor at a time, on any device. Slow, and easy to believe."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .table import BETAS, DECOUPLED, EPS, LR, MAXIMIZE, OWN, WEIGHT_DECAY, Row, Table


@dataclass
class Hyper:
    """What a rule reads, as csrc/rules.h has it; Python floats."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    step: float
    a: float
    b: float

    @property
    def bias_correction1(self) -> float:
        return 1.0 - self.beta1**self.step

    @property
    def bias_correction2(self) -> float:
        return 1.0 - self.beta2**self.step


def adam(h: Hyper, param: Tensor, grad: Tensor, states: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """arXiv:1412.6980; with a third state amsgrad (Reddi et al., ICLR 2018)."""
    exp_avg = states[0] - (1 - h.beta1) * states[0] + (1 - h.beta1) * grad
    exp_avg_sq = states[1] - (1 - h.beta2) * states[1] + (1 - h.beta2) * grad * grad
    # Once the average is inf the line above says inf - inf.
    exp_avg_sq = torch.where(states[1].isinf() & ~grad.isnan(), states[1], exp_avg_sq)
    states = [exp_avg, exp_avg_sq, *(torch.maximum(largest, exp_avg_sq) for largest in states[2:])]
    denom = states[-1].sqrt() / h.bias_correction2**0.5 + h.eps
    return (h.lr / h.bias_correction1) * (exp_avg / denom), states


RULES: dict[str, Callable[[Hyper, Tensor, Tensor, list[Tensor]], tuple[Tensor, list[Tensor]]]] = {"adam": adam}


def widen(tensor: Tensor) -> Tensor:
    """As reals of at least float32; shares memory where nothing has to change."""
    tensor = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def real_view(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def step_row(table: Table, row: Row, grad_scale: float) -> None:
    grad = row.param.grad
    if grad is None:
        return
    raw = table.scalars.raw[row.group].tolist()
    row.step += 1
    h = Hyper(raw[LR], raw[BETAS], raw[BETAS + 1], raw[EPS], float(row.step), raw[OWN], raw[OWN + 1])

    param, grad = widen(row.target), widen(grad) / grad_scale
    decay = raw[WEIGHT_DECAY]
    if raw[MAXIMIZE]:
        grad = -grad
    if decay and not raw[DECOUPLED]:
        grad = grad + decay * param
    update, states = RULES[table.rule.name](h, param, grad, [widen(state) for state in row.states])
    if decay and raw[DECOUPLED]:  # infinite params stay what they are
        update = update + torch.where(param.isinf(), 0.0, h.lr * decay * param)
    real_view(row.target).copy_(param - update)
    for old, new in zip(row.states, states, strict=True):
        real_view(old).copy_(new)


@torch.no_grad()
def step(table: Table, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
    if found_inf is not None and found_inf.item():
        return
    scale = 1.0 if grad_scale is None else float(grad_scale)
    for row in table.rows_list:
        step_row(table, row, scale)
