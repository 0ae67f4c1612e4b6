"""What a step should cost on an H100, before one has run it: the tables of docs/gpu-model.md.

    python bench/model.py            prints them
    python bench/model.py --host     and the host's time of this machine, through Triton's launcher over a stand-in

Instructions and registers are those of bench/results/instructions.md; docs/gpu-model.md says what is assumed.
"""

from __future__ import annotations

import argparse
import math
import re
import statistics
import sys
import time
from dataclasses import dataclass
from typing import Any

import torch
from environment import ROOT
from report import markdown
from shapes import CASES, elements

from fused_optim.engine.layout import CHUNK, SHARE

sys.path[:0] = [str(ROOT / "tests")]

MULTIPROCESSORS, SCHEDULERS, CLOCK = 132, 4, 1.755e9  # of an H100 SXM
BANDWIDTH = 3.0e12  # bytes per second that a copy reaches, of 3.35e12
LATENCY = 0.8e-6  # of one access to memory under load
LAUNCH = 3e-6  # from the end of one kernel to the first work of the next
FRONT = 2 * LATENCY  # of a block before its elements: its entry, then its row
THREADS = 128  # of a block
ISSUED = MULTIPROCESSORS * SCHEDULERS * 32 * CLOCK  # instructions of threads per second


@dataclass(frozen=True)
class Walk:
    backend: str
    optimizer: str
    name: str
    bytes: int
    instructions: float
    width: int  # elements per thread and iteration of the loop
    blocks: int

    @property
    def only_bfloat16(self) -> bool:
        return "bfloat16" in self.optimizer and not ("states" in self.optimizer or "ema_decay" in self.optimizer)

    @property
    def loads_ahead(self) -> bool:
        """Whether the loads of an iteration are issued before the arithmetic of the iteration before it."""
        four = "amsgrad" not in self.optimizer and self.name != "squares"
        return self.backend == "cuda" and self.only_bfloat16 and four


def walks() -> list[Walk]:
    """From the table in instructions.md: instructions of machine code if they are known, else of PTX."""
    text = (ROOT / "bench/results/instructions.md").read_text().split("## Per element")[1]
    found = []
    for line in re.findall(r"^\| (?:triton|cuda) .*$", text, re.MULTILINE):
        backend, optimizer, name, size, executed, machine, width, _, blocks = (
            cell.strip() for cell in line.strip("|").split("|")
        )
        found.append(
            Walk(backend, optimizer, name, int(size), float(machine or executed), int(width or 8), int(blocks))
        )
    return found


def iterations(walk: Walk, size: int) -> int:
    """Of a block with so many elements: over vectors, and one over the elements after the last vector."""
    vectors, rest = divmod(size, walk.width)
    return math.ceil(vectors / THREADS) + (rest > 0)


def seconds(walk: Walk, shapes: list[tuple[int, ...]]) -> tuple[float, float, float]:
    """Of one kernel: by memory, by instructions, by the time that each of its blocks takes."""
    count = elements(shapes)
    sizes = [math.prod(shape) for shape in shapes]
    chunks = sum(math.ceil(size / CHUNK) for size in sizes)
    resident = min(MULTIPROCESSORS * walk.blocks, max(chunks, 1))
    memory, instructions = count * walk.bytes / BANDWIDTH, count * walk.instructions / ISSUED
    # Warps of several blocks share a scheduler: a warp gets the slots that the others leave.
    free = max(0.2, 1 - instructions / max(memory, instructions))
    arithmetic = walk.width * walk.instructions / CLOCK / free
    first = LATENCY + arithmetic
    later = max(LATENCY, arithmetic) if walk.loads_ahead else first

    def block(size: int) -> float:
        return FRONT + first + (iterations(walk, size) - 1) * later if size else 0.0

    total = sum(size // CHUNK * block(CHUNK) + block(size % CHUNK) for size in sizes)
    return memory, instructions, total / resident


def total_seconds(shapes: list[tuple[int, ...]]) -> float:
    """Blocks of 1,024 threads add up a share each of the sums of chunks, then of shares: 4 loads per thread, all
    in flight, and 10 steps that halve the number of sums. With the launches."""
    numbers, launches = sum(math.ceil(math.prod(shape) / CHUNK) for shape in shapes), 1
    while numbers > SHARE:
        numbers, launches = math.ceil(numbers / SHARE), launches + 1
    return launches * (LAUNCH + LATENCY + 10 * 0.05e-6)


def predicted(backend: str, optimizer: str, case: str) -> list[str]:
    shapes = CASES[case]()
    chosen = [walk for walk in walks() if (walk.backend, walk.optimizer) == (backend, optimizer)]
    device = bytes_moved = 0.0
    bounds, margins = [], []
    for walk in chosen:
        parts = seconds(walk, shapes)
        margins.append(parts[0] / max(parts[1:]))
        device += max(parts) + LAUNCH
        bytes_moved += elements(shapes) * walk.bytes
        bounds.append(("memory", "instructions", "blocks")[parts.index(max(parts))])
    device += LAUNCH  # prep
    names = [walk.name for walk in chosen]
    if "squares" in names:
        device += total_seconds(shapes)
    if "update_moments" in names:  # the sums of each tensor, and the ratios
        device += 2 * LAUNCH + 2 * LATENCY * math.ceil(len(shapes) / (MULTIPROCESSORS * 16))
    floor = bytes_moved / BANDWIDTH + LAUNCH
    issue = sum(elements(shapes) * walk.instructions for walk in chosen) / ISSUED
    return [
        case,
        optimizer,
        backend,
        f"{1e3 * device:.3g}",
        f"{floor / device:.0%}",
        f"{issue / device:.0%}",
        f"{min(margins):.2f}",
        " and ".join(dict.fromkeys(bounds)),
    ]


PREDICTED = [
    ("one-tensor-100m", ["AdamW, float32", "AdamW, bfloat16"]),
    (
        "gpt2-124m",
        [
            "AdamW, float32",
            "AdamW, bfloat16",
            "AdamW, bfloat16, float32 states",
            "AdamW, float32, amsgrad",
            "AdamW, float32, ema_decay",
            "AdamW, float32, max_grad_norm",
            "AdamW, bfloat16, max_grad_norm",
            "SGD, float32, momentum",
            "SGD, bfloat16, momentum",
            "QHAdamW, float32",
            "QHAdamW, bfloat16",
            "LAMB, float32, max_grad_norm",
            "LAMB, bfloat16, max_grad_norm",
            "Lion, float32",
            "Lion, bfloat16",
        ],
    ),
    *((case, ["AdamW, float32", "AdamW, bfloat16"]) for case in ("vit-l", "llama-1b", "llama-8b-shard")),
    *((case, ["AdamW, float32"]) for case in ("resnet50", "2000x1000", "1000x1024", "10000x64", "465x1000")),
]


def host_times() -> list[list[str]]:
    """µs of step() until it returns, with Triton's launcher over a driver that does nothing."""
    from ptx.backends import stand_in_driver, use_stand_in_driver

    from fused_optim import FusedAdamW, backends

    use_stand_in_driver()
    stand_in_driver().set_launch(None)
    facts = {"name": "host", "why_not": staticmethod(lambda device: None)}
    backends.BACKENDS["host"] = type("Host", (backends.BACKENDS["triton"],), facts)
    host: Any = "host"  # which is none of the library's own
    rows = []
    for tensors in (1, 148, 2000):
        params = [torch.zeros(1, requires_grad=True) for _ in range(tensors)]
        for param in params:
            param.grad = torch.ones(1)
        row = [f"{tensors:,}"]
        for max_grad_norm in (None, 1.0):
            optimizer = FusedAdamW(params, backend=host, max_grad_norm=max_grad_norm)
            times = []
            for _ in range(300):
                begin = time.perf_counter()
                optimizer.step()
                times.append(1e6 * (time.perf_counter() - begin))
            row += [f"{statistics.median(times[50:]):.1f}", f"{min(times):.1f}"]
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", action="store_true")
    options = parser.parse_args()
    header = ["case", "step", "backend", "ms", "of copy", "of issue", "margin", "bound by"]
    rows = [
        predicted(backend, optimizer, case)
        for case, optimizers in PREDICTED
        for optimizer in optimizers
        for backend in ("triton", "cuda")
    ]
    print(markdown(header, rows))
    if options.host:
        print("\n" + markdown(["tensors", "step µs", "least", "with clipping µs", "least"], host_times()))


if __name__ == "__main__":
    main()
