"""States, params and averages in packed formats: every stored code is that of the float32 value that the rule has made,
on every backend. Checkpoints in each format load into each other one."""

from __future__ import annotations

import io
from typing import Any

import format_oracle as oracle
import numpy as np
import pytest
import torch
from cases import (
    ADAMW,
    AMSGRAD,
    BY_NAME,
    LAMB,
    Case,
    Target,
    build,
    build_torch,
    copies,
    for_every_rule,
    make_params,
    on_every_target,
    parameters,
    quick,
    random_grads,
    set_grads,
)
from compare import assert_equal
from torch import Tensor, nn

from fused_optim import convert

Array = Any
BF16 = torch.bfloat16
REFERENCE = Target("reference", "cpu")
SHAPES = ((3, 5), (), (0,), (7, 1, 9), (4099,), (8192 + 130,))


# ---- what is stored, by the oracle


def array(tensor: Tensor) -> Array:
    """Elements in the order in which they lie in memory: codes as int64, which are not negative, or float32."""
    flat = tensor.detach().as_strided((tensor.numel(),), (1,))
    if tensor.dtype == BF16:
        return flat.view(torch.int16).long().numpy() & 0xFFFF
    return flat.numpy() if tensor.dtype == torch.float32 else flat.long().numpy()


def fill(tensor: Tensor, values: Array) -> None:
    with torch.no_grad():
        tensor.as_strided((tensor.numel(),), (1,)).copy_(torch.from_numpy(np.asarray(values, np.float32)))


def values_of(optimizer: Any, param: Tensor) -> dict[str, Array]:
    """param, states and average of one param as float32."""
    state = optimizer.state[param]
    tensors = {"param": param, **{k: v for k, v in state.items() if isinstance(v, Tensor) and v.shape == param.shape}}
    low = tensors.pop("param_low", None)
    tensors.pop("step", None) if param.dim() else None
    values: dict[str, Array] = {}
    for name, tensor in tensors.items():
        codes = array(tensor)
        if name == "param" and low is not None:
            values[name] = oracle.joined(codes, array(low), 1 if low.dtype == torch.int16 else 256)
        elif tensor.dtype == BF16:
            values[name] = oracle.floats(codes << 16)
        elif tensor.dtype == torch.uint16:
            values[name] = oracle.from_e8m8(codes)
        elif tensor.dtype != torch.uint8:
            values[name] = codes
    if state.get("exp_avg") is not None and state["exp_avg"].dtype == torch.uint8:
        codes = array(state["exp_avg"])
        values["exp_avg"] = oracle.from_anchored8(codes, values["exp_avg_sq"], state["anchor"])
    return values


def check_codes(optimizer: Any, param: Tensor, name: str, wide: Array, step: int, dithered: bool) -> None:
    """That what is stored of `wide`, float32 values, is what the formats say."""
    state = optimizer.state[param]
    tensor = param if name == "param" else state[name]
    squared = name.endswith("_sq")
    kind = "param" if name in ("param", "ema") else "square" if squared else "average"
    at = oracle.threshold(kind, range(tensor.numel()), step)
    codes, low = array(tensor), state.get("param_low") if name == "param" else None
    if low is not None:
        assert np.array_equal(codes, oracle.halves(wide)[0]), name
        lower = oracle.halves(wide)[1] if low.dtype == torch.int16 else oracle.quarter(wide, at)
        assert np.array_equal(array(low), lower), name
    elif tensor.dtype == BF16 and dithered:
        assert np.array_equal(codes, oracle.bf16(wide, at)), name
    elif tensor.dtype == torch.uint16:
        assert np.array_equal(codes, oracle.e8m8(wide, at)), name
    elif tensor.dtype == torch.uint8:
        square = values_of(optimizer, param)["exp_avg_sq"]
        assert np.array_equal(codes, oracle.anchored8(wide, square, state["anchor"], at)), name
    elif tensor.dtype == torch.float32:
        assert np.array_equal(oracle.bits(codes), oracle.bits(wide)), name


def checked_steps(case: Case, target: Target, params: list[nn.Parameter], steps: int, **options: Any) -> Any:
    """Steps an optimizer beside one of float32 params and states, which starts each step at what the first one has
    stored, and checks every code. Returns the first one."""
    rounding, compact = options.get("rounding"), options.get("state_dtype") == "compact"
    ours = build(case, target, params, max_grad_norm=None, **options)
    averages = {"ema_decay": options["ema_decay"]} if "ema_decay" in options else {}
    wide_params = [nn.Parameter(p.detach().float().clone(memory_format=torch.preserve_format)) for p in params]
    wide = build(case, target, wide_params, max_grad_norm=None, **averages)
    for step in range(1, steps + 1):
        # Gradients of the two dtypes are walked by different loops.
        grads = random_grads(params, step, (BF16, torch.float32)[step % 2])
        for p, q in zip(params, wide_params, strict=True):
            if step > 1:
                for name, values in values_of(ours, p).items():
                    fill(q if name == "param" else wide.state[q][name], values)
        for p in params:
            p.grad, p.grad_dtype = None, None
        set_grads(params, grads)
        set_grads(wide_params, [grad.float() for grad in grads])
        ours.step()
        wide.step()
        for p, q in zip(params, wide_params, strict=True):
            made = values_of(wide, q)
            if case.ours is LAMB.ours:
                made.pop("param")  # made of the states as they are stored
                made.pop("ema", None)
            for name, values in made.items():
                state = name not in ("param", "ema")
                if name == "ema":  # follows the param as it is stored
                    weight = np.float32(1 - options["ema_decay"]) if step > 1 else np.float32(1)
                    if weight != 1 or options.get("master_weights") != "exact":
                        continue
                check_codes(ours, p, name, values, step, rounding == "dithered" or (compact and state))
    return ours


STORED: dict[str, dict[str, Any]] = {
    "exact, compact": {"master_weights": "exact", "state_dtype": "compact"},
    "24 bits, bfloat16 and e8m8": {
        "master_weights": "24bit",
        "state_dtype": {"exp_avg": BF16, "exp_avg_sq": "e8m8"},
        "rounding": "dithered",
    },
    "dithered, compact": {"rounding": "dithered", "state_dtype": "compact", "ema_decay": 0.5, "ema_dtype": BF16},
    "dithered": {"rounding": "dithered", "ema_decay": 0.5},
}


@pytest.mark.slow
@pytest.mark.compiled
@on_every_target
@for_every_rule
@pytest.mark.parametrize("stored", STORED)
def test_what_is_stored(case: Case, stored: str, target: Target) -> None:
    options = dict(STORED[stored])
    if isinstance(options.get("state_dtype"), dict):
        options["state_dtype"] = {k: v for k, v in options["state_dtype"].items() if k in case.ours.rule.states}
    case = Case(
        case.name,
        case.ours,
        None,
        case.rule,
        {**case.kwargs, **({"betas": (0.9, 0.999)} if "adam" in case.name else {})},
    )
    checked_steps(case, target, make_params(SHAPES[: quick(target, 6, 4)], BF16), quick(target, 4, 2), **options)


@on_every_target
def test_compact_states_of_float32_and_float16_params(target: Target) -> None:
    for dtype in (torch.float32, torch.float16):
        ours = checked_steps(ADAMW, target, make_params(((130,), (3, 4)), dtype), 3, state_dtype="compact")
        assert {s["exp_avg"].dtype for s in ours.state.values()} == {torch.uint8}


@on_every_target
def test_any_layout(target: Target) -> None:
    """The index of an element is that of its place in memory. Bytes around a view stay."""
    plain = torch.linspace(-2.0, 3.0, 120).to(BF16)
    buffer = torch.full((300,), 7.0, dtype=BF16)
    params = [
        nn.Parameter(plain.clone().view(10, 12).t()),
        nn.Parameter(plain.clone().view(2, 3, 4, 5).to(memory_format=torch.channels_last)),
        nn.Parameter(buffer[3:123].copy_(plain)),
    ]
    checked_steps(ADAMW, target, params, 3, master_weights="exact", state_dtype="compact")
    assert bool((buffer[:3] == 7).all()) and bool((buffer[123:] == 7).all())


@on_every_target
def test_params_with_holes(target: Target) -> None:
    buffer = torch.full((300,), 7.0, dtype=BF16)
    param = nn.Parameter(buffer[5:245:2].copy_(torch.linspace(-2.0, 3.0, 120)))
    options = {"master_weights": "exact", "state_dtype": "compact"}
    ours, dense = (
        build(ADAMW, target, [param], **options),
        build(ADAMW, target, copies([param.contiguous()]), **options),
    )
    for step in range(3):
        for optimizer in (ours, dense):
            set_grads(parameters(optimizer), random_grads([param], step, BF16))
            optimizer.step()
    assert_equal(ours.master_params(), dense.master_params())
    assert bool((buffer[:5] == 7).all()) and bool((buffer[6:245:2] == 7).all())


@on_every_target
@for_every_rule
def test_training_stays_near_that_in_float32(case: Case, target: Target) -> None:
    kwargs = {
        **case.kwargs,
        **({"betas": (0.9, 0.999)} if "betas" in case.options and case.ours.rule.name != "lion" else {}),
    }
    params = make_params(((200,), (20, 7)))
    ours = build(Case(case.name, case.ours, None, case.rule, kwargs), target, copies(params), state_dtype="compact")
    wide = build(Case(case.name, case.ours, None, case.rule, kwargs), target, copies(params))
    ours.lower_params()
    for step in range(quick(target, 20, 3)):
        for optimizer in (ours, wide):
            set_grads(parameters(optimizer), random_grads(params, step, BF16))
            optimizer.step()
    for master, other, start in zip(ours.master_params(), parameters(wide), params, strict=True):
        assert (master - other).abs().mean() < 0.1 * (other - start).abs().mean()


def test_small_updates_are_not_lost() -> None:
    """Where nearest rounding keeps every param at 1, dithering takes them as far as float32 would."""
    found = {}
    for rounding in ("nearest", "dithered"):
        param = nn.Parameter(torch.ones(1000, dtype=BF16))
        ours = build(ADAMW, REFERENCE, [param], lr=1e-5, weight_decay=0, rounding=rounding)
        for _ in range(500):
            param.grad = torch.ones_like(param)
            ours.step()
        found[rounding] = 1 - float(param.detach().float().mean())
    assert found["nearest"] == 0
    assert abs(found["dithered"] - 500e-5) < 3e-4


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
