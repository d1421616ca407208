"""Windows between two statements, each held open on purpose: what another thread does in it must do no harm."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from crowd import make
from kvpool import (
    AddRequest,
    CacheConfig,
    KVCache,
    KVCacheManager,
    LogicError,
    PoolConfig,
    Request,
    Retention,
    Scheduler,
    SchedulerConfig,
    TokenRange,
)
from kvpool.uses import StepUses

A, B, C = [1] * 8, [2] * 12, [3] * 12


class Between:
    """Stands for an object whose calls of one name are preceded by `before`, and followed by `after`."""

    def __init__(self, inner: Any, name: str, before: Callable[[], object], after: Callable[[], object] = int) -> None:
        self._inner, self._name, self._before, self._after = inner, name, before, after

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        if name != self._name:
            return found

        def call(*args: Any) -> Any:
            self._before()
            result = found(*args)
            self._after()
            return result

        return call


class Ids(dict[Any, KVCache]):
    """A manager's caches; `then` runs once, right before one enters."""

    def __init__(self, then: Callable[[], object]) -> None:
        self.then: Callable[[], object] | None = then

    def setdefault(self, key: Any, default: Any = None) -> Any:
        then, self.then = self.then, None
        if then is not None:
            then()
        return super().setdefault(key, default)


def test_a_cache_made_while_another_thread_closes_the_manager_does_not_stay_open() -> None:
    manager = make(8)
    manager._caches = Ids(manager.close)
    with pytest.raises(LogicError, match="the manager is closed"):
        manager.create("x", A)
    assert not manager._caches
    manager.check()


def test_a_batch_that_meets_an_id_of_another_thread_leaves_nothing() -> None:
    manager = make(8)
    requests = [Request(name, A, 1) for name in "abc"]
    manager._caches = Ids(lambda: manager.create("b", A))
    with pytest.raises(LogicError, match="'b' has a cache already"):
        manager.claim_contexts([(request, None) for request in requests])
    assert list(manager._caches) == ["b"]
    manager.close()
    manager.check()


def test_a_batch_that_cannot_be_closed_stays_open() -> None:
    """Copies of one cache of it are still another thread's to make."""
    manager = make(8)
    store(manager, A)
    caches = [manager.create(1, A), manager.create(2, [1] * 6 + [9, 9])]
    with ThreadPoolExecutor(1) as other:
        resumed, copies = other.submit(manager._core.resume, caches[1]._handle).result()
        assert resumed
        assert copies
        with pytest.raises(LogicError, match="copies of an earlier call"):
            manager.free_requests([Request(n, A, 1) for n in (1, 2)])
        other.submit(manager._core.copies_failed, [caches[1]._handle]).result()
    assert [cache.state for cache in caches] == ["SUSPENDED", "SUSPENDED"]
    manager.free_requests([Request(n, A, 1) for n in (1, 2)])
    assert not manager._caches
    manager.check()


def store(manager: KVCacheManager, tokens: list[int]) -> None:
    with manager.create("store", tokens) as cache:
        assert cache.resume()
        assert cache.resize(len(tokens))
        cache.commit(tokens[cache.num_reused_tokens :])


def test_a_batch_entry_that_is_lost_as_soon_as_it_is_claimed_is_none_and_closed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    manager = make(8)

    def lose(caches: Iterable[KVCache]) -> None:
        for cache in caches:
            cache._lost = cache.request_id == "lost"

    monkeypatch.setattr(manager, "_check_lost", lose)
    kept, lost = manager.add_batch([AddRequest("kept", A), AddRequest("lost", B)])
    assert kept is not None
    assert lost is None
    assert list(manager._caches) == ["kept"]
    manager.close()
    manager.check()


def test_a_step_that_cannot_be_written_down_has_not_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    manager = make(8)
    with manager.create("x", A) as cache:
        assert cache.resume()

        def busy(*_: object) -> StepUses:
            raise LogicError("another thread is in it")

        monkeypatch.setattr("kvpool.manager.StepUses", busy)
        with pytest.raises(LogicError):
            manager.step_begin([cache])
        with pytest.raises(LogicError, match="without step_begin"):
            manager.step_end([cache])
    assert not manager._caches
    manager.close()


# -- pages that did not arrive ------------------------------------------------------------------------


def losing() -> tuple[KVCacheManager, KVCache]:
    """A page of A has just not arrived on the host, which nobody knows yet; and a cache that claims it."""
    manager = make(3, 3, windowed=False, faults=True)
    store(manager, A)
    moves = manager._moves
    assert moves is not None
    moves.mover.fail(1, "offload")  # type: ignore[attr-defined]
    claims = manager.create("claims", [*A, 9])
    with manager.create("evicts", B) as cache:
        assert cache.resume()
        assert cache.resize(len(B))
        for flight in moves.flying:
            assert flight.ticket.wait(10)
    assert claims.state == "SUSPENDED"
    return manager, claims


def test_nobody_passes_while_another_thread_tells_who_is_lost() -> None:
    manager, claims = losing()
    at, go_on = threading.Event(), threading.Event()
    moves = manager._moves
    assert moves is not None
    moves.recorder = Between(moves.recorder, "lose", lambda: (at.set(), go_on.wait(10)))  # type: ignore[assignment]
    with ThreadPoolExecutor(2) as threads:
        finder = threads.submit(manager.lost)
        assert at.wait(10)
        resumed = threads.submit(claims.resume)
        threading.Timer(0.2, go_on.set).start()
        assert resumed.result(10) is False, "it was resumed on a page that did not arrive"
        assert finder.result(10) == ["claims"]
    claims.close()
    manager.check()
    manager.close()


def test_a_cache_made_while_another_thread_tells_who_is_lost_is_lost_too() -> None:
    manager, claims = losing()
    made: list[KVCache] = []
    moves = manager._moves
    assert moves is not None
    moves.recorder = Between(  # type: ignore[assignment]
        moves.recorder, "lose", lambda: made.append(manager.create("late", [*A, 8]))
    )
    assert sorted(manager.lost()) == ["claims", "late"]  # type: ignore[type-var]
    assert made[0].state == "LOST"
    for cache in (claims, *made):
        cache.close()
    manager.check()
    manager.close()


def test_a_page_that_fails_before_the_core_knows_of_its_copy_is_reported_all_the_same() -> None:
    manager = make(3, 3, windowed=False, faults=True)
    store(manager, A)
    store(manager, B)
    moves = manager._moves
    assert moves is not None
    moves.mover.fail(1, "onboard")  # type: ignore[attr-defined]
    cache = manager.create("x", [*A, 9])
    assert cache.num_reused_tokens == 8
    with ThreadPoolExecutor(1) as other:

        def others() -> None:
            assert all(flight.ticket.wait(10) for flight in moves.flying)
            done = other.submit(manager.lost)
            with contextlib.suppress(TimeoutError):
                done.result(0.2)  # it waits for the thread that makes the copies

        core, manager._core = manager._core, Between(manager._core, "copies_done", others)  # type: ignore[assignment]
        assert cache.resume()
        manager._core = core
    assert manager.lost() == ["x"]
    cache.close()
    manager.check()
    manager.close()


# -- the scheduler ------------------------------------------------------------------------------------


def test_explain_from_a_thread_that_asks_within_a_pass_disturbs_nobody() -> None:
    """The clock is read while the pass is in the roster."""
    said: list[str] = []
    scheduler: Scheduler | None = None

    def clock() -> float:
        if scheduler is not None and scheduler.find("x") is not None:
            said.append(scheduler.explain("x"))
        return 0.0

    config = CacheConfig(4, [PoolConfig("kv", 8)], 8 * 40, clock=clock)
    manager = KVCacheManager(config)
    scheduler = Scheduler(manager, SchedulerConfig(4, 64))
    timed = Retention([TokenRange(0, None, 50, 10.0)])
    scheduler.add(Request("x", A, 5, retention=timed))
    while scheduler.has_work:
        step = scheduler.schedule()
        scheduler.update(step, {request.request_id: [7] for request in step.requests})
    assert said
    assert all(text.startswith("request 'x' is") for text in said)
    manager.close()


def test_a_list_that_meets_an_id_which_another_thread_adds_meanwhile_refuses_its_own() -> None:
    manager = make(12)
    scheduler = Scheduler(manager, SchedulerConfig(4, 64))
    added, listed = Request("x", A, 1), Request("x", B, 1)
    check = scheduler.check

    def slow(request: Request) -> None:
        check(request)
        if request is listed:
            scheduler.add(added)

    scheduler.check = slow  # type: ignore[method-assign]
    step = scheduler.schedule([listed])
    ((request, error),) = step.refused
    assert request is listed
    assert isinstance(error, LogicError)
    assert scheduler.find("x") is not None
    assert scheduler.find("x").request is added  # type: ignore[union-attr]
    step = scheduler.schedule()
    assert [one.request_id for one in scheduler.update(step, {"x": [5]})] == ["x"]
    assert (added.output_tokens, listed.finish_reason) == ([5], "error")
    manager.close()
