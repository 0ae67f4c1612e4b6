"""Params that are spread over processes (DTensors). A step updates the local shard. Sums over a whole tensor are also
summed over the processes."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Groups = tuple[Any, ...]  # process groups whose members hold different elements


def is_sharded(tensor: Any) -> bool:
    """Whether the tensor is a DTensor. There are none if torch.distributed.tensor was never imported."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Any) -> Any:
    """The local shard of a DTensor: the object that it holds, because callers compare identities. Anything else is
    returned unchanged."""
    return tensor._local_tensor if is_sharded(tensor) else tensor


def is_same_memory(tensor: Any, earlier: Tensor) -> bool:
    """Whether the local shard of a tensor still has the memory, device, dtype and layout of `earlier`, which was
    detached from it."""
    shard = local(tensor)
    places = [(t.data_ptr(), t.device, t.dtype, t.shape, t.stride()) for t in (shard, earlier)]
    return places[0] == places[1]


def like(param: Tensor, shard: Tensor, shape: Sequence[int] | None = None) -> Tensor:
    """`shard` as a DTensor with the mesh and placements of param. If param is a plain tensor, `shard` itself.

    shape: of the whole tensor, which is then contiguous; None: shape and strides of param.
    """
    if not is_sharded(param):
        return shard
    from torch.distributed.tensor import DTensor

    with torch.no_grad():
        return DTensor.from_local(
            shard,
            param.device_mesh,  # type: ignore[attr-defined]
            param.placements,  # type: ignore[attr-defined]
            run_check=False,
            shape=param.shape if shape is None else torch.Size(shape),
            stride=param.stride() if shape is None else torch.empty(shape, device="meta").stride(),
        )


def check_spread(param: Any, tensor: Any, what: str) -> None:
    """Raises RuntimeError if only one of the two is a DTensor, or if their device meshes differ."""
    if is_sharded(param) != is_sharded(tensor):
        kinds = ("a DTensor", "a plain tensor") if is_sharded(param) else ("a plain tensor", "a DTensor")
        raise RuntimeError(
            f"{what} must be {kinds[0]} like its param, but is {kinds[1]}; "
            "torch.distributed.checkpoint.state_dict.set_optimizer_state_dict loads states with any placements"
        )
    if is_sharded(param) and tensor.device_mesh != param.device_mesh:
        raise RuntimeError(
            f"{what} must be on its param's device mesh, {param.device_mesh}, but is on {tensor.device_mesh}; "
            "distribute it over the param's mesh"
        )


def spread_as(param: Any, tensor: Any, what: str) -> Tensor:
    """A tensor that belongs to param, with param's placements. Raises RuntimeError as check_spread does."""
    check_spread(param, tensor, what)
    if not is_sharded(param) or tensor.placements == param.placements:
        return tensor
    with torch.no_grad():
        return tensor.redistribute(placements=param.placements)


def local_grad(param: Tensor, grad: Tensor) -> Tensor:
    """The shard of a gradient that matches param's shard. Communicates if the placements differ."""
    shard = local(spread_as(param, grad, "a gradient"))
    return shard.wait() if hasattr(shard, "wait") else shard  # the result of an asynchronous collective


def groups_of(param: Any) -> Groups:
    """The process groups over which the elements of param are spread: one for each dimension of its mesh that shards
    it. Dimensions that replicate it have none."""
    if not is_sharded(param) or param.device_mesh.get_coordinate() is None:
        return ()
    mesh = param.device_mesh
    dims = [dim for dim, placement in enumerate(param.placements) if not placement.is_replicate()]
    return tuple(mesh.get_group(dim) for dim in dims if mesh.size(dim) > 1)


def first_element_of(param: Any) -> int:
    """Index, within the whole tensor, of the first element that lies here. 0 where a shard is not a run of whole rows:
    its elements are counted by themselves."""
    if not is_sharded(param):
        return 0
    rows, begin, coordinate = param.shape[0] if param.dim() else 1, 0, param.device_mesh.get_coordinate()
    for dim, placement in enumerate(param.placements):
        if placement.is_replicate():
            continue
        if coordinate is None or type(placement).__name__ != "Shard" or placement.dim != 0:
            return 0
        size = -(-rows // param.device_mesh.size(dim))
        start = min(coordinate[dim] * size, rows)
        begin, rows = begin + start, min(size, rows - start)
    return begin * math.prod(param.shape[1:])


def device_for(group: Any) -> torch.device:
    """The device of the tensors that the group's collectives take."""
    on_gpus = torch.cuda.is_available() and "nccl" in torch.distributed.get_backend(group)
    return torch.device("cuda", torch.cuda.current_device()) if on_gpus else torch.device("cpu")


def reduce_over(values: Sequence[Tensor], groups: Sequence[Groups], op: str = "SUM") -> list[Tensor]:
    """Each value reduced over the processes of its groups, with one collective per group. op: a name in ReduceOp. All
    values have the same shape and dtype, and the values with groups are on one device."""
    reduced = list(values)
    if not any(groups):
        return reduced
    for group in dict.fromkeys(group for several in groups for group in several):
        members = [i for i, several in enumerate(groups) if group in several]
        together = torch.stack([reduced[i] for i in members])
        torch.distributed.all_reduce(together, getattr(torch.distributed.ReduceOp, op), group)
        for i, value in zip(members, together.unbind(), strict=True):
            reduced[i] = value
    return reduced


def largest_over(values: Sequence[Tensor], groups: Sequence[Groups]) -> list[Tensor]:
    """The maximum of each value over the processes of its groups, or NaN if one of them is NaN. Collectives alone do
    not guarantee the NaN."""
    if not any(groups):
        return list(values)
    both = [torch.stack([value.nan_to_num(math.inf, math.inf), value.isnan().to(value.dtype)]) for value in values]
    largest = [pair.unbind() for pair in reduce_over(both, groups, "MAX")]
    return [torch.where(bad != 0, math.nan, value) for value, bad in largest]
