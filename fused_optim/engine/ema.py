"""An exponential moving average of the weights, kept by the step itself: walkers update it where they have just stored
the param, so that it costs no pass over memory of its own."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from .backend import Tables
from .changes import RAW_CHANGED
from .dtensor import is_same_memory, like, local
from .scaling import Shared
from .states import match_layout, state_dtype_of
from .table import Row

Decay = float | Callable[[int], float]


def check_decay(decay: Any) -> float:
    """Raises ValueError for a decay that is no number from 0 to 1."""
    if not isinstance(decay, Real) or not 0.0 <= float(decay) <= 1.0:
        raise ValueError(f"ema_decay must be a number from 0 to 1, or a function that returns one, but got {decay!r}")
    return float(decay)


def check_dtype(dtype: Any, option: str = "ema_dtype") -> None:
    """Raises ValueError for a dtype that averages and states cannot have."""
    if dtype not in (None, torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"{option} must be None, torch.float32, torch.bfloat16 or torch.float16, but got {dtype}")


class WeightAverage:
    """The averages of one optimizer's params.

    current: the decay of the step that is under way. steps: how many were taken. tensors: the averages by param, laid
    out as its states. unreached: params whose first update may not have come yet, because steps were skipped; it will
        copy. lent: whether the averages are in the place of the params.

    Raises:
        ValueError: decay is no number from 0 to 1, or dtype none that the averages may have.
    """

    def __init__(self, decay: Decay, dtype: torch.dtype | None = None) -> None:
        check_dtype(dtype)
        self.set_decay(decay)
        self.dtype = dtype
        self.steps = 0
        self.tensors: dict[Tensor, Tensor] = {}
        self.unreached: set[Tensor] = set()
        self.lent = False

    @property
    def decay(self) -> Decay:
        return self._decay.value

    def set_decay(self, decay: Decay) -> None:
        """Raises ValueError where it is no number from 0 to 1, and no function."""
        self.current = 0.0 if callable(decay) else check_decay(decay)
        self._decay = Shared(decay, "ema_decay")

    def __getstate__(self) -> dict[str, Any]:
        self.check_home("an optimizer cannot be copied or saved")
        return self.__dict__.copy()

    def check_home(self, what: str) -> None:
        """Raises RuntimeError where the averages are in the place of the params."""
        if self.lent:
            raise RuntimeError(f"{what} inside of ema_weights(), where its params hold their averages; leave it first")

    def begin(self) -> None:
        """Before a step changes anything: asks for its decay.

        Raises:
            RuntimeError: the averages are in the place of the params.
            ValueError: the function that was given as decay returned no number from 0 to 1.
        """
        self.check_home("step() cannot be called")
        if callable(self.decay):
            self.current = check_decay(self.decay(self.steps))

    def advance(self, tables: Tables) -> int:
        """Puts the decay where prep reads it; returns what that has changed (see changes.py)."""
        self.steps += 1
        if not tables or not callable(self.decay):  # a number is there since the tables were built
            return 0
        column = tables[0].table.hparams.column("ema_decay")  # one for all tables
        if column[0] == self.current:
            return 0
        column.fill_(self.current)
        return RAW_CHANGED

    def join(self, row: Row, ended: Tensor | None) -> Tensor:
        """Gives a row the average of its param, laid out as that is; where there is none yet, a copy. Returns it, and
        does not keep it yet. ended: the count of the param's updates, where it begins anew."""
        param, old = row.param, self.tensors.get(row.param)
        if ended is not None and float(ended) > 0:
            self.unreached.discard(param)
        row.ema_begun = old is not None and param not in self.unreached
        if old is not None:
            average = match_layout(param, {"average": old}, ["average"])["average"]
        else:
            # In 16 bits an average stands still where decay is near 1.
            dtype = state_dtype_of(param, torch.float32 if self.dtype is None else self.dtype)
            average = like(param, torch.empty_like(row.shard, dtype=dtype, requires_grad=False).copy_(row.shard))
            self.unreached.add(param)
        row.ema = local(average)
        return average

    def keep_only(self, params: Iterable[Tensor]) -> None:
        """Drops the averages of all other params."""
        self.tensors = {param: self.tensors[param] for param in params if param in self.tensors}
        self.unreached &= self.tensors.keys()

    @contextmanager
    def lend(self, params: Sequence[Tensor]) -> Iterator[None]:
        """Puts the averages in the place of the params, and these back."""
        self.check_home("ema_weights() cannot be called")
        self.lent = True
        lent: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        converted = 0
        try:
            for param in params:
                average = self.tensors.get(param)
                if average is not None:
                    memory = local(param).detach()  # where the average is put, whatever the param becomes
                    lent.append((param, memory, average, replace(param, average)))
            yield
        finally:
            for param, memory, average, own in lent:
                if is_same_memory(param, memory):
                    replace(param, own, keep=own is average)
                    continue
                converted += 1
                if own is average:
                    local(average).copy_(memory)
            self.lent = False
            if converted:
                warnings.warn(
                    f"{converted} params were converted or replaced inside of ema_weights(). They keep what they hold "
                    "now, and the weights that they were trained to are gone. To train on, convert a copy of the "
                    "model: copy.deepcopy(model)",
                    stacklevel=5,  # past two context managers
                )

    def load(self, params: Sequence[Tensor], names: Sequence[str | None], state: Mapping[str, Any]) -> None:
        """Takes over what ema_state_dict gave, or AveragedModel's state_dict, or raises ValueError where it is of other
        params. names: of the params, None where they have none."""
        self.check_home("load_ema_state_dict() cannot be called")
        if "n_averaged" in state:
            state = from_averaged_model(state, names)
        if not {"steps", "averages"} <= state.keys():
            raise ValueError(
                "load_ema_state_dict() takes what ema_state_dict() or torch.optim.swa_utils.AveragedModel.state_dict() "
                f"returned, but got a dict with the keys {list(state)[:5]}"
            )
        for index, average in state["averages"].items():
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
        self.steps = int(state["steps"])
        self.unreached = set()
        self.tensors = {
            params[index]: match_layout(params[index], {"average": average.detach().clone()}, ["average"])["average"]
            for index, average in state["averages"].items()
        }


def from_averaged_model(state: Mapping[str, Any], names: Sequence[str | None]) -> dict[str, Any]:
    """What ema_state_dict would give, of the state_dict of a torch.optim.swa_utils.AveragedModel. Its averages have the
    names that the params have in the model, after "module."; buffers are left out.

    Raises:
        ValueError: the optimizer does not know the names of its params, or none of them is in the state.
    """
    if None in names:
        raise ValueError(
            "the averages of an AveragedModel are found by the names of the params, and this optimizer does not know "
            "them; make it with model.named_parameters() in place of model.parameters()"
        )
    steps = int(state["n_averaged"])
    found = {index: state[f"module.{name}"] for index, name in enumerate(names) if f"module.{name}" in state}
    if not found:
        raise ValueError(
            f"the AveragedModel has no average of the optimizer's params: it has {list(state)[1:4]}, and they are "
            f"{list(names)[:3]}; load the averages of the same model"
        )
    return {"steps": steps, "averages": found if steps else {}}  # before its first update it holds no average


def make_average(decay: Decay | None, dtype: torch.dtype | None) -> WeightAverage | None:
    """None without a decay. Errors as WeightAverage's, and ValueError where there is a dtype for no average."""
    if decay is None and dtype is not None:
        raise ValueError("ema_dtype has a meaning only with ema_decay; leave it out, or use ema_decay=0.999, say")
    return None if decay is None else WeightAverage(decay, dtype)


@torch.no_grad()
def replace(param: Tensor, new: Tensor, keep: bool = True) -> Tensor:
    """Gives the param the elements of another tensor. Returns what holds its own ones then (`keep`): that tensor where
    the dtypes are equal, else a copy."""
    own = param.clone() if keep else new
    param.copy_(new)
    return new.copy_(own) if keep and own.dtype == new.dtype else own
