"""Launches the kernels on the current stream, with no knowledge of any optimizer; compiles them where no GPU is."""

from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from .rules import RULES
from .step import PREP_TENSORS, THREADS, pack_kind, prep_kernel, step_kernel, vector_width

Kinds = tuple[tuple[int, ...], ...]

INTERPRETER = GPUTarget("interpreter", 0, 32)

_compiled: dict[tuple[torch.device, str, Kinds | None], CompiledKernel] = {}


def launch(
    rule: str,
    kinds: Kinds,
    desc: Tensor,
    rows: Tensor,
    grads: Tensor,
    lr: Tensor,
    raw: Tensor,
    group: Tensor,
    hyper: Tensor,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """One step of every tensor of a table (csrc/tables.h), whose device is the current one: prep, then the update.

    kinds: the dtype codes (param, grad, *states) of every kind, in the order in which `desc` numbers them.
    grad_scale, found_inf: one number each, best a float32 on the table's device; None is no scaling, no skipping.
    """
    tensors, chunks = grads.numel(), desc.numel()
    if tensors == 0:
        return
    device = grads.device
    one, zero = _neutral(device)
    scale = one if grad_scale is None else _float32_on(device, grad_scale)
    found = zero if found_inf is None else _float32_on(device, found_inf)
    programs = -(-tensors // PREP_TENSORS.value)
    _start((device, "prep", None), prep_kernel, programs, rows, grads, lr, raw, group, hyper, scale, found, tensors)
    if chunks:
        args = desc, rows, grads, hyper, RULES[rule], _packed(kinds)
        _start((device, rule, kinds), step_kernel, chunks, *args)


def _start(key: tuple[torch.device, str, Kinds | None], kernel: Any, programs: int, *args: Any) -> None:
    """Runs a kernel through the handle that its first launch with this key left. `kernel[grid]` would work out the
    specialisation every time, at several times the cost, though it depends on nothing but the key: no argument is
    specialised on its value or alignment, and the table fixes the dtypes."""
    handle = _compiled.get(key)
    if handle is not None:
        handle[programs, 1, 1](*args)
        return
    handle = kernel[programs, 1, 1](*args, **_options(key[2], _target()))
    if handle is not None:  # The interpreter has none.
        _compiled[key] = handle


@cache
def _neutral(device: torch.device) -> tuple[Tensor, Tensor]:
    return torch.ones(1, device=device), torch.zeros(1, device=device)


def _float32_on(device: torch.device, tensor: Tensor) -> Tensor:
    if tensor.dtype == torch.float32 and tensor.device == device:  # `to` alone takes microseconds to find nothing to do
        return tensor
    return tensor.to(device, torch.float32)


@cache
def _packed(kinds: Kinds) -> tuple[int, ...]:
    return tuple(pack_kind(codes) for codes in kinds)


def _target() -> GPUTarget:
    return INTERPRETER if triton.knobs.runtime.interpret else triton.runtime.driver.active.get_current_target()


def _options(kinds: Kinds | None, target: GPUTarget) -> dict[str, Any]:
    """How to compile the step kernel for these kinds, or prep (None)."""
    options = {"num_warps": THREADS.value // target.warp_size if kinds else 1, "enable_fp_fusion": False}
    # Left to itself, NVIDIA's assembler spills one of some 70 registers to fit one more block per SM; a limit keeps it
    # from that. Kinds with four elements per access need no more than 64, and a limit would only make it use more.
    if target.backend == "cuda" and any(vector_width(kind) != 4 for kind in _packed(kinds or ())):
        options["maxnreg"] = 96
    return options


def compile_ahead(rule: str, kinds: Kinds, target: GPUTarget) -> CompiledKernel:
    """The step kernel as `launch` would have it compiled for a target, such as GPUTarget("cuda", 90, 32)."""
    constants = {"RULE": RULES[rule], "KINDS": _packed(kinds)}
    arguments = {"desc": "*i64", "rows": "*i64", "grads": "*i64", "hyper": "*fp64"}
    source = ASTSource(step_kernel, arguments | dict.fromkeys(constants, "constexpr"), constants)
    return triton.compile(source, target=target, options=_options(kinds, target))


def compile_prep_ahead(target: GPUTarget) -> CompiledKernel:
    """The prep kernel as `launch` would have it compiled for a target."""
    arguments = {"rows": "*i64", "grads": "*i64", "lr": "*i64", "raw": "*fp64", "group": "*i32", "hyper": "*fp64"}
    arguments |= {"grad_scale": "*fp32", "found_inf": "*fp32", "tensors": "i32"}
    return triton.compile(ASTSource(prep_kernel, arguments, {}), target=target, options=_options(None, target))
