"""LAMB."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from ..engine.table import Rule
from .base import FusedOptimizer
from .checks import check_adam_like, check_trust_clip
from .options import Whole, check_max_grad_norm


class FusedLAMB(FusedOptimizer):
    r"""LAMB in two passes over memory, with the arguments and semantics of NVIDIA Apex's FusedLAMB.

    With $\hat m, \hat v$ Adam's averages of the clipped gradient after bias correction, tensor by tensor:

    $$ u = \frac{\hat m}{\sqrt{\hat v} + \epsilon} + \lambda p, \quad p = p - lr \frac{\|p\|}{\|u\|} u $$

    The ratio is 1 where either norm is 0, and where there is neither weight_decay nor use_nvlamb. Norms are sums of
    float64 in a fixed order: the same at every run. The second pass makes $u$ anew from the states as they are
    stored, and does not read the gradients. Unlike Apex, gradients are never written to, every param counts its own
    steps, and bfloat16, float64 and complex params are taken.

    Args:
        params, lr, betas, eps, maximize, capturable: as FusedAdam's.
        bias_correction: correct the averages for their start from 0.
        weight_decay: $\lambda$; with adam_w_mode=False an L2 penalty, added to the clipped gradient.
        amsgrad, set_grad_none: for Apex's sake; amsgrad must be False, and set_grad_none has no effect: zero_grad() has
            its own argument.
        grad_averaging: m = beta1 m + (1 - beta1) g; else m = beta1 m + g.
        max_grad_norm: gradients are divided by norm / max_grad_norm where the norm of all of them together is larger.
            None and 0 switch clipping off, as in Apex.
        use_nvlamb: use the ratio where weight_decay is 0, too.
        trust_clip: (lowest, highest) that the ratio may be.
        ours: options of every class, see FusedOptimizer: backend="auto", state_dtype=None, master_weights=None,
            rounding="nearest", norm_type=2.0, skip_nonfinite=False, norm_group=None, ema_decay=None, ema_dtype=None.

    Raises:
        ValueError: a hyperparameter is out of range.
        RuntimeError: amsgrad=True.

    Sources: You et al., arXiv:1904.00962; apex.optimizers.FusedLAMB.
    """

    rule = Rule(
        name="lamb",
        states=("exp_avg", "exp_avg_sq"),
        squares=("exp_avg_sq",),
        trust=True,
        clip_eps=0.0,
        options=(
            ("betas", "beta1", 2),
            ("eps", "eps", 1),
            ("adam_w_mode", "decoupled", 1),
            ("grad_averaging", "option_a", 1),
            ("bias_correction", "option_b", 1),
            ("use_nvlamb", "trust_always", 1),
        ),
    )

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        amsgrad: bool = False,
        adam_w_mode: bool = True,
        grad_averaging: bool = True,
        set_grad_none: bool = True,
        max_grad_norm: float | None = 1.0,
        use_nvlamb: bool = False,
        *,
        trust_clip: tuple[float, float] | None = None,
        maximize: bool = False,
        capturable: bool = False,
        **ours: Unpack[Whole],
    ) -> None:
        if amsgrad:
            raise RuntimeError("FusedLAMB does not support the AMSGrad variant.")
        check_adam_like(lr, betas, weight_decay, eps)
        check_max_grad_norm(max_grad_norm)
        check_trust_clip(trust_clip)
        options = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "bias_correction": bias_correction,
            "adam_w_mode": adam_w_mode,
            "grad_averaging": grad_averaging,
            "max_grad_norm": max_grad_norm,
            "use_nvlamb": use_nvlamb,
            "trust_clip": trust_clip,
            "maximize": maximize,
            "capturable": capturable,
        }
        super().__init__(params, options, **ours)

    @property
    def trust_ratios(self) -> dict[Tensor, Tensor]:
        """The ratio of every param's last update, as 0-dim float64 tensors on its device: reading them waits for
        nothing. They are overwritten by the next step, and 1 before the first."""
        return {
            row.param: bound.table.trust[number]
            for bound in self._all_tables()
            if bound.table.trust is not None
            for number, row in enumerate(bound.table.rows_list)
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As FusedOptimizer.load_state_dict; takes checkpoints of Apex too, which counts steps by group."""
        super().load_state_dict(with_steps_of_groups(state_dict))


def with_steps_of_groups(state_dict: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint whose groups count steps, with the count in each param's state."""
    groups = state_dict["param_groups"]
    steps = {index: group["step"] for group in groups if "step" in group for index in group["params"]}
    states = {
        index: {"step": torch.tensor(float(steps[index])), **state} if index in steps else state
        for index, state in state_dict["state"].items()
    }
    groups = [{key: value for key, value in group.items() if key != "step"} for group in groups]
    return {**state_dict, "state": states, "param_groups": groups}
