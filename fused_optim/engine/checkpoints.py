"""What optimizers save and load: torch's checkpoints, bit for bit, and states of any dtype besides."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from .scaling import Scaler
from .table import Rule

# What copies and pickles hold besides torch's.
KEPT = ("_backend", "_state_dtype", "_max_grad_norm", "_scaler", "_ema", "_steps")


class _Uncast:
    """Carries a state through torch's load_state_dict, which would cast it to its param's dtype."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class Checkpoints(Optimizer):
    """Saving, loading, copying and pickling of the fused optimizers.

    _steps: how many updates each param has had, where its rule keeps no `step` in its states.
    """

    rule: ClassVar[Rule]
    _steps: dict[Tensor, Tensor]
    _scaler: Scaler

    def _forget(self) -> None:
        raise NotImplementedError

    def __getstate__(self) -> dict[str, Any]:
        ours = {key: self.__dict__[key] for key in KEPT}
        return {**super().__getstate__(), **ours}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Before torch's class looks: it makes a tensor of a `step` that is none.
        for values in state["state"].values():
            if isinstance(values, dict):
                values.update({key: value.tensor for key, value in values.items() if isinstance(value, _Uncast)})
                if values and self.rule.counted:
                    values.setdefault("step", torch.zeros(()))
        defaults = dict(state.get("defaults") or self.defaults)  # before torch's class puts options of its own in
        super().__setstate__(state)
        self.__dict__.setdefault("_backend", "auto")
        self.__dict__.setdefault("_state_dtype", None)
        self.__dict__.setdefault("_max_grad_norm", None)
        self.__dict__.setdefault("_scaler", Scaler())
        self.__dict__.setdefault("_ema", None)
        self.__dict__.setdefault("_steps", {})
        for group in self.param_groups:
            for key, value in defaults.items():
                group.setdefault(key, value)
        self._forget()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a checkpoint of this class, or of torch's class of the same rule.

        States keep the dtype that they were saved in, `step` may be a number or a tensor of any device, and options
        that the saved groups lack keep this optimizer's values. So does skipped_steps. Errors are torch's.
        """

        def protect(_: Optimizer, incoming: dict[str, Any]) -> dict[str, Any]:
            states = {
                key: {k: _Uncast(v) if isinstance(v, Tensor) else v for k, v in value.items()}
                if isinstance(value, dict)
                else value
                for key, value in incoming["state"].items()
            }
            groups = incoming["param_groups"]
            if len(groups) == len(self.param_groups):
                ours = (
                    {k: v for k, v in group.items() if k not in ("params", "param_names")}
                    for group in self.param_groups
                )
                groups = [{**options, **group} for options, group in zip(ours, groups, strict=True)]
            return {**incoming, "state": states, "param_groups": groups}

        handle = self.register_load_state_dict_pre_hook(protect)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
        self._steps.clear()
        if "skipped_steps" in state_dict:
            self._scaler.set_skipped(state_dict["skipped_steps"])

    def state_dict(self) -> dict[str, Any]:
        """As torch's. A state that no update has reached yet (each was skipped) is left out where torch would not have
        made it. With skip_nonfinite there is one key more, "skipped_steps", which torch's classes ignore."""
        begun = [p for p, step in self._steps.items() if self.state.get(p) and step.device.type != "meta"]
        waiting = [param for param, step in zip(begun, self._counts(begun), strict=True) if step == 0]

        def leave_out(_: Optimizer, packed: dict[str, Any]) -> dict[str, Any]:
            params = [param for group in self.param_groups for param in group["params"]]
            unreached = {index for index, param in enumerate(params) if any(param is other for other in waiting)}
            return {**packed, "state": {k: v for k, v in packed["state"].items() if k not in unreached}}

        handle = self.register_state_dict_post_hook(leave_out, prepend=True) if waiting else None
        try:
            saved = super().state_dict()
        finally:
            if handle is not None:
                handle.remove()
        return {**saved, "skipped_steps": self._scaler.skipped} if self._scaler.skip_nonfinite else saved

    def _count_of(self, param: Tensor) -> float:
        """How many updates a param has had. Waits for its device."""
        count = self.state.get(param, {}).get("step", self._steps.get(param, 0.0))
        return 0.0 if isinstance(count, Tensor) and count.is_meta else float(count)

    def _counts(self, params: list[Tensor]) -> list[float]:
        return [float(count) for count in torch.stack([self._steps[p].cpu() for p in params])] if params else []
