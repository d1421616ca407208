"""Costs against the length of a context, min and median, CPU time of the calling thread:

- a step of 32 decodes (schedule + update, books only): one pool; a window of 1,024 tokens besides; a host tier
- a resume that brings every page back from the host (books only; half of the blocks in the tree, half the cache's own)
- step_begin + step_end of 32 requests over a stream, CPU mover, pages of 16 bytes

python bench/scale_context.py results/context.json
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from kvpool import CacheConfig, KVCache, KVCacheManager, PoolConfig, PoolPlan, Request, Scheduler, SchedulerConfig

T, REQUESTS, STEPS, BUDGET = 16, 32, 200, 1 << 14
LENGTHS = (1_000, 16_000, 128_000)


def build(slots: int, host: int = 0, window: int | None = None, device: str | None = None) -> KVCacheManager:
    pools = [PoolConfig("kv", 16)] + ([PoolConfig("window", 16, window=window)] if window else [])
    names = [pool.name for pool in pools]
    bytes_ = 16 * len(pools) * (slots + 1)
    config = CacheConfig(T, pools, bytes_, host_bytes=16 * len(pools) * host, max_batch_size=REQUESTS, hash_seed=1)
    plan = PoolPlan(dict.fromkeys(names, 1), dict.fromkeys(names, slots), dict.fromkeys(names, host), bytes_)
    return KVCacheManager(config, device, plan=plan)


def tokens(length: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 100_000, length, np.int32)


def timed(call: Callable[[], object]) -> float:
    start = time.thread_time_ns()
    call()
    return (time.thread_time_ns() - start) / 1e3


def ends(us: list[float]) -> list[float]:
    return [round(min(us), 1), round(float(np.median(us)), 1)]


def decode_step(length: int, host: bool, window: int | None) -> list[float]:
    new = STEPS + 2 * REQUESTS * length // BUDGET + REQUESTS  # the first are still there when the last begins
    slots = REQUESTS * ((length + new) // T + 2)
    manager = build(slots, slots if host else 0, window)
    scheduler = Scheduler(manager, SchedulerConfig(REQUESTS, BUDGET, chunk_tokens=2048))
    for i in range(REQUESTS):
        scheduler.add(Request(i, tokens(length, i), new))
    us: list[float] = []
    while len(us) < STEPS:
        start = time.thread_time_ns()
        step = scheduler.schedule()
        middle = time.thread_time_ns()
        due = [chunk.request for chunk in step.context if chunk.is_last] + step.generation
        outputs = {request.request_id: [1] for request in due}
        took = timed(lambda step=step, outputs=outputs: scheduler.update(step, outputs))
        if len(step.generation) == REQUESTS:
            us.append((middle - start) / 1e3 + took)
        assert step.context or step.generation, "the first ended before the last began"
    return ends(us)


def resume(blocks: int) -> list[float]:
    manager = build(blocks, 2 * blocks)
    caches: list[KVCache] = []
    for i in range(2):
        cache = manager.create(i, tokens(blocks * T, i))
        assert cache.resume()
        assert cache.resize(blocks * T)
        cache.commit(tokens(blocks * T, i)[: blocks * T // 2])
        cache.suspend()
        caches.append(cache)
    us = []
    for turn in range(20):
        us.append(timed(caches[turn % 2].resume))
        caches[turn % 2].suspend()
    return ends(us)


def stream_step(length: int) -> list[float]:
    slots = REQUESTS * (length // T + 40)
    manager = build(slots, device="cpu")
    stream = manager._moves.mover.stream()
    caches = []
    for i in range(REQUESTS):
        cache = manager.create(i, tokens(length, i))
        assert cache.resume()
        assert cache.resize(length)
        caches.append(cache)
    us = []
    for step in range(20):
        for cache in caches:
            assert cache.resize(length + 1 + step, length + step)
        begin = timed(lambda: manager.step_begin(caches, stream))
        us.append(begin + timed(lambda: manager.step_end(caches, stream)))
    manager.close()
    return ends(us[2:])  # the first looks at every slot


def main(path: Path) -> None:
    decode_step(1_000, False, None)  # what the process does only once is not the first row's
    rows = []
    for length in LENGTHS:
        rows.append({
            "tokens": length,
            "decode": decode_step(length, False, None),
            "window": decode_step(length, False, 1_024),
            "host": decode_step(length, True, None),
            "resume": resume(length // T),
            "stream": stream_step(length),
        })  # fmt: skip
    path.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
