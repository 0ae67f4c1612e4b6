"""Lion."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from typing_extensions import Unpack

from ..engine.table import Rule
from .checks import check_adam_like
from .decay import Decoupled
from .options import Decayed


class FusedLion(Decoupled):
    r"""Lion in one pass over memory, decay decoupled from the gradient.

    $$ p = (1 - lr \cdot \lambda) p - lr \cdot sign(\beta_1 m + (1-\beta_1) g), \quad m = \beta_2 m + (1-\beta_2) g $$

    Its state is exp_avg, which is $m$.

    Args:
        params: tensors, (name, tensor) pairs, or dicts of groups; float32, bfloat16, float16, float64 or complex, any
            shape and memory layout.
        lr: learning rate; a one-element tensor is read at every step, where it lies.
        betas: $\beta_1$ and $\beta_2$, each in [0, 1).
        weight_decay: share of the param that a step takes off, measured as decay says.
        maximize: ascend.
        capturable: allow the step in a CUDA graph.
        ours: options of decoupled decay, see fused_optim.decay.Decoupled: decay="torch", lr_reference=None,
            decay_period=None, corrected_decay=False, cautious_decay=False; and of every class, see FusedOptimizer:
            backend="auto", state_dtype=None, master_weights=None, rounding="nearest", max_grad_norm=None,
            norm_type=2.0, skip_nonfinite=False, norm_group=None, ema_decay=None, ema_dtype=None.

    Raises:
        ValueError: lr, betas or weight_decay are out of range.

    Source: Chen et al., arXiv:2302.06675, algorithm 2.
    """

    rule = Rule(name="lion", states=("exp_avg",), counted=False, options=(("betas", "beta1", 2),))

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        capturable: bool = False,
        **ours: Unpack[Decayed],
    ) -> None:
        check_adam_like(lr, betas, weight_decay)
        options = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "decoupled_weight_decay": True}
        super().__init__(params, {**options, "maximize": maximize, "capturable": capturable}, **ours)
