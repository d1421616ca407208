"""When memory is short: what a pool smaller than the need costs in steps and in tokens computed twice.

    .venv/bin/python bench/memory_short.py [--json PATH] [--chunk N] [--tiers none,full] [--ratios 0.8,0.7,0.5]

256 requests of 1,024 prompt tokens (no two alike) and 512 outputs arrive at once; a step has at most 8,192 tokens and
256 requests, blocks have 16 tokens. The pool has a share of the 256 * 96 blocks that all requests need together. The
executor computes nothing: every figure is a count and repeats exactly.

    extra = tokens executed - 256 * (1,024 + 512 - 1)        the last token of a request is never computed
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from kvpool import CacheConfig, KVCacheManager, PoolConfig, PoolPlan, Request, Scheduler, SchedulerConfig, Step

T, REQUESTS, PROMPT, OUTPUT = 16, 256, 1024, 512
MAX_TOKENS, MAX_BATCH = 8192, 256
NEED = REQUESTS * (PROMPT + OUTPUT) // T  # blocks
TOKENS = REQUESTS * (PROMPT + OUTPUT)


@dataclass(frozen=True)
class Outcome:
    """One run. extra_percent: of all 256 * 1,536 tokens. mean_end: mean step in which a request ends."""

    ratio: float
    host: str
    victim: str
    steps: int
    extra_tokens: int
    extra_percent: float
    mean_end: float
    recomputed: int
    suspended: int
    onboarded: int
    most_running: int
    cpu_s: float


def build(ratio: float, tiered: bool, victim: str, chunk: int | None) -> Scheduler:
    """A scheduler over one full-attention pool, books only."""
    slots = int(NEED * ratio)
    config = CacheConfig(T, [PoolConfig("kv", 1)], slots + 1, max_seq_len=PROMPT + OUTPUT, hash_seed=1)
    plan = PoolPlan({"kv": 1}, {"kv": slots}, {"kv": slots if tiered else 0}, config.device_bytes)
    manager = KVCacheManager(config, None, plan=plan)
    return Scheduler(manager, SchedulerConfig(MAX_BATCH, MAX_TOKENS, chunk, victim=victim))


def execute(step: Step) -> dict[int | str, list[int]]:
    """A token for whoever is due one."""
    outputs = {chunk.request.request_id: [1] for chunk in step.context if chunk.is_last}
    return outputs | {request.request_id: [1] for request in step.generation}


def run(ratio: float, tiered: bool, victim: str, chunk: int | None) -> Outcome:
    """All requests to their ends."""
    scheduler = build(ratio, tiered, victim, chunk)
    rng = np.random.default_rng(0)
    requests = [Request(i, rng.integers(0, 2**31 - 1, PROMPT, np.int32), OUTPUT) for i in range(REQUESTS)]
    for request in requests:
        scheduler.add(request)
    steps = executed = ends = most = 0
    cpu = time.thread_time()
    while scheduler.has_work:
        step = scheduler.schedule()
        assert step, "nothing runs though requests are left"
        ended = scheduler.update(step, execute(step))
        steps += 1
        ends += steps * len(ended)
        executed += step.num_tokens
        most = max(most, len(step.entries))
    cpu = time.thread_time() - cpu
    assert all(len(request.output_tokens) == OUTPUT for request in requests)
    scheduler.manager.check()
    extra = executed - (TOKENS - REQUESTS)
    stats = scheduler.stats
    assert extra == stats.recomputed_tokens, f"{extra} tokens executed twice, {stats.recomputed_tokens} counted"
    return Outcome(
        ratio, "full" if tiered else "none", victim, steps, extra, round(100 * extra / TOKENS, 2),
        round(ends / REQUESTS, 1), stats.recomputed, stats.suspended,
        scheduler.manager.stats().onboarded, most, round(cpu, 2),
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, help="where to write the outcomes")
    parser.add_argument("--chunk", type=int, default=T, help="chunk_tokens; 0: a prompt is computed in one step")
    parser.add_argument("--ratios", default="1,0.8,0.7,0.5")
    parser.add_argument("--tiers", default="none,full", help="host tier: none, or full (as large as the device pool)")
    parser.add_argument("--victims", default="newest,cheapest")
    given = parser.parse_args()
    outcomes = []
    columns = "pool / need, host tier, victim, steps, extra, mean end, recomputes, suspensions, onboarded, CPU s"
    print(f"| {columns.replace(', ', ' | ')} |")
    print("| --- " * 10 + "|")
    for tier in given.tiers.split(","):
        for ratio in map(float, given.ratios.split(",")):
            for victim in given.victims.split(","):
                o = run(ratio, tier == "full", victim, given.chunk or None)
                print(
                    f"| {o.ratio} | {o.host} | {o.victim} | {o.steps} | {o.extra_percent} % | {o.mean_end} "
                    f"| {o.recomputed} | {o.suspended} | {o.onboarded} | {o.cpu_s} |",
                    flush=True,
                )
                outcomes.append(asdict(o))
    if given.json:
        given.json.write_text(json.dumps(outcomes, indent=1) + "\n")


if __name__ == "__main__":
    main()
