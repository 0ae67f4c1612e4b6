"""The PTX instructions that compute. accesses.py has loads and stores, machine.py has the control flow.

    mov cvta cvt                     moves; splitting and joining of registers; conversions rounded to nearest even, or
                                     towards zero to integers
    add sub mul mad fma div          float32 and float64 with .rn; integers (no div), with .lo or .wide for products
    sqrt rcp min max abs neg         roots and reciprocals with .rn; abs also with .ftz, which exp(double) uses, and rcp
                                     with .approx.ftz.f64, which log(double) refines
    setp selp                        comparisons, also combined with a predicate
    and or xor not shl shr bfe lop3 prmt
    shfl.sync.bfly                   within a whole warp

Any other instruction raises an error that names it when the kernel is decoded. So an approximate division, a flush of
subnormal results to zero or an atomic operation cannot pass unnoticed.

An operation gets all lanes at once, and a mask of the lanes that execute it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .arithmetic import BOUNDS, COMBINED, EXACT, INTEGER, ROUNDED, comparison, conversion, float_function, to_bf16
from .kernel import BYTES, Kernel, Statement
from .lanes import Lanes, Mask, dtype_of, reader, writer

Operation = Callable[[Lanes, Mask], None]


class UnknownInstruction(NotImplementedError):
    """The interpreter does not support an instruction of this kernel."""


def refuse(kernel: Kernel, statement: Statement) -> UnknownInstruction:
    return UnknownInstruction(f"the PTX interpreter does not know `{statement.text}` in {kernel.name}")


def operation(kernel: Kernel, statement: Statement) -> Operation:
    """Decodes an instruction that computes.

    Raises:
        UnknownInstruction: this instruction is not supported.
    """
    name, *modifiers = statement.parts
    decode = DECODERS.get(name)
    made = decode(kernel, statement.operands, modifiers) if decode else None
    if made is None:
        raise refuse(kernel, statement)
    return made


def compute(
    kernel: Kernel, operands: tuple[str, ...], kinds: tuple[str, ...], function: Callable[..., Any]
) -> Operation:
    """Reads the other operands as these kinds, applies `function`, and writes the result to the first operand."""
    write = writer(kernel, operands[0])
    reads = [reader(kernel, operand, kind) for operand, kind in zip(operands[1:], kinds, strict=True)]

    def execute(lanes: Lanes, mask: Mask) -> None:
        write(lanes, function(*(read(lanes) for read in reads)), mask)

    return execute


def braced(operand: str) -> list[str] | None:
    return [part.strip() for part in operand[1:-1].split(",")] if operand.startswith("{") else None


def decode_mov(kernel: Kernel, operands: tuple[str, ...], modifiers: list[str]) -> Operation | None:
    (kind,) = modifiers
    outs, ins = braced(operands[0]), braced(operands[1])
    if outs is None and ins is None:
        return compute(kernel, operands, (kind,), lambda x: x)
    parts = outs or ins or []
    part = UNSIGNED_KIND[BYTES[kind] // len(parts)]
    if ins is not None:
        write, reads = writer(kernel, operands[0]), [reader(kernel, name, part) for name in ins]

        def join(lanes: Lanes, mask: Mask) -> None:
            columns = [np.broadcast_to(read(lanes), lanes.count) for read in reads]
            write(lanes, np.stack(columns, 1).view(dtype_of(kind))[:, 0], mask)

        return join
    read, writes = reader(kernel, operands[1], kind), [writer(kernel, name) for name in outs or []]

    def split(lanes: Lanes, mask: Mask) -> None:
        whole = np.ascontiguousarray(np.broadcast_to(read(lanes), lanes.count))
        columns = whole.view(dtype_of(part)).reshape(lanes.count, -1)
        for index, write in enumerate(writes):
            write(lanes, columns[:, index], mask)

    return split


UNSIGNED_KIND = {1: "b8", 2: "b16", 4: "b32", 8: "b64"}


def decode_cvta(kernel: Kernel, operands: tuple[str, ...], modifiers: list[str]) -> Operation | None:
    """Only global memory: its generic addresses are the same. Those of shared memory are not."""
    if modifiers not in (["to", "global", "u64"], ["global", "u64"]):
        return None
    return compute(kernel, operands, ("u64",), lambda x: x)


def decode_cvt(kernel: Kernel, operands: tuple[str, ...], modifiers: list[str]) -> Operation | None:
    *rounding, to, of = modifiers
    if to in ("bf16x2", "f16x2"):
        if rounding != ["rn"] or of != "f32":
            return None
        narrow = to_bf16 if to == "bf16x2" else (lambda x: np.asarray(x).astype(np.float16).view(np.uint16))
        return compute(
            kernel,
            operands,
            (of, of),
            lambda high, low: narrow(high).astype(np.uint32) << np.uint32(16) | narrow(low).astype(np.uint32),
        )
    function = conversion(rounding, to, of)
    if function is None:
        return None
    held = kernel.registers.get(operands[1], of)
    if of[0] in "su" and BYTES[held] > BYTES[of]:  # cvt takes the lower bits of a wider register
        convert, dtype = function, dtype_of(of)
        return compute(kernel, operands, (f"u{8 * BYTES[held]}",), lambda x: convert(x.astype(dtype)))
    return compute(kernel, operands, (of,), function)


def decode_arithmetic(name: str) -> Callable[..., Operation | None]:
    def decode(kernel: Kernel, operands: tuple[str, ...], modifiers: list[str]) -> Operation | None:
        *how, kind = modifiers
        if name == "neg" and kind in ("f16", "bf16"):  # the only arithmetic on these: it is exact
            function = (np.negative if kind == "f16" else lambda bits: bits ^ 0x8000) if how == [] else None
        elif kind in ("f32", "f64"):
            function = float_function(name, how, kind == "f64")
        elif kind in BYTES and kind[0] in "us":
            function = INTEGER.get(name) if how == [] else None
            if name in ("mul", "mad"):
                return product(kernel, operands, how, kind)
        else:
            function = None
        return None if function is None else compute(kernel, operands, (kind,) * (len(operands) - 1), function)

    return decode


def product(kernel: Kernel, operands: tuple[str, ...], how: list[str], kind: str) -> Operation | None:
    """mul and mad of integers: the low half of the product, or the full product in twice the width."""
    if how not in (["lo"], ["wide"]):
        return None
    result = f"{kind[0]}{16 * BYTES[kind]}" if how == ["wide"] else kind
    wide = dtype_of(result)

    def multiply(x: Any, y: Any, *added: Any) -> Any:
        return sum(added, x.astype(wide) * y.astype(wide))

    return compute(kernel, operands, (kind, kind, result)[: len(operands) - 1], multiply)


def decode_setp(kernel: Kernel, operands: tuple[str, ...], modifiers: list[str]) -> Operation | None:
    name, *combination, kind = modifiers
    function = comparison(name, kind)
    if function is None or (combination and combination[0] not in COMBINED):
        return None
    if not combination:
        return compute(kernel, operands, (kind, kind), function)
    combine = COMBINED[combination[0]]
    return compute(kernel, operands, (kind, kind, "pred"), lambda x, y, p: combine(function(x, y), p))


def decode_selp(kernel: Kernel, operands: tuple[str, ...], modifiers: list[str]) -> Operation | None:
    (kind,) = modifiers
    return compute(kernel, operands, (kind, kind, "pred"), lambda x, y, p: np.where(p, x, y))


BITWISE: dict[str, Callable[..., Any]] = {
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "not": np.invert,
}


def decode_bitwise(name: str) -> Callable[..., Operation | None]:
    def decode(kernel: Kernel, operands: tuple[str, ...], modifiers: list[str]) -> Operation | None:
        (kind,) = modifiers
        return compute(kernel, operands, (kind,) * (len(operands) - 1), BITWISE[name])

    return decode


def decode_shift(left: bool) -> Callable[..., Operation | None]:
    """A shift by the width or more shifts all bits out."""

    def decode(kernel: Kernel, operands: tuple[str, ...], modifiers: list[str]) -> Operation | None:
        (kind,) = modifiers
        bits = 8 * BYTES[kind]

        def shift(x: Any, by: Any) -> Any:
            within = np.minimum(by, bits - 1).astype(x.dtype)
            shifted = x << within if left else x >> within
            gone = x.dtype.type(0) if left or kind[0] != "s" else shifted
            return np.where(by >= bits, gone, shifted)

        return compute(kernel, operands, (kind, "u32"), shift)

    return decode


def decode_bfe(kernel: Kernel, operands: tuple[str, ...], modifiers: list[str]) -> Operation | None:
    (kind,) = modifiers
    if kind not in ("u32", "u64"):
        return None
    dtype, bits = dtype_of(kind), 8 * BYTES[kind]

    def extract(x: Any, start: Any, length: Any) -> Any:
        # The masks are Python integers: NumPy does not define a shift by the whole width.
        ones = [(1 << min(int(n) & 255, bits)) - 1 for n in np.atleast_1d(length)]
        moved = np.where(start >= bits, dtype.type(0), x >> np.minimum(start, bits - 1).astype(dtype))
        return moved & (np.array(ones, dtype) if len(ones) > 1 else dtype.type(ones[0]))

    return compute(kernel, operands, (kind, "u32", "u32"), extract)


def decode_lop3(kernel: Kernel, operands: tuple[str, ...], modifiers: list[str]) -> Operation | None:
    """Any logical function of three bits. The last operand is its truth table."""
    table = int(operands[4], 0)

    def look_up(*x: Any) -> Any:
        found = np.zeros_like(x[0])
        for row in range(8):
            if table >> row & 1:
                terms = [x[i] if row >> (2 - i) & 1 else ~x[i] for i in range(3)]
                found = found | (terms[0] & terms[1] & terms[2])
        return found

    return compute(kernel, operands[:4], ("b32",) * 3, look_up) if modifiers == ["b32"] else None


def decode_prmt(kernel: Kernel, operands: tuple[str, ...], modifiers: list[str]) -> Operation | None:
    """Selects four of the eight bytes of two words."""

    def choose(x: Any, y: Any, choice: Any) -> Any:
        x, y, choice = np.broadcast_arrays(x, y, choice)
        whole = x.astype(np.uint64) | y.astype(np.uint64) << np.uint64(32)
        result = np.zeros(x.shape, np.uint32)
        for place in range(4):
            nibble = (choice >> np.uint32(4 * place)) & np.uint32(15)
            byte = (whole >> (np.uint64(8) * (nibble & np.uint32(7)).astype(np.uint64))).astype(np.uint32)
            byte &= np.uint32(255)
            signs = np.where(byte & np.uint32(128), np.uint32(255), np.uint32(0))
            result |= np.where(nibble & np.uint32(8), signs, byte) << np.uint32(8 * place)
        return result

    return compute(kernel, operands, ("b32",) * 3, choose) if modifiers == ["b32"] else None


def decode_shfl(kernel: Kernel, operands: tuple[str, ...], modifiers: list[str]) -> Operation | None:
    """All lanes of a warp must be active."""
    if modifiers != ["sync", "bfly", "b32"] or operands[3:] not in (("31", "-1"), ("0x1f", "0xffffffff")):
        return None
    write = writer(kernel, operands[0])
    read, apart = reader(kernel, operands[1], "b32"), int(operands[2], 0)

    def exchange(lanes: Lanes, mask: Mask) -> None:
        warps = np.broadcast_to(mask, lanes.count).reshape(-1, 32)
        if (warps.any(1) != warps.all(1)).any():
            raise RuntimeError(f"shfl.sync in {kernel.name}: a part of a warp has gone another way")
        others = np.arange(lanes.count) ^ apart
        write(lanes, read(lanes)[others], mask)

    return exchange


DECODERS: dict[str, Callable[[Kernel, tuple[str, ...], list[str]], Operation | None]] = {
    "mov": decode_mov,
    "cvta": decode_cvta,
    "cvt": decode_cvt,
    "setp": decode_setp,
    "selp": decode_selp,
    "shl": decode_shift(left=True),
    "shr": decode_shift(left=False),
    "bfe": decode_bfe,
    "lop3": decode_lop3,
    "prmt": decode_prmt,
    "shfl": decode_shfl,
    **{name: decode_arithmetic(name) for name in (*ROUNDED, *EXACT, *BOUNDS, *INTEGER, "fma", "mad")},
    **{name: decode_bitwise(name) for name in BITWISE},
}
