"""The code that Triton generates, compiled ahead of time for GPUs that need not be present."""

import itertools
import os
import re
import subprocess
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import triton
from cases import CASES
from fused_optim.triton_kernels.launch import (
    ROW_SUMS,
    RULES,
    TOTAL,
    Signatures,
    Variant,
    apply_update_variant,
    prep_variant,
    scale_variant,
    squares_variant,
    step_variant,
    trust_variant,
)
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel

from fused_optim.engine.layout import FORMAT_BYTES, Format

pytestmark = pytest.mark.codegen
__test__ = os.environ.get("TRITON_INTERPRET") != "1"  # With TRITON_INTERPRET=1 Triton compiles nothing.

F32, BF16, F16, F64 = (int(Format[name]) for name in ("FLOAT32", "BFLOAT16", "FLOAT16", "FLOAT64"))
ITEMSIZE = FORMAT_BYTES
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
OTHERS = {"f32": (F32, F32), "bf16": (BF16, BF16), "bf16, f32 states": (BF16, F32)}  # params and gradients, states
RULE_OF = {case.ours.rule.name: case.ours.rule for case in CASES}
DIVIDES = {case.ours.rule.name for case in CASES if case.divides}
STATES = {  # the numbers of states that a rule supports
    name: range(len(rule.states) - len(rule.switched), len(rule.states) + 1)
    for name, rule in RULE_OF.items()
    if name != "adam"
}


@dataclass(frozen=True)
class Walk:
    """A kernel that walks over elements. streams: dtype codes of the tensors that it reads. written: which of these it
    writes. sums: the number of sums per chunk. divides: whether it divides elements. clips: whether it computes a
    clipping coefficient. unread: streams that it does not read."""

    variant: Variant
    streams: Signatures
    written: slice | tuple[int, ...]
    sums: int = 0
    divides: bool = False
    clips: bool = False
    unread: tuple[int, ...] = ()


AVERAGED = {  # the average of the weights is the last stream
    "adam": {
        "f32": (F32,) * 5,
        "f32 amsgrad": (F32,) * 6,
        "bf16": (BF16,) * 5,
        "bf16 amsgrad": (BF16,) * 6,
        "bf16, f32 average": (*(BF16,) * 4, F32),
        "bf16, f32 states and average": (BF16, BF16, F32, F32, F32),
        "bf16, f32 states amsgrad and average": (BF16, BF16, F32, F32, F32, F32),
        "f64 amsgrad": (F64,) * 6,
    },
    **{
        name: {
            "f32": (F32,) * (3 + states[-1]),
            "bf16": (BF16,) * (3 + states[-1]),
            "bf16, f32 average": (*(BF16,) * (2 + states[-1]), F32),
        }
        for name, states in STATES.items()
        if not RULE_OF[name].trust
    },
}


def averaging_walks() -> dict[str, Walk]:
    named = {}
    for rule, kinds in AVERAGED.items():
        for name, kind in kinds.items():
            variant, divides = step_variant(rule, (kind,), True, False), rule in DIVIDES
            named[f"{rule} {name} averaged"] = Walk(variant, (kind,), slice(0, None), divides=divides)
    for name, kind in AVERAGED["qhadam"].items():
        streams = ((kind[0], *kind[2:]),)
        variant = apply_update_variant("lamb", (kind,), True, False)
        named[f"apply update {name} averaged"] = Walk(variant, streams, (0, len(kind) - 2), divides=True)
    return named


def walks() -> dict[str, Walk]:
    named = {}
    for name, kinds in TABLES.items():
        named[f"adam {name}"] = Walk(step_variant("adam", kinds, False, False), kinds, slice(0, None), divides=True)
    for rule, name in itertools.product(STATES, OTHERS):
        param, state = OTHERS[name]
        for states in STATES[rule]:
            if states == 0 and state != param:
                continue
            kinds = ((param, param, *[state] * states),)
            written, sums = (slice(2, None), 2) if RULE_OF[rule].trust else (slice(0, None), 0)
            variant = step_variant(rule, kinds, False, False)
            named[f"{rule}{states} {name}"] = Walk(variant, kinds, written, sums, rule in DIVIDES)
            if RULE_OF[rule].trust:
                streams = ((param, *[state] * states),)
                named[f"apply update {name}"] = Walk(
                    apply_update_variant(rule, kinds, False, False), streams, slice(0, 1), divides=True
                )
    for name, (param, state) in OTHERS.items():  # Muon's second state is its workspace, which walk 1 only writes
        kinds, work = ((param, param, state, BF16),), ((param, state, BF16),)
        named[f"muon {name}"] = Walk(step_variant("muon", kinds, False, False), kinds, (2, 3), 1, unread=(3,))
        variant = apply_update_variant("muon", kinds, False, False)
        named[f"apply update muon {name}"] = Walk(variant, work, (0,), unread=(1,))
    for name in ("f32", "bf16", "f64", "mixed"):
        streams = tuple((kind[1],) for kind in TABLES[name])
        named[f"squares {name}"] = Walk(squares_variant(TABLES[name]), streams, slice(0, 0), sums=1)
        named[f"scale {name}"] = Walk(scale_variant(TABLES[name]), streams, slice(0, 1), clips=True)
    return named


WALKS = walks() | averaging_walks()
ELSEWHERE = [name for name in WALKS if not name.startswith("adam")] + [f"adam {name}" for name in REPRESENTATIVE]
SMALL = {"row sums": ROW_SUMS, "total": TOTAL}
SMALL |= {f"trust {name}": trust_variant(rule.ratio) for name, rule in RULES.items() if rule.ratio is not None}
SMALL |= {
    f"prep {rule} {clips}": prep_variant(RULES[rule].scalars, clips, RULES[rule].scales_decay, RULES[rule].running)
    for rule in RULES
    for clips in (False, True)
}
LIBRARY = ("prep nadam", "prep ademamix", "prep adopt", "prep schedule_free", "prep stableadamw")  # call exp or log
HOPPER = GPUTarget("cuda", 90, 32)
NVIDIA = (GPUTarget("cuda", 80, 32), HOPPER, GPUTarget("cuda", 100, 32))
INSTINCT = GPUTarget("hip", "gfx942", 64)
every_build = pytest.mark.parametrize(
    ("target", "name"),
    [
        pytest.param(target, name, id=f"sm_{target.arch}-{name}")
        for target in NVIDIA
        for name in (WALKS if target == HOPPER else ELSEWHERE)
    ],
)
# An SM has 65,536 registers. With 64 registers per thread 1,024 threads are resident, with 80 (two-byte dtypes) 768,
# with 96 there are 640, with 104 (six streams of float64) 512. Each thread has one vector per stream in flight.
FEW_REGISTERS, NARROW_REGISTERS, MOST_REGISTERS, WIDE_REGISTERS = 64, 80, 96, 104
# The exact counts of instructions and registers are those of this version of Triton. Other versions may generate other
# code: for them the tests require 128-bit accesses and no spills.
AS_READ = triton.__version__.startswith("3.9.")
# Triton 3.5 computes float32 roots and quotients with a library that flushes subnormal numbers to zero.
FLUSHES = triton.__version__.startswith("3.5.")


@cache
def compiled(target: GPUTarget, name: str) -> CompiledKernel:
    return (WALKS[name].variant if name in WALKS else SMALL[name]).compile_ahead(target)


def resources(kernel: CompiledKernel) -> dict[str, int]:
    """The resources of the binary (REG, STACK, SHARED, LOCAL, ...), as NVIDIA's cuobjdump, which Triton ships, reports
    them."""
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(kernel.asm["cubin"])
        command = [str(cuobjdump), "--dump-resource-usage", str(cubin)]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = {name: int(value) for name, value in re.findall(r"\b([A-Z]+):(\d+)", report)}
    assert {"REG", "STACK", "SHARED", "LOCAL"} <= usage.keys(), report
    return usage


def vector_accesses(walk: Walk) -> Counter:
    """The accesses that the kinds need: one load of every stream and one store of every written stream. Each occurs
    twice, for full blocks and for the remaining vectors of a chunk. They are 16 bytes wide for the widest dtype of the
    kind, and have as many elements for the other dtypes."""
    accesses: Counter = Counter()
    for kind in walk.streams:
        width = 16 // max(ITEMSIZE[code] for code in kind)
        if isinstance(walk.written, tuple):
            written = {*walk.written}
        else:
            written = {*range(len(kind))[walk.written]} - ({1} if walk.written.stop is None else set())
        for stream, code in enumerate(kind):
            size = width * ITEMSIZE[code]
            suffix = {16: "v4.b32", 8: "v2.b32"}[size] if code != F64 else "v2.b64"
            accesses[f"ld.global.{suffix}"] += 2 * (stream not in walk.unread)
            accesses[f"st.global.{suffix}"] += 2 * (stream in written)
    return accesses


@every_build
def test_compiled_code(target: GPUTarget, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """One test for all properties of a kernel, so that one process compiles it."""
    check_accesses(target, name)
    usage = check_resources(target, name)
    check_arithmetic(target, name)
    with capsys.disabled():
        print(f"\n    sm_{target.arch} {name}: {usage['REG']} registers", end="")


def check_accesses(target: GPUTarget, name: str) -> None:
    """Every stream is accessed in full vectors."""
    ptx = compiled(target, name).asm["ptx"]
    found, needed = Counter(re.findall(r"\b(?:ld|st)\.global\.v\d\.b\d+", ptx)), vector_accesses(WALKS[name])
    assert found == needed if AS_READ else found >= needed


DITHERED, SPLIT16, SPLIT8, E8M8, ANCHORED8 = (
    int(Format[name]) for name in ("BFLOAT16_DITHERED", "SPLIT16", "SPLIT8", "E8M8", "ANCHORED8")
)
PACKED = {
    "exact": ("adam", (SPLIT16, BF16, F32, F32), False),
    "exact, compact": ("adam", (SPLIT16, BF16, ANCHORED8, E8M8), False),
    "exact, compact, amsgrad": ("adam", (SPLIT16, BF16, ANCHORED8, E8M8, E8M8), False),
    "exact, compact, averaged": ("adam", (SPLIT16, BF16, ANCHORED8, E8M8, F32), True),
    "24 bits, compact": ("adam", (SPLIT8, BF16, ANCHORED8, E8M8), False),
    "dithered, compact": ("adam", (DITHERED, BF16, ANCHORED8, E8M8), False),
    "dithered, averaged": ("adam", (DITHERED,) * 2 + (DITHERED,) * 3, True),
    "qhadam": ("qhadam", (SPLIT16, BF16, ANCHORED8, E8M8), False),
    "sgd": ("sgd", (SPLIT16, BF16, DITHERED), False),
    "lion": ("lion", (SPLIT16, BF16, F32), False),
}


@pytest.mark.parametrize("name", PACKED)
def test_packed_formats_move_in_vectors_and_registers(name: str) -> None:
    """As many elements per thread and access as 16 bytes of the widest stream have, of lower halves too; no shared
    memory, nothing spilled."""
    rule, kind, ema = PACKED[name]
    kind = (kind[0], BF16, *kind[2:])
    kernel = step_variant(rule, (kind,), ema, False).compile_ahead(HOPPER)
    width = 16 // max(ITEMSIZE[code] for code in kind)
    lower = [{SPLIT16: 2, SPLIT8: 1}[kind[0]]] if kind[0] in (SPLIT16, SPLIT8) else []
    sizes = [width * size for size in [*(ITEMSIZE[code] for code in kind), *lower]]
    needed: Counter = Counter()
    for stream, size in enumerate(sizes):
        if size >= 8:
            suffix = {16: "v4.b32", 8: "v2.b32"}[size]
            needed[f"ld.global.{suffix}"] += 2
            needed[f"st.global.{suffix}"] += 2 * (stream != 1)
    found = Counter(re.findall(r"\b(?:ld|st)\.global\.v\d\.b\d+", kernel.asm["ptx"]))
    assert found == needed if AS_READ else found >= needed
    usage = resources(kernel)
    assert usage["STACK"] == usage["LOCAL"] == 0 and ".local" not in kernel.asm["ptx"]
    assert kernel.metadata.shared == 0
    if AS_READ:
        assert usage["REG"] <= (128 if len(kind) > 4 or kind[0] == SPLIT8 else MOST_REGISTERS)


def check_resources(target: GPUTarget, name: str) -> dict[str, int]:
    """No spills. Shared memory is used only by kernels that sum: to combine the warps' sums, after all loops."""
    walk, kernel = WALKS[name], compiled(target, name)
    ptx, usage = kernel.asm["ptx"], resources(kernel)
    assert usage["STACK"] == usage["LOCAL"] == 0 and ".local" not in ptx
    shared = kernel.metadata.shared
    assert shared == (32 if walk.sums else 0) if AS_READ else bool(shared) == bool(walk.sums)  # a float64 per warp
    assert usage["SHARED"] <= 1024  # sm_90 and later reserve 1024 bytes per block
    if walk.sums:
        stores, reductions = len(re.findall(r"\bst\.shared", ptx)), walk.sums * len(walk.streams)
        assert stores == reductions if AS_READ else stores >= reductions
    else:
        assert not re.search(r"\bbar\.sync\b|\.shared\b", ptx)
    if walk.sums and len(walk.streams) == 1:
        assert ptx.index("bar.sync") > max(found.start() for found in re.finditer(r"\bld\.global", ptx))
    few = all(max(ITEMSIZE[code] for code in kind) == 4 or len(kind) <= 3 for kind in walk.streams)
    few = few and max(map(len, walk.streams)) <= 5
    most = WIDE_REGISTERS if any(len(kind) > 5 and kind[0] == F64 for kind in walk.streams) else MOST_REGISTERS
    if all(max(ITEMSIZE[code] for code in kind) == 2 for kind in walk.streams):
        most = NARROW_REGISTERS if max(map(len, walk.streams)) <= 6 else MOST_REGISTERS
    assert not AS_READ or usage["REG"] <= (FEW_REGISTERS if few else most)
    return usage


def check_arithmetic(target: GPUTarget, name: str) -> None:
    """Division and square root are correctly rounded, nothing is flushed to zero, and no product is fused that the rule
    does not fuse: `.rn` on an addition prevents the assembler from fusing it."""
    walk, ptx = WALKS[name], compiled(target, name).asm["ptx"]
    widths = {"f64" if kind[0] == F64 else "f32" for kind in walk.streams if walk.divides}
    widths |= {"f64"} if walk.clips else set()
    if FLUSHES:
        ptx = re.sub(r"\b(div|sqrt)\.rn\.ftz\.f32", r"\1.rn.f32", ptx)
    roots_and_quotients = set(re.findall(r"\b(?:div|sqrt|rsqrt|rcp)\.\S+", ptx))
    assert roots_and_quotients == {f"{op}.rn.{width}" for op in ("div", "sqrt") for width in widths}
    assert ".ftz" not in ptx
    assert set(re.findall(r"\b(?:add|sub|mul|fma)\.\S*f(?:32|64)", ptx)) <= {
        f"{op}.rn.{width}" for op in ("add", "sub", "mul", "fma") for width in ("f32", "f64")
    }


@pytest.mark.parametrize("name", ELSEWHERE)
def test_amd(name: str) -> None:
    walk, kernel = WALKS[name], compiled(INSTINCT, name)
    code = kernel.asm["amdgcn"]
    for absent in ("vgpr_spill_count", "sgpr_spill_count", "private_segment_fixed_size", "group_segment_fixed_size"):
        assert re.findall(rf"\.{absent}: +(\d+)", code) == ["0"], absent
    assert kernel.metadata.shared == (16 if walk.sums else 0) or not AS_READ
    stores = len(re.findall(r"\bglobal_store_dwordx4\b", code))
    expected = vector_accesses(walk)
    wide = expected["st.global.v4.b32"] + expected["st.global.v2.b64"]
    assert stores >= wide
    assert not AS_READ or stores == 0 or stores % wide == 0  # short loops are unrolled


@pytest.mark.parametrize("name", SMALL)
def test_small_kernels(name: str) -> None:
    for target in NVIDIA:
        kernel = compiled(target, name)
        usage, ptx = resources(kernel), kernel.asm["ptx"]
        assert usage["STACK"] == usage["LOCAL"] == 0
        assert (kernel.metadata.shared == 0) == (name not in ("row sums", "total"))
        roots_and_quotients = set() if name in ("row sums", "total", "trust muon") else {"div.rn.f64", "sqrt.rn.f64"}
        found = set(re.findall(r"\b(?:div|sqrt|rcp)\.\S+", ptx))
        if name.startswith(LIBRARY):  # exp and log are functions of their own, which fuse, and log refines a reciprocal
            assert found - {"rcp.approx.ftz.f64"} == roots_and_quotients
        else:
            assert found == roots_and_quotients
            assert not re.search(r"\bfma\.", ptx)  # csrc/prep.h on the CPU fuses nothing either
    assert ".private_segment_fixed_size: 0" in compiled(INSTINCT, name).asm["amdgcn"]
