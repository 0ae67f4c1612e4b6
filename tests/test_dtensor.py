"""DTensor params on a mesh of one process: the result of a step on every backend, errors, and that no operation of the
step goes through DTensor's dispatch."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import (
    SCALARS,
    Case,
    Target,
    build,
    for_every_class,
    make_params,
    on_every_target,
    quick,
    random_grads,
    set_grads,
)
from compare import assert_equal
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fused_optim import FusedAdamW, FusedLAMB

SHAPES = [(6, 4), (5,), (300,), (4, 3, 2)]
PLACEMENTS = [Shard(0), Shard(0), Replicate(), Shard(1)]


@pytest.fixture(autouse=True, scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    path: Path = tmp_path_factory.mktemp("world") / "store"
    dist.init_process_group("gloo", store=dist.FileStore(str(path), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def mesh_of(device: str) -> DeviceMesh:
    return init_device_mesh(device, (1,))


def spread(tensors: Any, device: str = "cpu") -> list[torch.nn.Parameter]:
    mesh = mesh_of(device)
    return [
        torch.nn.Parameter(distribute_tensor(tensor.detach().clone(), mesh, [placement]))
        for tensor, placement in zip(tensors, PLACEMENTS, strict=True)
    ]


def set_spread_grads(params: list[torch.nn.Parameter], grads: list[Tensor]) -> None:
    for param, grad in zip(params, grads, strict=True):
        param.grad = distribute_tensor(grad, param.device_mesh, param.placements)


def plain(value: Any) -> Any:
    return value.full_tensor() if isinstance(value, DTensor) else value


@pytest.mark.shared
@pytest.mark.host
@on_every_target
@for_every_class
@pytest.mark.parametrize("bound", [None, 0.5])
def test_steps_as_plain_tensors(case: Case, bound: float | None, target: Target) -> None:
    params = make_params(SHAPES, device=target.device)
    theirs = build(case, target, params, max_grad_norm=bound)
    params = spread(params, target.device)
    ours = build(case, target, params, max_grad_norm=bound)
    for step in range(quick(target, 3, 2)):
        grads = random_grads(theirs.param_groups[0]["params"], step)
        set_grads(theirs.param_groups[0]["params"], grads)
        set_spread_grads(params, grads)
        ours.step()
        theirs.step()
    for p, q in zip(params, theirs.param_groups[0]["params"], strict=True):
        assert_equal(p.full_tensor().detach(), q.detach())
        for key, value in theirs.state[q].items():
            mine = ours.state[p][key]
            assert isinstance(mine, DTensor) == (key not in SCALARS)
            if isinstance(mine, DTensor):
                assert (mine.placements, mine.device_mesh, mine.shape) == (p.placements, p.device_mesh, p.shape)
            assert_equal(plain(mine), value)
    assert (ours.last_grad_norm is None) == (theirs.last_grad_norm is None)
    if ours.last_grad_norm is not None:
        torch.testing.assert_close(ours.last_grad_norm, theirs.last_grad_norm)


class Count(TorchDispatchMode):
    """Records the operations dispatched for DTensors."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            self.operations.append(str(func))
        return func(*args, **(kwargs or {}))


def test_no_operation_is_dispatched_for_dtensors() -> None:
    params = spread(make_params(SHAPES))
    optimizer = FusedAdamW(params, max_grad_norm=1.0, skip_nonfinite=True)
    for step in range(3):
        set_spread_grads(params, [g for g in random_grads(make_params(SHAPES), step)])
        with Count() as count:
            optimizer.step(grad_scale=2.0)
        assert step == 0 or count.operations == []
    with Count() as count:
        _ = params[0] + 1
    assert count.operations == ["aten.add.Tensor"]


def test_gradients_spread_otherwise_are_brought_into_the_params_layout() -> None:
    params, whole = spread(make_params(SHAPES)), make_params(SHAPES)
    ours, theirs = FusedAdamW(params), FusedAdamW(whole)
    grads = random_grads(whole, 0)
    set_grads(whole, grads)
    for param, grad in zip(params, grads, strict=True):
        other = Replicate() if param.placements[0].is_shard() else Shard(0)
        param.grad = distribute_tensor(grad, param.device_mesh, [other])
    ours.step()
    theirs.step()
    for p, q in zip(params, whole, strict=True):
        assert_equal(p.full_tensor().detach(), q.detach())


def test_versions_count_and_new_shards_are_seen() -> None:
    params = spread(make_params(SHAPES))
    optimizer = FusedAdamW(params, lr=0.1)
    set_spread_grads(params, random_grads(make_params(SHAPES), 0))
    optimizer.step()
    before = params[0]._version, params[0]._local_tensor._version
    optimizer.step()
    assert params[0]._version > before[0] and params[0]._local_tensor._version > before[1]

    old = params[0]._local_tensor
    kept = old.clone()
    params[0]._local_tensor = torch.zeros_like(old)  # FSDP does this when it shards again
    optimizer.step()
    assert_equal(old, kept)
    assert params[0]._local_tensor.abs().sum() > 0


def test_copies_and_checkpoints() -> None:
    params = spread(make_params(SHAPES))
    optimizer = FusedAdamW(params, lr=0.1)
    set_spread_grads(params, random_grads(make_params(SHAPES), 0))
    optimizer.step()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=False)
    others = [torch.nn.Parameter(p.detach().clone()) for p in params]
    for p, q in zip(params, others, strict=True):
        q.grad = p.grad
    again = FusedAdamW(others, lr=0.5)
    again.load_state_dict(saved)
    twin = copy.deepcopy(optimizer)
    for p, q in zip(params, twin.param_groups[0]["params"], strict=True):
        q.grad = p.grad
    for each in (optimizer, again, twin):
        each.step()
    for p, q, r in zip(params, others, twin.param_groups[0]["params"], strict=True):
        assert_equal(p.full_tensor().detach(), q.full_tensor().detach())
        assert_equal(p.full_tensor().detach(), r.full_tensor().detach())


def test_a_plain_gradient_or_state_is_refused() -> None:
    params = spread(make_params(SHAPES))
    optimizer = FusedAdamW(params, lr=0.1)
    set_spread_grads(params, random_grads(make_params(SHAPES), 0))
    optimizer.step()
    kept = [p.full_tensor().detach().clone() for p in params]

    whole = FusedAdamW(make_params(SHAPES), lr=0.1)
    set_grads(whole.param_groups[0]["params"], random_grads(make_params(SHAPES), 0))
    whole.step()
    fresh = FusedAdamW(params, lr=0.1)
    fresh.load_state_dict(whole.state_dict())
    with pytest.raises(
        RuntimeError, match=r'state "exp_avg" must be a DTensor like its param.*set_optimizer_state_dict'
    ):
        fresh.step()
    for p, before in zip(params, kept, strict=True):
        assert_equal(p.full_tensor().detach(), before)


def test_sharded_and_plain_params_share_the_launch_where_nothing_is_summed() -> None:
    sharded, others = spread(make_params(SHAPES)), make_params(SHAPES)
    for build_one, tables in ((FusedAdamW, 1), (FusedLAMB, 1)):  # with one process nothing is reduced over processes
        optimizer = build_one([*sharded, *others])
        grads = random_grads(others, 0)
        set_spread_grads(sharded, grads)
        set_grads(others, grads)
        optimizer.step()
        assert len(optimizer._tables) == tables
