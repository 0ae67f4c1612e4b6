"""Gradients with another dtype than their params (Tensor.grad_dtype), as backward() creates and accumulates them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import ADAMW, Case, Target, build, for_every_rule, on_every_target, parameters, random_grads
from compare import checked_step
from torch import Tensor, nn

from fused_optim import FusedAdamW, clip_grad_norm_

pytestmark = pytest.mark.skipif(
    not hasattr(Tensor, "grad_dtype"),
    reason="needs Tensor.grad_dtype, which torch has since 2.10",
)
HALF = [torch.bfloat16, torch.float16]


def net(dtype: torch.dtype, device: str, grad_dtype: torch.dtype | None) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3)).to(device, dtype)
    for p in model.parameters():
        p.grad_dtype = grad_dtype
    return model


def backward(model: nn.Module, seed: int, scale: float = 1.0) -> None:
    p = next(model.parameters())
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(seed)).to(p.device, p.dtype)
    (model(x).float().square().mean() * scale).backward()


@on_every_target
@for_every_rule
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_micro_batches_are_added_up_in_float32(case: Case, dtype: torch.dtype, target: Target) -> None:
    model = net(dtype, target.device, torch.float32)
    optimizer = build(case, target, [*model.parameters()], **case.known(eps=1e-3))
    for step in range(2):
        optimizer.zero_grad()
        sums = [torch.zeros_like(p, dtype=torch.float32) for p in parameters(optimizer)]
        for micro in range(3):
            apart = net(dtype, target.device, torch.float32)
            apart.load_state_dict(model.state_dict())
            backward(apart, 10 * step + micro)
            backward(model, 10 * step + micro)
            for total, p in zip(sums, apart.parameters(), strict=True):
                total += p.grad
        for p, total in zip(parameters(optimizer), sums, strict=True):
            assert p.grad is not None and p.grad.dtype == torch.float32
            assert torch.equal(p.grad, total)
        worst = checked_step(optimizer, case.rule, 8.0)
        assert worst["param"] <= 0.52
        assert all(p.grad.dtype == torch.float32 for p in parameters(optimizer) if p.grad is not None)


@on_every_target
def test_any_dtype(target: Target) -> None:
    """With grad_dtype=None the dtype of the gradient may change at every step."""
    model = net(torch.bfloat16, target.device, None)
    optimizer = build(ADAMW, target, [*model.parameters()], eps=1e-3)
    for step, dtype in enumerate((torch.bfloat16, torch.float32, torch.float32, torch.float16, torch.bfloat16)):
        for p, grad in zip(model.parameters(), random_grads(parameters(optimizer), step, dtype), strict=True):
            p.grad = grad
        checked_step(optimizer, ADAMW.rule, 8.0)


@on_every_target
def test_grad_scaler_and_clipping(target: Target) -> None:
    """float16 params with float32 gradients. unscale_ works too; it would refuse float16 gradients."""
    for unscale in (False, True):
        model, twin = (net(torch.float16, target.device, torch.float32) for _ in range(2))
        ours = FusedAdamW(model.parameters(), lr=0.01, eps=1e-3, max_grad_norm=0.1, backend=target.backend)
        theirs = FusedAdamW(twin.parameters(), lr=0.01, eps=1e-3, backend=target.backend)
        scaler = torch.amp.GradScaler(target.device, init_scale=64.0)
        for step in range(2):
            ours.zero_grad()
            theirs.zero_grad()
            scaler.scale(torch.zeros((), device=target.device))
            backward(model, step, 64.0)
            for p, q in zip(model.parameters(), twin.parameters(), strict=True):
                q.grad = p.grad.clone() / 64.0 if p.grad is not None else None
            if unscale:
                scaler.unscale_(ours)
            scaler.step(ours)
            scaler.update()
            norm = clip_grad_norm_(twin.parameters(), 0.1, backend=target.backend)
            theirs.step()
            torch.testing.assert_close(ours.last_grad_norm, norm)
            for p, q in zip(model.parameters(), twin.parameters(), strict=True):
                torch.testing.assert_close(p, q, rtol=2**-10, atol=0)


@pytest.mark.skipif(not torch.__version__.startswith("2.13."), reason="docs/precision.md claims this for torch 2.13")
@pytest.mark.parametrize("how", [{"fused": True}, {"foreach": True}, {"foreach": False}], ids=str)
def test_torchs_adamw_raises(how: dict[str, Any]) -> None:
    """torch's AdamW raises, ours works: a claim of docs/precision.md."""
    for kind, options in ((torch.optim.AdamW, how), (FusedAdamW, {})):
        model = net(torch.bfloat16, "cpu", torch.float32)
        optimizer = kind(model.parameters(), **options)
        backward(model, 0)
        if kind is FusedAdamW:
            optimizer.step()
        else:
            with pytest.raises(RuntimeError):
                optimizer.step()
