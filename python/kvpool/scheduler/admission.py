"""Who fits at all, and who may start.

A request fits alone if every pool of every manager has the slots that it can come to hold, and a step the tokens. One
that fits alone may start, without a tier below, only if nobody started will run short later: every started request is
assumed to grow to its expected output.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvpool._core import Roster
from kvpool.batches import scope_of
from kvpool.errors import ConfigError, RequestTooLargeError
from kvpool.scheduler.config import SchedulerConfig
from kvpool.scheduler.memory import Claimed, Memory
from kvpool.scheduler.request import Entry, Request
from kvpool.sizing import peak_slots


def check_request(request: Request, config: SchedulerConfig, memory: Memory) -> None:
    """RequestTooLargeError, with the numbers, unless the request runs when it has everything to itself.

    ConfigError: more drafts than CacheConfig allows for, or an adapter that has no pages in the AdapterBudget.
    ValueError: the epoch of its scope is above a manager's.
    """
    n, m, draft = len(request._prompt), request.max_new_tokens, request.draft_tokens
    who = f"request {request.request_id!r}"
    for side in memory.sides:
        side.manager.probe([], scope_of(request))  # the epoch of the scope may not be above the manager's
        if draft > side.config.draft_tokens:
            raise ConfigError(
                f"draft_tokens: {draft} of {who} is above CacheConfig.draft_tokens = {side.config.draft_tokens}; "
                "raise it there, so that reservations count it"
            )
        most = side.config.max_seq_len
        if most is not None and n + m > most:
            raise too_large(who, "max_seq_len", n + m, most, "tokens in all (prompt + max_new_tokens)")
    check_pools(request, config, memory)
    if 1 + draft > config.max_num_tokens:
        raise too_large(who, "max_num_tokens", 1 + draft, config.max_num_tokens, "tokens in a step (1 + draft_tokens)")
    if config.chunk_tokens is None and n + m - 1 > config.max_num_tokens:
        raise too_large(
            who, "max_num_tokens", n + m - 1, config.max_num_tokens,
            "tokens in a step (its whole context, computed again near its end); use chunk_tokens",
        )  # fmt: skip
    adapters = config.adapters
    if adapters is not None and request.lora_id is not None:
        if request.lora_id not in adapters.pages:
            raise ConfigError(
                f"lora_id: {request.lora_id!r} of {who} is not in AdapterBudget.pages; there are "
                f"{', '.join(map(repr, adapters.pages))}"
            )
        pages = adapters.pages[request.lora_id]
        if pages > adapters.budget:
            raise too_large(who, "the adapter budget", pages, adapters.budget, f"pages for adapter {request.lora_id!r}")


def check_pools(request: Any, config: SchedulerConfig, memory: Memory) -> None:
    """RequestTooLargeError unless every pool has the slots that it can come to hold alone.

    request: whatever has request_id and what `peak_slots` reads.
    """
    names = memory.names()
    at = 0
    for side in memory.sides:
        peaks = peak_slots(side.config, request, config.chunk_tokens)
        for pool, needed in zip(side.pools, peaks.values(), strict=True):
            if needed > memory.slots[at]:
                raise RequestTooLargeError(
                    f"request {request.request_id!r} needs {needed} slots of {names[at]} at its peak, there are "
                    f"{memory.slots[at]}; shorten it, use chunk_tokens, or raise device_bytes",
                    pool=pool.name, needed=needed, available=memory.slots[at],
                )  # fmt: skip
            at += 1


def too_large(who: str, pool: str, needed: int, available: int, what: str) -> RequestTooLargeError:
    """The error of a request that can never run; `pool`, `needed` and `available` are its attributes."""
    return RequestTooLargeError(
        f"{who} needs {needed} {what}, {pool} has {available}", pool=pool, needed=needed, available=available
    )


class Outlook:
    """How long requests are expected to become, learnt from those that ended.

    The share of max_new_tokens that a request is expected to use: 1 at first, then the mean of those that ended, raised
    half of the way to 1 by every request that had to be computed again and lowered again by those that end.
    """

    def __init__(self) -> None:
        self._ended = 0
        self._share = 1.0
        self._caution = 0.0
        self.error = 0.0  # mean, of the shares expected of those that ended

    @property
    def share(self) -> float:
        """Expected output / max_new_tokens."""
        return self._share + self._caution * (1.0 - self._share)

    def expect(self, share: float) -> None:
        """Begin with another share than 1: what is known of the workload."""
        if not 0.0 <= share <= 1.0:
            raise ValueError(f"share: {share!r} is not in 0..1")
        self._share = share

    def ended(self, request: Request) -> None:
        """A request ended by itself."""
        self._ended += 1
        share = len(request.output_tokens) / request.max_new_tokens
        self.error += (abs(share - self._share) - self.error) / min(self._ended, 256)
        self._share += (share - self._share) / min(self._ended, 256)
        self._caution *= 0.98

    def recomputed(self) -> None:
        """A request was freed, to be computed again: the expectation was too low."""
        self._caution += (1.0 - self._caution) / 2


class Forecast:
    """Requests as they will grow, by pool: those of a roster, and those that are added."""

    def __init__(self, memory: Memory, roster: Roster, share: float) -> None:
        self._memory, self._share = memory, share
        self._rows = roster.forecast(share)

    def add(self, entry: Entry, available: list[int] | None = None) -> tuple[int, int, int] | None:
        """A request that holds nothing counts from here on.

        available: per pool, slots that can be had. If some pool would overflow it is not added: (pool, step, missing).
        """
        nothing = self._memory.nothing
        return self._start(entry, self._memory.most(entry), nothing, nothing, available)

    def refuses(self, claim: Claimed, available: list[int]) -> str | None:
        """Why the claimed request must not start yet, or None: then it counts as started from here on.

        available: per pool, slots that can be had besides what the claim has and was promised.
        """
        entry, at = claim.entry, 0
        most = self._memory.most(entry)
        held = [s + t for s, t in zip(claim.shared, claim.taken, strict=True)]
        for side in self._memory.sides:
            blocks = -(-entry.length // side.config.tokens_per_block)
            for _ in side.pools:
                now = min(most[at], blocks + 1) - held[at]
                if now > available[at]:
                    name = self._memory.names()[at]
                    return f"{name} has {available[at]} slots for the {now} that its context needs now"
                at += 1
        over = self._start(entry, most, held, claim.taken, available)
        if over is None:
            return None
        pool, step, missing = over
        return (
            f"{self._memory.names()[pool]} would lack {missing} slots in {step} steps, with every started request "
            "growing to its expected output"
        )

    def start(self, claim: Claimed) -> None:
        """The claimed request counts as started from here on."""
        held = [s + t for s, t in zip(claim.shared, claim.taken, strict=True)]
        most = self._memory.most(claim.entry)
        self._start(claim.entry, most, held, claim.taken, None)

    def _start(
        self, entry: Entry, most: list[int], held: list[int], back: Sequence[int], available: list[int] | None
    ) -> tuple[int, int, int] | None:
        request = entry.request
        produced = len(request.output_tokens)
        return self._rows.start(
            self._share, entry.length, request.max_new_tokens, produced, most, held, back, available
        )
