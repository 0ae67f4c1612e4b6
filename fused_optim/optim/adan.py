"""Adan."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from typing_extensions import Unpack

from ..engine.table import Rule
from .checks import check_adam_like
from .decay import Decoupled
from .lamb import with_steps_of_groups
from .options import Decayed

OPTIONS = ("betas", "beta1", 3), ("eps", "eps", 1), ("no_prox", "no_prox", 1)


class FusedAdan(Decoupled):
    r"""Adan in one pass over memory, with the states and checkpoints of the authors' code (sail-sg/Adan).

    With $g'$ the gradient of the update before, in the first update $g$:

    $$ m = \beta_1 m + (1-\beta_1) g, \quad d = \beta_2 d + (1-\beta_2) (g - g'), \quad
       n = \beta_3 n + (1-\beta_3) (g + \beta_2 (g - g'))^2 $$

    $$ u = \frac{m / (1-\beta_1^t) + \beta_2 d / (1-\beta_2^t)}{\sqrt{n / (1-\beta_3^t)} + \epsilon}, \quad
       p = \frac{p - lr \cdot u}{1 + lr \cdot \lambda} $$

    Its states are exp_avg, which is $m$, exp_avg_diff, which is $d$, exp_avg_sq, which is $n$, and neg_pre_grad, which
    is $-g'$ after clipping. As in the authors' code $\beta$ is the share that an average keeps; in the paper it is the
    share of the new value. Unlike there, every param counts its own steps, and gradients are never written to.

    Args:
        params: tensors, (name, tensor) pairs, or dicts of groups; float32, bfloat16, float16, float64 or complex, any
            shape and memory layout.
        lr: learning rate; a one-element tensor is read at every step, where it lies.
        betas: $\beta_1$, $\beta_2$ and $\beta_3$, each in [0, 1).
        eps: added to the root.
        weight_decay: $\lambda$. Decay is measured as decay says.
        no_prox: multiply the param by $1 - lr \cdot \lambda$ before the update in place of the division.
        maximize: ascend.
        capturable: allow the step in a CUDA graph.
        ours: options of decoupled decay, see fused_optim.decay.Decoupled: decay="torch", lr_reference=None,
            decay_period=None, corrected_decay=False, cautious_decay=False; and of every class, see FusedOptimizer:
            backend="auto", state_dtype=None, master_weights=None, rounding="nearest", max_grad_norm=None,
            norm_type=2.0, skip_nonfinite=False, norm_group=None, ema_decay=None, ema_dtype=None.

    Raises:
        ValueError: a hyperparameter is out of range, or cautious_decay=True without no_prox=True.

    Source: Xie et al., arXiv:2208.06677.
    """

    rule = Rule(
        "adan",
        ("exp_avg", "exp_avg_diff", "neg_pre_grad", "exp_avg_sq"),
        OPTIONS,
        squares=("exp_avg_sq",),
        clip_eps=1e-8,
        bounded=False,
    )

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float, float] = (0.98, 0.92, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        no_prox: bool = False,
        maximize: bool = False,
        capturable: bool = False,
        **ours: Unpack[Decayed],
    ) -> None:
        check_adam_like(lr, betas, weight_decay, eps, 3)
        options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "no_prox": no_prox}
        options |= {"decoupled_weight_decay": True, "maximize": maximize, "capturable": capturable}
        super().__init__(params, options, **ours)

    def _complete(self, group: dict[str, Any]) -> None:
        super()._complete(group)
        if group.get("cautious_decay") and not group["no_prox"]:
            raise ValueError(
                "cautious_decay multiplies the elements that decay before the update, but no_prox=False divides all "
                "elements after it; pass no_prox=True, or leave cautious_decay out"
            )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As FusedOptimizer.load_state_dict; takes checkpoints of the authors' code, which counts steps by group."""
        super().load_state_dict(with_steps_of_groups(state_dict))
