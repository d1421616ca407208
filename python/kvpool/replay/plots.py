"""The result of a timed replay as one HTML page. plotly: interactive plots in a file that needs no network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvpool.replay.report import Report

# One colour per kind of slot, the same in every plot of pages; what can be evicted or is free stays pale.
_PAGES = {"active": "#1f5fa8", "held": "#e08a1e", "cached": "#a9cbe8", "fenced": "#c0392b", "free": "#eeeeee"}
_REQUESTS = {"active": "#1f5fa8", "suspended": "#e08a1e", "waiting": "#8a8a8a"}
_MOVES = {"evicted": "#1f5fa8", "dropped": "#c0392b", "offloaded": "#e08a1e", "onboarded": "#2e9e5b"}
_NAMES = [
    "hit rate, tokens of prompts that started",
    "pages evicted and moved per simulated second",
    "requests",
    "time to first token, simulated s, by arrival",
    "scheduler time per step, CPU µs",
]
_HEIGHT = 260  # pixels per plot
_MOST_POINTS = 5000
_RECENT = 20  # points of a moving hit rate: prompts start in bursts


def html(report: Report, title: str) -> str:
    """A page of plots over simulated time: pages per pool and tier, hit rate, evictions and moves, requests, time to
    first token, scheduler time.
    """
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    tiers = [(pool, tier) for pool, by_tier in report.pools.items() for tier in by_tier]
    names = [f"pages of pool {pool}, {tier}" for pool, tier in tiers]
    names += _NAMES
    figure = make_subplots(rows=len(names), cols=1, shared_xaxes=True, subplot_titles=names, vertical_spacing=0.035)

    def add(row: int, trace: Any) -> None:
        trace.update(legend="legend" if row == 1 else f"legend{row}")
        figure.add_trace(trace, row=row, col=1)

    samples = report.samples
    at = [sample.seconds for sample in samples]

    def line(row: int, name: str, values: Sequence[float | None], color: str, **style: Any) -> None:
        style.setdefault("line", {"color": color, "width": 1.5})
        add(row, go.Scatter(x=at, y=values, name=name, mode="lines", **style))

    for row, (pool, tier) in enumerate(tiers, start=1):
        for kind, color in _PAGES.items():
            values = [sample.pools[pool][tier][kind] for sample in samples]
            if any(values):
                style = {"stackgroup": "pages", "fillcolor": color, "line": {"color": color, "width": 0}}
                line(row, kind, values, color, **style)
    row = len(tiers) + 1
    prompts = [sample.prompt_tokens for sample in samples]
    reused = [sample.reused_tokens for sample in samples]
    line(row, f"last {_RECENT} points", _ratios(_steps(reused, _RECENT), _steps(prompts, _RECENT)), "#a9cbe8")
    line(row, "since the start", _ratios(reused, prompts), "#1f5fa8", line={"color": "#1f5fa8", "width": 2.5})
    bound = {"color": "#c0392b", "dash": "dot"}
    line(row, "bound, blocks", [report.hit_rate_bound] * len(at), "", line=bound)
    for name, color in _MOVES.items():
        rates = _ratios(_steps([getattr(sample, name) for sample in samples]), _steps(at))
        if any(rates):
            line(row + 1, name, rates, color)
    for name, color in _REQUESTS.items():
        line(row + 2, name, [getattr(sample, name) for sample in samples], color)
    if report.times is not None:
        every = -(-len(report.times.arrivals) // _MOST_POINTS) or 1
        # Not the WebGL kind of points: a browser without it shows a blank page instead of all plots.
        points = go.Scatter(
            x=report.times.arrivals[::every],
            y=report.times.first_token[::every],
            name="one request" if every == 1 else f"one of {every} requests",
            mode="markers",
            marker={"size": 4, "color": "#1f5fa8", "opacity": 0.35},
        )
        add(row + 3, points)
    line(row + 4, "p99", [sample.step_us[1] for sample in samples], "#a9cbe8")
    line(row + 4, "mean", [sample.step_us[0] for sample in samples], "#1f5fa8")
    _lay_out(figure, report, title, len(names))
    page: str = figure.to_html(include_plotlyjs=True, full_html=True)
    return page


def _lay_out(figure: Any, report: Report, title: str, rows: int) -> None:
    """Each plot has its legend beside it."""
    model = f"<br><sup>simulated time follows {report.times.model}</sup>" if report.times else ""
    figure.update_layout(
        title={"text": title + model, "x": 0.01, "xanchor": "left", "y": 1 - 28 / (_HEIGHT * rows), "yanchor": "top"},
        height=_HEIGHT * rows,
        hovermode="x unified",
        template="plotly_white",
        margin={"l": 70, "r": 20, "t": 100, "b": 60},
    )
    for row in range(1, rows + 1):
        top = figure.layout["yaxis" if row == 1 else f"yaxis{row}"].domain[1]
        figure.update_layout({"legend" if row == 1 else f"legend{row}": {"x": 1.01, "y": top, "yanchor": "top"}})
    figure.update_yaxes(rangemode="tozero")
    figure.update_yaxes(tickformat=".0%", row=rows - 4, col=1)
    figure.update_xaxes(showticklabels=True)
    figure.update_xaxes(title_text="simulated seconds", row=rows, col=1)


def _steps(values: Sequence[float], count: int = 1) -> list[float]:
    """What each of the values adds to the one so many before it."""
    return [value - before for before, value in zip([*[0.0] * count, *values], values, strict=False)]


def _ratios(parts: Sequence[float], wholes: Sequence[float]) -> list[float | None]:
    return [part / whole if whole else None for part, whole in zip(parts, wholes, strict=True)]
