"""Master weights: bfloat16 params whose lower halves stand in the state, so that no update is lost."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from . import formats
from .dtensor import is_sharded, like, local
from .states import match_layout
from .table import Row

Kind = Literal["exact", "24bit"]
LOW = "param_low"  # key in optimizer.state[param]
LOW_DTYPES: dict[Kind, torch.dtype] = {"exact": torch.int16, "24bit": torch.int8}


def check_kind(kind: Any) -> None:
    """Raises ValueError for master weights that there are not."""
    if kind is not None and kind not in get_args(Kind):
        names = " or ".join(f'"{name}"' for name in get_args(Kind))
        raise ValueError(f"master_weights must be None or {names}, but got {kind!r}")


def check_param(param: Tensor, kind: Kind | None) -> None:
    """Raises TypeError for a param that can have no such master weights but would need them."""
    if kind is not None and param.dtype == torch.float16:
        raise TypeError(
            f'master_weights="{kind}" is for bfloat16 params, but got one of torch.float16, which is not the upper '
            "half of a float32 number: its range is smaller. Convert the model to bfloat16, or use float32 params "
            "with autocast"
        )


class MasterWeights:
    """Which params of an optimizer have lower halves, and whether these still belong to what the params hold.

    A lower half belongs to the bits that its param had after the last step. Everything else that writes to the param
    makes it stale: torch counts writes (Tensor._version), and new memory has another address. Then the param alone is
    the master: its lower half becomes 0.

    kind: None where there are none. seen: version and address of the shard of each param that has a lower half, as they
    were when both belonged together. A param that is not in it is taken as it is when it is first seen.
    """

    def __init__(self, kind: Kind | None) -> None:
        check_kind(kind)
        self.kind = kind
        self.seen: dict[Tensor, tuple[int, int]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "seen": {}}

    def covers(self, param: Tensor) -> bool:
        return self.kind is not None and param.dtype == torch.bfloat16

    def place(self, param: Tensor) -> tuple[int, int]:
        shard = local(param)
        return 0 if shard.is_inference() else shard._version, shard.data_ptr()

    def remember(self, params: Iterable[Tensor]) -> None:
        """Param and lower half belong together as they are now."""
        self.seen.update({param: self.place(param) for param in params})

    def guard(self, rows: Sequence[Row]) -> list[Tensor]:
        """Remembers the params of new rows that have lower halves, and returns those whose writes torch counts."""
        params = [row.param for row in rows if row.low is not None]
        self.remember(params)
        return [param for param in params if not local(param).is_inference()]

    def remember_versions(self, params: Sequence[Tensor], versions: Sequence[int]) -> None:
        """After steps: the versions that they have left."""
        for param, version in zip(params, versions, strict=True):
            self.seen[param] = version, self.seen[param][1]

    def restored(self) -> None:
        """Params hold their own bits again, after others were lent to them; not those that have other memory now."""
        places = {param: self.place(param) for param in self.seen}
        self.seen.update({param: place for param, place in places.items() if place[1] == self.seen[param][1]})

    @torch.no_grad()
    def settle(self, state: Mapping[Tensor, dict[str, Any]]) -> None:
        """Sets stale lower halves to 0."""
        stale = [param for param, place in self.seen.items() if self.place(param) != place]
        for param in stale:
            low = state.get(param, {}).get(LOW)
            if isinstance(low, Tensor):
                local(low).zero_()
        if stale:
            warnings.warn(
                f"{len(stale)} params have been written to, or have other memory, since the last step: their master "
                "weights now start from the bfloat16 numbers that are there. This is right after loading weights into "
                "the model. Where it happens at every step, no master weights remain",
                stacklevel=4,
            )
            self.remember(stale)

    def loaded(self, state: Mapping[Tensor, dict[str, Any]]) -> None:
        """After lower halves were loaded: each belongs to what its param holds at the next step. Drops those of params
        that have every bit themselves, or shall have no master."""
        self.seen.clear()
        for param, values in state.items():
            if LOW in values and not self.covers(param):
                del values[LOW]

    def keep_only(self, params: Iterable[Tensor]) -> None:
        """Forgets all other params."""
        self.seen = {param: self.seen[param] for param in params if param in self.seen}

    def join(self, row: Row, kept: Mapping[str, Any]) -> dict[str, Tensor]:
        """Gives a row its param's lower half, zeros where `kept`, its state, has none. Returns what the state is to
        hold of it: nothing where the param has no master.

        Raises:
            RuntimeError: the lower half that is there is none.
        """
        if self.kind is None or not self.covers(row.param):
            return {}
        old, dtype = kept.get(LOW), LOW_DTYPES[self.kind]
        if old is None:
            low = like(row.param, torch.zeros_like(row.shard, dtype=dtype, requires_grad=False))
        elif old.dtype not in LOW_DTYPES.values():
            raise RuntimeError(
                f'state "{LOW}" must be torch.int16 or torch.int8, but is {old.dtype}; load a checkpoint of this '
                "optimizer, without a conversion between"
            )
        else:
            low = match_layout(row.param, {LOW: old}, [LOW], old.dtype)[LOW]
            if old.dtype != dtype:
                low = like(row.param, formats.convert_lower(local(low), dtype))
        row.low = local(low)
        return {LOW: low}

    def master(self, param: Tensor, state: Mapping[str, Any]) -> Tensor:
        """A new float32 tensor; of params that are wider than that in their own dtype."""
        low = state.get(LOW)
        if isinstance(low, Tensor) and self.covers(param):
            return like(param, formats.join(local(param).detach(), local(low)))
        wide = param.dtype if param.dtype in (torch.float64, torch.complex64, torch.complex128) else torch.float32
        return param.detach().to(wide, copy=True)

    @torch.no_grad()
    def lower(self, params: Sequence[Tensor], state: MutableMapping[Tensor, dict[str, Any]], kind: Kind) -> None:
        """Turns float32 params into bfloat16 ones in place, and keeps their lower halves in `state`.

        Raises:
            RuntimeError: a float32 param has a gradient, or is a DTensor. Nothing has been changed then.
        """
        lowered = [param for param in params if param.dtype == torch.float32]
        for param in lowered:
            if param.grad is not None:
                raise RuntimeError(
                    f"lower_params() takes params without gradients, but one of shape {tuple(param.shape)} has a "
                    "gradient; call zero_grad() before it"
                )
            if is_sharded(param):
                raise RuntimeError(
                    f"lower_params() takes plain tensors, but a param of shape {tuple(param.shape)} is a DTensor; "
                    "shard a bfloat16 model in its place, and make the optimizer with master_weights"
                )
        for param in lowered:
            upper, lower = formats.split(param)
            fitting = torch.empty_like(param, dtype=torch.bfloat16, requires_grad=False).copy_(upper)
            lower = formats.convert_lower(lower, LOW_DTYPES[kind])
            state[param][LOW] = torch.empty_like(fitting, dtype=lower.dtype).copy_(lower)
            param.data = fitting
        self.kind = kind
        self.remember(lowered)
