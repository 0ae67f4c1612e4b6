"""Rules: the arithmetic of each optimizer, on values already in registers. Mirrors csrc/rules/.

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


class BiasCorrections(NamedTuple):
    """The steps of tensors, counted from 1, and 1 - beta**step for the betas, in float64."""

    step: tl.tensor
    correction1: tl.tensor
    correction2: tl.tensor
    correction3: tl.tensor


class Rule(NamedTuple):
    update: triton.JITFunction
    scalars: triton.JITFunction | None = None
    direction: triton.JITFunction | None = None
    measure: triton.JITFunction | None = None
    ratio: triton.JITFunction | None = None
    scales_decay: bool = False
    running: int = 0
