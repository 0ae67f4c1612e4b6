"""Worlds: one test body runs in several processes at once. They communicate through gloo on CPUs and NCCL on GPUs.

Every test gets new processes, so a failure or a hang does not affect other tests. They are forked from a server that
has already imported torch: this takes a tenth of a second per process instead of several. A rank that fails or hangs
fails the test with its traceback.
"""

from __future__ import annotations

import faulthandler
import functools
import gc
import importlib
import inspect
import math
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import HAS_CUDA
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

LIMIT = 30  # seconds; a test takes about one
PRELOAD = [
    "fused_optim",
    "pytest",
    "torch._dynamo",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.distributed.optim",
    "torch.distributed.tensor.parallel",
]


@dataclass(frozen=True)
class World:
    size: int
    device: str

    def __str__(self) -> str:
        return f"{self.size}-{self.device}"

    @property
    def rank(self) -> int:
        return dist.get_rank()

    def mesh(self, *names: str) -> DeviceMesh:
        """A mesh of one dimension, or of two dimensions, the first of size 2."""
        shape = (self.size,) if len(names) < 2 else (min(2, self.size), math.ceil(self.size / 2))
        return init_device_mesh(self.device, shape, mesh_dim_names=names or None)


def worlds() -> list[World]:
    if not HAS_CUDA:
        return [World(2, "cpu"), World(4, "cpu")]
    count = torch.cuda.device_count()
    return [World(size, "cuda") for size in (2, 4) if size <= count] or [World(1, "cuda")]


def in_every_world(body: Callable[..., None]) -> Any:
    """A test whose body runs on every rank with the same arguments. All ranks share tmp_path. The argument `world` is
    required."""

    @functools.wraps(body)
    def test(**arguments: Any) -> None:
        path = arguments["tmp_path"]
        wanted = inspect.signature(body).parameters
        run(body, {key: value for key, value in arguments.items() if key in wanted}, path)

    names = dict.fromkeys([*inspect.signature(body).parameters, "tmp_path"])
    test.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in names]
    )
    return pytest.mark.parametrize("world", worlds(), ids=str)(test)


def run(body: Callable[..., None], arguments: dict[str, Any], folder: Path, limit: float = LIMIT) -> None:
    """Runs a test's body on every rank of arguments["world"]. Fails with the traceback of the rank that failed
    first."""
    world: World = arguments["world"]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    folder = Path(tempfile.mkdtemp(prefix="world", dir=folder))
    place = (body.__module__, body.__qualname__, str(folder), limit)
    ranks = [context.Process(target=_rank, args=(rank, place, arguments)) for rank in range(world.size)]
    for process in ranks:
        process.start()
    failed = _watch(ranks, time.monotonic() + limit + 10)
    if failed:
        texts = [_said(rank, ranks[rank].exitcode, folder) for rank in failed]
        others = [f"rank {rank}, after that: {text.splitlines()[-1]}" for rank, text in zip(failed, texts, strict=True)]
        pytest.fail("\n".join([f"rank {failed[0]}: {texts[0]}", *others[1:]]), pytrace=False)


def _said(rank: int, exitcode: int | None, folder: Path) -> str:
    report = folder / f"rank{rank}.txt"
    text = report.read_text().strip() if report.exists() else ""
    return text or f"ended with exit code {exitcode} and without a word"


def _watch(ranks: Sequence[BaseProcess], deadline: float) -> list[int]:
    """Waits until all ranks have ended. If one fails, the others wait for it, so they are stopped. Returns the failed
    ranks, the first failure first."""
    failed: list[int] = []
    running = {process.sentinel: rank for rank, process in enumerate(ranks)}
    try:
        while running and time.monotonic() < deadline:
            for sentinel in wait(list(running), timeout=0.5 if failed else 5):
                rank = running.pop(sentinel)  # type: ignore[call-overload]
                ranks[rank].join()
                if ranks[rank].exitcode:
                    failed.append(rank)
                    deadline = min(deadline, time.monotonic() + 1)
        return failed or list(running.values())
    finally:
        for process in ranks:
            if process.is_alive():
                os.kill(process.pid or 0, signal.SIGKILL)
            process.join()


def _rank(rank: int, place: tuple[str, str, str, float], arguments: dict[str, Any]) -> None:
    module, name, folder, limit = place
    world: World = arguments["world"]
    with open(f"{folder}/rank{rank}.txt", "w") as report:
        faulthandler.dump_traceback_later(limit, exit=True, file=report)
        try:
            gc.freeze()  # keeps the collector off the preloaded objects, so that their pages stay shared
            torch.set_num_threads(1)
            if world.device == "cuda":
                torch.cuda.set_device(rank)
            dist.init_process_group(
                "gloo" if world.device == "cpu" else "cpu:gloo,cuda:nccl",
                store=dist.FileStore(f"{folder}/store", world.size),
                rank=rank,
                world_size=world.size,
                timeout=timedelta(seconds=2 * limit),
            )
            getattr(importlib.import_module(module), name).__wrapped__(**arguments)
            dist.barrier()
            dist.destroy_process_group()
        except BaseException:
            traceback.print_exc(file=report)
            report.flush()
            sys.exit(1)
