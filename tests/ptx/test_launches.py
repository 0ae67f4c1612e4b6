"""The arguments of launches: from triton_kernels/launch.py through Triton's own launcher, and from the host code of
csrc/cuda/step.cu, compiled by nvcc."""

from __future__ import annotations

import math
import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from fused_optim.triton_kernels import launch as launching
from fused_optim.triton_kernels.launch import Variant
from torch import Tensor

from fused_optim import FusedAdamW, FusedLAMB, FusedLion, FusedQHAdam, FusedSGD, backends, clip_grad_norm_
from fused_optim.engine.layout import CHUNK, RowFields, TableArrays, TensorScalars, column
from ptx.backends import NAMES, STREAM, CudaPtx, TritonPtx, tables, tables_type, why_not
from ptx.launched import LAUNCHES, Launch
from ptx.toolchain import missing

MISSING = missing("gcc", "nvcc")
pytestmark = [
    pytest.mark.codegen,
    pytest.mark.skipif(MISSING is not None, reason=str(MISSING)),
    pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU, which runs the kernels directly"),
    pytest.mark.skipif(launching.triton.knobs.runtime.interpret, reason="TRITON_INTERPRET is set"),
]
OPTIMIZERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "adamw": (FusedAdamW, {"max_grad_norm": 1.0, "ema_decay": 0.9, "amsgrad": True}),
    "sgd": (FusedSGD, {"momentum": 0.9}),
    "qhadam": (FusedQHAdam, {"skip_nonfinite": True}),
    "lamb": (FusedLAMB, {"ema_decay": 0.9}),
    "lion": (FusedLion, {}),
}
every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)
SIZES = (3, 4097, 0, 640)


@dataclass(frozen=True)
class Start:
    variant: Variant
    programs: int
    args: tuple[Any, ...]


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    for backend in (TritonPtx, CudaPtx):
        monkeypatch.setitem(backends.BACKENDS, backend.name, backend)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """The number of calls of JITFunction.run per kernel. Each call takes a hundred microseconds."""
    counts: Counter[str] = Counter()
    kind = type(launching.prep_kernel)
    real = kind.run

    def run(self: Any, *args: Any, **options: Any) -> Any:
        counts[self.fn.__name__] += 1
        return real(self, *args, **options)

    monkeypatch.setattr(kind, "run", run)
    yield counts


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Start]]:
    """The kernels that launch.py starts. The handles of each variant are cleared before its first start."""
    found: list[Start] = []
    real = Variant.start
    seen: set[Variant] = set()

    def start(self: Variant, device: torch.device, programs: int, *args: Any) -> None:
        if self not in seen:
            seen.add(self)
            monkeypatch.setattr(self, "handles", {})
        found.append(Start(self, programs, args))
        real(self, device, programs, *args)

    monkeypatch.setattr(Variant, "start", start)
    yield found


def train(name: str, backend: str, steps: int = 12) -> Any:
    """All hyperparameters change, gradients appear and disappear, and a group is added."""
    kind, options = OPTIMIZERS[name]
    params = [torch.randn(size).requires_grad_() for size in SIZES]
    optimizer = kind(params, lr=1e-2, backend=backend, **options)
    LAUNCHES.record.clear()
    for step in range(steps):
        group = optimizer.param_groups[0]
        group["lr"] = torch.tensor(0.5) if step == 5 else 1e-2 / (step + 1)
        if "betas" in group:
            group["betas"] = (0.9 - 0.01 * step, 0.99)
        if step == 8:
            params.append(torch.randn(9000).requires_grad_())
            optimizer.add_param_group({"params": params[-1:]})
        for index, param in enumerate(params):
            param.grad = None if step and (index + step) % 3 == 0 else torch.randn_like(param)
        optimizer.step(grad_scale=None if step < 6 else 2.0)
    return optimizer


@every_optimizer
def test_a_kernel_is_looked_up_once(name: str, runs: Counter[str], starts: list[Start]) -> None:
    train(name, "triton-ptx")
    variants = Counter(start.variant.kernel.fn.__name__ for start in {id(s.variant): s for s in starts}.values())
    assert runs == variants, "once per variant, also after changes"
    assert len(starts) > 2 * sum(variants.values())


@every_optimizer
def test_triton_gets_what_its_kernels_take(name: str, starts: list[Start]) -> None:
    train(name, "triton-ptx")
    assert len(starts) == len(LAUNCHES.record) > 0
    for start, launch in zip(starts, LAUNCHES.record, strict=True):
        check_start(start, launch)


def check_start(start: Start, launch: Launch) -> None:
    variant = start.variant
    assert launch.kernel.name == variant.kernel.fn.__name__
    assert (launch.blocks, launch.threads, launch.stream) == (start.programs, variant.threads, STREAM)
    names = variant.kernel.arg_names
    constants = {*variant.constants, *variant.absent}
    assert names[len(start.args) :] == list(variant.constants)
    given = dict(zip(names, start.args, strict=False))
    assert {name for name, value in given.items() if value is None} == {*variant.absent}
    (handle,) = variant.handles.values()
    signature = {name: kind for name, kind in handle.src.signature.items() if kind != "constexpr"}
    assert list(signature) == [name for name in names if name not in constants]
    assert signature == {name: launching.TYPES[name] for name in signature}
    sent = list(launch.kernel.parameters.values())
    for (name, kind), (offset, size) in zip(signature.items(), sent, strict=False):
        raw, value = launch.parameters[offset : offset + size], given[name]
        if isinstance(value, Tensor):
            assert kind == POINTERS[value.dtype] and struct.unpack("<Q", raw) == (value.data_ptr(),)
        else:
            assert kind == "i32" and struct.unpack("<i", raw) == (value,)
    for offset, size in sent[len(signature) :]:  # pointers to scratch memory that Triton adds, unused here
        assert launch.parameters[offset : offset + size] == bytes(8)


POINTERS = {torch.int64: "*i64", torch.float64: "*fp64", torch.float32: "*fp32", torch.int32: "*i32"}

WALK, MANY, ONE, ROW = 128, 1024, 1, 32  # threads per block
KERNELS: dict[str, list[tuple[str, str, int]]] = {  # name, blocks and threads
    "adamw": [
        ("squares_kernel", "chunks", WALK),
        ("total_kernel", "one", MANY),
        ("prep_kernel", "rows", ROW),
        ("step_kernel", "chunks", WALK),
    ],
    "sgd": [("prep_kernel", "rows", ROW), ("step_kernel", "chunks", WALK)],
    "lamb": [
        ("squares_kernel", "chunks", WALK),
        ("total_kernel", "one", MANY),
        ("prep_kernel", "rows", ROW),
        ("step_kernel", "chunks", WALK),
        ("sum_kernel", "tensors", WALK),
        ("trust_kernel", "rows", ROW),
        ("step_kernel", "chunks", WALK),
    ],
}


@pytest.mark.parametrize("name", KERNELS)
def test_nvcc_launches(name: str) -> None:
    optimizer = train(name, "cuda-ptx", steps=2)
    (bound,) = optimizer._tables
    table = bound.table
    blocks = {"one": 1, "tensors": len(SIZES), "rows": 1, "chunks": table.chunk_table.numel()}
    step = LAUNCHES.record[len(LAUNCHES.record) // 2 :]
    assert len(step) == len(KERNELS[name])
    for launch, (kernel, count, threads) in zip(step, KERNELS[name], strict=True):
        assert kernel in launch.kernel.name
        assert (launch.blocks, launch.threads, launch.stream) == (blocks[count], threads, STREAM)
        offset, size = launch.kernel.parameters[next(iter(launch.kernel.parameters))]
        if kernel == "total_kernel":  # the input, its length, and the output
            expected_total = (table.partials.data_ptr(), table.chunk_table.numel(), table.squares.data_ptr())
            assert struct.unpack("<QqQ", launch.parameters) == expected_total
            continue
        assert size == len(bytes(tables_type()()))
        sent = tables_type().from_buffer_copy(launch.parameters[offset : offset + size])
        expected = tables(table)
        for field in TableArrays._fields:
            assert getattr(sent, field) == getattr(expected, field), field
        assert (sent.chunks, sent.tensors, sent.ema) == (table.chunk_table.numel(), len(SIZES), table.ema)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_alone_are_clipped(name: str) -> None:
    params = [torch.zeros(size, requires_grad=True) for size in SIZES]
    for param in params:
        param.grad = torch.ones_like(param)
    LAUNCHES.record.clear()
    norm = clip_grad_norm_(params, 1.0, backend=name)
    assert norm.item() == pytest.approx(math.sqrt(sum(SIZES)))
    assert [sum(kernel in launch.kernel.name for launch in LAUNCHES.record) for kernel in ("total", "scale")] == [1, 1]
    for param in params:
        torch.testing.assert_close(param.grad, torch.full_like(param, 1 / math.sqrt(sum(SIZES))))


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_left_from_the_step_before(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the overwrite with NaN, a step without prep would reuse the numbers of the last step. NaN in the column
    of skipped tensors makes the walk skip every tensor."""
    param = torch.ones(10, requires_grad=True)
    optimizer = FusedAdamW([param], backend=name)
    param.grad = torch.ones(10)
    optimizer.step()
    before = param.detach().clone()
    (bound,) = optimizer._tables
    table = bound.table
    own = column(TensorScalars, "own_a")  # the columns from here on are a rule's own scalars; Adam has none
    assert before.isfinite().all() and table.tensor_scalars[:, :own].isfinite().all()
    real = LAUNCHES.run
    monkeypatch.setattr(LAUNCHES, "run", lambda ptx, kernel, *args: 0 if "prep" in kernel else real(ptx, kernel, *args))
    optimizer.step()
    assert table.tensor_scalars.isnan().all() and torch.equal(param, before)


@pytest.mark.parametrize("name", NAMES)
def test_what_fails_in_a_kernel_is_raised(name: str) -> None:
    """The table has a row that reaches beyond its tensor."""
    param = torch.ones(10, requires_grad=True)
    optimizer = FusedAdamW([param], backend=name)
    param.grad = torch.ones(10)
    optimizer.step()
    (bound,) = optimizer._tables
    table = bound.table
    table.rows[0, column(RowFields, "numel")] += CHUNK
    with pytest.raises(RuntimeError, match=r"outside of every tensor: .*ld"):
        optimizer.step()


@pytest.mark.parametrize("name", NAMES)
def test_only_where_it_is_asked_for(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert backends.pick("auto", torch.device("cpu")).name not in NAMES
    with pytest.raises(RuntimeError, match="CPU tensors"):
        backends.pick(name, torch.device("cuda"))
    monkeypatch.setenv("PATH", "")
    assert "gcc is not installed" in str(why_not("gcc", "nvcc")(None))
