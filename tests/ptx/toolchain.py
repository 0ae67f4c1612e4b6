"""Compiles code for the interpreter with gcc and nvcc. The output is cached in build/ptx by a hash of its inputs."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path

from commands import ROOT, SETUP

NATIVE = Path(__file__).parent / "native"
BUILT = ROOT / "build" / "ptx"
ARCH = 90


def missing(*tools: str) -> str | None:
    """The reason why code cannot be compiled here, or None."""
    for tool in tools:
        found = SETUP["nvcc"]() if tool == "nvcc" else shutil.which(tool)
        if found is None:
            return f"{tool} is not installed, so the compiled kernels cannot be run without a GPU"
    return None


def made(parts: list[str | bytes], make: Callable[[Path], None]) -> Path:
    """A folder that `make` has filled. parts: everything that its content depends on. Equal parts give the same folder.
    If several processes need it, one makes it and the others wait."""
    digest = hashlib.sha256(b"\0".join(part.encode() if isinstance(part, str) else part for part in parts))
    folder = BUILT / digest.hexdigest()[:16]
    BUILT.mkdir(parents=True, exist_ok=True)
    with open(BUILT / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            unfinished = folder.with_suffix(f".{os.getpid()}")
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()
            make(unfinished)
            unfinished.rename(folder)
    return folder


def run(command: list[str], folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}")


@cache
def library(source: str, name: str, mode: int = ctypes.RTLD_LOCAL) -> ctypes.CDLL:
    """native/`source`, compiled to a shared library with this file name."""
    path = NATIVE / source
    command = ["gcc", "-O2", "-std=c11", "-Wall", "-Werror", "-ffp-contract=off", "-fPIC", "-shared"]
    command += [f"-Wl,-soname,{name}", "-o", name, str(path), "-lm"]
    folder = made([*command[:-2], path.read_bytes()], lambda folder: run(command, folder))
    return ctypes.CDLL(str(folder / name), mode)


@cache
def compiled_step() -> tuple[str, Path]:
    """Compiles csrc/cuda/step.cu with nvcc. Returns the PTX of its kernels, and the library with the host code that
    launches them."""
    compiler, source = SETUP["nvcc"](), ROOT / "csrc/cuda/step.cu"
    command = [compiler, *SETUP["CUDA_FLAGS"], f"-gencode=arch=compute_{ARCH},code=compute_{ARCH}"]
    command += ["--cudart", "none", "--shared", "--keep", "--keep-dir", ".", "-o", "step.so", str(source)]
    headers = sorted([*ROOT.glob("csrc/*.h"), *ROOT.glob("csrc/cuda/*")])
    version = subprocess.run([compiler, "--version"], capture_output=True).stdout

    def make(folder: Path) -> None:
        run(command, folder)
        for path in folder.iterdir():  # deletes nvcc's other intermediate files
            if path.name not in ("step.so", "step.ptx"):
                path.unlink()

    folder = made([*command, version, *(path.read_bytes() for path in headers)], make)
    return (folder / "step.ptx").read_text(), folder / "step.so"
