"""AdEMAMix."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from typing_extensions import Unpack

from ..engine.table import Rule
from .checks import check_adam_like, check_not_negative
from .decay import Decoupled
from .options import Decayed

OPTIONS = ("betas", "beta1", 3), ("alpha", "option_a", 1), ("eps", "eps", 1)
WARMUPS = ("alpha_warmup", "option_b", 1), ("beta3_warmup", "option_c", 1)


class FusedAdEMAMix(Decoupled):
    r"""AdEMAMix in one pass over memory, with the arguments, states and checkpoints of the authors' code
    (apple/ml-ademamix).

    $$ m_1 = \beta_1 m_1 + (1-\beta_1) g, \quad m_2 = \beta_3 m_2 + (1-\beta_3) g, \quad
       v = \beta_2 v + (1-\beta_2) g^2 $$

    $$ p = (1 - lr \cdot \lambda) p - lr \frac{m_1 / (1-\beta_1^t) + \alpha m_2}{\sqrt{v / (1-\beta_2^t)} + \epsilon} $$

    Its states are exp_avg_fast, which is $m_1$, exp_avg_slow, which is $m_2$, and exp_avg_sq, which is $v$. In a
    warm-up $\alpha$ grows linearly from 0, and $\beta_3$ grows from $\beta_1$ such that the half-life of $m_2$ grows
    linearly. Both are computed from the param's number of updates on its device, so a CUDA graph goes on with them.

    Args:
        params: tensors, (name, tensor) pairs, or dicts of groups; float32, bfloat16, float16, float64 or complex, any
            shape and memory layout.
        lr: learning rate; a one-element tensor is read at every step, where it lies.
        betas: $\beta_1$, $\beta_2$ and $\beta_3$, each in [0, 1).
        alpha: weight of the slow average.
        beta3_warmup, alpha_warmup: number of updates until beta3 and alpha have their values; None: from the start. The
            paper sets both to the length of the training, its $T_{\alpha,\beta_3}$.
        eps: added to the root.
        weight_decay: share of the param that a step takes off, measured as decay says.
        maximize: ascend.
        capturable: allow the step in a CUDA graph.
        ours: options of decoupled decay, see fused_optim.decay.Decoupled: decay="torch", lr_reference=None,
            decay_period=None, corrected_decay=False, cautious_decay=False; and of every class, see FusedOptimizer:
            backend="auto", state_dtype=None, master_weights=None, rounding="nearest", max_grad_norm=None,
            norm_type=2.0, skip_nonfinite=False, norm_group=None, ema_decay=None, ema_dtype=None.

    Raises:
        ValueError: a hyperparameter is out of range.

    Source: Pagliardini, Ablin and Grangier, arXiv:2409.03137. The authors' schedule of beta3 adds 1e-8 to both betas,
    and so does this one.
    """

    rule = Rule(
        "ademamix", ("exp_avg_fast", "exp_avg_slow", "exp_avg_sq"), OPTIONS, squares=("exp_avg_sq",), optional=WARMUPS
    )

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
        alpha: float = 2.0,
        beta3_warmup: float | None = None,
        alpha_warmup: float | None = None,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        capturable: bool = False,
        **ours: Unpack[Decayed],
    ) -> None:
        check_adam_like(lr, betas, weight_decay, eps, 3)
        check_not_negative(alpha=alpha, beta3_warmup=beta3_warmup, alpha_warmup=alpha_warmup)
        options: dict[str, Any] = {"lr": lr, "betas": betas, "eps": eps, "alpha": alpha, "weight_decay": weight_decay}
        options |= {"beta3_warmup": beta3_warmup, "alpha_warmup": alpha_warmup, "decoupled_weight_decay": True}
        super().__init__(params, {**options, "maximize": maximize, "capturable": capturable}, **ours)
