"""NAdam."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from ..engine.table import Rule
from .base import FusedOptimizer
from .options import Common

OPTIONS = ("betas", "beta1", 2), ("eps", "eps", 1), ("momentum_decay", "option_a", 1)


class FusedNAdam(FusedOptimizer, torch.optim.NAdam):
    r"""NAdam in one pass over memory, in place of torch.optim.NAdam: same arguments, groups, states, errors and
    checkpoints.

    With $g$ the gradient, plus $\lambda p$ where weight_decay $\lambda$ is an L2 penalty, $t$ the number of updates and
    $\psi$ the momentum_decay:

    $$ m = \beta_1 m + (1-\beta_1) g, \quad v = \beta_2 v + (1-\beta_2) g^2, \quad
       \mu_t = \beta_1 (1 - 0.96^{t\psi} / 2), \quad \pi_t = \mu_1 \mu_2 \cdots \mu_t $$

    $$ p = p - lr \left( \frac{1 - \mu_t}{1 - \pi_t} g + \frac{\mu_{t+1}}{1 - \pi_{t+1}} m \right)
       / \left(\sqrt{v / (1-\beta_2^t)} + \epsilon\right) $$

    Its states are exp_avg, which is $m$, exp_avg_sq, which is $v$, and mu_product, which is $\pi_t$: a float32 number.

    Args:
        params: tensors, (name, tensor) pairs, or dicts of groups; float32, bfloat16, float16, float64 or complex, any
            shape and memory layout.
        lr: learning rate; a one-element tensor is read at every step, where it lies.
        betas: decay rates of the two averages, each in [0, 1).
        eps: added to the root.
        weight_decay: L2 penalty, or decoupled decay.
        momentum_decay: how fast the momentum grows to betas[0].
        decoupled_weight_decay: the param is multiplied by 1 - lr * weight_decay in place of the L2 penalty (NAdamW).
        foreach: accepted and without effect.
        maximize: ascend.
        capturable: allow the step in a CUDA graph.
        differentiable: must be False.
        ours: options of every class, see FusedOptimizer: backend="auto", state_dtype=None, master_weights=None,
            rounding="nearest", max_grad_norm=None, norm_type=2.0, skip_nonfinite=False, norm_group=None,
            ema_decay=None, ema_dtype=None.

    Raises:
        ValueError: a hyperparameter is out of range (torch's messages).
        RuntimeError: differentiable=True, or the named backend cannot run here; in step(), a gradient is sparse.

    Sources: Dozat, Incorporating Nesterov Momentum into Adam, ICLR 2016 workshop; torch.optim.NAdam.
    """

    rule = Rule("nadam", ("exp_avg", "exp_avg_sq"), OPTIONS, squares=("exp_avg_sq",), running={"mu_product": 1.0})

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum_decay: float = 4e-3,
        decoupled_weight_decay: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        **ours: Unpack[Common],
    ) -> None:
        own = lr, betas, eps, weight_decay, momentum_decay, decoupled_weight_decay
        torchs = {"foreach": foreach, "maximize": maximize, "capturable": capturable, "differentiable": differentiable}
        super().__init__(params, *own, **torchs, **ours)
