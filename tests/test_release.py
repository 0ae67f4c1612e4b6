"""Gradient release: backward() steps the params bucket by bucket and frees their gradients. Changes between steps and
errors are in test_release_changes.py."""

from __future__ import annotations

import io
import math
from typing import Any

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
    for_every_rule,
    on_every_target,
    parameters,
    quick,
)
from compare import assert_equal
from released import BUCKET, REFERENCE, Net, assert_same, loss, pair, side_by_side
from torch import Tensor, nn

from fused_optim import FusedAdamW, FusedMuon, groups, release_gradients
from fused_optim.optim import release as release_module

BF16 = torch.bfloat16


# ---- numbers


@on_every_target
@for_every_rule
def test_steps_are_plain_steps(case: Case, target: Target) -> None:
    net, ours, release, other, plain = pair(case, target, max_grad_norm=None)
    assert len(release._buckets) > 3
    side_by_side(net, ours, other, plain, quick(target, 5, 2))
    assert_same(ours, plain)


STORED: dict[str, dict[str, Any]] = {
    "masters-compact": {"master_weights": "exact", "state_dtype": "compact"},
    "24bit": {"master_weights": "24bit"},
    "dithered": {"rounding": "dithered", "ema_dtype": BF16, "ema_decay": 0.9},
}


@on_every_target
@pytest.mark.parametrize("stored", STORED)
def test_bfloat16(stored: str, target: Target) -> None:
    net, ours, _, other, plain = pair(AMSGRAD, target, BF16, **STORED[stored])
    side_by_side(net, ours, other, plain, quick(target, 4, 2))
    assert_same(ours, plain)
    assert_equal(ours.master_params(), plain.master_params())


def test_schedules_and_averages_advance_once_per_step() -> None:
    asked: list[int] = []

    def decay(step: int) -> float:
        asked.append(step)
        return min(0.9, step / 10)

    net, ours, _, other, plain = pair(ADAMW, REFERENCE, ema_decay=decay)
    schedules = [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5) for optimizer in (ours, plain)]
    for step in range(4):
        side_by_side(net, ours, other, plain, range(step, step + 1))
        for schedule in schedules:
            schedule.step()
    assert asked == [0, 0, 1, 1, 2, 2, 3, 3]
    assert ours.state_dict()["ema_steps"] == 4
    assert_same(ours, plain)
    with ours.ema_weights(), pytest.raises(RuntimeError, match=r"step\(\) cannot be called inside of ema_weights"):
        loss(net, 0).backward()


@on_every_target
def test_accumulated_gradients(target: Target) -> None:
    """All micro-batches but the last are inside of no_release()."""
    net, ours, release, other, plain = pair(ADAMW, target)
    release.grad_scale = 3.0
    for step in range(3):
        with release.no_release():
            for part in range(2):
                loss(net, step, part).backward()
        assert net.first.weight.grad is not None and (step or not ours.state)
        loss(net, step, 2).backward()
        assert net.first.weight.grad is None
        ours.step()
        for part in range(3):
            loss(other, step, part).backward()
        plain.step(grad_scale=3.0)
        plain.zero_grad()
    assert_same(ours, plain)


# ---- memory and launches


def test_gradients_of_the_whole_model_never_live_together() -> None:
    sizes = [64] * 12
    net = nn.Sequential(*[nn.Linear(size, size, bias=False) for size in sizes])
    largest = 0

    def count(_: Tensor) -> None:
        nonlocal largest
        live = sum(p.grad.nbytes for p in net.parameters() if p.grad is not None)
        largest = max(largest, live)

    for param in net.parameters():
        param.register_post_accumulate_grad_hook(count)
    one = 64 * 64 * 4
    ours = FusedAdamW(net.parameters())
    for bucket_bytes, most in ((one, 1), (3 * one, 3), (100 * one, 12)):
        release, largest = release_gradients(net, ours, bucket_bytes=bucket_bytes), 0
        for _ in range(2):
            (net(torch.randn(2, 64)) ** 2).mean().backward()
            assert all(p.grad is None for p in net.parameters())
            ours.step()
        release.remove()
        assert largest == most * one


def test_plans_are_made_once_and_launched_once_per_step(monkeypatch: pytest.MonkeyPatch) -> None:
    made, walked = [], []
    make, walk = release_module.make_plan, release_module.walk
    monkeypatch.setattr(release_module, "make_plan", lambda *given: made.append(0) or make(*given))
    monkeypatch.setattr(release_module, "walk", lambda tables, given: walked.append(len(tables)) or walk(tables, given))
    net, ours, release, other, plain = pair(AMSGRAD, REFERENCE, max_grad_norm=1.0)
    side_by_side(net, ours, other, plain, range(0, 8, 2))
    assert len(made) == len(release._buckets)
    assert len(walked) == 4 * len(made) and {*walked} <= {0, 1}
    for group in ours.param_groups:
        group["lr"] = 0.5
    side_by_side(net, ours, other, plain, range(0, 4, 2))
    assert len(made) == len(release._buckets)


# ---- clipping and skipping


def expected_norms(norms: list[list[float]], norm_type: float) -> list[list[float]]:
    """The norm that clips each bucket, from the norms of the buckets of each step."""
    last, found = 0.0, []
    for step in norms:
        sums = [sum(norm**2 for norm in step[: n + 1]) ** 0.5 for n in range(len(step))]
        seen = sums if norm_type == 2 else [max(step[: n + 1]) for n in range(len(step))]
        found.append([max(last, one) for one in seen])
        last = seen[-1]
    return found


@on_every_target
@pytest.mark.parametrize("norm_type", [2.0, math.inf])
def test_clipping(norm_type: float, target: Target) -> None:
    """By the larger of the last step's norm and the norm of this step so far."""
    torch.manual_seed(0)
    layers = [nn.Linear(9, 9, bias=False, device=target.device, dtype=torch.float64) for _ in range(4)]
    net = nn.Sequential(*layers)
    ours = build(BY_NAME["sgd-plain"], target, net.parameters(), lr=1.0, weight_decay=0.0, max_grad_norm=0.1)
    ours.norm_type = norm_type
    release_gradients(net, ours, bucket_bytes=1)
    norms, taken = [], []
    for step in range(4):
        before = [layer.weight.detach().clone() for layer in layers]
        x = torch.randn(3, 9, device=target.device, dtype=torch.float64) * (1, 30, 1, 0.01)[step]
        grads = torch.autograd.grad((net(x) ** 2).mean(), [layer.weight for layer in layers])
        (net(x) ** 2).mean().backward()
        ours.step()
        norms.append([float(grad.norm(norm_type)) for grad in grads[::-1]])
        updates = [old - layer.weight.detach() for old, layer in zip(before, layers, strict=True)]
        moved = [float(update.norm(norm_type)) for update in updates[::-1]]
        taken.append([share / norm for share, norm in zip(moved, norms[-1], strict=True)])
        whole = torch.cat([grad.flatten() for grad in grads]).norm(norm_type)
        torch.testing.assert_close(ours.last_grad_norm, whole, check_device=False, check_dtype=False)
    for shares, bounds in zip(taken, expected_norms(norms, norm_type), strict=True):
        for share, bound in zip(shares, bounds, strict=True):
            assert share == pytest.approx(min(1.0, 0.1 / (bound + 1e-6)), rel=1e-3)


def test_resuming_with_clipping_is_like_not_having_stopped() -> None:
    net, ours, _, *_ = pair(ADAMW, REFERENCE, max_grad_norm=0.01)
    for step in range(2):
        loss(net, step).backward()
        ours.step()
    file = io.BytesIO()
    torch.save([net.state_dict(), ours.state_dict()], file)
    file.seek(0)
    weights, saved = torch.load(file, weights_only=True)
    other, resumed, *_ = pair(ADAMW, REFERENCE, max_grad_norm=0.01)
    other.load_state_dict(weights)
    resumed.load_state_dict(saved)
    side_by_side(net, ours, other, resumed, range(2, 5))
    assert_same(ours, resumed)


@on_every_target
def test_buckets_with_nonfinite_gradients_are_skipped(target: Target) -> None:
    layers = [nn.Linear(4, 4, bias=False, device=target.device) for _ in range(3)]
    net = nn.Sequential(*layers)
    ours = build(ADAMW, target, net.parameters(), skip_nonfinite=True, max_grad_norm=1.0)
    release_gradients(net, ours, bucket_bytes=1)
    layers[1].weight.register_hook(lambda grad: grad * poison)
    for poison, moves in ((1.0, [True] * 3), (math.nan, [True, False, True]), (1.0, [True] * 3)):  # noqa: B007
        before = [layer.weight.detach().clone() for layer in layers]
        net(torch.randn(2, 4, device=target.device)).sum().backward()
        ours.step()
        assert [not torch.equal(old, layer.weight) for old, layer in zip(before, layers, strict=True)] == moves
        assert bool(ours.last_grad_norm.isfinite())
    assert int(ours.skipped_steps) == 1
    assert [float(ours.state[layer.weight]["step"]) for layer in layers] == [3, 2, 3]


def test_lamb_keeps_its_ratios() -> None:
    net, ours, _, other, plain = pair(LAMB, REFERENCE, max_grad_norm=None)
    side_by_side(net, ours, other, plain, 2)
    ratios = [optimizer.trust_ratios for optimizer in (ours, plain)]
    assert len(ratios[0]) == len(ratios[1]) > 5
    for p, q in zip(parameters(ours), parameters(plain), strict=True):
        assert_equal(ratios[0].get(p), ratios[1].get(q))


@on_every_target
def test_muon(target: Target) -> None:
    """Matrices of one shape are orthogonalized together, in batches of a bucket, which may round otherwise."""
    nets = [Net(device=target.device) for _ in range(2)]
    ours, plain = (FusedMuon(groups.muon(net), backend=target.backend) for net in nets)
    release_gradients(nets[0], ours, bucket_bytes=BUCKET)
    side_by_side(nets[0], ours, nets[1], plain, 3)
    for p, q in zip(parameters(ours), parameters(plain), strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-3, atol=1e-5)
