"""Who of those that wait is looked at in a pass, and who is not because nothing can have changed for it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import pytest

from kvpool import Scheduler, SchedulerConfig
from kvpool.scheduler.memory import Memory
from kvpool.scheduler.request import RETRY
from test_scheduler import manager_of, one_step, request_of

Asked = list[list[int | str]]


@pytest.fixture
def asked() -> Iterator[Asked]:
    """Ids of those whose claims are tried, by call."""
    calls: Asked = []
    claim = Memory.claim

    def noted(self: Memory, entries: Any, unit: int | None, budget: int) -> Any:
        calls.append([entry.request.request_id for entry in entries])
        return claim(self, entries, unit, budget)

    with patch.object(Memory, "claim", noted):
        yield calls


def crowded(waiting: int = 3) -> Scheduler:
    """Request 0 has 10 of 26 slots and grows to 25; those that wait need 20 each."""
    scheduler = Scheduler(manager_of(26), SchedulerConfig(8, 128))
    scheduler.add(request_of(0, 40, 60))
    one_step(scheduler)
    for number in range(1, 1 + waiting):
        scheduler.add(request_of(number, 80, 1))
    return scheduler


def test_those_who_would_be_refused_again_are_not_asked_and_a_newcomer_is(asked: Asked) -> None:
    scheduler = crowded()
    asked.clear()
    one_step(scheduler)
    assert asked == [[1, 2, 3]]
    one_step(scheduler)
    assert asked == [[1, 2, 3]]
    scheduler.add(request_of(4, 80, 1))
    one_step(scheduler)
    assert asked == [[1, 2, 3], [4]]
    scheduler.cancel(2)
    scheduler.add(request_of(5, 4, 1))
    step, _ = one_step(scheduler)
    assert asked[2:] == [[5]]
    assert [chunk.request.request_id for chunk in step.context] == [5]
    assert [entry.bypassed for entry in scheduler.waiting()] == [1, 1, 1]


def test_all_are_asked_when_one_has_ended_and_after_retry_passes_in_one_pass(asked: Asked) -> None:
    scheduler = crowded()
    one_step(scheduler)
    asked.clear()
    passes = 0
    while not asked:
        one_step(scheduler)
        passes += 1
    assert (asked, passes) == ([[1, 2, 3]], RETRY)
    asked.clear()
    scheduler.cancel(0)
    one_step(scheduler)
    assert asked[0] == [1, 2, 3]


def test_who_was_not_reached_is_when_some_before_it_have_gone(asked: Asked) -> None:
    """A pass gives up after 16 refusals: the next ones are looked at once there are fewer before them."""
    scheduler = crowded(40)
    asked.clear()
    one_step(scheduler)
    looked = [number for batch in asked for number in batch]
    assert 16 <= len(looked) < 32
    asked.clear()
    one_step(scheduler)
    assert asked == []
    for number in looked[15:]:
        scheduler.cancel(number)
    one_step(scheduler)
    assert asked[0][0] == looked[-1] + 1


def test_a_pass_does_not_touch_every_waiting_request() -> None:
    """With 4,000 waiting as few of them are looked at as with 40."""
    looked = []
    for waiting in (40, 4000):
        scheduler = Scheduler(manager_of(8), SchedulerConfig(8, 64))
        for number in range(waiting):
            scheduler.add(request_of(number, 15, 12))
        scheduler.schedule()
        looked.append(sum(entry.why != "it has not been looked at yet" for entry in scheduler.waiting()))
    assert looked[0] == looked[1] <= 32
