"""The scheduler: who is known, who waits, who is started; and one pass over them.

    known == waiting + started           nobody is in both
    waiting holds nothing: no claim, page or adapter
    started: sorted by age; each has a cache in every manager
    a started request is in at most one step that was handed out and not yet updated: the roster knows in which

Age is the order in which the scheduler first saw a request. Suspension, recompute and retries keep it.
"""

from __future__ import annotations

import threading
from bisect import bisect_left, insort
from collections import Counter, OrderedDict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from heapq import merge
from operator import attrgetter

from kvpool.errors import ConfigError, KVPoolError, LogicError, StalledError
from kvpool.manager import KVCacheManager
from kvpool.scheduler.admission import Outlook, check_request
from kvpool.scheduler.bulk import Bulk
from kvpool.scheduler.config import SchedulerConfig
from kvpool.scheduler.guard import alone
from kvpool.scheduler.memory import Memory
from kvpool.scheduler.passes import Pass, run_pass, why_not, why_stalled
from kvpool.scheduler.request import Entry, Request, RequestState, in_use
from kvpool.scheduler.starts import LastRefused
from kvpool.scheduler.step import Context, SchedulerStats, Step
from kvpool.scheduler.updates import apply_outputs, as_outputs, lost_of

__all__ = ["Pass", "Scheduler", "SchedulerStats"]

_AGE = attrgetter("age")


class Scheduler:
    """Decides who runs in each step. One thread; `add` and `cancel` may come from any.

    manager: pages of the model. draft_manager: of a draft model; its caches are suspended, freed and resized with the
    target's or not at all. Both belong to the scheduler while it works: claims made by others are outside its promise.
    """

    def __init__(
        self, manager: KVCacheManager, config: SchedulerConfig, draft_manager: KVCacheManager | None = None
    ) -> None:
        for name, one in (("manager", manager), ("draft_manager", draft_manager)):
            if not isinstance(one, KVCacheManager) and not (one is None and name == "draft_manager"):
                raise ConfigError(f"{name}: {one!r} is not a KVCacheManager")
        if not isinstance(config, SchedulerConfig):
            raise ConfigError(f"config: {config!r} is not a SchedulerConfig")
        if draft_manager is manager:
            raise ConfigError("draft_manager: it is the target's manager; give the draft model one of its own")
        self.manager, self.draft_manager, self.config = manager, draft_manager, config
        self.memory = Memory(manager, draft_manager, config.chunk_tokens)
        self.outlook = Outlook()
        self.bulk = Bulk(self) if config.admission == "throughput" and not self.memory.tiered else None
        self.stats = SchedulerStats()
        self.started: list[Entry] = []
        self.contexts: list[Entry] = []  # those of them that do not generate
        self.adapters: Counter[int | str] = Counter()  # started requests that use each adapter
        self.ended: list[Request] = []  # since the last update
        self._lost: list[Request] = []  # freed because a move failed, since the last pass
        self._known: dict[int | str, Entry] = {}
        self.ages = 0  # requests that were ever seen
        self.last_refused: LastRefused | None = None
        self._fresh: OrderedDict[int, Entry] = OrderedDict()  # by age, never started
        self._returned: list[Entry] = []  # freed to be computed again, by age
        self._incoming: deque[Entry] = deque()  # added by any thread, not yet seen
        self._cancelled: deque[Entry] = deque()  # by another thread
        self._steps: dict[int, Step] = {}  # handed out and not yet updated, by number
        self._passes = 0
        self.changes = 0  # requests that started, ended or gave way
        self._last: Step | None = None
        self.held_up: set[Entry] = set()  # started ones that waited in the last pass for what is in flight
        self._thread = threading.get_ident()
        self._lock = threading.Lock()  # held by what changes the lists; `cancel` never waits for it

    # -- requests -------------------------------------------------------------------------------

    def check(self, request: Request) -> None:
        """Raise what `add` would for a request that can never run; changes nothing. From any thread."""
        if not isinstance(request, Request):
            raise ValueError(f"request: {request!r} is not a kvpool.Request")
        check_request(request, self.config, self.memory)

    def add(self, request: Request) -> None:
        """A request from now on scheduled by `schedule()`. From any thread.

        LogicError: its id is in use, or it is not new. RequestTooLargeError: it could not run even alone.
        ConfigError: more drafts than the managers were configured for, an unknown adapter.
        """
        self.check(request)
        if request.state is not RequestState.WAITING or request._entry is not None:
            raise LogicError(f"request_id: {request.request_id!r} is {request.state} already; add a new Request")
        entry = Entry(request, -1)
        if self._known.setdefault(request.request_id, entry) is not entry:
            raise in_use(request)
        request._entry = entry
        self._incoming.append(entry)

    def cancel(self, request_id: int | str) -> bool:
        """End a request, whatever it does. False: it is unknown or has ended. From any thread.

        What a step in flight may still touch is given back when the step has ended. From another thread than that of
        the scheduler it takes effect at the next `schedule` or `update`.
        """
        entry = self._known.get(request_id)
        if entry is None or entry.request.state is RequestState.FINISHED:
            return False
        # At once only where no pass runs, and no step of another thread is being launched.
        if threading.get_ident() == self._thread and self._lock.acquire(blocking=False):
            try:
                if threading.get_ident() == self._thread:
                    self._see_incoming()
                    self.end(entry, "cancelled")
                    return True
            finally:
                self._lock.release()
        self._cancelled.append(entry)
        return True

    def explain(self, request_id: int | str) -> str:
        """Why a request did not run in the last step, or that it did. From any thread."""
        entry = self._known.get(request_id)
        if entry is None:
            return f"request {request_id!r} is unknown, or it has ended"
        if self._last is not None and any(other is entry.request for other in self._last.requests):
            return f"request {request_id!r} is in the last step"
        return why_not(self, entry)

    def _see_incoming(self) -> None:
        while self._incoming:
            entry = self._incoming.popleft()
            if entry.age < 0 and entry.request.state is not RequestState.FINISHED:
                self._see(entry)

    def _see(self, entry: Entry) -> None:
        entry.age = self.ages
        self.ages += 1
        self._fresh[entry.age] = entry

    def _enter(self) -> None:
        self._thread = threading.get_ident()
        if self._incoming:
            self._see_incoming()
        while self._cancelled:
            self.end(self._cancelled.popleft(), "cancelled")
        if self.memory.before():
            self._take_lost()

    def _take_lost(self) -> None:
        """Requests whose pages did not arrive are computed again; those in a step when it comes back."""
        for request_id in self.memory.lost():
            entry = self._known.get(request_id)
            if entry is not None and entry.started and not self.memory.roster.in_step(entry.age):
                self._free(entry, "a move of its pages failed")
                self._lost.append(entry.request)

    # -- the pass -------------------------------------------------------------------------------

    @alone
    def schedule(self, requests: Iterable[Request] | None = None, *, in_flight: Iterable[int | str] = ()) -> Step:
        """One pass: the work of the next step. `update` takes the step back once it was executed.

        requests: None for those added; a list is the whole world of this pass (its order says nothing for requests that
        were seen before; finished ones are skipped). in_flight: ids of requests that some other step still works on.
        LogicError: a started request is missing in the list. StalledError: nothing runs, and nothing ever can.
        """
        self._enter()
        refused: list[tuple[Request, Exception]] = []
        world = None if requests is None else self._world(list(requests), refused)
        busy = frozenset(in_flight)
        before: list[Step] = []
        try:
            run = self._passes_until_work(busy, world, before)
        finally:
            self.memory.after()
        for other in reversed(before):
            run.step.inherit(other)
        if self._lost:
            run.step.recompute[:0] = [r for r in self._lost if r.state is not RequestState.FINISHED]
            self._lost.clear()
        return self._hand_out(run, refused, in_flight=bool(busy))

    def _passes_until_work(self, busy: frozenset[int | str], world: list[Entry] | None, before: list[Step]) -> Pass:
        """Where somebody gave way and nobody runs, what is free now may be enough for another one."""
        patient = False
        while True:
            self._passes += 1
            run = Pass(self.config, self._passes, busy, world, patient)
            run.gone += [request._entry.age for request in self._lost if request._entry is not None]
            try:
                run_pass(self, run)
            except BaseException as error:
                self.memory.roster.release(run.step.number)
                if isinstance(error, KeyError | LogicError) and self._end_closed():
                    continue
                raise
            if run.step.num_tokens:
                return run
            if not (run.step.suspended or run.step.recompute):
                if patient or not run.gave_up:
                    return run
                patient = True  # nothing runs: now all that wait are looked at
            before.append(run.step)

    def _end_closed(self) -> int:
        """Ends started requests whose caches somebody else has closed; how many."""
        closed = [entry for entry in self.started if not self.memory.has(entry)]
        for entry in closed:
            self.end(
                entry, "error", LogicError(f"request {entry.request.request_id!r}: its cache was closed by others")
            )
        return len(closed)

    def _hand_out(self, run: Pass, refused: list[tuple[Request, Exception]], in_flight: bool) -> Step:
        step = run.step
        step.refused = refused
        self._last, self.held_up = step, run.waiting
        if step.num_tokens:
            self.stats.steps += 1
            self._steps[step.number] = step
            return step
        moves_on = self._steps or in_flight or refused or step.recompute or not (self.started or run.waits)
        if not (moves_on or self.memory.is_returning() or any(map(self.memory.is_fenced, self.started))):
            raise StalledError(why_stalled(self))
        return step

    def _world(self, requests: Sequence[Request], refused: list[tuple[Request, Exception]]) -> list[Entry]:
        """Entries of the unfinished requests of a list; new ones are seen, or refused."""
        entries: dict[int | str, Entry] = {}
        for request in requests:
            if not isinstance(request, Request):
                raise ValueError(f"requests: {request!r} is not a kvpool.Request")
            if request.state is RequestState.FINISHED:
                continue
            if request.request_id in entries:
                raise LogicError(f"request_id: {request.request_id!r} is listed twice; list each request once")
            known = self._known.get(request.request_id)
            if known is not None and known.request is not request:
                raise in_use(request)
            if known is None and request._entry is not None:
                raise LogicError(f"request_id: {request.request_id!r} belongs to another scheduler")
            entries[request.request_id] = known or Entry(request, -1)
        missing = [entry for entry in self.started if entry.request.request_id not in entries]
        if missing:
            raise LogicError(
                f"requests: {missing[0].request.request_id!r} is started and not in the list; list it, or cancel it"
            )
        world = []
        for request_id, entry in entries.items():
            if entry.age < 0:
                try:
                    self.check(entry.request)
                    known = self._known.setdefault(request_id, entry)
                    if known.request is not entry.request:  # another thread has added it meanwhile
                        raise in_use(entry.request)
                    entry = known
                except (KVPoolError, ValueError) as error:
                    self._refuse(entry.request, error)
                    refused.append((entry.request, error))
                    continue
                entry.request._entry = entry
                self._see(entry)
            world.append(entry)
        return sorted(world, key=_AGE)

    @staticmethod
    def _refuse(request: Request, error: Exception) -> None:
        request.state, request.finish_reason, request.error = RequestState.FINISHED, "error", error

    @alone
    def update(self, step: Step, outputs: Mapping[int | str, Sequence[int]]) -> list[Request]:
        """What the executor returned: {request_id: tokens}, 1 .. 1 + draft_tokens of each generation and last chunk.

        Commits the inputs whose pages the step wrote, appends the outputs, closes and returns all that ended since the
        last update: finished, cancelled and failed ones. A missing, surplus or unknown result fails that request alone.
        LogicError: the step is not outstanding. ValueError: outputs is not a mapping; the step stays outstanding.
        """
        given = as_outputs(outputs)
        self._enter()
        self._take_back(step)
        self.memory.arrive(step)
        if self.memory.has_failed():
            for entry in lost_of(self, step):
                self.memory.roster.set_step(entry.age, 0)  # nothing of it leaves the engine
            self._take_lost()
        apply_outputs(self, step, given)
        self.memory.after()
        return self._take_ended()

    def drop_lost(self, step: Step) -> list[Request]:
        """Requests whose pages did not arrive leave the step: between `step_begin` and the launch. Returns them.

        They are under `step.recompute`, and a later step computes them again. Of a step that has nothing left there is
        nothing to launch; `update` takes it back all the same.
        """
        return self._drop_lost(step) if self.memory.has_failed() else []

    @alone
    def _drop_lost(self, step: Step) -> list[Request]:
        gone = lost_of(self, step)
        step.drop([entry.request for entry in gone])
        for entry in gone:
            self.memory.roster.set_step(entry.age, 0)
            self._free(entry, "a move of its pages failed")
        return [entry.request for entry in gone]

    @alone
    def fail(self, step: Step, error: Exception) -> list[Request]:
        """The executor failed: all requests of the step end with `error`. Returns what `update` does."""
        self._enter()
        self._take_back(step)
        self.memory.roster.release(step.number)
        for request in step.requests:
            entry = request._entry
            if entry is not None:
                self.end(entry, "error", error)
        return self._take_ended()

    @alone
    def abandon(self, step: Step) -> None:
        """The step was not executed, or its results are not wanted: its requests are as before it."""
        self._enter()
        self._take_back(step)
        self.memory.roster.release(step.number)

    @alone
    def fail_oldest(self, error: Exception) -> Request | None:
        """End the oldest waiting request, else the oldest started one, with `error`; None: there is neither."""
        self._enter()
        entry = next(self.waiting(), None) or (self.started[0] if self.started else None)
        if entry is None:
            return None
        self.end(entry, "error", error)
        return entry.request

    def _take_back(self, step: Step) -> None:
        if not isinstance(step, Step):
            raise ValueError(f"step: {step!r} is not a step")
        if self._steps.get(step.number) is step:
            del self._steps[step.number]
        elif step:
            raise LogicError("step: it is not outstanding; update each step of this scheduler once")

    def _take_ended(self) -> list[Request]:
        ended, self.ended = self.ended, []
        return ended

    def find(self, request_id: int | str) -> Entry | None:
        """The entry of a request that has not ended."""
        return self._known.get(request_id)

    @property
    def ran(self) -> bool:
        """Whether the last pass had work."""
        return bool(self._last)

    @property
    def has_work(self) -> bool:
        """Whether some request has not ended."""
        return bool(self._known)

    # -- lists that the phases use --------------------------------------------------------------

    def anybody_waits(self) -> bool:
        """Whether some request waits."""
        return bool(self._fresh or self._returned)

    def waiting(self) -> Iterator[Entry]:
        """All that wait, the oldest first. Changes end the iteration."""
        fresh = self._fresh.values()
        return merge(self._returned, fresh, key=_AGE) if self._returned else iter(fresh)

    def younger(self, entry: Entry) -> Iterator[Entry]:
        """Started requests younger than this one, the newest first."""
        for other in reversed(self.started):
            if other.age <= entry.age:
                return
            yield other

    def of_age(self, age: int) -> Entry:
        """A started request."""
        return self.started[bisect_left(self.started, age, key=_AGE)]

    def is_busy(self, run: Pass, entry: Entry) -> bool:
        """Whether a started request is in this step, or in one in flight."""
        return self.memory.roster.in_step(entry.age) or entry.request.request_id in run.busy

    def may_run(self, run: Pass, entry: Entry) -> bool:
        """Whether it is not in flight, and did not give way in this pass."""
        return entry.age not in run.gone and not self.is_busy(run, entry)

    # -- transitions ----------------------------------------------------------------------------

    def start(self, entry: Entry, reused: int, shared: Sequence[int]) -> None:
        """A waiting request has got its first pages."""
        self._leave_waiting(entry)
        self.changes += 1
        _insert(self.started, entry)
        _insert(self.contexts, entry)
        entry.started = True
        entry.request._computed = reused
        self.memory.enter(entry, shared)
        if entry.adapter is not None:
            self.adapters[entry.adapter] += 1
        if entry.lost:
            self.stats.recomputed_tokens += max(0, entry.lost - reused)
            entry.lost = 0

    def serve_context(self, run: Pass, entry: Entry, tokens: int) -> None:
        """A chunk of a started request is in the step."""
        start = entry.request.num_computed
        run.step.context.append(Context(entry.request, start, tokens, start + tokens == entry.length))
        run.serve(tokens)
        entry.request.state = RequestState.RUNNING
        self.memory.roster.set_step(entry.age, run.step.number)

    def generates(self, entry: Entry) -> None:
        """Only the token that came out last is to be computed from here on."""
        self.contexts.remove(entry)
        self.memory.generates(entry)

    def suspend(self, run: Pass, entry: Entry, why: str) -> None:
        """A running request gives up the place of its pages."""
        self.memory.suspend(entry)
        self.changes += 1
        entry.request.state = RequestState.SUSPENDED
        entry.why = why
        self.stats.suspended += 1
        run.gave_way(entry)
        run.step.suspended.append(entry.request)

    def recompute(self, run: Pass, entry: Entry, why: str) -> None:
        """A started request loses its pages and waits, as old as it is."""
        self._free(entry, why)
        run.gave_way(entry)
        if entry.request in run.step.suspended:
            run.step.suspended.remove(entry.request)
        run.step.recompute.append(entry.request)

    def _free(self, entry: Entry, why: str) -> None:
        self.memory.free([entry])
        entry.lost = entry.request.num_computed
        self._leave_started(entry)
        entry.request.state = RequestState.WAITING
        entry.request._computed = 0
        entry.why = why
        insort(self._returned, entry, key=_AGE)
        self.stats.recomputed += 1

    def end(self, entry: Entry, reason: str, error: Exception | None = None) -> None:
        """A request is over."""
        request = entry.request
        if request.state is RequestState.FINISHED:
            return
        if entry.started:
            self.memory.free([entry])
            self._leave_started(entry)
            if self.bulk:
                self.bulk.ended()
        elif entry.age >= 0:
            self._leave_waiting(entry)
        del self._known[request.request_id]
        request.state, request.finish_reason, request.error = RequestState.FINISHED, reason, error
        request._entry = None  # no cycle: its tokens go with the last reference, not with the next collection
        self.ended.append(request)

    def _leave_started(self, entry: Entry) -> None:
        self.changes += 1
        del self.started[bisect_left(self.started, entry.age, key=_AGE)]
        if entry.generates:
            computed = entry.request.num_computed
            entry.request._generates, entry.request._computed = False, computed
        else:
            self.contexts.remove(entry)
        self.memory.roster.remove(entry.age)
        entry.started = False
        if entry.adapter is not None:
            self.adapters[entry.adapter] -= 1
            if not self.adapters[entry.adapter]:
                del self.adapters[entry.adapter]

    def _leave_waiting(self, entry: Entry) -> None:
        if self._fresh.pop(entry.age, None) is None:
            self._returned.remove(entry)
        if self.last_refused is not None:
            self.last_refused.leave(entry)


def _insert(entries: list[Entry], entry: Entry) -> None:
    """By age; most that start are the youngest."""
    if not entries or entries[-1].age < entry.age:
        entries.append(entry)
    else:
        insort(entries, entry, key=_AGE)
