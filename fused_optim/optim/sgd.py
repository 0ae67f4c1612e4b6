"""SGD and SGDW, with momentum."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from ..engine.table import Rule
from .base import FusedOptimizer
from .decay import Decoupled
from .options import Common, Decayed

SGD = Rule(
    name="sgd",
    states=("momentum_buffer",),
    switched={"momentum_buffer": "momentum"},
    counted=False,
    options=(("momentum", "beta1", 1), ("dampening", "option_a", 1), ("nesterov", "option_b", 1)),
)


class FusedSGD(FusedOptimizer, torch.optim.SGD):
    r"""SGD in one pass over memory, in place of torch.optim.SGD: same arguments, groups, states, errors and
    checkpoints.

    With $g$ the gradient, plus $\lambda p$ where weight_decay $\lambda$ is not 0:

    $$ b = \mu b + (1 - dampening) g, \quad p = p - lr \cdot b $$

    The first buffer is $g$ itself, whenever a param's first update comes. With nesterov $g + \mu b$ takes
    the place of $b$, and without momentum $g$.

    Args:
        params: tensors, (name, tensor) pairs, or dicts of groups; float32, bfloat16, float16, float64 or complex, any
            shape and memory layout.
        lr: learning rate; a one-element tensor is read at every step, where it lies.
        momentum: $\mu$, 0 or more.
        dampening: keeps a share of the gradient out of the buffer.
        weight_decay: L2 penalty.
        nesterov: needs momentum and no dampening.
        maximize: ascend.
        foreach, fused: accepted and without effect.
        differentiable: must be False.
        ours: options of every class, see FusedOptimizer: backend="auto", state_dtype=None, master_weights=None,
            rounding="nearest", max_grad_norm=None, norm_type=2.0, skip_nonfinite=False, norm_group=None,
            ema_decay=None, ema_dtype=None.

    Raises:
        ValueError: a hyperparameter is out of range (torch's messages).
        RuntimeError: differentiable=True, or the named backend cannot run here.

    Source: torch.optim.SGD; Nesterov's form as in Sutskever et al., ICML 2013.
    """

    rule = SGD

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        **ours: Unpack[Common],
    ) -> None:
        super().__init__(
            params,
            lr,
            momentum,
            dampening,
            weight_decay,
            nesterov,
            maximize=maximize,
            foreach=foreach,
            differentiable=differentiable,
            fused=fused,
            **ours,
        )


class FusedSGDW(Decoupled, FusedSGD):
    r"""SGD with decay decoupled from the gradient: every step multiplies each param by $1 - lr \cdot \lambda$
    before its update, which knows nothing of the decay.

    Groups hold "decoupled_weight_decay" besides torch's keys.

    Args:
        params, lr, momentum, dampening, nesterov, maximize, foreach, fused, differentiable: as FusedSGD's.
        weight_decay: share of the param that a step takes off, measured as decay says.
        ours: options of decoupled decay, see fused_optim.decay.Decoupled: decay="torch", lr_reference=None,
            decay_period=None, corrected_decay=False, cautious_decay=False; and of every class, see FusedOptimizer:
            backend="auto", state_dtype=None, master_weights=None, rounding="nearest", max_grad_norm=None,
            norm_type=2.0, skip_nonfinite=False, norm_group=None, ema_decay=None, ema_dtype=None.

    Raises:
        ValueError: a hyperparameter is out of range (torch's messages).
        RuntimeError: differentiable=True, or the named backend cannot run here.

    Source: Loshchilov and Hutter, arXiv:1711.05101, algorithm 1.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 1e-2,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        **ours: Unpack[Decayed],
    ) -> None:
        super().__init__(
            params,
            lr,
            momentum,
            dampening,
            weight_decay,
            nesterov,
            maximize=maximize,
            foreach=foreach,
            differentiable=differentiable,
            fused=fused,
            **ours,
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group({**param_group, "decoupled_weight_decay": True})
