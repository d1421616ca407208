"""Runs a trace in simulated time through the real Scheduler and Engine: requests arrive at their timestamps.

The loop submits what has arrived, runs one step of the engine, and counts what ended; the executor lets the simulated
time pass that the step takes by the model. A request that could never run is refused with the numbers.

What is measured is the scheduler: the processor time that everything in a step of the engine besides `execute` takes on
this thread, that is `schedule` and `update` with all calls of the manager. What the thread waits for is not in it: the
machine, or a page on its way.

A prompt or an answer of no tokens counts as one token: nothing else could be run.
"""

from __future__ import annotations

import time
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvpool.errors import RequestTooLargeError
from kvpool.manager import KVCacheManager
from kvpool.replay.content import Contents
from kvpool.replay.executor import Clock, Job, SimulatedExecutor
from kvpool.replay.model import StepModel
from kvpool.replay.options import Options, make_manager
from kvpool.replay.pattern import block_tokens
from kvpool.replay.prefixes import PrefixIndex
from kvpool.replay.report import Report, Sample, Times
from kvpool.replay.traces import TraceRequest
from kvpool.scheduler import Engine, Request, RequestState, Scheduler, SchedulerConfig
from kvpool.scheduler.admission import check_pools

SAMPLES = 500  # over the arrivals; twice as many at most


def run_timed(
    requests: Iterable[TraceRequest],
    options: Options,
    *,
    model: StepModel | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    advance: Callable[[Report], object] = lambda report: None,
    corrupt_after: int | None = None,
) -> Report:
    """Replay `requests` at their timestamps and return what was counted.

    `model`: how long a step takes (None: the default one). `should_stop` is asked before each step: True ends the run
    with `interrupted` set. `advance` is called after each step in which a request ended. A wrong byte ends the run with
    `wrong` set to the place. `corrupt_after` (tests): after so many requests one bit of every page is flipped. Raises
    ConfigError where the options allow no manager or scheduler.
    """
    started = time.perf_counter()
    clock = Clock()
    page_bytes = Contents(options.tokens_per_block, options.seed).page_bytes
    with make_manager(options, page_bytes, clock) as manager:
        replay = _Timed(manager, options, clock, model or StepModel(), requests)
        report = replay.report
        while not replay.done() and report.wrong is None:
            if should_stop():
                report.interrupted = True
                break
            before = report.requests
            replay.step()
            if report.requests > before:
                advance(report)
                if corrupt_after is not None and before < corrupt_after <= report.requests:
                    replay.corrupt()
        replay.finish()
    report.seconds = time.perf_counter() - started
    return report


class _Outline(NamedTuple):
    """What can be said of a request before its tokens are made."""

    request_id: int
    tokens: Sequence[int]
    max_new_tokens: int


class _Timed:
    """One run: arrivals, the engine, and the counters."""

    def __init__(
        self,
        manager: KVCacheManager,
        options: Options,
        clock: Clock,
        model: StepModel,
        requests: Iterable[TraceRequest],
    ) -> None:
        self.report = Report(times=Times(model=model.name))
        self._manager, self._options, self._clock = manager, options, clock
        limits = SchedulerConfig(options.max_batch_size, options.max_num_tokens, options.chunk_tokens)
        self._scheduler = Scheduler(manager, limits)
        self._executor = SimulatedExecutor(self._scheduler, options, self.report, clock, model)
        self._engine = Engine(self._scheduler, self._executor)
        self._prefixes = PrefixIndex()
        arrivals = sorted(requests, key=lambda request: request.timestamp_ms)
        self._arrivals = deque(arrivals)
        self._start_ms = arrivals[0].timestamp_ms if arrivals else 0.0
        self._interval = (arrivals[-1].timestamp_ms - self._start_ms) / 1000 / SAMPLES if arrivals else 0.0
        self._next_sample = 0.0
        self._number = 0
        self._step_us = array("d")
        self._sampled_steps = 0

    def done(self) -> bool:
        """Whether every request has ended."""
        return not (self._arrivals or self._executor.jobs)

    def corrupt(self) -> None:
        """Flip a bit of every word on the device."""
        for pool in self._options.pools:
            self._manager.pages(pool)[1:].view(np.uint64)[:] ^= np.uint64(1)

    # -- arrivals -----------------------------------------------------------------------------------

    def _at(self, request: TraceRequest) -> float:
        return (request.timestamp_ms - self._start_ms) / 1000

    def _arrive(self) -> None:
        if not self._executor.jobs and self._arrivals:
            self._clock.now = max(self._clock.now, self._at(self._arrivals[0]))
        while self._arrivals and self._at(self._arrivals[0]) <= self._clock.now:
            self._submit(self._arrivals.popleft())

    def _submit(self, given: TraceRequest) -> None:
        report, block, per_id = self.report, self._options.tokens_per_block, self._options.tokens_per_id
        self._number += 1
        prompt, new = max(1, given.input_length), max(1, given.output_length)
        blocks = self._prefixes.add(given.hash_ids)
        try:  # before its tokens are made: those of a request that could never run may not fit this machine
            check_pools(_Outline(self._number, range(prompt), new), self._scheduler.config, self._scheduler.memory)
        except RequestTooLargeError as error:
            report.requests += 1
            report.refused += 1
            if not report.refusal:
                report.refusal = f"{error} (line {given.line})"
            return
        tokens = self._tokens(block_tokens(blocks.ids, per_id)[: len(blocks.ids) * per_id], prompt, prompt + new)
        request = Request(self._number, tokens[:prompt], new, arrival=self._at(given))
        self._engine.submit(request)
        seen = min(blocks.seen * per_id, prompt - 1) // block
        self._executor.jobs[self._number] = Job(request, given.line, tokens, seen)

    def _tokens(self, given: NDArray[np.int32], prompt: int, length: int) -> NDArray[np.int32]:
        """The given tokens of the prompt; the rest, and all that is generated, is the request's own."""
        known = min(prompt, len(given))
        own = np.arange(known, length, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        own += np.uint64(self._number * 0xD1B54A32D192ED03 % 2**64)
        return np.concatenate([given[:known], (own >> np.uint64(33)).astype(np.int32)])

    # -- one step -----------------------------------------------------------------------------------

    def step(self) -> None:
        """What arrives, and one step of the engine."""
        self._arrive()
        if not self._executor.jobs:
            return  # all that arrived was refused
        report, executor = self.report, self._executor
        steps, own = report.steps, executor.own_s
        begun = time.thread_time()
        ended = self._engine.step()
        spent = time.thread_time() - begun
        self._step_us.append((spent - (executor.own_s - own)) * 1e6)
        for request in ended:
            self._end(request)
        if report.steps == steps:
            raise RuntimeError(f"the scheduler ran nothing with {len(executor.jobs)} requests there")
        if self._clock.now >= self._next_sample:
            self._sample()

    def _end(self, request: Request) -> None:
        if request.error is not None:
            raise request.error  # the simulated engine makes no mistakes: this is one of ours
        job = self._executor.jobs.pop(request.request_id)
        times, now = self.report.times, self._clock.now
        assert times is not None
        assert job.started is not None
        assert job.first_token is not None
        self.report.requests += 1
        times.arrivals.append(job.arrival)
        times.queue.append(job.started - job.arrival)
        times.first_token.append(job.first_token - job.arrival)
        if len(request.output_tokens) > 1:
            times.per_token.append((now - job.first_token) / (len(request.output_tokens) - 1))

    # -- what is told -------------------------------------------------------------------------------

    def _sample(self) -> None:
        report, stats = self.report, self._manager.stats()
        states = Counter(job.request.state for job in self._executor.jobs.values())
        recent = np.array(self._step_us[self._sampled_steps :])
        self._sampled_steps = len(self._step_us)
        report.samples.append(
            Sample(
                seconds=self._clock.now,
                pools=stats.pools,
                reused_tokens=report.reused_tokens,
                prompt_tokens=report.prompt_tokens,
                evicted=stats.evicted,
                dropped=stats.dropped,
                offloaded=stats.offloaded,
                onboarded=stats.onboarded,
                step_us=(float(np.mean(recent)), float(np.percentile(recent, 99))),
                active=states[RequestState.RUNNING],
                suspended=states[RequestState.SUSPENDED],
                waiting=states[RequestState.WAITING],
            )
        )
        if len(report.samples) > 2 * SAMPLES:
            del report.samples[1::2]
            self._interval *= 2
        self._next_sample = self._clock.now + self._interval

    def finish(self) -> None:
        """Verify the books and take over the numbers of manager and scheduler."""
        self._manager.check()
        report, stats, done = self.report, self._manager.stats(), self._scheduler.stats
        report.evicted, report.dropped, report.pools = stats.evicted, stats.dropped, stats.pools
        report.offloaded, report.onboarded = stats.offloaded, stats.onboarded
        report.suspended, report.recomputed = done.suspended, done.recomputed
        report.recomputed_tokens = done.recomputed_tokens
        assert report.times is not None
        report.times.simulated_s = self._clock.now
        if self._step_us:
            p50, p99 = np.percentile(self._step_us, [50, 99])
            report.step_us_p50, report.step_us_p99 = float(p50), float(p99)
            report.step_us_sum = float(np.sum(self._step_us))
