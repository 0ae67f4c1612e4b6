"""Params that are DTensors: FSDP2, hybrid sharding, tensor parallelism and both. Each is compared with one process that
has the whole batch, in float64."""

from __future__ import annotations

import itertools
import math
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from cases import copies, parameters
from distributed import World, in_every_world
from looks import LOOKS, class_of, only
from spread import (
    CLASSES,
    DTENSORS,
    Spread,
    assert_alike,
    assert_close,
    assert_same,
    backward,
    build,
    fully,
    in_turn,
    make_net,
    sharded,
    tensor_parallel,
    whole,
)
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from fused_optim import FusedAdamW
from fused_optim.engine import modules

pytestmark = pytest.mark.distributed


in_every_way = pytest.mark.parametrize("spread", DTENSORS, ids=lambda way: way.__name__)


# ---- against one process


@in_every_world
@in_every_way
def test_as_in_one_process(world: World, spread: Spread) -> None:
    """This includes LAMB's trust ratios, which need norms of full tensors, and its norm of all gradients."""
    for name in in_turn(*CLASSES):
        (net, part), alone = spread(world), make_net(world.device)
        ours, theirs = build(name, net.parameters()), build(name, alone.parameters())
        for step in range(3):
            for model, optimizer, share in ((net, ours, part), (alone, theirs, (0, 1))):
                optimizer.zero_grad(set_to_none=step != 1)
                backward(model, step, *share)
                optimizer.step()
        assert any(isinstance(p, DTensor) for p in parameters(ours))
        assert_same(ours, theirs)


@in_every_world
def test_shards_store_what_one_process_stores(world: World) -> None:
    """Packed formats, to the bit: the thresholds of dithered rounding are those of the whole params."""
    compact: list[dict[str, Any]] = [{"master_weights": "24bit"}, {"rounding": "dithered"}]
    for options in in_turn(*compact):
        (net, _), alone = sharded(world, torch.bfloat16), make_net(world.device, torch.bfloat16)
        ours, theirs = (
            FusedAdamW(model.parameters(), lr=0.01, state_dtype="compact", **options) for model in (net, alone)
        )
        pairs = list(zip(parameters(ours), parameters(theirs), strict=True))
        for step in range(3):
            torch.manual_seed(step)
            for p, q in pairs:
                assert isinstance(p, DTensor)
                q.grad = torch.randn(q.shape, device=q.device).to(q.dtype)
                p.grad = distribute_tensor(q.grad, p.device_mesh, p.placements)
            ours.step()
            theirs.step()
        for p, q in pairs:
            assert torch.equal(whole(p), q)
            for name in ("exp_avg", "exp_avg_sq", *(["param_low"] if "master_weights" in options else [])):
                # Collectives take no 16-bit integers.
                assert torch.equal(whole(ours.state[p][name].int()), theirs.state[q][name].int())


@in_every_world
def test_the_shards_are_equal_unequal_and_empty(world: World) -> None:
    """The other tests in this file rely on this."""
    net, _ = sharded(world)
    sizes = torch.tensor([p.to_local().numel() for p in net.parameters()], device=world.device)
    everyone = [torch.empty_like(sizes) for _ in range(world.size)]
    dist.all_gather(everyone, sizes)
    by_param = [set(sizes) for sizes in torch.stack(everyone).T.tolist()]
    assert any(len(sizes) == 1 for sizes in by_param)
    if world.size > 1:
        assert any(0 in sizes for sizes in by_param) and any(len(sizes - {0}) == 2 for sizes in by_param)


def poison(param: nn.Parameter, bad: float) -> None:
    """Sets the last element of one shard of the gradient to `bad`: the first shard along the last mesh dimension. Other
    shards are unchanged."""
    grad = param.grad.to_local() if isinstance(param.grad, DTensor) else param.grad
    first = not isinstance(param.grad, DTensor) or param.device_mesh.get_coordinate()[-1] == 0
    if first and grad.numel():
        grad.view(-1)[-1] = bad


@in_every_world
@in_every_way
def test_whole_update(world: World, spread: Spread) -> None:
    """The clipping norm is over all shards and counts replicas once. `bad` is in a single shard, but all ranks skip the
    step."""
    for norm_type, bad in in_turn((2.0, -math.inf), (math.inf, math.nan)):
        (net, part), alone = spread(world), make_net(world.device)
        clip = {"max_grad_norm": 0.5, "norm_type": norm_type, "skip_nonfinite": True}
        ours, theirs = build("adamw-amsgrad", net.parameters(), **clip), build("adamw-amsgrad", alone.parameters())
        for step in range(4):
            ours.zero_grad()
            theirs.zero_grad()
            for micro in range(2):
                backward(net, 10 * step + micro, *part)
                backward(alone, 10 * step + micro)
            for param in parameters(theirs):
                param.grad /= 2
            norm = nn.utils.clip_grad_norm_(parameters(theirs), 0.5, norm_type)
            if step == 1:
                poison(parameters(ours)[0], bad)
            ours.step(grad_scale=2)
            assert type(ours.last_grad_norm) is torch.Tensor
            assert_alike(ours.last_grad_norm.nan_to_num())
            if step == 1:
                torch.testing.assert_close(ours.last_grad_norm.item(), abs(bad), equal_nan=True)
                continue
            theirs.step()
            torch.testing.assert_close(ours.last_grad_norm, norm.float())
        assert ours.skipped_steps.item() == 1
        assert_same(ours, theirs)


@in_every_world
def test_clips_as_torch_clips_dtensors(world: World) -> None:
    """One pass replaces clip_grad_norm_ and torch's step, both on DTensors."""
    (net, part), (twin, _) = sharded(world), sharded(world)
    ours = FusedAdamW(net.parameters(), lr=0.1, max_grad_norm=0.5)
    theirs = torch.optim.AdamW(twin.parameters(), lr=0.1)
    for step in range(3):
        for model, optimizer in ((net, ours), (twin, theirs)):
            optimizer.zero_grad()
            backward(model, step, *part)
        norm = nn.utils.clip_grad_norm_(twin.parameters(), 0.5)
        ours.step()
        theirs.step()
        torch.testing.assert_close(ours.last_grad_norm, whole(norm).float())
    for p, q in zip(parameters(ours), parameters(theirs), strict=True):
        assert_close(p, q)
        assert ours.state[p].keys() == theirs.state[q].keys()
        for key, value in theirs.state[q].items():
            assert_close(ours.state[p][key], value)


@in_every_world
def test_groups_have_their_own_bounds(world: World) -> None:
    for name in in_turn("adamw-amsgrad", "lamb"):
        (net, part), alone = sharded(world), make_net(world.device)

        def groups(model: nn.Module) -> list[dict[str, Any]]:
            params = list(model.parameters())
            return [{"params": params[:3]}, {"params": params[3:6], "max_grad_norm": None}, {"params": params[6:]}]

        ours, theirs = (build(name, groups(model), max_grad_norm=0.25) for model in (net, alone))
        for step in range(3):
            for model, optimizer, share in ((net, ours, part), (alone, theirs, (0, 1))):
                optimizer.zero_grad()
                backward(model, step, *share)
                optimizer.step()
            torch.testing.assert_close(ours.last_grad_norm, theirs.last_grad_norm)
        assert_same(ours, theirs)


@in_every_world
def test_grad_scaler(world: World) -> None:
    """One rank's shard overflows. GradScaler checks DTensors over the whole mesh, so all ranks skip."""
    for unscale, clip in in_turn(*itertools.product([False, True], repeat=2)):
        (net, part), alone = sharded(world), make_net(world.device)
        bound = {"max_grad_norm": 0.5} if clip else {}
        ours = build("adamw-amsgrad", net.parameters(), **bound)
        theirs = build("adamw-amsgrad", alone.parameters(), **bound)
        scaler = torch.amp.GradScaler(world.device, init_scale=64.0)
        for step in range(3):
            ours.zero_grad()
            theirs.zero_grad()
            scaler.scale(torch.zeros((), device=world.device))
            backward(net, step, *part, scale=scaler.get_scale())
            backward(alone, step)
            if step == 1:
                poison(parameters(ours)[0], math.inf)
            if unscale:
                scaler.unscale_(ours)
            scaler.step(ours)
            scaler.update()
            if step != 1:
                theirs.step()
        assert scaler.get_scale() == 32.0
        assert_same(ours, theirs)


# ---- dtypes


@in_every_world
@pytest.mark.parametrize("params", [torch.float32, torch.bfloat16], ids=str)
def test_mixed_precision(world: World, params: torch.dtype) -> None:
    """The forward pass is in bfloat16, gradients are reduced in float32, and states are always float32. One process
    gets the same gradients. The results are bitwise equal unless the rule sums over tensors."""
    for name in in_turn(*CLASSES):
        net, part = sharded(world, params, mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32))
        alone = nn.ParameterList(copies([whole(p) for p in net.parameters()]))
        ours = build(name, net.parameters(), state_dtype=torch.float32)
        theirs = build(name, alone, state_dtype=torch.float32)
        for step in range(3):
            ours.zero_grad()
            backward(net, step, *part)
            for p, q in zip(net.parameters(), alone, strict=True):
                q.grad = whole(p.grad).clone()
            ours.step()
            theirs.step()
        assert {p.dtype for p in parameters(ours)} == {params}
        rounding = {torch.float32: (1e-6, 1e-7), torch.bfloat16: (2**-7, 1e-4)}  # LAMB's ratios depend on sums
        assert_same(ours, theirs, *(rounding[params] if name == "lamb" else (0.0, 0.0)))


@in_every_world
def test_gradients_spread_otherwise(world: World) -> None:
    """Gradients are redistributed to their param's placements: replicated ones are sharded, partial ones are summed."""
    mesh = world.mesh()
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(6, 5, generator=generator, dtype=torch.float64).to(world.device) for _ in range(2)]
    spread = [([Shard(0)], [Replicate()]), ([Shard(1)], [Partial()]), ([Replicate()], [Partial()])]
    params, grads, alone = [], [], []
    for placements, of_grad in spread:
        full = DTensor.from_local(values[0], mesh, [Replicate()], run_check=False)
        params.append(nn.Parameter(full.redistribute(placements=placements)))
        here = values[1] if of_grad == [Replicate()] else values[1] * (world.rank + 1)
        grads.append(DTensor.from_local(here, mesh, of_grad, run_check=False))
        alone.append(nn.Parameter(values[0].clone()))
        alone[-1].grad = values[1] * (1 if of_grad == [Replicate()] else sum(range(world.size + 1)))
    ours = FusedAdamW(params, lr=0.1, max_grad_norm=0.5)
    theirs = FusedAdamW(alone, lr=0.1, max_grad_norm=0.5)
    for _ in range(2):
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        ours.step()
        theirs.step()
    torch.testing.assert_close(ours.last_grad_norm, theirs.last_grad_norm)
    assert_same(ours, theirs)


# ---- what changes between steps


@in_every_world
def test_late_params_and_missing_gradients(world: World) -> None:
    (net, part), alone = sharded(world), make_net(world.device)
    pairs = [(net, part), (alone, (0, 1))]
    first = [list(model.parameters()) for model, _ in pairs]
    ours, theirs = (build("adamw-amsgrad", params[:4], max_grad_norm=0.5) for params in first)
    missing = {0: {0, 1}, 1: set(), 2: {2, 6}, 3: set(range(9)), 4: set()}
    for step, without in missing.items():
        for (model, share), optimizer, params in zip(pairs, (ours, theirs), first, strict=True):
            if step == 2:
                optimizer.add_param_group({"params": params[4:], "lr": 0.05})
            optimizer.zero_grad()
            for p in params:
                p.grad = None
            backward(model, step, *share)
            for index in without:
                params[index].grad = None
            optimizer.step()
        torch.testing.assert_close(ours.last_grad_norm, theirs.last_grad_norm)
        assert_same(ours, theirs)


@in_every_world
def test_frozen_params(world: World) -> None:
    net, alone = make_net(world.device), make_net(world.device)
    for model in (net, alone):
        model[2].requires_grad_(False)
    fully(net, world.mesh())
    ours, theirs = build("adamw-amsgrad", net.parameters()), build("adamw-amsgrad", alone.parameters())
    for step in range(2):
        for model, optimizer, share in ((net, ours, (world.rank, world.size)), (alone, theirs, (0, 1))):
            optimizer.zero_grad()
            backward(model, step, *share)
            optimizer.step()
    assert len(ours.state) == 7
    assert_same(ours, theirs)


# ---- what a step costs


CALLS = [("adamw-amsgrad", None, 0), ("adamw-amsgrad", 0.5, 1), ("lamb", None, 1), ("lamb", 1.0, 2)]


def counted(name: str) -> AbstractContextManager[mock.MagicMock]:
    return mock.patch.object(dist, name, side_effect=getattr(dist, name))


@in_every_world
@pytest.mark.parametrize("spread", [sharded, tensor_parallel], ids=lambda way: way.__name__)
def test_collectives_of_a_step(world: World, spread: Spread) -> None:
    """One collective for the norm and one for LAMB's ratios, for any number of params. None if the step needs no
    sums."""
    for name, clip, calls in in_turn(*CALLS):
        net, part = spread(world)
        optimizer = build(name, net.parameters(), max_grad_norm=clip)
        for step in range(2):
            backward(net, step, *part)
            with counted("all_reduce") as reduced, counted("all_gather") as gathered:
                optimizer.step()
            assert (reduced.call_count, gathered.call_count) == (calls if world.size > 1 else 0, 0)


@in_every_world
def test_under_every_look(world: World) -> None:
    """With each change detector that is available."""
    for look in (look for look in LOOKS if not isinstance(class_of(look), str)):
        (net, part), alone = sharded(world), make_net(world.device)
        with mock.patch.object(modules, "poll", return_value=only(look)):
            ours = build("adamw-amsgrad", net.parameters(), max_grad_norm=0.5, backend="reference")
            theirs = build("adamw-amsgrad", alone.parameters(), max_grad_norm=0.5, backend="reference")
            for step in range(3):
                for model, optimizer, share in ((net, ours, part), (alone, theirs, (0, 1))):
                    optimizer.zero_grad()
                    backward(model, step, *share)
                    optimizer.step()
        assert type(ours._detector) is class_of(look)
        assert_same(ours, theirs)


@in_every_world
def test_ranks_without_any_element(world: World) -> None:
    """The model has one element, on the first rank. The other ranks still join the collectives."""
    net, alone = nn.Linear(1, 1, bias=False, dtype=torch.float64), nn.Linear(1, 1, bias=False, dtype=torch.float64)
    for model in (net, alone):
        nn.init.ones_(model.to(world.device).weight)
    fully_shard(net, mesh=world.mesh())
    ours = build("lamb", net.parameters(), max_grad_norm=0.5, skip_nonfinite=True)
    theirs = build("lamb", alone.parameters(), max_grad_norm=0.5)
    for step in range(3):
        ours.zero_grad()
        theirs.zero_grad()
        for model in (net, alone):
            (model(torch.full((2, 1), step + 1.0, dtype=torch.float64, device=world.device)) ** 2).mean().backward()
        ours.step()
        theirs.step()
    assert_same(ours, theirs)
