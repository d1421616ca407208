"""Requests whose pages turn out not to have arrived when their step is about to be launched: it runs without them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import backend
from kvpool import CacheConfig, Engine, KVCacheManager, LogicError, PoolConfig, PoolPlan, Request, Scheduler, Step
from kvpool import SchedulerConfig as Limits

A = [*range(8)]


def manager_of() -> KVCacheManager:
    config = CacheConfig(4, [PoolConfig("kv", 32)], 1 << 20, 1 << 20, hash_seed=1)
    plan = PoolPlan({"kv": 1}, {"kv": 12}, {"kv": 8}, 1 << 20)
    return KVCacheManager(config, backend.device(), plan=plan, mover=backend.mover(check=True, faults=True))


class Executor:
    """Asks for the tables of the whole step at once, as a kernel for a batch does; keeps what it got."""

    def __init__(self, *managers: KVCacheManager) -> None:
        self.managers = managers
        self.steps: list[list[int | str]] = []
        self.recompute: list[list[int | str]] = []

    def execute(self, step: Step) -> dict[Any, list[int]]:
        for manager in self.managers:
            tables = manager.block_tables([manager.cache(request.request_id) for request in step.requests], "kv")
            assert len(tables) == len([*step.requests])
        self.steps.append([request.request_id for request in step.requests])
        self.recompute.append([request.request_id for request in step.recompute])
        assert step.num_tokens == sum(chunk.num_tokens for chunk in step.context) + len(step.generation)
        return outputs_of(step)


def outputs_of(step: Step) -> dict[Any, list[int]]:
    return {r.request_id: [7] for r in [*(chunk.request for chunk in step.context if chunk.is_last), *step.generation]}


World = Callable[..., tuple[Engine, Executor, list[KVCacheManager]]]


@pytest.fixture
def make() -> Any:
    """An engine whose trees have A; the next copy in the last manager fails."""
    made: list[KVCacheManager] = []

    def build(draft: bool = False) -> tuple[Engine, Executor, list[KVCacheManager]]:
        managers = [manager_of() for _ in range(1 + draft)]
        made.extend(managers)
        scheduler = Scheduler(managers[0], Limits(8, 64), managers[1] if draft else None)
        executor = Executor(*managers)
        engine = Engine(scheduler, executor)
        engine.submit(Request("first", A, 1))
        engine.run()
        backend.mover_of(managers[-1]).fail(1, "copy")
        return engine, executor, managers

    yield build
    for manager in made:
        assert not manager._caches
        manager.check()
        assert manager.stats().failed_moves >= (manager is made[-1])
        manager.close()


@pytest.mark.parametrize("draft", [False, True], ids=["target", "target and draft"])
def test_a_step_runs_without_the_requests_that_are_lost_and_they_are_computed_again(make: World, draft: bool) -> None:
    engine, executor, managers = make(draft)
    engine.submit(Request("lost", [*A[:6], 90], 3))
    engine.submit(Request("fine", [70, 71, 72], 3))
    assert engine.step() == []
    assert executor.steps[1:] == [["fine"]]
    assert executor.recompute[1:] == [["lost"]]
    for manager in managers:
        assert [*manager._caches] == ["fine"]
        manager.check()
    assert engine.scheduler.explain("lost").endswith("a move of its pages failed")
    ended = engine.run()
    assert {name: (r.finish_reason, r.output_tokens) for name, r in ended.items()} == {
        name: ("length", [7, 7, 7]) for name in ("lost", "fine")
    }
    assert executor.steps[2] == ["lost", "fine"]
    assert executor.recompute[2] == []  # it was told once
    assert engine.scheduler.stats.recomputed == 1


def test_a_step_of_lost_requests_alone_is_not_launched(make: World) -> None:
    engine, executor, managers = make()
    engine.submit(Request("lost", [*A[:6], 90], 2))
    assert engine.step() == []
    assert len(executor.steps) == 1
    assert not managers[0]._caches
    assert not engine.scheduler._steps  # it was taken back
    assert engine.run()["lost"].output_tokens == [7, 7]


def test_a_generation_that_is_lost_leaves_its_step_with_its_tokens(make: World) -> None:
    engine, executor, managers = make()
    backend.mover_of(managers[0]).fail(1, "onboard")
    manager, scheduler = managers[0], engine.scheduler
    for name in ("one", "two"):
        engine.submit(Request(name, [ord(name[0]), *range(20, 26)], 4))
    engine.step()
    manager.cache("two").suspend()
    manager.evict(12)
    engine.step()  # the pass brings its pages up, one of them in vain
    assert executor.steps[-1] == ["one"]
    assert executor.recompute[-1] == ["two"]
    ended = engine.run()
    assert {name: len(request.output_tokens) for name, request in ended.items()} == {"one": 4, "two": 4}
    assert scheduler.stats.recomputed == 1


def test_in_a_loop_of_ones_own_drop_lost_makes_the_step_smaller_and_update_takes_it_back_once(make: World) -> None:
    engine, _, (manager,) = make()
    scheduler = engine.scheduler
    lost, fine = Request("lost", [*A[:6], 90], 1), Request("fine", [70, 71, 72], 1)
    scheduler.add(lost)
    scheduler.add(fine)
    step = scheduler.schedule()
    assert step.num_tokens == 4
    caches = [manager.cache(request.request_id) for request in step.requests]
    manager.step_begin(caches)
    with pytest.raises(LogicError, match="'lost' is LOST"):
        manager.block_tables(caches, "kv")
    assert scheduler.drop_lost(step) == [lost]
    assert scheduler.drop_lost(step) == []
    assert ([*step.requests], step.num_tokens, step.recompute) == ([fine], 3, [lost])
    assert lost.state == "WAITING"
    manager.step_end(caches)
    assert scheduler.update(step, outputs_of(step)) == [fine]
    with pytest.raises(LogicError, match="outstanding"):
        scheduler.update(step, {})
    step = scheduler.schedule()
    assert [*step.requests] == [lost]
    assert scheduler.update(step, outputs_of(step)) == [lost]


def test_an_emptied_step_of_another_scheduler_takes_nothing_back(make: World) -> None:
    mine, other = make()[0].scheduler, make()[0].scheduler
    steps = []
    for scheduler in (mine, other):
        scheduler.add(Request("lost", [*A[:6], 90], 1))
        steps.append(scheduler.schedule())
        (manager,) = (side.manager for side in scheduler.memory.sides)
        caches = [manager.cache("lost")]
        manager.step_begin(caches)
        scheduler.drop_lost(steps[-1])
        manager.step_end(caches)
    assert steps[0].number == steps[1].number
    mine.update(steps[1], {})
    assert mine._steps
    for scheduler, step in ((mine, steps[0]), (other, steps[1])):
        scheduler.update(step, {})
        assert not scheduler._steps
        last = scheduler.schedule()
        assert len(scheduler.update(last, outputs_of(last))) == 1


def test_who_is_found_lost_by_a_pass_is_under_recompute_and_waits_for_the_next_one(make: World) -> None:
    engine, _, (manager,) = make()
    scheduler = engine.scheduler
    lost, fine = Request("lost", [*A[:6], 90], 1), Request("fine", [70, 71, 72], 1)
    scheduler.add(lost)
    scheduler.add(fine)
    step = scheduler.schedule()
    scheduler.abandon(step)  # it was not launched; the copy of it fails meanwhile
    manager.pages("kv")
    step = scheduler.schedule()
    assert step.recompute == [lost]
    assert lost.state == "WAITING"
    assert [chunk.request for chunk in step.context] == [fine]
    scheduler.update(step, outputs_of(step))
    step = scheduler.schedule()
    assert (step.recompute, [chunk.request for chunk in step.context]) == ([], [lost])
    assert scheduler.update(step, outputs_of(step)) == [lost]
