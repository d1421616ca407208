"""The scheduler's surface: limits, order, reservations, drafts, adapters, errors; the engine around it."""

from __future__ import annotations

import threading
from typing import Any

import pytest

import backend
from kvpool import (
    AdapterBudget,
    CacheConfig,
    ConfigError,
    Engine,
    KVCacheManager,
    LogicError,
    PoolConfig,
    PoolPlan,
    Request,
    RequestTooLargeError,
    Scheduler,
    SchedulerConfig,
    Scope,
    StalledError,
    Step,
)


def manager_of(slots: int | list[int] = 8, pools: list[PoolConfig] | None = None, **config: Any) -> KVCacheManager:
    pools = pools or [PoolConfig("kv", 8)]
    host, t = config.pop("host", 0), config.pop("t", 4)
    names = [pool.name for pool in pools]
    given = [slots] if isinstance(slots, int) else slots
    plan = PoolPlan(dict.fromkeys(names, 1), dict(zip(names, given, strict=True)), dict.fromkeys(names, host), 1 << 30)
    return KVCacheManager(CacheConfig(t, pools, 1 << 30, hash_seed=1, **config), backend.books(), plan=plan)


def request_of(number: int, prompt: int, new: int, **more: Any) -> Request:
    return Request(number, [1000 * number + i for i in range(prompt)], new, **more)


def outputs_of(step: Step, tokens: list[int] | None = None) -> dict[Any, list[int]]:
    due = [chunk.request for chunk in step.context if chunk.is_last] + step.generation
    return {request.request_id: list(tokens or [7]) for request in due}


class Executor:
    def execute(self, step: Step) -> dict[Any, list[int]]:
        return outputs_of(step)


def one_step(scheduler: Scheduler) -> tuple[Step, list[Request]]:
    step = scheduler.schedule()
    return step, scheduler.update(step, outputs_of(step))


# -- requests -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({"tokens": [], "max_new_tokens": 1}, "tokens: empty"),
        ({"tokens": [1], "max_new_tokens": 0}, "max_new_tokens: 0"),
        ({"tokens": [-1], "max_new_tokens": 1}, "tokens: -1"),
        ({"tokens": [1], "max_new_tokens": 1, "draft_tokens": -1}, "draft_tokens"),
        ({"tokens": [1], "max_new_tokens": 1, "lora_id": 1, "scope": Scope(lora_id=2)}, "scope.lora_id: 2"),
        ({"tokens": [1], "max_new_tokens": 1, "retention": 5}, "retention: 5"),
    ],
)
def test_a_request_that_makes_no_sense_is_refused_at_construction(given: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        Request(0, **given)


def test_a_request_begins_waiting_and_ends_with_a_reason() -> None:
    scheduler = Scheduler(manager_of(), SchedulerConfig(4, 64))
    length, stop = request_of(0, 5, 2), request_of(1, 3, 9, stop_token_ids=[7])
    assert (length.state, length.num_computed, length.finish_reason) == ("WAITING", 0, None)
    scheduler.add(length)
    scheduler.add(stop)
    _, ended = one_step(scheduler)
    assert ended == [stop]
    assert (stop.state, stop.finish_reason, stop.output_tokens) == ("FINISHED", "stop", [7])
    assert (length.state, length.num_computed, length.output_tokens) == ("RUNNING", 5, [7])
    step, ended = one_step(scheduler)
    assert step.generation == [length]
    assert ended == [length]
    assert (length.finish_reason, length.num_computed, length.error) == ("length", 6, None)
    assert not scheduler.has_work
    scheduler.manager.check()


@pytest.mark.parametrize(
    ("config", "request_", "match", "needed"),
    [
        (SchedulerConfig(4, 64), request_of(0, 30, 4), r"request 0 needs 9 slots of pool 'kv' .*8", 9),
        (SchedulerConfig(4, 16), request_of(0, 16, 2), "17 tokens in a step.*max_num_tokens has 16", 17),
        (SchedulerConfig(4, 16, 4), request_of(0, 12, 20), "9|8 slots", 8),
        (SchedulerConfig(4, 2, 1), request_of(0, 2, 2, draft_tokens=2), "3 tokens in a step", 3),
    ],
)
def test_what_cannot_run_alone_is_refused_with_the_numbers(
    config: SchedulerConfig, request_: Request, match: str, needed: int
) -> None:
    scheduler = Scheduler(manager_of(7 if needed == 8 else 8, draft_tokens=2), config)
    with pytest.raises(RequestTooLargeError, match=match) as refused:
        scheduler.add(request_)
    assert refused.value.needed == needed > refused.value.available
    assert not scheduler.has_work


def test_max_seq_len_and_drafts_are_limits_of_the_manager() -> None:
    scheduler = Scheduler(manager_of(max_seq_len=16, draft_tokens=1), SchedulerConfig(4, 64))
    with pytest.raises(RequestTooLargeError, match="17 tokens in all"):
        scheduler.add(request_of(0, 10, 7))
    with pytest.raises(ConfigError, match="draft_tokens: 2"):
        scheduler.add(request_of(0, 2, 2, draft_tokens=2))


def test_config_errors_name_the_field() -> None:
    with pytest.raises(ConfigError, match="chunk_tokens: 9 is above max_num_tokens = 8"):
        SchedulerConfig(1, 8, 9)
    with pytest.raises(ConfigError, match="max_batch_size: 0"):
        SchedulerConfig(0, 8)
    with pytest.raises(ConfigError, match="victim: 'oldest'"):
        SchedulerConfig(1, 8, victim="oldest")
    with pytest.raises(ConfigError, match="admission: 'greedy' is none of latency, throughput"):
        SchedulerConfig(1, 8, admission="greedy")
    manager = manager_of()
    with pytest.raises(ConfigError, match="draft_manager"):
        Scheduler(manager, SchedulerConfig(1, 8), manager)


# -- both ways to call schedule ---------------------------------------------------------------------------


def test_a_list_is_the_whole_world() -> None:
    scheduler = Scheduler(manager_of(), SchedulerConfig(4, 64))
    first, second, large = request_of(0, 4, 2), request_of(1, 4, 2), request_of(2, 400, 2)
    step = scheduler.schedule([second, large])
    assert [chunk.request for chunk in step.context] == [second]
    ((refused, error),) = step.refused
    assert (refused, large.state, large.finish_reason) == (large, "FINISHED", "error")
    assert error is large.error
    assert isinstance(error, RequestTooLargeError)
    assert scheduler.update(step, outputs_of(step)) == []
    with pytest.raises(LogicError, match="1 is started and not in the list"):
        scheduler.schedule([first])
    step = scheduler.schedule([first, second, large])
    assert step.generation == [second]
    assert [chunk.request for chunk in step.context] == [first]
    assert step.refused == []
    with pytest.raises(LogicError, match="listed twice"):
        scheduler.schedule([first, first])


def test_age_is_the_order_in_which_requests_were_seen_first() -> None:
    scheduler = Scheduler(manager_of(2), SchedulerConfig(1, 64))
    a, b = request_of(0, 4, 1), request_of(1, 4, 1)
    for listed in ([a, b], [b, a]):
        step = scheduler.schedule(listed)
        assert [chunk.request for chunk in step.context] == [listed[0] if listed[0] is a else b]
        scheduler.update(step, outputs_of(step))


def test_ids_in_use_and_requests_of_others_are_refused() -> None:
    scheduler = Scheduler(manager_of(), SchedulerConfig(4, 64))
    request = request_of(0, 4, 1)
    scheduler.add(request)
    with pytest.raises(LogicError, match="0"):
        scheduler.add(request)
    with pytest.raises(LogicError, match="0 is in use"):
        scheduler.add(request_of(0, 5, 1))
    with pytest.raises(LogicError, match="another scheduler"):
        Scheduler(manager_of(), SchedulerConfig(4, 64)).schedule([request])
    one_step(scheduler)
    again = request_of(0, 4, 1)
    scheduler.add(again)
    step, ended = one_step(scheduler)
    assert step.context[0].start == 3, "the last prompt token is never reused"
    assert ended == [again]


# -- the pass ---------------------------------------------------------------------------------------------


def test_chunks_are_multiples_of_the_unit_within_the_budget_after_the_actual_claim() -> None:
    scheduler = Scheduler(manager_of(20), SchedulerConfig(4, 10, 4))
    scheduler.add(request_of(0, 19, 2))
    steps = []
    while scheduler.has_work:
        step, _ = one_step(scheduler)
        steps.append([(chunk.start, chunk.num_tokens, chunk.is_last) for chunk in step.context])
    assert steps == [[(0, 8, False)], [(8, 8, False)], [(16, 3, True)], []]
    scheduler.add(Request(1, [*range(19), 5], 1))
    step = scheduler.schedule()
    assert [(chunk.start, chunk.num_tokens) for chunk in step.context] == [(19, 1)]


def test_order_of_the_output_is_by_adapter_and_last_chunks_come_last() -> None:
    scheduler = Scheduler(manager_of(40), SchedulerConfig(8, 22, 4))
    for number, adapter in enumerate(["b", 2, None, "a", 1]):
        scheduler.add(request_of(number, 4, 4, lora_id=adapter))
    scheduler.add(request_of(9, 8, 2))
    step = scheduler.schedule()
    assert [chunk.request.lora_id for chunk in step.context] == [None, 1, 2, "a", "b"]
    scheduler.update(step, outputs_of(step))
    step = scheduler.schedule()
    assert [request.lora_id for request in step.generation] == [None, 1, 2, "a", "b"]
    assert scheduler.update(step, outputs_of(step)) == []


def test_adapters_are_counted_once_and_held_until_the_end() -> None:
    budget = AdapterBudget({"a": 2, "b": 2, "c": 9}, 3)
    scheduler = Scheduler(manager_of(40), SchedulerConfig(8, 64, adapters=budget))
    for number, adapter in enumerate(["a", "a", "b", None]):
        scheduler.add(request_of(number, 4, 2, lora_id=adapter))
    with pytest.raises(RequestTooLargeError, match="9 pages for adapter 'c'"):
        scheduler.add(request_of(7, 4, 2, lora_id="c"))
    with pytest.raises(ConfigError, match="lora_id: 'd'"):
        scheduler.add(request_of(8, 4, 2, lora_id="d"))
    step, _ = one_step(scheduler)
    assert [chunk.request.request_id for chunk in step.context] == [3, 0, 1]
    assert "adapter 'b' needs 2 pages, 1 are left" in scheduler.explain(2)
    one_step(scheduler)
    step, _ = one_step(scheduler)
    assert [chunk.request.request_id for chunk in step.context] == [2]


def test_drafts_are_verified_and_clipped_at_the_end() -> None:
    scheduler = Scheduler(manager_of(20, draft_tokens=3), SchedulerConfig(4, 64))
    request = request_of(0, 4, 7, draft_tokens=3)
    scheduler.add(request)
    step, _ = one_step(scheduler)
    assert step.num_tokens == 4, "contexts count no drafts"
    step = scheduler.schedule()
    assert (step.num_tokens, step.generation_tokens) == (4, [4])
    scheduler.update(step, {0: [1, 2, 3]})
    assert request.num_computed == scheduler.manager.cache(0).num_committed_tokens == 7
    step = scheduler.schedule()
    assert step.num_tokens == 3, "capacity ends at prompt + max_new_tokens - 1"
    assert scheduler.manager.cache(0).capacity == 10
    assert scheduler.update(step, {0: [4, 5, 6]}) == [request]
    assert request.output_tokens == [7, 1, 2, 3, 4, 5, 6]


def test_sampled_tokens_are_never_committed_before_they_are_computed() -> None:
    scheduler = Scheduler(manager_of(20), SchedulerConfig(4, 64))
    request = request_of(0, 3, 6)
    scheduler.add(request)
    for length in range(3, 9):
        one_step(scheduler)
        if request.state != "FINISHED":
            assert scheduler.manager.cache(0).num_committed_tokens == length == request.num_computed
            assert len(request.output_tokens) == length - 2
            assert list(request.token_slice(2, length + 1)) == [2, *request.output_tokens]


# -- reservations: TensorRT-LLM's table of windows ------------------------------------------------------------

WINDOWS = [PoolConfig("w128", 8, window=128), PoolConfig("full", 8), PoolConfig("w8", 8, window=8)]


def test_64_decodes_that_straddle_a_block_edge_run_together_with_the_sliding_reservation() -> None:
    manager = manager_of([128, 539, 128], WINDOWS, t=256, max_batch_size=64, decode_reservation="sliding")
    scheduler = Scheduler(manager, SchedulerConfig(64, 64 * 255))
    for number in range(64):
        scheduler.add(request_of(number, 255, 6))
    one_step(scheduler)
    for _ in range(5):
        step, _ = one_step(scheduler)
        assert len(step.generation) == 64
    assert scheduler.stats.suspended == scheduler.stats.recomputed == 0


@pytest.mark.parametrize("mode", ["aligned", "none"])
@pytest.mark.parametrize("host", [0, 600])
def test_with_one_windowed_slot_more_than_the_floor_requests_give_way_and_everything_finishes(
    mode: str, host: int
) -> None:
    manager = manager_of([65, 539, 65], WINDOWS, t=256, max_batch_size=64, decode_reservation=mode, host=host)
    scheduler = Scheduler(manager, SchedulerConfig(64, 64 * 255))
    scheduler.outlook.expect(0.0)
    engine = Engine(scheduler, Executor())
    for number in range(64):
        engine.submit(request_of(number, 255, 6))
    ended = engine.run()
    assert [len(request.output_tokens) for request in ended.values()] == [6] * 64
    if host:
        assert scheduler.stats.suspended > 0
    manager.check()


def test_a_context_leaves_the_reserved_decode_slots() -> None:
    """Three decodes are to slide over a block edge: a long context may not take their second slots."""
    pools = [PoolConfig("full", 8), PoolConfig("window", 8, window=4)]
    manager = manager_of([60, 12], pools, max_batch_size=4, decode_reservation="sliding")
    scheduler = Scheduler(manager, SchedulerConfig(4, 64, 4))
    for number in range(3):
        scheduler.add(request_of(number, 4, 12))
    one_step(scheduler)
    scheduler.add(request_of(9, 60, 2))
    while scheduler.has_work:
        step, _ = one_step(scheduler)
        assert not step.suspended
        assert not step.recompute


# -- draft model ------------------------------------------------------------------------------------------------


def test_a_draft_models_caches_live_and_die_with_the_targets() -> None:
    target, draft = manager_of(6, host=2), manager_of(9, host=20)
    scheduler = Scheduler(target, SchedulerConfig(8, 64), draft)
    scheduler.outlook.expect(0.0)
    for number in range(4):
        scheduler.add(request_of(number, 5, 12))
    while scheduler.has_work:
        _step, _ = one_step(scheduler)
        for manager in (target, draft):
            manager.check()
        assert set(target._caches) == set(draft._caches)
        for request_id, cache in target._caches.items():
            assert (cache.state, cache.capacity) == (draft.cache(request_id).state, draft.cache(request_id).capacity)
    assert scheduler.stats.suspended + scheduler.stats.recomputed > 0


def test_reuse_with_a_draft_model_is_the_smaller_of_the_two_matches() -> None:
    target, draft = manager_of(20), manager_of(20)
    for manager, cached in ((target, 11), (draft, 6)):
        cache = manager.create("fill", list(range(cached)))
        assert cache.resume()
        assert cache.resize(12)
        cache.commit(list(range(cached)) + [50] * (12 - cached))
        cache.close()
    scheduler = Scheduler(target, SchedulerConfig(8, 64), draft)
    scheduler.add(Request(0, list(range(20)), 2))
    step = scheduler.schedule()
    assert step.context[0].start == 6
    assert [manager.cache(0).history_length for manager in (target, draft)] == [6, 6]


# -- cancel, errors, explain --------------------------------------------------------------------------------------


def test_cancel_at_any_state() -> None:
    manager = manager_of(6, host=6)
    scheduler = Scheduler(manager, SchedulerConfig(8, 64))
    scheduler.outlook.expect(0.0)
    requests = [request_of(number, 7, 12) for number in range(4)]
    for request in requests:
        scheduler.add(request)
    assert scheduler.cancel(3)
    assert requests[3].state == "FINISHED"
    assert not scheduler.cancel(3)
    assert not scheduler.cancel("unknown")
    seen = set()
    ended = []
    while scheduler.has_work:
        step = scheduler.schedule()
        if step.suspended and "SUSPENDED" not in seen:
            seen.add("SUSPENDED")
            assert scheduler.cancel(step.suspended[0].request_id)
        elif step.generation and "in flight" not in seen:
            seen.add("in flight")
            cache = [manager.cache(step.generation[0].request_id)]
            manager.step_begin(cache)
            assert scheduler.cancel(step.generation[0].request_id)
            assert cache[0].state == "CLOSED"
            manager.step_end(cache)
        ended += scheduler.update(step, outputs_of(step))
        manager.check()
    assert seen == {"SUSPENDED", "in flight"}
    assert {request.finish_reason for request in ended} == {"cancelled", "length"}
    assert {request.request_id for request in ended} == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("bad", "match"),
    [
        ({}, "no tokens"),
        ({1: []}, "no tokens|0 tokens"),
        ({1: [1, 2]}, "2 tokens where 1 to 1 are due"),
        ({1: ["x"]}, "not a list of tokens"),
        ({1: [-1]}, "0..2"),
        ({1: 5}, "not a list of tokens"),
    ],
)
@pytest.mark.parametrize("generation", [False, True])
def test_a_result_that_is_wrong_fails_that_request_alone(bad: Any, match: str, generation: bool) -> None:
    scheduler = Scheduler(manager_of(20), SchedulerConfig(8, 64))
    for number in range(3):
        scheduler.add(request_of(number, 4, 3))
    if generation:
        one_step(scheduler)
    step = scheduler.schedule()
    (ended,) = scheduler.update(step, {0: [1], 2: [1], **bad})
    assert (ended.request_id, ended.finish_reason) == (1, "error")
    assert isinstance(ended.error, LogicError)
    with pytest.raises(LogicError, match=match):
        raise ended.error
    scheduler.manager.check()
    step, _ = one_step(scheduler)
    assert [request.request_id for request in step.generation] == [0, 2]


def test_tokens_for_a_request_that_is_not_in_the_step_fail_it() -> None:
    scheduler = Scheduler(manager_of(20), SchedulerConfig(1, 64))
    running, waiting = request_of(0, 4, 2), request_of(1, 4, 2)
    scheduler.add(running)
    scheduler.add(waiting)
    step = scheduler.schedule()
    assert scheduler.update(step, {0: [1], 1: [1], "nobody": [1]}) == [waiting]
    assert running.state == "RUNNING"


def test_a_step_is_updated_once_and_by_its_own_scheduler() -> None:
    scheduler, other = (Scheduler(manager_of(), SchedulerConfig(8, 64)) for _ in range(2))
    for one in (scheduler, other):
        one.add(request_of(0, 4, 3))
    step, foreign = scheduler.schedule(), other.schedule()
    with pytest.raises(LogicError, match="not outstanding"):
        scheduler.update(foreign, {})
    assert not scheduler.schedule(), "its request is in flight"
    scheduler.update(step, outputs_of(step))
    with pytest.raises(LogicError, match="not outstanding"):
        scheduler.update(step, {})


def test_in_flight_requests_are_neither_scheduled_nor_victims() -> None:
    scheduler = Scheduler(manager_of(4), SchedulerConfig(8, 64))
    scheduler.outlook.expect(0.0)
    for number in range(2):
        scheduler.add(request_of(number, 4, 8))
    one_step(scheduler)
    step = scheduler.schedule(in_flight=[1])
    assert [request.request_id for request in step.generation] == [0]
    scheduler.update(step, outputs_of(step))
    for _ in range(6):
        step = scheduler.schedule(in_flight=[1])
        assert not step.recompute
        scheduler.update(step, outputs_of(step))


def test_explain_says_why_a_request_did_not_run() -> None:
    scheduler = Scheduler(manager_of(5), SchedulerConfig(8, 64))
    for number in range(2):
        scheduler.add(request_of(number, 8, 9))
    scheduler.schedule()
    assert scheduler.explain(0) == "request 0 is in the last step"
    assert "pool 'kv'" in scheduler.explain(1)
    assert "WAITING" in scheduler.explain(1)
    assert "unknown" in scheduler.explain("nobody")


def test_stalled_error_names_who_waits_and_claims_of_others() -> None:
    manager = manager_of(4)
    outside = manager.create("outside", [])
    assert outside.resume()
    assert outside.resize(12)
    scheduler = Scheduler(manager, SchedulerConfig(8, 64))
    request = request_of(0, 8, 2)
    scheduler.add(request)
    with pytest.raises(StalledError, match=r"request 0: .*outside the scheduler: 'outside'"):
        scheduler.schedule()
    ended = Engine(scheduler, Executor()).run()
    assert ended == {0: request}
    assert isinstance(request.error, StalledError)
    outside.close()
    again = request_of(0, 8, 2)
    scheduler.add(again)
    Engine(scheduler, Executor()).run()
    assert again.finish_reason == "length"


# -- the engine --------------------------------------------------------------------------------------------------------


class Failing(Executor):
    def __init__(self, error: BaseException, at: int) -> None:
        self.error, self.at, self.steps = error, at, 0

    def execute(self, step: Step) -> dict[Any, list[int]]:
        self.steps += 1
        if self.steps == self.at:
            raise self.error
        return outputs_of(step)


def test_an_exception_of_the_executor_fails_the_requests_of_its_step_and_the_engine_goes_on() -> None:
    scheduler = Scheduler(manager_of(20), SchedulerConfig(2, 64))
    error = RuntimeError("the device is gone")
    engine = Engine(scheduler, Failing(error, 2))
    for number in range(4):
        engine.submit(request_of(number, 4, 3))
    ended = engine.run()
    assert [ended[i].error for i in range(4)] == [error, error, None, None]
    assert [ended[i].finish_reason for i in range(4)] == ["error", "error", "length", "length"]
    assert scheduler.manager.stats().pools["kv"]["device"]["active"] == 0
    scheduler.manager.check()


def test_an_interrupt_loses_nothing_and_the_engine_can_go_on() -> None:
    scheduler = Scheduler(manager_of(20), SchedulerConfig(4, 64))
    engine = Engine(scheduler, Failing(KeyboardInterrupt(), 2))
    for number in range(3):
        engine.submit(request_of(number, 4, 3))
    with pytest.raises(KeyboardInterrupt):
        engine.run()
    scheduler.manager.check()
    assert {request.finish_reason for request in engine.run().values()} == {"length"}


def test_what_is_not_a_mapping_fails_the_step() -> None:
    class Wrong(Executor):
        def execute(self, step: Step) -> Any:
            return [1, 2]

    engine = Engine(Scheduler(manager_of(20), SchedulerConfig(4, 64)), Wrong())
    engine.submit(request_of(0, 4, 3))
    (request,) = engine.step()
    assert isinstance(request.error, ValueError)


def test_submit_and_cancel_from_any_thread() -> None:
    scheduler = Scheduler(manager_of(200), SchedulerConfig(16, 256))
    engine = Engine(scheduler, Executor())
    done: dict[Any, Request] = {}
    numbers = range(200)
    refused: list[Exception] = []

    def feed(part: int) -> None:
        for number in numbers[part::4]:
            engine.submit(request_of(number, 5, 4))
            if number % 5 == 0:
                engine.cancel(number)
        try:
            engine.submit(request_of(part, 10**4, 4))
        except (LogicError, RequestTooLargeError) as error:
            refused.append(error)

    threads = [threading.Thread(target=feed, args=(part,)) for part in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads) or scheduler.has_work:
        done.update(engine.run())
    assert sorted(done) == list(numbers)
    assert {done[number].finish_reason for number in numbers if number % 5} == {"length"}
    assert len(refused) == 4
    scheduler.manager.check()
