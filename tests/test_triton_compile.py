"""The code that Triton generates, for targets that need not be here: compiled ahead of time, then read."""

import os
import re
import subprocess
from collections import Counter
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
import triton
from fused_optim.triton_kernels import launch as launching
from fused_optim.triton_kernels.launch import compile_ahead, compile_prep_ahead
from fused_optim.triton_kernels.rules import RULES
from fused_optim.triton_kernels.step import pack_kind, prep_kernel, step_kernel
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel, make_backend
from triton.runtime.jit import compute_cache_key, create_function_from_signature

__test__ = os.environ.get("TRITON_INTERPRET") != "1"  # Under the interpreter Triton compiles nothing.

F32, BF16, F16, F64 = range(4)  # dtype codes of the table: param, grad, states
ITEMSIZE = {F32: 4, BF16: 2, F16: 2, F64: 8}
KINDS = {
    "f32": (F32,) * 4,
    "f32 amsgrad": (F32,) * 5,
    "bf16, f32 states": (BF16, BF16, F32, F32),
    "bf16, f32 states amsgrad": (BF16, BF16, F32, F32, F32),
    "bf16": (BF16,) * 4,
    "bf16 amsgrad": (BF16,) * 5,
    "f16": (F16,) * 4,
    "f16, f32 states": (F16, F16, F32, F32),
    "f32, bf16 grad": (F32, BF16, F32, F32),
    "f64": (F64,) * 4,
    "f64 amsgrad": (F64,) * 5,
}
MIXED = ("f32", "bf16, f32 states", "bf16", "f64")
TABLES = {name: (kind,) for name, kind in KINDS.items()} | {"mixed": tuple(KINDS[name] for name in MIXED)}
REPRESENTATIVE = ("f32", "bf16, f32 states", "bf16 amsgrad", "mixed")
HOPPER = GPUTarget("cuda", 90, 32)
INSTINCT = GPUTarget("hip", "gfx942", 64)
BUILDS = [pytest.param(HOPPER, table, id=f"sm_90-{table}") for table in TABLES] + [
    pytest.param(GPUTarget("cuda", arch, 32), table, id=f"sm_{arch}-{table}")
    for arch in (80, 100)
    for table in REPRESENTATIVE
]
# Of an SM's 65,536 registers: 64 leave 1,024 threads resident, 96 leave 640, each with a vector per stream in flight.
REGISTERS = {"f32": 64, "f32 amsgrad": 64, "bf16, f32 states": 64, "f16, f32 states": 64, "f32, bf16 grad": 64}
MOST_REGISTERS = 96


@cache
def compiled(target: GPUTarget, table: str, rule: str = "adam") -> CompiledKernel:
    return compile_ahead(rule, TABLES[table], target)


def resources(kernel: CompiledKernel) -> dict[str, int]:
    """What the binary needs, as NVIDIA's cuobjdump reads it, which Triton ships: REG, STACK, SHARED, LOCAL, ..."""
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(kernel.asm["cubin"])
        command = [str(cuobjdump), "--dump-resource-usage", str(cubin)]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = {name: int(value) for name, value in re.findall(r"\b([A-Z]+):(\d+)", report)}
    assert {"REG", "STACK", "SHARED", "LOCAL"} <= usage.keys(), report
    return usage


def vector_accesses(table: str) -> Counter:
    """What the table's kinds need: one load of every stream and one store of all but the gradient, 16 bytes wide for
    the widest dtype of the kind and of as many elements for the others."""
    accesses: Counter = Counter()
    for kind in TABLES[table]:
        width = 16 // max(ITEMSIZE[code] for code in kind)
        for stream, code in enumerate(kind):
            size = width * ITEMSIZE[code]
            suffix = {16: "v4.b32", 8: "v2.b32"}[size] if code != F64 else "v2.b64"
            accesses[f"ld.global.{suffix}"] += 1
            accesses[f"st.global.{suffix}"] += stream != 1
    return accesses


@pytest.mark.parametrize(("target", "table"), BUILDS)
def test_every_stream_moves_in_full_vectors(target: GPUTarget, table: str) -> None:
    ptx = compiled(target, table).asm["ptx"]
    assert Counter(re.findall(r"\b(?:ld|st)\.global\.v\d\.b\d+", ptx)) == vector_accesses(table)


@pytest.mark.parametrize(("target", "table"), BUILDS)
def test_nothing_but_registers(target: GPUTarget, table: str, capsys: pytest.CaptureFixture[str]) -> None:
    kernel = compiled(target, table)
    usage = resources(kernel)
    with capsys.disabled():
        print(f"\n    sm_{target.arch} {table}: {usage['REG']} registers", end="")
    assert kernel.metadata.shared == 0 and usage["SHARED"] <= 1024  # sm_90 and later reserve 1024 bytes of every block
    assert usage["STACK"] == usage["LOCAL"] == 0
    assert not re.search(r"\.local\b|\bbar\.sync\b|\.shared\b", kernel.asm["ptx"])
    assert usage["REG"] <= REGISTERS.get(table, MOST_REGISTERS)


@pytest.mark.parametrize(("target", "table"), BUILDS)
def test_arithmetic_is_accurate(target: GPUTarget, table: str) -> None:
    """Division and square root correctly rounded, nothing flushed to zero, and no product fused that the rule did not
    fuse: `.rn` on an addition is what keeps the assembler from it."""
    ptx = compiled(target, table).asm["ptx"]
    widths = {"f64" if kind[0] == F64 else "f32" for kind in TABLES[table]}
    roots_and_quotients = set(re.findall(r"\b(?:div|sqrt|rsqrt|rcp)\.\S+", ptx))
    assert roots_and_quotients == {f"{op}.rn.{width}" for op in ("div", "sqrt") for width in widths}
    assert ".ftz" not in ptx
    assert set(re.findall(r"\b(?:add|sub|mul|fma)\.\S*f(?:32|64)", ptx)) <= {
        f"{op}.rn.{width}" for op in ("add", "sub", "mul", "fma") for width in ("f32", "f64")
    }


@pytest.mark.parametrize("table", REPRESENTATIVE)
def test_amd(table: str) -> None:
    kernel = compiled(INSTINCT, table)
    code = kernel.asm["amdgcn"]
    for absent in ("vgpr_spill_count", "sgpr_spill_count", "private_segment_fixed_size", "group_segment_fixed_size"):
        assert re.findall(rf"\.{absent}: +(\d+)", code) == ["0"], absent
    stores = Counter(re.findall(r"\bglobal_store_dwordx\d", code))
    expected = vector_accesses(table)
    assert stores["global_store_dwordx4"] == expected["st.global.v4.b32"] + expected["st.global.v2.b64"]


def test_prep() -> None:
    for target in (HOPPER, GPUTarget("cuda", 80, 32), GPUTarget("cuda", 100, 32)):
        kernel = compile_prep_ahead(target)
        usage = resources(kernel)
        assert kernel.metadata.shared == usage["STACK"] == usage["LOCAL"] == 0
        assert set(re.findall(r"\b(?:div|sqrt|rcp)\.\S+", kernel.asm["ptx"])) == {"div.rn.f64", "sqrt.rn.f64"}
        assert not re.search(r"\bfma\.", kernel.asm["ptx"])  # csrc/prep.h on the CPU fuses nothing either
    assert compile_prep_ahead(INSTINCT).metadata.shared == 0


def specialisation(kernel: Any, *args: Any) -> tuple[str, list[str]]:
    """What Triton's launcher takes as the key of its cache of compiled kernels, and the types that it compiles for."""
    binder = create_function_from_signature(kernel.signature, kernel.params, make_backend(HOPPER))
    _, specialization, options = binder(*args, num_warps=4, enable_fp_fusion=False)
    return compute_cache_key({}, specialization, options), [entry[0] for entry in specialization]


def step_tables(tensors: int, offset: int, values: float) -> list[torch.Tensor]:
    """desc, rows, grads, hyper of any number of tensors, `offset` elements off their alignment."""
    integers = torch.full((9 * tensors + offset,), int(values), dtype=torch.int64)[offset:]
    floats = torch.full_like(integers, values, dtype=torch.float64)
    return [integers[:tensors], integers[tensors:], integers[:tensors], floats]


def test_one_specialisation_whatever_the_values() -> None:
    """1cycle changes lr and betas at every step, models grow and shrink: none of it may compile anything again."""
    kinds = (pack_kind(KINDS["f32"]),)
    keys = {
        specialisation(step_kernel, *step_tables(tensors, offset, values), RULES["adam"], kinds)[0]
        for tensors in (1, 16, 1000)
        for offset in (0, 1)
        for values in (0.0, 1.0, 16.0)
    }
    assert len(keys) == 1
    others = (pack_kind(KINDS["bf16"]),)
    assert specialisation(step_kernel, *step_tables(1, 0, 0.0), RULES["adam"], others)[0] not in keys

    keys = set()
    for tensors in (1, 16, 17, 1000):
        desc, rows, grads, hyper = step_tables(tensors, tensors % 2, 0.5)
        group, flag = torch.zeros(tensors, dtype=torch.int32), torch.ones(tensors)[-1:]
        keys.add(specialisation(prep_kernel, rows, grads, desc, hyper, group, hyper, flag, flag, tensors)[0])
    assert len(keys) == 1


def test_launcher_compiles_what_is_tested_here() -> None:
    kinds = (pack_kind(KINDS["f32"]),)
    _, types = specialisation(step_kernel, *step_tables(1, 0, 0.0), RULES["adam"], kinds)
    assert types == list(compiled(HOPPER, "f32").src.signature.values())
    desc, rows, grads, hyper = step_tables(1, 0, 0.0)
    group, flag = torch.zeros(1, dtype=torch.int32), torch.ones(1)
    _, types = specialisation(prep_kernel, rows, grads, desc, hyper, group, hyper, flag, flag, 1)
    assert types == list(compile_prep_ahead(HOPPER).src.signature.values())


class Handle:
    """Stands in for a compiled kernel: keeps what it is launched with."""

    def __init__(self) -> None:
        self.launches: list[tuple[tuple[int, ...], tuple[Any, ...]]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args: self.launches.append((grid, args))


class Kernel:
    """Stands in for a kernel: keeps what it is launched with, and returns a handle."""

    def __init__(self) -> None:
        self.handle = Handle()
        self.launches: list[tuple[tuple[int, ...], tuple[Any, ...]]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def run(*args: Any, **options: Any) -> Handle:
            self.launches.append((grid, args))
            return self.handle

        return run


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> tuple[Kernel, Kernel]:
    prep, step = Kernel(), Kernel()
    monkeypatch.setattr(launching, "prep_kernel", prep)
    monkeypatch.setattr(launching, "step_kernel", step)
    monkeypatch.setattr(launching, "_compiled", {})
    monkeypatch.setattr(launching, "_target", lambda: HOPPER)
    return prep, step


def test_later_launches_go_through_the_handle(stand_ins: tuple[Kernel, Kernel]) -> None:
    prep, step = stand_ins
    desc, rows, grads, hyper = step_tables(40, 0, 0.0)
    group = torch.zeros(40, dtype=torch.int32)
    for _ in range(3):
        launching.launch("adam", TABLES["f32"], desc, rows, grads, desc, hyper, group, hyper, None, None)
    launching.launch("adam", TABLES["f32"], desc[:0], rows, grads, desc, hyper, group, hyper, None, None)
    launching.launch("adam", TABLES["bf16"], desc, rows, grads, desc, hyper, group, hyper, None, None)
    for kernel, first, later, programs in ((prep, 1, 4, 2), (step, 2, 2, 40)):
        assert (len(kernel.launches), len(kernel.handle.launches)) == (first, later)
        grid, args = kernel.launches[0]
        assert grid == (programs, 1, 1)
        for other, others in kernel.handle.launches:
            assert other == grid and len(others) == len(args)
            assert all(a is b for a, b in zip(args, others, strict=True) if isinstance(a, torch.Tensor))
