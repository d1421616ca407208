"""Faults on two tiers: the k-th copy up or of a partial block cannot be ordered, for all k; nodes run out at the k-th
block.

A call whose copies cannot be ordered leaves all as it was. Copies down that fail: rust/kvpool-core/tests/tiers.rs for
the core, tests/test_moves.py for a manager that hears of it later.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace as Request
from typing import Any

import numpy as np
import pytest

import backend
from kvpool import AddRequest, CacheConfig, KVCache, KVCacheManager, PoolConfig, PoolPlan, Retention, TokenRange
from test_tiers import changes

T = 2
FIRST, SECOND = [1, 2, 3, 4, 5, 6], [21, 22, 23, 24, 25, 26]


class Fault(Exception):
    pass


class Tiers:
    """A manager whose copies can be made to fail, and pages that tell whose they are."""

    def __init__(self, device: int, host: int, max_blocks: int | None = None) -> None:
        self.fails: Callable[[], bool] = lambda: False
        self.copies = 0
        names = {"full": None, "window": 3}
        pools = [PoolConfig(name, 8 * T, window) for name, window in names.items()]
        config = CacheConfig(T, pools, 1 << 20, 1 << 20, hash_seed=1, max_blocks=max_blocks)
        plan = PoolPlan(dict.fromkeys(names, 1), dict.fromkeys(names, device), dict.fromkeys(names, host), 1 << 20)
        self.manager = KVCacheManager(config, backend.device(), plan=plan)
        copy = self.manager._copy

        def one_by_one(copies: Sequence[tuple[int, bool, int, int]]) -> None:
            for each in copies:
                self.copies += 1
                if self.fails():
                    raise Fault
                copy([each])

        self.manager._copy = one_by_one  # type: ignore[method-assign]

    def fail(self, k: int) -> None:
        count = itertools.count()
        self.fails = lambda: next(count) == k

    def words(self, name: str) -> Any:
        return self.manager.pages(name).view(np.int64)

    def places(self, cache: KVCache, tokens: Sequence[int]) -> Iterator[tuple[str, int, int, int]]:
        """(pool, slot, offset, due word) of positions that have a page; a word is the position's token."""
        for name in ("full", "window"):
            table = cache.block_table(name)
            for at, token in enumerate(tokens[: cache.capacity]):
                if table[at // T]:
                    yield name, table[at // T], at % T, token

    def run(self, name: str, tokens: Sequence[int], retention: Retention | None = None) -> KVCache:
        cache = self.manager.create(name, tokens, retention=retention)
        assert cache.resume()
        assert cache.resize(len(tokens))
        self.verify(cache, tokens[: cache.num_committed_tokens])
        for pool, slot, offset, word in self.places(cache, tokens):
            self.words(pool)[slot, offset] = word
        cache.commit(tokens[cache.num_committed_tokens :])
        return cache

    def verify(self, cache: KVCache, tokens: Sequence[int]) -> None:
        for pool, slot, offset, word in self.places(cache, tokens):
            assert self.words(pool)[slot, offset] == word

    def found(self, tokens: Sequence[int]) -> int:
        return self.manager.probe([*tokens, 99])

    def finish(self) -> None:
        """Nothing is left: every slot is free again."""
        self.fails = lambda: False
        self.manager.check()
        for cache in list(self.manager._caches.values()):
            cache.close()
        self.manager.clear()
        self.manager.check()
        for tiers in self.manager.stats().pools.values():
            assert all(books["free"] == books["slots"] for books in tiers.values())


CALLS = ["resume", "add_batch", "provide_contexts", "allocate_generation"]


def matches() -> tuple[Tiers, list[Request]]:
    """Requests whose matches lie on the host, two with a partial block, one with a source on the device."""
    tiers = Tiers(12, 12)
    tiers.run("first", FIRST).close()
    tiers.run("second", SECOND).close()
    assert tiers.manager.evict(5) == 5
    prompts = [[*FIRST, 7], [*FIRST[:5], 8], [*SECOND[:3], 9]]
    return tiers, [Request(request_id=i, tokens=prompt, max_new_tokens=3) for i, prompt in enumerate(prompts)]


def make_call(manager: KVCacheManager, call: str, requests: list[Request]) -> object:
    match call:
        case "resume":
            return [manager.cache(request.request_id).resume() for request in requests]
        case "add_batch":
            keep = Retention([TokenRange(0, None, 100)], 100)
            return manager.add_batch([AddRequest(r.request_id, r.tokens, None, keep) for r in requests])
        case "provide_contexts":
            return manager.provide_contexts([(request, 1) for request in requests])
    return manager.allocate_generation(requests)


@pytest.mark.parametrize("call", CALLS)
def test_fault_in_the_kth_copy_up_leaves_all_as_it_was_for_every_k(call: str) -> None:
    for k in itertools.count():
        tiers, requests = matches()
        manager = tiers.manager
        if call == "provide_contexts":
            assert None not in manager.claim_contexts([(request, None) for request in requests])
        elif call != "add_batch":
            for request in requests:
                manager.create(request.request_id, request.tokens)
        before = changes(manager.stats())
        kept = {tier: manager.pages("full", tier).copy() for tier in ("device", "host")}
        tiers.copies = 0
        tiers.fail(k)

        try:
            assert make_call(manager, call, requests)
        except Fault:
            pass
        else:
            assert k == tiers.copies > 5
            tiers.finish()
            return
        manager.check()
        if call != "resume":  # there each call stands for itself
            assert changes(manager.stats()) == before, f"k = {k}"
            host = manager.pages("full", "host")
            used = [slot for slot in range(12) if kept["host"][slot].any()]
            assert (host[used] == kept["host"][used]).all()
        assert tiers.found(FIRST) == tiers.found(SECOND) == 6
        tiers.fails = lambda: False
        assert make_call(manager, call, requests)  # and again, without the fault
        for request in requests:
            cache = manager.cache(request.request_id)
            tiers.verify(cache, request.tokens[: cache.num_reused_tokens])
        tiers.finish()


@pytest.mark.parametrize("k", range(7))
def test_no_node_for_the_kth_block_keeps_it_private_on_either_tier(k: int) -> None:
    tiers = Tiers(6, 6, max_blocks=max(1, k))
    cache = tiers.run("first", FIRST)
    other = tiers.run("second", SECOND)
    assert tiers.found(FIRST) == 2 * min(3, max(1, k))
    cache.suspend()
    other.suspend()
    assert tiers.manager.evict(6) == 6
    for each, tokens in ((cache, FIRST), (other, SECOND)):
        assert each.resume()
        tiers.verify(each, tokens)
    tiers.finish()
