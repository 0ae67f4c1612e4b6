"""Formats in plain PyTorch. All loads and stores of values of the reference backend are here."""

from __future__ import annotations

import torch
from torch import Tensor

from ..engine import formats
from ..engine.table import Row


def real_view(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def load(tensor: Tensor) -> Tensor:
    """The values as real numbers, float32 or float64. Shares memory with the tensor if no conversion is needed."""
    real = real_view(tensor.resolve_conj())
    return real if real.dtype == torch.float64 else real.float()


def store(tensor: Tensor, values: Tensor) -> None:
    """Rounds to nearest even. Unlike `load` it takes no conjugate views."""
    real_view(tensor).copy_(values)


def load_param(row: Row) -> Tensor:
    """The param as the rule gets it: its master weights if it has them."""
    return load(row.target) if row.low is None else formats.join(row.target, row.low)


def store_param(row: Row, values: Tensor) -> None:
    if row.low is None:
        store_rounded(row, row.target, values, "param", formats.DITHER_PARAM)
        return
    upper, lower = formats.split(values)
    row.target.copy_(upper)
    row.low.copy_(
        lower if row.low.dtype == torch.int16 else formats.lower_quarter(values, at(row, formats.DITHER_PARAM))
    )


def load_states(row: Row) -> list[Tensor]:
    """The values of the states. An exp_avg in anchored8 is decoded with the stored exp_avg_sq."""
    values = [formats.decode_e8m8(state) if state.dtype == torch.uint16 else state for state in row.states]
    if values and values[0].dtype == torch.uint8:
        values[0] = formats.decode_anchored8(values[0], load(values[1]), row.anchor)
    return [load(value) for value in values]


def store_states(row: Row, values: list[Tensor]) -> None:
    for number in reversed(range(len(values))):  # exp_avg in anchored8 needs the stored exp_avg_sq
        state, value = row.states[number], values[number]
        dither = formats.DITHER_AVERAGE if number == 0 else formats.DITHER_SQUARE
        if state.dtype == torch.uint16:
            state.copy_(formats.encode_e8m8(value, at(row, dither)))
        elif state.dtype == torch.uint8:
            square = load_states(row)[1]
            state.copy_(formats.encode_anchored8(value, square, row.anchor, at(row, dither)))
        else:
            store_rounded(row, state, value, "workspace" if state is row.workspace else "states", dither)


def store_rounded(row: Row, tensor: Tensor, values: Tensor, name: str, dither: formats.Dither) -> None:
    """Stores a tensor without a second array. name: its name in Row.dithered."""
    if tensor.dtype == torch.bfloat16 and name in row.dithered:
        tensor.copy_(formats.encode_bf16(values, at(row, dither)))
    else:
        store(tensor, values)


def at(row: Row, dither: formats.Dither) -> Tensor:
    """The thresholds of all elements in this step, in the layout of the row's tensors. Elements are counted in memory
    order."""
    target = row.target
    index = torch.empty_like(target, dtype=torch.int64)
    count = torch.arange(row.first_element, row.first_element + target.numel(), device=target.device)
    index.as_strided((target.numel(),), (1,)).copy_(count)
    return formats.thresholds(dither, index, int(row.step))
