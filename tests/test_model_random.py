"""The manager against the reference model: the same random operations, everything observable compared.

A failing seed is printed; `KVPOOL_SEED=n` runs that one alone, `KVPOOL_OPS=n` sets the number of operations.
"""

from __future__ import annotations

import contextlib
import os
import random
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvpool import CacheConfig, KVCache, KVCacheManager, LogicError, PoolConfig, PoolPlan, Retention, Scope, TokenRange
from model import Model, ModelCache

SEEDS = [int(os.environ["KVPOOL_SEED"])] if "KVPOOL_SEED" in os.environ else list(range(150))
OPERATIONS = int(os.environ.get("KVPOOL_OPS", "800"))
SCOPES = [Scope(), Scope(lora_id=1), Scope(salt="1"), Scope(lora_id=1, salt=b"1")]
MIXES: list[list[tuple[int | None, int]]] = [
    [(None, 0)],
    [(None, 0), (3, 0)],
    [(5, 2), (None, 0)],
    [(None, 0), (4, 3), (1, 0)],
    [(3, 0), (8, 1)],
    [(None, 0), (None, 0)],
]


class Pair:
    """One manager and one model, driven together."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        t = rng.choice([1, 2, 4])
        mix = rng.choice(MIXES)
        slots = [rng.randint(2, 12) for _ in mix]
        max_blocks = rng.choice([rng.randint(1, 8), max(slots), 4 * max(slots)])
        self.max_seq_len = rng.choice([None, 9 * t])
        partial = rng.random() < 0.8
        self.names = [f"p{i}" for i in range(len(mix))]
        pools = [PoolConfig(name, 8 * t, window, sinks) for name, (window, sinks) in zip(self.names, mix, strict=True)]
        num_slots = dict(zip(self.names, slots, strict=True))
        config = CacheConfig(
            t, pools, 1 << 20, max_blocks=max_blocks, max_seq_len=self.max_seq_len, partial_reuse=partial
        )
        zero = dict.fromkeys(self.names, 0)
        plan = PoolPlan(dict.fromkeys(self.names, 1), num_slots, zero, 8 * t * (sum(slots) + len(slots)))
        self.real = KVCacheManager(config, "cpu", plan=plan)
        self.values = {name: self.real.pages(name).view(np.int64) for name in self.names}
        specs = [(n, window, sinks) for n, (window, sinks) in zip(slots, mix, strict=True)]
        self.model = Model(t, specs, max_blocks, partial, self.max_seq_len)
        self.open: list[tuple[KVCache, ModelCache]] = []
        self.in_flight: list[tuple[KVCache, ModelCache]] = []
        self.t = t
        self.next_id = 0
        self.did: dict[str, int] = {}

    def tokens(self, most: int = 14) -> list[int]:
        length = self.rng.randint(0, most)
        if self.rng.random() < 0.5:  # close to an old one
            seen = [c.committed + c.prompt[len(c.committed) :] for _, c in self.open]
            seen += [[token for node in n.path() for token in node.tokens] for n in self.model.nodes]
            if seen:
                base = self.rng.choice(seen)[: self.rng.randint(0, most)]
                return base + [self.rng.randint(0, 2) for _ in range(length - len(base))]
        return [self.rng.randint(0, 2) for _ in range(length)]

    def scope(self) -> tuple[Scope, tuple[object, ...]]:
        scope = self.rng.choice(SCOPES[: self.rng.randint(1, 4)])
        epoch = None
        if self.rng.random() < 0.1:
            epoch = self.rng.randint(0, self.model.epoch)
        key = (scope.lora_id, type(scope.salt), scope.salt)
        return Scope(scope.lora_id, scope.salt, epoch), key

    def content(self, pool: str, model: ModelCache, committed: list[int], end: int) -> int:
        """What position `end - 1` of a sequence holds: a value of its scope, pool and whole prefix."""
        return hash((model.root, pool, tuple(committed[:end])))

    def write(self, real: KVCache, model: ModelCache, tokens: list[int]) -> None:
        """ "Compute" the pages of the next tokens."""
        sequence = model.committed + tokens
        for name in self.names:
            table = real.block_table(name)
            for at in range(len(model.committed), len(sequence)):
                if slot := table[at // self.t]:
                    self.values[name][slot, at % self.t] = self.content(name, model, sequence, at + 1)

    def verify(self, real: KVCache, model: ModelCache) -> None:
        """No wrong byte: every committed position that has a page holds what was computed for it."""
        if model.state != "ACTIVE":
            return
        for name in self.names:
            table = real.block_table(name)
            for at in range(len(model.committed)):
                if slot := table[at // self.t]:
                    self.count("verified", True)
                    assert self.values[name][slot, at % self.t] == self.content(name, model, model.committed, at + 1)

    # -- operations: each returns nothing and compares its own results --------------------------

    def create(self) -> None:
        if len(self.open) > 5:
            return
        tokens, (scope, key) = self.tokens(), self.scope()
        if self.max_seq_len is not None:
            tokens = tokens[: self.max_seq_len]
        retention, ranges, decode = None, None, 35
        if self.rng.random() < 0.4:
            split = self.rng.randint(1, 6)
            low, high, decode = (self.rng.choice([0, 20, 35, 60, 100]) for _ in range(3))
            end = self.rng.choice([None, split + 4])
            retention = Retention([TokenRange(0, split, low), TokenRange(split, end, high)], decode)
            ranges = [(0, split, low), (split, end, high)]
        assert self.real.probe(tokens, scope) == self.model.probe(tokens, key, scope.epoch)
        real = self.real.create(self.next_id, tokens, scope=scope, retention=retention)
        self.next_id += 1
        model = self.model.create(tokens, key, scope.epoch, ranges, decode)
        if model.reused:
            self.did["partial" if model.source else "reuse"] = self.did.get("partial", 0) + 1
        self.open.append((real, model))

    def pick(self, state: str | None = None) -> tuple[KVCache, ModelCache] | None:
        choice = [pair for pair in self.open if state is None or pair[1].state == state]
        return self.rng.choice(choice) if choice else None

    def resume(self) -> None:
        if pair := self.pick():
            before = pair[1].capacity
            assert pair[0].resume() is True
            self.model.resume(pair[1])
            self.verify(*pair)
            self.count("shortened", pair[1].capacity < before)

    def suspend(self) -> None:
        if pair := self.pick():
            pair[0].suspend()
            pair[1].state = "SUSPENDED"

    def count(self, what: str, happened: object) -> None:
        self.did[what] = self.did.get(what, 0) + bool(happened)

    def resize(self) -> None:
        if not (pair := self.pick("ACTIVE")):
            return
        real, model = pair
        capacity = max(model.history, model.capacity + self.rng.randint(-4, 9))
        history = min(capacity, model.history + self.rng.choice([0, 0, 1, 3]))
        if self.max_seq_len is not None and capacity > self.max_seq_len:
            with pytest.raises(ValueError, match="capacity"):
                real.resize(capacity, history)
            return
        done = self.model.resize(model, capacity, history)
        assert real.resize(capacity, history) is done
        self.count("refused", not done)

    def commit(self) -> None:
        if not (pair := self.pick("ACTIVE")):
            return
        real, model = pair
        room = model.capacity - len(model.committed)
        tokens = self.tokens(room)[:room]
        rest = model.prompt[len(model.committed) :]
        tokens = rest[: len(tokens)] + tokens[len(rest) :]
        if rest and tokens and self.rng.random() < 0.05:
            with pytest.raises(LogicError, match="prompt"):
                real.commit([tokens[0] + 1, *tokens[1:]])
            return
        given: Any = np.array(tokens, np.int32) if self.rng.random() < 0.5 else tokens
        self.write(real, model, tokens)
        changed = self.model.commit(model, tokens)
        assert real.commit(given) is changed
        self.count("switched", changed)
        self.verify(real, model)

    def misuse(self) -> None:
        if not (pair := self.pick()):
            return
        real, model = pair
        if model.state == "ACTIVE":
            with pytest.raises(ValueError, match="capacity"):
                real.commit([0] * (model.capacity - len(model.committed) + 1))
            with pytest.raises(ValueError, match="history_length"):
                real.resize(model.capacity, model.capacity + 1)
        else:
            for call in (lambda: real.resize(1), lambda: real.commit([]), lambda: real.block_table("p0")):
                with pytest.raises(LogicError, match="SUSPENDED"):
                    call()
        with pytest.raises(LogicError, match="already"):
            self.real.create(real.request_id, [])

    def close(self) -> None:
        if pair := self.pick():
            self.open.remove(pair)
            self.verify(*pair)
            pair[0].close()
            self.model.close(pair[1])

    def step_begin(self) -> None:
        if pair := self.pick("ACTIVE"):
            self.real.step_begin([pair[0]])
            self.model.step_begin(pair[1])
            self.in_flight.append(pair)

    def step_end(self) -> None:
        if self.in_flight:
            pair = self.in_flight.pop(self.rng.randrange(len(self.in_flight)))
            self.count("closed in flight", pair[1].state == "CLOSED")
            self.real.step_end([pair[0]])
            self.model.step_end(pair[1])

    def evict(self) -> None:
        n = self.rng.randint(0, 3)
        assert self.real.evict(n) == self.model.evict(n)

    def clear(self) -> None:
        if self.rng.random() < 0.3:
            self.real.clear()
            self.model.clear()

    def epoch(self) -> None:
        if self.rng.random() < 0.3:
            self.real.set_epoch(self.model.epoch + 1)
            self.model.set_epoch(self.model.epoch + 1)

    def step(self) -> None:
        weights = {
            self.create: 5, self.resume: 5, self.resize: 8, self.commit: 9, self.close: 3, self.suspend: 1,
            self.step_begin: 2, self.step_end: 3, self.evict: 1, self.clear: 1, self.epoch: 1, self.misuse: 1,
        }  # fmt: skip
        operation = self.rng.choices(list(weights), list(weights.values()))[0]
        operation()
        self.compare()

    def compare(self) -> None:
        self.real.check()
        stats = self.real.stats()
        for i, name in enumerate(self.names):
            books = {k: v for k, v in stats.pools[name]["device"].items() if k != "peak"}
            assert books == self.model.books(i), name
        assert (stats.evicted, stats.dropped) == (self.model.evicted, self.model.dropped)
        assert self.real.available_tokens() == self.model.available_tokens()
        for real, model in self.open:
            seen = (real.state, real.num_reused_tokens, real.capacity, real.history_length, real.num_committed_tokens)
            assert seen == (model.state, model.reused, model.capacity, model.history, len(model.committed))
            if model.state == "ACTIVE":
                for i, name in enumerate(self.names):
                    table = real.block_table(name)
                    assert [slot != 0 for slot in table] == [page is not None for page in model.table[i]]

    def finish(self) -> None:
        while self.in_flight:
            self.step_end()
        while self.open:
            self.close()
        self.real.clear()
        self.model.clear()
        self.compare()
        for books in self.real.stats().pools.values():
            assert books["device"]["free"] == books["device"]["slots"]


def drive(seed: int, operations: int) -> dict[str, int]:
    pair = Pair(random.Random(seed))
    done = 0
    try:
        while done < operations:
            pair.step()
            done += 1
        pair.finish()
    except BaseException:
        print(f"seed {seed}, operation {done}: KVPOOL_SEED={seed} runs it again")
        raise
    return pair.did


def test_manager_equals_model_over_random_operations() -> None:
    did: dict[str, int] = {}
    for seed in SEEDS:
        for what, count in drive(seed, OPERATIONS).items():
            did[what] = did.get(what, 0) + count
    if not {"KVPOOL_SEED", "KVPOOL_OPS"} & set(os.environ):
        assert len(SEEDS) * OPERATIONS >= 100_000
        assert {"verified", "reuse", "partial", "shortened", "refused", "switched", "closed in flight"} <= {
            what for what, count in did.items() if count
        }, did


@settings(max_examples=25, deadline=None, print_blob=True, suppress_health_check=list(HealthCheck))
@given(st.integers(0, 2**32), st.integers(1, 80))
def test_manager_equals_model_shrinking(seed: int, operations: int) -> None:
    with contextlib.redirect_stdout(None):
        drive(seed, operations)
