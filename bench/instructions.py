"""What does a feature cost that is switched off? The instructions of every kernel, here and at another commit.

    python bench/instructions.py --against dc4e120

writes instructions.md and instructions.json. GPU kernels are compiled ahead of time for sm_90 and their machine code is
counted; the CPU kernel executes 4,096 elements, an instruction at a time. No GPU is needed, and nothing is timed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from against import worktree
from environment import ROOT, commit, describe, git
from report import markdown, number
from triton.backends.compiler import GPUTarget

SM = 90
DTYPES = {"float32": (0, 0), "bf16": (1, 1), "bf16, float32 states": (1, 0)}  # codes of param and gradient, of states
FLOAT32 = 0  # of the average
WALKS = ("update", "update_moments", "apply_update")  # enum Pass of csrc/cuda/kernels.cuh
FORMER = {"advance": "update_moments", "move": "apply_update"}  # what the walks were called before
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?!NOP)\S", re.MULTILINE)
CPU = "cpu, executed"

METHOD = """\
GPU: instructions of the machine code for sm_{sm}, all branches and loops counted once, padding not; kernels that differ
may be unrolled differently, so that fewer is not faster. CPU: instructions executed, {isa}, one thread; passes per
4,096 elements, prep per tensor.

Scaling, clipping and skipping are settled in prep, once per tensor; passes over elements multiply by what it leaves,
as they did before there was any of these. An average of the weights and the second walk of a trust ratio are kernels
of their own. Where nothing is asked for, a pass should cost what it cost at {other}. On the CPU the compiler decides
anew how to inline and unroll whenever a source changes, which is worth a few percent either way.

The GPU kernels have more loops than at 0039f90: Triton's kernels one for the vectors after the last whole block, nvcc's
kernels one each for float32 and bfloat16. These counts include all loops. The table "Per element" has what an element
costs."""


class Rule(NamedTuple):
    struct: str  # in csrc/rules/
    name: str
    trust: bool
    states: range


class Kernel(NamedTuple):
    backend: str
    rule: str
    walk: str
    dtypes: str
    feature: str  # what is switched on in it, "" for nothing


Count = tuple[Kernel, float]
Counts = dict[Kernel, float]


def rules(tree: Path) -> list[Rule]:
    pattern = r'struct (\w+) {\s[^}]*?name = "(\w+)";.*?trust = (\w+);.*?min_states = (\d), max_states = (\d);'
    text = "\n".join(file.read_text() for file in sorted((tree / "csrc/rules").glob("*.h")))
    found = re.findall(pattern, text, re.DOTALL)
    return [Rule(struct, name, trust == "true", range(int(a), int(b) + 1)) for struct, name, trust, a, b in found]


def kinds(tree: Path) -> Iterator[tuple[Rule, str, str, tuple[int, ...]]]:
    """Rule, its name with the number of states where it has a choice, dtypes, their codes: param, gradient, states."""
    for rule in rules(tree):
        for states, (dtypes, (param, state)) in itertools.product(rule.states, DTYPES.items()):
            if states or param == state:
                name = rule.name + (f", {states} states" if len(rule.states) > 1 else "")
                yield rule, name, dtypes, (param, param, *[state] * states)


def run(command: list[str], **options: Any) -> str:
    done = subprocess.run(command, capture_output=True, text=True, **options)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
    return done.stdout


def machine_code(cubin: Path) -> str:
    """As NVIDIA's cuobjdump prints it, which comes with Triton, together with the disassembler that it calls."""
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    return run([str(tools / "cuobjdump"), "-sass", str(cubin)], env={"PATH": str(tools)})


def triton_counts(tree: Path, folder: Path) -> Iterator[Count]:
    sys.path.insert(0, str(tree))
    from triton_kernels import launch  # type: ignore[import-not-found]  # that of the tree

    def count(variant: Any) -> int:
        cubin = folder / "kernel.cubin"
        cubin.write_bytes(variant.compile_ahead(GPUTarget("cuda", SM, 32)).asm["cubin"])
        return len(INSTRUCTION.findall(machine_code(cubin)))

    for clips in (False, True):
        yield Kernel("triton", "", "prep", "", "clipping" * clips), count(launch.prep_variant(None, clips, False, 0))
    for rule, name, dtypes, kind in kinds(tree):
        walks = {"update_moments": launch.step_variant, "apply_update": launch.apply_update_variant}
        for walk, variant in walks.items() if rule.trust else [("update", launch.step_variant)]:
            yield Kernel("triton", name, walk, dtypes, ""), count(variant(rule.name, (kind,), False, False))
            if walk != "update_moments":
                averaging = variant(rule.name, ((*kind, FLOAT32),), True, False)
                yield Kernel("triton", name, walk, dtypes, "average"), count(averaging)


def cuda_counts(tree: Path, folder: Path) -> Iterator[Count]:
    """One kernel serves all dtypes and numbers of states."""
    setup = runpy.run_path(str(tree / "setup.py"), run_name="not main")
    compiler = setup["nvcc"]()
    if compiler is None:
        print("The CUDA kernels are left out: there is no nvcc here.", file=sys.stderr)
        return
    cubin = folder / "step.cubin"
    run([compiler, *setup["CUDA_FLAGS"], f"-arch=sm_{SM}", "-cubin", "-o", str(cubin), str(tree / "csrc/cuda/step.cu")])
    names = {rule.struct: rule.name for rule in rules(tree)}
    for function in machine_code(cubin).split("Function : ")[1:]:
        symbol, count = function.split()[0], len(INSTRUCTION.findall(function))
        if step := re.search(
            rf"step_kernelILNS_4PassE(\d)ENS_\d+({'|'.join(names)})E(?:Lb(\d)E)?(?:Lb(\d)E)?E", symbol
        ):
            if step[4] == "1":  # of packed formats
                continue
            yield Kernel("cuda", names[step[2]], WALKS[int(step[1])], "", "average" * (step[3] == "1")), count
        elif other := re.search(r"\d(prep|squares)_kernel", symbol):
            yield Kernel("cuda", "", other[1], "", ""), count


def cpu_counts(tree: Path, folder: Path) -> Iterator[Count]:
    setup = runpy.run_path(str(tree / "setup.py"), run_name="not main")
    walker, program = instruction_set(), folder / "instructions"
    flags = ["-std=c++17", "-O3", "-fopenmp", *setup["KERNEL_FLAGS"], *setup["INSTRUCTION_SETS"][walker]]
    defined = [f"-DFUSED_ISA={walker}", f"-DWALKER={walker}"]
    # Not what Python sees of them.
    sources = [str(file) for file in (tree / "csrc/cpu").glob("*.cpp") if file.stem != "bindings"]
    sources.append(str(tree / "bench/instructions.cpp"))
    run([os.environ.get("CXX", "g++"), *flags, *defined, f"-I{tree / 'csrc'}", *sources, "-o", str(program)])

    def executed(rule: str, *numbers: int) -> list[int]:
        """Of step and of apply_update."""
        output = run(
            [str(program), rule, *(f"{number:d}" for number in numbers)], env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
        return [int(count) for count in output.split()]

    for clips in (False, True):
        few, many = (executed("adam", tensors, 0, False, clips, 0, 0, 0, 0)[0] for tensors in (10, 110))
        yield Kernel(CPU, "", "prep", "", "clipping" * clips), (many - few) / 100
    for rule, name, dtypes, kind in kinds(tree):
        for average in (False, True):
            one, two = (executed(rule.name, 1, chunks, average, False, *kind) for chunks in (1, 2))
            for walk, first, second in zip(WALKS[1:] if rule.trust else WALKS[:1], one, two, strict=False):
                if not (average and walk == "update_moments"):
                    yield Kernel(CPU, name, walk, dtypes, "average" * average), second - first


def instruction_set() -> str:
    return "avx2" if "avx2" in Path("/proc/cpuinfo").read_text() else "baseline"


def collect(tree: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for counts in (triton_counts, cuda_counts, cpu_counts):
            for kernel, count in counts(tree, Path(folder)):
                print(json.dumps([*kernel, count]), flush=True)


def counts_of(tree: Path) -> Counts:
    """Of that tree's sources, by that tree's own script: each knows the layout of its own tables."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, str(tree / "bench/instructions.py"), "--collect", str(tree)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    kernels = {Kernel(*kernel): count for *kernel, count in lines}
    return {kernel._replace(walk=FORMER.get(kernel.walk, kernel.walk)): count for kernel, count in kernels.items()}


def counts_at(name: str) -> Counts:
    with worktree(name) as tree:
        return counts_of(tree)


def table(here: Counts, there: Counts, name: str) -> str:
    """A row per kernel in which nothing is switched on, a column per feature that may be."""
    features = list(dict.fromkeys(kernel.feature for kernel in here if kernel.feature))
    rows = []
    for kernel, count in here.items():
        if not kernel.feature:
            change = f"{count - there[kernel]:+,g}" if kernel in there else ""
            others = [number(here.get(kernel._replace(feature=feature))) for feature in features]
            rows.append([*kernel[:-1], number(there.get(kernel)), number(count), change, *others])
    header = ["backend", "rule", "pass", "dtypes", name, "here", "change", *(f"with {feature}" for feature in features)]
    return markdown(header, rows)


def verdicts(here: Counts, there: Counts, name: str) -> str:
    """What became of the passes of each backend in which nothing is switched on."""
    lines = []
    for backend in dict.fromkeys(kernel.backend for kernel in here):
        passes = [k for k in here if k.backend == backend and k.walk in WALKS and not k.feature and k in there]
        changes = [here[kernel] / there[kernel] - 1 for kernel in passes]
        text = f"- {backend}: {changes.count(0)} of {len(changes)} passes have as many instructions as at {name}"
        if any(changes):
            mean = sum(changes) / len(changes)
            text += f"; changes from {min(changes):+.1%} to {max(changes):+.1%}, {mean:+.1%} on average"
        lines.append(text)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", metavar="COMMIT", default="dc4e120", help="has a bench/instructions.py of its own")
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results", help="folder for the two files")
    parser.add_argument("--collect", type=Path, metavar="TREE", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.collect:
        collect(options.collect.resolve())
        return
    name = git("rev-parse", "--short", options.against) or parser.error(f"git knows no commit {options.against} here")
    here, there = counts_of(ROOT), counts_at(name)
    about = describe(torch.device("cpu"))
    facts = f"`{about['command']}`, commit {commit()}, {about['date']}, Triton {about['triton']}"
    method = METHOD.format(sm=SM, isa=instruction_set(), other=name)
    verdict = verdicts(here, there, name)
    parts = ["# Instructions of the kernels", facts, method, verdict, table(here, there, name)]
    from elements import section  # it needs machine_code

    parts.append(section())
    (options.out / "instructions.md").write_text("\n\n".join(parts))
    counts = {
        title: [[*kernel, count] for kernel, count in of.items()] for title, of in (("here", here), (name, there))
    }
    content = {"about": about, "columns": [*Kernel._fields, "instructions"], **counts}
    (options.out / "instructions.json").write_text(json.dumps(content) + "\n")
    print(verdict)


if __name__ == "__main__":
    main()
