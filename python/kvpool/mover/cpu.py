"""The mover of CPU memory: tiers are arrays, streams are threads, memcpy runs without the GIL."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Mapping, Sequence

from kvpool import _core
from kvpool.arguments import ByteArray, Int32Array
from kvpool.errors import InvariantError
from kvpool.mover.types import MoveBatch, MoveError, SlotUse, slot_array

_CoreUse = tuple[int, str, Int32Array, bool]


class CpuTicket:
    """A ticket of `CpuMover`."""

    __slots__ = ("_names", "_ticket")

    def __init__(self, ticket: _core.Ticket, names: Sequence[str]) -> None:
        self._ticket = ticket
        self._names = names

    def done(self) -> bool:
        """Whether it is over, well or not."""
        return self._ticket.done()

    def wait(self, timeout: float | None = None) -> bool:
        """Until it is over, at most `timeout` seconds. False: not in time."""
        return self._ticket.wait(timeout)

    def result(self) -> MoveError | None:
        """Waits, then None if every page arrived, else the first that did not.

        In a simulation that stands still it is given up.
        """
        if not self._ticket.wait():
            self._ticket.give_up()
        return next(iter(self.errors()), None)

    def errors(self) -> list[MoveError]:
        """Every page that did not arrive, as far as is known now; the lowest index first."""
        return [
            MoveError(code, self._names[pool], slot, direction, index)
            for code, pool, slot, direction, index in self._ticket.errors()
        ]

    def give_up(self) -> bool:
        """If it is not done: it counts as failed from now on, and its slots are fenced for good. Whether it was not."""
        return self._ticket.give_up()


class CpuStream:
    """A FIFO thread of the engine whose work is in the mover's books. Made by `CpuMover.stream`."""

    def __init__(self, mover: CpuMover, number: int) -> None:
        self._mover = mover
        self._number = number

    def launch(self, call: Callable[[], object]) -> None:
        """`call()` in this stream, behind all that the stream was told to wait for. Returns at once."""
        self._mover._core.launch(self._number, call)

    def synchronize(self, timeout: float | None = None) -> bool:
        """Wait for all that was launched. False: in vain."""
        return self._mover._core.synchronize(self._number, timeout)


class CpuMover:
    """Moves between arrays of bytes, by a thread per direction; or simulated.

    pools: {name: (device pages, host pages or None)}, uint8 arrays (slots, page_bytes), writable and C-contiguous; kept
    alive. queue: tickets that a direction takes before `submit` returns None. staging: slots of a buffer in which
    pages are gathered before they are offloaded, 0 for none. check: the happens-before checker runs, and a call raises
    `InvariantError` for what it finds; None: if KVPOOL_CHECK=1. Every method may be called by any thread.

    For tests: simulate=(order, seed) has no threads and runs the work in a chosen order ("compute-last",
    "copies-eager", "copies-last", "random"); faults=True allows `fail`, `fail_at_random`, `fill` and `stall`; plant
    names the wait that is left out, by the name of what the checker will find.
    """

    def __init__(
        self,
        pools: Mapping[str, tuple[ByteArray, ByteArray | None]],
        *,
        queue: int = 64,
        staging: int = 0,
        check: bool | None = None,
        simulate: tuple[str, int] | None = None,
        faults: bool = False,
        plant: str | None = None,
    ) -> None:
        self._names = list(pools)
        self._index = {name: i for i, name in enumerate(self._names)}
        self.checks = os.environ.get("KVPOOL_CHECK") == "1" if check is None else check
        order, seed = simulate or (None, 0)
        self._core = _core.Mover(
            [(name, device.shape[1], device, host) for name, (device, host) in pools.items()],
            queue=queue,
            check=self.checks,
            staging=staging,
            order=order,
            seed=seed,
            faults=faults,
            plant=plant,
        )
        self._end = weakref.finalize(self, self._core.close)

    def _pool(self, pool: str) -> int:
        try:
            return self._index[pool]
        except (KeyError, TypeError):
            raise ValueError(f"pool: {pool!r} is unknown; there are {self._names}") from None

    def _checked(self) -> None:
        if self.checks and (findings := self._core.findings()):
            raise InvariantError("; ".join(text for _, text in findings))

    def submit(self, batch: MoveBatch, after: Sequence[CpuTicket] = ()) -> CpuTicket | None:
        """Enqueue, also behind the tickets `after`. None: the queue is full, nothing is taken. ValueError: bad slot."""
        behind = [ticket._ticket for ticket in after]
        ticket = self._core.submit(self._pool(batch.pool), batch.direction, batch.src, batch.dst, behind)
        self._checked()
        return None if ticket is None else CpuTicket(ticket, self._names)

    def _uses(self, uses: Sequence[SlotUse]) -> list[_CoreUse]:
        return [(self._pool(use.pool), use.tier, slot_array(use.slots, "slots"), use.writes) for use in uses]

    def _number(self, stream: CpuStream | None) -> int | None:
        if stream is not None and (not isinstance(stream, CpuStream) or stream._mover is not self):
            raise ValueError(f"stream: {stream!r} is no stream of this mover; make one by its stream()")
        return None if stream is None else stream._number

    def wait_on(
        self,
        stream: CpuStream | None,
        pool: str,
        tier: str,
        slots: Sequence[int] | Int32Array,
        timeout: float | None = None,
    ) -> bool:
        """The stream waits for everything that touches these slots. False: the caller waited in vain."""
        return self.step_begin([SlotUse(pool, tier, slots)], stream, timeout)

    def step_begin(
        self, uses: Sequence[SlotUse], stream: CpuStream | None = None, timeout: float | None = None
    ) -> bool:
        """As `wait_on`, for all slots that a step will use."""
        return self._core.wait_on(self._number(stream), self._uses(uses), timeout)

    def step_end(self, uses: Sequence[SlotUse], stream: CpuStream | None = None) -> None:
        """The step that was launched uses these slots: later moves of them wait for it."""
        self._core.record(self._number(stream), self._uses(uses))
        self._checked()

    def stream(self) -> CpuStream:
        """A thread for an engine that computes beside its caller; at most two."""
        return CpuStream(self, self._core.stream())

    def synchronize(self, timeout: float | None = None) -> bool:
        """Wait for all moves. False: in vain."""
        return self._core.synchronize(None, timeout)

    def totals(self) -> dict[str, int]:
        """pages and bytes that arrived, pages that failed, runs of neighbours, driver calls, submissions that found the
        queue full."""
        return self._core.totals()

    def findings(self) -> list[str]:
        """What the checker found since the last call."""
        return [text for _, text in self._core.findings()]

    def pending(self, direction: str) -> int:
        """Tickets of a direction that are not done."""
        return self._core.pending(direction)

    def fenced(self) -> list[tuple[str, str, int]]:
        """(pool, tier, slot) of tickets that were given up."""
        return [(self._names[pool], tier, slot) for pool, tier, slot in self._core.fenced()]

    def close(self) -> None:
        """Take no more; wait for what is enqueued. What stands still fails. Twice is a no-op."""
        self._end()

    # -- test switches ------------------------------------------------------------------------

    def fail(self, k: int, direction: str | None = None) -> None:
        """The k-th page (of this direction) from now, from 1, fails."""
        self._core.fail(k, direction)

    def fail_at_random(self, rate: float, seed: int) -> None:
        """Every page fails with this probability."""
        self._core.fail_at_random(rate, seed)

    def fill(self, direction: str, times: int) -> None:
        """The next `times` submissions of a direction find its queue full."""
        self._core.fill(direction, times)

    def stall(self, direction: str, stalled: bool = True) -> None:
        """A direction stands still, or goes on."""
        self._core.stall(direction, stalled)
