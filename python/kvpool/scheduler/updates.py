"""What comes back from the executor: inputs are committed, outputs appended, requests end.

Generations are the roster's, all in one call; here are chunks, and whatever goes wrong.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kvpool.arguments import Int32Array
from kvpool.errors import LogicError
from kvpool.scheduler.request import Entry
from kvpool.scheduler.step import Context, Step

if TYPE_CHECKING:
    from kvpool.scheduler.scheduler import Scheduler


def as_outputs(outputs: Mapping[int | str, Sequence[int]]) -> dict[Any, Any]:
    """The executor's answer as a dict; ValueError if it is no mapping."""
    if type(outputs) is dict:
        return outputs
    if not isinstance(outputs, Mapping):
        raise ValueError(f"outputs: {outputs!r} is not a mapping of request_id to tokens")
    return dict(outputs)


def lost_of(scheduler: Scheduler, step: Step) -> list[Entry]:
    """The started requests of a step that have a LOST cache."""
    lost = set(scheduler.memory.lost())
    found = [scheduler.find(request.request_id) for request in step.requests if request.request_id in lost]
    mine = {id(request) for request in step.requests}
    return [entry for entry in found if entry is not None and entry.started and id(entry.request) in mine]


def apply_outputs(scheduler: Scheduler, step: Step, given: dict[Any, Any]) -> None:
    """See `Scheduler.update`."""
    roster = scheduler.memory.roster
    found, ended, failed = roster.collect(step.number, given)
    for age, reason in ended:
        done = scheduler.of_age(age)
        scheduler.outlook.ended(done.request)
        scheduler.end(done, reason)
    for age, what in failed:
        _fail(scheduler, scheduler.of_age(age), what)
    for chunk in step.context:
        found += chunk.request.request_id in given
        entry = scheduler.find(chunk.request.request_id)
        if entry is not None and entry.request is chunk.request and entry.started:
            _take_chunk(scheduler, entry, chunk, given.get(chunk.request.request_id, ()))
    if found < len(given):
        _fail_strangers(scheduler, step, given)


def _fail_strangers(scheduler: Scheduler, step: Step, given: Mapping[Any, Any]) -> None:
    known = {request.request_id for request in step.requests}
    for request_id in given:
        entry = scheduler.find(request_id)
        if request_id not in known and entry is not None:
            _fail(scheduler, entry, "tokens for a request that is not in the step")


def _take_chunk(scheduler: Scheduler, entry: Entry, chunk: Context, given: Any) -> None:
    request = entry.request
    end = chunk.start + chunk.num_tokens
    inputs = request.token_slice(chunk.start, end)
    if not chunk.is_last:
        if _count(given):
            _fail(scheduler, entry, f"{given!r} for a chunk that is not its last")
        elif _commit(scheduler, entry, inputs):
            request._computed = end
        return
    produced = len(request.output_tokens)
    reason, wrong = scheduler.memory.roster.take(entry.age, given, inputs)
    if wrong is not None:
        _fail(scheduler, entry, wrong)
        return
    request._computed = end
    if reason is not None:
        scheduler.outlook.ended(request)
        scheduler.end(entry, reason)
    elif len(request.output_tokens) == produced + 1:
        scheduler.generates(entry)  # else what came out besides the next token is a chunk of its own


def _count(given: Any) -> int:
    try:
        return len(given)
    except TypeError:
        return 1


def _commit(scheduler: Scheduler, entry: Entry, inputs: Int32Array) -> bool:
    """Inputs whose pages the step wrote are final. False: the request failed."""
    try:
        scheduler.memory.commit(entry, inputs)
    except (KeyError, LogicError) as caught:
        error = caught if isinstance(caught, LogicError) else LogicError("its cache was closed by others")
        scheduler.end(entry, "error", error)
        return False
    return True


def _fail(scheduler: Scheduler, entry: Entry, what: str) -> None:
    scheduler.end(entry, "error", LogicError(f"request {entry.request.request_id!r}: the executor returned {what}"))
