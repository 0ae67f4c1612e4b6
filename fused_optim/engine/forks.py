"""Handles forks of a process that has stepped on the CPU."""

from __future__ import annotations

import os

import torch

_in_child = False


def _remember() -> None:
    global _in_child
    _in_child = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_remember)


def reset_threads_after_fork() -> None:
    """Call this before each walk. OpenMP workers do not survive a fork, and the child would wait for them without end.
    So the child sets torch's number of threads to 1, which the C++ walker follows."""
    global _in_child
    if _in_child:
        torch.set_num_threads(1)
        _in_child = False
