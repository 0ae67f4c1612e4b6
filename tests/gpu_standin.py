"""A stand-in for the CUDA runtime on machines without a GPU: streams with queued work, events, pinned buffers,
captures.

Device memory is host memory. A launch is only queued; it executes when its stream runs. Captured work executes at every
replay. The backend "standin" steps with the emulated CUDA kernels, over the arrays of a DeviceTable. As in CUDA, a
capture may neither allocate pinned memory nor query an event.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch import Tensor

from fused_optim import backends
from fused_optim.backends import device_tables as device
from fused_optim.backends.cuda import Cuda
from fused_optim.backends.native import address_of, arrays_of
from fused_optim.engine import graphs, modules
from fused_optim.engine.backend import Backend

Work = Callable[[], object]
MISSING = modules.load("_cuda_emulated")
built = pytest.mark.skipif(isinstance(MISSING, str), reason=str(MISSING))


class Stream:
    def __init__(self, number: int) -> None:
        self.cuda_stream = number
        self.waiting: list[Work] = []
        self.launched = self.done = 0

    def launch(self, work: Work) -> None:
        self.waiting.append(work)
        self.launched += 1

    def run(self) -> None:
        """Executes the queued work in order."""
        while self.waiting:
            self.waiting.pop(0)()
            self.done += 1

    synchronize = run


class Graph:
    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self.work: list[Work] = []

    def replay(self) -> None:
        for work in self.work:
            self.runtime.current.launch(work)


class Event:
    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self.stream, self.position = runtime.current, 0

    def record(self) -> None:
        self.stream = self.runtime.current
        self.position = self.stream.launched

    def query(self) -> bool:
        self.runtime.refuse_in_capture("cudaEventQuery")
        return self.stream.done >= self.position


class Runtime:
    """recorded: (address, stream) of every call of record_stream. pinned: the number of bytes pinned so far."""

    def __init__(self) -> None:
        self.streams = [Stream(0)]
        self.current = self.streams[0]
        self.graph: Graph | None = None
        self.recorded: set[tuple[int, int]] = set()
        self.pinned = 0

    def refuse_in_capture(self, what: str) -> None:
        if self.graph is not None:
            raise RuntimeError(f"{what}: operation not permitted when stream is capturing")

    def launch(self, work: Work) -> None:
        if self.graph is None:
            self.current.launch(work)
        else:
            self.graph.work.append(work)

    def synchronize(self, _: object = None) -> None:
        self.refuse_in_capture("cudaDeviceSynchronize")
        for stream in self.streams:
            stream.run()

    def pin(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        self.refuse_in_capture("cudaHostAlloc")
        made = torch.full(tuple(shape), -1, dtype=dtype)
        self.pinned += made.nbytes
        return made

    @contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def new_stream(self) -> Stream:
        self.streams.append(Stream(len(self.streams)))
        return self.streams[-1]

    @contextmanager
    def capture(self) -> Iterator[Graph]:
        """Like torch.cuda.graph: captures on a new stream, after all earlier work has finished."""
        self.synchronize()
        graph = Graph(self)
        with self.on(self.new_stream()):
            self.graph = graph
            try:
                yield graph
            finally:
                self.graph = None

    def backend(self) -> type[Backend]:
        launch = self.launch

        class StandIn(Cuda):
            """Runs the emulated kernels on the arrays of a DeviceTable."""

            name = "standin"

            @staticmethod
            def why_not(device: torch.device | None) -> str | None:
                return None

            @property
            def arrays(self) -> tuple[Tensor | None, ...]:
                return self._on_device().arrays

            def upload(self, changes: int) -> None:
                self._on_device().update(changes)

            def _call(self, function: str, before: tuple[str, ...], *numbers: Tensor | None) -> None:
                # The kernel gets only the addresses of the table's arrays: the optimizer must keep them alive until it
                # runs. The queued work holds the tensors made for one step, as the allocator's stream order does.
                if self._arrays is None:
                    self._arrays = arrays_of(self._module, self.table, self.arrays)
                module, rest = self._module, (self._arrays, *map(address_of, numbers))
                launch(lambda: (getattr(module, function)(*before, *rest), numbers))

        return StandIn


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Runtime:
    made = Runtime()
    monkeypatch.setattr(device, "pinned", made.pin)
    monkeypatch.setattr(device, "send", lambda source, target: made.launch(lambda: target.copy_(source)))
    for module in (device, graphs):
        monkeypatch.setattr(module, "capturing", lambda: made.graph is not None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _=None: made.current)
    monkeypatch.setattr(torch.cuda, "Event", lambda: Event(made))
    monkeypatch.setattr(torch.cuda, "synchronize", made.synchronize)
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    record = lambda tensor, stream: made.recorded.add((tensor.data_ptr(), stream.cuda_stream))  # noqa: E731
    monkeypatch.setattr(torch.Tensor, "record_stream", record)
    monkeypatch.setitem(backends.BACKENDS, "standin", made.backend())
    return made


__all__ = ["Event", "Graph", "Runtime", "Stream", "built", "runtime"]
