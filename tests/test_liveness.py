"""The scheduler never stalls: random worlds, each rule of docs/LIVENESS.md left out, and the stalls that others had."""

from __future__ import annotations

import multiprocessing
import os
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest

import backend
from kvpool import (
    CacheConfig,
    Engine,
    KVCacheManager,
    PoolConfig,
    PoolPlan,
    Request,
    RequestTooLargeError,
    Scheduler,
    SchedulerConfig,
    Step,
)
from rules import RULES
from scenarios import Job, Scenario, fails, generate, run, shrunk

SCENARIOS, CHUNK = 20_000, 500
ON_CUDA = 150


def _run_chunk(first: int, number: int = CHUNK) -> tuple[Counter[str], int | None]:
    counts: Counter[str] = Counter()
    for seed in range(first, first + number):
        try:
            world = run(generate(seed))
        except Exception:
            return counts, seed
        counts.update(world.counts)
        counts.update(scenarios=1, steps=world.steps)
    return counts, None


@pytest.mark.timeout(900)
def test_random_scenarios_end_within_the_bound_or_are_refused_and_never_stall() -> None:
    counts: Counter[str] = Counter()
    if backend.device() == "cuda":  # in this process: the stand-in for CuPy is here
        results = [_run_chunk(0, ON_CUDA)]
    else:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(os.cpu_count(), mp_context=context) as pool:
            results = list(pool.map(_run_chunk, range(0, SCENARIOS, CHUNK)))
    for counted, failing in results:
        counts.update(counted)
        if failing is not None:
            small = shrunk(generate(failing))
            pytest.fail(f"seed {failing} fails; shrunk: {small}: {fails(small)!r}")
    print(dict(counts))
    assert counts["scenarios"] == (SCENARIOS if backend.device() == "cpu" else ON_CUDA)
    for kind in ("length", "stop", "cancelled", "error", "refused", "suspended", "recomputed", "together"):
        assert counts[kind] >= (50 if backend.device() == "cpu" else 1), kind


# -- every rule is needed -----------------------------------------------------------------------------

J = Job
BREAKS: dict[str, Scenario] = {
    "age": Scenario(
        seed=100018, t=8, windows=((None, 0), (None, 0)), device=(9, 3), host=(1, 3), as_list=True,
        jobs=(J(8, 3), J(6, 4, draft=1)),
    ),
    "fits_alone": Scenario(device=(5,), tokens=1, jobs=(J(2, 1),)),
    "nothing_before_the_start": Scenario(device=(2,), jobs=(J(1, 1), J(2, 4))),
    "older_wins": Scenario(device=(11,), host=(1,), jobs=(J(18, 12), J(3, 19))),
    "whatever_tiers_exist": Scenario(device=(11,), host=(1,), jobs=(J(18, 12), J(3, 19))),
    "suspended_ones_included": Scenario(device=(11,), host=(1,), jobs=(J(21, 5, arrival=6), J(7, 19))),
    "later_chunks": Scenario(t=8, device=(4,), host=(2,), chunk=1, jobs=(J(25, 1), J(9, 1))),
    "no_start_past_a_refused_one": Scenario(
        device=(4,), host=(3,), jobs=(J(1, 5), J(1, 1, arrival=3), J(8, 3, arrival=2))
    ),
    "not_in_the_same_pass": Scenario(
        t=2, device=(4,), host=(2,), batch=1, started=5, depth=2, jobs=(J(1, 3), J(2, 4), J(2, 2), J(1, 1))
    ),
    "bounded_bypass": Scenario(device=(12,), bypass=0, jobs=(J(32, 2), J(13, 1, family=3), J(1, 1))),
    "bounded_starts": Scenario(t=1, device=(11,), batch=2, depth=2, jobs=(J(1, 1), J(1, 1), J(1, 1))),
    "all_or_nothing": Scenario(
        t=3, device=(10,), host=(20,), chunk=3, draft_model=(9,), jobs=(J(1, 2), J(10, 2), J(13, 1, family=2))
    ),
    "kept_out_until_an_end": Scenario(device=(6,), admission="throughput", jobs=(J(2, 12), J(1, 12))),
}  # fmt: skip


@pytest.mark.parametrize("rule", BREAKS)
def test_without_any_one_rule_a_scenario_fails(rule: str) -> None:
    run(BREAKS[rule])
    with RULES[rule]():
        error = fails(BREAKS[rule])
    assert error is not None, f"{rule}: it is not needed here"
    print(f"{rule}: {type(error).__name__}: {error}")


def test_each_rule_is_left_out_by_some_test() -> None:
    assert set(RULES) == {*BREAKS, "fenced_means_wait"}


# -- published stalls ---------------------------------------------------------------------------------


def manager_of(pools: list[PoolConfig], slots: list[int], host: int = 0, t: int = 4, **config: Any) -> KVCacheManager:
    names = [pool.name for pool in pools]
    plan = PoolPlan(dict.fromkeys(names, 1), dict(zip(names, slots, strict=True)), dict.fromkeys(names, host), 1 << 30)
    return KVCacheManager(CacheConfig(t, pools, 1 << 30, hash_seed=1, **config), backend.books(), plan=plan)


class Executor:
    """One token for everything; counts steps."""

    def __init__(self) -> None:
        self.steps = 0
        self.most = 0

    def execute(self, step: Step) -> dict[Any, list[int]]:
        self.steps += 1
        self.most = max(self.most, len(step.generation))
        done = [chunk.request for chunk in step.context if chunk.is_last] + step.generation
        return {request.request_id: [7] for request in done}


def serve(manager: KVCacheManager, config: SchedulerConfig, sizes: list[tuple[int, int]]) -> tuple[Scheduler, Executor]:
    """Every request runs to its end."""
    scheduler, executor = Scheduler(manager, config), Executor()
    engine = Engine(scheduler, executor)
    for number, (prompt, new) in enumerate(sizes):
        engine.submit(Request(number, [1000 * number + i for i in range(prompt)], new))
    ended = engine.run()
    assert {i: len(request.output_tokens) for i, request in ended.items()} == {i: m for i, (_, m) in enumerate(sizes)}
    manager.check()
    return scheduler, executor


PUBLISHED: dict[str, tuple[int, int, SchedulerConfig, list[tuple[int, int]]]] = {
    "tiny host": (3, 1, SchedulerConfig(8, 64), [(3, 10), (8, 2)]),
    "full host": (4, 4, SchedulerConfig(8, 64), [(2, 6), (10, 6), (6, 5), (9, 7)]),
    "chunks of 4": (3, 0, SchedulerConfig(8, 7, 4), [(1, 7), (3, 8), (3, 7)]),
    "chunks of 1": (5, 0, SchedulerConfig(8, 4, 1), [(1, 8), (13, 4), (4, 6)]),
    "chunks of 1 and a host": (5, 6, SchedulerConfig(8, 64, 1), [(1, 9), (14, 6), (10, 6)]),
    "not chunked": (3, 0, SchedulerConfig(8, 8), [(1, 5), (3, 6)]),
}


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("share", [1.0, 0.0], ids=["as expected", "optimistic"])
def test_smallest_stalls_of_the_interleaved_scheduler(name: str, share: float) -> None:
    slots, host, config, sizes = PUBLISHED[name]
    manager = manager_of([PoolConfig("kv", 8)], [slots], host)
    scheduler = Scheduler(manager, config)
    scheduler.outlook.expect(share)
    engine = Engine(scheduler, Executor())
    for number, (prompt, new) in enumerate(sizes):
        engine.submit(Request(number, [100 * number + i for i in range(prompt)], new))
    ended = engine.run()
    assert [len(ended[i].output_tokens) for i in range(len(sizes))] == [new for _, new in sizes]


def test_the_same_prompt_twice_in_a_pool_that_holds_it_once() -> None:
    scheduler, executor = serve(manager_of([PoolConfig("kv", 8)], [2]), SchedulerConfig(8, 64), [(8, 1)])
    engine = Engine(scheduler, executor)
    for number in (1, 2):
        engine.submit(Request(number, list(range(8)), 1))
    assert [request.finish_reason for request in engine.run().values()] == ["length", "length"]


def test_trtllm_15401_a_windowed_pool_with_one_slot() -> None:
    """A decode that needs a second slot of the window in the step in which it crosses a block edge."""
    pools = [PoolConfig("full", 8), PoolConfig("window", 8, window=3)]
    with pytest.raises(RequestTooLargeError, match=r"2 slots of pool 'window'.* 1") as refused:
        Scheduler(manager_of(pools, [8, 1]), SchedulerConfig(4, 64, 4)).add(Request(0, [1, 2, 3], 6))
    assert (refused.value.pool, refused.value.needed, refused.value.available) == ("window", 2, 1)
    serve(manager_of(pools, [8, 3], decode_reservation="none"), SchedulerConfig(4, 64, 1), [(3, 6), (2, 7), (3, 3)])


def test_trtllm_17668_a_full_pool_that_does_not_grow_vetoes_nothing() -> None:
    """Suspended requests resume although another pool, in which they need nothing, is full."""
    pools = [PoolConfig("full", 8), PoolConfig("window", 8, window=4)]
    for host in (0, 2, 40):
        manager = manager_of(pools, [10, 4], host, decode_reservation="none")
        serve(manager, SchedulerConfig(4, 64, 4), [(8, 9), (6, 10), (8, 8)])


def test_trtllm_13318_tokens_exceed_the_budget_after_reuse_shrank() -> None:
    """A claim whose reuse counts on cached blocks that others take: the budget is kept all the same."""
    manager = manager_of([PoolConfig("kv", 8)], [5])
    scheduler, executor = Scheduler(manager, SchedulerConfig(4, 12)), Executor()
    engine = Engine(scheduler, executor)
    engine.submit(Request("first", list(range(8)), 1))
    engine.run()
    engine.submit(Request("reuses", [*range(8), 50, 51], 3))
    engine.submit(Request("evicts", list(range(100, 110)), 3))
    ended = {}
    while scheduler.has_work:
        step = scheduler.schedule()
        assert step.num_tokens <= 12
        ended.update({request.request_id: request for request in scheduler.update(step, executor.execute(step))})
    assert {request.finish_reason for request in ended.values()} == {"length"}


def test_suspension_that_frees_nothing_is_not_made() -> None:
    """With pages on the GPU alone a suspended request would keep its pages: the newest is freed instead."""
    manager = manager_of([PoolConfig("kv", 8)], [6])
    scheduler = Scheduler(manager, SchedulerConfig(4, 64))
    scheduler.outlook.expect(0.0)
    engine = Engine(scheduler, Executor())
    for number in range(3):
        engine.submit(Request(number, [100 * number + i for i in range(5)], 12))
    assert len(engine.run()) == 3
    assert scheduler.stats.suspended == 0 < scheduler.stats.recomputed


def test_all_tiers_full_with_first_come_resume() -> None:
    """Suspended requests fill the host and the device: the oldest is brought back at the cost of the newest."""
    manager = manager_of([PoolConfig("kv", 8)], [6], host=3)
    scheduler, _ = serve(manager, SchedulerConfig(8, 64), [(4, 17), (8, 13), (6, 15), (4, 12)])
    assert scheduler.stats.suspended > 0 < scheduler.stats.recomputed


def test_vllm_45388_parked_requests_hold_blocks_so_that_nobody_finishes() -> None:
    """Requests that wait hold no block, whatever they matched: the running ones have everything."""
    manager = manager_of([PoolConfig("kv", 8)], [8])
    scheduler, executor = serve(manager, SchedulerConfig(8, 64), [(16, 1)])
    engine = Engine(scheduler, executor)
    for number in range(1, 6):
        engine.submit(Request(number, [*range(16), *range(100 * number, 100 * number + 8)], 4))
    while scheduler.has_work:
        engine.step()
        started = {entry.request.request_id for entry in scheduler.started}
        assert set(manager._caches) == started
    assert manager.stats().pools["kv"]["device"]["active"] == 0


def test_vllm_57841_the_head_needs_more_than_is_free_and_others_could_run() -> None:
    """The others run, up to max_bypass of them; then the head goes first."""
    manager = manager_of([PoolConfig("kv", 8)], [120], t=1)
    scheduler = Scheduler(manager, SchedulerConfig(32, 256, max_bypass=4))
    executor, order = Executor(), []
    for request in [Request("long", list(range(60)), 41), Request("head", list(range(1000, 1099)), 2)]:
        scheduler.add(request)
    for number in range(10):
        scheduler.add(Request(number, [2000 + 10 * number, 1], 2))
    while scheduler.has_work:
        step = scheduler.schedule()
        order += [chunk.request.request_id for chunk in step.context]
        scheduler.update(step, executor.execute(step))
    assert order == ["long", 0, 1, 2, 3, "head", 4, 5, 6, 7, 8, 9]


def _waits_for_what_is_in_flight() -> tuple[Step, Step]:
    """The old request lacks slots that a cancelled one in flight will give back; a younger one could give way."""
    manager = manager_of([PoolConfig("kv", 8)], [11], t=1)
    scheduler, executor = Scheduler(manager, SchedulerConfig(8, 64)), Executor()
    scheduler.outlook.expect(0.0)
    for at, (name, prompt, new) in enumerate((("old", 2, 6), ("cancelled", 4, 4), ("young", 2, 4))):
        scheduler.add(Request(name, [100 * at + i for i in range(prompt)], new))
    step = scheduler.schedule()
    assert len(step.context) == 3
    scheduler.update(step, executor.execute(step))
    outside = manager.create("outside", [])
    assert outside.resume()
    assert outside.resize(3)
    fenced = [manager.cache("cancelled")]
    manager.step_begin(fenced)
    assert scheduler.cancel("cancelled")
    before = scheduler.schedule()
    scheduler.update(before, executor.execute(before))
    manager.step_end(fenced)
    return before, scheduler.schedule()


def test_vllm_ascend_16315_nobody_gives_way_while_frees_are_pending() -> None:
    before, after = _waits_for_what_is_in_flight()
    assert not before.generation
    assert not before.suspended
    assert not before.recompute
    assert [request.request_id for request in after.generation] == ["old", "young"]


def test_without_fenced_means_wait_somebody_gives_way() -> None:
    with RULES["fenced_means_wait"]():
        before, _ = _waits_for_what_is_in_flight()
    assert [request.request_id for request in before.recompute] == ["young"]
