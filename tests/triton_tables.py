"""Tables built by hand for the Triton kernels, and what the oracle says of a step of them."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import ptx.backends
import torch
from cases import CASES, Case
from fused_optim.triton_kernels.launch import RULES, launch, launch_apply_update, launch_scale, launch_squares
from ptx.launched import LAUNCHES
from torch import Tensor

from fused_optim.engine.layout import (
    ALIGNMENT,
    CHUNK,
    EMPTY,
    GroupHparams,
    RowFields,
    TableArrays,
    TensorScalars,
    chunk_entry,
    packed_signature,
)
from fused_optim.engine.table import DTYPE_CODES

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CHOSEN = os.environ.get("FUSED_OPTIM_TEST_BACKENDS", "").split(",")
COMPILED = "triton-ptx" in CHOSEN and ptx.backends.why_not("gcc")(None) is None
DEVICE = "cpu" if INTERPRETED or COMPILED else "cuda"
if COMPILED:
    ptx.backends.use_stand_in_driver()
RUNS = INTERPRETED or COMPILED or torch.cuda.is_available()  # whether anything here can run a kernel
F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
KINDS = {
    "f32": (F32, F32, F32, F32),
    "f32 amsgrad": (F32,) * 5,
    "bf16, f32 states": (BF16, BF16, F32, F32),
    "bf16": (BF16,) * 4,
    "bf16 amsgrad": (BF16,) * 5,
    "f16": (F16,) * 4,
    "f16, f32 states amsgrad": (F16, F16, F32, F32, F32),
    "f32, bf16 grad": (F32, BF16, F32, F32),
    "f64": (F64,) * 4,
    "f64 amsgrad": (F64,) * 5,
}
GUARD = 64  # elements before and after every tensor, which nobody may touch
STATES = {case.ours.rule.name: case.ours.rule.states for case in CASES} | {"muon": ("momentum_buffer", "workspace")}
ORACLES = {case.ours.rule.name: case.rule for case in CASES}
COPIES = {case.ours.rule.name: case.ours.rule.copies for case in CASES}
RUNNING = {case.ours.rule.name: case.ours.rule.running for case in CASES}


@dataclass
class Group:
    """A row of `group_hparams`. The rule's own options are NaN for a rule that has none: reading one would show."""

    lr: float = 1e-2
    beta1: float = 0.9
    beta2: float = 0.999
    beta3: float = 0.9995
    eps: float = 1e-8
    weight_decay: float = 0.0
    decoupled: bool = False
    maximize: bool = False
    option_a: float = math.nan
    option_b: float = math.nan
    option_c: float = math.nan
    option_d: float = math.nan
    lr_reference: float = 1.0
    decay_period: float = 1.0
    max_norm: float = 0.0
    clip_eps: float = 1e-6
    trust_low: float = 0.0
    trust_high: float = math.inf
    trust_always: bool = False
    ema_decay: float = 0.75
    first_decay: float = 1.0
    no_prox: float = 1.0
    lr_tensor: Tensor | None = None
    given: dict[str, Any] = field(default_factory=dict)  # the options of a param group that it was made from

    @classmethod
    def of(cls, case: Case) -> "Group":
        numbers: dict[str, float] = {}
        for key, first, count, _, _ in case.ours.rule.columns:
            value = case.group.get(key)
            for place, number in enumerate([] if value is None else value if count > 1 else [value]):
                numbers[GroupHparams._fields[first + place]] = float(number)
        given = {key: value for key, value in case.group.items() if key not in ("params", "max_grad_norm")}
        rule = case.ours.rule
        return cls(**numbers, clip_eps=rule.clip_eps, first_decay=rule.first_decay, given=given)

    def __str__(self) -> str:
        default = vars(Group())
        return " ".join(f"{key}={value}" for key, value in vars(self).items() if str(value) != str(default[key]))

    def hparams(self) -> GroupHparams:
        return GroupHparams(**{key: float(value) for key, value in vars(self).items() if key in GroupHparams._fields})

    def options(self) -> dict[str, Any]:
        """What the rules of the oracle call them."""
        return {
            "lr": self.lr if self.lr_tensor is None else self.lr_tensor.item(),
            "betas": (self.beta1, self.beta2),
            "momentum": self.beta1,
            "dampening": self.option_a,
            "nesterov": self.option_b == 1.0,
            "nus": (self.option_a, self.option_b),
            "grad_averaging": self.option_a == 1.0,
            "bias_correction": self.option_b == 1.0,
            "use_nvlamb": self.trust_always,
            "trust_clip": (self.trust_low, self.trust_high),
            "max_grad_norm": None,  # clipped before
            "grad_norm": math.nan,
            "decoupled_weight_decay": self.decoupled,
            "decouple_weight_decay": self.decoupled,
            "adam_w_mode": self.decoupled,
            **{key: value for key, value in vars(self).items() if key in COMMON},
            **self.given,
        }


COMMON = ("eps", "weight_decay", "maximize", "lr_reference", "decay_period")


class Row:
    """One tensor with its gradient, states and perhaps (`ema`) average, each a view into a longer buffer, `offsets`
    elements off alignment. signed: how many of the states, from the first on, may be negative."""

    def __init__(
        self,
        size: int,
        dtypes: Sequence[torch.dtype],
        seed: int = 0,
        offsets: Sequence[int] = (),
        group: int = 0,
        ema: bool = False,
        begun: bool = False,
        signed: int = 1,
    ) -> None:
        self.ema, self.begun = ema, begun
        generator = torch.Generator().manual_seed(1000 * seed + size)
        self.group_index = group
        self.buffers: list[Tensor] = []
        self.views: list[Tensor] = []
        for i, dtype in enumerate(dtypes):
            values = torch.randn(size, dtype=torch.float64, generator=generator)
            values = values if i < 2 else 0.1 * values if i < 2 + signed else values.square()
            start = GUARD + (offsets[i] if i < len(offsets) else 0)
            self.buffers.append(torch.full((start + size + GUARD,), 3.0, dtype=dtype, device=DEVICE))
            self.views.append(self.buffers[-1][start : start + size].copy_(values))
        self.step = torch.zeros((), dtype=torch.float32, device=DEVICE)
        self.running: list[Tensor] = []
        self.grad_address = self.views[1].data_ptr() or EMPTY  # an empty tensor has no address, but has a gradient

    @property
    def dtypes(self) -> tuple[int, ...]:
        return tuple(DTYPE_CODES[view.dtype] for view in self.views)

    def bytes_outside(self) -> list[Tensor]:
        outside = []
        for buffer, view in zip(self.buffers, self.views, strict=True):
            start = view.storage_offset()
            outside += [part.clone().view(torch.uint8) for part in (buffer[:start], buffer[start + view.numel() :])]
        return outside


def rows_of(states: int, sizes: Sequence[int], group: int = 0, signed: int = 1) -> list[Row]:
    """Those sizes in float32, a few of other kinds, and one that has been stepped before."""
    rows = [Row(size, (F32,) * (2 + states), group=group, signed=signed) for size in sizes]
    rows += [
        Row(600 + i, (*dtypes, *[state] * states), seed=i, group=group, signed=signed)
        for i, (*dtypes, state) in enumerate([(BF16, BF16, BF16), (BF16, BF16, F32), (F64, F64, F64)])
    ]
    rows[-1].step += 3
    return rows


@dataclass
class Table:
    rows: list[Row]
    groups: list[Group] = field(default_factory=lambda: [Group()])
    rule: str = "adam"
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None
    chunks_before: int = 0  # of every tensor, at addresses before its buffer, which no program is launched for

    def __post_init__(self) -> None:
        count = len(self.rows)
        for row in self.rows:
            row.running = [torch.tensor(start, device=DEVICE) for start in RUNNING[self.rule].values()]
        width = len(TensorScalars._fields)
        self.tensor_scalars = torch.full((count, width), math.nan, dtype=torch.float64, device=DEVICE)
        self.clips = any(group.max_norm for group in self.groups)
        self.squares = torch.full((1,), math.nan, dtype=torch.float64, device=DEVICE)
        self.sums = torch.full((count, 2), math.nan, dtype=torch.float64, device=DEVICE)
        self.trust = torch.ones(count, dtype=torch.float64, device=DEVICE)

    @property
    def ema(self) -> bool:
        return self.rows[0].ema

    @cached_property
    def signatures(self) -> tuple[tuple[int, ...], ...]:
        return tuple(dict.fromkeys(row.dtypes for row in self.rows))

    def arrays(self) -> TableArrays:
        entries, fields, offsets = [], [], [0]
        for number, row in enumerate(self.rows):
            written = [row.views[0], *row.views[2:]]
            unaligned = any(view.data_ptr() % ALIGNMENT for view in written)
            numel = row.views[0].numel() + self.chunks_before * CHUNK
            signature = self.signatures.index(row.dtypes)
            chunks = range(self.chunks_before, -(-numel // CHUNK))
            entries += [chunk_entry(chunk, number, signature, unaligned) for chunk in chunks]
            offsets.append(len(entries))
            param, *states = (self.start(view) for view in written)
            average = states.pop() if row.ema else 0
            made = RowFields(
                numel=numel,
                param=param,
                param_low=0,
                step=row.step.data_ptr(),
                dtype_signature=packed_signature(row.dtypes, row.ema, row.begun),
                ema=average,
                **{f"state{place}": state for place, state in enumerate(states)},
                **{f"running{place}": scalar.data_ptr() for place, scalar in enumerate(row.running)},
            )
            fields.append(made)
        trusts = RULES[self.rule].direction is not None
        partials = torch.full((len(entries), 2), math.nan, dtype=torch.float64, device=DEVICE)
        sums = trusts or self.clips
        return TableArrays(
            chunk_table=integers(entries),
            rows=integers(fields),
            grads=integers([row.grad_address and self.start(row.views[1], row.grad_address) for row in self.rows]),
            lr=integers([lr_address(group) for group in self.groups]),
            group_hparams=torch.tensor([group.hparams() for group in self.groups], dtype=torch.float64, device=DEVICE),
            group_index=torch.tensor([row.group_index for row in self.rows], dtype=torch.int32, device=DEVICE),
            tensor_scalars=self.tensor_scalars,
            row_offsets=integers(offsets) if sums else None,
            partials=partials if sums else None,
            sums=self.sums if trusts else None,
            trust=self.trust if trusts else None,
        )

    def launch(self) -> None:
        arrays = self.arrays()
        with LAUNCHES.raising():
            if self.clips:
                launch_squares(self.signatures, arrays, self.squares)
            squares = self.squares if self.clips else None
            launch(self.rule, self.signatures, arrays, self.grad_scale, self.found_inf, squares, self.ema)
            launch_apply_update(self.rule, self.signatures, arrays, self.ema)

    def scale_gradients(self) -> None:
        arrays = self.arrays()
        with LAUNCHES.raising():
            launch_squares(self.signatures, arrays, self.squares)
            launch_scale(self.signatures, arrays, self.squares)

    def start(self, view: Tensor, address: int | None = None) -> int:
        return (view.data_ptr() if address is None else address) - self.chunks_before * CHUNK * view.itemsize

    def check_step(self, skipped: Sequence[int] = ()) -> None:
        """One launch, and every value of every tensor against float64."""
        outside = [row.bytes_outside() for row in self.rows]
        before = [[view.clone() for view in (*row.views, *row.running)] for row in self.rows]
        steps = [row.step.item() for row in self.rows]
        norm = self.norm()
        self.launch()
        for number, row in enumerate(self.rows):
            for kept, now in zip(outside[number], row.bytes_outside(), strict=True):
                assert torch.equal(kept, now)
            expected = before[number]
            if number not in skipped:
                expected = self.expected(row, expected, steps[number], self.groups[row.group_index], norm)
            assert row.step.item() == steps[number] + (number not in skipped)
            for view, wanted, old in zip((*row.views, *row.running), expected, before[number], strict=True):
                # A state that starts as a copy of the param moves by steps, which can cancel it.
                size = float(old.double().abs().max()) if COPIES[self.rule] and view.numel() else 0.0
                assert_rounded(view, wanted, size)

    def norm(self) -> float:
        """Of all gradients together that are clipped, before they are divided by grad_scale."""
        clipped = [row for row in self.rows if row.grad_address and self.groups[row.group_index].max_norm]
        return math.sqrt(sum(row.views[1].double().square().sum().item() for row in clipped))

    def expected(self, row: Row, tensors: Sequence[Tensor], step: float, group: Group, norm: float) -> list[Tensor]:
        """What param, gradient, states and average become in a step after `step` others."""
        running = dict(zip(RUNNING[self.rule], tensors[len(row.views) :], strict=True))
        param, grad, *states = (tensor.double() for tensor in tensors[: len(row.views)])
        averages = [states.pop()] if row.ema else []
        scale = 1.0 if self.grad_scale is None else self.grad_scale.item()
        scaled = grad / scale
        if group.max_norm:
            bound = norm / scale + group.clip_eps
            scaled = scaled * min(1.0, group.max_norm / bound if bound else math.inf)
        names = STATES[self.rule][: len(states)]
        state = dict(zip(names, states, strict=True)) if step or self.rule != "sgd" else {}
        options = group.options() | {"amsgrad": len(states) == 3, "stored": tensors[len(states) + 1].dtype}
        if self.rule == "sgd" and not states:
            options["momentum"] = 0.0
        state["step"] = torch.tensor(step, dtype=torch.float64)
        state |= {name: scalar.double() for name, scalar in running.items()}
        param, state = ORACLES[self.rule](param, scaled, state, **options)
        weight = 1.0 if step == 0 and not row.begun else 1.0 - group.ema_decay
        stored = row.views[0].double()  # the average is one of the params as they are stored, which are compared before
        followed = [old.lerp(stored, weight) for old in averages]
        return [param, grad, *(state[name] for name in names), *followed, *(state[name] for name in running)]


def integers(values: list) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device=DEVICE)


def lr_address(group: Group) -> int:
    return 0 if group.lr_tensor is None else group.lr_tensor.data_ptr() | (group.lr_tensor.dtype == torch.float64)


def assert_rounded(view: Tensor, wanted: Tensor, size: float = 0.0) -> None:
    """`view` is `wanted` up to the rounding of the arithmetic; 16-bit values are the nearest ones but for near ties.
    size: of numbers that cancelled."""
    if view.dtype in (BF16, F16):
        rounded = wanted.to(view.dtype)
        assert (view == rounded).double().mean().nan_to_num(1.0) >= 0.99 or view.numel() < 100
        tolerance = torch.finfo(view.dtype).eps
        torch.testing.assert_close(view.double(), rounded.double(), rtol=tolerance, atol=1e-7, equal_nan=True)
    else:
        eps = torch.finfo(view.dtype).eps
        # In float64 `wanted` itself is rounded. In float32, Triton 3.6's interpreter does not fuse its fma.
        atol = (4 * eps if view.dtype == F64 else eps / 4) + 2 * eps * size
        torch.testing.assert_close(view.double(), wanted.double(), rtol=8 * eps, atol=atol, equal_nan=True)
