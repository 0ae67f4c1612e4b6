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
from pathlib import Path

import torch

from ..engine.backend import Backend
from .cpp import Cpp
from .cuda import Cuda
from .reference import Reference
from .triton import Triton

BACKENDS: dict[str, type[Backend]] = {kind.name: kind for kind in (Triton, Cuda, Cpp, Reference)}

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


def pick(name: str, device: torch.device) -> type[Backend]:
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
