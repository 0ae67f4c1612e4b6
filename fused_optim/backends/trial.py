"""The choice of the backend for a table. Kernels are compiled, loaded and launched before a step changes anything: what
fails then can still be replaced."""

from __future__ import annotations

from typing import Any

import torch

from .. import backends
from ..engine.backend import Backend, Scaling
from ..engine.table import DTYPE_CODES, Row, Rule, Scalars, Table

_passed: set[tuple[Any, ...]] = set()


def choose(name: str, table: Table, steps: bool = True) -> Backend:
    """Binds a table to the backend called `name`, after a trial of what that launches for it. "auto" falls through to
    the next one where that fails, with a warning.

    steps: whether the table will be stepped; else its gradients are clipped where they stand.

    Raises:
        ValueError: there is no backend of that name.
        RuntimeError: the named backend cannot run tensors of that device, or its trial failed; says why.
    """
    while True:
        backend = backends.pick(name, table.device)
        if not is_tried(backend, table.device):
            return backend.bind(table)
        key = (backend.name, table.device, table.rule.name, table.kinds, table.clips, table.ema, steps)
        if key in _passed:
            return backend.bind(table)
        try:
            run_trial(backend, table, steps)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            reason = told_by(error)
            if name != "auto":
                raise RuntimeError(
                    f'backend="{name}" cannot step tensors on {table.device}: {reason}. Nothing has been changed'
                ) from error
            backends.FAILED[backend.name, table.device] = reason
        else:
            _passed.add(key)
            return backend.bind(table)


def is_tried(backend: type[Backend], device: torch.device) -> bool:
    """Whether its kernels are compiled or loaded at their first launch, which may fail."""
    return device.type != "cpu" and backend.compiles


def why_not(name: str, device: torch.device) -> str | None:
    """As the backend's own why_not, and after a trial of AdamW in float32."""
    backend = backends.BACKENDS[name]
    if (reason := backend.why_not(device)) is not None:
        return reason
    try:
        run_trial(backend, adamw_table(device), steps=True)
    except Exception as error:
        return told_by(error)
    return None


def told_by(error: Exception) -> str:
    text = " ".join(str(error).split())[:2000].rstrip(". ")
    return f"its trial launch failed with {type(error).__name__}{': ' if text else ''}{text}"


def run_trial(backend: type[Backend], table: Table, steps: bool) -> None:
    """Launches every kernel that the table's steps will launch, and waits for them. No tensor of the table is touched:
    they pass over others of the same dtypes, which have no gradient, and so leave them alone."""
    trial = without_gradients(table)
    bound = backend.bind(trial)
    bound.upload(0)
    if trial.squares is not None:
        bound.sum_squares(trial.squares)
    if steps:
        bound.step(Scaling(squares=trial.squares))
        if trial.rule.trust:
            bound.apply_update()
    elif trial.squares is not None:
        bound.scale_grads(trial.squares)
    if trial.device.type == "cuda":
        torch.cuda.current_stream(trial.device).synchronize()


def without_gradients(table: Table) -> Table:
    """A table of the same kinds in the same order, each with one tensor of one element that has no gradient."""
    return _table_of(table.rule, table.device, table.kinds, table.clips, table.ema)


def adamw_table(device: torch.device) -> Table:
    return _table_of(Rule("adam", ("exp_avg", "exp_avg_sq"), ()), device, ((0, 0, 0, 0),), False, False)


def _table_of(rule: Rule, device: torch.device, kinds: tuple[tuple[int, ...], ...], clips: bool, ema: bool) -> Table:
    dtypes = {code: dtype for dtype, code in DTYPE_CODES.items()}
    rows = []
    for param_code, grad_code, *codes in kinds:
        param, *others = (torch.zeros(1, dtype=dtypes[code], device=device) for code in (param_code, *codes))
        average = others.pop() if ema else None
        step = torch.zeros((), device=device)
        rows.append(Row(param, param, param, others, step, {}, dtypes[grad_code], 0, average))
    with torch.device("cpu"):
        return Table(rule, device, rows, Scalars(1, rule.clip_eps, 1.0), clips)
