"""The operations of the random tests that work on several caches at once; part of `Pair`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from kvpool import AddRequest, KVCache, KVCacheManager, Retention, Scope
from model import Model, ModelCache

Entry = tuple[int, int, tuple[int, ...], int]  # like, keep, then, scope


@dataclass
class Request:
    """What the manager reads of a request."""

    request_id: int
    tokens: list[int]
    output_tokens: list[int]
    scope: Scope | None = None
    retention: Retention | None = None
    draft_tokens: int = 0
    max_new_tokens: int = 1


class Batches:
    real: KVCacheManager
    model: Model
    t: int
    max_seq_len: int | None
    open: list[tuple[KVCache, ModelCache]]
    created: list[ModelCache]
    names: list[str]
    tell: Callable[[str], None]
    did: Counter[str]

    tokens: Callable[..., list[int]]
    scope: Callable[..., tuple[Scope, tuple[object, ...]]]
    rules: Callable[..., Any]
    name: Callable[[], int]
    count: Callable[..., None]
    settle: Callable[[], None]

    def add_batch(self, batch: tuple[Entry, ...], retention: Any, lasting: Any) -> None:
        rules, ranges, decode = self.rules(retention, lasting)
        given, models = [], []
        for like, keep, then, scope in batch:
            tokens, (asked, _) = self.tokens(like, keep, then), self.scope(scope, 0)
            given.append(AddRequest(self.name(), tokens, asked, rules))
        self.tell(f"manager.add_batch({given})")
        reals = self.real.add_batch(given)
        for request, (_, _, _, scope) in zip(given, batch, strict=True):
            root = (self.scope(scope, 0)[1], self.model.epoch)
            models.append(self.model.claim_work(list(request.tokens), root, ranges, decode, None, promised=False))
        done = []
        for model in models:
            assert model is not None
            done.append(self.model.provide(model, len(model.prompt), len(model.prompt)))
        for real, model, ok in zip(reals, models, done, strict=True):
            assert (real is not None) is (ok is True)
            assert model is not None
            if real is not None:
                self.model.provided(model)
                self.created.append(model)
                self.open.append((real, model))
                self.count("batch reused", model.reused)
        self.count("batch refused", reals.count(None))
        self.model.coming.clear()

    def claim(self, batch: tuple[Entry, ...], least: int | None, retention: Any, lasting: Any) -> None:
        rules, ranges, decode = self.rules(retention, lasting)
        given = []
        for like, keep, then, scope in batch:
            tokens, (asked, _) = self.tokens(like, keep, then), self.scope(scope, 0)
            cut = len(tokens) // 2
            given.append(Request(self.name(), tokens[:cut], tokens[cut:], asked, rules))
        self.tell(f"manager.claim_contexts({given}, {least})")
        reused = self.real.claim_contexts([(request, least) for request in given])
        self.settle()  # what it moved down is submitted by the next call otherwise
        for request, (_, _, _, scope), found in zip(given, batch, reused, strict=True):
            root = (self.scope(scope, 0)[1], self.model.epoch)
            tokens = request.tokens + request.output_tokens
            model = self.model.claim_work(tokens, root, ranges, decode, least, promised=True)
            assert found == (None if model is None else model.reused)
            if model is not None:
                self.open.append((self.real.cache(request.request_id), model))
                self.created.append(model)
            self.count("claim kept", model is not None)
            self.count("claim refused", model is None)

    def provide(self, ats: tuple[int, ...], grow: int) -> None:
        pairs = [self.open[at] for at in dict.fromkeys(at % len(self.open) for at in ats)]
        entries = []
        for real, model in pairs:
            tokens = grow if self.max_seq_len is None else min(grow, self.max_seq_len - model.history)
            entries.append((Request(int(real.request_id), model.prompt, []), tokens))
        self.tell(f"manager.provide_contexts({[(r.request_id, tokens) for r, tokens in entries]})")
        promised = [model.in_work and self.model.blocks_of(model, model.history + tokens) for (_, tokens), (_, model) in
                    zip(entries, pairs, strict=True)]  # fmt: skip
        promised = [
            bool(blocks) and all(self.model.need(model, p, blocks) <= model.promise[p] for p in range(len(self.names)))
            for blocks, (_, model) in zip(promised, pairs, strict=True)
        ]
        done = self.real.provide_contexts(entries)
        expected = []
        for (_, tokens), (_, model) in zip(entries, pairs, strict=True):
            expected.append(self.model.provide(model, tokens, 2**62))
        assert done == [ok is True for ok in expected]
        assert all(ok for ok, was in zip(done, promised, strict=True) if was), "promised and not delivered"
        self.count("promise kept", sum(promised))
        self.count("provide refused", done.count(False))
        for (real, model), ok in zip(pairs, expected, strict=True):
            if ok:
                self.model.provided(model)
            elif ok is None:
                self.gone(real, model)
        self.model.coming.clear()

    def gone(self, real: KVCache, model: ModelCache) -> None:
        """A claim in work that left no trace."""
        assert real.state == "CLOSED"
        self.open.remove((real, model))
        self.created = [c for c in self.created if c is not model]

    def generate(self, ats: tuple[int, ...], drafts: int, most: int) -> None:
        pairs = [self.open[at] for at in dict.fromkeys(at % len(self.open) for at in ats)]
        requests = []
        for real, model in pairs:
            room = most if self.max_seq_len is None else min(most, self.max_seq_len - len(model.prompt) + 1)
            request = Request(int(real.request_id), model.prompt, [], draft_tokens=drafts, max_new_tokens=room)
            requests.append(request)
        self.tell(f"manager.allocate_generation({[(r.request_id, drafts, r.max_new_tokens) for r in requests]})")
        count = self.real.allocate_generation(requests)
        done: list[ModelCache] = []
        for (real, model), request in zip(pairs, requests, strict=True):
            limit = max(0, len(request.tokens) + request.max_new_tokens - 1)
            ok = self.model.provide(model, 1 + drafts, limit)
            if ok is None:
                self.gone(real, model)
            if not ok:
                self.count("generation refused")
                break
            done.append(model)
        for model in done:
            self.model.provided(model)
        self.model.coming.clear()
        assert count == len(done)
        self.count("generated", count)
