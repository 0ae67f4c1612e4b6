"""Plans: what a step of some of an optimizer's params needs. A plain step has one plan for all params. With gradient
release each bucket of params has one."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..backends.trial import choose
from ..engine.backend import Backend
from ..engine.build import Built, ParamGroups, build_states, build_tables, make_hparams, names_of, validate
from ..engine.changes import REBUILD, detect_changes
from ..engine.dtensor import local
from ..engine.state_formats import ANCHOR, AnchorWatch, Storage
from ..engine.table import HostHparams
from .masters import Mastered

SLOW_BETA2 = 0.99  # from here on an average of squares in bfloat16 is off by several percent
SLOW_AVERAGES = "slow averages"
told: set[str] = set()  # warnings that this process has given


@dataclass
class Plan:
    """The tables of some params, bound to their backends.

    detector: looks for changes to what the tables were built from. guarded: params whose writes torch counts, in the
    detector's order. anchors: looks for betas that an exp_avg in anchored8 has no room for.
    """

    tables: list[Backend]
    detector: Any
    guarded: list[Tensor]
    anchors: AnchorWatch

    @property
    def is_meta(self) -> bool:
        """Whether a param is on meta. The detector cannot describe it."""
        return any(bound.table.is_meta for bound in self.tables)

    @property
    def on_cuda(self) -> bool:
        return any(bound.table.device.type == "cuda" for bound in self.tables)


@torch.no_grad()
def make_plan(optimizer: Mastered, groups: ParamGroups, shared: HostHparams | None = None) -> Plan:
    """Makes the states that the params of these groups lack, and their tables. The optimizer is changed only if all of
    this succeeds.

    groups: the optimizer's own, or copies of them with some of their params.
    shared: the hyperparameters of all plans of the optimizer. Their owner watches the groups and `optimizer.state`, so
        the detector of this plan watches the tensors alone.

    Raises:
        RuntimeError, TypeError, ValueError: a param, gradient, state or hyperparameter cannot be used in a step.
    """
    rule, state, ema, masters = optimizer.rule, optimizer.state, optimizer._ema, optimizer._masters
    validate(type(optimizer).__name__, rule, groups, names_of(groups), state)
    storage = Storage(optimizer._state_dtype, optimizer._rounding == "dithered")
    built = build_states(rule, groups, state, optimizer._steps, storage, ema, masters)
    hparams = make_hparams(rule, groups, optimizer._scaler, ema) if shared is None else shared
    made = build_tables(built, groups, optimizer._scaler, hparams, optimizer._sharers.value)
    tables = [choose(optimizer._backend, table) for table in made]

    # Nothing may fail from here to the detector, which fails only if another thread interferes.
    for row in built.rows:  # the state dicts stay the same objects, which others may hold
        fresh = built.fresh[row.param]
        row.state = state[row.param] if fresh else state.get(row.param, {})
        row.state.update(fresh)
        if ANCHOR not in fresh:
            row.state.pop(ANCHOR, None)
    if not rule.counted:
        optimizer._steps.update(built.steps)
    guarded = masters.guard(built.rows)
    watched: tuple[list[dict[str, Any]], dict[Tensor, dict[str, Any]]] = optimizer.param_groups, state
    if shared is not None:
        watched = [], {row.param: row.state for row in built.rows}
    detector = detect_changes(*watched, rule, hparams, built.pending, made, [local(param) for param in guarded])
    if detector.poll() & REBUILD:
        raise RuntimeError(
            "params, gradients or states changed while the step was being prepared; was another thread at them?"
        )
    tell_of_slow_averages(built, groups)
    return Plan(tables, detector, guarded, AnchorWatch(hparams, built.rows))


def tell_of_slow_averages(built: Built, groups: ParamGroups) -> None:
    """Warns, once per process, of an exp_avg_sq in bfloat16 that is rounded to nearest and has a beta2 near 1."""
    if SLOW_AVERAGES in told:
        return
    for row, rule in zip(built.rows, built.rules, strict=True):
        if "exp_avg_sq" not in rule.states:
            continue
        beta2 = float(groups[row.group_index]["betas"][1])
        square = row.states[rule.states.index("exp_avg_sq")]
        if beta2 < SLOW_BETA2 or square.dtype != torch.bfloat16 or "states" in row.dithered or square.is_meta:
            continue
        told.add(SLOW_AVERAGES)
        warnings.warn(
            f"exp_avg_sq is stored in bfloat16 and rounded to nearest, and beta2 is {beta2}. Changes below half a unit "
            "in the last place are lost: at beta2 = 0.999 exp_avg_sq ends 25 % too large, and steps are too small. "
            'Pass rounding="dithered", state_dtype="compact" or state_dtype=torch.float32. This is said once',
            stacklevel=9,
        )
        return
