"""The simulated engine: executes the scheduler's steps in simulated time, and verifies what it is given to reuse.

It writes the words of a sequence (`content`) into the page of every token that a step computes. All words of a request
that stand are compared with its pages, in every pool

- when the request starts on reused pages, or was not in the step before this one: it may have been down on the host;
- of everyone in a step in whose pass some request gave way, so that no way down and up between two steps is missed;
- when the request ends.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from kvpool.manager import KVCacheManager
from kvpool.replay.content import Content, Contents, Words
from kvpool.replay.model import StepModel, attention
from kvpool.replay.options import Options
from kvpool.replay.report import Report
from kvpool.scheduler import Request, Scheduler, Step
from kvpool.sizing import stale_range

_NEVER = 2**62


class Clock:
    """Simulated seconds since the first arrival; what the manager's clock reads."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Job:
    """A request on its way. line: of its trace. seen_blocks: leading blocks of the prompt that earlier ones had."""

    __slots__ = (
        "answer", "arrival", "contents", "due", "first_token", "last_step", "line", "prompt", "request", "seen_blocks",
        "started", "tokens", "written",
    )  # fmt: skip

    def __init__(self, request: Request, line: int, tokens: NDArray[np.int32], seen_blocks: int) -> None:
        self.request, self.line, self.tokens, self.seen_blocks = request, line, tokens, seen_blocks
        self.prompt = len(request.tokens)
        self.answer: list[int] = tokens[self.prompt :].tolist()
        self.arrival = request.arrival or 0.0
        self.started: float | None = None  # simulated seconds, as the next
        self.first_token: float | None = None
        self.contents: list[Content] = []  # by pool, once it has started
        self.last_step = -2  # no step comes before the first one
        self.written = 0  # words that stand
        self.due = _NEVER  # tokens that must be computed before the next word stands


class SimulatedExecutor:
    """`Executor` of a replay. `jobs`: of all requests that have not ended; `own_s`: processor time spent in here."""

    def __init__(self, scheduler: Scheduler, options: Options, report: Report, clock: Clock, model: StepModel) -> None:
        manager: KVCacheManager = scheduler.manager
        self.jobs: dict[int | str, Job] = {}
        self.own_s = 0.0
        self._manager, self._stats = manager, scheduler.stats
        self._report, self._clock, self._model = report, clock, model
        self._block = options.tokens_per_block
        self._pools = list(manager.config.pools)
        self._windows = [pool.window for pool in self._pools]
        self._contents = [Contents(self._block, options.seed, pool) for pool in range(len(self._pools))]
        self._pages: list[Words] = [np.asarray(manager.pages(pool.name)).view(np.uint64) for pool in self._pools]
        self._tiered = options.host_blocks > 0
        self._moved = (0, 0)
        self._gave_way = 0

    def execute(self, step: Step) -> Mapping[int | str, Sequence[int]]:
        """Write, verify, and let the time pass that the step takes by the model."""
        begun = time.thread_time()
        gave_way = self._stats.suspended + self._stats.recomputed
        shaken, self._gave_way = gave_way != self._gave_way, gave_way
        outputs: dict[int | str, Sequence[int]] = {}
        work = [0, 0]  # pairs, positions read; of all pools together
        first = self._contexts(step, shaken, outputs, work)
        self._generations(step, shaken, outputs, work)
        self._pass_time(step.num_tokens, *work)
        for job in first:
            job.first_token = self._clock.now
        self._report.steps += 1
        self._report.output_tokens += len(outputs)
        self.own_s += time.thread_time() - begun
        return outputs

    def _contexts(
        self, step: Step, shaken: bool, outputs: dict[int | str, Sequence[int]], work: list[int]
    ) -> list[Job]:
        """The chunks; returns who gets a first token."""
        first = []
        now = self._report.steps
        for request, start, num_tokens, is_last in step.context:
            job = self.jobs[request.request_id]
            if job.started is None:
                self._admit(job, start)
            if shaken or job.last_step != now - 1:
                self._enter(job, start)
            job.last_step = now
            end = start + num_tokens
            if end >= job.due:
                self._write(job, end)
            for window in self._windows:
                pairs, read = attention(start, num_tokens, window)
                work[0] += pairs
                work[1] += read
            if is_last:
                at = len(request.output_tokens)
                if not at:
                    first.append(job)
                outputs[request.request_id] = job.answer[at : at + 1]
                if at + 1 == len(job.answer):
                    self._verify(job, start)
        return first

    def _generations(self, step: Step, shaken: bool, outputs: dict[int | str, Sequence[int]], work: list[int]) -> None:
        """The last token of each, and the next one out. This loop is half of a replay: no calls in the common case."""
        now, jobs = self._report.steps, self.jobs
        ends = []
        for request in step.generation:
            job = jobs[request.request_id]
            at = len(request.output_tokens)
            end = job.prompt + at
            if shaken or job.last_step != now - 1:
                self._enter(job, end - 1)
            job.last_step = now
            if end >= job.due:
                self._write(job, end)
            ends.append(end)
            outputs[request.request_id] = job.answer[at : at + 1]
            if at + 1 == len(job.answer):
                self._verify(job, end - 1)
        for window in self._windows:
            seen = sum(ends) if window is None else sum(min(end, window) for end in ends)
            work[0] += seen
            work[1] += seen

    def _pass_time(self, tokens: int, pairs: int, read: int) -> None:
        pools = len(self._pools)
        down = up = 0
        if self._tiered:
            counters = self._manager.counters()
            down, up = counters.offloaded - self._moved[0], counters.onboarded - self._moved[1]
            self._moved = counters.offloaded, counters.onboarded
        share = self._block / pools  # tokens of all layers in a page
        self._clock.now += self._model.seconds(tokens, pairs / pools, read / pools, down * share, up * share)

    # -- pages --------------------------------------------------------------------------------------

    def _admit(self, job: Job, reused: int) -> None:
        """The first chunk: counted once, whatever happens to the request later."""
        report, prompt = self._report, job.prompt
        job.started = self._clock.now
        job.contents = [contents.of(job.tokens) for contents in self._contents]
        report.prompt_tokens += prompt
        report.prompt_blocks += -(-prompt // self._block)
        report.bound_blocks += job.seen_blocks
        report.reused_tokens += reused
        report.reused_blocks += reused // self._block

    def _enter(self, job: Job, computed: int) -> None:
        """The job was not in the last step, or may have been moved since: what it has of its tokens must be right."""
        job.written = job.contents[0].count(computed)
        job.due = self._due(job)
        self._verify(job, computed)

    @staticmethod
    def _due(job: Job) -> int:
        ends = job.contents[0].ends
        return int(ends[job.written]) if job.written < len(ends) else _NEVER

    def _write(self, job: Job, computed: int) -> None:
        """The words that stand once so many tokens are computed."""
        ready = job.contents[0].count(computed)
        cache = self._manager.cache(job.request.request_id)
        for pool, pages, content in zip(self._pools, self._pages, job.contents, strict=True):
            content.write(pages, cache.block_table(pool.name), job.written, ready)
        job.written = ready
        job.due = self._due(job)

    def _verify(self, job: Job, history: int) -> None:
        """Every word that stands is in its page, unless the page is stale with so many tokens computed before."""
        if not job.written or self._report.wrong is not None:
            return
        request = job.request
        cache = self._manager.cache(request.request_id)
        for pool, pages, content in zip(self._pools, self._pages, job.contents, strict=True):
            table = cache.block_table(pool.name)
            stale = stale_range(pool, self._block, history)
            wrong, compared = content.wrong(pages, table, job.written, stale)
            self._report.bytes_checked += 8 * compared
            if wrong is not None:
                block, word = divmod(wrong, content.per_page)
                found, due = int(pages[table[block], word]), int(content.words[wrong])
                self._report.wrong = (
                    f"request {request.request_id} (line {job.line}), block {block}, pool '{pool.name}', "
                    f"slot {int(table[block])}: bytes {8 * word} to {8 * word + 7} are 0x{found:016x}, "
                    f"expected 0x{due:016x}"
                )
                return
