"""How optimizers with decoupled decay measure it: torch's convention, the paper's, or the paper's normalized one."""

from __future__ import annotations

import warnings
from typing import Any

from .base import FusedOptimizer
from .options import Convention

CONVENTIONS = "torch", "paper", "normalized"


class Decoupled(FusedOptimizer):
    r"""Base of the optimizers whose decay goes past the gradient: each step takes a share of every param off it.

    Args:
        decay: what that share is, with $\lambda$ the weight_decay.
            With "torch" $lr \cdot \lambda$, as in torch.optim.AdamW.
            With "paper" $\eta \lambda$, where $\eta$ is lr / lr_reference: the schedule alone, so that the
            best decay does not hang on the base lr; 0 where lr_reference is 0.
            With "normalized" $\eta \lambda / \sqrt{T}$, where $T$ is decay_period, so that it does not hang
            on the length of the training either.
        lr_reference: the lr at which $\eta$ is 1; None: each group's lr at the start.
        decay_period: number of updates in the current restart period, batches per epoch times epochs.

    Groups hold "lr_reference" and "decay_period" only where the convention asks for them, and both may be changed
    between steps.

    Raises:
        ValueError: decay is none of the three, lr_reference is negative, or decay_period is missing or not positive.

    Source: Loshchilov and Hutter, arXiv:1711.05101, algorithm 2 and appendix B.1.
    """

    def __init__(
        self,
        *args: Any,
        decay: Convention = "torch",
        lr_reference: float | None = None,
        decay_period: float | None = None,
        **kwargs: Any,
    ) -> None:
        if decay not in CONVENTIONS:
            raise ValueError(f'decay must be "torch", "paper" or "normalized", but got {decay!r}')
        if decay == "torch" and lr_reference is not None:
            raise ValueError('lr_reference has no meaning with decay="torch"; leave it out, or use decay="paper"')
        if decay != "normalized" and decay_period is not None:
            raise ValueError('decay_period has a meaning only with decay="normalized"; leave it out, or say so')
        self._decay = decay
        self._decay_options = {"lr_reference": lr_reference, "decay_period": decay_period}
        super().__init__(*args, **kwargs)

    @property
    def decay(self) -> Convention:
        """The convention. It cannot be set, because the groups' options were made for it."""
        return self._decay

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._complete(group)
        except Exception:
            self.param_groups.pop()
            raise

    def _complete(self, group: dict[str, Any]) -> None:
        if self._decay == "torch":
            return
        reference = group.get("lr_reference", self._decay_options["lr_reference"])
        if reference is None and float(group["lr"]) == 0.0:
            warnings.warn(
                f'decay="{self._decay}" measures the decay by lr / lr_reference, and lr_reference is the first lr, 0: '
                "nothing will decay; pass lr_reference, the largest lr of the schedule, say",
                stacklevel=2,
            )
        reference = float(group["lr"] if reference is None else reference)
        if not reference >= 0:
            raise ValueError(f"lr_reference must be 0 or more, but got {reference}")
        group["lr_reference"] = reference
        if self._decay == "normalized":
            period = group.get("decay_period", self._decay_options["decay_period"])
            if period is None or not period > 0:
                raise ValueError(
                    'decay="normalized" needs decay_period, the number of updates in the current restart period '
                    f"(batches per epoch times epochs), more than 0, but got {period}"
                )
            group["decay_period"] = period

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_decay": self._decay, "_decay_options": self._decay_options}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_decay", "torch")
        self.__dict__.setdefault("_decay_options", {"lr_reference": None, "decay_period": None})
