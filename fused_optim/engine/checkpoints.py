"""Saves and loads checkpoints in torch's format. Values are loaded bit for bit; states keep the dtype they were saved
in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .states import numbers_of
from .table import Rule


class _Uncast:
    """Wraps a state, so that torch's load_state_dict does not cast it to its param's dtype."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


@contextmanager
def loading(optimizer: Optimizer) -> Iterator[None]:
    """Context manager for torch's load_state_dict. States keep their dtypes. Options that the saved groups lack keep
    the optimizer's values. __setstate__ must pass the loaded states to `arrived`."""

    def protect(_: Optimizer, incoming: dict[str, Any]) -> dict[str, Any]:
        states = {
            key: {k: _Uncast(v) if isinstance(v, Tensor) else v for k, v in value.items()}
            if isinstance(value, dict)
            else value
            for key, value in incoming["state"].items()
        }
        groups = incoming["param_groups"]
        if len(groups) == len(optimizer.param_groups):
            ours = (
                {k: v for k, v in group.items() if k not in ("params", "param_names")}
                for group in optimizer.param_groups
            )
            groups = [{**options, **group} for options, group in zip(ours, groups, strict=True)]
        return {**incoming, "state": states, "param_groups": groups}

    handle = optimizer.register_load_state_dict_pre_hook(protect)
    try:
        yield
    finally:
        handle.remove()


def arrived(states: Mapping[Any, Any], rule: Rule) -> None:
    """Unwraps loaded states in place. Must run before torch's __setstate__, which converts scalars that are not
    tensors. A missing `step` becomes 0, and a missing running scalar gets its start value."""
    for values in states.values():
        if isinstance(values, dict):
            values.update({key: value.tensor for key, value in values.items() if isinstance(value, _Uncast)})
            for name, start in {**({"step": 0.0} if rule.counted else {}), **rule.running}.items() if values else ():
                values.setdefault(name, torch.tensor(start))


@contextmanager
def leaving_out(optimizer: Optimizer, keys: Mapping[Tensor, Set[str]]) -> Iterator[None]:
    """Context manager in which state_dict() leaves states out. keys: the names of the states to leave out, by param."""

    def leave_out(_: Optimizer, packed: dict[str, Any]) -> dict[str, Any]:
        members = [param for group in optimizer.param_groups for param in group["params"]]
        state = dict(packed["state"])
        for index in [index for index, param in enumerate(members) if param in keys and index in state]:
            left_out = keys[members[index]]
            kept = {key: value for key, value in state.pop(index).items() if key not in left_out}
            if kept:
                state[index] = kept
        return {**packed, "state": state}

    handle = optimizer.register_state_dict_post_hook(leave_out, prepend=True) if keys else None
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()


def without_update(steps: Mapping[Tensor, Any]) -> list[Tensor]:
    """The params that have had no update yet, because every step was skipped. Waits for their devices. Params on meta
    are left out, because their counts have no values.

    steps: the counts of updates by param.
    """
    real = [param for param in steps if param.device.type != "meta"]
    return [param for param, count in zip(real, numbers_of([steps[p] for p in real]), strict=True) if count == 0]
