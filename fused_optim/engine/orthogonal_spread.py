"""Newton-Schulz orthogonalization over processes. The matrices of a bucket are dealt out to the processes, and each is
orthogonalized by one of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .dtensor import groups_of, is_sharded, like, local
from .layout import TensorScalars, column
from .orthogonal import MOMENTS, Bucket, Settings, newton_schulz, row_factors, workspace_dtype
from .table import Row, Table

SKIP = column(TensorScalars, "skip")
UPDATE_SQUARES = 1  # column of Table.sums


class SharedBucket(Bucket):
    """Matrices that every process has, with the same gradients, as in DistributedDataParallel. One all-gather hands out
    the results.

    group: the processes.
    """

    def __init__(self, rows: Sequence[Row], numbers: Sequence[int], settings: Settings, group: Any) -> None:
        self.group, processes = group, torch.distributed.get_world_size(group)
        self.share = -(-len(rows) // processes)
        super().__init__(rows, numbers, settings, self.share * processes)

    def run(self, present: Sequence[bool], norms: Tensor, skips: Tensor) -> None:
        places = [place for place, number in enumerate(self.numbers) if present[number]]
        if not places or not self.wide.numel():
            return
        first = self.share * torch.distributed.get_rank(self.group)
        own = [place for place in places if first <= place < first + self.share]
        if own:
            self.iterate(own, norms)
        mine = self.buffer[first : first + self.share].clone()
        # Not every backend sends bfloat16.
        torch.distributed.all_gather_into_tensor(
            self.buffer.view(torch.uint8), mine.view(torch.uint8), group=self.group
        )
        self.normalize(places, skips)


def add_workspaces(rows: Sequence[Row]) -> list[Tensor]:
    """Gives each row a workspace of its own."""
    made = [torch.zeros_like(row.target, dtype=workspace_dtype(row.target), requires_grad=False) for row in rows]
    for row, workspace in zip(rows, made, strict=True):
        row.workspace = workspace
        row.states.append(workspace)
    return made


class ShardedBucket:
    """Matrices that are DTensors of one shape, mesh and placements, spread over the processes of one group along one
    dimension. One exchange makes each matrix whole on one process, and one brings the shards of the results back.

    splits: sizes of the shards along the dimension, by process. own: the places of the matrices of this process.
    """

    def __init__(self, rows: Sequence[Row], numbers: Sequence[int], settings: Settings) -> None:
        first: Any = rows[0].param
        (self.group,) = groups_of(first)
        (self.dim,) = (p.dim for p in first.placements if not p.is_replicate())
        self.processes, self.rank = torch.distributed.get_world_size(self.group), torch.distributed.get_rank(self.group)
        self.shape, self.settings = first.shape, settings
        self.scale = settings.scale(first.shape[0], first.shape[1:].numel())
        size, length = -(-first.shape[self.dim] // self.processes), first.shape[self.dim]
        self.splits = [max(0, min(size, length - rank * size)) for rank in range(self.processes)]
        self.numbers = list(numbers)
        target = rows[0].target
        self.shards = add_workspaces(rows)
        self.own = list(range(self.rank, len(rows), self.processes))
        self.index = torch.tensor(self.numbers, device=target.device)
        self.moments = [local(row.state[MOMENTS]) for row in rows] if settings.beta2 is not None else []

    def run(self, present: Sequence[bool], norms: Tensor, skips: Tensor) -> None:
        """As Bucket.run. A gradient is missing on all processes or on none."""
        if not any(present[number] for number in self.numbers) or not self.shape.numel():
            return
        whole = self.exchange([shard.to(torch.bfloat16).reshape(-1) for shard in self.dealt(self.shards)], back=False)
        if self.own:
            x = whole.flatten(2)
            tall = x.shape[1] > x.shape[2]
            norm = norms[self.index[self.own]].clamp(min=self.settings.eps)[:, None, None]
            x = newton_schulz((x.mT if tall else x) / norm, self.settings, 1.0 if self.moments else self.scale)
            whole = (x.mT if tall else x).reshape(whole.shape)
        pieces = [piece.reshape(-1) for piece in whole.split(self.splits, dim=1 + self.dim)]
        made = self.exchange(pieces, back=True)
        if self.moments:
            flat = made.flatten(2).float()
            factors = row_factors(
                flat, self.moments, skips[self.index] != 0, self.settings, self.scale, -1, group=self.group
            )
            made = (flat * factors).reshape(made.shape)
        for shard, new in zip(self.shards, made, strict=True):
            shard.copy_(new)

    def dealt(self, items: Sequence[Tensor]) -> list[Tensor]:
        """The items in the order of the processes that their matrices are dealt to."""
        return [item for rank in range(self.processes) for item in items[rank :: self.processes]]

    def exchange(self, pieces: Sequence[Tensor], back: bool) -> Tensor:
        """Sends pieces, in the order of the processes.

        Returns:
            The whole matrices of this process, [matrices, *shape]; with `back` the shards of all matrices.
        """
        counts = [len(range(rank, len(self.shards), self.processes)) for rank in range(self.processes)]
        row = self.shape.numel() // self.shape[self.dim]  # elements for each one along the dimension
        mine, theirs = row * self.splits[self.rank], [row * split for split in self.splits]
        to_owners = [count * mine for count in counts]
        to_here = [len(self.own) * count for count in theirs]
        sent, received = (to_here, to_owners) if back else (to_owners, to_here)
        device = self.shards[0].device
        out = torch.empty(sum(received), dtype=torch.bfloat16, device=device)
        torch.distributed.all_to_all_single(
            out.view(torch.uint8),
            torch.cat([out[:0], *pieces]).view(torch.uint8),  # not every backend sends bfloat16
            [2 * count for count in received],
            [2 * count for count in sent],
            group=self.group,
        )
        parts = out.split(received)
        if back:
            shards: list[Any] = [None] * len(self.shards)
            for rank, part in enumerate(parts):
                shards[rank :: self.processes] = part.view(counts[rank], *self.shards[0].shape)
            return torch.stack(shards)
        shapes = [[*self.shape[: self.dim], split, *self.shape[self.dim + 1 :]] for split in self.splits]
        found = [part.view(len(self.own), *shape) for part, shape in zip(parts, shapes, strict=True)]
        return torch.cat(found, dim=1 + self.dim)


class GatheredBucket(ShardedBucket):
    """Matrices that are DTensors spread in another way, such as over two dimensions. Every process gathers each of them
    and orthogonalizes it."""

    def __init__(self, rows: Sequence[Row], numbers: Sequence[int], settings: Settings) -> None:
        first: Any = rows[0].param
        self.params = [row.param for row in rows]
        self.shape, self.settings, self.numbers = first.shape, settings, list(numbers)
        self.scale = settings.scale(first.shape[0], first.shape[1:].numel())
        self.shards = add_workspaces(rows)

    def run(self, present: Sequence[bool], norms: Tensor, skips: Tensor) -> None:
        from torch.distributed.tensor import DTensor, Replicate

        for param, number, shard in zip(self.params, self.numbers, self.shards, strict=True):
            if not present[number] or not self.shape.numel():
                continue
            spread: Any = like(param, shard.to(torch.bfloat16))
            whole = spread.full_tensor().flatten(1)
            tall = whole.shape[0] > whole.shape[1]
            x = (whole.T if tall else whole) / norms[number].clamp(min=self.settings.eps)
            x = newton_schulz(x, self.settings, self.scale)
            whole = (x.T if tall else x).reshape(self.shape).contiguous()
            everywhere = [Replicate()] * spread.device_mesh.ndim
            made = DTensor.from_local(whole, spread.device_mesh, everywhere, run_check=False)
            shard.copy_(local(made.redistribute(placements=spread.placements)))


def bucket_of(rows: Sequence[Row], numbers: Sequence[int], settings: Settings, group: Any) -> Any:
    """The bucket of rows that may share one. group: processes that have the same gradients, or None."""
    first: Any = rows[0].param
    if not groups_of(first):
        return Bucket(rows, numbers, settings) if group is None else SharedBucket(rows, numbers, settings, group)
    spread = [p for p in first.placements if not p.is_replicate()]
    usual = len(spread) == 1 and type(spread[0]).__name__ == "Shard"
    return (ShardedBucket if usual else GatheredBucket)(rows, numbers, settings)


class Orthogonalizer:
    """The orthogonalization of one table. Gives every row its workspace, as its last state.

    group: processes that have the same params and gradients and share the work; None: this one does all of it.
    """

    def __init__(self, rows: Sequence[Row], groups: Sequence[Mapping[str, Any]], group: Any = None) -> None:
        members: dict[Any, list[int]] = {}
        for number, row in enumerate(rows):
            target, param = row.target, row.param
            spread = (param.shape, param.device_mesh, param.placements) if is_sharded(param) else None  # type: ignore[attr-defined]
            settings = Settings.of(groups[row.group_index])
            key = target.dtype == torch.float64, target.shape, target.stride(), spread, settings
            members.setdefault(key, []).append(number)
        self.buckets = [
            bucket_of([rows[number] for number in numbers], numbers, key[-1], group) for key, numbers in members.items()
        ]

    @torch.no_grad()
    def __call__(self, table: Table) -> None:
        """Orthogonalizes the workspaces of all tensors that this step updates, after the first walk."""
        assert table.sums is not None
        skips = table.tensor_scalars[:, SKIP]
        # On a GPU the host knows only which gradients are missing.
        present = (skips == 0 if table.device.type == "cpu" else table.grads != 0).tolist()
        norms = table.sums[:, UPDATE_SQUARES].sqrt().to(torch.bfloat16)
        for bucket in self.buckets:
            bucket.run(present, norms, skips)
