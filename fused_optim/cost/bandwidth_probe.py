"""The floor pass: what the memory allows, which benchmarks and cost estimates hold a step against."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..engine import modules


def floor_pass(
    written: Sequence[Sequence[Tensor]],
    read: Sequence[Sequence[Tensor]],
    piece: int = 0,
    threads: int | None = None,
    prefetch: int = 0,
) -> Callable[[], None]:
    """A pass with the reads and writes of a step and no arithmetic, in one parallel region.

    Args:
        written: streams that are read and written, each a list of as many host tensors; 1 to 8.
        read: those that are only read; 1 to 4.
        piece: bytes of each stream that a thread takes at a time; 0: each thread has one contiguous share.
        threads: how many; None: torch's number.
        prefetch: distance in bytes of the software prefetch; 0 for none.

    Raises:
        RuntimeError: the C++ kernel is not built.
        ValueError: piece, prefetch or threads is too small, there are too many streams, or two tensors at one place in
            their lists differ in size.
    """
    module = modules.built(modules.cpu())
    sizes = [tensor.nbytes for tensor in read[0]] if read else []
    for stream in (*written, *read):
        if [tensor.nbytes for tensor in stream] != sizes:
            raise ValueError("the streams of a floor pass must hold tensors of the same sizes in bytes")
    if piece < 0 or prefetch < 0 or (threads is not None and threads < 1):
        raise ValueError(
            "a floor pass takes piece and prefetch of 0 or more bytes and 1 thread or more, but got "
            f"{piece}, {prefetch} and {threads}"
        )
    held = written, read
    addresses = [[[tensor.data_ptr() for tensor in stream] for stream in streams] for streams in held]
    run = module.FloorPass(*addresses, sizes, piece, prefetch)

    def step() -> None:
        assert held  # the tensors live as long as their addresses are used
        run(torch.get_num_threads() if threads is None else threads)

    return step
