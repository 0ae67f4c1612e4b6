"""Gradient release: changes between steps, compiled and checkpointed models, copies, errors."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import (
    ADAMW,
    AMSGRAD,
    BY_NAME,
    LAMB,
    Case,
)
from compare import assert_equal
from released import BUCKET, REFERENCE, Net, assert_same, loss, pair, side_by_side
from torch import Tensor, nn

from fused_optim import FusedAdamW, GradientRelease, release_gradients

BF16 = torch.bfloat16


def test_changes_between_steps() -> None:
    net, ours, release, other, plain = pair(ADAMW, REFERENCE)
    late = [nn.Linear(16, 16) for _ in range(2)]
    late[1].load_state_dict(late[0].state_dict())
    side_by_side(net, ours, other, plain, 2)
    for optimizer, model in ((ours, net), (plain, other)):
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        optimizer.rounding = "dithered"
        model.first.weight.requires_grad_(False)
    side_by_side(net, ours, other, plain, range(2, 4))
    for optimizer, model, layer in ((ours, net, late[0]), (plain, other, late[1])):
        model.first.weight.requires_grad_(True)
        model.last = nn.Sequential(layer, model.last)
        optimizer.add_param_group({"params": layer.named_parameters(prefix="late"), "lr": 0.1})
    side_by_side(net, ours, other, plain, range(4, 7))
    assert net.first.weight in release._hooks and late[0].weight in release._hooks
    loss(net, 0).backward()
    assert late[0].weight.grad is None
    ours.step()
    loss(other, 0).backward()
    plain.step()
    plain.zero_grad()
    assert_same(ours, plain)
    removed = [optimizer.param_groups.pop() for optimizer in (ours, plain)]
    side_by_side(net, ours, other, plain, range(7, 9))
    assert_same(ours, plain)
    assert removed[0]["params"][0] not in release._hooks


def test_writes_to_master_weights_are_noticed() -> None:
    net, ours, _, other, plain = pair(ADAMW, REFERENCE, BF16, master_weights="exact")
    side_by_side(net, ours, other, plain, 2)
    for model in (net, other):
        nn.init.constant_(model.tied.weight, 0.3)
    with pytest.warns(UserWarning, match="1 params have been written to"):
        side_by_side(net, ours, other, plain, range(2, 4))
    assert_same(ours, plain)


@pytest.mark.slow
def test_compiled_models() -> None:
    net, ours, _, other, plain = pair(ADAMW, REFERENCE)
    compiled = [torch.compile(model, backend="aot_eager") for model in (net, other)]
    side_by_side(compiled[0], ours, compiled[1], plain, 3)
    assert_same(ours, plain)


@pytest.mark.slow
@pytest.mark.filterwarnings("error:.*Dynamo does not know how to trace")
@torch._dynamo.config.patch(compiled_autograd=True)
def test_compiled_autograd() -> None:
    """It compiles the backward pass with the hooks, and must leave the step out."""
    net, ours, _, other, plain = pair(ADAMW, REFERENCE)

    @torch.compile(backend="eager")
    def train(model: nn.Module, step: int) -> None:
        loss(model, step).backward()

    for step in range(0, 6, 2):
        train(net, step)
        assert net.first.weight.grad is None
        ours.step()
        loss(other, step).backward()
        plain.step()
        plain.zero_grad()
    assert_same(ours, plain)


class Checkpointed(Net):
    """`tied` is recomputed in backward."""

    reentrant = False

    def forward(self, x: Tensor, step: int = 0) -> Tensor:
        x = self.first(x)
        for _ in range(2):
            x = torch.utils.checkpoint.checkpoint(self.tied, x, use_reentrant=self.reentrant)
        return self.last(x)


def test_checkpointed_segments() -> None:
    nets = [Checkpointed() for _ in range(2)]
    ours, plain = (FusedAdamW(net.parameters()) for net in nets)
    release_gradients(nets[0], ours, bucket_bytes=BUCKET)
    side_by_side(nets[0], ours, nets[1], plain, 3)
    assert_same(ours, plain)
    nets[0].reentrant = True
    with pytest.raises(RuntimeError, match="need use_reentrant=False"):
        loss(nets[0], 3).backward()


def test_closures_and_hooks_of_step() -> None:
    net, ours, _, other, plain = pair(ADAMW, REFERENCE)
    called = []
    ours.register_step_post_hook(lambda *_: called.append(1))

    def closure(model: nn.Module, optimizer: Any) -> Callable[[], Tensor]:
        def run() -> Tensor:
            optimizer.zero_grad()
            found = loss(model, 0)
            found.backward()
            return found

        return run

    for _ in range(2):
        assert torch.equal(ours.step(closure(net, ours)), plain.step(closure(other, plain)))
    assert called == [1, 1]
    plain.zero_grad()
    assert_same(ours, plain)


def test_removed() -> None:
    net, ours, release, other, plain = pair(ADAMW, REFERENCE)
    side_by_side(net, ours, other, plain, 2)
    release.remove()
    loss(net, 2).backward()
    assert net.first.weight.grad is not None
    net.zero_grad()
    side_by_side(net, ours, other, plain, range(2, 4))
    again = release_gradients(net, ours, bucket_bytes=BUCKET)
    side_by_side(net, ours, other, plain, range(4, 6))
    assert again is not release and isinstance(again, GradientRelease)
    assert_same(ours, plain)


def test_copies_do_not_release() -> None:
    net, ours, *_ = pair(ADAMW, REFERENCE)
    loss(net, 0).backward()
    ours.step()
    pickle.loads(pickle.dumps((net, ours)))
    other, copied = copy.deepcopy((net, ours))
    loss(other, 1).backward()
    assert other.first.weight.grad is not None
    copied.step()
    loss(net, 1).backward()
    ours.step()
    assert_equal([p.detach() for p in other.parameters()], [p.detach() for p in net.parameters()])


def test_an_optimizer_that_is_gone_is_not_stepped() -> None:
    net, ours, release, *_ = pair(ADAMW, REFERENCE)
    loss(net, 0).backward()
    ours.step()
    watched = [weakref.ref(ours), weakref.ref(release)]
    before = net.first.weight.detach().clone()
    del ours, release, _
    gc.collect()
    assert [ref() for ref in watched] == [None, None]
    loss(net, 1).backward()
    assert torch.equal(before, net.first.weight) and net.first.weight.grad is not None


# ---- errors


def test_a_second_backward_is_refused() -> None:
    net, ours, *_ = pair(ADAMW, REFERENCE)
    loss(net, 0).backward()
    with pytest.raises(RuntimeError, match="has got a second gradient in one step"):
        loss(net, 1).backward()
    ours.step()
    ours.zero_grad()
    loss(net, 1).backward()
    ours.step()


def test_bad_gradients_change_nothing_of_their_bucket() -> None:
    """The message is that of a plain step, and the optimizer goes on after it."""
    net = nn.Sequential(nn.Embedding(5, 4, sparse=True), nn.Linear(4, 2))
    ours = FusedAdamW(net.parameters())
    release_gradients(net, ours, bucket_bytes=1)
    before = net[0].weight.detach().clone()
    with pytest.raises(RuntimeError, match="sparse"):
        net(torch.tensor([1, 2])).sum().backward()
    assert torch.equal(before, net[0].weight) and net[0].weight not in ours.state
    net.zero_grad()
    ours.step()
    net[0].sparse = False
    net(torch.tensor([1, 2])).sum().backward()
    ours.step()
    assert not torch.equal(before, net[0].weight)


def test_what_cannot_be_released() -> None:
    net = Net()
    ours = FusedAdamW(net.parameters())
    with pytest.raises(TypeError, match="takes an optimizer of fused_optim, but got AdamW"):
        release_gradients(net, torch.optim.AdamW(net.parameters()))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"takes a torch.nn.Module, but got list"):
        release_gradients([net], ours)  # type: ignore[arg-type]
    for wrong in (0, -1, 2.5, True):
        with pytest.raises(ValueError, match="bucket_bytes must be a positive integer"):
            release_gradients(net, ours, bucket_bytes=wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="grad_scale must be"):
        release_gradients(net, ours, grad_scale=-1.0)
    with pytest.raises(ValueError, match="has no param of the model"):
        release_gradients(nn.Linear(2, 2), ours)
    release_gradients(net, ours)
    with pytest.raises(RuntimeError, match="are released already"):
        release_gradients(net, ours)
    loss(net, 0).backward()
    with pytest.raises(ValueError, match=r"step\(\) takes no grad_scale with gradient release"):
        ours.step(grad_scale=2.0)
    ours.grad_scale = torch.ones(())
    with pytest.raises(RuntimeError, match="GradScaler does not work with gradient release"):
        ours.step()


@pytest.mark.parametrize("case", [AMSGRAD, BY_NAME["sgd-dampening-maximize"], LAMB], ids=str)
def test_without_any_gradient(case: Case) -> None:
    """step() alone counts as a step without gradients."""
    net, ours, _, other, plain = pair(case, REFERENCE, ema_decay=0.9)
    ours.step()
    plain.step()
    side_by_side(net, ours, other, plain, 2)
    assert ours._ema.steps == plain._ema.steps == 3
    if case.ours is not LAMB.ours:  # clips
        assert_same(ours, plain)
