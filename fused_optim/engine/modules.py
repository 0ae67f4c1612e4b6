"""The compiled modules: which of them there are, which fit this machine, and why not the others.

_cpu_baseline, _cpu_avx2, _cpu_avx512   the kernels for CPUs, the same sources for one instruction set each
_cuda, _cuda_emulated                   those for NVIDIA GPUs, and the same kernels in a loop on the CPU
_poll                                   the look at all tensors before each step, through DLPack
None of these is linked to torch or compiled with its headers, so they work with every torch from 2.10 on, and all but
_poll with older ones. One more may be there:
_poll_aten                              the same look with torch's headers: faster, and for one minor version of torch
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import os
import re
import sys
from pathlib import Path
from types import ModuleType

import torch

from .table import CHUNK, HYPER_WIDTH, RAW_WIDTH, ROW_WIDTH, SHARE

INSTRUCTION_SETS = ("baseline", "avx2", "avx512")  # from the narrowest on
LAYOUT = (CHUNK, SHARE, ROW_WIDTH, RAW_WIDTH, HYPER_WIDTH)
REINSTALL = "install fused_optim again (in its sources: pip install .)"
TORCH = ".".join(torch.__version__.split(".")[:2])


def _why_not_built(name: str) -> str:
    """Why there is no such module beside the Python files."""
    here = Path(__file__).parents[1]
    others = [Path(entry or ".", here.name).resolve() for entry in sys.path]
    for other in dict.fromkeys(others):
        if other != here.resolve() and any(other.glob(f"{name}.*")):
            return (
                f"Python has imported the sources in {here}, where nothing is built, and not the installed package in "
                f"{other}; start it in another folder, or install the sources themselves: pip install -e ."
            )
    try:
        record = json.loads((here / "_build.json").read_text())
    except FileNotFoundError:
        return (
            f"nothing is compiled beside these Python files ({here}): they are a pure Python installation "
            "(FUSED_OPTIM_CPP=0) or sources that were never installed; install with a C++ compiler: pip install ."
        )
    return record["missing"].get(name) or f"{name} is missing in {here}; {REINSTALL}"


def _built_for() -> str | None:
    """The torch, "major.minor", whose headers _poll_aten was compiled with. It reads tensors as these lay them out, so
    the file is looked at before it is loaded."""
    spec = importlib.util.find_spec("fused_optim._poll_aten")
    if spec is None or spec.origin is None:
        return None
    found = re.search(rb"built for torch (\d+\.\d+)\.", Path(spec.origin).read_bytes())
    return found[1].decode() if found else "unknown"


@functools.cache
def load(name: str) -> ModuleType | str:
    """The module, or why there is none."""
    from .. import __version__  # which is there once the package has been imported

    if name == "_poll_aten" and (built_for := _built_for()) not in (None, TORCH):
        return f"{_TITLES[name]} was built for torch {built_for}, and this is torch {torch.__version__}; {REINSTALL}"
    try:
        module = importlib.import_module(f"fused_optim.{name}")
    except ModuleNotFoundError:
        return f"{_TITLES[name]} is not built: {_why_not_built(name)}"
    except ImportError as error:
        return f"{_TITLES[name]} does not load ({error}); {REINSTALL}"
    built = getattr(module, "VERSION", "unknown")
    if built != __version__:
        return f"{_TITLES[name]} is of fused_optim {built}, and the Python files are of {__version__}; {REINSTALL}"
    if module.LAYOUT != LAYOUT:
        return f"{_TITLES[name]} and the Python files have different tables, {module.LAYOUT} and {LAYOUT}; {REINSTALL}"
    return module


_TITLES = {f"_cpu_{name}": f"the C++ kernel for {name}" for name in INSTRUCTION_SETS} | {
    "_cuda": "the CUDA kernel",
    "_cuda_emulated": "the CUDA kernel for CPUs",
    "_poll": "the compiled look at the tensors",
    "_poll_aten": "the look at the tensors with torch's headers",
}

NAMES = tuple(_TITLES)


def instruction_sets() -> list[str]:
    """Those that this processor has, as torch finds it, down to baseline; FUSED_OPTIM_ISA leaves out what is wider.

    Raises:
        ValueError: FUSED_OPTIM_ISA is none of them.
    """
    widest = os.environ.get("FUSED_OPTIM_ISA") or INSTRUCTION_SETS[-1]
    if widest not in INSTRUCTION_SETS:
        raise ValueError(f"FUSED_OPTIM_ISA must be {', '.join(INSTRUCTION_SETS)} or unset, but is {widest!r}")
    found = torch.backends.cpu.get_cpu_capability().lower()
    level = max((level for level, name in enumerate(INSTRUCTION_SETS) if found.startswith(name)), default=0)
    return list(reversed(INSTRUCTION_SETS[: min(level, INSTRUCTION_SETS.index(widest)) + 1]))


@functools.cache
def cpu() -> ModuleType | str:
    """The kernels for the widest instruction set that this processor has and that is built, or why there are none."""
    try:
        modules = [load(f"_cpu_{name}") for name in instruction_sets()]
    except ValueError as error:
        return str(error)
    return next((module for module in modules if isinstance(module, ModuleType)), modules[0])


def instruction_set() -> str | None:
    """The one that the C++ kernel uses; None where it is not built."""
    module = cpu()
    return None if isinstance(module, str) else module.__name__.rpartition("_")[2]


@functools.cache
def poll() -> ModuleType | str:
    """The fastest look at the tensors that works with this torch, or why Python must look."""
    if isinstance(fastest := load("_poll_aten"), ModuleType):
        return fastest
    module = load("_poll")
    if isinstance(module, str):
        return module
    if not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
        return f"the compiled look at the tensors needs torch 2.10 or newer, and this is torch {torch.__version__}"
    try:
        module.check()
    except Exception as error:
        return f"the compiled look at the tensors does not know torch {torch.__version__} ({error})"
    return module


def look() -> str:
    """What poll() has found, in words."""
    if isinstance(module := poll(), str):
        return f"in Python, because {module}"
    return "compiled with torch's headers" if module.__name__.endswith("_aten") else "compiled, through DLPack"


def built(module: ModuleType | str) -> ModuleType:
    """The module. Raises RuntimeError with the reason where there is none."""
    if isinstance(module, str):
        raise RuntimeError(module)
    return module
