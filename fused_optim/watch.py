"""The look before each step, in Python: what csrc/watch.cpp and csrc/watch_groups.cpp do where the extension is
built, some ten times slower."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .layout import check_hyperparameter
from .shards import is_sharded, local, local_grad
from .table import EMPTY, same_strides

REBUILD, GRADS_MOVED, RAW_CHANGED = 1, 2, 4


def placement(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def dense_grad(grad: Tensor, target: Tensor) -> Tensor:
    """The gradient in the memory layout of the tensor that it updates; itself where it has that layout already."""
    if same_strides(grad, target) and not (grad.is_conj() or grad.is_neg() or grad._is_zerotensor()):
        return grad
    with torch.no_grad():
        return torch.empty_strided(target.shape, target.stride(), dtype=grad.dtype, device=grad.device).copy_(grad)


class Watch:
    """Same methods and answers as the extension's Watch; csrc/watch.h says what they mean."""

    def __init__(
        self,
        groups: list[dict[str, Any]],
        state: dict[Tensor, dict[str, Any]],
        columns: Sequence[tuple[str, int, int, bool, bool]],
        deciding: Sequence[str],
        raw: Tensor,
        lr: Tensor,
    ) -> None:
        self.deciding = deciding
        self.groups, self.state, self.columns, self.raw, self.lr = groups, state, columns, raw, lr
        self.defaults = raw.clone()
        self.switches = [first for _, first, _, _, is_switch in columns if is_switch]
        self.objects = self._objects()
        self.placements = self._placements()
        self.pending: list[Tensor] = []
        self.rows: list[tuple[Tensor, Tensor, torch.dtype, Tensor, int]] = []
        self.held: list[Tensor] = []
        self._read_hyperparameters()

    def add_pending(self, param: Tensor) -> None:
        self.pending.append(param)

    def add_row(
        self, param: Tensor, target: Tensor, state: dict[str, Any], dtype: torch.dtype, grads: Tensor, row: int
    ) -> None:
        self.rows.append((param, target, dtype, grads, row))

    def look(self) -> int:
        objects = self._objects()
        if len(objects) != len(self.objects) or any(a is not b for a, b in zip(objects, self.objects, strict=True)):
            return REBUILD
        if self._placements() != self.placements or any(param.grad is not None for param in self.pending):
            return REBUILD
        on = self.raw[:, self.switches] != 0
        answer = self._read_hyperparameters()
        if not torch.equal(on, self.raw[:, self.switches] != 0):
            return REBUILD
        self.held.clear()
        for param, target, dtype, grads, row in self.rows:
            grad, address = param.grad, 0
            if grad is not None:
                if grad.layout != torch.strided or (grad.dtype, grad.device, grad.shape) != (
                    dtype,
                    param.device,
                    param.shape,
                ):
                    return REBUILD
                shard = local_grad(param, grad) if is_sharded(param) or is_sharded(grad) else grad
                self.held.append(dense_grad(shard, target))
                address = self.held[-1].data_ptr() or EMPTY
            if int(grads[row]) != address:
                grads[row] = address
                answer |= GRADS_MOVED
        return answer

    def done(self) -> None:
        self.held.clear()
        stepped = [param for param, _, _, grads, row in self.rows if int(grads[row])]
        shards = [local(param) for param in stepped if is_sharded(param)]
        changed = [tensor for tensor in stepped + shards if not tensor.is_inference()]
        torch.autograd.graph.increment_version(changed)

    def _objects(self) -> list[Any]:
        """All that may not change without new tables, to be compared by identity."""
        objects: list[Any] = []
        for group in self.groups:
            objects += [group, *group["params"]]
            objects += [x for k in self.deciding for x in (k, group.get(k))]
        for param, state in self.state.items():
            objects += [param, *(state.values() if isinstance(state, dict) else [state])]
        return objects + [local(x) for x in objects if is_sharded(x)]

    def _placements(self) -> list[Any]:
        tensors = [x for x in self.objects if isinstance(x, Tensor) and not is_sharded(x)]
        return [placement(x) for x in tensors if x.layout == torch.strided]

    def _read_hyperparameters(self) -> int:
        raw, lr = self.defaults.clone(), torch.zeros_like(self.lr)
        for index, group in enumerate(self.groups):
            for key, first, count, optional, _ in self.columns:
                if optional and group.get(key) is None:
                    continue
                for column, value in enumerate(check_hyperparameter(key, group[key], count), start=first):
                    if isinstance(value, Tensor) and value.device.type != "cpu":
                        lr[index] = value.data_ptr() | (value.dtype == torch.float64)
                    else:
                        raw[index, column] = float(value)
        changed = not (torch.equal(raw, self.raw) and torch.equal(lr, self.lr))
        self.raw.copy_(raw)
        self.lr.copy_(lr)
        return RAW_CHANGED if changed else 0
