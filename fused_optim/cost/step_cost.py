"""The cost of one optimizer step on given params: launches, bytes moved, memory, and the time to move the bytes.

The optimizer is built on the meta device, so its states and tables exist without memory and can be counted. A model is
a dict of meta tensors by name.
"""

from __future__ import annotations

import inspect
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

import fused_optim

from ..engine import modules
from ..engine.table import Row
from ..optim.base import FusedOptimizer
from .bandwidth_probe import bandwidth_probe
from .shapes import Shapes

# Not FusedMuon: most of its step are matrix products, and it steps matrices alone.
OPTIMIZERS: dict[str, Callable[..., FusedOptimizer]] = {
    name.removeprefix("Fused").lower(): getattr(fused_optim, name)
    for name in fused_optim.__all__
    if name.startswith("Fused") and name not in ("FusedOptimizer", "FusedMuon")
}
GROUPS = "one", "decay", "each"
MEASURED_BYTES = 128 << 20  # bytes of each buffer of the bandwidth measurement: larger than the caches


def on_meta(shapes: Shapes, dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: torch.empty(shape, dtype=dtype, device="meta") for name, shape in shapes.items()}


def param_groups(params: Mapping[str, Tensor], kind: str) -> list[dict[str, Any]]:
    """The param groups of a model.

    kind: "one" group; "decay": a second group without decay for biases and params with fewer than two dimensions;
        "each": one group per param.
    """
    if kind == "one":
        return [{"params": list(params.items())}]
    if kind == "each":
        return [{"params": [pair]} for pair in params.items()]
    exempt = {name for name, p in params.items() if p.ndim < 2 or "bias" in name.rpartition(".")[2].split("_")}
    decay = {"params": [pair for pair in params.items() if pair[0] not in exempt]}
    no_decay = {"params": [pair for pair in params.items() if pair[0] in exempt], "weight_decay": 0.0}
    return [group for group in (decay, no_decay) if group["params"]]


def takers(option: str) -> list[str]:
    """The names of the optimizers whose groups have that option."""
    one = [Parameter(torch.empty(1, device="meta"))]
    return [name for name, build in OPTIMIZERS.items() if option in build(one).defaults]


def prepare(
    model: Mapping[str, Tensor], optimizer: str = "adamw", groups: str = "one", **options: Any
) -> FusedOptimizer:
    """An optimizer of the model on the meta device, with states and tables, ready for a step.

    Args:
        model: at least one tensor by name. Only shapes and dtypes matter. Gradients have the dtypes of their params.
        optimizer: a key of OPTIMIZERS.
        groups: one of GROUPS.
        options: keyword arguments of the optimizer's class, which raises its own errors.
    """
    params = {name: Parameter(torch.empty_like(tensor, device="meta")) for name, tensor in model.items()}
    for param in params.values():
        param.grad = torch.empty_like(param)
    made = OPTIMIZERS[optimizer](param_groups(params, groups), **options)
    made._rebuild()
    return made


@dataclass(frozen=True)
class TorchLaunch:
    """The limits of one launch of torch's fused kernels. A block takes 65,536 elements of one tensor.

    tensors: the most tensors in a launch, for 1, 2, ... addresses per tensor (param, gradient, states).
    blocks: the most blocks in a launch.

    Source: ATen/native/cuda/MultiTensorApply.cuh.
    """

    title: str
    tensors: tuple[int, ...]
    blocks: int

    def count(self, sizes: Iterable[int], addresses: int) -> int:
        """The number of launches for tensors of these numbers of elements. A launch ends when its blocks are used up,
        which can be inside a tensor, or with the last block of its last tensor."""
        done = tensors = blocks = 0
        for size in sizes:
            if size == 0:
                continue
            tensors += 1
            full, blocks = divmod(blocks - -size // 65536, self.blocks)
            if full:
                tensors = 1 if blocks else 0
            done += full
            if tensors == self.tensors[addresses - 1]:
                done, tensors, blocks = done + 1, 0, 0
        return done + (blocks > 0)


TORCH_LAUNCHES = (
    TorchLaunch("CUDA 13", (770, 448, 336, 252, 210), 2240),
    TorchLaunch("CUDA 12 or ROCm", (110, 64, 48, 36, 30), 320),
)


def torch_lists(optimizer: FusedOptimizer) -> list[list[Row]] | None:
    """The lists of tensors that torch's fused step passes to its kernel: one list per group and dtype. None if torch
    has no fused kernel for the step. Of the optimizers here torch has fused kernels for Adam, AdamW and SGD, if params
    are real, states have their param's dtype and there are no master weights."""
    fused = any("fused" in inspect.signature(base).parameters for base in _torch_bases(optimizer))
    lists: dict[object, list[Row]] = {}
    for row in rows_of(optimizer):
        narrow = row.low is None and {state.dtype for state in row.states} <= {row.target.dtype}
        fused &= narrow and not row.target.is_complex()
        lists.setdefault((row.group_index, row.target.dtype), []).append(row)
    return list(lists.values()) if fused else None


def _torch_bases(optimizer: FusedOptimizer) -> list[type]:
    return [base for base in type(optimizer).__bases__ if base.__module__.startswith("torch.optim.")]


def rows_of(optimizer: FusedOptimizer) -> list[Row]:
    return [row for bound in optimizer._tables for row in bound.table.rows_list]


@dataclass(frozen=True)
class Cost:
    """The cost of one step on one device.

    params, grads, states, tables: bytes in memory. states includes lower halves of master weights, step counts,
        running scalars and averages of the weights.
    moved: bytes that a step reads or writes; each operand of each walk counts once.
    clips: whether gradients are read a second time, for their norm.
    launches: kernel launches of a step on a GPU.
    loops: parallel loops of a step on the CPU.
    torch_launches: launches of torch's fused update and of its step counts, by TorchLaunch.title. None if torch has no
        fused kernel.
    torch_loops: parallel loops of torch's fused update on the CPU. None if torch has no fused kernel.
    """

    tensors: int
    elements: int
    groups: int
    params: int
    grads: int
    states: int
    tables: int
    moved: int
    clips: bool
    launches: int
    loops: int
    torch_launches: dict[str, tuple[int, int]] | None
    torch_loops: int | None


def cost_of(optimizer: FusedOptimizer) -> Cost:
    rows, trust, clips = rows_of(optimizer), optimizer.rule.trust, optimizer._looks
    params = sum(row.target.nbytes for row in rows)
    grads = sum(row.target.numel() * row.grad_dtype.itemsize for row in rows)
    states = sum(state.nbytes for row in rows for state in row.states)
    scalars = sum(scalar.nbytes for row in rows for scalar in (row.step, *row.running))
    lower = sum(row.low.nbytes for row in rows if row.low is not None)
    average = sum(row.ema.nbytes for row in rows if row.ema is not None)

    moved = grads + 2 * params + 2 * lower + 2 * states + 2 * average
    if trust:  # the second walk reads params and states again and recomputes the update
        moved += params + lower + states
    if clips:
        moved += grads

    lists = torch_lists(optimizer)
    torch_launches = None
    if lists is not None:
        torch_launches = {
            kernel.title: (
                sum(kernel.count([r.target.numel() for r in part], 2 + len(part[0].states)) for part in lists),
                sum(kernel.count([1] * len(part), 1) for part in lists) if optimizer.rule.counted else 0,
            )
            for kernel in TORCH_LAUNCHES
        }
    return Cost(
        tensors=len(rows),
        elements=sum(row.target.numel() for row in rows),
        groups=len(optimizer.param_groups),
        params=params,
        grads=grads,
        states=states + lower + scalars + average,
        tables=sum(_table_bytes(bound.table) for bound in optimizer._tables),
        moved=moved,
        clips=clips,
        # Norm of the gradients: partial sums, their sum. Prep, update. Trust: sums per tensor, ratios, second walk.
        launches=2 * clips + 2 + 3 * trust,
        loops=clips + 1 + trust,
        torch_launches=torch_launches,
        torch_loops=None if lists is None else len(rows),
    )


def _table_bytes(table: Any) -> int:
    return sum(array.nbytes for array in table.arrays if array is not None)


# ---- bandwidth


def bandwidth(device: torch.device, seconds: float = 0.5, size: int = MEASURED_BYTES) -> tuple[float, str]:
    """The bandwidth of a pass without arithmetic in bytes per second, and the name of the pass. Bytes read and bytes
    written both count. The median of the runs within `seconds`, at least three.

    Raises:
        torch.OutOfMemoryError, RuntimeError: there is not enough memory for four buffers of `size` bytes.
    """
    how, run, moved = _pass_over(device, size)
    time_of = _on_gpu if device.type == "cuda" else _on_cpu
    time_of(run)
    samples: list[float] = []
    begin = time.perf_counter()
    while len(samples) < 3 or time.perf_counter() - begin < seconds:
        samples.append(time_of(run))
    return moved / statistics.median(samples), how


def _pass_over(device: torch.device, size: int) -> tuple[str, Callable[[], Any], int]:
    a, b, c, d = (torch.ones(size // 4, device=device) for _ in range(4))
    if device.type == "cuda":
        return "a copy within the device", lambda: a.copy_(b), 2 * a.nbytes
    if isinstance(modules.cpu(), str):
        return "torch's a.add_(b)", lambda: a.add_(b), 3 * a.nbytes
    return "AdamW's reads and writes, without arithmetic", bandwidth_probe([[a], [b], [c]], [[d]]), 7 * a.nbytes


def _on_cpu(run: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def _on_gpu(run: Callable[[], Any]) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    run()
    end.record()
    end.synchronize()
    return 1e-3 * float(begin.elapsed_time(end))
