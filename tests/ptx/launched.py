"""Runs and records the launches that the stand-ins receive."""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from .kernel import Kernel, parse
from .machine import Program
from .memory import Memory


@dataclass(frozen=True)
class Launch:
    kernel: Kernel
    blocks: int
    threads: int
    shared: int
    stream: int
    parameters: bytes


class Launches:
    """Runs kernels of PTX modules. record: the launches since it was last cleared. modules: the PTX source of each
    program."""

    def __init__(self) -> None:
        self.memory = Memory()
        self.programs: dict[tuple[int, str], Program] = {}
        self.modules: dict[Program, str] = {}
        self.record: list[Launch] = []
        self.failure: BaseException | None = None

    def program(self, ptx: str, name: str) -> Program:
        key = (hash(ptx), name)
        if key not in self.programs:
            self.programs[key] = Program(parse(ptx, name))
            self.modules[self.programs[key]] = ptx
        return self.programs[key]

    def run(self, ptx: str, name: str, blocks: int, threads: int, shared: int, stream: int, pointers: int) -> int:
        """Returns nonzero after a failure, which `raising` then raises. pointers: the address of an array of pointers
        to the parameters."""
        try:
            program = self.program(ptx, name)
            kernel = program.kernel
            parameters = bytearray(kernel.parameter_bytes)
            addresses = (ctypes.c_void_p * len(kernel.parameters)).from_address(pointers)
            for address, (offset, size) in zip(addresses, kernel.parameters.values(), strict=True):
                parameters[offset : offset + size] = ctypes.string_at(address, size)
            self.record.append(Launch(kernel, blocks, threads, shared, stream, bytes(parameters)))
            program.launch(blocks, threads, shared, bytes(parameters), self.memory)
        except BaseException as error:  # An exception cannot pass through the C caller.
            self.failure = error
            return 1
        return 0

    @contextmanager
    def raising(self, lent: Sequence[tuple[int, int]] = ()) -> Iterator[None]:
        """Wraps the launches of a pass. A failure in a kernel is raised as the original exception, not as the error
        code that C returned. lent: see Memory.refresh."""
        self.failure = None
        self.memory.refresh(lent)
        try:
            yield
        except Exception as error:
            raise self.failure or error from None
        if self.failure is not None:
            raise self.failure

    def instructions(self) -> Counter[str]:
        """The instructions executed so far, each counted once per warp."""
        total: Counter[str] = Counter()
        for program in self.programs.values():
            total += program.instructions()
        return total


LAUNCHES = Launches()
