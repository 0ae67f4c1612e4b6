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

    Args as FusedAdamW's, without eps and amsgrad; maximize and capturable among the options. State: exp_avg.

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
