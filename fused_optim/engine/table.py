"""The table describes one step on one device, as plain arrays that a walker reads. layout.py defines their columns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
NARROW = (torch.float32, torch.bfloat16, torch.float16)  # dtypes of params whose arithmetic is float32
REAL_DTYPES = {torch.complex64: torch.float32, torch.complex128: torch.float64}

# A group's option, the first column of GroupHparams that it fills, and the number of columns: a tuple fills several.
Option = tuple[str, str, int]

# The options of every optimizer. A group may lack OPTIONAL ones or have None.
REQUIRED: tuple[Option, ...] = (("lr", "lr", 1), ("weight_decay", "weight_decay", 1))
OPTIONAL: tuple[Option, ...] = (
    ("maximize", "maximize", 1),
    ("decoupled_weight_decay", "decoupled", 1),
    ("lr_reference", "lr_reference", 1),
    ("decay_period", "decay_period", 1),
    ("cautious_decay", "cautious_decay", 1),
    ("max_grad_norm", "max_norm", 1),
    ("trust_clip", "trust_low", 2),
)


LR_MAX = "lr_max"  # running scalar of params with corrected decay: their largest lr so far


@dataclass(frozen=True)
class Rule:
    """A rule without its arithmetic. Each backend looks up the arithmetic by `name`.

    states: names in `optimizer.state[param]`, in the order of the rule's arguments.
    options: the options of its groups besides REQUIRED and OPTIONAL. An option of the same name replaces theirs.
    optional: more of them, which may be None.
    switched: states that exist only if a group's option is true, as {state: option}. They come last in `states`.
    squares: states that are sums or averages of squares. They are never negative.
    copies: states that start as copies of the param, and are stored as weights are.
    starts: the option that holds the start value of a state, as {state: option}. Other states start from 0. The maximum
        of an average starts from the average.
    running: float32 numbers of one tensor that carry over from step to step, as {name: start value}. Prepare updates
        them. They are states of shape [], beside `step`.
    eager: whether states are made with the param group. Otherwise they are made when the param has its first gradient.
    counted: whether `step` is one of the states. If not, the optimizer keeps the count itself, because the first update
        of a param may differ.
    trust: whether each tensor's update is scaled by a ratio of norms, which takes a second walk.
    orthogonal: whether updates are matrices that are orthogonalized between two walks. The rule's last state is then a
        workspace, which is not in `optimizer.state`.
    chosen_by, otherwise: groups in which the option `chosen_by` is false are stepped by the rule `otherwise`. The
        options of this rule are those of all groups.
    decides: options without a column from which tables are built.
    clip_eps: added to the norm in the clipping coefficient.
    first_decay: the first step of a param that has decoupled decay.
    bounded: whether the root of exp_avg_sq bounds exp_avg, which anchored8 needs.
    """

    name: str
    states: tuple[str, ...]
    options: tuple[Option, ...]
    switched: Mapping[str, str] = field(default_factory=dict)
    squares: tuple[str, ...] = ()
    copies: tuple[str, ...] = ()
    starts: Mapping[str, str] = field(default_factory=dict)
    running: Mapping[str, float] = field(default_factory=dict)
    eager: bool = False
    counted: bool = True
    trust: bool = False
    orthogonal: bool = False
    chosen_by: str | None = None
    otherwise: Rule | None = None
    decides: tuple[str, ...] = ()
    clip_eps: float = 1e-6
    first_decay: int = 1
    bounded: bool = True
    optional: tuple[Option, ...] = ()

    def of(self, group: Mapping[str, Any]) -> Rule:
        """The rule that steps the params of a group."""
        return self if self.otherwise is None or group[str(self.chosen_by)] else self.otherwise

    @property
    def all_states(self) -> tuple[str, ...]:
        """The states of all groups."""
        return self.states if self.otherwise is None else self.states + self.otherwise.states

    def states_of(self, group: Mapping[str, object]) -> list[str]:
        return [name for name in self.states if name not in self.switched or group[self.switched[name]]]

    def starts_of(self, group: Mapping[str, Any]) -> dict[str, float]:
        return {state: float(group[option]) for state, option in self.starts.items()}

    def running_of(self, group: Mapping[str, Any]) -> dict[str, float]:
        """The running scalars of a group's params, with their start values."""
        return {**self.running, **({LR_MAX: 0.0} if group.get("corrected_decay") else {})}

    @property
    def deciding(self) -> list[str]:
        """The options that have no column and decide which states exist."""
        with_column = {key for key, *_ in self.columns}
        options = (*self.switched.values(), *self.decides, "corrected_decay")
        return [key for key in options if key not in with_column]

    @property
    def columns(self) -> list[tuple[str, int, int, bool, bool]]:
        """Of each option: its name, its first column, its number of columns, whether it is optional, and whether tables
        are rebuilt when its value changes from or to 0."""
        switches = {*self.switched.values(), "max_grad_norm", "cautious_decay"}
        own = {name for key, first, _ in self.options + self.optional for name in (key, first)}
        required = tuple(option for option in REQUIRED if option[0] not in own)
        options = [(*option, False) for option in required + self.options]
        options += [(*option, True) for option in self.optional]
        options += [(*option, True) for option in OPTIONAL if option[1] not in own]
        return [
            (key, column(GroupHparams, first), count, optional, key in switches)
            for key, first, count, optional in options
        ]


@dataclass
class Row:
    """One tensor of a table.

    shard: the param; of a DTensor the shard on this process.
    target: the tensor that the kernel updates: the shard, or a dense copy of it if it has holes or is a conjugate view.
    states: the rule's states; of an orthogonal rule also the workspace, last.
    ema: the average of the weights. All rows of an optimizer have one, or none.
    ema_begun: whether the average is older than the table. If not, the first update copies the param into it.
    low: the lower halves of the master weights.
    first_element: index of the shard's first element in the whole param.
    anchor: the exponent of an exp_avg in anchored8, see engine/formats.py.
    workspace: the last state, if the rule is orthogonal.
    dithered: which bfloat16 tensors are rounded with dithering: "param", "states", "ema".
    running: the running scalars, in the order of their columns.
    """

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
    workspace: Tensor | None = None
    dithered: frozenset[str] = frozenset()
    running: list[Tensor] = field(default_factory=list)

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors that the kernel writes."""
        return [self.target, *self.states, *(x for x in (self.ema, self.low) if x is not None)]

    @property
    def formats(self) -> tuple[int, ...]:
        """The formats of param, gradient and states, and last of the average if there is one."""
        param = format_of(self.target.dtype, "param" in self.dithered)
        if self.low is not None:
            param = LOW_FORMATS[self.low.dtype]
        dithered = "states" in self.dithered
        states = [format_of(state.dtype, dithered and state is not self.workspace) for state in self.states]
        average = [] if self.ema is None else [format_of(self.ema.dtype, "ema" in self.dithered)]
        return tuple(map(int, (param, format_of(self.grad_dtype), *states, *average)))

    @property
    def grad(self) -> Tensor | None:
        """The shard of the gradient that belongs to the param's shard."""
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
    """The format of a tensor without a second array."""
    if dithered and dtype == torch.bfloat16:
        return Format.BFLOAT16_DITHERED
    return PACKED_DTYPES.get(dtype) or DTYPE_CODES[real_dtype(dtype)]


class HostHparams:
    """The hyperparameters of all groups on the host, in one buffer: one copy brings them to a device.

    defaults: the columns of options that a group lacks, where they are not those of GroupHparams.
    group_hparams: float64 [groups, GroupHparams]. lr: int64 [groups], the address of a device lr tensor (lowest bit
        set: float64, else float32), or 0.
    """

    def __init__(self, groups: int, **defaults: float) -> None:
        width = len(GroupHparams._fields)
        self.buffer = torch.zeros(groups * (width + 1), dtype=torch.int64)
        self.group_hparams, self.lr = self.split(self.buffer)
        self.group_hparams[:] = torch.tensor(GroupHparams(**defaults), dtype=torch.float64)

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
    """The number of intermediate sums of a sum over `count` numbers, if a block adds up to SHARE numbers. At most
    `count`."""
    total = 0
    while count > SHARE:
        count = -(-count // SHARE)
        total += count
    return total


class Table:
    """The arrays of one device's rows (see TableArrays). They are on the host, except `tensor_scalars` and the sums,
    which are on the device.

    clips: whether the norm of all gradients is computed. process_groups: every tensor is spread over their members.
    cautious: whether a group has cautious decay.
    dtype_signatures: by their numbers in chunk_table.
    orthogonalize: what an orthogonal rule does between its walks.
    row_offsets, sums, trust: None unless the rule has a trust ratio. partials: None unless the rule has one or the norm
        of all gradients is computed. squares: [1], for that norm.
    """

    def __init__(
        self,
        rule: Rule,
        device: torch.device,
        rows: list[Row],
        hparams: HostHparams,
        clips: bool,
        process_groups: tuple[Any, ...] = (),
        orthogonalize: Callable[[Table], None] | None = None,
        cautious: bool = False,
    ) -> None:
        self.rule = rule
        self.device = device
        self.rows_list = rows
        self.clips = clips
        self.process_groups = process_groups
        self.orthogonalize = orthogonalize
        self.cautious = cautious
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
        # Zeros, because prep writes only one column for a skipped tensor, and walkers load the whole row.
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
        """Whether the tensors have no memory. Then there is nothing to compute."""
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
            **{f"running{number}": scalar.data_ptr() for number, scalar in enumerate(row.running)},
        )
