"""Newton-Schulz orthogonalization of Muon's updates, between the two walks of its rule.

The first walk leaves the update of each matrix in its workspace, and the sum of the squares of the update in `sums`.
Matrices of one shape and with one setting are a bucket. Their workspaces lie in one buffer, so that batched products
need no copy. The second walk reads the result from the workspace.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .dtensor import is_sharded
from .layout import ALIGNMENT, TensorScalars, column
from .table import Row, Table

SKIP = column(TensorScalars, "skip")
UPDATE_SQUARES = 1  # column of Table.sums
MOMENTS = "second_momentum_buffer"  # key of NorMuon's row moments in optimizer.state[param]
MOMENTS_EPS = 1e-8  # added to the root of the row moments
MOST_STEPS = 100

# A batch holds intermediate results of all its matrices, so a large bucket is done in parts of this many elements.
BATCH_ELEMENTS = 1 << 26
# On a CPU larger matrices are multiplied one by one, which is then faster: see docs/cpu.md.
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
    """NorMuon's state of a param: the row moments, float32 [rows, 1]. Empty without normuon.

    Raises:
        RuntimeError: `state` has row moments of another shape.
    """
    if not group["normuon"]:
        return {}
    shape, old = (param.shape[0], 1), state.get(MOMENTS)
    if old is None:
        return {MOMENTS: torch.zeros(shape, dtype=torch.float32, device=param.device)}
    if old.shape != shape:
        raise RuntimeError(
            f'state "{MOMENTS}" of a param of shape {tuple(param.shape)} must have shape {shape}, but has '
            f"{tuple(old.shape)}; load a checkpoint of the same model"
        )
    return {MOMENTS: old.to(param.device, torch.float32)}


def memory_matrix(shape: Sequence[int], strides: Sequence[int]) -> tuple[int, int, bool] | None:
    """The matrix of a dense tensor as it lies in memory: its rows, its columns, and whether it is transposed. Dimensions
    after the first are one dimension of the matrix. None if the first dimension lies between others."""
    rows, columns = shape[0], math.prod(shape[1:])
    others = [stride for size, stride in zip(shape[1:], strides[1:], strict=True) if size != 1]
    if rows == 1 or not others or strides[0] >= max(others):
        return rows, columns, False
    return (columns, rows, True) if strides[0] <= min(others) else None


class Bucket:
    """Matrices that are orthogonalized together: their shape in memory, their settings and their dtype are equal.

    numbers: of their rows in the table; index: the same on the device. buffer: the workspaces, [matrices, elements and
    a gap]. wide: the same as matrices with at most as many rows as columns, [matrices, rows, columns]. rows_last:
    whether the param's rows are the columns of `wide`. moments: NorMuon's row moments. scale: of lr.
    """

    def __init__(self, rows: Sequence[Row], numbers: Sequence[int], settings: Settings) -> None:
        first = rows[0].target
        shape = first.shape[0], math.prod(first.shape[1:])
        found = memory_matrix(first.shape, first.stride())
        if found is None:
            raise ValueError(
                f"a param of shape {tuple(first.shape)} and strides {first.stride()} cannot be flattened to a matrix in "
                "its memory, because its first dimension lies between others; use param.contiguous()"
            )
        height, width, transposed = found
        self.numbers, self.settings = list(numbers), settings
        self.scale = settings.scale(*shape)
        self.index = torch.tensor(self.numbers, device=first.device)
        dtype = torch.float64 if first.dtype == torch.float64 else torch.bfloat16
        gap = -first.numel() % (8 * ALIGNMENT)
        self.buffer = torch.zeros(len(rows), first.numel() + gap, dtype=dtype, device=first.device)
        for row, memory in zip(rows, self.buffer, strict=True):
            row.workspace = memory[: first.numel()].as_strided(row.target.shape, row.target.stride())
            row.states.append(row.workspace)
        batch = self.buffer[:, : first.numel()].view(len(rows), height, width)
        # As in torch.optim.Muon, a matrix of more rows than columns is transposed.
        self.rows_last = shape[0] > shape[1]
        self.wide = batch.mT if transposed != self.rows_last else batch
        self.batched = first.device.type != "cpu" or max(shape) <= CPU_BATCHED_SIDE
        self.moments = [row.state[MOMENTS] for row in rows] if settings.beta2 is not None else []

    def run(self, present: Sequence[bool], norms: Tensor, skips: Tensor) -> None:
        """Orthogonalizes the workspaces of the matrices that are present. Of others nothing is used.

        norms, skips: [rows of the table], on the device.
        """
        members = [place for place, number in enumerate(self.numbers) if present[number]]
        if not members or not self.wide.numel():
            return
        norms, skips = norms[self.index].clamp(min=self.settings.eps), skips[self.index] != 0
        if not self.batched:
            for place in members:
                self.orthogonalize(slice(place, place + 1), norms, skips)
        elif len(members) == len(self.numbers) or self.buffer.device.type != "cpu":
            # On a GPU absent matrices are computed, too: to leave them out would take copies.
            size = max(1, BATCH_ELEMENTS // self.wide[0].numel())
            for begin in range(0, len(self.numbers), size):
                self.orthogonalize(slice(begin, begin + size), norms, skips)
        else:
            self.orthogonalize(members, norms, skips)

    def orthogonalize(self, part: slice | list[int], norms: Tensor, skips: Tensor) -> None:
        """Replaces a part of the workspaces by the orthogonalized matrices, times the scale of lr."""
        x, norm = self.wide[part], norms[part]
        alone = len(x) == 1
        x = x[0].to(torch.bfloat16) / norm[0] if alone else x.to(torch.bfloat16) / norm[:, None, None]
        if not self.moments:
            self.wide[part] = newton_schulz(x, self.settings, self.scale)
            return
        x = newton_schulz(x, self.settings).float()
        self.wide[part] = x * self.row_factors(x.unsqueeze(0) if alone else x, part, skips[part])

    def row_factors(self, x: Tensor, part: slice | list[int], skips: Tensor) -> Tensor:
        """NorMuon: the factor of each row of the params, which is 1 over the root of the average of its mean squares,
        and keeps the norm of the matrix. Updates the row moments, except those of skipped tensors.

        x: [matrices, rows, columns].

        Returns:
            [matrices, rows, 1] or [matrices, 1, columns].
        """
        assert self.settings.beta2 is not None
        across = -2 if self.rows_last else -1
        squares = x.square().mean(across)
        chosen = self.moments[part] if isinstance(part, slice) else [self.moments[place] for place in part]
        moments = torch.stack([moment.view(-1) for moment in chosen])
        moments = torch.where(skips[:, None], moments, moments.lerp(squares, 1 - self.settings.beta2))
        torch._foreach_copy_(chosen, [moment[:, None] for moment in moments])
        factors = (moments.sqrt() + MOMENTS_EPS).reciprocal()
        # All elements of a row have one factor, so the norms follow from the mean squares.
        kept = (squares.sum(-1) / (squares * factors.square()).sum(-1).clamp(min=MOMENTS_EPS)).sqrt()
        return (factors * (kept * self.scale)[:, None]).unsqueeze(across)


class Orthogonalizer:
    """The orthogonalization of one table. Gives every row its workspace, as its last state."""

    def __init__(self, rows: Sequence[Row], groups: Sequence[Mapping[str, Any]]) -> None:
        members: dict[Any, list[int]] = {}
        for number, row in enumerate(rows):
            target = row.target
            settings = Settings.of(groups[row.group_index])
            key = target.dtype == torch.float64, target.shape, target.stride(), settings
            members.setdefault(key, []).append(number)
        self.buckets = [Bucket([rows[n] for n in numbers], numbers, key[-1]) for key, numbers in members.items()]

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
