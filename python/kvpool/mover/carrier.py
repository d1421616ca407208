"""Brings a move on its way: the path that is chosen for it, what that path needs, and the calls that enqueue it.

A move is one piece, or, by way of staging memory, as many as that takes:

    staged offload     piece 0        piece 1        piece 2          part = piece mod 2
    gather stream      [gather 0]     [gather 1]     [gather 2]       gather 2 waits for send 0
    offload stream         [send 0]       [send 1]       [send 2]     send i waits for gather i
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kvpool.arguments import Int32Array
from kvpool.mover.batch_copy import MOST
from kvpool.mover.cuda_runtime import OTHER_ADDRESSES, CudaRuntime
from kvpool.mover.descriptors import PER_CALL, Buffer, CudaPool, Int64s, count_runs, starts
from kvpool.mover.launches import FAMILY, VECTOR, plan_launch
from kvpool.mover.paths import ALWAYS, PATHS, Choice, Chooser, Shape
from kvpool.mover.slot_events import DIRECTIONS
from kvpool.mover.staging import STAGING_BYTES, Staging
from kvpool.mover.types import MoveBatch

KERNELS = {"registers": ("copy_pages",), "ring": ("copy_ring",), "staged": ("gather_pages", "scatter_pages")}
RING_SINCE = 80  # compute capability that has cp.async


@dataclass(slots=True)
class Piece:
    """Pages `src` to `dst`. at: where fragments begin. lists: the slots where a kernel reads them. part: of staging
    memory."""

    src: Int32Array
    dst: Int32Array
    at: Int64s
    lists: list[Buffer] = field(default_factory=list)
    part: int | None = None


@dataclass(slots=True)
class Plan:
    """How a move travels."""

    batch: MoveBatch
    choice: Choice
    pieces: list[Piece]

    @property
    def gathers(self) -> bool:
        """Whether two streams take part."""
        return self.choice.path == "staged" and self.batch.direction == "offload"


def _inner(piece: Piece) -> Int32Array:
    """Where its pages are in a part: page i is the i-th."""
    return np.arange(len(piece.src), dtype=np.int32)


class Carrier:
    """For the pools of one mover. Not for several threads at once.

    calls: copies of the copy engine, batched copies, launches, so far. problems: why a path that the chooser knows is
    not offered to any pool.
    """

    def __init__(
        self,
        pools: Mapping[str, CudaPool],
        runtime: CudaRuntime,
        chooser: Chooser,
        staging_bytes: int = STAGING_BYTES,
    ) -> None:
        self._pools, self._runtime, self.chooser = pools, runtime, chooser
        self.calls = dict.fromkeys(("engine_copies", "batch_copies", "kernel_launches"), 0)
        self._counts: dict[tuple[str, str], list[int]] = {}
        self.staging: dict[str, Staging] = {}
        self.problems: dict[str, str] = {}
        wanted = chooser.paths
        if not runtime.same_addresses:  # kernels read their lists of slots in host memory, whatever they copy
            self.problems = dict.fromkeys(wanted & set(KERNELS), OTHER_ADDRESSES)
            wanted -= set(KERNELS)
        if "staged" in wanted:
            try:
                self.staging = {each: Staging(each, staging_bytes, runtime) for each in DIRECTIONS[:2]}
                runtime.synchronize()  # CuPy may hand out memory that work of its own streams still touches
            except MemoryError as error:
                self.problems["staged"] = f"{2 * staging_bytes} bytes of staging memory cannot be had: {error}"
        problem = runtime.batch_problem() if wanted & {"batch", "staged"} else None
        if problem is not None:
            self.problems["batch"] = problem
        if "ring" in wanted and (found := runtime.compute_capability) < RING_SINCE:
            self.problems["ring"] = f"compute capability {found / 10} is below {RING_SINCE / 10}"
        self._paths = ALWAYS | (wanted - set(self.problems))
        for name, pool in pools.items():
            if pool.host is not None and not pool.host.pinned:
                raise ValueError(f"pool {name!r}: host memory must be pinned. {pool.host.problem}")
        for family in sorted({FAMILY[each] for path in self._paths for each in KERNELS.get(path, ())}):
            runtime.compile(family)  # now, not within the first move
        self._offered = {(name, each): self._offers(pool, each) for name, pool in pools.items() for each in DIRECTIONS}

    def _offers(self, pool: CudaPool, direction: str) -> frozenset[str]:
        offered = set(self._paths)
        bases = [pool.device] if pool.host is None else [pool.device, pool.host.address]
        if pool.page_bytes % VECTOR or any(base % VECTOR for base in bases):
            offered.discard("ring")
        if direction == "copy" or not self.staging or pool.page_bytes > self.staging[direction].part_bytes:
            offered.discard("staged")
        return frozenset(offered)

    def offered(self, pool: str, direction: str) -> frozenset[str]:
        """Paths that pages of a pool can take, of those that the chooser knows, and ALWAYS."""
        return self._offered[pool, direction]

    # -- plans --------------------------------------------------------------------------------

    def plan(self, batch: MoveBatch, src: Int32Array, dst: Int32Array, take: Callable[[], Buffer]) -> Plan:
        """A path for these pages, and the buffers (by `take`) that it needs, filled.

        MemoryError, RuntimeError: of `take`.
        """
        if not len(src):
            return Plan(batch, Choice("engine"), [Piece(src, dst, np.zeros(0, np.int64))])
        pool = self._pools[batch.pool]
        host = {"offload": dst, "onboard": src}.get(batch.direction)
        order = np.argsort(src, kind="stable")  # neighbours come together
        near, far = src[order], dst[order]
        edges = pool.host.edges if pool.host is not None else ()
        at = starts(near, far, None if host is None else host[order], pool.page_bytes, edges)
        runs = 0 if host is None else count_runs(host)
        shape = Shape(batch.direction, pool.page_bytes, len(src), len(at), runs)
        choice = self.chooser.choose(shape, self._offered[batch.pool, batch.direction])
        if choice.path == "staged" and host is not None:
            pieces = self._cut(batch.direction, pool, src, dst, np.argsort(host, kind="stable"))
        else:
            pieces = [Piece(near, far, at)]
        if choice.path in KERNELS:
            for piece in pieces:
                self._list(piece, take)
        return Plan(batch, choice, pieces)

    def _cut(self, direction: str, pool: CudaPool, src: Int32Array, dst: Int32Array, order: Int64s) -> list[Piece]:
        """Pieces for a part each; within one the pages lie in the order of the host's slots."""
        assert pool.host is not None
        staging, pieces = self.staging[direction], list[Piece]()
        most = min(staging.part_bytes // pool.page_bytes, PER_CALL)
        for first in range(0, len(order), most):
            part = order[first : first + most]
            host = (dst if direction == "offload" else src)[part]
            at = starts(np.arange(len(part), dtype=np.int32), host, host, pool.page_bytes, pool.host.edges)
            pieces.append(Piece(src[part], dst[part], at, part=staging.take()))
        return pieces

    @staticmethod
    def _list(piece: Piece, take: Callable[[], Buffer]) -> None:
        for at in range(0, len(piece.src), PER_CALL):
            buffer, part = take(), slice(at, at + PER_CALL)
            count = len(piece.src[part])
            buffer.lists[0, :count], buffer.lists[1, :count] = piece.src[part], piece.dst[part]
            piece.lists.append(buffer)

    # -- calls --------------------------------------------------------------------------------

    def carry(self, plan: Plan, piece: Piece, stream: Any) -> None:
        """All of a piece, in one stream."""
        pool, direction = self._pools[plan.batch.pool], plan.batch.direction
        source, target = self._bases(pool, direction)
        if plan.choice.path == "staged":
            self._up(plan, piece, stream)
        elif plan.choice.path in KERNELS:
            (operation,) = KERNELS[plan.choice.path]
            for number, buffer in enumerate(piece.lists):
                count = min(len(piece.src) - number * PER_CALL, PER_CALL)
                lists = buffer.sources, buffer.targets
                self._launch(operation, (source, target), lists, count, pool, plan.choice, stream)
        else:
            self._copies(plan.choice.path, pool, (source, target), (piece.src, piece.dst), piece.at, stream)

    def gather(self, plan: Plan, piece: Piece, stream: Any) -> None:
        """The first half of a staged offload."""
        pool, (buffer,) = self._pools[plan.batch.pool], piece.lists
        bases = pool.device, self._part(plan, piece)
        self._launch("gather_pages", bases, (buffer.sources,), len(piece.src), pool, plan.choice, stream)

    def send(self, plan: Plan, piece: Piece, stream: Any) -> None:
        """Its second half."""
        pool = self._pools[plan.batch.pool]
        assert pool.host is not None
        self._copies(
            self._best(piece),
            pool,
            (self._part(plan, piece), pool.host.address),
            (_inner(piece), piece.dst),
            piece.at,
            stream,
        )

    def _up(self, plan: Plan, piece: Piece, stream: Any) -> None:
        """A staged onboard: one stream, so that what fills the part comes behind what reads it."""
        pool, (buffer,) = self._pools[plan.batch.pool], piece.lists
        assert pool.host is not None
        part = self._part(plan, piece)
        self._copies(self._best(piece), pool, (pool.host.address, part), (piece.src, _inner(piece)), piece.at, stream)
        bases = part, pool.device
        self._launch("scatter_pages", bases, (buffer.targets,), len(piece.src), pool, plan.choice, stream)

    def _part(self, plan: Plan, piece: Piece) -> int:
        assert piece.part is not None
        return self.staging[plan.batch.direction].address(piece.part)

    def _best(self, piece: Piece) -> str:
        """How the runs of the host's side go to and from a part."""
        return "batch" if "batch" not in self.problems and len(piece.at) > 1 else "engine"

    def _launch(
        self,
        operation: str,
        bases: tuple[int, int],
        lists: tuple[int, ...],
        count: int,
        pool: CudaPool,
        choice: Choice,
        stream: Any,
    ) -> None:
        launch = plan_launch(operation, bases, pool.page_bytes, count, choice.blocks)
        assert launch is not None
        self._runtime.launch(launch, (*bases, *lists, np.int64(pool.page_bytes), np.int32(count)), stream)
        self.calls["kernel_launches"] += 1

    def _copies(
        self,
        path: str,
        pool: CudaPool,
        bases: tuple[int, int],
        slots: tuple[Int32Array, Int32Array],
        at: Int64s,
        stream: Any,
    ) -> None:
        """The fragments that begin there, one by one or in calls of MOST."""
        size = pool.page_bytes
        sources, targets = (
            np.uint64(base) + of[at].astype(np.uint64) * np.uint64(size) for base, of in zip(bases, slots, strict=True)
        )
        sizes = (np.diff(at, append=len(slots[0])) * size).astype(np.uint64)
        if path == "batch":
            for first in range(0, len(at), MOST):
                part = slice(first, first + MOST)
                self._runtime.copy_batch(targets[part], sources[part], sizes[part], stream)
                self.calls["batch_copies"] += 1
            return
        for target, source, num_bytes in zip(targets.tolist(), sources.tolist(), sizes.tolist(), strict=True):
            self._runtime.copy_async(target, source, num_bytes, stream)
            self.calls["engine_copies"] += 1

    @staticmethod
    def _bases(pool: CudaPool, direction: str) -> tuple[int, int]:
        host = 0 if pool.host is None else pool.host.address
        return {"offload": (pool.device, host), "onboard": (host, pool.device)}.get(
            direction, (pool.device, pool.device)
        )

    # -- counts -------------------------------------------------------------------------------

    def count(self, plan: Plan) -> None:
        """It is on its way, if there was anything to send."""
        pages = sum(len(piece.src) for piece in plan.pieces)
        if not pages:
            return
        counts = self._counts.setdefault((plan.choice.path, plan.batch.direction), [0, 0, 0])
        for index, more in enumerate((1, pages, pages * self._pools[plan.batch.pool].page_bytes)):
            counts[index] += more

    def counts(self) -> dict[str, dict[str, dict[str, int]]]:
        """{path: {direction: {moves, pages, bytes}}} of all that was sent, in the order of PATHS."""
        found: dict[str, dict[str, dict[str, int]]] = {}
        for path in PATHS:
            for direction in DIRECTIONS:
                if counts := self._counts.get((path, direction)):
                    found.setdefault(path, {})[direction] = dict(zip(("moves", "pages", "bytes"), counts, strict=True))
        return found
