"""One call of a scheduler at a time."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Concatenate, ParamSpec, TypeVar

if TYPE_CHECKING:
    from kvpool.scheduler.scheduler import Scheduler

_P = ParamSpec("_P")
_R = TypeVar("_R")


def alone(method: Callable[Concatenate[Scheduler, _P], _R]) -> Callable[Concatenate[Scheduler, _P], _R]:
    """One call at a time: a `cancel` meanwhile waits in its queue."""

    @functools.wraps(method)
    def locked(self: Scheduler, /, *args: _P.args, **keywords: _P.kwargs) -> _R:
        with self._lock:
            return method(self, *args, **keywords)

    return locked
