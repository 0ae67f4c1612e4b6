"""Walks over every table of an optimizer: once, or twice if the rule of the table has a trust ratio."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch

from .backend import Scaling, Tables
from .dtensor import reduce_over
from .table import Table


def walk(tables: Tables, scalings: Sequence[Scaling]) -> None:
    """Steps every table.

    Raises:
        RuntimeError: a walk failed. The message says what was changed.
    """
    fates = ["unchanged"] * len(tables)
    try:
        for number, (bound, scaling) in enumerate(zip(tables, scalings, strict=True)):
            fates[number] = "possibly changed in part"
            bound.step(scaling)
            fates[number] = "states and step counts updated, params not"
            if not bound.table.rule.trust:
                if bound.table.copies:
                    copy_out(bound.table)
                fates[number] = "updated"
        again = [number for number, bound in enumerate(tables) if bound.table.rule.trust]
        sum_over_processes([tables[number].table for number in again])
        for number in again:
            bound = tables[number]
            if bound.table.orthogonalize is not None and not bound.table.is_meta:
                bound.table.orthogonalize(bound.table)
            bound.apply_update()
            if bound.table.copies:
                copy_out(bound.table)
            fates[number] = "updated"
    except BaseException as error:
        places = [bound.table.device for bound in tables]
        found = "; ".join(f"{place}: {fate}" for place, fate in zip(places, fates, strict=True))
        text = (
            f"a step ended before it was complete ({type(error).__name__}: {error}). Tensors on {found}. Load a "
            "checkpoint to continue"
        )
        if isinstance(error, Exception):
            raise RuntimeError(text) from error
        warnings.warn(text, stacklevel=4)
        raise


@torch.no_grad()
def copy_in(table: Table) -> None:
    """Copies params that kernels cannot read directly into the dense tensors that the kernels update instead."""
    for row in table.copies:
        row.target.copy_(row.shard)


@torch.no_grad()
def copy_out(table: Table) -> None:
    """Copies these dense tensors back into their params."""
    for row in table.copies:
        if row.param.grad is not None:
            row.shard.copy_(row.target)


def sum_over_processes(tables: Sequence[Table]) -> None:
    """Sums the squares for the trust ratios over the processes that hold shards of the same tensors."""
    for table in tables:
        if table.process_groups and table.sums is not None:
            (total,) = reduce_over([table.sums], [table.process_groups])
            table.sums.copy_(total)
