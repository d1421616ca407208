"""What the host pays to submit 16,000 random page moves, beside the same loop in Python in the same run.

    .venv/bin/python -m pytest bench/bench_mover.py --benchmark-only --benchmark-columns=min,median -s

"same loop": checks the slots, collects the waits of both event sets, writes the events, merges neighbours into
descriptors, with lists of ints, as `submit` does in Rust. "descriptors": only a list of (source, destination, length).
"page by page": what a manager without a mover does, a NumPy assignment per page, copy included. Pages have 64 bytes, so
that the copies are small beside the bookkeeping; copies of `submit` run in the mover's thread, outside of the figure.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from kvpool.mover import CpuMover, MoveBatch

MOVES, SLOTS, STREAMS = 16_000, 20_000, 6
ROUNDS = 30


class World:
    """Memory and random moves."""

    def __init__(self) -> None:
        random = np.random.default_rng(7)
        self.device = np.zeros((SLOTS + 1, 64), np.uint8)
        self.host = np.zeros((SLOTS, 64), np.uint8)
        self.src = (random.permutation(SLOTS)[:MOVES] + 1).astype(np.int32)
        self.dst = random.permutation(SLOTS)[:MOVES].astype(np.int32)
        self.mover = CpuMover({"kv": (self.device, self.host)}, check=False)

    def submit(self) -> None:
        assert self.mover.submit(MoveBatch("kv", "offload", self.src, self.dst)) is not None


class Books:
    """The mover's bookkeeping in Python: per slot the last write (stream, place) and the reads since, by stream."""

    def __init__(self) -> None:
        self.writes = {tier: [(0, 0)] * (SLOTS + 1) for tier in ("device", "host")}
        self.reads = {tier: [[0] * STREAMS for _ in range(SLOTS + 1)] for tier in ("device", "host")}
        self.place = 0

    def submit(self, src: list[int], dst: list[int]) -> list[tuple[int, int, int]]:
        self.place += 1
        waits, seen = [0] * STREAMS, set()
        source_writes, source_reads = self.writes["device"], self.reads["device"]
        target_writes, target_reads = self.writes["host"], self.reads["host"]
        runs: list[tuple[int, int, int]] = []
        first_src = first_dst = length = 0
        for source, target in zip(src, dst, strict=True):
            if not 1 <= source <= SLOTS or not 0 <= target < SLOTS or target in seen:
                raise ValueError(source, target)
            seen.add(target)
            for stream, place in (source_writes[source], target_writes[target]):
                if place > waits[stream]:
                    waits[stream] = place
            for stream, place in enumerate(target_reads[target]):
                if place > waits[stream]:
                    waits[stream] = place
            source_reads[source][0] = self.place
            target_writes[target] = (0, self.place)
            target_reads[target] = [0] * STREAMS
            if length and source == first_src + length and target == first_dst + length:
                length += 1
                continue
            if length:
                runs.append((first_src, first_dst, length))
            first_src, first_dst, length = source, target, 1
        runs.append((first_src, first_dst, length))
        return runs


def descriptors(src: list[int], dst: list[int]) -> list[tuple[int, int, int]]:
    return [(source, target, 1) for source, target in zip(src, dst, strict=True)]


def page_by_page(world: World, src: list[int], dst: list[int]) -> None:
    for source, target in zip(src, dst, strict=True):
        world.host[target] = world.device[source]


@pytest.fixture(scope="module")
def world() -> World:
    return World()


def test_submit(benchmark: Any, world: World) -> None:
    benchmark.pedantic(world.submit, setup=lambda: assert_idle(world), rounds=ROUNDS)


def test_same_loop_in_python(benchmark: Any, world: World) -> None:
    benchmark.pedantic(Books().submit, args=(world.src.tolist(), world.dst.tolist()), rounds=ROUNDS)


def test_descriptors_in_python(benchmark: Any, world: World) -> None:
    benchmark.pedantic(descriptors, args=(world.src.tolist(), world.dst.tolist()), rounds=ROUNDS)


def test_page_by_page(benchmark: Any, world: World) -> None:
    benchmark.pedantic(page_by_page, args=(world, world.src.tolist(), world.dst.tolist()), rounds=ROUNDS)


def assert_idle(world: World) -> None:
    assert world.mover.synchronize()


def test_ratio(benchmark: Any, world: World) -> None:
    """The loops by turns, so that all see the same machine: medians of the calling thread's CPU time."""
    src, dst, books = world.src.tolist(), world.dst.tolist(), Books()
    calls: dict[str, Callable[[], Any]] = {
        "submit": world.submit,
        "same loop": lambda: books.submit(src, dst),
        "descriptors": lambda: descriptors(src, dst),
        "page by page": lambda: page_by_page(world, src, dst),
    }
    times: dict[str, list[float]] = {name: [] for name in calls}

    def by_turns() -> None:
        for name, call in calls.items():
            assert_idle(world)
            start = time.thread_time()
            call()
            times[name].append(time.thread_time() - start)

    benchmark.pedantic(by_turns, rounds=ROUNDS)
    medians = {name: float(np.median(of)) for name, of in times.items()}
    for name, median in medians.items():
        benchmark.extra_info[name] = median
        print(f"\n{name}: {median * 1e6:.0f} us, {median / medians['submit']:.1f} x submit", end="")
    print()
