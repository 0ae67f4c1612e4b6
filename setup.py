"""Builds the compiled modules.

If torch can be imported, its BuildExtension builds all of them with ninja. Otherwise setuptools builds those that need
no torch: all but _poll_aten and _cuda.

Environment: MAX_JOBS, CC, CXX, CUDA_HOME, TORCH_CUDA_ARCH_LIST have the same meaning as in torch's own builds.
FUSED_OPTIM_CPP=0      build no compiled module (a pure Python wheel)
FUSED_OPTIM_CPP=1      fail if a module for the CPU cannot be built
FUSED_OPTIM_ISAS       build the CPU kernels for these instruction sets only, for example avx2,avx512; shortens a
                       developer's build
FUSED_OPTIM_CUDA=0     leave out the CUDA module
FUSED_OPTIM_CUDA=1     build the CUDA module even if torch has no CUDA, and fail if it cannot be built
FUSED_OPTIM_DEBUG=1    -O1 -g with the address sanitizer
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

cpp_extension: Any = None
with contextlib.suppress(ImportError, OSError):  # pip has isolated the build, or torch lacks one of its libraries
    from torch.utils import cpp_extension  # type: ignore[no-redef]

PACKAGE = "fused_optim"
ROOT = Path(__file__).resolve().parent
BASE: type[build_ext] = build_ext if cpp_extension is None else cpp_extension.BuildExtension

WARNINGS = ["-Wall", "-Wextra", "-Wno-unused-parameter", "-Wno-unknown-pragmas"]
# These come after Python's own build flags and override them. -g0: no debug symbols. -fno-wrapv: the compiler assumes
# that signed integers do not overflow.
COMMON_FLAGS = ["-std=c++17", "-fvisibility=hidden", "-g0", "-O3", "-fno-wrapv", *WARNINGS]
DEBUG_FLAGS = ["-g", "-O1", "-fsanitize=address", "-fno-omit-frame-pointer"]
# Without -fno-math-errno every square root is a call. Without -fno-trapping-math selects cannot be vectorised.
# -ffp-contract=off: the rules state every fused multiply-add themselves.
KERNEL_FLAGS = ["-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"]
INSTRUCTION_SETS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-march=x86-64-v4", "-mprefer-vector-width=512"],
}
# -fmad=false: the rules state every fused multiply-add themselves. Any other a * b + c must round as on the CPU.
CUDA_FLAGS = ["-O3", "-std=c++17", "-fmad=false", "--expt-relaxed-constexpr", "-Xcompiler", "-fPIC"]
CUDA_ARCHITECTURES = ["8.0", "9.0", "10.0"]  # those that nvcc knows; the last of these as PTX too, for later GPUs


def switch(name: str) -> bool | None:
    """True, False, or None if the variable is unset or empty."""
    value = os.environ.get(name)
    return None if value in (None, "") else value != "0"


def nvcc() -> str | None:
    """The path of nvcc. Searches where torch does: CUDA_HOME or CUDA_PATH, the PATH, /usr/local/cuda."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home:
        return shutil.which("nvcc", path=os.path.join(home, "bin"))
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def architectures(compiler: str) -> str:
    """The default of TORCH_CUDA_ARCH_LIST. torch's own default covers only the GPUs of this machine."""
    known = subprocess.run([compiler, "--list-gpu-arch"], capture_output=True, text=True).stdout.split()
    entries = [entry for entry in CUDA_ARCHITECTURES if f"compute_{entry.replace('.', '')}" in known]
    return ";".join(entries) + "+PTX"


def version() -> str:
    found = re.search(r'__version__ = "(.+)"', (ROOT / PACKAGE / "__init__.py").read_text())
    assert found
    return found[1]


def processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def sources(*patterns: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in (ROOT / "csrc").glob(pattern))


def module(name: str, files: list[str], flags: list[str], **more: Any) -> Extension:
    debug = DEBUG_FLAGS if switch("FUSED_OPTIM_DEBUG") else []
    flags = [*COMMON_FLAGS, *debug, *flags]
    return Extension(
        f"{PACKAGE}.{name}",
        files,
        define_macros=[("FUSED_OPTIM_VERSION", f'"{version()}"')],
        extra_compile_args={"cxx": flags, "nvcc": CUDA_FLAGS} if name == "_cuda" else flags,  # type: ignore[arg-type]
        extra_link_args=[*debug, *(flag for flag in flags if flag == "-fopenmp")],
        depends=[*sources("**/*.h", "**/*.cuh"), "setup.py", f"{PACKAGE}/__init__.py"],
        language="c++",
        **more,
    )


def cpu_modules() -> list[Extension]:
    known = INSTRUCTION_SETS if platform.machine() in ("x86_64", "AMD64") else {"baseline": []}
    wanted = os.environ.get("FUSED_OPTIM_ISAS") or ",".join(known)
    if unknown := set(wanted.split(",")) - set(known):
        sys.exit(f"FUSED_OPTIM_ISAS names {', '.join(sorted(unknown))}; the instruction sets are {', '.join(known)}")
    emulated = ["csrc/cuda/bindings_emulated.cpp", "csrc/cuda/emulate.cpp"]
    made = [
        module(
            f"_cpu_{isa}",
            sources("cpu/*.cpp"),
            ["-fopenmp", *KERNEL_FLAGS, *flags, f"-DFUSED_ISA={isa}", f"-DFUSED_MODULE=_cpu_{isa}"],
        )
        for isa, flags in known.items()
        if isa in wanted.split(",")
    ]
    made.append(module("_cuda_emulated", emulated, ["-UNDEBUG", *KERNEL_FLAGS, *known.get("avx2", [])]))
    made.append(module("_poll", sources("poll/*.cpp"), []))
    if cpp_extension is not None:
        made.append(aten_module())
    return made


def aten_module() -> Extension:
    """The only module built with torch's headers and libraries, in the C++ standard that this torch requires."""
    assert cpp_extension is not None
    made = module("_poll_aten", sources("poll/*_changes.cpp", "poll/aten/*.cpp", "cpu/threads.cpp"), ["-fopenmp"])
    made.extra_compile_args = [flag for flag in made.extra_compile_args if not flag.startswith("-std")]
    made.include_dirs = cpp_extension.include_paths()
    made.library_dirs, made.libraries = cpp_extension.library_paths(), ["c10", "torch_cpu", "torch_python"]
    return made


def why_not_cuda() -> str | None:
    """Why the CUDA module cannot be built, or None."""
    wanted = switch("FUSED_OPTIM_CUDA")
    if wanted is False:
        return "it was left out (FUSED_OPTIM_CUDA=0)"
    if cpp_extension is None:
        return (
            "torch's build tools compile it, but this build could not import torch; "
            "pip install --no-build-isolation . builds with the installed torch"
        )
    import torch

    if torch.version.hip is not None:
        return "it runs on NVIDIA GPUs, but this torch is built for ROCm"
    if wanted is None and torch.version.cuda is None:
        return "this torch is built without CUDA; FUSED_OPTIM_CUDA=1 builds the module anyway"
    if nvcc() is None:
        return "there is no nvcc in CUDA_HOME, on the PATH or in /usr/local/cuda; install the CUDA toolkit"
    return None


def cuda_module() -> Extension:
    compiler = nvcc()
    assert cpp_extension is not None and compiler is not None
    if cpp_extension.CUDA_HOME is None:  # a torch without CUDA does not search for it
        cpp_extension.CUDA_HOME = cpp_extension._find_cuda_home()
    if not os.environ.get("TORCH_CUDA_ARCH_LIST"):
        os.environ["TORCH_CUDA_ARCH_LIST"] = architectures(compiler)
    # The CUDA runtime is linked statically, so the module works with a torch of any CUDA version. nvcc may be a wrapper
    # script, so its dry run gives the toolkit's folder.
    plan = subprocess.run([compiler, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    top = re.search(r"^#\$ TOP=(.+)$", plan, re.MULTILINE)
    home = Path(top[1].strip() if top else compiler).resolve()
    home = home if top else home.parent.parent
    folders = [str(path) for path in (home / "lib64", home / "lib", *home.glob("targets/*/lib")) if path.is_dir()]
    return module(
        "_cuda",
        ["csrc/cuda/bindings.cpp", "csrc/cuda/step.cu"],
        [],
        libraries=["cudart_static", "dl", "rt", "pthread"],
        library_dirs=folders,
    )


class Build(BASE):  # type: ignore[valid-type, misc]
    """Builds the modules in parallel and independently: if one fails, the others are still built. _build.json lists the
    missing modules with their reasons."""

    extensions: list[Extension]

    def finalize_options(self) -> None:
        super().finalize_options()
        if getattr(self, "editable_mode", False):  # setuptools' temporary folders would force a full rebuild each time
            kept = ROOT / "build" / f"editable-{sys.implementation.cache_tag}"
            self.build_temp, self.build_lib = str(kept / "temp"), str(kept / "lib")

    def run(self) -> None:
        self.into_sources = bool(self.inplace)  # the base class clears inplace during the build
        super().run()

    def build_extensions(self) -> None:
        try:
            import pybind11
        except ImportError:
            sys.exit("building fused_optim requires pybind11, which is not installed: pip install pybind11 ninja")
        self.compiler.include_dirs.append(pybind11.get_include())

        missing: dict[str, str] = {}
        if (reason := why_not_cuda()) is not None:
            if switch("FUSED_OPTIM_CUDA"):
                raise RuntimeError(f"FUSED_OPTIM_CUDA=1, but the CUDA module cannot be built: {reason}")
            missing["_cuda"] = reason
        jobs = int(os.environ.get("MAX_JOBS") or processors())
        side_by_side = min(jobs, len(self.extensions))
        os.environ["MAX_JOBS"] = str(jobs // side_by_side)  # for each module's ninja
        with ThreadPoolExecutor(side_by_side) as pool:
            reasons = list(pool.map(self.build_alone, self.extensions))
        built = []
        for extension, reason in zip(self.extensions, reasons, strict=True):
            if reason is None:
                built.append(extension)
            else:
                missing[extension.name.rpartition(".")[2]] = reason
        self.extensions = built
        self.leave(missing, Path(self.build_lib, PACKAGE))
        if self.into_sources:
            self.leave(missing, ROOT / PACKAGE)

    def build_alone(self, extension: Extension) -> str | None:
        """Builds one module in its own folder. Returns why the build failed, or None."""
        alone = copy.copy(self)
        alone.compiler, alone.extensions = copy.copy(self.compiler), [extension]
        alone.build_temp = os.path.join(self.build_temp, extension.name)
        try:
            compiler = (os.environ.get("CXX") or "c++").split()[0]
            if shutil.which(compiler) is None:
                raise RuntimeError(f"there is no C++ compiler ({compiler}) on this machine; install g++, or set CXX")
            super(Build, alone).build_extensions()
        except Exception as error:  # without a module the optimizers still work, and report why it is missing
            if switch("FUSED_OPTIM_CUDA" if extension.name.endswith("_cuda") else "FUSED_OPTIM_CPP"):
                raise
            reason = " ".join(map(str, error.args)) or repr(error)
            if "no C++ compiler" not in reason:
                shown = reason if len(reason) < 200 else f"{reason[:200]} ..."
                reason = f"its build failed ({shown}); pip install -v shows the compiler's output"
            print(f"fused_optim: installing without {extension.name}: {reason}", file=sys.stderr, flush=True)
            return reason
        return None

    def leave(self, missing: dict[str, str], folder: Path) -> None:
        """Writes _build.json, and deletes modules of earlier builds that this build did not make."""
        folder.mkdir(parents=True, exist_ok=True)
        built = {Path(self.get_ext_filename(extension.name)).name for extension in self.extensions}
        for file in folder.glob(f"_*{EXTENSION_SUFFIXES[0]}"):
            if file.name not in built:
                file.unlink()
        record = {"version": version(), "missing": missing}
        (folder / "_build.json").write_text(json.dumps(record, indent=1) + "\n")


def modules() -> list[Extension]:
    if switch("FUSED_OPTIM_CPP") is False:
        return []
    return [*cpu_modules(), *([cuda_module()] if why_not_cuda() is None else [])]


if __name__ == "__main__":
    setup(ext_modules=modules(), cmdclass={"build_ext": Build})
