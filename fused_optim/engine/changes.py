"""Change detection: each step first polls the change detector for what changed since the tables were built. A compiled
one (csrc/poll) is used if it is built and torch is new enough. The one in Python gives the same answers more slowly."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterable, Sequence
from itertools import chain, compress
from operator import attrgetter, eq, is_, is_not
from typing import Any

import torch
from torch import Tensor

from . import modules
from .dtensor import is_sharded, local, local_grad
from .layout import EMPTY
from .table import HostHparams, Rule, Table, same_strides
from .validation import check_hyperparameter, is_wrapper

REBUILD, GRADS_MOVED, RAW_CHANGED = 1, 2, 4

# Methods and attributes of torch's base class, bound once: this saves a look-up per tensor.
_Base = torch._C.TensorBase
data_ptr, numel, stride, is_contiguous = _Base.data_ptr, _Base.numel, _Base.stride, _Base.is_contiguous
get_device, is_neg, is_conj = _Base.get_device, _Base.is_neg, _Base.is_conj
dtype_of, shape_of, grad_of, version_of = map(attrgetter, ("dtype", "shape", "grad", "_version"))
PLAIN = {Tensor, torch.nn.Parameter}
END = object()


def layout_of(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride()


def bits_of(tensor: Tensor) -> tuple[bool, bool]:
    return tensor.is_conj(), tensor.is_neg()


def detect_changes(
    groups: list[dict[str, Any]],
    state: dict[Tensor, dict[str, Any]],
    rule: Rule,
    hparams: HostHparams,
    pending: Sequence[Tensor],
    tables: Sequence[Table],
    guarded: Sequence[Tensor],
) -> Any:
    """A change detector over everything that the tables were built from, except tables on meta.

    pending: params that have had no gradient yet. guarded: tensors that steps alone may write to.
    """

    def over(kind: Any) -> Any:
        detector = kind(groups, state, rule.columns, rule.deciding, hparams.group_hparams, hparams.lr)
        for param in pending:
            detector.add_pending(param)
        for table in tables:
            for number, row in enumerate([] if table.is_meta else table.rows_list):
                detector.add_row(row.param, row.target, row.state, row.grad_dtype, table.grads, number)
        for shard in guarded:
            detector.add_guarded(shard)
        return detector

    module = modules.poll()
    if not isinstance(module, str):
        with contextlib.suppress(BufferError):  # DLPack cannot describe a tensor, for example a state on meta
            return over(module.ChangeDetector)
    return over(ChangeDetector)


def laid_out_as(grad: Tensor, target: Tensor) -> Tensor:
    """A copy of the gradient in the memory layout of the tensor that it updates."""
    with torch.no_grad():
        return torch.empty_strided(target.shape, target.stride(), dtype=grad.dtype, device=grad.device).copy_(grad)


def dense_grad(grad: Tensor, target: Tensor) -> Tensor:
    """The gradient in the memory layout of the tensor that it updates. A gradient that has this layout or has no memory
    is returned itself, any other as a copy."""
    if grad.numel() and not grad._is_zerotensor() and not grad.data_ptr():
        return grad
    if same_strides(grad, target) and not (grad.is_conj() or grad.is_neg() or grad._is_zerotensor()):
        return grad
    return laid_out_as(grad, target)


def same_objects(now: Iterable[Any], then: Sequence[Any]) -> bool:
    """Whether both hold the same objects in the same order. `then` ends with END."""
    return all(map(is_, chain(now, (END,)), then))


class Placements:
    """The addresses and layouts of tensors. Most are compared as lists of numbers. Shapes and strides are compared one
    at a time, because thousands of new tuples would start Python's garbage collector."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self.tensors = tensors
        self.then = [list(map(ask, tensors)) for ask in self.asked]
        self.strided = [tensor for tensor in tensors if not tensor.is_contiguous()]
        self.layouts = list(map(layout_of, self.strided))
        self.complex = [tensor for tensor in tensors if tensor.is_complex()]
        self.bits = list(map(bits_of, self.complex))

    asked: tuple[Callable[[Tensor], Any], ...] = (data_ptr, dtype_of, numel, is_contiguous)

    def unchanged(self) -> bool:
        return (
            all(list(map(ask, self.tensors)) == then for ask, then in zip(self.asked, self.then, strict=True))
            and all(map(eq, map(layout_of, self.strided), self.layouts))
            and all(map(eq, map(bits_of, self.complex), self.bits))
        )


class Hyperparameters:
    """The options of the param groups, and the columns of `group_hparams` and `lr` that they fill."""

    def __init__(
        self,
        groups: list[dict[str, Any]],
        columns: Sequence[tuple[str, int, int, bool, bool]],
        raw: Tensor,
        lr: Tensor,
    ) -> None:
        self.groups, self.columns = groups, columns
        self.keys = [key for key, *_ in columns]
        self.switches = [first for _, first, _, _, is_switch in columns if is_switch]
        self.defaults = raw[0].tolist() if len(raw) else []
        self.width = len(self.defaults)
        self.memory = raw, lr
        self.raw = (ctypes.c_double * raw.numel()).from_address(raw.data_ptr())
        self.lr = (ctypes.c_int64 * lr.numel()).from_address(lr.data_ptr())
        self.seen: list[list[Any]] = [[END] * len(self.keys) for _ in groups]
        self.volatile = [False] * len(groups)  # whether a value is a tensor or list, which can change in place
        self.read()

    def read(self) -> int:
        """Updates the columns. Returns RAW_CHANGED if a number changed, plus REBUILD if a switch changed between zero
        and non-zero."""
        answer = 0
        for index, group in enumerate(self.groups):
            values = list(map(group.get, self.keys))
            if self.volatile[index] or not all(map(is_, values, self.seen[index])):
                answer |= self._read_group(index, values)
        return answer

    def _read_group(self, index: int, values: list[Any]) -> int:
        first_time = self.seen[index][0] is END
        row, lr = list(self.defaults), 0
        for (key, first, count, optional, _), value in zip(self.columns, values, strict=True):
            if optional and value is None:
                continue
            for column, number in enumerate(check_hyperparameter(key, self.groups[index][key], count), start=first):
                if isinstance(number, Tensor) and number.device.type != "cpu":
                    lr = number.data_ptr() | (number.dtype == torch.float64)
                else:
                    row[column] = float(number)
        self.seen[index] = values
        flat = [number for value in values for number in (value if isinstance(value, tuple) else (value,))]
        self.volatile[index] = not all(isinstance(number, int | float | None) for number in flat)

        answer, begin = 0, index * self.width
        for _, first, count, _, _ in self.columns:
            for column in range(first, first + count):
                if self.raw[begin + column] != row[column]:
                    turned = (self.raw[begin + column] != 0) != (row[column] != 0)
                    answer |= RAW_CHANGED
                    if turned and column in self.switches and not first_time:
                        answer |= REBUILD
                    self.raw[begin + column] = row[column]
        if self.lr[index] != lr:
            self.lr[index] = lr
            answer |= RAW_CHANGED
        return answer


class Gradients:
    """The gradients of one table's rows, and their entries in its `grads`."""

    def __init__(self, memory: Tensor) -> None:
        self.memory = memory
        self.slots: Any = (ctypes.c_int64 * memory.numel()).from_address(memory.data_ptr())
        self.params: list[Tensor] = []
        self.targets: list[Tensor] = []
        self.dtypes: list[torch.dtype] = []
        self.addresses: list[int] = []
        self.held: list[Tensor] = []
        self.stepped: list[Tensor] | None = None

    def add(self, param: Tensor, target: Tensor, dtype: torch.dtype) -> None:
        self.params.append(param)
        self.targets.append(target)
        self.dtypes.append(dtype)
        self.addresses.append(0)

    def freeze(self) -> None:
        """Records the layouts of the targets. Called after the last row."""
        self.shapes = list(map(shape_of, self.targets))
        dense = all(map(is_contiguous, self.targets))
        self.how: Callable[[Tensor], Any] = is_contiguous if dense else stride
        self.layouts = list(map(self.how, self.targets))
        self.devices = list(map(get_device, self.targets))
        self.spread = any(map(is_sharded, self.params))
        self.complex = any(dtype.is_complex for dtype in self.dtypes)

    def poll(self) -> int:
        grads = list(map(grad_of, self.params))
        addresses = self._usual(grads)
        if addresses is None:
            addresses = self._one_by_one(grads)
        if addresses is None:
            return REBUILD
        if addresses == self.addresses:
            return 0
        if self.stepped is not None and list(map(bool, addresses)) != list(map(bool, self.addresses)):
            self.stepped = None
        self.addresses = addresses
        self.slots[:] = addresses
        return GRADS_MOVED

    def _usual(self, grads: list[Tensor | None]) -> list[int] | None:
        """The addresses if all gradients are plain tensors in the layout of their targets, else None."""
        there = [grad for grad in grads if grad is not None]
        asked: tuple[Callable[[Tensor], Any], ...] = (dtype_of, get_device, shape_of, self.how)
        expected: list[Iterable[Any]] = [self.dtypes, self.devices, self.shapes, self.layouts]
        if len(there) != len(grads):
            mask = [grad is not None for grad in grads]
            expected = [compress(values, mask) for values in expected]
        if self.spread or not set(map(type, there)) <= PLAIN or any(map(is_neg, there)):
            return None
        if self.complex and any(map(is_conj, there)):
            return None
        try:
            for ask, values in zip(asked, expected, strict=True):
                if not all(map(eq, map(ask, there), values)):
                    return None
            addresses = list(map(data_ptr, there))
        except RuntimeError:  # a sparse gradient has no strides
            return None
        if not all(addresses):  # a gradient without elements, or a zero tensor
            return None
        self.held = there
        if len(there) == len(grads):
            return addresses
        found = iter(addresses)
        return [0 if grad is None else next(found) for grad in grads]

    def _one_by_one(self, grads: list[Tensor | None]) -> list[int] | None:
        """The addresses of the gradients, or of copies if their layout differs. None if new tables are needed."""
        addresses, self.held = [], []
        for param, target, dtype, grad in zip(self.params, self.targets, self.dtypes, grads, strict=True):
            if grad is None:
                addresses.append(0)
                continue
            fits = grad.dtype == dtype and grad.device == param.device and grad.shape == param.shape
            if not fits or grad.layout != torch.strided or is_sharded(grad) != is_sharded(param):
                return None
            shard = local_grad(param, grad) if is_sharded(grad) else grad
            if shard.shape != target.shape or is_wrapper(shard):
                return None
            held = dense_grad(shard, target)
            if held.numel() and not held.data_ptr():
                return None
            self.held.append(held)
            addresses.append(held.data_ptr() or EMPTY)
        return addresses

    def done(self) -> list[Tensor]:
        """Releases the gradients. Returns the params that were stepped."""
        self.held = []
        if self.stepped is None:
            rows = zip(self.params, self.addresses, strict=True)
            self.stepped = [param for param, address in rows if address and not param.is_inference()]
        return self.stepped


class ChangeDetector:
    """Has the methods and answers of the compiled ChangeDetector; csrc/poll/change_detector.h describes them."""

    def __init__(
        self,
        groups: list[dict[str, Any]],
        state: dict[Tensor, dict[str, Any]],
        columns: Sequence[tuple[str, int, int, bool, bool]],
        deciding: Sequence[str],
        raw: Tensor,
        lr: Tensor,
    ) -> None:
        self.groups, self.state, self.deciding = groups, state, deciding
        self.hyperparameters = Hyperparameters(groups, columns, raw, lr)
        self.pending: list[Tensor] = []
        self.guarded: list[Tensor] = []
        self.seen: list[int] = []
        self.tables: dict[int, Gradients] = {}
        self.frozen = False

    def add_pending(self, param: Tensor) -> None:
        self.pending.append(param)

    def add_guarded(self, tensor: Tensor) -> None:
        self.guarded.append(tensor)
        self.seen.append(tensor._version)

    def versions(self) -> list[int]:
        return self.seen

    def add_row(
        self, param: Tensor, target: Tensor, state: dict[str, Any], dtype: torch.dtype, grads: Tensor, row: int
    ) -> None:
        gradients = self.tables.setdefault(id(grads), Gradients(grads))
        assert row == len(gradients.params), "rows must be added in the order of the table"
        gradients.add(param, target, dtype)

    def poll(self) -> int:
        if not self.frozen:
            self._freeze()
        if not self._same_objects() or any(map(is_not, map(grad_of, self.pending), [None] * len(self.pending))):
            return REBUILD
        if list(map(version_of, self.guarded)) != self.seen:
            return REBUILD
        try:
            if not self.placements.unchanged():
                return REBUILD
        except RuntimeError:  # a tensor no longer has memory
            return REBUILD
        answer = self.hyperparameters.read()
        for gradients in self.tables.values():
            if answer & REBUILD:
                return REBUILD
            answer |= gradients.poll()
        return REBUILD if answer & REBUILD else answer

    def done(self) -> None:
        stepped = [gradients.done() for gradients in self.tables.values()]
        changed = stepped[0] if len(stepped) == 1 else list(chain.from_iterable(stepped))
        if self.spread:
            changed = changed + [shard for shard in map(local, self.spread) if not shard.is_inference()]
        torch.autograd.graph.increment_version(changed)
        self.seen = list(map(version_of, self.guarded))

    def _freeze(self) -> None:
        """Records everything that poll() compares."""
        self.frozen = True
        self.then = [*self._objects(), END]
        self.states = [*self.state.values(), END]
        self.dicts = [value for value in self.state.values() if isinstance(value, dict)]
        self.lengths = list(map(len, self.dicts))
        self.entries = [*chain.from_iterable(map(dict.values, self.dicts)), END]
        tensors = [x for x in (*self.then, *self.entries) if isinstance(x, Tensor)]
        self.spread = [tensor for tensor in tensors if is_sharded(tensor)]
        self.shards = [*map(local, self.spread), END]
        places = {id(tensor): tensor for tensor in map(local, tensors) if tensor.layout == torch.strided}
        self.placements = Placements(list(places.values()))
        for gradients in self.tables.values():
            gradients.freeze()

    def _objects(self) -> Iterable[Any]:
        """The objects in the groups and the keys of optimizer.state. If one is replaced, new tables are needed."""
        decides = [group.get(key) for group in self.groups for key in self.deciding] if self.deciding else ()
        members = chain.from_iterable(chain((group,), group["params"]) for group in self.groups)
        return chain(members, decides, self.state)

    def _same_objects(self) -> bool:
        return (
            same_objects(self._objects(), self.then)
            and same_objects(self.state.values(), self.states)
            and list(map(len, self.dicts)) == self.lengths
            and same_objects(chain.from_iterable(map(dict.values, self.dicts)), self.entries)
            and (not self.spread or same_objects(map(local, self.spread), self.shards))
        )
