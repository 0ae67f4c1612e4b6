"""FusedAdEMAMix, FusedADOPT, FusedAdan and FusedStableAdamW beside other implementations of the same papers, and their
schedules and checkpoints."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import Target, copies, make_params, on_every_target, parameters, quick, train
from compare import assert_equal, checked_step, states
from oracle import adan, ademamix

from fused_optim import FusedAdan, FusedAdEMAMix, FusedADOPT, FusedStableAdamW
from fused_optim.optim.adopt import power_of

F64 = torch.float64
SHAPES = [(5, 3), (), (40,)]


def theirs_of(package: str, name: str, params: Any, **options: Any) -> Any:
    module = pytest.importorskip(package, reason=f"the comparison is with the package {package}")
    return getattr(module, name)(params, lr=0.01, foreach=False, **options)


# Our options, the package and the class, and its options. Where a package departs from the paper, the reason is beside.
ADEMAMIX: dict[str, Any] = {"betas": (0.9, 0.99, 0.999), "weight_decay": 0.1, "alpha": 3.0}
ADAN: dict[str, Any] = {"weight_decay": 0.1, "eps": 1e-6}
STABLE: dict[str, Any] = {"weight_decay": 0.1, "eps": 1e-6}
PACKAGES: dict[str, tuple[Any, dict[str, Any], str, str, dict[str, Any]]] = {
    "ademamix": (FusedAdEMAMix, ADEMAMIX, "pytorch_optimizer", "AdEMAMix", {**ADEMAMIX, "weight_decouple": True}),
    "adopt": (  # the package counts steps from 2
        FusedADOPT,
        {"weight_decay": 0.1},
        "pytorch_optimizer",
        "ADOPT",
        {"weight_decay": 0.1, "clip_lambda": lambda step: (step - 1) ** 0.25},
    ),
    "adan": (FusedAdan, ADAN, "optimi", "Adan", ADAN),
    "adan-no-prox": (
        FusedAdan,
        {**ADAN, "no_prox": True},
        "pytorch_optimizer",
        "Adan",
        {**ADAN, "weight_decouple": True},
    ),
    "stableadamw": (FusedStableAdamW, STABLE, "optimi", "StableAdamW", STABLE),
}


@on_every_target
@pytest.mark.parametrize("name", PACKAGES)
def test_like_the_package(target: Target, name: str) -> None:
    ours, options, package, theirs, others = PACKAGES[name]
    params = make_params(SHAPES, F64, target.device)
    pair = [
        ours(params, lr=0.01, backend=target.backend, **options),
        theirs_of(package, theirs, copies(params), **others),
    ]
    train(pair, quick(target, 100, 3))
    for p, q in zip(*map(parameters, pair), strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-10, atol=1e-12)


@on_every_target
@pytest.mark.parametrize("steps", [1, 7, 8, 9])
def test_ademamix_warms_up(target: Target, steps: int) -> None:
    """Beside the warm-up, at its end and after it."""
    params = make_params(SHAPES, device=target.device)
    ours = FusedAdEMAMix(
        params, lr=0.01, betas=(0.8, 0.99, 0.9995), alpha_warmup=8, beta3_warmup=8, backend=target.backend
    )
    train([ours], 1)
    for state in ours.state.values():
        state["step"].fill_(steps - 1)
    for p in params:
        p.grad = torch.ones_like(p)
    checked_step(ours, ademamix, 3.0)


@on_every_target
@pytest.mark.parametrize(
    "clip_lambda", [None, lambda step: 0.5, lambda step: 0.1 * step**0.5], ids=["no", "0.5", "root"]
)
def test_adopt_clips(target: Target, clip_lambda: Callable[[float], float] | None) -> None:
    """The first update sets exp_avg_sq alone. The second one moves by lr * (1 - beta1) * the clipped quotient."""
    p = torch.nn.Parameter(torch.ones(3, dtype=F64, device=target.device))
    ours = FusedADOPT([p], lr=1.0, betas=(0.75, 0.99), clip_lambda=clip_lambda, backend=target.backend)
    p.grad = torch.tensor([1.0, 1.0, 0.0], dtype=F64, device=target.device)
    ours.step()
    assert_equal(p.detach(), torch.ones_like(p))
    assert ours.state[p]["exp_avg_sq"].tolist() == [1.0, 1.0, 0.0] and not ours.state[p]["exp_avg"].any()
    p.grad = torch.tensor([0.25, -8.0, 1e-12], dtype=F64, device=target.device)
    ours.step()
    bound = math.inf if clip_lambda is None else clip_lambda(1)
    quotients = [min(max(x, -bound), bound) for x in (0.25, -8.0, 1e-6)]
    torch.testing.assert_close(p.tolist(), [1 - 0.25 * x for x in quotients], rtol=1e-14, atol=0)


def test_clip_lambda_is_a_power() -> None:
    assert power_of(lambda step: step**0.25) == (1.0, 0.25) and power_of(None) == (math.inf, 0.0)
    assert power_of(lambda step: 3.0) == (3.0, 0.0)
    for function in (lambda step: step + 1, lambda step: -1.0, lambda step: math.nan, lambda step: 0.0):
        with pytest.raises(ValueError, match=r"clip_lambda must be None or a power of the step, c \* step\*\*e"):
            FusedADOPT(make_params(), clip_lambda=function)


@on_every_target
@pytest.mark.parametrize("no_prox", [False, True])
def test_adan_decays(target: Target, no_prox: bool) -> None:
    """With zero gradients the param is divided by 1 + lr * weight_decay, or multiplied by 1 - lr * weight_decay."""
    p = torch.nn.Parameter(torch.full((5,), 3.0, dtype=F64, device=target.device))
    ours = FusedAdan([p], lr=0.5, weight_decay=0.5, no_prox=no_prox, backend=target.backend)
    p.grad = torch.zeros_like(p)
    ours.step()
    wanted = 3.0 * 0.75 if no_prox else 3.0 / 1.25
    torch.testing.assert_close(p.detach(), torch.full_like(p, wanted), rtol=1e-15, atol=0)


@on_every_target
def test_stableadamw_lowers_the_rate_of_one_tensor(target: Target) -> None:
    """A gradient ten times as large as before: the mean of g**2 / v is above 1. A tensor beside it keeps its rate."""
    params = make_params([(3000,), (3000,)], F64, target.device)
    ours = FusedStableAdamW(params, lr=0.1, betas=(0.0, 0.9), weight_decay=0.0, eps=1e-12, backend=target.backend)
    for size in (1.0, 1.0, 10.0):
        before = copies(params)
        params[0].grad, params[1].grad = torch.full_like(params[0], size), torch.ones_like(params[1])
        ours.step()
    # With beta1 = 0 the update is g / sqrt(v), which is the root mean square itself where that is above 1.
    for old, new in zip(before, params, strict=True):
        torch.testing.assert_close((old - new).detach(), torch.full_like(old, 0.1), rtol=1e-11, atol=0)


@on_every_target
def test_checkpoints_of_adans_authors(target: Target) -> None:
    """Their groups count the steps, and have options of their own."""
    params = make_params(SHAPES, F64, target.device)
    ours = FusedAdan(params, lr=0.01, weight_decay=0.1, backend=target.backend)
    train([ours], 3)
    saved = copy.deepcopy(ours.state_dict())
    for group in saved["param_groups"]:
        group |= {"step": 3, "foreach": True, "fused": False, "max_grad_norm": 0.0}
    for state in saved["state"].values():
        del state["step"]
    again = FusedAdan(copies(params), backend=target.backend)
    again.load_state_dict(saved)
    train([ours, again], 2, seed=9)
    assert_equal([p.detach() for p in parameters(ours)], [p.detach() for p in parameters(again)])
    assert_equal(states(ours), states(again))
    for p in params:
        p.grad = torch.ones_like(p)
    checked_step(ours, adan, 6.0)


def test_checkpoints_of_ademamixs_authors() -> None:
    """They count steps as numbers, and store None for the fast average where beta1 is 0."""
    params = make_params(SHAPES, F64)
    ours = FusedAdEMAMix(params, lr=0.01, betas=(0.0, 0.9, 0.99))
    train([ours], 2)
    saved = copy.deepcopy(ours.state_dict())
    for state in saved["state"].values():
        state |= {"step": 2, "exp_avg_fast": None}
    again = FusedAdEMAMix(copies(params), betas=(0.0, 0.9, 0.99))
    again.load_state_dict(saved)
    train([ours, again], 2, seed=9)
    assert_equal([p.detach() for p in parameters(ours)], [p.detach() for p in parameters(again)])


@pytest.mark.parametrize(
    ("build", "options", "said"),
    [
        (FusedAdan, {"betas": (0.9, 0.99)}, r"betas must be 3 numbers, but got \(0.9, 0.99\)"),
        (FusedAdEMAMix, {"betas": (0.9, 0.99, 1.0)}, "Invalid beta parameter at index 2: 1.0"),
        (FusedAdEMAMix, {"alpha": -1.0}, "alpha must be 0 or more, but got -1.0"),
        (FusedAdEMAMix, {"beta3_warmup": -1}, "beta3_warmup must be 0 or more, but got -1"),
        (FusedADOPT, {"betas": (0.9,)}, r"betas must be 2 numbers, but got \(0.9,\)"),
        (FusedADOPT, {"state_dtype": {"exp_avg": "anchored8"}}, '"anchored8" stores exp_avg relative to the root'),
        (FusedStableAdamW, {"eps": -1.0}, "Invalid epsilon value: -1.0"),
    ],
)
def test_what_is_refused(build: Any, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        build(make_params(), **options)


def test_compact_states() -> None:
    """The root of exp_avg_sq bounds exp_avg of AdamW alone: other averages are bfloat16."""
    bf16, e8m8, anchored8 = torch.bfloat16, torch.uint16, torch.uint8
    for build, wanted in (
        (FusedAdEMAMix, {"exp_avg_fast": bf16, "exp_avg_slow": bf16, "exp_avg_sq": e8m8}),
        (FusedADOPT, {"exp_avg": bf16, "exp_avg_sq": e8m8}),
        (FusedAdan, {"exp_avg": bf16, "exp_avg_diff": bf16, "neg_pre_grad": bf16, "exp_avg_sq": e8m8}),
        (FusedStableAdamW, {"exp_avg": anchored8, "exp_avg_sq": e8m8}),
    ):
        params = make_params(SHAPES)
        ours = build(params, state_dtype="compact")
        train([ours], 2)
        state = ours.state[params[0]]
        assert {name: state[name].dtype for name in wanted} == wanted
