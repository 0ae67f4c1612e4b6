"""The registers of all lanes of a few blocks, and how operands read and write them."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .kernel import BYTES, Kernel
from .memory import Memory

Array = NDArray[Any]
Mask = NDArray[np.bool_]

UNSIGNED = {1: np.dtype("u1"), 2: np.dtype("u2"), 4: np.dtype("u4"), 8: np.dtype("u8")}
POISON = 0xA5  # the value of every byte of a register or of shared memory that was never written


def dtype_of(kind: str) -> np.dtype[Any]:
    """The NumPy dtype of a PTX type. bfloat16, which NumPy does not have, is stored as bits."""
    if kind == "pred":
        return np.dtype(bool)
    if kind[0] in "us":
        return np.dtype(f"{'u' if kind[0] == 'u' else 'i'}{BYTES[kind]}")
    if kind in ("f16", "f32", "f64"):
        return np.dtype(f"f{BYTES[kind]}")
    return UNSIGNED[BYTES[kind]]


class Registers(dict[str, Array]):
    """Registers by name. Each is allocated on first use."""

    def __init__(self, kernel: Kernel, count: int) -> None:
        super().__init__()
        self.kinds, self.count = kernel.registers, count

    def __missing__(self, name: str) -> Array:
        kind = self.kinds[name]
        if kind == "pred":
            self[name] = np.zeros(self.count, bool)
        else:
            self[name] = np.full(self.count * BYTES[kind], POISON, np.uint8).view(UNSIGNED[BYTES[kind]])
        return self[name]


class Lanes:
    """count: the number of threads in the blocks that run at once. first: the index of the first of these blocks."""

    def __init__(
        self,
        kernel: Kernel,
        first: int,
        blocks: int,
        threads: int,
        grid: int,
        shared_bytes: int,
        parameters: bytes,
        memory: Memory,
    ) -> None:
        self.count, self.threads, self.memory, self.parameters = blocks * threads, threads, memory, parameters
        number = np.arange(self.count, dtype=np.uint32)
        self.block = number // np.uint32(threads)
        self.special = {
            "%tid.x": number % np.uint32(threads),
            "%ctaid.x": self.block + np.uint32(first),
            "%ntid.x": np.uint32(threads),
            "%nctaid.x": np.uint32(grid),
            "%laneid": number % np.uint32(32),
        }
        self.registers = Registers(kernel, self.count)
        self.shared = np.full((blocks, max(shared_bytes, 1)), POISON, np.uint8)


Read = Callable[[Lanes], Any]
Write = Callable[[Lanes, Any, Mask], None]


def reader(kernel: Kernel, operand: str, kind: str) -> Read:
    """A function that reads an operand as a type. It returns an array, or one number for all lanes.

    Raises:
        ValueError: the operand's register has another width.
    """
    dtype = dtype_of(kind)
    if operand in kernel.registers:
        held = kernel.registers[operand]
        if (held == "pred") != (kind == "pred") or BYTES[held] != BYTES[kind]:
            raise ValueError(f"{operand} of type {held} is read as {kind} in {kernel.name}")
        return lambda lanes: lanes.registers[operand].view(dtype)
    if operand.startswith("%"):
        return lambda lanes: lanes.special[operand].astype(dtype, copy=False)
    constant = immediate(kernel, operand, dtype)
    return lambda lanes: constant


def immediate(kernel: Kernel, operand: str, dtype: np.dtype[Any]) -> Any:
    if operand in kernel.shared:
        return dtype.type(kernel.shared[operand])
    if dtype.kind == "b":
        return np.bool_(int(operand, 0))
    digits = operand.lstrip("-")
    if digits[:2] in ("0f", "0F", "0d", "0D"):
        wide = digits[1] in "dD"
        (number,) = struct.unpack("<d" if wide else "<f", int(digits[2:], 16).to_bytes(8 if wide else 4, "little"))
        value = np.array(-number if operand[0] == "-" else number, "f8" if wide else "f4")
        return value.view(dtype)[()]
    bits = int(operand.rstrip("U"), 0) & ((1 << 8 * dtype.itemsize) - 1)
    return np.array(bits, UNSIGNED[dtype.itemsize]).view(dtype)[()]


def writer(kernel: Kernel, operand: str) -> Write:
    """A function that writes values to a register, in the lanes of a mask. Values narrower than the register are
    extended.

    Raises:
        ValueError: the operand is not a register.
    """
    if operand == "_":
        return lambda lanes, values, mask: None
    if operand not in kernel.registers:
        raise ValueError(f"{operand} is written in {kernel.name}, and is no register")
    kind = kernel.registers[operand]
    size = BYTES[kind]

    def write(lanes: Lanes, values: Any, mask: Mask) -> None:
        if kind != "pred":
            if values.dtype.itemsize < size:
                values = values.astype(f"{'i' if values.dtype.kind == 'i' else 'u'}{size}")
            elif values.dtype.itemsize > size:
                raise ValueError(f"{operand} of {size} bytes is written {values.dtype} in {kernel.name}")
            values = values.view(UNSIGNED[size])
        np.copyto(lanes.registers[operand], values, where=mask)

    return write
