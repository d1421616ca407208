"""Admission "throughput", where no tier is below: all start who fit now, and where memory runs short many give way at once.

Whoever starts only when another one has ended sets the last end, however many start before: to admit a few more than
the forecast allows costs tokens and gains no step. So everybody starts, or the forecast decides as it does by default.

Where memory then runs short somebody has to be computed again, and sets the last end. Others that give way with it cost
no step: what they do not grow into stays cached, so that less is computed again when they return. As many give way as
can return together, and nobody starts before a request has ended.

    gone = those that gave way since a started request last ended; nobody starts while there are any
    gone, grown to their expected ends, fit into the empty pools; all but the first of them: it had to go
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import TYPE_CHECKING

from kvpool.scheduler.admission import Forecast
from kvpool.scheduler.request import Entry
from kvpool.scheduler.victims import candidates

if TYPE_CHECKING:
    from kvpool.scheduler.scheduler import Pass, Scheduler


class Bulk:
    """Who gave way together, and whether everybody fits."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._gone: Forecast | None = None

    def all_fit(self, waiting: Iterable[Entry], most: int) -> bool:
        """Whether all that wait, `most` at most, have room for their contexts and a token beside those of the started.

        What they share with others is not counted.
        """
        memory = self._scheduler.memory
        entries = list(islice(waiting, most + 1))
        if len(entries) > most:
            return False
        contexts = Forecast(memory, memory.roster, 0.0)
        available = [n for n, _ in memory.pressure()]
        return not any(contexts.add(entry, available) for entry in entries)

    @property
    def keeps_out(self) -> bool:
        """Whether nobody may start: some gave way, and none of the started has ended since."""
        return self._gone is not None and bool(self._scheduler.started)

    def ended(self) -> None:
        """A started request has ended."""
        self._gone = None

    def gave_way(self, run: Pass, entry: Entry, older: Entry) -> None:
        """One had to, to an older request: others give way with it."""
        memory = self._scheduler.memory
        if self._gone is None:
            self._gone = Forecast(memory, memory.no_roster, self._scheduler.outlook.share)
        self._gone.add(entry)
        self._more(run, older)

    def go_on(self, run: Pass) -> None:
        """Those that ran while others gave way, or have less left now, may return together with them."""
        scheduler = self._scheduler
        if self.keeps_out and not any(returning for _, returning in scheduler.memory.pressure()):
            self._more(run, scheduler.started[0])

    def _more(self, run: Pass, older: Entry) -> None:
        """The newest give way for as long as all that did could return together; who ends next and the oldest stay."""
        scheduler = self._scheduler
        assert self._gone is not None
        next_end = min(scheduler.started, key=lambda entry: (entry.left(scheduler.outlook.share), entry.age))
        for other in list(candidates(scheduler, run, older)):
            if other is not next_end:
                if self._gone.add(other, scheduler.memory.slots):
                    return
                scheduler.recompute(run, other, "it gave way with others, to return when a request has ended")
