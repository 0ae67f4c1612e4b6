"""The table: everything that describes one step of one device, as plain arrays that a walker reads. csrc/tables.h is
its mirror."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .dtensor import local_grad

CHUNK = 4096  # elements of one tensor that one program handles
SHARE = 4096  # numbers that one block of a GPU adds up where the norm of all gradients is taken
ROW_WIDTH = 8  # numel, param, step, signature, states, average of the weights
RAW_WIDTH = 17
HYPER_WIDTH = 16
MAX_STATES = ROW_WIDTH - 5
EMA_STREAM = 6  # of the nibbles of a packed signature
EMA_BEGUN = 1 << 28  # beside them
ALIGNMENT = 16  # bytes of the widest access

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
REAL_DTYPES = {torch.complex64: torch.float32, torch.complex128: torch.float64}
ABSENT = 15
MAX_KINDS = 128  # what desc has bits for
EMPTY = 16  # stands in `grads` for the address of a gradient without elements, which is null


# Columns of `raw`, as csrc/tables.h has them.
LR, BETAS, EPS, WEIGHT_DECAY, DECOUPLED, MAXIMIZE, OWN = 0, 1, 3, 4, 5, 6, 7
LR_REFERENCE, DECAY_PERIOD, MAX_NORM, CLIP_EPS, TRUST_CLIP, TRUST_ALWAYS, EMA_DECAY = 9, 10, 11, 12, 13, 15, 16

SKIP = 11  # column of `hyper`: 1 where the tensor sits the step out


# A group's option, the first column that it fills, and how many: a tuple fills several.
Column = tuple[str, int, int]

# What every optimizer has; the second list may be missing in a group, or None.
REQUIRED: tuple[Column, ...] = (("lr", LR, 1), ("weight_decay", WEIGHT_DECAY, 1))
OPTIONAL: tuple[Column, ...] = (
    ("maximize", MAXIMIZE, 1),
    ("decoupled_weight_decay", DECOUPLED, 1),
    ("lr_reference", LR_REFERENCE, 1),
    ("decay_period", DECAY_PERIOD, 1),
    ("max_grad_norm", MAX_NORM, 1),
    ("trust_clip", TRUST_CLIP, 2),
)


@dataclass(frozen=True)
class Rule:
    """What the machinery must know of an optimizer; the arithmetic itself is looked up by `name` in each backend.

    states: names in `optimizer.state[param]`, in the order in which the rule takes them.
    options: the options of its groups besides REQUIRED and OPTIONAL.
    switched: states that exist only where a group's option is true, as {state: option}; they come last in `states`.
    counted: whether `step` is one of the states. Where it is not, the optimizer counts out of sight, because the first
        update of a param may differ.
    trust: whether each tensor's update is scaled by a ratio of norms, which takes a second walk.
    clip_eps: added to the norm that gradients are clipped by.
    """

    name: str
    states: tuple[str, ...]
    options: tuple[Column, ...]
    switched: Mapping[str, str] = field(default_factory=dict)
    counted: bool = True
    trust: bool = False
    clip_eps: float = 1e-6

    def states_of(self, group: Mapping[str, object]) -> list[str]:
        return [name for name in self.states if name not in self.switched or group[self.switched[name]]]

    @property
    def deciding(self) -> list[str]:
        """The options that have no column, and decide which states there are."""
        with_column = {key for key, *_ in self.columns}
        return [key for key in self.switched.values() if key not in with_column]

    @property
    def columns(self) -> list[tuple[str, int, int, bool, bool]]:
        """All of them, and of each whether it is optional, and whether new tables are due when it becomes 0 or no
        longer is."""
        switches = {*self.switched.values(), "max_grad_norm"}
        own = {first for _, first, _ in self.options}  # under a name of their own
        columns = [(*column, False) for column in REQUIRED + self.options]
        columns += [(*column, True) for column in OPTIONAL if column[1] not in own]
        return [(*column, column[0] in switches) for column in columns]


@dataclass
class Row:
    """One tensor of a table. `shard` is the param, or of a DTensor what lies here; `target` is what the kernel updates:
    the shard, or a dense copy of one that has holes or is a conjugate view. `ema`: the average of its weights, in all
    rows of an optimizer or in none; older than the table where it has `ema_begun`, else the first update copies the
    param into it."""

    param: Tensor
    shard: Tensor
    target: Tensor
    states: list[Tensor]
    step: Tensor
    state: dict[str, Tensor]
    grad_dtype: torch.dtype
    group: int
    ema: Tensor | None = None
    ema_begun: bool = False

    @property
    def tensors(self) -> list[Tensor]:
        """All that the kernel writes."""
        return [self.target, *self.states, *([] if self.ema is None else [self.ema])]

    @property
    def dtypes(self) -> list[torch.dtype]:
        """Of param and grad, and what else there is."""
        param, *others = (tensor.dtype for tensor in self.tensors)
        return [param, self.grad_dtype, *others]

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


def signature_of(dtypes: Sequence[torch.dtype]) -> tuple[int, ...]:
    """Dtype codes of param, grad and states, and last of the average where there is one: a kind."""
    return tuple(DTYPE_CODES[real_dtype(dtype)] for dtype in dtypes)


def pack(signature: Sequence[int], ema: bool) -> int:
    """A kind as the rows have it."""
    places = [*range(len(signature) - 1), EMA_STREAM] if ema else range(len(signature))
    codes = dict(zip(places, signature, strict=True))
    return sum(codes.get(place, ABSENT) << 4 * place for place in range(EMA_STREAM + 1))


class Scalars:
    """The hyperparameters of all groups, on the host: one buffer, so that one copy brings them to a device.

    raw: float64 [groups, RAW_WIDTH]. lr: int64 [groups], the address of a device lr tensor (lowest bit set: float64,
        else float32), or 0.
    """

    def __init__(self, groups: int, clip_eps: float, max_norm: float) -> None:
        self.buffer = torch.zeros(groups * (RAW_WIDTH + 1), dtype=torch.int64)
        self.raw, self.lr = self.split(self.buffer)
        # What holds where a group has no key for it.
        self.raw[:, [LR_REFERENCE, DECAY_PERIOD]] = 1.0
        self.raw[:, CLIP_EPS] = clip_eps
        self.raw[:, MAX_NORM] = max_norm
        self.raw[:, TRUST_CLIP + 1] = math.inf

    @staticmethod
    def split(buffer: Tensor) -> tuple[Tensor, Tensor]:
        groups = buffer.numel() // (RAW_WIDTH + 1)
        raw = buffer[: groups * RAW_WIDTH].view(torch.float64).view(groups, RAW_WIDTH)
        return raw, buffer[groups * RAW_WIDTH :]


def count_shares(count: int) -> int:
    """How many sums lie between so many numbers and the sum of them all, where a block adds up SHARE at most. There are
    never more of them than numbers."""
    total = 0
    while count > SHARE:
        count = -(-count // SHARE)
        total += count
    return total


class Table:
    """The host arrays of one device's rows.

    desc: int64 [chunks], chunk << 32 | row << 8 | kind << 1 | slow. rows: int64 [rows, ROW_WIDTH]. grads: int64
        [rows], 0 without a gradient.
    clips: whether the norm of all gradients is taken. groups: process groups over whose members every tensor is spread.
    group: int32 [rows]. hyper: float64 [rows, HYPER_WIDTH] on the device, written by prep. kinds: signatures, by kind
        number.
    Where something is summed over whole tensors, else None: spans int64 [rows + 1], row r has the chunks spans[r] up to
        spans[r + 1]; on the device, float64: partials [chunks, 2], sums [rows, 2], trust [rows]. Where it is the norm
        of all gradients alone: partials [chunks + shares], see `count_shares`. For that norm: squares [1].
    """

    def __init__(
        self,
        rule: Rule,
        device: torch.device,
        rows: list[Row],
        scalars: Scalars,
        clips: bool,
        groups: tuple[Any, ...] = (),
    ) -> None:
        self.rule = rule
        self.device = device
        self.rows_list = rows
        self.clips = clips
        self.groups = groups
        self.scalars = scalars
        self.copies = [row for row in rows if row.target is not row.shard]
        self.ema = any(row.ema is not None for row in rows)

        kinds: dict[tuple[int, ...], int] = {}
        signatures = [signature_of(row.dtypes) for row in rows]
        kind = torch.tensor([kinds.setdefault(signature, len(kinds)) for signature in signatures])
        slow = torch.tensor([any(t.data_ptr() % ALIGNMENT for t in row.tensors) for row in rows]).long()
        numel = torch.tensor([row.target.numel() * (2 if row.target.is_complex() else 1) for row in rows])
        self.kinds = tuple(kinds)
        if len(kinds) > MAX_KINDS:
            raise RuntimeError(
                f"the tensors of one device may have at most {MAX_KINDS} combinations of param, gradient and state "
                f"dtypes, but have {len(kinds)}; use several optimizers"
            )
        self.elements = int(numel.sum())

        chunks = (numel + CHUNK - 1) // CHUNK
        row = torch.repeat_interleave(torch.arange(len(rows)), chunks)
        chunk = torch.arange(row.numel()) - (chunks.cumsum(0) - chunks)[row]
        self.desc = chunk << 32 | row << 8 | kind[row] << 1 | slow[row]
        self.rows = torch.tensor(
            [self._columns(r, n, s) for r, n, s in zip(rows, numel.tolist(), signatures, strict=True)]
        )
        self.group = torch.tensor([row.group for row in rows], dtype=torch.int32)
        self.grads = torch.zeros(len(rows), dtype=torch.int64)
        # Zeros: prep writes one column of a skipped tensor's row, and the walkers load the whole row.
        self.hyper = torch.zeros(len(rows), HYPER_WIDTH, dtype=torch.float64, device=device)

        self.spans: Tensor | None = None
        self.partials: Tensor | None = None
        self.squares: Tensor | None = None
        self.sums: Tensor | None = None
        self.trust: Tensor | None = None
        if rule.trust or clips:
            count = self.desc.numel()
            shape = (count, 2) if rule.trust else (count + count_shares(count),)
            self.partials = torch.zeros(shape, dtype=torch.float64, device=device)
        if clips:
            self.squares = torch.zeros(1, dtype=torch.float64, device=device)
        if rule.trust:
            self.spans = torch.cat([torch.zeros(1, dtype=torch.int64), chunks.cumsum(0)])
            self.sums = torch.zeros(len(rows), 2, dtype=torch.float64, device=device)
            self.trust = torch.ones(len(rows), dtype=torch.float64, device=device)

    @property
    def is_meta(self) -> bool:
        """Whether its tensors have no memory, so that there is nothing to compute."""
        return self.device.type == "meta"

    @property
    def is_wide(self) -> bool:
        """Whether the arithmetic of all rows is float64."""
        return all(kind[0] == DTYPE_CODES[torch.float64] for kind in self.kinds)

    @property
    def arrays(self) -> tuple[Tensor | None, ...]:
        """In the order in which every backend takes them."""
        first = self.desc, self.rows, self.grads, self.scalars.lr, self.scalars.raw, self.group, self.hyper
        return *first, self.spans, self.partials, self.sums, self.trust

    @staticmethod
    def _columns(row: Row, numel: int, signature: tuple[int, ...]) -> list[int]:
        states = [state.data_ptr() for state in row.states]
        return [
            numel,
            row.target.data_ptr(),
            row.step.data_ptr(),
            pack(signature, row.ema is not None) | EMA_BEGUN * row.ema_begun,
            *states,
            *[0] * (MAX_STATES - len(states)),
            0 if row.ema is None else row.ema.data_ptr(),
        ]
