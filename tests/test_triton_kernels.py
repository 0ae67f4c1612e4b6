"""Numbers of the Triton kernels, on tables built by hand from csrc/tables.h, against the same step in float64.

They run in Triton's interpreter (`TRITON_INTERPRET=1 pytest tests/test_triton_kernels.py`) or on a GPU if there is one.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
import torch
from fused_optim.triton_kernels.launch import launch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# Elsewhere there is nothing that could run a kernel: collect nothing.
__test__ = INTERPRETED or torch.cuda.is_available()

DEVICE = "cpu" if INTERPRETED else "cuda"
CHUNK = 4096
SIZES = (0, 1, 31, 4095, 4096, 4097, 9000)
CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
F32, BF16, F16, F64 = CODES
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


@dataclass
class Group:
    lr: float = 1e-2
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    decoupled: bool = False
    maximize: bool = False
    lr_tensor: Tensor | None = None

    def raw(self) -> list[float]:
        values = [self.lr, self.beta1, self.beta2, self.eps, self.weight_decay, self.decoupled, self.maximize]
        return [*map(float, values), *[math.nan] * 5]  # Adam has no numbers of its own: reading one would show.


class Row:
    """One tensor with its gradient and states, each a view into a longer buffer, `offsets` elements off alignment."""

    def __init__(
        self, size: int, dtypes: Sequence[torch.dtype], seed: int = 0, offsets: Sequence[int] = (), group: int = 0
    ) -> None:
        generator = torch.Generator().manual_seed(1000 * seed + size)
        self.group = group
        self.buffers: list[Tensor] = []
        self.views: list[Tensor] = []
        for i, dtype in enumerate(dtypes):
            start = GUARD + (offsets[i] if i < len(offsets) else 0)
            values = torch.randn(start + size + GUARD, dtype=torch.float64, generator=generator)
            values = values if i < 2 else 0.1 * values if i == 2 else values.square()
            self.buffers.append(values.to(dtype).to(DEVICE))
            self.views.append(self.buffers[-1][start : start + size])
        self.step = torch.zeros((), dtype=torch.float32, device=DEVICE)
        self.grad_address = self.views[1].data_ptr() or 1 << 20  # an empty tensor has no address, but has a gradient

    @property
    def dtypes(self) -> tuple[int, ...]:
        return tuple(CODES[view.dtype] for view in self.views)

    def bytes_outside(self) -> list[Tensor]:
        outside = []
        for buffer, view in zip(self.buffers, self.views, strict=True):
            start = view.storage_offset()
            outside += [part.clone().view(torch.uint8) for part in (buffer[:start], buffer[start + view.numel() :])]
        return outside


@dataclass
class Table:
    rows: list[Row]
    groups: list[Group] = field(default_factory=lambda: [Group()])
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None
    chunks_before: int = 0  # of every tensor, at addresses before its buffer, which no program is launched for

    def __post_init__(self) -> None:
        self.hyper = torch.full((len(self.rows), 16), math.nan, dtype=torch.float64, device=DEVICE)

    def launch(self) -> None:
        kinds = tuple(dict.fromkeys(row.dtypes for row in self.rows))
        desc, table = [], []
        for number, row in enumerate(self.rows):
            written = [row.views[0], *row.views[2:]]
            slow = any(view.data_ptr() % 16 for view in written)
            numel = row.views[0].numel() + self.chunks_before * CHUNK
            desc += [
                chunk << 32 | number << 8 | kinds.index(row.dtypes) << 1 | slow
                for chunk in range(self.chunks_before, -(-numel // CHUNK))
            ]
            signature = sum(code << 4 * i for i, code in enumerate((*row.dtypes, 15)))
            param, *states = (self.start(view) for view in written)
            table.append([numel, param, row.step.data_ptr(), signature, *states, *[0] * (4 - len(states))])
        launch(
            "adam",
            kinds,
            integers(desc),
            integers(table),
            integers([row.grad_address and self.start(row.views[1], row.grad_address) for row in self.rows]),
            integers([lr_address(group) for group in self.groups]),
            torch.tensor([group.raw() for group in self.groups], dtype=torch.float64, device=DEVICE),
            torch.tensor([row.group for row in self.rows], dtype=torch.int32, device=DEVICE),
            self.hyper,
            self.grad_scale,
            self.found_inf,
        )

    def start(self, view: Tensor, address: int | None = None) -> int:
        return (view.data_ptr() if address is None else address) - self.chunks_before * CHUNK * view.itemsize

    def check_step(self, skipped: Sequence[int] = ()) -> None:
        """One launch, and every value of every tensor against float64."""
        outside = [row.bytes_outside() for row in self.rows]
        before = [[view.clone() for view in row.views] for row in self.rows]
        steps = [row.step.item() for row in self.rows]
        self.launch()
        for number, row in enumerate(self.rows):
            for kept, now in zip(outside[number], row.bytes_outside(), strict=True):
                assert torch.equal(kept, now)
            expected = before[number]
            if number not in skipped:
                scale = 1.0 if self.grad_scale is None else self.grad_scale.item()
                expected = adam(expected, steps[number] + 1, self.groups[row.group], scale)
            assert row.step.item() == steps[number] + (number not in skipped)
            for view, wanted in zip(row.views, expected, strict=True):
                assert_rounded(view, wanted)


def integers(values: list) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device=DEVICE)


def lr_address(group: Group) -> int:
    return 0 if group.lr_tensor is None else group.lr_tensor.data_ptr() | (group.lr_tensor.dtype == torch.float64)


def adam(tensors: Sequence[Tensor], step: float, group: Group, grad_scale: float) -> list[Tensor]:
    """The textbook's step in float64: what param, gradient and states become."""
    param, grad, exp_avg, exp_avg_sq, *maximum = (tensor.double() for tensor in tensors)
    lr = group.lr if group.lr_tensor is None else group.lr_tensor.item()
    g = grad / grad_scale * (-1.0 if group.maximize else 1.0)
    if not group.decoupled:
        g = g + group.weight_decay * param
    exp_avg = group.beta1 * exp_avg + (1 - group.beta1) * g
    exp_avg_sq = group.beta2 * exp_avg_sq + (1 - group.beta2) * g * g
    if maximum:
        maximum = [torch.maximum(maximum[0], exp_avg_sq)]
    second = (maximum[0] if maximum else exp_avg_sq) / (1 - group.beta2**step)
    if group.decoupled:
        param = param - lr * group.weight_decay * param
    param = param - lr / (1 - group.beta1**step) * exp_avg / (second.sqrt() + group.eps)
    return [param, grad, exp_avg, exp_avg_sq, *maximum]


def assert_rounded(view: Tensor, wanted: Tensor) -> None:
    """`view` is `wanted` up to the rounding of the arithmetic; 16-bit values are the nearest ones but for near ties."""
    if view.dtype in (BF16, F16):
        rounded = wanted.to(view.dtype)
        assert (view == rounded).double().mean().nan_to_num(1.0) >= 0.99 or view.numel() < 100
        tolerance = torch.finfo(view.dtype).eps
        torch.testing.assert_close(view.double(), rounded.double(), rtol=tolerance, atol=1e-7, equal_nan=True)
    else:
        eps = torch.finfo(view.dtype).eps
        # In float64 `wanted` itself is rounded. In float32, Triton 3.6's interpreter does not fuse its fma.
        atol = 4 * eps if view.dtype == F64 else eps / 4
        torch.testing.assert_close(view.double(), wanted.double(), rtol=8 * eps, atol=atol, equal_nan=True)


@pytest.mark.parametrize("kind", KINDS)
def test_sizes(kind: str) -> None:
    Table([Row(size, KINDS[kind]) for size in SIZES]).check_step()


def test_kinds_share_one_launch() -> None:
    Table([Row(700 + 900 * i, dtypes, seed=i) for i, dtypes in enumerate(KINDS.values())]).check_step()


@pytest.mark.parametrize("stream", range(5))
def test_misaligned_views(stream: int) -> None:
    offsets = [int(i == stream) for i in range(5)]
    kinds = KINDS["f32 amsgrad"], KINDS["bf16 amsgrad"]
    Table([Row(size, kind, offsets=offsets) for kind in kinds for size in (3, 130, 1500)]).check_step()


def test_beyond_32_bits() -> None:
    """The last chunk of a tensor of 2**32 elements and some. The rest of it is never touched, and need not exist."""
    rows = [Row(1030, KINDS[kind]) for kind in ("f32", "bf16", "f64")]
    Table(rows, chunks_before=2**20).check_step()


@pytest.mark.parametrize(
    "group",
    [
        Group(maximize=True),
        Group(weight_decay=0.1),
        Group(weight_decay=0.1, maximize=True),
        Group(weight_decay=0.1, decoupled=True),
        Group(beta1=0.0, beta2=0.0),
        Group(lr=0.0, weight_decay=0.1, decoupled=True),
    ],
    ids=str,
)
def test_options(group: Group) -> None:
    table = Table([Row(1000, KINDS["f32"]), Row(1000, KINDS["bf16 amsgrad"])], [group])
    table.check_step()
    table.check_step()


def test_groups_differ() -> None:
    groups = [Group(lr=10.0**-i, beta1=0.02 * i, weight_decay=0.01 * i, decoupled=i % 2 == 0) for i in range(40)]
    rows = [Row(i, KINDS["f32"], group=i) for i in range(40)]
    for row in rows:
        row.step += row.group % 7
    Table(rows, groups).check_step()


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_lr_tensor(dtype: torch.dtype) -> None:
    lr = torch.tensor(0.3, dtype=dtype, device=DEVICE)
    table = Table([Row(50, KINDS["f32"]), Row(50, KINDS["f64"], group=1)], [Group(lr=7.0, lr_tensor=lr), Group()])
    table.check_step()
    lr.fill_(0.05)
    table.check_step()


def test_grad_scale() -> None:
    scale = torch.tensor([1024.0], device=DEVICE)
    found = torch.tensor([0.0], device=DEVICE)
    Table([Row(600, KINDS[kind]) for kind in ("f32", "f16", "f64")], grad_scale=scale, found_inf=found).check_step()


@pytest.mark.parametrize("found_inf", [1.0, 2.0, math.inf, math.nan])
def test_found_inf_skips(found_inf: float) -> None:
    """`found_inf` is a sum over devices. Skipped states may be memory that nobody has written yet."""
    rows = [Row(size, KINDS["f32"]) for size in (5, 1000)]
    for row in rows:
        for state in row.views[2:]:
            state.fill_(math.nan)
    table = Table(rows, found_inf=torch.tensor([found_inf], device=DEVICE))
    table.check_step(skipped=(0, 1))
    for row in rows:
        for state in row.views[2:]:
            state.zero_()
    table.found_inf = torch.zeros(1, device=DEVICE)
    table.check_step()


def test_no_gradient_leaves_the_tensor_alone() -> None:
    rows = [Row(size, KINDS["f32"], seed=size) for size in (100, 5000, 7, 300)]
    addresses = [row.grad_address for row in rows]
    rows[1].grad_address = rows[2].grad_address = 0
    table = Table(rows)
    table.check_step(skipped=(1, 2))
    rows[1].grad_address, rows[2].grad_address = addresses[1:3]
    table.check_step()
    assert [row.step.item() for row in rows] == [2, 1, 1, 2]


def test_prep_is_exact() -> None:
    """Every column of hyper, bit for bit: float64 on the device is the float64 of Python."""

    def power(base: float, exponent: int) -> float:
        result = 1.0
        while exponent:
            result *= base if exponent & 1 else 1.0
            base *= base
            exponent >>= 1
        return result

    one_cycle = Group(lr=0.3, beta1=0.95, beta2=0.9999, weight_decay=0.1, decoupled=True)
    groups = [one_cycle, Group(maximize=True, weight_decay=0.2)]
    steps = [1, 2, 3, 10, 999, 123457, 2**24] * 5
    rows = [Row(1, KINDS["f32"], group=i % 2) for i in range(len(steps))]
    for row, step in zip(rows, steps, strict=True):
        row.step.fill_(step - 1)
    table = Table(rows, groups, grad_scale=torch.tensor([3.0], device=DEVICE))
    table.launch()
    for number, step in enumerate(steps):
        group = groups[number % 2]
        scale = -1.0 / 3.0 if group.maximize else 1.0 / 3.0
        expected = [group.lr, group.beta1, group.beta2, group.eps, 1.0 - group.beta1, 1.0 - group.beta2]
        correction1, correction2 = 1.0 - power(group.beta1, step), 1.0 - power(group.beta2, step)
        expected += [group.lr / correction1, 1.0 / math.sqrt(correction2), scale]
        expected += [0.0, group.lr * group.weight_decay] if group.decoupled else [group.weight_decay, 0.0]
        assert table.hyper[number, :13].tolist() == [*expected, 0.0, float(step == 1)]
        assert table.hyper[number, 15].item() == step


def test_only_empty_tensors() -> None:
    Table([Row(0, KINDS["f32"])]).check_step()


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_eps_zero_makes_no_trouble_past_the_end() -> None:
    """NumPy warns of 0 / 0, so in the interpreter a lane past the end that divides by zero fails this test."""
    row = Row(5, KINDS["f32 amsgrad"])
    for state in row.views[2:]:
        state.zero_()
    Table([row], [Group(eps=0.0)]).check_step()
    assert row.views[0].isfinite().all()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_nan_and_infinity_propagate() -> None:
    row = Row(8, KINDS["f32 amsgrad"])
    param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq = row.views
    grad[0], grad[1], max_exp_avg_sq[2], exp_avg_sq[3] = math.nan, math.inf, math.nan, math.inf
    param[4] = math.inf
    before = param[5:].clone()
    Table([row]).launch()
    assert param[:3].isnan().all() and max_exp_avg_sq[:1].isnan() and max_exp_avg_sq[2].isnan()
    assert exp_avg[1] == math.inf and exp_avg_sq[1] == math.inf and exp_avg_sq[3] == math.inf
    # Without weight decay an infinite param says nothing about the gradient: 0 * inf must not leak NaN into the states.
    assert param[4] == math.inf and row.views[2][4].isfinite() and exp_avg_sq[4].isfinite()
    assert param[5:].isfinite().all() and not torch.equal(param[5:], before)
