"""One thread schedules; others submit, cancel, probe and read statistics meanwhile."""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Iterator

import pytest

import backend
from kvpool import CacheConfig, Engine, KVCacheManager, PoolConfig, Request, Scheduler, SchedulerConfig, Step

T, THREADS, EACH = 4, 4, 20


class Echo:
    """Computes nothing: each token is the length of its sequence."""

    def execute(self, step: Step) -> dict[int | str, list[int]]:
        last = [chunk.request for chunk in step.context if chunk.is_last]
        return {r.request_id: [len(r.tokens) + len(r.output_tokens)] for r in [*last, *step.generation]}


@pytest.fixture
def hasty() -> Iterator[None]:
    """Threads take turns as often as the interpreter can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.parametrize("host_pages", [0, 12])
def test_threads_submit_cancel_and_probe_while_one_schedules(hasty: None, host_pages: int) -> None:
    pools = [PoolConfig("full", 64), PoolConfig("window", 64, window=6)]
    config = CacheConfig(T, pools, 64 * 40, host_bytes=64 * host_pages, max_batch_size=3, max_seq_len=40)
    manager = KVCacheManager(config, backend.device())
    engine = Engine(Scheduler(manager, SchedulerConfig(4, 48, chunk_tokens=T, max_started=6)), Echo())
    requests: dict[str, Request] = {}
    cancelled: set[str] = set()
    errors: list[BaseException] = []
    submitted = threading.Event()

    def submit(number: int) -> None:
        r = random.Random(number)
        try:
            for i in range(EACH):
                name = f"{number}-{i}"
                tokens = [r.randint(0, 1), *range(r.randint(1, 20))]
                requests[name] = Request(name, tokens, r.randint(1, 6))
                engine.submit(requests[name])
                if r.random() < 0.2 and engine.cancel(name):
                    cancelled.add(name)
        except BaseException as error:
            errors.append(error)

    def watch(number: int) -> None:
        r = random.Random(1000 + number)
        try:
            while not submitted.is_set() or engine.scheduler.has_work:
                prompt = [r.randint(0, 1), *range(r.randint(0, 20))]
                assert 0 <= manager.probe(prompt) < len(prompt)
                for tiers in manager.stats().pools.values():
                    assert all(0 <= slots <= books["slots"] for books in tiers.values() for slots in books.values())
                manager.drain_events(100)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=submit, args=(n,)) for n in range(THREADS)]
    threads += [threading.Thread(target=watch, args=(n,)) for n in range(2)]
    for thread in threads:
        thread.start()
    ended: dict[int | str, Request] = {}
    while any(thread.is_alive() for thread in threads[:THREADS]):
        ended |= engine.run()
    submitted.set()
    ended |= engine.run()
    for thread in threads:
        thread.join()
    assert not errors, errors
    assert ended.keys() == requests.keys()
    for name, request in requests.items():
        n = len(request.tokens)
        if name in cancelled and request.finish_reason == "cancelled":
            continue
        assert (request.finish_reason, request.error) == ("length", None)
        assert request.output_tokens == list(range(n, n + request.max_new_tokens))
    assert any(request.finish_reason == "cancelled" for request in requests.values())
    manager.check()
    for tiers in manager.stats().pools.values():
        assert tiers["device"]["free"] + tiers["device"]["cached"] == tiers["device"]["slots"]
    manager.close()
