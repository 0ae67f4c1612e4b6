"""Clips gradients in place, for any optimizer: torch.nn.utils.clip_grad_norm_ with one read and one write."""

from __future__ import annotations

import functools
import itertools
import math
import types
import warnings
from array import array
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from ..backends import BackendName
from ..backends import device_tables as devices
from ..backends.trial import choose
from ..engine.changes import GRADS_MOVED, RAW_CHANGED
from ..engine.forks import reset_threads_after_fork
from ..engine.table import DTYPE_CODES, HostHparams, Row, Rule, Table, is_dense, real_dtype

__all__ = ["clip_grad_norm_", "release_captured"]

EPS = 1e-6  # added to the norm, as in torch
NO_RULE = Rule("clip", states=(), options=())
PLAIN = {Tensor, torch.nn.Parameter}
MOST_KEPT = 16  # tables; a training loop clips one list of gradients, or a few


def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
    *,
    backend: BackendName = "auto",
) -> Tensor:
    """torch.nn.utils.clip_grad_norm_ with one read and one write of the gradients: multiplies all gradients in place by
    min(1, max_norm / (norm + 1e-6)), where norm is the norm of all of them together.

    On a GPU it takes three kernel launches for any number of gradients, or four if they have more than 4096 chunks (up
    to 4096 elements of one gradient each). It does not wait for the device, unless error_if_nonfinite is true. If
    nothing has to be clipped, no gradient is written.

    The norm is a float64 sum in a fixed order, so every run gives the same value. (On a CPU, eight squares at a time
    are summed in float32, unless the gradients are float64.) The factor is rounded once, to float32, or to float64 for
    float64 gradients. torch computes both in the gradients' dtype.

    torch's function is called instead in these cases:

    - Another norm_type than 2, or a max_norm that is not above 0.
    - Gradients that are sparse, have gaps in memory, share memory, are of a tensor subclass such as DTensor, or are
      neither on a CPU nor on a GPU.
    - Dtypes other than float32, bfloat16, float16, float64, complex64 and complex128.
    - A call that torch.compile traces.
    - A call during the capture of a CUDA graph, unless gradients of the same layouts and dtypes were clipped outside of
      captures since the last captured call.

    Args:
        parameters: a tensor or several, whose `grad` is clipped. Tensors without a gradient are left out.
        max_norm: the largest norm after clipping.
        norm_type: 2, or any other p that torch supports.
        error_if_nonfinite: raise an error if the norm is NaN or infinite. Waits for the device.
        foreach: passed on if torch's function is called, otherwise without effect.
        backend: "auto", "triton", "cuda", "cpp" or "reference" (see fused_optim.backends).

    Returns:
        The norm before clipping: shape [], on the first gradient's device, in the dtype that all gradients promote to
            (the real dtype for complex gradients). Without gradients it is a float32 0 on the CPU.

    Raises:
        RuntimeError: the norm is not finite and error_if_nonfinite is true, or the named backend cannot run here. No
            gradient has been changed.
        ValueError: there is no backend of that name.
    """
    parameters, given = [parameters] if isinstance(parameters, Tensor) else list(parameters), parameters
    if not parameters and isinstance(given, types.GeneratorType):
        warnings.warn("`parameters` is an empty generator, no gradient clipping will occur.", stacklevel=2)
    grads = [grad for grad in (p.grad for p in parameters) if grad is not None]
    max_norm, norm_type = float(max_norm), float(norm_type)
    known = grads and norm_type == 2 and max_norm > 0 and not is_dynamo_compiling()
    found = _find(grads, backend, max_norm) if known else None
    if found is None:
        return torch.nn.utils.clip_grad_norm_(parameters, max_norm, norm_type, error_if_nonfinite, foreach)

    reset_threads_after_fork()
    squares = _sum_of_squares([gradients for _, gradients in found])
    if error_if_nonfinite and not math.isfinite(squares.item()):
        raise RuntimeError(
            f"The total norm of order {norm_type} for gradients from "
            "`parameters` is non-finite, so it cannot be clipped. To disable "
            "this error and scale the gradients by the non-finite norm anyway, "
            "set `error_if_nonfinite=False`"
        )
    dtype = functools.reduce(torch.promote_types, [gradients.dtype for _, gradients in found])
    norm = squares.sqrt().to(dtype).reshape(())
    for key, gradients in found:
        gradients.bound.scale_grads(squares.to(gradients.table.device))
        _keep(key, gradients)
    torch.autograd.graph.increment_version(grads)
    return norm


class Gradients:
    """A table for the gradients of one device. It holds layouts and addresses, not the tensors.

    dtype: dtype of the norm. sizes: bytes of each gradient. addresses: the addresses in the table.
    """

    def __init__(
        self, grads: Sequence[Tensor], addresses: list[int], device: torch.device, backend: str, max_norm: float
    ) -> None:
        self.dtype = functools.reduce(torch.promote_types, {real_dtype(grad.dtype) for grad in grads})
        self.sizes = [grad.nbytes for grad in grads]
        self.max_norm = max_norm
        with torch.device("cpu"):
            rows = [self._row(grad) for grad in grads]
            self.table = Table(NO_RULE, device, rows, HostHparams(1, clip_eps=EPS, max_norm=max_norm), clips=True)
        self.bound = choose(backend, self.table, steps=False)
        if self.bound.reads_tensors:
            for row, grad in zip(rows, grads, strict=True):
                row.param = grad.detach()
                row.param.grad = grad
        self._write(addresses)

    @staticmethod
    def _row(grad: Tensor) -> Row:
        """A row with a param on the meta device, because clipping has no param."""
        param = torch.empty(grad.numel(), dtype=grad.dtype, device="meta")
        return Row(
            param=param,
            shard=param,
            target=param,
            states=[],
            step=param,
            state={},
            grad_dtype=grad.dtype,
            group_index=0,
        )

    def _write(self, addresses: list[int]) -> None:
        self.addresses = addresses
        self.table.grads.copy_(torch.frombuffer(array("q", addresses), dtype=torch.int64))

    def update(self, addresses: list[int], max_norm: float) -> None:
        changes = 0
        if addresses != self.addresses:
            self._write(addresses)
            changes |= GRADS_MOVED
        if max_norm != self.max_norm:
            self.table.hparams.column("max_norm").fill_(max_norm)
            self.max_norm = max_norm
            changes |= RAW_CHANGED
        self.bound.upload(changes)


# Tables by stream, device, backend, dtypes and layout. The last used table comes last. A call removes its entry and
# puts it back when it is done, so no two threads write to one table. Each stream has entries of its own, because
# kernels of two streams can overlap.
_kept: dict[tuple[Any, ...], Gradients] = {}
_captured: list[Gradients] = []  # tables that graphs read: never changed again, freed by release_captured


def release_captured() -> None:
    """Frees the memory that is kept for CUDA graphs in which clip_grad_norm_ was captured. Call it when none of these
    graphs will be replayed again. Waits for the devices.

    Raises:
        RuntimeError: a CUDA graph is being captured.
    """
    devices.release([gradients.bound for gradients in _captured])
    _captured.clear()


def _find(grads: Sequence[Tensor], backend: str, max_norm: float) -> list[tuple[Any, Gradients]] | None:
    """Tables for all gradients, with their keys in _kept. None if the kernels do not support one of the gradients."""
    if not {type(grad) for grad in grads} <= PLAIN or {grad.layout for grad in grads} != {torch.strided}:
        return None
    devices = list(dict.fromkeys([grad.device for grad in grads]))
    found = []
    for device in devices:
        members = grads if len(devices) == 1 else [grad for grad in grads if grad.device == device]
        if device.type not in ("cpu", "cuda") or (gradients := _take(members, device, backend, max_norm)) is None:
            return None
        found.append(gradients)
    return found


def _take(grads: Sequence[Tensor], device: torch.device, backend: str, max_norm: float) -> tuple[Any, Gradients] | None:
    stream, capturing = 0, False
    if device.type == "cuda":
        stream = torch.cuda.current_stream(device).cuda_stream
        capturing = torch.cuda.is_current_stream_capturing()
    dtypes = tuple([grad.dtype for grad in grads])
    layout = tuple([grad.numel() if grad.is_contiguous() else (grad.shape, grad.stride()) for grad in grads])
    key = (stream, device, backend, dtypes, layout)
    if capturing:  # a capture has a stream of its own; kernels of other streams are done
        key = next((other for other in list(_kept) if other[1:] == key[1:]), key)
    gradients = _kept.pop(key, None)
    if gradients is None:
        known = all(real_dtype(dtype) in DTYPE_CODES for dtype in set(dtypes))
        if capturing or not known or not all(is_dense(grad) for grad in grads):
            return None
    addresses = [grad.data_ptr() for grad in grads]
    if gradients is None:
        if _overlap(addresses, [grad.nbytes for grad in grads]):
            return None
        return key, Gradients(grads, addresses, device, backend, max_norm)
    if addresses != gradients.addresses and _overlap(addresses, gradients.sizes):
        return None
    gradients.update(addresses, max_norm)
    return key, gradients


def _overlap(addresses: Sequence[int], sizes: Sequence[int]) -> bool:
    """Whether any two gradients share memory. sizes: in bytes."""
    spans = sorted(zip(addresses, sizes, strict=True))
    return any(first + size > second for (first, size), (second, _) in itertools.pairwise(spans))


def _keep(key: tuple[Any, ...], gradients: Gradients) -> None:
    if gradients.bound.captured:
        _captured.append(gradients)
    elif not gradients.bound.reads_tensors:  # a table that reads tensors would keep the gradients alive
        _kept[key] = gradients
        for oldest in list(_kept)[:-MOST_KEPT]:
            _kept.pop(oldest, None)


def _sum_of_squares(tables: Sequence[Gradients]) -> Tensor:
    """The sum of squares over all tables: float64 [1], on the first table's device."""
    found = []
    for gradients in tables:
        assert gradients.table.squares is not None
        gradients.bound.sum_squares(gradients.table.squares)
        found.append(gradients.table.squares)
    first, *others = found
    return functools.reduce(lambda total, other: total + other.to(total.device), others, first)
