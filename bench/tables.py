"""Results as Markdown tables. In a row of systems that do the same work the least median is bold, whoever's it is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

Results = dict[str, Any]
CORE, KVBM, DYNAMO, WINDOWED = "kvpool-core", "kvbm-logical", "dynamo, find only", "kvpool-core, windowed pool besides"


def number(value: float) -> str:
    """Three digits, more only before the point."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.3g}"


def pair(ends: Sequence[float] | None) -> str:
    """min / median."""
    return " / ".join(number(value) for value in ends) if ends else ""


def bold(cells: dict[str, Sequence[float]], least: float | None = None) -> dict[str, str]:
    """Pairs as text, the least median bold; a system alone wins nothing."""
    best = min(ends[1] for ends in cells.values()) if least is None else least
    if least is None and len(cells) == 1:
        best = -1.0
    return {name: f"**{pair(ends)}**" if ends[1] == best else pair(ends) for name, ends in cells.items()}


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [list(head), *[list(row) for row in rows]]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _rust_rows(results: Results) -> list[tuple[str, dict[str, Any], str, str]]:
    """(workload, its turns, what kvpool is in it, what dynamo-kv-router is)"""
    rust = results["rust"]
    claim, churn = rust["claim"], rust["churn"]
    return [
        ("W1", claim["W1"], CORE, DYNAMO),
        ("W1, windowed pool besides", claim["W1"], WINDOWED, ""),
        ("W1t", claim["W1t"], CORE, DYNAMO),
        ("W1s", claim["W1s"], CORE, ""),
        ("W2", churn, CORE, "dynamo, insert of 64"),
        ("W2, windowed pool besides", churn, WINDOWED, ""),
    ]


def rust(results: Results) -> str:
    """W1, W1t, W1s, W2 on one thread."""
    rows = []
    for name, turns, ours, index in _rust_rows(results):
        figures = turns["figures"]
        alone = ours == CORE  # kvbm-logical has no windowed pools
        cells = bold({CORE: figures[ours], KVBM: figures[KVBM]}) if alone else {CORE: pair(figures[ours]), KVBM: ""}
        ratio = pair(turns["to_first"][KVBM]) if alone else ""
        rows.append([name, cells[CORE], cells[KVBM], ratio, pair(figures.get(index))])
    head = ["", CORE, "kvbm-logical 1.6.1, lru", "ratio", "dynamo-kv-router 1.6.1, an index only"]
    return table(head, rows)


def threads(results: Results) -> str:
    rows = []
    for workload, systems in results["rust"]["threads"].items():
        names = [name for name in systems if name in (CORE, KVBM)]
        best = [min(systems[name][at]["ns"][1] for name in names) for at in range(3)]
        for name, counts in systems.items():
            cells = [
                f"{bold({name: one['ns']}, best[at] if name in names else -1)[name]} "
                f"({number(one['work'])} ×; {number(one['cpu'][1])})"
                for at, one in enumerate(counts)
            ]
            rows.append([workload, name, *cells])
    return table(["", "", "1 thread", "2 threads", "4 threads on 2 cores"], rows)


def sizes(results: Results) -> str:
    rows = []
    for row in results["rust"]["scale"]["sizes"]:
        both = {CORE: row[CORE], KVBM: row[KVBM]} if row[KVBM] else {CORE: row[CORE]}
        w1 = bold({name: figures["W1"] for name, figures in both.items()})
        w2 = bold({name: figures["W2"] for name, figures in both.items()})
        cells = [w1[CORE], w1.get(KVBM, ""), w2[CORE], w2.get(KVBM, "")]
        mib = f"{row['bytes'] / 2**20:,.0f} MiB"
        rows.append([f"{row['blocks']:,}", mib, number(row["dependent_load"]), *cells])
    head = ["blocks", "tables of kvpool-core", "dependent load in as many bytes", "W1, kvpool-core", "kvbm-logical"]
    return table([*head, "W2, kvpool-core", "kvbm-logical"], rows)


def chains(results: Results) -> str:
    rows = []
    for row in results["rust"]["scale"]["chains"]:
        per_block = {name: [ns / row["blocks"] for ns in ends] for name, ends in row["W1"].items()}
        cells = bold(per_block)
        probe = pair([ns / row["blocks"] for ns in row["probe"][CORE]])
        rows.append([f"{row['blocks']:,}", cells[CORE], cells[KVBM], probe])
    return table(["blocks of the chain", "W1, kvpool-core", "W1, kvbm-logical", "probe, kvpool-core"], rows)


def leaves(results: Results) -> str:
    rows = []
    for row in results["rust"]["scale"]["leaves"]:
        cells = bold(row["figures"])
        rows.append([f"{row['leaves']:,}", cells[CORE], cells[KVBM]])
    return table(["leaves", CORE, KVBM], rows)


def pools(results: Results) -> str:
    rows = [
        [f"{row['full']}", f"{row['windowed']}", pair(row["W1"]), pair(row["W2"])]
        for row in results["rust"]["scale"]["pools"]
    ]
    return table(["full-attention pools", "windowed pools", "W1", "W2"], rows)


def beginnings(results: Results) -> str:
    rows = [
        [f"{row['shared']}", f"{row['cached']:,}", pair(row["open"]), pair(row["serve"])]
        for row in results["rust"]["scale"]["beginnings"]
    ]
    return table(["tokens in common", "cached prompts", "create, close", "create to close, evicting 2 blocks"], rows)


def waiting(results: Results) -> str:
    rows = [[f"{row['waiting']:,}", pair(row["A"]), pair(row["B asked"])] for row in results["waiting"]]
    return table(["waiting requests", "A", "B, asked in each step"], rows)


def context(results: Results) -> str:
    kinds = ("decode", "window", "host", "stream", "resume")
    rows = [[f"{row['tokens']:,}", *(pair(row[kind]) for kind in kinds)] for row in results["context"]]
    names = ["one pool", "a window besides", "a host tier", "step_begin + step_end over a stream", "one resume"]
    return table(["tokens of a context", *names], rows)


def latency(results: Results) -> str:
    rows = []
    latencies = results["rust"]["latency"]
    for system in (CORE, KVBM):
        crowded = latencies[f"{system}, a neighbour churns"]
        for operation, alone in latencies[system].items():
            cells = [number(alone[at] / 1e3) for at in ("p50", "p99", "p99.9", "max")]
            cells += [number(crowded[operation][at] / 1e3) for at in ("p50", "p99", "p99.9", "max")]
            rows.append([f"{system}: {operation}", *cells])
    head = ["µs", "p50", "p99", "p99.9", "longest"]
    return table([*head, "with a neighbour: p50", "p99", "p99.9", "longest"], rows)


def memory(results: Results) -> str:
    found = results["rust"]["memory"]
    rows = [
        ["kvpool-core, one pool", *map(number, found[CORE]), number(found[f"{CORE}, per pool besides its tokens"])],
        ["kvpool-core, two pools", *map(number, found[WINDOWED]),
         number(found[f"{CORE}, per pool of two besides its tokens"])],
        [KVBM, *map(number, found[KVBM]), ""],
        ["dynamo-kv-router, an index only", *map(number, found["dynamo"]), ""],
    ]  # fmt: skip
    head = ["bytes per block", "once made", "every block cached", "per pool, besides its tokens"]
    return table(head, rows)


def allocations(results: Results) -> str:
    found = results["rust"]["allocations"]
    names = list(found[CORE])
    ours = [number(found[CORE][name]) for name in names]
    theirs = [number(found[KVBM][name]) if name in found[KVBM] else "" for name in names]
    return table(["allocations per call of 64 blocks", *names], [[CORE, *ours], [KVBM, *theirs]])


def floors(results: Results) -> str:
    found = results["rust"]["floors"]
    atomics = table(["ns per operation", "min / median"], [[name, pair(e)] for name, e in found["atomics"].items()])
    loads = found["loads"]
    rows = [[kind, *[number(row[kind]) for row in loads]] for kind in ("dependent", "independent")]
    return atomics + "\n\n" + table(["ns per load from", *[f"{row['mib']} MiB" for row in loads]], rows)


def rust_trace(results: Results) -> str:
    rows = []
    for row in results["rust"]["trace"]:
        ns, hits = row["ns"], row["hit_percent"]
        cells = bold({CORE: ns[CORE], KVBM: ns[KVBM]})
        rates = f"{hits[CORE]} / {hits[KVBM]} / {hits['kvpool-core, slru']} %"
        rows.append([f"{row['blocks']:,}", cells[CORE], pair(ns["kvpool-core, ids"]), cells[KVBM], rates])
    return table(["blocks", CORE, "ids", KVBM, "hit rate: kvpool lru / kvbm-logical / kvpool slru"], rows)


def systems(rows: Iterable[dict[str, Any]]) -> list[str]:
    """Names of the systems of Python, in the order in which they appear."""
    return list(dict.fromkeys(name for row in rows for name in row))


def python_blocks(results: Results) -> str:
    found = results["python"]["blocks"]
    names = systems(found.values())
    rows = []
    for workload, figures in found.items():
        cells = bold(figures)
        rows.append([workload, *[cells.get(name, "") for name in names]])
    return table(["ns per block, min / median", *names], rows)


def w4(results: Results) -> str:
    found = results["python"]["w4"]
    names = systems(found.values())
    rows = []
    for case, figures in found.items():
        best = min(one["together"][1] for one in figures.values())
        cells = []
        for one in (figures.get(name) for name in names):
            if one is None:
                cells.append("")
                continue
            (s, s_median), (u, u_median) = one["schedule"], one["update"]
            cell = f"{s:,} + {u:,} / {s_median:,} + {u_median:,}"
            cells.append(f"**{cell}**" if one["together"][1] == best else cell)
        rows.append([case, *cells])
    return table(["schedule + update, µs, min / median", *names], rows)


def short(results: Results) -> str:
    """The least steps, tokens and ends of a row are bold where they differ."""
    found = results["python"]["short"]
    names = systems(found.values())
    forms = {"steps": "{:,}", "extra_percent": "{:g} %", "mean_end": "{}"}
    rows = []
    for world, figures in found.items():
        values = {what: [one[what] for one in figures.values()] for what in forms}
        cells = []
        for one in (figures.get(name, {}) for name in names):
            parts = []
            for what in one:
                text = forms[what].format(one[what])
                wins = min(values[what]) == one[what] < max(values[what])
                parts.append(f"**{text}**" if wins else text)
            cells.append(", ".join(parts))
        rows.append([world, *cells])
    return table(["", *names], rows)


def python_trace(results: Results) -> str:
    found = results["python"].get("w3", {})
    names = systems(found.values())
    rows = []
    for blocks, figures in found.items():
        best = min(one["ns"] for one in figures.values())
        cells = [
            f"{one['hit_percent']} %, " + (f"**{one['ns']:,}**" if one["ns"] == best else f"{one['ns']:,}")
            for one in (figures[name] for name in names if name in figures)
        ]
        rows.append([f"{int(blocks):,}", *cells])
    return table(["blocks: hit rate, ns per block", *names], rows)


def alone_blocks(results: Results) -> str:
    """bench_w1_w2.py; its rounds of two threads are of 400 calls."""
    found = results["alone"]
    names = {
        "W1: create, resume, block_tables, close": "w1_hot_claim_and_release[one pool]",
        "W1 with a windowed pool besides": "w1_hot_claim_and_release[windowed pool besides]",
        "W1, floor: dict with precomputed keys": "w1_floor_dict_of_precomputed_keys",
        "W1, two threads (they take turns under CPython's lock)": "w1_two_threads",
        "W2: create, resume, resize, commit, close": "w2_churn",
        "W2, two threads, making the tokens included": "w2_two_threads",
    }
    rows = [
        [name, pair([us / (400 if "threads" in test else 1) for us in found[test]])] for name, test in names.items()
    ]
    return table(["", "µs"], rows)


def alone_w4(results: Results) -> str:
    """bench_w4.py: what a case is by its test's name."""
    found = results["alone"]
    names = {
        "16 waiting": "w4[{}]", "4,000 waiting": "w4_many_wait[{}, waiting 4000]",
        "1,000 cached blocks": "w4_many_blocks[{}, cached 1000]",
        "100,000 cached blocks": "w4_many_blocks[{}, cached 100000]", "host tier": "w4_more[{}, host]",
        "windowed pool besides": "w4_more[{}, window]", "3 drafts": "w4_more[{}, drafts 3]",
    }  # fmt: skip
    kinds = ("A", "B asked", "C")
    rows = [[name, *[pair(found.get(test.format(kind))) for kind in kinds]] for name, test in names.items()]
    return table(["", "A", "B, asked in each step", "C"], rows)


def readme(results: Results) -> str:
    """What README.md shows."""
    rows = []
    for name, turns, ours, _ in _rust_rows(results):
        if ours == CORE:
            cells = bold({CORE: turns["figures"][CORE], KVBM: turns["figures"][KVBM]})
            rows.append([name, cells[CORE], cells[KVBM], number(turns["to_first"][KVBM][1])])
    for workload, by_system in results["rust"]["threads"].items():
        ends = {name: by_system[name][1]["ns"] for name in (CORE, KVBM)}
        cells = bold(ends)
        rows.append([f"{workload}: two threads", cells[CORE], cells[KVBM], number(ends[KVBM][1] / ends[CORE][1])])
    row = results["rust"]["trace"][1]
    ends = {name: row["ns"][name] for name in (CORE, KVBM)}
    cells = bold(ends)
    rows.append(["W3, 10,000 blocks of 512 tokens", cells[CORE], cells[KVBM], number(ends[KVBM][1] / ends[CORE][1])])
    return table(["ns per block, min / median", CORE, "kvbm-logical 1.6.1, lru", "kvbm-logical / kvpool"], rows)


def machine(results: Results) -> str:
    """Where bench/rivals ran, in a sentence."""
    found = results["rust"]["machine"]
    where = f"{found['cpu']}, {found['cores']} cores, load average before the run {found['load_before']}"
    return f"The figures from Rust: {where}, {found['rounds']} rounds."


TABLES: dict[str, Callable[[Results], str]] = {
    "rust": rust, "threads": threads, "sizes": sizes, "chains": chains, "leaves": leaves, "pools": pools,
    "beginnings": beginnings, "waiting": waiting, "context": context, "latency": latency, "memory": memory,
    "allocations": allocations, "floors": floors,
    "rust-trace": rust_trace, "python-blocks": python_blocks, "w4": w4, "short": short, "python-trace": python_trace,
    "alone-blocks": alone_blocks, "alone-w4": alone_w4, "readme": readme,
    "machine": machine,
}  # fmt: skip
