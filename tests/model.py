"""Reference model of tree, pools, eviction and caches on the device tier: slow, by scanning, obviously correct.

Nothing is counted incrementally and nothing is indexed: every question is answered by looking at all
nodes and caches. A page is an object with an identity; the slot it lies in is told from outside.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field

DEFAULT_PRIORITY = 35
FOREVER = math.inf
NEVER = (-math.inf, 0)

Use = tuple[float, int]  # the clock, then the number of the release (0: an expiry)
Retain = tuple[int, float]  # priority, duration


@dataclass(eq=False)
class Page:
    stale: bool = False
    used: Use = NEVER
    slot: int = 0  # as told; decides among equals only


@dataclass(eq=False)
class Node:
    root: tuple[object, int]
    parent: Node | None
    tokens: tuple[int, ...]
    seq: int
    priority: int
    duration: float
    depth: int
    pages: list[Page | None]
    used: Use = NEVER
    expiry: float | None = None

    def path(self) -> list[Node]:
        return ([] if self.parent is None else self.parent.path()) + [self]


@dataclass(eq=False)
class ModelCache:
    root: tuple[object, int]
    prompt: list[int]
    ranges: list[tuple[int, int | None, Retain]] | None
    decode: Retain
    reused: int
    nodes: list[Node]
    source: Node | None
    table: list[list[Page | None]]
    committed: list[int] = field(default_factory=list)
    history: int = 0
    capacity: int = 0
    state: str = "SUSPENDED"
    detached: bool = False
    in_work: bool = False
    promise: list[int] = field(default_factory=list)
    in_flight: int = 0
    fenced: list[list[Page]] = field(default_factory=list)

    def retain(self, first: int) -> Retain:
        if self.ranges is None:
            return DEFAULT_PRIORITY, FOREVER
        if first >= len(self.prompt):
            return self.decode
        for start, end, retain in self.ranges:
            if start <= first and (end is None or first < end):
                return retain
        return DEFAULT_PRIORITY, FOREVER


class Model:
    """pools: (num_slots, window or None, sink_tokens) each."""

    def __init__(
        self,
        t: int,
        pools: list[tuple[int, int | None, int]],
        max_blocks: int,
        partial_reuse: bool,
        max_seq_len: int | None,
    ) -> None:
        self.t, self.pools, self.max_blocks = t, pools, max_blocks
        self.partial_reuse, self.max_seq_len = partial_reuse, max_seq_len
        self.nodes: list[Node] = []
        self.caches: list[ModelCache] = []  # open ones, and closed ones in flight
        self.seq = itertools.count()
        self.epoch = 0
        self.stamp = 0
        self.now = 0.0
        self.evicted = self.dropped = 0

    # -- windows ------------------------------------------------------------------------------

    def stale(self, pool: int, history: int) -> range:
        _, window, sinks = self.pools[pool]
        if window is None:
            return range(0)
        s = min(-(-history // self.t), -(-sinks // self.t))
        return range(s, max(s, (history + 1 - window) // self.t))

    # -- claims -------------------------------------------------------------------------------

    def claimed(self, node: Node, settled: bool = False) -> bool:
        """settled: by a cache that is no batch's in work; only those leave a trace."""
        caches = [c for c in self.caches if not (settled and c.in_work)]
        return any(node in own.path() for c in caches for own in [*c.nodes[-1:], c.source] if own is not None)

    def page_claims(self, pool: int, node: Node, settled: bool = False) -> int:
        page = node.pages[pool]
        caches = [c for c in self.caches if not (settled and c.in_work)]
        holders = [c for c in caches if page is not None and page in c.table[pool][: len(c.nodes)]]
        return len(holders) + sum(c.source is node for c in caches)

    def children(self, node: Node | None, root: tuple[object, int]) -> list[Node]:
        return [n for n in self.nodes if n.parent is node and n.root == root]

    def is_full(self, pool: int) -> bool:
        return self.pools[pool][1] is None

    def evictable(self, pool: int) -> list[Node]:
        """Nodes whose page in `pool` could be taken, now or after their descendants."""
        if self.is_full(pool):
            return [n for n in self.nodes if not self.claimed(n)]
        return [n for n in self.nodes if n.pages[pool] is not None and not self.page_claims(pool, n)]

    def taken(self, pool: int) -> int:
        pages = {id(n.pages[pool]) for n in self.nodes if n.pages[pool] is not None}
        for c in self.caches:
            pages |= {id(p) for p in c.table[pool] if p is not None}
            pages |= {id(p) for p in c.fenced[pool]}
        return len(pages)

    def free(self, pool: int) -> int:
        return self.pools[pool][0] - self.taken(pool)

    def available(self, pool: int) -> int:
        return self.free(pool) + len(self.evictable(pool)) - sum(c.promise[pool] for c in self.caches)

    # -- eviction -----------------------------------------------------------------------------

    def rank(self, node: Node) -> int:
        return -1 if node.root[1] < self.epoch else node.priority

    def leaf(self) -> Node | None:
        leaves = [n for n in self.nodes if not self.children(n, n.root) and not self.claimed(n)]
        return min(leaves, key=lambda n: (self.rank(n), n.used, -n.depth, self.slot(n)), default=None)

    def slot(self, node: Node) -> int:
        """Of its page in the first full-attention pool, else in the first."""
        full = [pool for pool in range(len(self.pools)) if self.is_full(pool)]
        page = node.pages[(full or [0])[0]]
        return 0 if page is None else page.slot

    def page_key(self, pool: int, node: Node) -> tuple[int, bool, Use, int, int]:
        page = node.pages[pool]
        assert page is not None
        used = page.used if page.stale else max(page.used, node.used)
        return self.rank(node), not page.stale, used, -node.depth, page.slot

    def remove(self, node: Node) -> None:
        self.dropped += sum(p is not None for p in node.pages)
        self.nodes.remove(node)
        if node.parent is not None:
            self.sweep(node.parent)

    def sweep(self, node: Node) -> None:
        if not any(node.pages) and not self.children(node, node.root) and not self.claimed(node):
            self.remove(node)

    def evict_leaf(self) -> bool:
        node = self.leaf()
        if node is None:
            return False
        self.evicted += sum(p is not None for p in node.pages)
        self.remove(node)
        return True

    def evict_page(self, pool: int) -> None:
        node = min(self.evictable(pool), key=lambda n: self.page_key(pool, n))
        node.pages[pool] = None
        self.evicted += 1
        self.dropped += 1
        self.sweep(node)

    def take(self, pool: int) -> Page:
        if self.free(pool) == 0:
            if self.is_full(pool):
                assert self.evict_leaf()
            else:
                self.evict_page(pool)
        return Page()

    def evict(self, n: int) -> int:
        return sum(1 for _ in range(n) if self.evict_leaf())

    def clear(self) -> None:
        evicted = self.evicted
        while self.evict_leaf():
            pass
        for pool in range(len(self.pools)):
            while not self.is_full(pool) and self.evictable(pool):
                self.evict_page(pool)
        self.evicted = evicted

    # -- matching -----------------------------------------------------------------------------

    def valid(self, m: int, path: list[Node]) -> bool:
        return all(
            i in self.stale(pool, m) or path[i].pages[pool] is not None
            for pool in range(len(self.pools))
            for i in range(len(path))
        )

    def match(
        self, tokens: list[int], root: tuple[object, int], most: int | None = None
    ) -> tuple[int, list[Node], Node | None]:
        if root[1] < self.epoch:
            return 0, [], None
        for m in range(max(0, len(tokens) - 1) if most is None else most, 0, -1):
            path: list[Node] = []
            for i in range(m // self.t):
                block = tuple(tokens[i * self.t : (i + 1) * self.t])
                found = [n for n in self.children(path[-1] if path else None, root) if n.tokens == block]
                if not found:
                    break
                path.append(found[0])
            if len(path) < m // self.t:
                continue
            rest = tuple(tokens[len(path) * self.t : m])
            if not rest:
                if self.valid(m, path):
                    return m, path, None
            elif self.partial_reuse:
                siblings = self.children(path[-1] if path else None, root)
                sources = [n for n in siblings if n.tokens[: len(rest)] == rest and None not in n.pages]
                if sources and self.valid(m, path):
                    return m, path, min(sources, key=lambda n: n.seq)
        return 0, [], None

    def probe(self, tokens: list[int], scope: object, epoch: int | None) -> int:
        return self.match(tokens, (scope, self.epoch if epoch is None else epoch))[0]

    # -- release ------------------------------------------------------------------------------

    def released(self, before: list[Node], stamp: Use) -> None:
        """Blocks that were claimed before and are not any more."""
        for node in before:
            if not self.claimed(node, settled=True):
                node.used = stamp
                node.expiry = None if node.duration == FOREVER else stamp[0] + node.duration

    def wait(self, seconds: float) -> None:
        """Time passes: priorities end, in their order."""
        self.now += seconds
        due = [n for n in self.nodes if not self.claimed(n) and n.expiry is not None and n.expiry <= self.now]
        for node in sorted(due, key=lambda n: n.expiry or 0):
            assert node.expiry is not None
            node.priority = min(node.priority, DEFAULT_PRIORITY)
            node.used, node.expiry = (node.expiry, 0), None

    def keep(self, node: Node, retain: Retain) -> None:
        """Reuse with retention: the maximum of each."""
        node.priority = max(node.priority, retain[0])
        node.duration = max(node.duration, retain[1])

    def claimed_nodes(self) -> list[Node]:
        return [n for n in self.nodes if self.claimed(n, settled=True)]

    def tick(self) -> Use:
        self.stamp += 1
        return self.now, self.stamp

    def stamp_pages(self, pages: list[tuple[int, Node]], stamp: Use) -> None:
        """Live claims on these pages ended."""
        for pool, node in pages:
            page = node.pages[pool]
            if page is not None and not page.stale and not self.page_claims(pool, node, settled=True):
                page.used = stamp

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
        pools = range(len(self.pools))
        table = [[None if i in self.stale(pool, m) else n.pages[pool] for i, n in enumerate(path)] for pool in pools]
        c = ModelCache(
            root, tokens, ranges, decode, m, path, source, table, tokens[:m], m, m,
            promise=[0 for _ in pools], fenced=[[] for _ in pools],
        )  # fmt: skip
        self.caches.append(c)
        return c

    def affordable(self, tokens: list[int], root: tuple[object, int]) -> tuple[int, list[Node], Node | None]:
        """The longest match whose pages were not promised to claims of a batch."""
        most = None
        while True:
            m, path, source = self.match(tokens, root, most)
            nodes = [n for n in [*path, source] if n is not None and not self.claimed(n)]
            left = [self.available(p) for p in range(len(self.pools))]
            full = min((left[p] for p in range(len(left)) if self.is_full(p)), default=len(nodes))
            if sum(n in path for n in nodes) > full:
                most = (len(path) - 1) * self.t
                continue
            short = len(nodes) > full
            for p in range(len(left)):
                live = [n for i, n in enumerate(path) if i not in self.stale(p, m)] + ([source] if source else [])
                short |= not self.is_full(p) and sum(not self.page_claims(p, n) for n in live) > left[p]
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

    def need(self, c: ModelCache, pool: int, blocks: int) -> int:
        copy = int(c.source is not None)
        old = len(c.table[pool]) + copy
        return copy + sum(i not in self.stale(pool, c.history) for i in range(old, blocks))

    def blocks(self, c: ModelCache, capacity: int) -> int:
        return -(-max(c.capacity, capacity) // self.t)

    def fits(self, c: ModelCache, capacity: int) -> bool:
        """Whether there is room, what was promised to it included."""
        blocks = self.blocks(c, capacity)
        return all(self.need(c, p, blocks) <= self.available(p) + c.promise[p] for p in range(len(self.pools)))

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
            fits = self.fits(c, capacity)
            if fits or c.source is None:
                break
            self.shorten(c, None)
            c.source = None
        if promised and not fits:
            self.discard(c)
            return None
        if promised:
            c.promise = [self.need(c, p, self.blocks(c, capacity)) for p in range(len(self.pools))]
        return c

    def provide(self, c: ModelCache, tokens: int, most: int) -> bool | None:
        """None: it was in work and is gone."""
        capacity = max(c.capacity, min(c.history + tokens, most))
        if not self.fits(c, capacity):
            if c.in_work:
                self.discard(c)
                return None
            return False
        c.promise = [0 for _ in self.pools]
        if c.source is not None:
            for pool in range(len(self.pools)):
                c.table[pool].append(self.take(pool))
        for pool in range(len(self.pools)):
            for i in range(len(c.table[pool]), -(-capacity // self.t)):
                c.table[pool].append(None)
                if i not in self.stale(pool, c.history):
                    c.table[pool][i] = self.take(pool)
        c.capacity, c.state = capacity, "ACTIVE"
        return True

    def provided(self, c: ModelCache) -> None:
        """The copies are made."""
        if c.in_work:
            self.settle(c)
        if c.source is not None:
            stamp, source, before = self.tick(), c.source, self.claimed_nodes()
            c.source = None
            self.stamp_pages([(p, source) for p in range(len(self.pools))], stamp)
            self.released(before, stamp)

    # -- one cache ------------------------------------------------------------------------------

    def resume(self, c: ModelCache) -> None:
        if c.state == "ACTIVE":
            return
        if not self.provide_in_place(c):
            stamp = self.tick()
            self.shorten(c, stamp)
            before, source, c.source = self.claimed_nodes(), c.source, None
            assert source is not None
            self.stamp_pages([(p, source) for p in range(len(self.pools))], stamp)
            self.released(before, stamp)
            assert self.provide_in_place(c)
        self.provided(c)

    def provide_in_place(self, c: ModelCache) -> bool:
        return self.fits(c, c.capacity) and self.provide(c, 0, c.capacity) is True

    def shorten(self, c: ModelCache, stamp: Use | None) -> None:
        """To whole blocks. stamp None: in work, no use is recorded and nothing is live yet."""
        before, path = self.claimed_nodes(), c.nodes
        keep = next(k for k in range(len(path), -1, -1) if k == 0 or self.valid(k * self.t, path[:k]))
        left = [self.available(p) for p in range(len(self.pools))]
        own = {(p, i) for p in range(len(self.pools)) for i in range(len(path)) if c.table[p][i] is not None}
        while not self.hold_window(c, keep, left, own):
            keep -= 1
        m = keep * self.t
        held = [(p, path[i]) for p in range(len(self.pools)) for i in range(len(path)) if c.table[p][i] is not None]
        for pool in range(len(self.pools)):
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
            self.released(before, stamp)

    def hold_window(self, c: ModelCache, keep: int, left: list[int], own: set[tuple[int, int]]) -> bool:
        """Whether what is live at `keep` blocks is there and was not promised to others; what was tried stays held."""
        for pool in range(len(self.pools)):
            for i, node in enumerate(c.nodes[:keep]):
                if i in self.stale(pool, keep * self.t) or (pool, i) in own or self.is_full(pool):
                    continue
                if node.pages[pool] is None:
                    return False
                if not self.page_claims(pool, node):
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
            for p in range(len(self.pools))
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
        for pool in range(len(self.pools)):
            old = len(c.table[pool])
            stale = self.stale(pool, history)
            back = 0
            for i in stale:
                page = c.table[pool][i] if i < old else None
                if page is not None:
                    tree = i < len(c.nodes)
                    back += self.page_claims(pool, c.nodes[i]) == 1 if tree else not c.in_flight
            if sum(i not in stale for i in range(old, blocks)) > self.available(pool) + back:
                return False
        if history > c.history:
            c.history = history
            self.make_stale(c)
        for pool in range(len(self.pools)):
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
        found = [n for n in self.children(parent, c.root) if n.tokens == block]
        if found and c.in_flight and not self.prepaid(c, found[0]):
            c.detached = True
            return False
        if found:
            node = found[0]
            if c.ranges is not None:
                self.keep(node, retain)
        else:
            if len(self.nodes) == self.max_blocks and not self.evict_leaf():
                c.detached = True
                return False
            node = Node(c.root, parent, block, next(self.seq), *retain, i, [None] * len(self.pools))
            self.nodes.append(node)
        changed = False
        for pool in range(len(self.pools)):
            own, theirs = c.table[pool][i], node.pages[pool]
            if own is None:
                continue
            if theirs is None:
                node.pages[pool] = own
            else:
                c.table[pool][i] = theirs
                theirs.stale = False
                self.give(c, pool, own)
                changed = True
        c.nodes.append(node)
        return changed

    def prepaid(self, c: ModelCache, node: Node) -> bool:
        """In flight one's own slots come back later: what nobody claims must not be promised to others."""
        for pool in range(len(self.pools)):
            idle = c.table[pool][len(c.nodes)] is not None and node.pages[pool] is not None
            idle = not self.claimed(node) if self.is_full(pool) else idle and not self.page_claims(pool, node)
            if idle and self.available(pool) < 1:
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
        pools = range(len(self.pools))
        held = [(p, n) for p in pools for i, n in enumerate(c.nodes) if c.table[p][i] is not None]
        if c.source is not None:
            held += [(p, c.source) for p in pools]
        self.caches.remove(c)
        self.stamp_pages(held, stamp)
        self.released(before, stamp)

    def step_begin(self, c: ModelCache) -> None:
        c.in_flight += 1

    def step_end(self, c: ModelCache) -> None:
        c.in_flight -= 1
        if not c.in_flight:
            for fenced in c.fenced:
                fenced.clear()
            if c.state == "CLOSED":
                self.release(c)

    def set_epoch(self, n: int) -> None:
        self.epoch = n

    # -- what can be seen ---------------------------------------------------------------------

    def available_tokens(self) -> int:
        tokens = self.t * min(self.available(p) for p in range(len(self.pools)))
        return tokens if self.max_seq_len is None else min(tokens, self.max_seq_len)

    def books(self, pool: int) -> dict[str, int]:
        use: dict[int, str] = {}
        for n in self.nodes:
            if n.pages[pool] is not None:
                use[id(n.pages[pool])] = "cached"
        order = {"CLOSED": "fenced", "SUSPENDED": "held", "ACTIVE": "active"}
        for state, word in order.items():
            if word == "fenced":
                use.update({id(p): word for c in self.caches for p in c.fenced[pool]})
            for c in self.caches:
                if ("ACTIVE" if c.in_work else c.state) != state:
                    continue
                nodes = c.nodes if self.is_full(pool) else []
                pages = [*c.table[pool], *(n.pages[pool] for n in nodes), c.source and c.source.pages[pool]]
                use.update({id(p): word for p in pages if p is not None})
        words = list(use.values())
        slots = self.pools[pool][0]
        counts = {word: words.count(word) for word in ("active", "held", "cached", "fenced")}
        return {"slots": slots, "free": slots - len(words), **counts}
