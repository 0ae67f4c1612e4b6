"""The exponential moving average (EMA) of the weights. The step updates it in the same pass as the param, so the
average needs no pass over memory of its own. Averages are states: optimizer.state[param]["ema"]."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from .changes import RAW_CHANGED
from .dtensor import is_same_memory, like, local
from .scaling import Shared
from .states import match_layout, numbers_of, state_dtype_of
from .table import NARROW, HostHparams, Row

Decay = float | Callable[[int], float]
States = MutableMapping[Tensor, dict[str, Any]]

EMA = "ema"  # key of the average in a param's state
STEPS = "ema_steps"  # key of the number of step() calls in a checkpoint


def check_decay(decay: Any) -> float:
    """Returns the decay as a float. Raises ValueError unless it is a number from 0 to 1."""
    if not isinstance(decay, Real) or not 0.0 <= float(decay) <= 1.0:
        raise ValueError(f"ema_decay must be a number from 0 to 1, or a function that returns one, but got {decay!r}")
    return float(decay)


def check_dtype(dtype: Any) -> None:
    """Raises ValueError for a dtype that averages cannot have."""
    if dtype not in (None, *NARROW):
        raise ValueError(f"ema_dtype must be None, torch.float32, torch.bfloat16 or torch.float16, but got {dtype}")


class Averages(Mapping[Tensor, Tensor]):
    """The averages by param, in the order of the param groups. It is a view of the optimizer's state."""

    def __init__(self, groups: Sequence[dict[str, Any]], state: Mapping[Tensor, dict[str, Any]]) -> None:
        self._groups, self._state = groups, state

    def __getitem__(self, param: Tensor) -> Tensor:
        average = self._state.get(param, {}).get(EMA)
        if average is None:
            raise KeyError(param)
        return average

    def __iter__(self) -> Iterator[Tensor]:
        return (param for group in self._groups for param in group["params"] if EMA in self._state.get(param, ()))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def drop_averages(state: States) -> None:
    """Removes the averages from an optimizer's state."""
    for param, values in list(state.items()):
        if isinstance(values, dict) and values.pop(EMA, None) is not None and not values:
            del state[param]


class WeightAverage:
    """Decay, dtype and progress of the averages of one optimizer.

    current: the decay of the current step. steps: the number of step() calls. not_updated: params whose average this
        optimizer made and which possibly had no update yet, because steps can be skipped. Their first update copies
        the param. swapped: whether the params hold their averages.

    Raises:
        ValueError: decay is not a number from 0 to 1, or averages cannot have the dtype.
    """

    def __init__(self, decay: Decay, dtype: torch.dtype | None = None) -> None:
        check_dtype(dtype)
        self.set_decay(decay)
        self.dtype = dtype
        self.steps = 0
        self.not_updated: set[Tensor] = set()
        self.swapped = False

    @property
    def decay(self) -> Decay:
        return self._decay.value

    def set_decay(self, decay: Decay) -> None:
        """Raises ValueError unless it is a number from 0 to 1 or a function."""
        self.current = 0.0 if callable(decay) else check_decay(decay)
        self._decay = Shared(decay, "ema_decay")

    def __getstate__(self) -> dict[str, Any]:
        self.check_not_swapped("an optimizer cannot be copied or saved")
        return self.__dict__.copy()

    def check_not_swapped(self, what: str) -> None:
        """Raises RuntimeError if the params hold their averages."""
        if self.swapped:
            raise RuntimeError(f"{what} inside of ema_weights(), where its params hold their averages; leave it first")

    def begin(self) -> None:
        """Determines the decay of a step, before the step changes anything.

        Raises:
            RuntimeError: the params hold their averages.
            ValueError: the decay function did not return a number from 0 to 1.
        """
        self.check_not_swapped("step() cannot be called")
        if callable(self.decay):
            self.current = check_decay(self.decay(self.steps))

    def advance(self, hparams: HostHparams | None) -> int:
        """Counts the step and writes its decay to the hyperparameters that prep reads. Returns what changed, as
        ChangeDetector.poll() does."""
        self.steps += 1
        if hparams is None or not callable(self.decay):  # a constant decay was written when the tables were built
            return 0
        column = hparams.column("ema_decay")
        if column[0] == self.current:
            return 0
        column.fill_(self.current)
        return RAW_CHANGED

    def join(self, row: Row, state: dict[str, Any], ended: Tensor | None) -> Tensor:
        """Gives a row the average of its param, in the param's layout. If `state` has none, it is a copy of the param.

        ended: the count of the param's updates so far, if the count restarts at 0.

        Returns:
            The average.
        """
        param, old = row.param, state.get(EMA)
        if ended is not None and float(ended) > 0:
            self.not_updated.discard(param)
        row.ema_begun = old is not None and param not in self.not_updated
        if old is not None:
            average = match_layout(param, state, [EMA])[EMA]
        else:
            # In 16 bits an average with a decay near 1 does not change: its increments are rounded to 0.
            dtype = state_dtype_of(param, torch.float32 if self.dtype is None else self.dtype)
            average = like(param, torch.empty_like(row.shard, dtype=dtype, requires_grad=False).copy_(row.shard))
            self.not_updated.add(param)
        row.ema = local(average)
        return average

    def keep_only(self, params: Iterable[Tensor]) -> None:
        """Drops all other params from not_updated."""
        self.not_updated &= set(params)

    @contextmanager
    def swap(self, averages: Mapping[Tensor, Tensor]) -> Iterator[None]:
        """Writes the averages into their params, and the params' own values back on leaving."""
        self.check_not_swapped("ema_weights() cannot be called")
        self.swapped = True
        swapped: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        converted = 0
        try:
            for param, average in averages.items():
                memory = local(param).detach()  # keeps the memory if the param is converted
                swapped.append((param, memory, average, replace(param, average)))
            yield
        finally:
            for param, memory, average, own in swapped:
                if is_same_memory(param, memory):
                    replace(param, own, keep=own is average)
                    continue
                converted += 1
                if own is average:
                    local(average).copy_(memory)
            self.swapped = False
            if converted:
                warnings.warn(
                    f"{converted} params were converted or replaced inside of ema_weights(). They keep their current "
                    "values, and their trained values are lost. To continue training, convert a copy of the model: "
                    "copy.deepcopy(model)",
                    stacklevel=5,  # past two context managers
                )

    def resume(self, saved: Mapping[str, Any], state: States) -> None:
        """Restores the number of step() calls after `state` was loaded from the checkpoint `saved`. All saved averages
        have had an update.

        torch.distributed.checkpoint, FSDP1 and ZeRO save only states and groups. Then the number of step() calls is
        taken to be the largest number of updates of a param with an average.
        """
        self.not_updated = set()
        loaded = [values for values in state.values() if isinstance(values, dict) and EMA in values]
        counts = [values["step"] for values in loaded if "step" in values]
        if STEPS in saved:
            self.steps = int(saved[STEPS])
            return
        self.steps = int(max(numbers_of(counts), default=0.0))
        if loaded and not counts and callable(self.decay):
            warnings.warn(
                f'the checkpoint has averages of the weights, but not their "{STEPS}": ema_decay starts at 0 steps '
                'again. Save ema_state_dict()["steps"] too. After loading, call '
                'load_ema_state_dict({**ema_state_dict(), "steps": steps})',
                stacklevel=3,
            )

    def load(
        self, params: Sequence[Tensor], names: Sequence[str | None], state: States, saved: Mapping[str, Any]
    ) -> None:
        """Replaces the averages in `state`, and the number of step() calls, by saved ones. Raises ValueError for
        averages of other params.

        names: the names of the params; None for a param without a name. saved: the result of ema_state_dict() or
            AveragedModel.state_dict().
        """
        self.check_not_swapped("load_ema_state_dict() cannot be called")
        if "n_averaged" in saved:
            saved = from_averaged_model(saved, names)
        if not {"steps", "averages"} <= saved.keys():
            raise ValueError(
                "load_ema_state_dict() takes what ema_state_dict() or torch.optim.swa_utils.AveragedModel.state_dict() "
                f"returned, but got a dict with the keys {list(saved)[:5]}"
            )
        for index, average in saved["averages"].items():
            if index not in range(len(params)):
                raise ValueError(
                    f"the averages to be loaded have one of param {index}, but the optimizer has {len(params)} params; "
                    "load them into an optimizer of the same params in the same order"
                )
            if average.shape != params[index].shape:
                raise ValueError(
                    f"the average of param {index} must have its shape, {tuple(params[index].shape)}, but has "
                    f"{tuple(average.shape)}; load it into an optimizer of the same params in the same order"
                )
        averages = {
            params[index]: match_layout(params[index], {EMA: average.detach().clone()}, [EMA])
            for index, average in saved["averages"].items()
        }
        self.steps = int(saved["steps"])
        self.not_updated = set()
        drop_averages(state)
        for param, average in averages.items():
            state.setdefault(param, {}).update(average)


def from_averaged_model(state: Mapping[str, Any], names: Sequence[str | None]) -> dict[str, Any]:
    """Converts the state_dict of a torch.optim.swa_utils.AveragedModel to what ema_state_dict() returns. The name of an
    average is "module." and the name of the param in the model. Buffers are left out.

    Raises:
        ValueError: the params have no names, or none of their names is in the state.
    """
    if None in names:
        raise ValueError(
            "the averages of an AveragedModel are found by the names of the params, but this optimizer does not have "
            "the names; make it with model.named_parameters() in place of model.parameters()"
        )
    steps = int(state["n_averaged"])
    found = {index: state[f"module.{name}"] for index, name in enumerate(names) if f"module.{name}" in state}
    if not found:
        raise ValueError(
            f"the AveragedModel has no average of the optimizer's params: it has {list(state)[1:4]}, but the params "
            f"are {list(names)[:3]}; load the averages of the same model"
        )
    return {"steps": steps, "averages": found if steps else {}}  # before the first update they are copies of the model


def make_average(decay: Decay | None, dtype: torch.dtype | None) -> WeightAverage | None:
    """A WeightAverage, or None without a decay. Raises the errors of WeightAverage, and ValueError for a dtype if there
    is no decay."""
    if decay is None and dtype is not None:
        raise ValueError("ema_dtype can be set only with ema_decay; leave it out, or set ema_decay, for example 0.999")
    return None if decay is None else WeightAverage(decay, dtype)


@torch.no_grad()
def replace(param: Tensor, new: Tensor, keep: bool = True) -> Tensor:
    """Copies `new` into a param. With `keep` it returns a tensor with the param's previous values. This is `new` itself
    if the dtypes are equal, otherwise a copy."""
    own = param.clone() if keep else new
    param.copy_(new)
    return new.copy_(own) if keep and own.dtype == new.dtype else own
