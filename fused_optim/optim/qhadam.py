"""QHAdam and QHAdamW."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from ..engine.table import Rule
from .base import FusedOptimizer
from .checks import check_adam_like, check_nus
from .decay import Decoupled
from .options import Common, Decayed


class FusedQHAdam(FusedOptimizer):
    r"""QHAdam in one pass over memory, with the arguments and group keys of its authors' package qhoptim.

    The defaults of betas and nus are those that the paper recommends. qhoptim's own defaults are betas=(0.9, 0.999) and
    nus=(1.0, 1.0), which is Adam.

    With $\hat m, \hat v$ Adam's averages after bias correction:

    $$ p = p - lr \frac{\nu_1 \hat m + (1-\nu_1) g}{\sqrt{\nu_2 \hat v + (1-\nu_2) g^2} + \epsilon} $$

    nus=(1, 1) is Adam, (beta1, 1) NAdam but for its momentum schedule. States are torch's Adam's: step, exp_avg and
    exp_avg_sq, without bias correction. load_state_dict also takes checkpoints of qhoptim's QHAdam, whose averages are
    bias-corrected, and converts them.

    Args:
        params, lr, betas, weight_decay, eps, maximize, capturable: as FusedAdam's.
        nus: how much of each average goes into the step, the rest being the gradient itself; any finite numbers.
        decouple_weight_decay: decay past the gradient, $p = (1 - lr \cdot \lambda) p$, in place of L2.
        ours: options of every class, see FusedOptimizer: backend="auto", state_dtype=None, master_weights=None,
            rounding="nearest", max_grad_norm=None, norm_type=2.0, skip_nonfinite=False, norm_group=None,
            ema_decay=None, ema_dtype=None.

    Raises:
        ValueError: a hyperparameter is out of range.

    Sources: Ma and Yarats, arXiv:1810.06801, section 4.2; qhoptim.pyt.QHAdam.
    """

    rule = Rule(
        name="qhadam",
        states=("exp_avg", "exp_avg_sq"),
        squares=("exp_avg_sq",),
        options=(
            ("betas", "beta1", 2),
            ("nus", "option_a", 2),
            ("eps", "eps", 1),
            ("decouple_weight_decay", "decoupled", 1),
        ),
    )

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.995, 0.999),
        nus: tuple[float, float] = (0.7, 1.0),
        weight_decay: float = 0.0,
        decouple_weight_decay: bool = False,
        eps: float = 1e-8,
        *,
        maximize: bool = False,
        capturable: bool = False,
        **ours: Unpack[Common],
    ) -> None:
        check_adam_like(lr, betas, weight_decay, eps)
        check_nus(nus)
        options = {
            "lr": lr,
            "betas": betas,
            "nus": nus,
            "weight_decay": weight_decay,
            "eps": eps,
            "decouple_weight_decay": decouple_weight_decay,
            "maximize": maximize,
            "capturable": capturable,
        }
        super().__init__(params, options, **ours)

    @classmethod
    def from_nadam(cls, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999)) -> dict[str, Any]:
        """The arguments (lr, betas, nus) that make NAdam of QHAdam, but for NAdam's momentum schedule.

        Source: arXiv:1810.06801, table 2.
        """
        return {"lr": lr, "betas": tuple(betas), "nus": (betas[0], 1.0)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As FusedOptimizer.load_state_dict; takes qhoptim's checkpoints too."""
        betas = {index: group["betas"] for group in state_dict["param_groups"] for index in group["params"]}
        states = {
            index: from_qhoptim(state, *betas[index]) if "beta1_weight" in state else state
            for index, state in state_dict["state"].items()
        }
        super().load_state_dict({**state_dict, "state": states})


def from_qhoptim(state: dict[str, Any], beta1: float, beta2: float) -> dict[str, Any]:
    """A param's state as kept here. qhoptim counts in beta_weight = 1 + beta + ... + beta**(step - 1), and keeps
    averages divided by their bias corrections."""
    beta, weight = max((beta1, state["beta1_weight"]), (beta2, state["beta2_weight"]))
    step = steps_of(beta, weight)
    converted = {
        "step": torch.tensor(float(step)),
        "exp_avg": state["exp_avg"] * (1.0 - beta1**step),
        "exp_avg_sq": state["exp_avg_sq"] * (1.0 - beta2**step),
    }
    counted = ("beta1_weight", "beta2_weight")
    return converted | {key: value for key, value in state.items() if key not in (*converted, *counted)}


def steps_of(beta: float, weight: float) -> int:
    """The n with (1 - beta**n) / (1 - beta) = weight. Once beta**n is lost in rounding any large n will do, for then
    the bias correction is 1."""
    if beta == 0.0:
        return 1
    left = max(1.0 - weight * (1.0 - beta), 2.0**-53)  # beta**n
    return max(1, round(math.log(left) / math.log(beta)))


class FusedQHAdamW(Decoupled, FusedQHAdam):
    r"""QHAdam with decay decoupled from the gradient: every step multiplies each param by $1 - lr \cdot \lambda$.

    Args:
        params, lr, betas, nus, eps, maximize, capturable: as FusedQHAdam's.
        weight_decay: share of the param that a step takes off, measured as decay says.
        ours: options of decoupled decay, see fused_optim.decay.Decoupled: decay="torch", lr_reference=None,
            decay_period=None, corrected_decay=False, cautious_decay=False; and of every class, see FusedOptimizer:
            backend="auto", state_dtype=None, master_weights=None, rounding="nearest", max_grad_norm=None,
            norm_type=2.0, skip_nonfinite=False, norm_group=None, ema_decay=None, ema_dtype=None.

    Raises:
        ValueError: a hyperparameter is out of range.

    Sources: Ma and Yarats, arXiv:1810.06801; Loshchilov and Hutter, arXiv:1711.05101.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.995, 0.999),
        nus: tuple[float, float] = (0.7, 1.0),
        weight_decay: float = 0.0,
        eps: float = 1e-8,
        *,
        maximize: bool = False,
        capturable: bool = False,
        **ours: Unpack[Decayed],
    ) -> None:
        super().__init__(
            params, lr, betas, nus, weight_decay, True, eps, maximize=maximize, capturable=capturable, **ours
        )
