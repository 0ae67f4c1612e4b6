"""Objects that must outlive a step, on a GPU. tests/test_lifetimes.py has similar tests without a GPU."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from gpu import for_the_family, needs_gpu, on_gpu_backends, params, require, set_grads
from torch import Tensor

from fused_optim import FusedAdamW, FusedLAMB, FusedSGD, backends, clip_grad_norm_
from fused_optim.backends import trial

pytestmark = needs_gpu


def warmed_up(build: Any, backend: str, **options: Any) -> tuple[Any, list[Tensor], Any, list[Tensor]]:
    """An optimizer for capture and one for eager steps, with their params, after one step each."""
    captured, eager = params(), params()
    capturable = {} if build is FusedSGD else {"capturable": True}  # torch's SGD has no capturable
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
    step_with(a, 0.3)  # outside of captures, after what the last replay wrote to the device
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
    a.load_state_dict(a.state_dict())  # the next step builds new tables; the graph keeps the old ones
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
    """Independent of the default device."""
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
    """The tensors that all optimizers share must be ready on each stream, although no stream waits for another."""
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
    shapes = [tensor.shape for bound in b._tables for tensor in bound.arrays if tensor is not None]
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        a.step()  # from now on the optimizer knows the side stream
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

    for bound in optimizer._tables:
        monkeypatch.setattr(bound, "apply_update", fail)
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
    assert a._tables[0].name in ("cuda", "reference")
