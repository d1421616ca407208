"""W4, a scheduler step: 256 running decodes and 16 waiting contexts, in a state that lasts.

    A  the batch is full: nobody can start
    B  there is a place, and the head does not fit: "memory" (fewer free slots than its prompt needs), "forecast" (they
       are free, and the started requests will need them), or "asked" (memory; the youngest of the waiting is cancelled
       and another one arrives before each step, so that no refusal of the step before stands)
    C  16 contexts of 1,024 tokens start, 512 of them cached

Every step is measured between preparations that are not: 16 of the 256 decodes cross a block edge, outputs are
appended, A's and B's memory is as short before every step, C's contexts end and new ones arrive. Books only, no pages.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from kvpool import CacheConfig, KVCache, KVCacheManager, PoolConfig, PoolPlan, Request, Scheduler, SchedulerConfig

T, DECODES, WAITING, CONTEXT, CACHED = 16, 256, 16, 1024, 512
PROMPT, STEPS = 512, 1500  # of a decode; steps that its pages last
SLOTS = 1 << 17


@dataclass(frozen=True)
class Case:
    """One state. kind: "A", "B memory", "B forecast", "B asked" or "C". cached: blocks in the tree that nobody uses."""

    kind: str
    waiting: int = WAITING
    cached: int = 0
    host: bool = False
    window: bool = False
    drafts: int = 0


@dataclass(frozen=True)
class Figures:
    """CPU time of the calling thread, µs: (min, median)."""

    schedule: tuple[float, float]
    update: tuple[float, float]
    together: tuple[float, float]


class World:
    """A scheduler in the state of a case; `prepare` and `step` in turn."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self._random = np.random.default_rng(0)
        self._ids = 0
        self._holder: KVCache | None = None
        self.manager = self._manager()
        places = DECODES if case.kind == "A" else DECODES + WAITING
        # Only in B does a waiting request need more than a place: it is looked at in every step.
        self.scheduler = Scheduler(self.manager, SchedulerConfig(places, 1 << 14))
        self._prefixes = [self._tokens(CACHED) for _ in range(WAITING)] if case.kind == "C" else []
        self._fill()
        self.decodes = [self._add(self._tokens(PROMPT + i % T), self._length()) for i in range(DECODES)]
        while any(not request.output_tokens for request in self.decodes):
            self._run()
        self._new: list[Request] = []
        if case.kind != "C":
            for _ in range(case.waiting):
                self._last = self._add(self._tokens(CONTEXT), self._length())
        self.outputs: dict[int | str, list[int]] = {r.request_id: [1] * (1 + case.drafts) for r in self.decodes}
        if case.kind in ("B memory", "B asked"):
            self._holder = self.manager.create("holder", np.empty(0, np.int32))
            self._holder.resume()

    def _length(self) -> int:
        return STEPS * (1 + self.case.drafts)

    def _manager(self) -> KVCacheManager:
        slots = SLOTS
        if self.case.kind == "B forecast":  # exactly what the decodes grow to
            slots = sum(-(-(PROMPT + i % T + self._length() - 1) // T) for i in range(DECODES))
        pools = [PoolConfig("kv", 1)] + ([PoolConfig("window", 1, window=256)] if self.case.window else [])
        config = CacheConfig(T, pools, len(pools) * (slots + 1), max_batch_size=DECODES + WAITING,
                             draft_tokens=self.case.drafts, hash_seed=1)  # fmt: skip
        names = [pool.name for pool in pools]
        host = slots if self.case.host else 0
        plan = PoolPlan(
            dict.fromkeys(names, 1), dict.fromkeys(names, slots), dict.fromkeys(names, host), config.device_bytes
        )
        return KVCacheManager(config, None, plan=plan)

    def _tokens(self, length: int) -> np.ndarray:
        return self._random.integers(0, 2**31 - 1, length, np.int32)

    def _fill(self) -> None:
        """Cached blocks, among them the prefixes of C."""
        rest = [self._tokens(64 * T) for _ in range(self.case.cached // 64)]
        for tokens in self._prefixes + rest:
            with self.manager.create("fill", tokens) as cache:
                cache.resume()
                cache.resize(len(tokens))
                cache.commit(tokens[cache.num_reused_tokens :])

    def _add(self, tokens: np.ndarray, new: int) -> Request:
        request = Request(self._ids, tokens, new, draft_tokens=self.case.drafts)
        self._ids += 1
        self.scheduler.add(request)
        return request

    def _run(self) -> None:
        step = self.scheduler.schedule()
        due = [chunk.request for chunk in step.context if chunk.is_last] + step.generation
        self.scheduler.update(step, {request.request_id: [1] for request in due})

    def prepare(self) -> None:
        """Outside the measured part."""
        for request in self._new:
            self.outputs.pop(request.request_id)
            self.scheduler.cancel(request.request_id)
        self._new.clear()
        for prefix in self._prefixes:
            request = self._add(np.concatenate([prefix, self._tokens(CONTEXT - CACHED)]), 64)
            self._new.append(request)
            self.outputs[request.request_id] = [1]
        if self.case.kind == "B asked":
            self.scheduler.cancel(self._last.request_id)
            self._last = self._add(self._last.tokens, self._length())
        if self._holder is not None:  # takes all but what the decodes of this step and half a context need
            room = self.manager.available_tokens() // T - DECODES * (1 + self.case.drafts) // T - CONTEXT // T // 2
            self._holder.resize(self._holder.capacity + T * room)

    def step(self) -> tuple[int, int]:
        """The measured part: thread time of schedule and of update, ns."""
        outputs, clock = self.outputs, time.thread_time_ns
        start = clock()
        step = self.scheduler.schedule()
        middle = clock()
        self.scheduler.update(step, outputs)
        end = clock()
        assert len(step.generation) == DECODES
        assert len(step.context) == len(self._new)
        return middle - start, end - middle


def figures(times: list[tuple[int, int]]) -> Figures:
    """Of the times of steps, ns."""

    def low(values: list[int]) -> tuple[float, float]:
        return min(values) / 1000, statistics.median(values) / 1000

    return Figures(low([s for s, _ in times]), low([u for _, u in times]), low([s + u for s, u in times]))


def measure(case: Case, steps: int = 300, each: Callable[[World], None] | None = None) -> Figures:
    """Steps of a case in its own world, the first tenth not counted."""
    world = World(case)
    times = []
    for _ in range(steps):
        world.prepare()
        times.append(world.step())
    world.manager.check()
    return figures(times[steps // 10 :])
