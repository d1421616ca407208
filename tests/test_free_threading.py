"""Many threads at one manager and one scheduler: with the GIL off where Python can, else by the shortest of turns.

Books by `check()`, contents by words that tell whose they are, order of moves by the mover's checker. The seed stands
in the test's name; KVPOOL_STRESS_SEEDS=100 runs more of them.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from crowd import FREE_THREADED, SEEDS, Pages, make, prompt, together
from kvpool import AddRequest, Engine, KVCache, KVCacheManager, LogicError, Request, Scheduler
from kvpool import SchedulerConfig as Limits
from test_scheduler_bytes import Words, word

THREADS, EACH = 4, 25
Work = Callable[[random.Random], object]
needs_free_threading = pytest.mark.skipif(not FREE_THREADED, reason="this Python always has its GIL")


@needs_free_threading
def test_import_leaves_the_gil_off() -> None:
    code = "import sys, kvpool, kvpool.replay; print(sys._is_gil_enabled())"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHON_GIL"}  # nothing forces it
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.stderr) == ("False\n", "")


@needs_free_threading
@pytest.mark.skipif(os.environ.get("PYTHON_GIL") == "1", reason="it was asked for")
def test_nothing_that_the_tests_import_has_brought_the_gil_back() -> None:
    assert not sys._is_gil_enabled()  # type: ignore[attr-defined, unused-ignore]


# -- one manager --------------------------------------------------------------------------------------


def serve(manager: KVCacheManager, pages: Pages, cache: KVCache, tokens: list[int], r: random.Random) -> int:
    """One request, from its prompt to a few tokens more; words read."""
    read = 0
    start = None
    for _ in range(r.randint(1, 5)):
        if r.random() < 0.2:
            cache.suspend()
        if not cache.resume():
            break
        start = cache.num_reused_tokens if start is None else len(tokens)
        if start == len(tokens):
            tokens = [*tokens, r.randint(1, 3)]
        if not cache.resize(len(tokens)):
            break
        manager.step_begin([cache])
        try:
            if cache.state != "LOST":
                read += pages.compute(cache, tokens, start)
        finally:
            manager.step_end([cache])
        if cache.state != "LOST":
            cache.commit(tokens[start:])
    return read


def client(manager: KVCacheManager, pages: Pages, name: int, counts: Counter[str]) -> Work:
    def work(r: random.Random) -> None:
        for i in range(EACH):
            tokens = prompt(r)
            if r.random() < 0.3:
                (made,) = manager.add_batch([AddRequest(f"{name}-{i}", tokens)])
            else:
                made = manager.create(f"{name}-{i}", tokens)
            counts["made"] += made is not None
            if made is not None:
                with made as cache:
                    try:
                        counts["read"] += serve(manager, pages, cache, tokens, r)
                    except LogicError:
                        assert cache.state == "LOST", cache  # it turned out within the call

    return work


def bystander(manager: KVCacheManager) -> Work:
    """Asks and tidies up."""

    def work(r: random.Random) -> None:
        for i in range(4 * EACH):
            tokens = prompt(r)
            assert 0 <= manager.probe(tokens) < len(tokens)
            assert manager.available_tokens() >= 0
            assert len(manager.block_keys(tokens)) == len(tokens) // 4
            manager.is_request_active(f"{r.randrange(THREADS)}-{r.randrange(EACH)}")
            for tiers in manager.stats().pools.values():
                assert all(0 <= slots <= books["slots"] for books in tiers.values() for slots in books.values())
            manager.drain_events(100)
            if i % 8 == 0:
                manager.evict(r.randint(1, 3))
            if i % 50 == 49:
                manager.clear()

    return work


def all_books_balance(manager: KVCacheManager) -> None:
    manager.check()
    assert not manager._caches
    for tiers in manager.stats().pools.values():
        for books in tiers.values():
            assert books["free"] + books["cached"] == books["slots"], books


@pytest.mark.parametrize("host", [0, 16])
@pytest.mark.parametrize("seed", SEEDS)
def test_threads_serve_requests_of_their_own(seed: int, host: int) -> None:
    with make(28, host) as manager:
        pages, counts = Pages(manager), Counter[str]()
        works = [client(manager, pages, name, Counter()) for name in range(THREADS - 1)]
        together(seed, client(manager, pages, THREADS, counts), *works, bystander(manager), bystander(manager))
        assert min(counts["made"], counts["read"]) > 0, counts
        all_books_balance(manager)
        stats = manager.stats()
        assert stats.reused_tokens
        assert min(stats.offloaded, stats.onboarded) > 0 if host else stats.dropped, stats


@pytest.mark.parametrize("seed", SEEDS)
def test_pages_that_do_not_arrive_are_never_read_by_any_thread(seed: int) -> None:
    with make(20, 16, faults=True) as manager:
        pages, moves = Pages(manager), manager._moves
        assert moves is not None
        moves.mover.fail_at_random(0.05, seed)  # type: ignore[attr-defined]
        works = [client(manager, pages, name, Counter()) for name in range(THREADS)]
        together(seed, *works, bystander(manager))
        assert moves.failed
        manager.lost()  # whoever looks last
        all_books_balance(manager)


@pytest.mark.parametrize("seed", SEEDS)
def test_many_threads_in_one_cache_break_nothing(seed: int) -> None:
    """One of them is in; the others are told so. Nobody waits."""
    manager = make(20, 8)
    outcomes: Counter[str] = Counter()

    def hammer(r: random.Random) -> None:
        for _ in range(150):
            try:
                cache = manager.cache("x")
            except KeyError:
                cache = None
            try:
                if cache is None:
                    manager.create("x", prompt(r))
                elif r.random() < 0.05:
                    cache.close()
                elif r.random() < 0.2:
                    step(manager, cache)
                else:
                    call, *args = r.choice(
                        [(cache.resume,), (cache.suspend,), (getattr, cache, "capacity"), (getattr, cache, "state"),
                         (repr, cache), (cache.resize, r.randint(0, 40)), (cache.commit, [1]),
                         (cache.block_table, "full"), (manager.suspend_requests, [of("x")]),
                         (manager.free_requests, [of("x")]), (manager.provide_contexts, [(of("x"), 3)])]
                    )  # fmt: skip
                    call(*args)
                outcomes["done"] += 1
            except (LogicError, ValueError) as error:
                outcomes[type(error).__name__] += 1

    together(seed, *[hammer] * THREADS)
    assert outcomes["done"]
    manager.check()
    manager.close()
    all_books_balance(manager)


@contextmanager
def busy_at_most() -> Iterator[None]:
    """Another thread may be in the cache; nothing else may be wrong."""
    try:
        yield
    except LogicError as error:
        if "another thread" not in str(error) and "copies of an earlier call" not in str(error):
            raise


def of(request_id: str) -> Any:
    return SimpleNamespace(request_id=request_id, tokens=[1] * 8)


def step(manager: KVCacheManager, cache: KVCache) -> None:
    """What was begun can be ended, whoever else is in the cache."""
    manager.step_begin([cache])
    manager.step_end([cache])


@pytest.mark.parametrize("seed", SEEDS)
def test_one_of_many_threads_gets_an_id_and_one_close_frees_it(seed: int) -> None:
    manager = make(20)
    for _ in range(30):
        won: list[KVCache] = []

        def claim(r: random.Random, won: list[KVCache] = won) -> None:
            try:
                if r.random() < 0.5:
                    won.append(manager.create("x", prompt(r)))
                else:
                    won.extend(filter(None, manager.add_batch([AddRequest("y", [1]), AddRequest("x", [1, 2])])))
            except LogicError:
                pass

        together(seed, *[claim] * 3)
        assert sorted(str(cache.request_id) for cache in won) in (["x"], ["x", "y"])
        assert set(manager._caches) == {cache.request_id for cache in won}
        both = list(won)

        def close(r: random.Random, caches: list[KVCache] = both) -> None:
            for cache in caches:
                with busy_at_most():
                    r.choice([cache.close, lambda: manager.free_requests([of("x"), of("y")])])()

        together(seed, *[close] * 3)
        for cache in won:
            cache.close()
            assert (cache.state, cache.num_reused_tokens >= 0) == ("CLOSED", True)
        all_books_balance(manager)
    manager.close()


@pytest.mark.parametrize("seed", SEEDS)
def test_a_manager_that_closes_beside_others_leaves_no_cache_open(seed: int) -> None:
    for _ in range(20):
        manager = make(20, 8)

        def use(r: random.Random, manager: KVCacheManager = manager) -> None:
            try:
                for i in range(20):
                    manager.create(f"{threading.get_ident()}-{i}", prompt(r)).resume()
            except LogicError:
                return

        def end(r: random.Random, manager: KVCacheManager = manager) -> None:
            while not manager._closed:
                with busy_at_most():
                    manager.close()

        together(seed, use, use, end)
        all_books_balance(manager)


# -- one scheduler ------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", [0, 16])
@pytest.mark.parametrize("seed", SEEDS)
def test_threads_submit_cancel_explain_and_probe_while_one_schedules(seed: int, host: int) -> None:
    manager = make(24, host)
    engine = Engine(Scheduler(manager, Limits(4, 48, chunk_tokens=4, max_started=6)), words := Words(manager, seed))
    requests: dict[str, Request] = {}
    ended: dict[int | str, Request] = {}
    cancelled: set[str] = set()
    left = [THREADS - 1]  # that still submit
    lock = threading.Lock()

    def submit(number: int) -> Work:
        def work(r: random.Random) -> None:
            for i in range(EACH):
                name = f"{number}-{i}"
                with lock:
                    requests[name] = Request(name, prompt(r), r.randint(1, 6))
                engine.submit(requests[name])
                if r.random() < 0.2 and engine.cancel(r.choice([name, f"{number}-0"])):
                    cancelled.add(name)
            with lock:
                left[0] -= 1

        return work

    def watch(r: random.Random) -> None:
        while left[0] or engine.scheduler.has_work:
            assert engine.scheduler.explain(f"{r.randrange(THREADS)}-{r.randrange(EACH)}").startswith("request")
            tokens = prompt(r)
            assert 0 <= manager.probe(tokens) < len(tokens)
            manager.stats()
            manager.drain_events(100)
            if r.random() < 0.1:
                manager.evict(1)

    def run(r: random.Random) -> None:
        while left[0] or engine.scheduler.has_work:
            ended.update(engine.run())

    together(seed, *[submit(number) for number in range(THREADS - 1)], watch, run)
    assert ended.keys() == requests.keys()
    for request in requests.values():
        assert request.finish_reason in ("length", "cancelled"), (request, request.error)
        if request.finish_reason == "length":
            assert request.output_tokens == alone(request), request
    assert words.words
    all_books_balance(manager)
    manager.close()


def alone(request: Request) -> list[int]:
    """What it says with no cache manager at all."""
    copy = Request("copy", request.tokens, request.max_new_tokens)
    while len(copy.output_tokens) < copy.max_new_tokens:
        copy.output_tokens.append(word(copy) % 50)
    return copy.output_tokens


@pytest.mark.parametrize("seed", SEEDS)
def test_threads_that_step_by_turns_share_one_scheduler(seed: int) -> None:
    """Scheduler and engine belong to one thread at a time; whose turn it is may change."""
    manager = make(24, 16)
    engine = Engine(Scheduler(manager, Limits(4, 48, chunk_tokens=4, max_started=6)), Words(manager, seed))
    turn, ended = threading.Lock(), []

    def work(number: int) -> Work:
        def steps(r: random.Random) -> None:
            for i in range(EACH):
                engine.submit(Request(f"{number}-{i}", prompt(r), r.randint(1, 4)))
                with turn:
                    ended.extend(engine.step())

        return steps

    together(seed, *[work(number) for number in range(THREADS)])
    ended.extend(engine.run().values())
    assert sorted(request.request_id for request in ended) == sorted(
        f"{n}-{i}" for n in range(THREADS) for i in range(EACH)
    )
    assert all(request.output_tokens == alone(request) for request in ended)
    all_books_balance(manager)
    manager.close()
