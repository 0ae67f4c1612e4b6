"""Forked children of a process that has stepped on the CPU."""

from __future__ import annotations

import os

import torch

_in_child = False


def _remember() -> None:
    global _in_child
    _in_child = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_remember)


def heed_fork() -> None:
    """To be called before each walk. A child has none of its parent's OpenMP threads: torch, whose thread count the C++
    walker follows too, would wait for them for ever."""
    global _in_child
    if _in_child:
        torch.set_num_threads(1)
        _in_child = False
