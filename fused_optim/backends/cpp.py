"""The backend "cpp": the C++ kernels for CPUs."""

from __future__ import annotations

import functools
from types import ModuleType

import torch
from torch import Tensor

from ..engine import modules
from ..engine.backend import Backend, Scaling
from ..engine.table import Table
from .native import address_of, arrays_of, with_all_rules


@functools.cache
def kernels() -> ModuleType | str:
    return with_all_rules(modules.cpu())


class Cpp(Backend):
    name = "cpp"

    def __init__(self, table: Table) -> None:
        super().__init__(table)
        self._module = modules.built(kernels())
        self._arrays = arrays_of(self._module, table, table.arrays)

    @staticmethod
    def why_not(device: torch.device | None) -> str | None:
        module = kernels()
        if isinstance(module, str):
            return module
        if device is not None and device.type != "cpu":
            return f"the C++ kernel runs on the CPU, not on {device.type}"
        return None

    def sum_squares(self, out: Tensor) -> None:
        self._module.squares(self._arrays, address_of(out), torch.get_num_threads())

    def step(self, scaling: Scaling) -> None:
        numbers = map(address_of, (scaling.grad_scale, scaling.found_inf, scaling.squares))
        self._module.step(self.table.rule.name, self._arrays, *numbers, torch.get_num_threads())

    def apply_update(self) -> None:
        self._module.apply_update(self.table.rule.name, self._arrays, torch.get_num_threads())

    def scale_grads(self, squares: Tensor) -> None:
        self._module.scale(self._arrays, address_of(squares), torch.get_num_threads())
