"""The option `state_dtype`, and conversions of states between formats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from . import formats
from .dtensor import like, local
from .table import NARROW, PACKED_DTYPES, HostHparams, Row, Rule

Code = Literal["e8m8", "anchored8"]
StateDtype = torch.dtype | Literal["compact"] | Mapping[str, torch.dtype | Code] | None


class Storage(NamedTuple):
    """The storage options of an optimizer. dithered: whether bfloat16 tensors are rounded with dithering."""

    state_dtype: StateDtype
    dithered: bool


ANCHOR = "anchor"  # key in optimizer.state[param], beside an exp_avg in anchored8
CODE_DTYPES: dict[Any, torch.dtype] = {"e8m8": torch.uint16, "anchored8": torch.uint8}
SQUARES = ("exp_avg_sq", "max_exp_avg_sq")
CHOICES = (
    'None, torch.float32, torch.bfloat16, torch.float16, "compact", or a dict from names of states to these dtypes, '
    '"e8m8" or "anchored8"'
)


def check_state_dtype(value: Any, rule: Rule) -> None:
    """Raises ValueError unless an optimizer with this rule accepts it as state_dtype."""
    if not isinstance(value, Mapping):
        if value not in (None, "compact", *NARROW):
            raise ValueError(f"state_dtype must be {CHOICES}, but got {value!r}")
        return
    for name, choice in value.items():
        if name not in rule.all_states:
            raise ValueError(
                f"state_dtype names the state {name!r}, but the states of this optimizer are "
                f"{', '.join(rule.all_states)}"
            )
        if choice not in (*NARROW, *CODE_DTYPES):
            raise ValueError(f"state_dtype[{name!r}] must be a dtype of {CHOICES}, but got {choice!r}")
        if choice == "e8m8" and name not in SQUARES:
            raise ValueError(
                f'"e8m8" stores values that are never negative, {" and ".join(SQUARES)}, but state_dtype gives it to '
                f"{name!r}; use torch.bfloat16"
            )
        anchored = any(is_anchored(each) for each in (rule, rule.otherwise) if each is not None)
        if choice == "anchored8" and not (name == "exp_avg" and anchored):
            raise ValueError(
                f'"anchored8" stores exp_avg relative to the root of exp_avg_sq, but state_dtype gives it to {name!r} '
                f"of an optimizer with the states {', '.join(rule.all_states)}; use torch.bfloat16"
            )


def is_anchored(rule: Rule) -> bool:
    """Whether anchored8 can store the exp_avg of a rule, relative to the root of exp_avg_sq."""
    return rule.bounded and {"exp_avg", "exp_avg_sq"} <= {*rule.states}


def choices_of(value: StateDtype, rule: Rule) -> dict[str, torch.dtype | Code]:
    """The format that a state_dtype chooses for each state. States that keep their param's dtype have no entry."""
    if value is None:
        return {}
    if isinstance(value, Mapping):
        return dict(value)
    if value != "compact":
        return dict.fromkeys(rule.states, value)
    names = [name for name in rule.states if name not in rule.copies]
    compact: dict[str, torch.dtype | Code] = dict.fromkeys(names, torch.bfloat16)
    compact |= {name: "e8m8" for name in names if name in SQUARES}
    return compact | ({"exp_avg": "anchored8"} if is_anchored(rule) else {})


def check_betas(value: StateDtype, rule: Rule, betas: Any) -> None:
    """Raises ValueError if exp_avg is stored in anchored8 and these betas do not bound it."""
    if choices_of(value, rule).get("exp_avg") == "anchored8":
        exponent_for(*betas)


def exponent_for(beta1: float | Tensor, beta2: float | Tensor) -> int:
    """The exponent of the anchors for these betas. Raises ValueError if they do not bound exp_avg."""
    exponent = formats.anchor_exponent(float(beta1), float(beta2))
    if exponent is None:
        raise ValueError(
            f'"anchored8" needs betas with betas[0]**2 < betas[1], which bounds exp_avg by the root of exp_avg_sq, but '
            f'got {(float(beta1), float(beta2))}; use state_dtype={{"exp_avg": torch.bfloat16, "exp_avg_sq": "e8m8"}}'
        )
    return exponent


class AnchorWatch:
    """Detects betas for which the anchors of an exp_avg in anchored8 are too small. Betas may change at every step.

    seen: the betas at the last check, float64 [groups] each. anchors: float64 [groups], the smallest exponent in the
        group; inf if the group has no state in anchored8.
    """

    def __init__(self, hparams: HostHparams, rows: Sequence[Row]) -> None:
        self.beta1, self.beta2 = hparams.column("beta1"), hparams.column("beta2")
        self.seen = self.beta1.clone(), self.beta2.clone()
        self.anchors = torch.full_like(self.beta1, torch.inf)
        for row in rows:
            if any(state.dtype == CODE_DTYPES["anchored8"] for state in row.states):
                self.anchors[row.group_index] = min(float(self.anchors[row.group_index]), row.anchor)
        self.needed = bool(self.anchors.isfinite().any())

    def outgrown(self) -> bool:
        """Whether a state must be encoded again, or the betas no longer bound it."""
        if not self.needed or (torch.equal(self.beta1, self.seen[0]) and torch.equal(self.beta2, self.seen[1])):
            return False
        self.seen = self.beta1.clone(), self.beta2.clone()
        return bool((formats.anchor_exponents(*self.seen) > self.anchors).any())


def takes_codes(param: Tensor) -> bool:
    """Whether the states of a param can have packed formats, which need float32 arithmetic."""
    return param.dtype in NARROW


def is_coded(state: Tensor) -> bool:
    return state.dtype in PACKED_DTYPES


@torch.no_grad()
def decoded(states: Mapping[str, Any], name: str) -> Tensor:
    """The values of a state. Codes are decoded to float32; any other state is returned itself.

    Raises:
        RuntimeError: the state is in anchored8, and exp_avg_sq or the anchor is missing.
    """
    state = states[name]
    if not is_coded(state):
        return state
    codes = local(state)
    if codes.dtype == CODE_DTYPES["e8m8"]:
        return like(state, formats.decode_e8m8(codes))
    if ANCHOR not in states or "exp_avg_sq" not in states:
        raise RuntimeError(
            f'state "{name}" is in anchored8, so the states must hold "exp_avg_sq" and "{ANCHOR}" too, but hold '
            f"{', '.join(states)}; load the whole checkpoint"
        )
    square = local(decoded(states, "exp_avg_sq"))
    return like(state, formats.decode_anchored8(codes, square, int(states[ANCHOR])))


@torch.no_grad()
def encoded(value: Tensor, choice: torch.dtype | Code, square: Tensor | None, exponent: int) -> Tensor:
    """Converts a state to another format, with rounding to nearest. square: the stored exp_avg_sq, for anchored8."""
    shard = local(value)
    if isinstance(choice, torch.dtype):
        made = shard.to(choice)
    elif choice == "e8m8":
        made = formats.encode_e8m8(shard, formats.NEAREST)
    else:
        assert square is not None
        made = formats.encode_anchored8(shard, local(square), exponent, formats.NEAREST)
    return like(value, torch.empty_like(shard, dtype=made.dtype).copy_(made))


def format_name(state: Tensor) -> torch.dtype | Code:
    names: dict[torch.dtype, Code] = {torch.uint16: "e8m8", torch.uint8: "anchored8"}
    return names.get(state.dtype, state.dtype)


def convert(
    param: Tensor,
    states: dict[str, Any],
    choices: Mapping[str, torch.dtype | Code],
    betas: Sequence[float | Tensor] | None,
) -> dict[str, Any]:
    """Converts loaded states to the formats of an optimizer.

    choices: the wanted formats, see choices_of. Codes are decoded if a dtype is wanted, and states are encoded if codes
        are wanted. A state keeps its dtype if another dtype is wanted, and its format if there is no choice for it.

    Returns:
        The states, and the anchor if exp_avg is in anchored8. States that fit are not copied.

    Raises:
        ValueError: exp_avg is to be in anchored8, and the betas do not bound it.
        RuntimeError: a state is in anchored8, and exp_avg_sq or the anchor is missing.
    """
    tensors = {name: state for name, state in states.items() if name != ANCHOR}
    stored = {name: format_name(state) for name, state in tensors.items()}
    targets: dict[str, torch.dtype | Code] = {}
    for name, found in stored.items():
        choice = choices.get(name, found) if takes_codes(param) else param.dtype
        targets[name] = choice if choice in CODE_DTYPES or found in CODE_DTYPES else found

    anchored, exponent = targets.get("exp_avg") == "anchored8", 0
    if anchored:
        assert betas is not None
        exponent = exponent_for(*betas)
        if stored["exp_avg"] == "anchored8" and ANCHOR in states:
            exponent = max(exponent, int(states[ANCHOR]))
    if targets == stored and (not anchored or ("exp_avg_sq" in states and states.get(ANCHOR) == exponent)):
        return states

    values = {name: decoded(states, name) for name in tensors}
    made = dict(tensors)
    for name in sorted(tensors, key=lambda name: name == "exp_avg"):  # after exp_avg_sq
        if targets[name] != stored[name] or targets[name] == "anchored8":
            square = decoded(made, "exp_avg_sq") if targets[name] == "anchored8" else None
            made[name] = encoded(values[name], targets[name], square, exponent)
    return {**made, ANCHOR: exponent} if anchored else made
