"""First chunks: waiting requests that start, the oldest first.

Starting evicts nobody started, and what does not start holds nothing afterwards. A request that is refused is counted
for every younger one that starts in the same pass; after `max_bypass` of them no younger one starts any more.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvpool.scheduler.admission import Forecast
from kvpool.scheduler.memory import Claimed, first_chunk
from kvpool.scheduler.request import Entry, Refusal

if TYPE_CHECKING:
    from kvpool.scheduler.scheduler import Pass, Scheduler

# Requests that are refused in one pass before it gives up looking: a pass must not touch all that wait.
MOST_REFUSED = 16


def start_waiting(scheduler: Scheduler, run: Pass) -> None:
    """First chunks for as many as there are places, tokens and pages for."""
    if scheduler.bulk and scheduler.bulk.keeps_out:
        return
    if run.places <= 0 or (run.world is None and not scheduler.anybody_waits()):
        scheduler.last_refused = None
        return
    starts = _Starts(scheduler, run)
    if starts.recall():
        return
    starts.see_whether_all_fit()
    while starts.may_go_on():
        batch = starts.next_batch()
        if not batch:
            break
        claims = scheduler.memory.claim(batch, scheduler.config.chunk_tokens, run.tokens)
        if admitted := starts.admit(claims):
            starts.provide(admitted)
        if len(claims) < len(batch):
            return  # the tokens are used up
    starts.remember()


@dataclass(slots=True)
class LastRefused:
    """Of a pass in which nobody started: who was refused."""

    entries: list[Entry]
    may_be_blocked: bool
    seen: int  # age of the youngest of them
    ages: int  # requests that had been seen by then
    some_left: bool = False  # some of them have ended since

    def leave(self, entry: Entry) -> None:
        """It waits no more."""
        if entry in self.entries:
            self.entries.remove(entry)
            self.some_left = True


class _Starts:
    """State of the phase."""

    def __init__(self, scheduler: Scheduler, run: Pass) -> None:
        self._scheduler, self._run = scheduler, run
        self._memory, self._config = scheduler.memory, scheduler.config
        self._refused: list[Entry] = []
        self._seen = -1  # age of the youngest that was looked at
        self._forecast: Forecast | None = None
        self._now: Refusal | None = None
        self._same: tuple[Refusal | None, bool] = (None, False)
        self._started = 0
        self._all_fit = False
        self._ask_all = False
        self._may_be_blocked = False  # some of them must not be overtaken; false alarms where they have gone
        self._passed_over = False  # some that may be refused no more in the next pass
        self._in_vain = 0.0  # refused, those for their adapter counted as a quarter

    def _is_refused_still(self, entry: Entry) -> bool:
        """Whether its last refusal stands unasked. Never while nobody is started: then somebody has to be."""
        if entry.refusal is None or self._ask_all or not self._scheduler.started:
            return False
        if self._same[0] is not entry.refusal:
            if self._now is None:
                self._now = self._refusal_now()
            self._same = (entry.refusal, entry.refusal.holds(self._now))
        return self._same[1] and not self._run.patient

    def recall(self) -> bool:
        """Those whom the last pass refused, if it started nobody, are not asked if all would be again.

        True: there is nobody else to look at.
        """
        scheduler, run = self._scheduler, self._run
        last = scheduler.last_refused
        if last is None or run.world is not None or not scheduler.started or run.places <= 0 or run.patient:
            return False
        now, holds = self._refusal_now(), None
        for entry in last.entries:
            if entry.refusal is not holds:  # most share one
                holds = entry.refusal
                if holds is None or not holds.holds(now):
                    self._ask_all = holds is not None and holds.is_old(now.number)  # one pass for all of them
                    return False
        run.waits = run.gave_up = True
        if last.ages == scheduler.ages and not last.some_left:
            return True
        self._now, self._refused = now, list(last.entries)
        self._in_vain, self._may_be_blocked, self._seen = len(last.entries), last.may_be_blocked, last.seen
        return False

    def see_whether_all_fit(self) -> None:
        """Under admission "throughput": then no forecast is asked."""
        scheduler = self._scheduler
        if scheduler.bulk and self.may_go_on():
            most = self._config.most_started - len(scheduler.started)
            self._all_fit = scheduler.bulk.all_fit(self._waiting(), most)

    def remember(self) -> None:
        """For `recall`."""
        self._scheduler.last_refused = (
            LastRefused(self._refused, self._may_be_blocked, self._seen, self._scheduler.ages)
            if self._refused and not self._started and not self._passed_over and self._run.world is None
            else None
        )

    def _refusal_now(self) -> Refusal:
        run, scheduler = self._run, self._scheduler
        available = [n for n, _ in self._memory.pressure()]
        return Refusal(run.step.number, scheduler.changes, run.tokens, available)

    def may_go_on(self) -> bool:
        """Whether another first chunk is possible."""
        run = self._run
        room = run.places > 0 and run.tokens > 0 and len(self._scheduler.started) < self._config.most_started
        return room and not self._is_blocked(None) and not self._gives_up()

    def _gives_up(self) -> bool:
        """Whether enough were refused in this pass."""
        gives_up = not self._run.patient and self._in_vain >= MOST_REFUSED
        self._run.gave_up |= gives_up
        return gives_up

    def _waiting(self) -> Iterable[Entry]:
        world = self._run.world
        return self._scheduler.waiting() if world is None else (entry for entry in world if not entry.started)

    def next_batch(self) -> list[Entry]:
        """The next ones that may be claimed together: adapters fit, places and what may be started suffice."""
        run, config = self._run, self._config
        most = min(run.places, config.most_started - len(self._scheduler.started), MOST_REFUSED)
        batch: list[Entry] = []
        adapters = set(self._scheduler.adapters)
        for entry in self._waiting():
            if entry.age <= self._seen:
                continue
            if entry.age in run.gone or entry.request.request_id in run.busy:
                self._passed_over = True
                continue
            run.waits = True
            if self._memory.is_closing(entry):
                entry.why = "its former pages are still in flight"
                self._passed_over = True
                continue
            if len(batch) >= most or self._is_blocked(None) or self._gives_up():
                break
            fits = self._adapter_fits(entry, adapters)
            if not fits and self._adapter_fits(entry, set(self._scheduler.adapters)):
                break  # it depends on whether those of the batch start
            self._seen = entry.age
            if self._is_refused_still(entry):
                self._note(entry)
            elif not fits:
                self._refuse_adapter(entry)
            else:
                batch.append(entry)
        return batch

    def _adapter_fits(self, entry: Entry, adapters: set[int | str]) -> bool:
        budget = self._config.adapters
        if budget is None or entry.adapter is None or entry.adapter in adapters:
            return True
        used = sum(budget.pages.get(adapter, 0) for adapter in adapters)
        if used + budget.pages[entry.adapter] > budget.budget:
            return False
        adapters.add(entry.adapter)
        return True

    def _refuse_adapter(self, entry: Entry) -> None:
        budget = self._config.adapters
        assert budget is not None
        assert entry.adapter is not None
        left = budget.budget - sum(budget.pages.get(adapter, 0) for adapter in self._scheduler.adapters)
        pages = budget.pages[entry.adapter]
        self._refuse(entry, f"adapter {entry.adapter!r} needs {pages} pages, {left} are left", again=True)
        self._in_vain -= 0.75  # it costs next to nothing to ask

    def _refuse(self, entry: Entry, why: str, again: bool = False) -> None:
        """again: it is asked again in the next pass, whatever has changed."""
        entry.why = why
        if self._now is None or self._now.changes != self._scheduler.changes:
            self._now = self._refusal_now()
        entry.refusal = None if again else self._now
        self._note(entry)

    def _note(self, entry: Entry) -> None:
        """It is refused in this pass."""
        self._refused.append(entry)
        self._in_vain += 1
        self._may_be_blocked |= entry.bypassed >= self._config.max_bypass

    def _is_blocked(self, entry: Entry | None) -> bool:
        """Whether an older one (None: any) was refused that must not be overtaken any more."""
        if not self._may_be_blocked:
            return False
        most = self._config.max_bypass
        return any(r.bypassed >= most and (entry is None or r.age < entry.age) for r in self._refused)

    def _drop(self, claim: Claimed, why: str, again: bool = False) -> None:
        self._memory.free([claim.entry])
        self._refuse(claim.entry, why, again)

    def admit(self, claims: list[Claimed]) -> list[Claimed]:
        """Those of the claims that start; the others are released."""
        admitted: list[Claimed] = []
        kept: list[Claimed] = []
        for claim in claims:
            if claim.why == "kept":
                kept.append(claim)
            else:
                self._refuse(claim.entry, _WHY[claim.why])
        if not kept:
            return admitted
        available = [n for n, _ in self._memory.pressure()]
        debts = self._debts() if self._memory.reserves else []
        # Per claim: what is available besides it and those before it.
        rooms = [available]
        for claim in reversed(kept[1:]):
            rooms.append([n + taken for n, taken in zip(rooms[-1], claim.taken, strict=True)])
        for claim, room in zip(kept, reversed(rooms), strict=True):
            if self._is_blocked(claim.entry):
                self._drop(claim, "an older request was overtaken max_bypass times and goes first", again=True)
            elif why := self._refusal(claim, room, debts, first=not admitted):
                self._drop(claim, why)
            else:
                admitted.append(claim)
                self._overtake(claim.entry)
        return admitted

    def _overtake(self, entry: Entry) -> None:
        for older in self._refused:
            if older.age < entry.age:
                older.bypassed += 1
                self._may_be_blocked |= older.bypassed >= self._config.max_bypass

    def _refusal(self, claim: Claimed, room: list[int], debts: list[int], first: bool) -> str | None:
        """Why a claim that was kept must not start, or None: then it counts as started."""
        alone = (
            first and not self._scheduler.started
        )  # the oldest that can be had: nobody is started whom it could harm
        if debts:
            held = [shared + taken for shared, taken in zip(claim.shared, claim.taken, strict=True)]
            own = [max(0, slots - pages) for slots, pages in zip(self._memory.decode_slots, held, strict=True)]
            for name, n, debt, more in zip(self._memory.names(), room, debts, own, strict=True):
                if debt + more > n and not alone:
                    return f"{name} keeps {debt + more} decode slots for the started requests, {n} can be had"
            debts[:] = [debt + more for debt, more in zip(debts, own, strict=True)]
        if self._memory.tiered or self._all_fit:
            return None
        if self._forecast is None:
            self._forecast = Forecast(self._memory, self._memory.roster, self._scheduler.outlook.share)
        if alone:
            self._forecast.start(claim)
            return None
        return self._forecast.refuses(claim, room)

    def _debts(self) -> list[int]:
        """Per pool: decode slots that are reserved for started requests and that they do not hold yet."""
        return self._memory.roster.debts(self._memory.decode_slots)

    def provide(self, admitted: list[Claimed]) -> None:
        """Pages for the first chunks."""
        run, chunk = self._run, self._config.chunk_tokens
        work = []
        tokens = run.tokens
        for claim in admitted:
            rest = claim.entry.length - claim.reused
            want = first_chunk(rest, tokens, chunk)
            tokens -= want
            work.append((claim.entry, want, min(chunk or rest, rest)))
        try:
            provided = self._provide(work)
        except BaseException:
            self._memory.free([entry for entry, _, _ in work if not entry.started])
            raise
        for claim, got in zip(admitted, provided, strict=True):
            if not got:
                self._refuse(claim.entry, "the pages that it was promised were taken by others", again=True)
                continue
            self._started += 1
            self._scheduler.start(claim.entry, claim.reused, claim.shared)
            self._scheduler.serve_context(run, claim.entry, got)

    def _provide(self, work: list[tuple[Entry, int, int]]) -> list[int]:
        memory = self._memory
        if not memory.reserves:
            return memory.provide(work, memory.nothing)
        provided = []
        debts = self._debts()
        for entry, tokens, unit in work:
            # Its unit is promised; what it takes beyond leaves the decode slots of others.
            fits = memory.fitting(entry, tokens, unit, debts) or unit
            got = memory.provide([(entry, fits, unit)], memory.nothing)[0]
            provided.append(got)
            debts = [d + more for d, more in zip(debts, memory.decode_slots, strict=True)]
        return provided


_WHY = {
    "memory": "there is not enough room for its first chunk",
    "tokens": "the step has not enough tokens left for its first chunk",
}
