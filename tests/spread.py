"""Shared by the distributed tests: optimizers, a net, its batches, ways to distribute it over a world, and
comparisons."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from cases import parameters
from distributed import World
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from fused_optim import FusedAdamW, FusedLAMB, FusedLion, FusedSGD

CLASSES: dict[str, tuple[Any, dict[str, Any]]] = {
    "adamw-amsgrad": (FusedAdamW, {"lr": 0.1, "amsgrad": True}),
    "sgd": (FusedSGD, {"lr": 0.1, "momentum": 0.9}),
    "lamb": (FusedLAMB, {"lr": 0.1, "weight_decay": 0.1, "max_grad_norm": 0.5, "ema_decay": 0.9}),
    "lion": (FusedLion, {"lr": 0.01, "weight_decay": 0.1, "ema_decay": 0.9}),
}
ELEMENTWISE = [name for name in CLASSES if name != "lamb"]


def build(name: str, params: Any, **options: Any) -> Any:
    ours, usual = CLASSES[name]
    return ours(params, **{**usual, **options})


def in_turn(*things: Any) -> Iterator[Any]:
    """Yields the cases one after the other in the same processes. A separate test for each case would spend most of its
    time on starting processes. Prints each case; pytest shows the output if the test fails."""
    for thing in things:
        if dist.get_rank() == 0:
            print(f"now {thing}", flush=True)
        yield thing


OUT = 3


def make_net(device: str = "cpu", dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """Over 2 and 4 processes its params split into equal shards (8), unequal shards (5, 3), and some empty shards (3,
    1)."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 5), nn.LayerNorm(5), nn.Linear(5, OUT), Scale())
    return net.to(device, dtype)


class Scale(nn.Module):
    """Multiplies by a single param."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


def backward(net: nn.Module, step: int, part: int = 0, parts: int = 1, scale: float = 1.0) -> None:
    """Computes the gradients of the mean loss over one of the equal parts of the step's batch of 8."""
    generator = torch.Generator().manual_seed(step)
    x, y = (torch.randn(8, size, generator=generator, dtype=torch.float64).chunk(parts)[part] for size in (4, OUT))
    param = next(net.parameters())
    x, y = (tensor.to(param.device, param.dtype) for tensor in (x, y))
    (((net(x) - y) ** 2).mean() * 10 * scale).backward()


# ---- ways to distribute a net over a world: each returns the net, and this rank's part of the batch (index, count)


def replicated(world: World) -> tuple[nn.Module, tuple[int, int]]:
    return DistributedDataParallel(make_net(world.device)), (world.rank, world.size)


def sharded(world: World, dtype: torch.dtype = torch.float64, **options: Any) -> tuple[nn.Module, tuple[int, int]]:
    return fully(make_net(world.device, dtype), world.mesh(), **options), (world.rank, world.size)


def hybrid(world: World) -> tuple[nn.Module, tuple[int, int]]:
    """Shards within each half of the world and replicates across the halves."""
    return fully(make_net(world.device), world.mesh("replicate", "shard")), (world.rank, world.size)


def mixed(world: World) -> tuple[nn.Module, tuple[int, int]]:
    """The layers use two meshes in turn."""
    net, meshes = make_net(world.device), itertools.cycle([world.mesh(), world.mesh("replicate", "shard")])
    for layer in net:
        fully_shard(layer, mesh=next(meshes))
    return net, (world.rank, world.size)


def tensor_parallel(world: World) -> tuple[nn.Module, tuple[int, int]]:
    """The params of two layers are DTensors. The others are plain tensors with the same values on every rank."""
    return parallel(make_net(world.device), world.mesh()), (0, 1)


def parallel_and_sharded(world: World) -> tuple[nn.Module, tuple[int, int]]:
    """Two layers are on a mesh of two dimensions, the others on its first dimension."""
    mesh = world.mesh("data", "tensor")
    net = fully(parallel(make_net(world.device), mesh["tensor"]), mesh["data"])
    return net, (mesh.get_local_rank("data"), mesh["data"].size())


def fully(net: nn.Sequential, mesh: DeviceMesh, **options: Any) -> nn.Module:
    for layer in net:
        fully_shard(layer, mesh=mesh, **options)
    return fully_shard(net, mesh=mesh, **options)


def parallel(net: nn.Sequential, mesh: DeviceMesh) -> nn.Sequential:
    parallelize_module(net, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    return net


Spread = Callable[[World], tuple[nn.Module, tuple[int, int]]]
DTENSORS: list[Spread] = [sharded, hybrid, mixed, tensor_parallel, parallel_and_sharded]


# ---- comparison


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def assert_same(ours: Optimizer, theirs: Optimizer, rtol: float = 1e-9, atol: float = 1e-10) -> None:
    """Compares the params and states of a distributed optimizer with those of a plain one. Their params have the same
    order."""
    pairs = list(zip(parameters(ours), parameters(theirs), strict=True))
    for p, q in pairs:
        assert_close(p, q, rtol, atol)
        assert list(ours.state[p]) == list(theirs.state[q])
        for key, value in theirs.state[q].items():
            mine = ours.state[p][key]
            if key == "step" or mine is None:
                assert mine == value
                assert mine is None or (type(mine), mine.dtype, mine.shape) == (Tensor, torch.float32, ())
                continue
            if isinstance(p, DTensor):
                assert (mine.device_mesh, mine.placements) == (p.device_mesh, p.placements)
                assert mine.to_local().shape == p.to_local().shape
            else:
                assert not isinstance(mine, DTensor)
            assert mine.dtype == value.dtype
            assert_close(mine, value, rtol, atol)


def assert_close(a: Tensor, b: Tensor, rtol: float = 1e-9, atol: float = 1e-10) -> None:
    torch.testing.assert_close(whole(a.detach()), whole(b.detach()), rtol=rtol, atol=atol)


def assert_alike(value: Tensor) -> None:
    """The value is bitwise equal on every rank."""
    everyone = [torch.empty_like(value) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, value.detach().contiguous())
    assert all(torch.equal(value, other) for other in everyone), everyone
