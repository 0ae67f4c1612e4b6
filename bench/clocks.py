"""Clocks that time one step: wall time on a CPU; host and device time separately on a GPU."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import itertools
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from family import Pass
from torch import Tensor
from workload import Workload

from fused_optim.cost.bandwidth_probe import bandwidth_probe
from fused_optim.engine import modules

Step = Callable[[], Any]
Times = dict[str, float]  # "ms" always; on a GPU also "device_ms", "host_us", and "graph_ms" if a graph was captured


def last_level_cache() -> int:
    """Bytes of the CPU's largest cache; 64 MiB if the system does not report it."""
    files = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    sizes = [re.fullmatch(r"(\d+)([KM])", file.read_text().strip()) for file in files]
    return max((int(size[1]) << (10 if size[2] == "K" else 20) for size in sizes if size), default=64 << 20)


class CpuClock:
    def __init__(self, device: torch.device) -> None:
        self.flusher = torch.zeros(max(4 * last_level_cache(), 64 << 20) // 4, dtype=torch.int32)

    def time(self, step: Step, hot: bool) -> Times:
        if hot:
            step()
        else:
            self.flusher.add_(1)
        begin = time.perf_counter()
        step()
        return {"ms": 1e3 * (time.perf_counter() - begin)}


class CudaClock:
    """Times a step by CUDA events.

    ms: the device is idle at the start, so the time includes every wait of the device for the host.
    device_ms: the step is queued behind a kernel that spins while the host enqueues, so it is device time alone.
    host_us: time until step() returns.
    """

    # Above the clock of most GPUs. A faster clock makes the spin shorter, which the factor 2 in `time` allows for.
    SPIN_CYCLES_PER_SECOND = 2.5e9

    def __init__(self, device: torch.device) -> None:
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        self.flusher = torch.zeros(max(4 * cache, 256 << 20), dtype=torch.uint8, device=device)
        self.begin, self.end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def time(self, step: Step, hot: bool) -> Times:
        self._prepare(step, hot)
        torch.cuda.synchronize()
        begin = time.perf_counter()
        total = self._events(step)
        host = self.returned - begin
        self._prepare(step, hot)
        torch.cuda._sleep(int((2 * host + 1e-4) * self.SPIN_CYCLES_PER_SECOND))
        return {"ms": total, "device_ms": self._events(step), "host_us": 1e6 * host}

    def time_graph(self, graph: torch.cuda.CUDAGraph, hot: bool) -> float:
        self._prepare(graph.replay, hot)
        torch.cuda.synchronize()
        return self._events(graph.replay)

    def _prepare(self, step: Step, hot: bool) -> None:
        if hot:
            step()
        else:
            self.flusher.add_(1)

    def _events(self, step: Step) -> float:
        self.begin.record()
        step()
        self.returned = time.perf_counter()
        self.end.record()
        self.end.synchronize()
        return float(self.begin.elapsed_time(self.end))


@contextlib.contextmanager
def crowd(processes: int) -> Iterator[None]:
    """Keeps this many other processes busy."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)]
    try:
        if others:
            time.sleep(0.5)  # for their start
        yield
    finally:
        for process in others:
            process.kill()
            process.wait()


def capture(step: Step) -> torch.cuda.CUDAGraph:
    """Captures one step, after the warm-up on a side stream that torch requires before a capture."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


PIECES = {"contiguous shares": 0, **{f"pieces of {kib} KiB": kib << 10 for kib in (16, 64, 256, 1024, 4096)}}
PREFETCHES = (0, 2048)  # bytes ahead


def floor_steps(workload: Workload) -> dict[str, Step]:
    """Bandwidth probes by description: passes that move the bytes of a step without arithmetic. The fastest of them is
    the floor that a step is compared with."""
    if workload.device.type == "cuda":
        half = workload.bytes() // 2
        source, target = (torch.zeros(half, dtype=torch.uint8, device=workload.device) for _ in range(2))
        return {"device-to-device copy with the same traffic": lambda: target.copy_(source)}
    if modules.instruction_set() is None:
        return {"separate torch passes with the same traffic": torch_floor(workload)}
    streams = [lanes(workload, walk) for walk in workload.passes]
    steps: dict[str, Step] = {}
    for threads, (text, piece), ahead in itertools.product({1, torch.get_num_threads()}, PIECES.items(), PREFETCHES):
        if threads == 1 and piece:
            continue  # one thread walks in order, whatever the piece size
        passes = [bandwidth_probe(*of_walk, piece=piece, threads=threads, prefetch=ahead) for of_walk in streams]
        name = f"{threads} thread{'s' if threads > 1 else ''}, {text if threads > 1 else 'in order'}"
        steps[name + (", prefetched" if ahead else "")] = functools.partial(run_all, passes)
    return steps


def run_all(steps: list[Step]) -> None:
    for step in steps:
        step()


def fastest(steps: dict[str, Step], clock: CpuClock, hot: bool, count: int, tries: int = 3) -> dict[str, Step]:
    """The `count` fastest steps, by the minimum of a few tries."""
    times = {name: min(clock.time(step, hot)["ms"] for _ in range(tries)) for name, step in steps.items()}
    return {name: steps[name] for name in sorted(steps, key=times.__getitem__)[:count]}


def lanes(workload: Workload, walk: Pass) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
    """The streams that a walk writes and those that it only reads, as arguments of bandwidth_probe, which requires
    equal sizes in bytes. So a stream of a wider dtype than the narrowest is cut into several."""
    width = min(workload.streams[name][0].dtype.itemsize for name in walk.read + walk.written)

    def cut(name: str) -> list[list[Tensor]]:
        stream = workload.streams[name]
        count = stream[0].dtype.itemsize // width
        flat = [tensor.view(-1).view(torch.uint8).chunk(count) for tensor in stream]
        return [[pieces[lane] for pieces in flat] for lane in range(count)]

    return [lane for name in walk.written for lane in cut(name)], [lane for name in walk.read for lane in cut(name)]


def torch_floor(workload: Workload) -> Step:
    """The bandwidth probe without compiled modules: one torch operation per stream, on flat buffers of integers."""
    flat = {
        name: torch.zeros(sum(tensor.nbytes for tensor in stream) // 2, dtype=torch.int16)
        for name, stream in workload.streams.items()
    }

    def step() -> None:
        for walk in workload.passes:
            for name in walk.read:
                flat[name].max()
            for name in walk.written:
                flat[name].bitwise_or_(0)

    return step


def trim() -> None:
    """Returns freed memory to the system, so that every case starts alike."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    with contextlib.suppress(OSError, AttributeError):  # only glibc has malloc_trim
        ctypes.CDLL(None).malloc_trim(0)
