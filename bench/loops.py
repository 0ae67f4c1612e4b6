"""Loops of machine code over vectors: how many instructions a turn executes."""

from __future__ import annotations

import re
from dataclasses import dataclass

Line = tuple[int, str]  # address, instruction
LEAST = -(10**9)  # longer than no way


@dataclass(frozen=True)
class Loop:
    """wide: loads of 8 or 16 bytes. turn: instructions of the longest way through, without calls: these are for
    divisions and roots of numbers near the ends of the range."""

    wide: int
    turn: int
    text: str

    @property
    def of_double(self) -> bool:
        return "64H" in self.text or len(re.findall(r"\bF(?:FMA|MUL)\b", self.text)) < 4

    @property
    def dtypes(self) -> set[str]:
        """Of float32, bfloat16, float16 and float64, those that it stores or converts."""
        if self.of_double:
            return {"float64"}
        narrow = {"bfloat16": r"F2FP\.BF16|F2F\.BF16", "float16": r"F2FP\.F16|HADD2|F2F\.F16"}
        return {name for name, pattern in narrow.items() if re.search(pattern, self.text)} or {"float32"}


def loops(code: str) -> list[Loop]:
    """Of one kernel's code, as cuobjdump prints it, all that load vectors."""
    lines = [
        (int(address, 16), text)
        for address, text in re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", code, re.MULTILINE)
        if "NOP" not in text
    ]
    found = []
    for address, text in lines:
        start = target(text)
        if start is not None and start < address:
            body = [line for line in lines if start <= line[0] <= address]
            wide = sum(bool(re.search(r"LDG\S*\.(64|128)\b", text)) for _, text in body)
            if wide:
                found.append(Loop(wide, longest_way(body), "\n".join(text for _, text in body)))
    return found


def target(text: str) -> int | None:
    jump = re.search(r"\bBRA(?:\.\w+)*\s+.*?(0x[0-9a-f]+)", text)
    return int(jump[1], 16) if jump else None


def longest_way(body: list[Line]) -> int:
    """From the first line to the last, which jumps back."""
    last = body[-1][0]
    ways = {last: 1}
    below = last
    for address, text in reversed(body[:-1]):
        to = target(text)
        following = [] if re.match(r"(BRA|EXIT|RET)\b", text) or "CALL" in text else [below]
        if to is not None and address < to <= last:
            following.append(to)
        ways[address] = 1 + max((ways.get(at, LEAST) for at in following), default=LEAST)
        below = address
    return ways[body[0][0]]
