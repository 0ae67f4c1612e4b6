"""Global memory is the memory of this process. Every access of a kernel must be within the storage of a live tensor."""

from __future__ import annotations

import ctypes
import gc
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .toolchain import library

Addresses = NDArray[np.uint64]
Mask = NDArray[np.bool_]


@cache
def lanes() -> ctypes.CDLL:
    """The library native/lanes.c."""
    loaded, pointer = library("lanes.c", "lanes.so"), ctypes.c_void_p
    for copy in (loaded.gather, loaded.scatter):
        copy.argtypes, copy.restype = [ctypes.c_int64, pointer, pointer, ctypes.c_int64, pointer], None
    for fma in (loaded.fma32, loaded.fma64):
        fma.argtypes, fma.restype = [ctypes.c_int64, *[pointer] * 4], None
    return loaded


class AccessError(RuntimeError):
    """A kernel accessed memory that it must not access, or with an alignment that a GPU does not support."""


class Memory:
    """accesses: for each ("ld" or "st", size in bytes), the number of lanes that made such an access."""

    def __init__(self) -> None:
        self.accesses: Counter[tuple[str, int]] = Counter()
        self.tensors: list[weakref.ref[Tensor]] = []
        self.lent: list[tuple[int, int]] = []
        self.starts = self.ends = np.zeros(0, np.uint64)

    def load(self, addresses: Addresses, mask: Mask, size: int, text: str) -> NDArray[np.uint8]:
        """Returns bytes [lanes, size], zeros where the mask is off."""
        self.check("ld", addresses, mask, size, text)
        out = np.zeros((len(mask), size), np.uint8)
        lanes().gather(len(mask), mask.ctypes.data, addresses.ctypes.data, size, out.ctypes.data)
        return out

    def store(self, addresses: Addresses, mask: Mask, values: NDArray[np.uint8], text: str) -> None:
        """values: bytes [lanes, size]."""
        size = values.shape[1]
        self.check("st", addresses, mask, size, text)
        lanes().scatter(len(mask), mask.ctypes.data, addresses.ctypes.data, size, values.ctypes.data)

    def check(self, kind: str, addresses: Addresses, mask: Mask, size: int, text: str) -> None:
        """Checks that a kernel may make these accesses.

        Raises:
            AccessError: an address is not a multiple of the size of the access, or it is not within a live tensor.
        """
        used = addresses[mask]
        self.accesses[kind, size] += len(used)
        odd = used[used % np.uint64(size) != 0]
        if len(odd):
            raise AccessError(f"misaligned: {text} of {size} bytes at {odd[0]:#x}")
        outside = self.outside(used, size)
        for generation in range(3):  # Generation 0 is small and has the new tensors.
            if len(outside):
                self.look(generation)
                outside = self.outside(outside, size)
        if len(outside):
            raise AccessError(f"outside of every tensor: {text} of {size} bytes at {outside[0]:#x}")

    def outside(self, addresses: Addresses, size: int) -> Addresses:
        if len(self.starts) == 0:
            return addresses
        at = np.searchsorted(self.starts, addresses, side="right") - 1
        inside = (at >= 0) & (addresses + np.uint64(size) <= self.ends[np.maximum(at, 0)])
        return addresses[~inside]

    def refresh(self, lent: Sequence[tuple[int, int]] = ()) -> None:
        """Called before each pass, because tensors may have been freed and storages resized. lent: (start, end) of
        memory that no Python object owns and that this pass may access."""
        self.lent = list(lent)
        self.settle(self.alive())

    def alive(self) -> list[Tensor]:
        return [tensor for ref in self.tensors if (tensor := ref()) is not None]

    def look(self, generation: int) -> None:
        """Finds tensors among the objects that the garbage collector tracks. A gradient that only C++ has used gets its
        Python object when .grad is read, so .grad of each leaf is read too."""
        kinds = {Tensor, *subclasses(Tensor)}
        found = self.alive() + [x for x in gc.get_objects(generation) if type(x) in kinds]
        self.settle(found + [x.grad for x in found if x.is_leaf and x.grad is not None])

    def settle(self, tensors: Iterable[Tensor]) -> None:
        spans, kept = dict(self.lent), []
        for tensor in tensors:
            if tensor.device.type == "cpu" and tensor.layout == torch.strided and (span := extent(tensor)) is not None:
                kept.append(weakref.ref(tensor))
                spans[span[0]] = max(span[1], spans.get(span[0], 0))
        self.tensors = kept
        self.starts = np.array(sorted(spans), np.uint64)
        self.ends = np.array([spans[start] for start in sorted(spans)], np.uint64)


def subclasses(kind: type) -> Iterator[type]:
    for subclass in kind.__subclasses__():
        yield subclass
        yield from subclasses(subclass)


def extent(tensor: Tensor) -> tuple[int, int] | None:
    """The start and end address of the tensor's storage, or None if it has no memory."""
    try:
        storage: Any = tensor.untyped_storage()
        start = storage.data_ptr()
    except (NotImplementedError, RuntimeError):  # a wrapper subclass or a fake tensor
        return None
    return (start, start + storage.nbytes()) if start and storage.nbytes() else None
