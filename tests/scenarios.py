"""Random small worlds for the scheduler: pools, tiers, limits, requests that arrive and are cancelled, steps in flight.

`run(scenario)` drives a scheduler through one and raises AssertionError where a promise is broken; `shrunk` makes a
failing scenario small. Books only: bytes are verified elsewhere.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import backend
from kvpool import (
    AdapterBudget,
    CacheConfig,
    ConfigError,
    KVCacheManager,
    PoolConfig,
    PoolPlan,
    Request,
    RequestTooLargeError,
    Retention,
    Scheduler,
    SchedulerConfig,
    Step,
    TokenRange,
)


@dataclass(frozen=True)
class Job:
    """One request: `family` and `prompt` make its tokens; equal families share a prefix."""

    prompt: int
    new: int
    family: int = 0
    draft: int = 0
    arrival: int = 0  # pass
    cancel: int | None = None  # pass
    adapter: int | None = None
    priority: int | None = None
    stop: bool = False


@dataclass(frozen=True)
class Scenario:
    """Everything that happens; the seed decides what the executor accepts and in which order steps end."""

    seed: int = 0
    t: int = 4
    windows: tuple[tuple[int | None, int], ...] = ((None, 0),)  # (window, sinks) by pool
    device: tuple[int, ...] = (8,)
    host: tuple[int, ...] = (0,)
    reservation: str = "sliding"
    chunk: int | None = None
    tokens: int = 64
    batch: int = 8
    started: int | None = None
    bypass: int = 16
    depth: int = 1  # steps in flight
    faults: float = 0.0  # share of steps that the executor fails
    adapters: int | None = None  # budget; every adapter has 1 page
    draft_model: tuple[int, ...] = ()  # device slots of the draft model's manager, by pool; () for none
    optimism: float = 1.0  # share of max_new_tokens that the scheduler expects at first
    as_list: bool = False  # requests are given to each schedule call
    victim: str = "newest"
    admission: str = "latency"
    jobs: tuple[Job, ...] = ()


def generate(seed: int) -> Scenario:
    """A random scenario of tight pools."""
    r = random.Random(seed)
    t = r.choice([1, 2, 3, 4, 4, 8])
    pools = r.choice([1, 1, 1, 2, 2, 3])
    windows = tuple(
        (None, 0) if r.random() < 0.5 else (r.randint(1, 3 * t), r.choice([0, 0, 1, t + 1])) for _ in range(pools)
    )
    device = tuple(r.randint(1, 12) for _ in range(pools))
    tier = r.choice(["none", "none", "tiny", "full"])
    host = tuple({"none": 0, "tiny": r.randint(1, 3), "full": n + r.randint(0, 12)}[tier] for n in device)
    chunk = r.choice([None, None, 1, r.randint(1, 2 * t), t])
    draft = r.choice([0, 0, 0, 1, 3])
    adapters = r.choice([None, None, None, 1, 2])
    longest = max(2, min(device) * t)

    def job() -> Job:
        new = r.randint(1, max(1, r.choice([4, longest // 2, longest - 1])))
        return Job(
            prompt=r.randint(1, max(1, r.choice([t, longest + 2 - new]))),
            new=new,
            family=r.randint(0, 3),
            draft=r.randint(0, draft),
            arrival=r.choice([0, 0, r.randint(0, 15)]),
            cancel=r.randint(0, 30) if r.random() < 0.1 else None,
            adapter=r.choice([None, 1, 2, 3]) if adapters is not None else None,
            priority=r.choice([None, None, None, 0, 100]),
            stop=r.random() < 0.1,
        )

    scenario = Scenario(
        seed=seed,
        t=t,
        windows=windows,
        device=device,
        host=host,
        reservation=r.choice(["sliding", "aligned", "none"]),
        chunk=chunk,
        tokens=max(chunk or 1, 1 + draft, r.choice([r.randint(1, 12), longest + 8, 64])),
        batch=r.choice([1, 2, 3, 8]),
        started=r.choice([None, None, 1, 2, 5]),
        bypass=r.choice([16, 16, 2, 1, 0]),
        depth=r.choice([1, 1, 1, 2, 3]),
        faults=r.choice([0.0, 0.0, 0.0, 0.05]),
        adapters=adapters,
        draft_model=tuple(max(1, n + r.randint(-2, 3)) for n in device) if r.random() < 0.2 else (),
        optimism=r.choice([1.0, 0.5, 0.0]),
        as_list=r.random() < 0.25,
        victim=r.choice(["newest", "newest", "cheapest"]),
        jobs=tuple(job() for _ in range(r.randint(1, 7))),
    )
    if r.random() < 0.1:  # one at a time, several in flight, and cancelled there: slots come back late
        jobs = tuple(replace(job, cancel=r.choice([None, r.randint(2, 20)])) for job in scenario.jobs)
        scenario = replace(scenario, batch=1, started=5, depth=2, optimism=0.0, reservation="none", jobs=jobs)
    if r.random() < 0.5:
        return scenario
    scenario = replace(scenario, admission="throughput")
    return _crowded(scenario, r) if r.random() < 0.3 else scenario


def _crowded(scenario: Scenario, r: random.Random) -> Scenario:
    """All contexts fit at first, and not all ends: many give way together."""
    number, prompt, new = r.randint(3, 7), r.randint(1, 2 * scenario.t), r.randint(4, 6 * scenario.t)
    first, last = ((-(-tokens // scenario.t)) for tokens in (prompt + 1, prompt + new))
    device = tuple(r.randint(max(last, number * first), max(last, number * last)) for _ in scenario.windows)
    jobs = tuple(
        Job(prompt, max(1, new - r.choice([0, 0, 0, 1, new // 2])), family=i, arrival=r.choice([0, 0, 0, 0, 4]))
        for i in range(number)
    )
    return replace(
        scenario, device=device, host=(0,) * len(device), batch=8, started=None, tokens=max(scenario.tokens, 48),
        draft_model=device if scenario.draft_model else (), optimism=1.0, jobs=jobs,
    )  # fmt: skip


class Broken(AssertionError):
    """A promise of the scheduler does not hold."""


def manager_of(scenario: Scenario, slots: tuple[int, ...], draft: int) -> KVCacheManager:
    """Books only, with exactly so many slots."""
    names = [f"p{i}" for i in range(len(scenario.windows))]
    pools = [PoolConfig(name, 8, *window) for name, window in zip(names, scenario.windows, strict=True)]
    config = CacheConfig(
        scenario.t, pools, 1 << 20, draft_tokens=draft, decode_reservation=scenario.reservation, hash_seed=1
    )
    device = dict(zip(names, slots, strict=True))
    plan = PoolPlan(dict.fromkeys(names, 1), device, dict(zip(names, scenario.host, strict=True)), 1 << 20)
    return KVCacheManager(config, backend.books(), plan=plan)


class World:
    """A scheduler, its requests and a simulated executor."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = s = scenario
        self.random = random.Random(s.seed)
        draft = max((job.draft for job in s.jobs), default=0)
        self.managers = [manager_of(s, slots, draft) for slots in (s.device, s.draft_model) if slots]
        adapters = None if s.adapters is None else AdapterBudget({1: 1, 2: 1, 3: 1}, s.adapters)
        config = SchedulerConfig(
            s.batch, s.tokens, s.chunk, s.bypass, s.started, adapters, victim=s.victim, admission=s.admission
        )
        self.scheduler = Scheduler(self.managers[0], config, self.managers[1] if s.draft_model else None)
        self.scheduler.outlook.expect(s.optimism)
        self.config = config
        self.most_started = s.started or s.batch
        self.ages: dict[int | str, int] = {}
        self.requests: dict[int, Request] = {}
        self.alive: dict[int, Request] = {}
        self.limits: dict[int, int] = {}  # executed steps by which it must have ended
        self.flying: deque[Step] = deque()
        self.steps = self.passes = self.failed = 0
        self.counts: Counter[str] = Counter()
        self.arrived: list[Request] = []

    # -- the bound of docs/LIVENESS.md --------------------------------------------------------------

    def life(self, job: Job) -> int:
        """Most executed steps that the request can use itself."""
        if self.scenario.chunk is None:
            return 1 + job.new
        return -(-(job.prompt + job.new - 1) // self.scenario.chunk) + job.new

    def bound(self, older: int) -> int:
        s = max(self.life(self.scenario.jobs[i]) for i in self.requests)
        config = self.config
        most = (older + 1) * (self.most_started + config.max_bypass + 1) * s * self.scenario.depth
        return self.steps + most + (1 + self.failed) * s

    # -- what happens -------------------------------------------------------------------------------

    def tokens(self, number: int, job: Job) -> list[int]:
        """Families share the first half of their prompts."""
        common = [job.family * 1000 + i for i in range(job.prompt // 2)]
        return common + [100_000 + number * 1000 + i for i in range(job.prompt - len(common))]

    def arrive(self) -> None:
        for number, job in enumerate(self.scenario.jobs):
            if job.arrival == self.passes:
                retention = job.priority and Retention([TokenRange(0, None, job.priority)])
                request = Request(
                    number, self.tokens(number, job), job.new, lora_id=job.adapter, draft_tokens=job.draft,
                    retention=retention or None, stop_token_ids=[9] if job.stop else [],
                )  # fmt: skip
                if self.scenario.as_list:
                    self.arrived.append(request)
                    self.enter(number, request)
                    continue
                try:
                    self.scheduler.add(request)
                except (RequestTooLargeError, ConfigError):
                    self.counts["refused"] += 1
                    continue
                self.enter(number, request)
            if job.cancel == self.passes and number in self.requests and self.scheduler.cancel(number):
                self.counts["cancelled"] += 1

    def enter(self, number: int, request: Request) -> None:
        self.requests[number] = request
        self.alive[number] = request

    def set_limits(self) -> None:
        """For those that the scheduler saw in this pass."""
        for number, request in self.alive.items():
            if number in self.limits:
                continue
            if request.state == "FINISHED":  # cancelled before a pass saw it: the next update returns it
                self.limits[number] = self.bound(0)
            elif request._entry is not None:
                age = request._entry.age
                older = sum(other._entry is not None and other._entry.age < age for other in self.alive.values())
                self.limits[number] = self.bound(older)

    def schedule(self) -> Step:
        enough = self.returns_enough()
        waited = {number for number, request in self.alive.items() if request.state == "WAITING"}
        step = self.one_pass()
        gave_way = bool(step.suspended or step.recompute)
        first = any(chunk.request.request_id in waited for chunk in step.context)
        expect(not (gave_way and first), "a request starts in a pass in which a started one gives way")
        expect(not (gave_way and enough), "somebody gave way while enough slots were returning")
        return step

    def returns_enough(self) -> bool:
        """Whether each pool gets back more than any one request can lack in this pass."""
        t, unit = self.scenario.t, self.scenario.chunk or 10**6
        lacks = [0]
        for request in self.alive.values():
            entry = request._entry
            if entry is not None and entry.started:
                tokens = request.generation_tokens if entry.generates else min(unit, entry.rest)
                end = request.num_computed + tokens
                lacks.append(-(-end // t) if request.state == "SUSPENDED" else tokens // t + 1)
        if self.scenario.reservation != "none" or not self.flying:
            return False
        return all(returning >= max(lacks) for _, returning in self.scheduler.memory.pressure())

    def one_pass(self) -> Step:
        before = {number: request.state for number, request in self.alive.items()}
        if not self.scenario.as_list:
            step = self.scheduler.schedule()
        else:
            listed = list(self.arrived)
            self.random.shuffle(listed)
            step = self.scheduler.schedule(listed)
            for request, _ in step.refused:
                self.alive.pop(request.request_id)
                self.counts["refused"] += 1
        self.passes += 1
        self.set_limits()
        self.look_at(step)
        self.look_at_who_gave_way(step, before)
        return step

    def look_at_who_gave_way(self, step: Step, before: dict[int, str]) -> None:
        """Whoever lost its place in this call is in just one of the step's lists, and nobody else is."""
        suspended, recomputed = ({r.request_id for r in listed} for listed in (step.suspended, step.recompute))
        expect(len(step.suspended) + len(step.recompute) == len(suspended | recomputed), "somebody gave way twice")
        now = {number: request.state for number, request in self.alive.items()}
        for number, state in before.items():
            if state in ("RUNNING", "SUSPENDED") and now.get(number) == "WAITING":
                expect(number in recomputed, f"{number} is computed again, and is not in the list")
            if state == "RUNNING" and now.get(number) == "SUSPENDED":
                expect(number in suspended, f"{number} is suspended, and is not in the list")
        expect(all(now.get(number) == "WAITING" for number in recomputed), "who is computed again waits")
        expect(all(now.get(number) == "SUSPENDED" for number in suspended), "who is in the list is suspended")

    def look_at(self, step: Step) -> None:
        """Limits, order, and what a step consists of."""
        work = [*step.generation, *(chunk.request for chunk in step.context)]
        ids = [request.request_id for request in work]
        ends = {chunk.request.request_id: chunk.start + chunk.num_tokens for chunk in step.context}
        for request in step.generation:
            whole = len(request.tokens) + request.max_new_tokens - 1
            ends[request.request_id] = min(request.num_computed + 1 + request.draft_tokens, whole)
        tokens = sum(chunk.num_tokens for chunk in step.context)
        tokens += sum(ends[request.request_id] - request.num_computed for request in step.generation)
        expect(len(ids) == len(set(ids)), "a request is in a step twice")
        expect(tokens == step.num_tokens <= self.config.max_num_tokens, f"{step.num_tokens} tokens, {tokens} counted")
        expect(len(ids) <= self.config.max_batch_size, "more requests than max_batch_size")
        expect(not {r.request_id for r in [*step.suspended, *step.recompute]} & set(ids), "gave way and runs")
        flying = {request.request_id for other in self.flying for request in other.requests}
        expect(not flying & set(ids), "a request in flight is scheduled")
        lasts = [chunk.is_last for chunk in step.context]
        expect(lasts == sorted(lasts), "last chunks come last")
        for chunk in step.context:
            request = chunk.request
            end = len(request.tokens) + len(request.output_tokens)
            expect(chunk.start == request.num_computed, "a chunk starts where the last one ended")
            expect(chunk.is_last == (chunk.start + chunk.num_tokens == end), "is_last")
            unit = self.config.chunk_tokens
            expect(chunk.is_last or (unit is not None and chunk.num_tokens % unit == 0), "a multiple of chunk_tokens")
        for manager in self.managers:
            manager.check()
            for request in work:
                cache = manager.cache(request.request_id)
                expect(cache.state == "ACTIVE", f"{request} runs on a cache that is {cache.state}")
                expect(cache.history_length == request.num_computed, "the cache's history is what was computed")
                expect(cache.capacity >= ends[request.request_id], f"{request} has no pages for its tokens")
        started = [r for r in self.alive.values() if r.state in ("RUNNING", "SUSPENDED")]
        expect(len(started) <= self.most_started, "more started than max_started")
        held = {request.request_id for request in started} | flying
        for manager in self.managers:
            expect(set(manager._caches) <= held, f"un-started requests hold something: {set(manager._caches) - held}")
        for request in self.alive.values():
            if request._entry is not None:
                age = request._entry.age
                expect(self.ages.setdefault(request.request_id, age) == age, "the age of a request changed")
        waiting = [r._entry for r in self.alive.values() if r.state == "WAITING" and r._entry is not None]
        most = max((entry.bypassed for entry in waiting), default=0)
        expect(most <= self.config.max_bypass, f"a request was overtaken {most} times")
        adapters = {request.lora_id for request in started} - {None}
        expect(self.config.adapters is None or len(adapters) <= self.config.adapters.budget, "adapters over budget")
        self.counts.update(suspended=len(step.suspended), recomputed=len(step.recompute))
        self.counts["together"] += self.scenario.admission == "throughput" and len(step.recompute) > 1

    def launch(self, step: Step) -> None:
        self.steps += 1
        for manager, caches in self.scheduler.memory.caches(step):
            manager.step_begin(caches)
            step_caches.setdefault(id(step), []).append((manager, caches))
        self.flying.append(step)

    def land(self) -> None:
        """The oldest step in flight ends."""
        step = self.flying.popleft()
        for manager, caches in step_caches.pop(id(step)):
            manager.step_end(caches)
        if self.random.random() < self.scenario.faults:
            self.failed += 1
            ended = self.scheduler.fail(step, RuntimeError("the executor failed"))
        else:
            ended = self.scheduler.update(step, self.execute(step))
        self.finish(ended)

    def execute(self, step: Step) -> dict[Any, list[int]]:
        outputs = {chunk.request.request_id: [self.token()] for chunk in step.context if chunk.is_last}
        for request in step.generation:
            outputs[request.request_id] = [
                self.token() for _ in range(self.random.randint(1, 1 + request.draft_tokens))
            ]
        return outputs

    def token(self) -> int:
        return self.random.randint(0, 50)

    def finish(self, ended: list[Request]) -> None:
        for request in ended:
            self.alive.pop(request.request_id, None)
            self.counts[str(request.finish_reason)] += 1
            if request.finish_reason == "length":
                expect(len(request.output_tokens) == request.max_new_tokens, "finished by length, and shorter")

    def go(self) -> None:
        """Until everything has arrived and ended."""
        last = max((max(job.arrival, job.cancel or 0) for job in self.scenario.jobs), default=0)
        while self.alive or self.passes <= last:
            self.arrive()
            step = self.schedule()
            if step:
                self.launch(step)
            late = [r for r in self.alive if self.steps > self.limits[r]]
            expect(not late, f"request {late and late[0]} is not done after {self.steps} executed steps")
            if self.flying and (not step or len(self.flying) >= self.scenario.depth):
                self.land()
            elif not step:
                self.finish(self.scheduler.update(step, {}))
                expect(self.passes <= last + 1 or not self.alive, "nothing runs and nothing is in flight")
        while self.flying:
            self.land()
        for manager in self.managers:
            manager.check()
            expect(not manager._caches, "a cache is left")
            for tiers in manager.stats().pools.values():
                books = tiers["device"]
                expect(books["free"] + books["cached"] == books["slots"], f"a page is lost: {books}")


step_caches: dict[int, list[Any]] = {}


def expect(holds: object, what: str) -> None:
    if not holds:
        raise Broken(what)


def run(scenario: Scenario) -> World:
    """Drive a scenario to its end; the first broken promise is raised."""
    world = World(scenario)
    try:
        world.go()
    except Exception as error:
        error.add_note(f"{scenario}")
        raise
    return world


PLAIN = {
    "draft_model": (), "optimism": 1.0, "as_list": False, "faults": 0.0, "depth": 1, "adapters": None, "chunk": None,
    "started": None, "victim": "newest", "admission": "latency", "reservation": "none", "bypass": 16, "batch": 8,
    "tokens": 64,
}  # fmt: skip


def _smaller(s: Scenario) -> Iterator[Scenario]:
    for i in range(len(s.jobs)):
        yield replace(s, jobs=s.jobs[:i] + s.jobs[i + 1 :])
    for name, plain in PLAIN.items():
        if getattr(s, name) != plain:
            yield replace(s, **{name: plain})
    if any(s.host):
        yield replace(s, host=(0,) * len(s.host))
    for i in range(len(s.windows)):
        if len(s.windows) > 1:
            lists = ("windows", "device", "host", "draft_model")
            rest = {name: getattr(s, name)[:i] + getattr(s, name)[i + 1 :] for name in lists}
            yield replace(s, **rest)
        if s.windows[i] != (None, 0):
            yield replace(s, windows=(*s.windows[:i], (None, 0), *s.windows[i + 1 :]))
    plain_job = Job(1, 1)
    for i, job in enumerate(s.jobs):
        for name in ("family", "draft", "arrival", "cancel", "adapter", "priority", "stop"):
            if getattr(job, name) != getattr(plain_job, name):
                changed = replace(job, **{name: getattr(plain_job, name)})
                yield replace(s, jobs=(*s.jobs[:i], changed, *s.jobs[i + 1 :]))
        for name in ("prompt", "new", "arrival"):
            if getattr(job, name) > 1:
                changed = replace(job, **{name: getattr(job, name) - 1})
                yield replace(s, jobs=(*s.jobs[:i], changed, *s.jobs[i + 1 :]))


def fails(scenario: Scenario) -> BaseException | None:
    """What a scenario breaks."""
    try:
        run(scenario)
    except Exception as error:
        return error
    return None


def shrunk(scenario: Scenario, is_same: Callable[[BaseException], bool] = lambda error: True) -> Scenario:
    """The smallest scenario found that still fails."""
    best, again = scenario, True
    while again:
        again = False
        for smaller in _smaller(best):
            error = fails(smaller) if smaller.jobs else None
            if error is not None and is_same(error):
                best, again = smaller, True
                break
    return best
