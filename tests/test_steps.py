"""Steps that are computed behind `step_end`, on streams of the mover: who comes after them waits, whoever it is."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import backend
from kvpool import CacheConfig, KVCache, KVCacheManager, PoolConfig, PoolPlan


def manager_of(slots: int, host: int, check: bool = True) -> tuple[KVCacheManager, Any]:
    plan = PoolPlan({"kv": 1}, {"kv": slots}, {"kv": host}, 1 << 20)
    config = CacheConfig(4, [PoolConfig("kv", 8)], 1 << 20, hash_seed=1)
    manager = KVCacheManager(config, backend.device(), plan=plan, mover=backend.mover(check=check))
    return manager, backend.mover_of(manager)


def launch(stream: Any, call: Callable[[], object]) -> None:
    if stream is None:
        call()
    else:
        stream.launch(call)


@pytest.mark.parametrize("host", [0, 8])
@pytest.mark.parametrize("shares", [False, True], ids=["next owner", "sharer"])
@pytest.mark.parametrize("second", [0, 1, None])
def test_who_gets_a_slot_waits_for_launched_steps_of_other_streams(host: int, shares: bool, second: int | None) -> None:
    manager, mover = manager_of(4 if shares else 1, host)
    streams = [mover.stream(), mover.stream()]
    raw = manager.pages("kv")
    first = manager.create("first", [0, 1, 2, 3])
    assert first.resume()
    assert first.resize(4)
    slot = int(first.block_table("kv")[0])
    manager.step_begin([first], streams[0])
    streams[0].launch(lambda: (time.sleep(0.05), raw.__setitem__(slot, 1)))
    manager.step_end([first], streams[0])
    if shares:
        first.commit([0, 1, 2, 3])
    first.close()
    after = manager.create("after", [0, 1, 2, 3, 4] if shares else [9, 9, 9, 9])
    assert after.resume()
    assert after.resize(max(4, after.capacity))
    assert int(after.block_table("kv")[0]) == slot
    stream = None if second is None else streams[second]
    manager.step_begin([after], stream)
    seen: list[int] = []
    launch(stream, (lambda: seen.append(int(raw[slot][0]))) if shares else (lambda: raw.__setitem__(slot, 2)))
    manager.step_end([after], stream)
    for one in streams:
        one.synchronize()
    assert seen == [1] if shares else int(raw[slot][0]) == 2
    assert not mover.findings()
    manager.close()


def test_steps_of_many_threads_lose_no_use_and_no_fence() -> None:
    manager, mover = manager_of(64, 0)
    stream = mover.stream()
    failed: list[BaseException] = []

    def work(cache: KVCache) -> None:
        try:
            for _ in range(200):
                manager.step_begin([cache], stream)
                assert len(cache._uses) == 1
                manager.step_end([cache], stream)
                assert not cache._uses
        except BaseException as error:
            failed.append(error)

    caches = []
    for number in range(6):
        cache = manager.create(number, np.arange(1, dtype=np.int32))
        assert cache.resume()
        assert cache.resize(4)
        caches.append(cache)
    threads = [threading.Thread(target=work, args=(cache,)) for cache in caches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    for cache in caches:
        cache.close()
    assert manager.stats().pools["kv"]["device"]["fenced"] == 0
    manager.check()
    manager.close()
