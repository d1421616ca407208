"""How calls of two threads share the core: the wall time of a call by one thread over that of a call by two.

    PYTHON_GIL=0 python bench/threads.py [rounds]        # on a free-threaded build; PYTHON_GIL=1 to compare

2.0 is perfect; 1.0: they take turns. Workloads as W1 of bench_w1_w2.py, each thread with sequences of its own. Rounds
of one thread and of two take turns. A round in which a thread was off its core for a tenth of the time is left out (not
where there is a GIL to wait for): on a machine that others use most are. What is printed is the best of the others, and
how many those were.
"""

from __future__ import annotations

import random
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from bench_w1_w2 import BLOCKS, SEQUENCES, build, prompts, serve

from kvpool import KVCacheManager

CALLS, WARM_UP = 150, 30  # per thread and round: a millisecond or two
Prompts = list[np.ndarray[Any, np.dtype[np.int32]]]
Work = Callable[[KVCacheManager, Prompts, int], Callable[[], object]]


def probe(manager: KVCacheManager, own: Prompts, thread: int) -> Callable[[], object]:
    choose = random.Random(thread).randrange
    return lambda: manager.probe(own[choose(len(own))])


def create_close(manager: KVCacheManager, own: Prompts, thread: int) -> Callable[[], object]:
    choose = random.Random(thread).randrange
    return lambda: manager.create(thread, own[choose(len(own))]).close()


def w1(manager: KVCacheManager, own: Prompts, thread: int) -> Callable[[], object]:
    choose, out = random.Random(thread).randrange, np.zeros((1, BLOCKS), np.int32)

    def call() -> None:
        cache = manager.create(thread, own[choose(len(own))])
        cache.resume()
        manager.block_tables([cache], "kv", out=out)
        cache.close()

    return call


def core(manager: KVCacheManager, own: Prompts, thread: int) -> Callable[[], object]:
    choose, of = random.Random(thread).randrange, manager._core
    return lambda: of.close([of.create(own[choose(len(own))], b"(None, None)")])


LOCKED = getattr(sys, "_is_gil_enabled", lambda: True)()


def timed(manager: KVCacheManager, given: Prompts, work: Work, threads: int) -> float | None:
    """Seconds per call of all threads together; None: one of them was off its core."""
    start, spans = threading.Barrier(threads), [(0.0, 0.0, 0.0)] * threads

    def run(thread: int) -> None:
        call = work(manager, given[thread::2], thread)
        for _ in range(WARM_UP):
            call()
        start.wait()
        begun, busy = time.perf_counter(), time.thread_time()
        for _ in range(CALLS):
            call()
        spans[thread] = begun, time.perf_counter(), time.thread_time() - busy

    workers = [threading.Thread(target=run, args=(thread,)) for thread in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    wall = max(end for _, end, _ in spans) - min(begun for begun, _, _ in spans)
    return wall / (threads * CALLS) if LOCKED or all(wall <= 1.1 * busy for _, _, busy in spans) else None


def main(rounds: int) -> None:
    manager = build(False)
    given = prompts(SEQUENCES, BLOCKS * 16 + 1)
    for number, tokens in enumerate(given):
        serve(manager, number, tokens)
    lock = "on" if LOCKED else "off"
    print(
        f"Python {sys.version.split()[0]}, the GIL is {lock}; {rounds} rounds of {CALLS} calls per thread; µs per call"
    )
    print("| 64 blocks | 1 thread (rounds) | 2 threads (rounds) | ratio |\n| --- | --- | --- | --- |")
    works: dict[str, Work] = {"probe": probe, "create, close": create_close, "W1": w1, "the core's create, close": core}
    for name, work in works.items():
        found: dict[int, list[float]] = {1: [], 2: []}
        for _ in range(rounds):
            for threads, times in found.items():
                if (seconds := timed(manager, given, work, threads)) is not None:
                    times.append(seconds * 1e6)
        one, two = (min(times, default=float("nan")) for times in found.values())
        print(f"| {name} | {one:.2f} ({len(found[1])}) | {two:.2f} ({len(found[2])}) | {one / two:.2f} |", flush=True)
    manager.check()


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 300)
