"""Newton-Schulz orthogonalization of Muon's updates, between the two walks of its rule, for matrices that are whole on
this process.

The first walk leaves the update of each matrix in its workspace, and the sum of the squares of the update in `sums`.
Matrices of one shape and with one setting are a bucket. Their workspaces lie in one buffer, so that batched products
need no copy. The second walk reads the result from the workspace.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .dtensor import is_sharded, like, local, spread_as
from .layout import ALIGNMENT
from .table import Row

MOMENTS = "second_momentum_buffer"  # key of NorMuon's row moments in optimizer.state[param]
MOMENTS_EPS = 1e-8  # added to the root of the row moments
MOST_STEPS = 100

# A batch holds intermediate results of all its matrices, so a large bucket is done in parts of this many elements.
BATCH_ELEMENTS = 1 << 26
# On a CPU matrices of up to this many rows and columns are done in a batch, by one thread: a product of two of them
# takes longer to begin than to compute, and in each the threads wait for each other. All threads do larger ones, one
# matrix after the other.
CPU_BATCHED_SIDE = 128


class Settings(NamedTuple):
    """The options of a group that orthogonalization reads. beta2: of NorMuon's row moments; None without them."""

    coefficients: tuple[float, float, float]
    steps: int
    eps: float
    adjust_lr_fn: str | None
    beta2: float | None

    @classmethod
    def of(cls, group: Mapping[str, Any]) -> Settings:
        """Raises ValueError if an option is out of range. The wording is torch's where torch has the error."""
        coefficients, steps = tuple(group["ns_coefficients"]), group["ns_steps"]
        if steps >= MOST_STEPS:
            raise ValueError("Number of steps must be less than 100 for computational efficiency")
        if steps < 0:
            raise ValueError(f"ns_steps must be 0 or more, but is {steps}")
        if len(coefficients) != 3:
            raise ValueError("Coefficients must be a tuple of exactly 3 values")
        beta2 = float(group["normuon_beta2"]) if group["normuon"] else None
        return cls(coefficients, steps, float(group["eps"]), group["adjust_lr_fn"], beta2)

    def scale(self, rows: int, columns: int) -> float:
        """The factor of lr for a matrix."""
        if self.adjust_lr_fn is None or self.adjust_lr_fn == "original":
            return math.sqrt(max(1.0, rows / columns)) if columns else 1.0
        if self.adjust_lr_fn == "match_rms_adamw":
            return 0.2 * math.sqrt(max(rows, columns))
        return 1.0


@contextmanager
def one_thread(on: bool) -> Iterator[None]:
    """Context manager in which torch's CPU operators use one thread, if `on`."""
    threads = torch.get_num_threads()
    if not on or threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def newton_schulz(x: Tensor, settings: Settings, scale: float = 1.0) -> Tensor:
    """The orthogonalized matrices times `scale`, which costs nothing: the last product takes it as its factor.

    x: [rows, columns] or a batch [matrices, rows, columns], with rows <= columns and a norm of at most 1 each. The
    products and their order are those of torch.optim.Muon.
    """
    add_product = torch.addmm if x.dim() == 2 else torch.baddbmm
    a, b, c = settings.coefficients
    for step in range(settings.steps):
        factor = scale if step == settings.steps - 1 else 1.0
        gram = x @ x.mT
        polynomial = add_product(gram, gram, gram, beta=b, alpha=c)
        x = add_product(x, polynomial, x, beta=a * factor, alpha=factor)
    return x if settings.steps else x * scale


def row_moments(param: Tensor, group: Mapping[str, Any], state: Mapping[str, Any]) -> dict[str, Tensor]:
    """NorMuon's state of a param: the row moments, float32 [rows, 1], spread as the param. Empty without normuon.

    Raises:
        RuntimeError: `state` has row moments of another shape.
        ValueError: the param is spread otherwise than by whole rows.
    """
    if not group["normuon"]:
        return {}
    shape, old, shard = (param.shape[0], 1), state.get(MOMENTS), local(param)
    if is_sharded(param) and any(not p.is_replicate() and not p.is_shard(0) for p in param.placements):  # type: ignore[attr-defined]
        raise ValueError(
            f"normuon needs params that are sharded by rows (dimension 0), but one has placements {param.placements}; "  # type: ignore[attr-defined]
            "use normuon=False for its group"
        )
    if old is None:
        zeros = torch.zeros(shard.shape[0], 1, dtype=torch.float32, device=shard.device)
        return {MOMENTS: like(param, zeros, shape)}
    if old.shape != shape:
        raise RuntimeError(
            f'state "{MOMENTS}" of a param of shape {tuple(param.shape)} must have shape {shape}, but has '
            f"{tuple(old.shape)}; load a checkpoint of the same model"
        )
    return {MOMENTS: spread_as(param, old, f'state "{MOMENTS}"').to(shard.device, torch.float32)}


def row_factors(
    x: Tensor,
    moments: Sequence[Tensor],
    skips: Tensor,
    settings: Settings,
    scale: float,
    across: int,
    group: Any = None,
) -> Tensor:
    """NorMuon: `scale` times the factor of each row, which is 1 over the root of the running average of the row's mean
    square, and keeps the norm of the matrix. Updates the row moments, except those of skipped matrices.

    x: [matrices, rows, columns], or with rows and columns exchanged; across: the dimension of a row's elements.
    moments: [rows, 1] each. skips: bool [matrices]. group: the processes that hold other rows of the same matrices.

    Returns:
        A tensor of the shape of x, with 1 for `across`.
    """
    assert settings.beta2 is not None
    squares = x.square().mean(across)
    old = torch.stack([moment.view(-1) for moment in moments])
    new = torch.where(skips[:, None], old, old.lerp(squares, 1 - settings.beta2))
    torch._foreach_copy_(list(moments), [moment[:, None] for moment in new])
    factors = (new.sqrt() + MOMENTS_EPS).reciprocal()
    # All elements of a row have one factor, so the norms follow from the mean squares.
    norms = torch.stack([squares.sum(-1), (squares * factors.square()).sum(-1)])
    if group is not None:
        torch.distributed.all_reduce(norms, group=group)
    kept = (norms[0] / norms[1].clamp(min=MOMENTS_EPS)).sqrt()
    return (factors * (kept * scale)[:, None]).unsqueeze(across)


def workspace_dtype(param: Tensor) -> torch.dtype:
    """The dtype of a workspace: that of the iteration, unless the kernels' arithmetic is float64 throughout."""
    return torch.float64 if param.dtype == torch.float64 else torch.bfloat16


def memory_matrix(shape: Sequence[int], strides: Sequence[int]) -> tuple[int, int, bool] | None:
    """The matrix of a dense tensor as it lies in memory: its rows, its columns, and whether it is transposed. All
    dimensions after the first are one dimension of the matrix. None if the first dimension lies between others."""
    rows, columns = shape[0], math.prod(shape[1:])
    others = [stride for size, stride in zip(shape[1:], strides[1:], strict=True) if size != 1]
    if rows == 1 or not others or strides[0] >= max(others):
        return rows, columns, False
    return (columns, rows, True) if strides[0] <= min(others) else None


class Bucket:
    """Matrices that are orthogonalized together: their shape in memory, their settings and their dtype are equal.

    numbers: of their rows in the table; index: the same on the device. buffer: the workspaces, [places, elements and a
    gap]; there may be more places than matrices. wide: the workspaces as matrices with at most as many rows as columns,
    [matrices, rows, columns]. across: the dimension of `wide` along which the elements of one row of the param lie.
    moments: NorMuon's row moments. scale: of lr.
    """

    def __init__(self, rows: Sequence[Row], numbers: Sequence[int], settings: Settings, places: int = 0) -> None:
        first = rows[0].target
        shape = first.shape[0], math.prod(first.shape[1:])
        found = memory_matrix(first.shape, first.stride())
        if found is None:
            raise ValueError(
                f"a param of shape {tuple(first.shape)} and strides {first.stride()} cannot be flattened to a matrix "
                "in its memory, because its first dimension lies between others; use param.contiguous()"
            )
        height, width, transposed = found
        self.numbers, self.settings = list(numbers), settings
        self.scale = settings.scale(*shape)
        self.index = torch.tensor(self.numbers, device=first.device)
        gap = -first.numel() % (8 * ALIGNMENT)
        size = max(places, len(rows)), first.numel() + gap
        self.buffer = torch.zeros(size, dtype=workspace_dtype(first), device=first.device)
        for row, memory in zip(rows, self.buffer, strict=False):
            row.workspace = memory[: first.numel()].as_strided(row.target.shape, row.target.stride())
            row.states.append(row.workspace)
        batch = self.buffer[: len(rows), : first.numel()].view(len(rows), height, width)
        # As in torch.optim.Muon, a matrix of more rows than columns is transposed.
        tall = shape[0] > shape[1]
        self.wide = batch.mT if transposed != tall else batch
        self.across = -2 if tall else -1
        self.batched = first.device.type != "cpu" or max(shape) <= CPU_BATCHED_SIDE
        self.moments = [local(row.state[MOMENTS]) for row in rows] if settings.beta2 is not None else []

    def run(self, present: Sequence[bool], norms: Tensor, skips: Tensor) -> None:
        """Orthogonalizes the workspaces of the matrices that are present. Of others nothing is used.

        norms, skips: [rows of the table], on the device.
        """
        places = [place for place, number in enumerate(self.numbers) if present[number]]
        if places and self.wide.numel():
            self.iterate(places, norms)
            self.normalize(places, skips)

    def iterate(self, places: Sequence[int], norms: Tensor) -> None:
        """Replaces the updates at these places by orthogonalized ones."""
        norms = norms[self.index].clamp(min=self.settings.eps)
        scale = 1.0 if self.moments else self.scale
        if not self.batched:
            for place in places:
                x = self.wide[place].to(torch.bfloat16) / norms[place]
                self.wide[place] = newton_schulz(x, self.settings, scale).to(self.buffer.dtype)
            return
        with one_thread(self.buffer.device.type == "cpu"):
            for part in self.parts(places):
                x = self.wide[part].to(torch.bfloat16) / norms[part][:, None, None]
                self.wide[part] = newton_schulz(x, self.settings, scale).to(self.buffer.dtype)

    def normalize(self, places: Sequence[int], skips: Tensor) -> None:
        """NorMuon: multiplies the rows by their factors."""
        if not self.moments:
            return
        skips = skips[self.index] != 0
        for part in self.parts(places):
            x = self.wide[part].float()
            moments = self.moments[part] if isinstance(part, slice) else [self.moments[place] for place in part]
            x = x * row_factors(x, moments, skips[part], self.settings, self.scale, self.across)
            self.wide[part] = x.to(self.buffer.dtype)

    def parts(self, places: Sequence[int]) -> list[slice | list[int]]:
        """The places in parts that are computed as one batch. On a GPU all places between the first and the last one,
        because a list of places takes a copy of the matrices and, to the GPU, of the list."""
        size = max(1, BATCH_ELEMENTS // self.wide[0].numel())
        first, end = places[0], places[-1] + 1
        if self.buffer.device.type == "cpu" and end - first != len(places):
            return [list(places[begin : begin + size]) for begin in range(0, len(places), size)]
        return [slice(begin, min(begin + size, end)) for begin in range(first, end, size)]
