"""The CUDA kernels without a GPU: what nvcc makes of them. test_walkers.py has what they compute."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
from commands import ROOT, SETUP, run

pytestmark = pytest.mark.codegen
ARCHITECTURES = ["sm_80", "sm_90", "sm_100"]
FLAGS: list[str] = SETUP["CUDA_FLAGS"]
# In PTX, which every CUDA toolkit can print; an access that stands there in asm is one instruction of the GPU, too.
ACCESS = re.compile(r"\b(ld|st)\.global\.(v4\.u32|v2\.u32)")
SHARED = {"sum_kernel": 128 * 16, "squares_kernel": 128 * 8, "total_kernel": 1024 * 8}  # bytes, of partial sums
UPDATE, UPDATE_MOMENTS, APPLY_UPDATE = range(3)  # enum Pass
NVCC: str | None = SETUP["nvcc"]()
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")


@dataclass(frozen=True)
class Streaming:
    """A kernel that goes over elements, as it is called in object code."""

    symbol: str
    states: range
    reads: int  # streams besides the states
    writes: int
    writes_states: bool
    shared: int  # bytes
    crowded: bool = False  # takes the registers of one stream more


def listed_rules() -> list[str]:
    """Those of rules.h."""
    listed = re.search(r"RuleList<(.*?)>;", (ROOT / "csrc/rules.h").read_text(), re.DOTALL)
    assert listed
    return re.split(r",\s+", listed.group(1))


def streaming_kernels() -> list[Streaming]:
    """Of every rule: one kernel, or with a trust ratio two; and each that writes params again with an average of the
    weights."""
    rules = (ROOT / "csrc/rules.h").read_text()
    kernels = [Streaming("squares_kernel", range(1), 1, 0, False, SHARED["squares_kernel"])]
    kernels.append(Streaming("scale_kernel", range(1), 1, 1, False, 0))
    for rule in listed_rules():
        has_trust = rf"struct {rule} {{.*?trust = (\w+);.*?"
        traits = re.search(has_trust + r"signed_states = (\d), min_states = (\d), max_states = (\d);", rules, re.DOTALL)
        assert traits, rule
        states = range(int(traits.group(3)), int(traits.group(4)) + 1)
        squares = int(traits.group(2)) < states[-1]
        passes = [(UPDATE, 2, 1, True, 0)]
        if traits.group(1) == "true":
            passes = [(UPDATE_MOMENTS, 2, 0, True, 128 * 16), (APPLY_UPDATE, 1, 1, False, 0)]
        for number, reads, writes, writes_states, shared in passes:
            for average in (0, 1) if number != UPDATE_MOMENTS else (0,):  # of the weights, which is read and written
                symbol = f"step_kernelILNS_4PassE{number}ENS_{len(rule)}{rule}ELb{average}E"
                crowded = bool(average) and number == UPDATE and squares
                streams = reads + average, writes + average
                kernels.append(Streaming(symbol, states, *streams, writes_states, shared, crowded))
    return kernels


@needs_nvcc
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_kernels_need_no_stack(arch: str, tmp_path: Path) -> None:
    """Without torch's headers; no spills, no stack frame, shared memory for sums alone; and a multiprocessor holds five
    blocks of 128."""
    assert NVCC is not None
    output = ["-cubin", "-o", str(tmp_path / "step.cubin")]
    log = run([NVCC, *FLAGS, f"-arch={arch}", "-Xptxas", "-v", *output, "csrc/cuda/step.cu"])
    assert "warning" not in log, log
    entries = {entry.split("'")[1]: entry for entry in re.split(r"Compiling entry function", log)[1:]}
    shared = {"trust_kernel": 0, **SHARED}
    shared |= {f"prep_kernelINS_{len(rule)}{rule}E": 0 for rule in listed_rules()}
    shared |= {kernel.symbol: kernel.shared for kernel in streaming_kernels()}
    assert len(entries) == len(shared), sorted(entries)
    for kernel, size in shared.items():
        (entry,) = (text for symbol, text in entries.items() if kernel in symbol)
        frame = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", entry)
        registers = re.search(r"Used (\d+) registers", entry)
        assert frame and registers, entry
        print(arch, kernel, "registers:", registers.group(1))
        assert frame.groups() == ("0", "0", "0"), entry
        used = re.search(r"(\d+) bytes smem", entry)
        assert (int(used.group(1)) if used else 0) == size, entry
        threads = 1024 if kernel == "total_kernel" else 5 * 128
        assert int(registers.group(1)) <= 65536 // threads // 8 * 8, entry


@needs_nvcc
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_stream_has_wide_accesses(arch: str, tmp_path: Path) -> None:
    """Kernels take 16 bytes at a time of every stream (8 only of 2-byte dtypes among more than four streams of several
    dtypes) and leave alone those that they have no use for."""
    assert NVCC is not None
    ptx = tmp_path / "step.ptx"
    run([NVCC, *FLAGS, f"-arch={arch}", "-ptx", "-o", str(ptx), "csrc/cuda/step.cu"])
    entries = {part.split("(")[0].strip(): part for part in ptx.read_text().split(".entry")[1:]}
    for kernel in streaming_kernels():
        (text,) = (text for symbol, text in entries.items() if kernel.symbol in symbol)
        found = Counter(match.groups() for match in ACCESS.finditer(text))
        loops = 1 if kernel.symbol == "scale_kernel" else 3  # of float32, of bfloat16, of any dtypes; and of double
        for access, others, states in (("ld", kernel.reads, True), ("st", kernel.writes, kernel.writes_states)):
            least = most = narrow = 0
            for count in kernel.states:
                streams, few = others + states * count, kernel.reads + count + kernel.crowded <= 4
                # Without an average bfloat16 is loaded before its loop and in it.
                ahead = access == "ld" and few and "step_kernel" in kernel.symbol and "ELb0E" in kernel.symbol
                # Double and bfloat16 come in one part, float32 in two, or in one among more streams. Of any dtypes: as
                # float32, and 2-byte dtypes in one part, which nvcc may let share the first of float32. A stream of its
                # own is there of float16 alone.
                of_float32 = 2 if few else 1
                fixed = 1 + (of_float32 + 1 + ahead if loops > 1 else 0)
                of_any = (1, 1) if kernel.symbol == "squares_kernel" else (of_float32, of_float32 + few)
                least += streams * (fixed + of_any[0])
                most += streams * (fixed + of_any[1])
                narrow += streams * (not few)
            assert least <= found[access, "v4.u32"] <= most, (kernel, found)
            assert found[access, "v2.u32"] == narrow, (kernel, found)
        generic = re.search(r"\b(ld|st)\.(u16|f32|f64|v\d)", text)
        assert not generic, f"{kernel.symbol}: a generic access, slower than one to global memory"
