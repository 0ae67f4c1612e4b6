"""The CUDA kernels without a GPU: what nvcc makes of them. test_walkers.py has what they compute."""

import re
from pathlib import Path

import pytest
from commands import SETUP, run

ARCHITECTURES = ["sm_80", "sm_90", "sm_100"]
FLAGS: list[str] = SETUP["CUDA_FLAGS"]
# In PTX, which every CUDA toolkit can print; an access that stands there in asm is one instruction of the GPU, too.
ACCESS = re.compile(r"\b(ld|st)\.global\.(v4\.u32|v2\.u32)")
NVCC: str | None = SETUP["nvcc"]()
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")


@needs_nvcc
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_kernels_need_no_stack(arch: str, tmp_path: Path) -> None:
    """Without torch's headers; no spills, stack frame or shared memory; a multiprocessor holds five blocks of 128."""
    assert NVCC is not None
    output = ["-cubin", "-o", str(tmp_path / "step.cubin")]
    log = run([NVCC, *FLAGS, f"-arch={arch}", "-Xptxas", "-v", *output, "csrc/cuda/step.cu"])
    assert "warning" not in log, log
    entries = re.split(r"Compiling entry function", log)[1:]
    for kernel in ("prep_kernel", "step_kernel"):
        assert any(kernel in entry.splitlines()[0] for entry in entries), log
    for entry in entries:
        frame = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", entry)
        registers = re.search(r"Used (\d+) registers", entry)
        assert frame and registers, entry
        print(arch, entry.split("'")[1], "registers:", registers.group(1))
        assert frame.groups() == ("0", "0", "0"), entry
        assert " smem" not in entry, entry
        assert int(registers.group(1)) <= 65536 // (5 * 128) // 8 * 8, entry


@needs_nvcc
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_stream_has_wide_accesses(arch: str, tmp_path: Path) -> None:
    """Adam's kernel takes 16 bytes at a time of every stream; 8 only of 2-byte dtypes with three states."""
    assert NVCC is not None
    ptx = tmp_path / "step.ptx"
    run([NVCC, *FLAGS, f"-arch={arch}", "-ptx", "-o", str(ptx), "csrc/cuda/step.cu"])
    entries = [part for part in ptx.read_text().split(".entry")[1:] if re.match(r"\s*\w+step_kernel\w+Adam", part)]
    (kernel,) = entries
    found = [match.groups() for match in ACCESS.finditer(kernel)]
    count = {access: found.count(access) for access in set(found)}
    # Two states: float32 in two parts, and nvcc may let 2-byte dtypes share the first. Then three states, then double.
    assert count["ld", "v4.u32"] >= 4 * 2 + 5 + 4 + 5
    assert count["ld", "v2.u32"] == 5
    assert count["st", "v4.u32"] >= 3 * 2 + 4 + 3 + 4
    assert count["st", "v2.u32"] == 4
    assert not re.search(r"\b(ld|st)\.(u16|f32|f64|v\d)", kernel), "a generic access, slower than one to global memory"
