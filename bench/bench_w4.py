"""W4 (scheduler step) of kvpool alone: what it costs, and that it does not grow with what waits or is cached.

    .venv/bin/python -m pytest bench/bench_w4.py --benchmark-only

CPU time of the calling thread. The table's times are schedule() and update() of one step together; each alone is in
extra_info (`--benchmark-json PATH`), in µs as (min, median). bench/rivals_py measures the same beside vLLM and SGLang.
"""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

import pytest
from w4 import Case, World, figures

STEPS = 400

PLAIN = [Case("A"), Case("B memory"), Case("B forecast"), Case("B asked"), Case("C")]
WAITING = [Case(kind, waiting=n) for kind in ("A", "B memory", "B asked") for n in (16, 1000, 4000)]
CACHED = [Case(kind, cached=n) for kind in ("A", "C") for n in (1000, 100_000)]
OTHERS = [
    Case(kind, **more)
    for kind in ("A", "B asked", "C")
    for more in ({"host": True}, {"window": True}, {"drafts": 3})
]  # fmt: skip


def name(case: Case) -> str:
    given, usual = asdict(case), asdict(Case(case.kind))
    more = [what if value is True else f"{what} {value}" for what, value in given.items() if value != usual[what]]
    return ", ".join([case.kind, *more])


def run(benchmark: Any, case: Case, group: str) -> None:
    world = World(case)
    times = []
    for _ in range(STEPS // 10):
        world.prepare()
        world.step()
    benchmark.group = group
    benchmark.pedantic(lambda: times.append(world.step()), setup=world.prepare, rounds=STEPS)
    benchmark.extra_info.update(asdict(figures(times)))
    world.manager.check()


pytestmark = pytest.mark.benchmark(timer=time.thread_time)


@pytest.mark.parametrize("case", PLAIN, ids=name)
def test_w4(benchmark: Any, case: Case) -> None:
    """The three states; B by what refuses the head."""
    run(benchmark, case, "W4: 256 decodes, 16 waiting")


@pytest.mark.parametrize("case", WAITING, ids=name)
def test_w4_many_wait(benchmark: Any, case: Case) -> None:
    """16, 1,000 and 4,000 waiting."""
    run(benchmark, case, f"W4 {case.kind}, by number waiting")


@pytest.mark.parametrize("case", CACHED, ids=name)
def test_w4_many_blocks(benchmark: Any, case: Case) -> None:
    """1,000 and 100,000 blocks in the tree."""
    run(benchmark, case, f"W4 {case.kind}, by cached blocks")


@pytest.mark.parametrize("case", OTHERS, ids=name)
def test_w4_more(benchmark: Any, case: Case) -> None:
    """A host tier as large as the device pool; a windowed pool besides; 3 drafts, all accepted."""
    run(benchmark, case, f"W4 {case.kind}, with more")
