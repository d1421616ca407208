"""Pools, tree and caches of one device and its host tier: configuration, memory, block tables, steps, books.

The manager holds no state of a page: it converts arguments, calls the core once per operation and
makes the copies that the core asks for, at once.
`cache.py` has what one request's cache can do, `batches.py` the calls by batch.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from kvpool import _core
from kvpool.arguments import (
    INT32,
    ByteArray,
    Int32Array,
    Tokens,
    count,
    retention_spec,
    scope_key,
    token_array,
)
from kvpool.batches import Batches, checked_id, taken
from kvpool.buffers import check_apart, given_buffers
from kvpool.cache import CacheState, Closing, KVCache
from kvpool.config import CacheConfig, Retention, Scope, _int, _seconds
from kvpool.errors import ConfigError, InvariantError, KVPoolError, LogicError
from kvpool.mover import Mover
from kvpool.mover.cpu_memory import CpuMemory
from kvpool.moves import Moves
from kvpool.sizing import PoolPlan, plan_pools
from kvpool.uses import StepUses

if TYPE_CHECKING:
    from kvpool.mover.cuda_memory import CudaMemory

_BOOKS = ("slots", "free", "active", "held", "cached", "fenced", "peak")


@dataclass(frozen=True, slots=True)
class Counters:
    """What happened since construction, in tokens, blocks and pages."""

    requests: int
    prompt_tokens: int
    reused_tokens: int
    prompt_blocks: int
    reused_blocks: int
    evicted: int
    dropped: int
    offloaded: int
    onboarded: int

    @property
    def hit_rate_tokens(self) -> float:
        """Reused / prompt tokens, 0..1."""
        return self.reused_tokens / self.prompt_tokens if self.prompt_tokens else 0.0

    @property
    def hit_rate_blocks(self) -> float:
        """Whole blocks reused / prompt blocks, 0..1."""
        return self.reused_blocks / self.prompt_blocks if self.prompt_blocks else 0.0


@dataclass(frozen=True, slots=True)
class Stats(Counters):
    """Counters, and the books of every pool and tier.

    pools: {name: {tier: {slots, free, active, held, cached, fenced, peak}}}, in slots, with
    `free + active + held + cached + fenced == slots`. failed_moves: pages that did not arrive. stuck_slots: slots that
    a move which was not over in time may still write. paths: {path: {direction: {moves, pages, bytes}}}, what was sent
    by each path of a GPU's mover (docs/MOVER.md), whatever became of it: not compared; empty on the CPU.
    """

    pools: dict[str, dict[str, dict[str, int]]]
    failed_moves: int = 0
    stuck_slots: int = 0
    paths: dict[str, dict[str, dict[str, int]]] = field(default_factory=dict, compare=False)


@dataclass(frozen=True, slots=True)
class Event:
    """A page of a block entered the tree, changed its tier, or left.

    number: from 1, without gaps unless events were lost. kind: "stored", "moved" or "removed". key, parent: 64-bit keys
    of the block and of the one before it (None: it is the first, or the event is no "stored"); `block_keys` tells those
    of a prompt. tier: where the page is now, of a removed one where it was.
    """

    number: int
    kind: str
    key: int
    parent: int | None
    pool: str
    tier: str


def _listed(caches: Iterable[KVCache]) -> list[KVCache]:
    if type(caches) is not list and not isinstance(caches, Iterable):
        raise ValueError(f"caches: {caches!r} is not a list of caches")
    return list(caches)  # a copy: another thread may change the caller's


def _memory_of(device: str | None, numa_node: int | None) -> CpuMemory | CudaMemory | None:
    """What stands behind a device. CUDA's is imported here: it is half of what `import kvpool` would cost."""
    if numa_node is not None and device in (None, "cpu"):
        raise ConfigError(f"numa_node: {numa_node!r} is for the pinned host memory of a GPU, and device is {device!r}")
    if device is None:
        return None
    if device == "cpu":
        return CpuMemory()
    from kvpool.machine import parse_device
    from kvpool.mover.cuda_memory import CudaMemory

    parse_device(device)
    return CudaMemory(device, numa_node)


class KVCacheManager(Batches, Closing):
    """Pools, tree and caches of one device.

    device: "cpu" (pages in host memory), "cuda" or "cuda:N" (CuPy arrays), None (books only). plan: slots per pool
    instead of `plan_pools(config)`. buffers: the engine's own memory per pool, (num_slots + 1) * page_bytes bytes,
    C-contiguous: a NumPy array, on a GPU whatever has `__cuda_array_interface__`, or DLPack; kept alive, its row 0
    zeroed, never freed. policy: "lru", or "slru" (request-level segmented LRU with ghosts). move_timeout_s: a move that
    takes longer has failed. numa_node: of a GPU's host pages (None: the system's choice). mover: makes it from
    {pool: (device pages, host pages or None)}; None: the device's own.
    Raises ConfigError for what cannot be provided, MemoryError for pages that cannot be allocated. A context manager
    that closes.
    """

    def __init__(
        self,
        config: CacheConfig,
        device: str | None = "cpu",
        *,
        plan: PoolPlan | None = None,
        buffers: Mapping[str, Any] | None = None,
        policy: str = "lru",
        move_timeout_s: float | None = 60.0,
        numa_node: int | None = None,
        mover: Callable[[Mapping[str, tuple[ByteArray, ByteArray | None]]], Mover] | None = None,
    ) -> None:
        if not isinstance(config, CacheConfig):
            raise ConfigError(f"config: {config!r} is not a kvpool.CacheConfig")
        self._memory = _memory_of(device, numa_node)
        if policy not in ("lru", "slru"):
            raise ConfigError(f"policy: {policy!r} is none of 'lru', 'slru'")
        if move_timeout_s is not None:
            _seconds("move_timeout_s", move_timeout_s)
        if mover is not None and not callable(mover):
            raise ConfigError(f"mover: {mover!r} is not callable; give a function of {{pool: (device, host pages)}}")
        self.config = config
        self.plan = plan_pools(config) if plan is None else self._checked(plan, config)
        self._pool_index = {pool.name: i for i, pool in enumerate(config.pools)}
        slots = [self.plan.num_slots[pool.name] for pool in config.pools]
        host = [self.plan.host_slots.get(pool.name, 0) for pool in config.pools]
        self._tiers = ("device", "host") if any(host) else ("device",)
        self._pages: dict[str, ByteArray] = {}
        self._host_pages: dict[str, ByteArray] = {}
        if self._memory is not None:
            self._make_pages(self._memory, given_buffers(buffers, self._pool_index))
        elif buffers:
            raise ConfigError("buffers: device=None keeps books only; use device='cpu' or 'cuda'")
        max_blocks = config.max_blocks
        if max_blocks is None:
            longest = -(-(config.max_seq_len or 0) // config.tokens_per_block)
            max_blocks = max(*map(sum, zip(slots, host, strict=True)), 2 * longest, 1)
        self._core = _core.Core(
            tokens_per_block=config.tokens_per_block,
            pools=[(p.name, n, m, p.window, p.sink_tokens) for p, n, m in zip(config.pools, slots, host, strict=True)],
            max_blocks=max_blocks,
            max_seq_len=config.max_seq_len,
            partial_reuse=config.partial_reuse,
            hash_seed=int.from_bytes(os.urandom(8)) if config.hash_seed is None else config.hash_seed,
            policy=policy,
            clock=config.clock,
            offload_min_priority=config.offload_min_priority,
            record=bool(self._host_pages),
        )
        self._moves: Moves | None = None
        if self._memory is not None:
            pages = {name: (device, self._host_pages.get(name)) for name, device in self._pages.items()}
            made = self._memory.mover() if mover is None else mover(pages)
            self._moves = Moves(self._core, made, list(pages), move_timeout_s)
        # A GPU's would have to be waited for.
        self._verifies = isinstance(self._memory, CpuMemory) and os.environ.get("KVPOOL_CHECK") == "1"
        self._caches: dict[int | str, KVCache] = {}
        self._closed = False

    @staticmethod
    def _checked(plan: PoolPlan, config: CacheConfig) -> PoolPlan:
        if not isinstance(plan, PoolPlan):
            raise ConfigError(f"plan: {plan!r} is not a PoolPlan; `plan_pools` makes one")
        names = [pool.name for pool in config.pools]
        if sorted(plan.num_slots) != sorted(names):
            raise ConfigError(f"plan.num_slots: pools {sorted(plan.num_slots)} are not the config's {sorted(names)}")
        for name in names:
            _int(f"plan.num_slots[{name!r}]", plan.num_slots[name], 1, 2**27 - 1)
        host = {name: _int(f"plan.host_slots[{name!r}]", plan.host_slots.get(name, 0), 0, 2**27 - 1) for name in names}
        if any(host.values()) and not all(host.values()):
            raise ConfigError(f"plan.host_slots: {host} has 0 for some pools only; give every pool some, or none any")
        return plan

    def _make_pages(self, memory: CpuMemory | CudaMemory, given: Mapping[str, Any]) -> None:
        for pool in self.config.pools:
            slots, host_slots = self.plan.num_slots[pool.name] + 1, self.plan.host_slots.get(pool.name, 0)
            pages, host = memory.add(pool.name, pool.page_bytes, slots, host_slots, given.get(pool.name))
            self._pages[pool.name] = pages
            if host is not None:
                self._host_pages[pool.name] = host
        if given:
            check_apart(memory.places())

    def _pool(self, pool: str) -> int:
        try:
            return self._pool_index[pool]
        except (KeyError, TypeError):
            raise ValueError(f"pool: {pool!r} is unknown; there are {sorted(self._pool_index)}") from None

    def create(
        self,
        request_id: int | str,
        tokens: Tokens,
        *,
        scope: Scope | None = None,
        retention: Retention | None = None,
    ) -> KVCache:
        """Claim the longest cached prefix of `tokens`; SUSPENDED, takes no slot.

        In whole blocks it is the longest; where it ends inside one of very many that begin alike it may be shorter
        (README, limits).
        LogicError: the id has a cache. ValueError: more than max_seq_len tokens, tokens out of range.
        """
        self._open()
        if checked_id(request_id) in self._caches:
            raise taken(request_id)
        key, epoch = scope_key(scope)
        cache = KVCache(self, request_id, self._core.create(token_array(tokens), key, epoch, retention_spec(retention)))
        if self._caches.setdefault(request_id, cache) is not cache or self._closed:
            self._register([cache])  # raises: another thread was faster, or has closed the manager
        if self._moves is not None:
            self._check_lost([cache])
        return cache

    def cache(self, request_id: int | str) -> KVCache:
        """The open cache of a request; KeyError if there is none."""
        cache = self._caches[request_id]
        if cache._state is CacheState.CLOSED:
            raise KeyError(request_id)
        return cache

    def probe(self, tokens: Tokens, scope: Scope | None = None) -> int:
        """Tokens that `create` would reuse now. Claims and changes nothing.

        `create` reuses less while the last unclaimed pages are promised to others.
        """
        self._open()
        key, epoch = scope_key(scope)
        return self._core.probe(token_array(tokens), key, epoch)

    def evict(self, num_blocks: int) -> int:
        """Up to `num_blocks` leaves leave the device, in the order of eviction; returns how many did."""
        self._open()
        self._before()
        evicted = self._core.evict(count(num_blocks, "num_blocks"))
        self._after()
        return evicted

    def clear(self) -> None:
        """Drop all that is unclaimed."""
        self._open()
        self._core.clear()

    def set_epoch(self, n: int) -> None:
        """Weights changed: older content matches no longer and goes first. ValueError if lower than now."""
        self._open()
        self._core.set_epoch(count(n, "epoch"))

    def available_tokens(self) -> int:
        """Largest capacity (tokens) that one new unmatched cache could get now."""
        self._open()
        return self._core.available_tokens()

    def pages(self, pool: str, tier: str = "device") -> ByteArray:
        """Pages of a pool, zero-copy: (num_slots + 1, page_bytes) uint8, row 0 the null page; on the host (host_slots,
        page_bytes). All moves so far are over when it returns.

        LogicError: device=None, or no host tier.
        """
        if tier not in ("device", "host"):
            raise ValueError(f"tier: {tier!r} is none of 'device', 'host'")
        self._pool(pool)
        if not self._pages:
            raise LogicError("pages: device=None keeps books only")
        if self._moves is not None:
            self._moves.settle()
        if tier == "device":
            return self._pages[pool]
        if not self._host_pages:
            raise LogicError("pages: there is no host tier; set host_bytes")
        return self._host_pages[pool]

    def _handles(self, caches: list[KVCache]) -> list[_core.Cache]:
        try:
            handles = [cache._handle for cache in caches if cache._manager is self]
        except AttributeError:
            handles = []
        if len(handles) < len(caches):
            other = next(one for one in caches if not isinstance(one, KVCache) or one._manager is not self)
            raise ValueError(f"caches: {other!r} is not a cache of this manager")
        return handles

    def block_tables(
        self, caches: Sequence[KVCache], pool: str, out: Int32Array | None = None, fill: int = 0
    ) -> Int32Array:
        """Slots of ACTIVE caches, one row each: int32, C-contiguous (n, widest); stale and spare entries `fill`.

        Written in place into `out` if given. ValueError: `out` too small, of another dtype or order. LogicError: a
        cache is LOST, known then at the latest.
        """
        caches = _listed(caches)
        index, handles = self._pool(pool), self._handles(caches)
        if type(fill) is not int:
            if isinstance(fill, bool) or not isinstance(fill, int | np.integer):
                raise ValueError(f"fill: {fill!r} is not an int32")
            fill = int(fill)
        if not -(2**31) <= fill < 2**31:
            raise ValueError(f"fill: {fill!r} is not an int32")
        if self._moves is not None:
            self._ready_in_steps(caches)
            self._check_arrived(caches, "block_tables")
        if out is None:
            out = np.empty((len(handles), self._core.widest(handles, index)), np.int32)
        elif not isinstance(out, np.ndarray) or out.dtype != INT32:  # of the other byte order too
            raise ValueError("out: must be a two-dimensional int32 array")
        self._core.block_tables(handles, index, out, fill)
        return out

    def block_tables_csr(self, caches: Sequence[KVCache], pool: str) -> tuple[Int32Array, Int32Array, Int32Array]:
        """FlashInfer's form, int32: indptr (n + 1), indices (entries; stale ones 0), last_page_len (n).

        last_page_len counts capacity: 1..tokens_per_block, 0 for a cache without capacity. LogicError: a cache is LOST.
        """
        caches = _listed(caches)
        handles, index = self._handles(caches), self._pool(pool)
        self._ready_in_steps(caches)
        self._check_arrived(caches, "block_tables_csr")
        raw = self._core.block_tables_csr(handles, index, self.config.tokens_per_block)
        indptr, indices, last_page_len = (np.frombuffer(part, np.int32) for part in raw)
        return indptr, indices, last_page_len

    def step_begin(self, caches: Sequence[KVCache], stream: object = None) -> None:
        """Before the launch of a step over ACTIVE caches: their slots stay fenced until `step_end`.

        Returns when every move that touches their slots is over. A cache whose pages did not arrive is LOST then. On a
        GPU with a stream it returns at once, and the stream waits; what is LOST is known by `commit`, or `update`.
        KVPoolError: the GPU is at its end, whatever is launched there fails. ValueError: the stream is none of CUDA's,
        or a fifth one. Where it raises nothing has begun.
        """
        caches = _listed(caches)
        handles = self._handles(caches)
        if self._moves is not None:
            self._moves.check_stream(stream)
        self._ready(caches, stream, launch=True)
        if self._moves is not None and (fault := self._moves.fault()) is not None:
            raise KVPoolError(f"step_begin: the GPU is at its end ({fault}); end the process, and start anew")
        noted = self._moves is not None and self._moves.notes(stream)
        uses = StepUses(self._core, handles, stream) if noted else None  # before: it may raise
        self._core.step_begin(handles)
        if uses is not None:
            for position, cache in enumerate(caches):
                cache._uses.append((uses, position))

    def step_end(self, caches: Sequence[KVCache], stream: object = None) -> None:
        """After the step: what was freed or closed meanwhile is given back. LogicError without `step_begin`.

        With KVPOOL_CHECK=1, in CPU memory: InvariantError, afterwards, if a null page was written.
        """
        caches = _listed(caches)
        handles = self._handles(caches)
        try:
            if self._moves is not None and self._moves.noted:
                steps: dict[StepUses, list[int]] = {}
                for cache in caches:
                    if cache._uses and (use := cache._take_use()) is not None:
                        steps.setdefault(use[0], []).append(use[1])
                if steps:
                    self._moves.used(steps, stream)
        finally:
            gone = [caches[at] for at in self._core.step_end(handles)]
            for cache in gone:
                self._forget(cache)
            if gone:
                self._bury(gone)
        self._after()
        if self._verifies:
            self._check_null_pages()

    def drain_events(self, most: int = 2**31) -> list[Event]:
        """What happened to the tree since the last call, oldest first, at most `most` events.

        The last 65,536 unread events are kept; a gap in the numbers shows that older ones are gone. A page is in the
        tree if it was stored more often than removed: events of one block by different threads may stand in either
        order. Blocks nobody; of two readers at once one gets nothing.
        """
        events = self._core.drain_events(count(most, "most"))
        names = [pool.name for pool in self.config.pools]
        return [
            Event(number, kind, key, parent, names[pool], "host" if host else "device")
            for number, kind, pool, host, key, parent in events
        ]

    def block_keys(self, tokens: Tokens, scope: Scope | None = None) -> list[int]:
        """Keys that the full blocks of a prompt have in the events of this manager."""
        self._open()
        key, epoch = scope_key(scope)
        return self._core.block_keys(token_array(tokens), key, epoch)

    def counters(self) -> Counters:
        """`stats` without the books, which cost a look at every slot."""
        return Counters(**self._core.counters())

    def stats(self) -> Stats:
        """Counters since construction and the books of every pool. Disturbs nobody."""
        pools: dict[str, dict[str, dict[str, int]]] = {pool.name: {} for pool in self.config.pools}
        for tier in self._tiers:
            for pool, book in zip(self.config.pools, self._core.books(tier == "host"), strict=True):
                pools[pool.name][tier] = dict(zip(_BOOKS, book, strict=True))
        counters: dict[str, Any] = self._core.counters()
        if self._moves is None:
            return Stats(**counters, pools=pools)
        moves, counts = self._moves, getattr(self._moves.mover, "path_counts", dict)
        return Stats(**counters, pools=pools, failed_moves=moves.failed, stuck_slots=len(moves.stuck), paths=counts())

    def check(self) -> None:
        """Recompute all books; `InvariantError` names the equation that broke, or the written null page."""
        self._core.check([cache._handle for cache in list(self._caches.values())])
        self._check_null_pages()

    def _check_null_pages(self) -> None:
        for name in self._pages:
            if self._memory is not None and self._memory.null_page(name).any():
                raise InvariantError(f"pool {name!r}: the null page (slot 0) was written")

    def close(self) -> None:
        """Close all caches. Twice is a no-op. Calls that claim, change or match raise `LogicError` afterwards."""
        if self._closed:
            return
        self._closed = True  # nobody makes another cache meanwhile
        try:
            self._close([cache for cache in list(self._caches.values()) if cache._state is not CacheState.CLOSED])
        except BaseException:
            self._closed = False
            raise
        if self._moves is not None:
            self._moves.mover.close()
        if self._memory is not None:
            self._memory.close()
