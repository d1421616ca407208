"""The numbers of a run: the JSON object and, with rich, the table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from rich.table import Table

PoolBooks = dict[str, dict[str, dict[str, int]]]


@dataclass(frozen=True, slots=True)
class Sample:
    """A moment of a timed run; the counters since its start."""

    seconds: float
    pools: PoolBooks
    reused_tokens: int
    prompt_tokens: int
    evicted: int
    dropped: int
    offloaded: int
    onboarded: int
    step_us: tuple[float, float]  # mean and p99 of the steps since the last sample
    active: int
    suspended: int
    waiting: int


@dataclass(slots=True)
class Times:
    """Of the requests that ended, in the order in which they ended; simulated seconds. model: what they follow.

    queue: from arrival to the start of the first step. first_token: from arrival to the end of the step that yielded
    it. per_token: of a request with more than one output token, the mean from one to the next.
    """

    model: str
    simulated_s: float = 0.0
    arrivals: list[float] = field(default_factory=list)
    queue: list[float] = field(default_factory=list)
    first_token: list[float] = field(default_factory=list)
    per_token: list[float] = field(default_factory=list)


@dataclass(slots=True)
class Report:
    """What a replay counted. Hit rates: fractions 0..1. evicted, dropped, offloaded, onboarded: pages.

    In simulated time prompts, reuse and the bound are counted when a request first starts: a refused one counts in
    `requests` and `refused` alone, and what is computed again after a preemption in `recomputed_tokens`.
    """

    requests: int = 0
    prompt_tokens: int = 0
    reused_tokens: int = 0
    prompt_blocks: int = 0
    reused_blocks: int = 0
    bound_blocks: int = 0  # what a cache without a bound would have reused
    evicted: int = 0
    dropped: int = 0
    offloaded: int = 0
    onboarded: int = 0
    suspended: int = 0
    recomputed_tokens: int = 0
    steps: int = 0
    step_us_p50: float | None = None
    step_us_p99: float | None = None
    bytes_checked: int = 0
    pools: PoolBooks = field(default_factory=dict)
    recomputed: int = 0  # requests freed to be computed again
    refused: int = 0  # could not run even alone
    output_tokens: int = 0
    # Not in the JSON:
    times: Times | None = None  # of a run in simulated time
    too_long: int = 0  # sequential: requests with more blocks than the device has slots
    refusal: str = ""  # the first one
    interrupted: bool = False
    wrong: str | None = None  # what was wrong with which byte
    seconds: float = 0.0
    step_us_sum: float = 0.0
    samples: list[Sample] = field(default_factory=list)

    @property
    def hit_rate_tokens(self) -> float:
        return _rate(self.reused_tokens, self.prompt_tokens)

    @property
    def hit_rate_blocks(self) -> float:
        return _rate(self.reused_blocks, self.prompt_blocks)

    @property
    def hit_rate_bound(self) -> float:
        return _rate(self.bound_blocks, self.prompt_blocks)

    def to_dict(self) -> dict[str, Any]:
        """Every key, in the documented order; 0 or None where nothing applies.

        Behind `pools` stand those of a run in simulated time: tokens_per_s are prompt and output tokens, ttft_s is the
        time to first token, tpot_s the time per output token, queue_s the time until the first step; see `Times`.
        """
        names = (
            "requests prompt_tokens reused_tokens prompt_blocks reused_blocks hit_rate_tokens "
            "hit_rate_blocks hit_rate_bound evicted dropped offloaded onboarded suspended "
            "recomputed_tokens steps step_us_p50 step_us_p99 bytes_checked pools recomputed refused output_tokens"
        )
        result = {name: getattr(self, name) for name in names.split()}
        times = self.times or Times("")
        result["simulated_s"] = times.simulated_s if self.times else None
        result["tokens_per_s"], result["output_tokens_per_s"] = self.throughput()
        for name, values in (("ttft_s", times.first_token), ("tpot_s", times.per_token), ("queue_s", times.queue)):
            result[f"{name}_p50"], result[f"{name}_p99"] = percentiles(values)
        return result

    def throughput(self) -> tuple[float | None, float | None]:
        """Tokens per simulated second: prompt (reused ones too) and output together, output alone."""
        seconds = self.times.simulated_s if self.times else 0.0
        if not seconds:
            return None, None
        return (self.prompt_tokens + self.output_tokens) / seconds, self.output_tokens / seconds

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2) + "\n"


def _rate(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


def percentiles(values: Sequence[float]) -> tuple[float | None, float | None]:
    """p50 and p99, interpolated; None of nothing."""
    if not values:
        return None, None
    p50, p99 = np.percentile(values, [50, 99])
    return float(p50), float(p99)


def tables(report: Report) -> list[Table]:
    """The result as rich tables: the run, its times if it was in simulated time, then the pools' slots."""
    return [_run_table(report), *([_times_table(report)] if report.times else []), _books_table(report)]


def _new(*columns: str, header: bool = True) -> Table:
    from rich.table import Table

    table = Table(show_header=header)
    for at, column in enumerate(columns):
        table.add_column(column, no_wrap=at == 0 or not header, justify="right" if at else "left")
    return table


def _run_table(report: Report) -> Table:
    run = _new("what", "value", header=False)
    run.add_row("requests", f"{report.requests:,}")
    if report.refused:
        run.add_row("  refused: longer than the device", f"{report.refused:,}")
    if report.too_long:
        run.add_row("  longer than the device, cut to it", f"{report.too_long:,}")
    run.add_row("prompt tokens", f"{report.prompt_tokens:,}")
    run.add_row("reused tokens", f"{report.reused_tokens:,}")
    run.add_row("prompt blocks", f"{report.prompt_blocks:,}")
    run.add_row("reused blocks", f"{report.reused_blocks:,}")
    run.add_row("hit rate, tokens", f"{report.hit_rate_tokens:.2%}")
    run.add_row("hit rate, blocks", f"{report.hit_rate_blocks:.2%}")
    run.add_row("  bound for any cache", f"{report.hit_rate_bound:.2%}")
    run.add_row("pages evicted", f"{report.evicted:,}")
    run.add_row("pages dropped", f"{report.dropped:,}")
    if report.times:
        run.add_row("pages offloaded", f"{report.offloaded:,}")
        run.add_row("pages onboarded", f"{report.onboarded:,}")
        run.add_row("requests suspended", f"{report.suspended:,}")
        run.add_row("requests freed and recomputed", f"{report.recomputed:,}")
        run.add_row("tokens recomputed", f"{report.recomputed_tokens:,}")
    run.add_row("bytes checked", f"{report.bytes_checked:,}")
    run.add_row("seconds", f"{report.seconds:.1f}")
    return run


def _times_table(report: Report) -> Table:
    times = report.times
    assert times is not None
    table = _new("time", "p50", "p99")
    table.caption = f"Simulated time follows {times.model}: it is no measurement."
    for name, values in (
        ("waiting to start, simulated s per request", times.queue),
        ("time to first token, simulated s per request", times.first_token),
        ("time per output token, simulated s, mean of a request", times.per_token),
    ):
        table.add_row(name, *("-" if value is None else f"{value:,.3f}" for value in percentiles(values)))
    step = (report.step_us_p50, report.step_us_p99)
    table.add_row("scheduler and manager, CPU µs per step", *("-" if us is None else f"{us:,.0f}" for us in step))
    table.add_section()
    both, output = report.throughput()
    table.add_row("", "in all", "")
    table.add_row("steps", f"{report.steps:,}", "")
    table.add_row("simulated s", f"{times.simulated_s:,.0f}", "")
    table.add_row("prompt and output tokens per simulated s", f"{both or 0:,.0f}", "")
    table.add_row("  output tokens alone", f"{output or 0:,.0f}", "")
    table.add_row("scheduler and manager, CPU s", f"{report.step_us_sum / 1e6:,.1f}", "")
    return table


def _books_table(report: Report) -> Table:
    # One column per pool and tier: it stays readable with large counts and several pools.
    columns = [(pool, tier, counts) for pool, tiers in report.pools.items() for tier, counts in tiers.items()]
    books = _new("slots", *(f"{pool}, {tier}" for pool, tier, _ in columns))
    for name in ("slots", "free", "active", "held", "cached", "fenced", "peak"):
        label = "in all" if name == "slots" else name
        books.add_row(label, *(f"{counts[name]:,}" for _, _, counts in columns))
    return books
