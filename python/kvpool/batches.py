"""The manager's calls by batch: claim everything, then provide.

All claims of a batch are taken before any slot, so nothing that one request needs can evict what another one was
promised. Each call is one call into the core, whatever the number of requests.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from kvpool._core import Cache, Core
from kvpool.arguments import ByteArray, Int32Array, Tokens, count, retention_spec, scope_key, token_array
from kvpool.cache import CacheState, KVCache
from kvpool.config import CacheConfig, Retention, Scope
from kvpool.errors import ConfigError, LogicError
from kvpool.moves import BadPage, Moves

if TYPE_CHECKING:
    from kvpool.manager import KVCacheManager

_NO_LIMIT = 2**63 - 1


@dataclass(frozen=True, slots=True)
class AddRequest:
    """One entry of `KVCacheManager.add_batch`: what `create` takes."""

    request_id: int | str
    tokens: Tokens
    scope: Scope | None = None
    retention: Retention | None = None


class Batches:
    """Part of `KVCacheManager`: several caches at once.

    "Request" is any object with `request_id` and `tokens`; of it are read `output_tokens` (they follow `tokens`),
    `lora_id`, `scope`, `retention`, `draft_tokens` and `max_new_tokens` where it has them. The order of a list is the
    order of precedence. An exception leaves all caches as they were.
    """

    config: CacheConfig
    _core: Core
    _caches: dict[int | str, KVCache]
    _pages: dict[str, ByteArray]
    _host_pages: dict[str, ByteArray]
    _closed: bool
    _moves: Moves | None

    def _open(self) -> None:
        if self._closed:
            raise _is_closed()

    # -- the books of requests ------------------------------------------------------------------

    def _check_all_new(self, request_ids: Sequence[int | str]) -> None:
        """They are ids, all different, and have no caches."""
        for request_id in request_ids:
            if checked_id(request_id) in self._caches:
                raise taken(request_id)
        _check_different(request_ids)

    def _enter(self, request_ids: Sequence[int | str], handles: Sequence[Cache | None]) -> list[KVCache | None]:
        """Caches for the handles, under their ids."""
        self._after()
        manager = cast("KVCacheManager", self)
        caches = [
            None if handle is None else KVCache(manager, request_id, handle)
            for request_id, handle in zip(request_ids, handles, strict=True)
        ]
        made = [cache for cache in caches if cache is not None]
        self._register(made)
        self._check_lost(made)
        return caches

    def _register(self, made: Sequence[KVCache]) -> None:
        """New caches under their ids, all or none: another thread may have been faster, or have closed the manager."""
        entered = list(itertools.takewhile(lambda one: self._caches.setdefault(one.request_id, one) is one, made))
        if len(entered) == len(made) and not self._closed:  # `close` sets it before it looks for the ids
            return
        self._close(entered)
        others = made[len(entered) :]
        self._core.close([cache._handle for cache in others])
        raise taken(others[0].request_id) if others else _is_closed()

    def _forget(self, cache: KVCache) -> None:
        """Its id is free: nobody can have put another one there. Once per cache, by whom the core told so."""
        self._caches.pop(cache.request_id, None)

    def _close(self, caches: Sequence[KVCache]) -> None:
        for cache, (free, last) in zip(caches, self._core.close([cache._handle for cache in caches]), strict=True):
            cache._note_closed(last)
            if free:
                self._forget(cache)
        self._bury(caches)

    def _bury(self, caches: Iterable[KVCache]) -> None:
        """What only LOST caches claimed goes with them."""
        if self._moves is not None and any(cache._lost for cache in caches):
            self._moves.recorder.drop_lost()
            self._moves.retire()

    def _cache_of(self, request: Any) -> KVCache:
        request_id = _id_of(request)
        cache = self._caches.get(request_id)
        if cache is None or cache._state is CacheState.CLOSED:
            raise LogicError(f"request_id: {request_id!r} has no cache; claim_contexts makes one")
        return cache

    def _found(self, requests: Iterable[Any]) -> list[KVCache]:
        """The open caches of those requests that have one, each once."""
        found = [self._caches.get(_id_of(request)) for request in requests]
        return list(dict.fromkeys(cache for cache in found if cache is not None and cache._state is None))

    # -- copies ---------------------------------------------------------------------------------

    def _copy(self, copies: Sequence[tuple[int, bool, int, int]]) -> None:
        if self._moves is not None:
            self._moves.make(copies)

    def _make(self, handles: list[Cache], copies: Sequence[tuple[int, bool, int, int]]) -> None:
        """The copies for these caches; if they fail the caches are as before.

        The core learns of the copies before anybody can report that one of them has failed.
        """
        with contextlib.nullcontext() if self._moves is None else self._moves.unreported():
            try:
                self._copy(copies)
            except BaseException:
                self._core.copies_failed(handles)
                raise
            self._core.copies_done(handles)

    # -- moves ----------------------------------------------------------------------------------

    def _before(self) -> None:
        """Before the books change: there is room in the mover's queues, and what has failed is known."""
        if self._moves is not None and (self._moves.flying or self._moves.failed):
            self._moves.before()
            self._note_losses()
            self._moves.retire()

    def _after(self) -> None:
        """After the books have changed: what the core decided to move down is submitted."""
        if self._moves is not None and self._host_pages:
            self._moves.flush()

    def _ready(self, caches: Sequence[KVCache], stream: object = None, *, launch: bool = False) -> None:
        """No move touches the slots of these ACTIVE caches any more.

        launch: they are about to be computed on; steps that were launched before, on whatever stream, come first. Slots
        for which the stream, or the caller, has waited are not looked at again: nothing but steps touches them since.
        """
        moves = self._moves
        behind = launch and moves is not None and moves.launched
        if moves is None or not (self._host_pages or moves.flying or moves.failed or behind):
            return
        self._after()
        if moves.flying or moves.stuck or behind:
            now, fresh = self._core.fresh_slots([cache._seen_by(stream) for cache in caches])
            if any(fresh):
                moves.wait([(pool, np.frombuffer(slots, np.int32)) for pool, slots in enumerate(fresh)], stream)
            for cache, seen in zip(caches, now, strict=True):
                cache._waited = (stream, *seen)
        self._note_losses()

    def _ready_in_steps(self, caches: Sequence[KVCache]) -> None:
        """As `_ready`; on a GPU the stream of the step that a cache is begun for waits in the caller's place."""
        if self._moves is None or not self._moves.on_gpu:
            self._ready(caches)
            return
        streams: dict[int, tuple[object, list[KVCache]]] = {}
        for cache in caches:
            stream = cache._uses[-1][0].stream if cache._uses else None
            streams.setdefault(id(stream), (stream, []))[1].append(cache)
        for stream, group in streams.values():
            self._ready(group, stream)

    def _note_losses(self) -> None:
        """Caches that claim or own a page that did not arrive are LOST; blocks that nobody claims are dropped."""
        if self._moves is not None and self._moves.has_bad():
            self._moves.report(self._lose)
            self._moves.retire()

    def _lose(self, moves: Moves, bad: list[BadPage]) -> None:
        caches = [cache for cache in list(self._caches.values()) if cache._state is None]
        for cache, hit in zip(caches, moves.recorder.lose([cache._handle for cache in caches], bad), strict=True):
            if hit:  # never set back: another thread may have set it meanwhile
                cache._lost = True
        self._check_lost(list(self._caches.values()))  # those that came while it looked

    def _check_arrived(self, caches: Iterable[KVCache], what: str) -> None:
        """LogicError if a page of one of them is known not to have arrived.

        Not in a step that was begun for a stream of a GPU: it is on its way, and `update` discards what it yields.
        """
        if self._moves is not None and self._moves.failed:
            for cache in caches:
                if not (self._moves.on_gpu and cache._uses and cache._uses[-1][0].stream is not None):
                    cache._usable(what)

    def _check_lost(self, caches: Iterable[KVCache]) -> None:
        """New caches may have matched blocks that another thread was just losing."""
        if self._moves is not None and self._moves.failed:
            for cache in caches:
                if cache._state is None and self._moves.recorder.is_lost(cache._handle):
                    cache._lost = True

    def lost(self) -> list[int | str]:
        """Requests whose cache is LOST, and not closed yet: a move of its pages failed."""
        self._before()
        return [cache.request_id for cache in list(self._caches.values()) if cache._lost and cache._state is None]

    def _provide(self, caches: Sequence[tuple[KVCache, int, int]], stop: bool = False) -> list[bool]:
        """Room for (cache, tokens behind its history, most tokens in all), and the copies."""
        self._before()
        if any(cache._lost for cache, _, _ in caches):
            return self._provide_others(caches, stop)
        entries = [(cache._handle, tokens, most) for cache, tokens, most in caches]
        provided, copies = self._core.provide(entries, stop)
        for (cache, _, _), done in zip(caches, provided, strict=False):
            if done is None:  # closed by the core: it was only claimed
                cache._note_closed(None)
                self._forget(cache)
        self._make([handle for (handle, _, _), done in zip(entries, provided, strict=False) if done], copies)
        self._after()
        return [done is True for done in provided]

    def _provide_others(self, caches: Sequence[tuple[KVCache, int, int]], stop: bool) -> list[bool]:
        """As `_provide`; False for those that are LOST: what was only claimed is closed, others stay as they are."""
        lost = [cache._lost for cache, _, _ in caches]
        if stop:
            first = lost.index(True)
            provided = self._provide(caches[:first], stop)
            self._close_claims([cache for cache, _, _ in caches[first : first + all(provided)]])
            return provided
        self._close_claims([cache for (cache, _, _), gone in zip(caches, lost, strict=True) if gone])
        done = iter(self._provide([entry for entry, gone in zip(caches, lost, strict=True) if not gone]))
        return [not gone and next(done) for gone in lost]

    def _close_claims(self, caches: Sequence[KVCache]) -> None:
        """Those that a batch has claimed and not provided are closed."""
        in_work = self._core.in_work([cache._handle for cache in caches])
        self._close([cache for cache, claimed in zip(caches, in_work, strict=True) if claimed])

    # -- caches ---------------------------------------------------------------------------------

    def add_batch(self, requests: Iterable[AddRequest]) -> list[KVCache | None]:
        """Caches ready to run: ACTIVE, capacity = all tokens. None where memory did not suffice.

        All matches are claimed first, then slots are given in order; a claim that finds no room is released before the
        next one is served. Two equal prompts that nobody has cached share nothing until their commits.
        """
        self._open()
        given = _listed(requests, "requests")
        for request in given:
            if not isinstance(request, AddRequest):
                raise ValueError(f"requests: {request!r} is not a kvpool.AddRequest")
        ids = [request.request_id for request in given]
        self._check_all_new(ids)
        claims = [(token_array(r.tokens), *scope_key(r.scope), retention_spec(r.retention), None) for r in given]
        caches = self._enter(ids, self._core.claim(claims, False))
        lengths = [len(tokens) for tokens, *_ in claims]
        entries = [(cache, n, n) for cache, n in zip(caches, lengths, strict=True) if cache is not None]
        try:
            provided = self._provide(entries)
        except BaseException:
            self._close([cache for cache, _, _ in entries if cache._state is None])
            raise
        return [cache if done else None for (cache, _, _), done in zip(entries, provided, strict=True)]

    # -- scheduling -----------------------------------------------------------------------------

    def claim_contexts(self, requests: Iterable[tuple[Any, int | None]]) -> list[int | None]:
        """Phase 1, (request, fewest new tokens worth a start; None: all): reused tokens; takes no slot.

        A claim is kept only if it, its need and all kept before it fit together; else None, released at once. What is
        kept makes a cache whose pages stay, and whose need is promised, until it is provided or freed. LogicError for
        a request that has a cache.
        """
        self._open()
        given = _pairs(requests)
        ids = [_id_of(request) for request, _ in given]
        self._check_all_new(ids)
        claims = [
            (
                _context(request),
                *scope_key(scope_of(request)),
                retention_spec(getattr(request, "retention", None)),
                None if least is None else count(least, "min_tokens"),
            )
            for request, least in given
        ]
        caches = self._enter(ids, self._core.claim(claims, True))
        return [None if cache is None else cache.num_reused_tokens for cache in caches]

    def provide_contexts(self, requests: Iterable[tuple[Any, int]]) -> list[bool]:
        """Phase 2, (request, tokens): ACTIVE, capacity = max(capacity, history_length + tokens).

        False: a first chunk's cache is closed, a later one's is left as it was. More than what was claimed is taken
        only from what the claims behind it leave over.
        """
        self._open()
        given = [(request, count(tokens, "num_tokens")) for request, tokens in _pairs(requests)]
        _check_different([_id_of(request) for request, _ in given])
        return self._provide([(self._cache_of(request), tokens, _NO_LIMIT) for request, tokens in given])

    def allocate_generation(self, requests: Iterable[Any]) -> int:
        """How many from the front have room for their next token and drafts, resumed if need be.

        capacity = max(capacity, min(history_length + 1 + draft_tokens, len(tokens) + max_new_tokens - 1)); repeating
        adds nothing.
        """
        self._open()
        given = _listed(requests, "requests")
        _check_different([_id_of(request) for request in given])
        entries = []
        for request in given:
            most = getattr(request, "max_new_tokens", None)
            limit = _NO_LIMIT if most is None else len(_read(request, "tokens")) + count(most, "max_new_tokens") - 1
            drafts = count(getattr(request, "draft_tokens", 0), "draft_tokens")
            entries.append((self._cache_of(request), 1 + drafts, max(0, limit)))
        return sum(self._provide(entries, stop=True))

    def suspend_requests(self, requests: Iterable[Any]) -> None:
        """Suspend the caches of these requests, in order; one that has none is passed over."""
        self._open()
        self._before()
        self._core.suspend([cache._handle for cache in self._found(_listed(requests, "requests"))])
        self._after()

    def free_requests(self, requests: Iterable[Any]) -> None:
        """Close the caches of these requests, in order; one that has none is passed over."""
        self._open()
        self._close(self._found(_listed(requests, "requests")))

    # -- the same for one request -----------------------------------------------------------------

    def prepare_context(self, request: Any) -> bool:
        """Claim the request's match and resume; one that has a cache is resumed. False: not enough room."""
        self._open()
        if found := self._found([request]):
            return found[0].resume()
        if self.claim_contexts([(request, 0)]) == [None]:
            return False
        return self.provide_contexts([(request, 0)]) == [True]

    def resize_context(self, request: Any, num_tokens: int) -> bool:
        """Room for `num_tokens` behind the history; as `provide_contexts`."""
        return self.provide_contexts([(request, num_tokens)]) == [True]

    def try_allocate_generation(self, request: Any) -> bool:
        """As `allocate_generation`."""
        return self.allocate_generation([request]) == 1

    def suspend_request(self, request: Any) -> bool:
        """Suspend the request's cache. False: it has none."""
        found = bool(self._found([request]))
        self.suspend_requests([request])
        return found

    def free_request(self, request: Any) -> bool:
        """Close the request's cache. False: it has none."""
        found = bool(self._found([request]))
        self.free_requests([request])
        return found

    def is_request_active(self, request_id: int | str) -> bool:
        """Whether the request has a cache that is ACTIVE."""
        self._open()
        cache = self._caches.get(request_id)
        return cache is not None and cache.state is CacheState.ACTIVE


def _listed(items: Iterable[Any], name: str) -> list[Any]:
    if not isinstance(items, Iterable) or isinstance(items, str | bytes):
        raise ValueError(f"{name}: {items!r} is not a list")
    return list(items)


def _pairs(items: Iterable[Any]) -> list[tuple[Any, Any]]:
    """(request, number) each."""
    pairs = _listed(items, "requests")
    for pair in pairs:
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise ValueError(f"requests: {pair!r} is not a pair (request, tokens)")
    return pairs


def _read(request: Any, name: str) -> Any:
    try:
        return getattr(request, name)
    except AttributeError:
        raise ValueError(f"requests: {request!r} has no {name}") from None


def _id_of(request: Any) -> int | str:
    return checked_id(_read(request, "request_id"))


def checked_id(request_id: Any) -> int | str:
    """A request's id: int or str."""
    if isinstance(request_id, bool) or not isinstance(request_id, (int, str)):
        raise ValueError(f"request_id: {request_id!r} is neither int nor str")
    return request_id


def _is_closed() -> LogicError:
    return LogicError("the manager is closed")


def taken(request_id: int | str) -> LogicError:
    """The error of a second cache for a request."""
    return LogicError(f"request_id: {request_id!r} has a cache already; close it first")


def _check_different(request_ids: Sequence[Hashable]) -> None:
    if len(set(request_ids)) < len(request_ids):
        twice = next(one for one in request_ids if request_ids.count(one) > 1)
        raise LogicError(f"request_id: {twice!r} is listed twice; list each request once")


def _context(request: Any) -> Int32Array:
    """The tokens of a request that attention has to know: its prompt and what it has generated."""
    tokens = token_array(_read(request, "tokens"))
    generated = token_array(getattr(request, "output_tokens", ()), "output_tokens")
    return np.concatenate([tokens, generated]) if len(generated) else tokens


def scope_of(request: Any) -> Scope | None:
    scope, lora_id = getattr(request, "scope", None), getattr(request, "lora_id", None)
    if lora_id is None or not (scope is None or isinstance(scope, Scope)):
        return scope
    if scope is None:
        return Scope(lora_id=lora_id)
    if scope.lora_id not in (None, lora_id):
        raise ConfigError(
            f"scope.lora_id: {scope.lora_id!r} is not the request's lora_id = {lora_id!r}; give one of them"
        )
    return Scope(lora_id, scope.salt, scope.epoch)
