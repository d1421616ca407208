"""Admission "throughput" without a tier below: all start who fit now; where memory runs short many give way together.

Whoever starts only when another one has ended sets the last end, however many started before it: to admit a few more
than the forecast allows costs tokens and gains no step. So all that wait start, or the forecast decides as by default.

Where memory then runs short one has to be computed again, and sets the last end. Others may give way with it and end no
later than it does; the pages that they would have grown into stay cached, so that less of them all is computed again.
This presumes that requests become as long as expected. Where they do not, one gives way at a time.

    gone = those that gave way since a started request last ended; nobody starts while there are any
    gone, but for those that had to, fit into the empty pools grown to their expected ends: they can return together
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
    """Whether all fit, and who gave way together."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler, self._memory, self._outlook = scheduler, scheduler.memory, scheduler.outlook
        self._gone: Forecast | None = None

    def all_fit(self, waiting: Iterable[Entry], most: int) -> bool:
        """Whether all that wait have room for their contexts and a token, beside those of the started ones.

        What they share with others is not counted. False where they are more than `most`.
        """
        entries = list(islice(waiting, most + 1))
        if len(entries) > most:
            return False
        contexts = Forecast(self._memory, self._memory.roster, 0.0)
        available = [n for n, _ in self._memory.pressure()]
        return not any(contexts.add(entry, available) for entry in entries)

    @property
    def keeps_out(self) -> bool:
        """Whether nobody may start: some gave way, and no started request has ended since."""
        return self._gone is not None and bool(self._scheduler.started)

    def ended(self) -> None:
        """A started request has ended."""
        self._gone = None

    def gave_way(self, run: Pass, entry: Entry, older: Entry) -> None:
        """One had to, to an older request: others give way with it, if ends come within a block of where expected."""
        if self._outlook.error * entry.request.max_new_tokens > min(self._memory.tokens_per_block):
            return
        if self._gone is None:
            self._gone = Forecast(self._memory, self._memory.no_roster, self._outlook.share)
        self._gone.add(entry)
        self._more(run, self._gone, older)

    def go_on(self, run: Pass) -> None:
        """Those that were in a step when others gave way; and as requests grow more and more can return together."""
        if self._gone is not None and self.keeps_out and not any(back for _, back in self._memory.pressure()):
            self._more(run, self._gone, self._scheduler.started[0])

    def _more(self, run: Pass, gone: Forecast, older: Entry) -> None:
        """The newest give way as long as all that did could return together; the oldest stays, and who ends next."""
        scheduler, share = self._scheduler, self._outlook.share
        next_end = min(scheduler.started, key=lambda entry: (entry.left(share), entry.age))
        for other in list(candidates(scheduler, run, older)):
            if other is not next_end:
                if gone.add(other, self._memory.slots):
                    return
                scheduler.recompute(run, other, "it gave way with others, to return when a request has ended")
