"""What a step costs in which little happens, as counts: calls of Python functions and of the core, never time.

`bench/small_step.py` has the instructions of the same steps.
"""

from __future__ import annotations

import gc
import sys
import weakref
from collections import Counter
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest

from kvpool import CacheConfig, Engine, KVCacheManager, PoolConfig, PoolPlan, Request, Scheduler, Step
from kvpool import SchedulerConfig as Limits

SLOTS = 1000


class Executor:
    """Answers at once: what it costs is not the scheduler's."""

    def __init__(self) -> None:
        self.outputs: dict[Any, list[int]] = {}

    def execute(self, step: Step) -> dict[Any, list[int]]:
        return self.outputs


def decoding(decodes: int, host: int = 0, waiting: int = 0) -> Engine:
    """Requests that decode within their last block, and others for whom the batch has no place."""
    plan = PoolPlan({"kv": 1}, {"kv": SLOTS}, {"kv": host}, 1 << 20)
    manager = KVCacheManager(CacheConfig(64, [PoolConfig("kv", 64)], 1 << 20, hash_seed=1), plan=plan)
    engine = Engine(Scheduler(manager, Limits(decodes, 1 << 14)), Executor())
    engine.executor.outputs = {number: [1] for number in range(decodes)}  # type: ignore[attr-defined]
    for number in range(decodes + waiting):
        engine.submit(Request(number, [number + 1] * 3, 60))
    engine.step()
    for _ in range(3):
        engine.step()
    return engine


def calls_of(call: Callable[[], object]) -> tuple[Counter[str], Counter[str]]:
    """(functions and generators in Python, whatever is in C) that were entered, by name."""
    python, native = Counter[str](), Counter[str]()

    def note(frame: FrameType, event: str, arg: Any) -> None:
        if event == "call":
            python[frame.f_code.co_qualname] += 1
        elif event == "c_call":
            native[getattr(arg, "__qualname__", repr(arg))] += 1

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return python, native


@pytest.mark.parametrize("host", [0, SLOTS])
def test_a_step_makes_as_many_calls_for_two_hundred_decodes_as_for_two(host: int) -> None:
    assert calls_of(decoding(200, host).step) == calls_of(decoding(2, host).step)


def test_a_step_makes_one_call_of_the_core_per_phase() -> None:
    python, native = calls_of(decoding(8).step)
    core = Counter({name: n for name, n in native.items() if name.partition(".")[0] in ("Core", "Roster", "Started")})
    assert core == Counter(
        ["Roster.allocate", "Roster.requests", "Roster.caches", "Core.step_begin", "Core.step_end", "Roster.collect"]
    )
    assert python.total() <= 60, python


def test_a_full_batch_costs_the_same_however_many_wait() -> None:
    assert calls_of(decoding(4, waiting=500).step) == calls_of(decoding(4).step)


@pytest.mark.parametrize("ends", ["cancelled", "length"])
def test_a_request_that_has_ended_goes_without_a_collection(ends: str) -> None:
    engine = decoding(2)
    request = Request("other", [1, 2, 3], 1)
    gone = weakref.ref(request)
    gc.disable()
    try:
        engine.submit(request)
        if ends == "cancelled":
            assert engine.cancel("other")
        else:
            assert engine.cancel(0)
            engine.executor.outputs = {1: [1], "other": [1]}  # type: ignore[attr-defined]
        assert any(one is request and one.finish_reason == ends for one in engine.step())
        del request
        engine.step()  # the last step is no longer the one that it was in
        assert gone() is None
    finally:
        gc.enable()
