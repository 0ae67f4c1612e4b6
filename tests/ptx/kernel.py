"""One kernel of a PTX module: its parameters, registers, shared memory and statements."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

BYTES = {"pred": 1, "b8": 1, "b16": 2, "b32": 4, "b64": 8, "bf16": 2, "bf16x2": 4, "f16x2": 4}
BYTES |= {f"{letter}{bits}": bits // 8 for letter in "suf" for bits in (8, 16, 32, 64) if f"{letter}{bits}" != "f8"}

PARAMETER = re.compile(
    r"\.param\s+(?:\.align\s+(?P<align>\d+)\s+)?\.(?P<type>\w+)"
    r"(?:\s+\.ptr)?(?:\s+\.global)?(?:\s+\.align\s+\d+)?\s+(?P<name>\w+)(?:\[(?P<count>\d+)\])?"
)
SHARED = re.compile(r"\.shared\s+\.align\s+(\d+)\s+\.b8\s+(\w+)\[(\d*)\]")
REGISTERS = re.compile(r"(%?[\w$]+)(?:<(\d+)>)?")
LABEL = re.compile(r"([$\w%]+):(?!:)")
PREDICATE = re.compile(r"@(!?)(%?\w+)\s+")
OPERAND = re.compile(r"\s*((?:\{[^}]*\}|\[[^\]]*\]|[^,{\[])+)\s*(?:,|$)")


@dataclass(frozen=True)
class Statement:
    """`@predicate opcode operands;`"""

    text: str
    opcode: str
    operands: tuple[str, ...]
    predicate: str | None = None
    negated: bool = False

    @property
    def parts(self) -> list[str]:
        """The opcode split into name, modifiers and types."""
        return self.opcode.replace("::", "__").split(".")


@dataclass
class Kernel:
    """parameters: offset and size in bytes of each. registers: the type of each. shared: the offset of each variable.
    shared_bytes: the size of the shared variables whose size is known. labels: the index of the statement after each.
    targets: the labels of each list that an indexed branch selects from."""

    name: str
    parameters: dict[str, tuple[int, int]] = field(default_factory=dict)
    parameter_bytes: int = 0
    registers: dict[str, str] = field(default_factory=dict)
    shared: dict[str, int] = field(default_factory=dict)
    shared_bytes: int = 0
    statements: list[Statement] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    targets: dict[str, list[str]] = field(default_factory=dict)


def entries(ptx: str) -> list[str]:
    """The names of a module's kernels."""
    return re.findall(r"\.entry\s+(\w+)\s*\(", ptx)


def parse(ptx: str, name: str) -> Kernel:
    """Parses the kernel with this name.

    Raises:
        KeyError: the module has no kernel with this name.
    """
    start = re.search(rf"\.entry\s+{re.escape(name)}\s*\(", ptx)
    if start is None:
        raise KeyError(f"the module has the kernels {entries(ptx)}, but not {name}")
    opening = ptx.index("{", start.end())
    kernel = Kernel(name)
    for found in PARAMETER.finditer(ptx[start.end() : opening]):
        add_parameter(kernel, found["name"], found["type"], found["align"], found["count"])
    body = without_comments(body_from(ptx, opening))
    outside = without_comments(ptx[: ptx.index(".entry")])
    add_shared(kernel, outside, body)
    add_statements(kernel, body)
    return kernel


def body_from(ptx: str, opening: int) -> str:
    """The text between the brace at `opening` and the matching closing brace."""
    depth = 0
    for found in re.finditer(r"[{}]", ptx[opening:]):
        depth += 1 if found[0] == "{" else -1
        if depth == 0:
            return ptx[opening + 1 : opening + found.start()]
    raise ValueError("the module ends within a kernel")


def without_comments(text: str) -> str:
    return re.sub(r"//[^\n]*|^\s*\.(?:loc|file)\b[^\n]*", "", text, flags=re.MULTILINE)


def add_parameter(kernel: Kernel, name: str, kind: str, align: str | None, count: str | None) -> None:
    size = BYTES[kind] * int(count or 1)
    unit = int(align) if align else BYTES[kind]
    offset = -(-kernel.parameter_bytes // unit) * unit
    kernel.parameters[name] = (offset, size)
    kernel.parameter_bytes = offset + size


def add_shared(kernel: Kernel, outside: str, body: str) -> None:
    """Variables whose size is set at launch start after all others."""
    dynamic = []
    for align, name, count in SHARED.findall(outside + body):
        if count:
            offset = -(-kernel.shared_bytes // int(align)) * int(align)
            kernel.shared[name] = offset
            kernel.shared_bytes = offset + int(count)
        else:
            dynamic.append(name)
    kernel.shared |= dict.fromkeys(dynamic, kernel.shared_bytes)


def add_statements(kernel: Kernel, body: str) -> None:
    at, last_label = 0, ""
    while at < len(body):
        if body[at].isspace() or body[at] in "{}":  # A brace at the start of a statement opens or closes a scope.
            at += 1
        elif label := LABEL.match(body, at):
            last_label, at = label[1], label.end()
            kernel.labels[last_label] = len(kernel.statements)
        else:
            end = body.index(";", at)
            add_statement(kernel, " ".join(body[at:end].split()), last_label)
            at = end + 1


def add_statement(kernel: Kernel, text: str, last_label: str) -> None:
    if text.startswith(".reg"):
        kind, names = text.removeprefix(".reg").strip().removeprefix(".").split(None, 1)
        for name, count in REGISTERS.findall(names):
            kernel.registers |= {f"{name}{i}": kind for i in range(int(count))} if count else {name: kind}
    elif text.startswith(".branchtargets"):
        kernel.targets[last_label] = [name.strip() for name in text.removeprefix(".branchtargets").split(",")]
    elif not text.startswith((".shared", ".pragma")):
        predicate = PREDICATE.match(text)
        opcode, _, rest = text[predicate.end() if predicate else 0 :].partition(" ")
        operands = tuple(operand.strip() for operand in OPERAND.findall(rest))
        name, negated = (predicate[2], bool(predicate[1])) if predicate else (None, False)
        kernel.statements.append(Statement(text, opcode, operands, name, negated))
