"""What only a GPU can show: closeness to torch's fused kernel, no waiting for the device, graphs and streams."""

from __future__ import annotations

import copy
import dataclasses
import gc
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_optim import FusedAdamW, FusedLAMB, FusedLion, FusedQHAdam, FusedSGD, backends, clip, clip_grad_norm_, trial

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

SHAPES = [(1000, 1000), (7,), (), (4096,), (33, 129), (0,), (3, 5, 7)]
FAMILY: list[tuple[Any, dict[str, Any]]] = [
    (FusedAdamW, {}),
    (FusedAdamW, {"max_grad_norm": 0.5, "skip_nonfinite": True, "ema_decay": 0.9}),
    (FusedSGD, {"momentum": 0.9, "max_grad_norm": 0.5}),
    (FusedQHAdam, {"nus": (0.7, 0.9)}),
    (FusedLAMB, {"ema_decay": 0.9}),
    (FusedLion, {"skip_nonfinite": True}),
    (FusedAdamW, {"amsgrad": True, "ema_decay": 0.9}),
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
            # Torch's kernel rounds otherwise. Where exp_avg cancels, a thousandth of the values is more than 1e-8 away,
            # the farthest by 1.8e-7 (seen in PyTorch's arithmetic on a CPU, done in the kernel's order). Squares do not
            # cancel.
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
    if a.ema is not None:
        for p, q in zip(captured, eager, strict=True):
            assert torch.equal(a.ema[p], b.ema[q])


@on_gpu_backends
def test_a_whole_train_step_in_a_graph(backend: str) -> None:
    """Forward, backward and all that the step does, with an lr that changes between replays and a batch whose gradients
    are not finite."""
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


# ---- what outlives a step (tests/test_lifetimes.py has the same without a GPU)


def warmed_up(build: Any, backend: str, **options: Any) -> tuple[Any, list[Tensor], Any, list[Tensor]]:
    """An optimizer to be captured and one to step beside it, with their params, after a step."""
    captured, eager = params(), params()
    capturable = {} if build is FusedSGD else {"capturable": True}  # torch's SGD has no such option
    a = build(captured, lr=0.5, backend=backend, **capturable, **options)
    b = build(eager, lr=0.5, backend=backend, **options)
    set_grads(captured, eager, seed=0)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        a.step()
    torch.cuda.current_stream().wait_stream(side)
    b.step()
    return a, captured, b, eager


def step_with(optimizer: Any, lr: float) -> None:
    optimizer.param_groups[0]["lr"] = lr
    optimizer.step()


def assert_same(a: Any, captured: list[Tensor], b: Any, eager: list[Tensor]) -> None:
    for p, q in zip(captured, eager, strict=True):
        assert torch.equal(p, q)
        if a.ema is not None:
            assert torch.equal(a.ema[p], b.ema[q])
        for name, state in b.state[q].items():
            assert torch.equal(a.state[p][name], state)


@on_gpu_backends
@for_the_family
def test_two_captures_with_no_step_between(backend: str, build: Any, options: dict[str, Any]) -> None:
    require(backend)
    a, captured, b, eager = warmed_up(build, backend, **options)
    graphs = []
    for lr in (0.25, 0.125):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step_with(a, lr)
        graphs.append((graph, lr))
    for which in (0, 1, 1, 0):
        graph, lr = graphs[which]
        graph.replay()
        step_with(b, lr)
    assert_same(a, captured, b, eager)
    step_with(a, 0.3)  # outside of captures, and with what the last replay has left on the device
    step_with(b, 0.3)
    assert_same(a, captured, b, eager)
    del graph, graphs
    a.release_captured()
    for optimizer in (a, b):
        step_with(optimizer, 0.3)
    assert_same(a, captured, b, eager)


@on_gpu_backends
@for_the_family
def test_two_steps_in_one_capture(backend: str, build: Any, options: dict[str, Any]) -> None:
    require(backend)
    a, captured, b, eager = warmed_up(build, backend, **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for lr in (0.25, 0.125):
            step_with(a, lr)
    for _ in range(3):
        graph.replay()
        for lr in (0.25, 0.125):
            step_with(b, lr)
    assert_same(a, captured, b, eager)


@on_gpu_backends
def test_released_memory_is_free(backend: str) -> None:
    require(backend)
    a, *_ = warmed_up(FusedAdamW, backend)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        a.step()
    a.load_state_dict(a.state_dict())  # new tables for the next step; the graph goes on with the old ones
    set_grads(list(a.state), seed=1)
    a.step()
    gc.collect()
    kept = torch.cuda.memory_allocated()
    del graph
    a.release_captured()
    gc.collect()
    assert torch.cuda.memory_allocated() < kept


@on_gpu_backends
def test_new_tables_in_a_capture_are_refused(backend: str) -> None:
    require(backend)
    ours = params()
    optimizer = FusedAdamW(ours, backend=backend, capturable=True)
    set_grads(ours, seed=0)
    with pytest.raises(RuntimeError, match="before the capture"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        optimizer.step()
    assert not optimizer.state


@on_gpu_backends
def test_host_arrays_are_made_on_the_host(backend: str) -> None:
    """Whatever the default device is."""
    require(backend)
    lists = params(), params()
    optimizers = [FusedAdamW(tensors, lr=1e-2, max_grad_norm=1.0, backend=backend) for tensors in lists]
    for step in range(3):
        set_grads(*lists, seed=step)
        optimizers[0].step()
        with torch.device("cuda"):
            optimizers[1].step()
            clip_grad_norm_(lists[1], 1.0, backend=backend)
    for p, q in zip(*lists, strict=True):
        assert torch.equal(p, q)


@on_gpu_backends
def test_first_steps_on_two_streams(backend: str) -> None:
    """What all optimizers share is there, although neither stream waits for the other."""
    require(backend)
    if backend == "triton":
        from fused_optim.triton_kernels import launch

        launch._neutral.cache_clear()
    lists = [params() for _ in range(3)]
    optimizers = [FusedAdamW(tensors, lr=1e-2, backend=backend) for tensors in lists]
    for tensors in lists:
        set_grads(tensors, seed=0)
    streams = [torch.cuda.Stream(), torch.cuda.Stream(), torch.cuda.current_stream()]
    torch.cuda.synchronize()
    for stream, optimizer in zip(streams, optimizers, strict=True):
        with torch.cuda.stream(stream):
            if stream is streams[0]:
                torch.cuda._sleep(100_000_000)
            optimizer.step()
    torch.cuda.synchronize()
    for tensors in lists[1:]:
        for p, q in zip(lists[0], tensors, strict=True):
            assert torch.equal(p, q)


@on_gpu_backends
@for_the_family
def test_new_tables_while_another_stream_still_reads_the_old_ones(
    backend: str, build: Any, options: dict[str, Any]
) -> None:
    require(backend)
    ours, theirs = params(), params()
    a, b = (build(tensors, lr=0.1, backend=backend, **options) for tensors in (ours, theirs))
    set_grads(ours, theirs, seed=0)
    for optimizer in (a, b):
        optimizer.step()
        optimizer.step()
    torch.cuda.synchronize()
    shapes = [tensor.shape for table, _ in b._tables for tensor in table.on_device.arrays if tensor is not None]
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        a.step()  # the side stream is known by now
        torch.cuda._sleep(200_000_000)
        a.step()
    a.add_param_group({"params": [torch.ones(3, device="cuda", requires_grad=True)]})  # drops the tables
    gc.collect()
    garbage = [torch.full(shape, -1, dtype=torch.int64, device="cuda") for shape in shapes * 20]
    torch.cuda.synchronize()
    del garbage
    b.step()
    b.step()
    for p, q in zip(ours, theirs, strict=True):
        assert torch.equal(p, q)


@on_gpu_backends
def test_an_error_between_the_walks_says_what_has_changed(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    require(backend)
    ours = params()
    optimizer = FusedLAMB(ours, backend=backend)
    set_grads(ours, seed=0)
    optimizer.step()
    before = [param.detach().clone() for param in ours]

    def fail(*_: Any) -> None:
        raise ValueError("a reason")

    optimizer._tables = [(table, dataclasses.replace(kind, move=fail)) for table, kind in optimizer._tables]
    with pytest.raises(RuntimeError, match="cuda:0: states and step counts updated, params not"):
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(ours, before, strict=True))
    assert float(optimizer.state[ours[0]]["step"]) == 2


def test_auto_falls_through_where_triton_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    require("triton")
    from fused_optim.triton_kernels import launch

    def fail(*_: Any) -> None:
        raise RuntimeError("this GPU is of another kind")

    monkeypatch.setattr(launch.Variant, "start", fail)
    monkeypatch.setattr(backends, "FAILED", {})
    monkeypatch.setattr(trial, "_passed", set())
    ours, theirs = params(), params()
    a = FusedAdamW(ours, lr=1e-2)
    b = torch.optim.AdamW(theirs, lr=1e-2, foreach=False)
    set_grads(ours, theirs, seed=0)
    with pytest.warns(UserWarning, match="triton: its trial launch failed with RuntimeError: this GPU"):
        a.step()
    b.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=2e-6, atol=2e-6)
        assert float(a.state[p]["step"]) == 1
    assert a._tables[0][1].name in ("cuda", "reference")


def assert_clipped(ours: list[Tensor], before: list[Tensor], norm: Tensor, bound: float) -> None:
    """Against torch's function in float64."""
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
        # Between replays, gradients that lie elsewhere.
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
