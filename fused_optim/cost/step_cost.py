"""What a step of an optimizer costs on a given list of params: launches, bytes, memory, and the time these bytes take.

The numbers come from the optimizer itself, which is built on the meta device, with its states and tables and without
their memory. A model is a dict of meta tensors by name.
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
from .bandwidth_probe import floor_pass
from .shapes import Shapes

OPTIMIZERS: dict[str, Callable[..., FusedOptimizer]] = {
    name.removeprefix("Fused").lower(): getattr(fused_optim, name)
    for name in fused_optim.__all__
    if name.startswith("Fused") and name != "FusedOptimizer"
}
GROUPS = "one", "decay", "each"
MEASURED_BYTES = 128 << 20  # of each of the buffers that a bandwidth is measured on: more than caches hold


def on_meta(shapes: Shapes, dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: torch.empty(shape, dtype=dtype, device="meta") for name, shape in shapes.items()}


def param_groups(params: Mapping[str, Tensor], kind: str) -> list[dict[str, Any]]:
    """kind: "one"; "decay", where biases and all params of fewer than two dimensions have a group without decay; or
    "each", one per param."""
    if kind == "one":
        return [{"params": list(params.items())}]
    if kind == "each":
        return [{"params": [pair]} for pair in params.items()]
    exempt = {name for name, p in params.items() if p.ndim < 2 or "bias" in name.rpartition(".")[2].split("_")}
    decay = {"params": [pair for pair in params.items() if pair[0] not in exempt]}
    no_decay = {"params": [pair for pair in params.items() if pair[0] in exempt], "weight_decay": 0.0}
    return [group for group in (decay, no_decay) if group["params"]]


def takers(option: str) -> list[str]:
    """The optimizers whose groups have that option."""
    one = [Parameter(torch.empty(1, device="meta"))]
    return [name for name, build in OPTIMIZERS.items() if option in build(one).defaults]


def prepare(
    model: Mapping[str, Tensor], optimizer: str = "adamw", groups: str = "one", **options: Any
) -> FusedOptimizer:
    """The optimizer with states and tables, ready for a step of the model on the meta device.

    Args:
        model: at least one tensor by its name; shapes and dtypes count. Gradients have the dtypes of their params.
        optimizer: a key of OPTIMIZERS.
        groups: one of GROUPS.
        options: of the class; errors are its own.
    """
    params = {name: Parameter(torch.empty_like(tensor, device="meta")) for name, tensor in model.items()}
    for param in params.values():
        param.grad = torch.empty_like(param)
    made = OPTIMIZERS[optimizer](param_groups(params, groups), **options)
    made._rebuild()
    return made


@dataclass(frozen=True)
class TorchLaunch:
    """What fits into the arguments of one launch of torch's fused kernels, each of whose blocks takes 65,536 elements
    of one tensor.

    tensors: how many, where each has 1, 2, ... addresses (param, gradient, states). blocks: of all together.

    Source: ATen/native/cuda/MultiTensorApply.cuh.
    """

    title: str
    tensors: tuple[int, ...]
    blocks: int

    def count(self, sizes: Iterable[int], addresses: int) -> int:
        """Launches for tensors of so many elements each. The next one begins where this one's blocks are full, perhaps
        within a tensor, or with the last block of its last tensor."""
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
    """The lists of tensors that torch's fused step hands to its kernel one by one: of each group and dtype. None where
    torch has no fused kernel for that: it has only those of Adam, AdamW and SGD among ours, for states of their param's
    dtype that is not complex."""
    fused = any("fused" in inspect.signature(base).parameters for base in _torch_bases(optimizer))
    lists: dict[object, list[Row]] = {}
    for row in rows_of(optimizer):
        fused &= {state.dtype for state in row.states} <= {row.target.dtype} and not row.target.is_complex()
        lists.setdefault((row.group, row.target.dtype), []).append(row)
    return list(lists.values()) if fused else None


def _torch_bases(optimizer: FusedOptimizer) -> list[type]:
    return [base for base in type(optimizer).__bases__ if base.__module__.startswith("torch.optim.")]


def rows_of(optimizer: FusedOptimizer) -> list[Row]:
    return [row for bound in optimizer._tables for row in bound.table.rows_list]


@dataclass(frozen=True)
class Cost:
    """Of one step of one device.

    params, grads, states, tables: bytes that lie there all the time; states with the counts of steps, and with the
        average of the weights where there is one. moved: bytes that
        a step reads or writes, each operand of each walk once.
    clips: gradients are read once more, for their norm.
    launches: kernels of a step on a GPU. loops: parallel loops of a step on the CPU.
    torch_launches: torch's fused update, and the counting of its steps, by TorchLaunch.title. torch_loops: its fused
        update on the CPU. None where it has none.
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
    steps = sum(row.step.nbytes for row in rows)
    average = sum(row.ema.nbytes for row in rows if row.ema is not None)

    moved = grads + 2 * params + 2 * states + 2 * average
    if trust:  # one walk for states and norms, a second one that makes the update anew from the states
        moved += params + states
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
        states=states + steps + average,
        tables=sum(_table_bytes(bound.table) for bound in optimizer._tables),
        moved=moved,
        clips=clips,
        # Norm of the gradients: partial sums, their sum. Prep, update. Trust: sums by tensor, ratios, second walk.
        launches=2 * clips + 2 + 3 * trust,
        loops=clips + 1 + trust,
        torch_launches=torch_launches,
        torch_loops=None if lists is None else len(rows),
    )


def _table_bytes(table: Any) -> int:
    return sum(array.nbytes for array in table.arrays if array is not None)


# ---- bandwidth


def bandwidth(device: torch.device, seconds: float = 0.5, size: int = MEASURED_BYTES) -> tuple[float, str]:
    """Bytes per second that a pass without arithmetic reads and writes, the median over so many seconds, and how it was
    measured.

    Raises:
        torch.OutOfMemoryError, RuntimeError: there is no memory for it, four buffers of `size` bytes.
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
    return "a pass as AdamW's, without arithmetic", floor_pass([[a], [b], [c]], [[d]]), 7 * a.nbytes


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
