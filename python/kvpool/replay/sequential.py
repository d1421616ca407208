"""Runs requests through the manager one after the other, and verifies the bytes of every reused page.

Per request of k blocks, of which the cache reuses r:

    blocks   0 ........ r ................ k
             | verified | written, committed |        then the cache is closed and all k stay cached

Outputs are ignored and every hash id is one full block.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

import numpy as np
from numpy.typing import NDArray

from kvpool import KVCache, KVCacheManager
from kvpool.replay.options import POOL, Options, make_manager
from kvpool.replay.pattern import Pattern, block_tokens
from kvpool.replay.prefixes import PrefixIndex
from kvpool.replay.report import Report
from kvpool.replay.traces import TraceRequest

PAGE_BYTES = 256  # small: a replay proves who owns a page, not how fast it is copied


def run_sequential(
    requests: Iterable[TraceRequest],
    options: Options,
    *,
    should_stop: Callable[[], bool] = lambda: False,
    advance: Callable[[Report], object] = lambda report: None,
    corrupt_after: int | None = None,
) -> Report:
    """Replay `requests` and return what was counted, the books of the pools included.

    `should_stop` is asked before each request: True ends the run with `interrupted` set. `advance` is
    called after each. A wrong byte ends it with `wrong` set to the place. `corrupt_after` (tests): after so
    many requests one bit of each page of the last one is flipped. Raises ConfigError where the options
    allow no manager.
    """
    started = time.perf_counter()
    report = Report()
    with make_manager(options, PAGE_BYTES) as manager:
        replay = _Sequential(manager, options, report)
        for request in requests:
            if should_stop():
                report.interrupted = True
                break
            replay.serve(request)
            if report.wrong is not None:
                break
            if report.requests == corrupt_after:
                replay.corrupt()
            advance(report)
        replay.finish()
    report.seconds = time.perf_counter() - started
    return report


class _Sequential:
    """One run: the manager, the pattern of its pages, and the counters."""

    def __init__(self, manager: KVCacheManager, options: Options, report: Report) -> None:
        self._manager = manager
        self._block = options.tokens_per_block
        self._slots = options.device_blocks
        self._pages: NDArray[np.uint8] = np.asarray(manager.pages(POOL))
        self._pattern = Pattern(PAGE_BYTES, 0, options.seed)
        self._prefixes = PrefixIndex()
        self._report = report
        self._last_table: NDArray[np.int32] = np.empty(0, dtype=np.int32)

    def serve(self, request: TraceRequest) -> None:
        """Match, verify, compute, commit and close one request."""
        report = self._report
        blocks = self._prefixes.add(request.hash_ids)
        report.requests += 1
        report.prompt_blocks += len(blocks.ids)
        report.prompt_tokens += len(blocks.ids) * self._block
        report.bound_blocks += blocks.seen
        # Longer than the device: it cannot run there whole. Its head is served, its tail counts as missed.
        report.too_long += len(blocks.ids) > self._slots
        tokens = block_tokens(blocks.ids[: self._slots], self._block)
        with self._manager.create(report.requests, tokens) as cache:
            self._compute(cache, request, blocks.keys[: self._slots], tokens)

    def _compute(
        self, cache: KVCache, request: TraceRequest, keys: NDArray[np.uint64], tokens: NDArray[np.int32]
    ) -> None:
        reused_tokens = cache.num_reused_tokens
        reused = reused_tokens // self._block
        whole = len(keys) * self._block
        if not (cache.resume() and cache.resize(whole)):
            # Nothing else is open and the request is no longer than the device: the books must be wrong.
            raise RuntimeError(f"request {request.line}: no room for {len(keys)} of {self._slots} blocks")
        table = cache.block_table(POOL)
        self._report.reused_tokens += reused_tokens
        self._report.reused_blocks += reused
        if reused:
            wrong = self._pattern.check(self._pages[table[:reused]], keys[:reused])
            self._report.bytes_checked += reused * PAGE_BYTES
            if wrong is not None:
                self._report.wrong = (
                    f"request {self._report.requests} (line {request.line}), block {wrong.row}, "
                    f"pool '{POOL}', slot {int(table[wrong.row])}: byte {wrong.offset} is "
                    f"0x{wrong.found:02x}, expected 0x{wrong.expected:02x}"
                )
                return
        if reused < len(keys):
            self._pages[table[reused:]] = self._pattern.pages(keys[reused:])
            cache.commit(tokens[reused_tokens:whole])
            table = cache.block_table(POOL)
        self._last_table = table

    def corrupt(self) -> None:
        """Flip one bit in the middle of each page of the last request."""
        self._pages[self._last_table, PAGE_BYTES // 2] ^= 1

    def finish(self) -> None:
        """Verify the books and take over the manager's own numbers."""
        self._manager.check()
        stats = self._manager.stats()
        report = self._report
        report.evicted, report.dropped, report.pools = stats.evicted, stats.dropped, stats.pools
        report.offloaded, report.onboarded = stats.offloaded, stats.onboarded
