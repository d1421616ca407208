"""Two event sets per slot, its last write and the reads since, and the checker of happens-before over them.

The same books as rust/kvpool-mover keeps for CPU memory (docs/MOVER.md), for a mover whose streams are CUDA's. An
event is (stream, place): the place-th piece of work of a stream. Streams are FIFO, so a set is one place per stream, a
`Clock`.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import numpy.typing as npt

from kvpool.arguments import Int32Array

DIRECTIONS = ("offload", "onboard", "copy")
CALLER = 3
GATHER = 4  # fills staging memory for offloads
ENGINES = 4  # streams of the engine
STREAMS = GATHER + 1 + ENGINES
Clock = npt.NDArray[np.int64]


def new_clock() -> Clock:
    """Nothing yet, of every stream."""
    return np.zeros(STREAMS, np.int64)


def stream_name(stream: int) -> str:
    """For messages."""
    return (*DIRECTIONS, "compute", "gather")[stream] if stream <= GATHER else "compute stream"


def hazard(stream: int, writes: bool, tier: str, prior: int, prior_wrote: bool) -> str:
    """What it would be if `stream` used a slot of `tier` without waiting for what `prior` did with it."""
    offload, onboard, copy = 0, 1, 2
    compute, prior_compute = (each == CALLER or each > GATHER for each in (stream, prior))
    if tier == "staging":
        return "staging-reuse" if writes else "unordered"
    if tier == "device":
        if stream in (offload, copy, GATHER) and not writes and prior_wrote and prior_compute:
            return "offload-before-compute"
        if writes and prior in (offload, copy, GATHER) and not prior_wrote:
            return "reuse-before-copy"
        if compute and prior in (onboard, copy) and prior_wrote:
            return "compute-before-onboard"
        if stream in (onboard, copy) and writes and prior_compute:
            return "onboard-over-use"
        return "unordered"
    if compute and prior == offload and prior_wrote:
        return "host-read-early"
    if writes and not prior_wrote:
        return "host-overwrite"
    if stream == onboard and not writes and prior == offload and prior_wrote:
        return "onboard-before-offload"
    return "unordered"


class SlotEvents:
    """Of one pool on one tier. `bad`: slots whose last move failed."""

    def __init__(self, pool: str, tier: str, slots: int) -> None:
        self.pool, self.tier, self.slots = pool, tier, slots
        self._write_stream = np.zeros(slots, np.int8)
        self._write_place = np.zeros(slots, np.int64)
        self._reads = np.zeros((slots, STREAMS), np.int64)
        self.bad = np.zeros(slots, np.bool_)

    def _before(self, slots: Int32Array, writes: bool) -> list[tuple[int, bool, npt.NDArray[np.int64]]]:
        """(stream, whether it wrote, its place for each slot) of all that an access comes after."""
        streams, places = self._write_stream[slots], self._write_place[slots]
        found = [(int(prior), True, np.where(streams == prior, places, 0)) for prior in np.unique(streams)]
        if writes:
            found += [(prior, False, self._reads[slots, prior]) for prior in range(STREAMS)]
        return found

    def waits(self, stream: int, slots: Int32Array, writes: bool, plant: str | None, into: Clock) -> None:
        """Adds what work on `stream` must wait for before it uses these slots. plant: what a test leaves out."""
        if slots.size:
            for prior, wrote, places in self._before(slots, writes):
                if plant is None or hazard(stream, writes, self.tier, prior, wrote) != plant:
                    into[prior] = max(into[prior], int(places.max()))

    def unordered(self, stream: int, place: int, slots: Int32Array, writes: bool, clock: Clock) -> list[str]:
        """Pairs with earlier uses that the clock of this work does not order."""
        found = []
        for prior, wrote, places in self._before(slots, writes) if slots.size else ():
            late = np.flatnonzero(places > clock[prior])
            if late.size:
                name, verb = hazard(stream, writes, self.tier, prior, wrote), "writes" if writes else "reads"
                found.append(
                    f"{name}: {stream_name(stream)} {place} {verb} {self.tier} slot {slots[late[0]]} of pool "
                    f"{self.pool!r} without being ordered after {stream_name(prior)} {places[late[0]]}"
                )
        return found

    def mark(self, stream: int, place: int, slots: Int32Array, writes: bool) -> None:
        """Work that uses these slots is enqueued."""
        if not writes:
            self._reads[slots, stream] = place
            return
        self._write_stream[slots], self._write_place[slots] = stream, place
        self._reads[slots] = 0
        self.bad[slots] = False

    def forget_reads(self, stream: int, place: int, before: int) -> None:
        """Nobody waits for what this event read any more, only for what the stream did up to `before`."""
        reads = self._reads[:, stream]
        reads[reads == place] = before

    def lose(self, slots: Int32Array, stream: int, first: int, last: int) -> None:
        """The move that these places of a stream stand for failed: what it wrote last is bad."""
        places = self._write_place[slots]
        latest = (self._write_stream[slots] == stream) & (first <= places) & (places <= last)
        self.bad[slots[latest]] = True


class VainReads:
    """Reads of moves that were given up: they arrive nowhere, so the next owner of a source need not wait for them.

    Else it would wait as long as the move stands still, and its own time limit would pass.
    """

    def __init__(self) -> None:
        self._places: list[set[int]] = [set() for _ in range(STREAMS)]

    def add(self, stream: int, given_up: range, tables: Collection[SlotEvents]) -> None:
        """These places of a stream were given up; who waited for one waits for what was before."""
        places = self._places[stream]
        for place in given_up:
            places.add(place)
            before = place - 1
            while before in places:
                before -= 1
            for events in tables:
                events.forget_reads(stream, place, before)


class Checker:
    """Vector clocks, taken when work is enqueued: `clock[s] = n`, the first n pieces of s are done before it starts."""

    KEPT = 1 << 12  # clocks of each stream; older work is taken to be as late as the oldest that is kept

    def __init__(self) -> None:
        self.streams = [new_clock() for _ in range(STREAMS)]
        self._seen = new_clock()
        self._clocks: list[dict[int, Clock]] = [{} for _ in range(STREAMS)]

    def _join(self, into: Clock, waits: Clock) -> None:
        for stream in np.flatnonzero(waits):
            place, kept = int(waits[stream]), self._clocks[stream]
            clock = kept.get(place)
            if clock is None and kept:
                clock = kept[next(iter(kept))]
            if clock is not None:
                np.maximum(into, clock, out=into)
            into[stream] = max(into[stream], place)

    def wait(self, stream: int, waits: Clock) -> None:
        """The stream waits for these; the caller (CALLER) has waited for them."""
        self._join(self.streams[stream], waits)
        if stream == CALLER:
            np.maximum(self._seen, self.streams[CALLER], out=self._seen)

    def saw(self, stream: int, place: int) -> None:
        """The caller knows that the stream has done this place, and all before it."""
        waits = new_clock()
        waits[stream] = place
        self.wait(CALLER, waits)

    def enqueue(self, stream: int, place: int) -> Clock:
        """The place-th work enters its stream, behind what the caller knows to be done. Its clock."""
        clock = self.streams[stream]
        np.maximum(clock, self._seen, out=clock)
        clock[stream] = place
        if stream == CALLER:  # its own work is over when it is recorded
            self._seen[:] = clock
        kept = self._clocks[stream]
        kept[place] = clock.copy()
        if len(kept) > self.KEPT:
            del kept[next(iter(kept))]
        return clock
