"""How many slots each pool gets: floors that admission relies on, then the budget by weight.

All arithmetic is in exact integers. With T = tokens per block, W = window, h = history, c = capacity:

    blocks of a request   0 ... s ........ e ... ceil(c/T)
                          [sinks)[ stale  )[ live        )
    slots(c, h) = ceil(c/T) - (e - s)
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kvpool.config import BatchDesc, CacheConfig, KVCacheDesc, PoolConfig, _int
from kvpool.errors import ConfigError


@dataclass(frozen=True, slots=True)
class PoolPlan:
    """Slots by pool name: floors, device slots (null page not counted), host slots; device bytes in all."""

    min_slots: Mapping[str, int]
    num_slots: Mapping[str, int]
    host_slots: Mapping[str, int]
    bytes: int


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def stale_range(pool: PoolConfig, tokens_per_block: int, history_length: int) -> tuple[int, int]:
    """Blocks [s, e) of a windowed pool that no token from `history_length` on can see; empty for full attention."""
    if pool.window is None:
        return 0, 0
    t = tokens_per_block
    s = min(_ceil(history_length, t), _ceil(pool.sink_tokens, t))
    return s, max(s, (history_length + 1 - pool.window) // t)


def request_slots(pool: PoolConfig, t: int, request: KVCacheDesc) -> int:
    s, e = stale_range(pool, t, request.history_length)
    blocks = _ceil(request.capacity, t)
    return blocks - max(0, min(e, blocks) - s)


def _batch_slots(pool: PoolConfig, t: int, batch: BatchDesc) -> int:
    """Sum over requests; system prompt blocks that live in some request count once."""
    total = 0
    shared: set[int] = set()
    for request in batch.requests:
        total += request_slots(pool, t, request)
        prefix = max(0, min(batch.system_prompt_length, request.capacity - 1)) // t
        s, e = stale_range(pool, t, request.history_length)
        live = [i for i in range(prefix) if not s <= i < e]
        total -= len(live)
        shared.update(live)
    return total + len(shared)


def _check_config(config: object) -> None:
    if not isinstance(config, CacheConfig):
        raise ConfigError(f"config: {config!r} is not a CacheConfig")


def slots_for(config: CacheConfig, batch: BatchDesc) -> dict[str, int]:
    """Device slots that `batch` needs in each pool."""
    _check_config(config)
    if not isinstance(batch, BatchDesc):
        raise ConfigError(f"batch: {batch!r} is not a BatchDesc")
    return {pool.name: _batch_slots(pool, config.tokens_per_block, batch) for pool in config.pools}


def window_slots(pool: PoolConfig, config: CacheConfig, k: int) -> int:
    """Blocks that one request can hold in a windowed pool while a step adds k tokens, at any alignment."""
    t = config.tokens_per_block
    assert pool.window is not None
    blocks = _ceil(pool.sink_tokens, t) + (pool.window + k + t - 3) // t + 1
    return blocks if config.max_seq_len is None else min(blocks, _ceil(config.max_seq_len, t))


def decode_slots(pool: PoolConfig, config: CacheConfig) -> int:
    """Slots of one decode as `decode_reservation` counts it."""
    t = config.tokens_per_block
    if config.decode_reservation == "sliding" and pool.window is not None:
        return window_slots(pool, config, 1 + config.draft_tokens)
    return request_slots(pool, t, KVCacheDesc(t, t - 1))


def _floor(pool: PoolConfig, config: CacheConfig) -> int:
    t = config.tokens_per_block
    floors = [1]
    floors += [_batch_slots(pool, t, batch) for batch in config.constraints]
    if config.max_seq_len is not None:
        floors.append(request_slots(pool, t, KVCacheDesc(config.max_seq_len, config.max_seq_len - 1)))
    if config.decode_reservation != "none":
        decode = decode_slots(pool, config)
        floors.append(config.max_batch_size * decode)
        if config.max_num_tokens is not None:
            k = config.max_num_tokens
            if config.max_seq_len is not None:
                k = min(k, config.max_seq_len)
            if pool.window is not None:
                context = window_slots(pool, config, k)
            else:
                context = _ceil(config.max_seq_len if config.max_seq_len is not None else k, t)
            floors.append((config.max_batch_size - 1) * decode + context)
    return max(floors)


def _split(budget: int, page_bytes: list[int], weights: list[int], floors: list[int]) -> list[int]:
    """Share `budget` bytes by weight; pools below their floor are pinned there. Then one slot at a time."""
    slots = list(floors)
    open_pools = list(range(len(floors)))
    rest = budget
    while open_pools:
        total = sum(weights[i] for i in open_pools)
        share = {i: rest * weights[i] // (total * page_bytes[i]) for i in open_pools}
        pinned = [i for i in open_pools if share[i] < floors[i]]
        if not pinned:
            for i in open_pools:
                slots[i] = share[i]
            break
        rest -= sum(floors[i] * page_bytes[i] for i in pinned)
        open_pools = [i for i in open_pools if i not in pinned]
    left = budget - sum(n * b for n, b in zip(slots, page_bytes, strict=True))
    # Then one slot at a time to the lowest filling, config order on ties; what no longer fits never fits again.
    # All picks below a level that can be paid for as a whole are made at once, so huge budgets stay quick.
    open_pools, common = list(range(len(slots))), math.prod(weights)
    while open_pools:
        left -= _fill(left, slots, page_bytes, weights, open_pools)
        i = min(open_pools, key=lambda i: (slots[i] * page_bytes[i] * (common // weights[i]), i))
        if page_bytes[i] <= left:
            slots[i] += 1
            left -= page_bytes[i]
        else:
            open_pools.remove(i)
    return slots


def _fill(left: int, slots: list[int], page_bytes: list[int], weights: list[int], open_pools: list[int]) -> int:
    """Raise the open pools to the highest common filling (in steps of 2**-64) that `left` bytes pay for; the cost."""

    def at(level: int) -> dict[int, int]:
        return {i: max(slots[i], _ceil(level * weights[i], page_bytes[i] << 64)) for i in open_pools}

    def cost(level: int) -> int:
        return sum((n - slots[i]) * page_bytes[i] for i, n in at(level).items())

    low, high = 0, 1
    while cost(high) <= left:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if cost(middle) <= left else (low, middle)
    paid = cost(low)
    slots[:] = [at(low).get(i, n) for i, n in enumerate(slots)]
    return paid


def _warn_of_crowded_windows(config: CacheConfig, host: list[int]) -> None:
    """If the default typical step leaves a window less of the host than two requests can use, and others have it."""
    pools = list(zip(config.pools, host, strict=True))
    crowded = []
    for pool, slots in pools:
        if pool.window is None:
            continue
        blocks = window_slots(pool, config, 1)
        rich = [f"{other.name!r} {n}" for other, n in pools if other.window is None and n >= 2 * blocks]
        if slots < 2 * blocks and rich:
            crowded.append(
                f"pool {pool.name!r} {slots} host slots, where the window of one request takes up to {blocks} "
                f"(pool {', '.join(rich)})"
            )
    if crowded:
        warnings.warn(
            f"host_bytes: {config.host_bytes} gives {'; '.join(crowded)}: hardly a window stays there, and what is "
            "reused is the least of all pools. Without a typical_step a step of one request of 2,049 tokens is taken; "
            "set typical_step to one of yours, e.g. BatchDesc([KVCacheDesc(capacity, history_length)])",
            UserWarning,
            stacklevel=3,
        )


def plan_pools(config: CacheConfig) -> PoolPlan:
    """Slots of every pool from the budget; pure. ConfigError: the budget is below the floors, with the numbers.

    UserWarning: by the default `typical_step` less than two windows of a pool find room on the host, though another
    pool has it.
    """
    _check_config(config)
    t = config.tokens_per_block
    pools = config.pools
    page_bytes = [pool.page_bytes for pool in pools]
    floors = [_floor(pool, config) for pool in pools]
    needed = sum((n + 1) * b for n, b in zip(floors, page_bytes, strict=True))
    if config.device_bytes < needed:
        parts = ", ".join(
            f"pool {p.name!r}: min_slots {n} + 1 null page of {p.page_bytes} bytes"
            for p, n in zip(pools, floors, strict=True)
        )
        raise ConfigError(
            f"device_bytes: {config.device_bytes} is below the {needed} bytes needed ({parts}); raise device_bytes, "
            "or lower max_batch_size, max_seq_len, max_num_tokens or the constraints"
        )
    typical = config.typical_step or BatchDesc([KVCacheDesc(2049, 2048)])
    weights = [max(1, _batch_slots(p, t, typical)) * p.page_bytes for p in pools]
    slots = _split(config.device_bytes - sum(page_bytes), page_bytes, weights, floors)
    for pool, count in zip(pools, slots, strict=True):
        if count > 2**31 - 2:
            raise ConfigError(
                f"device_bytes: {config.device_bytes} gives pool {pool.name!r} {count} slots, more than 2**31 - 2; "
                "lower device_bytes or raise page_bytes"
            )
    host = [0] * len(pools)
    if config.host_bytes:
        if config.host_bytes < sum(page_bytes):
            raise ConfigError(
                f"host_bytes: {config.host_bytes} is below one page of each pool, {sum(page_bytes)} bytes; "
                "raise host_bytes, or use 0 for no host tier"
            )
        host = _split(config.host_bytes, page_bytes, weights, [1] * len(pools))
        if config.typical_step is None:
            _warn_of_crowded_windows(config, host)
    names = [pool.name for pool in pools]
    return PoolPlan(
        min_slots=dict(zip(names, floors, strict=True)),
        num_slots=dict(zip(names, slots, strict=True)),
        host_slots=dict(zip(names, host, strict=True)),
        bytes=sum((n + 1) * b for n, b in zip(slots, page_bytes, strict=True)),
    )


def peak_slots(config: CacheConfig, request: Any, chunk_tokens: int | None) -> dict[str, int]:
    """Slots that `request` alone can come to hold in each pool, recompute included.

    Reads len(tokens), max_new_tokens and draft_tokens (0 if missing). chunk_tokens None: not chunked.
    """
    _check_config(config)
    chunk = None if chunk_tokens is None else _int("chunk_tokens", chunk_tokens, 1)
    prompt = len(request.tokens)
    new = _int("max_new_tokens", request.max_new_tokens, 1)
    draft = _int("draft_tokens", getattr(request, "draft_tokens", 0), 0)
    whole = _ceil(prompt + new - 1, config.tokens_per_block)
    peaks = {}
    for pool in config.pools:
        peaks[pool.name] = whole
        if pool.window is not None and chunk is not None:
            peaks[pool.name] = min(whole, window_slots(pool, config, max(chunk, 1 + draft)))
    return peaks
