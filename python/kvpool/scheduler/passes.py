"""One pass, in three phases: generations, contexts of started requests, first chunks of waiting ones.

Token budget and pages are decided together. Within each phase the oldest goes first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from kvpool.scheduler.admission import decode_debt
from kvpool.scheduler.config import SchedulerConfig
from kvpool.scheduler.request import Entry, RequestState
from kvpool.scheduler.starts import start_waiting
from kvpool.scheduler.step import Context, Step
from kvpool.scheduler.victims import older_wins

if TYPE_CHECKING:
    from kvpool.scheduler.scheduler import Scheduler


class Pass:
    """What one pass has decided so far."""

    def __init__(self, config: SchedulerConfig, busy: frozenset[int | str], world: list[Entry] | None) -> None:
        self.step = Step()
        self.busy = busy
        self.world = world  # None: all that were added
        self.tokens = config.max_num_tokens  # left
        self.places = config.max_batch_size  # requests that the step has room for
        self.served: set[Entry] = set()  # in this step
        self.gone: set[Entry] = set()  # gave way in this pass
        self.waiting: set[Entry] = set()  # for what is in flight
        self.started_refused = False
        self.waits = False  # whether a waiting request was looked at and not started

    def is_busy(self, entry: Entry) -> bool:
        """In a step that is in flight."""
        return entry.step is not None or entry.request.request_id in self.busy

    def may_run(self, entry: Entry) -> bool:
        """Not in flight, and did not give way in this pass."""
        return entry not in self.gone and not self.is_busy(entry)

    def gave_way(self, entry: Entry) -> None:
        """Suspended or freed: it is not provided in this pass."""
        self.gone.add(entry)

    def serve(self, entry: Entry, tokens: int) -> None:
        """The request is in the step."""
        entry.request.state = RequestState.RUNNING
        self.served.add(entry)
        self.step.entries.append(entry)
        self.step.num_tokens += tokens
        self.tokens -= tokens
        self.places -= 1

    def serve_context(self, entry: Entry, tokens: int) -> None:
        """A chunk of the request is in the step."""
        start = entry.request.num_computed
        last = start + tokens == entry.length
        self.step.context.append(Context(entry.request, start, tokens, last))
        self.serve(entry, tokens)


def run_pass(scheduler: Scheduler, run: Pass) -> None:
    """Fills `run.step`."""
    _generations(scheduler, run)
    _contexts(scheduler, run)
    if not run.started_refused:
        start_waiting(scheduler, run)
    run.step.generation.sort(key=lambda request: adapter_order(request.lora_id))
    run.step.context.sort(key=lambda chunk: (chunk.is_last, adapter_order(chunk.request.lora_id)))


# -- generations ------------------------------------------------------------------------------------


def _generations(scheduler: Scheduler, run: Pass) -> None:
    ready = [entry for entry in scheduler.started if entry.generates and run.may_run(entry)]
    while ready:
        fit = _within_limits(run, ready)
        if not fit:
            for entry in ready:
                entry.why = "the tokens or places of the step were used up by older requests"
            return
        done = scheduler.memory.allocate(fit)
        for entry in fit[:done]:
            run.step.generation.append(entry.request)
            run.serve(entry, entry.generation_tokens)
        if done == len(fit):
            ready = ready[done:]
            continue
        refused = fit[done]
        if _make_room_for(scheduler, run, refused):
            run.step.generation.append(refused.request)
            run.serve(refused, refused.generation_tokens)
        elif refused not in run.waiting:
            return  # it has suspended itself, or is still suspended: later ones are not looked at
        ready = [entry for entry in ready[done + 1 :] if run.may_run(entry)]


def _within_limits(run: Pass, ready: Sequence[Entry]) -> list[Entry]:
    """As many from the front as the step has tokens and places for."""
    tokens, fit = run.tokens, []
    for entry in ready[: run.places]:
        tokens -= entry.generation_tokens
        if tokens < 0:
            break
        fit.append(entry)
    return fit


def _make_room_for(scheduler: Scheduler, run: Pass, entry: Entry) -> int:
    memory = scheduler.memory
    return older_wins(
        scheduler,
        run,
        entry,
        lambda: memory.lacking(entry, entry.generation_tokens, memory.nothing),
        lambda: memory.allocate([entry]),
    )


# -- contexts of started requests -----------------------------------------------------------------------


def _contexts(scheduler: Scheduler, run: Pass) -> None:
    for entry in list(scheduler.started):
        if run.places <= 0:
            return
        if entry.generates or not run.may_run(entry):
            continue
        rest = entry.rest
        unit = min(scheduler.config.chunk_tokens or rest, rest)
        if run.tokens < unit:
            run.started_refused = True
            entry.why = f"the step has {run.tokens} tokens left for its chunk of {unit}"
            continue
        want = rest if rest <= run.tokens else run.tokens // unit * unit
        if tokens := _provide_chunk(scheduler, run, entry, want, unit):
            run.serve_context(entry, tokens)


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
    debts = [decode_debt(memory, other) for other in scheduler.started if other is not entry]
    return [sum(per_pool) for per_pool in zip(memory.nothing, *debts, strict=True)], decode_debt(memory, entry)


def adapter_order(adapter: Any) -> tuple[int, Any]:
    """Sort key of adapters: none first, then numbers, then names."""
    if adapter is None:
        return 0, 0
    return (1, adapter) if isinstance(adapter, int) else (2, adapter)
