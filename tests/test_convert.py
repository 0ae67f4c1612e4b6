"""Converted checkpoints of Apex, DeepSpeed, optimi and bitsandbytes: training continues as it would in the other
library.

optimi and bitsandbytes train in these tests, on the CPU. foreign.py has stand-ins for Apex and DeepSpeed.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import copies, make_params, parameters, random_grads, set_grads, train
from compare import assert_equal, states
from foreign import (
    BACKEND,
    BF16,
    F32,
    F64,
    SHAPES,
    ApexAdam,
    ApexSGD,
    DeepSpeedAdam,
    DeepSpeedCPUAdam,
    DeepSpeedLamb,
    DeepSpeedLion,
    Stand,
    build_theirs,
    goes_on,
    in_groups,
    package,
)
from torch import Tensor

from fused_optim import FusedAdam, FusedAdamW, FusedLAMB, FusedLion, FusedSGD, FusedSGDW, convert

pytestmark = pytest.mark.slow

PAGE = Path(__file__).parent.parent / "docs" / "migration.md"


# ---- Apex


@pytest.mark.parametrize("adam_w_mode", [True, False])
@pytest.mark.parametrize("lr", [0.02, torch.tensor(0.02)], ids=["plain", "capturable"])
def test_apex_adam(adam_w_mode: bool, lr: float | Tensor) -> None:
    theirs = ApexAdam(in_groups(lr=lr, initial_lr=0.5), adam_w_mode)
    train([theirs], 4)
    steps = [state["step"] for state in convert.apex(theirs.state_dict())["state"].values()]
    assert [(step.dtype, step.shape, step.item()) for step in steps] == [(F32, (), 4.0)] * 3
    ours = goes_on(theirs, FusedAdamW if adam_w_mode else FusedAdam, convert.apex)
    assert [state["step"].item() for state in states(ours)] == [8.0] * 3
    assert all("step" not in group and "bias_correction" not in group for group in ours.param_groups)
    assert ours.param_groups[1]["initial_lr"] == 0.5


def test_apex_states_keep_their_dtype_and_their_memory() -> None:
    """The states of bfloat16 params are float32. torch's own classes would cast them."""
    theirs = ApexAdam(make_params(SHAPES, BF16))
    train([theirs], 2)
    saved = theirs.state_dict()
    converted = convert.apex(saved)
    for key in ("exp_avg", "exp_avg_sq"):
        assert all(converted["state"][i][key] is saved["state"][i][key] for i in range(len(SHAPES)))
    assert len({converted["state"][i]["step"].data_ptr() for i in range(len(SHAPES))}) == len(SHAPES)
    assert converted["param_groups"][0]["params"] is not saved["param_groups"][0]["params"]
    ours = FusedAdamW(copies(parameters(theirs)), backend=BACKEND)
    ours.load_state_dict(converted)
    assert {state["exp_avg"].dtype for state in states(ours)} == {F32}


@pytest.mark.parametrize("wd_after_momentum", [False, True])
@pytest.mark.parametrize("options", [{}, {"dampening": 0.0, "nesterov": True}], ids=str)
def test_apex_sgd(options: dict[str, Any], wd_after_momentum: bool) -> None:
    theirs = ApexSGD(in_groups(lr=0.02), **options)
    theirs.wd_after_momentum = wd_after_momentum
    train([theirs], 3)
    goes_on(theirs, FusedSGDW if wd_after_momentum else FusedSGD, convert.apex)


def test_apex_lamb() -> None:
    """FusedLAMB reads Apex's checkpoints directly. A converted checkpoint gives the same result."""
    source = FusedLAMB(make_params(SHAPES, F64), lr=0.01, backend=BACKEND)
    train([source], 3)
    saved = source.state_dict()
    keys = ["lr", "bias_correction", "betas", "eps", "weight_decay", "grad_averaging", "max_grad_norm", "params"]
    theirs = {
        "state": {i: {k: v for k, v in state.items() if k != "step"} for i, state in saved["state"].items()},
        "param_groups": [{**{key: group[key] for key in keys}, "step": 3} for group in saved["param_groups"]],
    }
    direct, converted = (FusedLAMB(copies(parameters(source)), backend=BACKEND) for _ in range(2))
    direct.load_state_dict(copy.deepcopy(theirs))
    converted.load_state_dict(convert.apex(copy.deepcopy(theirs)))
    train([direct, converted, source], 2, seed=50)
    assert_equal(parameters(converted), parameters(direct))
    assert_equal(parameters(converted), parameters(source))


# ---- DeepSpeed


@pytest.mark.parametrize("adam_w_mode", [True, False])
@pytest.mark.parametrize("kind", [DeepSpeedAdam, DeepSpeedCPUAdam])
def test_deepspeed_adam(kind: type[Stand], adam_w_mode: bool) -> None:
    theirs = kind(in_groups(lr=0.02), adam_w_mode)
    train([theirs], 4)
    if kind is DeepSpeedAdam:
        assert [state["step"] for state in states(theirs)] == [0, 4, 4]
    ours = goes_on(theirs, FusedAdamW if adam_w_mode else FusedAdam, convert.deepspeed)
    assert [state["step"].item() for state in states(ours)] == [8.0] * 3


def test_deepspeed_counts() -> None:
    """With params of two dtypes FusedAdam counts each step twice. Its old checkpoints have the count in the group only.
    DeepSpeedCPUAdam has a count per param."""
    params = [*make_params([(3,)], F32), *make_params([(4,)], BF16)]
    theirs: Stand = DeepSpeedAdam(params)
    train([theirs], 5)
    assert [state["step"] for state in states(theirs)] == [0, 10]
    loaded = convert.deepspeed(theirs.state_dict())["state"]
    assert [state["step"].item() for state in loaded.values()] == [5.0, 5.0]

    old = theirs.state_dict()
    old["param_groups"][0]["step"] = 5
    old["state"] = {i: {k: v for k, v in state.items() if k != "step"} for i, state in old["state"].items()}
    assert [state["step"].item() for state in convert.deepspeed(old)["state"].values()] == [5.0, 5.0]

    theirs = DeepSpeedCPUAdam(make_params([(3,), (4,)], F64))
    for present in ("10", "11"):
        grads = random_grads(parameters(theirs), 0)
        set_grads(parameters(theirs), [g if bit == "1" else None for g, bit in zip(grads, present, strict=True)])
        theirs.step()
    goes_on(theirs, FusedAdamW, convert.deepspeed)


@pytest.mark.parametrize("max_grad_norm", [0.0, 1e9])
def test_deepspeed_lamb(max_grad_norm: float) -> None:
    theirs = DeepSpeedLamb(
        in_groups(max_coeff=2.0), weight_decay=0.0, bias_correction=False, max_grad_norm=max_grad_norm
    )
    train([theirs], 4)
    ours = goes_on(theirs, FusedLAMB, convert.deepspeed)
    assert [group["trust_clip"] for group in ours.param_groups] == [(0.01, 10.0), (0.01, 2.0)]
    assert [group["max_grad_norm"] for group in ours.param_groups] == [max_grad_norm or None] * 2


def test_deepspeed_lamb_corrects_bias_elsewhere() -> None:
    """The conversion warns about the different bias correction. Once the correction is negligible, both train alike."""
    theirs = DeepSpeedLamb(make_params(SHAPES, F64), betas=(0.5, 0.5))
    train([theirs], 1)
    with pytest.warns(UserWarning, match="after the ratio of norms"):
        convert.deepspeed(theirs.state_dict())
    train([theirs], 60)
    with warnings.catch_warnings(action="ignore"):
        goes_on(theirs, FusedLAMB, convert.deepspeed)


@pytest.mark.parametrize("cpu", [False, True])
def test_deepspeed_lion(cpu: bool) -> None:
    theirs = DeepSpeedLion(in_groups(lr=0.02))
    theirs.cpu = cpu
    train([theirs], 4)
    ours = goes_on(theirs, FusedLion, convert.deepspeed)
    assert [set(state) for state in states(ours)] == [{"exp_avg"}] * 3


# ---- optimi

OPTIMI: list[tuple[str, dict[str, Any], Any, dict[str, Any]]] = [
    ("Adam", {"weight_decay": 0.1}, FusedAdam, {}),
    ("Adam", {"weight_decay": 0.1, "decouple_wd": True}, FusedAdam, {}),
    ("AdamW", {"weight_decay": 0.1}, FusedAdamW, {}),
    ("AdamW", {"weight_decay": 0.1, "decouple_lr": True, "max_lr": 0.04}, FusedAdamW, {"decay": "paper"}),
    ("AdamW", {"weight_decay": 0.1, "decouple_lr": True}, FusedAdamW, {}),
    ("SGD", {"momentum": 0.9, "weight_decay": 0.1}, FusedSGD, {}),
    ("SGD", {"momentum": 0.9, "weight_decay": 0.1, "dampening": True, "torch_init": True}, FusedSGD, {}),
    ("SGD", {"momentum": 0.9, "weight_decay": 0.1, "dampening": True, "decouple_wd": True}, FusedSGDW, {}),
    ("SGD", {"momentum": 0.9, "weight_decay": 0.1, "decouple_lr": True, "max_lr": 0.04}, FusedSGDW, {}),
    ("SGD", {"weight_decay": 0.1}, FusedSGD, {}),
    ("Lion", {"weight_decay": 0.1}, FusedLion, {}),
    ("Lion", {"weight_decay": 0.1, "decouple_lr": True, "max_lr": 0.04}, FusedLion, {"decay": "paper"}),
]


@pytest.mark.filterwarnings("ignore:You are using weight_decay")  # optimi warns about weight_decay with decouple_lr
@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize(("name", "options", "ours", "own"), OPTIMI, ids=lambda value: str(value))
def test_optimi(name: str, options: dict[str, Any], ours: Any, own: dict[str, Any], foreach: bool) -> None:
    optimi = package("optimi")
    groups = in_groups(lr=0.02)
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # foreach is deprecated
        theirs = getattr(optimi, name)(groups, lr=0.01, foreach=foreach, triton=False, **options)
    train([theirs], 3)
    theirs.param_groups[0]["lr"] = 0.015
    optimizer = goes_on(theirs, ours, convert.optimi, **own)
    names = {"Lion": {"exp_avg"}, "SGD": {"momentum_buffer"} if "momentum" in options else set()}
    assert [set(state) for state in states(optimizer)] == [names.get(name, {"step", "exp_avg", "exp_avg_sq"})] * 3
    assert not {"beta1", "setup", "kahan_sum", "max_lr"} & set(optimizer.param_groups[0])


def test_optimi_counts() -> None:
    """The count is per group, also for a param that joined late. With gradient release it is per param."""
    optimi = package("optimi")
    theirs = optimi.AdamW(make_params([(3,), (4,)], F64), lr=0.01, triton=False)
    set_grads(parameters(theirs), [random_grads(parameters(theirs), 0)[0], None])
    theirs.step()
    train([theirs], 3)
    goes_on(theirs, FusedAdamW, convert.optimi)

    model = torch.nn.Linear(4, 3, dtype=F64)
    theirs = optimi.AdamW(model.parameters(), lr=0.01, triton=False, gradient_release=True)
    optimi.prepare_for_gradient_release(model, theirs)
    for _ in range(3):
        model(torch.randn(2, 4, dtype=F64)).sum().backward()
    converted = convert.optimi(theirs.state_dict())
    assert [state["step"].item() for state in converted["state"].values()] == [3.0, 3.0]
    assert {key for state in converted["state"].values() for key in state} == {"step", "exp_avg", "exp_avg_sq"}


def test_optimi_kahan_compensation_is_missed() -> None:
    """The compensation cannot be converted. Adding it to float32 params, as the warning says, preserves it."""
    optimi = package("optimi")
    params = make_params([(500,)], BF16)
    plain, exact = copies(params), [torch.nn.Parameter(params[0].detach().float())]
    theirs, truth = (optimi.SGD(p, lr=1e-4, momentum=0.5, triton=False) for p in (params, exact))
    train([theirs, truth], 30)
    with pytest.warns(UserWarning, match="Kahan compensations of 1 params are left out"):
        converted = convert.optimi(theirs.state_dict())
    optimizer = FusedSGD(plain, backend=BACKEND)
    optimizer.load_state_dict(converted)
    assert [state["momentum_buffer"].dtype for state in states(optimizer)] == [BF16]
    master = params[0].detach().float() + theirs.state[params[0]]["kahan_comp"].float()
    off, off_without = ((value - exact[0]).abs().mean().item() for value in (master, params[0].float()))
    assert off < 0.1 * off_without

    theirs = optimi.SGD(make_params([(5,)], BF16), lr=1e-4, triton=False, kahan_sum=False)
    train([theirs], 2)
    saved = theirs.state_dict()
    with warnings.catch_warnings(action="error"):
        convert.optimi(saved)
        saved["state"][0]["kahan_comp"] = torch.zeros(1, dtype=torch.uint8)  # placeholder of optimi's Triton kernels
        convert.optimi(saved)


# ---- bitsandbytes

BITSANDBYTES: list[tuple[str, Any]] = [
    ("AdamW", FusedAdamW),
    ("Adam", FusedAdamW),
    ("Adam", FusedAdam),
    ("Lion", FusedLion),
    ("SGD", FusedSGD),
]


@pytest.mark.parametrize(("name", "ours"), BITSANDBYTES)
def test_bitsandbytes(name: str, ours: Any) -> None:
    theirs = build_theirs(name, in_groups(F32, lr=0.02))
    train([theirs], 4)
    others: dict[str, Any] = {"momentum": 0.5, "nesterov": True} if ours is FusedSGD else {}
    optimizer = goes_on(theirs, ours, convert.bitsandbytes, rtol=1e-5, **others)
    assert not {"alpha", "t_alpha", "t_beta3"} & set(optimizer.param_groups[0])


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("unwrapped", [False, True], ids=["new", "older"])
@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("AdamW8bit", FusedAdamW),
        ("PagedAdamW8bit", FusedAdamW),
        ("PagedAdamW32bit", FusedAdamW),
        ("Lion8bit", FusedLion),
        ("SGD8bit", FusedSGD),
    ],
)
def test_bitsandbytes_8_bits(name: str, ours: Any, unwrapped: bool) -> None:
    """The states equal those of bitsandbytes' own dequantization, and so does the next step. Small tensors, and all
    states of the 32-bit classes, are float32 in bitsandbytes too."""
    functional = package("bitsandbytes").functional
    theirs = build_theirs(name, in_groups(F32, lr=0.02))
    train([theirs], 4)

    def converter(saved: dict[str, Any]) -> dict[str, Any]:
        if unwrapped:
            hidden = "__bnb_optimizer_quant_state__"
            old = {"gnorm_vec": torch.zeros(100)}  # state of percentile clipping
            rest = {i: {k: v for k, v in s.items() if k != hidden} | s[hidden] | old for i, s in saved["state"].items()}
            saved = {**saved, "state": rest}
        converted = convert.bitsandbytes(saved)
        state = theirs.state[parameters(theirs)[2]]
        mine = [value for key, value in converted["state"][2].items() if key != "step"]
        for number, value in enumerate(mine, start=1):
            truth = state[f"state{number}"]
            if "8bit" in name:
                assert truth.dtype == torch.uint8
                scale, code = state[f"absmax{number}"], state[f"qmap{number}"]
                truth = functional.dequantize_blockwise(truth, absmax=scale, code=code, blocksize=256)
            assert_equal(value, truth)
        return converted

    ours = goes_on(theirs, ours, converter, rtol=2e-6, steps=1)
    assert all(value.dtype == F32 for state in states(ours) for value in state.values())


def test_blocks() -> None:
    """Blocks have 256 elements, in old versions 2048. The last block can be shorter."""
    qmap = torch.linspace(-1, 1, 256)
    codes = torch.randint(0, 256, (3, 1500), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for size in (256, 2048):
        absmax = torch.rand(-(-codes.numel() // size), generator=torch.Generator().manual_seed(1))
        values = convert.dequantized(codes, qmap, absmax)
        assert (values.dtype, values.shape) == (F32, codes.shape)
        for i in (0, 255, 256, 2047, 2048, 4499):
            assert values.flatten()[i] == qmap[int(codes.flatten()[i])] * absmax[i // size]
    assert convert.dequantized(codes[:0], qmap, torch.empty(0)).shape == (0, 1500)
    with pytest.raises(ValueError, match=r"a state of 4500 elements must have an absmax for each block.*but has 4"):
        convert.dequantized(codes, qmap, torch.ones(4))


@pytest.mark.parametrize("converter", [convert.apex, convert.deepspeed, convert.optimi, convert.bitsandbytes])
def test_before_the_first_step(converter: Callable[[Any], Any]) -> None:
    made: dict[Any, Callable[[Any], Any]] = {
        convert.apex: ApexAdam,
        convert.deepspeed: DeepSpeedAdam,
        convert.optimi: lambda params: package("optimi").AdamW(params, lr=0.01),
        convert.bitsandbytes: lambda params: build_theirs("AdamW", params),
    }
    theirs = made[converter](make_params(SHAPES))
    ours = FusedAdamW(copies(parameters(theirs)), backend=BACKEND)
    ours.load_state_dict(converter(theirs.state_dict()))
    assert not any(states(ours))
    assert ours.param_groups[0]["lr"] == 0.01


# ---- the page

MAKERS: dict[str, Callable[[Any], Any]] = {
    "torch": torch.optim.AdamW,
    "Apex": ApexAdam,
    "DeepSpeed": DeepSpeedAdam,
    "optimi": lambda params: package("optimi").AdamW(params, lr=0.01, triton=False),
    "bitsandbytes": lambda params: build_theirs("AdamW8bit", params),
}


@pytest.mark.parametrize("library", MAKERS)
@pytest.mark.filterwarnings("ignore:the Kahan compensations")
def test_the_page(library: str) -> None:
    """The Python blocks under each library's heading run in order, on a checkpoint of that library."""
    section = re.search(rf"^## {library}\b.*?(?=^## |\Z)", PAGE.read_text(), re.M | re.S)
    assert section is not None
    blocks = re.findall(r"^```python\n(.*?)^```", section[0], re.M | re.S)
    assert blocks
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2)).to(BF16 if library == "optimi" else F32)
    theirs = MAKERS[library](list(model.parameters()))
    train([theirs], 2)
    names: dict[str, Any] = {"model": model, "checkpoint": {"optimizer": theirs.state_dict()}}
    for block in blocks:
        exec(block, names)
    optimizer = names["optimizer"]
    assert len(optimizer.state) == len(list(model.parameters()))
    train([optimizer], 1)
    assert {state["step"].item() for state in states(optimizer)} == {3.0}
    assert {p.dtype for p in model.parameters()} == {F32}
