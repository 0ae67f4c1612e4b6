"""Measures steps of FusedMuon against torch.optim.Muon, and of both with AdamW for the params that are not matrices.

    python bench/muon.py          # into bench/results/<machine>/muon.md and muon.json

The optimizers of a workload take turns in random order, round after round. The params of two steps must agree,
within the rounding of the iteration. The last column is the share of our step that is left if the Newton-Schulz
iteration does nothing: both passes over memory, the division by the norm, Python.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from environment import ROOT, describe, device_name, folder_name
from report import markdown
from torch import Tensor
from torch.nn import Parameter

sys.path.append(str(ROOT))

from fused_optim import FusedMuon
from fused_optim.engine import orthogonal

Shapes = Sequence[tuple[int, ...]]
LR = 0.02
BLOCK: Shapes = [(768, 256), (256, 256), (1024, 256), (256, 1024)]  # attention and MLP of a GPT of width 256
VECTORS: Shapes = [(256,)] * 4 + [(768,), (1024,)]
WORKLOADS: dict[str, tuple[Shapes, Shapes]] = {
    "400 matrices of 32 x 32": ([(32, 32)] * 400, []),
    "200 matrices of 64 x 64": ([(64, 64)] * 200, []),
    "100 matrices of 128 x 128": ([(128, 128)] * 100, []),
    "60 matrices of 256 x 256": ([(256, 256)] * 60, []),
    "8 matrices of 512 x 2048": ([(512, 2048)] * 8, []),
    "GPT of 6 layers, mixed": ([*BLOCK] * 6, [(8192, 256), (512, 256), *([*VECTORS] * 6)]),
    "MLP of 64 layers of 64, mixed": ([(64, 64)] * 64, [(64,)] * 64 + [(1000, 64)]),
}


class Both:
    """torch.optim.Muon, and torch's fused AdamW for the other params."""

    def __init__(self, matrices: list[Tensor], others: list[Tensor]) -> None:
        self.parts: list[Any] = [torch.optim.Muon(matrices, lr=LR)]
        if others:
            self.parts.append(torch.optim.AdamW(others, lr=1e-3, fused=True))

    def step(self) -> None:
        for part in self.parts:
            part.step()


def ours(matrices: list[Tensor], others: list[Tensor]) -> FusedMuon:
    return FusedMuon([{"params": matrices}, *([{"params": others, "use_muon": False}] if others else [])], lr=LR)


def make(workload: str, dtype: torch.dtype, build: Callable[..., Any]) -> tuple[Any, list[Tensor]]:
    """An optimizer after two steps, and its params."""
    torch.manual_seed(0)
    parts = [[Parameter(torch.randn(shape).to(dtype)) for shape in shapes] for shapes in WORKLOADS[workload]]
    for p in (p for part in parts for p in part):
        p.grad = torch.randn_like(p)
    optimizer = build(*parts)
    for _ in range(2):
        optimizer.step()
    return optimizer, [p for part in parts for p in part]


def seconds_of(step: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    step()
    return time.perf_counter() - begin


def without_iteration(optimizer: FusedMuon) -> float:
    whole = orthogonal.newton_schulz
    orthogonal.newton_schulz = lambda x, settings, scale=1.0: x
    try:
        return seconds_of(optimizer.step)
    finally:
        orthogonal.newton_schulz = whole


def measure(workload: str, dtype: torch.dtype, limit: float) -> dict[str, list[float]]:
    """Seconds of steps, by round: "ours", "torch" and "rest", our step without the iteration."""
    theirs, other = make(workload, dtype, Both)
    mine, params = make(workload, dtype, ours)
    for p, q in zip(params, other, strict=True) if dtype == torch.float32 else ():  # torch rounds bfloat16 params twice
        bound = 0.05 * 2 * LR * max(1.0, p.shape[0] / p.shape[-1]) ** 0.5 if p.dim() == 2 else 1e-4
        torch.testing.assert_close(p, q, rtol=1e-4, atol=bound)
    rest, _ = make(workload, dtype, ours)
    steps = {
        "ours": lambda: seconds_of(mine.step),
        "torch": lambda: seconds_of(theirs.step),
        "rest": lambda: without_iteration(rest),
    }
    found: dict[str, list[float]] = {name: [] for name in steps}
    begin = time.perf_counter()
    while len(found["ours"]) < 5 or time.perf_counter() - begin < limit:
        for name in random.sample(list(steps), len(steps)):
            found[name].append(steps[name]())
    return found


def row_of(workload: str, dtype: torch.dtype, found: dict[str, list[float]]) -> list[str]:
    mine, theirs, rest = found["ours"], found["torch"], found["rest"]
    ratios = [b / a for a, b in zip(mine, theirs, strict=True)]
    return [
        workload,
        str(dtype).removeprefix("torch."),
        f"{1e3 * statistics.median(mine):.1f}",
        f"{1e3 * min(mine):.1f}",
        f"{1e3 * statistics.median(theirs):.1f}",
        f"{1e3 * min(theirs):.1f}",
        f"{statistics.median(ratios):.2f}",
        f"{min(theirs) / min(mine):.2f}",
        f"{100 * min(rest) / min(mine):.1f} %",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seconds", type=float, default=6.0, help="for each workload and dtype")
    parser.add_argument("--only", default="", help="workloads whose names contain this")
    parser.add_argument("--dry", action="store_true", help="write no files")
    arguments = parser.parse_args()
    device, rows, results = torch.device("cpu"), [], {}
    for workload in (name for name in WORKLOADS if arguments.only in name):
        for dtype in (torch.float32, torch.bfloat16):
            found = measure(workload, dtype, arguments.seconds)
            results[f"{workload}, {dtype}"] = found
            rows.append(row_of(workload, dtype, found))
            print("  ".join(rows[-1]), flush=True)
    header = ["workload", "dtype", "ours ms", "min", "torch ms", "min", "x torch", "x torch (min)", "not iteration"]
    text = (
        f"# Muon\n\n{device_name(device)}, {torch.get_num_threads()} threads. Milliseconds of a step, medians and "
        'minima. "x torch" is the median over the rounds of the ratio within a round, then the ratio of the minima. '
        "torch is torch.optim.Muon, and for mixed params also AdamW(fused=True).\n\n" + markdown(header, rows) + "\n"
    )
    if not arguments.dry:
        folder = ROOT / "bench" / "results" / folder_name(device)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "muon.md").write_text(text)
        (folder / "muon.json").write_text(json.dumps({"environment": describe(device), "seconds": results}, indent=1))


if __name__ == "__main__":
    main()
