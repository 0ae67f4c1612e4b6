"""The backends "triton-ptx" and "cuda-ptx": the library's "triton" and "cuda" backends on CPU tensors. The interpreter
runs their kernels as compiled for a GPU.

"triton-ptx": the library's launch.py, and Triton's compiler, cache and launcher, on a stand-in driver.
"cuda-ptx": csrc/cuda/step.cu as nvcc compiles it, including the host code, on a stand-in runtime.

Before every pass the scratch arrays of a step (`tensor_scalars`, sums) are overwritten with NaN, because no step may
use values of the step before.
"""

from __future__ import annotations

import ctypes
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from commands import ROOT
from torch import Tensor

from fused_optim import backends
from fused_optim.backends.triton import Triton
from fused_optim.engine.backend import Backend, Scaling
from fused_optim.engine.table import Table, same_strides

from .launched import LAUNCHES
from .toolchain import ARCH, compiled_step, library, missing

STREAM = 0x5151  # the handle of the current stream in the stand-ins


def why_not(*tools: str) -> Callable[[torch.device | None], str | None]:
    def reason(device: torch.device | None) -> str | None:
        if device is not None and device.type != "cpu":
            return "the interpreter of PTX runs on CPU tensors"
        if torch.cuda.is_available():
            return "there is a GPU here, which runs the kernels itself"
        return missing(*tools)

    return reason


def poison(table: Table, *names: str) -> None:
    for name in names:
        if (array := getattr(table, name)) is not None:
            array.fill_(math.nan)


def copied(table: Table) -> list[tuple[int, int]]:
    """Address ranges of the gradients that change detection copied because the kernels cannot read the originals. No
    Python object holds these copies."""
    found = []
    for row, address in zip(table.rows_list, table.grads.tolist(), strict=True):
        grad = row.param.grad
        if address == 0 or type(grad) is not Tensor or grad.numel() == 0 or row.target.device.type != "cpu":
            continue
        views = grad.is_conj() or grad.is_neg() or grad._is_zerotensor()
        if views or not same_strides(grad, row.target):
            found.append((address, address + grad.nbytes))
    return found


def stand_in_driver() -> ctypes.CDLL:
    return library("libcuda.c", "libcuda.so.1", ctypes.RTLD_GLOBAL)


@cache
def use_stand_in_driver() -> None:
    """From now on Triton compiles for a GPU that does not exist, and launches through the stand-in."""
    driver = stand_in_driver()
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.driver import CudaDriver

    triton.knobs.nvidia.libcuda_path = str(Path(driver._name).parent)
    ptx_of: dict[int, tuple[str, str]] = {}

    class StandIn(CudaDriver):
        def __init__(self) -> None:
            super().__init__()
            self.get_device_capability = lambda device=0: (ARCH // 10, ARCH % 10)
            self.get_current_stream = lambda device: STREAM
            self.get_current_device = lambda: 0
            self.set_current_device = lambda device: None

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", ARCH, 32)

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cpu")

    def loaded(module: int, function: int, name: str, group: dict[str, str], key: str) -> None:
        (path,) = (path for file, path in group.items() if file.endswith(".ptx"))
        ptx_of[function] = (Path(path).read_text(), name)

    three = ctypes.POINTER(ctypes.c_uint)
    kind = ctypes.CFUNCTYPE(
        ctypes.c_int, ctypes.c_uint64, three, three, ctypes.c_uint, ctypes.c_uint64, ctypes.c_void_p
    )

    def launch(function: int, grid: Any, block: Any, shared: int, stream: int, pointers: int) -> int:
        assert grid[1] == grid[2] == block[1] == block[2] == 1
        return LAUNCHES.run(*ptx_of[function], grid[0], block[0], shared, stream, pointers)

    callback = kind(launch)
    driver.set_launch(callback)
    triton.runtime.driver.set_active(StandIn())
    hook = triton.knobs.runtime.kernel_load_end_hook
    if hasattr(hook, "add"):
        hook.add(loaded)
    else:
        triton.knobs.runtime.kernel_load_end_hook = loaded
    KEPT.extend([callback, loaded])


KEPT: list[Any] = []  # callbacks that C code holds: they must not be freed


class TritonPtx(Triton):
    """The library's functions, unchanged, on another driver."""

    name = "triton-ptx"
    why_not = staticmethod(why_not("gcc"))

    @contextmanager
    def checked(self, *poisoned: str) -> Iterator[None]:
        use_stand_in_driver()
        poison(self.table, *poisoned)
        with LAUNCHES.raising(copied(self.table)):
            yield

    def sum_squares(self, out: Tensor) -> None:
        with self.checked("partials"):
            super().sum_squares(out)

    def step(self, scaling: Scaling) -> None:
        with self.checked("tensor_scalars", "partials", "sums"):
            super().step(scaling)

    def apply_update(self) -> None:
        with self.checked("partials"):
            super().apply_update()

    def scale_grads(self, squares: Tensor) -> None:
        with self.checked("partials"):
            super().scale_grads(squares)


@cache
def tables_type() -> type[ctypes.Structure]:
    """struct Tables, read from csrc/tables.h."""
    text = re.search(r"struct Tables \{(.*?)\n\};", (ROOT / "csrc/tables.h").read_text(), re.DOTALL)
    assert text
    types = {"int64_t": ctypes.c_int64, "int32_t": ctypes.c_int32, "bool": ctypes.c_bool}
    found = re.findall(r"^\s*(?:const )?(\w+)(\*?) (\w+);", text[1], re.MULTILINE)
    fields = [(name, ctypes.c_void_p if star else types[kind]) for kind, star, name in found]
    return type("Tables", (ctypes.Structure,), {"_fields_": fields})


def tables(table: Table, **numbers: Tensor | None) -> Any:
    arrays = table.arrays._asdict() | numbers
    made = tables_type()(**{key: None if x is None else x.data_ptr() for key, x in arrays.items()})
    made.chunks, made.tensors = table.chunk_table.numel(), table.rows.size(0)
    made.ema, made.packed = table.ema, table.packed
    return made


@cache
def host_code() -> dict[str, Any]:
    """The entry points of csrc/cuda/step.h by name. They use the stand-in runtime, which is loaded first."""
    runtime = library("cudart.c", "libcudart-stand-in.so", ctypes.RTLD_GLOBAL)
    ptx, path = compiled_step()
    kind = ctypes.CFUNCTYPE(
        ctypes.c_int,
        ctypes.c_char_p,
        ctypes.c_uint,
        ctypes.c_uint,
        ctypes.c_size_t,
        ctypes.c_uint64,
        ctypes.c_void_p,
    )

    def launch(name: bytes, blocks: int, threads: int, shared: int, stream: int, pointers: int) -> int:
        return LAUNCHES.run(ptx, name.decode(), blocks, threads, shared, stream, pointers)

    callback = kind(launch)
    runtime.set_launch(callback)
    KEPT.append(callback)
    code = ctypes.CDLL(str(path))
    table, pointer, number, text = ctypes.POINTER(tables_type()), ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p
    signatures = {
        "step": ("PKcRKNS_6TablesEPvi", text, table, pointer, number),
        "apply_update": ("PKcRKNS_6TablesEPvi", text, table, pointer, number),
        "squares": ("RKNS_6TablesEPdPvi", table, pointer, pointer, number),
        "scale": ("RKNS_6TablesEPvi", table, pointer, number),
    }
    functions = {}
    for name, (mangled, *types) in signatures.items():
        full = f"launch_{name}_cuda"
        functions[name] = getattr(code, f"_ZN11fused_optim{len(full)}{full}E{mangled}")
        functions[name].argtypes = types
    return functions


def call(name: str, table: Table, *args: Any) -> None:
    with LAUNCHES.raising(copied(table)):
        error = host_code()[name](*args, STREAM, 0)
        if error != 0:
            raise RuntimeError(f"launch_{name}_cuda has returned {error}")


class CudaPtx(Backend):
    name = "cuda-ptx"
    why_not = staticmethod(why_not("gcc", "nvcc"))

    def sum_squares(self, out: Tensor) -> None:
        poison(self.table, "partials")
        call("squares", self.table, tables(self.table), out.data_ptr())

    def step(self, scaling: Scaling) -> None:
        poison(self.table, "tensor_scalars", "partials", "sums")
        numbers = {"grad_scale": scaling.grad_scale, "found_inf": scaling.found_inf, "squares": scaling.squares}
        call("step", self.table, self.table.rule.name.encode(), tables(self.table, **numbers))

    def apply_update(self) -> None:
        poison(self.table, "partials")
        call("apply_update", self.table, self.table.rule.name.encode(), tables(self.table))

    def scale_grads(self, squares: Tensor) -> None:
        poison(self.table, "partials")
        call("scale", self.table, tables(self.table, squares=squares))


NAMES = ("triton-ptx", "cuda-ptx")


def register() -> None:
    """Makes the backends selectable by name. "auto" never selects them."""
    backends.BACKENDS.update({backend.name: backend for backend in (TritonPtx, CudaPtx)})
