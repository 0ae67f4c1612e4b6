"""Measures the host overhead per tensor: the time of one step over T tensors of one element, fitted as a + b T.

    python bench/host.py --json host.json
    python bench/host.py --poll --tensors 148,2000     only the change detectors, in warm and in cold caches

On a GPU the time is until step() returns, on an idle device. On a CPU it is the whole step, which is nothing but
overhead at one element per tensor.
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
from fused_optim.engine import changes, modules

TENSORS = (1, 10, 148, 500, 2000, 20000)
PEER_NAMES = ["torch-for", "torch-foreach", "torch-fused", "foreach", "ours"]


def measure(tensors: int, optimizer: str, names: list[str], device: torch.device, rounds: int) -> dict[str, float]:
    """Median µs per step of each peer. The peers take turns in each round."""
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
        except Exception as error:  # the other peers are still timed
            progress(f"{name} left out: {reason_of(error)}", done=True)
            continue
        steps[name] = step
    return host_times(steps, f"{tensors:,} tensors", rounds)


DETECTORS: dict[str, Callable[[], Any]] = {
    "with torch's headers": lambda: modules.load("_poll_aten"),
    "through DLPack": lambda: modules.load("_poll"),
    "in Python": lambda: changes,
}


def detector_of(tensors: int, module: Any) -> Any:
    """The change detector of a module, over AdamW with `tensors` params of 1,000 elements, after its first step."""
    params = [torch.nn.Parameter(torch.randn(1000)) for _ in range(tensors)]
    for param in params:
        param.grad = torch.randn(1000)
    optimizer = fused_optim.FusedAdamW(params)
    with mock.patch.object(modules, "poll", lambda: "not used here" if module is changes else module):
        optimizer.step()
    assert type(optimizer._detector) is module.ChangeDetector
    return optimizer._detector


def measure_polls(tensors: int, cold: bool, rounds: int) -> dict[str, tuple[float, float, float]]:
    """By change detector: median and minimum µs, and the median over rounds of the ratio to the first detector.

    A time covers poll() before the step and done() after it, which releases gradients and advances version counters.
    """
    found = {name: module() for name, module in DETECTORS.items()}
    detectors = {name: detector_of(tensors, module) for name, module in found.items() if not isinstance(module, str)}
    clock, samples = CpuClock(torch.device("cpu")), dict[str, list[float]]((name, []) for name in detectors)

    def poll_of(detector: Any) -> Callable[[], None]:
        def poll() -> None:
            assert detector.poll() == 0
            detector.done()

        return poll

    steps = {name: poll_of(detector) for name, detector in detectors.items()}
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


def print_polls(counts: list[int], rounds: int) -> None:
    rows = []
    for count, cold in itertools.product(counts, (False, True)):
        for name, (median, least, ratio) in measure_polls(count, cold, rounds).items():
            caches = "cold" if cold else "warm"
            rows.append([f"{count:,}", caches, name, number(median), number(least), f"{ratio:.2f}"])
    header = ["tensors", "caches", "change detector", "median µs", "min µs", "ratio to the first"]
    print("Change detection of one AdamW step, poll() and done() together:\n\n" + markdown(header, rows))


def fit(medians: dict[int, float]) -> tuple[float, float]:
    """a (µs per step) and b (µs per tensor) of the line that fits by least squares of the relative errors."""
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
    parser.add_argument("--poll", action="store_true", help="time only the change detectors, all that are built here")
    options = parser.parse_args()
    if options.poll:
        print_polls([int(count) for count in options.tensors.split(",")], options.rounds)
        return 0
    usual = [name for name in PEER_NAMES if options.optimizer in PEERS[name].builds]
    names = options.peers.split(",") if options.peers else usual
    if unknown := [name for name in names if name not in PEERS]:
        parser.error(f"--peers must name some of {', '.join(PEERS)}, but got {', '.join(unknown)}")
    if options.device == "cuda" and not torch.cuda.is_available():
        print("Nothing was measured: torch finds no GPU on this machine.", file=sys.stderr)
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
    print("Median µs per step over T tensors of one element:\n\n" + markdown(header, rows))
    if options.json:
        content = {"about": describe(torch.device(options.device)), "rounds": options.rounds, "median_us": medians}
        content["fit_us"] = {name: {"per_step": a, "per_tensor": b} for name, (a, b) in fits.items()}
        options.json.write_text(json.dumps(content, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
