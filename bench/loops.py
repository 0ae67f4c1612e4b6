"""The loops over vectors in machine code: how many instructions an iteration executes."""

from __future__ import annotations

import re
from dataclasses import dataclass

Line = tuple[int, str]  # address, instruction
NONE = -(10**9)  # where no path leads to the end


@dataclass(frozen=True)
class Loop:
    """wide: loads of 8 or 16 bytes. instructions: on the longest path through the loop without calls, which are for
    divisions and square roots of numbers near the ends of the range."""

    wide: int
    instructions: int
    text: str

    @property
    def of_double(self) -> bool:
        return "64H" in self.text or len(re.findall(r"\bF(?:FMA|MUL)\b", self.text)) < 4

    @property
    def dtypes(self) -> set[str]:
        """Those of float32, bfloat16, float16 and float64 that it converts from or to."""
        if self.of_double:
            return {"float64"}
        narrow = {"bfloat16": r"F2FP\.BF16|F2F\.BF16", "float16": r"F2FP\.F16|HADD2|F2F\.F16"}
        return {name for name, pattern in narrow.items() if re.search(pattern, self.text)} or {"float32"}


def loops(code: str) -> list[Loop]:
    """All loops with vector loads in one kernel's code, as cuobjdump prints it."""
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
                found.append(Loop(wide, longest_path(body), "\n".join(text for _, text in body)))
    return found


def target(text: str) -> int | None:
    jump = re.search(r"\bBRA(?:\.\w+)*\s+.*?(0x[0-9a-f]+)", text)
    return int(jump[1], 16) if jump else None


def longest_path(body: list[Line]) -> int:
    """Instructions from the first line to the last, which jumps back."""
    last = body[-1][0]
    paths = {last: 1}
    below = last
    for address, text in reversed(body[:-1]):
        to = target(text)
        following = [] if re.match(r"(BRA|EXIT|RET)\b", text) or "CALL" in text else [below]
        if to is not None and address < to <= last:
            following.append(to)
        paths[address] = 1 + max((paths.get(at, NONE) for at in following), default=NONE)
        below = address
    return paths[body[0][0]]
