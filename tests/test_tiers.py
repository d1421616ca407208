"""Two tiers, one rule a test: who leaves the device, who finds room on the host, what a refused call leaves behind."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import SimpleNamespace as Request
from typing import Any

import pytest

import backend
from kvpool import AddRequest, CacheConfig, KVCache, KVCacheManager, PoolConfig, PoolPlan, Retention, Stats, TokenRange

Make = Any


@pytest.fixture
def make() -> Iterator[Make]:
    """Managers of pools (device slots, host slots, window) whose books balance in the end."""
    made = []

    def build(*pools: tuple[int, int, int | None], t: int = 1, **options: Any) -> KVCacheManager:
        names = [f"p{i}" for i in range(len(pools))]
        config = CacheConfig(
            t,
            [PoolConfig(name, 8 * t, window) for name, (_, _, window) in zip(names, pools, strict=True)],
            1 << 20,
            1 << 20,
            hash_seed=1,
            **options,
        )
        slots, host = ({name: pool[tier] for name, pool in zip(names, pools, strict=True)} for tier in (0, 1))
        plan = PoolPlan(dict.fromkeys(names, 1), slots, host, 1 << 20)
        made.append(KVCacheManager(config, backend.device(), plan=plan))
        return made[-1]

    yield build
    for manager in made:
        manager.check()
        for cache in list(manager._caches.values()):
            cache.close()
        manager.clear()
        manager.check()
        for tiers in manager.stats().pools.values():
            assert all(books["free"] == books["slots"] for books in tiers.values())


def keep(priority: int) -> Retention:
    return Retention([TokenRange(0, None, priority)], priority)


def run(manager: KVCacheManager, name: str, tokens: Sequence[int], retention: Retention | None = None) -> KVCache:
    cache = manager.create(name, tokens, retention=retention)
    assert cache.resume()
    assert cache.resize(len(tokens))
    cache.commit(tokens[cache.num_committed_tokens :])
    return cache


def store(manager: KVCacheManager, tokens: Sequence[int], retention: Retention | None = None) -> None:
    run(manager, "stored", tokens, retention).close()


def changes(stats: Stats) -> tuple[Any, ...]:
    """All that a refused call must leave as it was."""
    books = {
        (name, tier): {what: count for what, count in books.items() if what != "peak"}
        for name, tiers in stats.pools.items()
        for tier, books in tiers.items()
    }
    return books, stats.evicted, stats.dropped, stats.offloaded, stats.onboarded, stats.reused_tokens


def test_evict_leaves_the_host_alone_when_nothing_is_left_on_the_device(make: Make) -> None:
    manager = make((4, 4, None))
    store(manager, [1, 2])
    assert (manager.evict(5), manager.evict(1)) == (2, 0)
    assert manager.probe([1, 2, 0]) == 2


def test_pages_of_suspended_caches_make_room_in_the_one_order_of_eviction(make: Make) -> None:
    manager = make((4, 4, None))
    store(manager, [1, 2])
    suspended = run(manager, "suspended", [7, 8])
    suspended.suspend()
    other = manager.create("other", [])
    assert other.resume()
    assert other.resize(3)  # two pages are unclaimed and go anyway, older than the third
    assert (manager.stats().offloaded, manager.stats().dropped) == (3, 0)
    assert manager.probe([1, 2, 0]) == manager.probe([7, 8, 0]) == 2
    assert not suspended.resume()
    other.close()
    assert suspended.resume()
    assert manager.stats().onboarded == 1


def test_refused_call_changes_nothing_where_a_window_has_no_room_on_the_host(make: Make) -> None:
    manager = make((4, 4, None), (8, 1, 4))
    suspended = run(manager, "suspended", [1, 2, 3])
    suspended.suspend()
    other = manager.create("other", [])
    assert other.resume()
    before = changes(manager.stats())
    assert manager.available_tokens() == 2  # one is free; only the last block finds room in both pools
    assert not other.resize(3)
    assert changes(manager.stats()) == before
    assert other.resize(2)
    assert manager.stats().offloaded == 2


def test_stale_page_of_a_suspended_block_goes_by_its_own_merit(make: Make) -> None:
    """It displaces nothing that is worth more, and its block goes down without it."""
    manager = make((4, 4, None), (4, 2, 2))
    store(manager, [9], keep(100))
    assert manager.evict(1) == 1
    suspended = run(manager, "suspended", [1, 2], keep(0))
    suspended.suspend()
    assert manager.evict(2) == 2
    assert manager.probe([9, 0]) == 1
    assert manager.stats().pools["p0"]["host"]["held"] == 2
    assert suspended.resume()


def test_block_of_a_suspended_cache_that_stays_displaces_nothing(make: Make) -> None:
    """It would find room in the first pool, and none in the second."""
    manager = make((4, 2, None), (4, 1, 2))
    low = run(manager, "low", [1], keep(0))
    low.suspend()
    assert manager.evict(1) == 1  # holds the only host slot of the window from here on
    store(manager, [9], keep(100))
    assert manager.evict(1) == 1
    other = run(manager, "other", [2], keep(0))
    other.suspend()
    books = manager.stats().pools["p0"]["host"]
    assert (books["held"], books["cached"]) == (1, 1)
    assert manager.evict(1) == 0
    assert manager.stats().pools["p0"]["host"] == books


def test_priority_of_a_private_block_does_not_lift_the_block_above(make: Make) -> None:
    manager = make((4, 4, None), (4, 4, 1), offload_min_priority=60)
    cache = manager.create("private", [1], retention=Retention([TokenRange(0, None, 0)], 100))
    assert cache.resume()
    assert cache.resize(3)
    cache.commit([1])
    cache.suspend()
    assert manager.evict(3) == 3
    assert manager.stats().dropped == 1  # the stale page of block 0; everything else is claimed
    assert cache.resume()


def test_closing_a_suspended_cache_counts_no_private_page_as_dropped(make: Make) -> None:
    manager = make((2, 2, None))
    cache = manager.create("private", [1])
    assert cache.resume()
    assert cache.resize(2)
    cache.suspend()
    assert manager.evict(1) == 1
    cache.close()
    assert (manager.stats().offloaded, manager.stats().dropped) == (1, 0)


def test_commit_onto_a_page_on_the_host_brings_it_up_and_drops_none(make: Make) -> None:
    manager = make((4, 4, None))
    store(manager, [1])
    cache = manager.create("again", [1])
    assert cache.resume()
    assert cache.resize(1)
    assert manager.evict(1) == 1
    assert cache.commit([1]) is False
    stats = manager.stats()
    assert (stats.offloaded, stats.onboarded, stats.dropped) == (1, 0, 0)
    assert stats.pools["p0"]["host"]["free"] == 4
    assert [(event.kind, event.tier) for event in manager.drain_events()] == [
        ("stored", "device"),
        ("moved", "host"),
        ("moved", "device"),
    ]


def test_node_that_is_needed_is_that_of_the_first_leaf_of_both_tiers(make: Make) -> None:
    manager = make((4, 4, None), max_blocks=2)
    store(manager, [1], keep(100))
    assert manager.evict(1) == 1
    store(manager, [2], keep(0))
    store(manager, [3], keep(0))
    assert [manager.probe([token, 0]) for token in (1, 2, 3)] == [1, 0, 1]


def test_evict_with_windows_alone_moves_pages_of_the_first_pool(make: Make) -> None:
    manager = make((2, 2, 4), (2, 2, 4))
    store(manager, [1, 2])
    assert manager.evict(1) == 1
    assert (manager.stats().offloaded, manager.stats().dropped) == (1, 0)
    assert manager.probe([1, 2, 0]) == 2


def test_suspending_a_claim_in_work_keeps_its_pages_where_they_are(make: Make) -> None:
    manager = make((4, 4, None))
    store(manager, [1, 2])
    request = Request(request_id="claimed", tokens=[1, 2, 3])
    assert manager.claim_contexts([(request, None)]) == [2]
    manager.suspend_requests([request])
    assert manager.evict(4) == 0
    assert manager.provide_contexts([(request, 1)]) == [True]
    assert manager.stats().onboarded == 0


def test_resume_that_is_refused_keeps_the_partial_block(make: Make) -> None:
    manager = make((2, 3, None), t=2)
    store(manager, [1, 2, 3, 4])
    assert manager.evict(2) == 2
    other = run(manager, "other", [7, 7, 8, 8])
    cache = manager.create("partial", [1, 2, 3, 9])
    before = changes(manager.stats())
    assert cache.num_reused_tokens == 3
    assert not cache.resume()
    assert (cache.num_reused_tokens, cache.capacity, changes(manager.stats())) == (3, 3, before)
    assert other.resize(4)
    other.close()
    assert cache.resume()
    assert cache.num_reused_tokens == 3


def test_resume_without_room_for_the_partial_block_alone_shortens_the_match(make: Make) -> None:
    manager = make((2, 3, None), t=2)
    store(manager, [1, 2, 3, 4])
    assert manager.evict(2) == 2
    other = run(manager, "other", [7, 7])
    cache = manager.create("partial", [1, 2, 3, 9])
    assert cache.resume()
    assert (cache.num_reused_tokens, cache.capacity) == (2, 2)
    other.close()


def test_resume_that_gives_its_partial_block_up_may_move_that_block_down(make: Make) -> None:
    """Its source is claimed by another SUSPENDED cache too, and makes the room for what must come up."""
    manager = make((8, 8, None), (3, 8, 3), t=2)
    store(manager, [1, 2, 3, 4, 5, 6], Retention([TokenRange(0, 4, 30), TokenRange(4, None, 40)]))
    holder = manager.create("holder", [1, 2, 3, 4, 5, 6, 7])
    cache = manager.create("partial", [1, 2, 3, 4, 5, 9])
    assert (holder.num_reused_tokens, cache.num_reused_tokens) == (6, 5)
    other = manager.create("other", [])
    assert other.resume()
    assert other.resize(4)  # takes the windows of the first block, which is stale, and of the second
    assert manager.stats().pools["p1"]["host"]["held"] == 1
    assert cache.resume()
    assert cache.num_reused_tokens == 4
    assert manager.stats().onboarded == 1
    assert not holder.resume()
    other.close()
    assert holder.resume()


def test_commit_in_flight_onto_several_blocks_needs_one_unit_for_each(make: Make) -> None:
    manager = make((4, 4, None))
    stored = run(manager, "stored", [1, 2])
    slots = stored.block_table("p0").tolist()
    stored.close()
    cache = manager.create("again", [])
    assert cache.resume()
    assert cache.resize(2)
    manager.step_begin([cache])
    assert cache.commit([1, 2])
    assert cache.block_table("p0").tolist() == slots
    manager.step_end([cache])


def test_phase_1_of_add_batch_moves_nothing(make: Make) -> None:
    """The second request would find room by itself, and does not behind the first."""
    manager = make((4, 4, None))
    run(manager, "suspended", [7, 8]).suspend()
    caches = manager.add_batch([AddRequest("first", [1, 2]), AddRequest("second", [3, 4, 5, 6])])
    assert [cache is not None for cache in caches] == [True, False]
    assert manager.stats().offloaded == 0


def test_claim_of_a_match_on_a_full_host_is_never_displaced(make: Make) -> None:
    manager = make((2, 1, None))
    store(manager, [1])
    assert manager.evict(1) == 1
    cache = manager.create("claims", [1, 5])
    assert cache.num_reused_tokens == 1
    store(manager, [2], keep(100))
    assert manager.evict(1) == 1  # finds no room, and goes for good
    assert (manager.stats().dropped, manager.probe([2, 0])) == (1, 0)
    assert cache.resume()
    assert manager.stats().onboarded == 1
