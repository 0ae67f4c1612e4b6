"""A kernel that applies one function of triton_kernels/formats.py to arrays, for the tests of the formats."""

import torch
import triton
import triton.language as tl
from fused_optim.triton_kernels import packed as formats
from torch import Tensor

BLOCK = 16384


@triton.jit
def format_kernel(
    out: tl.tensor,
    x: tl.tensor,
    a: tl.tensor,
    b: tl.tensor,
    exponent: tl.tensor,
    NAME: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """x, a, b: int32; bits of floats, or integers. Writes int32 likewise."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    word, threshold = tl.load(x + at), tl.load(a + at)
    value, square = word.to(tl.float32, bitcast=True), tl.load(b + at).to(tl.float32, bitcast=True)
    threshold = threshold.to(tl.uint32, bitcast=True)
    if NAME == "threshold_square":
        made = formats.threshold(formats.SQUARE, word.to(tl.uint32, bitcast=True), threshold).to(tl.int32, bitcast=True)
    elif NAME == "threshold_average":
        made = formats.threshold(formats.AVERAGE, word.to(tl.uint32, bitcast=True), threshold).to(
            tl.int32, bitcast=True
        )
    elif NAME == "threshold_param":
        made = formats.threshold(formats.PARAM, word.to(tl.uint32, bitcast=True), threshold).to(tl.int32, bitcast=True)
    elif NAME == "bf16":
        made = formats.encode_bf16(value, threshold).to(tl.int32)
    elif NAME == "upper":
        made = formats.upper_half(value).to(tl.int32)
    elif NAME == "lower":
        made = formats.lower_half(value).to(tl.int32)
    elif NAME == "quarter":
        made = formats.lower_quarter(value, threshold).to(tl.int32)
    elif NAME == "join":
        made = formats.join_halves(word.to(tl.uint16), threshold.to(tl.uint16).to(tl.int16, bitcast=True)).to(
            tl.int32, bitcast=True
        )
    elif NAME == "join8":
        made = formats.join_quarter(word.to(tl.uint16), threshold.to(tl.uint8).to(tl.int8, bitcast=True)).to(
            tl.int32, bitcast=True
        )
    elif NAME == "e8m8":
        made = formats.encode_e8m8(value, threshold).to(tl.int32)
    elif NAME == "from_e8m8":
        made = formats.decode_e8m8(word.to(tl.uint16)).to(tl.int32, bitcast=True)
    elif NAME == "anchored8":
        made = formats.encode_anchored8(value, square, exponent, threshold).to(tl.int32)
    else:
        made = formats.decode_anchored8(word.to(tl.uint8), square, exponent).to(tl.int32, bitcast=True)
    tl.store(out + at, made)


def launch(name: str, x: Tensor, a: Tensor, b: Tensor, exponent: int) -> Tensor:
    count = x.numel()
    padded = [torch.nn.functional.pad(t, (0, -count % BLOCK)) for t in (x, a, b)]
    out = torch.empty_like(padded[0])
    format_kernel[(out.numel() // BLOCK,)](out, *padded, exponent, name, BLOCK, num_warps=4, enable_fp_fusion=False)
    return out[:count]
