"""LAMB: NVIDIA Apex's formula in every combination of its options, trust ratios, clipping, and run-to-run
reproducibility."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import pytest
import torch
from cases import (
    SLOW,
    Target,
    copies,
    make_params,
    on_every_target,
    parameters,
    quick,
    random_grads,
    set_grads,
    train,
)
from compare import assert_equal, checked_step, states
from oracle import lamb

from fused_optim import FusedLAMB

F64 = torch.float64
SHAPES = [(5, 3), (), (0,), (40,)]
SWITCHES = ["bias_correction", "adam_w_mode", "grad_averaging", "use_nvlamb"]


def build(target: Target, params: Any, **options: Any) -> FusedLAMB:
    return FusedLAMB(params, backend=target.backend, **{"lr": 0.01, **options})


def norm(tensors: list[torch.Tensor]) -> float:
    return math.sqrt(sum(x.double().square().sum().item() for x in tensors))


@pytest.mark.slow
@on_every_target
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("max_grad_norm", [None, 0, 0.5])
@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16], ids=str)
def test_every_combination(
    target: Target, weight_decay: float, max_grad_norm: float | None, dtype: torch.dtype
) -> None:
    bound = {F64: 200.0, torch.float32: 3.0, torch.bfloat16: 0.6}[dtype]
    combinations = list(itertools.product([False, True], repeat=4))
    for number, values in enumerate(combinations[:: quick(target, 1, 5)]):
        params = make_params(SHAPES, dtype, target.device, seed=number)
        switches = dict(zip(SWITCHES, values, strict=True))
        ours = build(target, params, weight_decay=weight_decay, max_grad_norm=max_grad_norm, **switches)
        for step in range(2):
            set_grads(params, random_grads(params, step))
            checked_step(ours, lamb, bound)


def apex(
    param: torch.Tensor, grad: torch.Tensor, m: torch.Tensor, v: torch.Tensor, step: int, lr: float, wd: float
) -> torch.Tensor:
    """One update with Apex's defaults, written out. Updates m and v in place."""
    m.mul_(0.9).add_(grad, alpha=0.1)
    v.mul_(0.999).add_(grad * grad, alpha=0.001)
    u = m / (1 - 0.9**step) / ((v / (1 - 0.999**step)).sqrt() + 1e-6) + wd * param
    return param - lr * (param.norm() / u.norm()) * u


@on_every_target
def test_defaults_are_apexs(target: Target) -> None:
    """No option is set. The gradients have norm 5, so they are clipped to a fifth."""
    p = torch.nn.Parameter(torch.tensor([3.0, -1.0, 0.5], dtype=F64, device=target.device))
    truth, m, v = p.detach().clone(), torch.zeros_like(p.detach()), torch.zeros_like(p.detach())
    ours = FusedLAMB([p], backend=target.backend)
    for step, grad in enumerate(([3.0, 4.0, 0.0], [0.0, -3.0, 4.0], [-4.0, 0.0, 3.0]), start=1):
        p.grad = torch.tensor(grad, dtype=F64, device=target.device)
        ours.step()
        truth = apex(truth, p.grad / 5, m, v, step, lr=1e-3, wd=0.01)
        torch.testing.assert_close(p.detach(), truth, rtol=1e-12, atol=0)


@pytest.mark.compiled
@on_every_target
def test_trust_ratios(target: Target) -> None:
    """trust_ratios holds ‖p‖ / ‖u‖ of the last step. The update has length lr * ‖p‖."""
    params = make_params([(50,), (9000,)], F64, target.device)
    ours = build(target, params, weight_decay=0.01)
    for step in range(2):
        before = copies(params)
        set_grads(params, random_grads(params, step))
        ours.step()
        for p, old in zip(params, before, strict=True):
            ratio = ours.trust_ratios[p]
            assert (ratio.shape, ratio.device) == ((), p.device)
            assert norm([p.detach() - old.detach()]) == pytest.approx(0.01 * norm([old.detach()]), rel=1e-10)
            state = ours.state[p]
            mean = state["exp_avg"] / (1 - 0.9 ** (step + 1))
            u = mean / ((state["exp_avg_sq"] / (1 - 0.999 ** (step + 1))).sqrt() + 1e-6) + 0.01 * old.detach()
            assert ratio.item() == pytest.approx(norm([old.detach()]) / norm([u]), rel=1e-9)


@on_every_target
def test_ratio_is_one_without_norms(target: Target) -> None:
    """The ratio is 1 for zero params, zero updates and empty tensors, and if weight decay and nvlamb are both off."""
    shapes = [(7,), (7,), (0,), (7,)]
    for options in ({"weight_decay": 0.1}, {"weight_decay": 0.0, "use_nvlamb": True}, {"weight_decay": 0.0}):
        params = make_params(shapes, device=target.device)
        ours = build(target, params, **options)
        with torch.no_grad():
            params[0].zero_()
        set_grads(params, [torch.ones_like(params[0]), torch.zeros_like(params[1]), *random_grads(params[2:], 0)])
        checked_step(ours, lamb, 3.0)
        ratios = [ours.trust_ratios[p].item() for p in params]
        assert ratios[0] == ratios[2] == 1.0
        assert (ratios[1] == 1.0) == (options["weight_decay"] == 0.0)  # decay alone is a nonzero update
        assert (ratios[3] == 1.0) == (options == {"weight_decay": 0.0})


@on_every_target
@pytest.mark.parametrize("trust_clip", [(0.0, 0.5), (2.0, 3.0), (1.0, 1.0), (0.0, math.inf)], ids=str)
def test_trust_clip(target: Target, trust_clip: tuple[float, float]) -> None:
    params = make_params([(30,), (4, 4)], device=target.device)
    free, ours = build(target, params), build(target, copies(params), trust_clip=trust_clip)
    for optimizer in (free, ours):
        set_grads(parameters(optimizer), random_grads(parameters(optimizer), 0))
    free.step()
    checked_step(ours, lamb, 3.0)
    for ratio, clipped in zip(free.trust_ratios.values(), ours.trust_ratios.values(), strict=True):
        assert clipped.item() == min(max(ratio.item(), trust_clip[0]), trust_clip[1])


@on_every_target
def test_clipping(target: Target) -> None:
    """A bound above the norm changes no bit. With a bound below it the step equals one with gradients scaled
    beforehand."""
    params = make_params(SHAPES, F64, target.device)
    grads = random_grads(params, 0)
    total = norm(grads)
    off, above, below, scaled = (
        build(target, copies(params), max_grad_norm=bound) for bound in (None, 1.001 * total, 0.875 * total, 0)
    )
    for optimizer in (off, above, below, scaled):
        set_grads(parameters(optimizer), [g * 0.875 for g in grads] if optimizer is scaled else grads)
        optimizer.step()
    assert_equal(states(above), states(off))
    assert_equal([p.detach() for p in parameters(above)], [p.detach() for p in parameters(off)])
    for p, q in zip(parameters(below), parameters(scaled), strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-12, atol=0)
        torch.testing.assert_close(below.state[p]["exp_avg"], scaled.state[q]["exp_avg"], rtol=1e-12, atol=0)
    for p, g in zip(parameters(below), grads, strict=True):
        assert_equal(p.grad, g)


@on_every_target
def test_only_gradients_that_are_there_are_clipped(target: Target) -> None:
    """The norm is over the gradients of this step in all clipped groups. Each group has its own bound."""
    params = make_params([(5,), (6,), (7,), (8,)], device=target.device)
    groups = [
        {"params": params[:2], "max_grad_norm": 0.1},
        {"params": params[2:3], "max_grad_norm": 2.0},
        {"params": params[3:], "max_grad_norm": None},
    ]
    ours = build(target, groups)
    for step, present in enumerate(["1111", "0111", "0001", "1010"]):
        grads = zip(random_grads(params, step), present, strict=True)
        set_grads(params, [g * 10 if bit == "1" else None for g, bit in grads])
        checked_step(ours, lamb, 3.0)


@pytest.mark.slow
@on_every_target
def test_the_same_at_every_run_and_number_of_threads(target: Target) -> None:
    """Sums over full tensors have a fixed order, independent of the thread that computes each part. A different order
    would change the last bits."""
    shapes = [(50_000,), (3,), (40_001,), (4096,), (7, 9)] if target.backend not in SLOW else [(9000,), (7, 9)]
    threads = torch.get_num_threads()
    runs = []
    try:
        for count in [1, 2, 5, 8, 2, 8] if target.backend not in SLOW else [1, 2]:
            torch.set_num_threads(count)
            ours = build(target, make_params(shapes, device=target.device), weight_decay=0.1, max_grad_norm=0.3)
            train([ours], quick(target, 3, 1))
            ratios = [ratio.clone() for ratio in ours.trust_ratios.values()]
            runs.append(([p.detach().clone() for p in parameters(ours)], copy.deepcopy(states(ours)), ratios))
    finally:
        torch.set_num_threads(threads)
    for run in runs[1:]:
        assert_equal(run, runs[0])


@pytest.mark.compiled
@on_every_target
def test_skipped_steps_leave_the_ratios(target: Target) -> None:
    params = make_params(SHAPES, device=target.device)
    ours: Any = build(target, params)
    train([ours], 1)
    before = [ours.trust_ratios[p].item() for p in params]
    assert any(ratio != 1.0 for ratio in before)
    set_grads(params, [torch.full_like(p, math.inf) for p in params])
    ours.found_inf = torch.ones((), device=target.device)
    ours.step()
    assert [ours.trust_ratios[p].item() for p in params] == before


@on_every_target
def test_nan_gradients_reach_the_params(target: Target) -> None:
    """A NaN gradient makes the norm of all gradients NaN, and so every clipped gradient and every param."""
    params = make_params([(4,), (5,)], device=target.device)
    ours = build(target, params)
    set_grads(params, [torch.tensor([1.0, math.nan, 2.0, 3.0], device=target.device), torch.ones_like(params[1])])
    ours.step()
    assert all(p.isnan().all() for p in params)


@on_every_target
def test_checkpoints_of_apex(target: Target) -> None:
    """Apex keeps the step count in the group, and its groups have keys of their own."""
    params = make_params(SHAPES, device=target.device)
    ours = build(target, [{"params": params[:2]}, {"params": params[2:], "weight_decay": 0.1}])
    train([ours], 4)
    saved = copy.deepcopy(ours.state_dict())
    keys = ["lr", "bias_correction", "betas", "eps", "weight_decay", "grad_averaging", "max_grad_norm", "params"]
    theirs: dict[str, Any] = {
        "state": {
            index: {key: value for key, value in state.items() if key != "step"}
            for index, state in saved["state"].items()
        },
        "param_groups": [{**{key: group[key] for key in keys}, "step": 4} for group in saved["param_groups"]],
    }
    kept = copy.deepcopy(theirs)
    other = copies(params)
    back = build(target, [{"params": other[:2]}, {"params": other[2:]}], lr=7.0, trust_clip=(0.0, 10.0))
    back.load_state_dict(theirs)
    assert theirs["param_groups"] == kept["param_groups"]
    assert all("step" not in state for state in theirs["state"].values())
    assert all("step" not in group for group in back.param_groups)
    assert [group["weight_decay"] for group in back.param_groups] == [0.01, 0.1]
    assert [group["trust_clip"] for group in back.param_groups] == [(0.0, 10.0)] * 2
    for group in back.param_groups:
        group["trust_clip"] = None
    assert [back.state[p]["step"].item() for p in other] == [4.0] * 4
    train([ours, back], 2, seed=5)
    assert_equal([p.detach() for p in params], [p.detach() for p in other])
    assert_equal(states(ours), states(back))


BROKEN: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"amsgrad": True}, RuntimeError, "does not support the AMSGrad variant"),
    ({"max_grad_norm": -1.0}, ValueError, "max_grad_norm must be 0 or more.*but got -1.0"),
    ({"max_grad_norm": math.nan}, ValueError, "max_grad_norm must be 0 or more.*but got nan"),
    ({"trust_clip": (2.0, 1.0)}, ValueError, r"trust_clip must be .*but got \(2.0, 1.0\)"),
    ({"trust_clip": (-1.0, 1.0)}, ValueError, r"trust_clip must be .*but got \(-1.0, 1.0\)"),
    ({"trust_clip": (1.0,)}, ValueError, r"trust_clip must be .*but got \(1.0,\)"),
]


@pytest.mark.parametrize(("options", "kind", "message"), BROKEN, ids=str)
def test_refused_options(options: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        FusedLAMB(make_params(), **options)


def test_arguments_are_apexs() -> None:
    """As positional arguments, in this order."""
    ours = FusedLAMB(make_params(), 0.5, False, (0.8, 0.9), 1e-3, 0.2, False, False, False, True, 3.0, True)
    group = ours.param_groups[0]
    names = ["lr", "bias_correction", "betas", "eps", "weight_decay", "adam_w_mode", "grad_averaging"]
    assert [group[name] for name in names] == [0.5, False, (0.8, 0.9), 1e-3, 0.2, False, False]
    assert (group["max_grad_norm"], group["use_nvlamb"]) == (3.0, True)
