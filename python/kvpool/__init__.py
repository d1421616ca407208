"""kvpool: the KV-cache block manager for LLM inference engines, as a library."""

from typing import TYPE_CHECKING, Any

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
from kvpool.mover import CpuMover, MoveBatch, MoveError, Mover, SlotUse, Ticket
from kvpool.scheduler import (
    AdapterBudget,
    Context,
    Engine,
    Executor,
    Request,
    RequestState,
    Scheduler,
    SchedulerConfig,
    SchedulerStats,
    Step,
)
from kvpool.sizing import PoolPlan, peak_slots, plan_pools, slots_for

if TYPE_CHECKING:
    from kvpool.mover.cuda import CudaMover

__version__ = "0.1.0"

__all__ = [
    "AdapterBudget",
    "AddRequest",
    "BatchDesc",
    "CacheConfig",
    "CacheState",
    "ConfigError",
    "Context",
    "Counters",
    "CpuMover",
    "CudaMover",
    "Engine",
    "Event",
    "Executor",
    "InvariantError",
    "KVCache",
    "KVCacheDesc",
    "KVCacheManager",
    "KVPoolError",
    "LogicError",
    "MoveBatch",
    "MoveError",
    "Mover",
    "PoolConfig",
    "PoolPlan",
    "Request",
    "RequestState",
    "RequestTooLargeError",
    "Retention",
    "Scheduler",
    "SchedulerConfig",
    "SchedulerStats",
    "Scope",
    "SlotUse",
    "StalledError",
    "Stats",
    "Step",
    "Ticket",
    "TokenRange",
    "peak_slots",
    "plan_pools",
    "slots_for",
]


def __getattr__(name: str) -> Any:
    """CUDA's mover when it is asked for: it is half of what `import kvpool` would cost."""
    if name == "CudaMover":
        from kvpool.mover.cuda import CudaMover

        return CudaMover
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
