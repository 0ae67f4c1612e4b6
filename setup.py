"""Builds what this machine can: the C++ kernel where there is a C++ compiler, the CUDA kernel where nvcc and a CUDA
torch are, nothing where there is neither.

Environment: MAX_JOBS, CXX, CUDA_HOME, TORCH_CUDA_ARCH_LIST as torch's own builds read them.
FUSED_OPTIM_CPP=0|1    forbid the extension, or fail the installation when it cannot be built
FUSED_OPTIM_CUDA=0|1   forbid or force the CUDA kernel
FUSED_OPTIM_DEBUG=1    -O1 -g with the address sanitizer
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

CSRC = Path("csrc")
WARNINGS = ["-Wall", "-Wextra", "-Wno-unused-parameter", "-Wno-unknown-pragmas"]
# No errno: else every square root is a call. No traps: else selects cannot be vectorised. No contraction: the rules
# say where they fuse.
KERNEL_FLAGS = ["-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"]
INSTRUCTION_SETS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-march=x86-64-v4", "-mprefer-vector-width=512"],
}
CUDA_ARCHITECTURES = "8.0;9.0;10.0+PTX"


def switch(name: str) -> bool | None:
    """True, False, or None where the environment does not say."""
    value = os.environ.get(name)
    return None if value in (None, "") else value != "0"


def nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return shutil.which("nvcc", path=os.path.join(home, "bin") if home else None) or shutil.which("nvcc")


def gencode() -> list[str]:
    flags = []
    for entry in os.environ.get("TORCH_CUDA_ARCH_LIST", CUDA_ARCHITECTURES).replace(" ", ";").split(";"):
        if not entry:
            continue
        number = entry.removesuffix("+PTX").replace(".", "")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if entry.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


class Build(build_ext):
    """Compiles each file with its own flags, a few at a time, and links them into one module."""

    def run(self) -> None:
        if switch("FUSED_OPTIM_CPP") is False:
            print("fused_optim: FUSED_OPTIM_CPP=0, so no extension is built")
            return
        try:
            super().run()
        except Exception as error:  # an optimizer without its fast kernel still works, and says why
            if switch("FUSED_OPTIM_CPP") or switch("FUSED_OPTIM_CUDA"):
                raise
            print(f"fused_optim: installing without the C++ extension, because {error}", file=sys.stderr)
            self.extensions: list[Extension] = []

    def build_extension(self, extension: Extension) -> None:
        import torch
        from torch.utils import cpp_extension

        compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
        if compiler is None:
            raise RuntimeError("there is no C++ compiler (g++) on this machine")

        debug = bool(switch("FUSED_OPTIM_DEBUG"))
        optimise = ["-O1", "-g", "-fsanitize=address", "-fno-omit-frame-pointer"] if debug else ["-O3"]
        common = [*compiler.split(), "-std=c++17", "-fPIC", "-fvisibility=hidden", "-fopenmp", *optimise, *WARNINGS]
        if torch.__version__ >= "2.13" or not hasattr(torch._C, "_GLIBCXX_USE_CXX11_ABI"):
            abi = "1"
        else:
            abi = str(int(torch._C._GLIBCXX_USE_CXX11_ABI))
        torch_flags = [f"-isystem{path}" for path in cpp_extension.include_paths()]
        torch_flags += [f"-isystem{sysconfig.get_paths()['include']}", f"-D_GLIBCXX_USE_CXX11_ABI={abi}", "-std=c++20"]

        with_cuda = switch("FUSED_OPTIM_CUDA")
        if with_cuda is None:
            with_cuda = nvcc() is not None and torch.version.cuda is not None
        if with_cuda and nvcc() is None:
            raise RuntimeError("FUSED_OPTIM_CUDA=1, and there is no nvcc on the PATH or under CUDA_HOME")

        out = Path(self.build_temp)
        out.mkdir(parents=True, exist_ok=True)
        jobs: list[list[str]] = []

        def job(source: str, name: str, command: list[str]) -> None:
            jobs.append([*command, "-c", str(CSRC / source), "-o", str(out / name)])

        for source in ("watch.cpp", "bindings.cpp"):
            job(source, source.replace(".cpp", ".o"), [*common, *torch_flags, *(["-DWITH_CUDA"] if with_cuda else [])])
        sets = INSTRUCTION_SETS if platform.machine() in ("x86_64", "AMD64") else {"baseline": []}
        for isa, flags in sets.items():
            job("cpu/step.cpp", f"step_{isa}.o", [*common, *KERNEL_FLAGS, *flags, f"-DFUSED_ISA={isa}"])
        job("cpu/simd.cpp", "simd.o", common)
        job("cpu/floor.cpp", "floor.o", common)
        job("cuda/emulate.cpp", "emulate.o", [*common, *KERNEL_FLAGS, *sets.get("avx2", [])])
        if with_cuda:
            job(
                "cuda/step.cu",
                "step_cuda.o",
                [
                    str(nvcc()),
                    "-O3",
                    "-std=c++17",
                    "-fmad=false",
                    "--expt-relaxed-constexpr",
                    "-Xcompiler",
                    "-fPIC",
                    *gencode(),
                ],
            )

        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
            list(pool.map(self.call, jobs))

        target = Path(self.get_ext_fullpath(extension.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        libraries = [f"-L{path}" for path in cpp_extension.library_paths()] + ["-lc10", "-ltorch_cpu", "-ltorch_python"]
        if with_cuda:
            cuda_lib = Path(str(nvcc())).resolve().parent.parent / "lib64"
            libraries += [f"-L{cuda_lib}", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
        objects = [command[-1] for command in jobs]
        self.call([*compiler.split(), "-shared", "-fopenmp", *optimise, *objects, *libraries, "-o", str(target)])

    def call(self, command: list[str]) -> None:
        print(" ".join(command), flush=True)
        result = subprocess.run(command, capture_output=True, text=True)
        print(result.stdout + result.stderr, end="", flush=True)
        if result.returncode != 0:
            raise RuntimeError(
                f"`{command[0]}` failed with exit status {result.returncode}: {result.stderr.strip()[-2000:]}"
            )


if __name__ == "__main__":
    setup(ext_modules=[Extension("fused_optim._C", sources=[])], cmdclass={"build_ext": Build})
