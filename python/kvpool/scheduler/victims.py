"""Older wins: who gives way when a started request needs room, and who waits instead.

A started request takes room from younger started ones that are not in this step, not in flight and not fenced: the
newest whose pages all find room below is suspended; if there is none, the newest that has pages where they are missing
is freed, to be computed again. What would fit once steps in flight have ended waits for them. If no younger one is left
the request suspends itself, unless it is alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from kvpool.scheduler.request import Entry, RequestState

if TYPE_CHECKING:
    from kvpool.scheduler.scheduler import Pass, Scheduler


def older_wins(
    scheduler: Scheduler, run: Pass, entry: Entry, lacking: Callable[[], Sequence[int]], attempt: Callable[[], int]
) -> int:
    """Room for a started request that was refused it: what `attempt` returned once it succeeded, else 0.

    lacking: per pool the slots that it is short of.
    """
    run.started_refused = True
    while True:
        short = lacking()
        if _comes_back(scheduler, short):
            run.waiting.add(entry)
            entry.why = "it waits for slots that come back when the steps in flight have ended" + _numbers(
                scheduler, short
            )
            return 0
        if not _give_way(scheduler, run, entry, short):
            break
        if done := attempt():
            return done
    entry.why = "there is no room, and no younger request is left to give way" + _numbers(scheduler, short)
    in_use = (scheduler.is_busy(run, other) or scheduler.memory.is_fenced(other) for other in scheduler.younger(entry))
    if any(in_use):
        run.waiting.add(entry)
        entry.why += "; it waits for a younger one in flight"
    elif len(scheduler.started) > 1 and entry.request.state is RequestState.RUNNING:
        scheduler.suspend(run, entry, "itself: " + entry.why)
    return 0


def _numbers(scheduler: Scheduler, short: Sequence[int]) -> str:
    names = scheduler.memory.names()
    missing = [f"{name} lacks {n} slots" for name, n in zip(names, short, strict=True) if n]
    return f" ({', '.join(missing)})" if missing else ""


def _comes_back(scheduler: Scheduler, short: Sequence[int]) -> bool:
    """Whether all that is missing returns with the steps in flight."""
    pressure = scheduler.memory.pressure()
    return any(short) and all(n <= returning for n, (_, returning) in zip(short, pressure, strict=True))


def candidates(scheduler: Scheduler, run: Pass, entry: Entry) -> Iterator[Entry]:
    """Younger started requests that may give way, the newest first."""
    for other in scheduler.younger(entry):
        if not scheduler.is_busy(run, other) and not scheduler.memory.is_fenced(other):
            yield other


def _give_way(scheduler: Scheduler, run: Pass, entry: Entry, short: Sequence[int]) -> bool:
    """One younger request gives way. False: there is none."""
    younger = list(candidates(scheduler, run, entry))
    why = f"it gave way to the older request {entry.request.request_id!r}"
    if scheduler.memory.tiered:
        for other in younger:
            if other.request.state is not RequestState.RUNNING:
                continue
            pages = scheduler.memory.below(other)
            if pages is not None and any(n and moved for n, moved in zip(short, pages, strict=True)):
                scheduler.suspend(run, other, why)
                return True
    victims = _worth_freeing(scheduler, younger, short)
    if not victims:
        return False
    victim = victims[0]
    if scheduler.config.victim == "cheapest":
        victim = min(victims, key=lambda other: (other.request.num_computed, -other.age))
    scheduler.recompute(run, victim, why)
    scheduler.outlook.recomputed()
    if scheduler.bulk:
        scheduler.bulk.gave_way(run, victim, entry)
    return True


def _worth_freeing(scheduler: Scheduler, candidates: Sequence[Entry], short: Sequence[int]) -> list[Entry]:
    """Those that have pages on the device where they are missing, if possible pages that nobody else claims.

    Pages of suspended requests count only where the host has no room for them: otherwise they make room anyhow, and to
    free them would give nothing.
    """
    some, own = [], []
    stuck = scheduler.memory.stuck()
    for other in candidates:
        suspended = other.request.state is RequestState.SUSPENDED
        pools = zip(short, scheduler.memory.holds(other), stuck, strict=True)
        pages = [both for n, both, rest in pools if (n or not any(short)) and (rest or not suspended)]
        if any(alone for _, alone in pages):
            own.append(other)
        elif any(here for here, _ in pages):
            some.append(other)
    return own or some
