"""The structure of the package: a module imports only from its own room and from lower ones."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import ROOT

PACKAGE = ROOT / "fused_optim"
# The lowest room first. A room may import itself and the rooms before it, the top of the package may import all.
ROOMS = ("engine", "backends", "optim", "recipes", "interop", "cost")
FILES = sorted(file for file in PACKAGE.rglob("*.py") if file.parent.name in ROOMS)
# Imports inside functions: these names exist only after the package was imported.
TOP = {("engine/modules.py", "__version__"), ("cost/step_cost.py", "fused_optim"), ("interop/timm.py", "fused_optim")}


def imported(file: Path) -> Iterator[tuple[str, ...]]:
    """The modules of the package that a file imports, as tuples of names without the package's name."""
    package = file.relative_to(PACKAGE).parent.parts
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                first, *rest = alias.name.split(".")
                if first == PACKAGE.name:
                    yield tuple(rest) or (PACKAGE.name,)
        elif isinstance(node, ast.ImportFrom):
            parts = tuple(node.module.split(".")) if node.module else ()
            if node.level:
                parts = package[: len(package) - node.level + 1] + parts
            elif parts[:1] == (PACKAGE.name,):
                parts = parts[1:]
            else:
                continue
            yield from [parts] if parts else [(alias.name,) for alias in node.names]


def test_every_module_is_in_a_room() -> None:
    """At the top there are only the entry points and the old public paths of moved modules, which define nothing."""
    assert {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"} == {*ROOMS}
    for file in PACKAGE.glob("*.py"):
        if file.name not in ("__init__.py", "__main__.py"):
            kinds = {type(node) for node in ast.parse(file.read_text()).body}
            assert kinds <= {ast.Expr, ast.ImportFrom, ast.Assign}, file


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_go_down(file: Path) -> None:
    room = ROOMS.index(file.parent.name)
    for parts in imported(file):
        if (str(file.relative_to(PACKAGE)), parts[0]) in TOP or parts[0] == "triton_kernels":
            continue
        assert parts[0] in ROOMS[: room + 1], f"{file} imports {'.'.join(parts)}"


def test_the_reader_of_imports_sees_all_forms() -> None:
    found = {parts for file in FILES for parts in imported(file)}
    assert {("engine", "table"), ("backends",), ("optim", "base"), ("fused_optim",), ("triton_kernels",)} <= found
