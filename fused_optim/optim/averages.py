"""Averages of the weights, for every optimizer: reads them, swaps them with the params, saves and loads them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..engine.build import members_of, missing_states, names_of
from ..engine.checkpoints import without_update
from ..engine.ema import Averages, WeightAverage
from ..engine.table import Rule
from .options import Options


class Averaged(Options):
    """Averages of the weights, in `optimizer.state[param]["ema"]`. The option ema_decay enables them; see
    FusedOptimizer."""

    rule: ClassVar[Rule]
    _steps: dict[Tensor, Tensor]
    _release: Any = None  # a GradientRelease, see release.py
    _guarded: list[Tensor]  # params with lower halves, in the detector's order

    @property
    def ema(self) -> Mapping[Tensor, Tensor] | None:
        """The averages by param, or None without an ema_decay. It is a view of `state[param]["ema"]` and has no entry
        for a param that has had no gradient. Read it outside of ema_weights()."""
        return None if self._ema is None else Averages(self.param_groups, self.state)

    @contextmanager
    def ema_weights(self) -> Iterator[None]:
        """Context manager in which the params hold their averages, in the same memory. Params must only be read in it:

            with optimizer.ema_weights():
                evaluate(model)

        On exit, also after an exception, every param has its own values again, bit for bit. Params that have had no
        gradient yet do not change. An average in its param's dtype is swapped with the param, one tensor at a time.
        For an average in another dtype a copy of the param is kept.

        Raises:
            RuntimeError: the optimizer keeps no averages, or the call is inside of another ema_weights().
        """
        average = self._averages()
        self._settle_masters()
        try:
            with average.swap(Averages(self.param_groups, self.state)):
                yield
        finally:
            if self._masters.seen:
                self._forget()
                self._masters.restored()

    def ema_state_dict(self) -> dict[str, Any]:
        """The averages without the other states. Use it for a model that is evaluated, or trained further with new
        states. state_dict() contains the averages too.

        Returns:
            {"steps": the number of step() calls, "averages": tensors by the params' indices in state_dict()}. The
            tensors are the averages themselves, not copies. Params whose updates have all been skipped have none.

        Raises:
            RuntimeError: the optimizer keeps no averages, or the call is inside of ema_weights().
        """
        average = self._averages()
        average.check_not_swapped("ema_state_dict() cannot be called")
        self._find_not_updated()
        numbered = {param: index for index, param in enumerate(self._all_params())}
        averages = Averages(self.param_groups, self.state).items()
        return {
            "steps": average.steps,
            "averages": {numbered[param]: tensor for param, tensor in averages if param not in average.not_updated},
        }

    def load_ema_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Loads averages. They are copied and keep the dtype that they were saved in. A param without an average in
        state_dict gets a new one at its next step. Call it after load_state_dict, which replaces the averages too.

        Args:
            state_dict: the result of ema_state_dict(). If the optimizer was made with named params, it can also be the
                state_dict of a torch.optim.swa_utils.AveragedModel.

        Raises:
            RuntimeError: the optimizer keeps no averages, or the call is inside of ema_weights().
            ValueError: the averages are of other params, or state_dict is neither of the two.
        """
        self._averages().load(self._all_params(), names_of(self.param_groups), self.state, state_dict)
        self._forget()
        for param, _, group in members_of(self.param_groups):  # torch's classes require all states of a param, or none
            rule, values = self.rule.of(group), self.state.get(param)
            if rule.counted and values and "step" not in values:
                made = missing_states(self.rule, group, param, values, self._state_dtype, self._masters)
                running = {name: torch.tensor(start) for name, start in rule.running.items()}
                self.state[param] = {"step": torch.zeros(()), **running, **made, **values}

    def _find_not_updated(self) -> None:
        """Determines which averages have had no update yet. Waits for the devices, unless all averages are known to
        have had one."""
        if self._ema is not None and self._ema.not_updated:
            counts = {p: self.state.get(p, {}).get("step", self._steps.get(p, 0.0)) for p in self._ema.not_updated}
            self._ema.not_updated = set(without_update(counts))

    def _settle_masters(self) -> None:
        """Finds the params that something other than this optimizer's steps has written to. Inside of ema_weights()
        every param has been written to and will be restored, so none is looked for."""
        if self._ema is not None and self._ema.swapped:
            return
        if self._guarded:
            self._masters.remember_versions(self._guarded, self._detector.versions())
        if self._release is not None:
            self._release.remember_versions()
        self._masters.settle(self.state)

    def _all_params(self) -> list[Tensor]:
        return [param for group in self.param_groups for param in group["params"]]

    def _averages(self) -> WeightAverage:
        if self._ema is None:
            raise RuntimeError(
                "this optimizer keeps no average of its weights; make it with an ema_decay, such as ema_decay=0.999"
            )
        return self._ema
