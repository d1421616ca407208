"""The streams of a `CudaMover` and the events on them: which place of which stream is reached, and who waits for whom.

A wait binds to the latest record of its event, so an event is recorded again only when its last record is known to be
reached. Nothing here waits on the host.
"""

from __future__ import annotations

from collections import deque
from typing import Any

from kvpool.mover.cuda_runtime import CudaRuntime
from kvpool.mover.slot_events import CALLER, ENGINES, GATHER, STREAMS, Clock


class Stream:
    """One CUDA stream (the caller has none), and the events of its work that are not known to be reached."""

    def __init__(self, cuda: Any) -> None:
        self.cuda = cuda
        self.place = 0  # of the latest work
        self.reached = 0  # all work up to here is done
        self.events: deque[tuple[int, Any]] = deque()


class Streams:
    """By number, as slot_events counts them; the engine's come as they are seen. Under the mover's lock."""

    def __init__(self, runtime: CudaRuntime) -> None:
        self._runtime = runtime
        self._all = [Stream(None if number == CALLER else runtime.stream()) for number in range(GATHER + 1)]
        self._engine: dict[int, int] = {}  # address of an engine's stream -> its number
        self._spare: list[Any] = []

    def __getitem__(self, number: int) -> Stream:
        return self._all[number]

    def own(self) -> list[Any]:
        """CUDA's streams that are the mover's."""
        return [stream.cuda for stream in self._all[: GATHER + 1] if stream.cuda is not None]

    def number(self, stream: Any) -> int:
        """Number of an engine's stream, which is new or known; of None the caller's."""
        if stream is None:
            return CALLER
        given = stream if isinstance(stream, int) else getattr(stream, "cuda_stream", None)  # PyTorch's have that
        address = getattr(stream, "ptr", None) if given is None else given
        if not isinstance(address, int):
            raise ValueError(f"stream: {stream!r} is none of CuPy's, PyTorch's, or the address of a CUDA stream")
        number = self._engine.get(address)
        if number is None:
            number = len(self._all)
            if number == STREAMS:
                raise ValueError(f"stream: the mover knows {ENGINES} streams of the engine already")
            cuda = stream if given is None else self._runtime.external_stream(given)
            self._all.append(Stream(cuda))
            self._engine[address] = number
        return number

    def wait(self, number: int, waits: Clock) -> None:
        """The stream waits, on the device, for these places of the others."""
        for prior, place in enumerate(waits.tolist()):
            if prior != number and place:
                event = self.event_of(prior, place)
                if event is not None:
                    self._runtime.wait(self._all[number].cuda, event)

    def event_of(self, number: int, place: int) -> Any | None:
        """The first event at or behind a place; None: it is reached."""
        if place <= self._all[number].reached:
            return None
        return next(event for at, event in self._all[number].events if at >= place)

    def record(self, number: int) -> None:
        """An event behind the stream's latest work."""
        stream = self._all[number]
        event = self._spare.pop() if self._spare else self._runtime.event()
        self._runtime.record(event, stream.cuda)
        stream.events.append((stream.place, event))

    def reap(self) -> None:
        """Ask what is reached. RuntimeError: the GPU is at its end."""
        for stream in self._all:
            while stream.events and self._runtime.is_done(stream.events[0][1]):
                stream.reached, event = stream.events.popleft()
                self._spare.append(event)
