"""The compiled modules: which ones work on this machine, and why the others do not.

_cpu_baseline, _cpu_avx2, _cpu_avx512   the kernels for CPUs: the same sources, compiled per instruction set
_cuda, _cuda_emulated                   the kernels for NVIDIA GPUs, and the same kernels in a loop on the CPU
_poll                                   the change detector, which reads tensors through DLPack
_poll_aten                              the change detector with torch's headers: faster, for one minor version of torch

Except for _poll_aten, no module is linked to torch or compiled with its headers. So these modules work with every
supported version of torch; _poll needs 2.10 or newer.
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

from .layout import difference

INSTRUCTION_SETS = ("baseline", "avx2", "avx512")  # the narrowest first
REINSTALL = "install fused_optim again (in its sources: pip install .)"
TORCH = ".".join(torch.__version__.split(".")[:2])


def _why_not_built(name: str) -> str:
    """Why the module does not exist beside the Python files."""
    here = Path(__file__).parents[1]
    others = [Path(entry or ".", here.name).resolve() for entry in sys.path]
    for other in dict.fromkeys(others):
        if other != here.resolve() and any(other.glob(f"{name}.*")):
            return (
                f"Python has imported the sources in {here}, where nothing is built, and not the installed package in "
                f"{other}; start Python in another folder, or install the sources: pip install -e ."
            )
    try:
        record = json.loads((here / "_build.json").read_text())
    except FileNotFoundError:
        return (
            f"nothing is compiled beside the Python files in {here}: this is a pure Python installation "
            "(FUSED_OPTIM_CPP=0), or the sources were never installed; install with a C++ compiler: pip install ."
        )
    return record["missing"].get(name) or f"{name} is missing in {here}; {REINSTALL}"


def _built_for() -> str | None:
    """The version of torch, "major.minor", whose headers _poll_aten was compiled with. The module reads tensors by
    their layout in this version, so the version is read from the file before the module is loaded."""
    spec = importlib.util.find_spec("fused_optim._poll_aten")
    if spec is None or spec.origin is None:
        return None
    found = re.search(rb"built for torch (\d+\.\d+)\.", Path(spec.origin).read_bytes())
    return found[1].decode() if found else "unknown"


@functools.cache
def load(name: str) -> ModuleType | str:
    """The module, or the reason why it cannot be used."""
    from .. import __version__  # not defined yet while the package is being imported

    if name == "_poll_aten" and (built_for := _built_for()) not in (None, TORCH):
        return f"{_TITLES[name]} was built for torch {built_for}, and this is torch {torch.__version__}; {REINSTALL}"
    try:
        module = importlib.import_module(f"fused_optim.{name}")
    except ModuleNotFoundError:
        return f"{_TITLES[name]} is not built: {_why_not_built(name)}"
    except ImportError as error:
        return f"{_TITLES[name]} does not load ({error}); {REINSTALL}"
    return why_stale(name, module, __version__) or module


def why_stale(name: str, module: ModuleType, version: str) -> str | None:
    """Why a built module does not belong to these Python files. None if it does."""
    if (built := getattr(module, "VERSION", "unknown")) != version:
        return f"{_TITLES[name]} is from fused_optim {built}, and the Python files are from {version}; {REINSTALL}"
    layout = getattr(module, "LAYOUT", {})
    if (other := difference(layout if isinstance(layout, dict) else {})) is not None:  # once it was a tuple
        return f"{_TITLES[name]} was built for another layout of the tables ({other}); {REINSTALL}"
    return None


def stale() -> dict[str, str]:
    """The modules that are built from another version or layout than that of these Python files, and the reasons."""
    reasons = {name: load(name) for name in NAMES if importlib.util.find_spec(f"fused_optim.{name}") is not None}
    return {name: reason for name, reason in reasons.items() if isinstance(reason, str)}


_TITLES = {f"_cpu_{name}": f"the C++ kernel for {name}" for name in INSTRUCTION_SETS} | {
    "_cuda": "the CUDA kernel",
    "_cuda_emulated": "the CUDA kernel for CPUs",
    "_poll": "the compiled change detector",
    "_poll_aten": "the change detector with torch's headers",
}

NAMES = tuple(_TITLES)


def instruction_sets() -> list[str]:
    """The instruction sets of this processor, as torch detects them, the widest first. FUSED_OPTIM_ISA leaves out wider
    ones.

    Raises:
        ValueError: FUSED_OPTIM_ISA is not the name of one.
    """
    widest = os.environ.get("FUSED_OPTIM_ISA") or INSTRUCTION_SETS[-1]
    if widest not in INSTRUCTION_SETS:
        raise ValueError(f"FUSED_OPTIM_ISA must be {', '.join(INSTRUCTION_SETS)} or unset, but is {widest!r}")
    found = torch.backends.cpu.get_cpu_capability().lower()
    level = max((level for level, name in enumerate(INSTRUCTION_SETS) if found.startswith(name)), default=0)
    return list(reversed(INSTRUCTION_SETS[: min(level, INSTRUCTION_SETS.index(widest)) + 1]))


@functools.cache
def cpu() -> ModuleType | str:
    """The kernels for the widest built instruction set of this processor, or the reason why there are none."""
    try:
        modules = [load(f"_cpu_{name}") for name in instruction_sets()]
    except ValueError as error:
        return str(error)
    return next((module for module in modules if isinstance(module, ModuleType)), modules[0])


def instruction_set() -> str | None:
    """The instruction set that the C++ kernel uses. None if it is not built."""
    module = cpu()
    return None if isinstance(module, str) else module.__name__.rpartition("_")[2]


@functools.cache
def poll() -> ModuleType | str:
    """The fastest compiled change detector that works with this torch, or the reason why there is none."""
    if isinstance(fastest := load("_poll_aten"), ModuleType):
        return fastest
    module = load("_poll")
    if isinstance(module, str):
        return module
    if not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
        return f"{_TITLES['_poll']} needs torch 2.10 or newer, and this is torch {torch.__version__}"
    try:
        module.check()
    except Exception as error:
        return f"{_TITLES['_poll']} does not support torch {torch.__version__} ({error})"
    return module


def poll_title() -> str:
    """Describes the change detector that is used."""
    if isinstance(module := poll(), str):
        return f"in Python, because {module}"
    return "compiled with torch's headers" if module.__name__.endswith("_aten") else "compiled, through DLPack"


def built(module: ModuleType | str) -> ModuleType:
    """The module. Raises RuntimeError with the reason if there is none."""
    if isinstance(module, str):
        raise RuntimeError(module)
    return module
