"""Lion: the update uses only the sign of an average, so the size of gradients does not matter."""

from __future__ import annotations

import math

import pytest
import torch
from cases import Target, copies, make_params, on_every_target, parameters, quick, random_grads, set_grads, train
from compare import assert_equal, checked_step, states
from oracle import lion

from fused_optim import FusedLion

SHAPES = [(5, 3), (), (0,), (40,)]


@on_every_target
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_by_hand(target: Target, dtype: torch.dtype) -> None:
    """beta1 = 1/2, beta2 = 3/4, lr = 1/8, decay = 1/2: every number below is exact."""
    p = torch.nn.Parameter(torch.tensor([1.0, -2.0, 4.0], dtype=dtype, device=target.device))
    ours = FusedLion([p], lr=0.125, betas=(0.5, 0.75), weight_decay=0.5, backend=target.backend)
    kept = 1 - 0.125 * 0.5  # 0.9375
    first = [kept - 0.125, -2 * kept + 0.125, 4 * kept]
    # Before the second step the averages are 4, -8 and 0. Their means with its gradients are 0, -2 and 2.
    second = [first[0] * kept, first[1] * kept + 0.125, first[2] * kept - 0.125]
    steps = [([16.0, -32.0, 0.0], first, [4.0, -8.0, 0.0]), ([-4.0, 4.0, 4.0], second, [2.0, -5.0, 1.0])]
    for grad, param, exp_avg in steps:
        p.grad = torch.tensor(grad, dtype=dtype, device=target.device)
        ours.step()
        assert p.tolist() == param
        assert ours.state[p]["exp_avg"].tolist() == exp_avg


@on_every_target
def test_the_size_of_gradients_does_not_matter(target: Target) -> None:
    """Scaling gradients by a power of two is exact: the params are bitwise equal, and the averages scale by the same
    factor."""
    params = make_params(SHAPES, device=target.device)
    ours, larger = (FusedLion(copies(params), lr=0.01, weight_decay=0.1, backend=target.backend) for _ in range(2))
    for step in range(quick(target, 10, 3)):
        grads = random_grads(params, step)
        set_grads(parameters(ours), grads)
        set_grads(parameters(larger), [g * 1024 for g in grads])
        ours.step()
        larger.step()
    assert_equal([p.detach() for p in parameters(ours)], [p.detach() for p in parameters(larger)])
    assert_equal([s["exp_avg"] * 1024 for s in states(ours)], [s["exp_avg"] for s in states(larger)])


@on_every_target
@pytest.mark.parametrize("maximize", [False, True])
def test_every_element_moves_by_lr(target: Target, maximize: bool) -> None:
    params = make_params([(1000,)], torch.float64, target.device)
    ours = FusedLion(params, lr=0.25, maximize=maximize, backend=target.backend)
    for step in range(2):
        (before,) = copies(params)
        set_grads(params, random_grads(params, step))
        ours.step()
        torch.testing.assert_close((params[0] - before).abs(), torch.full_like(before, 0.25), rtol=1e-12, atol=0)
        if step == 0:
            assert params[0].grad is not None
            assert_equal((params[0] - before).sign(), params[0].grad.sign() * (1 if maximize else -1))


@on_every_target
def test_sign_of_zero_is_zero(target: Target) -> None:
    """A param whose gradients were all zero, such as an unused embedding, only decays."""
    params = make_params([(40,)], device=target.device)
    ours = FusedLion(params, lr=0.1, weight_decay=0.0, backend=target.backend)
    for zero in (0.0, -0.0):
        (before,) = copies(params)
        params[0].grad = torch.full_like(params[0], zero)
        ours.step()
        assert_equal(params[0].detach(), before.detach())
    ours.param_groups[0]["weight_decay"] = 0.5
    checked_step(ours, lion, 3.0)
    assert_equal(ours.state[params[0]]["exp_avg"], torch.zeros_like(params[0]))


@on_every_target
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.complex64], ids=str)
def test_other_dtypes(target: Target, dtype: torch.dtype) -> None:
    """Complex numbers are pairs of reals, each with its own sign."""
    params = make_params(SHAPES, dtype, target.device)
    ours = FusedLion(params, lr=0.05, weight_decay=0.1, backend=target.backend)
    for step in range(quick(target, 6, 2)):
        set_grads(params, random_grads(params, step))
        checked_step(ours, lion, 3.0 if dtype.is_complex else 0.6)


@on_every_target
def test_special_gradients(target: Target) -> None:
    """Infinity has a sign. NaN stays in the average of its element and does not affect other elements."""
    p = torch.nn.Parameter(torch.ones(5, device=target.device))
    ours = FusedLion([p], lr=0.5, backend=target.backend)
    p.grad = torch.tensor([math.inf, -math.inf, math.nan, 1e-38, -3e38], device=target.device)
    ours.step()
    assert p[[0, 1, 3, 4]].tolist() == [0.5, 1.5, 0.5, 1.5]
    exp_avg = ours.state[p]["exp_avg"]
    assert exp_avg[2].isnan() and exp_avg[[0, 1]].tolist() == [math.inf, -math.inf] and exp_avg[3:].isfinite().all()


@on_every_target
def test_one_state(target: Target) -> None:
    params = make_params(SHAPES, device=target.device)
    ours = FusedLion(params, backend=target.backend)
    train([ours], 2)
    assert all([*state] == ["exp_avg"] for state in ours.state.values())
    assert all([*state] == ["exp_avg"] for state in ours.state_dict()["state"].values())
    assert (ours.defaults["lr"], ours.defaults["betas"], ours.defaults["weight_decay"]) == (1e-4, (0.9, 0.99), 0.0)
