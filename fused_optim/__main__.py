"""`python -m fused_optim`: which backends work on this machine, and why not the others."""

from __future__ import annotations

import importlib.metadata
import platform

import torch

from . import __version__, backends


def version_of(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def devices() -> str:
    if not torch.cuda.is_available():
        return "CPU only"
    return ", ".join(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))


def main() -> None:
    extension = backends.extension()
    facts = {
        "fused_optim": __version__,
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "torch": f"{torch.__version__} (CUDA {torch.version.cuda or 'none'}, HIP {torch.version.hip or 'none'})",
        "triton": version_of("triton"),
        "devices": devices(),
        "instruction set": "extension not built" if isinstance(extension, str) else extension.instruction_set(),
        "threads": str(torch.get_num_threads()),
    }
    facts |= {f"backend {name}": reason or "ok" for name, reason in backends.available().items()}
    width = max(map(len, facts))
    for name, value in facts.items():
        print(f"{name:{width}}  {value}")
    for kind in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        print(f"{'auto on ' + kind:{width}}  {backends.pick('auto', torch.device(kind)).name}")


if __name__ == "__main__":
    main()
