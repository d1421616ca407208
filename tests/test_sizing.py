"""Sizing: the table of exact results, and that every plan can really be allocated."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpool import (
    BatchDesc,
    CacheConfig,
    ConfigError,
    KVCacheDesc,
    KVCacheManager,
    PoolConfig,
    peak_slots,
    plan_pools,
    slots_for,
)
from kvpool.sizing import _split, stale_range

MIB = 1 << 20


def pools(windows: list[int | None], page_bytes: list[int] | None = None) -> list[PoolConfig]:
    sizes = page_bytes or [1] * len(windows)
    return [PoolConfig(f"p{i}", size, window) for i, (window, size) in enumerate(zip(windows, sizes, strict=True))]


@pytest.mark.parametrize(
    ("mode", "floors"), [("none", [1, 539, 1]), ("aligned", [64, 539, 64]), ("sliding", [128, 539, 128])]
)
def test_floors_by_reservation(mode: str, floors: list[int]) -> None:
    config = CacheConfig(
        256, pools([128, None, 8]), 1 << 30, max_batch_size=64, max_seq_len=137984, decode_reservation=mode
    )
    assert list(plan_pools(config).min_slots.values()) == floors


def test_floor_is_cut_at_max_seq_len() -> None:
    config = CacheConfig(16, pools([4096]), 1 << 30, max_batch_size=256, max_seq_len=2048)
    assert plan_pools(config).min_slots == {"p0": 32768}


@pytest.mark.parametrize(("count", "c", "h", "slots"), [(4, 97, 96, [52, 52, 8]), (1, 201, 200, [17, 26, 2])])
def test_slots_for(count: int, c: int, h: int, slots: list[int]) -> None:
    config = CacheConfig(8, pools([128, None, 8]), 1 << 30)
    assert list(slots_for(config, BatchDesc([KVCacheDesc(c, h)] * count)).values()) == slots


@pytest.mark.parametrize("t", [1, 2, 3, 4, 7])
def test_a_window_holds_as_many_blocks_as_its_worst_alignment_needs(t: int) -> None:
    """By trying all: history h, k tokens more, blocks [floor((h + 1 - W) / t), ceil((h + k) / t))."""
    request = SimpleNamespace(tokens=range(10_000), max_new_tokens=1)
    for window in range(1, 3 * t + 3):
        for k in range(1, 2 * t + 3):
            config = CacheConfig(t, [PoolConfig("w", 1, window)], 1 << 20)
            held = (-(-(h + k) // t) - max(0, (h + 1 - window) // t) for h in range(100, 100 + t))
            assert peak_slots(config, request, k) == {"w": max(held)}, (t, window, k)


def test_the_step_that_adds_most_decides_a_window() -> None:
    """k = max(chunk_tokens, 1 + draft_tokens), and sinks besides."""
    config = CacheConfig(4, [PoolConfig("w", 1, 8, 5)], 1 << 20, draft_tokens=20)
    for chunk, drafts, k in ((4, 0, 4), (4, 9, 10), (40, 9, 40)):
        request = SimpleNamespace(tokens=range(1000), max_new_tokens=1, draft_tokens=drafts)
        assert peak_slots(config, request, chunk) == {"w": 2 + (8 + k + 4 - 3) // 4 + 1}


def test_a_prompt_of_the_whole_system_prompt_computes_its_last_token_itself() -> None:
    """Of a request at most capacity - 1 tokens are shared: of (8, 0) no block of 8."""
    config = CacheConfig(8, pools([None]), 1 << 30)
    assert slots_for(config, BatchDesc([KVCacheDesc(8, 0)] * 2, system_prompt_length=8)) == {"p0": 2}
    assert slots_for(config, BatchDesc([KVCacheDesc(9, 0)] * 2, system_prompt_length=8)) == {"p0": 3}


@pytest.mark.parametrize(
    ("mode", "floors"),
    [("none", [1, 1]), ("aligned", [3 + (64 + 512 + 16 - 3) // 16 + 1, 3 + 32]), ("sliding", [3 * 5 + 37, 3 + 32])],
)
def test_one_context_of_a_step_beside_the_other_decodes(mode: str, floors: list[int]) -> None:
    """Four requests, 512 tokens a step: three decodes (5 windowed blocks each when they slide) and one context."""
    config = CacheConfig(16, pools([64, None]), 1 << 20, max_batch_size=4, max_num_tokens=512, decode_reservation=mode)
    assert list(plan_pools(config).min_slots.values()) == floors


def test_the_host_knows_no_reservation() -> None:
    config = CacheConfig(16, pools([64, None], [100, 100]), 100_000, host_bytes=400, max_batch_size=4, max_seq_len=160)
    plan = plan_pools(config)
    assert plan.min_slots == {"p0": 20, "p1": 10}
    assert sum(plan.host_slots.values()) == 4


def test_a_pool_of_which_the_typical_step_needs_nothing_weighs_one_page() -> None:
    typical = BatchDesc([KVCacheDesc(10, 10)])
    config = CacheConfig(1, pools([1, None]), 112, typical_step=typical)
    assert slots_for(config, typical) == {"p0": 0, "p1": 10}
    assert plan_pools(config).num_slots == {"p0": 10, "p1": 100}


def test_system_prompt_counts_once() -> None:
    config = CacheConfig(8, pools([None]), 1 << 30)
    assert slots_for(config, BatchDesc([KVCacheDesc(48, 0)] * 2, system_prompt_length=40)) == {"p0": 7}


@pytest.mark.parametrize(("h", "stale"), [(190, (1, 1)), (191, (1, 2)), (223, (1, 3)), (512, (1, 12)), (2048, (1, 60))])
def test_stale_range(h: int, stale: tuple[int, int]) -> None:
    assert stale_range(PoolConfig("w", 1, 128, 32), 32, h) == stale


def test_split_of_the_budget() -> None:
    config = CacheConfig(
        256,
        pools([128, None, 8], [MIB, MIB, MIB // 4]),
        4096 * MIB + 9 * MIB // 4,
        max_batch_size=64,
        max_seq_len=137984,
    )
    plan = plan_pools(config)
    assert list(plan.num_slots.values()) == [713, 3205, 712]
    assert plan.bytes == config.device_bytes
    assert set(plan.host_slots.values()) == {0}


def test_below_the_floors_names_pools_bytes_and_remedy() -> None:
    config = CacheConfig(16, pools([64, None], [100, 200]), 1000, max_batch_size=4)
    with pytest.raises(ConfigError) as error:
        plan_pools(config)
    # 4 decodes of ceil((64 + 1 + 16 - 3) / 16) + 1 = 5 blocks, 4 aligned ones, and two null pages.
    for part in ("device_bytes: 1000", "'p0': min_slots 20", "'p1': min_slots 4", "3100 bytes", "raise device_bytes"):
        assert part in str(error.value)
    assert plan_pools(CacheConfig(16, pools([64, None], [100, 200]), 3100, max_batch_size=4)).num_slots == {
        "p0": 20,
        "p1": 4,
    }


def test_a_huge_budget_is_planned_at_once() -> None:
    """80 GiB of 4 KiB pages; the remainder is dealt out in runs, not slot by slot."""
    batch = BatchDesc([KVCacheDesc(1 << 20, 0)])
    config = CacheConfig(16, pools([64, None], [4096, 8192]), 80 << 30, constraints=[batch], max_seq_len=1 << 20)
    plan = plan_pools(config)
    assert 0 <= config.device_bytes - plan.bytes < 4096


def split_one_by_one(budget: int, sizes: list[int], weights: list[int], floors: list[int]) -> list[int]:
    """The rule as it is written, slot by slot."""
    slots, rest, unpinned = list(floors), budget, list(range(len(sizes)))
    while unpinned:
        total = sum(weights[i] for i in unpinned)
        share = {i: rest * weights[i] // (total * sizes[i]) for i in unpinned}
        low = [i for i in unpinned if share[i] < floors[i]]
        if not low:
            for i, n in share.items():
                slots[i] = n
            break
        rest -= sum(floors[i] * sizes[i] for i in low)
        unpinned = [i for i in unpinned if i not in low]
    left = budget - sum(n * b for n, b in zip(slots, sizes, strict=True))
    while fits := [i for i in range(len(sizes)) if sizes[i] <= left]:
        best = min(fits, key=lambda i: (Fraction(slots[i] * sizes[i], weights[i]), i))
        slots[best] += 1
        left -= sizes[best]
    return slots


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 60), st.integers(1, 9), st.integers(1, 6)), min_size=1, max_size=4),
    st.integers(0, 3000),
)
def test_split_equals_the_rule_slot_by_slot(pools: list[tuple[int, int, int]], more: int) -> None:
    sizes, factors, floors = (list(column) for column in zip(*pools, strict=True))
    weights = [size * factor for size, factor in zip(sizes, factors, strict=True)]
    budget = sum(n * b for n, b in zip(floors, sizes, strict=True)) + more
    assert _split(budget, sizes, weights, floors) == split_one_by_one(budget, sizes, weights, floors)


def test_small_pages_beside_a_huge_one_are_planned_at_once() -> None:
    """A remainder of a million slots, dealt to two pools in turn."""
    page = 64 * MIB
    config = CacheConfig(16, pools([None] * 3, [page, 64, 64]), 61 * page - 200)
    assert 0 <= config.device_bytes - plan_pools(config).bytes < 64


def test_host_split_has_floors_of_one() -> None:
    given = pools([None, None], [100, 300])
    plan = plan_pools(CacheConfig(16, given, 10000, host_bytes=400))
    assert plan.host_slots == {"p0": 1, "p1": 1}
    with pytest.raises(ConfigError, match="host_bytes: 399"):
        plan_pools(CacheConfig(16, given, 10000, host_bytes=399))


@pytest.mark.parametrize(
    "call", [plan_pools, lambda none: slots_for(none, BatchDesc([])), lambda none: peak_slots(none, None, 1)]
)
def test_sizing_of_no_config_is_refused(call: Callable[[Any], object]) -> None:
    with pytest.raises(ConfigError, match="config: None is not a CacheConfig"):
        call(None)


def test_peak_slots() -> None:
    config = CacheConfig(16, pools([64, None]), 1 << 20)
    request = SimpleNamespace(tokens=range(1000), max_new_tokens=25, draft_tokens=0)
    assert peak_slots(config, request, None) == {"p0": 64, "p1": 64}
    assert peak_slots(config, request, 32) == {"p0": (64 + 32 + 16 - 3) // 16 + 1, "p1": 64}


def live_blocks(pool: PoolConfig, t: int, capacity: int, history: int) -> int:
    """Blocks below `capacity` that hold a sink token, or a token that some query at >= history can see."""

    def needed(block: int) -> bool:
        if pool.window is None:
            return True
        sinks = block * t < pool.sink_tokens
        last = (block + 1) * t - 1
        return sinks or last > history - pool.window

    return sum(needed(block) for block in range(-(-capacity // t)))


windows = st.one_of(st.none(), st.integers(1, 40))


@st.composite
def configs(draw: st.DrawFn) -> CacheConfig:
    t = draw(st.integers(1, 9))
    made = []
    for i in range(draw(st.integers(1, 4))):
        window = draw(windows)
        sinks = 0 if window is None else draw(st.integers(0, 12))
        made.append(PoolConfig(f"p{i}", draw(st.integers(1, 50)), window, sinks))
    descs = st.tuples(st.integers(0, 80), st.integers(0, 80)).map(lambda x: KVCacheDesc(max(x), min(x)))
    batches = st.builds(BatchDesc, st.lists(descs, max_size=4), st.integers(0, 40))
    return CacheConfig(
        t,
        made,
        draw(st.integers(1, 100_000)),
        max_batch_size=draw(st.integers(1, 5)),
        max_seq_len=draw(st.one_of(st.none(), st.integers(1, 90))),
        max_num_tokens=draw(st.one_of(st.none(), st.integers(1, 60))),
        draft_tokens=draw(st.integers(0, 4)),
        constraints=draw(st.lists(batches, max_size=2)),
        decode_reservation=draw(st.sampled_from(["none", "aligned", "sliding"])),
    )


@settings(max_examples=300, deadline=None)
@given(configs())
def test_every_plan_respects_floors_and_budget_and_leaves_less_than_a_page(config: CacheConfig) -> None:
    try:
        plan = plan_pools(config)
    except ConfigError:
        return
    sizes = {pool.name: pool.page_bytes for pool in config.pools}
    assert all(plan.num_slots[name] >= plan.min_slots[name] >= 1 for name in sizes)
    assert plan.bytes == sum((plan.num_slots[name] + 1) * size for name, size in sizes.items())
    assert 0 <= config.device_bytes - plan.bytes < min(sizes.values())


@settings(max_examples=200, deadline=None)
@given(configs())
def test_every_constraint_can_be_allocated_from_the_floors(config: CacheConfig) -> None:
    try:
        plan = plan_pools(config)
    except ConfigError:
        return
    for batch in config.constraints:
        for pool in config.pools:
            # Counted block by block, the shared prompt as a set.
            shared: set[int] = set()
            own = 0
            for r in batch.requests:
                prefix = max(0, min(batch.system_prompt_length, r.capacity - 1)) // config.tokens_per_block
                s, e = stale_range(pool, config.tokens_per_block, r.history_length)
                live = [i for i in range(-(-r.capacity // config.tokens_per_block)) if not s <= i < e]
                shared |= {i for i in live if i < prefix}
                own += sum(i >= prefix for i in live)
            assert own + len(shared) <= plan.num_slots[pool.name]


@settings(max_examples=200, deadline=None)
@given(configs())
def test_sliding_holds_every_alignment_of_max_batch_size_decodes(config: CacheConfig) -> None:
    if config.decode_reservation != "sliding":
        return
    try:
        plan = plan_pools(config)
    except ConfigError:
        return
    longest = config.max_seq_len or 200
    for pool in config.pools:
        if pool.window is None:
            continue
        worst = max(
            live_blocks(pool, config.tokens_per_block, min(h + 1 + config.draft_tokens, longest), h)
            for h in range(longest)
        )
        assert config.max_batch_size * worst <= plan.num_slots[pool.name]


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 9), st.integers(1, 40), st.integers(0, 12), st.integers(0, 120))
def test_stale_blocks_are_never_seen_again(t: int, window: int, sinks: int, h: int) -> None:
    """No stale block holds a sink token or one that the query at h, or any later one, can see."""
    pool = PoolConfig("w", 1, window, sinks)
    s, e = stale_range(pool, t, h)
    for block in range(s, e):
        assert block * t >= sinks
        assert (block + 1) * t - 1 <= h - window


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 9),
    st.integers(1, 40),
    st.integers(0, 12),
    st.integers(0, 3),
    st.lists(st.integers(0, 80), min_size=1, max_size=5),
)
def test_sliding_decodes_are_really_allocated_at_once(
    t: int, window: int, sinks: int, draft: int, histories: list[int]
) -> None:
    """On the floors alone, the manager gives every decode its slots, whatever the alignments are."""
    pool = PoolConfig("w", 1, window, sinks)
    config = CacheConfig(t, [pool], 1 << 20, max_batch_size=len(histories), draft_tokens=draft)
    floor = plan_pools(config).min_slots["w"]
    config = CacheConfig(t, [pool], floor + 1, max_batch_size=len(histories), draft_tokens=draft)
    with KVCacheManager(config, None) as manager:
        assert manager.stats().pools["w"]["device"]["slots"] == floor
        for i, h in enumerate(histories):
            cache = manager.create(i, [])
            assert cache.resume()
            assert cache.resize(h + 1 + draft, h)
        manager.check()


def test_plan_pools_warns_once_of_a_window_that_gets_next_to_no_host_room() -> None:
    """Two pools of 4-token blocks: 396 host slots and 4, the window of one request."""
    kv = pools([None, 10, 12], [32, 32, 32])
    sizes = {"device_bytes": 1 << 20, "max_seq_len": 48}
    config = CacheConfig(4, kv[:2], host_bytes=400 * 32, **sizes)
    with pytest.warns(UserWarning, match="typical_step") as caught:
        plan = plan_pools(config)
    assert list(plan.host_slots.values()) == [396, 4]
    (warning,) = caught
    assert warning.filename == __file__
    text = "pool 'p1' 4 host slots, where the window of one request takes up to 4 (pool 'p0' 396)"
    assert text in str(warning.message)
    with pytest.warns(UserWarning, match="'p1' .*'p2' ") as caught:
        plan_pools(CacheConfig(4, kv, host_bytes=400 * 32, **sizes))
    assert len(caught) == 1  # of all pools
    with warnings.catch_warnings(record=True) as caught_by_default:
        warnings.simplefilter("default")
        for _ in range(3):
            plan_pools(config)
    assert len(caught_by_default) == 1


def test_plan_pools_does_not_warn_where_a_typical_step_or_the_budget_says_otherwise() -> None:
    kv = pools([None, 10], [32, 32])
    quiet = [
        {"host_bytes": 400 * 32, "typical_step": BatchDesc([KVCacheDesc(29, 28)])},
        {"host_bytes": 400 * 32, "typical_step": BatchDesc([KVCacheDesc(2049, 2048)])},  # said on purpose
        {"host_bytes": 2000 * 32},  # 19 slots
        {"host_bytes": 8 * 32},  # 7 and 1: too little for any pool
        {"host_bytes": 0},
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for more in quiet:
            plan_pools(CacheConfig(4, kv, 1 << 20, max_seq_len=48, **more))
        plan_pools(CacheConfig(4, kv[:1], 1 << 20, host_bytes=400 * 32))
        plan_pools(CacheConfig(4, kv[1:], 1 << 20, host_bytes=4 * 32))
