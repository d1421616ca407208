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
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from kvpool.arguments import Int32Array
from kvpool.errors import InvariantError, LogicError
from kvpool.mover.carrier import Carrier, Plan
from kvpool.mover.cuda_runtime import CudaRuntime
from kvpool.mover.cuda_streams import Streams
from kvpool.mover.cuda_ticket import CudaTicket
from kvpool.mover.descriptors import Buffer, Buffers, CudaPool
from kvpool.mover.paths import Chooser, Thresholds
from kvpool.mover.slot_events import CALLER, DIRECTIONS, GATHER, Checker, Clock, SlotEvents, VainReads, new_clock
from kvpool.mover.staging import STAGING_BYTES
from kvpool.mover.types import MoveBatch, MoveError, SlotUse, slot_array

POLL_S = 50e-6
_Use = tuple[SlotEvents, Int32Array, bool]
ENDS = {"offload": ("device", "host"), "onboard": ("host", "device"), "copy": ("device", "device")}


def _end(streams: Sequence[Any], buffers: Buffers, carrier: Carrier) -> None:
    """A mover is gone: its work ends before anything that it touches (`carrier` holds all memory) is let go."""
    with contextlib.suppress(RuntimeError):
        for stream in streams:
            stream.synchronize()
        buffers.close()


class CudaMover:
    """Moves between the tiers of `pools` on one GPU.

    chooser: which path a move takes; by default two thresholds that are guesses. staging_bytes: of each direction, for
    the path that needs them, if the chooser knows it. queue: tickets that a direction takes before `submit` returns
    None. check: the happens-before checker runs, and a call raises `InvariantError` for what it finds; None: if
    KVPOOL_CHECK=1. The engine's streams are CuPy's, PyTorch's, or addresses of CUDA streams; at most four. plant, for
    tests: the wait that is left out, by the name of what the checker will find. Every method may be called by any
    thread.
    """

    knows_cuda_streams = True

    def __init__(
        self,
        pools: Mapping[str, CudaPool],
        runtime: CudaRuntime,
        *,
        chooser: Chooser | None = None,
        staging_bytes: int = STAGING_BYTES,
        queue: int = 64,
        check: bool | None = None,
        plant: str | None = None,
    ) -> None:
        self._pools, self._runtime, self._queue = dict(pools), runtime, queue
        self._plant = plant
        self._slots: dict[tuple[str, str], SlotEvents] = {}
        for name, pool in self._pools.items():
            host_slots = pool.host.array.size // pool.page_bytes if pool.host is not None else 0
            self._slots[name, "device"] = SlotEvents(name, "device", pool.device_slots)
            self._slots[name, "host"] = SlotEvents(name, "host", host_slots)
        self._streams = Streams(runtime)
        self._tickets: list[deque[CudaTicket]] = [deque() for _ in DIRECTIONS]
        self._carrier = Carrier(self._pools, runtime, chooser or Thresholds(), staging_bytes)
        self._buffers = Buffers(runtime)
        self._planted_buffer: Buffer | None = None
        self._checker = Checker() if (os.environ.get("KVPOOL_CHECK") == "1" if check is None else check) else None
        self._findings: list[str] = []
        self._fenced: list[tuple[str, str, int]] = []
        self._vain_reads = VainReads()
        self._totals = dict.fromkeys(("pages", "bytes", "failed", "full"), 0)
        self._fault: str | None = None
        self._closed = False
        self._lock = threading.RLock()
        self._end = weakref.finalize(self, _end, self._streams.own(), self._buffers, self._carrier)

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
            good = np.delete(np.arange(src.size), lost)
            plan = self._plan(ticket, src[good], dst[good])
            try:
                self._enqueue(ticket, plan, after, sources, targets)
            except RuntimeError as error:
                self._break(error)
            targets.bad[dst[lost]] = True
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

    def _plan(self, ticket: CudaTicket, src: Int32Array, dst: Int32Array) -> Plan:
        """MemoryError: no pinned memory for the lists; nothing is taken."""
        try:
            return self._carrier.plan(ticket._batch, src, dst, lambda: self._buffer(ticket))
        except (MemoryError, RuntimeError):
            self._buffers.give_back(ticket._buffers)
            raise

    def _enqueue(
        self,
        ticket: CudaTicket,
        plan: Plan,
        after: Sequence[CudaTicket],
        sources: SlotEvents,
        targets: SlotEvents,
    ) -> None:
        """Every piece behind what its slots' events name; all of them behind the tickets `after`."""
        number, behind = DIRECTIONS.index(plan.batch.direction), new_clock()
        ticket._place = self._streams[number].place + len(plan.pieces)
        if plan.gathers:
            gathered = self._streams[GATHER].place
            ticket._gathers = range(gathered + 1, gathered + 1 + len(plan.pieces))
        self._tickets[number].append(ticket)
        for other in after:
            before = DIRECTIONS.index(other._batch.direction)
            behind[before] = max(behind[before], other._place)
        for piece in plan.pieces:
            source, target = (sources, piece.src, False), (targets, piece.dst, True)
            carry, gather, send = (
                partial(call, plan, piece) for call in (self._carrier.carry, self._carrier.gather, self._carrier.send)
            )
            if piece.part is None:
                self._work(number, behind, [source, target], carry)
                continue
            staging = self._carrier.staging[plan.batch.direction]
            filled, read = ((staging.events, staging.slots(piece.part), writes) for writes in (True, False))
            if plan.gathers:
                self._work(GATHER, behind, [source, filled], gather)
                self._work(number, behind, [read, target], send)
            else:
                self._work(number, behind, [source, filled, target], carry)
        self._carrier.count(plan)

    def _work(self, number: int, behind: Clock, uses: list[_Use], call: Callable[[Any], None]) -> None:
        """One piece of work of a stream, enqueued by `call`: behind `behind` and what the events of its slots name."""
        waits = behind.copy()
        for events, slots, writes in uses:
            events.waits(number, slots, writes, self._plant, waits)
        self._streams[number].place += 1
        self._book(number, waits, uses)
        self._streams.wait(number, waits)
        call(self._streams[number].cuda)
        self._streams.record(number)

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

    # -- what is over -------------------------------------------------------------------------

    def _reap(self) -> None:
        """What is over: events, tickets, their buffers."""
        if self._fault is not None:
            return
        try:
            self._streams.reap()
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
        targets.lose(slot_array(batch.dst, "dst"), number, ticket._first, ticket._place)

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
                if (event := self._streams.event_of(number, place)) is None:
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
            for stream, places in ticket._places():
                self._vain_reads.add(stream, places, self._slots.values())
            return True

    # -- the engine ---------------------------------------------------------------------------

    def _book(self, number: int, waits: Clock, uses: list[_Use]) -> None:
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
        """Raises what was found, in one thread alone."""
        if self._findings:
            with self._lock:
                found, self._findings = self._findings, []
            if found:  # not if another thread has them
                raise InvariantError("; ".join(found))

    def _uses(self, uses: Sequence[SlotUse]) -> list[_Use]:
        found = list[_Use]()
        for use in uses:
            self._pool(use.pool)
            if use.tier not in ("device", "host"):
                raise ValueError(f"tier: {use.tier!r} is none of 'device', 'host'")
            slots = slot_array(use.slots, "slots")
            events = self._slots[use.pool, use.tier]
            self._exist("slots", events, slots)
            found.append((events, slots, use.writes))
        return found

    def check_stream(self, stream: Any) -> None:
        """ValueError if it is no CUDA stream, or one more than the mover can know; else it is known from here on."""
        with self._lock:
            self._streams.number(stream)

    def wait_on(
        self, stream: Any, pool: str, tier: str, slots: Sequence[int] | Int32Array, timeout: float | None = None
    ) -> bool:
        """The stream waits for everything that touches these slots. False: the caller waited in vain."""
        return self.step_begin([SlotUse(pool, tier, slots)], stream, timeout)

    def step_begin(self, uses: Sequence[SlotUse], stream: Any = None, timeout: float | None = None) -> bool:
        """As `wait_on`, for all slots that a step will use. False too if the GPU is at its end."""
        with self._lock:
            number, waits = self._streams.number(stream), new_clock()
            for events, slots, _ in self._uses(uses):
                events.waits(number, slots, True, self._plant, waits)  # the slot's owner may do anything with it
            if self._fault is not None:
                return False
            if number != CALLER:
                try:
                    self._streams.wait(number, waits)
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
            number, booked = self._streams.number(stream), self._uses(uses)
            self._streams[number].place += 1
            self._book(number, new_clock(), booked)
            if number == CALLER:
                self._streams[CALLER].reached = self._streams[CALLER].place
            elif self._fault is None:
                try:
                    self._streams.record(number)
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
        """pages and bytes that arrived, pages that failed, submissions that found the queue full; copies of the copy
        engine, batched copies, launches of kernels that were enqueued."""
        with self._lock:
            self._reap()
            return self._totals | self._carrier.calls

    def path_counts(self) -> dict[str, dict[str, dict[str, int]]]:
        """{path: {direction: {moves, pages, bytes}}} of all moves that were enqueued; what was not taken is absent."""
        with self._lock:
            return self._carrier.counts()

    def offered(self, pool: str, direction: str) -> frozenset[str]:
        """Paths that pages of a pool can take, of those that the chooser knows; "engine" and "registers" always."""
        return self._carrier.offered(pool, direction)

    def problems(self) -> dict[str, str]:
        """Paths that the chooser knows and this machine does not offer, and why."""
        return dict(self._carrier.problems)

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
