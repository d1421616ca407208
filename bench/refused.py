"""What a refusal costs on two tiers: a `resize` that cannot be and `available_tokens`, by the number of cached blocks.

`python bench/refused.py`: microseconds a call, the least of five rounds. "crowded": a suspended cache holds more pages
of a windowed pool than its part of the host has room for, so that moves are tried on paper.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from kvpool import CacheConfig, KVCacheManager, PoolConfig, PoolPlan

T = 16


def least(call: Callable[[], object]) -> float:
    """Microseconds a call; at least 20 ms a round."""
    times = 1
    while True:
        rounds = []
        for _ in range(5):
            start = time.perf_counter()
            for _ in range(times):
                call()
            rounds.append(time.perf_counter() - start)
        if min(rounds) > 0.02:
            return min(rounds) / times * 1e6
        times *= 4


def measure(blocks: int, crowded: bool) -> tuple[float, float]:
    windows = {"full": None, "window": 4 * T} if crowded else {"full": None}
    config = CacheConfig(T, [PoolConfig(n, T, w) for n, w in windows.items()], 1 << 30, 1 << 30, hash_seed=1)
    host = {"full": blocks, "window": 1}
    plan = PoolPlan(dict.fromkeys(windows, 1), dict.fromkeys(windows, blocks), {n: host[n] for n in windows}, 1 << 30)
    manager = KVCacheManager(config, device=None, plan=plan)

    def run(tokens: range, keep: bool) -> None:
        cache = manager.create(f"{tokens}", tokens)
        assert cache.resume()
        assert cache.resize(len(tokens))
        cache.commit(tokens)
        if keep:
            cache.suspend()
        else:
            cache.close()

    for i in range(blocks // 64 - 1):
        run(range(i * 64 * T, (i + 1) * 64 * T), keep=False)
    if crowded:
        run(range(10**6, 10**6 + 64 * T), keep=True)
    last = manager.create("last", [])
    assert last.resume()
    # Crowded: as many as there are slots but one; the suspended cache's last block finds room, the others do not.
    too_much = (blocks - 2) * T if crowded else (blocks + 1) * T
    assert not last.resize(too_much)
    return least(lambda: last.resize(too_much)), least(manager.available_tokens)


if __name__ == "__main__":
    for crowded in (False, True):
        for blocks in (1024, 16384, 65536):
            refused, tokens = measure(blocks, crowded)
            name = "crowded, " if crowded else ""
            print(f"{name}{blocks} blocks: refused resize {refused:.2f} us, available_tokens {tokens:.2f} us")
