"""A table's arrays on its GPU, kept up to date without ever waiting for the device."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from ..engine.backend import Backend
from ..engine.changes import GRADS_MOVED, RAW_CHANGED
from ..engine.graphs import capturing, refuse_capture
from ..engine.table import Scalars, Table

# Pinned buffers that are made at once, and how many must be left for captures, which can make none.
SLAB, SPARES = 32, 16


def pinned(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="cpu", pin_memory=True)  # whatever the default device is


def send(buffer: Tensor, on_device: Tensor) -> None:
    on_device.copy_(buffer, non_blocking=True)


class Upload:
    """A host array's copy on the device. The host array may be overwritten while older copies of it are still on their
    way, so each one leaves from a pinned buffer of its own, used again once an event says that it has left.

    A captured graph reads its buffer at every replay, so that buffer is never written again. Pinned memory cannot be
    allocated in a capture: steps outside of captures keep SPARES buffers ready.

    ring: buffers of copies outside of captures, each with the event after its last copy. spare: buffers that nothing
    uses. captured: those that graphs read.
    """

    def __init__(self, host: Tensor, device: torch.device) -> None:
        self.host = host
        self.on_device = torch.empty_like(host, device=device)
        self.ring: list[tuple[Tensor, torch.cuda.Event]] = []
        self.spare: list[Tensor] = []
        self.captured: list[Tensor] = []

    def __call__(self) -> None:
        if capturing():
            send(self._captured_buffer(), self.on_device)
            return
        if len(self.spare) < SPARES:
            self.spare += pinned((SLAB, *self.host.shape), self.host.dtype).unbind()
        free = next((entry for entry in self.ring if entry[1].query()), None)
        if free is None:
            free = (self.spare.pop(), torch.cuda.Event())
            self.ring.append(free)
        buffer, event = free
        send(buffer.copy_(self.host), self.on_device)
        event.record()

    def _captured_buffer(self) -> Tensor:
        """A buffer that holds what the host array holds now, and always will."""
        for buffer in self.captured:
            if torch.equal(buffer, self.host):
                return buffer
        if not self.spare:
            raise RuntimeError(
                "no pinned buffer is left for this capture, and none can be made in one: too many steps were captured "
                "with no step between. Take a step outside of captures, which makes new ones, or call "
                "release_captured() where older graphs are gone. Params and states have not been changed"
            )
        self.captured.append(self.spare.pop().copy_(self.host))
        return self.captured[-1]

    def release(self) -> None:
        """No graph reads its buffers any longer."""
        self.spare += self.captured
        self.captured = []


def sent_once(host: Tensor, device: torch.device) -> Tensor:
    """A copy of a host array that never changes. torch keeps the pinned one until the copy has been made."""
    on_device = torch.empty_like(host, device=device)
    send(pinned(host.shape, host.dtype).copy_(host), on_device)
    return on_device


class DeviceTable:
    """The device's copies of desc, rows, grads, lr, raw, group and spans.

    captured: whether a CUDA graph writes here at every replay.

    Raises:
        RuntimeError: a CUDA graph is being captured.
    """

    def __init__(self, table: Table) -> None:
        refuse_capture("a table cannot be brought to its device", "take one step before the capture")
        self.table = table
        self.captured = False
        self.streams = {torch.cuda.current_stream(table.device).cuda_stream}
        self.grads = Upload(table.grads, table.device)
        self.scalars = Upload(table.scalars.buffer, table.device)
        self.grads()
        self.scalars()

        raw, lr = Scalars.split(self.scalars.on_device)
        desc, rows, group = (sent_once(host, table.device) for host in (table.desc, table.rows, table.group))
        spans = None if table.spans is None else sent_once(table.spans, table.device)
        sums = (spans, table.partials, table.sums, table.trust)
        self.arrays = (desc, rows, self.grads.on_device, lr, raw, group, table.hyper, *sums)

    def update(self, moved: int) -> None:
        """Brings over what has `moved`."""
        stream = torch.cuda.current_stream(self.table.device)
        if stream.cuda_stream not in self.streams:
            self.streams.add(stream.cuda_stream)
            self._keep_until_done(stream)
        self.captured |= capturing()
        if self.captured:  # its graph writes here at every replay what it was captured with
            moved |= GRADS_MOVED | RAW_CHANGED
        if moved & GRADS_MOVED:
            self.grads()
        if moved & RAW_CHANGED:
            self.scalars()

    def _keep_until_done(self, stream: torch.cuda.Stream) -> None:
        """Tells the allocator that this stream uses what was allocated on another one. Else a new table could get the
        memory of this one while kernels on this stream still read it."""
        table = self.table
        made = [tensor for row in table.rows_list for tensor in (row.step, *row.states, row.ema)]
        made += [row.target for row in table.copies]
        for tensor in (*self.arrays, getattr(table, "squares", None), *made):
            if tensor is not None and not tensor.is_meta:
                tensor.record_stream(stream)

    def release(self) -> None:
        """No graph writes here any longer: what the last replay has left is replaced by what the host has."""
        self.grads.release()
        self.scalars.release()
        self.captured = False
        self.grads()
        self.scalars()


class OnDevice(Backend):
    """A backend whose kernels read the table's arrays on its device: copies on a GPU, the arrays themselves on the
    CPU."""

    device_table: DeviceTable | None = None

    def current_device(self) -> AbstractContextManager[object]:
        device = self.table.device
        return torch.cuda.device(device) if device.type == "cuda" else nullcontext()

    @property
    def arrays(self) -> tuple[Tensor | None, ...]:
        return self.table.arrays if self.table.device.type == "cpu" else self._on_device().arrays

    @property
    def captured(self) -> bool:  # type: ignore[override]
        return self.device_table is not None and self.device_table.captured

    def upload(self, changes: int) -> None:
        if self.table.device.type == "cuda":
            with self.current_device():
                self._on_device().update(changes)

    def release(self) -> None:
        if self.device_table is not None:
            with self.current_device():
                self.device_table.release()

    def _on_device(self) -> DeviceTable:
        if self.device_table is None:
            self.device_table = DeviceTable(self.table)
        return self.device_table


def release(tables: Iterable[Backend]) -> None:
    """Makes nothing keep what captured graphs have used of these tables. Waits for their devices.

    Raises:
        RuntimeError: a CUDA graph is being captured.
    """
    refuse_capture("release_captured() cannot be called", "call it before or after")
    captured = [bound for bound in tables if bound.captured]
    for device in dict.fromkeys(bound.table.device for bound in captured):
        torch.cuda.synchronize(device)
    for bound in captured:
        bound.release()
