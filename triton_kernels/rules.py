"""Rules: the arithmetic of each optimizer, on values already in registers. Mirrors csrc/rules.h.

A rule gets the hyperparameters `h`, the param, the gradient and a tuple of states, and returns the update that the
walker subtracts from the param, and the new states. All values have one dtype: float32, or float64 for float64 tensors.
"""

from typing import NamedTuple

import triton
import triton.language as tl


class Hyper(NamedTuple):
    """What a rule reads: one scalar each per tensor, written by prep. The order is that of the table's `hyper`."""

    lr: tl.tensor
    beta1: tl.tensor
    beta2: tl.tensor
    eps: tl.tensor
    weight1: tl.tensor  # 1 - beta1
    weight2: tl.tensor  # 1 - beta2
    step_size: tl.tensor  # lr / bias_correction1
    denom_scale: tl.tensor  # 1 / sqrt(bias_correction2)
    grad_scale: tl.tensor  # multiplies the gradient: unscaling, and the sign of maximize
    l2: tl.tensor  # weight decay that goes into the gradient
    decay: tl.tensor  # weight decay that goes past it: lr * weight_decay
    skip: tl.tensor  # 1: leave this tensor alone
    first: tl.tensor  # 1 on the first update of this tensor
    a: tl.tensor  # the rule's own numbers
    b: tl.tensor
    step: tl.tensor  # number of this update, from 1


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
    forget = minimum(weight * average, largest(x.dtype))
    return tl.fma(weight * x, x, average - forget)


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


RULES = {"adam": adam}
