"""Chooses the backend for a table. Its kernels are compiled, loaded and launched on trial before a step changes
anything, so that another backend can take over if one of them fails."""

from __future__ import annotations

from typing import Any

import torch

from .. import backends
from ..engine.backend import Backend, Scaling
from ..engine.layout import Format
from ..engine.table import DTYPE_CODES, LOW_FORMATS, PACKED_DTYPES, HostHparams, Row, Rule, Table

_passed: set[tuple[Any, ...]] = set()


def choose(name: str, table: Table, steps: bool = True) -> Backend:
    """Binds a table to the backend called `name`, after a trial of the kernels that it launches for this table. If the
    trial fails, "auto" warns and goes on with the next backend.

    steps: True if the table will be stepped; False if only its gradients are clipped in place.

    Raises:
        ValueError: there is no backend of that name.
        RuntimeError: the named backend cannot run tensors of that device, or its trial failed. The message gives the
            reason.
    """
    while True:
        backend = backends.pick(name, table.device)
        if not is_tried(backend, table.device):
            return backend.bind(table)
        kernels = table.dtype_signatures, table.clips, table.ema, table.cautious, steps
        key = (backend.name, table.device, table.rule.name, *kernels)
        if key in _passed:
            return backend.bind(table)
        try:
            run_trial(backend, table, steps)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            reason = trial_failure(error)
            if name != "auto":
                raise RuntimeError(
                    f'backend="{name}" cannot step tensors on {table.device}: {reason}. Nothing has been changed'
                ) from error
            backends.FAILED[backend.name, table.device] = reason
        else:
            _passed.add(key)
            return backend.bind(table)


def is_tried(backend: type[Backend], device: torch.device) -> bool:
    """Whether the backend compiles or loads its kernels at the first launch on that device. This can fail."""
    return device.type != "cpu" and backend.compiles


def why_not(name: str, device: torch.device) -> str | None:
    """The reason why a backend does not work on a device, or None. Includes a trial of AdamW in float32."""
    backend = backends.BACKENDS[name]
    if (reason := backend.why_not(device)) is not None:
        return reason
    try:
        run_trial(backend, adamw_table(device), steps=True)
    except Exception as error:
        return trial_failure(error)
    return None


def trial_failure(error: Exception) -> str:
    text = " ".join(str(error).split())[:2000].rstrip(". ")
    return f"its trial launch failed with {type(error).__name__}{': ' if text else ''}{text}"


def run_trial(backend: type[Backend], table: Table, steps: bool) -> None:
    """Launches every kernel that steps of the table launch, and waits for them. The kernels run on other tensors of the
    same dtypes, which have no gradients and so stay unchanged. The tensors of the table are not touched."""
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
    """A table of the same dtype signatures in the same order, with one row each: one element without a gradient."""
    made = _table_of(table.rule, table.device, table.dtype_signatures, table.clips, table.ema)
    made.cautious = table.cautious
    return made


def adamw_table(device: torch.device) -> Table:
    return _table_of(Rule("adam", ("exp_avg", "exp_avg_sq"), ()), device, ((int(Format.FLOAT32),) * 4,), False, False)


def _table_of(
    rule: Rule, device: torch.device, signatures: tuple[tuple[int, ...], ...], clips: bool, ema: bool
) -> Table:
    dtypes = {int(code): dtype for dtype, code in (DTYPE_CODES | PACKED_DTYPES).items()}
    dtypes |= dict.fromkeys((int(Format.BFLOAT16_DITHERED), *map(int, LOW_FORMATS.values())), torch.bfloat16)
    low_dtypes = {int(code): dtype for dtype, code in LOW_FORMATS.items()}
    dithered = int(Format.BFLOAT16_DITHERED)
    rows = []
    for param_code, grad_code, *codes in signatures:
        param, *others = (torch.zeros(1, dtype=dtypes[code], device=device) for code in (param_code, *codes))
        average = others.pop() if ema else None
        step = torch.zeros((), device=device)
        row = Row(param, param, param, others, step, {}, dtypes[grad_code], 0, average)
        if param_code in low_dtypes:
            row.low = torch.zeros(1, dtype=low_dtypes[param_code], device=device)
        states = len(others) - rule.orthogonal
        if rule.orthogonal:
            row.workspace = others[-1]
        places = {"param": [param_code], "states": codes[:states], "ema": codes[len(others) :]}
        row.dithered = frozenset(name for name, found in places.items() if dithered in found)
        rows.append(row)
    with torch.device("cpu"):
        return Table(rule, device, rows, HostHparams(1, clip_eps=rule.clip_eps, max_norm=1.0), clips)
