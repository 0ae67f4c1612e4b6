"""Loads and stores of the interpreter: .global and generic accesses go to memory.py, .shared ones to memory of the
block, ld.param to the parameters. Volatile and atomic accesses and cache operators are not supported."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from .instructions import Operation, braced, refuse
from .kernel import BYTES, Kernel, Statement
from .lanes import UNSIGNED, Array, Lanes, Mask, Read, dtype_of, reader, writer
from .memory import AccessError

ADDRESS = re.compile(r"\[\s*([%$\w]+)\s*(?:\+\s*(-?\w+))?\s*\]")


def access(kernel: Kernel, statement: Statement) -> Operation:
    """Decodes a load or a store.

    Raises:
        UnknownInstruction: this kind of access is not supported.
    """
    name, *modifiers, kind = statement.parts
    count = 1
    if modifiers and modifiers[-1] in ("v2", "v4"):
        count = int(modifiers.pop()[1])
    space = modifiers[0] if modifiers else "generic"
    found = ADDRESS.fullmatch(statement.operands[1 if name == "ld" else 0])
    if len(modifiers) > 1 or found is None or kind not in BYTES:
        raise refuse(kernel, statement)
    base, offset = found[1], int(found[2] or "0", 0)
    registers = statement.operands[0 if name == "ld" else 1]
    names = braced(registers) or [registers]
    if len(names) != count:
        raise refuse(kernel, statement)
    if (name, space) == ("ld", "param"):
        return load_parameter(kernel, names, kind, base, offset)
    if space in ("global", "generic"):
        return Global(kernel, statement.text, names, kind, base, offset).operation(name)
    if space == "shared":
        return Shared(kernel, statement.text, names, kind, base, offset).operation(name)
    raise refuse(kernel, statement)


def load_parameter(kernel: Kernel, names: list[str], kind: str, base: str, offset: int) -> Operation:
    start, size = kernel.parameters[base][0] + offset, BYTES[kind]
    writes = [writer(kernel, name) for name in names]

    def load(lanes: Lanes, mask: Mask) -> None:
        values = np.frombuffer(lanes.parameters, dtype_of(kind), len(writes), start)
        for value, write in zip(values, writes, strict=True):
            write(lanes, value, mask)

    assert offset + size * len(names) <= kernel.parameters[base][1]
    return load


class Access:
    """Shared by both memory spaces: converts between registers and rows of bytes."""

    def __init__(self, kernel: Kernel, text: str, names: list[str], kind: str, base: str, offset: int) -> None:
        self.kernel, self.text, self.names, self.kind, self.offset = kernel, text, names, kind, offset
        self.size = BYTES[kind] * len(names)
        self.base = base

    def operation(self, name: str) -> Operation:
        dtype, bits = dtype_of(self.kind), f"b{8 * BYTES[self.kind]}"
        if name == "ld":
            writes = [writer(self.kernel, register) for register in self.names]

            def load(lanes: Lanes, mask: Mask) -> None:
                columns = self.load(lanes, mask).view(dtype)
                for index, write in enumerate(writes):
                    write(lanes, columns[:, index], mask)

            return load
        reads = [value_reader(self.kernel, register, bits) for register in self.names]

        def store(lanes: Lanes, mask: Mask) -> None:
            columns = [np.broadcast_to(read(lanes), lanes.count) for read in reads]
            self.store(lanes, np.stack(columns, 1).view(np.uint8), mask)

        return store

    def load(self, lanes: Lanes, mask: Mask) -> Array:
        raise NotImplementedError

    def store(self, lanes: Lanes, values: Array, mask: Mask) -> None:
        raise NotImplementedError


def value_reader(kernel: Kernel, operand: str, bits: str) -> Read:
    """Reads a register that can be wider than the stored value: its low bytes."""
    held = kernel.registers.get(operand)
    if held is None or BYTES[held] == BYTES[bits]:
        return reader(kernel, operand, bits)
    read, dtype = reader(kernel, operand, held), UNSIGNED[BYTES[bits]]
    return lambda lanes: read(lanes).astype(dtype)


class Global(Access):
    def addresses(self, lanes: Lanes) -> Array:
        read = reader(self.kernel, self.base, "u64")
        moved = read(lanes) + np.uint64(self.offset & (1 << 64) - 1)
        return np.ascontiguousarray(np.broadcast_to(moved, lanes.count))

    def load(self, lanes: Lanes, mask: Mask) -> Array:
        return lanes.memory.load(self.addresses(lanes), mask, self.size, f"{self.text} of {self.kernel.name}")

    def store(self, lanes: Lanes, values: Array, mask: Mask) -> None:
        lanes.memory.store(self.addresses(lanes), mask, values, f"{self.text} of {self.kernel.name}")


class Shared(Access):
    def places(self, lanes: Lanes, mask: Mask) -> tuple[Any, Any]:
        """Block numbers and byte offsets [lanes, size] of the active lanes."""
        if self.base in self.kernel.shared:
            first = np.full(lanes.count, self.kernel.shared[self.base] + self.offset)
        else:
            held = self.kernel.registers[self.base]
            read = reader(self.kernel, self.base, f"u{8 * BYTES[held]}")
            first = np.broadcast_to(read(lanes), lanes.count).astype(np.int64) + self.offset
        used = first[mask]
        if (used % self.size).any() or (used < 0).any() or (used + self.size > lanes.shared.shape[1]).any():
            raise AccessError(f"misaligned or outside of shared memory: {self.text} of {self.kernel.name}")
        return lanes.block[mask][:, None], used[:, None] + np.arange(self.size)

    def load(self, lanes: Lanes, mask: Mask) -> Array:
        values = np.zeros((lanes.count, self.size), np.uint8)
        values[mask] = lanes.shared[self.places(lanes, mask)]
        return values

    def store(self, lanes: Lanes, values: Array, mask: Mask) -> None:
        lanes.shared[self.places(lanes, mask)] = values[mask]
