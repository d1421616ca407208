"""kvpool: the KV-cache block manager for LLM inference engines, as a library."""

from kvpool.batches import AddRequest
from kvpool.cache import CacheState, KVCache
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
from kvpool.manager import Counters, Event, KVCacheManager, Stats
from kvpool.scheduler import (
    AdapterBudget,
    Engine,
    Executor,
    Request,
    RequestState,
    Scheduler,
    SchedulerConfig,
    Step,
)
from kvpool.sizing import PoolPlan, peak_slots, plan_pools, slots_for

__version__ = "0.1.0"

__all__ = [
    "AdapterBudget",
    "AddRequest",
    "BatchDesc",
    "CacheConfig",
    "CacheState",
    "ConfigError",
    "Counters",
    "Engine",
    "Event",
    "Executor",
    "InvariantError",
    "KVCache",
    "KVCacheDesc",
    "KVCacheManager",
    "KVPoolError",
    "LogicError",
    "PoolConfig",
    "PoolPlan",
    "Request",
    "RequestState",
    "RequestTooLargeError",
    "Retention",
    "Scheduler",
    "SchedulerConfig",
    "Scope",
    "StalledError",
    "Stats",
    "Step",
    "TokenRange",
    "peak_slots",
    "plan_pools",
    "slots_for",
]
