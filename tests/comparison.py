"""The comparison of a manager and the reference model after each operation; part of `Pair`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from kvpool import KVCache, KVCacheManager, Scope
from model import DEVICE, HOST, Model, ModelCache, Node, Page

IntArray = npt.NDArray[Any]


class Step:
    """A launched step over one cache, with what it may still read."""

    def __init__(self, pair: Comparison, real: KVCache, model: ModelCache) -> None:
        self.caches = real, model
        due = pair.contents(model.root, model.committed)
        self.seen = [pair.places(pool, real.block_table(name), due) for pool, name in enumerate(pair.names)]


class Comparison:
    real: KVCacheManager
    model: Model
    t: int
    names: list[str]
    tiers: tuple[str, ...]
    values: dict[str, list[IntArray]]
    open: list[tuple[KVCache, ModelCache]]
    created: list[ModelCache]
    steps: list[Step]
    told: Counter[tuple[str, str, int]]
    parents: dict[int, int | None]
    last_event: int
    numbers: dict[tuple[object, int], int]
    operations: int
    evicted: int
    dropped: int
    offloaded: int
    onboarded: int

    count: Callable[..., None]
    sequence: Callable[[Node], list[int]]

    # -- contents of pages ----------------------------------------------------------------------

    def contents(self, root: tuple[object, int], tokens: Sequence[int]) -> list[int]:
        """What each position of a sequence must hold: a number of its scope and whole prefix, never 0."""
        numbers, at, values = self.numbers, 0, []
        for token in tokens:
            at = numbers.setdefault((at or root, token), len(numbers) + 1)
            values.append(at)
        return values

    def write(self, real: KVCache, model: ModelCache, tokens: list[int]) -> None:
        """ "Compute" the pages of the next tokens."""
        done = len(model.committed)
        self.settle()
        due = self.contents(model.root, model.committed + tokens)
        for pool, name in enumerate(self.names):
            at, slots, values = self.places(pool, real.block_table(name), due)
            new = at >= done
            self.values[DEVICE][pool][slots[new], at[new] % self.t] = values[new]

    def settle(self) -> None:
        """All moves so far are over: pages are read and written here without a step around it."""
        self.real.pages(self.names[0])

    def places(self, pool: int, table: IntArray, contents: list[int]) -> tuple[IntArray, IntArray, IntArray]:
        """All positions of a sequence that have a page; the page's slot and the due contents of each."""
        slots = np.repeat(table, self.t)[: len(contents)]
        (at,) = slots.nonzero()
        return at, slots[at], np.array(contents, np.int64)[at] * 8 + pool

    # -- comparison -----------------------------------------------------------------------------

    def entries(self, model: ModelCache) -> int:
        return sum(page is not None for row in model.table for page in row)

    def compare(self) -> None:
        """Everything that can be seen is as the model has it, and no page holds a wrong byte."""
        model = self.model
        self.settle()
        self.real.check()
        stats = self.real.stats()
        for pool, name in enumerate(self.names):
            assert tuple(stats.pools[name]) == self.tiers
            for tier in self.tiers:
                books = {what: n for what, n in stats.pools[name][tier].items() if what != "peak"}
                assert books == model.books(tier, pool), f"{name} on the {tier}: {books}, due {model.books(tier, pool)}"
                self.count("fenced", books["fenced"])
        assert not model.told, "the model moved less"
        counted = (model.evicted, model.dropped, model.offloaded, model.onboarded)
        assert (stats.evicted, stats.dropped, stats.offloaded, stats.onboarded) == counted
        assert self.real.available_tokens() == model.available_tokens()
        prompts = [len(c.prompt) for c in self.created]
        blocks = sum(-(-prompt // self.t) for prompt in prompts)
        assert (stats.requests, stats.prompt_tokens, stats.prompt_blocks) == (len(prompts), sum(prompts), blocks)
        reused = [c.reused for c in self.created]
        blocks = sum(tokens // self.t for tokens in reused)
        assert (stats.reused_tokens, stats.reused_blocks) == (sum(reused), blocks)
        self.compare_caches()
        self.compare_steps()
        self.count("evicted", model.evicted - self.evicted)
        self.count("offloaded", model.offloaded - self.offloaded)
        self.count("onboarded", model.onboarded - self.onboarded)
        if model.dropped > self.dropped:
            self.compare_tree()
        if (model.evicted, model.dropped, model.onboarded) != (self.evicted, self.dropped, self.onboarded) or (
            self.operations % 8 == 0
        ):
            self.compare_events()
            self.compare_contents()
        self.evicted, self.dropped, self.offloaded, self.onboarded = counted

    def compare_caches(self) -> None:
        slot_of: list[dict[Page, int]] = [{} for _ in self.names]
        for real, model in self.open:
            seen = (real.state, real.num_reused_tokens, real.capacity, real.history_length, real.num_committed_tokens)
            assert seen == (model.state, model.reused, model.capacity, model.history, len(model.committed))
            if model.state != "ACTIVE":
                continue
            contents = self.contents(model.root, model.committed)
            for pool, name in enumerate(self.names):
                table = real.block_table(name)
                assert [slot != 0 for slot in table] == [page is not None for page in model.table[pool]], name
                for slot, page in zip(table.tolist(), model.table[pool], strict=True):
                    if page is not None:
                        self.count("shared", page in slot_of[pool])
                        assert page.slot in (0, slot), "a page is where no move brought it"
                        page.slot = slot
                        assert slot_of[pool].setdefault(page, slot) == slot, "two slots for one shared page"
                at, slots, due = self.places(pool, table, contents)
                assert (self.values[DEVICE][pool][slots, at % self.t] == due).all(), (
                    f"wrong byte: {name} of r{real.request_id}"
                )
                self.count("verified", len(due))
        for pages in slot_of:
            assert len(set(pages.values())) == len(pages), "two pages in one slot"

    def compare_steps(self) -> None:
        """What a launched step reads stays as it was until the step ends.

        Not so pages of the tree that the cache's history has left behind since: those have no fence.
        """
        for step in self.steps:
            real, model = step.caches
            for pool, (at, slots, due) in enumerate(step.seen):
                changed = at[self.values[DEVICE][pool][slots, at % self.t] != due]
                row = model.table[pool][: len(model.nodes)]
                kept = [i for i in (changed // self.t).tolist() if i >= len(row) or row[i] is not None]
                assert not kept, f"{self.names[pool]} of r{real.request_id} changed in flight"
                self.count("step verified", len(due) - len(changed))

    def compare_contents(self) -> None:
        """Every page of the tree and of SUSPENDED caches has its bytes, on its tier."""
        paths = [
            (node.depth, self.contents(node.root, self.sequence(node)), node.pages) for node in self.model.blocks()
        ]
        for _, model in self.open:
            if model.state == "SUSPENDED":
                due = self.contents(model.root, model.committed)
                whole = range(len(model.nodes), len(model.committed) // self.t)
                paths += [(i, due, [row[i] for row in model.table]) for i in whole]
        self.real.pages(self.names[0])  # all moves are over
        for i, due, pages in paths:
            for pool, page in enumerate(pages):
                if page is not None:
                    words = np.array(due[i * self.t : (i + 1) * self.t]) * 8 + pool
                    seen = self.values[page.tier][pool][page.slot - (page.tier == HOST)]
                    assert (seen == words).all(), f"wrong byte: {self.names[pool]}, {page}"
                    self.count("verified on the host", page.tier == HOST)

    def compare_events(self) -> None:
        """The events so far give exactly the pages of the tree on each tier, each with its block's parent."""
        for event in self.real.drain_events():
            assert event.number == self.last_event + 1
            self.last_event = event.number
            self.told[event.tier, event.pool, event.key] += 1 if event.kind != "removed" else -1
            if event.kind == "moved":
                self.told[DEVICE if event.tier == HOST else HOST, event.pool, event.key] -= 1
            if event.kind == "stored":
                self.parents[event.key] = event.parent
            self.count("event")
        due = Counter[tuple[str, str, int]]()
        for node in self.model.blocks():
            if any(node.pages):
                (lora, _, salt), epoch = node.root
                keys = self.real.block_keys(self.sequence(node), Scope(lora, salt, epoch))
                assert self.parents[keys[-1]] == (keys[-2] if len(keys) > 1 else None)
                places = zip(self.names, node.pages, strict=True)
                due.update((page.tier, name, keys[-1]) for name, page in places if page)
        assert +self.told == due
        assert not -self.told

    def compare_tree(self) -> None:
        """After pages were dropped: the same leaves are left."""
        for node in self.model.blocks():
            if not any(child.tokens for child in self.model.children(node)):
                (lora, _, salt), epoch = node.root
                tokens = [*self.sequence(node), 0]
                found = self.model.match(tokens, node.root)[0]
                assert self.real.probe(tokens, Scope(lora, salt, epoch)) == found, tokens
                self.count("tree probed")
                self.count("gap in the tree", None in node.pages)
