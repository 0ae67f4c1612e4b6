"""Rules of two walks."""

import triton
import triton.language as tl

from fused_optim.engine.layout import GroupHparams, TensorScalars

from ..arithmetic import divide, finite, keep, maximum, move_average, move_average_square, positive_power, square_root
from .rule import BiasCorrections, Rule


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


RULES = {
    "lamb": Rule(lamb_moments, lamb_scalars, lamb_direction, lamb_measure, lamb_ratio, scales_decay=True),
    "stableadamw": Rule(
        stableadamw_moments,
        stableadamw_scalars,
        stableadamw_direction,
        stableadamw_measure,
        stableadamw_ratio,
        scales_decay=True,
    ),
    "muon": Rule(muon_moments, muon_scalars, direction=muon_direction, measure=muon_measure, ratio=muon_ratio),
}
