"""Objects that must outlive a step on a GPU: pinned buffers, tables of captured graphs, memory used by other streams.
These tests use the stand-in for the CUDA runtime; tests/test_gpu_lifetimes.py has similar tests on a GPU."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from compare import updates
from gpu_standin import Runtime, built, runtime
from torch import Tensor

from fused_optim import FusedAdamW, FusedLAMB, FusedLion, FusedSGD
from fused_optim.backends import device_tables as device
from fused_optim.backends.device_tables import DeviceTable
from fused_optim.recipes import clip

pytestmark = built
__all__ = ["runtime"]  # a fixture

SIZES = (5, 4097, 1)
FAMILY: list[tuple[Any, dict[str, Any]]] = [
    (FusedAdamW, {}),
    (FusedAdamW, {"ema_decay": 0.9, "amsgrad": True}),
    (FusedSGD, {"momentum": 0.9}),
    (FusedLAMB, {"max_grad_norm": None}),
    (FusedLion, {}),
]
for_the_family = pytest.mark.parametrize(("build", "options"), FAMILY, ids=["adamw", "average", "sgd", "lamb", "lion"])


def params() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, generator=generator).requires_grad_() for size in SIZES]


def set_grads(tensors: list[Tensor], seed: int) -> None:
    """Each new gradient has other memory: the old one is freed only after the new one is allocated."""
    generator = torch.Generator().manual_seed(seed)
    for param in tensors:
        param.grad = torch.randn(param.shape, generator=generator)


class Pair:
    """An optimizer on the stand-in, and a reference optimizer to compare it with."""

    def __init__(self, build: Any = FusedAdamW, **options: Any) -> None:
        self.ours, self.theirs = params(), params()
        self.optimizer = build(self.ours, lr=0.5, backend="standin", **options)
        self.plain = build(self.theirs, lr=0.5, backend="reference", **options)
        self.held: list[Tensor | None] = []
        self.steps = 0  # the expected step count of both

    def grads(self, seed: int) -> None:
        """Sets new gradients for both. The old gradients are kept alive, because graphs still read them."""
        for tensors in (self.ours, self.theirs):
            self.held += [param.grad for param in tensors if param.grad is not None]
            set_grads(tensors, seed)

    def step(self, seed: int, lr: float) -> None:
        """A step of both optimizers."""
        self.grads(seed)
        self.begin(lr)
        self.expect(seed, lr)

    def begin(self, lr: float) -> None:
        """A step of our optimizer only, with its current gradients."""
        self.optimizer.param_groups[0]["lr"] = lr
        self.optimizer.step()

    def expect(self, seed: int, lr: float) -> None:
        """Applies to the reference what our step did, directly or in a replay."""
        set_grads(self.theirs, seed)
        self.plain.param_groups[0]["lr"] = lr
        self.plain.step()
        self.steps += 1

    def check(self) -> None:
        for p, q in zip(self.ours, self.theirs, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-4)
            if self.optimizer.ema is not None:
                torch.testing.assert_close(self.optimizer.ema[p], self.plain.ema[q], rtol=1e-4, atol=1e-4)
            ours, theirs = self.optimizer.state[p], self.plain.state[q]
            assert ours.keys() == theirs.keys()
            for name, state in theirs.items():
                torch.testing.assert_close(ours[name], state, rtol=1e-4, atol=0 if name == "step" else 1e-4)
        for optimizer, tensors in ((self.optimizer, self.ours), (self.plain, self.theirs)):
            assert updates(optimizer, tensors) == [self.steps] * len(tensors)


@pytest.mark.slow
@for_the_family
def test_steps_are_queued_before_the_first_one_runs(runtime: Runtime, build: Any, options: dict[str, Any]) -> None:
    pair = Pair(build, **options)
    for step in range(40):
        pair.step(step, lr=0.01 * (step + 1))
        if step == 0:
            runtime.synchronize()
    before = runtime.pinned
    runtime.synchronize()
    pair.check()
    for step in range(40, 60):  # these steps pin no more memory
        pair.step(step, lr=0.01 * (step + 1))
        runtime.synchronize()
    assert runtime.pinned == before
    pair.check()


@for_the_family
def test_two_captures_with_no_step_between(runtime: Runtime, build: Any, options: dict[str, Any]) -> None:
    pair = Pair(build, **options)
    pair.step(0, lr=0.5)
    graphs = []
    for seed, lr in ((1, 0.25), (2, 0.125)):
        pair.grads(seed)
        with runtime.capture() as graph:
            pair.begin(lr)
        graphs.append(graph)
    for which in (0, 1, 0, 0, 1):
        graphs[which].replay()
        pair.expect(*((1, 0.25), (2, 0.125))[which])
    runtime.synchronize()
    pair.check()
    pair.step(3, lr=0.3)  # outside of captures, with values that no graph wrote
    graphs[0].replay()
    pair.expect(1, 0.25)
    pair.step(4, lr=0.2)
    runtime.synchronize()
    pair.check()


@for_the_family
def test_two_steps_in_one_capture(runtime: Runtime, build: Any, options: dict[str, Any]) -> None:
    pair = Pair(build, **options)
    pair.step(0, lr=0.5)
    with runtime.capture() as graph:
        for seed, lr in ((1, 0.25), (2, 0.125)):
            pair.grads(seed)
            pair.begin(lr)
    for _ in range(3):
        graph.replay()
        pair.expect(1, 0.25)
        pair.expect(2, 0.125)
    runtime.synchronize()
    pair.check()


def table_of(optimizer: Any) -> DeviceTable:
    (bound,) = optimizer._tables
    assert isinstance(bound.device_table, DeviceTable)
    return bound.device_table


def test_captures_without_end(runtime: Runtime) -> None:
    """Steps with equal gradient addresses, or equal hyperparameters, share a pinned buffer. Other steps use up the
    buffers; the error that follows changes nothing."""
    pair = Pair()
    pair.step(0, lr=0.5)
    with runtime.capture() as graph:
        for _ in range(3 * device.SLAB):
            pair.begin(0.25)
    with pytest.raises(RuntimeError, match="Take a step outside captures"), runtime.capture():
        for number in range(2 * device.SLAB):
            pair.begin(0.25 / (2 + number))
    pair.begin(0.5)
    for seed, lr in ((0, 0.5), *((0, 0.25),) * (3 * device.SLAB)):
        pair.expect(seed, lr)
    graph.replay()
    runtime.synchronize()
    pair.check()
    with runtime.capture():
        for number in range(device.SPARES):  # a step outside captures keeps this many ready
            pair.begin(0.25 / (2 + number))


def test_released_buffers_are_used_again(runtime: Runtime) -> None:
    pair = Pair()
    pair.step(0, lr=0.5)
    for round_ in range(10):
        with runtime.capture():
            for number in range(device.SPARES - 2):
                pair.begin(0.1 / (1 + number + 100 * round_))
        pair.optimizer.release_captured()
    assert not table_of(pair.optimizer).captured
    assert runtime.pinned < 2 * device.SLAB * 8 * (len(SIZES) + 18)
    runtime.synchronize()
    pair.check()


def test_steps_bring_back_what_a_replay_has_overwritten(runtime: Runtime) -> None:
    pair = Pair()
    pair.step(0, lr=0.5)
    grads = [param.grad for param in pair.ours]
    pair.grads(1)
    with runtime.capture() as graph:
        pair.begin(0.25)
    for param, grad in zip(pair.ours, grads, strict=True):
        pair.held += [param.grad]  # the graph still reads it
        param.grad = grad
    pair.begin(0.125)
    pair.expect(0, 0.125)
    for releases in (False, True):
        graph.replay()
        pair.expect(1, 0.25)
        if releases:
            pair.optimizer.release_captured()
        pair.begin(0.125)  # nothing has changed since the last step
        pair.expect(0, 0.125)
    runtime.synchronize()
    pair.check()


def test_a_captured_table_lives_until_it_is_released(runtime: Runtime) -> None:
    """Also if the optimizer drops it, here by load_state_dict."""
    pair = Pair()
    pair.step(0, lr=0.5)
    captured = weakref.ref(table_of(pair.optimizer))
    with runtime.capture() as graph:
        pair.begin(0.25)
    pair.expect(0, 0.25)
    for optimizer in (pair.optimizer, pair.plain):
        optimizer.load_state_dict(optimizer.state_dict())
    gc.collect()
    assert captured() is not None
    pair.optimizer.release_captured()
    graph.work.clear()
    runtime.synchronize()
    gc.collect()
    assert captured() is None


def test_a_captured_table_is_replayed_after_its_memory_was_wanted(runtime: Runtime) -> None:
    """New allocations would overwrite arrays that were freed too early."""
    pair = Pair()
    pair.step(0, lr=0.5)
    sizes = {array.nbytes for array in table_of(pair.optimizer).arrays if array is not None}
    pair.grads(1)
    with runtime.capture() as graph:
        pair.begin(0.25)
    for optimizer in (pair.optimizer, pair.plain):
        optimizer.load_state_dict(optimizer.state_dict())
    gc.collect()
    garbage = [torch.full((size,), 255, dtype=torch.uint8) for size in sizes for _ in range(50)]
    graph.replay()
    pair.expect(1, 0.25)
    runtime.synchronize()
    pair.check()
    assert garbage


def test_a_table_that_nothing_has_captured_goes_with_its_optimizer(runtime: Runtime) -> None:
    pair = Pair()
    pair.step(0, lr=0.5)
    table = weakref.ref(table_of(pair.optimizer))
    runtime.synchronize()
    pair.optimizer.load_state_dict(pair.optimizer.state_dict())
    gc.collect()
    assert table() is None


def test_new_tables_in_a_capture_are_refused(runtime: Runtime) -> None:
    """Otherwise each replay would create the states again."""
    pair = Pair()
    pair.grads(0)
    with pytest.raises(RuntimeError, match="before the capture"), runtime.capture():
        pair.begin(0.5)
    assert not pair.optimizer.state
    pair.step(0, lr=0.5)
    with pytest.raises(RuntimeError, match="before the capture"), runtime.capture():
        pair.optimizer.add_param_group({"params": [torch.ones(3, requires_grad=True)]})
        pair.begin(0.5)
    with pytest.raises(RuntimeError, match="release_captured"), runtime.capture():
        pair.optimizer.release_captured()
    runtime.synchronize()
    pair.check()


@for_the_family
def test_memory_waits_for_the_other_streams_that_use_it(runtime: Runtime, build: Any, options: dict[str, Any]) -> None:
    """record_stream is called for all memory that the optimizer allocated and the table's kernels use."""
    pair = Pair(build, **options)
    pair.step(0, lr=0.5)
    pair.step(1, lr=0.5)
    assert not runtime.recorded, "all memory was allocated on this stream"
    runtime.synchronize()
    with runtime.on(runtime.new_stream()):
        pair.step(2, lr=0.5)
    wanted = [tensor for tensor in table_of(pair.optimizer).arrays if tensor is not None]
    wanted += [tensor for param in pair.ours for tensor in pair.optimizer.state[param].values()]
    if pair.optimizer.ema is not None:
        wanted += [pair.optimizer.ema[param] for param in pair.ours]
    assert {(tensor.data_ptr(), 1) for tensor in wanted} <= runtime.recorded
    assert not {(param.data_ptr(), 1) for param in pair.ours} & runtime.recorded, "params belong to the user"
    before = len(runtime.recorded)
    with runtime.on(runtime.streams[1]):
        pair.step(3, lr=0.5)
    assert len(runtime.recorded) == before
    for stream in runtime.streams:
        stream.run()
    pair.check()


def test_the_copy_of_a_param_with_holes_waits_too(runtime: Runtime) -> None:
    param = torch.ones(4, 6)[:, ::2].requires_grad_()
    optimizer = FusedAdamW([param], backend="standin")
    param.grad = torch.ones(4, 3)
    optimizer.step()
    runtime.synchronize()
    with runtime.on(runtime.new_stream()):
        optimizer.step()
    (row,) = optimizer._tables[0].table.copies
    assert (row.target.data_ptr(), 1) in runtime.recorded


def test_shared_scalars_are_there_before_another_stream_reads_them(monkeypatch: pytest.MonkeyPatch) -> None:
    launch = pytest.importorskip("fused_optim.triton_kernels.launch")
    order: list[str] = []
    place = torch.device("meta")  # stands for any device other than the host

    class Current:
        def synchronize(self) -> None:
            order.append("waited")

    def fill(name: str, value: float) -> Any:
        def filled(*shape: int, device: torch.device) -> Tensor:
            order.append(name)
            return torch.full(shape, value, device=device)

        return filled

    monkeypatch.setattr(torch, "ones", fill("ones", 1.0))
    monkeypatch.setattr(torch, "zeros", fill("zeros", 0.0))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: Current())
    one, zero = launch._neutral.__wrapped__(place)
    assert order == ["ones", "zeros", "waited"] and one.device == zero.device == place


def test_captured_clipping_lives_until_it_is_released(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clip, "_captured", [])
    monkeypatch.setattr(clip, "_kept", {})
    grads = [torch.full((size,), 2.0) for size in SIZES]
    addresses = [grad.data_ptr() for grad in grads]
    gradients = clip.Gradients(grads, addresses, torch.device("cpu"), "standin", 1.0)
    key = ("a stream", "a layout")

    def run() -> None:
        gradients.update(addresses, 1.0)
        gradients.bound.sum_squares(gradients.table.squares)
        gradients.bound.scale_grads(gradients.table.squares)
        clip._keep(key, gradients)

    run()
    runtime.synchronize()
    assert list(clip._kept) == [key]
    with runtime.capture() as graph:
        del clip._kept[key]
        run()
    assert not clip._kept and clip._captured == [gradients]
    for grad in grads:
        grad.fill_(3.0)
    graph.replay()
    runtime.synchronize()
    torch.testing.assert_close(torch.cat(grads).norm(), torch.tensor(1.0))
    with pytest.raises(RuntimeError, match="release_captured"), runtime.capture():
        clip.release_captured()
    assert clip._captured == [gradients]
    clip.release_captured()
    assert not clip._captured and not gradients.bound.captured
