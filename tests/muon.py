"""Shared by the tests of Muon: gradients, and one thread."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads only slow products of small matrices down."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def gradients(params: Sequence[Tensor], seed: int) -> list[Tensor]:
    """Well-conditioned matrices: of others the iteration magnifies the roundings of small singular values."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for p in params:
        flat = torch.randn(p.shape, generator=generator, dtype=torch.float64).flatten(1)
        if flat.numel():
            left, values, right = torch.linalg.svd(flat, full_matrices=False)
            flat = left @ torch.diag(values.clamp(min=0.3 * values.max().item())) @ right
        made.append(flat.reshape(p.shape).to(p.device, p.dtype))
    return made
