"""Many threads at once, and requests whose pages tell whose they are."""

from __future__ import annotations

import os
import random
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np

from kvpool import CacheConfig, KVCache, KVCacheManager, PoolConfig, PoolPlan
from kvpool.mover import CpuMover

T = 4
FREE_THREADED = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))
SEEDS = range(int(os.environ.get("KVPOOL_STRESS_SEEDS", "3")))  # more of them: for an hour's run


def gil_is_on() -> bool:
    return not FREE_THREADED or sys._is_gil_enabled()


@contextmanager
def hasty() -> Iterator[None]:
    """Where there is a GIL, threads take turns as often as the interpreter can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def together(seed: int, *works: Callable[[random.Random], object], seconds: float = 60) -> None:
    """Each in a thread and with random numbers of its own, all from the same moment on; raises what one raises."""
    errors: list[BaseException] = []
    start = threading.Barrier(len(works))

    def run(number: int, work: Callable[[random.Random], object]) -> None:
        try:
            start.wait()
            work(random.Random(1000 * seed + number))
        except BaseException as error:
            errors.append(error)
            start.abort()

    threads = [threading.Thread(target=run, args=one, daemon=True) for one in enumerate(works)]
    with hasty():
        for thread in threads:
            thread.start()
        end = time.monotonic() + seconds
        for thread in threads:
            thread.join(max(0.0, end - time.monotonic()))
    assert not errors, (f"seed {seed}", errors) and errors[0]
    assert not any(thread.is_alive() for thread in threads), f"seed {seed}: threads hang after {seconds} s"


def make(device: int, host: int = 0, *, windowed: bool = True, faults: bool = False) -> KVCacheManager:
    """Two pools of int64 words, one per position; the mover's happens-before checker runs."""
    names: dict[str, int | None] = {"full": None} | ({"window": 6} if windowed else {})
    pools = [PoolConfig(name, 8 * T, window) for name, window in names.items()]
    config = CacheConfig(T, pools, 1 << 20, hash_seed=1, max_seq_len=64)
    plan = PoolPlan(dict.fromkeys(names, 1), dict.fromkeys(names, device), dict.fromkeys(names, host), 1 << 20)
    return KVCacheManager(config, plan=plan, mover=partial(CpuMover, check=True, faults=faults))


def prompt(r: random.Random, longest: int = 24) -> list[int]:
    """One of few families, so that many share prefixes and part within a block."""
    n = r.randint(1, longest)
    at = r.randint(0, n)
    return [*([r.randint(1, 2)] * at), *(r.randint(1, 3) for _ in range(n - at))]


def word(tokens: Sequence[int]) -> int:
    """What belongs into the last position of these tokens."""
    return hash(tuple(tokens)) & 0x7FFFFFFFFFFF


class Pages:
    """A manager's pages by pool, as words; they must not be asked for while others work: that settles all moves."""

    def __init__(self, manager: KVCacheManager) -> None:
        self.words: dict[str, Any] = {name: manager.pages(name).view(np.int64) for name in manager._pool_index}

    def compute(self, cache: KVCache, tokens: Sequence[int], start: int) -> int:
        """As a step of the engine would: reads what is before `start`, writes the rest. How many words it has read."""
        read = 0
        for name, words in self.words.items():
            table = cache.block_table(name)
            for position in range(len(tokens)):
                slot, due = table[position // T], word(tokens[: position + 1])
                if position >= start:
                    assert slot, (cache, name, position)
                    words[slot, position % T] = due
                elif slot:
                    found = words[slot, position % T]
                    assert found == due, f"{cache!r}: word {found}, not {due}, at {position} in slot {slot} of {name}"
                    read += 1
        return read
