"""Rules in plain PyTorch: the arithmetic of each optimizer, on whole tensors. Mirrors csrc/rules/.

A rule gets the scalars `h` of the tensor, the param, the gradient and the states, and returns the update that is
subtracted from the param, and the new states. A rule may have `scalars`, which makes scalars of its own (own_a to
own_f) from the options of the tensor's group, once per tensor and step. Of a rule with running scalars it also gets
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
    """The step of a tensor, counted from 1, and 1 - beta**step of the betas."""

    step: float
    correction1: float
    correction2: float
    correction3: float


# What a rule makes of param, gradient and states: the update to be subtracted, and the new states.
Update = tuple[Tensor, list[Tensor]]


class Arithmetic(NamedTuple):
    """A rule: its update, and what makes its own scalars, own_a to own_f. Rules that are walked twice have `direction`,
    the update from the states alone, before lr and decay; `measure`, two numbers of each element whose squares are
    summed over the tensor; `ratio`, which makes of both sums what the update is multiplied by; and `scales_decay`,
    whether it multiplies decoupled decay, too."""

    update: Callable[[TensorScalars, Tensor, Tensor, list[Tensor]], Update]
    scalars: Callable[..., tuple[float, ...]] | None = None
    direction: Callable[[TensorScalars, list[Tensor]], Tensor] | None = None
    measure: Callable[[TensorScalars, Tensor, Tensor, list[Tensor]], tuple[Tensor, Tensor]] | None = None
    ratio: Callable[[GroupHparams, float, float], float] | None = None
    scales_decay: bool = False


def with_decay(h: TensorScalars, param: Tensor, update: Tensor) -> Tensor:
    """The update including decoupled decay. Infinite params are not decayed, and with cautious decay those that the
    update moves away from 0."""
    if not h.decay:
        return update
    kept = param.isinf()
    if h.cautious_decay:
        kept = kept | torch.where(param > 0, update < 0, update > 0)
    return update + torch.where(kept, 0.0, h.decay * param)


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


def lamb_measure(h: TensorScalars, param: Tensor, grad: Tensor, states: list[Tensor]) -> tuple[Tensor, Tensor]:
    return param, with_decay(h, param, lamb_direction(h, states))


def lamb_ratio(group: GroupHparams, params: float, updates: float) -> float:
    if not group.weight_decay and not group.trust_always:
        return 1.0
    ratio = math.sqrt(params) / math.sqrt(updates) if params and updates else 1.0
    return min(max(ratio, group.trust_low), group.trust_high)


def muon_scalars(group: GroupHparams, at: BiasCorrections) -> tuple[float, ...]:
    """Options: momentum, nesterov."""
    return 1 - group.option_a, group.option_a if group.option_a < 0.5 else 0.0, group.option_b


def muon(h: TensorScalars, param: Tensor, grad: Tensor, states: list[Tensor]) -> Update:
    """Jordan et al., 2024, as in torch.optim.Muon. The second state is a workspace: the update, which is orthogonalized
    there. Own: the weight of the gradient, a small momentum, nesterov."""
    buffer = keep(states[0], h.own_a, h.own_b) + h.own_a * grad
    update = keep(buffer, h.own_a, h.own_b) + h.own_a * grad if h.own_c else buffer
    return update, [buffer, update]


def muon_direction(h: TensorScalars, states: list[Tensor]) -> Tensor:
    return states[1]


def muon_measure(h: TensorScalars, param: Tensor, grad: Tensor, states: list[Tensor]) -> tuple[Tensor, Tensor]:
    return torch.zeros_like(param), states[1]


def muon_ratio(group: GroupHparams, first: float, second: float) -> float:
    return 1.0


def adagrad_scalars(group: GroupHparams, at: BiasCorrections) -> tuple[float, ...]:
    return (group.lr / (1 + (at.step - 1) * group.option_a),)


def adagrad(h: TensorScalars, param: Tensor, grad: Tensor, states: list[Tensor]) -> Update:
    """Duchi et al., JMLR 2011. Own: lr after its decay."""
    total = states[0] + grad * grad
    return h.own_a * (grad / (total.sqrt() + h.eps)), [total]


def nadam_scalars(group: GroupHparams, at: BiasCorrections, running: list[float]) -> tuple[float, ...]:
    """Option: momentum_decay. Running: mu_product."""
    now, after = (group.beta1 * (1 - 0.5 * 0.96 ** (group.option_a * step)) for step in (at.step, at.step + 1))
    running[0] = float(torch.tensor(running[0], dtype=torch.float32, device="cpu") * now)  # in float32, as in torch
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
    return lr if float(torch.tensor(lr, dtype=torch.float32, device="cpu")) >= before else before


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


def ademamix_scalars(group: GroupHparams, at: BiasCorrections) -> tuple[float, ...]:
    """Options: alpha, alpha_warmup, beta3_warmup."""
    alpha, beta3 = group.option_a * (at.step / group.option_b if at.step < group.option_b else 1.0), group.beta3
    if at.step < group.option_c:  # the half-life of the slow average grows linearly
        done = at.step / group.option_c
        beta3 = math.exp(1 / ((1 - done) / math.log(group.beta1 + 1e-8) + done / math.log(group.beta3 + 1e-8)))
    return 1 - beta3, beta3 if beta3 < 0.5 else 0.0, alpha


def ademamix(h: TensorScalars, param: Tensor, grad: Tensor, states: list[Tensor]) -> Update:
    """arXiv:2409.03137 as in Apple's ml-ademamix. Own: weight of the gradient in the slow average, its beta if that is
    small, alpha."""
    fast, exp_avg_sq = averages(h, grad, [states[0], states[2]])
    slow = keep(states[1], h.own_a, h.own_b) + h.own_a * grad
    mean = h.debias * fast + h.own_c * slow
    return h.lr * (mean / (exp_avg_sq.sqrt() * h.denom_scale + h.eps)), [fast, slow, exp_avg_sq]


def adopt_scalars(group: GroupHparams, at: BiasCorrections) -> tuple[float, ...]:
    """Options: factor and exponent of the clipping bound. The first step only sets exp_avg_sq."""
    if at.step == 1:
        return 1.0, 0.0, 1.0
    return 1 - group.beta2, group.option_a * math.exp(group.option_b * math.log(at.step - 1)), group.eps


def adopt(h: TensorScalars, param: Tensor, grad: Tensor, states: list[Tensor]) -> Update:
    """arXiv:2411.02853. Own: weight of the square, bound of the normalised gradient, least divisor."""
    clipped = (grad / states[1].sqrt().clamp(min=h.own_c)).clamp(-h.own_b, h.own_b)
    exp_avg = keep(states[0], h.weight1, h.small_beta1) + h.weight1 * clipped
    exp_avg_sq = keep(states[1], h.weight2, h.small_beta2) + h.own_a * grad * grad
    return h.lr * exp_avg, [exp_avg, torch.where(states[1].isinf() & ~grad.isnan(), states[1], exp_avg_sq)]


def adan_scalars(group: GroupHparams, at: BiasCorrections) -> tuple[float, ...]:
    return (
        group.lr * group.beta2 / at.correction2,
        0.0 if at.step == 1 else 1.0,
        1 / math.sqrt(at.correction3),
        1 - group.beta3,
        group.beta3 if group.beta3 < 0.5 else 0.0,
    )


def adan(h: TensorScalars, param: Tensor, grad: Tensor, states: list[Tensor]) -> Update:
    """arXiv:2208.06677 as in sail-sg/Adan. Own: rate of exp_avg_diff, 0 in the first step, bias correction of the root,
    weight of the square, beta3 if it is small."""
    change = h.own_b * (grad + states[2])
    exp_avg = keep(states[0], h.weight1, h.small_beta1) + h.weight1 * grad
    exp_avg_diff = keep(states[1], h.weight2, h.small_beta2) + h.weight2 * change
    ahead = grad + keep(change, h.weight2, h.small_beta2)
    exp_avg_sq = keep(states[3], h.own_d, h.own_e) + h.own_d * ahead * ahead
    exp_avg_sq = torch.where(states[3].isinf() & ~ahead.isnan(), states[3], exp_avg_sq)
    update = (h.step_size * exp_avg + h.own_a * exp_avg_diff) / (exp_avg_sq.sqrt() * h.own_c + h.eps)
    return update, [exp_avg, exp_avg_diff, -grad, exp_avg_sq]


def stableadamw_scalars(group: GroupHparams, at: BiasCorrections) -> tuple[float, ...]:
    """The weights of gradient and square for debiased betas; these betas if they are small."""
    weights = (1 - group.beta1) / at.correction1, (1 - group.beta2) / at.correction2
    # 1 - weight loses digits for a small beta, and 1 - beta**(step - 1) for a large one.
    debiased = [
        beta * (1 - beta ** (at.step - 1)) / correction if beta < 0.5 else 1 - weight
        for beta, correction, weight in zip(
            (group.beta1, group.beta2), (at.correction1, at.correction2), weights, strict=True
        )
    ]
    return *weights, *(beta if weight > 0.5 else 0.0 for beta, weight in zip(debiased, weights, strict=True))


def stableadamw(h: TensorScalars, param: Tensor, grad: Tensor, states: list[Tensor]) -> Update:
    """arXiv:2304.13013, algorithm 2."""
    debiased = h._replace(weight1=h.own_a, weight2=h.own_b, small_beta1=h.own_c, small_beta2=h.own_d)
    states = averages(debiased, grad, states)
    return stableadamw_direction(h, states), states


def stableadamw_direction(h: TensorScalars, states: list[Tensor]) -> Tensor:
    return states[0] / (states[1].sqrt() + h.eps)


def stableadamw_measure(h: TensorScalars, param: Tensor, grad: Tensor, states: list[Tensor]) -> tuple[Tensor, Tensor]:
    return torch.ones_like(grad), grad / states[1].sqrt().clamp(min=h.eps)


def stableadamw_ratio(group: GroupHparams, count: float, squares: float) -> float:
    """1 over the root mean square, where that is above 1."""
    rms = math.sqrt(squares / count) if count else 0.0
    return 1.0 if rms <= 1 else 1 / rms


RULES = {
    "adam": Arithmetic(adam),
    "sgd": Arithmetic(sgd, sgd_scalars),
    "qhadam": Arithmetic(qhadam, qhadam_scalars),
    "lion": Arithmetic(lion),
    "adagrad": Arithmetic(adagrad, adagrad_scalars),
    "muon": Arithmetic(muon, muon_scalars, direction=muon_direction, measure=muon_measure, ratio=muon_ratio),
    "nadam": Arithmetic(nadam, nadam_scalars),
    "radam": Arithmetic(radam, radam_scalars),
    "schedule_free_adamw": Arithmetic(schedule_free_adamw, schedule_free_scalars),
    "schedule_free_sgd": Arithmetic(schedule_free_sgd, schedule_free_scalars),
    "ademamix": Arithmetic(ademamix, ademamix_scalars),
    "adopt": Arithmetic(adopt, adopt_scalars),
    "adan": Arithmetic(adan, adan_scalars),
    "stableadamw": Arithmetic(
        stableadamw,
        stableadamw_scalars,
        stableadamw_direction,
        stableadamw_measure,
        stableadamw_ratio,
        scales_decay=True,
    ),
    "lamb": Arithmetic(lamb, lamb_scalars, lamb_direction, lamb_measure, lamb_ratio, scales_decay=True),
}
