"""Adam and AdamW, with amsgrad."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from ..engine.table import Rule
from .base import FusedOptimizer
from .decay import Decoupled
from .options import Common, Decayed

ADAM = Rule(
    name="adam",
    states=("exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
    switched={"max_exp_avg_sq": "amsgrad"},
    squares=("exp_avg_sq", "max_exp_avg_sq"),
    options=(("betas", "beta1", 2), ("eps", "eps", 1)),
)


class FusedAdam(FusedOptimizer, torch.optim.Adam):
    r"""Adam in one pass over memory, in place of torch.optim.Adam: same arguments, groups, states, errors and
    checkpoints.

    With $g$ the gradient, plus $\lambda p$ where weight_decay $\lambda$ is not 0:

    $$
    m = \beta_1 m + (1-\beta_1) g, \quad v = \beta_2 v + (1-\beta_2) g^2, \quad
    p = p - \frac{lr}{1-\beta_1^t} \frac{m}{\sqrt{v}/\sqrt{1-\beta_2^t} + \epsilon}
    $$

    With amsgrad the largest $v$ so far takes its place in the root.

    Args:
        params: tensors, (name, tensor) pairs, or dicts of groups; float32, bfloat16, float16, float64 or complex, any
            shape and memory layout.
        lr: learning rate; a one-element tensor is read at every step, where it lies.
        betas: decay rates of the two averages, each in [0, 1).
        eps: added to the root, after bias correction.
        weight_decay: L2 penalty; decoupled from the gradient (as in AdamW) with decoupled_weight_decay=True.
        amsgrad: keep max_exp_avg_sq.
        maximize: ascend.
        foreach, fused: accepted and without effect.
        capturable: allow the step in a CUDA graph.
        differentiable: must be False.
        ours: options of every class, see FusedOptimizer: backend="auto", state_dtype=None, master_weights=None,
            rounding="nearest", max_grad_norm=None, norm_type=2.0, skip_nonfinite=False, norm_group=None,
            ema_decay=None, ema_dtype=None.

    Raises:
        ValueError: a hyperparameter is out of range (torch's messages).
        RuntimeError: differentiable=True, or the named backend cannot run here.

    Sources: Kingma and Ba, arXiv:1412.6980; amsgrad: Reddi, Kale and Kumar, ICLR 2018; torch.optim.Adam.
    """

    rule = ADAM

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        **ours: Unpack[Common],
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=decoupled_weight_decay,
            **ours,
        )


class FusedAdamW(Decoupled, torch.optim.AdamW):
    r"""AdamW in one pass over memory, in place of torch.optim.AdamW: FusedAdam with decay decoupled from the gradient.

    $$ p = (1 - lr \cdot \lambda) p - \text{Adam's update} $$

    Args:
        params: tensors, (name, tensor) pairs, or dicts of groups; float32, bfloat16, float16, float64 or complex, any
            shape and memory layout.
        lr: learning rate; a one-element tensor is read at every step, where it lies.
        betas: decay rates of the two averages, each in [0, 1).
        eps: added to the root, after bias correction.
        weight_decay: share of the param that a step takes off, measured as decay says.
        amsgrad: keep max_exp_avg_sq, the largest average so far, and divide by its root.
        maximize: ascend.
        foreach, fused: accepted and without effect.
        capturable: allow the step in a CUDA graph.
        differentiable: must be False.
        ours: options of decoupled decay, see fused_optim.decay.Decoupled: decay="torch", lr_reference=None,
            decay_period=None, corrected_decay=False, cautious_decay=False; and of every class, see FusedOptimizer:
            backend="auto", state_dtype=None, master_weights=None, rounding="nearest", max_grad_norm=None,
            norm_type=2.0, skip_nonfinite=False, norm_group=None, ema_decay=None, ema_dtype=None.

    Raises:
        ValueError: a hyperparameter is out of range (torch's messages).
        RuntimeError: differentiable=True, or the named backend cannot run here.

    Sources: Loshchilov and Hutter, arXiv:1711.05101; torch.optim.AdamW.
    """

    rule = ADAM

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **ours: Unpack[Decayed],
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            **ours,
        )
