"""What does the host pay per tensor? The time of one step over T tensors of one element, fitted as a + b T.

    python bench/host.py --json host.json
    python bench/host.py --looks --tensors 148,2000    the looks before a step side by side, in warm and in cold caches

On a GPU the time is until step() returns, the device having been idle before; on a CPU it is the whole step, in which
one element per tensor leaves nothing but the overhead.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import random
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from clocks import CpuClock, Step
from environment import describe
from family import OPTIMIZERS
from measure import host_times, progress, reason_of
from peers import PEERS
from report import markdown, number
from workload import Config, Workload

import fused_optim
from fused_optim.engine import changes as watch
from fused_optim.engine import modules

TENSORS = (1, 10, 148, 500, 2000, 20000)
PEER_NAMES = ["torch-for", "torch-foreach", "torch-fused", "foreach", "ours"]


def measure(tensors: int, optimizer: str, names: list[str], device: torch.device, rounds: int) -> dict[str, float]:
    """Median µs per step of each peer, which take turns in each round."""
    workload = Workload(Config("2000x1000", hot=True, optimizer=optimizer), device, shapes=[(1,)] * tensors)
    steps: dict[str, Step] = {}
    for name in names:
        progress(f"{tensors:,} tensors: preparing {name}")
        if (reason := PEERS[name].why_not(workload)) is not None:
            progress(f"{name} left out: {reason}", done=True)
            continue
        try:
            step = PEERS[name].build(workload.groups(), workload.config, device).step
            for _ in range(3):
                step()
        except Exception as error:  # the others are worth timing all the same
            progress(f"{name} left out: {reason_of(error)}", done=True)
            continue
        steps[name] = step
    return host_times(steps, f"{tensors:,} tensors", rounds)


LOOKS: dict[str, Callable[[], Any]] = {
    "with torch's headers": lambda: modules.load("_poll_aten"),
    "through DLPack": lambda: modules.load("_poll"),
    "in Python": lambda: watch,
}


def looking(tensors: int, module: Any) -> Any:
    """What looks at the params, gradients and AdamW's states of so many tensors of 1,000 elements, by that module."""
    params = [torch.nn.Parameter(torch.randn(1000)) for _ in range(tensors)]
    for param in params:
        param.grad = torch.randn(1000)
    optimizer = fused_optim.FusedAdamW(params)
    with mock.patch.object(modules, "poll", lambda: "Python's own" if module is watch else module):
        optimizer.step()
    assert type(optimizer._detector) is module.ChangeDetector
    return optimizer._detector


def measure_looks(tensors: int, cold: bool, rounds: int) -> dict[str, tuple[float, float, float]]:
    """Of each look: median and least µs, and how many times the first one's in the same round; together with what comes
    after the step (the gradients are let go, and version counters move on)."""
    found = {name: module() for name, module in LOOKS.items()}
    watches = {name: looking(tensors, module) for name, module in found.items() if not isinstance(module, str)}
    clock, samples = CpuClock(torch.device("cpu")), dict[str, list[float]]((name, []) for name in watches)

    def look_of(watched: Any) -> Callable[[], None]:
        def look() -> None:
            assert watched.poll() == 0
            watched.done()

        return look

    steps = {name: look_of(watched) for name, watched in watches.items()}
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for name in random.sample(list(steps), len(steps)):
                steps[name]()
                samples[name].append(1e3 * clock.time(steps[name], hot=not cold)["ms"])
    finally:
        gc.enable()
    first = next(iter(samples.values()))
    ratios = {name: [b / a for a, b in zip(first, times, strict=True)] for name, times in samples.items()}
    return {name: (statistics.median(x), min(x), statistics.median(ratios[name])) for name, x in samples.items()}


def print_looks(counts: list[int], rounds: int) -> None:
    rows = []
    for count, cold in itertools.product(counts, (False, True)):
        for name, (median, least, ratio) in measure_looks(count, cold, rounds).items():
            caches = "cold" if cold else "warm"
            rows.append([f"{count:,}", caches, name, number(median), number(least), f"{ratio:.2f}"])
    header = ["tensors", "caches", "look", "median µs", "least µs", "times the first"]
    print("A look before a step of AdamW, and what comes after the step:\n\n" + markdown(header, rows))


def fit(medians: dict[int, float]) -> tuple[float, float]:
    """a (µs per step) and b (µs per tensor) of the line with the least squares of relative errors."""
    tensors, times = np.array(list(medians), dtype=float), np.array(list(medians.values()))
    design = np.stack([np.ones_like(tensors), tensors], axis=1) / times[:, None]
    a, b = np.linalg.lstsq(design, np.ones_like(times), rcond=None)[0]
    return float(a), float(b)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--optimizer", default="adamw", choices=OPTIMIZERS)
    parser.add_argument("--peers", help=", ".join(PEERS))
    parser.add_argument("--tensors", default=",".join(map(str, TENSORS)), help="how many, comma-separated")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--looks", action="store_true", help="time the looks alone, by all that are built here")
    options = parser.parse_args()
    if options.looks:
        print_looks([int(count) for count in options.tensors.split(",")], options.rounds)
        return 0
    usual = [name for name in PEER_NAMES if options.optimizer in PEERS[name].builds]
    names = options.peers.split(",") if options.peers else usual
    if unknown := [name for name in names if name not in PEERS]:
        parser.error(f"{', '.join(unknown)}: not among {', '.join(PEERS)}")
    if options.device == "cuda" and not torch.cuda.is_available():
        print("There is no GPU that torch can use on this machine, so nothing was measured.", file=sys.stderr)
        return 2

    counts = [int(count) for count in options.tensors.split(",")]
    by_count = {
        count: measure(count, options.optimizer, names, torch.device(options.device), options.rounds)
        for count in counts
    }
    everywhere = [name for name in names if all(name in by_count[count] for count in counts)]
    medians = {name: {count: by_count[count][name] for count in counts} for name in everywhere}
    fits = {name: fit(values) for name, values in medians.items()} if len(counts) > 1 else {}
    header = ["peer", *(f"T = {count:,}" for count in counts), *(["µs + µs per tensor"] if fits else [])]
    rows = [
        [name, *(number(value) for value in values.values()), *([f"{a:.1f} + {b:.3f} T"] if fits else [])]
        for (name, values), (a, b) in ((item, fits.get(item[0], (0.0, 0.0))) for item in medians.items())
    ]
    print("Median µs per step over tensors of one element each:\n\n" + markdown(header, rows))
    if options.json:
        content = {"about": describe(torch.device(options.device)), "rounds": options.rounds, "median_us": medians}
        content["fit_us"] = {name: {"per_step": a, "per_tensor": b} for name, (a, b) in fits.items()}
        options.json.write_text(json.dumps(content, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
