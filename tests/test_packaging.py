"""What strangers get: the sdist, the wheel made of it, its installation, and an extension of another torch."""

from __future__ import annotations

import importlib.machinery
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path
from types import ModuleType

import pytest
import torch
from commands import ROOT, SETUP, run

import fused_optim
from fused_optim import backends

VERSION = fused_optim.__version__
TORCH = ".".join(torch.__version__.split(".")[:2])
BUILD_ENV = {"FUSED_OPTIM_CPP": "0", "PYTHONDONTWRITEBYTECODE": "", "PYTHONWARNINGS": "default"}


def sources(folder: str, *patterns: str) -> set[str]:
    return {str(path.relative_to(ROOT)) for pattern in patterns for path in (ROOT / folder).glob(pattern)}


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a copy of the sources: the sdist, and a wheel without the extension that was built from the sdist."""
    copy = tmp_path_factory.mktemp("sources") / "copy"
    clutter = shutil.ignore_patterns(".*", "build", "dist", "results", "api", "__pycache__", "*.egg-info", "*.so")
    shutil.copytree(ROOT, copy, ignore=clutter)
    command = [sys.executable, "-m", "build", "--no-isolation", str(copy)]
    done = subprocess.run(command, env={**os.environ, **BUILD_ENV}, capture_output=True, text=True, timeout=600)
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    complaints = [line for line in output.splitlines() if re.search(r"warning:|DeprecationWarning|\*{20}", line, re.I)]
    assert not complaints, output
    return copy / "dist"


def test_the_sdist_holds_all_sources(dist: Path) -> None:
    with tarfile.open(dist / f"fused_optim-{VERSION}.tar.gz") as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = sources("csrc", "**/*.cpp", "**/*.h", "**/*.cu", "**/*.cuh") | sources("triton_kernels", "*.py")
    wanted |= sources("fused_optim", "**/*.py") | sources("bench", "*.py")
    wanted |= sources("tests", "*.py", "*.sh", "cpp/*.cpp", "cpp/*.h") | sources("docs", "*.md")
    wanted |= {"README.md", "LICENSE", "CHANGELOG.md", "Makefile", "pyproject.toml", "setup.py", "requirements-dev.txt"}
    assert len(wanted) > 50
    assert not wanted - names
    assert not [name for name in names if name.endswith((".so", ".o", ".pyc")) or "results" in name]


def metadata(archive: zipfile.ZipFile) -> Message:
    return Parser().parsestr(archive.read(f"fused_optim-{VERSION}.dist-info/METADATA").decode())


def test_the_wheel_holds_the_package_and_nothing_else(dist: Path) -> None:
    with zipfile.ZipFile(dist / f"fused_optim-{VERSION}-py3-none-any.whl") as archive:
        names, facts = set(archive.namelist()), metadata(archive)
    package = {name for name in names if ".dist-info/" not in name}
    kernels = {f"fused_optim/{name}" for name in sources("triton_kernels", "*.py")}
    assert package == sources("fused_optim", "**/*.py") | {"fused_optim/py.typed"} | kernels
    assert f"fused_optim-{VERSION}.dist-info/licenses/LICENSE" in names
    assert facts["Version"] == VERSION
    assert facts["License-Expression"] == "BSD-3-Clause"
    assert facts["Requires-Python"] == ">=3.10"
    assert "torch>=2.8" in facts.get_all("Requires-Dist", [])


INSTALLED = """
import sys
# An editable installation of the sources would lend its extension.
sys.meta_path = [finder for finder in sys.meta_path if "__editable__" not in getattr(finder, "__module__", "")]
import importlib.metadata, importlib.util, warnings, torch, fused_optim
assert fused_optim.__file__.startswith({target!r}), fused_optim.__file__
assert importlib.metadata.version("fused-optim") == fused_optim.__version__ == {version!r}
assert importlib.util.find_spec("fused_optim.triton_kernels.step")
p, q = (torch.nn.Parameter(torch.ones(10)) for _ in range(2))
ours, theirs = fused_optim.FusedAdamW([p], backend="reference"), torch.optim.AdamW([q])
p.grad, q.grad = torch.ones(10), torch.ones(10)
ours.step()
theirs.step()
torch.testing.assert_close(p, q)
print(fused_optim.backends.extension())
"""


def test_the_wheel_installs_and_works(dist: Path, tmp_path: Path) -> None:
    wheel = str(dist / f"fused_optim-{VERSION}-py3-none-any.whl")
    run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", str(tmp_path), wheel]
    )
    code = INSTALLED.format(target=str(tmp_path), version=VERSION)
    assert "the C++ extension is not built" in python(code, tmp_path)


def python(code: str, path: Path) -> str:
    """What the code prints, importing from that folder before all others."""
    environment = {**os.environ, "PYTHONPATH": str(path)}
    done = subprocess.run([sys.executable, "-c", code], cwd=path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


# ---- the extension and the torch that it was built for


def test_the_extension_says_for_which_torch_it_was_built() -> None:
    module = backends.extension()
    if not isinstance(module, ModuleType):
        pytest.skip(f"there is no extension to look at: {module}")
    assert f"built for torch {TORCH}.".encode() in Path(str(module.__file__)).read_bytes()


REFUSED = """
import sys, warnings, torch, fused_optim
from fused_optim import FusedAdamW, backends
print(backends.extension())
p = torch.nn.Parameter(torch.ones(10))
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    optimizer = FusedAdamW([p])
p.grad = torch.ones(10)
optimizer.step()
print("fell back", p.detach().ne(1).all().item(), [str(w.message) for w in caught])
try:
    FusedAdamW([p], backend="cpp")
except RuntimeError as error:
    print("refused", error)
print("loaded", "fused_optim._C" in sys.modules)
"""


@pytest.mark.parametrize(
    ("built_for", "message"),
    [
        ("1.0", f"the C++ extension was built for torch 1.0 and this is torch {torch.__version__}; "),
        (TORCH, f"the C++ extension, built for torch {TORCH}, does not load with torch {torch.__version__} ("),
    ],
    ids=["of-another-torch", "broken"],
)
def test_an_extension_that_does_not_fit_is_refused_unused(built_for: str, message: str, tmp_path: Path) -> None:
    """The file holds nothing but the words that are looked for, so whoever loads it fails."""
    package = tmp_path / "fused_optim"
    shutil.copytree(Path(fused_optim.__file__).parent, package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    extension = package / f"_C{importlib.machinery.EXTENSION_SUFFIXES[0]}"
    extension.write_bytes(b"\x7fELF built for torch " + built_for.encode() + b".\0")
    said, fell_back, refused, loaded = python(REFUSED, tmp_path).splitlines()
    assert said.startswith(message)
    assert "pip install --no-build-isolation --no-deps ." in said
    assert fell_back.startswith("fell back True") and said in fell_back
    assert refused.startswith("refused") and said in refused
    assert loaded == "loaded False"


def test_no_stale_extension_is_shipped_where_the_build_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from setuptools import Distribution, Extension

    for name in ("FUSED_OPTIM_CPP", "FUSED_OPTIM_CUDA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CXX", str(tmp_path / "no-such-compiler"))
    monkeypatch.chdir(ROOT)
    build = SETUP["Build"](Distribution({"name": "x", "ext_modules": [Extension("fused_optim._C", sources=[])]}))
    build.build_lib, build.build_temp = str(tmp_path / "lib"), str(tmp_path / "temp")
    build.ensure_finalized()
    stale = Path(build.get_ext_fullpath("fused_optim._C"))
    stale.parent.mkdir(parents=True)
    stale.touch()
    build.run()
    assert "installing without the C++ extension" in capsys.readouterr().err
    assert not stale.exists()
