"""Rules with an average of squared gradients, or their sum."""

import triton
import triton.language as tl

from fused_optim.engine.layout import GroupHparams, TensorScalars

from ..arithmetic import (
    divide,
    keep,
    largest,
    lerp,
    lerp_square,
    maximum,
    minimum,
    move_average,
    move_average_square,
    square_root,
)
from .rule import BiasCorrections, Rule


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


RULES = {
    "adam": Rule(adam),
    "qhadam": Rule(qhadam, qhadam_scalars),
    "adagrad": Rule(adagrad, adagrad_scalars),
    "nadam": Rule(nadam, nadam_scalars, running=1),
    "radam": Rule(radam, radam_scalars),
    "ademamix": Rule(ademamix, ademamix_scalars),
    "adopt": Rule(adopt, adopt_scalars),
    "adan": Rule(adan, adan_scalars),
}
