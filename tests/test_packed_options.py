"""Packed states: options, changes of options, checkpoints and conversions between formats."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from cases import (
    ADAMW,
    AMSGRAD,
    BY_NAME,
    Case,
    build,
    build_torch,
    copies,
    make_params,
    parameters,
    random_grads,
    set_grads,
)
from compare import assert_equal
from packed import BF16, REFERENCE, STORED, array, values_of
from torch import Tensor, nn

from fused_optim import convert

# ---- options


def trained(steps: int = 3, case: Case = AMSGRAD, **options: Any) -> Any:
    params = make_params(((33,), (4, 5)), options.pop("dtype", torch.float32))
    ours = build(case, REFERENCE, params, **options)
    for step in range(steps):
        set_grads(params, random_grads(params, step))
        ours.step()
    return ours


def dtypes(optimizer: Any, index: int = 0) -> dict[str, torch.dtype]:
    state = optimizer.state[parameters(optimizer)[index]]
    return {k: v.dtype for k, v in state.items() if isinstance(v, Tensor) and k != "step"}


COMPACT = {"exp_avg": torch.uint8, "exp_avg_sq": torch.uint16, "max_exp_avg_sq": torch.uint16}


def test_formats_by_name_and_by_group() -> None:
    assert dtypes(trained(state_dtype="compact")) == COMPACT
    assert dtypes(trained(state_dtype={"exp_avg_sq": "e8m8"})) == {
        "exp_avg": torch.float32,
        "exp_avg_sq": torch.uint16,
        "max_exp_avg_sq": torch.float32,
    }
    assert dtypes(trained(case=BY_NAME["sgd-dampening-maximize"], state_dtype="compact")) == {"momentum_buffer": BF16}
    assert dtypes(trained(case=BY_NAME["lion-paper-maximize"], state_dtype="compact")) == {"exp_avg": BF16}
    first, second = make_params(((8,), (8,)))
    groups = [{"params": [first], "state_dtype": torch.float32}, {"params": [second]}]
    ours = ADAMW.ours(groups, backend="reference", state_dtype="compact")
    for p in (first, second):
        p.grad = torch.ones_like(p)
    ours.step()
    assert dtypes(ours, 0)["exp_avg"] == torch.float32 and dtypes(ours, 1)["exp_avg"] == torch.uint8
    wide = nn.Parameter(torch.ones(3, dtype=torch.float64))
    wide.grad = torch.ones_like(wide)
    ours = ADAMW.ours([wide], backend="reference", state_dtype="compact", master_weights="exact", rounding="dithered")
    ours.step()
    assert dtypes(ours) == {"exp_avg": torch.float64, "exp_avg_sq": torch.float64}


def test_set_later() -> None:
    ours = trained(state_dtype="compact")
    ours.state_dtype = torch.float32
    ours.step()
    assert set(dtypes(ours).values()) == {torch.float32}
    assert "anchor" not in ours.state[parameters(ours)[0]]
    ours.state_dtype = "compact"
    ours.rounding = "dithered"
    ours.step()
    assert dtypes(ours) == COMPACT


def test_betas_that_change() -> None:
    """Larger averages of the gradient get larger anchors; where there is no bound the step is refused, and nothing is
    changed."""
    ours = trained(case=ADAMW, state_dtype="compact")
    param, (group,) = parameters(ours)[0], ours.param_groups
    assert ours.state[param]["anchor"] == -4
    group["betas"] = (0.85, 0.999)
    ours.step()
    assert ours.state[param]["anchor"] == -3
    group["betas"] = (0.9, 0.999)
    ours.step()
    assert ours.state[param]["anchor"] == -3
    before, codes = param.detach().clone(), ours.state[param]["exp_avg"].clone()
    group["betas"] = (0.99, 0.9)
    with pytest.raises(ValueError, match=r'"anchored8" needs betas with betas\[0\]\*\*2 < betas\[1\]'):
        ours.step()
    assert_equal([param.detach(), ours.state[param]["exp_avg"]], [before, codes])
    group["betas"] = (0.9, 0.999)
    ours.step()


def test_amsgrad_later() -> None:
    ours = trained(case=ADAMW, state_dtype="compact")
    ours.param_groups[0]["amsgrad"] = True
    squares = ours.state[parameters(ours)[0]]["exp_avg_sq"].clone()
    set_grads(parameters(ours), [torch.zeros_like(p) for p in parameters(ours)])
    ours.step()
    largest = ours.state[parameters(ours)[0]]["max_exp_avg_sq"]
    assert largest.dtype == torch.uint16
    assert bool((largest.int() - squares.int()).abs().max() <= 1)  # dithered once more at most


def test_bad_input() -> None:
    params = [nn.Parameter(torch.zeros(3))]
    sgd = BY_NAME["sgd-dampening-maximize"].ours
    for kind, state_dtype, text in (
        (ADAMW.ours, "small", r"state_dtype must be None, torch.float32, .*, but got 'small'"),
        (ADAMW.ours, torch.int8, "but got torch.int8"),
        (ADAMW.ours, {"momentum_buffer": BF16}, "names the state 'momentum_buffer', but the states of this optimizer"),
        (ADAMW.ours, {"exp_avg": "e8m8"}, '"e8m8" stores values that are never negative'),
        (ADAMW.ours, {"exp_avg_sq": "anchored8"}, '"anchored8" stores exp_avg relative to the root of exp_avg_sq'),
        (BY_NAME["lion-paper-maximize"].ours, {"exp_avg": "anchored8"}, "use torch.bfloat16"),
        (ADAMW.ours, {"exp_avg": "int8"}, r"state_dtype\['exp_avg'\] must be a dtype of"),
        (sgd, {"momentum_buffer": "anchored8"}, '"anchored8" stores exp_avg'),
    ):
        with pytest.raises(ValueError, match=text):
            kind(params, state_dtype=state_dtype)
    with pytest.raises(ValueError, match=r'"anchored8" needs betas .* but got \(0.99, 0.9\); use state_dtype='):
        ADAMW.ours(params, betas=(0.99, 0.9), state_dtype="compact")
    with pytest.raises(ValueError, match="names the state 'momentum'"):
        ADAMW.ours([{"params": params, "state_dtype": {"momentum": BF16}}])
    with pytest.raises(ValueError, match='rounding must be "nearest" or "dithered", but got \'up\''):
        ADAMW.ours(params, rounding="up")
    ours = ADAMW.ours(params)
    with pytest.raises(ValueError, match="state_dtype must be"):
        ours.state_dtype = "small"
    with pytest.raises(ValueError, match="rounding must be"):
        ours.rounding = "up"


# ---- checkpoints

FORMATS: dict[str, Any] = {
    "float32": torch.float32,
    "bfloat16": BF16,
    "compact": "compact",
    "e8m8": {"exp_avg": torch.float32, "exp_avg_sq": "e8m8", "max_exp_avg_sq": "e8m8"},
}


def reloaded(ours: Any) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(ours.state_dict(), file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


@pytest.mark.parametrize("stored", STORED)
def test_resuming_is_like_not_having_stopped(stored: str) -> None:
    options = {**STORED[stored], "dtype": BF16}
    options.pop("ema_decay", None), options.pop("ema_dtype", None)
    ours = trained(**options)
    other = trained(steps=0, **options)
    for p, q in zip(parameters(ours), parameters(other), strict=True):
        q.data.copy_(p.detach())
    other.load_state_dict(reloaded(ours))
    for step in range(10, 13):
        for optimizer in (ours, other):
            set_grads(parameters(optimizer), random_grads(parameters(ours), step))
            optimizer.step()
    assert_equal(ours.master_params(), other.master_params())
    for p, q in zip(parameters(ours), parameters(other), strict=True):
        assert_equal(ours.state[p], other.state[q])


@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize("start", FORMATS)
def test_each_format_loads_into_each(start: str, to: str) -> None:
    """A dtype stays where a dtype is wanted, as ever; codes are made and read where one side has them."""
    ours = trained(state_dtype=FORMATS[start])
    other = trained(steps=0, state_dtype=FORMATS[to])
    other.load_state_dict(reloaded(ours))
    set_grads(parameters(other), [torch.zeros_like(p) for p in parameters(other)])
    other.skip_nonfinite = True
    parameters(other)[0].grad[0] = torch.nan  # so that the step only converts
    other.step()
    coded = {torch.uint8, torch.uint16}
    for p, q in zip(parameters(ours), parameters(other), strict=True):
        before, after = values_of(ours, p), values_of(other, q)
        for name in COMPACT:
            was, now = ours.state[p][name].dtype, other.state[q][name].dtype
            wanted = dtypes(trained(state_dtype=FORMATS[to]))[name]
            assert now == (wanted if coded & {was, wanted} else was)
            bound = (
                {torch.float32: 0, BF16: 2.0**-8, torch.uint16: 2.0**-8, torch.uint8: 0.04}[now] if now != was else 0
            )
            scale = np.abs(before[name]) + (np.sqrt(before["exp_avg_sq"]) if now == torch.uint8 else 0)
            assert (np.abs(after[name] - before[name]) <= bound * scale + 1e-37).all(), name


def test_checkpoints_of_torch_and_for_torch() -> None:
    params = make_params(((40,),))
    theirs = torch.optim.AdamW(copies(params), lr=0.01)
    set_grads(parameters(theirs), random_grads(params, 0))
    theirs.step()
    ours = build(ADAMW, REFERENCE, copies(parameters(theirs)), state_dtype="compact")
    ours.load_state_dict(theirs.state_dict())
    set_grads(parameters(ours), random_grads(params, 1))
    ours.step()
    assert dtypes(ours) == {k: v for k, v in COMPACT.items() if k != "max_exp_avg_sq"}
    saved = reloaded(ours)
    del saved["state"][0]["exp_avg_sq"]
    ours.load_state_dict(saved)
    with pytest.raises(RuntimeError, match='"exp_avg" is in anchored8, so the states must hold "exp_avg_sq"'):
        ours.step()


@pytest.mark.parametrize("stored", ["float32", "compact"])
def test_torchs_classes_load_what_to_torch_makes(stored: str) -> None:
    """And step from the same values as ours do."""
    params = make_params(((33,), (4, 5)))
    ours = build(AMSGRAD, REFERENCE, copies(params), state_dtype=FORMATS[stored], ema_decay=0.9)
    for step in range(3):
        set_grads(parameters(ours), random_grads(params, step))
        ours.step()
    saved = reloaded(ours)
    converted = convert.to_torch(saved)
    values = [values_of(ours, p) for p in parameters(ours)]
    theirs = build_torch(AMSGRAD, copies([p.detach() for p in parameters(ours)]))
    theirs.load_state_dict(converted)
    assert set(saved["state"][0]) > set(converted["state"][0])
    for p, wanted in zip(parameters(theirs), values, strict=True):
        for name in COMPACT:
            assert theirs.state[p][name].dtype == torch.float32
            assert np.array_equal(array(theirs.state[p][name]), wanted[name])
    set_grads(parameters(theirs), random_grads(params, 9))
    theirs.step()
    with pytest.raises(ValueError, match='must be a dict with "state" and "param_groups"'):
        convert.to_torch({"model": {}})


def test_exact_and_24_bit_halves_load_into_each_other() -> None:
    exact = trained(dtype=BF16, master_weights="exact", case=ADAMW)
    narrow = trained(steps=0, dtype=BF16, master_weights="24bit", case=ADAMW)
    for p, q in zip(parameters(exact), parameters(narrow), strict=True):
        q.data.copy_(p.detach())
    narrow.load_state_dict(exact.state_dict())
    set_grads(parameters(narrow), [torch.zeros_like(p) for p in parameters(narrow)])
    narrow.param_groups[0].update(lr=0.0)
    narrow.step()
    for master, rounded in zip(exact.master_params(), narrow.master_params(), strict=True):
        assert ((master - rounded).abs() <= master.abs() * 2.0**-15 + 1e-38).all()
    back = trained(steps=0, dtype=BF16, master_weights="exact", case=ADAMW)
    for p, q in zip(parameters(narrow), parameters(back), strict=True):
        q.data.copy_(p.detach())
    back.load_state_dict(narrow.state_dict())
    set_grads(parameters(back), [torch.zeros_like(p) for p in parameters(back)])
    back.step()
    assert_equal(back.master_params(), narrow.master_params())
