"""How kernels read a table: the positions of its columns (from fused_optim/engine/layout.py) and the fields of an entry
of chunk_table."""

import triton
import triton.language as tl

from fused_optim.engine.layout import LAYOUT, GroupHparams, RowFields, TensorScalars

CHUNK = tl.constexpr(LAYOUT["CHUNK"])  # elements of one tensor per program
SHARE = tl.constexpr(LAYOUT["SHARE"])  # numbers that one program adds up for the norm of all gradients
ALIGNMENT = tl.constexpr(LAYOUT["ALIGNMENT"])
THREADS = tl.constexpr(128)  # threads of one program that walks a chunk

# Kernels read columns by name, with `column`. So the names and positions are part of the key under which Triton caches
# compiled kernels.
ROWS, ROW_WIDTH = tl.constexpr(RowFields._fields), tl.constexpr(LAYOUT["ROW_WIDTH"])
GROUPS, GROUP_WIDTH = tl.constexpr(GroupHparams._fields), tl.constexpr(LAYOUT["GROUP_WIDTH"])
GROUP_DEFAULTS = tl.constexpr(tuple(GroupHparams()))
SCALARS, SCALAR_WIDTH = tl.constexpr(TensorScalars._fields), tl.constexpr(LAYOUT["SCALAR_WIDTH"])
EMA_BEGUN = tl.constexpr(LAYOUT["EMA_BEGUN"])

UNALIGNED_MASK = tl.constexpr(2 ** LAYOUT["ENTRY_UNALIGNED_BITS"] - 1)
SIGNATURE_SHIFT = tl.constexpr(LAYOUT["ENTRY_SIGNATURE_SHIFT"])
SIGNATURE_MASK = tl.constexpr(2 ** LAYOUT["ENTRY_SIGNATURE_BITS"] - 1)
ROW_SHIFT = tl.constexpr(LAYOUT["ENTRY_ROW_SHIFT"])
ROW_MASK = tl.constexpr(2 ** LAYOUT["ENTRY_ROW_BITS"] - 1)
CHUNK_SHIFT = tl.constexpr(LAYOUT["ENTRY_CHUNK_SHIFT"])


@triton.constexpr_function
def column(fields: tuple[str, ...], name: str) -> int:
    """The index of a column, for example column(ROWS, "step")."""
    return fields.index(name)


@triton.jit
def row_of(entry: tl.tensor) -> tl.tensor:
    return (entry >> ROW_SHIFT) & ROW_MASK


@triton.jit
def first_element(entry: tl.tensor) -> tl.tensor:
    """Index of the chunk's first element within its tensor."""
    return (entry >> CHUNK_SHIFT) * CHUNK


@triton.jit
def signature_number(entry: tl.tensor) -> tl.tensor:
    """Index of the row's dtype signature among the table's signatures."""
    return (entry >> SIGNATURE_SHIFT) & SIGNATURE_MASK


@triton.jit
def is_aligned(entry: tl.tensor) -> tl.tensor:
    """Whether param, states and average begin at a multiple of ALIGNMENT. The gradient is not included."""
    return entry & UNALIGNED_MASK == 0


@triton.jit
def device_lr(address: tl.tensor, otherwise: tl.tensor, mask: tl.tensor) -> tl.tensor:
    """The lr at an address in device memory. An odd address marks float64, an even one float32. Address 0 stands for
    `otherwise`."""
    wide = mask & (address & 1 != 0)
    narrow = mask & (address & 1 == 0) & (address != 0)
    lr64 = tl.load((address & -2).to(tl.pointer_type(tl.float64)), mask=wide, other=0.0)
    lr32 = tl.load(address.to(tl.pointer_type(tl.float32)), mask=narrow, other=0.0)
    return tl.where(wide, lr64, tl.where(narrow, lr32.to(tl.float64), otherwise))


@triton.jit
def read_group(group_hparams: tl.tensor, lr: tl.tensor | None, index: tl.tensor, mask: tl.tensor) -> GroupHparams:
    """The hyperparameters of groups. The compiler removes the loads of unused ones. lr: the addresses of lr tensors,
    which replace the host's values; None if the caller does not use lr."""
    row = group_hparams + index.to(tl.int64) * GROUP_WIDTH
    columns: tl.tuple = ()
    for i in tl.static_range(GROUP_WIDTH):
        number = tl.load(row + i, mask=mask, other=GROUP_DEFAULTS[i])
        if lr is not None and i == column(GROUPS, "lr"):
            number = device_lr(tl.load(lr + index, mask=mask, other=0), number, mask)
        columns += (number,)
    return GroupHparams(*columns)
