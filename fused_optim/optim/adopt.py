"""ADOPT."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor
from typing_extensions import Unpack

from ..engine.table import Rule
from .base import FusedOptimizer
from .checks import check_adam_like
from .options import Common

OPTIONS = ("betas", "beta1", 2), ("eps", "eps", 1), ("clip_power", "option_a", 2), ("decouple", "decoupled", 1)


def fourth_root(step: float) -> float:
    return step**0.25


class FusedADOPT(FusedOptimizer):
    r"""ADOPT in one pass over memory, with the arguments, states and checkpoints of the authors' code
    (iShohei220/adopt).

    The first update only sets $v = g^2$. With $t = 1, 2, \ldots$ counted from the second update on:

    $$ n = clip\left(\frac{g}{\max(\sqrt{v}, \epsilon)}, \pm c_t\right), \quad m = \beta_1 m + (1-\beta_1) n, \quad
       p = p - lr \cdot m, \quad v = \beta_2 v + (1-\beta_2) g^2 $$

    $c_t$ is clip_lambda(t). Its states are exp_avg, which is $m$, and exp_avg_sq, which is $v$.

    Args:
        params, lr, weight_decay, maximize, capturable: as FusedAdam's.
        betas: $\beta_1$ and $\beta_2$, each in [0, 1).
        eps: least divisor of the gradient.
        clip_lambda: the bound as a function of $t$: a power, $c \cdot t^e$ with $c > 0$, because the bound is computed
            on the param's device. None: no bound. Groups hold $(c, e)$ as "clip_power".
        decouple: the param is multiplied by 1 - lr * weight_decay in place of the L2 penalty, from the second update
            on.
        ours: options of every class, see FusedOptimizer: backend="auto", state_dtype=None, master_weights=None,
            rounding="nearest", max_grad_norm=None, norm_type=2.0, skip_nonfinite=False, norm_group=None,
            ema_decay=None, ema_dtype=None.

    Raises:
        ValueError: a hyperparameter is out of range, or clip_lambda is no power.

    Source: Taniguchi et al., arXiv:2411.02853. pytorch-optimizer counts $t$ from 2; this class follows the authors.
    """

    rule = Rule("adopt", ("exp_avg", "exp_avg_sq"), OPTIONS, squares=("exp_avg_sq",), first_decay=2, bounded=False)

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.9999),
        eps: float = 1e-6,
        clip_lambda: Callable[[float], float] | None = fourth_root,
        weight_decay: float = 0.0,
        decouple: bool = False,
        *,
        maximize: bool = False,
        capturable: bool = False,
        **ours: Unpack[Common],
    ) -> None:
        check_adam_like(lr, betas, weight_decay, eps)
        options = {"lr": lr, "betas": betas, "eps": eps, "clip_power": power_of(clip_lambda)}
        options |= {"weight_decay": weight_decay, "decouple": decouple}
        super().__init__(params, {**options, "maximize": maximize, "capturable": capturable}, **ours)


def power_of(function: Callable[[float], float] | None) -> tuple[float, float]:
    """The c and e of a function c * t**e. None stands for infinity.

    Raises:
        ValueError: it is another function.
    """
    if function is None:
        return math.inf, 0.0
    values = {t: float(function(t)) for t in (1, 2, 3, 10, 1000, 2**20)}
    if all(0 < value < math.inf for value in values.values()):
        factor, exponent = values[1], math.log2(values[2**20] / values[1]) / 20
        if all(math.isclose(value, factor * t**exponent, rel_tol=1e-9) for t, value in values.items()):
            return factor, exponent
    raise ValueError(
        f"clip_lambda must be None or a power of the step, c * step**e with c > 0, but its values are {values}; pass "
        "for example lambda step: step**0.25"
    )
