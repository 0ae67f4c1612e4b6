"""Converts states to the layout that kernels read, and makes missing states. Runs when tables are rebuilt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .dtensor import like, local, spread_as
from .table import DTYPE_CODES, NARROW, PACKED_DTYPES, Row, is_dense, real_dtype, same_strides
from .validation import check_memory


def target_of(param: Tensor) -> Tensor:
    """The tensor that the kernel writes: the param itself if it is dense and has no conjugate or negative bit,
    otherwise an empty dense tensor of its shape."""
    plain = is_dense(param) and not param.is_conj() and not param.is_neg()
    return param if plain else torch.empty_like(param, requires_grad=False)


def state_dtype_of(param: Tensor, wanted: torch.dtype | None) -> torch.dtype:
    """The dtype of a new state: `wanted` for float32, bfloat16 and float16 params, otherwise the param's dtype."""
    return wanted if wanted is not None and param.dtype in NARROW else param.dtype


def allowed_dtype(param: Tensor, dtype: torch.dtype) -> torch.dtype:
    """The dtype of a loaded state. It keeps its own if kernels support it, it is complex exactly if the param is, and
    it is 64-bit (float64 or complex128) exactly if the param is. Otherwise it gets the param's dtype.
    Codes of packed formats are converted later."""
    if dtype in PACKED_DTYPES:
        return dtype
    same_width = (real_dtype(param.dtype) == torch.float64) == (real_dtype(dtype) == torch.float64)
    fits = real_dtype(dtype) in DTYPE_CODES and dtype.is_complex == param.dtype.is_complex
    return dtype if same_width and fits else param.dtype


def numbers_of(counts: Sequence[Any]) -> list[float]:
    """Counts of updates as numbers. Waits once for each device that holds counts."""
    numbers = [0.0 if isinstance(count, Tensor) else float(count) for count in counts]
    by_device: dict[torch.device, dict[int, Tensor]] = {}
    for index, count in enumerate(counts):
        if isinstance(count, Tensor):
            by_device.setdefault(count.device, {})[index] = local(count).reshape(()).float()
    for there in by_device.values():
        for index, number in zip(there, torch.stack([*there.values()]).tolist(), strict=True):
            numbers[index] = number
    return numbers


def match_scalar(param: Tensor, scalar: Any, name: str) -> Tensor:
    """A state of one number, such as the count of updates, as a float32 tensor of shape [] on the param's device.

    Raises:
        RuntimeError: the state has several elements, or is on meta although the param is not.
    """
    if not isinstance(scalar, Tensor):
        scalar = torch.tensor(float(scalar))
    if scalar.numel() != 1:
        raise RuntimeError(f'state "{name}" must have one element, but has shape {tuple(scalar.shape)}')
    check_data(param, scalar, name)
    return local(scalar).to(local(param).device, torch.float32).reshape(())


def match_running(param: Tensor, state: Mapping[str, Any], starts: Mapping[str, float]) -> dict[str, Tensor]:
    """The running scalars of a param. Those that `state` lacks have their start values."""
    return {name: match_scalar(param, state.get(name, start), name) for name, start in starts.items()}


def check_data(param: Tensor, state: Tensor, name: str) -> None:
    if state.is_meta and not param.is_meta:
        raise RuntimeError(
            f'state "{name}" must be on a device with data, like its param on {param.device}, but is on meta; load a '
            "checkpoint, or clear the param's states"
        )


def match_layout(
    param: Tensor, state: Mapping[str, Any], wanted: Sequence[str], only_dtype: torch.dtype | None = None
) -> dict[str, Any]:
    """The states among `wanted` that exist, on the param's device and in its memory layout. A state that fits is
    returned itself, others are copied.

    only_dtype: the dtype of all of them; None: a state keeps its dtype if the param may have states of that dtype.

    Raises:
        RuntimeError: a state has another shape than its param, or is on meta although the param is not.
    """
    fitting: dict[str, Any] = {}
    for name in wanted:
        old = state.get(name)
        if old is None:
            continue
        if old.shape != param.shape:
            raise RuntimeError(
                f'state "{name}" must have its param\'s shape, {tuple(param.shape)}, but has {tuple(old.shape)}'
            )
        check_data(param, old, name)
        old = spread_as(param, old, f'state "{name}"')
        if param.grad is not None:
            check_memory(old, f'state "{name}" of a param of shape {tuple(param.shape)}')
        shard, shard_of_param, dtype = local(old), local(param), only_dtype or allowed_dtype(param, old.dtype)
        laid_out = torch.empty_like(shard_of_param, device="meta")
        if (
            shard.device == shard_of_param.device
            and shard.dtype == dtype
            and same_strides(shard, laid_out)
            and not (shard.is_conj() or shard.is_neg())
        ):
            fitting[name] = old
        else:
            fitting[name] = like(param, torch.empty_like(shard_of_param, dtype=dtype, requires_grad=False).copy_(shard))
    return fitting


def make_states(
    param: Tensor,
    state: dict[str, Any],
    wanted: Sequence[str],
    dtypes: Mapping[str, torch.dtype],
    starts: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """The states among `wanted` that `state` lacks. The maximum of an average is a copy of the average. Other states
    are filled with their start value.

    dtypes: the dtypes of states that do not have their param's. starts: the start values that are not 0, by state. In
        complex states both parts have the value, as in torch.
    """
    made: dict[str, Any] = {}
    for name in wanted:
        if name in state:
            continue
        average = state.get(name.removeprefix("max_"))
        if average is not None:
            made[name] = like(param, local(average).clone())
        else:
            start = (starts or {}).get(name, 0.0)
            shard, value = local(param), complex(start, start) if param.is_complex() else start
            full = torch.full_like(shard, value, dtype=state_dtype_of(param, dtypes.get(name)), requires_grad=False)
            made[name] = like(param, full)
    return made


def make_row(param: Tensor, state: dict[str, Any], wanted: Sequence[str], step: Tensor, group: int) -> Row:
    grad_dtype = param.dtype if param.grad is None else param.grad.dtype
    shard = local(param)
    return Row(param, shard, target_of(shard), [local(state[name]) for name in wanted], step, state, grad_dtype, group)
