"""What one pass has decided; what is counted over all of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from kvpool.scheduler.request import Request


class Context(NamedTuple):
    """Prompt tokens [start, start + num_tokens) of a request; a last chunk yields a token."""

    request: Request
    start: int
    num_tokens: int
    is_last: bool


class Step:
    """Work of one forward pass. Handed out once, never enlarged; `Scheduler.update` takes it back.

    Who turns out to have lost pages leaves it before the launch (`Scheduler.drop_lost`).

    context: chunks, those that are not a request's last before the last ones, each sorted by adapter, none first.
    generation: requests whose last token and drafts are computed, sorted by adapter. suspended, recompute: who gave way
    in this pass. refused: (request, error) of a list that can never run. num_tokens: of all, drafts included.
    """

    __slots__ = ("context", "generation", "num_tokens", "number", "recompute", "refused", "suspended")

    def __init__(self, number: int = 0) -> None:
        self.number = number  # from 1; 0: it was not handed out
        self.context: list[Context] = []
        self.generation: list[Request] = []
        self.suspended: list[Request] = []
        self.recompute: list[Request] = []
        self.refused: list[tuple[Request, Exception]] = []
        self.num_tokens = 0

    @property
    def requests(self) -> Iterator[Request]:
        """All that are in work: contexts, then generations."""
        for chunk in self.context:
            yield chunk.request
        yield from self.generation

    @property
    def generation_tokens(self) -> list[int]:
        """Of each generation, before the update: tokens to compute, the last token and drafts, clipped at the end."""
        return [request.generation_tokens for request in self.generation]

    def inherit(self, before: Step) -> None:
        """An earlier pass of the same call, in which nobody ran: those who gave way in it, unless they run now."""
        for mine, theirs in ((self.suspended, before.suspended), (self.recompute, before.recompute)):
            known = {id(request) for request in [*self.requests, *self.suspended, *self.recompute]}
            mine[:0] = [request for request in theirs if id(request) not in known]

    def drop(self, gone: Sequence[Request]) -> None:
        """These are not computed in it, but again: before its update."""
        known = {id(request) for request in gone}
        self.num_tokens -= sum(chunk.num_tokens for chunk in self.context if id(chunk.request) in known)
        self.num_tokens -= sum(request.generation_tokens for request in self.generation if id(request) in known)
        self.context = [chunk for chunk in self.context if id(chunk.request) not in known]
        self.generation = [request for request in self.generation if id(request) not in known]
        self.recompute += gone

    def __bool__(self) -> bool:
        """Whether there is anything to execute."""
        return self.num_tokens > 0

    def __repr__(self) -> str:
        return (
            f"<kvpool step: {len(self.context)} contexts, {len(self.generation)} generations, {self.num_tokens} tokens>"
        )


@dataclass(slots=True)
class SchedulerStats:
    """Counted since construction: passes with work, preemptions, tokens computed again."""

    steps: int = 0
    suspended: int = 0
    recomputed: int = 0
    recomputed_tokens: int = 0
