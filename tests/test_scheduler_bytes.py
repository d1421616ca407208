"""The scheduler over real pages: each position of a request has the word that its own tokens say, whatever moved, was
suspended, freed, or failed on its way; and the tokens that come out do not depend on it."""

from __future__ import annotations

import random
import time
from collections import Counter
from typing import Any

import numpy as np
import pytest

import backend
from kvpool import CacheConfig, Engine, KVCacheManager, PoolConfig, PoolPlan, Request, Scheduler, SchedulerConfig, Step


class Words:
    """An executor whose page words and tokens are hashes of the tokens before them; it verifies all that it reads."""

    def __init__(self, manager: KVCacheManager, seed: int) -> None:
        self.manager, self.random = manager, random.Random(seed)
        self.names = [pool.name for pool in manager.config.pools]
        self.t = manager.config.tokens_per_block
        self.words = 0

    def execute(self, step: Step) -> dict[Any, list[int]]:
        """Takes the tables of the whole step at once, as a batch's kernel needs them: a LOST one would be an error."""
        caches = [self.manager.cache(request.request_id) for request in step.requests]
        for name in self.names:
            self.manager.block_tables(caches, name)
            self.manager.block_tables_csr(caches, name)
        outputs = {}
        for chunk in step.context:
            self.compute(chunk.request, chunk.start, chunk.start + chunk.num_tokens)
            if chunk.is_last:
                outputs[chunk.request.request_id] = [word(chunk.request) % 50]
        for request, count in zip(step.generation, step.generation_tokens, strict=True):
            self.compute(request, request.num_computed, request.num_computed + 1)
            outputs[request.request_id] = [word(request) % 50]
            assert count >= 1
        return outputs

    def compute(self, request: Request, start: int, end: int) -> None:
        cache = self.manager.cache(request.request_id)
        for name in self.names:
            pages = self.manager.pages(name).view(np.int64)
            table = cache.block_table(name)
            for position in range(end):
                slot = table[position // self.t]
                if position < start and slot:
                    assert pages[slot, position % self.t] == word(request, position + 1), (request, name, position)
                    self.words += 1
                elif position >= start:
                    assert slot, (request, name, position)
                    pages[slot, position % self.t] = word(request, position + 1)


def word(request: Request, length: int | None = None) -> int:
    end = len(request.tokens) + len(request.output_tokens) if length is None else length
    return hash(tuple(request.token_slice(0, end).tolist())) & 0x7FFFFFFFFFFF


def world(seed: int, rate: float) -> tuple[Scheduler, Words, Any, list[Request]]:
    r = random.Random(seed)
    t = r.choice([1, 2, 4])
    windows = r.choice([[None], [None], [None, 3], [None, 4 * t], [2 * t]])
    names = [f"p{i}" for i in range(len(windows))]
    pools = [PoolConfig(name, 8 * t, window) for name, window in zip(names, windows, strict=True)]
    host = r.choice([0, 3, 12, 30])
    device = {name: r.randint(6, 14) for name in names}
    plan = PoolPlan(dict.fromkeys(names, 1), device, dict.fromkeys(names, host), 1 << 20)
    config = CacheConfig(t, pools, 1 << 20, hash_seed=1, decode_reservation=r.choice(["none", "sliding"]))
    make = backend.mover(check=True, faults=True)
    manager = KVCacheManager(config, backend.device(), plan=plan, mover=make)
    mover = backend.mover_of(manager)
    if rate:
        mover.fail_at_random(rate, seed)
    scheduler = Scheduler(manager, SchedulerConfig(8, 64, r.choice([None, t, 2])))
    scheduler.outlook.expect(r.choice([0.0, 1.0]))
    longest = min(device.values()) * t
    requests = []
    for number in range(10):
        new = r.randint(1, max(1, longest // 2))
        prompt = r.randint(1, longest - new)
        common = [r.randint(0, 1)] * (prompt // 2)
        requests.append(Request(number, common + [r.randint(0, 2) for _ in range(prompt - len(common))], new))
    return scheduler, Words(manager, seed), mover, requests


@pytest.mark.parametrize("rate", [0.0, 0.1], ids=["moves arrive", "moves fail"])
def test_never_a_wrong_byte_whatever_moves(rate: float) -> None:
    did: Counter[str] = Counter()
    for seed in backend.few(range(60), 20):
        scheduler, executor, mover, requests = world(seed, rate)
        manager = scheduler.manager
        with manager:
            engine = Engine(scheduler, executor)
            for request in requests:
                engine.submit(request)
            ended = engine.run()
            assert len(ended) == len(requests)
            for request in requests:
                n = len(request.tokens)
                for i, token in enumerate(request.output_tokens):
                    assert token == word(request, n + i) % 50, (seed, request, i)
                assert request.finish_reason == "length", (seed, request, request.error)
            manager.check()
            assert not mover.findings(), seed
            stats = manager.stats()
            did.update(words=executor.words, offloaded=stats.offloaded, onboarded=stats.onboarded)
            did.update(suspended=scheduler.stats.suspended, recomputed=scheduler.stats.recomputed)
            did.update(failed=stats.failed_moves)
    print(dict(did))
    least = 20 if backend.device() == "cpu" else 4
    assert all(did[name] > least for name in ("words", "offloaded", "onboarded", "suspended", "recomputed"))
    assert (did["failed"] > least // 4) == bool(rate)


class Streamed(Words):
    """Computes in a thread of its own, behind the engine by any number of steps: ordered by slot events alone.

    The tokens that come out are known beforehand, so the engine never waits for the stream.
    """

    def __init__(self, manager: KVCacheManager, seed: int, delay: float) -> None:
        super().__init__(manager, seed)
        self.stream = backend.mover_of(manager).stream()
        self.pages = {name: manager.pages(name).view(np.int64) for name in self.names}
        self.delay = delay
        self.wrong: list[Any] = []
        self.behind = self.launched = self.done = 0

    def compute(self, request: Request, start: int, end: int) -> None:
        cache = self.manager.cache(request.request_id)
        tables = {name: cache.block_table(name).copy() for name in self.names}
        due = [word(request, position + 1) for position in range(end)]
        request_id = request.request_id

        def later() -> None:
            if self.random.random() < 0.3:
                time.sleep(self.delay)
            for name, table in tables.items():
                for position in range(end):
                    slot, offset = table[position // self.t], position % self.t
                    if position >= start:
                        self.pages[name][slot, offset] = due[position]
                    elif slot and self.pages[name][slot, offset] != due[position]:
                        self.wrong.append((request_id, name, position, int(slot)))
                    else:
                        self.words += bool(slot)
            self.done += 1

        self.behind = max(self.behind, self.launched - self.done)
        self.launched += 1
        self.stream.launch(later)


def test_never_a_wrong_byte_when_steps_are_computed_in_a_thread_of_their_own() -> None:
    did: Counter[str] = Counter()
    for seed in backend.few(range(40), 12):
        scheduler, _, mover, requests = world(seed, 0.0)
        with scheduler.manager as manager:
            executor = Streamed(manager, seed, 0.0005)
            engine = Engine(scheduler, executor)
            for request in requests:
                engine.submit(request)
            assert {request.finish_reason for request in engine.run().values()} == {"length"}
            executor.stream.synchronize()
            assert not executor.wrong, (seed, executor.wrong[:3])
            assert not mover.findings(), seed
            manager.check()
            stats = manager.stats()
            did.update(words=executor.words, offloaded=stats.offloaded, onboarded=stats.onboarded)
            did.update(behind=executor.behind > 2, suspended=scheduler.stats.suspended)
    print(dict(did))
    least = 10 if backend.device() == "cpu" else 2
    assert all(did[name] > least for name in ("words", "offloaded", "onboarded", "suspended", "behind"))
