"""Master weights, for every optimizer: reads them, and makes them from a float32 model."""

from __future__ import annotations

import torch
from torch import Tensor

from ..engine.masters import Kind, check_kind, check_param
from .averages import Averaged


class Mastered(Averaged):
    """Master weights of bfloat16 params. Their lower halves are in `optimizer.state[param]["param_low"]`."""

    @property
    def master_weights(self) -> Kind | None:
        """The option master_weights: "exact", "24bit" or None. It cannot be set. lower_params() converts a float32
        model to bfloat16 with master weights."""
        return self._masters.kind

    def master_params(self) -> list[Tensor]:
        """The master weights of all params, as new float32 tensors in the order of param_groups. A param without master
        weights is copied. float64 and complex params keep their dtype.

        Raises:
            RuntimeError: this is inside of ema_weights().
        """
        self._check_not_swapped("master_params() cannot be called")
        self._settle_masters()
        return [self._masters.master(param, self.state.get(param, {})) for param in self._all_params()]

    def lower_params(self, dtype: torch.dtype = torch.bfloat16, *, master_weights: Kind = "exact") -> None:
        """Converts float32 params to bfloat16 in place. The bits that bfloat16 cannot hold become the lower halves of
        their master weights: all of them with "exact", eight of them, rounded, with "24bit". States keep their dtype.
        Params of other dtypes do not change.

        Raises:
            ValueError: dtype is not torch.bfloat16, or master_weights is neither "exact" nor "24bit".
            TypeError: a param is float16.
            RuntimeError: a float32 param has a gradient, or is a DTensor, or this is inside of ema_weights(). Nothing
                has been changed then.
        """
        self._check_not_swapped("lower_params() cannot be called")
        if dtype != torch.bfloat16:
            raise ValueError(f"lower_params() makes bfloat16 params, but got {dtype}; pass torch.bfloat16")
        if master_weights is None:
            raise ValueError('lower_params() keeps master weights; pass master_weights="exact"')
        check_kind(master_weights)
        params = self._all_params()
        for param in params:
            check_param(param, master_weights)
        self._settle_masters()
        self._masters.lower(params, self.state, master_weights)
        self._forget()

    def _check_not_swapped(self, what: str) -> None:
        if self._ema is not None:
            self._ema.check_not_swapped(what)
