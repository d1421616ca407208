"""Instructions of a step in which little happens: decodes within their blocks, nobody arrives, ends or gives way.

    .venv/bin/python bench/small_step.py

Counted by valgrind's callgrind as the difference of two runs, one with more steps: what starts up is the same in both.
One step of an Engine: schedule, step_begin, an executor that answers at once, step_end, update. Repeats within a
percent on one machine, busy or not; tests/test_small_step.py holds the calls.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from typing import Any

from kvpool import CacheConfig, Engine, KVCacheManager, PoolConfig, PoolPlan, Request, Scheduler, SchedulerConfig, Step

CASES = {"8 decodes": (8, 0), "250 decodes": (250, 0), "8 decodes, host tier": (8, 1000)}
WARM, STEPS, MORE = 20, 100, 300


class Executor:
    """Answers at once."""

    def __init__(self, decodes: int) -> None:
        self.outputs = {number: [1] for number in range(decodes)}

    def execute(self, step: Step) -> dict[Any, list[int]]:
        return self.outputs


def run(decodes: int, host: int, steps: int) -> None:
    """Everything from the start to the last of so many steps."""
    plan = PoolPlan({"kv": 1}, {"kv": 1000}, {"kv": host}, 1 << 20)
    config = CacheConfig(512, [PoolConfig("kv", 64)], 1 << 20, hash_seed=1, clock=lambda: 0.0)
    scheduler = Scheduler(KVCacheManager(config, plan=plan), SchedulerConfig(256, 1 << 14))
    engine = Engine(scheduler, Executor(decodes))
    for number in range(decodes):
        engine.submit(Request(number, [number + 1] * 8, 500))
    for _ in range(WARM + steps):
        engine.step()


def instructions(case: str, steps: int) -> int:
    """Of a process that runs so many steps."""
    command = ["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null", sys.executable, __file__]
    environment = {**os.environ, "PYTHONHASHSEED": "0", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--case", case, "--steps", str(steps)], stderr=subprocess.PIPE, text=True, env=environment
    )
    if done.returncode:
        sys.exit(done.stderr)
    return int(re.findall(r"Collected : (\d+)", done.stderr)[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--case", choices=CASES, help="run it, and count nothing")
    parser.add_argument("--steps", type=int, default=STEPS)
    given = parser.parse_args()
    if given.case:
        run(*CASES[given.case], given.steps)
        return
    for case in CASES:
        each = (instructions(case, STEPS + MORE) - instructions(case, STEPS)) / MORE
        print(f"{case}: {each:,.0f} instructions")


if __name__ == "__main__":
    main()
