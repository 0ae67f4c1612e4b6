"""Rules of Schedule-Free."""

import triton
import triton.language as tl

from fused_optim.engine.layout import GroupHparams, TensorScalars

from ..arithmetic import divide, finite, largest_lr, move_average_square, positive_power, square_root
from .rule import BiasCorrections, Rule


@triton.jit
def schedule_free_scalars(group: GroupHparams, at: BiasCorrections, running: tl.tuple) -> tl.tuple:
    """The weight of z in the average; lr after its warm-up; the step of y; weight decay. Running: weight_sum,
    lr_max."""
    warms_up = at.step < group.option_a
    lr = tl.where(warms_up, group.lr * (at.step / tl.where(warms_up, group.option_a, 1.0)), group.lr)
    lr_max = largest_lr(lr, running[1])
    weight = positive_power(at.step, group.option_b) * positive_power(lr_max, group.option_c)
    total = running[0] + weight
    share = tl.where(total > 0.0, weight / tl.where(total > 0.0, total, 1.0), 0.0)
    return (share, lr, lr * (1.0 - group.beta1 * (1.0 - share)), group.option_d), (total, lr_max)


@triton.jit
def schedule_free_move(h: TensorScalars, y: tl.tensor, z: tl.tensor, direction: tl.tensor) -> tl.tuple:
    """What y is moved by, and the new z. With weight decay at y."""
    direction = tl.fma(h.own_d, finite(y), direction)
    return tl.fma(h.own_c, direction, h.own_a * finite(y - z)), tl.fma(-h.own_b, direction, z)


@triton.jit
def schedule_free_adamw(h: TensorScalars, param: tl.tensor, grad: tl.tensor, states: tl.tuple) -> tl.tuple:
    """Schedule-Free AdamW, arXiv:2405.15682, as in the package schedulefree. The param is y. Options: warmup_steps, r,
    weight_lr_power, weight_decay. States: z, exp_avg_sq."""
    exp_avg_sq = move_average_square(states[1], grad, h.weight2, h.small_beta2)
    direction = divide(grad, tl.fma(square_root(exp_avg_sq), h.denom_scale, h.eps))
    change, z = schedule_free_move(h, param, states[0], direction)
    return change, (z, exp_avg_sq)


@triton.jit
def schedule_free_sgd(h: TensorScalars, param: tl.tensor, grad: tl.tensor, states: tl.tuple) -> tl.tuple:
    """Schedule-Free SGD, arXiv:2405.15682, as in the package schedulefree. States: z."""
    change, z = schedule_free_move(h, param, states[0], grad)
    return change, (z,)


RULES = {
    "schedule_free_adamw": Rule(schedule_free_adamw, schedule_free_scalars, running=2),
    "schedule_free_sgd": Rule(schedule_free_sgd, schedule_free_scalars, running=2),
}
