"""Launches the kernels on the current stream, and compiles them ahead of time without a GPU. Rules are looked up by
name: nothing here depends on an optimizer.

Arguments that the functions share:

- x: the arrays of a table. Its device must be the current one.
- signatures: the formats (param, grad, *states) of every dtype signature, in the order in which chunk_table numbers
  them. With `ema` the last format is that of the average of the weights.
- ema: whether every row has an average of its weights.
- cautious: whether a group has cautious decay.
"""

from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from fused_optim.engine.layout import Format, TableArrays

from . import step
from .formats import count_streams, format_of, is_packed, pack_signature, vector_width
from .prep import PREP_TENSORS, prep_kernel, trust_kernel
from .rules import RULES
from .scale import scale_kernel
from .sums import TOTAL_THREADS, row_sums_kernel, squares_kernel, total_kernel
from .tables import SHARE, THREADS

Signatures = tuple[tuple[int, ...], ...]

INTERPRETER = GPUTarget("interpreter", 0, 32)
TYPES = {
    **dict.fromkeys(("chunk_table", "rows", "grads", "lr", "row_offsets"), "*i64"),
    **dict.fromkeys(("group_hparams", "tensor_scalars", "partials", "sums", "trust", "squares", "out"), "*fp64"),
    **dict.fromkeys(("grad_scale", "found_inf"), "*fp32"),
    **dict.fromkeys(("tensors", "first", "count", "place"), "i32"),
    "group_index": "*i32",
}


def register_limit(signatures: tuple[int, ...]) -> int:
    """The register limit per thread of a walk over rows of these signatures; 0: no limit. Without a limit, NVIDIA's
    assembler spills a few registers to fit one more block per SM. Kernels that need fewer registers have no limit,
    because with one the assembler would use more."""
    if len(signatures) > 1 and all(count_streams(signature) == 1 for signature in signatures):
        return 40
    return max(map(_limit_of, signatures), default=0)


def _limit_of(signature: int) -> int:
    streams, width = count_streams(signature), vector_width(signature)
    if is_packed(signature):
        if width == 4:
            return 72
        return 128 if streams > 4 or format_of(signature, 0) == Format.SPLIT8 else 96
    if streams <= 2 or (width == 4 and streams < 5):
        return 0
    if streams == 3 or (width == 4 and streams == 5):
        return 64
    if width == 4:
        return 72
    if width == 8:
        return 80 if streams <= 6 else 96  # six or five blocks per SM
    return 104 if streams > 5 else 96


class Variant:
    """A kernel with its compile-time arguments.

    threads: number of threads of one program. absent: names of arguments that are None. constants: the compile-time
    arguments, which are the kernel's last ones.
    """

    def __init__(self, kernel: Any, threads: int, *absent: str, **constants: Any) -> None:
        self.kernel = kernel
        self.threads = threads
        self.absent = absent
        self.constants = constants
        self.handles: dict[torch.device, CompiledKernel] = {}

    def start(self, device: torch.device, programs: int, *args: Any) -> None:
        """Launches the kernel. Launches after the first use its compiled handle. `kernel[grid]` would determine the
        specialisation again, at several times the cost. It depends only on the variant: no argument is specialised on
        its value or alignment, and the table fixes the dtypes."""
        handle = self.handles.get(device)
        if handle is not None:
            handle[programs, 1, 1](*args, *self.constants.values())
            return
        handle = self.kernel[programs, 1, 1](*args, *self.constants.values(), **self.options(_target()))
        if handle is not None:  # the interpreter returns None
            self.handles[device] = handle

    def options(self, target: GPUTarget) -> dict[str, Any]:
        options = {"num_warps": max(1, self.threads // target.warp_size), "enable_fp_fusion": False}
        if target.backend == "cuda" and (limit := register_limit(self.constants.get("SIGNATURES", ()))):
            options["maxnreg"] = limit
        return options

    def compile_ahead(self, target: GPUTarget) -> CompiledKernel:
        """Compiles the kernel as `start` does, but for a given target, such as GPUTarget("cuda", 90, 32)."""
        constants = self.constants | dict.fromkeys(self.absent)
        signature = {name: "constexpr" if name in constants else TYPES[name] for name in self.kernel.arg_names}
        source = ASTSource(self.kernel, signature, constants)
        return triton.compile(source, target=target, options=self.options(target))


@cache
def prep_variant(scalars: triton.JITFunction | None, clips: bool, scales_decay: bool, running: int) -> Variant:
    """scalars, scales_decay, running: the rule's, see rules/rule.py."""
    absent = () if clips else ("squares",)
    constants = {"OWN_SCALARS": scalars, "SCALES_DECAY": scales_decay, "RUNNING": running}
    return Variant(prep_kernel, PREP_TENSORS.value, *absent, **constants)


@cache
def step_variant(rule: str, signatures: Signatures, ema: bool, cautious: bool) -> Variant:
    """The whole step. For a rule with a trust ratio it is the first walk."""
    measure = RULES[rule].measure
    walk, absent = (step.update, ("partials", "trust")) if measure is None else (step.update_moments, ("trust",))
    if ema and measure is not None:  # the second walk updates the averages
        return step_variant(rule, tuple(signature[:-1] for signature in signatures), False, False)
    packed = tuple(map(pack_signature, signatures))
    constants = {
        "PASS": walk,
        "RULE": RULES[rule].update,
        "SECOND": measure,
        "SIGNATURES": packed,
        "EMA": ema,
        "CAUTIOUS": cautious,
    }
    return Variant(step.step_kernel, THREADS.value, *absent, **constants)


@cache
def apply_update_variant(rule: str, signatures: Signatures, ema: bool, cautious: bool) -> Variant:
    """The second walk of a rule with a trust ratio. It reads no gradient."""
    packed = tuple(pack_signature((param, *states)) for param, _, *states in signatures)
    walk = step.apply_update if RULES[rule].scales_decay else step.apply_update_beside_decay
    constants = {
        "PASS": walk,
        "RULE": None,
        "SECOND": RULES[rule].direction,
        "SIGNATURES": packed,
        "EMA": ema,
        "CAUTIOUS": cautious,
    }
    return Variant(step.step_kernel, THREADS.value, "grads", "partials", **constants)


def of_gradients(signatures: Signatures) -> tuple[int, ...]:
    return tuple(pack_signature((grad,)) for _, grad, *_ in signatures)


@cache
def squares_variant(signatures: Signatures) -> Variant:
    return Variant(squares_kernel, THREADS.value, SIGNATURES=of_gradients(signatures))


@cache
def scale_variant(signatures: Signatures) -> Variant:
    return Variant(scale_kernel, THREADS.value, SIGNATURES=of_gradients(signatures))


@cache
def trust_variant(ratio: triton.JITFunction) -> Variant:
    """ratio: the rule's."""
    return Variant(trust_kernel, PREP_TENSORS.value, RATIO=ratio)


ROW_SUMS = Variant(row_sums_kernel, THREADS.value)
TOTAL = Variant(total_kernel, TOTAL_THREADS.value)


def launch(
    rule: str,
    signatures: Signatures,
    x: TableArrays,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    squares: Tensor | None,
    ema: bool = False,
    cautious: bool = False,
) -> None:
    """One step of every tensor: prep, then the update. For a rule with a trust ratio it is the first walk, which ends
    with `sums`.

    grad_scale, found_inf: one number each. A float32 tensor on the table's device avoids a conversion. None: gradients
    are not scaled; no step is skipped. squares: the sum of what `launch_squares` wrote on all devices. None: no
    clipping.
    """
    tensors, chunks, device = x.grads.numel(), x.chunk_table.numel(), x.grads.device
    if tensors == 0:
        return
    one, zero = _neutral(device)
    scale = one if grad_scale is None else _float32_on(device, grad_scale)
    found = zero if found_inf is None else _float32_on(device, found_inf)
    programs = -(-tensors // PREP_TENSORS.value)
    arithmetic = RULES[rule]
    prep = prep_variant(arithmetic.scalars, squares is not None, arithmetic.scales_decay, arithmetic.running)
    hparams = x.lr, x.group_hparams, x.group_index
    prep.start(device, programs, x.rows, x.grads, *hparams, x.tensor_scalars, scale, found, squares, tensors)
    partials = None if x.trust is None else x.partials  # without a trust ratio only clipping uses them
    if chunks:
        walk = step_variant(rule, signatures, ema, cautious)
        walk.start(device, chunks, x.chunk_table, x.rows, x.grads, x.tensor_scalars, partials, None)
    if x.trust is not None:
        ROW_SUMS.start(device, tensors, x.row_offsets, partials, x.sums)


def launch_apply_update(
    rule: str,
    signatures: Signatures,
    x: TableArrays,
    ema: bool = False,
    cautious: bool = False,
) -> None:
    """The second walk of a rule with a trust ratio: computes the ratios from `sums`, then updates the params. Does
    nothing for other rules."""
    tensors, chunks, device = x.grads.numel(), x.chunk_table.numel(), x.grads.device
    if x.trust is None or tensors == 0:
        return
    trust_variant(RULES[rule].ratio).start(
        device,
        -(-tensors // PREP_TENSORS.value),
        x.group_hparams,
        x.group_index,
        x.tensor_scalars,
        x.sums,
        x.trust,
        tensors,
    )
    if chunks:
        walk = apply_update_variant(rule, signatures, ema, cautious)
        walk.start(device, chunks, x.chunk_table, x.rows, None, x.tensor_scalars, None, x.trust)


def launch_squares(
    signatures: Signatures,
    x: TableArrays,
    out: Tensor,
) -> None:
    """Writes the sum of the squares of all gradients whose groups are clipped to out, float64 [1]."""
    device, chunks = x.grads.device, x.chunk_table.numel()
    assert x.partials is not None
    if chunks:
        hparams = x.group_hparams, x.group_index
        squares_variant(signatures).start(device, chunks, x.chunk_table, x.rows, x.grads, *hparams, x.partials)
    launch_total(x.partials, chunks, out)


def launch_total(partials: Tensor, count: int, out: Tensor) -> None:
    """Writes the sum of the first `count` numbers of partials to out, float64 [1]. While there are more than SHARE
    numbers, a launch sums shares of SHARE numbers and writes the sums after them; then these sums are summed."""
    first = 0
    while count > SHARE.value:
        shares = -(-count // SHARE.value)
        TOTAL.start(out.device, shares, partials, partials, first, count, first + count)
        first, count = first + count, shares
    TOTAL.start(out.device, 1, partials, out, first, count, 0)


def launch_scale(
    signatures: Signatures,
    x: TableArrays,
    squares: Tensor,
) -> None:
    """Multiplies each gradient in place by the clip coefficient of its group. squares: the sum of what `launch_squares`
    wrote on all devices."""
    if chunks := x.chunk_table.numel():
        hparams = x.group_hparams, x.group_index
        walk = scale_variant(signatures)
        walk.start(x.grads.device, chunks, x.chunk_table, x.rows, x.grads, *hparams, squares)


@cache
def _neutral(device: torch.device) -> tuple[Tensor, Tensor]:
    """A 1 and a 0, shared by all optimizers on a device. The stream is synchronized once, when they are made, because
    kernels on other streams read them without waiting for this one."""
    made = torch.ones(1, device=device), torch.zeros(1, device=device)
    if device.type != "cpu":
        torch.cuda.current_stream(device).synchronize()
    return made


def _float32_on(device: torch.device, tensor: Tensor) -> Tensor:
    if tensor.dtype == torch.float32 and tensor.device == device:  # `to` takes microseconds even without a conversion
        return tensor
    return tensor.to(device, torch.float32)


def _target() -> GPUTarget:
    return INTERPRETER if triton.knobs.runtime.interpret else triton.runtime.driver.active.get_current_target()
