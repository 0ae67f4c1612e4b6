"""The layout of a table: the columns of its arrays, the codes and the bit fields in them. The only definition.

Python and the Triton kernels import it. `python csrc/make_layout.py` writes csrc/layout.h from it, for C++ and CUDA.
Every compiled module carries LAYOUT as its own compiler saw it; modules.py refuses a module that differs.

A NamedTuple is one row of an array: its fields are the columns, in order. The comment beside a field goes into the
C++ header too.
"""

from __future__ import annotations

import math
from enum import IntEnum
from typing import Any, NamedTuple

CHUNK = 4096  # elements of one tensor that one program (GPU) or one loop turn (CPU) handles
SHARE = 4096  # numbers that one block of a GPU adds up where the norm of all gradients is taken
ALIGNMENT = 16  # bytes of the widest access
MAX_STATES = 3  # of one tensor
EMPTY = 16  # in `grads`: stands for the address of a gradient without elements, which is null


class RowFields(NamedTuple):
    """`rows`, int64 [tensors, ...]. Addresses are 0 where there is nothing."""

    numel: int  # elements; a complex tensor has two for each of its own
    param: int  # address
    param_low: int  # address of the low halves of the param, where its format has them
    step: int  # address of the number of updates, float32
    dtype_signature: int  # formats of the tensor's streams and its flags, packed: see `packed_signature`
    state0: int = 0  # addresses of the states, in the order of the rule
    state1: int = 0
    state2: int = 0
    ema: int = 0  # address of the moving average of the weights
    first_element: int = 0  # index, within the whole param, of the first element that lies here
    anchor: int = 0  # exponent of the anchors of a state in ANCHORED8


class GroupHparams(NamedTuple):
    """`group_hparams`, float64 [groups, ...]: the hyperparameters of a param group. The defaults hold where a group
    has no option of that name."""

    lr: Any = 0.0
    beta1: Any = 0.0
    beta2: Any = 0.0
    eps: Any = 0.0
    weight_decay: Any = 0.0
    decoupled: Any = 0.0  # whether weight decay goes past the gradient
    maximize: Any = 0.0
    lr_reference: Any = 1.0  # decoupled decay is lr / lr_reference * weight_decay / sqrt(decay_period)
    decay_period: Any = 1.0
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
    """`tensor_scalars`, float64 [tensors, ...]: what a rule reads. Prep writes it at each step; walkers round each
    number once, to the dtype of their arithmetic."""

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
    decay: Any  # weight decay that goes past it; times lr, but where a trust ratio follows
    ema_weight: Any  # of the new param in the moving average of the weights
    skip: Any  # 1: this tensor is left alone, and the other columns mean nothing
    own_a: Any = 0.0  # what the rule's function `scalars` makes
    own_b: Any = 0.0
    own_c: Any = 0.0
    own_d: Any = 0.0


class TableArrays(NamedTuple):
    """The arrays of a table, in the order in which every backend takes them. They lie on the tensors' device."""

    chunk_table: Any  # int64 [chunks]: see `chunk_entry`; the tensors in order, and of each its chunks
    rows: Any  # int64 [tensors, RowFields]
    grads: Any  # int64 [tensors]: address of the gradient; 0: there is none, and the tensor sits this step out
    lr: Any  # int64 [groups]: address of a device lr tensor (lowest bit set: float64, else float32), or 0
    group_hparams: Any  # float64 [groups, GroupHparams]
    group_index: Any  # int32 [tensors]: the row of group_hparams
    tensor_scalars: Any  # float64 [tensors, TensorScalars]
    # None where nothing is summed over whole tensors.
    row_offsets: Any = None  # int64 [tensors + 1]: tensor t has the entries row_offsets[t] up to row_offsets[t + 1]
    partials: Any = None  # float64 [chunks, 2]: sums over each chunk; [chunks + shares] for the norm of all gradients
    sums: Any = None  # float64 [tensors, 2]: squares of param and update
    trust: Any = None  # float64 [tensors]: trust ratios


# ---- formats


class Format(IntEnum):
    """How a stream stores one value per element. A format has a code and its bytes here, and one load and one store per
    language, in csrc/cpu/formats.h, csrc/cuda/formats.cuh, triton_kernels/formats.py and backends/formats.py."""

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
ABSENT = (
    2**SIGNATURE_FIELD_BITS - 1
)  # the code of a stream that a tensor does not have; it also ends the list of states


class Stream(IntEnum):
    """Places of the streams in a packed signature. The place before EMA is always ABSENT: it ends the states."""

    PARAM = 0
    GRAD = 1
    STATE0 = 2
    EMA = STATE0 + MAX_STATES + 1


EMA_BEGUN = 1 << SIGNATURE_FIELD_BITS * (
    int(Stream.EMA) + 1
)  # flag beside the codes: the average is older than the table


def packed_signature(signature: tuple[int, ...], ema: bool, begun: bool = False) -> int:
    """The formats of param, gradient, states and, with `ema`, of the average of the weights, as `rows` has them."""
    codes = [ABSENT] * (Stream.EMA + 1)
    streams, average = (signature[:-1], signature[-1]) if ema else (signature, ABSENT)
    codes[: len(streams)], codes[Stream.EMA] = streams, average
    return sum(code << SIGNATURE_FIELD_BITS * place for place, code in enumerate(codes)) | EMA_BEGUN * begun


# ---- entries of chunk_table

# Bit fields of an entry, from the lowest bit on.
ENTRY_UNALIGNED_BITS = 1  # set where a tensor that is written does not begin at a multiple of ALIGNMENT
ENTRY_SIGNATURE_BITS = 7  # number of the tensor's dtype signature, in the order of Table.dtype_signatures
ENTRY_ROW_BITS = 24
ENTRY_SIGNATURE_SHIFT = ENTRY_UNALIGNED_BITS
ENTRY_ROW_SHIFT = ENTRY_SIGNATURE_SHIFT + ENTRY_SIGNATURE_BITS
ENTRY_CHUNK_SHIFT = ENTRY_ROW_SHIFT + ENTRY_ROW_BITS  # the chunk's number within its tensor has the rest
MAX_SIGNATURES = 2**ENTRY_SIGNATURE_BITS


def chunk_entry(chunk: Any, row: Any, signature: Any, unaligned: Any) -> Any:
    """An entry of chunk_table, of numbers or of integer tensors."""
    return chunk << ENTRY_CHUNK_SHIFT | row << ENTRY_ROW_SHIFT | signature << ENTRY_SIGNATURE_SHIFT | unaligned


# ---- all of it, by name


def column(fields: Any, name: str) -> int:
    """The number of a column, for a row's NamedTuple and the name of a field."""
    names: tuple[str, ...] = fields._fields
    return names.index(name)


STRUCTS: dict[str, Any] = {"ROW": RowFields, "GROUP": GroupHparams, "SCALAR": TensorScalars, "ARRAY": TableArrays}


def _layout() -> dict[str, int]:
    scalars = "CHUNK", "SHARE", "ALIGNMENT", "MAX_STATES", "EMPTY", "SIGNATURE_FIELD_BITS", "ABSENT", "EMA_BEGUN"
    found = {name: value for name, value in globals().items() if name in scalars or name.startswith("ENTRY_")}
    found |= {f"FORMAT_{format.name}": format.value for format in Format}
    found |= {f"BYTES_{format.name}": size for format, size in FORMAT_BYTES.items()}
    found |= {f"STREAM_{stream.name}": stream.value for stream in Stream}
    for prefix, fields in STRUCTS.items():
        found |= {f"{prefix}_{field.upper()}": number for number, field in enumerate(fields._fields)}
        found[f"{prefix}_WIDTH"] = len(fields._fields)
    return found


LAYOUT = _layout()  # every name with its number; csrc/layout.h has the same, as kRowNumel for ROW_NUMEL


def difference(theirs: dict[str, int]) -> str | None:
    """The first name that another layout lacks, has besides, or has with another number, in words; None where it is
    this one."""
    for name in [*LAYOUT, *theirs]:
        if LAYOUT.get(name) != theirs.get(name):
            return f"{name} is {theirs.get(name, 'missing')} there and {LAYOUT.get(name, 'missing')} here"
    return None
