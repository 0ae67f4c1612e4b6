"""The layout of a table: columns of arrays, codes, bit fields. This file is its only definition.

Python and the Triton kernels import it. `python csrc/make_layout.py` generates csrc/layout.h for C++ and CUDA. Every
compiled module contains the LAYOUT that it was compiled with, and modules.py refuses a module whose LAYOUT differs.

A NamedTuple is one row of an array: its fields are the columns, in order. The comment beside a field goes into the
C++ header, too.
"""

from __future__ import annotations

import math
from enum import IntEnum
from typing import Any, NamedTuple

CHUNK = 4096  # elements of one tensor that one program (GPU) or one loop turn (CPU) handles
SHARE = 4096  # numbers that one GPU block sums for the norm of all gradients
ALIGNMENT = 16  # bytes of the widest access
MAX_STATES = 4  # of one tensor
MAX_RUNNING = 3  # running scalars of one tensor: two of the rule, and the largest lr
EMPTY = 16  # in `grads`: replaces the address of a gradient without elements, which is null


class RowFields(NamedTuple):
    """`rows`, int64 [tensors, ...]. The address of a missing tensor is 0."""

    numel: int  # elements; a complex tensor has two for each of its own
    param: int  # address
    param_low: int  # address of the lower halves of the param, if its format has them
    step: int  # address of the number of updates, float32
    dtype_signature: int  # formats of the tensor's streams and its flags, packed: see `packed_signature`
    state0: int = 0  # addresses of the states, in the order of the rule
    state1: int = 0
    state2: int = 0
    state3: int = 0
    ema: int = 0  # address of the moving average of the weights
    first_element: int = 0  # index of the tensor's first element in the whole param
    anchor: int = 0  # exponent of the anchors of a state in ANCHORED8
    running0: int = 0  # addresses of the running scalars, float32: those of the rule in its order, then the largest lr
    running1: int = 0
    running2: int = 0


class GroupHparams(NamedTuple):
    """`group_hparams`, float64 [groups, ...]: the hyperparameters of a param group. A default is used if the group has
    no such option."""

    lr: Any = 0.0
    beta1: Any = 0.0
    beta2: Any = 0.0
    beta3: Any = 0.0  # of rules with three averages
    eps: Any = 0.0
    weight_decay: Any = 0.0
    decoupled: Any = 0.0  # whether weight decay is decoupled from the gradient
    maximize: Any = 0.0
    lr_reference: Any = 1.0  # decoupled decay is lr / lr_reference * weight_decay / sqrt(decay_period)
    decay_period: Any = 1.0
    first_decay: Any = 1.0  # the first step of a param that has decoupled decay
    cautious_decay: Any = 0.0  # whether decoupled decay leaves out elements that the update moves away from 0
    no_prox: Any = 1.0  # 0: decoupled decay divides by 1 + decay after the update
    max_norm: Any = 0.0  # of all gradients; 0: not clipped, not in the norm; < 0: neither, but NaN and inf still show
    clip_eps: Any = 0.0  # added to the norm
    trust_low: Any = 0.0  # bounds of the trust ratio
    trust_high: Any = math.inf
    trust_always: Any = 0.0  # whether the trust ratio is also used without weight decay
    ema_decay: Any = 0.0  # share that a moving average of the weights keeps at each step
    option_a: Any = 0.0  # the rule's own options
    option_b: Any = 0.0
    option_c: Any = 0.0
    option_d: Any = 0.0


class TensorScalars(NamedTuple):
    """`tensor_scalars`, float64 [tensors, ...]: the numbers that a rule reads. Prepare writes them at each step.
    Walkers round each number once, to the dtype of their arithmetic."""

    lr: Any
    eps: Any
    weight1: Any  # 1 - beta1
    weight2: Any  # 1 - beta2
    small_beta1: Any  # beta1 if it is below 0.5, otherwise 0
    small_beta2: Any  # beta2 if it is below 0.5, otherwise 0
    step_size: Any  # lr / (1 - beta1**step)
    debias: Any  # 1 / (1 - beta1**step)
    denom_scale: Any  # 1 / sqrt(1 - beta2**step)
    grad_factor: Any  # multiplies the gradient: 1 / grad_scale, the clip coefficient, the sign of maximize
    l2: Any  # weight decay that is added to the gradient
    decay: Any  # decoupled weight decay, multiplied by lr unless the rule has a trust ratio
    cautious_decay: Any  # the group's
    ema_weight: Any  # weight of the new param in the moving average of the weights
    skip: Any  # 1: this tensor is not updated, and the other columns have no meaning
    own_a: Any = 0.0  # results of the rule's function `scalars`
    own_b: Any = 0.0
    own_c: Any = 0.0
    own_d: Any = 0.0
    own_e: Any = 0.0
    own_f: Any = 0.0


class TableArrays(NamedTuple):
    """The arrays of a table, in the order of every backend's arguments. They are on the tensors' device."""

    chunk_table: Any  # int64 [chunks]: see `chunk_entry`; ordered by tensor, then by chunk
    rows: Any  # int64 [tensors, RowFields]
    grads: Any  # int64 [tensors]: address of the gradient; 0: no gradient, and no update
    lr: Any  # int64 [groups]: address of a device lr tensor (lowest bit set: float64, else float32), or 0
    group_hparams: Any  # float64 [groups, GroupHparams]
    group_index: Any  # int32 [tensors]: the row of group_hparams
    tensor_scalars: Any  # float64 [tensors, TensorScalars]
    # None if nothing is summed over whole tensors.
    row_offsets: Any = None  # int64 [tensors + 1]: tensor t has the entries row_offsets[t] up to row_offsets[t + 1]
    partials: Any = None  # float64 [chunks, 2]: sums over each chunk; [chunks + shares] for the norm of all gradients
    sums: Any = None  # float64 [tensors, 2]: squares of param and update
    trust: Any = None  # float64 [tensors]: trust ratios


# ---- formats


class Format(IntEnum):
    """The ways in which a stream stores one value per element. The code and the bytes of a format are defined here.
    Each language has one load and one store for it, in csrc/cpu/formats.h, csrc/cuda/formats.cuh,
    triton_kernels/formats.py and backends/formats.py."""

    FLOAT32 = 0
    BFLOAT16 = 1
    FLOAT16 = 2
    FLOAT64 = 3
    # Packed formats, see csrc/formats.h.
    BFLOAT16_DITHERED = 4
    SPLIT16 = 5  # bfloat16, and int16 lower halves in a second array
    SPLIT8 = 6  # and int8
    E8M8 = 7
    ANCHORED8 = 8


FORMAT_BYTES = {
    Format.FLOAT32: 4,
    Format.BFLOAT16: 2,
    Format.FLOAT16: 2,
    Format.FLOAT64: 8,
    Format.BFLOAT16_DITHERED: 2,
    Format.SPLIT16: 2,
    Format.SPLIT8: 2,
    Format.E8M8: 2,
    Format.ANCHORED8: 1,
}
SIGNATURE_FIELD_BITS = 4  # of a code in a packed signature
ABSENT = 2**SIGNATURE_FIELD_BITS - 1  # the code of a missing stream; it also ends the list of states


class Stream(IntEnum):
    """Places of the streams in a packed signature. The place before EMA is always ABSENT: it ends the states."""

    PARAM = 0
    GRAD = 1
    STATE0 = 2
    EMA = STATE0 + MAX_STATES + 1


# Flag beside the codes: the average is older than the table.
EMA_BEGUN = 1 << SIGNATURE_FIELD_BITS * (int(Stream.EMA) + 1)


def packed_signature(signature: tuple[int, ...], ema: bool, begun: bool = False) -> int:
    """Packs the formats of param, gradient, states and, with `ema`, average of the weights, as in `rows`."""
    codes = [ABSENT] * (Stream.EMA + 1)
    streams, average = (signature[:-1], signature[-1]) if ema else (signature, ABSENT)
    codes[: len(streams)], codes[Stream.EMA] = streams, average
    return sum(code << SIGNATURE_FIELD_BITS * place for place, code in enumerate(codes)) | EMA_BEGUN * begun


# ---- entries of chunk_table

# Bit fields of an entry, from the lowest bit on.
ENTRY_UNALIGNED_BITS = 1  # set if a written tensor does not begin at a multiple of ALIGNMENT
ENTRY_SIGNATURE_BITS = 7  # number of the tensor's dtype signature, in the order of Table.dtype_signatures
ENTRY_ROW_BITS = 24
ENTRY_SIGNATURE_SHIFT = ENTRY_UNALIGNED_BITS
ENTRY_ROW_SHIFT = ENTRY_SIGNATURE_SHIFT + ENTRY_SIGNATURE_BITS
ENTRY_CHUNK_SHIFT = ENTRY_ROW_SHIFT + ENTRY_ROW_BITS  # the chunk's number within its tensor has the remaining bits
MAX_SIGNATURES = 2**ENTRY_SIGNATURE_BITS


def chunk_entry(chunk: Any, row: Any, signature: Any, unaligned: Any) -> Any:
    """An entry of chunk_table. The arguments are numbers or integer tensors."""
    return chunk << ENTRY_CHUNK_SHIFT | row << ENTRY_ROW_SHIFT | signature << ENTRY_SIGNATURE_SHIFT | unaligned


# ---- the whole layout by name


def column(fields: Any, name: str) -> int:
    """The number of a column. fields: the NamedTuple of the row."""
    names: tuple[str, ...] = fields._fields
    return names.index(name)


STRUCTS: dict[str, Any] = {"ROW": RowFields, "GROUP": GroupHparams, "SCALAR": TensorScalars, "ARRAY": TableArrays}


def _layout() -> dict[str, int]:
    scalars = (
        "CHUNK",
        "SHARE",
        "ALIGNMENT",
        "MAX_STATES",
        "MAX_RUNNING",
        "EMPTY",
        "SIGNATURE_FIELD_BITS",
        "ABSENT",
        "EMA_BEGUN",
    )
    found = {name: value for name, value in globals().items() if name in scalars or name.startswith("ENTRY_")}
    found |= {f"FORMAT_{format.name}": format.value for format in Format}
    found |= {f"BYTES_{format.name}": size for format, size in FORMAT_BYTES.items()}
    found |= {f"STREAM_{stream.name}": stream.value for stream in Stream}
    for prefix, fields in STRUCTS.items():
        found |= {f"{prefix}_{field.upper()}": number for number, field in enumerate(fields._fields)}
        found[f"{prefix}_WIDTH"] = len(fields._fields)
    return found


LAYOUT = _layout()  # by name; csrc/layout.h has the same numbers, for example kRowNumel for ROW_NUMEL


def difference(theirs: dict[str, int]) -> str | None:
    """Describes the first name that is missing, additional or has another number in `theirs`. None if the layouts are
    equal."""
    for name in [*LAYOUT, *theirs]:
        if LAYOUT.get(name) != theirs.get(name):
            return f"{name} is {theirs.get(name, 'missing')} there and {LAYOUT.get(name, 'missing')} here"
    return None
