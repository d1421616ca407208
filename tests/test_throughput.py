"""Admission "throughput": all start who fit now, and many give way at once where memory runs short.

What it is for are the runs of bench/memory_short.py: 256 requests at once in a pool that is a share of their need.
Counts, which repeat exactly. Worlds in which it must never stall: test_liveness.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from kvpool import CacheConfig, KVCacheManager, PoolConfig, PoolPlan, Request, Scheduler, SchedulerConfig, Step

BENCH = Path(__file__).parents[1] / "bench"
RULES = ("latency", "throughput")
SGLANG = {0.8: 8.9, 0.7: 7.9, 0.5: 5.6}  # extra tokens in %, as published
VLLM = {0.8: 851, 0.7: 1007, 0.5: 1041}  # steps, as measured under the same conditions


def load(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


memory_short = load(BENCH / "memory_short.py")
MEASURED = json.loads((BENCH / "rivals_py" / "results.json").read_text())["short"]


@pytest.mark.parametrize("ratio", SGLANG)
def test_throughput_computes_less_again_than_sglang_in_fewer_steps_than_vllm(ratio: float) -> None:
    assert MEASURED[f"equal, {ratio}"]["vLLM 0.33.0"]["steps"] == VLLM[ratio]
    outcome = memory_short.run(ratio, admission="throughput")
    print(outcome)
    assert outcome.extra_percent < SGLANG[ratio]
    assert outcome.steps < VLLM[ratio]


@pytest.mark.parametrize("ratio", SGLANG)
def test_latency_computes_nothing_again_where_outputs_are_as_long_as_expected(ratio: float) -> None:
    outcome = memory_short.run(ratio)
    assert outcome.extra_tokens == outcome.recomputed == outcome.suspended == 0


@pytest.mark.parametrize("ratio", [0.9, 0.7, 0.3])
def test_throughput_needs_no_more_steps_than_latency_whatever_outputs_become(ratio: float) -> None:
    """Also where the scheduler does not know how long outputs get: then one gives way at a time."""
    for lengths in (memory_short.EQUAL, memory_short.mixed()):
        latency, throughput = (memory_short.run(ratio, admission=rule, lengths=lengths) for rule in RULES)
        assert throughput.steps <= latency.steps


@pytest.mark.parametrize("lengths", ["EQUAL", "mixed"])
def test_with_a_host_tier_admission_says_nothing(lengths: str) -> None:
    given = memory_short.EQUAL if lengths == "EQUAL" else memory_short.mixed()
    one, other = (memory_short.run(0.7, True, admission=rule, lengths=given) for rule in RULES)
    assert (one.steps, one.extra_tokens, one.mean_end) == (other.steps, other.extra_tokens, other.mean_end)


# -- one by one ---------------------------------------------------------------------------------------


class Run:
    """A scheduler over one pool with blocks of 4, and the steps that it made."""

    def __init__(self, slots: int, jobs: list[tuple[int, int]], stops: dict[int | str, int] | None = None) -> None:
        self.stops = stops or {}
        plan = PoolPlan({"kv": 1}, {"kv": slots}, {"kv": 0}, 1 << 20)
        manager = KVCacheManager(CacheConfig(4, [PoolConfig("kv", 8)], 1 << 20, hash_seed=1), None, plan=plan)
        self.scheduler = Scheduler(manager, SchedulerConfig(8, 64, admission="throughput"))
        self.requests = [
            Request(i, range(100 * i, 100 * i + n), m, stop_token_ids=[2]) for i, (n, m) in enumerate(jobs)
        ]
        for request in self.requests:
            self.scheduler.add(request)

    def step(self) -> Step:
        step = self.scheduler.schedule()
        due = [chunk.request for chunk in step.context if chunk.is_last] + step.generation
        self.scheduler.update(step, {request.request_id: [self._token(request)] for request in due})
        self.scheduler.manager.check()
        return step

    def _token(self, request: Request) -> int:
        return 2 if len(request.output_tokens) + 1 == self.stops.get(request.request_id) else 1

    def until_somebody_gives_way(self) -> Step:
        for _ in range(100):
            step = self.step()
            if step.recompute:
                return step
        raise AssertionError("nobody gave way")


def ids(requests: list[Request]) -> list[int | str]:
    return sorted(request.request_id for request in requests)


def test_all_start_who_fit_now_or_as_many_as_the_forecast_allows() -> None:
    """3 contexts and a token need 6 slots; up to their ends 12; 2 of them 8."""
    assert len(Run(6, [(4, 12)] * 3).step().context) == 3
    assert len(Run(5, [(4, 12)] * 3).step().context) == 1
    assert len(Run(8, [(4, 12)] * 5).step().context) == 2


def test_those_give_way_who_can_return_together_and_nobody_starts_before_an_end() -> None:
    """Five of them fill 15 slots; three need 12 at their ends, four 16."""
    run = Run(15, [(4, 12)] * 5)
    assert ids(run.until_somebody_gives_way().recompute) == [2, 3, 4]
    run.scheduler.add(Request("late", range(4), 1))
    starts = []
    while not any(request.state == "FINISHED" for request in run.requests):
        assert "nobody starts before a request has ended" in run.scheduler.explain("late")
        starts += run.step().context
    assert not starts
    assert {chunk.request.request_id for chunk in run.step().context} >= {2, 3, 4, "late"}
    while run.scheduler.has_work:
        run.step()
    assert [len(request.output_tokens) for request in run.requests] == [12] * 5


def test_who_is_expected_to_end_next_stays_though_older_ones_give_way() -> None:
    run = Run(15, [(4, 20), (4, 20), (4, 20), (4, 14), (4, 20)])
    gone: list[int | str] = []
    while run.requests[3].state != "FINISHED":
        gone += ids(run.step().recompute)
    assert gone == [2, 4]


def test_one_gives_way_at_a_time_where_requests_do_not_become_as_long_as_expected() -> None:
    run = Run(16, [(4, 40), (4, 40), (4, 40), (4, 40)], stops={0: 2})
    together = 0
    while run.scheduler.has_work:
        together = max(together, len(run.step().recompute))
    assert run.scheduler.outlook.error * 40 > 4
    assert run.scheduler.stats.recomputed > 0
    assert together == 1
