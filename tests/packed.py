"""Packed states as float32 numbers, by the oracle of the formats."""

from __future__ import annotations

from typing import Any

import format_oracle as oracle
import numpy as np
import torch
from cases import Target
from torch import Tensor

Array = Any
BF16 = torch.bfloat16
REFERENCE = Target("reference", "cpu")
SHAPES = ((3, 5), (), (0,), (7, 1, 9), (4099,), (8192 + 130,))


def array(tensor: Tensor) -> Array:
    """Elements in the order in which they lie in memory: codes as int64, which are not negative, or float32."""
    flat = tensor.detach().as_strided((tensor.numel(),), (1,))
    if tensor.dtype == BF16:
        return flat.view(torch.int16).long().numpy() & 0xFFFF
    return flat.numpy() if tensor.dtype == torch.float32 else flat.long().numpy()


def fill(tensor: Tensor, values: Array) -> None:
    with torch.no_grad():
        tensor.as_strided((tensor.numel(),), (1,)).copy_(torch.from_numpy(np.asarray(values, np.float32)))


def values_of(optimizer: Any, param: Tensor) -> dict[str, Array]:
    """param, states and average of one param as float32."""
    state = optimizer.state[param]
    tensors = {"param": param, **{k: v for k, v in state.items() if isinstance(v, Tensor) and v.shape == param.shape}}
    low = tensors.pop("param_low", None)
    tensors.pop("step", None) if param.dim() else None
    values: dict[str, Array] = {}
    for name, tensor in tensors.items():
        codes = array(tensor)
        if name == "param" and low is not None:
            values[name] = oracle.joined(codes, array(low), 1 if low.dtype == torch.int16 else 256)
        elif tensor.dtype == BF16:
            values[name] = oracle.floats(codes << 16)
        elif tensor.dtype == torch.uint16:
            values[name] = oracle.from_e8m8(codes)
        elif tensor.dtype != torch.uint8:
            values[name] = codes
    if state.get("exp_avg") is not None and state["exp_avg"].dtype == torch.uint8:
        codes = array(state["exp_avg"])
        values["exp_avg"] = oracle.from_anchored8(codes, values["exp_avg_sq"], state["anchor"])
    return values


STORED: dict[str, dict[str, Any]] = {
    "exact, compact": {"master_weights": "exact", "state_dtype": "compact"},
    "24 bits, bfloat16 and e8m8": {
        "master_weights": "24bit",
        "state_dtype": {"exp_avg": BF16, "exp_avg_sq": "e8m8"},
        "rounding": "dithered",
    },
    "dithered, compact": {"rounding": "dithered", "state_dtype": "compact", "ema_decay": 0.5, "ema_dtype": BF16},
    "dithered": {"rounding": "dithered", "ema_decay": 0.5},
}
