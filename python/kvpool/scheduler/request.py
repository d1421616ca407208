"""A request as the user sees it, and what the scheduler knows of it.

WAITING ──first chunk──> RUNNING <──resumed/suspended──> SUSPENDED
   ^                        │                               │
   └───────── freed, to be computed again ──────────────────┤
                            └────────> FINISHED <───────────┘
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from operator import le

import numpy as np

from kvpool.arguments import Int32Array, RetentionSpec, Tokens, count, retention_spec, scope_key, token_array
from kvpool.batches import checked_id, scope_of
from kvpool.config import Retention, Scope
from kvpool.errors import LogicError

# Passes after which a refused start is tried again although nothing seems to have changed: its match may have grown.
RETRY = 32
NOT_LOOKED_AT = "it has not been looked at yet"


class RequestState(StrEnum):
    """Where a request is."""

    WAITING = "WAITING"
    RUNNING = "RUNNING"
    SUSPENDED = "SUSPENDED"
    FINISHED = "FINISHED"


class Request:
    """One prompt, to be continued by up to `max_new_tokens` tokens.

    tokens: the prompt, 1-D ints 0..2^31-1, not empty; what it holds at construction counts. draft_tokens: most drafts
    that a step verifies besides the next token. stop_token_ids: the first of them to come out ends the request and is
    its last token. lora_id=x is short for scope=Scope(lora_id=x). arrival: for the caller's own use. Greedy, sampled or
    whatever: sampling is the executor's; beam search and several returned sequences are not supported.

    Raises ValueError for an empty prompt or max_new_tokens < 1, ConfigError for two different lora_ids.
    """

    __slots__ = (
        "__weakref__", "_computed", "_entry", "_generates", "_prompt", "_stops", "arrival", "draft_tokens", "error",
        "finish_reason", "lora_id", "max_new_tokens", "output_tokens", "request_id", "retention", "scope", "state",
        "stop_token_ids", "tokens",
    )  # fmt: skip

    def __init__(
        self,
        request_id: int | str,
        tokens: Tokens,
        max_new_tokens: int,
        *,
        lora_id: int | str | None = None,
        scope: Scope | None = None,
        retention: Retention | None = None,
        draft_tokens: int = 0,
        stop_token_ids: Iterable[int] = (),
        arrival: float | None = None,
    ) -> None:
        self.request_id = checked_id(request_id)
        self._prompt: Int32Array = token_array(tokens).copy()
        self._prompt.flags.writeable = False
        if not len(self._prompt):
            raise ValueError("tokens: empty; a request needs at least one prompt token")
        self.tokens = tokens
        self.max_new_tokens = count(max_new_tokens, "max_new_tokens")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens: {max_new_tokens} is below 1; a request must want a token")
        self.lora_id = lora_id
        self.scope = scope
        self.retention = retention
        if scope is not None and not isinstance(scope, Scope):
            raise ValueError(f"scope: {scope!r} is not a kvpool.Scope")
        given = scope_of(self)
        if lora_id is None and given is not None:
            self.lora_id = given.lora_id
        retention_spec(retention)
        self.draft_tokens = count(draft_tokens, "draft_tokens")
        if isinstance(stop_token_ids, str) or not isinstance(stop_token_ids, Iterable):
            raise ValueError(f"stop_token_ids: {stop_token_ids!r} is not a list of ints")
        self.stop_token_ids = tuple(stop_token_ids)
        self._stops = frozenset(count(token, "stop_token_ids") for token in self.stop_token_ids)
        self.arrival = arrival
        self.state = RequestState.WAITING
        self.output_tokens: list[int] = []
        self._generates = False  # only the token that came out last is to be computed
        self._computed = 0  # otherwise: tokens that are
        self.finish_reason: str | None = None
        self.error: Exception | None = None
        self._entry: Entry | None = None  # of the scheduler that has it, until it ends

    @property
    def num_computed(self) -> int:
        """Tokens, of prompt and output, whose keys and values are computed."""
        if self._generates:
            return len(self._prompt) + len(self.output_tokens) - 1
        return self._computed

    @property
    def generation_tokens(self) -> int:
        """Tokens of its next generation: the last token and drafts, clipped at the end."""
        last = len(self._prompt) + self.max_new_tokens - 1
        return min(1 + self.draft_tokens, last - self.num_computed)

    def token_slice(self, start: int, end: int) -> Int32Array:
        """Tokens [start, end) of prompt and output: int32, what a chunk of a context covers."""
        n = len(self._prompt)
        if end <= n:
            return self._prompt if end - start == n else self._prompt[start:end]
        output = np.array(self.output_tokens[max(0, start - n) : end - n], np.int32)
        return output if start >= n else np.concatenate([self._prompt[start:], output])

    def __repr__(self) -> str:
        return (
            f"<kvpool request {self.request_id!r}: {self.state.value}, {len(self._prompt)} prompt tokens, "
            f"{len(self.output_tokens)} of {self.max_new_tokens} new>"
        )


def in_use(request: Request) -> LogicError:
    """The error of a second request of an id."""
    return LogicError(
        f"request_id: {request.request_id!r} is in use; ids may be used again once their request has ended"
    )


class Refusal:
    """When a start was refused, so that it is not tried again before something has changed."""

    __slots__ = ("available", "changes", "number", "tokens")

    def __init__(self, number: int, changes: int, tokens: int, available: list[int]) -> None:
        self.number = number  # of the pass
        self.changes = changes  # requests that had started, ended or given way by then
        self.tokens = tokens  # that the step had left
        self.available = available  # per pool

    def is_old(self, number: int) -> bool:
        """Whether it does not hold any more in this pass, even if nothing has changed."""
        return number - self.number >= RETRY

    def holds(self, now: Refusal) -> bool:
        """Whether nothing has got better since, and it is not long ago."""
        same = self.changes == now.changes and now.tokens <= self.tokens and not self.is_old(now.number)
        return same and all(map(le, now.available, self.available))


class Entry:
    """What the scheduler knows of an unfinished request."""

    __slots__ = (
        "adapter", "age", "bypassed", "key", "limit", "lost", "most", "prompt", "refusal", "request", "spec",
        "started", "why",
    )  # fmt: skip

    def __init__(self, request: Request, age: int) -> None:
        self.request = request
        self.age = age  # in the order in which the scheduler first saw them
        self.prompt = request._prompt
        self.limit = len(self.prompt) + request.max_new_tokens - 1  # tokens that are ever computed
        self.most: tuple[list[int], list[int]] | None = None  # see `Memory.most`
        self.adapter = request.lora_id
        self.key: tuple[bytes, int | None] = scope_key(scope_of(request))
        self.spec: RetentionSpec | None = retention_spec(request.retention)
        self.started = False
        self.bypassed = 0  # first chunks of younger ones that overtook it
        self.refusal: Refusal | None = None  # of its start, when it was last looked at
        self.lost = 0  # tokens that were computed when it was freed
        self.why = NOT_LOOKED_AT

    @property
    def length(self) -> int:
        """Tokens of which attention has to know."""
        return len(self.prompt) + len(self.request.output_tokens)

    @property
    def rest(self) -> int:
        """Tokens to be computed before the next one comes out."""
        return self.length - self.request.num_computed

    def left(self, share: float) -> int:
        """Outputs until it ends, as expected; at least one."""
        request = self.request
        return max(1, round(share * request.max_new_tokens) - len(request.output_tokens))

    @property
    def generates(self) -> bool:
        """Whether only the token that came out last is to be computed."""
        return self.request._generates
