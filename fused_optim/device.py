"""A table's arrays on its GPU, kept up to date without ever waiting for the device."""

from __future__ import annotations

import torch
from torch import Tensor

from .table import Scalars, Table
from .watch import GRADS_MOVED, RAW_CHANGED


class Upload:
    """A host array's copy on the device. The host array may be overwritten while older copies of it are still on their
    way, so each one leaves from a pinned buffer of its own, used again once an event says that it has left."""

    def __init__(self, host: Tensor, device: torch.device) -> None:
        self.host = host
        self.on_device = torch.empty_like(host, device=device)
        self.ring: list[tuple[Tensor, torch.cuda.Event]] = []
        # A captured graph reads its buffer at every replay: it gets one that nothing else ever uses, pinned while
        # that is allowed.
        self.spare = [self._pinned()]
        self.captured: list[Tensor] = []

    def _pinned(self) -> Tensor:
        return torch.empty_like(self.host, pin_memory=True)

    def __call__(self) -> None:
        if torch.cuda.is_current_stream_capturing():
            buffer = self.spare.pop() if self.spare else self._pinned()
            self.captured.append(buffer)
            self.on_device.copy_(buffer.copy_(self.host), non_blocking=True)
            return
        if not self.spare:
            self.spare.append(self._pinned())
        free = next((entry for entry in self.ring if entry[1].query()), None)
        if free is None:
            free = (self._pinned(), torch.cuda.Event())
            self.ring.append(free)
        buffer, event = free
        self.on_device.copy_(buffer.copy_(self.host), non_blocking=True)
        event.record()


class DeviceTable:
    """The device's copies of desc, rows, grads, lr, raw, group and spans."""

    def __init__(self, table: Table) -> None:
        self.table = table
        self.captured = False
        fixed = [table.desc, table.rows, table.group, *([] if table.spans is None else [table.spans])]
        self.fixed = [Upload(host, table.device) for host in fixed]
        self.grads = Upload(table.grads, table.device)
        self.scalars = Upload(table.scalars.buffer, table.device)
        for upload in (*self.fixed, self.grads, self.scalars):
            upload()

        raw, lr = Scalars.split(self.scalars.on_device)
        desc, rows, group, *spans = (upload.on_device for upload in self.fixed)
        sums = (spans[0] if spans else None, table.partials, table.sums, table.trust)
        self.arrays = (desc, rows, self.grads.on_device, lr, raw, group, table.hyper, *sums)

    @staticmethod
    def of(table: Table) -> DeviceTable:
        if table.on_device is None:
            table.on_device = DeviceTable(table)
        assert isinstance(table.on_device, DeviceTable)
        return table.on_device

    def update(self, moved: int) -> None:
        """Brings over what has `moved`."""
        self.captured |= torch.cuda.is_current_stream_capturing()
        if self.captured:  # its graph writes here at every replay what it was captured with
            moved |= GRADS_MOVED | RAW_CHANGED
        if moved & GRADS_MOVED:
            self.grads()
        if moved & RAW_CHANGED:
            self.scalars()
