"""W1 (hot claim and release) and W2 (churn) from Python, beside a floor in the same run.

    make bench

Figures are seconds per call of 64 blocks (1,024 tokens, 16 per block) in a pool of 65,536 slots. The floor is what any
manager written in Python pays: one dict look-up per block with precomputed keys, a counter up, a counter down.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from kvpool import CacheConfig, KVCacheManager, PoolConfig, PoolPlan

T, BLOCKS, SEQUENCES, SLOTS = 16, 64, 1000, 65_536
CALLS = 200  # of each of two threads per round


def build(windowed: bool) -> KVCacheManager:
    pools = [PoolConfig("kv", 1)]
    if windowed:
        pools.append(PoolConfig("window", 1, window=256))
    config = CacheConfig(T, pools, len(pools) * (SLOTS + 1), max_seq_len=2048, hash_seed=1)
    names = [pool.name for pool in pools]
    plan = PoolPlan(dict.fromkeys(names, 1), dict.fromkeys(names, SLOTS), dict.fromkeys(names, 0), config.device_bytes)
    return KVCacheManager(config, None, plan=plan)


def serve(manager: KVCacheManager, request_id: int, tokens: np.ndarray[Any, np.dtype[np.int32]]) -> int:
    cache = manager.create(request_id, tokens)
    reused = cache.num_reused_tokens
    cache.resume()
    cache.resize(len(tokens))
    cache.commit(tokens[reused:])
    cache.close()
    return reused


def prompts(count: int, length: int) -> list[np.ndarray[Any, np.dtype[np.int32]]]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 2**31 - 1, length, np.int32) for _ in range(count)]


def by_two_threads(benchmark: Any, work: Callable[[int], None]) -> None:
    """Rounds of 2 * CALLS calls in two threads of one interpreter; divide a round's time by 2 * CALLS for one call."""
    with ThreadPoolExecutor(2) as threads:

        def once() -> None:
            for result in [threads.submit(work, i) for i in range(2)]:
                result.result()

        benchmark.group = f"2 threads, rounds of {2 * CALLS} calls of 64 blocks"
        benchmark.pedantic(once, rounds=50, warmup_rounds=1)


@pytest.mark.parametrize("windowed", [False, True], ids=["one pool", "windowed pool besides"])
def test_w1_hot_claim_and_release(benchmark: Any, windowed: bool) -> None:
    """create (compare, claim), resume, block_table, close, of a full match nobody else holds."""
    manager = build(windowed)
    given = prompts(SEQUENCES, BLOCKS * T + 1)
    for i, tokens in enumerate(given):
        serve(manager, i, tokens)
    rng = random.Random(0)
    out = np.zeros((1, BLOCKS), np.int32)

    def once() -> None:
        cache = manager.create(0, given[rng.randrange(SEQUENCES)])
        cache.resume()
        manager.block_tables([cache], "kv", out=out)
        cache.close()

    once()
    assert (out > 0).all()
    benchmark.group = "W1, 64 blocks"
    benchmark(once)
    manager.check()


def test_w1_two_threads(benchmark: Any) -> None:
    """As W1, two threads on disjoint halves of the sequences; with CPython's lock they take turns."""
    manager = build(False)
    given = prompts(SEQUENCES, BLOCKS * T + 1)
    for i, tokens in enumerate(given):
        serve(manager, i, tokens)

    def work(thread: int) -> None:
        rng = random.Random(thread)
        out = np.zeros((1, BLOCKS), np.int32)
        for _ in range(CALLS):
            cache = manager.create(thread, given[2 * rng.randrange(SEQUENCES // 2) + thread])
            cache.resume()
            manager.block_tables([cache], "kv", out=out)
            cache.close()

    by_two_threads(benchmark, work)
    manager.check()


def test_w1_floor_dict_of_precomputed_keys(benchmark: Any) -> None:
    keys = [[hash((i, j)) for j in range(BLOCKS)] for i in range(SEQUENCES)]
    table = {key: [0, n] for n, key in enumerate(key for chain in keys for key in chain)}
    rng = random.Random(0)

    def once() -> list[int]:
        chain = keys[rng.randrange(SEQUENCES)]
        slots = []
        for key in chain:
            entry = table[key]
            entry[0] += 1
            slots.append(entry[1])
        for key in chain:
            table[key][0] -= 1
        return slots

    benchmark.group = "W1, 64 blocks"
    benchmark(once)


def test_w2_churn(benchmark: Any) -> None:
    """The pool is full of cached blocks: each call evicts 64, fills 64 slots, commits them, releases."""
    manager = build(False)
    given = prompts(SLOTS // BLOCKS, BLOCKS * T)
    for i, tokens in enumerate(given):
        serve(manager, i, tokens)
    assert manager.stats().pools["kv"]["device"]["free"] == 0
    fresh = np.zeros(BLOCKS * T, np.int32)
    rng = np.random.default_rng(1)

    def setup() -> None:
        fresh[:] = rng.integers(0, 2**31 - 1, BLOCKS * T, np.int32)

    def once() -> None:
        serve(manager, 0, fresh)

    benchmark.group = "W2, 64 blocks"
    benchmark.pedantic(once, setup=setup, rounds=2000)
    manager.check()


def test_w2_two_threads(benchmark: Any) -> None:
    """As W2, two threads, the making of the tokens included; with CPython's lock they take turns."""
    manager = build(False)
    for i, tokens in enumerate(prompts(SLOTS // BLOCKS, BLOCKS * T)):
        serve(manager, i, tokens)
    generators = [np.random.default_rng(i + 1) for i in range(2)]

    def work(thread: int) -> None:
        for _ in range(CALLS):
            serve(manager, thread, generators[thread].integers(0, 2**31 - 1, BLOCKS * T, np.int32))

    by_two_threads(benchmark, work)
    manager.check()
