"""The loop: schedule, launch, update.

An executor that cannot overlap steps needs nothing else; one that can calls the scheduler itself.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Protocol

from kvpool.cache import KVCache
from kvpool.errors import StalledError
from kvpool.manager import KVCacheManager
from kvpool.scheduler.request import Request
from kvpool.scheduler.scheduler import Scheduler
from kvpool.scheduler.step import Step
from kvpool.scheduler.updates import as_outputs


class Executor(Protocol):
    """What computes a step. `stream`, if it has one, is what `step_begin` and `step_end` are given."""

    def execute(self, step: Step) -> Mapping[int | str, Sequence[int]]:
        """Write keys and values of the step's tokens into their pages; return {request_id: [token, ...]}."""
        ...


class Engine:
    """Runs requests on an executor. One thread steps; `submit` and `cancel` may come from any."""

    def __init__(self, scheduler: Scheduler, executor: Executor) -> None:
        self.scheduler, self.executor = scheduler, executor
        self._wake = threading.Event()

    def submit(self, request: Request) -> None:
        """As `Scheduler.add`."""
        self.scheduler.add(request)
        self._wake.set()

    def cancel(self, request_id: int | str) -> bool:
        """As `Scheduler.cancel`."""
        known = self.scheduler.cancel(request_id)
        self._wake.set()
        return known

    def step(self) -> list[Request]:
        """One step; returns the requests that ended. StalledError: nothing can ever run.

        An exception of the executor ends the requests of the step with it; their pages are given back. Who turns out to
        have lost pages is not in the step that the executor gets; a later one computes it again.
        """
        scheduler = self.scheduler
        step = scheduler.schedule()
        if not step:
            return scheduler.update(step, {})
        error: Exception | None = None
        outputs: Mapping[int | str, Sequence[int]] = {}
        try:
            outputs = self._launch(step, scheduler.memory.caches(step))
        except Exception as caught:
            error = caught
        except BaseException:
            scheduler.abandon(step)
            raise
        return scheduler.update(step, outputs) if error is None else scheduler.fail(step, error)

    def _launch(
        self, step: Step, work: Sequence[tuple[KVCacheManager, list[KVCache]]]
    ) -> Mapping[int | str, Sequence[int]]:
        """Executes a step between `step_begin` and `step_end` of these managers, one within the other."""
        if not work:
            self.scheduler.drop_lost(step)
            return as_outputs(self.executor.execute(step)) if step else {}
        (manager, caches), *inner = work
        stream = getattr(self.executor, "stream", None)
        manager.step_begin(caches, stream)
        try:
            return self._launch(step, inner)
        finally:
            manager.step_end(caches, stream)

    def run(self) -> dict[int | str, Request]:
        """Steps until no request is left; {request_id: request} of all that ended meanwhile.

        Where nothing can ever run the oldest waiting request ends with the `StalledError`, and the others go on.
        """
        ended: dict[int | str, Request] = {}
        while self.scheduler.has_work:
            self._wake.clear()
            try:
                finished = self.step()
                idle = not finished and not self.scheduler.ran
            except StalledError as error:
                self.scheduler.fail_oldest(error)
                finished, idle = self.scheduler.update(Step(), {}), False
            ended.update((request.request_id, request) for request in finished)
            if idle and self.scheduler.has_work:
                self._wake.wait(0.001)  # slots are in flight elsewhere
        ended.update((request.request_id, request) for request in self.scheduler.update(Step(), {}))
        return ended
