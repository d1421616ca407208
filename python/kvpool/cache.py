"""The cache of one request, as its engine sees it.

create ──> SUSPENDED ──resume──> ACTIVE ──resize/commit──> ACTIVE
               ^ └──────suspend────┘ │
               └── close ──> CLOSED <┘
"""

from __future__ import annotations

from enum import StrEnum
from types import TracebackType
from typing import TYPE_CHECKING, Self

from kvpool import _core
from kvpool.arguments import Int32Array, Tokens, count, token_array
from kvpool.errors import LogicError

if TYPE_CHECKING:
    from kvpool.manager import KVCacheManager
    from kvpool.uses import StepUses


class Closing:
    """A context manager that closes."""

    __slots__ = ()

    def close(self) -> None:
        """Give everything back."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class CacheState(StrEnum):
    """Public state of a cache."""

    SUSPENDED = "SUSPENDED"
    ACTIVE = "ACTIVE"
    CLOSED = "CLOSED"
    LOST = "LOST"


class KVCache(Closing):
    """KVCache of one request; made by `KVCacheManager.create`. A context manager that closes.

    One thread at a time: a second one in the same cache gets a `LogicError`. Raises `LogicError` where the state
    forbids a call, ValueError for arguments out of range; both leave everything as it was.
    """

    __slots__ = ("__weakref__", "_handle", "_last", "_lost", "_manager", "_state", "_uses", "_waited", "request_id")

    request_id: int | str

    def __init__(self, manager: KVCacheManager, request_id: int | str, handle: _core.Cache) -> None:
        self._manager = manager
        self._handle = handle
        self._state: CacheState | None = None
        self._last = (0, 0, 0, 0)
        self._lost = False
        self._uses: list[tuple[StepUses, int]] = []  # steps that were begun, and its place in each
        # Who has waited for everything that touches its slots (a stream, or None: the caller), and for which: as
        # `Core.fresh_slots` has it.
        self._waited: tuple[object, int, int] = (None, 0, 0)
        self.request_id = request_id

    def _seen_by(self, stream: object) -> tuple[_core.Cache, int, int]:
        by, entries, alterations = self._waited
        # A wrapper may be made anew for each call; CuPy's are comparable with their like only.
        same = by is None or by is stream or (type(by) is type(stream) and by == stream)
        return self._handle, entries if same else 0, alterations

    def _info(self) -> tuple[int, int, int, int]:
        if self._state is CacheState.CLOSED:
            return self._last
        info = self._manager._core.info(self._handle)
        return self._last if info is None else info[1:]  # None: another thread has just closed it

    @property
    def state(self) -> CacheState:
        """SUSPENDED, ACTIVE, CLOSED; or LOST: a page of it did not arrive, it can only be closed."""
        if self._state is CacheState.CLOSED:
            return CacheState.CLOSED
        if self._lost:
            return CacheState.LOST
        info = self._manager._core.info(self._handle)
        return CacheState.CLOSED if info is None else CacheState(info[0])

    @property
    def num_reused_tokens(self) -> int:
        """Prompt tokens found in the tree at creation (less after a resume without room for the partial block)."""
        return self._info()[0]

    @property
    def capacity(self) -> int:
        """Tokens with storage."""
        return self._info()[1]

    @property
    def history_length(self) -> int:
        """Tokens before the next step's input."""
        return self._info()[2]

    @property
    def num_committed_tokens(self) -> int:
        """Final tokens."""
        return self._info()[3]

    def resume(self) -> bool:
        """All live pages on the device, the partial block copied; ACTIVE. True if it already was. LOST: False."""
        self._manager._before()
        if self._lost and self._state is None:
            return False
        resumed, copies = self._manager._core.resume(self._handle)
        if copies:
            self._manager._make([self._handle], copies)
        self._manager._after()
        return resumed

    def suspend(self) -> None:
        """Give up the place: SUSPENDED. Its pages may move down to the host; without one they stay."""
        self._manager._before()
        self._manager._core.suspend([self._handle])
        self._manager._after()

    def resize(self, capacity: int, history_length: int | None = None) -> bool:
        """Set capacity and history (tokens) in all pools; False: not enough room, nothing changed."""
        capacity = count(capacity, "capacity")
        if history_length is not None:
            history_length = count(history_length, "history_length")
        self._manager._before()
        self._usable("resize")
        resized = self._manager._core.resize(self._handle, capacity, history_length)
        self._manager._after()
        return resized

    def _usable(self, what: str) -> None:
        if self._lost and self._state is None:
            raise LogicError(
                f"{what}: the cache of request {self.request_id!r} is LOST, a move of its pages failed: close it and "
                "compute again"
            )

    def commit(self, tokens: Tokens) -> bool:
        """Declare the next tokens final; full blocks enter the tree. True if a block table entry changed.

        Only tokens whose keys and values are written. ValueError past the capacity; LogicError for
        prompt tokens other than those given at creation.
        """
        final = token_array(tokens)
        manager = self._manager
        if manager._moves is not None and (manager._moves.flying or manager._moves.failed):
            manager._ready([self])  # nothing is final before the pages it depends on have arrived
        self._usable("commit")
        changed = manager._core.commit(self._handle, final)
        manager._after()
        return changed

    def block_table(self, pool: str, fill: int = 0) -> Int32Array:
        """Slots of this cache in `pool`: int32, ceil(capacity / tokens_per_block) entries, stale ones `fill`."""
        out: Int32Array = self._manager.block_tables([self], pool, fill=fill)[0]
        return out

    def close(self) -> None:
        """Give everything back; full committed blocks stay cached. Twice is a no-op."""
        if self._state is CacheState.CLOSED:
            return
        manager = self._manager
        free, last = manager._core.close_one(self._handle)  # not `_close`: its lists cost a tenth of a hot request
        self._note_closed(last)
        if free:
            manager._forget(self)
        if self._lost:
            manager._bury([self])

    def _note_closed(self, last: tuple[int, int, int, int] | None) -> None:
        """The core has closed it and forgets its lengths. None: it had been closed before."""
        if last is not None:
            self._last = last
        self._state = CacheState.CLOSED

    def _take_use(self) -> tuple[StepUses, int] | None:
        """The step that was begun first, and its place in it."""
        try:
            return self._uses.pop(0)
        except IndexError:  # nothing was written down
            return None

    def __repr__(self) -> str:
        return f"<kvpool cache of request {self.request_id!r}: {self.state.value}>"
