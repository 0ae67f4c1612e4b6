"""The reference backend: the rules in plain PyTorch, one tensor at a time, on any device. Slow, and easy to believe."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..engine.backend import Backend, Scaling
from ..engine.table import (
    BETAS,
    CLIP_EPS,
    DECAY_PERIOD,
    DECOUPLED,
    EMA_DECAY,
    EPS,
    LR,
    LR_REFERENCE,
    MAX_NORM,
    MAXIMIZE,
    OWN,
    SKIP,
    TRUST_ALWAYS,
    TRUST_CLIP,
    WEIGHT_DECAY,
    Row,
    Table,
)


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


# What a rule makes of param, gradient and states: the update to be subtracted, and the new states.
Update = tuple[Tensor, list[Tensor]]


def averages(h: Hyper, grad: Tensor, states: list[Tensor]) -> list[Tensor]:
    """Running averages of the gradient and its square."""
    exp_avg = states[0] - (1 - h.beta1) * states[0] + (1 - h.beta1) * grad
    exp_avg_sq = states[1] - (1 - h.beta2) * states[1] + (1 - h.beta2) * grad * grad
    # Once the average is inf the line above says inf - inf.
    return [exp_avg, torch.where(states[1].isinf() & ~grad.isnan(), states[1], exp_avg_sq)]


def adam(h: Hyper, param: Tensor, grad: Tensor, states: list[Tensor]) -> Update:
    """arXiv:1412.6980; with a third state amsgrad (Reddi et al., ICLR 2018)."""
    exp_avg, exp_avg_sq = averages(h, grad, states)
    states = [exp_avg, exp_avg_sq, *(torch.maximum(largest, exp_avg_sq) for largest in states[2:])]
    denom = states[-1].sqrt() / h.bias_correction2**0.5 + h.eps
    return (h.lr / h.bias_correction1) * (exp_avg / denom), states


def sgd(h: Hyper, param: Tensor, grad: Tensor, states: list[Tensor]) -> Update:
    """torch.optim.SGD. beta1: momentum, a: dampening, b: nesterov."""
    if not states:
        return h.lr * grad, states
    buffer = grad if h.step == 1 else h.beta1 * states[0] + (1 - h.a) * grad
    return h.lr * (grad + h.beta1 * buffer if h.b else buffer), [buffer]


def qhadam(h: Hyper, param: Tensor, grad: Tensor, states: list[Tensor]) -> Update:
    """arXiv:1810.06801, section 4.2. a, b: nu1, nu2."""
    exp_avg, exp_avg_sq = averages(h, grad, states)
    mean = h.a * (exp_avg / h.bias_correction1) + (1 - h.a) * grad
    mean_sq = h.b * (exp_avg_sq / h.bias_correction2) + (1 - h.b) * grad * grad
    return h.lr * (mean / (mean_sq.sqrt() + h.eps)), [exp_avg, exp_avg_sq]


def lion(h: Hyper, param: Tensor, grad: Tensor, states: list[Tensor]) -> Update:
    """arXiv:2302.06675."""
    mixed = h.beta1 * states[0] + (1 - h.beta1) * grad
    return h.lr * mixed.sign(), [h.beta2 * states[0] + (1 - h.beta2) * grad]


def lamb(h: Hyper, param: Tensor, grad: Tensor, states: list[Tensor]) -> Update:
    """arXiv:1904.00962 as in NVIDIA Apex, before lr, decay and trust ratio. a: grad_averaging, b: bias_correction."""
    exp_avg, exp_avg_sq = averages(h, grad, states)
    if not h.a:
        exp_avg = h.beta1 * states[0] + grad
    return lamb_direction(h, [exp_avg, exp_avg_sq]), [exp_avg, exp_avg_sq]


def lamb_direction(h: Hyper, states: list[Tensor]) -> Tensor:
    correction1, correction2 = (h.bias_correction1, h.bias_correction2) if h.b else (1.0, 1.0)
    return (states[0] / correction1) / ((states[1] / correction2).sqrt() + h.eps)


RULES: dict[str, Callable[[Hyper, Tensor, Tensor, list[Tensor]], Update]] = {
    "adam": adam,
    "sgd": sgd,
    "qhadam": qhadam,
    "lion": lion,
    "lamb": lamb,
}
# Of rules with a trust ratio: the update from the states alone.
DIRECTIONS = {"lamb": lamb_direction}


def widen(tensor: Tensor) -> Tensor:
    """As reals of at least float32; shares memory where nothing has to change."""
    tensor = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def real_view(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def decoupled_decay(raw: list[float], lr: float, trust: bool) -> float:
    if trust:
        return raw[WEIGHT_DECAY]
    reference = raw[LR_REFERENCE]
    return lr / reference * raw[WEIGHT_DECAY] / raw[DECAY_PERIOD] ** 0.5 if reference else 0.0


def hyper_of(raw: list[float], row: Row) -> Hyper:
    return Hyper(raw[LR], raw[BETAS], raw[BETAS + 1], raw[EPS], float(row.step), raw[OWN], raw[OWN + 1])


def step_row(table: Table, row: Row, number: int, grad_scale: float, norm: float | None) -> None:
    """norm: of all gradients that are clipped, after the division by grad_scale."""
    grad = row.grad
    table.hyper[number, SKIP] = grad is None
    if grad is None:
        return
    raw = table.scalars.raw[row.group].tolist()
    row.step += 1

    param, grad = widen(row.target), widen(grad) / grad_scale
    if norm is not None and raw[MAX_NORM] > 0:
        bound = raw[MAX_NORM] / (norm + raw[CLIP_EPS]) if norm + raw[CLIP_EPS] else math.inf
        grad = grad if bound >= 1 else grad * bound
    if raw[MAXIMIZE]:
        grad = -grad
    if raw[WEIGHT_DECAY] and not raw[DECOUPLED]:
        grad = grad + raw[WEIGHT_DECAY] * param
    update, states = RULES[table.rule.name](hyper_of(raw, row), param, grad, [widen(state) for state in row.states])
    for old, new in zip(row.states, states, strict=True):
        real_view(old).copy_(new)
    if table.sums is not None:
        # Norms, because torch's sums depend on the number of threads.
        norms = [param.double().norm(), trusted_update(table, row).double().norm()]
        table.sums[number] = torch.stack(norms).square()
    else:
        write(table, row, param - with_decay(table, row, update))


def write(table: Table, row: Row, param: Tensor) -> None:
    """Stores the new param, and takes the average of the weights along."""
    real_view(row.target).copy_(param)
    if row.ema is None:
        return
    copies = row.step == 1 and not row.ema_begun
    weight = 1.0 if copies else 1.0 - float(table.scalars.raw[row.group, EMA_DECAY])
    old, new = widen(row.ema), widen(row.target)
    real_view(row.ema).copy_(new if weight == 1.0 else old - weight * old + weight * new)


def with_decay(table: Table, row: Row, update: Tensor) -> Tensor:
    """The update with decoupled decay in it. Infinite params stay what they are."""
    raw = table.scalars.raw[row.group].tolist()
    if not (raw[WEIGHT_DECAY] and raw[DECOUPLED]):
        return update
    param = widen(row.target)
    return update + torch.where(param.isinf(), 0.0, decoupled_decay(raw, raw[LR], table.rule.trust) * param)


def trusted_update(table: Table, row: Row) -> Tensor:
    """Of the states as they are stored, because a float16 one may have become 0."""
    h = hyper_of(table.scalars.raw[row.group].tolist(), row)
    return with_decay(table, row, DIRECTIONS[table.rule.name](h, [widen(state) for state in row.states]))


def trust_ratio(raw: list[float], param: float, update: float) -> float:
    if not raw[WEIGHT_DECAY] and not raw[TRUST_ALWAYS]:
        return 1.0
    ratio = param / update if param and update else 1.0
    return min(max(ratio, raw[TRUST_CLIP]), raw[TRUST_CLIP + 1])


class Reference(Backend):
    name = "reference"
    reads_tensors = True

    @staticmethod
    def why_not(device: torch.device | None) -> str | None:
        return None

    @torch.no_grad()
    def sum_squares(self, out: Tensor) -> None:
        out.zero_()
        for row in self.table.rows_list:
            bound = float(self.table.scalars.raw[row.group, MAX_NORM])
            grad = row.grad
            if grad is not None and bound:
                out += widen(grad).double().square().sum() * (bound > 0)

    @torch.no_grad()
    def step(self, scaling: Scaling) -> None:
        table = self.table
        if table.is_meta:
            return
        if scaling.found_inf is not None and scaling.found_inf.item():
            table.hyper[:, SKIP] = 1.0
            return
        scale = 1.0 if scaling.grad_scale is None else float(scaling.grad_scale)
        # A tensor's division: a scale of 0 gives inf or NaN, as in the kernels, where Python's would raise.
        norm = None if scaling.squares is None else float(scaling.squares.double().sqrt() / scale)
        for number, row in enumerate(table.rows_list):
            step_row(table, row, number, scale, norm)

    @torch.no_grad()
    def apply_update(self) -> None:
        table = self.table
        if table.trust is None or table.sums is None or table.is_meta:
            return
        for number, row in enumerate(table.rows_list):
            if table.hyper[number, SKIP]:
                continue
            raw = table.scalars.raw[row.group].tolist()
            ratio = trust_ratio(raw, *table.sums[number].sqrt().tolist())
            table.trust[number] = ratio
            write(table, row, widen(row.target) - raw[LR] * ratio * trusted_update(table, row))

    @torch.no_grad()
    def scale_grads(self, squares: Tensor) -> None:
        norm = math.sqrt(float(squares))
        for row in self.table.rows_list:
            grad, raw = row.grad, self.table.scalars.raw[row.group].tolist()
            bound = norm + raw[CLIP_EPS]
            if grad is None or not raw[MAX_NORM] > 0 or not bound or raw[MAX_NORM] / bound >= 1:
                continue
            real_view(grad.conj() if grad.is_conj() else grad).mul_(raw[MAX_NORM] / bound)
