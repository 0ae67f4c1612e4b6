"""Counts the instructions that the compiled GPU kernels execute per element, and their registers.

    python bench/elements.py

writes the section "Per element" of bench/results/instructions.md. The interpreter of tests/ptx executes the PTX of both
backends on tensors of two sizes. The difference of the counts is the cost of the elements, without prep and without the
work that each block does once. It needs no GPU and times nothing.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton
from environment import ROOT, commit
from instructions import machine_code
from loops import loops
from report import markdown
from triton.backends.nvidia.compiler import get_ptxas

sys.path[:0] = [str(ROOT / "tests")]
from ptx.backends import NAMES, register  # noqa: E402
from ptx.kernel import Statement  # noqa: E402
from ptx.launched import LAUNCHES  # noqa: E402
from ptx.machine import Program  # noqa: E402
from ptx.toolchain import ARCH, SETUP, missing  # noqa: E402

import fused_optim  # noqa: E402
from fused_optim.engine.layout import CHUNK  # noqa: E402

HEADING = "## Per element"
SIZES = (16 * CHUNK, 48 * CHUNK)
# Instructions of each in machine code for sm_90 (CUDA 13.0), on the path for operands away from the ends of the range.
EXPANDED = {"div.rn.f32": 10, "sqrt.rn.f32": 10}
PASSES = {
    "E0": "update",
    "E1": "update_moments",
    "E2": "apply_update",
}  # of nvcc's names: enum Pass of csrc/cuda/kernels.cuh

TEXT = """\
`python bench/elements.py`, commit {commit}, Triton {triton}, {nvcc}.

Instructions per element, and registers, of the walks over whole aligned vectors.

- Bytes: the walk reads and writes this many per element.
- Executed: PTX instructions, counted by the interpreter of tests/ptx. A division and a square root count as {expanded}
  each, as in machine code. Moves between registers count as none.
- Machine code: instructions per element of the longest path through the loop over vectors, without the calls for
  divisions and square roots of numbers near the ends of the range. Empty where nvcc's kernel has no loop for these
  dtypes alone.
- Elements: how many a thread processes in one iteration of that loop.
- Registers: those of the machine code for sm_{arch}.
- Blocks: how many blocks of 128 threads the 65,536 registers of a multiprocessor can hold."""


@dataclass(frozen=True)
class Case:
    optimizer: str
    param: torch.dtype = torch.float32
    states: torch.dtype | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        dtypes = str(self.param).removeprefix("torch.") + (", float32 states" if self.states else "")
        return ", ".join([self.optimizer.removeprefix("Fused"), dtypes, *self.options])


BF16 = torch.bfloat16
KINDS: list[tuple[torch.dtype, torch.dtype | None]] = [(torch.float32, None), (BF16, None), (BF16, torch.float32)]
CASES = [
    *(Case("FusedAdamW", *kind) for kind in KINDS),
    Case("FusedAdamW", options={"amsgrad": True}),
    Case("FusedAdamW", BF16, options={"amsgrad": True}),
    Case("FusedAdamW", options={"ema_decay": 0.9}),
    Case("FusedAdamW", BF16, options={"ema_decay": 0.9}),
    Case("FusedAdamW", options={"max_grad_norm": 1.0}),
    Case("FusedAdamW", BF16, options={"max_grad_norm": 1.0}),
    *(Case("FusedSGD", dtype, options={"momentum": 0.9}) for dtype in (torch.float32, BF16)),
    *(Case("FusedQHAdamW", dtype) for dtype in (torch.float32, BF16)),
    *(Case("FusedLAMB", dtype, options={"max_grad_norm": None}) for dtype in (torch.float32, BF16)),
    *(Case("FusedLion", dtype) for dtype in (torch.float32, BF16)),
]


def weight(statement: Statement) -> int:
    if statement.parts[0] == "cvta" or (statement.parts[0] == "mov" and "{" not in statement.text):
        return 0
    return EXPANDED.get(statement.opcode, 1)


def issued(program: Program) -> int:
    """Instructions that all warps of the program have executed so far."""
    return sum(
        warps * sum(weight(step.statement) for step in program.steps[start:stop])
        for (start, stop), warps in program.executed.items()
    )


def executed(case: Case, backend: str, size: int) -> dict[Program, int]:
    """Instructions that the second step executes, by kernel."""
    param = torch.randn(size).to(case.param).requires_grad_()
    build = getattr(fused_optim, case.optimizer)
    optimizer = build([param], backend=backend, state_dtype=case.states, **case.options)
    before: dict[Program, int] = {}
    for _ in range(2):
        param.grad = torch.randn(size).to(case.param)
        before = {program: issued(program) for program in LAUNCHES.programs.values()}
        optimizer.step()
    counts = {program: issued(program) - before.get(program, 0) for program in LAUNCHES.programs.values()}
    return {program: count for program, count in counts.items() if count}


def per_element(case: Case, backend: str) -> dict[Program, float]:
    """Instructions per element, by kernel that walks over elements."""
    small, large = (executed(case, backend, size) for size in SIZES)
    names = ("step_kernel", "squares_kernel")
    return {
        program: 32 * (count - small[program]) / (SIZES[1] - SIZES[0])
        for program, count in large.items()
        if any(name in program.kernel.name for name in names)
    }


@cache
def assembled(ptx: str, by_triton: bool) -> tuple[dict[str, int], dict[str, str]]:
    """Registers and machine code of a module's kernels, each by kernel name."""
    ptxas = get_ptxas(ARCH).path if by_triton else str(Path(SETUP["nvcc"]()).resolve().parent / "ptxas")
    with tempfile.TemporaryDirectory() as folder:
        source, cubin = Path(folder, "module.ptx"), Path(folder, "module.cubin")
        source.write_text(ptx)
        (target,) = re.findall(r"^\.target (\w+)", ptx, re.MULTILINE)
        command = [ptxas, f"-arch={target}", "--fmad=false", "-v", str(source), "-o", str(cubin)]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}\n{done.stdout}")
        found = re.findall(r"entry function '(\w+)'.*?Used (\d+) registers", done.stdout, re.DOTALL)
        code = {part.split()[0]: part for part in machine_code(cubin).split("Function : ")[1:]}
    return {name: int(registers) for name, registers in found}, code


def iteration_of(code: str, case: Case, walk: str, by_triton: bool) -> tuple[float, int] | None:
    """Instructions per element of the loop over whole blocks of vectors, and elements per thread and iteration. None
    where this loop cannot be identified: nvcc's kernels have loops for several dtypes, and the squares convert nothing
    that would tell them apart."""
    streams, dtypes = READ[walk] + STATES_READ[walk] * states_of(case), {case.param}
    if STATES_READ[walk]:
        dtypes.add(case.states or case.param)
    if averages(case, walk):
        streams, dtypes = streams + 1, dtypes | {AVERAGE}
    width = 16 // max(dtype.itemsize for dtype in dtypes)
    found = [loop for loop in loops(code) if loop.wide % streams == 0]
    if not by_triton:
        if len(dtypes) > 1 or walk == "squares":
            return None
        name = str(case.param).removeprefix("torch.")
        least = streams * (2 if name == "float32" and streams <= 4 else 1)
        found = [loop for loop in found if loop.dtypes == {name} and loop.wide == least]
    # Triton's kernels have a loop without a mask and one with a mask. The first is shorter.
    counts = [(loop.instructions, loop.wide // streams * width) for loop in found]
    return min(((instructions / elements, elements) for instructions, elements in counts), default=None)


def row(case: Case, backend: str, program: Program, count: float) -> list[str]:
    name = program.kernel.name
    by_triton = backend.startswith("triton")
    walk = "squares" if "squares" in name else walk_of(name, case, program)
    registers, code = assembled(LAUNCHES.modules[program], by_triton)
    used = registers[name]
    blocks = 65536 // (-(-used // 8) * 8 * 128)
    iteration = iteration_of(code[name], case, walk, by_triton)
    return [
        backend.removesuffix("-ptx"),
        str(case),
        walk,
        str(bytes_of(case, walk)),
        f"{count:.1f}",
        *(("", "") if iteration is None else (f"{iteration[0]:.1f}", str(iteration[1]))),
        str(used),
        str(blocks),
    ]


def walk_of(name: str, case: Case, program: Program) -> str:
    if found := re.search(r"PassE(\d)", name):
        return PASSES[f"E{found[1]}"]
    if case.optimizer != "FusedLAMB":
        return "update"
    return "update_moments" if program.kernel.shared else "apply_update"  # only the first walk adds up


# Streams that a walk reads besides states, and whether it reads these.
READ = {"update": 2, "update_moments": 2, "apply_update": 1, "squares": 1}
STATES_READ = {"update": 1, "update_moments": 1, "apply_update": 1, "squares": 0}
STATES = {"FusedAdamW": 2, "FusedSGD": 1, "FusedQHAdamW": 2, "FusedLAMB": 2, "FusedLion": 1}


AVERAGE = torch.float32  # dtype of averages, of bfloat16 params too


def averages(case: Case, walk: str) -> bool:
    return "ema_decay" in case.options and walk in ("update", "apply_update")


def states_of(case: Case) -> int:
    return STATES[case.optimizer] + ("amsgrad" in case.options)


def bytes_of(case: Case, walk: str) -> int:
    """Bytes that a walk reads and writes per element."""
    param, state = case.param.itemsize, (case.states or case.param).itemsize
    states = states_of(case) * state
    average = 2 * AVERAGE.itemsize if averages(case, walk) else 0
    return {
        "update": 3 * param + 2 * states + average,
        "update_moments": 2 * param + 2 * states,
        "apply_update": 2 * param + states + average,
        "squares": param,
    }[walk]


def section() -> str:
    """The section with its heading."""
    register()
    rows = []
    for case in CASES:
        for backend in NAMES:
            rows += [row(case, backend, program, count) for program, count in per_element(case, backend).items()]
    nvcc = subprocess.run([SETUP["nvcc"](), "--version"], capture_output=True, text=True).stdout
    (version,) = re.findall(r"release [\d.]+", nvcc)
    facts = {"commit": commit(), "triton": triton.__version__, "nvcc": f"nvcc {version}", "arch": ARCH}
    text = TEXT.format(expanded=EXPANDED["div.rn.f32"], **facts)
    header = ["backend", "optimizer", "walk", "bytes", "executed", "machine code", "elements", "registers", "blocks"]
    return f"{HEADING}\n\n{text}\n\n{markdown(header, rows)}\n"


def main() -> int:
    if (reason := missing("gcc", "nvcc")) is not None:
        print(reason, file=sys.stderr)
        return 2
    file = ROOT / "bench/results/instructions.md"
    before = file.read_text().split(HEADING)[0].rstrip() if file.exists() else "# Instructions of the kernels"
    made = section()
    file.write_text(f"{before}\n\n{made}")
    print(made)
    return 0


if __name__ == "__main__":
    sys.exit(main())
