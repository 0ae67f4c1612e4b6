"""The backends: which there are, which work here, and how each takes a table.

"triton"     GPUs; CPU tensors too when TRITON_INTERPRET=1 was set before the import of Triton
"cuda"       NVIDIA GPUs, where the CUDA module was built; CPU tensors too when FUSED_OPTIM_CUDA_EMULATE=1 (the kernel's
             body in a loop)
"cpp"        CPU tensors, where the modules for CPUs were built
"reference"  plain PyTorch, any device; it waits for the device at every step
"auto"       the first of these that works: on GPUs "triton", "cuda", "reference"; on CPUs "cpp", "reference". What is
             passed over is named in a warning, once, with the reason
"""

from __future__ import annotations

import functools
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..engine import machine, modules
from ..engine.table import Table
from . import reference
from .device_tables import DeviceTable


def interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def emulated() -> bool:
    return os.environ.get("FUSED_OPTIM_CUDA_EMULATE") == "1"


def _why_not_triton(device: torch.device | None) -> str | None:
    if (reason := machine.why_not_triton()) is not None:
        return reason
    if interpreted() and (device is None or device.type == "cpu"):
        return None
    if device is not None and device.type == "cpu":
        return "Triton runs CPU tensors only under TRITON_INTERPRET=1"
    if device is not None and device.type != "cuda":
        return f"Triton kernels run on CUDA and ROCm devices, not on {device.type}"
    return machine.why_no_gpu() or machine.why_not_compiled_by_triton()


def _why_not_cuda(device: torch.device | None) -> str | None:
    module = modules.load("_cuda_emulated" if emulated() else "_cuda")
    if isinstance(module, str):
        return module
    if emulated():
        return None if device is None or device.type == "cpu" else "FUSED_OPTIM_CUDA_EMULATE=1 is for CPU tensors"
    if device is not None and device.type != "cuda":
        return f"the CUDA kernel runs on CUDA devices, not on {device.type}"
    if (reason := machine.why_no_gpu()) is not None:
        return reason
    if torch.version.cuda is None:
        return "the CUDA kernel runs on NVIDIA GPUs, and this torch is built for ROCm; use Triton"
    return None


def _why_not_cpp(device: torch.device | None) -> str | None:
    module = modules.cpu()
    if isinstance(module, str):
        return module
    if device is not None and device.type != "cpu":
        return f"the C++ kernel runs on the CPU, not on {device.type}"
    return None


def _why_not_reference(device: torch.device | None) -> str | None:
    return None


@dataclass(frozen=True)
class Scaling:
    """What comes anew with each step, a number each on the table's device: float32 grad_scale and found_inf, and
    float64 `squares`, the sum of the squares of all gradients, where they are to be clipped."""

    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None
    squares: Tensor | None = None


def _upload(table: Table, moved: int) -> None:
    if table.device.type == "cuda":
        with torch.cuda.device(table.device):
            DeviceTable.of(table).update(moved)


def _nothing_to_upload(table: Table, moved: int) -> None:
    pass


def _arrays(table: Table) -> tuple[Tensor | None, ...]:
    return table.arrays if table.device.type == "cpu" else DeviceTable.of(table).arrays


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _native(table: Table, module: ModuleType) -> Any:
    """The table's arrays as the module takes them: by their addresses. The arrays live as long as the table does."""
    if table.native is None:
        addresses = [_address(array) for array in _arrays(table)]
        table.native = module.Arrays(addresses, table.desc.numel(), len(table.rows_list), table.elements, table.ema)
    return table.native


def _call(table: Table, module: ModuleType, function: str, before: Sequence[Any], after: Sequence[Any]) -> None:
    """The module's function of that name. before: what comes before the table's arrays; after: what comes after them,
    tensors and None by their addresses."""
    getattr(module, function)(*before, _native(table, module), *after)


def _triton(table: Table, function: str, args: Sequence[Any], *more: Any) -> None:
    """launch's function of that name. args: what comes before the table's arrays; more: what comes after them."""
    from ..triton_kernels import launch

    with nullcontext() if table.device.type == "cpu" else torch.cuda.device(table.device):
        getattr(launch, function)(*args, launch.Arrays(*_arrays(table)), *more)


def _step_triton(table: Table, scaling: Scaling) -> None:
    numbers = scaling.grad_scale, scaling.found_inf, scaling.squares
    _triton(table, "launch", (table.rule.name, table.kinds), *numbers, table.ema)


def _move_triton(table: Table) -> None:
    _triton(table, "launch_move", (table.rule.name, table.kinds), table.ema)


def _squares_triton(table: Table, out: Tensor) -> None:
    _triton(table, "launch_squares", (table.kinds,), out)


def _cuda(table: Table, function: str, before: Sequence[Any], *numbers: Tensor | None) -> None:
    addresses = [_address(number) for number in numbers]
    if table.device.type == "cpu":
        _call(table, modules.built(modules.load("_cuda_emulated")), function, before, addresses)
        return
    with torch.cuda.device(table.device):
        stream, index = torch.cuda.current_stream().cuda_stream, torch.cuda.current_device()
        _call(table, modules.built(modules.load("_cuda")), function, before, (*addresses, stream, index))


def _step_cuda(table: Table, scaling: Scaling) -> None:
    _cuda(table, "step", (table.rule.name,), scaling.grad_scale, scaling.found_inf, scaling.squares)


def _move_cuda(table: Table) -> None:
    _cuda(table, "move", (table.rule.name,))


def _squares_cuda(table: Table, out: Tensor) -> None:
    _cuda(table, "squares", (), out)


def _scale_triton(table: Table, squares: Tensor) -> None:
    _triton(table, "launch_scale", (table.kinds,), squares)


def _scale_cuda(table: Table, squares: Tensor) -> None:
    _cuda(table, "scale", (), squares)


def _cpp(table: Table, function: str, before: Sequence[Any], *numbers: Tensor | None) -> None:
    after = (*(_address(number) for number in numbers), torch.get_num_threads())
    _call(table, modules.built(modules.cpu()), function, before, after)


def _scale_cpp(table: Table, squares: Tensor) -> None:
    _cpp(table, "scale", (), squares)


def _step_cpp(table: Table, scaling: Scaling) -> None:
    _cpp(table, "step", (table.rule.name,), scaling.grad_scale, scaling.found_inf, scaling.squares)


def _move_cpp(table: Table) -> None:
    _cpp(table, "move", (table.rule.name,))


def _squares_cpp(table: Table, out: Tensor) -> None:
    _cpp(table, "squares", (), out)


def _step_reference(table: Table, scaling: Scaling) -> None:
    reference.step(table, scaling.grad_scale, scaling.found_inf, scaling.squares)


@dataclass(frozen=True)
class Backend:
    """One way to walk a table.

    why_not(device): None where it can run that device's tensors (None: any device at all), else the reason.
    upload(table, moved): brings over what has changed since the last step (see watch).
    squares(table, out): writes the sum of the squares of all gradients that are clipped; float64, one element.
    step(table, scaling): the whole step of one device; of a rule with a trust ratio the first walk.
    move(table): its second walk.
    scale(table, squares): multiplies every gradient in place by what clips its group to its bound, given the sum of the
        squares; leaves those alone that stay as they are.
    """

    name: str
    why_not: Callable[[torch.device | None], str | None]
    upload: Callable[[Table, int], None]
    squares: Callable[[Table, Tensor], None]
    step: Callable[[Table, Scaling], None]
    move: Callable[[Table], None]
    scale: Callable[[Table, Tensor], None]


BACKENDS = {
    backend.name: backend
    for backend in (
        Backend("triton", _why_not_triton, _upload, _squares_triton, _step_triton, _move_triton, _scale_triton),
        Backend("cuda", _why_not_cuda, _upload, _squares_cuda, _step_cuda, _move_cuda, _scale_cuda),
        Backend("cpp", _why_not_cpp, _nothing_to_upload, _squares_cpp, _step_cpp, _move_cpp, _scale_cpp),
        Backend(
            "reference",
            _why_not_reference,
            _nothing_to_upload,
            reference.squares,
            _step_reference,
            reference.move,
            reference.scale,
        ),
    )
}


# "auto" tries them in this order.
ORDER = {"cuda": ("triton", "cuda"), "cpu": ("cpp",)}
# Why a backend failed on a device although why_not had nothing against it (see trial.py).
FAILED: dict[tuple[str, torch.device], str] = {}


def available() -> dict[str, str | None]:
    """Every backend's name, with None where it works here, or the reason why not."""
    return {name: backend.why_not(None) for name, backend in BACKENDS.items()}


@functools.cache
def _warn(text: str) -> None:
    """Once per text, at the line that called this package or torch."""
    packages = Path(__file__).parents[1], Path(torch.__file__).parent
    inside = tuple(f"{package}{os.sep}" for package in packages)
    frame, level = sys._getframe(), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(inside):
        frame, level = frame.f_back, level + 1
    warnings.warn(text, stacklevel=level)


def check_name(name: str) -> None:
    """Raises ValueError where there is no backend of that name."""
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f'backend must be "auto" or one of {", ".join(BACKENDS)}, but got {name!r}')


def pick(name: str, device: torch.device) -> Backend:
    """The backend called `name` for that device; "auto" takes the first that works, and warns where that is not the
    first of all.

    Raises:
        ValueError: there is no backend of that name.
        RuntimeError: the named backend cannot run tensors of that device; says why.
    """
    if name == "auto":
        reasons: list[str] = []
        for candidate in ORDER.get(device.type, ()):
            reason = BACKENDS[candidate].why_not(device) or FAILED.get((candidate, device))
            if reason is None:
                if reasons:
                    because = "; ".join(reasons)
                    _warn(
                        f'fused_optim steps {device.type} tensors by backend="{candidate}", because {because}. '
                        f'backend="{candidate}" chooses it without this warning.'
                    )
                return BACKENDS[candidate]
            reasons.append(f"{candidate}: {reason.rstrip('.')}")
        if reasons:
            because = "; ".join(reasons)
            _warn(f"fused_optim steps {device.type} tensors in plain PyTorch, which is slow, because {because}.")
        return BACKENDS["reference"]
    check_name(name)
    if (reason := BACKENDS[name].why_not(device)) is not None:
        raise RuntimeError(f'backend="{name}" cannot step tensors on {device}: {reason}')
    return BACKENDS[name]
