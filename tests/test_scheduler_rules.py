"""Rules of the scheduler at their edges: what fits alone, who must not start, what is learnt from those that ended."""

from __future__ import annotations

import pytest

from kvpool import (
    AdapterBudget,
    KVCache,
    PoolConfig,
    Request,
    RequestTooLargeError,
    Scheduler,
    SchedulerConfig,
    StalledError,
)
from kvpool.scheduler.admission import Outlook
from test_scheduler import manager_of, one_step, request_of
from test_starts import crowded


def test_an_adapter_may_take_the_whole_budget_and_no_page_more() -> None:
    scheduler = Scheduler(manager_of(), SchedulerConfig(4, 64, adapters=AdapterBudget({"all": 5, "more": 6}, 5)))
    scheduler.add(request_of(0, 4, 1, lora_id="all"))
    with pytest.raises(RequestTooLargeError, match="6 pages for adapter 'more', the adapter budget has 5"):
        scheduler.add(request_of(1, 4, 1, lora_id="more"))
    step, _ = one_step(scheduler)
    assert len(step.context) == 1


def test_nobody_starts_in_a_pass_in_which_a_started_context_lacked_tokens() -> None:
    """The chunk of 4 finds 2 tokens left; a waiting prompt of 2 would fit, and would go past it for ever."""
    scheduler = Scheduler(manager_of(40, draft_tokens=1), SchedulerConfig(8, 10, 4))
    for number in range(4):
        scheduler.add(request_of(number, 1, 9, draft_tokens=1))
    scheduler.add(request_of(4, 30, 1))
    step, _ = one_step(scheduler)
    assert [chunk.num_tokens for chunk in step.context] == [4, 1, 1, 1, 1]
    scheduler.add(request_of(5, 2, 1))
    step, _ = one_step(scheduler)
    assert (len(step.generation), step.context, step.num_tokens) == (4, [], 8)
    assert "2 tokens left for its chunk of 4" in scheduler.explain(4)


def test_behind_one_that_suspends_itself_no_later_generation_is_looked_at() -> None:
    """Of 11 slots the oldest takes the last; the next one gives up its five, and the newest would fit into them."""
    scheduler = Scheduler(manager_of(11, host=20, t=1), SchedulerConfig(8, 64))
    oldest, middle, newest = (request_of(number, prompt, 7) for number, prompt in enumerate((4, 4, 2)))
    for request in (oldest, middle, newest):
        scheduler.add(request)
    one_step(scheduler)
    step, _ = one_step(scheduler)
    assert (step.generation, step.suspended) == ([oldest, middle], [newest])
    step, _ = one_step(scheduler)
    assert (step.generation, step.suspended) == ([oldest], [middle])
    assert "itself" in scheduler.explain(1)
    while scheduler.has_work:
        one_step(scheduler)
    assert {request.finish_reason for request in (oldest, middle, newest)} == {"length"}


def fenced_younger(prompt: int) -> tuple[Scheduler, list[KVCache], list[Request]]:
    """An older request needs a slot; a launched step may still touch the pages of the younger one that has the others.

    So it is in a loop that takes the results before it ends the step on its stream.
    """
    manager = manager_of(4, host=8, t=8)
    scheduler = Scheduler(manager, SchedulerConfig(8, 64))
    requests = [request_of(0, 15, 6), request_of(1, prompt, 6)]
    for request in requests:
        scheduler.add(request)
    one_step(scheduler)
    one_step(scheduler)
    fenced = [manager.cache(1)]
    manager.step_begin(fenced)
    return scheduler, fenced, requests


def test_tokens_for_a_chunk_that_is_not_the_last_fail_that_request_alone() -> None:
    scheduler = Scheduler(manager_of(20), SchedulerConfig(8, 12, 4))
    long, short = request_of(0, 20, 2), request_of(1, 4, 2)
    scheduler.add(short)
    scheduler.add(long)
    step = scheduler.schedule()
    assert [(chunk.request, chunk.is_last) for chunk in step.context] == [(long, False), (short, True)]
    assert scheduler.update(step, {0: [7], 1: [7]}) == [long]
    assert (long.finish_reason, long.output_tokens) == ("error", [])
    assert "for a chunk that is not its last" in str(long.error)
    assert short.output_tokens == [7]
    scheduler.manager.check()


def test_a_request_whose_pages_a_launched_step_may_still_touch_is_no_victim_and_the_older_one_waits() -> None:
    scheduler, fenced, (older, younger) = fenced_younger(9)
    step, _ = one_step(scheduler)
    assert (step.generation, step.suspended, step.recompute) == ([younger], [], [])
    assert scheduler.explain(0).endswith("it waits for a younger one in flight")
    scheduler.manager.step_end(fenced)
    step, _ = one_step(scheduler)
    assert (step.generation, step.suspended) == ([older], [younger])


def test_nobody_is_stalled_while_a_launched_step_may_still_touch_pages() -> None:
    """The younger one lacks a slot too, so nothing can run before the step ends."""
    scheduler, fenced, (older, younger) = fenced_younger(15)
    step, _ = one_step(scheduler)
    assert not step
    assert older not in step.suspended
    scheduler.manager.step_end(fenced)
    step, _ = one_step(scheduler)
    assert step.generation == [older]
    assert younger.state == "SUSPENDED"


def test_an_id_that_is_used_again_waits_for_its_former_pages() -> None:
    manager = manager_of(8)
    scheduler = Scheduler(manager, SchedulerConfig(8, 64))
    scheduler.add(request_of(1, 8, 3))
    one_step(scheduler)
    fenced = [manager.cache(1)]
    manager.step_begin(fenced)
    assert scheduler.cancel(1)
    again = request_of(1, 4, 1)
    scheduler.add(again)
    step, _ = one_step(scheduler)
    assert not step
    assert scheduler.explain(1) == "request 1 is WAITING: its former pages are still in flight"
    manager.step_end(fenced)
    _, ended = one_step(scheduler)
    assert ended == [again]


def test_the_only_started_request_never_suspends_itself() -> None:
    """What it lacks is claimed outside the scheduler; its pages would be of no use to anybody."""
    manager = manager_of(6, host=6, t=1)
    scheduler, request = Scheduler(manager, SchedulerConfig(8, 64)), request_of(0, 3, 4)
    scheduler.add(request)
    one_step(scheduler)
    outside = manager.create("outside", [])
    assert outside.resume()
    assert outside.resize(3)
    with pytest.raises(StalledError, match=r"request 0: there is no room.*'outside'"):
        scheduler.schedule()
    assert (request.state, manager.cache(0).state) == ("RUNNING", "ACTIVE")
    outside.close()
    while scheduler.has_work:
        one_step(scheduler)
    assert request.finish_reason == "length"


def test_the_expected_output_is_the_mean_of_those_that_ended_raised_after_a_recompute() -> None:
    outlook = Outlook()
    assert outlook.share == 1.0
    for produced, mean in ((2, 0.25), (6, 0.5), (4, 0.5)):
        request = request_of(0, 4, 8)
        request.output_tokens = [7] * produced
        outlook.ended(request)
        assert outlook.share == pytest.approx(mean)
    outlook.recomputed()
    raised = outlook.share
    assert raised == pytest.approx(0.75)  # half of the way to 1
    outlook.recomputed()
    assert outlook.share == pytest.approx(0.875)
    outlook.ended(request)
    assert raised < outlook.share < 0.875


def test_nobody_is_stalled_while_a_step_elsewhere_is_in_flight() -> None:
    manager = manager_of(2)
    outside = manager.create("outside", [])
    assert outside.resume()
    assert outside.resize(8)
    scheduler = Scheduler(manager, SchedulerConfig(4, 64))
    scheduler.add(request_of(0, 8, 1))
    assert not scheduler.schedule(in_flight=["elsewhere"])
    with pytest.raises(StalledError):
        scheduler.schedule()


def test_with_nothing_started_the_oldest_need_not_fit_to_its_end() -> None:
    """Another cache, not the scheduler's, has 2 of 6 slots; the request needs 5 in the end, and 2 to start."""
    manager = manager_of(6)
    outside = manager.create("outside", [])
    assert outside.resume()
    assert outside.resize(8)
    scheduler = Scheduler(manager, SchedulerConfig(4, 64))
    for number in range(2):
        scheduler.add(request_of(number, 8, 12))
    step, _ = one_step(scheduler)
    assert [chunk.request.request_id for chunk in step.context] == [0]
    outside.close()
    while scheduler.has_work:
        one_step(scheduler)
    assert scheduler.stats.recomputed == 0


def test_a_tier_below_the_target_alone_is_none_below_both() -> None:
    """Each request comes to need 5 of the draft model's 8 slots, which has nowhere to suspend it to."""
    target, draft = manager_of(40, host=40), manager_of(8)
    scheduler = Scheduler(target, SchedulerConfig(4, 64), draft)
    for number in range(2):
        scheduler.add(request_of(number, 8, 12))
    step, _ = one_step(scheduler)
    assert [chunk.request.request_id for chunk in step.context] == [0]
    assert "'kv' of the draft model" in scheduler.explain(1)
    while scheduler.has_work:
        one_step(scheduler)
    assert scheduler.stats.suspended == scheduler.stats.recomputed == 0


def test_a_recompute_raises_what_the_scheduler_expects() -> None:
    scheduler = Scheduler(manager_of(6), SchedulerConfig(4, 64))
    scheduler.outlook.expect(0.0)
    for number in range(3):
        scheduler.add(request_of(number, 5, 12))
    while not (step := one_step(scheduler)[0]).recompute:
        assert scheduler.outlook.share == 0.0
    assert len(step.recompute) == 1
    assert scheduler.outlook.share == 0.5


def test_a_context_leaves_the_decode_slots_of_others_and_has_room_for_its_own() -> None:
    """Of 3 windowed slots the started request has 2; a first chunk would take the last, and lack its own second one."""
    pools = [PoolConfig("full", 8), PoolConfig("window", 8, window=4)]
    scheduler = Scheduler(manager_of([40, 3], pools, host=40), SchedulerConfig(4, 64, 4))
    scheduler.add(request_of(0, 4, 20))
    one_step(scheduler)
    scheduler.add(request_of(1, 4, 2))
    step, _ = one_step(scheduler)
    assert step.context == []
    assert "'window' keeps 1 decode slots for the started requests, 0 can be had" in scheduler.explain(1)


def test_a_scheduler_learns_from_those_that_ended_by_themselves() -> None:
    """Requests that end at the first of 20 tokens: two may start together that would need 7 slots of 8 each."""
    scheduler = Scheduler(manager_of(8), SchedulerConfig(4, 64))
    together = []
    for number in range(0, 12, 2):
        for one in (number, number + 1):
            scheduler.add(request_of(one, 8, 20, stop_token_ids=[7]))
        step, _ = one_step(scheduler)
        together.append(len(step.context))
        while scheduler.has_work:
            one_step(scheduler)
    assert (together[0], together[-1]) == (1, 2)


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (SchedulerConfig(2, 64, max_started=3), "the last step was full with max_batch_size = 2 requests"),
        (SchedulerConfig(4, 8, max_started=3), "the last step used up max_num_tokens = 8"),
        (SchedulerConfig(4, 64, max_started=2), "max_started = 2 requests are started"),
    ],
)
def test_explain_says_what_kept_the_pass_from_looking_at_a_request(config: SchedulerConfig, why: str) -> None:
    scheduler = Scheduler(manager_of(40), config)
    for number in range(4):
        scheduler.add(request_of(number, 4, 3))
    assert scheduler.explain(3).endswith("it has not been looked at yet: there was no pass since it came")
    scheduler.schedule()
    assert scheduler.explain(1) == "request 1 is in the last step"
    assert scheduler.explain(3) == f"request 3 is WAITING: it has not been looked at yet: {why}"


def test_explain_says_that_older_ones_were_refused() -> None:
    """A pass gives up looking after 16 refusals: the last of 40 was not looked at."""
    scheduler = crowded(40)
    one_step(scheduler)
    assert "not enough room" in scheduler.explain(16)
    assert scheduler.explain(40).endswith("not been looked at yet: older requests were refused, and go first")
