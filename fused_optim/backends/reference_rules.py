"""Rules in plain PyTorch: the arithmetic of each optimizer, on whole tensors. Mirrors csrc/rules.h.

A rule gets the scalars `h` of the tensor, the param, the gradient and the states, and returns the update that is
subtracted from the param, and the new states. A rule may have `scalars`, which makes scalars of its own (own_a to
own_d) from the options of the tensor's group, once per tensor and step. Of a rule with running scalars it also gets
these, as a list that it changes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..engine.layout import GroupHparams, TensorScalars


class BiasCorrections(NamedTuple):
    """The step of a tensor, counted from 1, and 1 - beta**step of both betas."""

    step: float
    correction1: float
    correction2: float


# What a rule makes of param, gradient and states: the update to be subtracted, and the new states.
Update = tuple[Tensor, list[Tensor]]


class Arithmetic(NamedTuple):
    """A rule: its update; what makes its own scalars, own_a to own_d; with a trust ratio the update from the states
    alone, before lr and decay."""

    update: Callable[[TensorScalars, Tensor, Tensor, list[Tensor]], Update]
    scalars: Callable[..., tuple[float, ...]] | None = None
    direction: Callable[[TensorScalars, list[Tensor]], Tensor] | None = None


def keep(average: Tensor, weight: float, small_beta: float) -> Tensor:
    """beta * average. Beside a small beta the rounding of 1 - beta is large."""
    return small_beta * average if small_beta else average - weight * average


def averages(h: TensorScalars, grad: Tensor, states: list[Tensor]) -> list[Tensor]:
    """Running averages of the gradient and its square."""
    exp_avg = keep(states[0], h.weight1, h.small_beta1) + h.weight1 * grad
    exp_avg_sq = keep(states[1], h.weight2, h.small_beta2) + h.weight2 * grad * grad
    # Once the average is inf the line above says inf - inf.
    return [exp_avg, torch.where(states[1].isinf() & ~grad.isnan(), states[1], exp_avg_sq)]


def adam(h: TensorScalars, param: Tensor, grad: Tensor, states: list[Tensor]) -> Update:
    """arXiv:1412.6980; with a third state amsgrad (Reddi et al., ICLR 2018)."""
    exp_avg, exp_avg_sq = averages(h, grad, states)
    states = [exp_avg, exp_avg_sq, *(torch.maximum(largest, exp_avg_sq) for largest in states[2:])]
    return h.step_size * (exp_avg / (states[-1].sqrt() * h.denom_scale + h.eps)), states


def sgd_scalars(group: GroupHparams, at: BiasCorrections) -> tuple[float, ...]:
    """Options: beta1 is the momentum; dampening, nesterov."""
    first = at.step == 1
    return 1 if first else 1 - group.option_a, 0 if first else group.beta1, group.beta1, group.option_b


def sgd(h: TensorScalars, param: Tensor, grad: Tensor, states: list[Tensor]) -> Update:
    """torch.optim.SGD. Own: weights of gradient and buffer in the new buffer, momentum, nesterov."""
    if not states:
        return h.lr * grad, states
    buffer = h.own_a * grad if h.own_b == 0 else h.own_b * states[0] + h.own_a * grad
    return h.lr * (grad + h.own_c * buffer if h.own_d else buffer), [buffer]


def qhadam_scalars(group: GroupHparams, at: BiasCorrections) -> tuple[float, ...]:
    """Options: the two nus."""
    return 1 - group.option_a, 1 - group.option_b


def qhadam(h: TensorScalars, param: Tensor, grad: Tensor, states: list[Tensor]) -> Update:
    """arXiv:1810.06801, section 4.2. Own: the weights of the gradient beside the two averages."""
    exp_avg, exp_avg_sq = averages(h, grad, states)
    mean = (1 - h.own_a) * (exp_avg * h.debias) + h.own_a * grad
    mean_sq = (1 - h.own_b) * (exp_avg_sq * h.denom_scale**2) + h.own_b * grad * grad
    return h.lr * (mean / (mean_sq.sqrt() + h.eps)), [exp_avg, exp_avg_sq]


def lion(h: TensorScalars, param: Tensor, grad: Tensor, states: list[Tensor]) -> Update:
    """arXiv:2302.06675."""
    mixed = keep(states[0], h.weight1, h.small_beta1) + h.weight1 * grad
    return h.lr * mixed.sign(), [keep(states[0], h.weight2, h.small_beta2) + h.weight2 * grad]


def lamb_scalars(group: GroupHparams, at: BiasCorrections) -> tuple[float, ...]:
    """Options: grad_averaging, bias_correction."""
    correction1, correction2 = (at.correction1, at.correction2) if group.option_b else (1.0, 1.0)
    return 1 - group.beta1 if group.option_a else 1.0, 1 / correction1, 1 / math.sqrt(correction2)


def lamb(h: TensorScalars, param: Tensor, grad: Tensor, states: list[Tensor]) -> Update:
    """arXiv:1904.00962 as in NVIDIA Apex. Own: the weight of the gradient in exp_avg; debias and denom_scale, 1 without
    bias correction."""
    _, exp_avg_sq = averages(h, grad, states)
    states = [keep(states[0], h.weight1, h.small_beta1) + h.own_a * grad, exp_avg_sq]
    return lamb_direction(h, states), states


def lamb_direction(h: TensorScalars, states: list[Tensor]) -> Tensor:
    return states[0] * h.own_b / (states[1].sqrt() * h.own_c + h.eps)


def adagrad_scalars(group: GroupHparams, at: BiasCorrections) -> tuple[float, ...]:
    return (group.lr / (1 + (at.step - 1) * group.option_a),)


def adagrad(h: TensorScalars, param: Tensor, grad: Tensor, states: list[Tensor]) -> Update:
    """Duchi et al., JMLR 2011. Own: lr after its decay."""
    total = states[0] + grad * grad
    return h.own_a * (grad / (total.sqrt() + h.eps)), [total]


def nadam_scalars(group: GroupHparams, at: BiasCorrections, running: list[float]) -> tuple[float, ...]:
    """Option: momentum_decay. Running: mu_product."""
    now, after = (group.beta1 * (1 - 0.5 * 0.96 ** (group.option_a * step)) for step in (at.step, at.step + 1))
    running[0] = float(torch.tensor(running[0], dtype=torch.float32) * now)  # in float32, as in torch
    return (1 - now) / (1 - running[0]), after / (1 - running[0] * after), 1 / at.correction2


def nadam(h: TensorScalars, param: Tensor, grad: Tensor, states: list[Tensor]) -> Update:
    """Dozat, ICLR 2016 workshop, as in torch. Own: the weights of the gradient and of exp_avg in the mean; the
    bias correction of exp_avg_sq."""
    exp_avg, exp_avg_sq = averages(h, grad, states)
    mean = h.own_a * grad + h.own_b * exp_avg
    return h.lr * (mean / ((h.own_c * exp_avg_sq).sqrt() + h.eps)), [exp_avg, exp_avg_sq]


def radam_scalars(group: GroupHparams, at: BiasCorrections) -> tuple[float, ...]:
    longest = 2 / (1 - group.beta2) - 1
    length = longest - 2 * at.step * (1 - at.correction2) / at.correction2
    if not length > 5:
        return group.lr / at.correction1, 0.0
    rectified = (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
    return group.lr / at.correction1 * math.sqrt(rectified * at.correction2), 1.0


def radam(h: TensorScalars, param: Tensor, grad: Tensor, states: list[Tensor]) -> Update:
    """arXiv:1908.03265, as in torch. Own: the step size, whether exp_avg is divided by the root."""
    exp_avg, exp_avg_sq = averages(h, grad, states)
    return h.own_a * (exp_avg / (exp_avg_sq.sqrt() + h.eps) if h.own_b else exp_avg), [exp_avg, exp_avg_sq]


def largest_lr(lr: float, before: float) -> float:
    """The larger of lr and the largest lr before, which is stored as float32. A constant lr stays the largest."""
    return lr if float(torch.tensor(lr, dtype=torch.float32)) >= before else before


def schedule_free_scalars(group: GroupHparams, at: BiasCorrections, running: list[float]) -> tuple[float, ...]:
    """Options: warmup_steps, r, weight_lr_power, weight_decay. Running: weight_sum, lr_max."""
    lr = group.lr * (at.step / group.option_a) if at.step < group.option_a else group.lr
    running[1] = largest_lr(lr, running[1])
    weight = at.step**group.option_b * running[1] ** group.option_c
    running[0] += weight
    share = weight / running[0] if running[0] > 0 else 0.0
    return share, lr, lr * (1 - group.beta1 * (1 - share)), group.option_d


def schedule_free_move(h: TensorScalars, y: Tensor, z: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    """What y is moved by, and the new z. Own: the weight of z in the average, lr after its warm-up, the step of y,
    weight decay. Infinite params stay where they are."""
    apart, finite = y - z, torch.where(y.isfinite(), y, 0.0)
    direction = direction + h.own_d * finite
    return h.own_a * torch.where(apart.isfinite(), apart, 0.0) + h.own_c * direction, z - h.own_b * direction


def schedule_free_adamw(h: TensorScalars, param: Tensor, grad: Tensor, states: list[Tensor]) -> Update:
    """arXiv:2405.15682, as in the package schedulefree. The param is y."""
    _, exp_avg_sq = averages(h, grad, states)  # z is no average
    direction = grad / (exp_avg_sq.sqrt() * h.denom_scale + h.eps)
    change, z = schedule_free_move(h, param, states[0], direction)
    return change, [z, exp_avg_sq]


def schedule_free_sgd(h: TensorScalars, param: Tensor, grad: Tensor, states: list[Tensor]) -> Update:
    change, z = schedule_free_move(h, param, states[0], grad)
    return change, [z]


RULES = {
    "adam": Arithmetic(adam),
    "sgd": Arithmetic(sgd, sgd_scalars),
    "qhadam": Arithmetic(qhadam, qhadam_scalars),
    "lion": Arithmetic(lion),
    "adagrad": Arithmetic(adagrad, adagrad_scalars),
    "nadam": Arithmetic(nadam, nadam_scalars),
    "radam": Arithmetic(radam, radam_scalars),
    "schedule_free_adamw": Arithmetic(schedule_free_adamw, schedule_free_scalars),
    "schedule_free_sgd": Arithmetic(schedule_free_sgd, schedule_free_scalars),
    "lamb": Arithmetic(lamb, lamb_scalars, lamb_direction),
}
