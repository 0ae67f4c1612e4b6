"""The backend "triton": the Triton kernels. With TRITON_INTERPRET=1 they run on the CPU."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..engine import machine
from ..engine.backend import Scaling
from .device_tables import OnDevice


def interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


class Triton(OnDevice):
    name = "triton"
    compiles = True

    @staticmethod
    def why_not(device: torch.device | None) -> str | None:
        if (reason := machine.why_not_triton()) is not None:
            return reason
        if interpreted() and (device is None or device.type == "cpu"):
            return None
        if device is not None and device.type == "cpu":
            return "Triton runs CPU tensors only with TRITON_INTERPRET=1"
        if device is not None and device.type != "cuda":
            return f"Triton kernels run on CUDA and ROCm devices, not on {device.type}"
        return machine.why_no_gpu() or machine.why_not_compiled_by_triton()

    def sum_squares(self, out: Tensor) -> None:
        self._call("launch_squares", (self.table.dtype_signatures,), out)

    def step(self, scaling: Scaling) -> None:
        numbers = scaling.grad_scale, scaling.found_inf, scaling.squares
        self._call(
            "launch", (self.table.rule.name, self.table.dtype_signatures), *numbers, self.table.ema, self.table.cautious
        )

    def apply_update(self) -> None:
        self._call(
            "launch_apply_update",
            (self.table.rule.name, self.table.dtype_signatures),
            self.table.ema,
            self.table.cautious,
        )

    def scale_grads(self, squares: Tensor) -> None:
        self._call("launch_scale", (self.table.dtype_signatures,), squares)

    def _call(self, function: str, before: Sequence[Any], *after: Any) -> None:
        """Calls a function of launch.py with the arguments `before`, the table's arrays and `after`."""
        from ..triton_kernels import launch  # imports Triton

        with self.current_device():
            getattr(launch, function)(*before, self.arrays, *after)
