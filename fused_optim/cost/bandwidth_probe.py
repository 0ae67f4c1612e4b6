"""The bandwidth probe: the reads and writes of a step without arithmetic. Its time is the least that a step can take,
so benchmarks and cost estimates compare with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..engine import modules


def bandwidth_probe(
    written: Sequence[Sequence[Tensor]],
    read: Sequence[Sequence[Tensor]],
    piece: int = 0,
    threads: int | None = None,
    prefetch: int = 0,
) -> Callable[[], None]:
    """A function that runs the probe in one parallel region.

    Args:
        written: 1 to 8 streams that are read and written. A stream is a list of host tensors; all streams have lists
            of one length.
        read: 1 to 4 streams that are only read.
        piece: bytes of each stream that a thread takes at a time. 0: each thread has one contiguous share.
        threads: number of threads. None: torch's number.
        prefetch: distance of the software prefetch in bytes. 0: no prefetch.

    Raises:
        RuntimeError: the C++ kernel is not built.
        ValueError: piece, prefetch or threads is too small, the number of streams is out of range, or tensors at the
            same position in two streams differ in size.
    """
    module = modules.built(modules.cpu())
    sizes = [tensor.nbytes for tensor in read[0]] if read else []
    for stream in (*written, *read):
        if [tensor.nbytes for tensor in stream] != sizes:
            raise ValueError("the streams of a bandwidth probe must hold tensors of the same sizes in bytes")
    if piece < 0 or prefetch < 0 or (threads is not None and threads < 1):
        raise ValueError(
            "the piece and prefetch of a bandwidth probe must be 0 or more bytes and threads must be 1 or more, but "
            f"got {piece}, {prefetch} and {threads}"
        )
    held = written, read
    addresses = [[[tensor.data_ptr() for tensor in stream] for stream in streams] for streams in held]
    run = module.BandwidthProbe(*addresses, sizes, piece, prefetch)

    def step() -> None:
        assert held  # keeps the tensors alive while their addresses are in use
        run(torch.get_num_threads() if threads is None else threads)

    return step
