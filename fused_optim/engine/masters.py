"""Master weights of bfloat16 params. The param is the upper half of a float32 weight; the lower half is a state."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from . import formats
from .dtensor import is_sharded, like, local
from .states import match_layout
from .table import NARROW, Row

Kind = Literal["exact", "24bit"]
LOW = "param_low"  # key in optimizer.state[param]
LOW_DTYPES: dict[Kind, torch.dtype] = {"exact": torch.int16, "24bit": torch.int8}


def check_kind(kind: Any) -> None:
    """Raises ValueError unless it is a value of the option master_weights."""
    if kind is not None and kind not in get_args(Kind):
        names = " or ".join(f'"{name}"' for name in get_args(Kind))
        raise ValueError(f"master_weights must be None or {names}, but got {kind!r}")


def check_param(param: Tensor, kind: Kind | None) -> None:
    """Raises TypeError for a float16 param if master weights are wanted."""
    if kind is not None and param.dtype == torch.float16:
        raise TypeError(
            f'master_weights="{kind}" is for bfloat16 params, but got one of torch.float16, which is not the upper '
            "half of a float32 number: its range is smaller. Convert the model to bfloat16, or use float32 params "
            "with autocast"
        )


class MasterWeights:
    """The master weights of one optimizer: which params have them, and whether their lower halves are still valid.

    A lower half is valid for the bits that its param had after the last step. A write by anything else makes it stale.
    Writes are detected by torch's count (Tensor._version) and by the address of the memory. A stale lower half becomes
    0, so that the param alone is the master.

    kind: the option master_weights. seen: for each param with a lower half, version and address of its shard at the
        time when the lower half was valid. The lower half of a param without an entry is taken to be valid.
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
        """Declares the lower halves of these params valid for the present values."""
        self.seen.update({param: self.place(param) for param in params})

    def guard(self, rows: Sequence[Row]) -> list[Tensor]:
        """Declares the lower halves of new rows valid. Returns the params whose writes torch counts."""
        params = [row.param for row in rows if row.low is not None]
        self.remember(params)
        return [param for param in params if not local(param).is_inference()]

    def remember_versions(self, params: Sequence[Tensor], versions: Sequence[int]) -> None:
        """Records the versions of params after steps. Their addresses have not changed."""
        for param, version in zip(params, versions, strict=True):
            self.seen[param] = version, self.seen[param][1]

    def restored(self) -> None:
        """Declares lower halves valid again after params were restored. A param with new memory was not restored."""
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
        """To be called after a checkpoint was loaded. Each lower half is taken to be valid at the next step. Removes
        the lower halves of params that have no master weights here."""
        self.seen.clear()
        for param, values in state.items():
            if LOW in values and not self.covers(param):
                del values[LOW]

    def keep_only(self, params: Iterable[Tensor]) -> None:
        """Removes the entries of all other params."""
        self.seen = {param: self.seen[param] for param in params if param in self.seen}

    def join(self, row: Row, kept: Mapping[str, Any]) -> dict[str, Tensor]:
        """Gives a row the lower half of its param. If the param's state `kept` has none, it is zeros.

        Returns:
            The entry for the param's state; empty if the param has no master weights.

        Raises:
            RuntimeError: the state's lower half has a dtype that lower halves cannot have.
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
        """The master weights of a param as a new float32 tensor. float64 and complex params are copied in their
        dtype."""
        low = state.get(LOW)
        if isinstance(low, Tensor) and self.covers(param):
            return like(param, formats.join(local(param).detach(), local(low)))
        wide = param.dtype if param.dtype in (torch.float64, torch.complex64, torch.complex128) else torch.float32
        return param.detach().to(wide, copy=True)

    @torch.no_grad()
    def move(self, param: Tensor, state: Mapping[str, Any], target: Tensor, share: float) -> None:
        """Moves a param, or its master weights, by a share of the way to `target`. Elements of the param that are
        infinite stay. The arithmetic is float32 or wider."""
        shard, low = local(param), state.get(LOW)
        mastered = isinstance(low, Tensor) and self.covers(param)
        wide = local(self.master(param, state)) if mastered or param.dtype in NARROW[1:] else shard
        wide.add_((local(target).to(wide.dtype) - wide).masked_fill_(wide.isinf(), 0.0), alpha=share)
        if isinstance(low, Tensor) and mastered:
            upper, lower = formats.split(wide)
            shard.copy_(upper)
            local(low).copy_(formats.convert_lower(lower, low.dtype))
        elif wide is not shard:
            shard.copy_(wide)

    @torch.no_grad()
    def lower(self, params: Sequence[Tensor], state: MutableMapping[Tensor, dict[str, Any]], kind: Kind) -> None:
        """Converts float32 params to bfloat16 in place, and puts their lower halves into `state`.

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
