"""The compiled modules of the kernels: whether they have all rules, and tables passed as the addresses of their
arrays."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from torch import Tensor

from ..engine import modules
from ..engine.layout import TableArrays
from ..engine.table import Table
from .reference_rules import RULES


def with_all_rules(module: ModuleType | str) -> ModuleType | str:
    """The module, or the reason why it cannot be used. A module that was built before a rule was added lacks it."""
    if isinstance(module, str) or RULES.keys() <= set(module.RULES):
        return module
    missing = ", ".join(name for name in RULES if name not in module.RULES)
    return f"{module.__name__} was built without the rule {missing}; {modules.REINSTALL}"


def stale() -> dict[str, str]:
    """The modules that are built but cannot be used with these Python files, and the reasons. The tests fail if there
    is one, because otherwise they would skip it."""
    kernels = [name for name in modules.NAMES if not name.startswith("_poll")]
    found = {name: with_all_rules(module) for name in kernels if isinstance(module := modules.load(name), ModuleType)}
    return modules.stale() | {name: reason for name, reason in found.items() if isinstance(reason, str)}


def address_of(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def arrays_of(module: ModuleType, table: Table, arrays: TableArrays) -> Any:
    """The module's Arrays object. It holds addresses only, so the caller must keep `arrays` alive."""
    addresses = list(map(address_of, arrays))
    rows = len(table.rows_list)
    return module.Arrays(addresses, table.chunk_table.numel(), rows, table.elements, table.ema, table.packed)
