"""Builds new tables: validates params and gradients, builds states, builds tables. The optimizer is not changed; the
base class installs the results."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .dtensor import Groups, first_element_of, groups_of, is_sharded, local
from .ema import EMA, WeightAverage
from .masters import LOW, MasterWeights
from .orthogonal import Settings, row_moments
from .orthogonal_spread import Orthogonalizer
from .scaling import Scaler
from .state_formats import ANCHOR, CODE_DTYPES, StateDtype, Storage, choices_of, convert, exponent_for, takes_codes
from .states import make_row, make_states, match_layout, match_running, match_scalar
from .table import HostHparams, Row, Rule, Table
from .validation import check_grad, check_hyperparameter, check_param, may_get_grad

ParamGroups = Sequence[dict[str, Any]]
States = Mapping[Tensor, dict[str, Any]]


def members_of(groups: ParamGroups) -> Iterator[tuple[Tensor, int, dict[str, Any]]]:
    """Every param, with the index of its group and the group."""
    return ((param, index, group) for index, group in enumerate(groups) for param in group["params"])


def names_of(groups: ParamGroups) -> list[str | None]:
    """The names of the params; None for each param that was given without a name."""
    return [name for group in groups for name in group.get("param_names", [None] * len(group["params"]))]


def validate(optimizer: str, rule: Rule, groups: ParamGroups, names: Sequence[str | None], state: States) -> None:
    """Raises RuntimeError, TypeError or ValueError for a param, gradient or hyperparameter that a step cannot use.

    optimizer: its class, for messages. names: of the params, None where they have none.
    """
    for (param, _, _), name in zip(members_of(groups), names, strict=True):
        if param.grad is not None or state.get(param):
            check_param(param)
        if param.grad is not None:
            check_grad(optimizer, param, param.grad, name)
    for group in groups:
        for key, _, count, optional, _ in rule.columns:
            if not optional or group.get(key) is not None:
                check_hyperparameter(key, group[key], count)
        if rule.of(group).orthogonal:
            Settings.of(group)


@dataclass
class Built:
    """The result of `build_states`.

    rows: one for each param that is stepped. pending: params without a gradient so far and without states.
    fresh: the states of each param with a row, in the order of `optimizer.state`. steps: the counts of updates of those
        whose states have no `step`. rules: the rule of each row.
    """

    rows: list[Row] = field(default_factory=list)
    pending: list[Tensor] = field(default_factory=list)
    fresh: dict[Tensor, dict[str, Any]] = field(default_factory=dict)
    steps: dict[Tensor, Tensor] = field(default_factory=dict)
    rules: list[Rule] = field(default_factory=list)


def build_states(
    rules: Rule,
    groups: ParamGroups,
    state: States,
    counts: Mapping[Tensor, Tensor],
    storage: Storage,
    ema: WeightAverage | None,
    masters: MasterWeights,
) -> Built:
    """Builds rows for all params that have a gradient or states, and makes missing states.

    counts: the number of updates of each param, for rules without a `step` in their states.
    """
    built = Built()
    for param, index, group in members_of(groups):
        kept, rule = state.get(param, {}), rules.of(group)
        old = {key: value for key, value in kept.items() if key != LOW}
        if param.grad is None and not old and param not in counts:
            built.pending.append(param)
            continue
        wanted = rule.states_of(group)
        state_dtype = group.get("state_dtype", storage.state_dtype)
        fresh = match_layout(param, old, wanted)
        if ANCHOR in old:
            fresh[ANCHOR] = old[ANCHOR]
        if fresh:
            fresh = convert(param, fresh, choices_of(state_dtype, rule), group.get("betas"))
        made = missing_states(rule, group, param, fresh, state_dtype, masters, kept)
        fresh.update(made)
        step = match_scalar(param, _count_of(rule, old, counts.get(param), begun=not made), "step")
        running = match_running(param, old, rule.running_of(group))
        row = make_row(param, fresh, wanted, step, index)
        row.running = [*running.values()]
        row.first_element, row.anchor = first_element_of(param), fresh.get(ANCHOR, 0)
        if rule.orthogonal:
            fresh |= row_moments(param, group, kept)
        if storage.dithered:
            row.dithered = frozenset(("param", "states", "ema"))
        elif state_dtype == "compact":
            row.dithered = frozenset(("states",))
        fresh |= masters.join(row, kept)
        if ema is not None:
            fresh[EMA] = ema.join(row, old, counts.get(param) if made else None)
        built.rows.append(row)
        built.rules.append(rule)
        if not rule.counted:
            built.steps[param] = step
        built.fresh[param] = {**({"step": step} if rule.counted else {}), **running, **fresh}
    return built


def make_eager_states(
    rule: Rule,
    group: Mapping[str, Any],
    state: MutableMapping[Tensor, dict[str, Any]],
    state_dtype: StateDtype,
    masters: MasterWeights,
) -> None:
    """Replaces the states of every param of a group by those that exist before the first step. Frozen params get
    none."""
    for param in group["params"]:
        state.pop(param, None)
        if may_get_grad(param):
            step = {"step": match_scalar(param, 0.0, "step")} if rule.counted else {}
            running = match_running(param, {}, rule.running_of(group))
            state[param] = {**step, **running, **missing_states(rule, group, param, {}, state_dtype, masters)}


def missing_states(
    rule: Rule,
    group: Mapping[str, Any],
    param: Tensor,
    state: dict[str, Any],
    state_dtype: StateDtype,
    masters: MasterWeights,
    kept: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """New tensors for the rule's states that `state` lacks, and the anchor of a new exp_avg in anchored8.

    state_dtype: of the optimizer; a group may have its own. kept: the present states, which may hold the lower half of
        the param.
    """
    rule = rule.of(group)
    wanted = rule.states_of(group)
    choices: dict[str, Any] = choices_of(group.get("state_dtype", state_dtype), rule)
    dtypes = dict.fromkeys(wanted, torch.float32) if masters.covers(param) else {}
    dtypes |= {name: CODE_DTYPES.get(choice, choice) for name, choice in choices.items()}
    copies = {name: masters.master(param, kept or {}) for name in rule.copies if name not in state}
    made = make_states(param, {**state, **copies}, wanted, dtypes, rule.starts_of(group))
    for name, master in copies.items():
        made |= make_states(param, {}, [name], dtypes)
        local(made[name]).copy_(local(master))
    if "exp_avg" in made and choices.get("exp_avg") == "anchored8" and takes_codes(param):
        made[ANCHOR] = exponent_for(*group["betas"])
    return made


def _count_of(rule: Rule, state: dict[str, Any], count: Tensor | None, begun: bool) -> Any:
    """The number of updates of a param. Rules without `step` only need to know whether there was one. A param that was
    loaded with states had one."""
    if rule.counted:
        return state.get("step", 0.0)
    if not begun:
        return 0.0
    return (1.0 if state else 0.0) if count is None else count


def make_hparams(rule: Rule, groups: ParamGroups, scaler: Scaler, ema: WeightAverage | None) -> HostHparams:
    """The hyperparameters of all groups. A change detector fills in the options of the groups."""
    max_norm = scaler.bound_without_key(groups)
    hparams = HostHparams(len(groups), clip_eps=rule.clip_eps, first_decay=rule.first_decay, max_norm=max_norm)
    if ema is not None:
        hparams.column("ema_decay").fill_(ema.current)
    return hparams


def build_tables(
    built: Built,
    groups: ParamGroups,
    scaler: Scaler,
    hparams: HostHparams,
    sharers: Any = None,
) -> list[Table]:
    """A table for each rule and device. If something is summed over whole tensors, tensors that are summed over
    different processes are in different tables.

    hparams: of all groups. sharers: the process group that shares the work of an orthogonal rule, or None.
    """
    looks = scaler.looks_at(groups)
    cautious = any(group.get("cautious_decay") for group in groups)
    by_place: dict[tuple[str, torch.device, bool, Groups], list[Row]] = {}
    for row, its_rule in zip(built.rows, built.rules, strict=True):
        spread = groups_of(row.param) if looks or its_rule.trust else ()
        alone = scaler.norm_group is not None and is_sharded(row.param)
        by_place.setdefault((its_rule.name, row.shard.device, alone, spread), []).append(row)
    by_name = {its_rule.name: its_rule for its_rule in built.rules}
    tables = []
    for (name, device, _, spread), members in by_place.items():
        orthogonalize = Orthogonalizer(members, groups, sharers) if by_name[name].orthogonal else None
        tables.append(Table(by_name[name], device, members, hparams, looks, spread, orthogonalize, cautious))
    return tables
