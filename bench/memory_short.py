"""When memory is short: what a pool smaller than the need costs in steps and in tokens computed twice.

    .venv/bin/python bench/memory_short.py [--json PATH] [--chunk N] [--tiers none,full] [--ratios 0.8,0.7,0.5]
                                           [--victims newest,cheapest] [--admissions latency,throughput]

256 requests of 1,024 prompt tokens (no two alike) and 512 outputs arrive at once; a step has at most 8,192 tokens and
256 requests, blocks have 16 tokens. The pool has a share of the 256 * 96 blocks that all requests need together. The
executor computes nothing: every figure is a count and repeats exactly.

    extra = tokens executed - sum of (prompt + outputs - 1)        the last token of a request is never computed

A second table has requests of 256 to 2,047 prompt tokens that stop by themselves after 64 to 511 of 512 outputs: the
scheduler learns how long outputs get, and errs. It shows what the choice of the victim is worth.

Admission "throughput" is another rule without a host tier, and says nothing with one: there it has no row.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import numpy as np

from kvpool import CacheConfig, KVCacheManager, PoolConfig, PoolPlan, Request, Scheduler, SchedulerConfig, Step

T, REQUESTS, PROMPT, OUTPUT = 16, 256, 1024, 512
MAX_TOKENS, MAX_BATCH = 8192, 256
STOP = 2  # the token that ends a request early
Lengths = list[tuple[int, int]]  # prompt, outputs
EQUAL: Lengths = [(PROMPT, OUTPUT)] * REQUESTS


def mixed() -> Lengths:
    """Prompts and outputs of random lengths."""
    rng = np.random.default_rng(1)
    prompts, outputs = rng.integers(256, 2048, REQUESTS), rng.integers(64, OUTPUT, REQUESTS)
    return list(zip(prompts.tolist(), outputs.tolist(), strict=True))


def blocks(lengths: Lengths) -> int:
    """What all requests need together."""
    return sum(-(-(prompt + outputs) // T) for prompt, outputs in lengths)


@dataclass(frozen=True)
class Outcome:
    """One run. extra_percent: of the tokens of all requests. mean_end: mean step in which a request ends."""

    ratio: float
    host: str
    victim: str
    admission: str
    steps: int
    extra_tokens: int
    extra_percent: float
    mean_end: float
    recomputed: int
    suspended: int
    onboarded: int
    most_running: int
    cpu_s: float


def build(slots: int, tiered: bool, victim: str, chunk: int | None, admission: str) -> Scheduler:
    """A scheduler over one full-attention pool, books only."""
    config = CacheConfig(T, [PoolConfig("kv", 1)], slots + 1, hash_seed=1)
    plan = PoolPlan({"kv": 1}, {"kv": slots}, {"kv": slots if tiered else 0}, config.device_bytes)
    manager = KVCacheManager(config, None, plan=plan)
    return Scheduler(manager, SchedulerConfig(MAX_BATCH, MAX_TOKENS, chunk, victim=victim, admission=admission))


def execute(step: Step, lengths: Lengths) -> dict[int | str, list[int]]:
    """A token for whoever is due one."""
    due = [chunk.request for chunk in step.context if chunk.is_last] + step.generation
    return {
        request.request_id: [STOP if len(request.output_tokens) + 1 == lengths[int(request.request_id)][1] else 1]
        for request in due
    }


def run(
    ratio: float,
    tiered: bool = False,
    victim: str = "newest",
    admission: str = "latency",
    lengths: Lengths = EQUAL,
    chunk: int | None = T,
) -> Outcome:
    """All requests to their ends."""
    scheduler = build(int(blocks(lengths) * ratio), tiered, victim, chunk, admission)
    rng = np.random.default_rng(0)
    requests = [
        Request(i, rng.integers(0, 2**31 - 1, prompt, np.int32), OUTPUT, stop_token_ids=[STOP])
        for i, (prompt, _) in enumerate(lengths)
    ]
    for request in requests:
        scheduler.add(request)
    steps = executed = ends = most = 0
    cpu = time.thread_time()
    while scheduler.has_work:
        step = scheduler.schedule()
        assert step, "nothing runs though requests are left"
        ended = scheduler.update(step, execute(step, lengths))
        steps += 1
        ends += steps * len(ended)
        executed += step.num_tokens
        most = max(most, len(step.context) + len(step.generation))
    cpu = time.thread_time() - cpu
    assert [len(request.output_tokens) for request in requests] == [outputs for _, outputs in lengths]
    scheduler.manager.check()
    tokens = sum(prompt + outputs for prompt, outputs in lengths)
    extra = executed - (tokens - REQUESTS)
    stats = scheduler.stats
    assert extra == stats.recomputed_tokens, f"{extra} tokens executed twice, {stats.recomputed_tokens} counted"
    return Outcome(
        ratio, "full" if tiered else "none", victim, admission, steps, extra, round(100 * extra / tokens, 2),
        round(ends / REQUESTS, 1), stats.recomputed, stats.suspended,
        scheduler.manager.stats().onboarded, most, round(cpu, 2),
    )  # fmt: skip


def report(o: Outcome) -> Outcome:
    """Print a row."""
    print(
        f"| {o.ratio} | {o.host} | {o.victim} | {o.admission} | {o.steps} | {o.extra_percent} % | {o.mean_end} "
        f"| {o.recomputed} | {o.suspended} | {o.onboarded} | {o.cpu_s} |",
        flush=True,
    )
    return o


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, help="where to write the outcomes")
    parser.add_argument("--chunk", type=int, default=T, help="chunk_tokens; 0: a prompt is computed in one step")
    parser.add_argument("--ratios", default="1,0.8,0.7,0.5")
    parser.add_argument("--tiers", default="none,full", help="host tier: none, or full (as large as the device pool)")
    parser.add_argument("--victims", default="newest,cheapest")
    parser.add_argument("--admissions", default="latency,throughput")
    given = parser.parse_args()
    rules = [
        (tier == "full", float(ratio), victim, admission)
        for tier, ratio, victim, admission in product(
            given.tiers.split(","), given.ratios.split(","), given.victims.split(","), given.admissions.split(",")
        )
        if (tier, admission) != ("full", "throughput")
    ]
    outcomes = {}
    for name, lengths in (("equal", EQUAL), ("mixed", mixed())):
        print(f"\n{name} lengths, {blocks(lengths):,} blocks needed in all\n")
        columns = (
            "pool / need, host tier, victim, admission, steps, extra, mean end, recomputes, suspensions, onboarded"
        )
        print(f"| {columns.replace(', ', ' | ')} | CPU s |")
        print("| --- " * 11 + "|")
        outcomes[name] = [
            asdict(report(run(ratio, tiered, victim, admission, lengths, given.chunk or None)))
            for tiered, ratio, victim, admission in rules
        ]
    if given.json:
        given.json.write_text(json.dumps(outcomes, indent=1) + "\n")


if __name__ == "__main__":
    main()
