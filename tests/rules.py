"""The rules of docs/LIVENESS.md, each as a way to leave it out. Test only: nothing in the scheduler knows of this."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from kvpool.scheduler import config, passes, scheduler, starts, victims
from kvpool.scheduler.bulk import Bulk
from kvpool.scheduler.memory import Memory
from kvpool.scheduler.scheduler import Scheduler

Leaving = Callable[[], Any]


@contextmanager
def age() -> Iterator[None]:
    """A request that is freed comes back as the youngest."""
    recompute = Scheduler.recompute

    def younger(self: Scheduler, run: Any, entry: Any, why: str) -> None:
        recompute(self, run, entry, why)
        self._returned.remove(entry)
        self._see(entry)

    with patch.object(Scheduler, "recompute", younger):
        yield


@contextmanager
def fits_alone() -> Iterator[None]:
    """Requests are admitted whatever they need."""
    with patch.object(scheduler, "check_request", lambda *_: None):
        yield


@contextmanager
def nothing_before_the_start() -> Iterator[None]:
    """A waiting request whose start is refused keeps its claim."""

    def keep(self: Any, claim: Any, why: str) -> None:
        self._refuse(claim.entry, why)

    with patch.object(starts._Starts, "_drop", keep):
        yield


@contextmanager
def older_wins() -> Iterator[None]:
    """Nobody gives way to an older request."""
    with patch.object(victims, "_give_way", lambda *_: False):
        yield


@contextmanager
def whatever_tiers_exist() -> Iterator[None]:
    """With a tier below nobody is freed: requests are only suspended."""
    give_way = victims._give_way

    def suspended_only(world: Any, run: Any, entry: Any, short: Any) -> bool:
        with patch.object(Scheduler, "recompute", _no_victim) if world.memory.tiered else _nothing():
            try:
                return give_way(world, run, entry, short)
            except _NoVictim:
                return False

    with patch.object(victims, "_give_way", suspended_only):
        yield


@contextmanager
def suspended_ones_included() -> Iterator[None]:
    """Suspended requests are never freed."""
    candidates = victims.candidates

    def running(world: Any, run: Any, entry: Any) -> Iterator[Any]:
        return (other for other in candidates(world, run, entry) if other.request.state == "RUNNING")

    with patch.object(victims, "candidates", running):
        yield


@contextmanager
def later_chunks() -> Iterator[None]:
    """A later chunk takes no room from younger requests."""
    wins = passes.older_wins

    def generations_only(world: Any, run: Any, entry: Any, lacking: Any, attempt: Any) -> int:
        if entry.generates:
            return wins(world, run, entry, lacking, attempt)
        run.started_refused = True
        return 0

    with patch.object(passes, "older_wins", generations_only):
        yield


@contextmanager
def no_start_past_a_refused_one() -> Iterator[None]:
    """Requests start in a pass in which a started one was refused."""

    never = property(lambda run: False, lambda run, refused: None)
    with patch.object(passes.Pass, "started_refused", never, create=True):
        yield


@contextmanager
def not_in_the_same_pass() -> Iterator[None]:
    """Who gave way may be provided again in the same pass."""
    with patch.object(passes.Pass, "gave_way", lambda *_: None), no_start_past_a_refused_one():
        yield


@contextmanager
def bounded_bypass() -> Iterator[None]:
    """A waiting request may be overtaken without end."""
    with patch.object(starts._Starts, "_is_blocked", lambda *_: False):
        yield


@contextmanager
def bounded_starts() -> Iterator[None]:
    """Any number of requests is started."""
    with patch.object(config.SchedulerConfig, "most_started", 10**6):
        yield


@contextmanager
def fenced_means_wait() -> Iterator[None]:
    """Others give way although what is missing comes back by itself."""
    with patch.object(victims, "_comes_back", lambda *_: False):
        yield


@contextmanager
def all_or_nothing() -> Iterator[None]:
    """A request runs with pages of the target alone."""
    provide = Memory._provide_both

    def target_only(self: Memory, entry: Any, tokens: int, unit: int, leave: Any) -> int:
        least = self._split(leave)[0]
        return provide(self, entry, tokens, unit, leave) or self.sides[0].provide([(entry, tokens, unit)], least)[0]

    with patch.object(Memory, "_provide_both", target_only):
        yield


@contextmanager
def kept_out_until_an_end() -> Iterator[None]:
    """Where many gave way together nobody starts ever after."""
    for_ever = property(lambda bulk: bulk._gone is not None)
    with patch.multiple(Bulk, ended=lambda *_: None, go_on=lambda *_: None, keeps_out=for_ever):
        yield


class _NoVictim(Exception):
    pass


def _no_victim(*_: Any) -> None:
    raise _NoVictim


@contextmanager
def _nothing() -> Iterator[None]:
    yield


RULES: dict[str, Leaving] = {
    rule.__name__: rule
    for rule in (
        age, fits_alone, nothing_before_the_start, older_wins, whatever_tiers_exist, suspended_ones_included,
        later_chunks, no_start_past_a_refused_one, not_in_the_same_pass, bounded_bypass, bounded_starts,
        fenced_means_wait, all_or_nothing, kept_out_until_an_end,
    )
}  # fmt: skip
