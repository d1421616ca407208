"""What comes back from the executor: inputs are committed, outputs appended, requests end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from kvpool.errors import LogicError
from kvpool.scheduler.request import Entry, RequestState
from kvpool.scheduler.step import Step

if TYPE_CHECKING:
    from kvpool.scheduler.scheduler import Scheduler


def apply_outputs(scheduler: Scheduler, step: Step, outputs: Mapping[int | str, Sequence[int]]) -> None:
    """See `Scheduler.update`."""
    in_step = {entry.request.request_id: entry for entry in step.entries}
    for chunk in step.context:
        entry = in_step[chunk.request.request_id]
        if entry.request.state is RequestState.FINISHED:
            continue
        given = outputs.get(chunk.request.request_id, ())
        if chunk.is_last:
            _take(scheduler, entry, chunk.num_tokens, given)
        elif len(given):
            _fail(scheduler, entry, f"{len(given)} tokens for a chunk that is not its last")
        else:
            _commit(scheduler, entry, chunk.num_tokens)
    for request in step.generation:
        entry = in_step[request.request_id]
        if request.state is not RequestState.FINISHED:
            given = outputs.get(request.request_id, ())
            _take(scheduler, entry, len(given), given)
    for request_id in outputs:
        if request_id not in in_step:
            stranger = scheduler.find(request_id)
            if stranger is not None:
                _fail(scheduler, stranger, "tokens for a request that is not in the step")


def _take(scheduler: Scheduler, entry: Entry, num_inputs: int, given: Sequence[int]) -> None:
    """Tokens of a generation or a last chunk."""
    request = entry.request
    most = 1 + request.draft_tokens
    try:
        tokens = [int(token) for token in given]
    except (TypeError, ValueError):
        _fail(scheduler, entry, f"{given!r}, which is not a list of tokens")
        return
    if not 1 <= len(tokens) <= most:
        _fail(scheduler, entry, f"{len(tokens)} tokens where 1 to {most} are due")
        return
    if not all(0 <= token < 2**31 for token in tokens):
        _fail(scheduler, entry, f"{tokens!r}, which are not all in 0..2**31-1")
        return
    reason = None
    tokens = tokens[: request.max_new_tokens - len(request.output_tokens)]
    for at, token in enumerate(tokens):
        if token in request._stops:
            tokens, reason = tokens[: at + 1], "stop"
            break
    is_generation = entry.generates
    request.output_tokens += tokens
    if reason is None and len(request.output_tokens) >= request.max_new_tokens:
        reason = "length"
    if not _commit(scheduler, entry, len(tokens) if is_generation else num_inputs):
        return
    if reason is not None:
        scheduler.outlook.ended(request)
        scheduler.end(entry, reason)


def _commit(scheduler: Scheduler, entry: Entry, num_tokens: int) -> bool:
    """Inputs whose pages the step wrote are final. False: the request failed."""
    request = entry.request
    start = request.num_computed
    tokens = entry.tokens(start, start + num_tokens)
    try:
        scheduler.memory.commit(entry, tokens)
    except LogicError as error:
        scheduler.end(entry, "error", error)
        return False
    request.num_computed = start + num_tokens
    return True


def _fail(scheduler: Scheduler, entry: Entry, what: str) -> None:
    scheduler.end(entry, "error", LogicError(f"request {entry.request.request_id!r}: the executor returned {what}"))
