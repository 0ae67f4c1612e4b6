"""The origin of a result file: machine, software and commit."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from fused_optim.engine import modules

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("qhoptim", "torch-optimi", "flashoptim", "torchao", "bitsandbytes", "apex")


def git(*arguments: str) -> str | None:
    try:
        return subprocess.run(
            ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def commit() -> str:
    """$FUSED_OPTIM_COMMIT if it is set, for copies of the tree without .git. Otherwise the commit that is checked out,
    with "+changes" if tracked files outside bench/results differ from it."""
    if told := os.environ.get("FUSED_OPTIM_COMMIT"):
        return told
    name = git("rev-parse", "HEAD")
    if name is None:
        return "unknown"
    return name + ("+changes" if git("status", "--porcelain", "-uno", "--", ".", ":!bench/results") else "")


def cpu_name() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{cpu_name()}, {len(os.sched_getaffinity(0))} CPUs"


def folder_name(device: torch.device) -> str:
    """The folder under bench/results that holds this machine's figures."""
    return re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")


def describe(device: torch.device) -> dict[str, Any]:
    return {
        "command": shlex.join(["python", *sys.argv]),
        "date": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
        "commit": commit(),
        "device": device_name(device),
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "instruction_set": modules.instruction_set(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "cuda": torch.version.cuda,
        "driver": driver() if device.type == "cuda" else None,
        "peers": {name: version(name) for name in PACKAGES},
    }


def driver() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split("\n")[0]
    except (OSError, subprocess.CalledProcessError):
        return None
