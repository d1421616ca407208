"""Prompts that begin alike: a first token that begins them all, a system prompt that ends inside a block."""

from __future__ import annotations

import numpy as np
import pytest

from kvpool import CacheConfig, KVCacheManager, PoolConfig, PoolPlan

T = 16


def build(slots: int, host: int = 0) -> KVCacheManager:
    config = CacheConfig(T, [PoolConfig("kv", 1)], slots + 1, host_bytes=host, hash_seed=3)
    return KVCacheManager(config, None, plan=PoolPlan({"kv": 1}, {"kv": slots}, {"kv": host}, slots + 1))


def serve(manager: KVCacheManager, request_id: int, tokens: list[int]) -> int:
    """Cache all whole blocks of a prompt; what it reused."""
    with manager.create(request_id, tokens) as cache:
        reused = cache.num_reused_tokens
        assert cache.resume()
        assert cache.resize(len(tokens))
        cache.commit(tokens[cache.num_reused_tokens :])
    return reused


def common(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def prompts(shared: int, ways: int, count: int, seed: int) -> list[list[int]]:
    """One block and a token, the first `shared` tokens the same."""
    rng = np.random.default_rng(seed)
    return [[7] * shared + rng.integers(0, ways, T + 1 - shared).tolist() for _ in range(count)]


@pytest.mark.parametrize("parent", [[], list(range(100, 100 + T))], ids=["first blocks", "below a block"])
@pytest.mark.parametrize("shared", [0, 1, 5, 15])
def test_a_match_inside_a_block_is_the_longest_among_64_that_begin_alike(shared: int, parent: list[int]) -> None:
    manager = build(4096)
    cached: list[list[int]] = []
    for i, tokens in enumerate(prompts(shared, 3, 64, seed=shared)):
        best = max((common(tokens[:-1], other) for other in cached), default=0)
        expected = len(parent) * (i > 0) + best
        assert manager.probe(parent + tokens) == expected, f"prompt {i}"
        serve(manager, i, parent + tokens)
        cached.append(tokens[:-1])
    manager.check()


@pytest.mark.parametrize("host", [0, 20_000], ids=["device", "two tiers"])
@pytest.mark.parametrize("shared", [1, 3, 8, 12])
def test_a_match_inside_a_block_is_more_than_half_of_the_longest_among_thousands(shared: int, host: int) -> None:
    manager = build(20_000, host)
    given = prompts(shared, 4, 2_000, seed=shared)
    cached = np.array([tokens[:-1] for tokens in given])
    for i, tokens in enumerate(given):
        serve(manager, i, tokens)
    for tokens in prompts(shared, 4, 200, seed=1000 + shared):
        same = (cached == np.array(tokens[:-1])).cumprod(axis=1).sum(axis=1).max()
        assert 2 * manager.probe(tokens) > same >= shared
    manager.check()


@pytest.mark.parametrize("host", [0, 300], ids=["device", "two tiers"])
@pytest.mark.parametrize("below", [0, T], ids=["first blocks", "below a block"])
def test_thousands_that_begin_alike_come_and_go(below: int, host: int) -> None:
    """In a pool that they overflow: every page is found again or evicted, and the chains stay whole."""
    manager = build(300, host)
    system = list(range(100, 100 + below))
    for i, tokens in enumerate(prompts(5, 1000, 3_000, seed=1)):
        reused = serve(manager, i, system + tokens)
        assert reused >= below + 5 or i == 0
        if i % 500 == 0:
            manager.check()
    manager.check()
    assert manager.stats().evicted > 2_000
    manager.clear()
    manager.check()
    assert manager.available_tokens() == 300 * T
