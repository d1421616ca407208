"""Who runs in the next step, with how many tokens, in which pages: one interleaved pass.

`scheduler.py` wires it; `passes.py` has two of its phases, `starts.py` the third; `victims.py` decides who gives way,
`admission.py` who fits at all and who may start, `bulk.py` both for throughput; `memory.py` is the way to the managers,
`engine.py` the loop around it all. docs/LIVENESS.md has the rules and why they never stall.
"""

from kvpool.scheduler.config import AdapterBudget, SchedulerConfig
from kvpool.scheduler.engine import Engine, Executor
from kvpool.scheduler.request import Request, RequestState
from kvpool.scheduler.scheduler import Scheduler
from kvpool.scheduler.step import Context, SchedulerStats, Step

__all__ = [
    "AdapterBudget",
    "Context",
    "Engine",
    "Executor",
    "Request",
    "RequestState",
    "Scheduler",
    "SchedulerConfig",
    "SchedulerStats",
    "Step",
]
