"""Imports the package of another commit next to the current one: one process times both on the same memory."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from environment import ROOT, git


@contextmanager
def worktree(commit: str) -> Iterator[Path]:
    """Checks the commit out into a temporary folder, and yields the folder."""
    with TemporaryDirectory() as folder:
        tree = Path(folder, "tree")
        run(["git", "-C", str(ROOT), "worktree", "add", "--quiet", "--detach", str(tree), commit], ROOT)
        try:
            yield tree
        finally:
            run(["git", "-C", str(ROOT), "worktree", "remove", "--force", str(tree)], ROOT)


@contextmanager
def package_at(commit: str) -> Iterator[str]:
    """Builds the package of a commit and makes it importable under a separate name. Yields the name.

    Raises:
        ValueError: the commit does not exist.
        RuntimeError: the build fails; the message holds the compiler's output.
    """
    short = git("rev-parse", "--verify", "--quiet", "--short", f"{commit}^{{commit}}")
    if short is None:
        raise ValueError(f"--against must be a commit of this repository, but got {commit!r}; git log lists them")
    name = f"fused_optim_at_{short}"
    with TemporaryDirectory() as folder, worktree(short) as tree:
        build(tree, Path(folder, "build"), name)
        package = Path(folder, "build", "lib", "fused_optim").rename(Path(folder, name))
        shutil.copytree(tree / "fused_optim", package, dirs_exist_ok=True)
        if not (package / "triton_kernels").exists():
            shutil.copytree(tree / "triton_kernels", package / "triton_kernels")
        for file in package.rglob("*.py"):
            file.write_text(re.sub(r"\bfused_optim\b", name, file.read_text()))
        sys.path.append(folder)
        try:
            yield name
        finally:
            sys.path.remove(folder)


def build(tree: Path, out: Path, name: str) -> None:
    # Both packages register pybind11 classes of the same names. A separate ABI tag gives the other its own registry.
    # A quotation mark would not pass the shells and build files between here and the compiler.
    (tree / "csrc" / "abi.h").write_text(f'#define PYBIND11_BUILD_ABI "_{name}"\n')
    command = [sys.executable, "setup.py", "--quiet", "build_ext"]
    run(
        [*command, "--build-temp", str(out / "temp"), "--build-lib", str(out / "lib")],
        tree,
        FUSED_OPTIM_CPP="1",
        CFLAGS=f"{os.environ.get('CFLAGS', '')} -include {tree / 'csrc' / 'abi.h'}",
    )


def run(command: list[str], folder: Path, **environment: str) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env={**os.environ, **environment})
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{(done.stdout + done.stderr)[-3000:]}")
