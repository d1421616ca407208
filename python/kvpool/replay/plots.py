"""The result of a timed replay as one HTML page. plotly: interactive plots in a file that needs no network."""

from __future__ import annotations

from typing import Any

from kvpool.replay.report import Report


def html(report: Report, title: str) -> str:
    """A page with five plots over simulated time: pages, hit rate, evictions and moves, requests, scheduler time."""
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    samples = report.samples
    at = [sample.seconds for sample in samples]
    tiers = [(pool, tier) for pool, by_tier in report.pools.items() for tier in by_tier]
    names = [f"pages of pool {pool}, {tier}" for pool, tier in tiers]
    names += ["hit rate, tokens, since the start", "pages evicted and moved", "requests", "scheduler time per step, µs"]
    figure = make_subplots(rows=len(names), cols=1, shared_xaxes=True, subplot_titles=names, vertical_spacing=0.04)

    def line(row: int, name: str, values: list[Any], **style: Any) -> None:
        figure.add_trace(go.Scatter(x=at, y=values, name=name, mode="lines", **style), row=row, col=1)

    for row, (pool, tier) in enumerate(tiers, start=1):
        for kind in ("active", "held", "cached", "fenced", "free"):
            line(row, f"{pool}, {tier}: {kind}", [s.pools[pool][tier][kind] for s in samples], stackgroup=f"pages{row}")
    row = len(tiers) + 1
    line(row, "hit rate", [s.reused_tokens / max(1, s.prompt_tokens) for s in samples])
    line(row, "bound, whole run", [report.hit_rate_bound] * len(samples), line={"dash": "dot"})
    for name in ("evicted", "offloaded", "onboarded"):
        line(row + 1, name, [getattr(s, name) for s in samples])
    for name in ("active", "suspended", "waiting"):
        line(row + 2, name, [getattr(s, name) for s in samples])
    line(row + 3, "mean since the last point", [s.step_us for s in samples])
    figure.update_layout(title=title, height=280 * len(names), hovermode="x unified", template="plotly_white")
    figure.update_yaxes(rangemode="tozero")
    figure.update_xaxes(title_text="simulated seconds", row=len(names), col=1)
    page: str = figure.to_html(include_plotlyjs=True, full_html=True)
    return page
