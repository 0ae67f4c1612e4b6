"""CUDA graphs: detects captures and refuses what cannot be captured."""

from __future__ import annotations

import torch


def capturing() -> bool:
    """Whether a CUDA graph is being captured on the current stream."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def refuse_capture(what: str, instead: str) -> None:
    """Raises RuntimeError if a CUDA graph is being captured."""
    if capturing():
        raise RuntimeError(f"{what} while a CUDA graph is being captured; {instead}")
