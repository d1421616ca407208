"""One pass, in three phases: generations, contexts of started requests, first chunks of waiting ones.

Token budget and pages are decided together. Within each phase the oldest goes first.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from kvpool._core import Allocation
from kvpool.scheduler.config import SchedulerConfig
from kvpool.scheduler.memory import first_chunk
from kvpool.scheduler.request import NOT_LOOKED_AT, Entry, RequestState
from kvpool.scheduler.starts import start_waiting
from kvpool.scheduler.step import Step
from kvpool.scheduler.victims import older_wins

if TYPE_CHECKING:
    from kvpool.scheduler.scheduler import Scheduler


_IS_LAST = attrgetter("is_last")


class Pass:
    """What one pass has decided so far."""

    def __init__(
        self,
        config: SchedulerConfig,
        number: int,
        busy: frozenset[int | str],
        world: list[Entry] | None,
        patient: bool = False,
    ) -> None:
        self.step = Step(number)
        self.busy = busy  # ids in flight elsewhere
        self.world = world  # None: all that were added
        self.tokens = config.max_num_tokens  # left
        self.places = config.max_batch_size  # requests that the step has room for
        self.gone: list[int] = []  # ages of those that gave way in this pass
        self.waiting: set[Entry] = set()  # started ones that wait for what is in flight
        self.started_refused = False
        self.patient = patient  # all that wait are looked at, not only some
        self.gave_up = False  # some that wait were not looked at because enough were refused
        self.waits = False  # whether a waiting request was looked at and not started

    def gave_way(self, entry: Entry) -> None:
        """Suspended or freed: it is not provided in this pass."""
        self.gone.append(entry.age)

    def serve(self, tokens: int, requests: int = 1) -> None:
        """So much more is in the step."""
        self.step.num_tokens += tokens
        self.tokens -= tokens
        self.places -= requests


def run_pass(scheduler: Scheduler, run: Pass) -> None:
    """Fills `run.step`."""
    if scheduler.bulk:
        scheduler.bulk.go_on(run)
    _generations(scheduler, run)
    _contexts(scheduler, run)
    if not run.started_refused:
        start_waiting(scheduler, run)
    step = run.step
    step.generation = scheduler.memory.roster.requests(step.number)
    if scheduler.adapters:
        step.generation.sort(key=lambda request: adapter_order(request.lora_id))
        step.context.sort(key=lambda chunk: adapter_order(chunk.request.lora_id))
    step.context.sort(key=_IS_LAST)


# -- generations ------------------------------------------------------------------------------------


def _generations(scheduler: Scheduler, run: Pass) -> None:
    first = 0
    while True:
        found = _allocate(scheduler, run, run.places, first)
        if found.short_of_tokens:
            run.started_refused = True
        if found.refused is None:
            return
        entry = scheduler.of_age(found.refused)
        if not _make_room_for(scheduler, run, entry) and entry not in run.waiting:
            return  # it has suspended itself, or is still suspended: later ones are not looked at
        first = entry.age + 1


def _allocate(scheduler: Scheduler, run: Pass, places: int, first: int) -> Allocation:
    found = scheduler.memory.allocate(run.step.number, run.tokens, places, run.gone, run.busy, first)
    for age in found.resumed:
        scheduler.of_age(age).request.state = RequestState.RUNNING
    run.serve(found.tokens, found.count)
    return found


def _make_room_for(scheduler: Scheduler, run: Pass, entry: Entry) -> int:
    memory = scheduler.memory
    return older_wins(
        scheduler,
        run,
        entry,
        lambda: memory.lacking(entry, entry.request.generation_tokens, memory.nothing),
        lambda: _allocate(scheduler, run, 1, entry.age).count,
    )


# -- contexts of started requests -----------------------------------------------------------------------


def _contexts(scheduler: Scheduler, run: Pass) -> None:
    for entry in list(scheduler.contexts):
        if run.places <= 0:
            return
        if not scheduler.may_run(run, entry):
            continue
        rest = entry.rest
        unit = min(scheduler.config.chunk_tokens or rest, rest)
        if run.tokens < unit:
            run.started_refused = True
            entry.why = f"the step has {run.tokens} tokens left for its chunk of {unit}"
            continue
        want = first_chunk(rest, run.tokens, unit)
        if tokens := _provide_chunk(scheduler, run, entry, want, unit):
            scheduler.serve_context(run, entry, tokens)


def _provide_chunk(scheduler: Scheduler, run: Pass, entry: Entry, want: int, unit: int) -> int:
    """Tokens of a later chunk that got its pages, at the cost of younger requests if need be; 0: none."""
    memory = scheduler.memory

    def attempt(tokens: int) -> int:
        leave, own = reserved(scheduler, entry)
        if any(n < keep + more for (n, _), keep, more in zip(memory.pressure(), leave, own, strict=True) if more):
            return 0
        return memory.provide([(entry, tokens, unit)], leave)[0]

    def lacking() -> Sequence[int]:
        leave, own = reserved(scheduler, entry)
        pages = memory.lacking(entry, unit, leave)
        rooms = zip(pages, leave, own, memory.pressure(), strict=True)
        return [max(n, keep + more - room if more else 0) for n, keep, more, (room, _) in rooms]

    return attempt(want) or older_wins(scheduler, run, entry, lacking, lambda: attempt(unit))


def reserved(scheduler: Scheduler, entry: Entry) -> tuple[Sequence[int], Sequence[int]]:
    """Decode slots of each windowed pool that a later chunk must leave: for the other started requests; for itself.

    The oldest started request need not leave any: it takes what it lacks from the others anyhow.
    """
    memory = scheduler.memory
    if not memory.reserves or scheduler.started[0] is entry:
        return memory.nothing, memory.nothing
    others = memory.roster.debts(memory.decode_slots, entry.age)
    own = [both - other for both, other in zip(memory.roster.debts(memory.decode_slots), others, strict=True)]
    return others, own


def adapter_order(adapter: Any) -> tuple[int, Any]:
    """Sort key of adapters: none first, then numbers, then names."""
    if adapter is None:
        return 0, 0
    return (1, adapter) if isinstance(adapter, int) else (2, adapter)


def why_not(scheduler: Scheduler, entry: Entry) -> str:
    """Why a request that has not ended is not in the last step."""
    request = entry.request
    name = f"request {request.request_id!r}"
    if scheduler._lock.acquire(blocking=False):  # where a pass runs just now the roster is that one's
        try:
            if entry.started and scheduler.memory.roster.in_step(entry.age):
                return f"{name} is in a step in flight"
        finally:
            scheduler._lock.release()
    if entry.started and entry.generates and request.state is RequestState.RUNNING and entry not in scheduler.held_up:
        return f"{name} is RUNNING: older requests used up the tokens or places of the step"
    if not entry.started and scheduler.bulk and scheduler.bulk.keeps_out:
        return f"{name} is WAITING: memory ran short, and nobody starts before a request has ended"
    if entry.why == NOT_LOOKED_AT:
        return f"{name} is {request.state.value}: {entry.why}: {_why_not_looked_at(scheduler, entry)}"
    return f"{name} is {request.state.value}: {entry.why}"


def _why_not_looked_at(scheduler: Scheduler, entry: Entry) -> str:
    """What kept the last pass from looking at a waiting request."""
    config, last = scheduler.config, scheduler._last
    if last is None or entry.age < 0:
        return "there was no pass since it came"
    if len(last.context) + len(last.generation) >= config.max_batch_size:
        return f"the last step was full with max_batch_size = {config.max_batch_size} requests"
    if last.num_tokens >= config.max_num_tokens:
        return f"the last step used up max_num_tokens = {config.max_num_tokens}"
    if len(scheduler.started) >= config.most_started:
        return f"max_started = {config.most_started} requests are started"
    return "older requests were refused, and go first"


def why_stalled(scheduler: Scheduler) -> str:
    """Who waits for what when nothing can ever run, and who holds pages outside the scheduler."""
    waits = itertools.islice(itertools.chain(scheduler.started, scheduler.waiting()), 8)
    parts = [f"request {entry.request.request_id!r}: {entry.why}" for entry in waits]
    mine = {entry.request.request_id for entry in scheduler.started}
    strangers = [repr(request_id) for request_id in scheduler.memory.open() if request_id not in mine]
    outside = f"; claims of caches outside the scheduler: {', '.join(strangers)}" if strangers else ""
    return f"nothing runs, nothing is in flight, and nothing ever can: {'; '.join(parts)}{outside}"
