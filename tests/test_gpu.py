"""Tests that need a GPU: agreement with torch's fused kernel, no synchronization, graphs and streams."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from compare import updates
from gpu import for_the_family, needs_gpu, on_gpu_backends, params, require, set_grads
from torch import Tensor

from fused_optim import FusedAdamW, FusedSGD, clip_grad_norm_
from fused_optim.recipes import clip

pytestmark = needs_gpu


@on_gpu_backends
@pytest.mark.parametrize("amsgrad", [False, True])
def test_close_to_torch_fused(backend: str, amsgrad: bool) -> None:
    require(backend)
    ours, theirs = params(), params()
    a = FusedAdamW(ours, lr=1e-2, amsgrad=amsgrad, backend=backend)
    b = torch.optim.AdamW(theirs, lr=1e-2, amsgrad=amsgrad, fused=True)
    for step in range(10):
        set_grads(ours, theirs, seed=step)
        a.step()
        b.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=2e-6, atol=2e-6)
        for name, state in b.state[q].items():
            # torch's kernel rounds differently. Where the terms of exp_avg cancel, a thousandth of the values differ by
            # more than 1e-8, at most by 1.8e-7 (measured on a CPU with PyTorch operations in the kernel's order). The
            # squares do not cancel.
            atol = 2e-7 if name == "exp_avg" else 1e-8
            torch.testing.assert_close(a.state[p][name], state, rtol=4e-6, atol=atol)
    equal = sum(int((p == q).sum()) for p, q in zip(ours, theirs, strict=True))
    print(f"{backend}: {equal / sum(p.numel() for p in ours):.1%} of params equal torch's fused kernel after 10 steps")


@on_gpu_backends
@for_the_family
def test_the_two_kernels_agree_with_the_cpu(backend: str, build: Any, options: dict[str, Any]) -> None:
    require(backend)
    ours = params()
    host = [param.detach().cpu().requires_grad_() for param in ours]
    a, b = build(ours, lr=1e-2, backend=backend, **options), build(host, lr=1e-2, **options)
    for step in range(5):
        set_grads(ours, seed=step)
        for p, q in zip(ours, host, strict=True):
            assert p.grad is not None
            q.grad = p.grad.cpu()
        a.step()
        b.step()
    for p, q in zip(ours, host, strict=True):
        torch.testing.assert_close(p.cpu(), q, rtol=2.5e-7, atol=2.5e-7)
        if a.ema is not None:
            torch.testing.assert_close(a.ema[p].cpu(), b.ema[q], rtol=2.5e-7, atol=2.5e-7)


@on_gpu_backends
@for_the_family
def test_step_never_waits_for_the_device(backend: str, build: Any, options: dict[str, Any]) -> None:
    require(backend)
    ours = params()
    lr = torch.tensor(1e-2, device="cuda")
    optimizer = build(ours, lr=lr, backend=backend, **options)
    set_grads(ours, seed=0)
    optimizer.step()
    found_inf = torch.zeros((), device="cuda")
    grad_scale = torch.full((), 4.0, device="cuda")
    for step in range(5):
        set_grads(ours, seed=step)
        optimizer.found_inf, optimizer.grad_scale = found_inf, grad_scale
        torch.cuda.set_sync_debug_mode("error")
        try:
            optimizer.step(grad_scale=2)
            lr.mul_(0.9)
            _ = optimizer.last_grad_norm, optimizer.skipped_steps
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert updates(optimizer, ours) == [6.0] * len(ours)


@on_gpu_backends
@for_the_family
def test_graph_replays_as_eager_steps(backend: str, build: Any, options: dict[str, Any]) -> None:
    require(backend)
    captured, eager = params(), params()
    lrs = [torch.tensor(1e-2, device="cuda") for _ in range(2)]
    capturable = {} if build is FusedSGD else {"capturable": True}  # torch's SGD has no capturable
    a = build(captured, lr=lrs[0], backend=backend, **capturable, **options)
    b = build(eager, lr=lrs[1], backend=backend, **options)
    set_grads(captured, eager, seed=0)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        a.step()
    torch.cuda.current_stream().wait_stream(side)
    b.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        a.step()
    for factor in (1.0, 0.5, 2.0):
        for lr in lrs:
            lr.mul_(factor)
        graph.replay()
        b.step()
    for p, q in zip(captured, eager, strict=True):
        assert torch.equal(p, q)
        if a.ema is not None:
            assert torch.equal(a.ema[p], b.ema[q])
    assert updates(a, captured) == updates(b, eager) == [4.0] * len(captured)
    if a.last_grad_norm is not None:
        assert torch.equal(a.last_grad_norm, b.last_grad_norm)
    if a.ema is not None:
        for p, q in zip(captured, eager, strict=True):
            assert torch.equal(a.ema[p], b.ema[q])


@on_gpu_backends
def test_a_whole_train_step_in_a_graph(backend: str) -> None:
    """Forward, backward and all parts of the step are captured. The lr changes between replays, and one batch gives
    nonfinite gradients."""
    require(backend)
    torch.manual_seed(0)
    models = [torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.Tanh(), torch.nn.Linear(32, 4)).cuda()]
    models.append(copy.deepcopy(models[0]))
    lrs = [torch.tensor(1e-2, device="cuda") for _ in models]
    optimizers = [
        FusedAdamW(
            m.parameters(),
            lr=lr,
            backend=backend,
            capturable=True,
            max_grad_norm=0.1,
            skip_nonfinite=True,
            ema_decay=0.9,
        )
        for m, lr in zip(models, lrs, strict=True)
    ]
    batch = torch.randn(8, 16, device="cuda")

    def train(which: int) -> None:
        optimizers[which].zero_grad()
        (models[which](batch).square().mean() * 8.0).backward()
        optimizers[which].step(grad_scale=8.0)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            train(0)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    optimizers[0].zero_grad()
    with torch.cuda.graph(graph):
        train(0)
    for _ in range(2):
        train(1)
    for replay in range(6):
        batch.copy_(torch.randn(8, 16, device="cuda") if replay != 3 else torch.full((8, 16), math.nan, device="cuda"))
        for lr in lrs:
            lr.mul_(0.8)
        graph.replay()
        train(1)
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(p, q)
        assert torch.equal(optimizers[0].ema[p], optimizers[1].ema[q])
    assert [int(optimizer.skipped_steps) for optimizer in optimizers] == [1, 1]
    assert [float(next(iter(optimizer.state.values()))["step"]) for optimizer in optimizers] == [7.0, 7.0]


def test_capture_without_capturable_is_refused() -> None:
    ours = params()
    optimizer = FusedAdamW(ours)
    set_grads(ours, seed=0)
    optimizer.step()
    with pytest.raises(RuntimeError, match="capturable is False"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        optimizer.step()


@on_gpu_backends
def test_steps_on_another_stream(backend: str) -> None:
    require(backend)
    lists = params(), params()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    for tensors, where in zip(lists, (stream, torch.cuda.current_stream()), strict=True):
        optimizer = FusedAdamW(tensors, lr=1e-2, backend=backend)
        with torch.cuda.stream(where):
            for step in range(3):
                set_grads(tensors, seed=step)
                optimizer.step()
    torch.cuda.synchronize()
    for p, q in zip(*lists, strict=True):
        assert torch.equal(p, q)


@on_gpu_backends
def test_changing_hyperparameters_never_outrun_their_copies(backend: str) -> None:
    """Many steps with different lrs are queued before the first one runs."""
    require(backend)
    ours = [torch.zeros(1000, device="cuda", requires_grad=True)]
    optimizer = FusedAdamW(ours, lr=1.0, betas=(0.0, 0.0), eps=0.0, weight_decay=0.0, backend=backend)
    ours[0].grad = torch.ones(1000, device="cuda")
    optimizer.step()
    torch.cuda.synchronize()
    torch.cuda._sleep(200_000_000)
    for step in range(1, 40):
        optimizer.param_groups[0]["lr"] = float(step)
        optimizer.step()
    expected = -(1.0 + sum(range(1, 40)))
    assert torch.equal(ours[0].detach(), torch.full((1000,), expected, device="cuda"))


def assert_clipped(ours: list[Tensor], before: list[Tensor], norm: Tensor, bound: float) -> None:
    """Compares with torch's function in float64."""
    exact = [torch.empty_like(grad, dtype=torch.float64, device="cpu") for grad in before]
    for param, grad in zip(exact, before, strict=True):
        param.grad = grad.double().cpu()
    torch.testing.assert_close(norm.cpu().double(), torch.nn.utils.clip_grad_norm_(exact, bound), rtol=2e-6, atol=0)
    for param, wanted in zip(ours, exact, strict=True):
        assert param.grad is not None and wanted.grad is not None
        torch.testing.assert_close(param.grad.cpu().double(), wanted.grad, rtol=2e-6, atol=1e-12)


@on_gpu_backends
def test_clip_grad_norm_never_waits_for_the_device(backend: str) -> None:
    require(backend)
    ours = params()
    for step, bound in enumerate((0.5, 0.5, 0.25, 1e6)):
        set_grads(ours, seed=step)
        before = [param.grad.clone() for param in ours if param.grad is not None]
        if step:
            torch.cuda.set_sync_debug_mode("error")
        try:
            norm = clip_grad_norm_(ours, bound, backend=backend)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert_clipped(ours, before, norm, bound)


@on_gpu_backends
@pytest.mark.parametrize("clipped_before", [True, False])
def test_clip_grad_norm_in_a_graph(backend: str, clipped_before: bool) -> None:
    require(backend)
    ours = params()
    set_grads(ours, seed=0)
    if clipped_before:
        clip_grad_norm_(ours, 0.5, backend=backend)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        norm = clip_grad_norm_(ours, 0.5, backend=backend)
    others = params()
    for seed in range(1, 4):
        set_grads(others, seed=seed)
        before = [param.grad for param in others if param.grad is not None]
        for param, grad in zip(ours, before, strict=True):
            assert param.grad is not None
            param.grad.copy_(grad)
        kept = [grad.clone() for grad in before]
        graph.replay()
        assert_clipped(ours, kept, norm, 0.5)
        # Between replays: gradients in other memory.
        assert_clipped(others, kept, clip_grad_norm_(others, 0.5, backend=backend), 0.5)
    del graph
    assert clip._captured or not clipped_before
    clip.release_captured()
    assert not clip._captured


def test_clip_grad_norm_of_gradients_on_two_devices() -> None:
    for order in (1, -1):
        ours = [*params(), *(param.detach().cpu().requires_grad_() for param in params())][::order]
        for index, param in enumerate(ours):
            param.grad = torch.full_like(param, 1.0 + index)
        before = [param.grad.clone() for param in ours if param.grad is not None]
        norm = clip_grad_norm_(ours, 0.5)
        assert norm.device == ours[0].device
        assert_clipped(ours, before, norm, 0.5)
