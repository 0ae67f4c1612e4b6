"""Adagrad."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from ..engine.table import Rule
from .base import FusedOptimizer
from .options import Common

OPTIONS = ("lr_decay", "option_a", 1), ("eps", "eps", 1)


class FusedAdagrad(FusedOptimizer, torch.optim.Adagrad):
    r"""Adagrad in one pass over memory, in place of torch.optim.Adagrad: same arguments, groups, states, errors and
    checkpoints.

    With $g$ the gradient, plus $\lambda p$ if weight_decay $\lambda$ is not 0, and $t$ the number of updates:

    $$ s = s + g^2, \quad p = p - \frac{lr}{1 + (t-1) \cdot lr\_decay} \frac{g}{\sqrt{s} + \epsilon} $$

    As in torch, the states exist before the first step. Unlike in torch, a param group can have its own
    initial_accumulator_value, and params of groups that are added later get states.

    Args:
        params: tensors, (name, tensor) pairs, or dicts of groups; float32, bfloat16, float16, float64 or complex, any
            shape and memory layout.
        lr: learning rate; a one-element tensor is read at every step, on its device.
        lr_decay: the learning rate is divided by 1 + (t - 1) * lr_decay.
        weight_decay: L2 penalty.
        initial_accumulator_value: start value of the sums $s$.
        eps: added to the root.
        maximize: ascend.
        foreach, fused: accepted and without effect.
        differentiable: must be False.
        ours: options of every class, see FusedOptimizer: backend="auto", state_dtype=None, master_weights=None,
            rounding="nearest", max_grad_norm=None, norm_type=2.0, skip_nonfinite=False, norm_group=None,
            ema_decay=None, ema_dtype=None.

    Raises:
        ValueError: a hyperparameter is out of range (torch's messages).
        RuntimeError: differentiable=True, or the named backend cannot run here; in step(), a gradient is sparse.

    Sources: Duchi, Hazan and Singer, JMLR 12 (2011); torch.optim.Adagrad.
    """

    rule = Rule("adagrad", ("sum",), OPTIONS, squares=("sum",), starts={"sum": "initial_accumulator_value"}, eager=True)

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-2,
        lr_decay: float = 0,
        weight_decay: float = 0,
        initial_accumulator_value: float = 0,
        eps: float = 1e-10,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **ours: Unpack[Common],
    ) -> None:
        own = lr, lr_decay, weight_decay, initial_accumulator_value, eps, foreach
        super().__init__(params, *own, maximize=maximize, differentiable=differentiable, fused=fused, **ours)
