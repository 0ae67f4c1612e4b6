"""Measures one case: checks every peer's numbers, then times them in turn, A B A B, in one process."""

from __future__ import annotations

import gc
import math
import os
import random
import statistics
import sys
import time
from dataclasses import asdict, dataclass, field, fields
from typing import Any, TypeVar

import torch
from clocks import CpuClock, CudaClock, Step, capture, crowd, fastest, floor_steps, trim
from family import BASELINES
from peers import PEERS, Peer, backend_of
from shapes import CASES, elements
from workload import Config, Workload, check

FLOOR = "floor"
FLOORS = 3  # ways of going over memory that take turns with the peers; the fastest is the floor
Key = TypeVar("Key")


def progress(text: str, done: bool = False) -> None:
    """One line on stderr that overwrites itself on a terminal; only finished lines elsewhere."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="\n" if done else "", file=sys.stderr, flush=True)
    elif done:
        print(text, file=sys.stderr, flush=True)


@dataclass
class Timed:
    """One peer in one case. samples: lists of equal length, one value per round, keyed as clocks.Times."""

    name: str
    backend: str | None = None
    error: float | None = None  # as a share of the tolerance
    first_step_s: float | None = None  # the very first step(): state, tables, compilation
    host_us: float | None = None
    samples: dict[str, list[float]] = field(default_factory=dict)

    def add(self, times: dict[str, float]) -> None:
        for key, value in times.items():
            self.samples.setdefault(key, []).append(value)

    def median(self, key: str = "ms") -> float | None:
        return statistics.median(self.samples[key]) if self.samples.get(key) else None

    def quartiles(self) -> tuple[float, float]:
        first, _, third = statistics.quantiles(self.samples["ms"], n=4, method="inclusive")
        return first, third

    def mean(self) -> float | None:
        return statistics.fmean(self.samples["ms"]) if self.samples else None

    def best(self) -> float | None:
        return min(self.samples["ms"]) if self.samples else None

    def speed(self, other: Timed | None, key: str = "ms") -> float | None:
        """How many times faster than the other: the median over the rounds, each of which timed both within moments."""
        if other is None or not other.samples or not self.samples:
            return None
        return statistics.median(b / a for a, b in zip(self.samples[key], other.samples[key], strict=True))

    def share_of(self, floor: Timed) -> float | None:
        """Of the floor's speed, by the device's time where it is known: a copy is one launch, and a step is several."""
        return self.speed(floor, "device_ms" if "device_ms" in self.samples else "ms")


@dataclass
class Measured:
    config: Config
    tensors: int
    elements: int
    bytes: int
    floor: str
    timed: dict[str, Timed]
    skipped: dict[str, str]
    load: float  # the system's load average when it was done
    baseline: str  # the peer that ratios are taken to

    def json(self) -> dict[str, Any]:
        peers = []
        for timed in self.timed.values():
            first, third = timed.quartiles()
            median = timed.median() or float("nan")
            peers.append(
                {
                    **asdict(timed),
                    "median_ms": median,
                    "quartiles_ms": [first, third],
                    "mean_ms": timed.mean(),
                    "min_ms": timed.best(),
                    f"speed_against_{self.baseline}": timed.speed(self.timed.get(self.baseline)),
                    "share_of_floor": timed.share_of(self.timed[FLOOR]),
                    "gb_per_s": self.bytes / median / 1e6,
                }
            )
        return {
            "config": asdict(self.config),
            "tensors": self.tensors,
            "elements": self.elements,
            "bytes": self.bytes,
            "bytes_per_element": self.bytes / self.elements,
            "baseline": self.baseline,
            "floor": self.floor,
            "peers": peers,
            "skipped": self.skipped,
            "load_average": self.load,
        }


def measured_from(content: dict[str, Any]) -> Measured:
    """What `json` has made of it."""
    names = {entry.name for entry in fields(Timed)}
    timed = {peer["name"]: Timed(**{key: peer[key] for key in names}) for peer in content["peers"]}
    keys = ("tensors", "elements", "bytes", "floor", "skipped", "baseline")
    config, kept = Config(**content["config"]), {key: content[key] for key in keys}
    return Measured(config=config, timed=timed, load=content["load_average"], **kept)


def reason_of(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]


def free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def ready(peer: Peer, workload: Workload, timed: Timed) -> Step:
    """The peer's step, checked and given the shared states. Raises where it cannot run or its numbers are wrong."""
    optimizer = peer.build(workload.groups(), workload.config, workload.device)
    timed.backend = backend_of(optimizer, workload.device)

    def step() -> None:
        begin = time.perf_counter()
        optimizer.step()
        if timed.first_step_s is None:
            if workload.device.type == "cuda":
                torch.cuda.synchronize()
            timed.first_step_s = time.perf_counter() - begin

    timed.error = check(workload, step, peer.slack)
    if not timed.error <= 1:
        raise ArithmeticError(f"numbers are wrong: the largest error is {timed.error:.3g} of the tolerance")
    workload.share(optimizer)
    run: Step = torch.compile(optimizer.step) if peer.compiled else optimizer.step
    for _ in range(3):
        run()
    return run


def measure(
    config: Config, device: torch.device, peers: list[str], baseline: str | None, rounds: int, graph: bool = False
) -> Measured | str:
    """The case's figures, or why it cannot run here. baseline: None for the usual one."""
    gc.collect()
    trim()
    if config.memory() > 0.9 * free_memory(device):
        return f"needs {config.memory() / 2**30:.1f} GiB, and {free_memory(device) / 2**30:.1f} are free"
    torch.manual_seed(0)
    workload = Workload(config, device)
    timed: dict[str, Timed] = {}
    steps: dict[str, Step] = {}
    skipped: dict[str, str] = {}
    for name in peers:
        progress(f"{config}: checking {name}")
        candidate = Timed(name)
        reason = PEERS[name].why_not(workload)
        if reason is None:
            try:
                steps[name] = ready(PEERS[name], workload, candidate)
                timed[name] = candidate
            except Exception as error:  # whatever a stranger's optimizer raises is the reason why it is not timed
                reason = reason_of(error)
        if reason is not None:
            skipped[name] = reason
        gc.collect()

    clock = CudaClock(device) if device.type == "cuda" else CpuClock(device)
    floors = floor_steps(workload)
    with crowd(len(os.sched_getaffinity(0)) - 1 if config.crowded else 0):
        if isinstance(clock, CpuClock):
            progress(f"{config}: looking for the floor")
            floors = fastest(floors, clock, config.hot, FLOORS)
        # The best of them takes part in every round as any peer does.
        tried = {name: Timed(FLOOR) for name in floors}
        take_turns(config, clock, {**steps, **floors}, {**timed, **tried}, skipped, rounds)
    for name in timed.keys() & skipped.keys():
        del steps[name], timed[name]
    kind = min(tried, key=lambda name: tried[name].median() or math.inf)
    steps[FLOOR], timed[FLOOR] = floors[kind], tried[kind]
    if isinstance(clock, CudaClock):
        for candidate in timed.values():
            candidate.host_us = candidate.median("host_us")
        if graph:
            replay_graphs(workload, clock, steps, timed, skipped, rounds)
    else:
        host_time(config, steps.keys() - {FLOOR}, timed, rounds)
    load = os.getloadavg()[0]
    progress(f"{config}: done", done=True)
    count = elements(CASES[config.case]())
    baseline = baseline or next((name for name in BASELINES if name in timed), BASELINES[0])
    return Measured(config, len(workload.params), count, workload.bytes(), kind, timed, skipped, load, baseline)


def take_turns(
    config: Config,
    clock: CpuClock | CudaClock,
    steps: dict[str, Step],
    timed: dict[str, Timed],
    skipped: dict[str, str],
    rounds: int,
) -> None:
    """Every peer once per round, in random order, so that nobody always follows the same neighbour. One that fails is
    left out from there on, with what it has shown before."""
    names, order = list(steps), random.Random(0)
    gc.collect()
    gc.disable()
    try:
        for turn in range(rounds):
            progress(f"{config}: round {turn + 1} of {rounds}")
            for name in order.sample(names, len(names)):
                try:
                    timed[name].add(clock.time(steps[name], config.hot))
                except Exception as error:
                    if timed[name].name == FLOOR:
                        raise
                    skipped[name] = f"in round {turn + 1}, {reason_of(error)}"
                    del steps[name], timed[name]
                    names.remove(name)
    finally:
        gc.enable()


def replay_graphs(
    workload: Workload,
    clock: CudaClock,
    steps: dict[str, Step],
    timed: dict[str, Timed],
    skipped: dict[str, str],
    rounds: int,
) -> None:
    """Times a captured graph of each step: launch-free device time, as a training loop under CUDA graphs sees it."""
    config = workload.config
    for name in steps:
        progress(f"{config}: graph of {name}")
        try:
            step = steps[name] if name == FLOOR else capturable_step(PEERS[name], workload)
            graph = capture(step)
            samples = [clock.time_graph(graph, config.hot) for _ in range(rounds)]
        except Exception as error:
            torch.cuda.synchronize()
            skipped[f"{name}, graph"] = reason_of(error)
            continue
        timed[name].samples["graph_ms"] = samples


def capturable_step(peer: Peer, workload: Workload) -> Step:
    """Of an optimizer that was told of the graph; many refuse to be captured else. It has stepped once, as it must."""
    optimizer = peer.build(workload.groups(), workload.config, workload.device, graph=True)
    optimizer.step()
    workload.share(optimizer)
    return torch.compile(optimizer.step) if peer.compiled else optimizer.step


def host_time(config: Config, names: set[str], timed: dict[str, Timed], rounds: int) -> None:
    """The host's share, which on a CPU nothing tells apart: a step over as many tensors of one element each."""
    workload = Workload(config, torch.device("cpu"), shapes=[(1,) * len(shape) for shape in CASES[config.case]()])
    probes = {}
    for name in sorted(names):
        progress(f"{config}: host time of {name}")
        optimizer = PEERS[name].build(workload.groups(), config, workload.device)
        optimizer.step()
        run: Step = torch.compile(optimizer.step) if PEERS[name].compiled else optimizer.step
        run()
        probes[name] = run
    for name, median in host_times(probes, f"{config}: host time", rounds).items():
        timed[name].host_us = median


def host_times(steps: dict[Key, Step], what: str, rounds: int) -> dict[Key, float]:
    """Median µs until each step returns, the device being idle; they take turns."""
    samples: dict[Key, list[float]] = {key: [] for key in steps}
    gc.collect()
    gc.disable()
    try:
        for turn in range(rounds):
            progress(f"{what}: round {turn + 1} of {rounds}")
            for key, step in steps.items():
                step()
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                begin = time.perf_counter()
                step()
                samples[key].append(1e6 * (time.perf_counter() - begin))
    finally:
        gc.enable()
    progress(f"{what}: done", done=True)
    return {key: statistics.median(values) for key, values in samples.items()}
