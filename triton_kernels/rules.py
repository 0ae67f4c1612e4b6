"""Rules: the arithmetic of each optimizer, on values already in registers. Mirrors csrc/rules.h.

A rule gets the scalars `h` of the tensor, the param, the gradient and a tuple of states, and returns the update that
the walker subtracts from the param, and the new states. All values have one dtype: float32, or float64 for float64
tensors.

A rule with a `direction` is walked twice, because each tensor's update is scaled by the ratio of two norms: its
`update` gets no param and returns the new states alone, and `direction` makes the update of these, before lr and decay.

A rule may have `scalars`, which makes scalars of its own (own_a to own_d) from the options of the tensor's group, once
per tensor and step, in float64.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from fused_optim.engine.layout import GroupHparams, TensorScalars


class BiasCorrections(NamedTuple):
    """The steps of tensors, counted from 1, and 1 - beta**step of both betas; float64."""

    step: tl.tensor
    correction1: tl.tensor
    correction2: tl.tensor


@triton.constexpr_function
def largest(dtype: tl.dtype) -> float:
    """The largest finite number of a dtype."""
    return 1.7976931348623157e308 if dtype == tl.float64 else 3.4028234663852886e38


@triton.jit
def maximum(a: tl.tensor, b: tl.tensor) -> tl.tensor:
    """The larger of the two; NaN if either is, as torch.maximum."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def minimum(a: tl.tensor, b: tl.tensor) -> tl.tensor:
    """The smaller of the two; NaN if either is."""
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def finite(x: tl.tensor) -> tl.tensor:
    """x, or 0 where it is inf or NaN: 0 * inf would be NaN."""
    return tl.where(tl.abs(x) <= largest(x.dtype), x, 0.0)


@triton.jit
def square_root(x: tl.tensor) -> tl.tensor:
    """Correctly rounded: tl.sqrt is only in float64, and tl.sqrt_rn takes nothing but float32."""
    if x.dtype == tl.float64:
        return tl.sqrt(x)
    else:
        return tl.sqrt_rn(x)


@triton.jit
def divide(x: tl.tensor, y: tl.tensor) -> tl.tensor:
    """Correctly rounded: / is only in float64, and tl.div_rn takes nothing but float32."""
    if x.dtype == tl.float64:
        return x / y
    else:
        return tl.div_rn(x, y)


@triton.jit
def lerp(average: tl.tensor, x: tl.tensor, weight: tl.tensor) -> tl.tensor:
    """(1 - weight) * average + weight * x. `weight` is rounded once from float64: 1 - float(weight) is closer to the
    truth than float(beta), and the two still sum to 1. With weight 1 (beta 0) the old average leaves no trace."""
    return tl.fma(weight, x, tl.fma(-weight, average, average))


@triton.jit
def lerp_square(average: tl.tensor, x: tl.tensor, weight: tl.tensor) -> tl.tensor:
    """The same of x * x: finite where weight * x * x is, and inf (not NaN) once the average is inf."""
    bounded = minimum(average, largest(x.dtype))
    return tl.fma(weight * x, x, tl.fma(-weight, bounded, average))


@triton.jit
def keep(average: tl.tensor, factor: tl.tensor, weight: tl.tensor, small_beta: tl.tensor) -> tl.tensor:
    """beta * average. A beta of 0.5 or more is 1 - weight, as in lerp, and small_beta is 0. Below 0.5 the rounding of
    the weight is large beside beta, and small_beta is beta, rounded once. It is the same for a whole tensor.
    factor: the average, or a finite number in the place of inf."""
    return tl.where(small_beta != 0.0, small_beta * average, tl.fma(-weight, factor, average))


@triton.jit
def move_average(average: tl.tensor, x: tl.tensor, weight: tl.tensor, small_beta: tl.tensor) -> tl.tensor:
    """beta * average + (1 - beta) * x, exact to a few ulp for any beta in [0, 1)."""
    return tl.fma(weight, x, keep(average, average, weight, small_beta))


@triton.jit
def move_average_square(average: tl.tensor, x: tl.tensor, weight: tl.tensor, small_beta: tl.tensor) -> tl.tensor:
    """The same of x * x: finite where weight * x * x is, and inf (not NaN) once the average is inf."""
    return tl.fma(weight * x, x, keep(average, minimum(average, largest(x.dtype)), weight, small_beta))


@triton.jit
def sign(x: tl.tensor) -> tl.tensor:
    """-1, 0 or 1; 0 of NaN, as torch.sign."""
    return (x > 0.0).to(x.dtype) - (x < 0.0).to(x.dtype)


@triton.jit
def adam(h: TensorScalars, param: tl.tensor, grad: tl.tensor, states: tl.tuple) -> tl.tuple:
    """Adam, arXiv:1412.6980; with a third state amsgrad, Reddi et al., ICLR 2018, whose maximum torch takes before bias
    correction. States: exp_avg, exp_avg_sq, max_exp_avg_sq."""
    exp_avg = move_average(states[0], grad, h.weight1, h.small_beta1)
    exp_avg_sq = move_average_square(states[1], grad, h.weight2, h.small_beta2)
    new_states: tl.tuple = (exp_avg, exp_avg_sq)
    if len(states) == 3:
        exp_avg_sq = maximum(states[2], exp_avg_sq)
        new_states += (exp_avg_sq,)
    return h.step_size * divide(exp_avg, tl.fma(square_root(exp_avg_sq), h.denom_scale, h.eps)), new_states


@triton.jit
def sgd_scalars(group: GroupHparams, at: BiasCorrections) -> tl.tuple:
    """Weights of gradient and buffer in the new buffer, momentum, nesterov."""
    first = at.step == 1.0
    return (
        tl.where(first, 1.0, 1.0 - group.option_a),
        tl.where(first, 0.0, group.beta1),
        group.beta1,
        group.option_b,
    )


@triton.jit
def sgd(h: TensorScalars, param: tl.tensor, grad: tl.tensor, states: tl.tuple) -> tl.tuple:
    """SGD as in torch: the first buffer is the gradient itself. Options: beta1 is the momentum; dampening, nesterov.
    States: momentum_buffer, or none."""
    update = grad
    new_states: tl.tuple = ()
    if len(states) == 1:
        buffer = tl.fma(h.own_b, states[0], h.own_a * grad)
        update = tl.where(h.own_d != 0.0, tl.fma(h.own_c, buffer, grad), buffer)
        new_states = (buffer,)
    return h.lr * update, new_states


@triton.jit
def qhadam_scalars(group: GroupHparams, at: BiasCorrections) -> tl.tuple:
    """Weights of the gradient beside the two averages."""
    return 1.0 - group.option_a, 1.0 - group.option_b


@triton.jit
def qhadam(h: TensorScalars, param: tl.tensor, grad: tl.tensor, states: tl.tuple) -> tl.tuple:
    """QHAdam, arXiv:1810.06801, section 4.2. Options: the two nus. States: exp_avg, exp_avg_sq."""
    exp_avg = move_average(states[0], grad, h.weight1, h.small_beta1)
    exp_avg_sq = move_average_square(states[1], grad, h.weight2, h.small_beta2)
    mean = lerp(h.debias * exp_avg, grad, h.own_a)
    mean_sq = lerp_square(h.denom_scale * h.denom_scale * exp_avg_sq, grad, h.own_b)
    return h.lr * divide(mean, square_root(mean_sq) + h.eps), (exp_avg, exp_avg_sq)


@triton.jit
def lamb_scalars(group: GroupHparams, at: BiasCorrections) -> tl.tuple:
    """Weight of the gradient in exp_avg; debias and denom_scale, 1 without bias correction."""
    return (
        tl.where(group.option_a != 0.0, 1.0 - group.beta1, 1.0),
        tl.where(group.option_b != 0.0, 1.0 / at.correction1, 1.0),
        tl.where(group.option_b != 0.0, 1.0 / tl.sqrt(at.correction2), 1.0),
    )


@triton.jit
def lamb_moments(h: TensorScalars, grad: tl.tensor, states: tl.tuple) -> tl.tuple:
    """LAMB, arXiv:1904.00962, with the choices of NVIDIA Apex. Options: grad_averaging, bias_correction.
    States: exp_avg, exp_avg_sq."""
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


class Rule(NamedTuple):
    update: triton.JITFunction
    scalars: triton.JITFunction | None = None
    direction: triton.JITFunction | None = None


RULES = {
    "adam": Rule(adam),
    "sgd": Rule(sgd, sgd_scalars),
    "qhadam": Rule(qhadam, qhadam_scalars),
    "lamb": Rule(lamb_moments, lamb_scalars, lamb_direction),
    "lion": Rule(lion),
}
