"""`CudaMover` with the test switches of `CpuMover`, and streams for an engine, under the stand-in for CuPy."""

from __future__ import annotations

import ctypes
import random
from collections.abc import Callable
from typing import Any

import fake_cupy
from fake_cupy import Stream, Work
from kvpool import LogicError
from kvpool.mover import MoveBatch
from kvpool.mover.cuda import ENDS, CudaMover, CudaTicket
from kvpool.mover.cuda_runtime import CudaRuntime
from kvpool.mover.descriptors import CudaPool
from kvpool.mover.slot_events import DIRECTIONS
from kvpool.mover.types import MoveError


class EngineStream(Stream):
    """A stream whose kernels are Python functions."""

    def launch(self, call: Callable[[], object]) -> None:
        self.world.give(self, Work(lambda: (call(), None)[1]))

    def synchronize(self, timeout: float | None = None) -> bool:
        super().synchronize()
        return True


class SwitchedMover(CudaMover):
    """A `CudaMover` with the test switches of `CpuMover`, and streams for an engine.

    CUDA fails as a whole or not at all; here single pages can fail too, which a mover's interface allows: their
    destinations are filled with rubbish, behind the copy.
    """

    def __init__(
        self,
        pools: dict[str, CudaPool],
        runtime: CudaRuntime,
        gpu: fake_cupy.World,
        faults: bool = False,
        **options: Any,
    ) -> None:
        self._gpu, self._faults = gpu, faults
        self._fails: list[tuple[int, str | None]] = []  # pages from now, of which direction
        self._rate, self._dice = 0.0, random.Random(0)
        self._fills = dict.fromkeys(DIRECTIONS, 0)
        self._holds: dict[str, fake_cupy.Record] = {}
        self._spoiled: set[int] = set()  # destinations of the move that is being enqueued
        super().__init__(pools, runtime, **options)

    def stream(self) -> EngineStream:
        """A stream whose kernels are Python functions."""
        return EngineStream(self._gpu, non_blocking=True)

    def findings(self) -> list[str]:
        """None: what the checker finds is raised by the call that shows it."""
        return []

    def submit(self, batch: MoveBatch, after: Any = ()) -> CudaTicket | None:
        with self._lock:
            if self._fills[batch.direction] and len(batch.src):
                self._fills[batch.direction] -= 1
                self._totals["full"] += 1
                return None
            return super().submit(batch, after)

    def _enqueue(self, ticket: CudaTicket, *given: Any) -> None:
        batch = ticket._batch
        failing = [i for i in range(len(batch.src)) if self._is_failing(batch.direction)]
        known = {error.index for error in ticket._failed}
        fresh = [i for i in failing if i not in known]
        self._spoiled = {int(batch.dst[i]) for i in fresh}
        super()._enqueue(ticket, *given)
        if not fresh:
            return
        failed = [MoveError("copy", batch.pool, int(batch.src[i]), batch.direction, i) for i in fresh]
        ticket._failed = sorted([*ticket._failed, *failed], key=lambda error: error.index)
        self._slots[batch.pool, ENDS[batch.direction][1]].bad[batch.dst[fresh]] = True
        self._totals["failed"] += len(fresh)

    def _work(self, number: int, behind: Any, uses: Any, call: Callable[[Any], None]) -> None:
        """What is to fail is spoiled behind the copy, before its event."""
        places = []
        for events, slots, writes in uses:
            if writes and events.tier != "staging":
                pool = self._pools[events.pool]
                base = pool.host.address if events.tier == "host" and pool.host is not None else pool.device
                places += [
                    (base + int(slot) * pool.page_bytes, pool.page_bytes) for slot in slots if slot in self._spoiled
                ]

        def spoil() -> None:
            for place, size in places:
                ctypes.memset(place, 0xEE, size)

        def copy_and_spoil(stream: Any) -> None:
            call(stream)
            if places:
                self._gpu.give(stream, Work(spoil))

        super()._work(number, behind, uses, copy_and_spoil)

    def _is_failing(self, direction: str) -> bool:
        """Whether the next page of a direction is to fail."""
        mine = [only in (None, direction) for _, only in self._fails]
        self._fails = [(left - counts, only) for (left, only), counts in zip(self._fails, mine, strict=True)]
        due = [each for each in self._fails if each[0] == 0]
        self._fails = [each for each in self._fails if each[0] > 0]
        return bool(due) or self._dice.random() < self._rate

    def _allow(self) -> None:
        if not self._faults:
            raise LogicError("made without faults=True")

    def fail(self, k: int, direction: str | None = None) -> None:
        """The k-th page (of this direction) from now, from 1, fails."""
        self._allow()
        self._fails.append((k, direction))

    def fail_at_random(self, rate: float, seed: int) -> None:
        """Every page fails with this probability."""
        self._allow()
        self._rate, self._dice = rate, random.Random(seed)

    def fill(self, direction: str, times: int) -> None:
        """The next `times` submissions of a direction find its queue full."""
        self._allow()
        self._fills[direction] += times

    def stall(self, direction: str, stalled: bool = True) -> None:
        """A direction stands still, or goes on."""
        self._allow()
        hold = self._holds.pop(direction, None)
        if hold is not None:
            hold.done = True
        if stalled:
            hold = self._holds[direction] = fake_cupy.Record()
            with self._gpu.lock:
                queue = self._streams[DIRECTIONS.index(direction)].cuda.queue
                queue.appendleft(Work(lambda: None, after=hold))

    def close(self) -> None:
        for direction in list(self._holds):
            self.stall(direction, False)
        super().close()
