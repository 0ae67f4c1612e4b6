"""Gradient release where params are DTensors: FSDP2, hybrid sharding, tensor parallelism and both. FSDP2 calls the
hooks itself, when it has reduced a gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import parameters
from distributed import World, in_every_world
from spread import (
    CLASSES,
    DTENSORS,
    OUT,
    Scale,
    Spread,
    assert_same,
    backward,
    build,
    fully,
    in_turn,
    make_net,
    replicated,
    sharded,
    whole,
)
from torch import nn
from torch.distributed.tensor import DTensor

from fused_optim import FusedAdamW, release_gradients

pytestmark = pytest.mark.distributed

BUCKET = 160  # bytes


def released(name: str, net: nn.Module, **options: Any) -> Any:
    optimizer = build(name, net.parameters(), **options)
    assert len(release_gradients(net, optimizer, bucket_bytes=BUCKET)._buckets) > 1
    return optimizer


@in_every_world
@pytest.mark.parametrize("spread", DTENSORS, ids=lambda way: way.__name__)
def test_as_in_one_process(world: World, spread: Spread) -> None:
    for name in in_turn(*CLASSES):
        (net, part), alone = spread(world), make_net(world.device)
        ours, theirs = released(name, net, max_grad_norm=None), build(name, alone.parameters(), max_grad_norm=None)
        for step in range(3):
            backward(net, step, *part)
            assert all(p.grad is None for p in net.parameters())
            ours.step()
            backward(alone, step)
            theirs.step()
            theirs.zero_grad()
        assert any(isinstance(p, DTensor) for p in parameters(ours))
        assert_same(ours, theirs)


def narrow(device: str) -> nn.Sequential:
    """One param in each layer, so that the gradients arrive in the same order with and without FSDP2."""
    torch.manual_seed(0)
    layers = [nn.Linear(sizes[0], sizes[1], bias=False) for sizes in ((4, 8), (8, 5), (5, OUT))]
    return nn.Sequential(layers[0], nn.Tanh(), *layers[1:], Scale()).to(device, torch.float64)


@in_every_world
def test_clipping_and_skipping_agree_on_all_ranks(world: World) -> None:
    """One process with the same release takes the same steps: it updates the params in the same order."""
    for name in in_turn("adamw-amsgrad", "lamb"):
        net, alone, part = narrow(world.device), narrow(world.device), (world.rank, world.size)
        fully(net, world.mesh())
        ours, theirs = (
            build(name, model.parameters(), max_grad_norm=0.05, skip_nonfinite=True) for model in (net, alone)
        )
        for model, optimizer in ((net, ours), (alone, theirs)):
            release_gradients(model, optimizer, bucket_bytes=1)  # a bucket for each param
        for step in range(3):
            for model, optimizer, share in ((net, ours, part), (alone, theirs, (0, 1))):
                # A gradient that is infinite on one rank alone.
                scale = float("inf") if step == 1 and (share == (0, 1) or world.rank == 0) else 1.0
                backward(model, step, *share, scale=scale)
                optimizer.step()
        torch.testing.assert_close(ours.last_grad_norm, theirs.last_grad_norm)
        assert int(ours.skipped_steps) == int(theirs.skipped_steps) == 1
        assert_same(ours, theirs)


@in_every_world
def test_accumulation(world: World) -> None:
    """By FSDP2's set_requires_gradient_sync, and by no_release()."""
    for own in in_turn(True, False):
        (net, part), alone = sharded(world), make_net(world.device)
        ours, theirs = build("sgd", net.parameters()), build("sgd", alone.parameters())
        release = release_gradients(net, ours, bucket_bytes=BUCKET)
        for step in range(0, 6, 2):
            if own:
                with release.no_release():
                    backward(net, step, *part)
            else:
                net.set_requires_gradient_sync(False)
                backward(net, step, *part)
                net.set_requires_gradient_sync(True)
            backward(net, step + 1, *part)
            assert all(p.grad is None for p in net.parameters())
            ours.step()
            for micro in (step, step + 1):
                backward(alone, micro)
            theirs.step()
            theirs.zero_grad()
        assert_same(ours, theirs)


@in_every_world
def test_compact_states_and_master_weights(world: World) -> None:
    """To the bit those of plain steps of the same shards."""
    nets = [sharded(world, torch.bfloat16) for _ in range(2)]
    options: dict[str, Any] = {"lr": 0.01, "state_dtype": "compact", "master_weights": "exact"}
    ours, plain = (FusedAdamW(net.parameters(), **options) for net, _ in nets)
    release_gradients(nets[0][0], ours, bucket_bytes=BUCKET)
    for step in range(3):
        for (net, part), optimizer in zip(nets, (ours, plain), strict=True):
            backward(net, step, *part)
            optimizer.step()
            optimizer.zero_grad()
    for p, q in zip(parameters(ours), parameters(plain), strict=True):
        assert torch.equal(whole(p), whole(q))
        for key, value in plain.state[q].items():
            mine = ours.state[p][key]
            same = mine.to_local().equal(value.to_local()) if isinstance(value, DTensor) else mine == value
            assert same, key


@in_every_world
def test_ddp_is_refused(world: World) -> None:
    net, _ = replicated(world)
    with pytest.raises(
        TypeError, match=r"DistributedDataParallel reduces them later; shard the model with .*fully_shard"
    ):
        release_gradients(net, FusedAdamW(net.parameters()))
