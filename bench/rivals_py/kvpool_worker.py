"""kvpool's side of `compare.py`."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from worker import replay, serve, steps

sys.path.insert(0, str(Path(__file__).parents[1]))
import bench_w1_w2
import memory_short
import w4

from kvpool import CacheConfig, KVCache, KVCacheManager, PoolConfig, PoolPlan


def w4_steps(number: int, warm: int, **case: Any) -> list[tuple[int, int]]:
    return steps(w4.World(w4.Case(**case)), number, warm)


def short(ratio: float, lengths: list[tuple[int, int]], admission: str = "latency") -> dict[str, Any]:
    """See ../memory_short.py."""
    outcome = memory_short.run(ratio, admission=admission, lengths=lengths)
    return {name: getattr(outcome, name) for name in ("steps", "extra_percent", "mean_end")}


def blocks(number: int) -> dict[str, list[int]]:
    """W1, W1t, W1s, W1 with a windowed pool and W2, ns per call of 64 blocks; see ../bench_w1_w2.py."""
    clock = time.thread_time_ns
    given = bench_w1_w2.prompts(1000, 1025)
    rng = np.random.default_rng(0)
    out = np.zeros((1, 64), np.int32)

    def cached(windowed: bool, turns: int) -> KVCacheManager:
        manager = bench_w1_w2.build(windowed)
        for at, tokens in enumerate(given):
            for turn in range(1, turns + 1):
                bench_w1_w2.serve(manager, at, tokens[: 1024 * turn // turns])
        return manager

    def claims(manager: KVCacheManager) -> list[int]:
        times = []
        for at in rng.integers(0, 1000, number).tolist():
            start = clock()
            cache = manager.create(0, given[at])
            cache.resume()
            manager.block_tables([cache], "kv", out=out)
            cache.close()
            times.append(clock() - start)
            assert out.all()
        manager.check()
        return times

    manager = cached(False, 1)
    times = {"W1": claims(manager), "W1t": claims(cached(False, 8))}
    held = [manager.create(f"live {at}", tokens) for at, tokens in enumerate(given)]
    assert all(cache.resume() for cache in held)
    times["W1s"] = claims(manager)
    for cache in held:
        cache.close()
    times["W1, windowed pool besides"] = claims(cached(True, 1))
    for tokens in bench_w1_w2.prompts(1100, 1024):
        bench_w1_w2.serve(manager, 0, tokens)
    times["W2"] = []
    for _ in range(number):
        tokens = rng.integers(0, 2**31 - 1, 1024, np.int32)
        start = clock()
        bench_w1_w2.serve(manager, 0, tokens)
        times["W2"].append(clock() - start)
    manager.check()
    return times


def w3(path: str, slots: int) -> dict[str, float]:
    """Blocks of 512 tokens, hashed and compared in every call."""
    t = 512
    config = CacheConfig(t, [PoolConfig("kv", 1)], slots + 1, hash_seed=1)
    manager = KVCacheManager(config, None, plan=PoolPlan({"kv": 1}, {"kv": slots}, {"kv": 0}, slots + 1))
    serial = iter(range(1 << 30))
    columns = np.arange(t, dtype=np.int64)

    def prepare(ids: list[int]) -> np.ndarray:
        rows = (np.array(ids, np.int64)[:, None] * 0x9E3779B1 + columns * 0x85EBCA6B) & 0x7FFFFFFF
        rows[:, 0] = ids
        return np.append(rows.ravel(), 0).astype(np.int32)

    def claim(tokens: np.ndarray) -> tuple[KVCache, int]:
        cache = manager.create(next(serial), tokens)
        return cache, cache.num_reused_tokens // t

    def store(cache: KVCache, tokens: np.ndarray) -> bool:
        end = len(tokens) - 1
        if not cache.resume() or not cache.resize(end):
            return False
        cache.commit(tokens[cache.num_committed_tokens : end])
        return True

    result = replay(path, slots, prepare, claim, store, lambda cache: cache.close())
    manager.check()
    return result


if __name__ == "__main__":
    serve({"w4": w4_steps, "short": short, "blocks": blocks, "w3": w3})
