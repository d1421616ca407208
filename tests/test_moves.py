"""A manager over its mover: what is moved when, and what becomes of moves that fail."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import backend
from backend import mover_of
from kvpool import CacheConfig, CacheState, KVCache, KVCacheManager, LogicError, PoolConfig, PoolPlan, Request
from kvpool.mover import AtOnceMover
from movers import ORDERS

MODES: dict[str, dict[str, Any]] = {"threads": {}, **{order: {"simulate": (order, 1)} for order in ORDERS}}
A, B = [*range(8)], [*range(20, 28)]


@pytest.fixture(params=MODES)
def make(request: pytest.FixtureRequest) -> Any:
    made: list[KVCacheManager] = []

    def build(device: int = 6, host: int = 8, window: int | None = None, **options: Any) -> KVCacheManager:
        pools = [PoolConfig("kv", 4 * 8)] + ([PoolConfig("w", 4 * 8, window)] if window else [])
        names = [pool.name for pool in pools]
        each = lambda n: dict.fromkeys(names, n)  # noqa: E731
        plan = PoolPlan(each(1), each(device), each(host), 1 << 20)
        config = CacheConfig(4, pools, 1 << 20, 1 << 20 if host else 0, hash_seed=1)
        mover = backend.mover(check=True, faults=True, **MODES[request.param])
        given = {"mover": mover, "move_timeout_s": 60.0, **options}
        made.append(KVCacheManager(config, backend.device(), plan=plan, **given))
        return made[-1]

    yield build
    for manager in made:
        manager.check()
        manager.close()


def words(manager: KVCacheManager, cache: KVCache, pool: str = "kv") -> list[int]:
    """The word of every token that has a page; read as an engine's kernel would."""
    pages = manager._pages[pool].view(np.int64)
    manager.step_begin([cache])
    table = cache.block_table(pool) if cache.state == "ACTIVE" else []
    found = [int(pages[table[p // 4], p % 4]) for p in range(cache.history_length) if len(table) and table[p // 4]]
    manager.step_end([cache])
    return found


def compute(manager: KVCacheManager, request_id: int, tokens: list[int]) -> KVCache:
    """A request that writes token + 1000 for every token, and commits."""
    cache = manager.create(request_id, tokens)
    assert cache.resume()
    assert cache.resize(len(tokens))
    manager.step_begin([cache])
    for name, pages in manager._pages.items():
        for p in range(cache.history_length, len(tokens)):
            slot = cache.block_table(name)[p // 4]
            pages.view(np.int64)[slot, p % 4] = tokens[p] + 1000
    manager.step_end([cache])
    cache.commit(tokens[cache.history_length :])
    return cache


def test_suspended_pages_go_down_and_come_up_in_one_batch_per_direction(make: Callable[..., KVCacheManager]) -> None:
    manager = make(device=4)
    first = compute(manager, 1, A)
    first.suspend()
    second = compute(manager, 2, [*range(40, 56)])  # takes all four slots
    assert manager.stats().offloaded == 2
    totals = mover_of(manager).totals()
    second.close()
    assert first.resume()
    assert words(manager, first) == [t + 1000 for t in A]
    assert mover_of(manager).totals()["pages"] >= totals["pages"] + 2
    assert manager.stats().failed_moves == 0


def test_a_partial_copy_waits_for_the_kernel_and_the_kernel_for_the_copy(make: Callable[..., KVCacheManager]) -> None:
    manager = make()
    compute(manager, 1, A).close()
    cache = manager.create(2, [*A[:6], 90])
    assert cache.num_reused_tokens == 6
    assert cache.resume()
    assert words(manager, cache) == [t + 1000 for t in A[:6]]


def test_pages_are_complete_when_the_manager_hands_out_the_array(make: Callable[..., KVCacheManager]) -> None:
    manager = make(device=4)
    compute(manager, 1, A).close()
    compute(manager, 2, [*range(40, 56)]).close()
    assert manager.stats().offloaded == 2
    host = manager.pages("kv", "host").view(np.int64)
    assert sorted(host[host.any(axis=1)].ravel().tolist()) == [t + 1000 for t in A]


def test_a_failed_offload_drops_the_cached_page_and_what_is_below_it(make: Callable[..., KVCacheManager]) -> None:
    manager = make(device=4)
    compute(manager, 1, A).close()
    mover_of(manager).fail(2, "offload")  # leaf first: the second page is the parent
    compute(manager, 2, [*range(40, 56)]).close()
    assert manager.stats().offloaded == 2
    manager.pages("kv")
    assert manager.lost() == []
    assert manager.probe([*A, 99]) == 0
    assert manager.stats().failed_moves == 1
    assert manager.stats().pools["kv"]["host"]["cached"] == 0
    manager.check()


def test_a_failed_offload_of_a_suspended_cache_makes_it_lost(make: Callable[..., KVCacheManager]) -> None:
    manager = make(device=4)
    first = compute(manager, 1, A)
    first.suspend()
    mover_of(manager).fail(1, "offload")
    second = compute(manager, 2, [*range(40, 56)])
    manager.pages("kv")
    assert manager.lost() == [1]
    assert first.state is CacheState.LOST
    second.close()
    assert not first.resume()
    with pytest.raises(LogicError, match="LOST"):
        first.commit([1])
    with pytest.raises(LogicError, match="LOST"):
        first.resize(20)
    manager.check()
    first.close()
    assert first.state is CacheState.CLOSED
    assert manager.lost() == []
    assert manager.probe([*A, 99]) <= 4  # the leaf went first; its parent is good only if it is another page
    again = compute(manager, 3, A)
    assert words(manager, again) == [t + 1000 for t in A]


@pytest.mark.parametrize("call", ["provide_contexts", "allocate_generation"])
def test_a_lost_first_chunk_is_closed_and_a_lost_later_one_is_left_as_it_was(
    make: Callable[..., KVCacheManager], call: str
) -> None:
    manager = make(device=6)
    compute(manager, 1, A).close()
    compute(manager, 2, [*range(40, 64)]).close()
    first, later = (Request(name, [*A, 9, at], 4) for at, name in enumerate(("first", "later")))
    fine = Request("fine", [70, 71], 4)
    manager.create("later", later.tokens)
    assert manager.claim_contexts([(first, 0), (fine, 0)]) == [8, 0]
    mover_of(manager).fail(1, "onboard")
    other = manager.create("other", [*A, 99])
    assert other.resume()
    manager.step_begin([other])
    manager.step_end([other])
    other.close()
    assert manager.lost() == ["later", "first"]
    if call == "provide_contexts":
        assert manager.provide_contexts([(later, 2), (first, 2), (fine, 2)]) == [False, False, True]
    else:
        assert manager.allocate_generation([fine, first, later]) == 1
    assert manager.stats().failed_moves == 1
    assert sorted(map(str, manager._caches)) == ["fine", "later"]
    assert manager.cache("later").state is CacheState.LOST
    manager.check()
    manager.free_requests([later, fine])
    manager.check()
    assert not manager._caches


@pytest.mark.parametrize("k", [1, 2])
def test_a_failed_onboard_is_known_at_step_begin(make: Callable[..., KVCacheManager], k: int) -> None:
    manager = make(device=4)
    compute(manager, 1, A).close()
    compute(manager, 2, [*range(40, 56)]).close()
    mover_of(manager).fail(k, "onboard")
    cache = manager.create(3, [*A, 99])
    other = manager.create(4, [*A, 98])
    assert cache.num_reused_tokens == other.num_reused_tokens == 8
    assert cache.resume()
    manager.step_begin([cache])
    assert manager.lost() == [3, 4]
    assert cache.state == other.state == "LOST"
    manager.step_end([cache])
    for call in (
        lambda: cache.commit([99]),
        lambda: cache.block_table("kv"),
        lambda: manager.block_tables([cache], "kv"),
        lambda: manager.block_tables_csr(iter([cache]), "kv"),
    ):
        with pytest.raises(LogicError, match="of request 3 is LOST"):
            call()
    assert manager.probe([*A, 99]) == 4 * (k - 1)
    cache.close()
    other.close()
    manager.check()
    assert manager.probe([*A, 99]) == 4 * (k - 1)
    again = compute(manager, 5, [*A, 97])
    assert words(manager, again) == [t + 1000 for t in [*A, 97]]


def test_a_failed_copy_of_a_partial_block_loses_only_its_owner(
    make: Callable[..., KVCacheManager],
) -> None:
    manager = make()
    compute(manager, 1, A).close()
    mover_of(manager).fail(1, "copy")
    cache, whole = manager.create(2, [*A[:6], 90]), manager.create(3, [*A, 91])
    assert cache.resume()
    assert whole.resume()
    manager.step_begin([cache, whole])
    manager.step_end([cache, whole])
    assert manager.lost() == [2]
    cache.close()
    assert words(manager, whole) == [t + 1000 for t in A]
    assert manager.probe([*A, 99]) == 8


def test_tables_of_a_cache_whose_page_turns_out_not_to_have_arrived_are_not_handed_out(
    make: Callable[..., KVCacheManager],
) -> None:
    manager = make()
    compute(manager, 1, A).close()
    mover_of(manager).fail(1, "copy")
    lost, other = manager.create(2, [*A[:6], 90]), manager.create(3, [*A, 91])
    assert lost.resume()
    assert other.resume()
    with pytest.raises(LogicError, match=r"block_tables: the cache of request 2 is LOST.*close it"):
        manager.block_tables([other, lost], "kv")
    with pytest.raises(LogicError, match="block_tables_csr: the cache of request 2 is LOST"):
        manager.block_tables_csr([other, lost], "kv")
    assert manager.block_tables([other], "kv").shape == (1, 2)


def test_blocks_of_a_lost_cache_that_is_closed_in_flight_go_when_the_step_ends(
    make: Callable[..., KVCacheManager],
) -> None:
    manager = make(device=4)
    compute(manager, 1, A).close()
    compute(manager, 2, [*range(40, 56)]).close()
    mover_of(manager).fail(1, "onboard")
    cache = manager.create(3, [*A, 99])
    assert cache.resume()
    manager.step_begin([cache])
    assert manager.lost() == [3]
    cache.close()
    assert manager.stats().pools["kv"]["device"]["fenced"] > 0
    manager.step_end([cache])
    books = manager.stats().pools["kv"]
    assert (books["device"]["active"], books["device"]["fenced"]) == (0, 0)
    cached = books["device"]["cached"] + books["host"]["cached"]
    assert cached == sum(manager.probe([*prompt, 98]) for prompt in (A, [*range(40, 56)])) // 4
    manager.check()


def test_lost_caches_get_nothing_in_a_batch_and_others_do(make: Callable[..., KVCacheManager]) -> None:
    manager = make(device=8)

    class Request:
        def __init__(self, request_id: int, tokens: list[int]) -> None:
            self.request_id, self.tokens, self.max_new_tokens = request_id, tokens, 8

    compute(manager, 1, A).close()
    requests = [Request(2, [*A[:6], 90]), Request(3, [70, 71])]
    assert manager.claim_contexts([(request, None) for request in requests]) == [6, 0]
    mover_of(manager).fail(1, "copy")
    assert manager.provide_contexts([(request, 1) for request in requests]) == [True, True]
    caches = [manager.cache(2), manager.cache(3)]
    manager.step_begin(caches)
    manager.step_end(caches)
    assert manager.lost() == [2]
    assert manager.provide_contexts([(request, 1) for request in requests]) == [False, True]
    assert manager.allocate_generation(requests) == 0
    assert manager.allocate_generation(requests[::-1]) == 1
    manager.free_requests(requests)
    assert manager.lost() == []


def test_a_failed_page_of_a_windowed_pool_loses_the_block(make: Callable[..., KVCacheManager]) -> None:
    manager = make(device=6, window=6)
    compute(manager, 1, A).close()
    compute(manager, 2, [*range(40, 64)]).close()
    assert manager.stats().offloaded > 0
    mover_of(manager).fail(1, "onboard")
    cache = manager.create(3, [*A, 99])
    assert cache.num_reused_tokens == 8
    assert cache.resume()
    manager.step_begin([cache])
    manager.step_end([cache])
    assert manager.lost() == [3]
    cache.close()
    assert manager.probe([*A, 99]) < 8
    manager.check()


def step_in_vain(manager: KVCacheManager, cache: KVCache, stalled: str) -> None:
    """A step that waits for a direction that stands still; what goes the other way is over before, however slowly."""
    moves = manager._moves
    assert moves is not None
    for flight in list(moves.flying):
        assert flight.host is (stalled == "offload") or flight.ticket.wait(60)
    moves._timeout = 0.05
    manager.step_begin([cache])
    manager.step_end([cache])
    moves._timeout = 60.0


def test_a_move_that_takes_too_long_counts_as_failed(make: Callable[..., KVCacheManager]) -> None:
    manager = make(device=4)
    compute(manager, 1, A).close()
    compute(manager, 2, [*range(40, 56)]).close()
    manager.pages("kv")
    mover_of(manager).stall("onboard")
    cache = manager.create(3, [*A, 99])
    assert cache.resume()
    step_in_vain(manager, cache, "onboard")
    assert manager.lost() == [3]
    assert manager.stats().stuck_slots == 2
    cache.close()
    assert manager.lost() == []
    manager.check()
    # The two slots are fenced for good, and the others go on serving.
    books = manager.stats().pools["kv"]["device"]
    assert (books["fenced"], books["slots"]) == (2, 4)
    assert manager.available_tokens() == 8
    again = compute(manager, 4, A)
    assert words(manager, again) == [t + 1000 for t in A]
    mover_of(manager).stall("onboard", False)
    assert mover_of(manager).synchronize()
    assert words(manager, again) == [t + 1000 for t in A]
    again.close()
    manager.clear()
    manager.check()
    assert manager.stats().pools["kv"]["device"]["fenced"] == 2
    assert len({slot for pool, tier, slot in mover_of(manager).fenced() if tier == "device"}) == 2


def test_nobody_waits_again_for_a_move_that_was_given_up(
    make: Callable[..., KVCacheManager], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU it may stand still for long: a LOST cache that is not closed yet must not cost the moves of others."""
    manager = make(device=6)
    compute(manager, 1, A).close()
    compute(manager, 2, [*range(40, 64)]).close()
    manager.pages("kv")
    mover_of(manager).stall("onboard")
    gone = manager.create(3, [*A, 99])
    assert gone.resume()
    step_in_vain(manager, gone, "onboard")
    assert manager.lost() == [3]
    stuck = {slot for pool, tier, slot in mover_of(manager).fenced() if tier == "device"}
    assert len(stuck) == 2
    mover, calls = mover_of(manager), list[list[int]]()
    begin = mover.step_begin

    def recorded(uses: Any, *rest: Any) -> bool:
        calls.append([slot for use in uses for slot in use.slots])
        return bool(begin(uses, *rest))

    monkeypatch.setattr(mover, "step_begin", recorded)
    other = manager.create(4, [*range(40, 46), 70])
    assert other.resume()  # its copy is on its way
    manager.step_begin([gone, other])
    manager.step_end([gone, other])
    assert calls
    assert not any(stuck & set(slots) for slots in calls)
    assert words(manager, other) == [t + 1000 for t in range(40, 46)]
    assert manager.lost() == [3]
    gone.close()
    other.close()
    assert manager.stats().failed_moves == 2


def test_an_offload_that_takes_too_long_fences_its_host_slots(make: Callable[..., KVCacheManager]) -> None:
    manager = make(device=4, move_timeout_s=0.05)
    compute(manager, 1, A).close()
    mover_of(manager).stall("offload")
    other = manager.create(2, [])
    assert other.resume()
    assert other.resize(16)  # its slots are the sources of offloads that stand still
    manager.step_begin([other])
    manager.step_end([other])
    manager._moves._timeout = 60.0  # type: ignore[union-attr]
    assert manager.stats().stuck_slots == 2
    assert manager.probe([*A, 99]) == 0
    assert manager.stats().pools["kv"]["host"]["fenced"] == 2
    other.close()
    mover_of(manager).stall("offload", False)
    manager.check()
    first = compute(manager, 3, A)
    assert words(manager, first) == [t + 1000 for t in A]
    first.close()
    compute(manager, 4, [*range(40, 56)]).close()
    again = compute(manager, 5, A)
    assert again.num_reused_tokens > 0
    assert words(manager, again) == [t + 1000 for t in A]


def test_a_full_queue_is_waited_for(make: Callable[..., KVCacheManager]) -> None:
    manager = make(device=4)
    mover = mover_of(manager)
    compute(manager, 1, A).close()
    mover.fill("offload", 1)
    compute(manager, 2, [*range(40, 56)]).close()  # with nothing to wait for the pages are given up
    manager.pages("kv")
    assert manager.lost() == []
    assert mover.totals()["full"] == 1
    assert manager.probe([*A, 99]) == 0
    manager.check()
    for request_id in range(3, 60):  # more tickets than are kept flying
        compute(manager, request_id, [100 * request_id + i for i in range(16)]).close()
    assert len(manager._moves.flying) <= 48 + 4  # type: ignore[union-attr]


def test_nothing_is_committed_before_its_pages_have_arrived(make: Callable[..., KVCacheManager]) -> None:
    manager = make()
    compute(manager, 1, A).close()
    mover_of(manager).fail(1, "copy")
    cache = manager.create(2, [*A[:6], 90, 91])
    assert cache.resume()

    def finish() -> None:
        cache.resize(8)  # known here already, where copies are fast
        cache.commit([90, 91])

    with pytest.raises(LogicError, match="LOST"):
        finish()
    assert manager.probe([*A[:6], 90, 91, 92]) == 6


def test_any_mover_serves() -> None:
    config = CacheConfig(4, [PoolConfig("kv", 32)], 5 * 32, 8 * 32, hash_seed=1)
    manager = KVCacheManager(config, backend.device(), mover=AtOnceMover)
    first = compute(manager, 1, A)
    first.suspend()
    compute(manager, 2, [*range(40, 56)]).close()
    assert manager.stats().offloaded == 2
    assert first.resume()
    assert words(manager, first) == [t + 1000 for t in A]
    manager.close()
