"""The scheduler's way to its managers: the target model's, and a draft model's that shares every decision.

Every call goes to all managers or to none. Lists "per pool" run over the pools of all managers, the target's first.
Of a request that a call refuses nothing changes, in any manager.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from kvpool._core import Allocation, Roster, Started
from kvpool.cache import CacheState, KVCache
from kvpool.manager import KVCacheManager
from kvpool.scheduler.request import Entry
from kvpool.scheduler.step import Step
from kvpool.sizing import decode_slots, window_slots

Work = tuple[Entry, int, int]  # request, tokens, unit

_FAILED = attrgetter("failed")


@dataclass(slots=True)
class Claimed:
    """A first chunk that was looked at. why: "kept", "memory" or "tokens"."""

    entry: Entry
    why: str
    reused: int = 0
    taken: Sequence[int] = ()  # per pool: slots that the claim and its promise took off what was available
    shared: Sequence[int] = ()  # per pool: its pages that others had claimed


class Side:
    """One manager."""

    def __init__(self, manager: KVCacheManager) -> None:
        self.manager = manager
        self.view = Started(manager._core)
        self.config = manager.config
        self.pools = list(manager.config.pools)
        self.slots = [manager.plan.num_slots[pool.name] for pool in self.pools]
        self.tiered = "host" in manager._tiers
        self.decode_slots = [
            decode_slots(pool, self.config)
            if pool.window is not None and self.config.decode_reservation != "none"
            else 0
            for pool in self.pools
        ]

    def cache(self, entry: Entry) -> KVCache:
        """The cache of a started request."""
        return self.manager._caches[entry.request.request_id]

    def claim(self, entries: Sequence[Entry], unit: int | None, budget: int, most: int | None = None) -> list[Claimed]:
        """See `Memory.claim`; reuses at most `most` tokens."""
        given = [(entry.request.token_slice(0, entry.length), *entry.key, entry.spec, most) for entry in entries]
        claims, ids, handles = [], [], []
        for entry, (why, handle, reused, taken, shared) in zip(
            entries, self.view.claim(given, unit, budget), strict=False
        ):
            claims.append(Claimed(entry, why, reused, taken, shared))
            if handle is not None:
                ids.append(entry.request.request_id)
                handles.append(handle)
        if handles:
            self.manager._enter(ids, handles)
        return claims

    def provide(self, work: Sequence[Work], leave: Sequence[int]) -> list[int]:
        """See `Memory.provide`."""
        caches = [self.cache(entry) for entry, _, _ in work]
        entries = [(cache._handle, tokens, unit) for cache, (_, tokens, unit) in zip(caches, work, strict=True)]
        provided, copies = self.view.provide(entries, leave)
        for cache, tokens in zip(caches, provided, strict=True):
            if tokens is None:  # closed by the core: it was only claimed
                cache._note_closed(None)
                self.manager._forget(cache)
        served = [cache._handle for cache, tokens in zip(caches, provided, strict=True) if tokens]
        if served:
            self.manager._make(served, copies)
        return [tokens or 0 for tokens in provided]

    def fitting(self, entry: Entry, tokens: int, unit: int, leave: Sequence[int]) -> int:
        """Most tokens, in multiples of `unit` or all, for which there is room now."""
        (fits,) = self.view.fitting([(self.cache(entry)._handle, tokens, unit)], leave)
        return fits


class Memory:
    """All managers of a scheduler."""

    def __init__(self, manager: KVCacheManager, draft_manager: KVCacheManager | None, chunk: int | None = None) -> None:
        self._chunk = chunk
        self.sides = [Side(manager)] + ([] if draft_manager is None else [Side(draft_manager)])
        self.alone = self.sides[0] if draft_manager is None else None
        self.slots = [slots for side in self.sides for slots in side.slots]
        self.decode_slots = [slots for side in self.sides for slots in side.decode_slots]
        self.reserves = any(self.decode_slots)
        self.nothing = [0] * len(self.slots)
        pools = [(side, pool) for side in self.sides for pool in side.pools]
        self.tokens_per_block = [side.config.tokens_per_block for side, _ in pools]
        self._windowed = [(at, side, pool) for at, (side, pool) in enumerate(pools) if pool.window is not None]
        cores = [side.manager._core for side in self.sides]
        self.roster, self.no_roster = Roster(cores), Roster(cores)
        self._moves = [side.manager._moves for side in self.sides if side.manager._moves is not None]
        # A victim can be suspended to some use only if there is something below every pool.
        self.tiered = all(side.tiered for side in self.sides)

    def names(self) -> list[str]:
        """Pools, with the manager where there are two."""
        if self.alone:
            return [f"pool {pool.name!r}" for pool in self.alone.pools]
        roles = zip(("target", "draft"), self.sides, strict=True)
        return [f"pool {pool.name!r} of the {role} model" for role, side in roles for pool in side.pools]

    def _split(self, per_pool: Sequence[int]) -> list[Sequence[int]]:
        n = len(self.sides[0].pools)
        return [per_pool[:n], per_pool[n:]]

    # -- questions ------------------------------------------------------------------------------

    def pressure(self) -> list[tuple[int, int]]:
        """Per pool: slots that can be had now, slots that come back when what is in flight has ended."""
        if self.alone:
            return self.alone.view.pressure()
        return [one for side in self.sides for one in side.view.pressure()]

    def lacking(self, entry: Entry, tokens: int, leave: Sequence[int]) -> list[int]:
        """Per pool: slots that a started request lacks for so many tokens behind its history."""
        lacks = zip(self.sides, self._split(leave), strict=False)
        return [n for side, leave in lacks for n in side.view.lacking(side.cache(entry)._handle, tokens, leave)]

    def stuck(self) -> list[int]:
        """Per pool: pages on the device that only suspended requests claim and for which the host has no room."""
        return [pages for side in self.sides for pages in side.view.stuck()]

    def fitting(self, entry: Entry, tokens: int, unit: int, leave: Sequence[int]) -> int:
        """As many of `tokens` as there is room for now in every pool, in multiples of `unit` (or all)."""
        for side, least in zip(self.sides, self._split(leave), strict=False):
            tokens = min(tokens, side.fitting(entry, tokens, unit, least))
        return tokens

    def below(self, entry: Entry) -> list[int] | None:
        """Per pool: pages that would move down if the request were suspended; None: one of them finds no room."""
        pages: list[int] = []
        for side in self.sides:
            found = side.view.below(side.cache(entry)._handle)
            if found is None:
                return None
            pages += found
        return pages

    def holds(self, entry: Entry) -> list[tuple[int, int]]:
        """Per pool: live pages of a started request on the device, how many of them nobody else claims."""
        return [both for side in self.sides for both in side.view.holds(side.cache(entry)._handle)]

    def is_fenced(self, entry: Entry) -> bool:
        """Whether a launched step may still touch its pages."""
        return any(side.view.in_flight(side.cache(entry)._handle) for side in self.sides)

    def open(self) -> list[int | str]:
        """Ids that have a cache in some manager."""
        return list(dict.fromkeys(request_id for side in self.sides for request_id in list(side.manager._caches)))

    # -- moves ----------------------------------------------------------------------------------

    def before(self) -> bool:
        """Before the books change: there is room in the movers' queues. See `has_failed`."""
        for side in self.sides:
            moves = side.manager._moves
            if moves is not None and (moves.flying or moves.failed):
                side.manager._before()
        return self.has_failed()

    def after(self) -> None:
        """After they have changed: pages that go down are on their way."""
        for side in self.sides:
            if side.tiered:
                side.manager._after()

    def has_failed(self) -> bool:
        """Whether a move ever failed: else no cache is LOST."""
        return any(map(_FAILED, self._moves))

    def lost(self) -> list[int | str]:
        """Requests with a LOST cache, each once: a move of its pages failed."""
        return list(dict.fromkeys(request_id for side in self.sides for request_id in side.manager.lost()))

    def arrive(self, step: Step) -> None:
        """Every move that pages of a step depend on is over, or known to have failed."""
        for side in self.sides:
            moves = side.manager._moves
            if moves is not None and (moves.flying or moves.failed):
                caches = [side.manager._caches.get(request.request_id) for request in step.requests]
                side.manager._ready([cache for cache in caches if cache is not None and cache._state is None])

    def is_returning(self) -> bool:
        """Whether slots are in flight, or a move is."""
        return any(moves.flying for moves in self._moves) or any(returning for _, returning in self.pressure())

    def has(self, entry: Entry) -> bool:
        """Whether a started request has an open cache in every manager."""
        caches = [side.manager._caches.get(entry.request.request_id) for side in self.sides]
        return all(cache is not None and cache.state is not CacheState.CLOSED for cache in caches)

    def is_closing(self, entry: Entry) -> bool:
        """Whether an earlier cache of this id is closed and still in flight."""
        request_id = entry.request.request_id
        if self.alone:
            return request_id in self.alone.manager._caches
        return any(request_id in side.manager._caches for side in self.sides)

    # -- changes --------------------------------------------------------------------------------

    def claim(self, entries: Sequence[Entry], unit: int | None, budget: int) -> list[Claimed]:
        """Claims for first chunks, in order, until `budget` new tokens are used up; the rest is not looked at.

        A first chunk has `unit` tokens at least, or all (None: always all). What is kept keeps its pages, and its need
        is promised, until it is provided or freed.
        """
        if self.alone:
            return self.alone.claim(entries, unit, budget)
        claims: list[Claimed] = []
        for entry in entries:
            if budget <= 0:
                break
            claims.append(self._claim_both(entry, unit, budget))
            if claims[-1].why == "kept":
                new = entry.length - claims[-1].reused
                budget -= first_chunk(new, budget, unit)
        return claims

    def _claim_both(self, entry: Entry, unit: int | None, budget: int) -> Claimed:
        """Reuse is the smaller of the two matches, cut before any page is provided."""
        tokens = entry.request.token_slice(0, entry.length)
        probes = [side.manager._core.probe(tokens, *entry.key) for side in self.sides]
        most = min(probes)
        while True:
            both: list[Claimed] = []
            for side in self.sides:
                (claimed,) = side.claim([entry], unit, budget, most)
                both.append(claimed)
                if claimed.why != "kept":
                    break
            refused = next((claimed for claimed in both if claimed.why != "kept"), None)
            reused = [claimed.reused for claimed in both]
            if refused is None and min(reused) == max(reused):
                target, draft = both
                return Claimed(entry, "kept", reused[0], [*target.taken, *draft.taken], [*target.shared, *draft.shared])
            self.free([entry])
            if refused is not None:
                return refused
            most = min(reused)

    def provide(self, work: Sequence[Work], leave: Sequence[int]) -> list[int]:
        """Room behind the histories, in order, as much of `tokens` as there is in multiples of `unit` (or all).

        `leave`: per pool, slots that must be left. 0: there is no room for one unit; a cache that was only claimed is
        closed then, another one is as it was. What is provided is ACTIVE.
        """
        if self.alone:
            return self.alone.provide(work, leave)
        return [self._provide_both(*one, leave) for one in work]

    def _provide_both(self, entry: Entry, tokens: int, unit: int, leave: Sequence[int]) -> int:
        sides = list(zip(self.sides, self._split(leave), strict=True))
        tokens = self.fitting(entry, tokens, unit, leave)
        (target, least), (draft, draft_least) = sides
        before = [(side.cache(entry).state, side.cache(entry).capacity) for side, _ in sides]
        if tokens and target.provide([(entry, tokens, tokens)], least)[0]:
            if draft.provide([(entry, tokens, tokens)], draft_least)[0]:
                return tokens
            state, capacity = before[0]
            cache = target.cache(entry)
            if cache.capacity > capacity:
                cache.resize(capacity)
            if state is CacheState.SUSPENDED:
                cache.suspend()
        if any(entry.request.request_id not in side.manager._caches for side in self.sides) or not entry.started:
            self.free([entry])
        return 0

    def allocate(
        self, step: int, tokens: int, places: int, gone: list[int], busy: frozenset[int | str], first: int
    ) -> Allocation:
        """Room for the next tokens of those that generate, the oldest first; see `_core.Roster.allocate`."""
        found = self.roster.allocate(step, tokens, places, gone, busy or None, first)
        work = found.copies
        while work:
            side, handles, copies = work.pop(0)
            try:
                self.sides[side].manager._make(handles, copies)
            except BaseException:
                for other, handles, _ in work:
                    self.sides[other].manager._core.copies_failed(handles)
                raise
        return found

    def enter(self, entry: Entry, shared: Sequence[int]) -> None:
        """A request has started: the roster knows it from here on."""
        request = entry.request
        caches = [side.cache(entry) for side in self.sides]
        self.roster.insert(
            entry.age, request, request.request_id, [(cache, cache._handle) for cache in caches],
            request.output_tokens, request._stops, len(entry.prompt),
            request.max_new_tokens, request.draft_tokens, shared, self.most(entry),
        )  # fmt: skip

    def generates(self, entry: Entry) -> None:
        """From here on only its last token is to be computed."""
        entry.request._generates = True
        self.roster.set_generates(entry.age, self.most(entry, generates=True))

    def most(self, entry: Entry, generates: bool = False) -> list[int]:
        """Per pool: slots that a request can come to hold with chunks of a context, or once it generates."""
        if entry.most is None:
            context = self._most(entry, self._chunk)
            entry.most = (context, self._most(entry, 0) if self._windowed else context)
        return entry.most[generates]

    def _most(self, entry: Entry, chunk: int | None) -> list[int]:
        most = [-(-entry.limit // t) for t in self.tokens_per_block]
        if chunk is not None:
            k = max(chunk, 1 + entry.request.draft_tokens)
            for at, side, pool in self._windowed:
                most[at] = min(most[at], window_slots(pool, side.config, k))
        return most

    def commit(self, entry: Entry, tokens: Any) -> None:
        """Tokens of an ACTIVE request are final, in all managers."""
        for side in self.sides:
            side.manager._core.commit(side.cache(entry)._handle, tokens)

    def suspend(self, entry: Entry) -> None:
        """Gives up the place of a request's pages."""
        for side in self.sides:
            side.cache(entry).suspend()

    def free(self, entries: Sequence[Entry]) -> None:
        """Closes the caches of these requests, those that have one."""
        requests = [entry.request for entry in entries]
        for side in self.sides:
            side.manager.free_requests(requests)

    def caches(self, step: Step) -> list[tuple[KVCacheManager, list[KVCache]]]:
        """Per manager the caches of the requests in a step, the oldest first."""
        caches = self.roster.caches(step.number)
        return [(side.manager, caches[at]) for at, side in enumerate(self.sides)]


def first_chunk(rest: int, budget: int, unit: int | None) -> int:
    """Tokens of a chunk: all that is left, or the largest multiple of the unit within the budget; 0 if none fits."""
    if rest <= budget:
        return rest
    return 0 if unit is None else budget // unit * unit
