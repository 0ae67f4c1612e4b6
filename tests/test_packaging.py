"""What users install: the sdist, the wheel built from it, its installation, and errors for compiled modules that do not
match."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.message import Message
from email.parser import Parser
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from commands import ROOT, run

import fused_optim
from fused_optim.engine import modules

pytestmark = pytest.mark.slow
VERSION = fused_optim.__version__
FREE_OF_TORCH = [name for name in modules.NAMES if name != "_poll_aten"]
BUILD_ENV = {"FUSED_OPTIM_CPP": "0", "PYTHONDONTWRITEBYTECODE": "", "PYTHONWARNINGS": "default"}


def sources(folder: str, *patterns: str) -> set[str]:
    return {str(path.relative_to(ROOT)) for pattern in patterns for path in (ROOT / folder).glob(pattern)}


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Builds the sdist from a copy of the sources, and from the sdist a wheel without compiled modules."""
    copy = tmp_path_factory.mktemp("sources") / "copy"
    clutter = shutil.ignore_patterns(".*", "build", "dist", "results", "site", "__pycache__", "*.egg-info", "*.so")
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
    wanted = sources("csrc", "**/*.cpp", "**/*.h", "**/*.cu", "**/*.cuh") | sources("triton_kernels", "**/*.py")
    wanted |= sources("fused_optim", "**/*.py") | sources("bench", "*.py")
    wanted |= sources("tests", "*.py", "*.sh", "cpp/*.cpp", "cpp/*.h") | sources("docs", "**/*.*")
    wanted |= {"README.md", "LICENSE", "CHANGELOG.md", "Makefile", "pyproject.toml", "setup.py", "requirements-dev.txt"}
    wanted |= {"mkdocs.yml"}
    assert len(wanted) > 50
    assert not wanted - names
    assert not [name for name in names if name.endswith((".so", ".o", ".pyc")) or "results" in name]


def metadata(archive: zipfile.ZipFile) -> Message:
    return Parser().parsestr(archive.read(f"fused_optim-{VERSION}.dist-info/METADATA").decode())


def test_the_wheel_holds_the_package_and_nothing_else(dist: Path) -> None:
    with zipfile.ZipFile(dist / f"fused_optim-{VERSION}-py3-none-any.whl") as archive:
        names, facts = set(archive.namelist()), metadata(archive)
    package = {name for name in names if ".dist-info/" not in name}
    kernels = {f"fused_optim/{name}" for name in sources("triton_kernels", "**/*.py")}
    assert package == sources("fused_optim", "**/*.py") | {"fused_optim/py.typed"} | kernels
    assert f"fused_optim-{VERSION}.dist-info/licenses/LICENSE" in names
    assert facts["Version"] == VERSION
    assert facts["License-Expression"] == "BSD-3-Clause"
    assert facts["Requires-Python"] == ">=3.10"
    assert "torch>=2.8" in facts.get_all("Requires-Dist", [])


INSTALLED = """
import sys
# An editable installation of the sources would lend its modules.
sys.meta_path = [finder for finder in sys.meta_path if "__editable__" not in getattr(finder, "__module__", "")]
import importlib.metadata, importlib.util, torch, fused_optim
assert fused_optim.__file__.startswith({target!r}), fused_optim.__file__
assert importlib.metadata.version("fused-optim") == fused_optim.__version__ == {version!r}
assert importlib.util.find_spec("fused_optim.triton_kernels.step")
assert importlib.util.find_spec("fused_optim.triton_kernels.rules.adaptive")
p, q = (torch.nn.Parameter(torch.ones(10)) for _ in range(2))
ours, theirs = fused_optim.FusedAdamW([p], backend="reference"), torch.optim.AdamW([q])
p.grad, q.grad = torch.ones(10), torch.ones(10)
ours.step()
theirs.step()
torch.testing.assert_close(p, q)
print(fused_optim.engine.modules.cpu())
"""


def test_the_wheel_installs_and_works(dist: Path, tmp_path: Path) -> None:
    wheel = str(dist / f"fused_optim-{VERSION}-py3-none-any.whl")
    run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", str(tmp_path), wheel]
    )
    code = INSTALLED.format(target=str(tmp_path), version=VERSION)
    assert "a pure Python installation (FUSED_OPTIM_CPP=0)" in python(code, tmp_path)


def python(code: str, folder: Path, *more: Path) -> str:
    """The output of the code. Imports come from `folder` first and from `more` after it."""
    path = os.pathsep.join(map(str, [folder, *more]))
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


# ---- the compiled modules


def file_of(name: str) -> Path:
    module = modules.load(name)
    if not isinstance(module, ModuleType):
        pytest.skip(f"there is no module to inspect: {module}")
    return Path(str(module.__file__))


def needed(file: Path) -> set[str]:
    """The libraries that an ELF file is linked to: the DT_NEEDED entries of its dynamic section."""
    data = file.read_bytes()
    assert data[:6] == b"\x7fELF\x02\x01", "not a 64-bit little-endian ELF file"

    def number(at: int, size: int = 8) -> int:
        return int.from_bytes(data[at : at + size], "little")

    headers, width, count = number(32), number(54, 2), number(56, 2)
    segments = [headers + width * index for index in range(count)]
    loads = [(number(at + 16), number(at + 8), number(at + 32)) for at in segments if number(at, 4) == 1]
    (dynamic,) = (at for at in segments if number(at, 4) == 2)
    begin, size = number(dynamic + 8), number(dynamic + 32)
    entries = [(number(at), number(at + 8)) for at in range(begin, begin + size, 16)]
    strings = next(value for tag, value in entries if tag == 5)
    (table,) = (offset + strings - address for address, offset, bytes_ in loads if 0 <= strings - address < bytes_)
    names = [table + value for tag, value in entries if tag == 1]
    return {data[at : data.index(b"\0", at)].decode() for at in names}


@pytest.mark.parametrize("name", FREE_OF_TORCH)
def test_modules_are_linked_to_no_torch_and_no_python(name: str) -> None:
    libraries = needed(file_of(name))
    assert any(library.startswith("libc.so") for library in libraries), "needed() found no libc"
    assert not [library for library in libraries if re.match(r"lib(torch|c10|python|cudart|shm)", library)]


def test_the_look_with_torchs_headers_is_linked_to_torch() -> None:
    """Shows that the test above can detect a link to torch."""
    assert "libtorch_python.so" in needed(file_of("_poll_aten"))


ONE_OPENMP = """
import torch
from fused_optim import FusedAdamW
p = torch.nn.Parameter(torch.ones(1 << 20))
p.grad = torch.ones_like(p)
FusedAdamW([p], backend="cpp").step()
torch.ones(1 << 20).add_(1)
files = {line.split()[-1] for line in open("/proc/self/maps") if "/" in line}
print([file for file in files if any(name in file for name in ("libgomp", "libomp", "libiomp"))])
"""


def test_a_process_has_one_openmp_runtime(tmp_path: Path) -> None:
    """It is torch's. The kernels use its threads."""
    file_of("_cpu_baseline")
    (library,) = json.loads(python(ONE_OPENMP, tmp_path).replace("'", '"'))
    assert Path(library).is_relative_to(Path(torch.__file__).parent.parent), library


def copy_of_the_package(folder: Path) -> Path:
    """The Python files without the compiled ones."""
    package = folder / "fused_optim"
    clutter = shutil.ignore_patterns("*.so", "__pycache__", "_build.json")
    shutil.copytree(Path(fused_optim.__file__).parent, package, ignore=clutter)
    return package


FALLS_BACK = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if "__editable__" not in getattr(finder, "__module__", "")]
import warnings, torch, fused_optim
from fused_optim import FusedAdamW
from fused_optim.engine import modules
print(modules.cpu())
print(modules.poll())
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
print("loaded", [name for name in modules.NAMES if f"fused_optim.{name}" in sys.modules])
"""


def falls_back(folder: Path, *more: Path) -> tuple[str, str, str]:
    """The reason for missing kernels, the reason for a missing compiled change detector, and the modules that were
    loaded. The step must work without them."""
    kernels, look, fell_back, refused, loaded = python(FALLS_BACK, folder, *more).splitlines()
    assert fell_back.startswith("fell back True") and kernels in fell_back.replace("\\'", "'").replace('\\"', '"')
    assert refused.startswith("refused") and kernels in refused
    return kernels, look, loaded


def test_broken_modules(tmp_path: Path) -> None:
    package = copy_of_the_package(tmp_path)
    for name in modules.NAMES:
        (package / f"{name}{EXTENSION_SUFFIXES[0]}").write_bytes(b"\x7fELF")
    kernels, look, loaded = falls_back(tmp_path)
    assert re.match(r"the C\+\+ kernel for \w+ does not load \(.+\); install fused_optim again", kernels), kernels
    assert look.startswith("the compiled change detector does not load (")
    assert loaded == "loaded []"


def test_a_look_for_another_torch_is_not_even_loaded(tmp_path: Path) -> None:
    """The file contains only the version string, so loading it would fail."""
    package = copy_of_the_package(tmp_path)
    (package / f"_poll_aten{EXTENSION_SUFFIXES[0]}").write_bytes(b"\x7fELF built for torch 1.0.\0")
    code = FALLS_BACK + 'print(modules.load("_poll_aten"))'
    said = python(code, tmp_path).splitlines()[-1]
    assert said.startswith("the change detector with torch's headers was built for torch 1.0, and this is torch ")
    assert "install fused_optim again" in said


@pytest.mark.parametrize(
    ("version", "layout", "message"),
    [
        (
            "0.0.1",
            "LAYOUT",
            f"is from fused_optim 0.0.1, and the Python files are from {VERSION}; install fused_optim again",
        ),
        (
            VERSION,
            "LAYOUT | {'CHUNK': 8192}",
            "was built for another layout of the tables (CHUNK is 8192 there and 4096 here); install fused_optim again",
        ),
    ],
    ids=["version", "layout"],
)
def test_modules_of_another_build(version: str, layout: str, message: str, tmp_path: Path) -> None:
    package = copy_of_the_package(tmp_path)
    theirs = layout.replace("LAYOUT", "OURS")
    text = f"from .engine.layout import LAYOUT as OURS\nVERSION = {version!r}\nLAYOUT = {theirs}\n"
    for name in modules.NAMES:
        (package / f"{name}.py").write_text(text)
    kernels, look, _ = falls_back(tmp_path)
    assert message in kernels
    assert message in look


def test_sources_that_hide_the_installed_package(tmp_path: Path) -> None:
    """As in a checkout after `pip install .`: Python imports the package from the current folder."""
    checkout, site = tmp_path / "checkout", tmp_path / "site"
    package, installed = copy_of_the_package(checkout), copy_of_the_package(site)
    for name in modules.NAMES:
        (installed / f"{name}{EXTENSION_SUFFIXES[0]}").touch()
    for said in falls_back(checkout, site)[:2]:
        assert f"Python has imported the sources in {package}, where nothing is built, and not the installed " in said
        assert f"package in {installed}; start Python in another folder" in said


def test_the_reason_why_a_module_was_not_built_is_kept(tmp_path: Path) -> None:
    package = copy_of_the_package(tmp_path)
    reasons = dict.fromkeys(modules.NAMES, "there is no C++ compiler (c++) on this machine")
    (package / "_build.json").write_text(json.dumps({"version": VERSION, "missing": reasons}))
    for said in falls_back(tmp_path)[:2]:
        assert "is not built: there is no C++ compiler (c++) on this machine" in said


# ---- building


BUILD = """
import json, sys
from setuptools import Distribution
sys.argv = ["setup.py"]
import runpy
made = runpy.run_path("setup.py", run_name="not main")
distribution = Distribution({{"name": "fused_optim", "ext_modules": made["modules"](), "packages": ["fused_optim"]}})
build = made["Build"](distribution)
build.build_lib, build.build_temp = {lib!r}, {temp!r}
build.ensure_finalized()
build.run()
"""


def build(tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs setup.py on small sources in place of the real ones, which takes seconds."""
    source = tmp_path / "source"
    if not source.exists():
        (source / "fused_optim").mkdir(parents=True)
        for name in ("setup.py", "fused_optim/__init__.py"):
            shutil.copy(ROOT / name, source / name)
        for path in (*(ROOT / "csrc").rglob("*.h"), *(ROOT / "csrc").rglob("*.cuh")):
            (source / path.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, source / path.relative_to(ROOT))
        for folder, module in (("cpu", "FUSED_MODULE"), ("poll", "_poll"), ("poll/aten", "_poll_aten"), ("cuda", "X")):
            (source / "csrc" / folder).mkdir(parents=True, exist_ok=True)
            files = {"bindings.cpp": module}
            if folder == "cuda":
                files = {"bindings_emulated.cpp": "_cuda_emulated", "bindings.cpp": "_cuda"}
            for file, name in files.items():
                (source / "csrc" / folder / file).write_text(TINY.format(name=name))
        for file in ("cpu/step.cpp", "cuda/emulate.cpp", "cuda/step.cu", "poll/watch_groups.cpp"):
            (source / "csrc" / file).write_text("int nothing() { return 0; }\n")
    code = BUILD.format(lib=str(tmp_path / "lib"), temp=str(tmp_path / "temp"))
    hidden = {"FUSED_OPTIM_CPP", "FUSED_OPTIM_ISAS", "FUSED_OPTIM_CUDA", "CUDA_HOME", "CUDA_PATH", "CXX", "CC"}
    inherited = {key: value for key, value in os.environ.items() if key not in hidden}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=source, env={**inherited, **environment}, capture_output=True, text=True
    )


TINY = """
#include <Python.h>
#define NAMED(x) PyInit_##x
#define INIT(x) NAMED(x)
extern "C" __attribute__((visibility("default"))) PyObject* INIT({name})() {{ return nullptr; }}
"""


def built(tmp_path: Path) -> dict[str, str]:
    """Each compiled module with "", and each missing module with the reason."""
    folder = tmp_path / "lib/fused_optim"
    there = {path.name.partition(".")[0]: "" for path in folder.glob("*.so")}
    missing: dict[str, Any] = json.loads((folder / "_build.json").read_text())["missing"]
    assert not there.keys() & missing.keys()
    return there | missing


def test_incremental_builds(tmp_path: Path) -> None:
    """One changed file compiles one file. A module that does not compile leaves the others, and its file from an
    earlier build is removed. With FUSED_OPTIM_CPP=1 the failure stops the installation."""
    assert shutil.which("ninja"), "the tests require ninja"
    first = build(tmp_path)
    assert first.returncode == 0, first.stdout + first.stderr
    found = built(tmp_path)
    assert {name for name, reason in found.items() if not reason} >= {"_poll", "_cpu_baseline", "_cuda_emulated"}
    assert "FUSED_OPTIM_CUDA=1" in found["_cuda"] or torch.version.cuda
    assert "no work to do" in (again := build(tmp_path).stdout) and " -c " not in again
    bindings = tmp_path / "source/csrc/poll/bindings.cpp"
    bindings.write_text(TINY.format(name="_poll") + "int more;\n")
    compiled = re.findall(r" -c (\S+\.cpp) ", build(tmp_path).stdout)
    assert [Path(path).name for path in compiled] == ["bindings.cpp"]

    bindings.write_text("#error this does not compile\n")
    done = build(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "installing without fused_optim._poll: its build failed (Error compiling objects" in done.stderr
    found = built(tmp_path)
    assert "pip install -v shows the compiler's output" in found["_poll"]
    assert found["_cpu_baseline"] == ""
    assert build(tmp_path, FUSED_OPTIM_CPP="1").returncode != 0


def test_instruction_sets_of_a_developers_build(tmp_path: Path) -> None:
    assert build(tmp_path, FUSED_OPTIM_ISAS="baseline").returncode == 0
    assert [name for name, reason in built(tmp_path).items() if name.startswith("_cpu") and not reason] == [
        "_cpu_baseline"
    ]
    refused = build(tmp_path, FUSED_OPTIM_ISAS="baseline,sse9")
    assert refused.returncode != 0
    assert "FUSED_OPTIM_ISAS names sse9; the instruction sets are baseline" in refused.stderr


def test_no_compiler(tmp_path: Path) -> None:
    assert build(tmp_path, CXX="/no/such/compiler").returncode == 0
    found = built(tmp_path)
    sentence = "there is no C++ compiler (/no/such/compiler) on this machine; install g++, or set CXX"
    assert all(found[name] == sentence for name in ("_poll", "_cpu_baseline", "_cuda_emulated"))
    asked = build(tmp_path, CXX="/no/such/compiler", FUSED_OPTIM_CPP="1")
    assert asked.returncode != 0 and sentence in asked.stderr


def test_no_nvcc(tmp_path: Path) -> None:
    asked = build(tmp_path, FUSED_OPTIM_CUDA="1", CUDA_HOME="/no/such/folder")
    assert asked.returncode != 0
    assert "FUSED_OPTIM_CUDA=1, but the CUDA module cannot be built: there is no nvcc in CUDA_HOME" in asked.stderr
