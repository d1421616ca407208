"""kvpool: the KV-cache block manager for LLM inference engines, as a library."""

from kvpool.config import (
    BatchDesc,
    CacheConfig,
    KVCacheDesc,
    PoolConfig,
    Retention,
    Scope,
    TokenRange,
)
from kvpool.errors import (
    ConfigError,
    InvariantError,
    KVPoolError,
    LogicError,
    RequestTooLargeError,
    StalledError,
)
from kvpool.manager import Cache, CacheState, KVCacheManager, Stats, TierStats
from kvpool.sizing import PoolPlan, peak_slots, plan_pools, slots_for

__version__ = "0.1.0"

__all__ = [
    "BatchDesc",
    "Cache",
    "CacheConfig",
    "CacheState",
    "ConfigError",
    "InvariantError",
    "KVCacheDesc",
    "KVCacheManager",
    "KVPoolError",
    "LogicError",
    "PoolConfig",
    "PoolPlan",
    "RequestTooLargeError",
    "Retention",
    "Scope",
    "Stats",
    "StalledError",
    "TierStats",
    "TokenRange",
    "peak_slots",
    "plan_pools",
    "slots_for",
]
