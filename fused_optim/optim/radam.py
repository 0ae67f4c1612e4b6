"""RAdam."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from ..engine.table import Rule
from .base import FusedOptimizer
from .options import Common

OPTIONS = ("betas", "beta1", 2), ("eps", "eps", 1)


class FusedRAdam(FusedOptimizer, torch.optim.RAdam):
    r"""RAdam in one pass over memory, in place of torch.optim.RAdam: same arguments, groups, states, errors and
    checkpoints.

    With $g$ the gradient, plus $\lambda p$ where weight_decay $\lambda$ is an L2 penalty, and $t$ the number of
    updates:

    $$ m = \beta_1 m + (1-\beta_1) g, \quad v = \beta_2 v + (1-\beta_2) g^2, \quad
       \rho_\infty = \frac{2}{1-\beta_2} - 1, \quad \rho_t = \rho_\infty - \frac{2 t \beta_2^t}{1-\beta_2^t} $$

    $$ p = p - \frac{lr}{1-\beta_1^t} m \cdot
       \sqrt{\frac{(\rho_t-4)(\rho_t-2)\rho_\infty}{(\rho_\infty-4)(\rho_\infty-2)\rho_t}}
       \frac{\sqrt{1-\beta_2^t}}{\sqrt{v} + \epsilon} $$

    While $\rho_t$ is at most 5, the two roots are left out. The states are exp_avg, which is $m$, and exp_avg_sq, which
    is $v$.

    Args:
        params: tensors, (name, tensor) pairs, or dicts of groups; float32, bfloat16, float16, float64 or complex, any
            shape and memory layout.
        lr: learning rate; a one-element tensor is read at every step, where it lies.
        betas: decay rates of the two averages, each in [0, 1).
        eps: added to the root, before bias correction.
        weight_decay: L2 penalty, or decoupled decay.
        decoupled_weight_decay: the param is multiplied by 1 - lr * weight_decay in place of the L2 penalty.
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

    Sources: Liu et al., arXiv:1908.03265; torch.optim.RAdam.
    """

    rule = Rule("radam", ("exp_avg", "exp_avg_sq"), OPTIONS, squares=("exp_avg_sq",))

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        decoupled_weight_decay: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        **ours: Unpack[Common],
    ) -> None:
        own = lr, betas, eps, weight_decay, decoupled_weight_decay
        torchs = {"foreach": foreach, "maximize": maximize, "capturable": capturable, "differentiable": differentiable}
        super().__init__(params, *own, **torchs, **ours)
