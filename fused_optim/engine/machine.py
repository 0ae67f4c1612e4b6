"""Checks this machine for what the backends need. Each `why_...` returns None, or a sentence that says what is missing
and what to do."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shutil
import sysconfig
from pathlib import Path

import torch

OLDEST_TORCH, OLDEST_TRITON = (2, 8), (3, 5)
TRITON_PACKAGES = ("triton", "pytorch-triton", "pytorch-triton-rocm", "triton-windows")  # each has the module "triton"


def is_older(version: str, oldest: tuple[int, int]) -> bool:
    """Whether the version "major.minor..." is below `oldest`. A version that cannot be parsed counts as new enough."""
    found = re.match(r"(\d+)\.(\d+)", version)
    return found is not None and (int(found[1]), int(found[2])) < oldest


def why_not_torch() -> str | None:
    if is_older(torch.__version__, OLDEST_TORCH):
        return (
            f"fused_optim needs torch 2.8 or newer, but this is torch {torch.__version__}; pip install --upgrade torch"
        )
    return None


def why_no_gpu() -> str | None:
    if torch.cuda.is_available():
        return None
    if torch.version.cuda is None and torch.version.hip is None:
        return (
            "this torch is a CPU build, so it cannot use a GPU; on a machine with a GPU, install the build for its "
            "CUDA or ROCm (https://pytorch.org/get-started/locally)"
        )
    built_for = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}"
    tool, variable = ("nvidia-smi", "CUDA") if torch.version.cuda else ("rocm-smi", "HIP")
    return (
        f"torch is built for {built_for} but finds no GPU; check that {tool} lists one, that its driver is new enough "
        f"for {built_for}, and that {variable}_VISIBLE_DEVICES does not hide it"
    )


def triton_version() -> str | None:
    """The version of Triton. None if it is not installed, "unknown" if no package states its version."""
    if importlib.util.find_spec("triton") is None:
        return None
    for package in TRITON_PACKAGES:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "unknown"


def why_not_triton() -> str | None:
    """Checks the package alone. The kernels use constexpr_function and list comprehensions, which are new in 3.5."""
    version = triton_version()
    if version is None:
        return "Triton is not installed; pip install 'triton>=3.5' (CUDA builds of torch 2.9 and newer install it)"
    if is_older(version, OLDEST_TRITON):
        return (
            f"Triton {version} is too old: these kernels need 3.5 or newer; upgrade torch to 2.9 or newer, which "
            "installs it, or pip install 'triton>=3.5'"
        )
    return None


def why_not_compiled_by_triton() -> str | None:
    """Checks for a C compiler and Python.h. Before its first launch Triton builds a small Python module in C."""
    named = os.environ.get("CC")
    if named is not None and shutil.which(named) is None:
        return f"CC is {named!r}, which is not a compiler that Triton can run; correct CC or unset it"
    if named is None and not (shutil.which("gcc") or shutil.which("clang")):
        return (
            "there is no C compiler, which Triton needs before its first launch; install gcc or clang, or set CC to a "
            "compiler"
        )
    scheme = sysconfig.get_default_scheme()
    folder = sysconfig.get_path("include", "posix_prefix" if scheme == "posix_local" else scheme)
    if not Path(folder, "Python.h").is_file():
        return (
            f"there is no Python.h in {folder}, which Triton needs before its first launch; install the headers of "
            "this Python (the package python3-dev on Debian and Ubuntu)"
        )
    return None


if (_reason := why_not_torch()) is not None:  # raised before other files import what an older torch does not have
    raise ImportError(_reason)
