"""add_batch and the scheduling calls: what a batch claims it gets, what it does not get leaves no trace."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import pytest

import backend
from kvpool import (
    AddRequest,
    CacheConfig,
    ConfigError,
    KVCacheManager,
    LogicError,
    PoolConfig,
    Retention,
    Scope,
    Stats,
    TokenRange,
)

T = 4


@dataclass
class Request:
    request_id: int | str
    tokens: Sequence[int]
    max_new_tokens: int = 1
    output_tokens: list[int] = field(default_factory=list)
    draft_tokens: int = 0
    lora_id: int | None = None
    scope: Scope | None = None


def make(slots: int, **options: Any) -> KVCacheManager:
    return KVCacheManager(CacheConfig(T, [PoolConfig("kv", 8)], (slots + 1) * 8, **options), backend.device())


def store(manager: KVCacheManager, tokens: list[int]) -> None:
    with manager.create("stored", tokens) as cache:
        assert cache.resume()
        assert cache.resize(len(tokens))
        cache.commit(tokens[cache.num_committed_tokens :])


def without_peak(stats: Stats) -> Stats:
    """A high-water mark may stay when a call is undone."""
    for tiers in stats.pools.values():
        tiers["device"].pop("peak", None)
    return stats


def free(manager: KVCacheManager) -> int:
    return manager.stats().pools["kv"]["device"]["free"]


A = list(range(8))


@pytest.fixture
def made() -> Iterator[list[KVCacheManager]]:
    managers: list[KVCacheManager] = []
    yield managers
    for manager in managers:
        manager.check()
        for cache in list(manager._caches.values()):
            cache.close()
        manager.clear()
        manager.check()
        assert manager.stats().pools["kv"]["device"]["free"] == manager.plan.num_slots["kv"]


# -- the table of add_batch -------------------------------------------------------------------------


@pytest.mark.parametrize("swap", [False, True])
def test_batch_claims_before_it_provides(made: list[KVCacheManager], swap: bool) -> None:
    made.append(manager := make(5))
    store(manager, A)
    store(manager, [20 + i for i in range(8)])
    batch = [AddRequest("new", [40 + i for i in range(8)]), AddRequest("again", [*A, 9])]
    caches = manager.add_batch(batch[::-1] if swap else batch)
    reused = {cache.request_id: cache.num_reused_tokens for cache in caches if cache is not None}
    assert reused == {"new": 0, "again": 8}
    assert all(cache is not None and cache.state == "ACTIVE" for cache in caches)
    assert {cache.capacity for cache in caches if cache is not None} == {8, 9}


def test_two_partial_matches_of_one_block(made: list[KVCacheManager]) -> None:
    made.append(manager := make(8))
    store(manager, A)
    manager.pages("kv")[1:] = np.arange(1, 9, dtype=np.uint8)[:, None]
    before = manager.pages("kv").copy()
    first, second = manager.add_batch([AddRequest(1, [*A[:6], 60, 61, 62]), AddRequest(2, [*A[:7], 70, 71])])
    assert first is not None
    assert second is not None
    assert (first.num_reused_tokens, second.num_reused_tokens) == (6, 7)
    assert manager.probe([*A, 9]) == 8
    tables = first.block_table("kv"), second.block_table("kv")
    assert tables[0][0] == tables[1][0]
    copies = {int(table[1]) for table in tables}
    assert len(copies) == 2
    (source,) = {slot for slot in range(1, 9) if (manager.pages("kv")[slot] == before[slot]).all()} & {
        int(manager.pages("kv")[slot][0]) for slot in copies
    }
    assert source not in copies


def test_two_full_matches_share_pages(made: list[KVCacheManager]) -> None:
    made.append(manager := make(8))
    store(manager, A)
    first, second = manager.add_batch([AddRequest(1, [*A, 80]), AddRequest(2, [*A, 90])])
    assert first is not None
    assert second is not None
    assert (first.num_reused_tokens, second.num_reused_tokens) == (8, 8)
    assert list(first.block_table("kv")[:2]) == list(second.block_table("kv")[:2])
    assert free(manager) == 4


def test_refused_entry_does_not_take_what_another_one_claimed(made: list[KVCacheManager]) -> None:
    made.append(manager := make(4))
    store(manager, A)
    first, second = manager.add_batch([AddRequest(1, [30 + i for i in range(13)]), AddRequest(2, [*A, 8])])
    assert first is None
    assert second is not None
    assert second.num_reused_tokens == 8
    stats = manager.stats()
    assert (stats.requests, stats.prompt_tokens, stats.reused_tokens) == (2, 8 + 9, 8)  # the stored one, and the second
    with pytest.raises(KeyError):
        manager.cache(1)


def test_duplicate_id_leaves_the_books_as_before(made: list[KVCacheManager]) -> None:
    made.append(manager := make(4))
    manager.create("open", A)
    before = manager.stats()
    for batch in ([AddRequest(1, A), AddRequest(1, A)], [AddRequest(2, A), AddRequest("open", A)]):
        with pytest.raises(LogicError, match="request_id"):
            manager.add_batch(batch)
        assert manager.stats() == before
    assert manager.cache("open").state == "SUSPENDED"


def test_equal_new_prompts_share_nothing_until_commit(made: list[KVCacheManager]) -> None:
    made.append(manager := make(4))
    first, second = manager.add_batch([AddRequest(1, A), AddRequest(2, A)])
    assert first is not None
    assert second is not None
    assert free(manager) == 0
    assert first.commit(A) is False
    assert second.commit(A) is True
    assert list(first.block_table("kv")) == list(second.block_table("kv"))
    assert free(manager) == 2


def test_bad_entry_of_a_batch_leaves_the_books_as_before(made: list[KVCacheManager]) -> None:
    made.append(manager := make(8, max_seq_len=16))
    store(manager, A)
    before = manager.stats()
    bad: list[tuple[type[Exception], Callable[[], object]]] = [
        (ValueError, lambda: manager.add_batch([AddRequest(1, [*A, 9]), AddRequest(2, list(range(17)))])),
        (ValueError, lambda: manager.add_batch([AddRequest(1, [*A, 9]), AddRequest(2, [-1])])),
        (ValueError, lambda: manager.add_batch([AddRequest(1, [*A, 9]), "two"])),  # type: ignore[list-item]
        (ValueError, lambda: manager.add_batch([AddRequest(1, A, Scope(epoch=0)), AddRequest(2, A, Scope(epoch=1))])),
        (ValueError, lambda: manager.claim_contexts([(Request(1, A), -1)])),
        (ConfigError, lambda: manager.claim_contexts([(Request(1, A, lora_id=1, scope=Scope(lora_id=2)), None)])),
        (LogicError, lambda: manager.provide_contexts([(Request(1, A), 1)])),
        (LogicError, lambda: manager.allocate_generation([Request(1, A)])),
        (ValueError, lambda: manager.claim_contexts([Request(1, A)])),  # type: ignore[list-item]
        (ValueError, lambda: manager.claim_contexts([(object(), None)])),
        (ValueError, lambda: manager.claim_contexts([(Request([1], A), None)])),  # type: ignore[arg-type]
        (ValueError, lambda: manager.claim_contexts([(Request(1, A, output_tokens=None), None)])),  # type: ignore[arg-type]
        (ValueError, lambda: manager.provide_contexts([Request(1, A)])),  # type: ignore[list-item]
        (ValueError, lambda: manager.allocate_generation([1])),
        (ValueError, lambda: manager.suspend_requests([1])),
        (ValueError, lambda: manager.free_requests(None)),  # type: ignore[arg-type]
    ]
    for error, call in bad:
        with pytest.raises(error):
            call()
        assert manager.stats() == before


def test_later_bad_entry_undoes_what_was_provided(made: list[KVCacheManager]) -> None:
    made.append(manager := make(8, max_seq_len=16))
    store(manager, A)
    first, second = Request(1, [*A[:6], 9, 9]), Request(2, [50, 51])
    assert manager.claim_contexts([(first, None), (second, None)]) == [6, 0]
    before = manager.stats()
    with pytest.raises(ValueError, match="capacity"):
        manager.provide_contexts([(first, 2), (second, 17)])
    assert without_peak(manager.stats()) == without_peak(before)
    assert manager.provide_contexts([(first, 2), (second, 2)]) == [True, True]


def test_refused_entry_before_a_bad_one_is_left_as_it_was(made: list[KVCacheManager]) -> None:
    made.append(manager := make(4, max_seq_len=16))
    first, second = Request(1, [1] * 12), Request(2, [2])
    assert manager.claim_contexts([(first, 1), (second, 1)]) == [0, 0]
    (hog,) = manager.add_batch([AddRequest("hog", [3] * 8)])
    assert hog is not None
    with pytest.raises(ValueError, match="capacity"):
        manager.provide_contexts([(first, 12), (second, 17)])  # the first would find no room and be closed
    assert manager.cache(1).state == manager.cache(2).state == "SUSPENDED"
    assert manager.provide_contexts([(first, 4), (second, 1)]) == [True, True]


# -- claims -----------------------------------------------------------------------------------------


def test_claim_is_kept_only_with_its_need(made: list[KVCacheManager]) -> None:
    made.append(manager := make(5))
    store(manager, A)
    requests = [Request("a", [*A, 9]), Request("b", [30] * 8), Request("c", [40] * 4), Request("d", [50])]
    assert manager.claim_contexts([(request, None) for request in requests]) == [8, 0, None, None]
    assert manager.stats().requests == 3
    assert manager.available_tokens() == 0
    outside = manager.create("outside", [*A, 1])
    assert outside.resume()
    assert not outside.resize(9)  # promised to others
    assert manager.provide_contexts([(requests[1], 8), (requests[0], 1)]) == [True, True]


def test_claim_with_few_tokens_gets_more_only_from_what_is_left_over(made: list[KVCacheManager]) -> None:
    made.append(manager := make(4))
    first, second = Request(1, [10] * 16), Request(2, [20] * 8)
    assert manager.claim_contexts([(first, 4), (second, 8)]) == [0, 0]
    assert manager.provide_contexts([(first, 16), (second, 8)]) == [False, True]
    with pytest.raises(KeyError):
        manager.cache(1)
    assert manager.claim_contexts([(first, 4)]) == [0]
    assert manager.provide_contexts([(first, 8)]) == [True]
    assert manager.provide_contexts([(first, 9)]) == [False]  # a later chunk: left as it was
    assert manager.cache(1).capacity == 8


def test_freed_claim_leaves_no_trace(made: list[KVCacheManager]) -> None:
    made.append(manager := make(8))
    store(manager, A)
    store(manager, [20 + i for i in range(8)])
    before = manager.stats()
    keep = Retention([TokenRange(0, None, 100)], 100)
    request = Request(1, [*A, 9])
    request.retention = keep  # type: ignore[attr-defined]
    assert manager.claim_contexts([(request, None)]) == [8]
    active = manager.stats().pools["kv"]["device"]["active"]
    assert active == 2
    manager.free_requests([request])
    assert manager.stats() == before
    manager.evict(1)  # neither its use nor its retention counts
    assert (manager.probe([*A, 9]), manager.probe([*(20 + i for i in range(8)), 9])) == (4, 8)


def test_partial_block_without_room_for_its_copy_is_given_up_in_phase_1(made: list[KVCacheManager]) -> None:
    made.append(manager := make(2))
    store(manager, A[:4])
    assert manager.claim_contexts([(Request(1, [0, 1, 2, 9, 9]), None)]) == [0]
    assert manager.provide_contexts([(Request(1, [0, 1, 2, 9, 9]), 5)]) == [True]


# -- generation -------------------------------------------------------------------------------------


def test_generation_goes_from_the_front_until_there_is_no_room(made: list[KVCacheManager]) -> None:
    made.append(manager := make(4))
    requests = [Request(i, [10 * i] * 4, max_new_tokens=8) for i in range(1, 4)]
    assert manager.claim_contexts([(request, None) for request in requests]) == [0, 0, 0]
    assert manager.provide_contexts([(request, 4) for request in requests]) == [True] * 3
    for request in requests:
        manager.cache(request.request_id).resize(4, 4)
    assert manager.allocate_generation(requests) == 1
    assert manager.allocate_generation(requests) == 1  # repeating adds nothing
    assert [manager.cache(i).capacity for i in (1, 2, 3)] == [5, 4, 4]
    manager.suspend_requests([requests[0]])
    assert not manager.is_request_active(1)
    assert manager.allocate_generation([requests[0]]) == 1
    assert manager.is_request_active(1)
    assert manager.free_request(requests[2])
    assert manager.allocate_generation(requests[:2]) == 2
    assert not manager.free_request(requests[2])


def test_what_was_generated_follows_the_prompt_of_a_context(made: list[KVCacheManager]) -> None:
    made.append(manager := make(6))
    store(manager, [*A, 8, 9, 10, 11])
    freed = Request(1, A[:5], max_new_tokens=9, output_tokens=[*A[5:], 8, 9, 10, 11, 12])
    assert manager.claim_contexts([(freed, None)]) == [12]
    assert manager.provide_contexts([(freed, 1)]) == [True]
    assert manager.cache(1).capacity == 13


def test_generation_is_clipped_at_the_end(made: list[KVCacheManager]) -> None:
    made.append(manager := make(4))
    request = Request(1, [1] * 4, max_new_tokens=2, draft_tokens=5)
    assert manager.prepare_context(request)
    assert manager.resize_context(request, 4)
    manager.cache(1).resize(4, 4)
    assert manager.try_allocate_generation(request)
    assert manager.cache(1).capacity == 5
    assert manager.suspend_request(request)
    assert manager.prepare_context(request)
    assert manager.is_request_active(1)


# -- faults -----------------------------------------------------------------------------------------


class Fault(Exception):
    pass


def faulty(manager: KVCacheManager, monkeypatch: pytest.MonkeyPatch, k: int) -> None:
    """The k-th copy of pages raises."""
    made, copy = itertools.count(), manager._copy

    def one_by_one(copies: Sequence[tuple[int, int, int]]) -> None:
        for each in copies:
            if next(made) == k:
                raise Fault
            copy([each])

    monkeypatch.setattr(manager, "_copy", one_by_one)


@pytest.mark.parametrize("k", range(5))
@pytest.mark.parametrize("call", ["add_batch", "provide_contexts", "allocate_generation"])
def test_fault_in_the_kth_copy_rolls_the_batch_back(
    made: list[KVCacheManager], monkeypatch: pytest.MonkeyPatch, call: str, k: int
) -> None:
    made.append(manager := make(12))
    store(manager, A)
    store(manager, [20 + i for i in range(8)])
    prompts = [[*A[:6], 30], [20, 21, 22, 31], [*A[:5], 32], [20, 33]]
    requests = [Request(i, prompt, max_new_tokens=3) for i, prompt in enumerate(prompts)]
    keep = Retention([TokenRange(0, None, 100)], 100)
    if call == "provide_contexts":
        manager.claim_contexts([(request, None) for request in requests])
    elif call == "allocate_generation":
        for request in requests:
            manager.create(request.request_id, request.tokens)
    before, kept = manager.stats(), manager.pages("kv").copy()
    faulty(manager, monkeypatch, k)

    def run() -> object:
        if call == "add_batch":
            return manager.add_batch([AddRequest(r.request_id, r.tokens, retention=keep) for r in requests])
        if call == "provide_contexts":
            return manager.provide_contexts([(request, 4) for request in requests])
        return manager.allocate_generation(requests)

    if k == 4:  # there are four
        assert run()
        return
    with pytest.raises(Fault):
        run()
    after = manager.stats()
    assert without_peak(after) == without_peak(before)
    manager.check()
    for i in range(4):
        assert manager.probe([*A, 9]) == manager.probe([*(20 + i for i in range(8)), 9]) == 8, i
    cached = [slot for slot in range(1, 13) if kept[slot].any()]
    assert (manager.pages("kv")[cached] == kept[cached]).all()
    monkeypatch.undo()
    if call != "add_batch":
        manager.free_requests(requests)
    if call != "allocate_generation":  # there `create` has used the blocks
        manager.evict(1)  # no priority was raised and no use recorded: the older of the two goes first
        assert (manager.probe([*A, 9]), manager.probe([*(20 + i for i in range(8)), 9])) == (4, 8)


def test_counters_are_those_of_stats() -> None:
    with KVCacheManager(CacheConfig(4, [PoolConfig("kv", 8)], 8 * 5), backend.device()) as manager:
        for start in (0, 0, 100):
            with manager.create(start, range(start, start + 9)) as cache:
                assert cache.resume()
                assert cache.resize(9)
                cache.commit(np.arange(start, start + 9)[cache.num_reused_tokens :].astype(np.int32))
        stats, counters = manager.stats(), manager.counters()
        assert counters.reused_tokens == 8
        assert counters.evicted > 0
        assert all(getattr(stats, field.name) == getattr(counters, field.name) for field in fields(counters))
