"""What optimizers save and load: torch's checkpoints, bit for bit, and states of any dtype besides."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .states import numbers_of


class _Uncast:
    """Carries a state through torch's load_state_dict, which would cast it to its param's dtype."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


@contextmanager
def loading(optimizer: Optimizer) -> Iterator[None]:
    """Inside of it torch's load_state_dict keeps the dtypes of states, and the optimizer's values of options that the
    saved groups lack. What arrives in __setstate__ must go through `arrived`."""

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


def arrived(states: Mapping[Any, Any], counted: bool) -> None:
    """Completes loaded states in place, before torch's __setstate__ sees them: it makes a tensor of a `step` that is
    none."""
    for values in states.values():
        if isinstance(values, dict):
            values.update({key: value.tensor for key, value in values.items() if isinstance(value, _Uncast)})
            if values and counted:
                values.setdefault("step", torch.zeros(()))


@contextmanager
def leaving_out(optimizer: Optimizer, keys: Mapping[Tensor, Set[str]]) -> Iterator[None]:
    """Inside of it state_dict() lacks these states of these params."""

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
    """The params that no update has reached yet, because each step was skipped. steps: their counts of updates. Waits
    for their devices. On meta, where counts have no values, none."""
    real = [param for param in steps if param.device.type != "meta"]
    return [param for param, count in zip(real, numbers_of([steps[p] for p in real]), strict=True) if count == 0]
