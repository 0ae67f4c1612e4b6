"""Rules: the arithmetic of each optimizer, on values already in registers. Mirrors csrc/rules.h.

A rule gets the scalars `h` of the tensor, the param, the gradient and a tuple of states. It returns the update that the
walker subtracts from the param, and the new states. All values have one dtype: float32, or float64 for float64 tensors.

A rule with a `direction` is walked twice, because the update of each tensor is multiplied by a ratio that depends on
the whole tensor. Its `update` gets no param and returns the new states alone. `measure` makes two numbers of each
element, whose squares are summed over the tensor, and `ratio` makes the ratio of both sums. `direction` computes the
update from the new states, before lr and decay. `scales_decay`: whether the ratio multiplies decoupled decay, too.

A rule can have a function `scalars`, which computes the rule's own scalars (own_a to own_f) from the options of the
tensor's group, once per tensor and step, in float64. Of a rule with `running` scalars it also gets these, numbers of
the tensor that carry over from step to step, and returns them after its own.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from fused_optim.engine.layout import GroupHparams, TensorScalars


class BiasCorrections(NamedTuple):
    """The steps of tensors, counted from 1, and 1 - beta**step for the betas, in float64."""

    step: tl.tensor
    correction1: tl.tensor
    correction2: tl.tensor
    correction3: tl.tensor


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
def lamb_measure(h: TensorScalars, param: tl.tensor, grad: tl.tensor, states: tl.tuple) -> tl.tuple:
    """The param, and the update with decay."""
    return param, tl.fma(h.decay, finite(param), lamb_direction(h, states))


@triton.jit
def lamb_ratio(group: GroupHparams, params: tl.tensor, updates: tl.tensor) -> tl.tensor:
    param, update = tl.sqrt(params), tl.sqrt(updates)
    ratio = param / tl.where(update == 0.0, 1.0, update)
    ratio = tl.where((param == 0.0) | (update == 0.0), 1.0, ratio)
    ratio = tl.where(ratio < group.trust_low, group.trust_low, ratio)
    ratio = tl.where(ratio > group.trust_high, group.trust_high, ratio)
    return tl.where((group.weight_decay == 0.0) & (group.trust_always == 0.0), 1.0, ratio)


@triton.jit
def lion(h: TensorScalars, param: tl.tensor, grad: tl.tensor, states: tl.tuple) -> tl.tuple:
    """Lion, arXiv:2302.06675. States: exp_avg."""
    mixed = move_average(states[0], grad, h.weight1, h.small_beta1)
    return h.lr * sign(mixed), (move_average(states[0], grad, h.weight2, h.small_beta2),)


@triton.jit
def muon_scalars(group: GroupHparams, at: BiasCorrections) -> tl.tuple:
    """1 - momentum; momentum if it is below 0.5, otherwise 0; nesterov."""
    momentum = group.option_a
    return 1.0 - momentum, tl.where(momentum < 0.5, momentum, 0.0), group.option_b


@triton.jit
def muon_moments(h: TensorScalars, grad: tl.tensor, states: tl.tuple) -> tl.tuple:
    """Muon, Jordan et al., 2024, as in torch. The first walk puts the update into the second state, a workspace, and
    torch orthogonalizes it there. Options: momentum, nesterov. States: momentum_buffer, workspace."""
    buffer = move_average(states[0], grad, h.own_a, h.own_b)
    return buffer, tl.where(h.own_c != 0.0, move_average(buffer, grad, h.own_a, h.own_b), buffer)


@triton.jit
def muon_direction(h: TensorScalars, states: tl.tuple) -> tl.tensor:
    return states[1]


@triton.jit
def muon_measure(h: TensorScalars, param: tl.tensor, grad: tl.tensor, states: tl.tuple) -> tl.tuple:
    """The update, whose norm the orthogonalization needs. The first sum is not used. A constant in its place would be
    summed in a layout of its own, through shared memory."""
    return states[1], states[1]


@triton.jit
def muon_ratio(group: GroupHparams, first: tl.tensor, second: tl.tensor) -> tl.tensor:
    return tl.full(first.shape, 1.0, first.dtype)


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


@triton.jit
def ademamix_scalars(group: GroupHparams, at: BiasCorrections) -> tl.tuple:
    """1 - beta3; beta3 if it is small; alpha. In the warm-up the half-life of the slow average grows linearly."""
    alpha = group.option_a * (at.step / tl.maximum(at.step, group.option_b))
    done = at.step / tl.maximum(at.step, group.option_c)
    growing = tl.exp(1.0 / ((1.0 - done) / tl.log(group.beta1 + 1e-8) + done / tl.log(group.beta3 + 1e-8)))
    beta3 = tl.where(at.step < group.option_c, growing, group.beta3)
    return 1.0 - beta3, tl.where(beta3 < 0.5, beta3, 0.0), alpha


@triton.jit
def ademamix(h: TensorScalars, param: tl.tensor, grad: tl.tensor, states: tl.tuple) -> tl.tuple:
    """AdEMAMix, arXiv:2409.03137, as in Apple's ml-ademamix. Options: alpha, alpha_warmup, beta3_warmup. States:
    exp_avg_fast, exp_avg_slow, exp_avg_sq."""
    fast = move_average(states[0], grad, h.weight1, h.small_beta1)
    slow = move_average(states[1], grad, h.own_a, h.own_b)
    exp_avg_sq = move_average_square(states[2], grad, h.weight2, h.small_beta2)
    mean = tl.fma(h.own_c, slow, h.debias * fast)
    return h.lr * divide(mean, tl.fma(square_root(exp_avg_sq), h.denom_scale, h.eps)), (fast, slow, exp_avg_sq)


@triton.jit
def adopt_scalars(group: GroupHparams, at: BiasCorrections) -> tl.tuple:
    """The weight of the square; the bound of the normalised gradient; the least divisor. With the bound 0 nothing
    moves."""
    first = at.step == 1.0
    bound = group.option_a * tl.exp(group.option_b * tl.log(tl.where(first, 1.0, at.step - 1.0)))
    return (
        tl.where(first, 1.0, 1.0 - group.beta2),
        tl.where(first, 0.0, bound),
        tl.where(first, 1.0, group.eps),
    )


@triton.jit
def adopt(h: TensorScalars, param: tl.tensor, grad: tl.tensor, states: tl.tuple) -> tl.tuple:
    """ADOPT, arXiv:2411.02853. The first step only sets exp_avg_sq. Options: factor and exponent of the clipping bound.
    States: exp_avg, exp_avg_sq."""
    normed = divide(grad, maximum(square_root(states[1]), h.own_c))
    clipped = tl.where(normed > h.own_b, h.own_b, tl.where(normed < -h.own_b, -h.own_b, normed))
    exp_avg = move_average(states[0], clipped, h.weight1, h.small_beta1)
    kept = keep(states[1], minimum(states[1], largest(grad.dtype)), h.weight2, h.small_beta2)
    return h.lr * exp_avg, (exp_avg, tl.fma(h.own_a * grad, grad, kept))


@triton.jit
def adan_scalars(group: GroupHparams, at: BiasCorrections) -> tl.tuple:
    """The rate of exp_avg_diff; 0 in the first step, which has no difference; the bias correction of the root of
    exp_avg_sq; 1 - beta3; beta3 if it is small."""
    return (
        group.lr * group.beta2 / at.correction2,
        tl.where(at.step == 1.0, 0.0, 1.0),
        1.0 / tl.sqrt(at.correction3),
        1.0 - group.beta3,
        tl.where(group.beta3 < 0.5, group.beta3, 0.0),
    )


@triton.jit
def adan(h: TensorScalars, param: tl.tensor, grad: tl.tensor, states: tl.tuple) -> tl.tuple:
    """Adan, arXiv:2208.06677, as in sail-sg/Adan. States: exp_avg, exp_avg_diff, neg_pre_grad, exp_avg_sq."""
    change = h.own_b * (grad + states[2])
    exp_avg = move_average(states[0], grad, h.weight1, h.small_beta1)
    exp_avg_diff = move_average(states[1], change, h.weight2, h.small_beta2)
    ahead = grad + keep(change, change, h.weight2, h.small_beta2)
    exp_avg_sq = move_average_square(states[3], ahead, h.own_d, h.own_e)
    mean = tl.fma(h.own_a, exp_avg_diff, h.step_size * exp_avg)
    update = divide(mean, tl.fma(square_root(exp_avg_sq), h.own_c, h.eps))
    return update, (exp_avg, exp_avg_diff, -grad, exp_avg_sq)


@triton.jit
def small_debiased_beta(beta: tl.tensor, step: tl.tensor, correction: tl.tensor, weight: tl.tensor) -> tl.tensor:
    """beta (1 - beta**(step - 1)) / (1 - beta**step), if it is small. weight: 1 minus it, which loses digits for a
    small beta, as 1 - beta**(step - 1) does for a large one."""
    exact = beta * (1.0 - positive_power(beta, step - 1.0)) / correction
    return tl.where(weight <= 0.5, 0.0, tl.where(beta < 0.5, exact, 1.0 - weight))


@triton.jit
def stableadamw_scalars(group: GroupHparams, at: BiasCorrections) -> tl.tuple:
    """1 - beta of the debiased betas; these betas if they are small."""
    weight1, weight2 = (1.0 - group.beta1) / at.correction1, (1.0 - group.beta2) / at.correction2
    small1 = small_debiased_beta(group.beta1, at.step, at.correction1, weight1)
    return weight1, weight2, small1, small_debiased_beta(group.beta2, at.step, at.correction2, weight2)


@triton.jit
def stableadamw_moments(h: TensorScalars, grad: tl.tensor, states: tl.tuple) -> tl.tuple:
    """StableAdamW, arXiv:2304.13013, algorithm 2. States: exp_avg, exp_avg_sq."""
    exp_avg = move_average(states[0], grad, h.own_a, h.own_c)
    return exp_avg, move_average_square(states[1], grad, h.own_b, h.own_d)


@triton.jit
def stableadamw_direction(h: TensorScalars, states: tl.tuple) -> tl.tensor:
    return divide(states[0], square_root(states[1]) + h.eps)


@triton.jit
def stableadamw_measure(h: TensorScalars, param: tl.tensor, grad: tl.tensor, states: tl.tuple) -> tl.tuple:
    """1, or -1 for NaN, whose square counts the elements, and the gradient over the root of exp_avg_sq. A constant 1
    would have another layout than the gradient, which takes shared memory."""
    return tl.where(grad == grad, 1.0, -1.0).to(grad.dtype), divide(grad, maximum(square_root(states[1]), h.eps))


@triton.jit
def stableadamw_ratio(group: GroupHparams, count: tl.tensor, squares: tl.tensor) -> tl.tensor:
    rms = tl.sqrt(squares / tl.where(count == 0.0, 1.0, count))
    return 1.0 / maximum(rms, 1.0)


class Rule(NamedTuple):
    update: triton.JITFunction
    scalars: triton.JITFunction | None = None
    direction: triton.JITFunction | None = None
    measure: triton.JITFunction | None = None
    ratio: triton.JITFunction | None = None
    scales_decay: bool = False
    running: int = 0


RULES = {
    "adam": Rule(adam),
    "sgd": Rule(sgd, sgd_scalars),
    "qhadam": Rule(qhadam, qhadam_scalars),
    "lamb": Rule(lamb_moments, lamb_scalars, lamb_direction, lamb_measure, lamb_ratio, scales_decay=True),
    "lion": Rule(lion),
    "adagrad": Rule(adagrad, adagrad_scalars),
    "muon": Rule(muon_moments, muon_scalars, direction=muon_direction, measure=muon_measure, ratio=muon_ratio),
    "nadam": Rule(nadam, nadam_scalars, running=1),
    "radam": Rule(radam, radam_scalars),
    "schedule_free_adamw": Rule(schedule_free_adamw, schedule_free_scalars, running=2),
    "schedule_free_sgd": Rule(schedule_free_sgd, schedule_free_scalars, running=2),
    "ademamix": Rule(ademamix, ademamix_scalars),
    "adopt": Rule(adopt, adopt_scalars),
    "adan": Rule(adan, adan_scalars),
    "stableadamw": Rule(
        stableadamw_moments,
        stableadamw_scalars,
        stableadamw_direction,
        stableadamw_measure,
        stableadamw_ratio,
        scales_decay=True,
    ),
}
