"""Rules: the arithmetic of each optimizer, on values already in registers. Mirrors csrc/rules.h.

A rule gets the scalars `h` of the tensor, the param, the gradient and a tuple of states. It returns the update that the
walker subtracts from the param, and the new states. All values have one dtype: float32, or float64 for float64 tensors.

A rule with a `direction` is walked twice, because the update of each tensor is scaled by the ratio of two norms. Its
`update` gets no param and returns the new states alone. `direction` computes the update from the new states, before lr
and decay.

A rule can have a function `scalars`, which computes the rule's own scalars (own_a to own_d) from the options of the
tensor's group, once per tensor and step, in float64. Of a rule with `running` scalars it also gets these, numbers of
the tensor that carry over from step to step, and returns them after its own.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from fused_optim.engine.layout import GroupHparams, TensorScalars


class BiasCorrections(NamedTuple):
    """The steps of tensors, counted from 1, and 1 - beta**step for both betas, in float64."""

    step: tl.tensor
    correction1: tl.tensor
    correction2: tl.tensor


@triton.constexpr_function
def largest(dtype: tl.dtype) -> float:
    """The largest finite number of a dtype."""
    return 1.7976931348623157e308 if dtype == tl.float64 else 3.4028234663852886e38


@triton.jit
def maximum(a: tl.tensor, b: tl.tensor) -> tl.tensor:
    """The maximum; NaN if either argument is NaN, as in torch.maximum."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def minimum(a: tl.tensor, b: tl.tensor) -> tl.tensor:
    """The minimum; NaN if either argument is NaN."""
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def finite(x: tl.tensor) -> tl.tensor:
    """x, or 0 where it is inf or NaN: 0 * inf would be NaN."""
    return tl.where(tl.abs(x) <= largest(x.dtype), x, 0.0)


@triton.jit
def square_root(x: tl.tensor) -> tl.tensor:
    """The correctly rounded root. tl.sqrt is correctly rounded in float64 only; tl.sqrt_rn takes float32 only."""
    if x.dtype == tl.float64:
        return tl.sqrt(x)
    else:
        return tl.sqrt_rn(x)


@triton.jit
def divide(x: tl.tensor, y: tl.tensor) -> tl.tensor:
    """The correctly rounded quotient. / is correctly rounded in float64 only; tl.div_rn takes float32 only."""
    if x.dtype == tl.float64:
        return x / y
    else:
        return tl.div_rn(x, y)


@triton.jit
def lerp(average: tl.tensor, x: tl.tensor, weight: tl.tensor) -> tl.tensor:
    """(1 - weight) * average + weight * x. `weight` is 1 - beta, rounded once from float64. For beta from 0.5,
    1 - weight is closer to beta than beta rounded to float, and the two weights sum to 1. With weight 1 (beta 0) the
    result is x if the average is finite."""
    return tl.fma(weight, x, tl.fma(-weight, average, average))


@triton.jit
def lerp_square(average: tl.tensor, x: tl.tensor, weight: tl.tensor) -> tl.tensor:
    """(1 - weight) * average + weight * x * x. x * x alone is not computed, because it can overflow where
    weight * x * x does not. An infinite average stays inf: unbounded, inf - inf would give NaN."""
    bounded = minimum(average, largest(x.dtype))
    return tl.fma(weight * x, x, tl.fma(-weight, bounded, average))


@triton.jit
def keep(average: tl.tensor, factor: tl.tensor, weight: tl.tensor, small_beta: tl.tensor) -> tl.tensor:
    """beta * average. For beta from 0.5, small_beta is 0 and beta is computed as 1 - weight, as in lerp. Below 0.5 the
    rounding error of the weight is large relative to beta. Then small_beta is beta, rounded once. It is constant for a
    tensor. factor: the average, or a finite number in place of an infinite average."""
    return tl.where(small_beta != 0.0, small_beta * average, tl.fma(-weight, factor, average))


@triton.jit
def move_average(average: tl.tensor, x: tl.tensor, weight: tl.tensor, small_beta: tl.tensor) -> tl.tensor:
    """beta * average + (1 - beta) * x, with an error of a few ulp for any beta in [0, 1)."""
    return tl.fma(weight, x, keep(average, average, weight, small_beta))


@triton.jit
def move_average_square(average: tl.tensor, x: tl.tensor, weight: tl.tensor, small_beta: tl.tensor) -> tl.tensor:
    """beta * average + (1 - beta) * x * x. As in lerp_square, x * x alone is not computed, and an infinite average
    stays inf."""
    return tl.fma(weight * x, x, keep(average, minimum(average, largest(x.dtype)), weight, small_beta))


@triton.jit
def sign(x: tl.tensor) -> tl.tensor:
    """-1, 0 or 1. The sign of NaN is 0, as in torch.sign."""
    return (x > 0.0).to(x.dtype) - (x < 0.0).to(x.dtype)


@triton.jit
def adam(h: TensorScalars, param: tl.tensor, grad: tl.tensor, states: tl.tuple) -> tl.tuple:
    """Adam, arXiv:1412.6980. With a third state it is AMSGrad, Reddi et al., ICLR 2018. As in torch, the maximum is
    taken before bias correction. States: exp_avg, exp_avg_sq, max_exp_avg_sq."""
    exp_avg = move_average(states[0], grad, h.weight1, h.small_beta1)
    exp_avg_sq = move_average_square(states[1], grad, h.weight2, h.small_beta2)
    new_states: tl.tuple = (exp_avg, exp_avg_sq)
    if len(states) == 3:
        exp_avg_sq = maximum(states[2], exp_avg_sq)
        new_states += (exp_avg_sq,)
    return h.step_size * divide(exp_avg, tl.fma(square_root(exp_avg_sq), h.denom_scale, h.eps)), new_states


@triton.jit
def sgd_scalars(group: GroupHparams, at: BiasCorrections) -> tl.tuple:
    """The weights of gradient and old buffer in the new buffer; momentum; nesterov."""
    first = at.step == 1.0
    return (
        tl.where(first, 1.0, 1.0 - group.option_a),
        tl.where(first, 0.0, group.beta1),
        group.beta1,
        group.option_b,
    )


@triton.jit
def sgd(h: TensorScalars, param: tl.tensor, grad: tl.tensor, states: tl.tuple) -> tl.tuple:
    """SGD as in torch: the first update sets the buffer to the gradient. beta1 is the momentum. Options: dampening,
    nesterov. States: momentum_buffer, or none."""
    update = grad
    new_states: tl.tuple = ()
    if len(states) == 1:
        buffer = tl.fma(h.own_b, states[0], h.own_a * grad)
        update = tl.where(h.own_d != 0.0, tl.fma(h.own_c, buffer, grad), buffer)
        new_states = (buffer,)
    return h.lr * update, new_states


@triton.jit
def qhadam_scalars(group: GroupHparams, at: BiasCorrections) -> tl.tuple:
    """The weights of the gradient and of its square in the two means."""
    return 1.0 - group.option_a, 1.0 - group.option_b


@triton.jit
def qhadam(h: TensorScalars, param: tl.tensor, grad: tl.tensor, states: tl.tuple) -> tl.tuple:
    """QHAdam, arXiv:1810.06801, section 4.2. Options: nu1, nu2. States: exp_avg, exp_avg_sq."""
    exp_avg = move_average(states[0], grad, h.weight1, h.small_beta1)
    exp_avg_sq = move_average_square(states[1], grad, h.weight2, h.small_beta2)
    mean = lerp(h.debias * exp_avg, grad, h.own_a)
    mean_sq = lerp_square(h.denom_scale * h.denom_scale * exp_avg_sq, grad, h.own_b)
    return h.lr * divide(mean, square_root(mean_sq) + h.eps), (exp_avg, exp_avg_sq)


@triton.jit
def lamb_scalars(group: GroupHparams, at: BiasCorrections) -> tl.tuple:
    """The weight of the gradient in exp_avg; debias and denom_scale, or 1 without bias correction."""
    return (
        tl.where(group.option_a != 0.0, 1.0 - group.beta1, 1.0),
        tl.where(group.option_b != 0.0, 1.0 / at.correction1, 1.0),
        tl.where(group.option_b != 0.0, 1.0 / tl.sqrt(at.correction2), 1.0),
    )


@triton.jit
def lamb_moments(h: TensorScalars, grad: tl.tensor, states: tl.tuple) -> tl.tuple:
    """LAMB, arXiv:1904.00962, as in NVIDIA Apex. Options: grad_averaging, bias_correction. States: exp_avg,
    exp_avg_sq."""
    exp_avg = tl.fma(h.own_a, grad, keep(states[0], states[0], h.weight1, h.small_beta1))
    return exp_avg, move_average_square(states[1], grad, h.weight2, h.small_beta2)


@triton.jit
def lamb_direction(h: TensorScalars, states: tl.tuple) -> tl.tensor:
    return h.own_b * divide(states[0], tl.fma(square_root(states[1]), h.own_c, h.eps))


@triton.jit
def lion(h: TensorScalars, param: tl.tensor, grad: tl.tensor, states: tl.tuple) -> tl.tuple:
    """Lion, arXiv:2302.06675. States: exp_avg."""
    mixed = move_average(states[0], grad, h.weight1, h.small_beta1)
    return h.lr * sign(mixed), (move_average(states[0], grad, h.weight2, h.small_beta2),)


@triton.jit
def adagrad_scalars(group: GroupHparams, at: BiasCorrections) -> tl.tuple:
    """The decayed lr."""
    return (group.lr / (1.0 + (at.step - 1.0) * group.option_a),)


@triton.jit
def adagrad(h: TensorScalars, param: tl.tensor, grad: tl.tensor, states: tl.tuple) -> tl.tuple:
    """Adagrad, Duchi et al., JMLR 2011, as in torch. Option: lr_decay. States: sum."""
    total = tl.fma(grad, grad, states[0])
    return h.own_a * divide(grad, square_root(total) + h.eps), (total,)


@triton.jit
def nadam_momentum(group: GroupHparams, step: tl.tensor) -> tl.tensor:
    return group.beta1 * (1.0 - 0.5 * tl.exp(-0.040821994520255166 * group.option_a * step))  # 0.96**(decay * step)


@triton.jit
def nadam_scalars(group: GroupHparams, at: BiasCorrections, running: tl.tuple) -> tl.tuple:
    """The weights of the gradient and of exp_avg in the mean; the bias correction of exp_avg_sq, before the root.
    Running: mu_product."""
    now = nadam_momentum(group, at.step)
    next = nadam_momentum(group, at.step + 1.0)
    product = (running[0].to(tl.float32) * now.to(tl.float32)).to(tl.float64)  # in float32, as in torch
    return ((1.0 - now) / (1.0 - product), next / (1.0 - product * next), 1.0 / at.correction2), (product,)


@triton.jit
def nadam(h: TensorScalars, param: tl.tensor, grad: tl.tensor, states: tl.tuple) -> tl.tuple:
    """NAdam, Dozat, ICLR 2016 workshop, as in torch. Option: momentum_decay. States: exp_avg, exp_avg_sq."""
    exp_avg = move_average(states[0], grad, h.weight1, h.small_beta1)
    exp_avg_sq = move_average_square(states[1], grad, h.weight2, h.small_beta2)
    mean = tl.fma(h.own_b, exp_avg, h.own_a * grad)
    return h.lr * divide(mean, square_root(h.own_c * exp_avg_sq) + h.eps), (exp_avg, exp_avg_sq)


@triton.jit
def radam_scalars(group: GroupHparams, at: BiasCorrections) -> tl.tuple:
    """The step size; whether exp_avg is divided by the root. It is not while the average of squares has few
    summands."""
    longest = 2.0 / (1.0 - group.beta2) - 1.0
    length = longest - 2.0 * at.step * (1.0 - at.correction2) / at.correction2
    rectifies = length > 5.0
    longest, length = tl.where(rectifies, longest, 6.0), tl.where(rectifies, length, 6.0)
    rectified = (length - 4.0) * (length - 2.0) * longest / ((longest - 4.0) * (longest - 2.0) * length)
    scale = tl.where(rectifies, tl.sqrt(rectified * at.correction2), 1.0)
    return group.lr / at.correction1 * scale, tl.where(rectifies, 1.0, 0.0)


@triton.jit
def radam(h: TensorScalars, param: tl.tensor, grad: tl.tensor, states: tl.tuple) -> tl.tuple:
    """RAdam, arXiv:1908.03265, as in torch. States: exp_avg, exp_avg_sq."""
    exp_avg = move_average(states[0], grad, h.weight1, h.small_beta1)
    exp_avg_sq = move_average_square(states[1], grad, h.weight2, h.small_beta2)
    divisor = tl.where(h.own_b != 0.0, square_root(exp_avg_sq) + h.eps, 1.0)
    return h.own_a * divide(exp_avg, divisor), (exp_avg, exp_avg_sq)


@triton.jit
def largest_lr(lr: tl.tensor, before: tl.tensor) -> tl.tensor:
    """The larger of lr and the largest lr before, which is stored as float32. A constant lr stays the largest."""
    return tl.where(lr.to(tl.float32).to(tl.float64) >= before, lr, before)


@triton.jit
def positive_power(base: tl.tensor, exponent: tl.tensor) -> tl.tensor:
    """base**exponent for base >= 0."""
    return tl.where(exponent == 0.0, 1.0, tl.exp(exponent * tl.log(base)))


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


class Rule(NamedTuple):
    update: triton.JITFunction
    scalars: triton.JITFunction | None = None
    direction: triton.JITFunction | None = None
    running: int = 0


RULES = {
    "adam": Rule(adam),
    "sgd": Rule(sgd, sgd_scalars),
    "qhadam": Rule(qhadam, qhadam_scalars),
    "lamb": Rule(lamb_moments, lamb_scalars, lamb_direction),
    "lion": Rule(lion),
    "adagrad": Rule(adagrad, adagrad_scalars),
    "nadam": Rule(nadam, nadam_scalars, running=1),
    "radam": Rule(radam, radam_scalars),
    "schedule_free_adamw": Rule(schedule_free_adamw, schedule_free_scalars, running=2),
    "schedule_free_sgd": Rule(schedule_free_sgd, schedule_free_scalars, running=2),
}
