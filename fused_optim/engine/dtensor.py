"""Params that are spread over processes (DTensors): a step works on the shard that lies here, and what is summed over
whole tensors is summed over processes too."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Groups = tuple[Any, ...]  # process groups, whose every member holds other elements


def is_sharded(tensor: Any) -> bool:
    """Whether it is a DTensor. Where nobody has imported these, there are none."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Any) -> Any:
    """The shard that lies here: the very tensor that the DTensor holds, for it is compared by identity. Anything else
    is given back as it is."""
    return tensor._local_tensor if is_sharded(tensor) else tensor


def is_same_memory(tensor: Any, earlier: Tensor) -> bool:
    """Whether a tensor still has the memory, dtype and layout of `earlier`, the detached shard that it held then."""
    shard = local(tensor)
    places = [(t.data_ptr(), t.device, t.dtype, t.shape, t.stride()) for t in (shard, earlier)]
    return places[0] == places[1]


def like(param: Tensor, shard: Tensor) -> Tensor:
    """`shard` as a DTensor that is spread as param is; itself where param is a plain tensor."""
    if not is_sharded(param):
        return shard
    from torch.distributed.tensor import DTensor

    with torch.no_grad():
        return DTensor.from_local(
            shard,
            param.device_mesh,  # type: ignore[attr-defined]
            param.placements,  # type: ignore[attr-defined]
            run_check=False,
            shape=param.shape,
            stride=param.stride(),
        )


def check_spread(param: Any, tensor: Any, what: str) -> None:
    """Raises RuntimeError where one of them is a DTensor and the other is not, or they lie on different meshes."""
    if is_sharded(param) != is_sharded(tensor):
        kinds = ("a DTensor", "a plain tensor") if is_sharded(param) else ("a plain tensor", "a DTensor")
        raise RuntimeError(
            f"{what} must be {kinds[0]} like its param, but is {kinds[1]}; "
            "torch.distributed.checkpoint.state_dict.set_optimizer_state_dict loads states that are spread otherwise"
        )
    if is_sharded(param) and tensor.device_mesh != param.device_mesh:
        raise RuntimeError(
            f"{what} must lie on its param's device mesh, {param.device_mesh}, but lies on {tensor.device_mesh}; "
            "distribute it anew"
        )


def spread_as(param: Any, tensor: Any, what: str) -> Tensor:
    """A tensor that belongs to param, spread as param is. Raises RuntimeError as check_spread."""
    check_spread(param, tensor, what)
    if not is_sharded(param) or tensor.placements == param.placements:
        return tensor
    with torch.no_grad():
        return tensor.redistribute(placements=param.placements)


def local_grad(param: Tensor, grad: Tensor) -> Tensor:
    """The shard of a gradient that goes with param's, after whatever communication that takes."""
    shard = local(spread_as(param, grad, "a gradient"))
    return shard.wait() if hasattr(shard, "wait") else shard  # of an asynchronous collective


def groups_of(param: Any) -> Groups:
    """The processes over which the elements of param are spread: one group for each dimension of its mesh that shards
    it, and none for those that replicate it."""
    if not is_sharded(param) or param.device_mesh.get_coordinate() is None:
        return ()
    mesh = param.device_mesh
    dims = [dim for dim, placement in enumerate(param.placements) if not placement.is_replicate()]
    return tuple(mesh.get_group(dim) for dim in dims if mesh.size(dim) > 1)


def device_for(group: Any) -> torch.device:
    """Where its collectives take tensors from."""
    on_gpus = torch.cuda.is_available() and "nccl" in torch.distributed.get_backend(group)
    return torch.device("cuda", torch.cuda.current_device()) if on_gpus else torch.device("cpu")


def reduce_over(values: Sequence[Tensor], groups: Sequence[Groups], op: str = "SUM") -> list[Tensor]:
    """Each value summed (or what ReduceOp has) over the processes of its groups, one collective for each group. The
    values have one shape and dtype; those to be reduced are all of one device."""
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
    """The largest of each value over the processes of its groups; NaN if one is, which collectives do not promise."""
    if not any(groups):
        return list(values)
    both = [torch.stack([value.nan_to_num(math.inf, math.inf), value.isnan().to(value.dtype)]) for value in values]
    largest = [pair.unbind() for pair in reduce_over(both, groups, "MAX")]
    return [torch.where(bad != 0, math.nan, value) for value, bad in largest]
