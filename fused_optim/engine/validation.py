"""Validates params, gradients and hyperparameters. Runs when tables are rebuilt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .dtensor import check_spread, is_sharded, local
from .table import DTYPE_CODES, NARROW, real_dtype

SUPPORTED = "float32, bfloat16, float16, float64, complex64 or complex128"


def may_get_grad(param: Tensor) -> bool:
    """Whether steps can touch the param. They do not touch frozen params, which may have any dtype and layout."""
    return param.requires_grad or param.grad is not None


def is_wrapper(tensor: Tensor) -> bool:
    """Whether the class of the tensor overrides torch's operations, as classes that wrap other tensors do."""
    return type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__


def check_memory(tensor: Any, who: str) -> None:
    """Raises RuntimeError if the elements have no memory: kernels would crash the process."""
    shard = local(tensor)
    if shard.numel() and shard.device.type != "meta" and not shard._is_zerotensor() and not shard.data_ptr():
        raise RuntimeError(
            f"{who} has {shard.numel()} elements but no memory (its storage may have been resized to 0 bytes); "
            "restore its memory before the step"
        )


def check_param(param: Tensor) -> None:
    """Raises RuntimeError or TypeError for a param that no backend can update."""
    if real_dtype(param.dtype) not in DTYPE_CODES:
        raise TypeError(
            f"params must be {SUPPORTED}, but got one of {param.dtype}; leave it out of the optimizer or convert it"
        )
    shard = local(param)
    if is_traceable_wrapper_subclass(shard):
        raise RuntimeError(
            f"params must be plain tensors or DTensors of plain tensors, but got a {type(shard).__name__}, which wraps "
            "other tensors; pass the tensors inside it to the optimizer"
        )
    if param.layout != torch.strided:
        raise RuntimeError(f"params must be dense tensors, but got one with layout {param.layout}")
    if any(stride == 0 and size > 1 for size, stride in zip(shard.shape, shard.stride(), strict=True)):
        raise RuntimeError(
            f"a param of shape {tuple(shard.shape)} and strides {shard.stride()} has elements that share memory (it "
            "was expanded), so it cannot be updated element by element; use param.clone()"
        )
    if param.grad is not None:
        check_memory(param, f"a param of shape {tuple(param.shape)}")


def check_grad(optimizer: str, param: Tensor, grad: Tensor, name: str | None) -> None:
    """Raises RuntimeError for a gradient that does not fit its param."""
    who = f'the gradient of param "{name}"' if name else f"the gradient of a param of shape {tuple(param.shape)}"
    if grad.layout != torch.strided:
        raise RuntimeError(
            f"{optimizer.removeprefix('Fused').removesuffix('W')} does not support sparse gradients, "
            f"please consider SparseAdam instead"
        )
    if grad.device != param.device:
        raise RuntimeError(
            f"{who} must be on the param's device, {param.device}, but is on {grad.device}; move one of them"
        )
    if grad.shape != param.shape:
        raise RuntimeError(
            f"{who} must have the param's shape, {tuple(param.shape)}, but has {tuple(grad.shape)}; "
            "was the param's .data replaced after backward()? Call zero_grad() and backward() again"
        )
    check_spread(param, grad, who)
    if grad.dtype != param.dtype and not {grad.dtype, param.dtype} <= {*NARROW}:
        raise RuntimeError(
            f"{who} must be {param.dtype} like the param (or float32, bfloat16 or float16 if the param is one of "
            f"these), but is {grad.dtype}; convert it"
        )
    shard = local(grad)
    if not is_wrapper(shard):
        check_memory(grad, who)
    elif not (is_sharded(grad) and hasattr(shard, "wait")):  # the result of an asynchronous collective
        raise RuntimeError(
            f"{who} must be a plain tensor or a DTensor of plain tensors, but is a {type(shard).__name__}, which "
            "overrides torch's operations; assign the tensor inside it to param.grad"
        )


def check_hyperparameter(key: str, value: Any, count: int) -> Sequence[Any]:
    """The `count` numbers or one-element tensors of a group's option. Raises TypeError or ValueError for anything
    else."""
    values = value if count > 1 else [value]
    if not isinstance(values, tuple | list) or len(values) != count:
        raise ValueError(f'option "{key}" of a param group must hold {count} numbers, but is {value!r}')
    for number in values:
        if isinstance(number, Tensor):
            if number.numel() != 1:
                raise ValueError(
                    f'option "{key}" of a param group must be a one-element tensor, but has shape {tuple(number.shape)}'
                )
            if number.device.type != "cpu" and (key != "lr" or number.dtype not in (torch.float32, torch.float64)):
                raise TypeError(
                    f'option "{key}" of a param group cannot be a {number.dtype} tensor on {number.device}; use a '
                    "number (only lr can be a float32 or float64 tensor on a GPU)"
                )
        elif not isinstance(number, int | float) and not hasattr(number, "__float__"):
            raise TypeError(
                f'option "{key}" of a param group must be a number or a one-element tensor, but is {value!r}'
            )
    return values
