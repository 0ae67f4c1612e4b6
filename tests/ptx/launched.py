"""What the stand-ins are asked to launch is run here, and recorded."""

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
    """Runs kernels of PTX modules. record: the launches since it was last cleared. modules: the PTX that each program
    is from."""

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
        """pointers: the address of those to the parameters. Not 0 after a failure, which `raising` raises."""
        try:
            program = self.program(ptx, name)
            kernel = program.kernel
            parameters = bytearray(kernel.parameter_bytes)
            addresses = (ctypes.c_void_p * len(kernel.parameters)).from_address(pointers)
            for address, (offset, size) in zip(addresses, kernel.parameters.values(), strict=True):
                parameters[offset : offset + size] = ctypes.string_at(address, size)
            self.record.append(Launch(kernel, blocks, threads, shared, stream, bytes(parameters)))
            program.launch(blocks, threads, shared, bytes(parameters), self.memory)
        except BaseException as error:  # It cannot go through the C code that has called.
            self.failure = error
            return 1
        return 0

    @contextmanager
    def raising(self, lent: Sequence[tuple[int, int]] = ()) -> Iterator[None]:
        """Around the launches of a pass. What has failed in a kernel is raised here, and not the error that C has made
        of it. lent: see Memory.refresh."""
        self.failure = None
        self.memory.refresh(lent)
        try:
            yield
        except Exception as error:
            raise self.failure or error from None
        if self.failure is not None:
            raise self.failure

    def instructions(self) -> Counter[str]:
        """Executed so far, by how many warps."""
        total: Counter[str] = Counter()
        for program in self.programs.values():
            total += program.instructions()
        return total


LAUNCHES = Launches()
