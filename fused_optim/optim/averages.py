"""The averages of the weights of every optimizer: read, put into the params, saved and loaded by themselves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..engine.build import members_of
from ..engine.checkpoints import without_update
from ..engine.ema import Averages, WeightAverage
from ..engine.states import make_states
from ..engine.table import Rule
from .options import Options


class Averaged(Options):
    """Averages of the weights, in optimizer.state[param]["ema"]. FusedOptimizer's ema_decay says how they move."""

    rule: ClassVar[Rule]
    _steps: dict[Tensor, Tensor]

    @property
    def ema(self) -> Mapping[Tensor, Tensor] | None:
        """The averages of params that have had a gradient, by param: a view on the states. To be read outside of
        ema_weights(). None without an ema_decay."""
        return None if self._ema is None else Averages(self.param_groups, self.state)

    @contextmanager
    def ema_weights(self) -> Iterator[None]:
        """Inside of it the params hold their averages, in the same memory, and may be read alone:

            with optimizer.ema_weights():
                evaluate(model)

        On leaving, in whatever way, every param has its own elements again, bit for bit. Params that have had no
        gradient yet stay as they are. Averages of the params' dtype change places with them, one tensor after the
        other; for others the params are copied.

        Raises:
            RuntimeError: the optimizer keeps no averages, or this is inside of another ema_weights().
        """
        with self._averages().swap(Averages(self.param_groups, self.state)):
            yield

    def ema_state_dict(self) -> dict[str, Any]:
        """The averages alone. state_dict() has them too: this is for a model that is evaluated, or trained on with new
        states.

        Returns:
            {"steps": the number of step() calls, "averages": tensors by the params' indices in state_dict()}. The
            tensors are the averages themselves. Params whose updates have all been skipped have none.

        Raises:
            RuntimeError: the optimizer keeps no averages, or this is inside of ema_weights().
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
        """Loads what ema_state_dict gave, or the state_dict of a torch.optim.swa_utils.AveragedModel if the optimizer
        was made with named params. Averages are copied and keep the dtype that they were saved in. Those of params that
        have none in state_dict start anew. Call it after load_state_dict, which replaces the averages too.

        Raises:
            RuntimeError: the optimizer keeps no averages, or this is inside of ema_weights().
            ValueError: the averages are of other params, or state_dict is none of the two.
        """
        self._averages().load(self._all_params(), self._all_names(), self.state, state_dict)
        self._forget()
        if not self.rule.counted:
            return
        for param, _, group in members_of(self.param_groups):  # torch's classes know no param with one of its states
            values = self.state.get(param)
            if values and "step" not in values:
                made = make_states(param, values, self.rule.states_of(group), self._state_dtype)
                self.state[param] = {"step": torch.zeros(()), **made, **values}

    def _find_not_updated(self) -> None:
        """Waits for the devices to learn which averages no update has reached, if it is not known of some."""
        if self._ema is not None and self._ema.not_updated:
            counts = {p: self.state.get(p, {}).get("step", self._steps.get(p, 0.0)) for p in self._ema.not_updated}
            self._ema.not_updated = set(without_update(counts))

    def _all_params(self) -> list[Tensor]:
        return [param for group in self.param_groups for param in group["params"]]

    def _averages(self) -> WeightAverage:
        if self._ema is None:
            raise RuntimeError(
                "this optimizer keeps no average of its weights; make it with an ema_decay, such as ema_decay=0.999"
            )
        return self._ema

    def _all_names(self) -> list[str | None]:
        """Of the params; None where they were given without names."""
        groups = self.param_groups
        return [name for group in groups for name in group.get("param_names", [None] * len(group["params"]))]
