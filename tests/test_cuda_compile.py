"""The code that nvcc generates for the CUDA kernels. No GPU is needed. test_walkers.py tests the results of the
kernels."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
from commands import SETUP, rule_sources, rule_structs, run

pytestmark = pytest.mark.codegen
ARCHITECTURES = ["sm_80", "sm_90", "sm_100"]
FLAGS: list[str] = SETUP["CUDA_FLAGS"]
# Checked in PTX, which every CUDA toolkit can emit. An access written in asm is one instruction on the GPU as well.
ACCESS = re.compile(r"\b(ld|st)\.global\.(v4\.u32|v2\.u32)")
SHARED = {"sum_kernel": 128 * 16, "squares_kernel": 128 * 8, "total_kernel": 1024 * 8}  # bytes of partial sums
UPDATE, UPDATE_MOMENTS, APPLY_UPDATE = range(3)  # enum Pass
NVCC: str | None = SETUP["nvcc"]()
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")


@dataclass(frozen=True)
class Streaming:
    """A kernel that walks over elements. symbol: part of its mangled name."""

    symbol: str
    states: range
    reads: int  # streams other than states
    writes: int
    writes_states: bool
    shared: int  # bytes
    crowded: bool = False  # uses as many registers as with one more stream
    several: bool = False  # adds up several averages of the gradient


def streaming_kernels() -> list[Streaming]:
    """squares_kernel and scale_kernel; for every rule one kernel, or two with a trust ratio; and a variant with an
    average of the weights of each kernel that writes params."""
    rules = rule_sources()
    kernels = [Streaming("squares_kernel", range(1), 1, 0, False, SHARED["squares_kernel"])]
    kernels.append(Streaming("scale_kernel", range(1), 1, 1, False, 0))
    for rule in rule_structs():
        has_trust = rf"struct {rule}(?: : \w+)? {{.*?trust = (\w+)\b.*?"
        traits = re.search(has_trust + r"signed_states = (\d), min_states = (\d), max_states = (\d);", rules, re.DOTALL)
        assert traits, rule
        states = range(int(traits.group(3)), int(traits.group(4)) + 1)
        squares = int(traits.group(2)) < states[-1]
        passes = [(UPDATE, 2, 1, True, 0)]
        if traits.group(1) == "true":
            passes = [(UPDATE_MOMENTS, 2, 0, True, 128 * 16), (APPLY_UPDATE, 1, 1, False, 0)]
        for number, reads, writes, writes_states, shared in passes:
            for average in (0, 1) if number != UPDATE_MOMENTS else (0,):  # an average is read and written
                symbol = f"step_kernelILNS_4PassE{number}ENS_{len(rule)}{rule}ELb{average}E{PLAIN}"
                crowded = bool(average) and number == UPDATE and squares
                several = number != APPLY_UPDATE and int(traits.group(2)) > 1
                streams = reads + average, writes + average
                kernels.append(Streaming(symbol, states, *streams, writes_states, shared, crowded, several))
    return kernels


PLAIN, PACKED = "Lb0E", "Lb1E"  # the last template argument of step_kernel, as symbols have it


@needs_nvcc
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_kernels(arch: str, tmp_path: Path) -> None:
    """One compilation, without torch's headers, gives the assembler's report and the PTX."""
    assert NVCC is not None
    output = ["-cubin", "-o", str(tmp_path / "step.cubin"), "--keep", "--keep-dir", str(tmp_path)]
    log = run([NVCC, *FLAGS, f"-arch={arch}", "-Xptxas", "-v", *output, "csrc/cuda/step.cu"])
    assert "warning" not in log, log
    check_resources(arch, log)
    check_accesses((tmp_path / "step.ptx").read_text())


def check_resources(arch: str, log: str) -> None:
    """No spills, no stack frame, shared memory only for sums. The registers allow five blocks of 128 threads per
    multiprocessor, four with packed formats, two with an average of the weights besides. If several averages of the
    gradient are added up, they allow four and two."""
    entries = {entry.split("'")[1]: entry for entry in re.split(r"Compiling entry function", log)[1:]}
    shared = dict(SHARED)
    shared |= {f"prep_kernelINS_{len(rule)}{rule}E": 0 for rule in rule_structs()}
    twice = {
        re.search(r"PassE2ENS_(\d+[A-Za-z]+)E", kernel.symbol)[1]
        for kernel in streaming_kernels()
        if "PassE2E" in kernel.symbol
    }
    shared |= {f"trust_kernelINS_{rule}E": 0 for rule in twice}
    shared |= {kernel.symbol: kernel.shared for kernel in streaming_kernels()}
    shared |= {
        f"{kernel.symbol.removesuffix(PLAIN)}{PACKED}": kernel.shared
        for kernel in streaming_kernels()
        if kernel.symbol.endswith(PLAIN)
    }
    several = {kernel.symbol.removesuffix(PLAIN) for kernel in streaming_kernels() if kernel.several}
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
        if kernel.endswith(PACKED):
            blocks = 2 if kernel.endswith(f"ELb1E{PACKED}") or kernel.removesuffix(PACKED) in several else 4
        else:
            blocks = 4 if kernel.removesuffix(PLAIN) in several and "PassE0" in kernel else 5
        threads = 1024 if kernel == "total_kernel" else blocks * 128
        assert int(registers.group(1)) <= 65536 // threads // 8 * 8, entry


def check_accesses(ptx: str) -> None:
    """Kernels access every stream in units of 16 bytes, and access no stream that they do not need. With more than four
    streams of several dtypes, 2-byte dtypes are accessed in units of 8 bytes."""
    entries = {part.split("(")[0].strip(): part for part in ptx.split(".entry")[1:]}
    for kernel in streaming_kernels():
        (text,) = (text for symbol, text in entries.items() if kernel.symbol in symbol)
        found = Counter(match.groups() for match in ACCESS.finditer(text))
        loops = 1 if kernel.symbol == "scale_kernel" else 3  # float32, bfloat16, any dtypes; double in addition
        for access, others, states in (("ld", kernel.reads, True), ("st", kernel.writes, kernel.writes_states)):
            least = most = narrow = 0
            for count in kernel.states:
                streams, few = others + states * count, kernel.reads + count + kernel.crowded <= 4
                # Without an average, the bfloat16 loop also loads ahead, before the loop.
                ahead = access == "ld" and few and "step_kernel" in kernel.symbol and "ELb0ELb0E" in kernel.symbol
                # Accesses per stream: one for double and bfloat16, two for float32, or one with more than four streams.
                # The loop for any dtypes has those of float32, and one for 2-byte dtypes, which nvcc may merge with the
                # first of float32. With a single stream only float16 uses this loop.
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
