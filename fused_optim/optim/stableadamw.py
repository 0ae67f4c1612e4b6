"""StableAdamW."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from typing_extensions import Unpack

from ..engine.table import Rule
from .checks import check_adam_like
from .decay import Decoupled
from .options import Decayed

OPTIONS = ("betas", "beta1", 2), ("eps", "eps", 1)


class FusedStableAdamW(Decoupled):
    r"""StableAdamW in two passes over memory: AdamW whose learning rate is lowered for a tensor with large updates.

    $$ m = \hat\beta_1 m + (1-\hat\beta_1) g, \quad v = \hat\beta_2 v + (1-\hat\beta_2) g^2, \quad
       \hat\beta = \beta \frac{1 - \beta^{t-1}}{1 - \beta^t} $$

    $$ \eta = lr / \max(1, RMS), \quad RMS^2 = mean\left(\frac{g^2}{\max(v, \epsilon^2)}\right), \quad
       p = (1 - \eta \lambda) p - \eta \frac{m}{\sqrt{v} + \epsilon} $$

    The mean is over one tensor, in float64 and a fixed order, and over all shards of it. Its states are exp_avg, which
    is $m$, and exp_avg_sq, which is $v$: with these betas they need no bias correction. The second pass computes the
    update from the states as they are stored, and does not read the gradients.

    Args:
        params: tensors, (name, tensor) pairs, or dicts of groups; float32, bfloat16, float16, float64 or complex, any
            shape and memory layout.
        lr: learning rate; a one-element tensor is read at every step, where it lies.
        betas: $\beta_1$ and $\beta_2$, each in [0, 1).
        weight_decay: share of the param that a step takes off, measured as decay says.
        eps: added to the root.
        maximize: ascend.
        capturable: allow the step in a CUDA graph.
        ours: options of decoupled decay, see fused_optim.decay.Decoupled: decay="torch", lr_reference=None,
            decay_period=None, corrected_decay=False, cautious_decay=False; and of every class, see FusedOptimizer:
            backend="auto", state_dtype=None, master_weights=None, rounding="nearest", max_grad_norm=None,
            norm_type=2.0, skip_nonfinite=False, norm_group=None, ema_decay=None, ema_dtype=None.

    Raises:
        ValueError: a hyperparameter is out of range.

    Source: Wortsman et al., arXiv:2304.13013, algorithm 2, as in torch-optimi.
    """

    rule = Rule("stableadamw", ("exp_avg", "exp_avg_sq"), OPTIONS, squares=("exp_avg_sq",), trust=True)

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 1e-2,
        eps: float = 1e-6,
        *,
        maximize: bool = False,
        capturable: bool = False,
        **ours: Unpack[Decayed],
    ) -> None:
        check_adam_like(lr, betas, weight_decay, eps)
        options = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "eps": eps, "decoupled_weight_decay": True}
        super().__init__(params, {**options, "maximize": maximize, "capturable": capturable}, **ours)
