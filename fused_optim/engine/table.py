"""The table: everything that describes one step of one device, as plain arrays that a walker reads. layout.py says
what their columns are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .dtensor import local_grad
from .layout import (
    ALIGNMENT,
    CHUNK,
    MAX_SIGNATURES,
    SHARE,
    Format,
    GroupHparams,
    RowFields,
    TableArrays,
    TensorScalars,
    chunk_entry,
    column,
    packed_signature,
)

DTYPE_CODES: dict[torch.dtype, Format] = {
    torch.float32: Format.FLOAT32,
    torch.bfloat16: Format.BFLOAT16,
    torch.float16: Format.FLOAT16,
    torch.float64: Format.FLOAT64,
}
PACKED_DTYPES = {torch.uint16: Format.E8M8, torch.uint8: Format.ANCHORED8}  # of states
LOW_FORMATS = {torch.int16: Format.SPLIT16, torch.int8: Format.SPLIT8}
REAL_DTYPES = {torch.complex64: torch.float32, torch.complex128: torch.float64}

# A group's option, the first column of GroupHparams that it fills, and how many: a tuple fills several.
Option = tuple[str, str, int]

# What every optimizer has; the second list may be missing in a group, or None.
REQUIRED: tuple[Option, ...] = (("lr", "lr", 1), ("weight_decay", "weight_decay", 1))
OPTIONAL: tuple[Option, ...] = (
    ("maximize", "maximize", 1),
    ("decoupled_weight_decay", "decoupled", 1),
    ("lr_reference", "lr_reference", 1),
    ("decay_period", "decay_period", 1),
    ("max_grad_norm", "max_norm", 1),
    ("trust_clip", "trust_low", 2),
)


@dataclass(frozen=True)
class Rule:
    """What the machinery must know of an optimizer; the arithmetic itself is looked up by `name` in each backend.

    states: names in `optimizer.state[param]`, in the order in which the rule takes them.
    options: the options of its groups besides REQUIRED and OPTIONAL.
    switched: states that exist only where a group's option is true, as {state: option}; they come last in `states`.
    squares: states that are made of squares, and are never negative.
    starts: the option whose value a state starts from, as {state: option}; all others start from 0, but the maximum of
        an average starts from the average.
    eager: whether states are made with the param group, and not when the param has its first gradient.
    counted: whether `step` is one of the states. Where it is not, the optimizer counts out of sight, because the first
        update of a param may differ.
    trust: whether each tensor's update is scaled by a ratio of norms, which takes a second walk.
    clip_eps: added to the norm that gradients are clipped by.
    """

    name: str
    states: tuple[str, ...]
    options: tuple[Option, ...]
    switched: Mapping[str, str] = field(default_factory=dict)
    squares: tuple[str, ...] = ()
    starts: Mapping[str, str] = field(default_factory=dict)
    eager: bool = False
    counted: bool = True
    trust: bool = False
    clip_eps: float = 1e-6

    def states_of(self, group: Mapping[str, object]) -> list[str]:
        return [name for name in self.states if name not in self.switched or group[self.switched[name]]]

    def starts_of(self, group: Mapping[str, Any]) -> dict[str, float]:
        return {state: float(group[option]) for state, option in self.starts.items()}

    @property
    def deciding(self) -> list[str]:
        """The options that have no column, and decide which states there are."""
        with_column = {key for key, *_ in self.columns}
        return [key for key in self.switched.values() if key not in with_column]

    @property
    def columns(self) -> list[tuple[str, int, int, bool, bool]]:
        """All of them, with the number of the first column, and of each whether it is optional, and whether new tables
        are due when it becomes 0 or no longer is."""
        switches = {*self.switched.values(), "max_grad_norm"}
        own = {first for _, first, _ in self.options}  # under a name of their own
        options = [(*option, False) for option in REQUIRED + self.options]
        options += [(*option, True) for option in OPTIONAL if option[1] not in own]
        return [
            (key, column(GroupHparams, first), count, optional, key in switches)
            for key, first, count, optional in options
        ]


@dataclass
class Row:
    """One tensor of a table. `shard` is the param, or of a DTensor what lies here; `target` is what the kernel updates:
    the shard, or a dense copy of one that has holes or is a conjugate view. `ema`: the average of its weights, in all
    rows of an optimizer or in none; older than the table where it has `ema_begun`, else the first update copies the
    param into it. `low`: the lower halves of its master weights. `first_element`: where the shard begins within the
    whole param. `anchor`: of an exp_avg in anchored8, see engine/formats.py. `dithered`: which bfloat16 tensors of one
    array, of "param", "states" and "ema", are rounded at thresholds."""

    param: Tensor
    shard: Tensor
    target: Tensor
    states: list[Tensor]
    step: Tensor
    state: dict[str, Tensor]
    grad_dtype: torch.dtype
    group_index: int
    ema: Tensor | None = None
    ema_begun: bool = False
    low: Tensor | None = None
    first_element: int = 0
    anchor: int = 0
    dithered: frozenset[str] = frozenset()

    @property
    def tensors(self) -> list[Tensor]:
        """All that the kernel writes."""
        return [self.target, *self.states, *(x for x in (self.ema, self.low) if x is not None)]

    @property
    def formats(self) -> tuple[int, ...]:
        """Of param, gradient, states, and last of the average where there is one."""
        param = format_of(self.target.dtype, "param" in self.dithered)
        if self.low is not None:
            param = LOW_FORMATS[self.low.dtype]
        states = [format_of(state.dtype, "states" in self.dithered) for state in self.states]
        average = [] if self.ema is None else [format_of(self.ema.dtype, "ema" in self.dithered)]
        return tuple(map(int, (param, format_of(self.grad_dtype), *states, *average)))

    @property
    def grad(self) -> Tensor | None:
        """What goes with the shard of the param's gradient."""
        return None if self.param.grad is None else local_grad(self.param, self.param.grad)


def real_dtype(dtype: torch.dtype) -> torch.dtype:
    return REAL_DTYPES.get(dtype, dtype)


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one block of memory, in any order, each once."""
    expected = 1
    for stride, size in sorted(
        (stride, size) for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size != 1
    ):
        if stride != expected:
            return tensor.numel() == 0
        expected *= size
    return True


def same_strides(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape are laid out alike; strides along dimensions of one element say nothing."""
    return all(x == y or size == 1 for size, x, y in zip(a.shape, a.stride(), b.stride(), strict=True))


def format_of(dtype: torch.dtype, dithered: bool = False) -> Format:
    """The format of a tensor that has one array."""
    if dithered and dtype == torch.bfloat16:
        return Format.BFLOAT16_DITHERED
    return PACKED_DTYPES.get(dtype) or DTYPE_CODES[real_dtype(dtype)]


class HostHparams:
    """The hyperparameters of all groups, on the host: one buffer, so that one copy brings them to a device.

    group_hparams: float64 [groups, GroupHparams]. lr: int64 [groups], the address of a device lr tensor (lowest bit
        set: float64, else float32), or 0.
    """

    def __init__(self, groups: int, clip_eps: float, max_norm: float) -> None:
        width = len(GroupHparams._fields)
        self.buffer = torch.zeros(groups * (width + 1), dtype=torch.int64)
        self.group_hparams, self.lr = self.split(self.buffer)
        # What holds where a group has no key for it.
        self.group_hparams[:] = torch.tensor(GroupHparams(clip_eps=clip_eps, max_norm=max_norm), dtype=torch.float64)

    @staticmethod
    def split(buffer: Tensor) -> tuple[Tensor, Tensor]:
        width = len(GroupHparams._fields)
        groups = buffer.numel() // (width + 1)
        return buffer[: groups * width].view(torch.float64).view(groups, width), buffer[groups * width :]

    def column(self, name: str) -> Tensor:
        """float64 [groups], a view."""
        return self.group_hparams[:, column(GroupHparams, name)]

    def of(self, group: int) -> GroupHparams:
        """A group's numbers as Python floats."""
        return GroupHparams(*self.group_hparams[group].tolist())


def count_shares(count: int) -> int:
    """How many sums lie between so many numbers and the sum of them all, where a block adds up SHARE at most. There are
    never more of them than numbers."""
    total = 0
    while count > SHARE:
        count = -(-count // SHARE)
        total += count
    return total


class Table:
    """The arrays of one device's rows (see TableArrays), on the host; but `tensor_scalars` and what is summed lie on
    the device.

    clips: whether the norm of all gradients is taken. process_groups: those over whose members every tensor is spread.
    dtype_signatures: by the numbers that chunk_table has.
    row_offsets, sums and trust are None unless the rule has a trust ratio, and so is partials, unless the norm of all
        gradients is taken. For that norm: squares [1].
    """

    def __init__(
        self,
        rule: Rule,
        device: torch.device,
        rows: list[Row],
        hparams: HostHparams,
        clips: bool,
        process_groups: tuple[Any, ...] = (),
    ) -> None:
        self.rule = rule
        self.device = device
        self.rows_list = rows
        self.clips = clips
        self.process_groups = process_groups
        self.hparams = hparams
        self.copies = [row for row in rows if row.target is not row.shard]
        self.ema = any(row.ema is not None for row in rows)

        numbers: dict[tuple[int, ...], int] = {}
        signatures = [row.formats for row in rows]
        signature = torch.tensor([numbers.setdefault(found, len(numbers)) for found in signatures])
        unaligned = torch.tensor([any(t.data_ptr() % ALIGNMENT for t in row.tensors) for row in rows]).long()
        numel = torch.tensor([row.target.numel() * (2 if row.target.is_complex() else 1) for row in rows])
        self.dtype_signatures = tuple(numbers)
        self.packed = any(code >= Format.BFLOAT16_DITHERED for found in numbers for code in found)
        if len(numbers) > MAX_SIGNATURES:
            raise RuntimeError(
                f"the tensors of one device may have at most {MAX_SIGNATURES} combinations of param, gradient and "
                f"state dtypes, but have {len(numbers)}; use several optimizers"
            )
        self.elements = int(numel.sum())

        chunks = (numel + CHUNK - 1) // CHUNK
        row = torch.repeat_interleave(torch.arange(len(rows)), chunks)
        chunk = torch.arange(row.numel()) - (chunks.cumsum(0) - chunks)[row]
        self.chunk_table = chunk_entry(chunk, row, signature[row], unaligned[row])
        self.rows = torch.tensor(
            [self._fields(r, n, s) for r, n, s in zip(rows, numel.tolist(), signatures, strict=True)]
        )
        self.group_index = torch.tensor([row.group_index for row in rows], dtype=torch.int32)
        self.grads = torch.zeros(len(rows), dtype=torch.int64)
        # Zeros: prep writes one column of a skipped tensor's row, and the walkers load the whole row.
        width = len(TensorScalars._fields)
        self.tensor_scalars = torch.zeros(len(rows), width, dtype=torch.float64, device=device)

        self.row_offsets: Tensor | None = None
        self.partials: Tensor | None = None
        self.squares: Tensor | None = None
        self.sums: Tensor | None = None
        self.trust: Tensor | None = None
        if rule.trust or clips:
            count = self.chunk_table.numel()
            shape = (count, 2) if rule.trust else (count + count_shares(count),)
            self.partials = torch.zeros(shape, dtype=torch.float64, device=device)
        if clips:
            self.squares = torch.zeros(1, dtype=torch.float64, device=device)
        if rule.trust:
            self.row_offsets = torch.cat([torch.zeros(1, dtype=torch.int64), chunks.cumsum(0)])
            self.sums = torch.zeros(len(rows), 2, dtype=torch.float64, device=device)
            self.trust = torch.ones(len(rows), dtype=torch.float64, device=device)

    @property
    def is_meta(self) -> bool:
        """Whether its tensors have no memory, so that there is nothing to compute."""
        return self.device.type == "meta"

    @property
    def is_wide(self) -> bool:
        """Whether the arithmetic of all rows is float64."""
        return all(signature[0] == Format.FLOAT64 for signature in self.dtype_signatures)

    @property
    def arrays(self) -> TableArrays:
        hparams = self.hparams
        return TableArrays(
            chunk_table=self.chunk_table,
            rows=self.rows,
            grads=self.grads,
            lr=hparams.lr,
            group_hparams=hparams.group_hparams,
            group_index=self.group_index,
            tensor_scalars=self.tensor_scalars,
            row_offsets=self.row_offsets,
            partials=self.partials,
            sums=self.sums,
            trust=self.trust,
        )

    @staticmethod
    def _fields(row: Row, numel: int, signature: tuple[int, ...]) -> RowFields:
        return RowFields(
            numel=numel,
            param=row.target.data_ptr(),
            param_low=0 if row.low is None else row.low.data_ptr(),
            step=row.step.data_ptr(),
            dtype_signature=packed_signature(signature, row.ema is not None, row.ema_begun),
            ema=0 if row.ema is None else row.ema.data_ptr(),
            first_element=row.first_element,
            anchor=row.anchor,
            **{f"state{number}": state.data_ptr() for number, state in enumerate(row.states)},
        )
