"""How a replay runs, and the manager that it runs on."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from kvpool.config import CacheConfig, PoolConfig
from kvpool.manager import KVCacheManager
from kvpool.sizing import PoolPlan

POOL = "kv"
WINDOW_POOL = "window"


@dataclass(frozen=True, slots=True)
class Options:
    """`device_blocks`, `host_blocks`: slots of each pool on the tiers, exactly (0: no host tier).

    Of a timed replay only: `tokens_per_id`, tokens of a hash id; `window`, tokens of the sliding window of a second
    pool (None: there is none); `max_batch_size`, `max_num_tokens`, `chunk_tokens` of the scheduler.
    """

    tokens_per_block: int = 512
    device_blocks: int = 10_000
    policy: Literal["lru", "slru"] = "lru"
    seed: int = 0
    tokens_per_id: int = 512
    host_blocks: int = 0
    window: int | None = None
    max_batch_size: int = 256
    max_num_tokens: int = 8192
    chunk_tokens: int = 512

    @property
    def pools(self) -> dict[str, int | None]:
        """Window by pool."""
        return {POOL: None} if self.window is None else {POOL: None, WINDOW_POOL: self.window}


def make_manager(options: Options, page_bytes: int, clock: Callable[[], float] = time.monotonic) -> KVCacheManager:
    """A manager with just the slots that the options name in each pool (and its null page)."""
    pools = [PoolConfig(name, page_bytes, window) for name, window in options.pools.items()]
    device_bytes = (options.device_blocks + 1) * page_bytes * len(pools)
    config = CacheConfig(
        tokens_per_block=options.tokens_per_block,
        pools=pools,
        device_bytes=device_bytes,
        host_bytes=options.host_blocks * page_bytes * len(pools),
        hash_seed=options.seed,
        clock=clock,
    )
    # Not `plan_pools`: it would share the bytes out by need, and refuse less than a full batch of windows.
    plan = PoolPlan(
        min_slots=dict.fromkeys(options.pools, 1),
        num_slots=dict.fromkeys(options.pools, options.device_blocks),
        host_slots=dict.fromkeys(options.pools, options.host_blocks),
        bytes=device_bytes,
    )
    return KVCacheManager(config, device="cpu", plan=plan, policy=options.policy)
