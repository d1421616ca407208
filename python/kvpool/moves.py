"""A manager's moves: what the core has decided becomes batches of the mover; tickets until they are known to be good.

Order within a call of the manager: offloads, onboards, copies; one submission per pool and direction. The core has
changed its books by then, so a move that fails is reported later (`report`), by the slot that did not get its page.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from kvpool._core import Core, Recorder
from kvpool.arguments import Int32Array
from kvpool.mover import CpuStream, MoveBatch, Mover, SlotUse, Ticket
from kvpool.uses import StepUses

if TYPE_CHECKING:
    from kvpool.mover.cuda import CudaMover

# (pool, on the host, slot as the core counts it: from 1)
BadPage = tuple[int, bool, int]
MOST_TICKETS = 48  # before a call that may move; the queues of a mover are longer by what one call submits


@dataclass(slots=True)
class _Flight:
    ticket: Ticket
    pool: int
    host: bool
    slots: list[int]


class Moves:
    """Submits, waits, and knows what failed. Safe for any number of threads."""

    def __init__(self, core: Core, mover: Mover, pools: Sequence[str], timeout: float | None) -> None:
        self.mover = mover
        self.recorder = Recorder(core)
        self.flying: list[_Flight] = []
        self.failed = 0
        self.launched = False  # whether steps may be computed behind their `step_end`
        self.noted = False  # whether what a step uses was ever written down
        self.stuck: set[BadPage] = set()  # a move that was given up may still write them
        self.loose: list[BadPage] = []  # those of them that are not out of use yet
        self._names = list(pools)
        self._timeout = timeout
        self._bad: list[BadPage] = []
        self._lock = threading.RLock()  # who takes the record submits it before anybody else submits anything
        self._checked = bool(getattr(mover, "checks", False))
        self.on_gpu = bool(getattr(mover, "knows_cuda_streams", False))

    # -- before and after the core's books change ----------------------------------------------

    def before(self) -> None:
        """Look at what is over; if much is not, wait for the oldest. The only place that waits for room."""
        with self._lock:
            self._look()
            while len(self.flying) >= MOST_TICKETS:
                self._wait_for_oldest()

    def flush(self) -> None:
        """Submit the offloads that the core has decided on."""
        with self._lock:
            taken = self.recorder.take()
            pools: dict[int, dict[int, int]] = {}
            for pool, source, target in taken:
                sources = pools.setdefault(pool, {})
                if target in sources:  # the page that went there is gone again: another batch behind the first
                    self._submit(pool, "offload", [*sources.values()], [*sources])
                    sources.clear()
                sources[target] = source
            for pool, sources in pools.items():
                self._submit(pool, "offload", [*sources.values()], [*sources])

    def make(self, copies: Iterable[tuple[int, bool, int, int]]) -> None:
        """Offloads first, then (pool, source on the host, source, destination): onboards, then copies."""
        groups: dict[tuple[int, bool], tuple[list[int], list[int]]] = {}
        for pool, host, source, target in copies:
            sources, targets = groups.setdefault((pool, host), ([], []))
            sources.append(source)
            targets.append(target)
        with self._lock:
            self.flush()
            for up in (True, False):
                for (pool, host), (sources, targets) in groups.items():
                    if host is up:
                        self._submit(pool, "onboard" if host else "copy", sources, targets)

    def _submit(self, pool: int, direction: str, sources: list[int], targets: list[int]) -> None:
        # The core counts host slots from 1, the mover from 0.
        down, up = direction == "offload", direction == "onboard"
        batch = MoveBatch(
            self._names[pool],
            direction,
            [slot - 1 for slot in sources] if up else sources,
            [slot - 1 for slot in targets] if down else targets,
        )
        while (ticket := self.mover.submit(batch)) is None:
            if not self.flying:  # what fills the queue was given up long ago
                self._fail([(pool, down, slot) for slot in targets])
                return
            self._wait_for_oldest()
        self.flying.append(_Flight(ticket, pool, down, targets))

    # -- what became of it ---------------------------------------------------------------------

    def _wait_for_oldest(self) -> None:
        if not self.flying[0].ticket.wait(self._timeout):
            self._give_up(self.flying[:1])
        self._look()

    def _give_up(self, flights: Iterable[_Flight]) -> None:
        with self._lock:
            for flight in flights:
                if flight.ticket.give_up():
                    pages = [(flight.pool, flight.host, slot) for slot in flight.slots]
                    self.stuck.update(pages)
                    self.loose += pages

    def _fail(self, pages: Sequence[BadPage]) -> None:
        self._bad += pages
        self.failed += len(pages)

    def _look(self) -> None:
        """By who holds the lock. What failed is bad before it has landed: who sees nothing flying sees what failed."""
        over = [flight for flight in self.flying if flight.ticket.done()]
        for flight in over:
            self._fail([(flight.pool, flight.host, flight.slots[error.index]) for error in flight.ticket.errors()])
        if over:
            self.flying = [flight for flight in self.flying if flight not in over]

    def retire(self) -> None:
        """Slots that may still be written by a move that was given up are out of use for good once nobody has them."""
        if self.loose:
            with self._lock:
                self.loose = self.recorder.retire(self.loose)

    def has_bad(self) -> bool:
        """Whether pages may not have arrived that nobody has reported yet."""
        return bool(self.flying or self._bad)

    def unreported(self) -> AbstractContextManager[object]:
        """Within it no other thread reports anything."""
        return self._lock

    def report(self, lose: Callable[[Moves, list[BadPage]], None]) -> None:
        """`lose` is told the pages that turned out not to have arrived, if there are any.

        Nobody else gets past this before it has returned: a page counts as good only once all that hold it know better.
        """
        with self._lock:
            self._look()
            if self._bad:
                lose(self, self._bad)
                self._bad = []

    def wait(self, slots: Sequence[tuple[int, Int32Array]], stream: object = None) -> None:
        """Everything that touches these device slots, by pool, is over; what is not in time has failed.

        If no move is on its way the stream alone waits for the steps that were launched before. On a GPU a stream that
        is given waits for moves too, and the caller for nothing: what fails is known by the next call without one.
        """
        with self._lock:
            self.flush()
            flights = self.flying
        known = stream if self._knows(stream) else None
        if (self.launched and not flights) or (self.on_gpu and known is not None):
            self.mover.step_begin(self._good(slots), known, self._timeout)
        elif flights and not self.mover.step_begin(self._good(slots), None, self._timeout):
            self._give_up(flights)
            self.mover.step_begin(self._good(slots), None, self._timeout)  # for what was behind them
        if self.stuck:
            with self._lock:
                # Whoever has one is LOST; they are counted already.
                self._bad += [
                    page for pool, of in slots for slot in of.tolist() if (page := (pool, False, slot)) in self.stuck
                ]

    def _good(self, slots: Sequence[tuple[int, Int32Array]]) -> list[SlotUse]:
        """Uses of these slots but the stuck ones: to wait for those would be in vain."""
        if not self.stuck:
            return [SlotUse(self._names[pool], "device", of) for pool, of in slots]
        return [
            SlotUse(
                self._names[pool], "device", [slot for slot in of.tolist() if (pool, False, slot) not in self.stuck]
            )
            for pool, of in slots
        ]

    def settle(self) -> None:
        """All moves so far are over."""
        self.flush()
        flights = self.flying
        if flights and not self.mover.synchronize(self._timeout):
            self._give_up(flights)

    def fault(self) -> str | None:
        """Why nothing will ever be moved again; None: moves go on."""
        found: str | None = getattr(self.mover, "fault", None)
        return found

    # -- the engine's kernels --------------------------------------------------------------------

    def notes(self, stream: object) -> bool:
        """Whether what a step uses must be written down: not if it is over at `step_end` and no page ever failed."""
        if self._checked or self.failed > 0 or self._knows(stream):
            self.noted = True  # never set back: another thread may have set it meanwhile
            return True
        return False

    def _knows(self, stream: object) -> bool:
        """Whether the stream is one of the mover's kind; else the caller waits in its place."""
        return isinstance(stream, CpuStream) or (stream is not None and self.on_gpu)

    def check_stream(self, stream: object) -> None:
        """ValueError if what a step on this stream uses could not be written down at its end."""
        if self.on_gpu and stream is not None:
            cast("CudaMover", self.mover).check_stream(stream)

    def used(self, steps: Mapping[StepUses, Sequence[int]], stream: object) -> None:
        """Steps, launched on this stream or over, used the slots of their caches at these positions."""
        uses = [use for step, positions in steps.items() for use in step.of(positions, self._names, self.stuck)]
        if self._knows(stream):  # never set back: another thread may have set it meanwhile
            self.launched = True
        self.mover.step_end(uses, stream if self._knows(stream) else None)
