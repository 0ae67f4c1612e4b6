"""Measures one case in one process: checks every peer's numbers, then times the peers in turn."""

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
FLOORS = 3  # bandwidth probes that take turns with the peers; the fastest is the floor
Key = TypeVar("Key")


def progress(text: str, done: bool = False) -> None:
    """Prints a line on stderr. A terminal shows each line in place of the last; elsewhere only `done` lines appear."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="\n" if done else "", file=sys.stderr, flush=True)
    elif done:
        print(text, file=sys.stderr, flush=True)


@dataclass
class Timed:
    """One peer in one case. samples: one value per round, with the keys of clocks.Times; all lists have one length."""

    name: str
    backend: str | None = None
    error: float | None = None  # divided by the tolerance
    first_step_s: float | None = None  # the first step(), with state creation, tables and compilation
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
        """How many times as fast as the other: the median over the rounds of the ratio within a round.

        A round times both shortly after each other, so slow changes of the machine cancel out.
        """
        if other is None or not other.samples or not self.samples:
            return None
        return statistics.median(b / a for a, b in zip(self.samples[key], other.samples[key], strict=True))

    def share_of(self, floor: Timed) -> float | None:
        """The share of the floor's speed. By device time if it is known: the copy is one launch, a step is several."""
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
    load: float  # the system's load average at the end
    baseline: str  # the peer that ratios are against

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
    """The inverse of `Measured.json`."""
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
    """Builds and checks the peer, gives it the shared states, and returns its step.

    Raises:
        ArithmeticError: its numbers are wrong. Any other exception comes from the peer.
    """
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
        raise ArithmeticError(f"wrong numbers: the largest error is {timed.error:.3g} times the tolerance")
    workload.share(optimizer)
    run: Step = torch.compile(optimizer.step) if peer.compiled else optimizer.step
    for _ in range(3):
        run()
    return run


def measure(
    config: Config, device: torch.device, peers: list[str], baseline: str | None, rounds: int, graph: bool = False
) -> Measured | str:
    """The figures of the case, or why it cannot run here. baseline: None selects the first of BASELINES that works."""
    gc.collect()
    trim()
    if config.memory() > 0.9 * free_memory(device):
        return f"needs {config.memory() / 2**30:.1f} GiB, but only {free_memory(device) / 2**30:.1f} GiB are free"
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
            except Exception as error:  # a peer can raise anything; the report gives it as the reason
                reason = reason_of(error)
        if reason is not None:
            skipped[name] = reason
        gc.collect()

    clock = CudaClock(device) if device.type == "cuda" else CpuClock(device)
    floors = floor_steps(workload)
    with crowd(len(os.sched_getaffinity(0)) - 1 if config.crowded else 0):
        if isinstance(clock, CpuClock):
            progress(f"{config}: selecting bandwidth probes")
            floors = fastest(floors, clock, config.hot, FLOORS)
        # The selected probes take part in every round, like the peers.
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
    """Times every peer once per round. The order is random, so that no peer always follows the same one. A peer that
    fails is removed together with its earlier samples."""
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
    """Times replays of each step's captured graph: device time without launches, as in a loop under CUDA graphs."""
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
    """A step for capture. Many optimizers need capturable=True for that, and all a first step outside the graph."""
    optimizer = peer.build(workload.groups(), workload.config, workload.device, graph=True)
    optimizer.step()
    workload.share(optimizer)
    return torch.compile(optimizer.step) if peer.compiled else optimizer.step


def host_time(config: Config, names: set[str], timed: dict[str, Timed], rounds: int) -> None:
    """Sets the host time on a CPU, where a step's overhead cannot be timed by itself: the time of a step over the same
    number of tensors with one element each."""
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
    """Median µs until each step returns, on an idle device. The steps take turns."""
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
