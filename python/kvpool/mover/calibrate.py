"""Times every path that a GPU offers, through `CudaMover` itself, each verified byte by byte before.

All work of one measurement is held behind copies within the device until it is enqueued, by the events that moves wait
for anyway, so that what is timed is the GPU's and not the caller's:

    engine's stream   [ hold ... ] begin
    mover's streams                [ the move ]
    another stream                              end
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kvpool.mover.calibration import KERNELS, Calibration, Speed
from kvpool.mover.cuda import ENDS, CudaMover
from kvpool.mover.cuda_runtime import CudaRuntime
from kvpool.mover.cuda_ticket import CudaTicket
from kvpool.mover.descriptors import CudaPool
from kvpool.mover.paths import PATHS, Choice, Shape
from kvpool.mover.pinned import PinnedMemory
from kvpool.mover.slot_events import DIRECTIONS
from kvpool.mover.staging import STAGING_BYTES
from kvpool.mover.twins import copy_pages_u8
from kvpool.mover.types import MoveBatch, SlotUse, slot_array

ROUNDS = 5
VERIFIED_BYTES = 4 << 20  # of a job that is verified
HOLD_BYTES = 64 << 20  # of one copy that holds the streams
PLAIN = "plain copy"
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Sizes:
    """fragments, counts: of pages (bytes) and their numbers. most_bytes: of one job. blocks: caps of the grid. holds:
    most copies that hold a measurement."""

    fragments: tuple[int, ...] = (4 << 10, 16 << 10, 64 << 10, 256 << 10, 2 << 20)
    counts: tuple[int, ...] = (8, 64, 1024)
    most_bytes: int = 256 << 20
    blocks: tuple[int, ...] = (8, 16, 32, 64)
    holds: int = 200


@dataclass(frozen=True, slots=True)
class Job:
    """n pages of one size between slots, scattered on both sides, or side by side on the host's."""

    batch: MoveBatch
    page_bytes: int

    @property
    def num_bytes(self) -> int:
        return len(self.batch.src) * self.page_bytes


@dataclass
class Result:
    """rows: medians, with a plain copy (path PLAIN) of as many bytes for each job. wrong: a path that left a wrong
    byte; nothing is measured after it. cut: time ran out. problems: paths that are not offered, and why."""

    rows: list[Speed] = field(default_factory=list)
    wrong: str | None = None
    cut: bool = False
    problems: dict[str, str] = field(default_factory=dict)

    def plain(self, row: Speed) -> float:
        """GB/s of the plain copy beside a row."""
        key = row.direction, row.page_bytes, row.count
        return next(r.gb_per_s for r in self.rows if r.path == PLAIN and (r.direction, r.page_bytes, r.count) == key)

    def own(self) -> list[Speed]:
        """Without the plain copies."""
        return [row for row in self.rows if row.path != PLAIN]

    def calibration(self, device: str, driver: str) -> Calibration:
        """Of what was measured now."""
        return Calibration(device, driver, time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), tuple(self.own()))


class _Given:
    """A chooser that is told what to choose."""

    paths = frozenset(PATHS)
    choice = Choice("engine")

    def choose(self, shape: Shape, offered: frozenset[str]) -> Choice:
        """As told."""
        return self.choice


class Bench:
    """Memory for the largest job on both sides, about 2 x most_bytes each, used by all. A context manager."""

    def __init__(
        self, runtime: CudaRuntime, sizes: Sizes, seconds: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._runtime, self.sizes, self._clock = runtime, sizes, clock
        self._end = clock() + seconds
        largest = max(sizes.fragments)
        total = largest * -(-2 * sizes.most_bytes // largest)
        self.device = runtime.allocate(total + largest)  # slot 0 is the null page
        self.host = PinnedMemory(total, largest, runtime)
        self._chooser = _Given()
        pools = {
            str(size): CudaPool(size, self.device.ptr, total // size + 1, self.host, self.device)
            for size in sizes.fragments
        }
        staging = max(STAGING_BYTES, 2 * largest)
        self.mover = CudaMover(pools, runtime, chooser=self._chooser, staging_bytes=staging, queue=2000, check=False)
        self._holding, self._probe = runtime.stream(), runtime.stream()
        self._random = np.random.default_rng(0)
        self._held = min(HOLD_BYTES, total // 2)
        self._hold_ms = self.ms(self._holding, lambda: self._hold(1))

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *args: object) -> None:
        self.mover.close()
        self._runtime.synchronize()
        self.host.close()

    # -- jobs ---------------------------------------------------------------------------------

    def choices(self, direction: str, page_bytes: int) -> list[Choice]:
        """All that pages of this size can take, with each cap of blocks."""
        offered = self.mover.offered(str(page_bytes), direction)
        return [
            Choice(path, cap)
            for path in PATHS
            if path in offered
            for cap in (self.sizes.blocks if path in KERNELS else (0,))
        ]

    def job(self, direction: str, page_bytes: int, count: int, path: str) -> Job:
        """On random slots; for "staged" the host's lie side by side."""
        slots = self._random.permutation(2 * count).astype(np.int32)
        src, dst = slots[:count], slots[count:]
        run = np.arange(count, dtype=np.int32)
        if direction == "offload":
            src, dst = src + 1, run if path == "staged" else dst
        elif direction == "onboard":
            src, dst = run if path == "staged" else src, dst + 1
        else:
            src, dst = src + 1, dst + 1
        return Job(MoveBatch(str(page_bytes), direction, src, dst), page_bytes)

    def send(self, choice: Choice | None, job: Job) -> None:
        """On its way, by that path, or (None) by a plain copy of as many bytes."""
        if choice is None:
            self._plain(job)
        else:
            self.submit(choice, job)

    def finish(self) -> None:
        """All that was sent is over."""
        self._holding.synchronize()
        self.mover.synchronize()

    def submit(self, choice: Choice, job: Job) -> CudaTicket:
        """By that path."""
        self._chooser.choice = choice
        ticket = self.mover.submit(job.batch)
        assert ticket is not None, "the queue is long"
        return ticket

    # -- figures ------------------------------------------------------------------------------

    def run(self, progress: Progress) -> Result:
        """Every direction, fragment, count and path."""
        result = Result(problems=self.mover.problems())
        for direction in DIRECTIONS:
            for size in self.sizes.fragments:
                for choice in self.choices(direction, size):
                    if not self.is_right(choice, direction, size):
                        result.wrong = f"{direction}, pages of {size} bytes: {choice.path}, {choice.blocks} blocks"
                        return result
                for count in sorted({min(n, self.sizes.most_bytes // size) for n in self.sizes.counts}):
                    progress(f"{direction}, {count} pages of {size} bytes")
                    if self._clock() > self._end:
                        result.cut = True
                        return result
                    result.rows += self._cell(direction, size, count)
        return result

    def _cell(self, direction: str, size: int, count: int) -> list[Speed]:
        at = direction, size, count
        rows = [Speed(*at, PLAIN, None, self._gb_per_s(None, self.job(*at, PLAIN)))]
        for choice in self.choices(direction, size):
            speed = self._gb_per_s(choice, self.job(*at, choice.path))
            rows.append(Speed(*at, choice.path, choice.blocks or None, speed))
        return rows

    def ms(self, stream: Any, work: Callable[[], None]) -> float:
        """Of work that is given to one stream."""
        begin, end = self._runtime.event(timing=True), self._runtime.event(timing=True)
        self._runtime.record(begin, stream)
        work()
        self._runtime.record(end, stream)
        stream.synchronize()
        return self._runtime.elapsed_ms(begin, end)

    def _hold(self, times: int) -> None:
        for _ in range(times):
            self._runtime.copy_async(self.device.ptr + self._held, self.device.ptr, self._held, self._holding)

    def _gb_per_s(self, choice: Choice | None, job: Job) -> float:
        """choice None: a plain copy of as many bytes."""
        if choice is None:
            times = [self.ms(self._holding, lambda: self._plain(job)) for _ in range(ROUNDS + 1)][1:]
        else:
            start = self._clock()
            self.submit(choice, job).wait()  # the first time costs more
            enqueue_ms = 1e3 * (self._clock() - start)
            holds = min(int(2 * enqueue_ms / max(self._hold_ms, 1e-3)) + 1, self.sizes.holds)
            times = [self._move_ms(choice, job, holds) for _ in range(ROUNDS)]
        return job.num_bytes / 1e6 / statistics.median(times)

    def _move_ms(self, choice: Choice, job: Job, holds: int) -> float:
        begin, end = self._runtime.event(timing=True), self._runtime.event(timing=True)
        pool, (near, far) = job.batch.pool, ENDS[job.batch.direction]
        self._hold(holds)
        self._runtime.record(begin, self._holding)
        self.mover.step_end([SlotUse(pool, near, job.batch.src, True)], self._holding)
        self.submit(choice, job)
        self.mover.wait_on(self._probe, pool, far, job.batch.dst)
        self._runtime.record(end, self._probe)
        self._probe.synchronize()
        return self._runtime.elapsed_ms(begin, end)

    def _plain(self, job: Job) -> None:
        device, host, direction = self.device.ptr, self.host.address, job.batch.direction
        source, target = {
            "offload": (device, host),
            "onboard": (host, device),
            "copy": (device, device + job.num_bytes),
        }[direction]
        self._runtime.copy_async(target, source, job.num_bytes, self._holding)

    # -- bytes --------------------------------------------------------------------------------

    def is_right(self, choice: Choice, direction: str, size: int) -> bool:
        """Both sides hold random bytes; afterwards they must be what the twin makes of them."""
        job = self.job(direction, size, max(min(max(self.sizes.counts), VERIFIED_BYTES // size), 2), choice.path)
        n = len(job.batch.src)
        device = np.frombuffer(self._random.bytes((2 * n + 1) * size), np.uint8).copy()
        host = np.frombuffer(self._random.bytes(2 * n * size), np.uint8).copy()
        self._runtime.upload(device, self.device.ptr)
        self.host.array[: host.size] = host
        self.submit(choice, job).wait()
        source, target = {"offload": (device, host), "onboard": (host, device)}.get(direction, (device, device))
        copy_pages_u8(source, target, slot_array(job.batch.src, "src"), slot_array(job.batch.dst, "dst"), size, n)
        found = self._runtime.download(self.device.ptr, device.size)
        return bool(np.array_equal(found, device) and np.array_equal(self.host.array[: host.size], host))
