"""kvpool's side of `compare.py`."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from worker import serve, steps

sys.path.insert(0, str(Path(__file__).parents[1]))
import bench_w1_w2
import memory_short
import w4


def w4_steps(number: int, warm: int, **case: Any) -> list[tuple[int, int]]:
    return steps(w4.World(w4.Case(**case)), number, warm)


def short(ratio: float, lengths: list[tuple[int, int]], admission: str = "latency") -> dict[str, Any]:
    """See ../memory_short.py."""
    outcome = memory_short.run(ratio, admission=admission, lengths=lengths)
    return {name: getattr(outcome, name) for name in ("steps", "extra_percent", "mean_end")}


def blocks(number: int) -> dict[str, list[int]]:
    """W1 and W2, ns per call of 64 blocks; see ../bench_w1_w2.py."""
    manager = bench_w1_w2.build(False)
    clock = time.thread_time_ns
    given = bench_w1_w2.prompts(1000, 1025)
    for at, tokens in enumerate(given):
        bench_w1_w2.serve(manager, at, tokens)
    rng = np.random.default_rng(0)
    out = np.zeros((1, 64), np.int32)
    w1 = []
    for at in rng.integers(0, 1000, number).tolist():
        start = clock()
        cache = manager.create(0, given[at])
        cache.resume()
        manager.block_tables([cache], "kv", out=out)
        cache.close()
        w1.append(clock() - start)
    for tokens in bench_w1_w2.prompts(1100, 1024):
        bench_w1_w2.serve(manager, 0, tokens)
    w2 = []
    for _ in range(number):
        tokens = rng.integers(0, 2**31 - 1, 1024, np.int32)
        start = clock()
        bench_w1_w2.serve(manager, 0, tokens)
        w2.append(clock() - start)
    manager.check()
    return {"W1": w1, "W2": w2}


if __name__ == "__main__":
    serve({"w4": w4_steps, "short": short, "blocks": blocks})
