"""The numbers of a run: the JSON object and, with rich, the table."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

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
    offloaded: int
    onboarded: int
    step_us: float
    active: int
    suspended: int
    waiting: int


@dataclass(slots=True)
class Report:
    """What a replay counted. Hit rates: fractions 0..1. evicted, dropped, offloaded, onboarded: pages."""

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
    # Not in the JSON:
    too_long: int = 0  # requests with more blocks than the device has slots
    interrupted: bool = False
    wrong: str | None = None  # what was wrong with which byte
    seconds: float = 0.0
    timed: bool = False  # in simulated time
    preempted: int = 0  # requests freed to be computed again
    simulated_s: float = 0.0
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
        """Every key, in the documented order; 0 or None where nothing applies."""
        names = (
            "requests prompt_tokens reused_tokens prompt_blocks reused_blocks hit_rate_tokens "
            "hit_rate_blocks hit_rate_bound evicted dropped offloaded onboarded suspended "
            "recomputed_tokens steps step_us_p50 step_us_p99 bytes_checked pools"
        )
        return {name: getattr(self, name) for name in names.split()}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2) + "\n"


def _rate(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


def tables(report: Report) -> list[Table]:
    """The result as rich tables: the run, then the pools' slots."""
    from rich.table import Table

    run = Table(show_header=False)
    run.add_column("what", no_wrap=True)
    run.add_column("value", justify="right", no_wrap=True)
    run.add_row("requests", f"{report.requests:,}")
    if report.too_long:
        verdict = "refused" if report.timed else "cut to it"
        run.add_row(f"  longer than the device, {verdict}", f"{report.too_long:,}")
    run.add_row("prompt tokens", f"{report.prompt_tokens:,}")
    run.add_row("reused tokens", f"{report.reused_tokens:,}")
    run.add_row("prompt blocks", f"{report.prompt_blocks:,}")
    run.add_row("reused blocks", f"{report.reused_blocks:,}")
    run.add_row("hit rate, tokens", f"{report.hit_rate_tokens:.2%}")
    run.add_row("hit rate, blocks", f"{report.hit_rate_blocks:.2%}")
    run.add_row("  bound for any cache", f"{report.hit_rate_bound:.2%}")
    run.add_row("pages evicted", f"{report.evicted:,}")
    run.add_row("pages dropped", f"{report.dropped:,}")
    if report.timed:
        run.add_row("requests suspended", f"{report.suspended:,}")
        run.add_row("requests freed and recomputed", f"{report.preempted:,}")
        run.add_row("tokens recomputed", f"{report.recomputed_tokens:,}")
        run.add_row("steps", f"{report.steps:,}")
        run.add_row("simulated seconds", f"{report.simulated_s:,.0f}")
    if report.step_us_p50 is not None and report.step_us_p99 is not None:
        run.add_row("scheduler and manager per step, µs, p50", f"{report.step_us_p50:,.0f}")
        run.add_row("  p99", f"{report.step_us_p99:,.0f}")
        run.add_row("  in all, seconds", f"{report.step_us_sum / 1e6:,.1f}")
    run.add_row("bytes checked", f"{report.bytes_checked:,}")
    run.add_row("seconds", f"{report.seconds:.1f}")

    # One column per pool and tier: it stays readable with large counts and several pools.
    columns = [(pool, tier, counts) for pool, tiers in report.pools.items() for tier, counts in tiers.items()]
    books = Table()
    books.add_column("slots", no_wrap=True)
    for pool, tier, _ in columns:
        books.add_column(f"{pool}, {tier}", justify="right")
    for name in ("slots", "free", "active", "held", "cached", "fenced", "peak"):
        label = "in all" if name == "slots" else name
        books.add_row(label, *(f"{counts[name]:,}" for _, _, counts in columns))
    return [run, books]
