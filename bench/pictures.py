"""The pictures of the results. matplotlib: static SVG that a page of Markdown shows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from tables import CORE, DYNAMO, KVBM, Results

mpl.use("svg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

COLORS = {
    CORE: "#1f5fa8", "kvpool": "#1f5fa8", KVBM: "#e08a1e", DYNAMO: "#9a9a9a", "vLLM 0.33.0": "#2e9e5b",
    "SGLang 0.5.23": "#c0392b",
}  # fmt: skip
LABELS = {KVBM: "kvbm-logical 1.6.1", DYNAMO: "dynamo-kv-router 1.6.1 (an index only)"}
STYLE = {
    "svg.fonttype": "none", "svg.hashsalt": "kvpool", "font.family": "sans-serif", "font.size": 9,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True,
    "grid.color": "#e4e4e4", "legend.frameon": False, "figure.constrained_layout.use": True,
}  # fmt: skip


def bars(axes: Axes, title: str, groups: dict[str, dict[str, Sequence[float]]]) -> None:
    """Medians side by side, the figure above each bar; a line down to the least."""
    names = list(dict.fromkeys(name for group in groups.values() for name in group))
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        at = [x + (i - (len(names) - 1) / 2) * width for x, group in enumerate(groups.values()) if name in group]
        ends = [group[name] for group in groups.values() if name in group]
        medians = [median for _, median in ends]
        below = [median - least for least, median in ends]
        drawn = axes.bar(at, medians, width * 0.94, color=COLORS[name], label=LABELS.get(name, name))
        axes.errorbar(at, medians, [below, [0] * len(below)], fmt="none", ecolor="black", elinewidth=0.6)
        axes.bar_label(drawn, [f"{median:,.0f}" for median in medians], padding=1, fontsize=7)
    axes.set_xticks(range(len(groups)), list(groups))
    axes.grid(visible=False, axis="x")
    axes.set_title(title, fontsize=9, loc="left")


def lines(
    axes: Axes, name: str, x: Sequence[float], ends: Sequence[Sequence[float]], suffix: str = "", **style: Any
) -> None:
    """Medians over x, the least as the lower edge of a band."""
    label = LABELS.get(name, name) + suffix
    medians = [median for _, median in ends]
    axes.plot(x, medians, marker="o", markersize=3, color=COLORS[name], label=label, **style)
    axes.fill_between(x, [least for least, _ in ends], medians, color=COLORS[name], alpha=0.15, linewidth=0)


def rivals(found: Results) -> None:
    """W1, W1t, W1s and W2 beside every rival."""
    _, axes = plt.subplots(1, 4, figsize=(11, 3.2), width_ratios=[3, 1, 3, 1])
    claim, churn = found["rust"]["claim"], found["rust"]["churn"]["figures"]
    keep = (CORE, KVBM, DYNAMO)
    claims = {
        name: {system: ends for system, ends in claim[name]["figures"].items() if system in keep}
        for name in ("W1", "W1t", "W1s")
    }
    churns = {CORE: churn[CORE], KVBM: churn[KVBM], DYNAMO: churn["dynamo, insert of 64"]}
    bars(axes[0], "from Rust: claim and release, ns per block", claims)
    bars(axes[1], "churn", {"W2": churns})
    blocks = found["python"]["blocks"]
    bars(
        axes[2],
        "from Python: claim and release, ns per block",
        {name: blocks[name] for name in claims if name in blocks},
    )
    bars(axes[3], "churn", {"W2": blocks["W2"]})
    for one in (axes[0], axes[2]):
        one.set_ylim(0, 1.35 * one.get_ylim()[1])  # room for the legend
        one.legend(fontsize=7, loc="upper left", ncols=2)


def scaling(found: Results) -> None:
    """Cost against the size of the pool, and work against threads."""
    _, axes = plt.subplots(1, 2, figsize=(11, 3.6))
    sizes = found["rust"]["scale"]["sizes"]
    for workload, style in (("W1", "-"), ("W2", "--")):
        for name in (CORE, KVBM):
            rows = [row for row in sizes if row[name]]
            x = [row["blocks"] for row in rows]
            lines(axes[0], name, x, [row[name][workload] for row in rows], f", {workload}", linestyle=style)
    x = [row["blocks"] for row in sizes]
    loads = [row["dependent_load"] for row in sizes]
    axes[0].plot(x, loads, color="black", linestyle=":", marker=".", label="one dependent load in as many bytes")
    axes[0].set(xscale="log", yscale="log", xlabel="blocks of the pool", ylabel="ns per block")
    axes[0].set_title("size of the pool", fontsize=9, loc="left")
    axes[0].legend(fontsize=7, ncols=2)
    styles = {"W1, own sequences": "-", "W1, one shared sequence": ":", "W2": "--"}
    for workload, systems in found["rust"]["threads"].items():
        for name in (CORE, KVBM):
            x = [row["threads"] for row in systems[name]]
            work = [row["work"] for row in systems[name]]
            label = f"{LABELS.get(name, name)}, {workload}"
            axes[1].plot(x, work, styles[workload], marker="o", markersize=3, color=COLORS[name], label=label)
    axes[1].axhline(1, color="black", linewidth=0.6)
    axes[1].set(xlabel="threads, on 2 cores", ylabel="work in the same time, one thread = 1", ylim=(0, None))
    axes[1].set_xticks([1, 2, 4])
    axes[1].set_title("threads", fontsize=9, loc="left")
    axes[1].legend(fontsize=7)


def shapes(found: Results) -> None:
    """Cost against chain length, leaves, pools, waiting requests."""
    _, axes = plt.subplots(1, 4, figsize=(13, 3.2))
    scale = found["rust"]["scale"]
    chains = scale["chains"]
    for name in (CORE, KVBM):
        ends = [[ns / row["blocks"] for ns in row["W1"][name]] for row in chains]
        lines(axes[0], name, [row["blocks"] for row in chains], ends)
    axes[0].set(xscale="log", yscale="log", xlabel="blocks of a chain", ylabel="ns per block, W1")
    for name in (CORE, KVBM):
        x = [row["leaves"] for row in scale["leaves"]]
        lines(axes[1], name, x, [row["figures"][name] for row in scale["leaves"]])
    axes[1].set(xscale="log", xlabel="leaves of 65,536 blocks", ylabel="µs per eviction of 64, W2l", ylim=(0, None))
    full = [row for row in scale["pools"] if not row["windowed"]]
    for workload, style in (("W1", "-"), ("W2", "--")):
        x = [row["full"] for row in full]
        lines(axes[2], CORE, x, [row[workload] for row in full], f", {workload}", linestyle=style)
    axes[2].set(xlabel="full-attention pools", ylabel="ns per block", ylim=(0, None))
    rows = found["waiting"]
    for kind, style in (("A", "-"), ("B asked", "--")):
        lines(
            axes[3],
            "kvpool",
            [row["waiting"] for row in rows],
            [row[kind] for row in rows],
            f", {kind}",
            linestyle=style,
        )
    axes[3].set(xscale="log", xlabel="waiting requests", ylabel="µs per scheduler step, W4", ylim=(0, None))
    for one in axes:
        one.legend(fontsize=7)


def latency(found: Results) -> None:
    """p50, p99, p99.9 and the longest of single operations."""
    latencies = found["rust"]["latency"]
    _, axes = plt.subplots(1, 2, figsize=(11, 4.6), sharey=True, sharex=True)
    marks = {"p50": "o", "p99": "|", "p99.9": "x", "max": "."}
    for one, suffix, title in (
        (axes[0], "", "alone"),
        (axes[1], ", a neighbour churns", "while a second thread churns the same pool"),
    ):
        labels: list[str] = []
        for system in (CORE, KVBM):
            operations = latencies[system + suffix]
            at = [len(labels) + i for i in range(len(operations))]
            us = {mark: [times[mark] / 1e3 for times in operations.values()] for mark in marks}
            one.hlines(at, us["p50"], us["max"], color=COLORS[system], linewidth=0.6)
            for mark, shape in marks.items():
                label = None if labels else "longest" if mark == "max" else mark
                one.plot(us[mark], at, shape, color=COLORS[system], markersize=5, label=label)
            labels += [f"{system}: {operation}" for operation in operations]
        one.set_yticks(range(len(labels)), labels, fontsize=7)
        one.set(xscale="log", xlabel="µs by the wall clock")
        one.set_title(title, fontsize=9, loc="left")
    axes[0].invert_yaxis()
    axes[1].legend(fontsize=7, loc="lower right", bbox_to_anchor=(1, 0.99), ncols=4)


PICTURES: dict[str, Callable[[Results], None]] = {
    "rivals": rivals, "scaling": scaling, "shapes": shapes, "latency": latency,
}  # fmt: skip


def draw(found: Results, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    with mpl.rc_context(STYLE):
        for name, make in PICTURES.items():
            make(found)
            plt.savefig(folder / f"{name}.svg", metadata={"Date": None})
            plt.close()
