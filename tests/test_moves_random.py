"""Random caches on two tiers whose moves fail at random, stand still or find full queues: no wrong byte, no lost page.

Every cache that a failure touches becomes LOST and is closed, as a scheduler does; the others must have every word.
"""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import numpy as np
import pytest

import backend
from kvpool import (
    AddRequest,
    CacheConfig,
    KVCache,
    KVCacheManager,
    LogicError,
    PoolConfig,
    PoolPlan,
    Retention,
    TokenRange,
)
from movers import ORDERS

MODES: dict[str, dict[str, Any]] = {"threads": {}, **{order: {"simulate": (order, 1)} for order in ORDERS}}
RUNS, STEPS = 12, 300
MIXES: list[list[int | None]] = [[None], [None, 3], [4], [None, None], [None, 2, 5], [3, 2]]
WEIGHTS = {
    "create": 2, "resume": 3, "grow": 2, "commit": 2, "suspend": 2, "close": 1, "evict": 1, "batch": 1, "claim": 1,
    "clear": 0.1, "wait": 1, "step": 1,
}  # fmt: skip


class Faulty:
    """A manager of two tiers whose moves fail, its caches, and what their pages must contain."""

    def __init__(self, seed: int, mover: Any) -> None:
        self.random = r = random.Random(seed)
        self.t = r.choice([1, 2, 3])
        mix = r.choice(MIXES)
        self.names = [f"p{i}" for i in range(len(mix))]
        device = {name: r.randint(3, 10) for name in self.names}
        host = {name: r.randint(1, 12) for name in self.names}
        pools = [
            PoolConfig(name, 8 * self.t, window, r.choice([0, 1]) if window else 0)
            for name, window in zip(self.names, mix, strict=True)
        ]
        self.now = 0.0
        config = CacheConfig(
            self.t, pools, 1 << 20, 1 << 20, max_blocks=r.choice([None, 6, 12]), hash_seed=1,
            partial_reuse=r.random() < 0.7, offload_min_priority=r.choice([0, 30, 35, 36, 60]), clock=lambda: self.now,
        )  # fmt: skip
        plan = PoolPlan(dict.fromkeys(self.names, 1), device, host, 1 << 20)
        self.manager = KVCacheManager(config, backend.device(), plan=plan, mover=mover)
        self.words = {name: self.manager.pages(name).view(np.int64) for name in self.names}
        self.tokens: dict[int | str, list[int]] = {}
        self.caches: list[KVCache] = []
        self.number = 0
        self.did: Counter[str] = Counter()

    def due(self, cache: KVCache, position: int) -> int:
        return hash(tuple(self.tokens[cache.request_id][: position + 1])) & 0x7FFFFFFFFFFF

    def prompt(self, most: int, least: int = 0) -> tuple[int, list[int]]:
        """A request and its prompt; it knows some tokens more, to be generated."""
        tokens = [self.random.randint(0, 1) for _ in range(self.random.randint(least, most * self.t))]
        self.number += 1
        self.tokens[self.number] = tokens + [self.random.randint(0, 1) for _ in range(4 * self.t)]
        return self.number, tokens

    def retention(self) -> Retention | None:
        r = self.random
        if r.random() < 0.6:
            return None
        first = TokenRange(0, None, r.choice([0, 20, 35, 50, 100]), r.choice([None, 5.0]))
        return Retention([first], decode_priority=r.choice([10, 35, 80]))

    def words_of(self, cache: KVCache, start: int, end: int) -> list[tuple[str, int, int, int]]:
        """(pool, slot, offset, position) of positions that have a page; none of a LOST cache, which is known then."""
        found = []
        for name in self.names:
            try:
                table = cache.block_table(name)
            except LogicError:
                if cache.state != "LOST":
                    raise
                return []
            places = ((p, table[p // self.t]) for p in range(start, min(end, len(self.tokens[cache.request_id]))))
            found += [(name, int(slot), p % self.t, p) for p, slot in places if slot]
        return found

    def write(self, cache: KVCache) -> None:
        for name, slot, offset, position in self.words_of(cache, cache.history_length, cache.capacity):
            self.words[name][slot, offset] = self.due(cache, position)

    def verify(self, cache: KVCache) -> None:
        for name, slot, offset, position in self.words_of(cache, 0, cache.history_length):
            assert self.words[name][slot, offset] == self.due(cache, position), (name, slot, position)
            self.did["words"] += 1

    def create(self) -> None:
        if len(self.caches) < 6:
            number, tokens = self.prompt(6)
            self.caches.append(self.manager.create(number, tokens, retention=self.retention()))

    def batch(self) -> None:
        requests = [AddRequest(*self.prompt(5, 1), retention=self.retention()) for _ in range(2)]
        for cache in self.manager.add_batch(requests):
            if cache is not None:
                self.caches.append(cache)
                self.verify(cache)
                self.write(cache)

    def claim(self) -> None:
        requests = [AddRequest(*self.prompt(5, 1), retention=self.retention()) for _ in range(3)]
        claimed = self.manager.claim_contexts([(request, None) for request in requests])
        rest = zip(requests, claimed, strict=True)
        kept = [(request, len(request.tokens) - reused) for request, reused in rest if reused is not None]
        provided = self.manager.provide_contexts(kept)
        for (request, _), done in zip(kept, provided, strict=True):
            cache = self.manager.cache(request.request_id)
            self.caches.append(cache)
            assert done or cache.state == "LOST", "promise kept"
            if done:
                self.verify(cache)
                self.write(cache)
                self.did["promises"] += 1

    def resume(self, cache: KVCache) -> None:
        if cache.resume():
            self.verify(cache)
            self.write(cache)

    def grow(self, cache: KVCache) -> None:
        capacity = max(cache.capacity, min(len(self.tokens[cache.request_id]), cache.capacity + 2 * self.t))
        if cache.resize(capacity):
            self.write(cache)

    def commit(self, cache: KVCache) -> None:
        tokens, start = self.tokens[cache.request_id], cache.num_committed_tokens
        end = self.random.randint(start, max(start, min(cache.capacity, len(tokens))))
        cache.commit(tokens[start:end])
        self.verify(cache)

    def step(self, cache: KVCache) -> None:
        """Suspended or closed while a step is in flight."""
        self.manager.step_begin([cache])
        if self.random.random() < 0.5:
            cache.suspend()
        else:
            cache.close()
            self.caches.remove(cache)
        self.manager.check()
        self.manager.step_end([cache])

    def act(self) -> None:
        name = self.random.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
        cache = self.random.choice(self.caches) if self.caches else None
        match name:
            case "create" | "batch" | "claim":
                if len(self.caches) < 5:
                    getattr(self, name)()
            case "evict":
                self.manager.evict(self.random.randint(1, 3))
            case "clear":
                self.manager.clear()
            case "wait":
                self.now += 4 * self.random.random()
            case "resume" | "suspend" | "close" if cache is not None:
                if name == "resume":
                    self.resume(cache)
                elif name == "suspend":
                    cache.suspend()
                else:
                    cache.close()
                    self.caches.remove(cache)
            case _ if cache is not None and cache.state == "ACTIVE":
                getattr(self, name)(cache)
        self.did[name] += 1
        self.manager.check()

    def do(self) -> None:
        for request_id in self.manager.lost():
            cache = self.manager.cache(request_id)
            assert cache.state == "LOST"
            assert not cache.resume()
            cache.close()
            self.caches.remove(cache)
            self.did["lost"] += 1
        if self.random.random() < 0.05:
            backend.mover_of(self.manager).fill(self.random.choice(["offload", "onboard", "copy"]), 1)
        try:
            self.act()
        except LogicError as error:
            if "LOST" not in str(error):
                raise


@pytest.fixture(scope="module")
def all_totals() -> dict[str, Counter[str]]:
    return {"cpu": Counter(), "cuda": Counter()}


@pytest.fixture
def totals(all_totals: dict[str, Counter[str]], device: str) -> Counter[str]:
    return all_totals[device]


@pytest.mark.parametrize("mode", MODES)
def test_moves_that_fail_cost_caches_but_no_byte_and_no_page(mode: str, totals: Counter[str]) -> None:
    make = backend.mover(check=True, faults=True, **MODES[mode])
    for seed in backend.few(range(RUNS), 5):
        run = Faulty(seed, make)
        backend.mover_of(run.manager).fail_at_random(0.05, seed)
        try:
            for _ in range(STEPS):
                run.do()
            run.manager.pages(run.names[0])  # all moves are over
            run.manager.lost()
            for cache in run.caches:
                cache.close()
            run.manager.clear()
            run.manager.check()
        except BaseException as error:
            error.add_note(f"mode {mode}, seed {seed}")
            raise
        stats = run.manager.stats()
        for tiers in stats.pools.values():
            assert all(books["free"] == books["slots"] for books in tiers.values()), (mode, seed)
        totals.update(run.did)
        totals.update(failed=stats.failed_moves, offloaded=stats.offloaded, onboarded=stats.onboarded)
        run.manager.close()


def test_the_random_runs_did_what_they_are_for(totals: Counter[str]) -> None:
    print(dict(totals))
    least = 50 if backend.device() == "cpu" else 10
    assert min(totals[name] for name in ("failed", "lost", "offloaded", "onboarded", "words", "promises")) > least
