"""Rules with momentum alone."""

import triton
import triton.language as tl

from fused_optim.engine.layout import GroupHparams, TensorScalars

from ..arithmetic import move_average, sign
from .rule import BiasCorrections, Rule


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
def lion(h: TensorScalars, param: tl.tensor, grad: tl.tensor, states: tl.tuple) -> tl.tuple:
    """Lion, arXiv:2302.06675. States: exp_avg."""
    mixed = move_average(states[0], grad, h.weight1, h.small_beta1)
    return h.lr * sign(mixed), (move_average(states[0], grad, h.weight2, h.small_beta2),)


RULES = {
    "sgd": Rule(sgd, sgd_scalars),
    "lion": Rule(lion),
}
