"""What only a GPU can show: closeness to torch's fused kernel, no waiting for the device, graphs and streams."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fused_optim import FusedAdamW, FusedLAMB, FusedLion, FusedQHAdam, FusedSGD, backends

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

SHAPES = [(1000, 1000), (7,), (), (4096,), (33, 129), (0,), (3, 5, 7)]
FAMILY: list[tuple[Any, dict[str, Any]]] = [
    (FusedAdamW, {}),
    (FusedAdamW, {"max_grad_norm": 0.5, "skip_nonfinite": True}),
    (FusedSGD, {"momentum": 0.9, "max_grad_norm": 0.5}),
    (FusedQHAdam, {"nus": (0.7, 0.9)}),
    (FusedLAMB, {}),
    (FusedLion, {"skip_nonfinite": True}),
    (FusedAdamW, {"amsgrad": True, "ema_decay": 0.9}),
    (FusedLAMB, {"ema_decay": 0.9}),
]
for_the_family = pytest.mark.parametrize(("build", "options"), FAMILY, ids=lambda x: getattr(x, "__name__", None))
on_gpu_backends = pytest.mark.parametrize("backend", ["triton", "cuda"])


def require(backend: str) -> None:
    reason = backends.BACKENDS[backend].why_not(torch.device("cuda"))
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")


def params(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)
    made = [torch.randn(shape, device="cuda", generator=generator).to(dtype) for shape in SHAPES]
    return [param.requires_grad_() for param in made]


def set_grads(*lists: list[Tensor], seed: int) -> None:
    generator = torch.Generator("cuda").manual_seed(seed)
    for same in zip(*lists, strict=True):
        grad = torch.randn(same[0].shape, device="cuda", generator=generator)
        for param in same:
            param.grad = grad.to(param.dtype).clone()


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
            torch.testing.assert_close(a.state[p][name], state, rtol=4e-6, atol=1e-8)
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
    steps = optimizer.state[ours[0]].get("step")
    assert steps is None or float(steps) == 6


@on_gpu_backends
@for_the_family
def test_graph_replays_as_eager_steps(backend: str, build: Any, options: dict[str, Any]) -> None:
    require(backend)
    captured, eager = params(), params()
    lrs = [torch.tensor(1e-2, device="cuda") for _ in range(2)]
    capturable = {} if build is FusedSGD else {"capturable": True}  # torch's SGD has no such option
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
    assert float(a.state[captured[0]].get("step", 4.0)) == 4
    if a.last_grad_norm is not None:
        assert torch.equal(a.last_grad_norm, b.last_grad_norm)


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
    """Many steps are queued before the first one runs, each with an lr of its own."""
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
