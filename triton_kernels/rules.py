"""Rules: the arithmetic of each optimizer, on values already in registers. Mirrors csrc/rules.h.

A rule gets the hyperparameters `h`, the param, the gradient and a tuple of states, and returns the update that the
walker subtracts from the param, and the new states. All values have one dtype: float32, or float64 for float64 tensors.

A rule with a `direction` is walked twice, because each tensor's update is scaled by the ratio of two norms: its
`update` gets no param and returns the new states alone, and `direction` makes the update of these, before lr and decay.
"""

from typing import NamedTuple

import triton
import triton.language as tl


class Hyper(NamedTuple):
    """What a rule reads: one scalar each per tensor, written by prep. The order is that of the table's `hyper`."""

    lr: tl.tensor
    beta1: tl.tensor
    ema_weight: tl.tensor  # of the new param in the average of the weights
    eps: tl.tensor
    weight1: tl.tensor  # 1 - beta1
    weight2: tl.tensor  # 1 - beta2
    step_size: tl.tensor  # lr / bias_correction1
    denom_scale: tl.tensor  # 1 / sqrt(bias_correction2)
    grad_scale: tl.tensor  # multiplies the gradient: unscaling, and the sign of maximize
    l2: tl.tensor  # weight decay that goes into the gradient
    decay: tl.tensor  # weight decay that goes past it, lr included (but where a trust ratio follows)
    skip: tl.tensor  # 1: leave this tensor alone
    first: tl.tensor  # 1 on the first update of this tensor
    weight_a: tl.tensor  # 1 - a and 1 - b, of the rule's own numbers
    weight_b: tl.tensor
    debias: tl.tensor  # 1 / bias_correction1


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
def sign(x: tl.tensor) -> tl.tensor:
    """-1, 0 or 1; 0 of NaN, as torch.sign."""
    return (x > 0.0).to(x.dtype) - (x < 0.0).to(x.dtype)


@triton.jit
def adam(h: Hyper, param: tl.tensor, grad: tl.tensor, states: tl.tuple) -> tl.tuple:
    """Adam, arXiv:1412.6980; with a third state amsgrad, Reddi et al., ICLR 2018, whose maximum torch takes before bias
    correction. States: exp_avg, exp_avg_sq, max_exp_avg_sq."""
    exp_avg = lerp(states[0], grad, h.weight1)
    exp_avg_sq = lerp_square(states[1], grad, h.weight2)
    new_states: tl.tuple = (exp_avg, exp_avg_sq)
    if len(states) == 3:
        exp_avg_sq = maximum(states[2], exp_avg_sq)
        new_states += (exp_avg_sq,)
    return h.step_size * divide(exp_avg, tl.fma(square_root(exp_avg_sq), h.denom_scale, h.eps)), new_states


@triton.jit
def sgd(h: Hyper, param: tl.tensor, grad: tl.tensor, states: tl.tuple) -> tl.tuple:
    """SGD as in torch: the first buffer is the gradient itself. beta1: momentum, a: dampening, b: nesterov.
    States: momentum_buffer, or none."""
    update = grad
    new_states: tl.tuple = ()
    if len(states) == 1:
        weight = tl.where(h.first != 0.0, 1.0, h.weight_a)
        momentum = tl.where(h.first != 0.0, 0.0, h.beta1)
        buffer = tl.fma(momentum, states[0], weight * grad)
        update = tl.where(h.weight_b == 0.0, tl.fma(h.beta1, buffer, grad), buffer)
        new_states = (buffer,)
    return h.lr * update, new_states


@triton.jit
def qhadam(h: Hyper, param: tl.tensor, grad: tl.tensor, states: tl.tuple) -> tl.tuple:
    """QHAdam, arXiv:1810.06801, section 4.2. a, b: nu1, nu2. States: exp_avg, exp_avg_sq."""
    exp_avg = lerp(states[0], grad, h.weight1)
    exp_avg_sq = lerp_square(states[1], grad, h.weight2)
    mean = lerp(h.debias * exp_avg, grad, h.weight_a)
    mean_sq = lerp_square(h.denom_scale * h.denom_scale * exp_avg_sq, grad, h.weight_b)
    return h.lr * divide(mean, square_root(mean_sq) + h.eps), (exp_avg, exp_avg_sq)


@triton.jit
def lamb_advance(h: Hyper, grad: tl.tensor, states: tl.tuple) -> tl.tuple:
    """LAMB, arXiv:1904.00962, with the choices of NVIDIA Apex. a: grad_averaging, b: bias_correction.
    States: exp_avg, exp_avg_sq."""
    weight = tl.where(h.weight_a != 0.0, 1.0, h.weight1)
    exp_avg = tl.fma(weight, grad, tl.fma(-h.weight1, states[0], states[0]))
    return exp_avg, lerp_square(states[1], grad, h.weight2)


@triton.jit
def lamb_direction(h: Hyper, states: tl.tuple) -> tl.tensor:
    debias = tl.where(h.weight_b != 0.0, 1.0, h.debias)
    scale = tl.where(h.weight_b != 0.0, 1.0, h.denom_scale)
    return debias * divide(states[0], tl.fma(square_root(states[1]), scale, h.eps))


@triton.jit
def lion(h: Hyper, param: tl.tensor, grad: tl.tensor, states: tl.tuple) -> tl.tuple:
    """Lion, arXiv:2302.06675. States: exp_avg."""
    return h.lr * sign(lerp(states[0], grad, h.weight1)), (lerp(states[0], grad, h.weight2),)


class Rule(NamedTuple):
    update: triton.JITFunction
    direction: triton.JITFunction | None = None


RULES = {
    "adam": Rule(adam),
    "sgd": Rule(sgd),
    "qhadam": Rule(qhadam),
    "lamb": Rule(lamb_advance, lamb_direction),
    "lion": Rule(lion),
}
