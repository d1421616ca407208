"""Runs a trace in simulated time: requests arrive at their timestamps, several are active at once.

Scheduling is plain, to exercise the manager (a real scheduler comes later). One step:

1. generation first: one token for each request whose prompt is computed, oldest first. When memory runs out the
   newest running request gives way: it is suspended; where that frees nothing (no tier below, or no room there) it is
   freed, waits as the oldest and is computed again. In a step in which nobody gave way, suspended ones are resumed
   first, oldest first.
2. contexts in order, by chunks, within what is left of `MAX_TOKENS`: the running ones, then waiting ones. A waiting one
   starts only if all its pages fit; in a step in which one gave way, or while one is suspended, none starts.
3. the simulated engine writes every page it computes, and the tokens are committed.

A step takes `STEP_MS` of simulated time however much it does. Every word of a request is verified when it is reused and
when the request ends.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvpool import KVCache, KVCacheManager
from kvpool.replay.content import Content, Contents
from kvpool.replay.pattern import block_tokens
from kvpool.replay.prefixes import PrefixIndex
from kvpool.replay.report import Report, Sample
from kvpool.replay.sequential import POOL, Options, make_manager
from kvpool.replay.traces import TraceRequest

STEP_MS = 20.0
MAX_TOKENS = 8192
MAX_RUNNING = 256
MOST_SAMPLES = 1000


def run_timed(
    requests: Iterable[TraceRequest],
    options: Options,
    *,
    should_stop: Callable[[], bool] = lambda: False,
    advance: Callable[[Report], object] = lambda report: None,
    corrupt_after: int | None = None,
) -> Report:
    """Replay `requests` at their timestamps and return what was counted.

    `should_stop` is asked before each step: True ends the run with `interrupted` set. `advance` is called after each
    step in which a request ended. A wrong byte ends the run with `wrong` set to the place. `corrupt_after` (tests):
    after so many requests one bit of every page is flipped. Raises ConfigError where the options allow no manager.
    """
    started = time.perf_counter()
    report = Report(timed=True)
    contents = Contents(options.tokens_per_block, options.seed)
    with make_manager(options, contents.page_bytes) as manager:
        replay = _Timed(manager, options, report, contents, requests)
        while not replay.done() and report.wrong is None:
            if should_stop():
                report.interrupted = True
                break
            before = report.requests
            replay.step()
            if report.requests > before:
                advance(report)
                if corrupt_after is not None and before < corrupt_after <= report.requests:
                    np.asarray(manager.pages(POOL))[1:] ^= 1
        replay.finish()
    report.seconds = time.perf_counter() - started
    return report


class _Job:
    """A request on its way. It is what the manager's batch calls read."""

    __slots__ = (
        "all_tokens", "cache", "content", "generated", "history", "line", "lost", "max_new_tokens", "request_id",
        "target", "tokens", "written",
    )  # fmt: skip

    def __init__(self, number: int, line: int, tokens: NDArray[np.int32], prompt: int, content: Content) -> None:
        self.request_id = number
        self.line = line
        self.all_tokens = tokens
        self.tokens = tokens[:prompt]
        self.max_new_tokens = len(tokens) - prompt
        self.content = content
        self.generated = 0
        self.history = 0  # tokens computed and committed
        self.target = prompt  # tokens of the context
        self.written = 0  # words
        self.lost: int | None = None  # tokens that were computed when it was freed
        self.cache: KVCache | None = None

    @property
    def output_tokens(self) -> NDArray[np.int32]:
        return self.all_tokens[len(self.tokens) : len(self.tokens) + self.generated]


class _Timed:
    """One run: simulated clock, waiting and running requests, the manager and the counters."""

    def __init__(
        self,
        manager: KVCacheManager,
        options: Options,
        report: Report,
        contents: Contents,
        requests: Iterable[TraceRequest],
    ) -> None:
        self._manager = manager
        self._options = options
        self._report = report
        self._contents = contents
        self._pages: NDArray[np.uint64] = np.asarray(manager.pages(POOL)).view(np.uint64)
        self._prefixes = PrefixIndex()
        self._arrivals = deque(sorted(requests, key=lambda request: request.timestamp_ms))
        self._now = self._arrivals[0].timestamp_ms if self._arrivals else 0.0
        self._start = self._now
        self._waiting: deque[_Job] = deque()
        self._running: list[_Job] = []  # the oldest first
        self._suspended: list[_Job] = []  # the oldest first
        self._gave_way = False
        self._number = 0
        self._step_us: list[float] = []
        self._stride = 1

    def done(self) -> bool:
        """Whether every request has ended."""
        return not (self._arrivals or self._waiting or self._running or self._suspended)

    # -- arrivals ---------------------------------------------------------------------------------

    def _arrive(self) -> None:
        if not self._waiting and not self._running and not self._suspended and self._arrivals:
            self._now = max(self._now, self._arrivals[0].timestamp_ms)
        while self._arrivals and self._arrivals[0].timestamp_ms <= self._now:
            self._enter(self._arrivals.popleft())

    def _enter(self, request: TraceRequest) -> None:
        report, block = self._report, self._options.tokens_per_block
        self._number += 1
        blocks = self._prefixes.add(request.hash_ids)
        prompt = max(1, request.input_length)
        report.prompt_tokens += prompt
        report.prompt_blocks += -(-prompt // block)
        report.bound_blocks += min(blocks.seen * self._options.tokens_per_id, prompt - 1) // block
        new = max(1, request.output_length)
        if -(-(prompt + new - 1) // block) > self._options.device_blocks:
            report.too_long += 1  # it could not run even alone
            report.requests += 1
            return
        tokens = np.empty(prompt + new, np.int32)
        given = block_tokens(blocks.ids, self._options.tokens_per_id)[:-1] if len(blocks.ids) else tokens[:0]
        known = min(prompt, len(given))
        tokens[:known] = given[:known]
        # The rest, and all that is generated, is the request's own: it matches nothing.
        own = np.arange(known, len(tokens), dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        own += np.uint64(self._number * 0xD1B54A32D192ED03 % 2**64)
        tokens[known:] = (own >> np.uint64(33)).astype(np.int32)
        self._waiting.append(_Job(self._number, request.line, tokens, prompt, self._contents.of(tokens)))

    # -- one step -----------------------------------------------------------------------------------

    def step(self) -> None:
        """One pass of scheduling, and what it decided."""
        self._arrive()
        if not self._waiting and not self._running and not self._suspended:
            return  # what has arrived was too long
        begun = time.perf_counter()
        if not self._gave_way:
            self._resume()
        decoding, self._gave_way = self._generate()
        work = [(job, 1) for job in decoding]
        work += self._contexts(MAX_TOKENS - len(decoding), may_start=not (self._gave_way or self._suspended))
        spent = time.perf_counter() - begun
        if not work and self._gave_way:
            return  # the last one that ran gave way: others are resumed
        if not work:
            raise RuntimeError(
                f"nothing runs at {self._now} ms with {len(self._waiting)} waiting, {len(self._suspended)} suspended"
            )
        spent += self._execute(work)
        self._report.steps += 1
        self._step_us.append(spent * 1e6)
        self._now += STEP_MS
        if self._report.steps % self._stride == 0:
            self._sample()

    def _generate(self) -> tuple[list[_Job], bool]:
        """Room for one token of each request that has its context; those that have it, and whether one gave way."""
        decoding = [job for job in self._running if job.generated and job.history >= job.target]
        gave_way = False
        while decoding:
            count = self._manager.allocate_generation(decoding)
            if count == len(decoding):
                break
            self._preempt(self._running[-1])
            gave_way = True
            decoding = [job for job in decoding if job in self._running]
        return decoding, gave_way

    def _resume(self) -> None:
        """As many suspended requests as there is room for."""
        while self._suspended:
            job = self._suspended[0]
            if self._manager.prepare_context(job):
                self._suspended.pop(0)
                self._running.append(job)
                self._running.sort(key=lambda job: job.request_id)
                self._verify(job)
            elif not self._running and len(self._suspended) > 1:
                self._free(self._suspended.pop())
            else:
                return

    def _preempt(self, job: _Job) -> None:
        self._running.remove(job)
        if self._options.host_blocks:
            before = self._manager.available_tokens()
            self._manager.suspend_requests([job])
            if self._manager.available_tokens() > before:
                self._suspended.append(job)
                self._suspended.sort(key=lambda job: job.request_id)
                self._report.suspended += 1
                return
        self._free(job)

    def _free(self, job: _Job) -> None:
        self._manager.free_requests([job])
        job.cache, job.lost = None, job.history
        self._waiting.appendleft(job)
        self._report.preempted += 1

    def _contexts(self, budget: int, may_start: bool) -> list[tuple[_Job, int]]:
        """(request, tokens to compute) for contexts, within the budget."""
        work = []
        for job in self._running:
            if job.history < job.target and budget > 0:
                chunk = min(budget, job.target - job.history)
                budget -= chunk
                work.append((job, chunk))
        while may_start and self._waiting and budget > 0 and len(self._running) < MAX_RUNNING:
            heads = self._heads(budget)
            reused = self._manager.claim_contexts([(job, None) for job in heads])
            started: list[_Job] = []
            for job, found in zip(heads, reused, strict=True):
                if found is None or budget <= 0:
                    break
                self._admit(job, found)
                started.append(job)
                chunk = min(budget, job.target - job.history)
                budget -= chunk
                work.append((job, chunk))
            wanted = [(job, job.target - job.history) for job in started]
            if not all(self._manager.provide_contexts(wanted)):
                raise RuntimeError("a claim was promised its pages and did not get them")
            self._manager.free_requests(heads[len(started) :])
            for job in started:
                self._verify(job)
            if len(started) < len(heads):
                break
        return work

    def _heads(self, budget: int) -> list[_Job]:
        """As many of the waiting as the budget may have room for."""
        heads: list[_Job] = []
        for job in self._waiting:
            if budget <= 0 or len(self._running) + len(heads) >= MAX_RUNNING:
                break
            heads.append(job)
            budget -= len(job.tokens) + job.generated
        return heads

    def _admit(self, job: _Job, reused: int) -> None:
        self._waiting.popleft()
        self._running.append(job)
        self._running.sort(key=lambda job: job.request_id)
        job.cache = self._manager.cache(job.request_id)
        job.history = reused
        job.target = len(job.tokens) + job.generated
        job.written = job.content.count(reused)
        if job.lost is None:
            self._report.reused_tokens += reused
            self._report.reused_blocks += reused // self._options.tokens_per_block
        else:
            self._report.recomputed_tokens += max(0, job.lost - reused)
            job.lost = None

    # -- the simulated engine -------------------------------------------------------------------------

    def _execute(self, work: Sequence[tuple[_Job, int]]) -> float:
        """Compute, commit, end. Returns the seconds that were not the engine's."""
        caches: list[Any] = [job.cache for job, _ in work]
        begun = time.perf_counter()
        self._manager.step_begin(caches)
        spent = time.perf_counter() - begun
        for job, count in work:
            ready = job.content.count(job.history + count)
            if ready > job.written:
                assert job.cache is not None
                job.content.write(self._pages, job.cache.block_table(POOL), job.written, ready)
                job.written = ready
        begun = time.perf_counter()
        self._manager.step_end(caches)
        for (job, count), cache in zip(work, caches, strict=True):
            cache.commit(job.all_tokens[job.history : job.history + count])
            job.history += count
            if job.history >= job.target:
                job.generated += 1
        spent += time.perf_counter() - begun
        ended = [job for job, _ in work if job.generated >= job.max_new_tokens]
        for job in ended:
            self._verify(job)
            self._running.remove(job)
        begun = time.perf_counter()
        self._manager.free_requests(ended)
        self._report.requests += len(ended)
        return spent + time.perf_counter() - begun

    def _verify(self, job: _Job) -> None:
        """Every word of the request that stands is in its page."""
        if not job.written or self._report.wrong is not None:
            return
        assert job.cache is not None
        table = job.cache.block_table(POOL)
        wrong = job.content.wrong(self._pages, table, job.written)
        self._report.bytes_checked += 8 * job.written
        if wrong is not None:
            block, word = divmod(wrong, job.content.per_page)
            found, due = int(self._pages[table[block], word]), int(job.content.words[wrong])
            self._report.wrong = (
                f"request {job.request_id} (line {job.line}), block {block}, pool '{POOL}', slot {int(table[block])}: "
                f"bytes {8 * word} to {8 * word + 7} are 0x{found:016x}, expected 0x{due:016x}"
            )

    # -- what is told -----------------------------------------------------------------------------------

    def _sample(self) -> None:
        report, stats = self._report, self._manager.stats()
        report.samples.append(
            Sample(
                seconds=(self._now - self._start) / 1000,
                pools=stats.pools,
                reused_tokens=report.reused_tokens,
                prompt_tokens=report.prompt_tokens,
                evicted=stats.evicted,
                offloaded=stats.offloaded,
                onboarded=stats.onboarded,
                step_us=float(np.mean(self._step_us[-self._stride :])),
                active=len(self._running),
                suspended=len(self._suspended),
                waiting=len(self._waiting),
            )
        )
        if len(report.samples) > MOST_SAMPLES:
            del report.samples[::2]
            self._stride *= 2

    def finish(self) -> None:
        """Verify the books and take over the manager's own numbers."""
        self._manager.check()
        report, stats = self._report, self._manager.stats()
        report.evicted, report.dropped, report.pools = stats.evicted, stats.dropped, stats.pools
        report.offloaded, report.onboarded = stats.offloaded, stats.onboarded
        report.simulated_s = (self._now - self._start) / 1000
        if self._step_us:
            p50, p99 = np.percentile(self._step_us, [50, 99])
            report.step_us_p50, report.step_us_p99 = float(p50), float(p99)
            report.step_us_sum = float(np.sum(self._step_us))
