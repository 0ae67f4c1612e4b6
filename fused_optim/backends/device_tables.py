"""The copies of a table's arrays on its GPU. Updating them never synchronizes with the device."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from ..engine.backend import Backend
from ..engine.changes import GRADS_MOVED, RAW_CHANGED
from ..engine.graphs import capturing, refuse_capture
from ..engine.layout import TableArrays
from ..engine.table import HostHparams, Table

# Pinned buffers per allocation, and the number kept spare for captures. A capture cannot allocate pinned memory.
SLAB, SPARES = 32, 16


def pinned(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="cpu", pin_memory=True)  # the default device may be another one


def send(buffer: Tensor, on_device: Tensor) -> None:
    on_device.copy_(buffer, non_blocking=True)


class Upload:
    """The copy of a host array on the device.

    The host array may be overwritten while earlier copies are in flight. So each copy is sent from its own pinned
    buffer. The buffer is reused when an event shows that the copy is complete.

    A captured graph reads its buffer at every replay, so that buffer is never written again. Pinned memory cannot be
    allocated during a capture, so steps outside captures keep SPARES buffers ready.

    ring: buffers of copies outside captures, each with the event after its last copy.
    spare: unused buffers.
    captured: buffers that graphs read.
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
        """A buffer with the present content of the host array. It is never written again."""
        for buffer in self.captured:
            if torch.equal(buffer, self.host):
                return buffer
        if not self.spare:
            raise RuntimeError(
                "no pinned buffer is left for this capture, and a capture cannot allocate one: too many steps were "
                "captured without a step outside captures. Take a step outside captures, which allocates new buffers, "
                "or call release_captured() if older graphs are deleted. Params and states have not been changed"
            )
        self.captured.append(self.spare.pop().copy_(self.host))
        return self.captured[-1]

    def release(self) -> None:
        """Reuses the buffers of graphs. No graph may read them any longer."""
        self.spare += self.captured
        self.captured = []


def sent_once(host: Tensor, device: torch.device) -> Tensor:
    """The copy of a constant host array on the device. torch keeps the pinned buffer until the copy is complete."""
    on_device = torch.empty_like(host, device=device)
    send(pinned(host.shape, host.dtype).copy_(host), on_device)
    return on_device


class DeviceTable:
    """The copies of the host's arrays on the device.

    captured: whether a CUDA graph writes to them at every replay.

    Raises:
        RuntimeError: a CUDA graph is being captured.
    """

    def __init__(self, table: Table) -> None:
        refuse_capture("a table cannot be uploaded to its device", "take one step before the capture")
        self.table = table
        self.captured = False
        self.streams = {torch.cuda.current_stream(table.device).cuda_stream}
        self.grads = Upload(table.grads, table.device)
        self.hparams = Upload(table.hparams.buffer, table.device)
        self.grads()
        self.hparams()

        group_hparams, lr = HostHparams.split(self.hparams.on_device)
        host = table.arrays
        self.arrays = host._replace(
            chunk_table=sent_once(host.chunk_table, table.device),
            rows=sent_once(host.rows, table.device),
            grads=self.grads.on_device,
            lr=lr,
            group_hparams=group_hparams,
            group_index=sent_once(host.group_index, table.device),
            row_offsets=None if host.row_offsets is None else sent_once(host.row_offsets, table.device),
        )

    def update(self, changes: int) -> None:
        """Uploads the arrays that changed. changes: flags of changes.py."""
        stream = torch.cuda.current_stream(self.table.device)
        if stream.cuda_stream not in self.streams:
            self.streams.add(stream.cuda_stream)
            self._keep_until_done(stream)
        self.captured |= capturing()
        if self.captured:  # a replay may have overwritten the arrays with the values of its capture
            changes |= GRADS_MOVED | RAW_CHANGED
        if changes & GRADS_MOVED:
            self.grads()
        if changes & RAW_CHANGED:
            self.hparams()

    def _keep_until_done(self, stream: torch.cuda.Stream) -> None:
        """Tells the allocator that this stream uses memory that was allocated on another stream. Otherwise a new table
        could get the memory of this one while kernels on this stream still read it."""
        table = self.table
        made = [tensor for row in table.rows_list for tensor in (row.step, *row.states, row.ema)]
        made += [row.target for row in table.copies]
        for tensor in (*self.arrays, getattr(table, "squares", None), *made):
            if tensor is not None and not tensor.is_meta:
                tensor.record_stream(stream)

    def release(self) -> None:
        """Uploads the host arrays over the values of the last replay. No graph may write to the copies any longer."""
        self.grads.release()
        self.hparams.release()
        self.captured = False
        self.grads()
        self.hparams()


class OnDevice(Backend):
    """A backend whose kernels read the table's arrays on its device: copies on a GPU, the host arrays on the CPU."""

    device_table: DeviceTable | None = None

    def current_device(self) -> AbstractContextManager[object]:
        device = self.table.device
        return torch.cuda.device(device) if device.type == "cuda" else nullcontext()

    @property
    def arrays(self) -> TableArrays:
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
    """Frees the memory that these tables keep for captured graphs. Synchronizes with their devices.

    Raises:
        RuntimeError: a CUDA graph is being captured.
    """
    refuse_capture("release_captured() cannot be called", "call it before or after")
    captured = [bound for bound in tables if bound.captured]
    for device in dict.fromkeys(bound.table.device for bound in captured):
        torch.cuda.synchronize(device)
    for bound in captured:
        bound.release()
