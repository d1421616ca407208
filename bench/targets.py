"""The project's targets beside what the results say, each as a ratio against a rival or a floor of the same run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tables import CORE, KVBM, WINDOWED, Results, number, table

SGLANG, VLLM = "SGLang 0.5.23", "vLLM 0.33.0"
SGLANG_EXTRA = {0.8: 8.9, 0.7: 7.9, 0.5: 5.6}  # tokens computed twice when memory is short, as published


def _rust(results: Results) -> Iterator[tuple[str, float, str, float]]:
    """(target, bound, "least" or "most", figure); ratios are of medians."""
    rust = results["rust"]
    claim, churn = rust["claim"], rust["churn"]
    w1, w1t = claim["W1"], claim["W1t"]
    yield "W1: kvbm-logical / kvpool", 20, "least", w1["to_first"][KVBM][1]
    yield "W1t / W1", 1.5, "most", 1 / w1t["to_first"]["kvpool-core, W1 in the same round"][1]
    yield "W1: windowed pool besides / one pool", 1.5, "most", w1["to_first"][WINDOWED][1]
    yield "W2: kvbm-logical / kvpool", 10, "least", churn["to_first"][KVBM][1]
    by_leaves = {row["leaves"]: row["figures"][CORE][1] for row in rust["scale"]["leaves"]}
    yield "W2l: 16,384 leaves / 1,024", 1.5, "most", by_leaves[16_384] / by_leaves[1_024]
    for workload, bound in (("W1, own sequences", 1.7), ("W1, one shared sequence", 1)):
        one, two, _ = rust["threads"][workload][CORE]
        yield f"{workload}: work of two threads / of one, by the clock (minima)", bound, "least", two["work"]
        by_cpu = 2 * one["cpu"][1] / two["cpu"][1]
        yield f"{workload}: the same by CPU time, as if both always ran", bound, "least", by_cpu
    allocations = rust["allocations"][CORE].values()
    yield "heap allocations in a call of 64 blocks", 0, "most", max(allocations)
    memory = rust["memory"]["kvpool-core, per pool besides its tokens"]
    yield "bytes per block and pool besides its tokens", 128, "most", memory
    sizes = rust["scale"]["sizes"]
    first, last = sizes[0], sizes[-1]
    floor = last["dependent_load"] / first["dependent_load"]
    for workload in ("W1", "W2"):
        growth = last[CORE][workload][1] / first[CORE][workload][1]
        name = f"{workload}: {last['blocks']:,} blocks / {first['blocks']:,}, by the growth of a dependent load"
        yield name, 1, "most", growth / floor
    for row in rust["trace"]:
        ns = row["ns"]
        yield f"W3, {row['blocks']:,} blocks: kvpool / kvbm-logical", 1, "most", ns[CORE][1] / ns[KVBM][1]


def _python(results: Results) -> Iterator[tuple[str, float, str, float]]:
    python = results["python"]
    w1, w2 = python["blocks"]["W1"], python["blocks"]["W2"]
    yield "W1 from Python: SGLang / kvpool", 5, "least", w1[SGLANG][1] / w1["kvpool"][1]
    yield "W1 from Python: vLLM / kvpool", 15, "least", w1[VLLM][1] / w1["kvpool"][1]
    windowed = python["blocks"]["W1, windowed pool besides"]["kvpool"][1]
    yield "W1 from Python: windowed pool besides / one pool", 1.5, "most", windowed / w1["kvpool"][1]
    yield "W2 from Python: SGLang / kvpool", 10, "least", w2[SGLANG][1] / w2["kvpool"][1]
    yield "W2 from Python: vLLM / kvpool", 10, "least", w2[VLLM][1] / w2["kvpool"][1]
    w4 = {case: {name: one["together"][0] for name, one in by.items()} for case, by in python["w4"].items()}
    yield "W4 A: SGLang / kvpool (minima)", 10, "least", w4["A"][SGLANG] / w4["A"]["kvpool"]
    yield "W4 B / A (minima)", 1.2, "most", w4["B"]["kvpool"] / w4["A"]["kvpool"]
    asked = w4["B, somebody comes and goes in each step"]["kvpool"]
    yield "W4 B, somebody comes and goes in each step / A (minima)", 1.2, "most", asked / w4["A"]["kvpool"]
    yield "W4 C: vLLM / kvpool (minima)", 10, "least", w4["C"][VLLM] / w4["C"]["kvpool"]
    by_waiting = {row["waiting"]: row["A"][0] for row in results["waiting"]}
    yield "W4 A: 4,000 waiting / 16 (minima)", 1.2, "most", by_waiting[4_000] / by_waiting[16]
    for ratio, extra_percent in SGLANG_EXTRA.items():
        short = python["short"][f"equal, {ratio}"]
        mine, name = short["kvpool, throughput"], f"memory short, {ratio} of the need, throughput"
        yield f"{name}: vLLM's steps - kvpool's", 1, "least", short[VLLM]["steps"] - mine["steps"]
        yield f"{name}: extra tokens, %, SGLang's as published", extra_percent, "most", mine["extra_percent"]
    for blocks, by in python.get("w3", {}).items():
        lead = by["kvpool"]["hit_percent"] - by[VLLM]["hit_percent"]
        yield f"W3, {int(blocks):,} blocks: hit rate above vLLM's, points", 0, "least", round(lead, 2)


def figures(results: Results) -> list[tuple[str, float, str, float, bool]]:
    """(target, bound, "least" or "most", figure, met)"""
    found = []
    for name, bound, kind, value in [*_rust(results), *_python(results)]:
        met = value >= bound if kind == "least" else value <= bound
        found.append((name, bound, kind, value, met))
    return found


def markdown(results: Results) -> str:
    rows: list[list[Any]] = []
    for name, bound, kind, value, met in figures(results):
        measured = number(value) if met else f"**{number(value)}**, missed"
        rows.append([name, f"at {kind} {bound:g}", measured])
    return table(["", "target", "measured"], rows)
