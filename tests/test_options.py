"""Options of the whole optimizer: as attributes, misspelt, and in a place where they mean nothing."""

from __future__ import annotations

import ast
import inspect
import itertools
import math
import re
from typing import Any

import pytest
import torch
from cases import (
    ADAMW,
    LAMB,
    Case,
    Target,
    build,
    for_every_class,
    make_params,
    on_every_target,
    parameters,
    random_grads,
    set_grads,
    train,
)
from compare import assert_equal

import fused_optim
from fused_optim import FusedAdam, FusedAdamW, FusedLAMB, FusedLion, FusedOptimizer, FusedSGDW
from fused_optim.decay import Decoupled
from fused_optim.optim.options import Common, Decayed, Whole


def pair(target: Target, case: Case = ADAMW, **options: Any) -> tuple[Any, Any]:
    """An optimizer, and one that was made with the options."""
    return tuple(build(case, target, make_params(device=target.device), **made) for made in ({}, options))  # type: ignore[return-value]


# ---- attributes


@on_every_target
@pytest.mark.parametrize("case", [ADAMW, LAMB], ids=str)
def test_clipping_may_be_set_later(case: Case, target: Target) -> None:
    ours, theirs = pair(target, case, max_grad_norm=0.5)
    ours.max_grad_norm = 0.5
    train([ours, theirs], 2)
    assert ours.last_grad_norm.item() == theirs.last_grad_norm.item() > 0.5
    assert_equal([*parameters(ours)], [*parameters(theirs)])
    late = torch.nn.Parameter(torch.ones(3, device=target.device))
    ours.add_param_group({"params": [late]})
    assert [group["max_grad_norm"] for group in ours.param_groups] == [0.5, 0.5]


@pytest.mark.parametrize("off", [None, 0])
def test_clipping_may_be_taken_back(off: float | None) -> None:
    for case in (ADAMW, LAMB):
        optimizer = case.ours(make_params(), max_grad_norm=0.5)
        optimizer.max_grad_norm = off
        train([optimizer], 1)
        assert optimizer.max_grad_norm is None and optimizer.last_grad_norm is None
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(3))]})
        assert optimizer.param_groups[1].get("max_grad_norm") is None


def test_clipping_is_that_of_the_groups() -> None:
    optimizer = FusedAdamW(make_params(), max_grad_norm=0.5)
    other = FusedAdamW(make_params(), max_grad_norm=2.0)
    other.load_state_dict(optimizer.state_dict())
    assert other.max_grad_norm == 0.5
    other.param_groups[0]["max_grad_norm"] = 3.0
    assert other.max_grad_norm == 3.0
    other.add_param_group({"params": [torch.nn.Parameter(torch.ones(3))], "max_grad_norm": 1.0})
    with pytest.raises(AttributeError, match=r"different values of max_grad_norm, \[3\.0, 1\.0\]; read group"):
        _ = other.max_grad_norm
    other.max_grad_norm = 4.0
    assert [group["max_grad_norm"] for group in other.param_groups] == [4.0, 4.0]
    plain = FusedAdamW(make_params())
    plain.max_grad_norm = None
    assert plain.param_groups[0].keys() == FusedAdamW(make_params()).param_groups[0].keys()


@on_every_target
def test_norm_type_may_be_set_later(target: Target) -> None:
    ours, theirs = pair(target, max_grad_norm=0.5, norm_type=math.inf)
    ours.max_grad_norm, ours.norm_type = 0.5, math.inf
    train([ours, theirs], 1)
    assert ours.norm_type == math.inf
    assert_equal(ours.last_grad_norm, theirs.last_grad_norm)


@on_every_target
def test_skipping_may_be_set_later(target: Target) -> None:
    (optimizer, _) = pair(target)
    train([optimizer], 1)
    for skips in (True, False):
        optimizer.skip_nonfinite = skips
        grads = random_grads(parameters(optimizer), 1)
        grads[0][0, 0] = math.nan
        set_grads(parameters(optimizer), grads)
        optimizer.step()
        assert optimizer.skip_nonfinite is skips and optimizer.skipped_steps.item() == 1
        assert parameters(optimizer)[0].isnan().any() == (not skips)


@on_every_target
def test_averages_may_be_asked_for_later(target: Target) -> None:
    optimizer, theirs = pair(target, ema_decay=0.9)
    train([optimizer], 1)
    assert optimizer.ema is None and optimizer.ema_decay is None and optimizer.ema_dtype is None
    with pytest.raises(ValueError, match="set ema_decay first"):
        optimizer.ema_dtype = torch.float32
    optimizer.ema_decay = 0.5
    optimizer.ema_dtype = torch.bfloat16
    train([optimizer], 1)
    assert {average.dtype for average in optimizer.ema.values()} == {torch.bfloat16}
    train([theirs], 1)
    before = {p: average.clone() for p, average in theirs.ema.items()}
    theirs.ema_decay = 1.0  # its averages stay where they are
    train([theirs], 1)
    assert_equal(list(theirs.ema.values()), list(before.values()))
    theirs.ema_decay = None
    train([theirs], 1)
    assert theirs.ema is None


@on_every_target
def test_states_made_later_have_the_dtype_set_later(target: Target) -> None:
    p = torch.nn.Parameter(torch.ones(3, device=target.device))
    optimizer = build(ADAMW, target, [p])
    optimizer.state_dtype = torch.bfloat16
    train([optimizer], 1)
    assert optimizer.state_dtype == optimizer.state[p]["exp_avg"].dtype == torch.bfloat16


def test_the_backend_may_be_set_later() -> None:
    optimizer = FusedAdamW(make_params(), backend="cpp" if ADAMW_RUNS else "reference")
    train([optimizer], 1)
    optimizer.backend = "reference"
    train([optimizer], 1)
    assert [bound.name for bound in optimizer._tables] == ["reference"]
    with pytest.raises(ValueError, match="backend must be"):
        optimizer.backend = "fast"
    assert optimizer.backend == "reference"


ADAMW_RUNS = fused_optim.backends.available()["cpp"] is None


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("max_grad_norm", -1.0, "max_grad_norm must be 0 or more"),
        ("max_grad_norm", "1.0", "max_grad_norm must be 0 or more"),
        ("norm_type", 1, "norm_type must be 2 or inf"),
        ("state_dtype", torch.float64, "state_dtype must be None"),
        ("ema_decay", "0.9", "ema_decay must be a number from 0 to 1"),
        ("ema_decay", 1.5, "ema_decay must be a number from 0 to 1"),
        ("ema_dtype", torch.int8, "ema_dtype must be None"),
    ],
)
def test_bad_values_change_nothing(name: str, value: Any, message: str) -> None:
    optimizer = FusedAdamW(make_params(), max_grad_norm=0.5, ema_decay=0.9)
    before = getattr(optimizer, name)
    with pytest.raises(ValueError, match=message):
        setattr(optimizer, name, value)
    assert getattr(optimizer, name) == before


def test_backends_that_nobody_knows() -> None:
    """Where all params are frozen, too: none of them asks for a backend."""
    frozen = [torch.nn.Parameter(torch.ones(3), requires_grad=False)]
    with pytest.raises(ValueError, match='backend must be "auto" or one of'):
        FusedAdamW(frozen, backend="fast")  # type: ignore[arg-type]
    optimizer = FusedAdamW(frozen)
    with pytest.raises(ValueError, match='backend must be "auto" or one of'):
        optimizer.backend = "fast"  # type: ignore[assignment]


def test_what_cannot_be_set() -> None:
    optimizer = FusedAdamW(make_params())
    for name, value in (("norm_group", None), ("decay", "paper"), ("last_grad_norm", 1.0), ("skipped_steps", 0)):
        with pytest.raises(AttributeError, match=name):
            setattr(optimizer, name, value)


# ---- options that nobody knows


@for_every_class
def test_unknown_keywords(case: Case) -> None:
    name = case.ours.__name__
    for keyword, hint in (("max_grad_nrom", r'did you mean "max_grad_norm"\?'), ("weigth_decay", '"weight_decay"')):
        with pytest.raises(TypeError, match=rf'^{name}\(\) got an unexpected keyword argument "{keyword}"; .*{hint}'):
            case.ours(make_params(), **{**case.kwargs, keyword: 1.0})
    with pytest.raises(TypeError, match=rf'^{name}\(\) got an unexpected keyword argument "zzz"$'):
        case.ours(make_params(), **{**case.kwargs, "zzz": 1.0})


def test_options_of_another_class() -> None:
    with pytest.raises(TypeError, match='unexpected keyword argument "decay"'):
        FusedAdam(make_params(), decay="paper")  # type: ignore[call-arg]
    with pytest.raises(TypeError, match='unexpected keyword argument "eps"'):
        FusedLion(make_params(), eps=1e-8)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match='unexpected keyword argument "capturable"'):
        FusedSGDW(make_params(), capturable=True)  # type: ignore[call-arg]


@for_every_class
@pytest.mark.parametrize(
    "option",
    [
        {"ema_decay": 0.9},
        {"ema_dtype": torch.float32},
        {"skip_nonfinite": True},
        {"norm_type": math.inf},
        {"norm_group": "all"},
        {"backend": "reference"},
        {"master_weights": "exact"},
        {"rounding": "dithered"},
        {"decay": "none"},
    ],
    ids=lambda option: next(iter(option)),
)
def test_groups_have_no_options_of_the_whole(case: Case, option: dict[str, Any]) -> None:
    (name,) = option
    group = {"params": make_params(), **option}
    message = rf"a param group cannot have {name} of its own.*pass it to {case.ours.__name__}\("
    with pytest.raises(ValueError, match=message):
        case.ours([group], **case.kwargs)
    optimizer = case.ours(make_params(seed=1), **case.kwargs)
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group(group)
    assert len(optimizer.param_groups) == 1
    train([optimizer], 1)


def test_groups_that_repeat_an_option_of_the_whole() -> None:
    """As those of ZeroRedundancyOptimizer, which writes all options into its groups."""
    options: dict[str, Any] = {"ema_decay": 0.9, "skip_nonfinite": True, "norm_group": None, "decay": "torch"}
    optimizer = FusedAdamW([{"params": make_params(), **options}], **options)
    train([optimizer], 1)


def test_a_group_with_a_bad_bound() -> None:
    optimizer = FusedAdamW(make_params())
    with pytest.raises(ValueError, match="max_grad_norm must be 0 or more"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(3))], "max_grad_norm": -1.0})
    assert len(optimizer.param_groups) == 1


# ---- signatures


def default_of(name: str) -> Any:
    """What the base classes give an option."""
    for base in (FusedOptimizer, Decoupled):
        parameter = inspect.signature(base).parameters.get(name)
        if parameter is not None:
            return parameter.default
    raise KeyError(name)


def notes_of(kind: type) -> dict[str, tuple[str, str]]:
    """Annotation and docstring of every key that a TypedDict declares itself, by name."""
    (declared,) = ast.parse(inspect.getsource(kind)).body
    assert isinstance(declared, ast.ClassDef)
    body = [*declared.body, ast.Pass()]
    return {
        ast.unparse(key.target): (ast.unparse(key.annotation), str(ast.literal_eval(note.value)))
        for key, note in itertools.pairwise(body)
        if isinstance(key, ast.AnnAssign) and isinstance(note, ast.Expr)
    }


NOTES = {kind: notes_of(kind) for kind in (Whole, Common, Decayed)}


def test_the_typed_options_are_those_of_the_base_classes() -> None:
    """With the types and the defaults that their notes say; an IDE shows these notes, and no base class."""
    typed = {name: note for notes in NOTES.values() for name, note in notes.items()}
    assert list(typed) == list(Decayed.__annotations__)
    theirs = {
        name: parameter
        for base in (FusedOptimizer, Decoupled)
        for name, parameter in inspect.signature(base).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    }
    assert typed.keys() == theirs.keys()
    for name, (annotation, note) in typed.items():
        default = theirs[name].default
        assert note.startswith(f"Default {default!r}".replace("'", '"')), name
        same = annotation.replace("float | Callable[[int], float]", "Decay")
        assert same == theirs[name].annotation, name


@for_every_class
def test_every_option_is_in_the_signature(case: Case) -> None:
    """And in the docstring of the very class, with its default."""
    kind = case.ours
    parameters_ = inspect.signature(kind).parameters
    assert not [p for p in parameters_.values() if p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    wanted = {**NOTES[Whole], **NOTES[Common], **(NOTES[Decayed] if issubclass(kind, Decoupled) else {})}
    text = " ".join(str(kind.__doc__).split())
    for name in wanted:
        assert name in parameters_
        if name == "max_grad_norm" and kind is FusedLAMB:
            continue  # an argument of its own
        assert parameters_[name].default is default_of(name) or parameters_[name].default == default_of(name)
        assert f"{name}={default_of(name)!r}".replace("'", '"') in text, name
    for name, parameter in parameters_.items():
        assert parameter.annotation is not parameter.empty
        assert re.search(rf"\b{name}\b", text), name


def test_signatures_of_subclasses() -> None:
    """Of one's own: as written, and inherited."""

    class Same(FusedAdamW):
        pass

    class Other(FusedAdamW):
        def __init__(self, params: Any, scale: float = 1.0, **kwargs: Any) -> None:
            super().__init__(params, lr=1e-3 * scale, **kwargs)

    assert inspect.signature(Same) == inspect.signature(FusedAdamW)
    assert list(inspect.signature(Other).parameters) == ["params", "scale", "kwargs"]
    optimizer = Other(make_params(), 2.0, max_grad_norm=1.0)
    assert optimizer.max_grad_norm == 1.0


def test_a_bound_of_0_clips_nothing() -> None:
    """Where torch.nn.utils.clip_grad_norm_ makes gradients 0."""
    for case in (ADAMW, LAMB):
        ours, theirs = (case.ours(make_params(), max_grad_norm=bound) for bound in (0, None))
        train([ours, theirs], 2)
        assert_equal([*parameters(ours)], [*parameters(theirs)])
