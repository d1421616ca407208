"""Times every path on every job, verifies its bytes, and times a matrix multiply beside it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from paths import DIRECTIONS, PLAIN, Job, Path, paths

from kvpool.mover.cuda_runtime import CudaRuntime
from kvpool.mover.pinned import PinnedMemory
from kvpool.mover.twins import copy_pages_u8

ROUNDS = 5
MULTIPLIES = 20


@dataclass(frozen=True)
class Sizes:
    """fragments, counts: of pages (bytes) and their numbers. most_bytes: of one job. blocks: caps of the grid. matrix:
    rows of the matrices that are multiplied."""

    fragments: tuple[int, ...] = (16 << 10, 64 << 10, 256 << 10, 2 << 20)
    counts: tuple[int, ...] = (64, 1024)
    most_bytes: int = 256 << 20
    blocks: tuple[int, ...] = (8, 16, 32, 64)
    matrix: int = 4096


@dataclass(frozen=True)
class Row:
    """One path on one job: median of ROUNDS; of_plain: fraction of the plain copy's GB/s in the same run."""

    direction: str
    fragment_bytes: int
    count: int
    path: str
    blocks: int | None
    gb_per_s: float
    of_plain: float


@dataclass(frozen=True)
class Beside:
    """ms of MULTIPLIES matrix multiplies alone and while a path was copying."""

    direction: str
    path: str
    blocks: int | None
    alone_ms: float
    beside_ms: float
    slower: float


def calibrate(rows: list[Row]) -> dict[str, dict[str, int | None]]:
    """Per direction, from its largest counts.

    engine_bytes: the smallest page from which on the copy engine, page by page, is at least as fast as every path with
    a kernel (None: it never is). max_blocks: the least cap of blocks with which the register kernel reaches 95 % of its
    best on the smallest page.
    """
    found: dict[str, dict[str, int | None]] = {}
    for direction in dict.fromkeys(row.direction for row in rows):
        own = [row for row in rows if row.direction == direction]
        fragments = sorted({row.fragment_bytes for row in own}, reverse=True)
        engine_bytes = None
        for fragment in fragments:
            cell = _largest(own, fragment)
            engine = [row.gb_per_s for row in cell if row.path.startswith("copy engine")]
            kernels = [row.gb_per_s for row in cell if row.blocks is not None]
            if not engine or not kernels or max(engine) < max(kernels):
                break
            engine_bytes = fragment
        speeds = {row.blocks: row.gb_per_s for row in _largest(own, fragments[-1]) if row.path == "registers"}
        enough = [blocks for blocks, speed in speeds.items() if blocks and speed >= 0.95 * max(speeds.values())]
        found[direction] = {"engine_bytes": engine_bytes, "max_blocks": min(enough, default=None)}
    return found


def _largest(rows: list[Row], fragment: int) -> list[Row]:
    """Rows of one page size with the largest count."""
    count = max(row.count for row in rows if row.fragment_bytes == fragment)
    return [row for row in rows if (row.fragment_bytes, row.count) == (fragment, count)]


@dataclass
class Result:
    """wrong: a path that left a wrong byte; nothing is measured after it. cut: time ran out."""

    rows: list[Row] = field(default_factory=list)
    beside: list[Beside] = field(default_factory=list)
    wrong: str | None = None
    cut: bool = False

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"calibration": calibrate(self.rows)}


class Bench:
    """Memory for the largest job, used by all. Ends when `seconds` are over."""

    def __init__(
        self, runtime: CudaRuntime, sizes: Sizes, seconds: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._runtime, self._sizes, self._clock = runtime, sizes, clock
        self._end = clock() + seconds
        most = max(sizes.fragments) * -(-2 * sizes.most_bytes // max(sizes.fragments))
        self._host = PinnedMemory(most, max(sizes.fragments), runtime)
        self._lists = PinnedMemory(1 << 20, 4096, runtime)
        self._device, self._staging = runtime.allocate(most), runtime.allocate(sizes.most_bytes)
        self._stream, self._other = runtime.stream(), runtime.stream()
        self._random = np.random.default_rng(0)

    def close(self) -> None:
        self._runtime.synchronize()
        self._host.close()
        self._lists.close()

    def run(self, progress: Callable[[str], None]) -> Result:
        """Every direction, fragment, count and path; then the multiplies."""
        result = Result()
        for direction in DIRECTIONS:
            for fragment in self._sizes.fragments:
                for count in sorted({min(n, self._sizes.most_bytes // fragment) for n in self._sizes.counts}):
                    progress(f"{direction}, {count} pages of {fragment >> 10} KiB")
                    self._cells(result, self._job(direction, fragment, count))
                    if result.wrong or result.cut:
                        return result
        for direction in DIRECTIONS:
            progress(f"matrix multiply beside {direction}")
            self._multiplies(result, direction)
        return result

    def _job(self, direction: str, page_bytes: int, count: int) -> Job:
        slots = self._random.permutation(2 * count).astype(np.int32)
        source, target = {
            "offload": (self._device.ptr, self._host.address),
            "onboard": (self._host.address, self._device.ptr),
            "copy": (self._device.ptr, self._device.ptr),
        }[direction]
        half = self._lists.array.size // 2
        lists = self._lists.address, self._lists.address + half
        return Job(direction, source, target, self._staging.ptr, slots[:count], slots[count:], lists, page_bytes)

    def _cells(self, result: Result, job: Job) -> None:
        plain = self._gb_per_s(PLAIN, job)
        row = job.direction, job.page_bytes, job.num_pages
        result.rows.append(Row(*row, PLAIN.name, None, plain, 1.0))
        for path in paths(job.direction, self._sizes.blocks):
            if self._clock() > self._end:
                result.cut = True
                return
            if not self._is_right(path, job):
                result.wrong = f"{job.direction}, {job.num_pages} pages of {job.page_bytes} bytes: {path.name}"
                return
            speed = self._gb_per_s(path, job)
            result.rows.append(Row(*row, path.name, path.blocks, speed, speed / plain))

    def _prepare(self, path: Path, given: Job) -> Job:
        job = path.job(given)
        half = self._lists.array.size // 2
        for at, slots in ((0, job.src_slots), (half, job.dst_slots)):
            self._lists.array[at : at + slots.nbytes].view(np.int32)[:] = slots
        return job

    def _read(self, address: int, num_bytes: int) -> Any:
        if address == self._host.address:
            return self._host.array[:num_bytes].copy()
        return self._runtime.download(address, num_bytes)

    def _is_right(self, path: Path, given: Job) -> bool:
        """Both pools hold random bytes; afterwards the target must be what the twin makes of it."""
        job = self._prepare(path, given)
        size = 2 * job.num_bytes
        contents = {address: self._random.bytes(size) for address in {job.source, job.target}}
        for address, content in contents.items():
            array = np.frombuffer(content, np.uint8)
            if address == self._host.address:
                self._host.array[:size] = array
            else:
                self._runtime.upload(array, address)
        source, expected = (np.frombuffer(contents[address], np.uint8).copy() for address in (job.source, job.target))
        copy_pages_u8(source, expected, job.src_slots, job.dst_slots, job.page_bytes, job.num_pages)
        path.enqueue(self._runtime, job, self._stream)
        self._stream.synchronize()
        return bool(np.array_equal(self._read(job.target, size), expected))

    def _ms(self, work: Callable[[], None], stream: Any) -> float:
        begin, end = self._runtime.event(timing=True), self._runtime.event(timing=True)
        self._runtime.record(begin, stream)
        work()
        self._runtime.record(end, stream)
        stream.synchronize()
        return self._runtime.elapsed_ms(begin, end)

    def _gb_per_s(self, path: Path, given: Job) -> float:
        job = self._prepare(path, given)
        path.enqueue(self._runtime, job, self._stream)  # warm
        times = [self._ms(lambda: path.enqueue(self._runtime, job, self._stream), self._stream) for _ in range(ROUNDS)]
        return job.num_bytes / 1e6 / statistics.median(times)

    def _multiplies(self, result: Result, direction: str) -> None:
        multiply = self._runtime.matrix_multiply(self._sizes.matrix)

        def many() -> None:
            for _ in range(MULTIPLIES):
                multiply(self._other)

        many()
        alone = statistics.median(self._ms(many, self._other) for _ in range(ROUNDS))
        fragment = max(self._sizes.fragments)
        job = self._job(direction, fragment, self._sizes.most_bytes // fragment)
        for path in [PLAIN, *paths(direction, self._sizes.blocks)]:
            if self._clock() > self._end:
                result.cut = True
                return
            mine = self._prepare(path, job)
            once = self._ms(lambda path=path, mine=mine: path.enqueue(self._runtime, mine, self._stream), self._stream)
            for _ in range(min(int(2 * alone / max(once, 1e-3)) + 1, 1000)):  # copies for twice as long
                path.enqueue(self._runtime, mine, self._stream)
            beside = self._ms(many, self._other)
            self._runtime.synchronize()
            result.beside.append(Beside(direction, path.name, path.blocks, alone, beside, beside / alone))
