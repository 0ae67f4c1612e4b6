"""Checkpoints, copies and pickles, for every optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..engine.checkpoints import arrived, leaving_out, loading, without_update
from ..engine.ema import EMA, STEPS, drop_averages
from ..engine.masters import MasterWeights
from ..engine.orthogonal import MOMENTS
from ..engine.scaling import SQUARES, Scaler
from ..engine.state_formats import ANCHOR
from ..engine.table import LR_MAX
from .masters import Mastered

# What copies and pickles hold besides torch's, and what an older pickle without it stands for.
KEPT: dict[str, Callable[[], Any]] = {
    "_backend": lambda: "auto",
    "_state_dtype": lambda: None,
    "_rounding": lambda: "nearest",
    "_masters": lambda: MasterWeights(None),
    "_max_grad_norm": lambda: None,
    "_scaler": Scaler,
    "_ema": lambda: None,
    "_steps": dict,
}


class Saved(Mastered):
    """state_dict() and load_state_dict() of FusedOptimizer, and what copies and pickles hold."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a checkpoint of this class, or of torch's class of the same rule.

        States keep the dtype that they were saved in. `step` may be a number or a tensor on any device. Options that
        the saved groups lack keep this optimizer's values, and so does skipped_steps. If the checkpoint has no averages
        of the weights, they start again as copies. If this optimizer has no ema_decay, saved averages are dropped.
        Errors are torch's.

        Lower halves of master weights are joined with the values that the params have at the next step. Load the
        model's weights, too, before that step.

        Raises:
            RuntimeError: the call is inside of ema_weights().
        """
        if self._ema is not None:
            self._ema.check_not_swapped("load_state_dict() cannot be called")
        with loading(self):
            super().load_state_dict(state_dict)
        self._steps.clear()
        self._masters.loaded(self.state)
        if "skipped_steps" in state_dict:
            self._scaler.set_skipped(state_dict["skipped_steps"])
        if SQUARES in state_dict:
            self._scaler.set_last_squares(state_dict[SQUARES])
        if self._ema is None:
            drop_averages(self.state)
        else:
            self._ema.resume(state_dict, self.state)

    def state_dict(self) -> dict[str, Any]:
        """torch's state_dict. With an ema_decay each param has the state "ema", the average of its weights, and the
        dict has "ema_steps", the number of step() calls. With skip_nonfinite it has "skipped_steps", and with gradient
        release and max_grad_norm "last_grad_squares". torch's classes load and ignore all of these. If every step so
        far was skipped, states that torch would not have made are left out.

        Raises:
            RuntimeError: the call is inside of ema_weights().
        """
        self._settle_masters()
        left_out: dict[Tensor, set[str]] = {}
        begun = {param: step for param, step in self._steps.items() if self.state.get(param)}
        for param in without_update(begun):
            left_out[param] = {*self.rule.states, *self.rule.running, LR_MAX, ANCHOR, MOMENTS}
        if self._ema is not None:
            self._ema.check_not_swapped("state_dict() cannot be called")
            self._find_not_updated()
            for param in self._ema.not_updated:
                left_out.setdefault(param, set()).add(EMA)
        with leaving_out(self, left_out):
            saved = super().state_dict()
        if self._scaler.skip_nonfinite:
            saved = {**saved, "skipped_steps": self._scaler.skipped}
        if self._release is not None:
            saved = {**saved, **self._release.saved()}
        return saved if self._ema is None else {**saved, STEPS: self._ema.steps}

    def __getstate__(self) -> dict[str, Any]:
        self._settle_masters()
        return {**super().__getstate__(), **{key: self.__dict__[key] for key in KEPT}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        arrived(state["state"], self.rule)
        defaults = dict(state.get("defaults") or self.defaults)  # before torch's class puts options of its own in
        super().__setstate__(state)
        for key, default in KEPT.items():
            if key not in self.__dict__:
                self.__dict__[key] = default()
        for group in self.param_groups:
            for key, value in defaults.items():
                group.setdefault(key, value)
        self._forget()
