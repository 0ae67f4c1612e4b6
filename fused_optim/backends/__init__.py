"""The backends: their names, where each works, and the choice of "auto".

"triton"     GPUs. CPU tensors, too, if TRITON_INTERPRET=1 was set before Triton was imported.
"cuda"       NVIDIA GPUs, if the CUDA module is built. With FUSED_OPTIM_CUDA_EMULATE=1 CPU tensors instead: the kernel's
             body runs in a loop.
"cpp"        CPU tensors, if the CPU modules are built.
"reference"  Plain PyTorch on any device. Every step synchronizes with the device.
"auto"       The first that works: "triton", "cuda", "reference" on GPUs; "cpp", "reference" on CPUs. If it is not the
             first of the list, one warning names the others and the reasons.
"""

from __future__ import annotations

import functools
import os
import sys
import warnings
from pathlib import Path
from typing import Literal

import torch

from ..engine.backend import Backend
from .cpp import Cpp
from .cuda import Cuda
from .reference import Reference
from .triton import Triton

BackendName = Literal["auto", "triton", "cuda", "cpp", "reference"]
BACKENDS: dict[str, type[Backend]] = {kind.name: kind for kind in (Triton, Cuda, Cpp, Reference)}

# "auto" tries them in this order.
ORDER = {"cuda": ("triton", "cuda"), "cpu": ("cpp",)}
# The reasons of failed trial launches, on devices that why_not had accepted (see trial.py).
FAILED: dict[tuple[str, torch.device], str] = {}


def available() -> dict[str, str | None]:
    """The name of every backend, with None if it works on this machine, else the reason."""
    return {name: backend.why_not(None) for name, backend in BACKENDS.items()}


@functools.cache
def _warn(text: str) -> None:
    """Warns once per text. The warning points at the caller of this package or of torch."""
    packages = Path(__file__).parents[1], Path(torch.__file__).parent
    inside = tuple(f"{package}{os.sep}" for package in packages)
    frame, level = sys._getframe(), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(inside):
        frame, level = frame.f_back, level + 1
    warnings.warn(text, stacklevel=level)


def check_name(name: str) -> None:
    """Raises ValueError if there is no backend of that name."""
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f'backend must be "auto" or one of {", ".join(BACKENDS)}, but got {name!r}')


def pick(name: str, device: torch.device) -> type[Backend]:
    """The backend called `name` for a device. "auto" takes the first that works and warns if an earlier one does not.

    Raises:
        ValueError: there is no backend of that name.
        RuntimeError: the named backend cannot run tensors of that device. The message gives the reason.
    """
    if name == "auto":
        reasons: list[str] = []
        for candidate in ORDER.get(device.type, ()):
            reason = BACKENDS[candidate].why_not(device) or FAILED.get((candidate, device))
            if reason is None:
                if reasons:
                    because = "; ".join(reasons)
                    _warn(
                        f'fused_optim steps {device.type} tensors with backend="{candidate}", because {because}. '
                        f'Pass backend="{candidate}" to choose it without this warning.'
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
