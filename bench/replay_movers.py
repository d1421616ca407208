"""Replay on the mover with threads against the one that copies at once: what overlapping gains, or costs.

    .venv/bin/python bench/replay_movers.py [REQUESTS] [DEVICE BLOCKS] [HOST BLOCKS]

The generated workload, by turns on both movers; every reused page is verified. "steps" is what scheduling, claims,
copies that are waited for, commits and releases cost; the simulated engine computes between `step_begin` and
`step_end` and overlaps with nothing, so moves overlap with scheduling only.
"""

from __future__ import annotations

import sys
import time
from functools import partial

from kvpool import KVCacheManager
from kvpool.mover import AtOnceMover, CpuMover
from kvpool.replay import sequential
from kvpool.replay.generated import Workload, generate
from kvpool.replay.sequential import Options
from kvpool.replay.timed import run_timed

ROUNDS = 3


def main(requests: int, device_blocks: int, host_blocks: int) -> None:
    """Print a line per run."""
    for _ in range(ROUNDS):
        for name, mover in (("at once", AtOnceMover), ("threads", CpuMover)):
            sequential.KVCacheManager = partial(KVCacheManager, mover=mover)  # type: ignore[assignment,misc]
            options = Options(device_blocks=device_blocks, host_blocks=host_blocks)
            cpu = time.process_time()
            report = run_timed(generate(Workload(requests), 0, 512), options)
            cpu = time.process_time() - cpu
            assert report.wrong is None
            print(
                f"{name}: {report.steps} steps, {report.step_us_sum / 1e6:.2f} s in steps, "
                f"p50 {report.step_us_p50:.0f} us, p99 {report.step_us_p99:.0f} us, "
                f"{cpu:.2f} s CPU, {report.seconds:.2f} s wall; "
                f"{report.offloaded} offloaded, {report.onboarded} onboarded",
                flush=True,
            )


if __name__ == "__main__":
    given = [int(argument) for argument in sys.argv[1:]]
    main(*given, *(600, 400, 800)[len(given) :])
