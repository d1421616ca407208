"""A manager and the reference model, driven together: the operations of all random tests, once.

Every operation takes plain values, calls both, and everything that can be seen is compared. domains.py
says which values there are, so that a driver only needs to know how to draw one: from a seeded generator
in bulk, or from hypothesis, which shrinks a failure to few operations.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import backend
from batches import Batches
from comparison import Comparison, Step
from domains import MIXES, MOST_OPEN, MOST_STEPS, SCOPES
from kvpool import CacheConfig, KVCache, KVCacheManager, LogicError, PoolConfig, PoolPlan, Retention, Scope, TokenRange
from model import DEVICE, FOREVER, HOST, Model, ModelCache, Node, Retain

IntArray = npt.NDArray[Any]


class Recorded(KVCacheManager):
    """A manager that tells of each page that it copies."""

    told: list[tuple[str, int, int, int]]

    def _copy(self, copies: Sequence[tuple[int, bool, int, int]]) -> None:
        super()._copy(copies)
        self.told += [("up" if host else "copy", pool, src, dst) for pool, host, src, dst in copies]


class Offloads:
    """The recorder of a manager's moves, which tells of each page that goes down."""

    def __init__(self, recorder: Any, told: list[tuple[str, int, int, int]]) -> None:
        self.recorder, self.told = recorder, told

    def take(self) -> Any:
        taken = self.recorder.take()
        self.told += [("down", *move) for move in taken]
        return taken

    def __getattr__(self, name: str) -> Any:
        return getattr(self.recorder, name)


def recorded(*args: Any, **keywords: Any) -> Recorded:
    real = Recorded(*args, **keywords)
    real.told = []
    assert real._moves is not None
    real._moves.recorder = Offloads(real._moves.recorder, real.told)  # type: ignore[assignment]
    return real


class Pair(Batches, Comparison):
    """One manager and one model. `tell` hears of every call, in the manager's words."""

    def __init__(
        self,
        *,
        t: int,
        mix: int,
        slots: int,
        second: int,
        third: int,
        host: tuple[int, int, int],
        least: int,
        max_blocks: int,
        short: bool,
        partial: bool,
        tell: Callable[[str], None] = lambda line: None,
    ) -> None:
        pools, counts = MIXES[mix], [slots, second, third][: len(MIXES[mix])]
        host_counts = list(host[: len(counts)])
        max_blocks = max_blocks or 4 * max(map(sum, zip(counts, host_counts, strict=True)))
        self.t, self.tell = t, tell
        self.max_seq_len = 9 * t if short else None
        self.names = [f"p{i}" for i in range(len(pools))]
        config = CacheConfig(
            t,
            [PoolConfig(name, 8 * t, window, sinks) for name, (window, sinks) in zip(self.names, pools, strict=True)],
            1 << 20,
            1 << 20,
            max_blocks=max_blocks,
            max_seq_len=self.max_seq_len,
            partial_reuse=partial,
            offload_min_priority=least,
            hash_seed=1,
            clock=lambda: self.model.now,
        )
        num_slots, host_slots = (dict(zip(self.names, n, strict=True)) for n in (counts, host_counts))
        plan = PoolPlan(dict.fromkeys(self.names, 1), num_slots, host_slots, 8 * t * (sum(counts) + len(counts)))
        self.real = recorded(config, backend.device(), plan=plan)
        self.tiers = (DEVICE, HOST) if any(host_counts) else (DEVICE,)
        self.values = {tier: [self.real.pages(n, tier).view(np.int64) for n in self.names] for tier in self.tiers}
        specs = [(n, m, *rest) for n, m, rest in zip(counts, host_counts, pools, strict=True)]
        self.model = Model(t, specs, max_blocks, least, partial, self.max_seq_len)
        self.model.told = self.real.told
        tell(f"{max_blocks} blocks of {t} tokens, at most {self.max_seq_len}, offload_min_priority {least}")
        tell(f"pools (device slots, host slots, window, sinks): {specs}")
        self.open: list[tuple[KVCache, ModelCache]] = []
        self.closed: KVCache | None = None
        self.steps: list[Step] = []
        self.created: list[ModelCache] = []
        self.named = 0
        self.told: Counter[tuple[str, str, int]] = Counter()
        self.parents: dict[int, int | None] = {}
        self.last_event = 0
        self.numbers: dict[tuple[object, int], int] = {}
        self.did: Counter[str] = Counter()
        self.operations = 0
        self.evicted = self.dropped = self.offloaded = self.onboarded = 0
        self.sound = True

    # -- what a driver needs --------------------------------------------------------------------

    def ready(self, name: str) -> bool:
        """Whether an operation has something to work on; idle ones would only lengthen an example."""
        match name:
            case "create" | "serve" | "again":
                return len(self.open) < MOST_OPEN
            case "add_batch" | "claim":
                return len(self.open) < MOST_OPEN - 1
            case "resume" | "suspend" | "close" | "misuse" | "provide" | "generate":
                return bool(self.open)
            case "resize" | "commit":
                return any(model.state == "ACTIVE" for _, model in self.open)
            case "step_begin":
                return len(self.steps) < MOST_STEPS and self.ready("commit")
            case "step_end":
                return bool(self.steps)
        return bool(self.model.nodes)  # probe, evict, clear, set_epoch

    def do(self, name: str, **values: Any) -> None:
        """One operation, then everything is compared."""
        self.sound = False
        getattr(self, name)(**values)
        if name not in ("serve", "again"):  # these consist of operations, each counted and compared
            self.operations += 1
            self.compare()
        self.sound = True

    def finish(self) -> None:
        """All is closed and dropped: every slot must be free again. Not after a failure, which it would hide."""
        if not self.sound:
            return
        while self.steps:
            self.do("step_end", ats=(0,))
        while self.open:
            self.do("close", at=0)
        self.do("clear")
        for tiers in self.real.stats().pools.values():
            assert all(books["free"] == books["slots"] for books in tiers.values())

    # -- turning plain values into arguments ----------------------------------------------------

    def count(self, what: str, happened: object = True) -> None:
        if happened:
            self.did[what] += int(happened) if isinstance(happened, int) else 1

    def pick(self, at: int, state: str | None = None) -> tuple[KVCache, ModelCache]:
        choice = [pair for pair in self.open if state is None or pair[1].state == state]
        return choice[at % len(choice)]

    def sequence(self, node: Node) -> list[int]:
        return [token for own in node.path() for token in own.tokens]

    def like(self, at: int) -> list[int]:
        """A sequence of an open cache or of the tree."""
        if not (known := len(self.open) + len(self.model.blocks())):
            return []
        at %= known
        if at >= len(self.open):
            return self.sequence(self.model.blocks()[at - len(self.open)])
        model = self.open[at][1]
        return model.committed + model.prompt[len(model.committed) :]

    def tokens(self, like: int, keep: int, then: tuple[int, ...]) -> list[int]:
        return (self.like(like)[:keep] + list(then))[: self.max_seq_len]

    def scope(self, scope: int, age: int) -> tuple[Scope, tuple[object, ...]]:
        """The scope as the manager and as the model know it; `age`: so many epochs ago."""
        given = SCOPES[scope]
        epoch = max(0, self.model.epoch - age) if age else None
        return Scope(given.lora_id, given.salt, epoch), (given.lora_id, type(given.salt), given.salt)

    def rules(
        self,
        retention: tuple[int, int | None, int, int, int] | None,
        lasting: tuple[int | None, int | None, int | None] | None,
    ) -> tuple[Retention | None, list[tuple[int, int | None, Retain]] | None, Retain]:
        """The retention as the manager and as the model know it."""
        rules, ranges, decode = None, None, (35, FOREVER)
        if retention is not None:
            split, rest, low, high, late = retention
            end = None if rest is None else split + rest
            times = lasting or (None, None, None)
            rules = Retention(
                [TokenRange(0, split, low, times[0]), TokenRange(split, end, high, times[1])], late, times[2]
            )
            first, second, third = (seconds or FOREVER for seconds in times)
            ranges, decode = [(0, split, (low, first)), (split, end, (high, second))], (late, third)
        return rules, ranges, decode

    def name(self) -> int:
        """A new request id."""
        self.named += 1
        return self.named - 1

    # -- operations -----------------------------------------------------------------------------

    def probe(self, like: int, keep: int, then: tuple[int, ...], scope: int, age: int) -> None:
        tokens, (asked, key) = self.tokens(like, keep, then), self.scope(scope, age)
        self.tell(f"manager.probe({tokens}, {asked})")
        assert self.real.probe(tokens, asked) == self.model.probe(tokens, key, asked.epoch)

    def create(
        self,
        like: int,
        keep: int,
        then: tuple[int, ...],
        scope: int,
        age: int,
        retention: tuple[int, int | None, int, int, int] | None,
        lasting: tuple[int | None, int | None, int | None] | None,
    ) -> None:
        tokens, (asked, key) = self.tokens(like, keep, then), self.scope(scope, age)
        rules, ranges, decode = self.rules(retention, lasting)
        name = self.name()
        self.tell(f"r{name} = manager.create({name}, {tokens}, scope={asked}, retention={rules})")
        found = self.real.probe(tokens, asked)
        real = self.real.create(name, tokens, scope=asked, retention=rules)
        model = self.model.create(tokens, key, asked.epoch, ranges, decode)
        kept = any(sum(c.promise) for c in self.model.caches)
        assert found == real.num_reused_tokens or (kept and found > real.num_reused_tokens)
        assert real.num_reused_tokens == model.reused
        self.count("promised to others", found > model.reused)
        assert self.real.cache(name) is real
        self.count("partial copy" if model.source else "reused", model.reused)
        self.count("old epoch", model.root[1] < self.model.epoch)
        self.open.append((real, model))
        self.created.append(model)

    def serve(self, spare: int, stay: bool, **values: Any) -> None:
        """A whole request: created, given room, its prompt committed; closed unless it stays."""
        self.do("create", **values)
        pair = self.open[-1]
        at = len(self.open) - 1
        self.do("resume", at=at)
        if pair[1].state != "ACTIVE":
            self.do("close", at=at)
            return
        active = sum(model.state == "ACTIVE" for _, model in self.open) - 1
        self.do("resize", at=active, grow=len(pair[1].prompt) - pair[1].capacity + spare, slide=0)
        if pair[1].capacity:
            self.do("commit", at=active, like=0, keep=0, then=(), count=None)
        if not stay:
            self.do("close", at=at)

    def again(self, like: int, cut: int, **values: Any) -> None:
        """A whole request that goes on from a known sequence, or from shortly before its end."""
        keep = max(0, len(self.like(like)) - cut)
        self.serve(like=like, keep=keep, **values)

    def resume(self, at: int) -> None:
        real, model = self.pick(at)
        self.tell(f"r{real.request_id}.resume()")
        before = model.capacity
        done = real.resume()
        assert self.model.resume(model) is done
        self.model.coming.clear()
        self.count("shortened", model.capacity < before)
        self.count("resume refused", not done)

    def wait(self, seconds: int) -> None:
        self.tell(f"clock += {seconds}")
        before = sum(node.priority for node in self.model.nodes)
        self.model.wait(seconds)
        self.count("expired", sum(node.priority for node in self.model.nodes) < before)

    def suspend(self, at: int) -> None:
        real, model = self.pick(at)
        self.tell(f"r{real.request_id}.suspend()")
        real.suspend()
        self.model.suspend(model)

    def resize(self, at: int, grow: int, slide: int) -> None:
        real, model = self.pick(at, "ACTIVE")
        capacity = max(model.history, model.capacity + grow)
        history = min(capacity, model.history + slide)
        self.tell(f"r{real.request_id}.resize({capacity}, {history})")
        if self.max_seq_len is not None and capacity > self.max_seq_len:
            with pytest.raises(ValueError, match="capacity"):
                real.resize(capacity, history)
            return
        before = self.entries(model)
        done = real.resize(capacity, history if slide else None)
        assert self.model.resize(model, capacity, history) is done
        self.count("refused", not done)
        self.count("stale page", slide and grow >= 0 and self.entries(model) < before)

    def commit(self, at: int, like: int, keep: int, then: tuple[int, ...], count: int | None) -> None:
        """The rest of the prompt, then as a known sequence goes on, then `then`; as far as there is room."""
        real, model = self.pick(at, "ACTIVE")
        done = len(model.committed)
        tokens = model.prompt[done:]
        tokens += self.like(like)[done + len(tokens) :][:keep] + list(then)
        tokens = tokens[: model.capacity - done][:count]
        self.tell(f"r{real.request_id}.commit({tokens})")
        before, old = self.entries(model), model.root[1] < self.model.epoch
        self.write(real, model, tokens)
        held = [set(filter(None, row)) for row in model.table]
        given = np.array(tokens, np.int32) if len(tokens) % 2 else tokens
        changed = real.commit(given)
        assert self.model.commit(model, tokens) is changed
        self.count("switched", any({*filter(None, row)} - own for own, row in zip(held, model.table, strict=True)))
        self.count("stale page", self.entries(model) < before)
        self.count("old epoch", old and tokens)
        self.count("detached", model.detached and not old)

    def close(self, at: int) -> None:
        real, model = pair = self.pick(at)
        self.tell(f"r{real.request_id}.close()")
        self.open.remove(pair)
        self.closed = real
        in_work = model.in_work
        real.close()
        self.model.close(model)
        if in_work:
            self.created = [c for c in self.created if c is not model]
            self.count("freed unprovided")
        seen = (real.num_reused_tokens, real.capacity, real.history_length, real.num_committed_tokens)
        assert seen == (model.reused, model.capacity, model.history, len(model.committed))

    def step_begin(self, ats: tuple[int, ...]) -> None:
        pairs = [self.pick(at, "ACTIVE") for at in ats]
        self.tell(f"manager.step_begin([{', '.join(f'r{real.request_id}' for real, _ in pairs)}])")
        self.real.step_begin([real for real, _ in pairs])
        for real, model in pairs:
            self.model.step_begin(model)
            self.steps.append(Step(self, real, model))

    def step_end(self, ats: tuple[int, ...]) -> None:
        steps = [self.steps.pop(at % len(self.steps)) for at in ats if self.steps]
        self.tell(f"manager.step_end([{', '.join(f'r{step.caches[0].request_id}' for step in steps)}])")
        self.real.step_end([step.caches[0] for step in steps])
        for step in steps:
            self.count("closed in flight", step.caches[1].state == "CLOSED")
            self.model.step_end(step.caches[1])

    def evict(self, count: int) -> None:
        self.tell(f"manager.evict({count})")
        first = next(iter(self.model.leaves()), None)
        self.count("old block evicted", count and first is not None and self.model.rank(first) < 0)
        assert self.real.evict(count) == self.model.evict(count)

    def clear(self) -> None:
        self.tell("manager.clear()")
        self.real.clear()
        self.model.clear()

    def set_epoch(self) -> None:
        epoch = self.model.epoch + 1
        self.tell(f"manager.set_epoch({epoch})")
        self.real.set_epoch(epoch)
        self.model.set_epoch(epoch)

    def misuse(self, at: int) -> None:
        """Every refused call; the comparison afterwards shows that none changed anything."""
        real, model = self.pick(at)
        self.tell(f"# what r{real.request_id} and closed caches must refuse")
        if model.state == "ACTIVE":
            with pytest.raises(ValueError, match="capacity"):
                real.commit([0] * (model.capacity - len(model.committed) + 1))
            with pytest.raises(ValueError, match="history_length"):
                real.resize(model.capacity, model.capacity + 1)
            if (done := len(model.committed)) < min(len(model.prompt), model.capacity):
                with pytest.raises(LogicError, match="prompt"):
                    real.commit([model.prompt[done] + 1])
        else:
            self.refuses(real, "SUSPENDED", lambda: real.resize(1), lambda: real.commit([]))
        with pytest.raises(LogicError, match="already"):
            self.real.create(real.request_id, [])
        with pytest.raises(ValueError, match="epoch"):
            self.real.create("later", [], scope=Scope(epoch=self.model.epoch + 1))
        if self.model.epoch:
            with pytest.raises(ValueError, match="only grows"):
                self.real.set_epoch(self.model.epoch - 1)
        if not model.in_flight:
            with pytest.raises(LogicError, match="without step_begin"):
                self.real.step_end([real])
        if (gone := self.closed) is not None:
            gone.close()
            assert gone.state == "CLOSED"
            self.refuses(gone, "CLOSED", gone.resume, gone.suspend, lambda: gone.resize(1), lambda: gone.commit([]))

    def refuses(self, real: KVCache, state: str, *calls: Callable[[], object]) -> None:
        for call in (*calls, lambda: real.block_table("p0"), lambda: self.real.step_begin([real])):
            with pytest.raises(LogicError, match=state):
                call()
