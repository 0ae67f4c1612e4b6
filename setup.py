"""Builds what this machine can: the C++ kernel where there is a C++ compiler, the CUDA kernel where nvcc and a CUDA
torch are, nothing where there is neither.

Environment: MAX_JOBS, CXX, CUDA_HOME, TORCH_CUDA_ARCH_LIST as torch's own builds read them.
FUSED_OPTIM_CPP=0|1    leave the extension out (a pure Python wheel), or fail the installation when it cannot be built
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

import setuptools
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
# Without contraction here too: the rules say where they fuse, and a * b + c elsewhere must round as it does on the CPU.
CUDA_FLAGS = ["-O3", "-std=c++17", "-fmad=false", "--expt-relaxed-constexpr", "-Xcompiler", "-fPIC"]
CUDA_ARCHITECTURES = ["8.0", "9.0", "10.0"]  # those of them that the compiler knows, and PTX of the last for later ones


def switch(name: str) -> bool | None:
    """True, False, or None where the environment does not say."""
    value = os.environ.get(name)
    return None if value in (None, "") else value != "0"


def nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return shutil.which("nvcc", path=os.path.join(home, "bin") if home else None) or shutil.which("nvcc")


def gencode(compiler: str) -> list[str]:
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(" ", ";").split(";")
    entries = [entry for entry in wanted if entry]
    if not entries:
        known = subprocess.run([compiler, "--list-gpu-arch"], capture_output=True, text=True).stdout.split()
        entries = [entry for entry in CUDA_ARCHITECTURES if f"compute_{entry.replace('.', '')}" in known]
        entries[-1:] = [f"{entry}+PTX" for entry in entries[-1:]]
    flags = []
    for entry in entries:
        number = entry.removesuffix("+PTX").replace(".", "")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if entry.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


class Build(build_ext):
    """Compiles each file with its own flags, a few at a time, and links them into one module."""

    def run(self) -> None:
        try:
            super().run()
        except Exception as error:  # an optimizer without its fast kernel still works, and says why
            if switch("FUSED_OPTIM_CPP") or switch("FUSED_OPTIM_CUDA"):
                raise
            print(f"fused_optim: installing without the C++ extension, because {error}", file=sys.stderr)
            for extension in self.extensions:  # one that an earlier build has left behind
                Path(self.get_ext_fullpath(extension.name)).unlink(missing_ok=True)
            self.extensions: list[Extension] = []

    def build_extension(self, extension: Extension) -> None:
        import torch
        from torch.utils.cpp_extension import include_paths, library_paths

        compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
        if compiler is None:
            raise RuntimeError("there is no C++ compiler (g++) on this machine")
        out = Path(self.build_temp)
        out.mkdir(parents=True, exist_ok=True)
        cuda = self.compile_cuda(out, torch.version.cuda is not None)

        debug = bool(switch("FUSED_OPTIM_DEBUG"))
        optimise = ["-O1", "-g", "-fsanitize=address", "-fno-omit-frame-pointer"] if debug else ["-O3"]
        common = [*compiler.split(), "-std=c++17", "-fPIC", "-fvisibility=hidden", "-fopenmp", *optimise, *WARNINGS]
        abi = int(getattr(torch._C, "_GLIBCXX_USE_CXX11_ABI", True))
        includes = [*include_paths(), sysconfig.get_paths()["include"]]
        for_torch = [
            *common,
            "-std=c++20",
            f"-D_GLIBCXX_USE_CXX11_ABI={abi}",
            *(f"-isystem{path}" for path in includes),
        ]
        if cuda:
            for_torch.append("-DWITH_CUDA")
        sets = INSTRUCTION_SETS if platform.machine() in ("x86_64", "AMD64") else {"baseline": []}

        jobs = [
            [*for_torch, "-c", str(CSRC / f"{name}.cpp"), "-o", str(out / f"{name}.o")]
            for name in ("watch", "watch_groups", "bindings")
        ]
        for isa, flags in sets.items():
            kernel = [*common, *KERNEL_FLAGS, *flags, f"-DFUSED_ISA={isa}"]
            jobs += [
                [*kernel, "-c", str(CSRC / f"cpu/{name}.cpp"), "-o", str(out / f"{name}_{isa}.o")]
                for name in ("step", "grads", "floor")
            ]
        emulated = [*common, *KERNEL_FLAGS, *sets.get("avx2", [])]
        jobs.append([*emulated, "-c", str(CSRC / "cuda/emulate.cpp"), "-o", str(out / "emulate.o")])
        for name in ("simd", "threads"):
            jobs.append([*common, "-c", str(CSRC / f"cpu/{name}.cpp"), "-o", str(out / f"{name}.o")])
        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
            list(pool.map(self.call, jobs))

        target = Path(self.get_ext_fullpath(extension.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        libraries = [*(f"-L{path}" for path in library_paths()), "-lc10", "-ltorch_cpu", "-ltorch_python"]
        objects = [command[-1] for command in jobs]
        if cuda:  # nvcc knows where its runtime lies, and links it statically
            linker = [cuda[0], "-shared", "-Xcompiler", ",".join(["-fopenmp", *optimise])]
            self.call([*linker, *objects, cuda[1], *libraries, "-o", str(target)])
        else:
            self.call([*compiler.split(), "-shared", "-fopenmp", *optimise, *objects, *libraries, "-o", str(target)])

    def compile_cuda(self, out: Path, torch_has_cuda: bool) -> tuple[str, str] | None:
        """nvcc and the object that it made, where there shall be one. Fails only where it was asked for by name."""
        wanted, compiler = switch("FUSED_OPTIM_CUDA"), nvcc()
        if wanted is False or (wanted is None and not (compiler and torch_has_cuda)):
            return None
        if compiler is None:
            raise RuntimeError("FUSED_OPTIM_CUDA=1, and there is no nvcc on the PATH or under CUDA_HOME")
        made = str(out / "step_cuda.o")
        try:
            self.call([compiler, *CUDA_FLAGS, *gencode(compiler), "-c", str(CSRC / "cuda/step.cu"), "-o", made])
        except RuntimeError as error:
            if wanted:
                raise
            print(f"fused_optim: building without the CUDA kernel, because {error}", file=sys.stderr)
            return None
        return compiler, made

    def call(self, command: list[str]) -> None:
        print(" ".join(command), flush=True)
        result = subprocess.run(command, capture_output=True, text=True)
        print(result.stdout + result.stderr, end="", flush=True)
        if result.returncode != 0:
            raise RuntimeError(
                f"`{command[0]}` failed with exit status {result.returncode}: {result.stderr.strip()[-2000:]}"
            )


if __name__ == "__main__":
    if int(setuptools.__version__.split(".")[0]) < 77:  # pip itself looks only where it isolates the build
        sys.exit(
            f"fused_optim is built by setuptools 77 or newer, not {setuptools.__version__}: pip install -U setuptools"
        )
    wanted = switch("FUSED_OPTIM_CPP") is not False
    setup(ext_modules=[Extension("fused_optim._C", sources=[])] if wanted else [], cmdclass={"build_ext": Build})
