"""Reference model of tree and caches on two tiers: slow, by scanning, obviously correct.

The life of a cache, batches, and what can be seen; model_tree.py has matching, model_memory.py eviction and moves.
"""

from __future__ import annotations

import copy

from model_memory import DEVICE, FOREVER, HOST, NEVER, Memory, ModelCache, Node, Page, Retain, Use
from model_tree import Tree

__all__ = ["DEVICE", "FOREVER", "HOST", "Memory", "Model", "ModelCache", "Node", "Page", "Retain"]


class Model(Tree):
    """pools: (device slots, host slots, window or None, sink_tokens) each."""

    # -- life of a cache ----------------------------------------------------------------------

    def create(
        self,
        tokens: list[int],
        scope: object,
        epoch: int | None,
        ranges: list[tuple[int, int | None, Retain]] | None,
        decode: Retain,
    ) -> ModelCache:
        root = (scope, self.epoch if epoch is None else epoch)
        c = self.claim(tokens, root, ranges, decode)
        self.settle(c)
        return c

    def claim(
        self,
        tokens: list[int],
        root: tuple[object, int],
        ranges: list[tuple[int, int | None, Retain]] | None,
        decode: Retain,
    ) -> ModelCache:
        m, path, source = self.affordable(tokens, root)
        pools = self.pools
        table = [[None if i in self.stale(pool, m) else n.pages[pool] for i, n in enumerate(path)] for pool in pools]
        c = ModelCache(
            root, tokens, ranges, decode, m, path, source, table, tokens[:m], m, m,
            promise=[0 for _ in pools], fenced=[[] for _ in pools], landing=[0 for _ in pools],
        )  # fmt: skip
        self.caches.append(c)
        return c

    def affordable(self, tokens: list[int], root: tuple[object, int]) -> tuple[int, list[Node], Node | None]:
        """The longest match whose pages on the device were not promised to claims of a batch."""
        most = None
        while True:
            m, path, source = self.match(tokens, root, most)
            left = [self.available(DEVICE, p) for p in self.pools]
            claimed = self.claimed()
            new = [n for n in [*path, source] if n is not None and n not in claimed]
            if self.full:
                new = [n for n in new if self.tier(self.full[0], n) == DEVICE]
            full = min((left[p] for p in self.full), default=len(new))
            if sum(n in path for n in new) > full:
                most = (len(path) - 1) * self.t
                continue
            short = len(new) > full
            for p in self.windowed:
                live = [n for i, n in enumerate(path) if i not in self.stale(p, m)] + ([source] if source else [])
                new = [n for n in live if not self.page_claims(p, n) and self.tier(p, n) == DEVICE]
                short |= len(new) > left[p]
            if not short:
                return m, path, source
            most = m // self.t * self.t if source else m - 1

    def settle(self, c: ModelCache) -> None:
        """The claim holds: pages are live, retention is applied."""
        for pool, row in enumerate(c.table):
            for page in [*row[: len(c.nodes)], c.source.pages[pool] if c.source else None]:
                if page is not None:
                    page.stale = False
        if c.ranges is not None:
            for i, node in enumerate(c.nodes):
                self.keep(node, c.retain(i * self.t))
        c.in_work = False

    def discard(self, c: ModelCache) -> None:
        """A claim in work was never there."""
        self.caches.remove(c)
        c.state = "CLOSED"
        self.wait(0)

    # -- batches ------------------------------------------------------------------------------

    def far(self, c: ModelCache, pool: int) -> list[Page]:
        """Pages on the host that must come up."""
        return [page for page in c.table[pool] if page is not None and page.tier == HOST and page not in self.coming]

    def need(self, c: ModelCache, pool: int, blocks: int) -> int:
        copies = int(c.source is not None)
        old = len(c.table[pool]) + copies
        far = 0 if c.state == "ACTIVE" else len(self.far(c, pool))
        return far + copies + sum(i not in self.stale(pool, c.history) for i in range(old, blocks))

    def blocks_of(self, c: ModelCache, capacity: int) -> int:
        return -(-max(c.capacity, capacity) // self.t)

    def missing(self, c: ModelCache, capacity: int) -> list[int]:
        """What it needs beyond what was promised to it."""
        blocks = self.blocks_of(c, capacity)
        return [max(0, self.need(c, pool, blocks) - c.promise[pool]) for pool in self.pools]

    def claim_work(
        self,
        tokens: list[int],
        root: tuple[object, int],
        ranges: list[tuple[int, int | None, Retain]] | None,
        decode: Retain,
        least: int | None,
        promised: bool,
    ) -> ModelCache | None:
        c = self.claim(tokens, root, ranges, decode)
        c.in_work = True
        while True:
            capacity = len(tokens) if least is None else min(len(tokens), c.history + least)
            missing = self.missing(c, capacity)
            fits = self.room(missing) if promised else self.can_have(missing)
            if fits or c.source is None:
                break
            self.shorten(c, None)
            c.source = None
        if promised and not fits:
            self.discard(c)
            return None
        if promised:
            c.promise = [self.need(c, p, self.blocks_of(c, capacity)) for p in self.pools]
        return c

    def provide(self, c: ModelCache, tokens: int, most: int) -> bool | None:
        """None: it was in work and is gone."""
        capacity = max(c.capacity, min(c.history + tokens, most))
        if not self.give_room(c, capacity):
            if c.in_work:
                self.discard(c)
                return None
            return False
        return True

    def give_room(self, c: ModelCache, capacity: int) -> bool:
        """All that it needs to run with this capacity: device slots for the partial copy, for what is on the host, for
        new blocks."""
        c.asking = True  # what it has stays where it is
        fits = self.room(self.missing(c, capacity))
        c.asking = False
        if not fits:
            return False
        far = [[] if c.state == "ACTIVE" else self.far(c, pool) for pool in self.pools]
        c.promise, c.state = [0 for _ in self.pools], "ACTIVE"
        if c.source is not None:
            for pool in self.pools:
                c.table[pool].append(self.take(pool))
            places = [(pool, page) for pool, page in enumerate(c.source.pages) if page is not None]
            c.reads = [("up" if page.tier == HOST else "copy", pool, page.slot) for pool, page in places]
        for pool in self.pools:
            for page in far[pool]:
                self.take(pool)
                c.landing[pool] += 1
                self.coming.add(page)
        for pool in self.pools:
            for i in range(len(c.table[pool]), -(-capacity // self.t)):
                c.table[pool].append(None)
                if i not in self.stale(pool, c.history):
                    c.table[pool][i] = self.take(pool)
        c.capacity = capacity
        return True

    def provided(self, c: ModelCache) -> None:
        """The copies are made: its pages are on the device, its private blocks its own again."""
        for place in c.reads:
            self.move(*place)
        c.reads = []
        for pool, row in enumerate(c.table):
            c.landing[pool] = 0
            for page in row:
                if page is not None and page.tier == HOST:
                    page.slot, page.tier = self.move("up", pool, page.slot), DEVICE
                    self.onboarded += 1
                    self.coming.discard(page)
        self.nodes = [n for n in self.nodes if n.tokens or n not in c.nodes]
        c.nodes = [n for n in c.nodes if n.tokens]
        if c.in_work:
            self.settle(c)
        if c.source is not None:
            stamp, source, before = self.tick(), c.source, self.claimed_nodes()
            c.source = None
            self.stamp_pages([(p, source) for p in self.pools], stamp)
            self.released(before, stamp, source.path())

    # -- one cache ------------------------------------------------------------------------------

    def resume(self, c: ModelCache) -> bool:
        """If the partial block finds no room the match ends before it; if that does not help either nothing changes."""
        if c.state == "ACTIVE":
            return True
        if not self.give_room(c, c.capacity):
            if c.source is None or not copy.deepcopy(self, {id(self.seq): self.seq}).resume_whole(self.caches.index(c)):
                return False
            assert self.resume_whole(self.caches.index(c))
        self.provided(c)
        return True

    def resume_whole(self, index: int) -> bool:
        c = self.caches[index]
        stamp = self.tick()
        self.shorten(c, stamp)
        before, source, c.source = self.claimed_nodes(), c.source, None
        assert source is not None
        self.stamp_pages([(p, source) for p in self.pools], stamp)
        self.released(before, stamp, source.path())
        return self.give_room(c, c.capacity)

    def suspend(self, c: ModelCache) -> None:
        if c.state == "ACTIVE":
            c.state = "SUSPENDED"
            if not c.in_flight:
                self.lower(c)

    def lower(self, c: ModelCache) -> None:
        """Its pages may move down from here on, ranked as released now; private blocks are a chain below the others."""
        stamp = self.tick()
        for i in range(len(c.nodes), len(c.table[0]) if self.tiered else 0):
            priority, parent = c.retain(i * self.t)[0], c.nodes[-1] if c.nodes else None
            pages = [row[i] for row in c.table]
            c.nodes.append(Node(c.root, parent, (), -1, priority, FOREVER, i, pages))
            self.nodes.append(c.nodes[-1])
        for i, node in enumerate(c.nodes if self.tiered else []):
            node.used = stamp
            for row in c.table:
                page = row[i]
                if page is not None and not page.stale:
                    page.used = stamp

    def shorten(self, c: ModelCache, stamp: Use | None) -> None:
        """To whole blocks. stamp None: in work, no use is recorded and nothing is live yet."""
        before, path = self.claimed_nodes(), c.nodes
        keep = next(k for k in range(len(path), -1, -1) if k == 0 or self.valid(k * self.t, path[:k]))
        left = [self.available(DEVICE, p) for p in self.pools]
        own = {(p, i) for p in self.pools for i in range(len(path)) if c.table[p][i] is not None}
        while not self.hold_window(c, keep, left, own):
            keep -= 1
        m = keep * self.t
        held = [(p, path[i]) for p in self.pools for i in range(len(path)) if c.table[p][i] is not None]
        for pool in self.pools:
            row = [None if i in self.stale(pool, m) else path[i].pages[pool] for i in range(keep)]
            for i, page in enumerate(row):
                if page is not None and c.table[pool][i] is None and stamp is not None:
                    page.stale = False
            c.table[pool] = row
        c.nodes = path[:keep]
        c.committed = c.committed[:m]
        c.reused = c.history = c.capacity = m
        if stamp is not None:
            self.stamp_pages(held, stamp)
            self.released(before, stamp, [] if keep == len(path) else path)

    def hold_window(self, c: ModelCache, keep: int, left: list[int], own: set[tuple[int, int]]) -> bool:
        """Whether what is live at `keep` blocks is there and was not promised to others; what was tried stays held."""
        for pool in self.pools:
            for i, node in enumerate(c.nodes[:keep]):
                if i in self.stale(pool, keep * self.t) or (pool, i) in own or pool in self.full:
                    continue
                if node.pages[pool] is None:
                    return False
                if not self.page_claims(pool, node) and self.tier(pool, node) == DEVICE:
                    if left[pool] == 0:
                        return False
                    left[pool] -= 1
                own.add((pool, i))
        return True

    def give(self, c: ModelCache, pool: int, page: Page) -> None:
        if c.in_flight:
            c.fenced[pool].append(page)

    def make_stale(self, c: ModelCache) -> bool:
        gone = [
            (p, i)
            for p in self.pools
            for i in self.stale(p, c.history)
            if i < len(c.table[p]) and c.table[p][i] is not None
        ]
        stamp = self.tick() if any(i < len(c.nodes) for _, i in gone) else NEVER
        for pool, i in gone:
            page = c.table[pool][i]
            assert page is not None
            c.table[pool][i] = None
            if i < len(c.nodes):
                page.stale, page.used = True, stamp
            else:
                self.give(c, pool, page)
        return bool(gone)

    def resize(self, c: ModelCache, capacity: int, history: int) -> bool:
        blocks = -(-capacity // self.t)
        missing = []
        for pool in self.pools:
            old = len(c.table[pool])
            stale = self.stale(pool, history)
            back = 0
            for i in stale:
                page = c.table[pool][i] if i < old else None
                if page is not None:
                    tree = i < len(c.nodes)
                    back += self.page_claims(pool, c.nodes[i]) == 1 if tree else not c.in_flight
            missing.append(max(0, sum(i not in stale for i in range(old, blocks)) - back))
        if not self.room(missing):
            return False
        if history > c.history:
            c.history = history
            self.make_stale(c)
        for pool in self.pools:
            while len(c.table[pool]) > blocks:
                page = c.table[pool].pop()
                if page is not None:
                    self.give(c, pool, page)
            for i in range(len(c.table[pool]), blocks):
                c.table[pool].append(None)
                if i not in self.stale(pool, history):
                    c.table[pool][i] = self.take(pool)
        c.capacity = capacity
        return True

    def commit(self, c: ModelCache, tokens: list[int]) -> bool:
        changed = False
        for token in tokens:
            c.committed.append(token)
            if len(c.committed) % self.t == 0:
                changed |= self.commit_block(c)
        if len(c.committed) > c.history:
            c.history = len(c.committed)
            changed |= self.make_stale(c)
        return changed

    def commit_block(self, c: ModelCache) -> bool:
        if c.detached or c.root[1] < self.epoch:
            c.detached = True
            return False
        i = len(c.nodes)
        block = tuple(c.committed[-self.t :])
        parent = c.nodes[-1] if c.nodes else None
        retain = c.retain(i * self.t)
        found = [n for n in self.next_blocks(c.nodes, c.root) if n.tokens == block]
        if found and c.in_flight and not self.prepaid(c, found[0]):
            c.detached = True
            return False
        if found:
            node = found[0]
            if c.ranges is not None:
                self.keep(node, retain)
        else:
            if not self.take_node():
                c.detached = True
                return False
            node = Node(c.root, parent, block, next(self.seq), *retain, i, [None] * len(self.pools))
            self.nodes.append(node)
        changed = False
        for pool in self.pools:
            own, theirs = c.table[pool][i], node.pages[pool]
            if own is None:
                continue
            if theirs is None:
                node.pages[pool] = own
            elif theirs.tier == HOST:  # one's own becomes the tree's
                theirs.tier, theirs.slot, theirs.stale = DEVICE, own.slot, False
                c.table[pool][i] = theirs
            else:
                c.table[pool][i] = theirs
                theirs.stale = False
                self.give(c, pool, own)
                changed = True
        c.nodes.append(node)
        return changed

    def prepaid(self, c: ModelCache, node: Node) -> bool:
        """In flight one's own slots come back later: what nobody claims must not be promised to others."""
        for pool in self.pools:
            if self.tier(pool, node) != DEVICE:
                continue
            if pool in self.full:
                idle = node not in self.claimed()
            else:
                idle = c.table[pool][len(c.nodes)] is not None and not self.page_claims(pool, node)
            if idle and self.available(DEVICE, pool) < 1:
                return False
        return True

    def close(self, c: ModelCache) -> None:
        if c.in_work:
            self.discard(c)
            return
        c.state = "CLOSED"
        if not c.in_flight:
            self.release(c)

    def release(self, c: ModelCache) -> None:
        stamp, before = self.tick(), self.claimed_nodes()
        pools = self.pools
        held = [(p, n) for p in pools for i, n in enumerate(c.nodes) if c.table[p][i] is not None]
        if c.source is not None:
            held += [(p, c.source) for p in pools]
        self.caches.remove(c)
        self.stamp_pages(held, stamp)
        self.released(before, stamp, c.path())
        self.nodes = [n for n in self.nodes if n.tokens or n not in c.nodes]

    def step_begin(self, c: ModelCache) -> None:
        c.in_flight += 1

    def step_end(self, c: ModelCache) -> None:
        c.in_flight -= 1
        if not c.in_flight:
            for fenced in c.fenced:
                fenced.clear()
            if c.state == "CLOSED":
                self.release(c)
            elif c.state == "SUSPENDED":
                self.lower(c)

    def set_epoch(self, n: int) -> None:
        self.epoch = n

    # -- what can be seen ---------------------------------------------------------------------

    def available_tokens(self) -> int:
        slots = min(self.available(DEVICE, pool) for pool in self.pools)
        while self.can_have([slots + 1 for _ in self.pools]):
            slots += 1
        tokens = self.t * slots
        return tokens if self.max_seq_len is None else min(tokens, self.max_seq_len)

    def books(self, tier: str, pool: int) -> dict[str, int]:
        use: dict[Page, str] = {}
        for n in self.nodes:
            if (page := n.pages[pool]) is not None:
                use[page] = "cached"
        order = {"CLOSED": "fenced", "SUSPENDED": "held", "ACTIVE": "active"}
        for state, word in order.items():
            if word == "fenced":
                use.update({page: word for c in self.caches for page in c.fenced[pool]})
            for c in self.caches:
                if ("ACTIVE" if c.in_work else c.state) != state:
                    continue
                nodes = c.nodes if pool in self.full else []
                pages = [*c.table[pool], *(n.pages[pool] for n in nodes), c.source and c.source.pages[pool]]
                use.update({page: word for page in pages if page is not None})
        words = [word for page, word in use.items() if page.tier == tier]
        slots = self.slots[tier][pool]
        counts = {word: words.count(word) for word in ("active", "held", "cached", "fenced")}
        return {"slots": slots, "free": slots - len(words), **counts}
