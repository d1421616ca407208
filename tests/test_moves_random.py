"""Random caches on two tiers whose moves fail at random, stand still or find full queues: no wrong byte, no lost page.

Every cache that a failure touches becomes LOST and is closed, as a scheduler does; the others must have every word.
"""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import Any

import pytest

import test_tiers_random
from kvpool import AddRequest, KVCache, KVCacheManager, LogicError
from kvpool.mover import CpuMover
from movers import ORDERS

MODES: dict[str, dict[str, Any]] = {"threads": {}, **{order: {"simulate": (order, 1)} for order in ORDERS}}
RUNS, STEPS = 12, 300


class Faulty(test_tiers_random.Random):
    """As its base, with a mover whose moves fail."""

    def verify(self, cache: KVCache) -> None:
        found = self.words_of(cache, 0, cache.history_length)
        if cache.state != "LOST":  # known by now
            for name, slot, offset, position in found:
                assert self.words[name][slot, offset] == self.due(cache, position), (name, slot, position)
                self.did["words"] += 1

    def write(self, cache: KVCache) -> None:
        found = self.words_of(cache, cache.history_length, cache.capacity)
        if cache.state != "LOST":
            for name, slot, offset, position in found:
                self.words[name][slot, offset] = self.due(cache, position)

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

    def do(self) -> None:
        for request_id in self.manager.lost():
            cache = self.manager.cache(request_id)
            assert cache.state == "LOST"
            assert not cache.resume()
            cache.close()
            self.caches.remove(cache)
            self.did["lost"] += 1
        moves = self.manager._moves
        assert moves is not None
        assert isinstance(moves.mover, CpuMover)
        if self.random.random() < 0.05:
            moves.mover.fill(self.random.choice(["offload", "onboard", "copy"]), 1)
        try:
            super().do()
        except LogicError as error:
            if "LOST" not in str(error):
                raise


@pytest.fixture(scope="module")
def totals() -> Counter[str]:
    return Counter()


@pytest.mark.parametrize("mode", MODES)
def test_moves_that_fail_cost_caches_but_no_byte_and_no_page(
    mode: str, totals: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    make = partial(CpuMover, check=True, faults=True, **MODES[mode])
    monkeypatch.setattr(test_tiers_random, "KVCacheManager", partial(KVCacheManager, mover=make))
    for seed in range(RUNS):
        run = Faulty(seed)
        assert run.manager._moves is not None
        mover = run.manager._moves.mover
        assert isinstance(mover, CpuMover)
        mover.fail_at_random(0.05, seed)
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
    assert min(totals[name] for name in ("failed", "lost", "offloaded", "onboarded", "words", "promises")) > 50
