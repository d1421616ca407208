"""The mover of GPU memory: kernels and the copy engine on a stream per direction, ordered by CUDA's events.

Who waits for whom is decided when work is enqueued, from the event sets of its slots (docs/MOVER.md), and carried out
on the device: no call waits for a copy but those of the calling thread itself. Every CUDA call is `CudaRuntime`'s.

A CUDA error is the end: all outstanding tickets fail, and every later one does. A move cannot be taken back: one that
was given up may still arrive, which is why its slots stay fenced.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kvpool.arguments import Int32Array
from kvpool.errors import InvariantError, LogicError
from kvpool.mover.cuda_runtime import CudaRuntime
from kvpool.mover.cuda_ticket import CudaTicket
from kvpool.mover.descriptors import PER_CALL, Buffer, Buffers, CudaPool, pieces, runs
from kvpool.mover.launches import plan_launch
from kvpool.mover.slot_events import CALLER, DIRECTIONS, STREAMS, Checker, Clock, SlotEvents, VainReads, new_clock
from kvpool.mover.types import MoveBatch, MoveError, SlotUse, slot_array

ENGINE_BYTES = 256 << 10  # runs at least so long on average go by the copy engine; not calibrated
MAX_BLOCKS = 16  # of a kernel; not calibrated
POLL_S = 50e-6
ENDS = {"offload": ("device", "host"), "onboard": ("host", "device"), "copy": ("device", "device")}


class _Stream:
    """One CUDA stream, and the events of its work that are not known to be reached."""

    def __init__(self, cuda: Any) -> None:
        self.cuda = cuda
        self.place = 0  # of the latest work
        self.reached = 0  # all work up to here is done
        self.events: deque[tuple[int, Any]] = deque()


def _end(streams: Sequence[Any], buffers: Buffers, pools: Mapping[str, CudaPool]) -> None:
    """A mover is gone: its work ends before anything that it touches (the pools' memory is held here) is let go."""
    with contextlib.suppress(RuntimeError):
        for stream in streams:
            stream.synchronize()
        buffers.close()


class CudaMover:
    """Moves between the tiers of `pools` on one GPU.

    queue: tickets that a direction takes before `submit` returns None. check: the happens-before checker runs, and a
    call raises `InvariantError` for what it finds; None: if KVPOOL_CHECK=1. engine_bytes: runs of neighbours that are
    so long on average (bytes) go by the copy engine, others by a kernel of at most max_blocks blocks. The engine's
    streams are CuPy's, PyTorch's, or addresses of CUDA streams; at most four. plant, for tests: the wait that is left
    out, by the name of what the checker will find. Every method may be called by any thread.
    """

    knows_cuda_streams = True

    def __init__(
        self,
        pools: Mapping[str, CudaPool],
        runtime: CudaRuntime,
        *,
        queue: int = 64,
        engine_bytes: int = ENGINE_BYTES,
        max_blocks: int = MAX_BLOCKS,
        check: bool | None = None,
        plant: str | None = None,
    ) -> None:
        self._pools, self._runtime, self._queue = dict(pools), runtime, queue
        self._engine_bytes, self._max_blocks, self._plant = engine_bytes, max_blocks, plant
        self._slots: dict[tuple[str, str], SlotEvents] = {}
        for name, pool in self._pools.items():
            host_slots = pool.host.array.size // pool.page_bytes if pool.host is not None else 0
            self._slots[name, "device"] = SlotEvents(name, "device", pool.device_slots)
            self._slots[name, "host"] = SlotEvents(name, "host", host_slots)
        self._streams = [_Stream(runtime.stream()) for _ in DIRECTIONS] + [_Stream(None)]
        self._engine: dict[int, int] = {}  # address of an engine's stream -> its number
        self._tickets: list[deque[CudaTicket]] = [deque() for _ in DIRECTIONS]
        self._spare_events: list[Any] = []
        runtime.compile("copy_pages")  # now, not within the first move
        self._buffers = Buffers(runtime)
        self._planted_buffer: Buffer | None = None
        self._checker = Checker() if (os.environ.get("KVPOOL_CHECK") == "1" if check is None else check) else None
        self._findings: list[str] = []
        self._fenced: list[tuple[str, str, int]] = []
        self._vain_reads = VainReads()
        self._totals = dict.fromkeys(("pages", "bytes", "failed", "engine_copies", "kernel_launches", "full"), 0)
        self._fault: str | None = None
        self._closed = False
        self._lock = threading.RLock()
        self._end = weakref.finalize(self, _end, [s.cuda for s in self._streams[:CALLER]], self._buffers, self._pools)

    # -- moves --------------------------------------------------------------------------------

    def submit(self, batch: MoveBatch, after: Sequence[CudaTicket] = ()) -> CudaTicket | None:
        """Enqueue, also behind the tickets `after`. None: the queue is full, nothing is taken. ValueError: bad slot.

        MemoryError: no pinned memory for the lists of slots; nothing is taken.
        """
        number = DIRECTIONS.index(batch.direction)
        if any(other._mover is not self for other in after):
            raise ValueError("after: a ticket is another mover's")
        with self._lock:
            if self._closed:
                raise LogicError("the mover is closed")
            sources, targets = self._ends(batch)
            self._reap()
            if self._fault is None and len(self._tickets[number]) >= self._queue:
                self._totals["full"] += 1
                return None
            src, dst = slot_array(batch.src, "src"), slot_array(batch.dst, "dst")
            stream = self._streams[number]
            lost = np.flatnonzero(sources.bad[src])
            ticket = CudaTicket(self, batch, stream.place + 1, self._errors(batch, lost, "source"))
            if self._fault is not None or not src.size:
                return self._over_at_once(ticket, targets, dst)
            waits = new_clock()
            sources.waits(number, src, False, self._plant, waits)
            targets.waits(number, dst, True, self._plant, waits)
            for other in after:
                before = DIRECTIONS.index(other._batch.direction)
                waits[before] = max(waits[before], other._place)
            good = np.delete(np.arange(src.size), lost)
            good = good[np.argsort(src[good], kind="stable")]  # neighbours come together
            stretches = self._describe(ticket, src[good], dst[good])
            stream.place += 1
            self._tickets[number].append(ticket)
            self._book(number, waits, [(sources, src, False), (targets, dst, True)])
            targets.bad[dst[lost]] = True
            try:
                self._wait(number, waits)
                self._enqueue(ticket, src[good], dst[good], stretches)
                self._record(number)
            except RuntimeError as error:
                self._break(error)
            self._totals["failed"] += int(lost.size)
        self._checked()
        return ticket

    def _ends(self, batch: MoveBatch) -> tuple[SlotEvents, SlotEvents]:
        """Event sets of the sources' and of the destinations' tier; ValueError for slots that cannot be."""
        self._pool(batch.pool)
        near, far = (self._slots[batch.pool, tier] for tier in ENDS[batch.direction])
        for name, events, slots in (("src", near, batch.src), ("dst", far, batch.dst)):
            self._exist(name, events, slot_array(slots, name))
        if len(np.unique(batch.dst)) < len(batch.dst):
            raise ValueError(f"dst: a slot of pool {batch.pool!r} is listed twice")
        if near is far and np.intersect1d(batch.src, batch.dst).size:
            raise ValueError(f"src: a slot of pool {batch.pool!r} is a destination of the same batch")
        return near, far

    def _exist(self, name: str, events: SlotEvents, slots: Int32Array) -> None:
        low = 1 if events.tier == "device" else 0
        wrong = slots[(slots < low) | (slots >= events.slots)]
        if wrong.size:
            reason = "is the null page" if low and wrong[0] == 0 else f"is not in {low}..{events.slots - 1}"
            raise ValueError(f"{name}: {events.tier} slot {wrong[0]} of pool {events.pool!r} {reason}")

    def _pool(self, pool: str) -> CudaPool:
        try:
            return self._pools[pool]
        except (KeyError, TypeError):
            raise ValueError(f"pool: {pool!r} is unknown; there are {list(self._pools)}") from None

    @staticmethod
    def _errors(batch: MoveBatch, indices: Any, code: str) -> list[MoveError]:
        return [MoveError(code, batch.pool, int(batch.src[i]), batch.direction, int(i)) for i in indices]

    def _over_at_once(self, ticket: CudaTicket, targets: SlotEvents, dst: Int32Array) -> CudaTicket:
        """Nothing to move, or a GPU that is at its end."""
        ticket._over = True
        if self._fault is not None and dst.size:
            ticket._failed = self._errors(ticket._batch, range(dst.size), "copy")
            targets.bad[dst] = True
        return ticket

    def _describe(self, ticket: CudaTicket, src: Int32Array, dst: Int32Array) -> list[tuple[int, int]] | None:
        """Runs for the copy engine, if they are long; else None, and the lists are in the ticket's buffers.

        MemoryError: no memory for the lists; nothing is taken.
        """
        stretches = runs(src, dst)
        size = self._pools[ticket._batch.pool].page_bytes
        if len(src) * size >= self._engine_bytes * max(len(stretches), 1):
            return stretches
        for start in range(0, len(src), PER_CALL):
            try:
                buffer = self._buffer(ticket)
            except (MemoryError, RuntimeError):
                self._buffers.give_back(ticket._buffers)
                raise
            part = slice(start, start + PER_CALL)
            buffer.lists[0, : len(src[part])], buffer.lists[1, : len(src[part])] = src[part], dst[part]
        return None

    def _enqueue(
        self, ticket: CudaTicket, src: Int32Array, dst: Int32Array, stretches: list[tuple[int, int]] | None
    ) -> None:
        """Runs by the copy engine, or a kernel per buffer."""
        batch, pool = ticket._batch, self._pools[ticket._batch.pool]
        size, stream = pool.page_bytes, self._streams[DIRECTIONS.index(batch.direction)].cuda
        source, target = (
            pool.device if tier == "device" or pool.host is None else pool.host.address
            for tier in ENDS[batch.direction]
        )
        for start, end in stretches or ():
            for first, last in self._pieces(pool, batch.direction, src[start:end], dst[start:end]):
                at, count = start + first, last - first
                to, origin = target + int(dst[at]) * size, source + int(src[at]) * size
                self._runtime.copy_async(to, origin, count * size, stream)
                self._totals["engine_copies"] += 1
        for number, buffer in enumerate(ticket._buffers):
            count = min(len(src) - number * PER_CALL, PER_CALL)
            launch = plan_launch("copy_pages", (source, target), size, count, self._max_blocks)
            assert launch is not None
            lists = buffer.sources, buffer.targets
            self._runtime.launch(launch, (source, target, *lists, np.int64(size), np.int32(count)), stream)
            self._totals["kernel_launches"] += 1

    @staticmethod
    def _pieces(pool: CudaPool, direction: str, src: Int32Array, dst: Int32Array) -> list[tuple[int, int]]:
        """One run, cut where its host side passes from one registration to the next."""
        if pool.host is None or direction == "copy":
            return [(0, len(src))]
        return pieces(int((dst if direction == "offload" else src)[0]), len(src), pool.page_bytes, pool.host.edges)

    def _buffer(self, ticket: CudaTicket) -> Buffer:
        """A descriptor buffer that is the ticket's until it is over."""
        if self._plant == "descriptor-rewrite":
            buffer = self._planted_buffer = self._planted_buffer or self._buffers.take()
            if self._checker is not None and any(other._buffers for queue in self._tickets for other in queue):
                self._findings.append("descriptor-rewrite: descriptors are rewritten before their move is done")
        else:
            buffer = self._buffers.take()
        ticket._buffers.append(buffer)
        return buffer

    # -- streams and events -------------------------------------------------------------------

    def _number(self, stream: Any) -> int:
        """Number of an engine's stream, which is new or known."""
        if stream is None:
            return CALLER
        given = stream if isinstance(stream, int) else getattr(stream, "cuda_stream", None)  # PyTorch's have that
        address = getattr(stream, "ptr", None) if given is None else given
        if not isinstance(address, int):
            raise ValueError(f"stream: {stream!r} is none of CuPy's, PyTorch's, or the address of a CUDA stream")
        number = self._engine.get(address)
        if number is None:
            number = len(self._streams)
            if number == STREAMS:
                raise ValueError(f"stream: the mover knows {STREAMS - CALLER - 1} streams of the engine already")
            cuda = stream if given is None else self._runtime.external_stream(given)
            self._streams.append(_Stream(cuda))
            self._engine[address] = number
        return number

    def _wait(self, number: int, waits: Clock) -> None:
        """The stream waits, on the device, for these places of the others."""
        for prior, place in enumerate(waits.tolist()):
            if prior != number and place:
                event = self._event_of(prior, place)
                if event is not None:
                    self._runtime.wait(self._streams[number].cuda, event)

    def _event_of(self, number: int, place: int) -> Any | None:
        """The first event at or behind a place; None: it is reached."""
        if place <= self._streams[number].reached:
            return None
        return next(event for at, event in self._streams[number].events if at >= place)

    def _record(self, number: int) -> None:
        """An event behind the stream's latest work."""
        stream = self._streams[number]
        event = self._spare_events.pop() if self._spare_events else self._runtime.event()
        self._runtime.record(event, stream.cuda)
        stream.events.append((stream.place, event))

    def _reap(self) -> None:
        """What is over: events, tickets, their buffers."""
        if self._fault is not None:
            return
        try:
            for stream in self._streams:
                while stream.events and self._runtime.is_done(stream.events[0][1]):
                    stream.reached, event = stream.events.popleft()
                    self._spare_events.append(event)
        except RuntimeError as error:
            self._break(error)
            return
        for number, tickets in enumerate(self._tickets):
            while tickets and tickets[0]._place <= self._streams[number].reached:
                self._arrive(tickets.popleft())

    def _arrive(self, ticket: CudaTicket) -> None:
        """It ran to its end."""
        ticket._over = True
        if not ticket._given_up:
            pages = len(ticket._batch.src) - len(ticket._failed)
            self._totals["pages"] += pages
            self._totals["bytes"] += pages * self._pools[ticket._batch.pool].page_bytes
        if self._plant != "descriptor-rewrite":
            self._buffers.give_back(ticket._buffers)
        ticket._buffers = []

    def _break(self, error: Exception) -> None:
        """The GPU is at its end: every outstanding ticket fails. Their buffers stay taken: some may still be read."""
        self._fault = str(error)
        for tickets in self._tickets:
            for ticket in tickets:
                self._lose(ticket, "copy")
            tickets.clear()

    def _lose(self, ticket: CudaTicket, code: str) -> None:
        """Every page of it that had not failed yet fails; what its destinations hold is unknown."""
        batch = ticket._batch
        known = {error.index for error in ticket._failed}
        fresh = self._errors(batch, [i for i in range(len(batch.src)) if i not in known], code)
        ticket._failed = sorted([*ticket._failed, *fresh], key=lambda error: error.index)
        ticket._over = True
        self._totals["failed"] += len(fresh)
        number = DIRECTIONS.index(batch.direction)
        targets = self._slots[batch.pool, ENDS[batch.direction][1]]
        targets.lose(slot_array(batch.dst, "dst"), number, ticket._place)

    def _poll(self, ticket: CudaTicket) -> bool:
        with self._lock:
            self._reap()
            if ticket._over and self._checker is not None and not ticket._given_up and self._fault is None:
                self._checker.saw(DIRECTIONS.index(ticket._batch.direction), ticket._place)
            return ticket._over

    def _reach(self, number: int, place: int, timeout: float | None) -> bool:
        """The caller waits for a place of a stream. False: not in time, or the GPU is at its end."""
        end = None if timeout is None else time.monotonic() + timeout
        while True:
            with self._lock:
                self._reap()
                if self._fault is not None:
                    return False
                if (event := self._event_of(number, place)) is None:
                    if self._checker is not None:
                        self._checker.saw(number, place)
                    return True
            if end is None:
                try:
                    event.synchronize()
                except RuntimeError as error:
                    with self._lock:
                        self._break(error)
            elif time.monotonic() >= end:
                return False
            else:
                time.sleep(POLL_S)

    def _give_up(self, ticket: CudaTicket) -> bool:
        with self._lock:
            self._reap()
            if ticket._over:
                return False
            ticket._given_up = True
            self._lose(ticket, "timeout")
            batch = ticket._batch
            for tier, slots in zip(ENDS[batch.direction], (batch.src, batch.dst), strict=True):
                self._fenced += [(batch.pool, tier, int(slot)) for slot in slots]
            self._vain_reads.add(DIRECTIONS.index(batch.direction), ticket._place, self._slots.values())
            return True

    # -- the engine ---------------------------------------------------------------------------

    def _book(self, number: int, waits: Clock, uses: list[tuple[SlotEvents, Int32Array, bool]]) -> None:
        """The stream's latest work uses these slots behind these waits."""
        place = self._streams[number].place
        if self._checker is not None:
            self._checker.wait(number, waits)
            clock = self._checker.enqueue(number, place)
            for events, slots, writes in uses:
                self._findings += events.unordered(number, place, slots, writes, clock)
        for events, slots, writes in uses:
            events.mark(number, place, slots, writes)

    def _checked(self) -> None:
        if self._findings:
            found, self._findings = self._findings, []
            raise InvariantError("; ".join(found))

    def _uses(self, uses: Sequence[SlotUse]) -> list[tuple[SlotEvents, Int32Array, bool]]:
        found = []
        for use in uses:
            self._pool(use.pool)
            if use.tier not in ("device", "host"):
                raise ValueError(f"tier: {use.tier!r} is none of 'device', 'host'")
            slots = slot_array(use.slots, "slots")
            events = self._slots[use.pool, use.tier]
            self._exist("slots", events, slots)
            found.append((events, slots, use.writes))
        return found

    def wait_on(
        self, stream: Any, pool: str, tier: str, slots: Sequence[int] | Int32Array, timeout: float | None = None
    ) -> bool:
        """The stream waits for everything that touches these slots. False: the caller waited in vain."""
        return self.step_begin([SlotUse(pool, tier, slots)], stream, timeout)

    def step_begin(self, uses: Sequence[SlotUse], stream: Any = None, timeout: float | None = None) -> bool:
        """As `wait_on`, for all slots that a step will use. False too if the GPU is at its end."""
        with self._lock:
            number, waits = self._number(stream), new_clock()
            for events, slots, _ in self._uses(uses):
                events.waits(number, slots, True, self._plant, waits)  # the slot's owner may do anything with it
            if self._fault is not None:
                return False
            if number != CALLER:
                try:
                    self._wait(number, waits)
                except RuntimeError as error:
                    self._break(error)
                    return False
        if number == CALLER:
            end = None if timeout is None else time.monotonic() + timeout
            for prior, place in enumerate(waits.tolist()):
                left = None if end is None else max(end - time.monotonic(), 0)
                if prior != CALLER and place and not self._reach(prior, place, left):
                    return False
        if self._checker is not None:
            with self._lock:
                self._checker.wait(number, waits)
        return True

    def step_end(self, uses: Sequence[SlotUse], stream: Any = None) -> None:
        """The step that was launched uses these slots: later moves of them wait for it."""
        with self._lock:
            number, booked = self._number(stream), self._uses(uses)
            self._streams[number].place += 1
            self._book(number, new_clock(), booked)
            if number == CALLER:
                self._streams[CALLER].reached = self._streams[CALLER].place
            elif self._fault is None:
                try:
                    self._record(number)
                except RuntimeError as error:
                    self._break(error)
        self._checked()

    def synchronize(self, timeout: float | None = None) -> bool:
        """Wait for all moves. False: in vain."""
        with self._lock:
            places = [self._streams[number].place for number in range(len(DIRECTIONS))]
        end = None if timeout is None else time.monotonic() + timeout
        return all(
            self._reach(number, place, None if end is None else max(end - time.monotonic(), 0))
            for number, place in enumerate(places)
        )

    def totals(self) -> dict[str, int]:
        """pages and bytes that arrived, pages that failed, copies of the copy engine, launches of kernels, submissions
        that found the queue full."""
        with self._lock:
            self._reap()
            return dict(self._totals)

    def pending(self, direction: str) -> int:
        """Tickets of a direction that are not done."""
        with self._lock:
            self._reap()
            return len(self._tickets[DIRECTIONS.index(direction)])

    def fenced(self) -> list[tuple[str, str, int]]:
        """(pool, tier, slot) of tickets that were given up."""
        with self._lock:
            return list(self._fenced)

    @property
    def checks(self) -> bool:
        """Whether the checker runs."""
        return self._checker is not None

    @property
    def fault(self) -> str | None:
        """CUDA's words about the error that ended everything; None: there was none."""
        return self._fault

    def close(self) -> None:
        """Take no more; wait for what is enqueued. Twice is a no-op."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self.synchronize()
        self._end()
