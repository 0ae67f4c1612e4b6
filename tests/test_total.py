"""The CUDA kernels sum the squares of all gradients in the order of csrc/cuda/kernels.cuh, bit for bit.
test_triton_sums.py tests Triton's kernels."""

from __future__ import annotations

import pytest
import torch
from cases import Target, on_every_target
from torch import Tensor

from fused_optim import clip_grad_norm_
from fused_optim.engine.layout import SHARE
from fused_optim.engine.table import count_shares
from fused_optim.recipes import clip

THREADS = 1024


def in_order(numbers: Tensor) -> Tensor:
    """The sum of one share: first each thread's numbers in turn, then the threads' sums in pairs."""
    padded = torch.cat([numbers, numbers.new_zeros(SHARE - len(numbers))])
    sums = padded.new_zeros(THREADS)
    for part in padded.view(-1, THREADS):
        sums = sums + part
    while len(sums) > 1:
        sums = sums[: len(sums) // 2] + sums[len(sums) // 2 :]
    return sums


@on_every_target
@pytest.mark.compiled
def test_shares_then_their_sums(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    if not target.backend.startswith("cuda"):
        pytest.skip("tests the order of the CUDA kernels")
    count = SHARE + 5
    values = torch.randn(count, generator=torch.Generator().manual_seed(0)).to(target.device)
    params = [torch.zeros(1, device=target.device, requires_grad=True) for _ in range(count)]
    for param, value in zip(params, values, strict=True):
        param.grad = value.reshape(1)
    kept: dict[object, clip.Gradients] = {}
    monkeypatch.setattr(clip, "_kept", kept)
    norm = clip_grad_norm_(params, 1e6, backend=target.backend)
    (gradients,) = kept.values()
    table = gradients.table
    assert table.partials is not None and table.squares is not None
    gradients.bound.sum_squares(table.squares)  # again, because the clipping pass may have overwritten the sums
    assert len(table.partials) == count + count_shares(count)
    squares = values.double() ** 2
    assert torch.equal(table.partials[:count], squares)
    shares = torch.cat([in_order(part) for part in squares.split(SHARE)])
    assert torch.equal(table.partials[count:], shares)
    assert torch.equal(table.squares, in_order(shares))
    torch.testing.assert_close(norm, values.norm())
