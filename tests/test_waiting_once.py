"""What a step tells the mover: a stream waits once for a slot; what is used is written down for all caches at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from kvpool import CacheConfig, KVCache, KVCacheManager, PoolConfig, PoolPlan
from kvpool.mover import CpuMover, SlotUse

T = 4


class Spy(CpuMover):
    """Writes down what it is asked."""

    def __init__(self, pools: Any) -> None:
        super().__init__(pools, check=False)
        self.waited: list[list[int]] = []
        self.used: list[SlotUse] = []

    def step_begin(self, uses: Sequence[SlotUse], stream: Any = None, timeout: float | None = None) -> bool:
        self.waited.append(sorted(slot for use in uses for slot in use.slots))
        return super().step_begin(uses, stream, timeout)

    def step_end(self, uses: Sequence[SlotUse], stream: Any = None) -> None:
        self.used = list(uses)
        super().step_end(uses, stream)

    def slots(self, writes: bool) -> list[int]:
        return sorted(int(slot) for use in self.used if use.writes is writes for slot in use.slots)

    def waits(self) -> list[int]:
        """Slots that were waited for since the last look."""
        found = [slot for slots in self.waited for slot in slots]
        self.waited.clear()
        return sorted(found)


def build(slots: int = 32, host: int = 0) -> tuple[KVCacheManager, Spy]:
    plan = PoolPlan({"kv": 1}, {"kv": slots}, {"kv": host}, 8 * (slots + 1))
    config = CacheConfig(T, [PoolConfig("kv", 8)], 8 * (slots + 1), hash_seed=1)
    made: list[Spy] = []

    def mover(pools: Any) -> Spy:
        made.append(Spy(pools))
        return made[0]

    return KVCacheManager(config, "cpu", plan=plan, mover=mover), made[0]


def active(manager: KVCacheManager, request_id: int, tokens: list[int], capacity: int) -> KVCache:
    cache = manager.create(request_id, tokens)
    assert cache.resume()
    assert cache.resize(capacity)
    return cache


def step(manager: KVCacheManager, caches: list[KVCache], stream: Any) -> None:
    manager.step_begin(caches, stream)
    manager.step_end(caches, stream)


def slots_of(*caches: KVCache) -> list[int]:
    return sorted(int(slot) for cache in caches for slot in cache.block_table("kv"))


def test_a_stream_waits_for_a_slot_once() -> None:
    manager, spy = build()
    stream = spy.stream()
    caches = [active(manager, i, list(range(10 * i, 10 * i + 10)), 12) for i in range(3)]
    step(manager, caches, stream)  # nothing was launched before: nothing to wait for
    assert spy.waits() == []
    step(manager, caches, stream)
    assert spy.waits() == slots_of(*caches)
    step(manager, caches, stream)
    assert spy.waits() == []
    assert caches[1].resize(16)
    step(manager, caches, stream)
    assert spy.waits() == slots_of(caches[1])[-1:]
    manager.close()


def test_another_stream_waits_for_all_slots() -> None:
    manager, spy = build()
    one, other = spy.stream(), spy.stream()
    cache = active(manager, 0, [1, 2, 3], 8)
    step(manager, [cache], one)
    step(manager, [cache], one)
    spy.waits()
    step(manager, [cache], other)
    assert spy.waits() == slots_of(cache)
    step(manager, [cache], other)
    assert spy.waits() == []
    step(manager, [cache], one)
    assert spy.waits() == slots_of(cache)
    step(manager, [cache], None)  # the caller waits: for every stream
    assert spy.waits() == slots_of(cache)
    step(manager, [cache], other)
    assert spy.waits() == []
    manager.close()


class Wrapper:
    """Of a stream; equal by its address, and comparable with its like only, as CuPy's."""

    __hash__ = None  # type: ignore[assignment]

    def __init__(self, ptr: int) -> None:
        self.ptr = ptr

    def __eq__(self, other: Any) -> bool:
        return bool(self.ptr == other.ptr)


@pytest.mark.parametrize("wrap", [Wrapper, lambda ptr: int(str(ptr))], ids=["wrappers", "addresses"])
def test_a_stream_is_known_by_equality(wrap: Any) -> None:
    """Wrappers of one stream, as `torch.cuda.current_stream()` makes one per call, are one stream."""
    manager, spy = build()
    cache = active(manager, 0, [1, 2, 3], 8)
    step(manager, [cache], spy.stream())
    spy.waits()
    step(manager, [cache], wrap(1234567))
    assert spy.waits() == slots_of(cache)
    step(manager, [cache], wrap(1234567))
    assert spy.waits() == []
    for other in (wrap(7654321), None):
        step(manager, [cache], other)
        assert spy.waits() == slots_of(cache)
    manager.close()


def test_slots_of_a_table_that_was_altered_are_waited_for_again() -> None:
    manager, spy = build()
    stream = spy.stream()
    first, second = (active(manager, i, list(range(8)), 8) for i in range(2))
    step(manager, [first, second], stream)
    step(manager, [first, second], stream)
    first.commit(range(8))
    spy.waits()
    assert second.commit(range(8))  # its pages are the first one's now
    assert slots_of(second) == slots_of(first)
    step(manager, [first, second], stream)
    assert spy.waits() == slots_of(second)
    assert first.resize(20)
    step(manager, [first], stream)
    spy.waits()
    assert first.resize(12)
    assert first.resize(20)  # the last slot may have been another's meanwhile
    step(manager, [first], stream)
    assert spy.waits() == slots_of(first)
    first.suspend()
    assert first.resume()
    step(manager, [first], stream)
    assert spy.waits() == slots_of(first)
    manager.close()


@pytest.mark.parametrize("parts", [[0, 1, 2], [2, 0], [1]])
def test_a_step_that_ends_in_parts_uses_the_slots_of_each(parts: list[int]) -> None:
    manager, spy = build()
    stream = spy.stream()
    caches = [active(manager, i, list(range(10 * i, 10 * i + 8)), 10) for i in range(3)]
    for cache in caches:
        cache.commit(list(range(10 * cache.request_id, 10 * cache.request_id + 8)))  # history: two blocks of three
    manager.step_begin(caches, stream)
    manager.step_end([caches[i] for i in parts], stream)
    assert spy.slots(False) == slots_of(*(caches[i] for i in parts))
    assert spy.slots(True) == sorted(int(caches[i].block_table("kv")[-1]) for i in parts)
    rest = [cache for i, cache in enumerate(caches) if i not in parts]
    if rest:
        manager.step_end(rest, stream)
        assert spy.slots(False) == slots_of(*rest)
    manager.check()
    manager.close()


def test_what_a_step_uses_is_as_it_was_when_it_began() -> None:
    manager, spy = build()
    stream = spy.stream()
    first, second = (active(manager, i, list(range(8)), 8) for i in range(2))
    first.commit(range(8))
    own = slots_of(second)
    manager.step_begin([second], stream)
    assert second.commit(range(8))
    manager.step_end([second], stream)
    assert spy.slots(False) == own == spy.slots(True)
    manager.close()
