"""Muon over several processes: matrices are dealt out to them, whether they are DTensors or the same everywhere. Each
way is compared with one process that has all gradients."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import parameters
from distributed import World, in_every_world
from muon import gradients
from spread import (
    DTENSORS,
    Spread,
    assert_alike,
    fully,
    hybrid,
    in_turn,
    make_net,
    sharded,
    tensor_parallel,
    whole,
)
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from fused_optim import FusedMuon

pytestmark = pytest.mark.distributed
LR = 0.02
ROUNDINGS = LR * 8 * torch.finfo(torch.bfloat16).eps  # of an iteration, whose inputs may be rounded to the other side


def build(net: nn.Module, **options: Any) -> FusedMuon:
    params = list(net.parameters())
    matrices, others = ([p for p in params if (p.dim() == 2) == is_matrix] for is_matrix in (True, False))
    return FusedMuon([{"params": matrices}, {"params": others, "use_muon": False}], lr=LR, **options)


def set_grads(ours: FusedMuon, theirs: FusedMuon, step: int) -> None:
    """The same gradients for whole params and for their shards."""
    for p, q in zip(parameters(ours), parameters(theirs), strict=True):
        grad = gradients([q], step)[0] if q.dim() == 2 else torch.full_like(q, 0.1 * (step + 1))
        q.grad = grad
        p.grad = distribute_tensor(grad, p.device_mesh, p.placements) if isinstance(p, DTensor) else grad.clone()


def compare(ours: FusedMuon, theirs: FusedMuon) -> None:
    for p, q in zip(parameters(ours), parameters(theirs), strict=True):
        torch.testing.assert_close(whole(p.detach()), q.detach(), rtol=0, atol=ROUNDINGS if q.dim() == 2 else 1e-9)
        for key, value in theirs.state[q].items():
            bounds = (0.02, 1e-6) if key == "second_momentum_buffer" else (1e-9, 1e-10)
            mine: Tensor = whole(ours.state[p][key])
            torch.testing.assert_close(mine, value, rtol=bounds[0], atol=bounds[1])


@in_every_world
@pytest.mark.parametrize("spread", DTENSORS, ids=lambda way: way.__name__)
def test_as_in_one_process(world: World, spread: Spread) -> None:
    for options in in_turn({}, {"max_grad_norm": 0.5, "ema_decay": 0.9}, {"nesterov": False, "ns_steps": 3}):
        net, alone = spread(world)[0], make_net(world.device)
        ours, theirs = build(net, **options), build(alone, **options)
        for step in range(3):
            set_grads(ours, theirs, step)
            ours.step()
            theirs.step()
            compare(ours, theirs)


@in_every_world
def test_normuon_of_shards(world: World) -> None:
    """The row moments are sharded as the rows are, and the norm is that of the whole matrix."""
    for way in in_turn(sharded, hybrid):
        net, alone = way(world)[0], make_net(world.device)
        ours, theirs = build(net, normuon=True), build(alone, normuon=True)
        for step in range(3):
            set_grads(ours, theirs, step)
            ours.step()
            theirs.step()
            compare(ours, theirs)
        for p in parameters(ours):
            if p.dim() == 2:
                moments: Any = ours.state[p]["second_momentum_buffer"]
                assert (moments.placements, moments.shape) == (p.placements, (p.shape[0], 1))


@in_every_world
def test_normuon_needs_whole_rows(world: World) -> None:
    net, _ = tensor_parallel(world)
    ours = build(net, normuon=True)
    set_grads(ours, build(make_net(world.device)), 0)
    with pytest.raises(ValueError, match=r"normuon needs params that are sharded by rows .*use normuon=False"):
        ours.step()


class Deep(nn.Module):
    """Five matrices of one shape and two of another, so that processes get different numbers of them."""

    def __init__(self, device: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        sizes = [(6, 10)] * 5 + [(10, 6)] * 2
        self.layers = nn.ModuleList([nn.Linear(*size, device=device) for size in sizes])


@in_every_world
@pytest.mark.parametrize("normuon", [False, True])
def test_processes_share_the_matrices(world: World, normuon: bool) -> None:
    """With the same gradients everywhere, as in DistributedDataParallel. A gradient may be missing."""
    net, alone = Deep(world.device), Deep(world.device)
    ours = build(net, normuon=normuon, distributed_group=dist.group.WORLD)
    theirs = build(alone, normuon=normuon)
    assert ours.distributed_group is dist.group.WORLD
    for step in range(3):
        set_grads(ours, theirs, step)
        if step == 1:
            net.layers[1].weight.grad = alone.layers[1].weight.grad = None
        ours.step()
        theirs.step()
        compare(ours, theirs)
    for p in parameters(ours):
        assert_alike(p)


@in_every_world
def test_shards_of_many_matrices(world: World) -> None:
    """Several matrices of one shape for each process, in bfloat16 and float32."""
    for dtype in in_turn(torch.float32, torch.bfloat16):
        alone = Deep(world.device).to(dtype)
        net = nn.Sequential(*Deep(world.device).to(dtype).layers)
        fully(net, world.mesh())
        ours, theirs = build(net, master_weights="exact"), build(alone, master_weights="exact")
        for step in range(2):
            set_grads(ours, theirs, step)
            ours.step()
            theirs.step()
        for p, q in zip(parameters(ours), parameters(theirs), strict=True):
            bound = ROUNDINGS + (0.01 if dtype == torch.bfloat16 else 0.0)
            torch.testing.assert_close(whole(p.detach()), q.detach(), rtol=0, atol=bound)


@in_every_world
def test_checkpoints_of_shards(world: World) -> None:
    """state_dict() of DTensors continues bit for bit."""
    net = sharded(world)[0]
    ours, alone = build(net, normuon=True), build(make_net(world.device))
    set_grads(ours, alone, 0)
    ours.step()
    other = sharded(world)[0]
    again = build(other, normuon=True)
    again.load_state_dict(copy.deepcopy(ours.state_dict()))
    with torch.no_grad():
        for p, q in zip(parameters(ours), parameters(again), strict=True):
            q.copy_(p)
    for step in (1, 2):
        for optimizer in (ours, again):
            set_grads(optimizer, alone, step)
            optimizer.step()
    assert_same_bits(ours, again)


def assert_same_bits(ours: FusedMuon, theirs: FusedMuon) -> None:
    for p, q in zip(parameters(ours), parameters(theirs), strict=True):
        assert torch.equal(whole(p.detach()), whole(q.detach()))
        for key, value in ours.state[p].items():
            assert torch.equal(whole(value), whole(theirs.state[q][key])), key
