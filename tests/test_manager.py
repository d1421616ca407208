"""The manager's calls one by one: results, misuse, bad input, memory, threads, fork and exit."""

from __future__ import annotations

import itertools
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import backend
from kvpool import (
    CacheConfig,
    ConfigError,
    InvariantError,
    KVCache,
    KVCacheManager,
    LogicError,
    PoolConfig,
    PoolPlan,
    Retention,
    Scope,
    TokenRange,
)

T = 4


def make(slots: int = 8, page_bytes: int = 8, **options: Any) -> KVCacheManager:
    pools = [PoolConfig("kv", page_bytes)]
    return KVCacheManager(CacheConfig(T, pools, (slots + 1) * page_bytes, **options), backend.device())


def run(manager: KVCacheManager, request_id: int | str, tokens: list[int], **options: Any) -> int:
    """One request from create to close; returns what it reused."""
    with manager.create(request_id, tokens, **options) as cache:
        assert cache.resume()
        assert cache.resize(len(tokens))
        cache.commit(tokens[cache.num_committed_tokens :])
        return cache.num_reused_tokens


@pytest.fixture
def manager() -> Iterator[KVCacheManager]:
    with make() as made:
        yield made
        made.check()


def test_life_of_a_request(manager: KVCacheManager) -> None:
    cache = manager.create("a", list(range(10)))
    assert (cache.state, cache.capacity, cache.num_reused_tokens) == ("SUSPENDED", 0, 0)
    assert manager.cache("a") is cache
    assert manager.stats().pools["kv"]["device"]["free"] == 8
    assert cache.resume()
    assert cache.resume()
    assert cache.state == "ACTIVE"
    assert cache.resize(10, 3)
    assert (cache.capacity, cache.history_length) == (10, 3)
    assert cache.commit(list(range(10))) is False
    assert (cache.history_length, cache.num_committed_tokens) == (10, 10)
    assert sorted(cache.block_table("kv")) == [1, 2, 3]
    cache.suspend()
    cache.suspend()
    assert manager.stats().pools["kv"]["device"]["held"] == 3
    cache.close()
    cache.close()
    assert cache.state == "CLOSED"
    books = manager.stats().pools["kv"]["device"]
    assert (books["cached"], books["free"], books["peak"]) == (2, 6, 3)
    with pytest.raises(KeyError):
        manager.cache("a")
    assert manager.probe(list(range(9))) == 8
    assert manager.probe(list(range(8))) == 7  # the last prompt token is never reused


def test_shrinking_frees_whole_blocks(manager: KVCacheManager) -> None:
    cache = manager.create(1, [])
    cache.resume()
    assert cache.resize(16)
    assert cache.resize(5)
    assert manager.stats().pools["kv"]["device"]["free"] == 6


def test_pressure_is_a_value_and_changes_nothing() -> None:
    with make(slots=4) as manager:
        run(manager, 1, list(range(12)))
        cache = manager.create(2, [99])
        cache.resume()
        before = manager.stats()
        assert cache.resize(17) is False
        assert manager.stats() == before
        assert cache.resize(16) is True


def test_partial_match_copies_the_bytes_and_leaves_the_source(manager: KVCacheManager) -> None:
    run(manager, 1, list(range(8)))
    first = manager.create(2, [*range(8), 50])
    first.resume()
    pages = manager.pages("kv")
    table = first.block_table("kv")
    pages[table[0]], pages[table[1]] = 11, 22
    first.close()
    second = manager.create(3, [0, 1, 2, 3, 4, 5, 60, 61])
    assert second.num_reused_tokens == 6
    second.resume()
    mine = second.block_table("kv")
    assert mine[0] == table[0]
    assert mine[1] != table[1]
    assert (pages[mine[1]] == 22).all()
    assert manager.probe([*range(8), 50]) == 8


def test_interrupted_copy_leaves_the_cache_as_it_was(manager: KVCacheManager, monkeypatch: pytest.MonkeyPatch) -> None:
    run(manager, 1, list(range(8)))
    cache = manager.create(2, [0, 1, 2, 3, 4, 5, 60])
    before = manager.stats()

    def interrupted(copies: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(manager, "_copy", interrupted)
        with pytest.raises(KeyboardInterrupt):
            cache.resume()
    after = manager.stats()
    assert {k: v for k, v in after.pools["kv"]["device"].items() if k != "peak"} == {
        k: v for k, v in before.pools["kv"]["device"].items() if k != "peak"
    }
    assert cache.state == "SUSPENDED"
    manager.check()
    assert cache.resume()
    assert cache.num_reused_tokens == 6


def test_equal_blocks_switch_to_the_page_of_the_tree(manager: KVCacheManager) -> None:
    caches = [manager.create(i, list(range(4))) for i in range(2)]
    for cache in caches:
        cache.resume()
        cache.resize(4)
    assert caches[0].commit(list(range(4))) is False
    assert caches[1].commit(list(range(4))) is True
    assert caches[0].block_table("kv") == caches[1].block_table("kv")


def test_scopes_separate_completely_and_types_count(manager: KVCacheManager) -> None:
    scopes = [None, Scope(lora_id=1), Scope(lora_id="1"), Scope(salt=1), Scope(salt="1"), Scope(salt=b"1")]
    for i, scope in enumerate(scopes):
        assert run(manager, i, [7, 7, 7, 7, 7], scope=scope) == 0
    for scope in scopes:
        assert manager.probe([7, 7, 7, 7, 7], scope) == 4
    assert manager.probe([7, 7, 7, 7, 7], Scope(lora_id=1, salt=1)) == 0


def test_set_epoch_makes_old_content_unreachable_and_reclaims_it_first() -> None:
    with make(slots=3) as manager:
        run(manager, 1, list(range(4)), retention=Retention([TokenRange(0, None, 100)]))
        manager.set_epoch(2)
        assert manager.probe(list(range(5))) == 0
        run(manager, 2, list(range(10, 14)), retention=Retention([TokenRange(0, None, 0)]))
        run(manager, 3, list(range(20, 28)))
        assert manager.probe([*range(10, 14), 0]) == 4
        with pytest.raises(ValueError, match="only grows"):
            manager.set_epoch(1)
        with pytest.raises(ValueError, match="epoch"):
            manager.create(4, [1], scope=Scope(epoch=3))


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def kept(priority: int, seconds: float | None = None) -> Retention:
    return Retention([TokenRange(0, None, priority, seconds)], priority, seconds)


def victims(manager: KVCacheManager, prompts: dict[str, list[int]]) -> list[str]:
    """The order in which these one-block prompts are evicted."""
    order = []
    for _ in prompts:
        before = {name for name, tokens in prompts.items() if manager.probe([*tokens, 0])}
        manager.evict(1)
        (gone,) = before - {name for name, tokens in prompts.items() if manager.probe([*tokens, 0])}
        order.append(gone)
    return order


A, B, C = [1] * T, [2] * T, [3] * T


def test_duration_over_means_priority_35_and_the_expiry_counts_as_use() -> None:
    clock = Clock()
    with make(clock=clock) as manager:
        run(manager, "a", A, retention=kept(90, 10.0))
        run(manager, "b", B)
        clock.now += 11
        run(manager, "c", C)  # a's expiry lies between b's use and c's
        assert victims(manager, {"a": A, "b": B, "c": C}) == ["b", "a", "c"]


def test_duration_not_over_keeps_the_priority() -> None:
    clock = Clock()
    with make(clock=clock) as manager:
        run(manager, "a", A, retention=kept(90, 10.0))
        run(manager, "b", B)
        clock.now += 9
        run(manager, "c", C)
        assert victims(manager, {"a": A, "b": B, "c": C}) == ["b", "c", "a"]


def test_duration_below_35_rises_with_no_expiry() -> None:
    clock = Clock()
    with make(clock=clock) as manager:
        run(manager, "b", B)
        run(manager, "a", A, retention=kept(10, 1.0))
        clock.now += 5
        assert victims(manager, {"a": A, "b": B}) == ["a", "b"]


def test_every_release_of_the_last_claim_restarts_the_clock() -> None:
    clock = Clock()
    with make(clock=clock) as manager:
        run(manager, "a", A, retention=kept(90, 10.0))
        first, second = (manager.create(i, [*A, 9]) for i in range(2))
        clock.now += 20  # claimed: the clock does not run
        first.close()
        clock.now += 20
        second.close()
        clock.now += 9
        run(manager, "b", B)
        assert victims(manager, {"a": A, "b": B}) == ["b", "a"]


def test_reuse_with_retention_takes_the_maximum_of_each_and_reuse_without_changes_neither() -> None:
    clock = Clock()
    with make(clock=clock) as manager:
        run(manager, "a", A, retention=kept(90, 5.0))
        run(manager, 1, [*A, 9], retention=kept(50, 20.0))  # now 90 for 20 s
        run(manager, 2, [*A, 9])
        clock.now += 19
        run(manager, "b", B, retention=kept(80))
        assert victims(manager, {"a": A, "b": B}) == ["b", "a"]


def test_expired_priority_is_not_the_one_that_a_later_reuse_raises() -> None:
    clock = Clock()
    with make(clock=clock) as manager:
        run(manager, "a", A, retention=kept(90, 5.0))
        clock.now += 6
        run(manager, 1, [*A, 9], retention=kept(50, 5.0))
        run(manager, "b", B, retention=kept(60))
        assert victims(manager, {"a": A, "b": B}) == ["a", "b"]


def test_clock_that_fails_leaves_everything_as_it_was() -> None:
    clock = Clock()
    with make(clock=lambda: clock()) as manager:
        cache = manager.create("a", [*A, 5], retention=kept(90, 5.0))
        before = manager.stats()
        clock.now = float("nan")
        for call in (
            cache.resume,
            cache.close,
            manager.clear,
            lambda: manager.evict(1),
            lambda: manager.create("b", A),
        ):
            with pytest.raises(ValueError, match="clock"):
                call()
        assert manager.stats() == before
        assert cache.state == "SUSPENDED"
        clock.now = 1.0
        cache.close()
        assert cache.state == "CLOSED"
        manager.check()


def test_clock_is_not_asked_before_a_duration_is_given() -> None:
    def never() -> float:
        raise AssertionError("asked")

    with make(clock=never) as manager:
        run(manager, "a", A, retention=kept(90))
        manager.evict(1)
        with pytest.raises(AssertionError, match="asked"):
            manager.create("b", B, retention=kept(90, 1.0))
        manager.check()


def test_priority_decides_who_goes_first() -> None:
    with make(slots=4) as manager:
        run(manager, 1, [1] * 4, retention=Retention([TokenRange(0, None, 90)]))
        run(manager, 2, [2] * 4, retention=Retention([TokenRange(0, None, 10)]))
        run(manager, 3, [3] * 4)
        assert manager.evict(1) == 1
        assert [manager.probe([i] * 5) for i in (1, 2, 3)] == [4, 0, 4]
        assert manager.evict(1) == 1
        assert [manager.probe([i] * 5) for i in (1, 2, 3)] == [4, 0, 0]
        assert manager.evict(5) == 1


def test_claimed_blocks_are_never_evicted_under_any_number(manager: KVCacheManager) -> None:
    run(manager, 1, list(range(8)))
    holder = manager.create(2, [*range(8), 1])
    assert manager.evict(10**9) == 0
    manager.clear()
    assert holder.resume()
    assert manager.probe([*range(8), 1]) == 8


def test_the_tail_goes_before_the_prefix(manager: KVCacheManager) -> None:
    run(manager, 1, list(range(16)))
    assert [manager.evict(1) and manager.probe(list(range(17))) for _ in range(4)] == [12, 8, 4, 0]


def test_block_tables_in_place_and_csr(manager: KVCacheManager) -> None:
    a, b, empty = (manager.create(i, []) for i in range(3))
    for cache, capacity in ((a, 9), (b, 4), (empty, 0)):
        cache.resume()
        cache.resize(capacity)
    tables = manager.block_tables([a, b, empty], "kv", fill=-1)
    assert tables.shape == (3, 3)
    assert tables.dtype == np.int32
    assert list(tables[1, 1:]) == [-1, -1]
    out = np.full((4, 5), 77, np.int32)
    assert manager.block_tables([a, b, empty], "kv", out=out, fill=-1) is out
    assert (out[:3, :3] == tables).all()
    assert (out[3] == -1).all()
    assert (out[:, 3:] == -1).all()
    indptr, indices, last = manager.block_tables_csr([a, b, empty], "kv")
    assert list(indptr) == [0, 3, 4, 4]
    assert list(indices) == [*tables[0], tables[1, 0]]
    assert list(last) == [1, 4, 0]
    assert {x.dtype for x in (indptr, indices, last)} == {np.dtype(np.int32)}
    for bad in (
        np.zeros((3, 2), np.int32),
        np.zeros((2, 3), np.int32),
        np.zeros((3, 3), np.int64),
        np.zeros((3, 3), ">i4"),  # the core takes it for one of this machine's
        np.zeros((3, 3), np.int32, order="F"),
        np.zeros(9, np.int32),
        [[0] * 3] * 3,
    ):
        with pytest.raises(ValueError, match="out"):
            manager.block_tables([a, b, empty], "kv", out=bad)  # type: ignore[arg-type]
    assert manager.block_tables([], "kv").shape == (0, 0)


def test_stale_entries_keep_their_place() -> None:
    pools = [PoolConfig("full", 8), PoolConfig("window", 8, window=4)]
    with KVCacheManager(CacheConfig(T, pools, 8 * 4000), backend.books()) as manager:
        cache = manager.create(1, [])
        cache.resume()
        assert cache.resize(16)
        assert cache.commit(list(range(16))) is True
        full, window = cache.block_table("full", fill=-1), cache.block_table("window", fill=-1)
        assert (full > 0).all()
        assert list(window > 0) == [False, False, False, True]
        manager.check()


def test_pages_are_zero_copy_with_a_null_page(manager: KVCacheManager) -> None:
    pages = manager.pages("kv")
    assert pages.shape == (9, 8)
    assert pages.dtype == np.uint8
    assert not pages[0].any()
    assert np.shares_memory(pages, manager.pages("kv"))
    assert np.shares_memory(np.from_dlpack(pages), pages)
    pages[0, 3] = 1
    with pytest.raises(InvariantError, match="null page"):
        manager.check()
    pages[0, 3] = 0


def test_buffers_are_the_engines_memory() -> None:
    memory = np.full((9, 2, 2), 5, np.uint16)
    config = CacheConfig(T, [PoolConfig("kv", 8)], 72)
    with KVCacheManager(config, "cpu", buffers={"kv": memory}) as manager:
        assert np.shares_memory(manager.pages("kv"), memory)
        assert not memory[0].any()
    for name, buffer in (
        ("kv", memory[1:]),
        ("kv", np.zeros((9, 16), np.uint8)[:, ::2]),
        ("other", memory),
        ("kv", "no array"),
    ):
        with pytest.raises(ConfigError, match=name):
            KVCacheManager(config, "cpu", buffers={name: buffer})


def test_books_only() -> None:
    with KVCacheManager(CacheConfig(T, [PoolConfig("kv", 8)], 72), None) as manager:
        assert run(manager, 1, list(range(8))) == 0
        assert run(manager, 2, [0, 1, 2, 3, 9, 9]) == 4
        with pytest.raises(LogicError, match="books only"):
            manager.pages("kv")


def test_step_fences_what_is_given_up(manager: KVCacheManager) -> None:
    cache = manager.create(1, [])
    cache.resume()
    cache.resize(12)
    manager.step_begin([cache])
    cache.resize(4)
    books = manager.stats().pools["kv"]["device"]
    assert (books["active"], books["fenced"], books["free"]) == (1, 2, 5)
    cache.close()
    assert cache.state == "CLOSED"
    with pytest.raises(LogicError, match="already"):
        manager.create(1, [])
    assert manager.stats().pools["kv"]["device"]["fenced"] == 3
    manager.step_end([cache])
    assert manager.stats().pools["kv"]["device"]["free"] == 8
    manager.create(1, []).close()
    with pytest.raises(LogicError, match="step_begin"):
        manager.step_end([cache])


def test_step_end_releases_closed_caches_in_the_order_listed() -> None:
    """Not in that of their addresses: what is evicted first must not depend on where the allocator put them."""
    for order in itertools.permutations(range(4)):
        with make(slots=4) as manager:
            caches = [manager.create(i, [i] * T) for i in range(4)]
            for i, cache in enumerate(caches):
                assert cache.resume()
                assert cache.resize(T)
                cache.commit([i] * T)
            manager.step_begin(caches)
            for cache in caches:
                cache.close()
            manager.step_end([caches[i] for i in order])
            for gone in range(1, 4):
                assert manager.evict(1) == 1
                assert [i for i in order if manager.probe([i] * (T + 1)) == T] == list(order[gone:])


def test_closed_cache_refuses_and_its_successor_is_untouched(manager: KVCacheManager) -> None:
    old = manager.create(1, [])
    old.close()
    new = manager.create(1, [])
    new.resume()
    new.resize(8)
    calls: list[Callable[[], object]] = [
        old.resume,
        old.suspend,
        lambda: old.resize(4),
        lambda: old.commit([1]),
        lambda: old.block_table("kv"),
        lambda: manager.step_begin([old]),
    ]
    for call in calls:
        with pytest.raises(LogicError, match="CLOSED"):
            call()
    old.close()
    assert (new.capacity, new.state) == (8, "ACTIVE")


BAD_TOKENS = [
    [-1],
    [2**31],
    [2**70],
    [1.5],
    [True],
    ["a"],
    b"ab",
    "ab",
    None,
    [[1, 2]],
    [1, None],
    3,
    np.zeros(3, np.int64),
    np.zeros((2, 2), np.int32),
    np.array([-5], np.int32),
]


@pytest.mark.parametrize("tokens", BAD_TOKENS, ids=repr)
def test_bad_tokens_leave_the_books_unchanged(manager: KVCacheManager, tokens: Any) -> None:
    cache = manager.create("ok", [])
    cache.resume()
    cache.resize(8)
    before = manager.stats()
    for call in (lambda: manager.create("bad", tokens), lambda: manager.probe(tokens), lambda: cache.commit(tokens)):
        with pytest.raises(ValueError, match="tokens"):
            call()
    assert manager.stats() == before
    manager.check()


def test_bad_arguments_name_the_field(manager: KVCacheManager) -> None:
    cache = manager.create("ok", [])
    cache.resume()
    before = manager.stats()
    bad: list[tuple[str, Callable[[], object]]] = [
        ("capacity", lambda: cache.resize(-1)),
        ("capacity", lambda: cache.resize(2**80)),
        ("capacity", lambda: cache.resize(2**40)),
        ("history_length", lambda: cache.resize(4, 5)),
        ("pool", lambda: cache.block_table("nothing")),
        ("pool", lambda: manager.pages("nothing")),
        ("tier", lambda: manager.pages("kv", "disk")),
        ("num_blocks", lambda: manager.evict(-1)),
        ("epoch", lambda: manager.set_epoch(-1)),
        ("request_id", lambda: manager.create(1.5, [])),  # type: ignore[arg-type]
        ("scope", lambda: manager.create(1, [], scope="a")),  # type: ignore[arg-type]
        ("retention", lambda: manager.create(1, [], retention=5)),  # type: ignore[arg-type]
        ("caches", lambda: manager.block_tables(["ok"], "kv")),  # type: ignore[list-item]
        ("caches", lambda: manager.step_begin(cache)),  # type: ignore[arg-type]
        ("fill", lambda: cache.block_table("kv", fill=2**31)),
    ]
    for name, call in bad:
        with pytest.raises(ValueError, match=name):
            call()
    with make() as other, pytest.raises(ValueError, match="caches"):
        other.block_tables([cache], "kv")
    assert manager.stats() == before


def test_longer_than_max_seq_len() -> None:
    with make(max_seq_len=8) as manager:
        with pytest.raises(ValueError, match="max_seq_len"):
            manager.create(1, [0] * 9)
        cache = manager.create(1, [0] * 8)
        cache.resume()
        with pytest.raises(ValueError, match="capacity"):
            cache.resize(9)


@pytest.mark.parametrize(
    ("field", "options"),
    [("device", {"device": "gpu"}), ("device", {"device": "cuda"}), ("policy", {"policy": "fifo"})],
)
def test_what_is_not_available_is_refused(field: str, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=field):
        KVCacheManager(CacheConfig(T, [PoolConfig("kv", 8)], 100), **options)


@pytest.mark.parametrize(
    ("field", "options"),
    [
        ("move_timeout_s", {"move_timeout_s": 0}),
        ("move_timeout_s", {"move_timeout_s": "a minute"}),
        ("mover", {"mover": 3}),
        ("buffers", {"buffers": [b"x"]}),
        ("buffers\\['kv'\\]", {"buffers": {"kv": None}}),
        ("plan", {"plan": {"kv": 3}}),
        ("plan.num_slots\\['kv'\\]", {"plan": PoolPlan({"kv": 1}, {"kv": 2.5}, {}, 0)}),
        ("plan.num_slots\\['kv'\\]", {"plan": PoolPlan({"kv": 1}, {"kv": 0}, {}, 0)}),
        ("plan.host_slots\\['kv'\\]", {"plan": PoolPlan({"kv": 1}, {"kv": 2}, {"kv": -1}, 0)}),
    ],
)
def test_options_of_another_kind_name_the_field(field: str, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"^{field}: "):
        KVCacheManager(CacheConfig(T, [PoolConfig("kv", 8)], 100), backend.device(), **options)


def test_tables_too_large_for_memory_are_a_memory_error() -> None:
    config = CacheConfig(2**20, [PoolConfig("kv", 1)], 100, max_blocks=2**31 - 2)
    with pytest.raises(MemoryError, match="max_blocks"):
        KVCacheManager(config, backend.books())


def test_pages_too_large_for_memory_are_a_memory_error() -> None:
    with pytest.raises(MemoryError, match="device_bytes"):
        KVCacheManager(CacheConfig(T, [PoolConfig("kv", 10**15)], 10**17), backend.device())


def test_closed_manager_refuses() -> None:
    manager = make()
    cache = manager.create(1, [])
    manager.close()
    manager.close()
    assert cache.state == "CLOSED"
    for call in (lambda: manager.create(2, []), manager.clear, lambda: manager.probe([]), manager.available_tokens):
        with pytest.raises(LogicError, match="closed"):
            call()


def test_available_tokens_can_really_be_had() -> None:
    with make(slots=5) as manager:
        run(manager, 1, list(range(8)))
        keep = manager.create(2, [*range(8), 0])
        assert manager.available_tokens() == 12
        cache = manager.create(3, [])
        cache.resume()
        assert cache.resize(12)
        assert manager.available_tokens() == 0
        keep.close()


def test_threads_with_requests_of_their_own() -> None:
    errors: list[BaseException] = []
    with make(slots=64) as manager:

        def work(thread: int) -> None:
            try:
                for i in range(300):
                    run(manager, f"{thread}-{i}", [thread % 2, i % 5, *range(10)])
                    manager.probe([0, 1, *range(10)])
                    manager.stats()
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors
        manager.check()
        books = manager.stats().pools["kv"]["device"]
        assert books["free"] + books["cached"] == books["slots"]


SCRIPT = """
import os
from kvpool import CacheConfig, KVCacheManager, PoolConfig
m = KVCacheManager(CacheConfig(4, [PoolConfig("kv", 8)], 800))
c = m.create(1, list(range(9))); c.resume(); c.resize(9); c.commit(list(range(9)))
{action}
print("done")
"""


@pytest.mark.parametrize(
    "action",
    [
        "",
        "pid = os.fork()\nc.close(); m.check()\nif pid: assert os.waitpid(pid, 0)[1] == 0",
        "del m",
        "c.resize(40); m.step_begin([c])",
    ],
    ids=["exit", "fork", "manager gone", "in flight"],
)
def test_exit_with_open_caches_neither_hangs_nor_crashes(action: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(action=action)], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("done")


def test_import_takes_no_extra() -> None:
    code = "import sys, kvpool; print([m for m in ('torch', 'cupy', 'click', 'rich') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_repr_tells_id_and_state(manager: KVCacheManager) -> None:
    cache: KVCache = manager.create("x", [])
    assert repr(cache) == "<kvpool cache of request 'x': SUSPENDED>"


def test_drain_events_tells_blocks_with_their_parents(manager: KVCacheManager) -> None:
    tokens = list(range(10))
    run(manager, "a", tokens)
    first, second = manager.block_keys(tokens)
    stored = manager.drain_events()
    assert [(e.number, e.kind, e.key, e.parent, e.pool, e.tier) for e in stored] == [
        (1, "stored", first, None, "kv", "device"),
        (2, "stored", second, first, "kv", "device"),
    ]
    assert manager.drain_events() == []
    run(manager, "b", tokens)  # the tree has it already
    manager.evict(1)
    manager.clear()
    removed = manager.drain_events()
    assert [(e.number, e.kind, e.key, e.parent) for e in removed] == [
        (3, "removed", second, None),
        (4, "removed", first, None),
    ]
    assert manager.block_keys(tokens, Scope(lora_id=1))[0] != first


def test_drain_events_shows_a_gap_when_the_ring_was_too_small() -> None:
    with make(slots=64) as manager:
        for i in range(600):
            run(manager, i, [i] * 256)
        events = manager.drain_events()
        numbers = [e.number for e in events]
        assert len(numbers) == 65_536
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
        assert numbers[0] > 1
        assert manager.drain_events(5) == []


@pytest.mark.parametrize("step", [1, 2, -1])
def test_tokens_of_any_stride_are_what_they_show(step: int) -> None:
    config = CacheConfig(4, [PoolConfig("kv", 8)], 8 * 9, hash_seed=1)
    with KVCacheManager(config, None) as manager:
        wide = np.arange(1, 19, dtype=np.int32)[::step]
        with manager.create(1, wide) as cache:
            assert cache.resume()
            assert cache.resize(8)
            cache.commit(wide[:8])
        assert manager.probe(wide.tolist()) == manager.probe(wide) == 8
