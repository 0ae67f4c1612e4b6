"""The backend "cuda": the CUDA C++ kernels. With FUSED_OPTIM_CUDA_EMULATE=1 their code runs in a loop on the CPU."""

from __future__ import annotations

import functools
import os
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..engine import machine, modules
from ..engine.backend import Scaling
from ..engine.table import Table
from .device_tables import OnDevice
from .native import address_of, arrays_of, with_all_rules


def emulated() -> bool:
    return os.environ.get("FUSED_OPTIM_CUDA_EMULATE") == "1"


@functools.cache
def kernels(name: str) -> ModuleType | str:
    return with_all_rules(modules.load(name))


class Cuda(OnDevice):
    name = "cuda"
    compiles = True

    def __init__(self, table: Table) -> None:
        super().__init__(table)
        self._module = modules.built(kernels("_cuda_emulated" if table.device.type == "cpu" else "_cuda"))
        self._arrays: Any = None

    @staticmethod
    def why_not(device: torch.device | None) -> str | None:
        module = kernels("_cuda_emulated" if emulated() else "_cuda")
        if isinstance(module, str):
            return module
        if emulated():
            return None if device is None or device.type == "cpu" else "FUSED_OPTIM_CUDA_EMULATE=1 is for CPU tensors"
        if device is not None and device.type != "cuda":
            return f"the CUDA kernel runs on CUDA devices, not on {device.type}"
        if (reason := machine.why_no_gpu()) is not None:
            return reason
        if torch.version.cuda is None:
            return "the CUDA kernel runs on NVIDIA GPUs, and this torch is built for ROCm; use Triton"
        return None

    def sum_squares(self, out: Tensor) -> None:
        self._call("squares", (), out)

    def step(self, scaling: Scaling) -> None:
        self._call("step", (self.table.rule.name,), scaling.grad_scale, scaling.found_inf, scaling.squares)

    def apply_update(self) -> None:
        self._call("apply_update", (self.table.rule.name,))

    def scale_grads(self, squares: Tensor) -> None:
        self._call("scale", (), squares)

    def _call(self, function: str, before: tuple[str, ...], *numbers: Tensor | None) -> None:
        """Calls a function of the module with the arguments `before`, the table and the addresses of `numbers`."""
        with self.current_device():
            if self._arrays is None:
                self._arrays = arrays_of(self._module, self.table, self.arrays)
            where: tuple[int, ...] = ()
            if self.table.device.type == "cuda":
                where = (torch.cuda.current_stream().cuda_stream, torch.cuda.current_device())
            getattr(self._module, function)(*before, self._arrays, *map(address_of, numbers), *where)
