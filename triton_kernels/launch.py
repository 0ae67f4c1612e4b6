"""Launches the kernels on the current stream, with no knowledge of any optimizer; compiles them where no GPU is."""

from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from .rules import RULES
from .step import PREP_TENSORS, THREADS, pack_kind, prep_kernel, step_kernel

Kinds = tuple[tuple[int, ...], ...]

_compiled: dict[tuple[Any, ...], CompiledKernel] = {}


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
    _start((device,), prep_kernel, programs, 1, rows, grads, lr, raw, group, hyper, scale, found, tensors)
    if chunks:
        args = desc, rows, grads, hyper, RULES[rule], _packed(kinds)
        _start((device, rule, kinds), step_kernel, chunks, THREADS.value // _warp_size(), *args)


def _start(key: tuple[Any, ...], kernel: Any, programs: int, warps: int, *args: Any) -> None:
    """Runs a kernel through the handle that its first launch with this key left. `kernel[grid]` would work out the
    specialisation every time, at several times the cost, though it depends on nothing but the key: no argument is
    specialised on its value or alignment, and the table fixes the dtypes."""
    handle = _compiled.get(key)
    if handle is not None:
        handle[programs, 1, 1](*args)
        return
    handle = kernel[programs, 1, 1](*args, num_warps=warps, enable_fp_fusion=False)
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


@cache
def _warp_size() -> int:
    return 32 if triton.knobs.runtime.interpret else triton.runtime.driver.active.get_current_target().warp_size


def compile_ahead(rule: str, kinds: Kinds, target: GPUTarget) -> CompiledKernel:
    """The step kernel as `launch` would have it compiled for a target, such as GPUTarget("cuda", 90, 32)."""
    constants = {"RULE": RULES[rule], "KINDS": _packed(kinds)}
    pointers = {"desc": "*i64", "rows": "*i64", "grads": "*i64", "hyper": "*fp64"}
    return _compile(step_kernel, pointers, constants, target, THREADS.value // target.warp_size)


def compile_prep_ahead(target: GPUTarget) -> CompiledKernel:
    """The prep kernel as `launch` would have it compiled for a target."""
    arguments = {"rows": "*i64", "grads": "*i64", "lr": "*i64", "raw": "*fp64", "group": "*i32", "hyper": "*fp64"}
    arguments |= {"grad_scale": "*fp32", "found_inf": "*fp32", "tensors": "i32"}
    return _compile(prep_kernel, arguments, {}, target, 1)


def _compile(
    kernel: Any, arguments: dict[str, str], constants: dict[str, Any], target: GPUTarget, warps: int
) -> CompiledKernel:
    source = ASTSource(kernel, arguments | dict.fromkeys(constants, "constexpr"), constants)
    return triton.compile(source, target=target, options={"num_warps": warps, "enable_fp_fusion": False})
