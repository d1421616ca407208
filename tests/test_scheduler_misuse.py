"""The scheduler under bad input, bad luck and other threads: what a review and an attack have found."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from typing import Any

import pytest

from kvpool import (
    AdapterBudget,
    Engine,
    KVCacheManager,
    LogicError,
    Request,
    Scheduler,
    SchedulerConfig,
    Scope,
)
from test_scheduler import Executor, manager_of, one_step, outputs_of, request_of


class Broken(Exception):
    pass


@pytest.mark.parametrize("draft", [False, True], ids=["target", "target and draft"])
def test_a_pass_that_is_broken_off_in_the_kth_copy_leaves_the_next_one_whole(draft: bool) -> None:
    resumed = 0
    for k in range(60):
        managers = [manager_of(6, host=12) for _ in range(1 + draft)]
        scheduler = Scheduler(managers[0], SchedulerConfig(8, 64, 4), managers[1] if draft else None)
        scheduler.outlook.expect(0.0)
        left = k

        def copy(copies: Any, managers: list[KVCacheManager] = managers) -> None:
            nonlocal left
            left -= len(copies)
            if left < 0 <= left + len(copies):
                raise Broken

        for manager in managers:
            manager._copy = copy  # type: ignore[method-assign]
        for number in range(4):
            scheduler.add(Request(number, [1, 2, 3, 4, 5, number], 12))
        ended: list[Request] = []
        broken = 0
        while scheduler.has_work:
            try:
                step = scheduler.schedule()
            except Broken:
                broken += 1
                continue
            for manager in managers:
                manager.check()
            resumed += any(request.state == "SUSPENDED" for request in step.suspended)
            ended += scheduler.update(step, outputs_of(step))
        assert [request.finish_reason for request in ended] == ["length"] * 4
        for manager in managers:
            manager.check()
            assert not manager._caches
        if not broken:
            break
    assert k > 5
    assert resumed


def test_an_epoch_above_the_managers_is_refused_at_add_and_stops_nobody() -> None:
    scheduler = Scheduler(manager_of(20), SchedulerConfig(4, 64), manager_of(20))
    with pytest.raises(ValueError, match="epoch"):
        scheduler.add(request_of(0, 4, 2, scope=Scope(epoch=1)))
    late, fine = request_of(1, 4, 2, scope=Scope(epoch=1)), request_of(2, 4, 2)
    step = scheduler.schedule([late, fine])
    assert [request for request, _ in step.refused] == [late]
    assert [chunk.request for chunk in step.context] == [fine]


def test_outputs_that_are_no_mapping_leave_the_step_outstanding() -> None:
    scheduler = Scheduler(manager_of(20), SchedulerConfig(4, 64))
    scheduler.add(request_of(0, 4, 2))
    step = scheduler.schedule()
    with pytest.raises(ValueError, match="outputs: None"):
        scheduler.update(step, None)  # type: ignore[arg-type]
    assert scheduler.update(step, {0: [1]}) == []


class Unreadable(list[int]):
    def __iter__(self) -> Any:
        raise RuntimeError("the device is gone")


@pytest.mark.parametrize("bad", [[float("inf")], [1.5], "7", Unreadable([1])], ids=["inf", "float", "str", "raises"])
def test_tokens_that_are_no_ints_fail_that_request_alone(bad: Any) -> None:
    scheduler = Scheduler(manager_of(20), SchedulerConfig(4, 64))
    for number in range(3):
        scheduler.add(request_of(number, 4, 3))
    for _ in range(2):
        step = scheduler.schedule()
        ended = scheduler.update(step, {**outputs_of(step), 1: bad})
        if ended:
            assert [request.request_id for request in ended] == [1]
            assert isinstance(ended[0].error, LogicError)
    assert [request.state for request in scheduler.schedule().generation] == ["RUNNING", "RUNNING"]


def test_a_cancel_of_another_thread_is_never_lost() -> None:
    scheduler = Scheduler(manager_of(20), SchedulerConfig(4, 64))
    request = request_of(0, 4, 9)
    scheduler.add(request)
    one_step(scheduler)
    thread = threading.Thread(target=scheduler.cancel, args=(0,))
    thread.start()
    thread.join()
    assert request.state == "RUNNING", "the thread of the scheduler may be launching it"
    step = scheduler.schedule()
    assert (not step, request.finish_reason) == (True, "cancelled")
    assert scheduler.update(step, {}) == [request]


def test_where_nothing_runs_all_that_wait_are_looked_at() -> None:
    """Behind requests that others leave no room for, or whose adapter does not fit, there is one that can run."""
    manager = manager_of(10)
    outside = manager.create("outside", [])
    assert outside.resume()
    assert outside.resize(32)
    scheduler = Scheduler(manager, SchedulerConfig(4, 64))
    for number in range(20):
        scheduler.add(request_of(number, 20, 2))
    scheduler.add(request_of(99, 4, 2))
    assert [chunk.request.request_id for chunk in scheduler.schedule().context] == [99]
    scheduler = Scheduler(
        manager_of(40), SchedulerConfig(4, 64, max_bypass=99, adapters=AdapterBudget({1: 1, 2: 1}, 1))
    )
    scheduler.add(request_of(0, 4, 9, lora_id=1))
    scheduler.schedule()  # in flight, with its adapter
    for number in range(1, 200):
        scheduler.add(request_of(number, 4, 2, lora_id=2))
    scheduler.add(request_of(999, 4, 2))
    assert [chunk.request.request_id for chunk in scheduler.schedule().context] == [999]


def test_a_request_that_does_not_start_takes_no_adapter_from_those_behind_it() -> None:
    manager = manager_of(10)
    outside = manager.create("outside", [])
    assert outside.resume()
    assert outside.resize(28)
    scheduler = Scheduler(manager, SchedulerConfig(4, 64, adapters=AdapterBudget({1: 1, 2: 1}, 1)))
    scheduler.add(request_of(1, 20, 2, lora_id=1))
    scheduler.add(request_of(2, 4, 2, lora_id=2))
    assert [chunk.request.request_id for chunk in scheduler.schedule().context] == [2]


def test_nobody_starts_in_a_pass_in_which_a_generation_lacked_tokens() -> None:
    scheduler = Scheduler(manager_of(40, draft_tokens=3), SchedulerConfig(8, 6))
    for number in range(2):
        scheduler.add(request_of(number, 1, 5, draft_tokens=3))
    one_step(scheduler)
    scheduler.add(request_of(2, 1, 2))
    step = scheduler.schedule()
    assert [request.request_id for request in step.generation] == [0]
    assert step.context == []


@pytest.mark.parametrize("name", ["step_begin", "step_end"])
def test_a_step_ends_whatever_the_manager_raises(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    manager = manager_of(20)
    engine = Engine(Scheduler(manager, SchedulerConfig(4, 64)), Executor())
    real = getattr(manager, name)
    failures = iter([RuntimeError("the device is gone")])

    def once(*given: Any) -> Any:
        for failure in failures:
            raise failure
        return real(*given)

    monkeypatch.setattr(manager, name, once)
    engine.submit(request_of(0, 4, 3))
    (ended,) = engine.step()
    assert isinstance(ended.error, RuntimeError)
    engine.submit(request_of(1, 4, 3))
    assert engine.run()[1].finish_reason == "length"


@pytest.mark.parametrize("when", ["context", "between", "generation"])
def test_a_cache_that_others_close_ends_its_request_alone(when: str) -> None:
    manager = manager_of(20)
    scheduler = Scheduler(manager, SchedulerConfig(4, 64))
    closed, other = request_of(0, 4, 3), request_of(1, 4, 3)
    scheduler.add(closed)
    scheduler.add(other)
    ended: list[Request] = []
    for step_number in range(6):
        step = scheduler.schedule()
        if (when, step_number) in (("context", 0), ("generation", 1)):
            manager.cache(0).close()
        ended += scheduler.update(step, outputs_of(step))
        if when == "between" and step_number == 0:
            manager.cache(0).close()
    assert {request.request_id: request.finish_reason for request in ended} == {0: "error", 1: "length"}
    assert isinstance(closed.error, LogicError)


@pytest.mark.parametrize("given", [{"scope": "x"}, {"scope": "x", "lora_id": 1}, {"stop_token_ids": 5}])
def test_arguments_of_a_wrong_type_name_their_field(given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(given))):
        Request(0, [1], 1, **given)


def test_a_scheduler_that_is_dropped_amid_its_work_goes_with_its_manager() -> None:
    manager = manager_of()
    scheduler = Scheduler(manager, SchedulerConfig(8, 64))
    scheduler.add(request_of(1, 3, 9))
    scheduler.add(request_of(2, 3, 9))
    one_step(scheduler)
    scheduler.schedule()
    gone = [weakref.ref(scheduler), weakref.ref(manager)]
    del scheduler, manager
    gc.collect()
    assert [one() for one in gone] == [None, None]


def test_update_takes_the_step_that_was_handed_out_and_no_copy_of_it() -> None:
    scheduler = Scheduler(manager_of(), SchedulerConfig(8, 64))
    scheduler.add(request_of(1, 3, 1))
    step = scheduler.schedule()
    with pytest.raises(LogicError, match="not outstanding"):
        scheduler.update(copy.copy(step), outputs_of(step))
    assert [request.request_id for request in scheduler.update(step, outputs_of(step))] == [1]
