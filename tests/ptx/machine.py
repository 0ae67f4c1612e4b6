"""Runs a launch: a few blocks at a time. All their lanes execute each instruction together.

Diverged lanes continue at the lowest of their positions, so they converge again. Supported control flow: bra, brx.idx,
ret, exit, and bar.sync and barrier.sync of all threads.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from .accesses import access
from .instructions import Operation, operation, refuse
from .kernel import Kernel, Statement
from .lanes import Array, Lanes, Mask, reader
from .memory import Memory

BLOCKS = 64  # blocks that run at a time
TURNS = {"bra", "brx", "ret", "exit", "bar", "barrier"}


@dataclass(frozen=True)
class Step:
    statement: Statement
    run: Operation | None  # None for control flow


class Program:
    """A decoded kernel. Its statements are cut into stretches, which execute from the first statement to the last."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.steps = [Step(statement, self.decode(statement)) for statement in kernel.statements]
        self.end = len(self.steps)
        cuts = {0, self.end, *kernel.labels.values()}
        cuts |= {number + 1 for number, step in enumerate(self.steps) if step.run is None}
        self.stretches = {start: (start, stop) for start, stop in pairwise(sorted(cuts))}
        self.executed: Counter[tuple[int, int]] = Counter()  # counts warps

    def decode(self, statement: Statement) -> Operation | None:
        name = statement.parts[0]
        if name in TURNS:
            if statement.opcode not in ("bra", "bra.uni", "brx.idx", "ret", "exit", "bar.sync", "barrier.sync"):
                raise refuse(self.kernel, statement)
            if name in ("bar", "barrier") and (statement.operands != ("0",) or statement.predicate):
                raise refuse(self.kernel, statement)
            return None
        return (access if name in ("ld", "st") else operation)(self.kernel, statement)

    def instructions(self) -> Counter[str]:
        """For each opcode, the number of executions so far, each counted once per warp."""
        counts: Counter[str] = Counter()
        for (start, stop), warps in self.executed.items():
            for step in self.steps[start:stop]:
                counts[step.statement.opcode] += warps
        return counts

    def launch(self, grid: int, threads: int, shared_bytes: int, parameters: bytes, memory: Memory) -> None:
        """Runs all blocks.

        Raises:
            AccessError: see memory.py.
            RuntimeError: threads of a block wait at different barriers.
        """
        if len(parameters) != self.kernel.parameter_bytes:
            raise ValueError(f"{self.kernel.name} takes {self.kernel.parameter_bytes} bytes of parameters")
        shared = shared_bytes + self.kernel.shared_bytes
        with np.errstate(all="ignore"):
            for first in range(0, grid, BLOCKS):
                blocks = min(BLOCKS, grid - first)
                lanes = Lanes(self.kernel, first, blocks, threads, grid, shared, parameters, memory)
                self.run(lanes)

    def run(self, lanes: Lanes) -> None:
        at = np.zeros(lanes.count, np.int64)  # the index of the next statement of each lane
        waiting = np.zeros(lanes.count, bool)
        while True:
            ready = (at < self.end) & ~waiting
            if not ready.any():
                if not waiting.any():
                    return
                self.release(lanes, at, waiting)
                continue
            start = int(at[ready].min())
            mask = ready & (at == start)
            self.stretch(lanes, self.stretches[start], mask, at, waiting)

    def release(self, lanes: Lanes, at: Array, waiting: Mask) -> None:
        """Releases the barriers. The caller calls this once every thread waits at a barrier or has ended."""
        places = np.where(waiting, at, -1).reshape(-1, lanes.threads)
        least = np.where(waiting, at, self.end).reshape(-1, lanes.threads).min(1)
        most = places.max(1)
        if ((least != most) & (most >= 0)).any():
            raise RuntimeError(f"threads of a block wait at different barriers in {self.kernel.name}")
        waiting[:] = False

    def stretch(self, lanes: Lanes, span: tuple[int, int], mask: Mask, at: Array, waiting: Mask) -> None:
        start, stop = span
        self.executed[span] += int(mask.reshape(-1, 32).any(1).sum())
        for step in self.steps[start:stop]:
            taken = self.taken(step.statement, lanes, mask)
            if step.run is None:
                at[mask] = stop
                self.turn(step.statement, lanes, taken, at, waiting)
                return
            if taken is mask or taken.any():
                step.run(lanes, taken)
        at[mask] = stop

    def taken(self, statement: Statement, lanes: Lanes, mask: Mask) -> Mask:
        if statement.predicate is None:
            return mask
        predicate = lanes.registers[statement.predicate]
        return mask & (~predicate if statement.negated else predicate)

    def turn(self, statement: Statement, lanes: Lanes, taken: Mask, at: Array, waiting: Mask) -> None:
        name, operands = statement.parts[0], statement.operands
        if name == "bra":
            at[taken] = self.kernel.labels[operands[0]]
        elif name == "brx":
            places = np.array([self.kernel.labels[label] for label in self.kernel.targets[operands[1]]])
            at[taken] = places[reader(self.kernel, operands[0], "u32")(lanes)[taken]]
        elif name in ("ret", "exit"):
            at[taken] = self.end
        else:
            waiting[taken] = True
