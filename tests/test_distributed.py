"""Params that are plain tensors on every rank: DDP, ZeRO, FSDP1. Each is compared with one process that has the whole
batch."""

from __future__ import annotations

import math
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import parameters
from distributed import World, in_every_world, run
from spread import CLASSES, ELEMENTWISE, assert_alike, assert_close, assert_same, backward, build, in_turn, make_net
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, StateDictType
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from fused_optim import FusedAdamW

pytestmark = pytest.mark.distributed


def ddp(world: World, **options: Any) -> nn.Module:
    return DistributedDataParallel(make_net(world.device), **options)


# ---- DDP


@in_every_world
@pytest.mark.parametrize("views", [False, True], ids=["", "bucket-views"])
def test_ddp(world: World, views: bool) -> None:
    for name in in_turn(*CLASSES):
        net, alone = ddp(world, gradient_as_bucket_view=views), make_net(world.device)
        ours, theirs = build(name, net.parameters()), build(name, alone.parameters())
        for step in range(3):
            for model, optimizer, part in ((net, ours, (world.rank, world.size)), (alone, theirs, ())):
                optimizer.zero_grad(set_to_none=step != 1)
                backward(model, step, *part)
                optimizer.step()
        assert_same(ours, theirs)


@in_every_world
def test_ddp_whole_update(world: World) -> None:
    """Clipping, accumulation and skipping. The gradients are the same on all ranks, so the norm and the update are
    too."""
    net, alone = ddp(world), make_net(world.device)
    options = {"lr": 0.1, "skip_nonfinite": True}
    ours, theirs = FusedAdamW(net.parameters(), max_grad_norm=0.5, **options), FusedAdamW(alone.parameters(), **options)
    for step in range(4):
        ours.zero_grad()
        theirs.zero_grad()
        for micro in range(2):
            with net.no_sync() if micro == 0 else nullcontext():
                backward(net, 10 * step + micro, world.rank, world.size)
            backward(alone, 10 * step + micro)
        if step == 1 and world.rank == 0:  # simulates an overflow that DDP did not reduce
            parameters(ours)[0].grad.view(-1)[0] = math.nan
        if step == 1:  # DDP has reduced already: without this the ranks would diverge, in torch too
            dist.broadcast(parameters(ours)[0].grad, 0)
            parameters(theirs)[0].grad.view(-1)[0] = math.nan
        for param in parameters(theirs):
            param.grad /= 2
        norm = nn.utils.clip_grad_norm_(parameters(theirs), 0.5)
        ours.step(grad_scale=2)
        theirs.step()
        torch.testing.assert_close(ours.last_grad_norm, norm.float(), equal_nan=True)
        assert_alike(ours.last_grad_norm.nan_to_num())
    assert ours.skipped_steps.item() == 1
    assert_same(ours, theirs)


# ---- ZeRO


def zero(name: str, params: Any, **options: Any) -> ZeroRedundancyOptimizer:
    ours, usual = CLASSES[name]
    return ZeroRedundancyOptimizer(params, optimizer_class=ours, **{**usual, **options})


@in_every_world
def test_zero(world: World, tmp_path: Path) -> None:
    """Each state is on one rank. The gathered states equal those of one process, and loading distributes them again."""
    for name in in_turn(*CLASSES):
        net, alone = ddp(world), make_net(world.device)
        bound = {"max_grad_norm": None} if name == "lamb" else {}
        ours, theirs = zero(name, net.parameters(), **bound), build(name, alone.parameters(), **bound)
        for step in range(6):
            for model, optimizer, part in ((net, ours, (world.rank, world.size)), (alone, theirs, ())):
                optimizer.zero_grad()
                backward(model, step, *part)
                optimizer.step()
            for p, q in zip(net.parameters(), alone.parameters(), strict=True):
                assert_close(p, q)
            if step == 2:
                path = tmp_path / name
                ours.consolidate_state_dict(to=0)
                if world.rank == 0:
                    saved, plain = ours.state_dict(), theirs.state_dict()
                    torch.testing.assert_close(saved["state"], plain["state"], rtol=1e-9, atol=1e-10)
                    torch.save(saved, path)
                dist.barrier()
                ours = zero(name, net.parameters(), **bound)
                ours.load_state_dict(torch.load(path, weights_only=True))
        assert len(ours.optim.state) < len(parameters(theirs)) or world.size == 1


@in_every_world
@pytest.mark.parametrize("params", [1, 6])
def test_zero_clips_by_the_norm_over_all_ranks(world: World, params: int) -> None:
    """Also if some ranks have no params."""
    for norm_type in in_turn(2.0, math.inf):

        def tensors() -> list[nn.Parameter]:
            generator = torch.Generator().manual_seed(0)
            sizes = [(5, 3), (4,), (), (1,), (7,), (2, 2)][:params]
            made = (torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes)
            return [nn.Parameter(tensor.to(world.device)) for tensor in made]

        mine, alone = tensors(), tensors()
        norm = {"max_grad_norm": 0.5, "norm_type": norm_type, "norm_group": dist.group.WORLD, "skip_nonfinite": True}
        ours = zero("sgd", mine, **norm)
        theirs = build("sgd", alone)
        for step in range(4):
            generator = torch.Generator().manual_seed(step)
            for p, q in zip(mine, alone, strict=True):
                p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.device)
                q.grad = p.grad.clone()
            bad = step == 2
            if bad:
                mine[0].grad[0, 0] = math.inf  # only the owner of the param sees it
            total = nn.utils.clip_grad_norm_(alone, 0.5, norm_type)
            ours.step()
            if not bad:
                theirs.step()
                torch.testing.assert_close(ours.optim.last_grad_norm, total.float())
                assert_alike(ours.optim.last_grad_norm)
            for p, q in zip(mine, alone, strict=True):
                assert_close(p, q)
        assert ours.optim.skipped_steps.item() == 1


@in_every_world
def test_zero_without_a_norm_group_clips_by_its_own_norm(world: World) -> None:
    params = [nn.Parameter(torch.zeros(3, device=world.device)) for _ in range(4)]
    ours = zero("sgd", params, max_grad_norm=1.0)
    for p in params:
        p.grad = torch.ones_like(p)
    ours.step()
    mine = sum(p.numel() for p in parameters(ours.optim))
    assert ours.optim.last_grad_norm.item() == pytest.approx(math.sqrt(mine))


# ---- FSDP1


# FSDP1's clip_grad_norm_ does not accept float64.
SINGLE = {"rtol": 1e-4, "atol": 1e-5}


def fsdp1(world: World, original: bool, dtype: torch.dtype = torch.float64, **options: Any) -> FullyShardedDataParallel:
    """There are two flat params: one for the inner linear layer, one for all other layers."""
    place = torch.device(world.device, world.rank if world.device == "cuda" else None)
    net = make_net(world.device, dtype)
    options = {"device_id": place, "use_orig_params": original, **options}
    net[2] = FullyShardedDataParallel(net[2], **options)
    return FullyShardedDataParallel(net, **options)


def assert_whole_params(net: FullyShardedDataParallel, alone: nn.Module, **tolerance: float) -> None:
    with FullyShardedDataParallel.summon_full_params(net, writeback=False):
        whole = {name.replace("_fsdp_wrapped_module.", ""): param for name, param in net.named_parameters()}
        assert whole.keys() == dict(alone.named_parameters()).keys()
        for name, param in alone.named_parameters():
            assert_close(whole[name], param, **tolerance)


@in_every_world
@pytest.mark.parametrize("original", [True, False], ids=["orig-params", "flat"])
def test_fsdp1(world: World, original: bool) -> None:
    for name in in_turn(*ELEMENTWISE):
        net, alone = fsdp1(world, original), make_net(world.device)
        ours, theirs = build(name, net.parameters()), build(name, alone.parameters())
        for step in range(3):
            for model, optimizer, part in ((net, ours, (world.rank, world.size)), (alone, theirs, ())):
                optimizer.zero_grad(set_to_none=step != 1)
                backward(model, step, *part)
                optimizer.step()
            assert_whole_params(net, alone)


@in_every_world
@pytest.mark.parametrize("original", [True, False], ids=["orig-params", "flat"])
def test_fsdp1_clips_as_its_own_method(world: World, original: bool) -> None:
    """One pass replaces FullyShardedDataParallel.clip_grad_norm_ and a step."""
    for norm_type in in_turn(2.0, math.inf):
        net, twin = fsdp1(world, original, torch.float32), fsdp1(world, original, torch.float32)
        alone = make_net(world.device, torch.float32)
        norm = {"max_grad_norm": 0.5, "norm_type": norm_type, "norm_group": net.process_group}
        ours = build("sgd", net.parameters(), **norm)
        apart, theirs = build("sgd", twin.parameters()), build("sgd", alone.parameters())
        for step in range(3):
            for model, optimizer in ((net, ours), (twin, apart), (alone, theirs)):
                optimizer.zero_grad()
                backward(model, step, *(() if model is alone else (world.rank, world.size)))
            total = twin.clip_grad_norm_(0.5, norm_type)
            nn.utils.clip_grad_norm_(alone.parameters(), 0.5, norm_type)
            for optimizer in (ours, apart, theirs):
                optimizer.step()
            torch.testing.assert_close(ours.last_grad_norm, total)
            assert_alike(ours.last_grad_norm)
            for p, q in zip(net.parameters(), twin.parameters(), strict=True):
                assert_close(p, q, **SINGLE)
            assert_whole_params(net, alone, **SINGLE)


@in_every_world
def test_fsdp1_hybrid_clips_by_each_shard_once(world: World) -> None:
    """The norm is summed over the sharding group. A sum over the world would count every replica."""
    shape = max(1, world.size // 2), min(2, world.size)
    mesh = init_device_mesh(world.device, shape, mesh_dim_names=("replicate", "shard"))
    strategy = ShardingStrategy.HYBRID_SHARD
    net, alone = fsdp1(world, False, device_mesh=mesh, sharding_strategy=strategy), make_net(world.device)
    ours = build("sgd", net.parameters(), max_grad_norm=0.5, norm_group=net.process_group)
    theirs = build("sgd", alone.parameters(), max_grad_norm=0.5)
    for step in range(3):
        for model, optimizer, part in ((net, ours, (world.rank, world.size)), (alone, theirs, ())):
            optimizer.zero_grad()
            backward(model, step, *part)
            optimizer.step()
        torch.testing.assert_close(ours.last_grad_norm, theirs.last_grad_norm)
        assert_whole_params(net, alone)


@in_every_world
def test_fsdp1_with_its_grad_scaler(world: World) -> None:
    """One rank has an overflow. ShardedGradScaler.unscale_ tells the other ranks, and no param changes."""
    net, alone = fsdp1(world, True), make_net(world.device)
    ours, theirs = build("adamw-amsgrad", net.parameters()), build("adamw-amsgrad", alone.parameters())
    scaler = ShardedGradScaler(world.device, init_scale=64.0)
    for step in range(3):
        ours.zero_grad()
        theirs.zero_grad()
        scaler.scale(torch.zeros((), device=world.device))
        backward(net, step, world.rank, world.size, scale=scaler.get_scale())
        backward(alone, step)
        overflow = step == 1
        if overflow and world.rank == 0:
            next(p.grad for p in parameters(ours) if p.grad is not None and p.numel()).view(-1)[0] = math.inf
        scaler.unscale_(ours)
        scaler.step(ours)
        scaler.update()
        if not overflow:
            theirs.step()
        assert_whole_params(net, alone)
    assert scaler.get_scale() == 32.0


# With use_orig_params on CPUs torch gathers every state of a param into the same memory, also for its own AdamW. So the
# result is correct only for optimizers with one state.
@in_every_world
def test_fsdp1_checkpoint(world: World) -> None:
    """optim_state_dict gathers full states by name. A new optimizer loads them and training continues."""
    for name, original in in_turn(("adamw-amsgrad", False), ("sgd", False), ("sgd", True), ("lion", False)):
        net, alone = fsdp1(world, original), make_net(world.device)
        ours, theirs = build(name, net.parameters()), build(name, alone.named_parameters())
        for step in range(4):
            for model, optimizer, part in ((net, ours, (world.rank, world.size)), (alone, theirs, ())):
                optimizer.zero_grad()
                backward(model, step, *part)
                optimizer.step()
            if step == 1:
                saved = FullyShardedDataParallel.optim_state_dict(net, ours)
                plain = {param: theirs.state[p] for param, p in alone.named_parameters()}
                if world.rank == 0:  # torch gathers the states on this rank only
                    assert saved["state"].keys() == plain.keys()
                    for param, state in plain.items():
                        assert state.keys() == saved["state"][param].keys()
                        for key, value in state.items():
                            assert_close(saved["state"][param][key].to(value.device), value)
                before, ours = ours, build(name, net.parameters())
                FullyShardedDataParallel.set_state_dict_type(net, StateDictType.FULL_STATE_DICT)
                averages = {} if before.ema is None else {p: average.clone() for p, average in before.ema.items()}
                ours.load_state_dict(FullyShardedDataParallel.optim_state_dict_to_load(net, ours, saved))
                for p, average in averages.items():
                    assert torch.equal(ours.ema[p], average)
        assert_whole_params(net, alone)


# ---- tests of distributed.py


@in_every_world
def fails(world: World) -> None:
    if world.rank == world.size - 1:
        raise ArithmeticError("seven times nine")
    dist.barrier()


@in_every_world
def hangs(world: World) -> None:
    if world.rank == 0:
        time.sleep(60)
    dist.barrier()


def test_a_failing_rank_is_shown(tmp_path: Path) -> None:
    with pytest.raises(pytest.fail.Exception, match=r"rank 1(.|\n)*in fails(.|\n)*ArithmeticError: seven times nine"):
        run(fails.__wrapped__, {"world": World(2, "cpu")}, tmp_path)


def test_a_hanging_rank_is_stopped(tmp_path: Path) -> None:
    with pytest.raises(pytest.fail.Exception, match=r"Timeout(.|\n)* in (hangs|barrier)"):
        run(hangs.__wrapped__, {"world": World(2, "cpu")}, tmp_path, limit=2)
