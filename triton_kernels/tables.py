"""The table (csrc/tables.h) as the kernels see it: where its columns are, and what a kind says of the tensors of a row.

A kind, the dtype signature of a row, is one integer: a nibble for each tensor that is walked, then 15. The average of
weights comes right after the states, other than in the table.
"""

import triton
import triton.language as tl

CHUNK = tl.constexpr(4096)  # elements of one tensor that one program handles: kChunk
SHARE = tl.constexpr(4096)  # numbers that one program adds up where the norm of all gradients is taken: kShare
THREADS = tl.constexpr(128)  # of one program that walks a chunk

# RowColumn, RawColumn, and the order of Hyper.
ROW_WIDTH, ROW_PARAM, ROW_STEP, ROW_SIGNATURE, ROW_STATE, ROW_EMA = (tl.constexpr(i) for i in (8, 1, 2, 3, 4, 7))
EMA_BEGUN = tl.constexpr(1 << 28)
RAW_WIDTH, RAW_EMA_DECAY = tl.constexpr(17), tl.constexpr(16)
RAW_LR, RAW_BETA1, RAW_BETA2, RAW_EPS, RAW_WEIGHT_DECAY, RAW_DECOUPLED, RAW_MAXIMIZE, RAW_A, RAW_B = (
    tl.constexpr(i) for i in range(9)
)
RAW_LR_REFERENCE, RAW_DECAY_PERIOD, RAW_MAX_NORM, RAW_CLIP_EPS, RAW_TRUST_LOW, RAW_TRUST_HIGH, RAW_TRUST_ALWAYS = (
    tl.constexpr(i) for i in range(9, 16)
)
HYPER_WIDTH, HYPER_SKIP = tl.constexpr(16), tl.constexpr(11)

DTYPES = (tl.float32, tl.bfloat16, tl.float16, tl.float64)
ABSENT = 15


def pack_kind(codes: tuple[int, ...]) -> int:
    """The signature of the dtype codes of streams, in order."""
    return sum(code << 4 * i for i, code in enumerate((*codes, ABSENT)))


@triton.constexpr_function
def count_streams(kind: int) -> int:
    """How many tensors of a row are walked."""
    return next(i for i in range(16) if kind >> 4 * i & 15 == ABSENT)


@triton.constexpr_function
def stream_dtype(kind: int, stream: int) -> tl.dtype:
    return DTYPES[kind >> 4 * stream & 15]


@triton.constexpr_function
def vector_width(kind: int) -> int:
    """Elements per thread and access: 16 bytes of the widest dtype. All streams have the same width: else values would
    have to change threads, through shared memory, on their way from one stream to another."""
    return 128 // max(DTYPES[kind >> 4 * i & 15].primitive_bitwidth for i in range(count_streams(kind)))
