"""Machines on which something is missing: each case has a message that says what to do."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import sysconfig
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from commands import SETUP
from test_errors import SENTENCE

from fused_optim import __main__ as cli
from fused_optim import backends
from fused_optim.engine import machine

GPU = torch.device("cuda", 0)


@pytest.fixture
def healthy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Simulates a machine with a GPU and everything that Triton needs. Returns the only folder in PATH."""
    for name in ("gcc", "clang", "nvcc"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setenv("FUSED_OPTIM_CUDA_EMULATE", "0")
    for variable in ("CC", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(variable, raising=False)
    (tmp_path / "Python.h").write_text("")
    monkeypatch.setattr(sysconfig, "get_path", lambda *_: str(tmp_path))
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name == "triton" else find(name))
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "3.5.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    return tmp_path


def reason(name: str = "triton") -> str | None:
    return backends.BACKENDS[name].why_not(GPU)


def test_nothing_is_missing(healthy: Path) -> None:
    assert reason() is None
    (healthy / "gcc").unlink()
    assert reason() is None, "clang is enough"


@pytest.mark.parametrize(
    ("version", "works"),
    [("3.4.0", False), ("2.3.1+git", False), ("3.5.0", True), ("3.10.1", True), ("4.0", True), ("unknown", True)],
)
def test_triton_is_too_old(healthy: Path, monkeypatch: pytest.MonkeyPatch, version: str, works: bool) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    found = reason()
    assert (found is None) == works
    if found is not None:
        assert f"Triton {version} is too old" in found and "pip install 'triton>=3.5'" in found


def test_triton_has_several_names(healthy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name != "pytorch-triton-rocm":
            raise importlib.metadata.PackageNotFoundError
        return "3.4.0"

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert "Triton 3.4.0 is too old" in str(reason())


def test_triton_is_missing(healthy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install 'triton>=3.5'" in str(reason())


def test_there_is_no_c_compiler(healthy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (healthy / "gcc").unlink()
    (healthy / "clang").unlink()
    assert "install gcc or clang" in str(reason())
    monkeypatch.setenv("CC", str(healthy / "nvcc"))
    assert reason() is None
    monkeypatch.setenv("CC", "no-such-compiler")
    assert "correct CC" in str(reason())


def test_there_is_no_python_header(healthy: Path) -> None:
    (healthy / "Python.h").unlink()
    assert "python3-dev" in str(reason()) and str(healthy) in str(reason())


@pytest.mark.parametrize("name", ["triton", "cuda"])
@pytest.mark.parametrize(
    ("cuda", "hip", "words"),
    [
        (None, None, ("is a CPU build", "https://pytorch.org/get-started/locally")),
        ("12.8", None, ("built for CUDA 12.8 but finds no GPU", "nvidia-smi", "CUDA_VISIBLE_DEVICES")),
        (None, "6.4", ("built for ROCm 6.4 but finds no GPU", "rocm-smi", "HIP_VISIBLE_DEVICES")),
    ],
)
def test_there_is_no_gpu(
    healthy: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    cuda: str | None,
    hip: str | None,
    words: tuple[str, ...],
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.version, "hip", hip)
    for device in (None, GPU):
        found = str(backends.BACKENDS[name].why_not(device))
        assert "not built" in found or all(word in found for word in words)
    assert all(word in str(machine.why_no_gpu()) for word in words)


def test_there_is_no_nvcc(healthy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The build reports it. Its record explains why the module is missing."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.version, "hip", None)
    why_not_cuda = SETUP["why_not_cuda"]
    assert why_not_cuda() is None
    monkeypatch.setitem(SETUP["nvcc"].__globals__, "shutil", types.SimpleNamespace(which=lambda *_, **__: None))
    assert "install the CUDA toolkit" in why_not_cuda()


@pytest.mark.slow
def test_torch_is_too_old() -> None:
    code = "import torch, runpy; torch.__version__ = '2.7.1+cpu'; runpy.run_module('fused_optim', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: fused_optim needs torch 2.8 or newer, but this is torch 2.7.1")
    assert "pip install --upgrade torch" in last


LACKING: dict[str, Callable[[pytest.MonkeyPatch, Path], None]] = {
    "compiler": lambda patch, path: [(path / name).unlink() for name in ("gcc", "clang")] and None,
    "header": lambda patch, path: (path / "Python.h").unlink(),
    "triton": lambda patch, path: patch.setattr(importlib.metadata, "version", lambda name: "3.4.0"),
    "gpu": lambda patch, path: patch.setattr(torch.cuda, "is_available", lambda: False),
    "nothing": lambda patch, path: None,
}


@pytest.mark.parametrize("lacking", LACKING)
def test_report(
    healthy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], lacking: str
) -> None:
    """`python -m fused_optim` prints a sentence for what is missing. With a GPU it makes a trial launch, which fails
    here."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "a GPU")
    if torch.backends.cuda.is_built():
        pytest.skip("expects the error of a torch without CUDA")
    LACKING[lacking](monkeypatch, healthy)
    assert cli.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    (line,) = (line for line in lines if line.startswith("backend triton"))
    words = {
        "compiler": "install gcc or clang",
        "header": "python3-dev",
        "triton": "triton>=3.5",
        "gpu": "finds no GPU",
        "nothing": "its trial launch failed with AssertionError: Torch not compiled with CUDA enabled",
    }
    assert words[lacking] in line and SENTENCE.search(line)
    assert [line.split()[-1] for line in lines if line.startswith("auto on cuda")] == ["reference"] * (lacking != "gpu")
