"""What the scheduler is built from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from kvpool.config import _int, _opt_int
from kvpool.errors import ConfigError

VICTIMS = ("newest", "cheapest")
ADMISSIONS = ("latency", "throughput")


@dataclass(frozen=True, slots=True)
class AdapterBudget:
    """Adapters (LoRA) that the started requests may need at once.

    pages: {lora_id: pages of the adapter}. budget: pages for all adapters together.
    """

    pages: Mapping[int | str, int]
    budget: int

    def __post_init__(self) -> None:
        if not isinstance(self.pages, Mapping):
            raise ConfigError(f"pages: {self.pages!r} is not a mapping of lora_id to pages")
        for lora_id, pages in self.pages.items():
            _int(f"pages[{lora_id!r}]", pages, 0)
        object.__setattr__(self, "pages", dict(self.pages))
        _int("budget", self.budget, 0)


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Limits of one step and of what is started.

    max_batch_size: requests in a step. max_num_tokens: tokens in a step, drafts included. chunk_tokens: unit of chunked
    prefill; None: a prompt is computed in one step. max_bypass: first chunks of younger requests that may overtake a
    waiting one while it is refused. max_started: requests that hold pages, running or suspended (None: max_batch_size).
    adapters: None for no limit. victim: which of the younger requests gives way, "newest" or "cheapest" (the one whose
    return costs the fewest tokens).

    admission: what starts where there is no tier below to suspend requests to; with one it says nothing. "latency": as
    many as can grow to their expected ends together, so that hardly anything is computed again. "throughput": all that
    wait, if their contexts fit now, else as "latency"; where memory runs short many give way at once, and return when
    a request has ended. Work that is all there at once ends in fewer steps, at the cost of some tokens computed again
    and of a later mean end. It gains where outputs become as long as expected.
    """

    max_batch_size: int
    max_num_tokens: int
    chunk_tokens: int | None = None
    max_bypass: int = 16
    max_started: int | None = None
    adapters: AdapterBudget | None = None
    victim: str = field(default="newest", kw_only=True)
    admission: str = field(default="latency", kw_only=True)

    def __post_init__(self) -> None:
        _int("max_batch_size", self.max_batch_size, 1)
        _int("max_num_tokens", self.max_num_tokens, 1)
        _opt_int("chunk_tokens", self.chunk_tokens, 1)
        if self.chunk_tokens is not None and self.chunk_tokens > self.max_num_tokens:
            raise ConfigError(
                f"chunk_tokens: {self.chunk_tokens} is above max_num_tokens = {self.max_num_tokens}; no chunk would "
                "fit into a step"
            )
        _int("max_bypass", self.max_bypass, 0)
        _opt_int("max_started", self.max_started, 1)
        if self.adapters is not None and not isinstance(self.adapters, AdapterBudget):
            raise ConfigError(f"adapters: {self.adapters!r} is not an AdapterBudget")
        if self.victim not in VICTIMS:
            raise ConfigError(f"victim: {self.victim!r} is none of {', '.join(VICTIMS)}")
        if self.admission not in ADMISSIONS:
            raise ConfigError(f"admission: {self.admission!r} is none of {', '.join(ADMISSIONS)}")

    @property
    def most_started(self) -> int:
        """`max_started`, or what it defaults to."""
        return self.max_batch_size if self.max_started is None else self.max_started
