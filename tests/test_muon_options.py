"""Every option of the base with Muon and AdamW in one optimizer."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from cases import Target, copies, make_params, on_every_target, parameters, quick, set_grads
from compare import assert_equal, checked_averages, states
from mixed_groups import BF16, F64, MATRICES, OTHERS, build, draw, make, steps, values
from muon import one_thread
from torch import Tensor
from torch.nn import Parameter

from fused_optim import FusedMuon

__all__ = ["one_thread"]  # a fixture


@on_every_target
def test_clipping_is_by_the_norm_of_all_gradients(target: Target) -> None:
    params = make(target, F64)
    grads = draw(params, 0)
    norm = math.sqrt(sum(g.square().sum().item() for g in grads))
    other = copies(params)
    clipped, scaled = build(target, params, max_grad_norm=norm / 4), build(target, other)
    set_grads(params, grads)
    set_grads(other, [g / 4 for g in grads])
    clipped.step()
    scaled.step()
    torch.testing.assert_close(clipped.last_grad_norm.item(), norm, rtol=1e-6, atol=0)
    for mine, theirs in zip(states(clipped), states(scaled), strict=True):
        for key, value in mine.items():
            torch.testing.assert_close(value, theirs[key], rtol=2e-6, atol=1e-12)


@on_every_target
def test_grad_scale(target: Target) -> None:
    params = make(target)
    other = copies(params)
    plain, scaled = build(target, params), build(target, other)
    for step in range(2):
        grads = draw(params, step)
        set_grads(params, grads)
        set_grads(other, [g * 8 for g in grads])
        plain.step()
        scaled.step(grad_scale=8.0)
    assert_equal(values(plain), values(scaled))


@pytest.mark.compiled
@on_every_target
@pytest.mark.parametrize("normuon", [False, True])
def test_skipped_steps_change_nothing(target: Target, normuon: bool) -> None:
    params = make(target)
    optimizer: Any = build(target, params, skip_nonfinite=True, normuon=normuon)
    steps(optimizer, 2)
    before = values(optimizer)
    bad = draw(params, 5)
    bad[4] = torch.full_like(bad[4], math.nan)
    set_grads(params, bad)
    optimizer.step()
    assert optimizer.skipped_steps.item() == 1
    assert_equal(values(optimizer), before)
    set_grads(params, draw(params, 6))
    optimizer.found_inf = torch.ones((), device=target.device)
    optimizer.step()
    del optimizer.found_inf
    assert_equal(values(optimizer), before)
    steps(optimizer, 1, first=7)
    assert not any(torch.equal(p, q) for p, q in zip(params[:3], before[0], strict=False))


@on_every_target
def test_averages(target: Target) -> None:
    params = make(target)
    checked_averages(build(target, params, ema_decay=0.75), [1.0, 0.25, 0.25])


@on_every_target
def test_master_weights(target: Target) -> None:
    """The masters of bfloat16 params are float32 params that get the same gradients, bit for bit."""
    narrow = make(target, BF16)
    wide = [Parameter(p.detach().float()) for p in narrow]
    lowered, plain = build(target, narrow, master_weights="exact"), build(target, wide)
    for step in range(3):
        grads = draw(narrow, step)
        set_grads(narrow, grads)
        set_grads(wide, [grad.float() for grad in grads])
        lowered.step()
        plain.step()
    assert_equal(lowered.master_params(), [p.detach() for p in wide])


@on_every_target
@pytest.mark.parametrize("state_dtype", ["compact", BF16, {"momentum_buffer": BF16, "exp_avg_sq": "e8m8"}], ids=str)
def test_state_dtypes(target: Target, state_dtype: Any) -> None:
    params = make(target)
    other = copies(params)
    narrow, wide = build(target, params, state_dtype=state_dtype), build(target, other)
    for optimizer in (narrow, wide):
        steps(optimizer, 2)
    assert narrow.state[params[0]]["momentum_buffer"].dtype == BF16
    for p, q in zip(params, other, strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=0.02, atol=0.01)
    again = build(target, copies(params), state_dtype=state_dtype)
    again.load_state_dict(copy.deepcopy(narrow.state_dict()))
    for optimizer in (narrow, again):
        steps(optimizer, 1, first=2)
    for mine, theirs in zip(states(narrow), states(again), strict=True):
        kept, loaded = ({k: x.dtype for k, x in state.items() if k != "anchor"} for state in (mine, theirs))
        assert kept == loaded
    if state_dtype != "compact":  # its dithering depends on the number of updates, which a checkpoint of Muon lacks
        assert_equal(values(narrow), values(again))


def test_unknown_states_in_state_dtype() -> None:
    with pytest.raises(ValueError, match=r"the states of this optimizer are momentum_buffer, exp_avg, exp_avg_sq"):
        FusedMuon(make_params([(3, 4)]), state_dtype={"sum": BF16})


@on_every_target
def test_dithered_rounding(target: Target) -> None:
    """The same bits at every run, and small updates are not lost."""
    runs = []
    for _ in range(2):
        params = make(target, BF16)
        optimizer = build(target, params, lr=1e-5, rounding="dithered")
        before = copies(params)
        steps(optimizer, quick(target, 4, 2))
        assert not torch.equal(params[0], before[0])
        runs.append(values(optimizer))
    assert_equal(*runs)


@on_every_target
@pytest.mark.parametrize("how", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_copies_continue(target: Target, how: Any) -> None:
    optimizer = build(target, make(target), normuon=True, ema_decay=0.9)
    steps(optimizer, 2)
    again = how(optimizer)
    for each in (optimizer, again):
        steps(each, 2, first=2)
    assert_equal(values(optimizer), values(again))


@on_every_target
def test_checkpoints_continue(target: Target) -> None:
    optimizer = build(target, make(target), normuon=True)
    steps(optimizer, 2)
    again = build(target, copies(parameters(optimizer)), lr=9.0)
    again.load_state_dict(pickle.loads(pickle.dumps(optimizer.state_dict())))
    assert again.param_groups[0]["normuon"] and again.param_groups[0]["lr"] == 0.02
    for each in (optimizer, again):
        steps(each, 2, first=2)
    assert_equal(values(optimizer), values(again))


@on_every_target
def test_a_checkpoint_after_skipped_steps_has_no_momentum(target: Target) -> None:
    optimizer: Any = build(target, make(target), skip_nonfinite=True, normuon=True)
    set_grads(parameters(optimizer), [torch.full_like(p, math.inf) for p in parameters(optimizer)])
    optimizer.step()
    assert [index for index in optimizer.state_dict()["state"] if index < 3] == []


@on_every_target
@pytest.mark.parametrize("decay", ["paper", "normalized"])
def test_decay_conventions(target: Target, decay: Any) -> None:
    """Without a gradient direction only the decay moves the params."""
    params = make(target)
    before = copies(params)
    period = {"decay_period": 16.0} if decay == "normalized" else {}
    optimizer = build(target, params, decay=decay, lr_reference=0.04, weight_decay=0.5, **period)
    set_grads(params, [torch.zeros_like(p) for p in params])
    optimizer.step()
    share = 0.02 / 0.04 * 0.5 / (4 if period else 1)
    for p, q in zip(params[:3], before, strict=False):
        torch.testing.assert_close(p.detach(), (1 - share) * q.detach(), rtol=1e-6, atol=0)


@on_every_target
def test_cautious_decay(target: Target) -> None:
    """Matrices decay only where their orthogonalized update has their sign."""
    params = make(target)
    ways: list[dict[str, Any]] = [{"weight_decay": 0.0}, {"weight_decay": 5.0}, {"weight_decay": 5.0}]
    optimizers = [build(target, copies(params), **way) for way in ways[:2]]
    optimizers.append(build(target, copies(params), **ways[2], cautious_decay=True))
    for optimizer in optimizers:
        steps(optimizer, 1)
    for p, free, decayed, cautious in zip(params[:3], *map(parameters, optimizers), strict=False):
        agree = (p - free) * p > 0
        assert agree.any() and not agree.all()
        torch.testing.assert_close(cautious, torch.where(agree, decayed, free), rtol=1e-6, atol=1e-6)


@on_every_target
def test_corrected_decay(target: Target) -> None:
    """With a quarter of the largest lr the decay is a sixteenth. The largest lr is a state of every param."""
    params = make(target)
    optimizer = build(target, params, weight_decay=0.5, corrected_decay=True)
    for lr in (0.02, 0.005):
        for group in optimizer.param_groups:
            group["lr"] = lr
        before = copies(params)
        set_grads(params, [torch.zeros_like(p) for p in params])
        optimizer.step()
        for p, q in zip(params[:3], before, strict=False):
            share = lr * lr / 0.02 * 0.5
            torch.testing.assert_close(p.detach(), (1 - share) * q.detach(), rtol=1e-6, atol=1e-7)
    assert all("lr_max" in optimizer.state[p] for p in params)


@pytest.mark.slow
def test_inside_of_torch_compile() -> None:
    params = make_params(MATRICES + OTHERS)
    target = Target("reference", "cpu")
    optimizer, plain = build(target, params), build(target, copies(params))
    step = torch.compile(optimizer.step, backend="eager")
    for number in range(2):
        for each in (optimizer, plain):
            set_grads(parameters(each), draw(parameters(each), number))
        step()
        plain.step()
    assert_equal(values(optimizer), values(plain))


@on_every_target
def test_frozen_params_and_late_gradients(target: Target) -> None:
    params = make(target)
    params[0].requires_grad_(False)
    params[3].requires_grad_(False)
    optimizer = build(target, params)
    before = copies(params)
    for step in range(2):
        grads: list[Tensor | None] = list(draw(params, step))
        grads[0] = grads[3] = None
        if step == 0:
            grads[1] = None
        set_grads(params, grads)
        optimizer.step()
    for number in (0, 3):
        assert_equal(params[number].detach(), before[number].detach())
        assert params[number] not in optimizer.state
    assert not torch.equal(params[1], before[1])
