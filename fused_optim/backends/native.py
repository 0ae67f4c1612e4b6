"""Tables as the compiled modules take them: by the addresses of their arrays."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from torch import Tensor

from ..engine.layout import TableArrays
from ..engine.table import Table


def address_of(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def arrays_of(module: ModuleType, table: Table, arrays: TableArrays) -> Any:
    """Whoever keeps this keeps `arrays` alive: it holds addresses."""
    addresses = list(map(address_of, arrays))
    rows = len(table.rows_list)
    return module.Arrays(addresses, table.chunk_table.numel(), rows, table.elements, table.ema, table.packed)
