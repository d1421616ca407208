"""Reference model of the memory: blocks and pages on two tiers, claims, orders of eviction, moves. By scanning.

Nothing is counted incrementally and nothing is indexed: every question is answered by looking at all nodes and caches.
A page is an object with an identity and a tier; the slot it lies in is told from outside.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

DEFAULT_PRIORITY = 35
FOREVER = math.inf
NEVER = (-math.inf, 0)
DEVICE, HOST = "device", "host"

Use = tuple[float, int]  # the clock, then the number of the release (0: an expiry)
Retain = tuple[int, float]  # priority, duration
Rank = tuple[int, bool, Use]  # priority, whether it is in its window, use
Move = tuple[str, int, int, int]  # "down", "up" or "copy", pool, source slot, destination slot


@dataclass(eq=False)
class Page:
    tier: str = DEVICE
    stale: bool = False
    used: Use = NEVER
    slot: int = 0  # as told; decides among equals only


@dataclass(eq=False)
class Node:
    root: tuple[object, int]
    parent: Node | None
    tokens: tuple[int, ...]  # none: a private block of a SUSPENDED cache, which nobody finds
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
    asking: bool = False  # for room
    reads: list[tuple[str, int, int]] = field(default_factory=list)  # of its partial source: way, pool, slot
    landing: list[int] = field(default_factory=list)  # by pool, device slots that its pages on the host come up into

    def retain(self, first: int) -> Retain:
        if self.ranges is None:
            return DEFAULT_PRIORITY, FOREVER
        if first >= len(self.prompt):
            return self.decode
        for start, end, retain in self.ranges:
            if start <= first and (end is None or first < end):
                return retain
        return DEFAULT_PRIORITY, FOREVER

    def stays(self) -> bool:
        """Whether its pages keep their place."""
        return self.state == "ACTIVE" or self.asking or self.in_work or self.in_flight > 0

    def path(self) -> list[Node]:
        """All that it claims."""
        return [node for own in [*self.nodes[-1:], self.source] if own is not None for node in own.path()]


class Memory:
    """pools: (device slots, host slots, window or None, sink_tokens) each."""

    def __init__(self, t: int, pools: list[tuple[int, int, int | None, int]], max_blocks: int, least: int) -> None:
        self.t, self.max_blocks, self.least = t, max_blocks, least
        self.slots = {DEVICE: [pool[0] for pool in pools], HOST: [pool[1] for pool in pools]}
        self.windows = [pool[2:] for pool in pools]
        self.pools = range(len(pools))
        self.full = [pool for pool in self.pools if self.windows[pool][0] is None]
        self.windowed = [pool for pool in self.pools if pool not in self.full]
        self.tiered = any(self.slots[HOST])
        self.nodes: list[Node] = []
        self.caches: list[ModelCache] = []  # open ones, and closed ones in flight
        self.epoch = 0
        self.evicted = self.dropped = self.offloaded = self.onboarded = 0
        self.told: list[Move] = []

    # -- claims -------------------------------------------------------------------------------

    def settled(self) -> list[ModelCache]:
        """All but those that a batch has in work: these leave no trace."""
        return [c for c in self.caches if not c.in_work]

    def staying(self) -> list[ModelCache]:
        return [c for c in self.caches if c.stays()]

    def claimed(self, by: list[ModelCache] | None = None) -> set[Node]:
        """All nodes that these caches claim; all caches if none are given."""
        return {node for c in (self.caches if by is None else by) for node in c.path()}

    def page_claims(self, pool: int, node: Node, by: list[ModelCache] | None = None) -> int:
        """A partial source counts once more."""
        page, caches = node.pages[pool], self.caches if by is None else by
        holders = [c for c in caches if page is not None and page in c.table[pool][: len(c.nodes)]]
        return len(holders) + sum(c.source is node for c in caches)

    def blocks(self) -> list[Node]:
        """Nodes of the tree."""
        return [node for node in self.nodes if node.tokens]

    def children(self, node: Node) -> list[Node]:
        return [n for n in self.nodes if n.parent is node]

    def below(self, node: Node) -> list[Node]:
        return [n for n in self.nodes if node in n.path()]

    def on(self, tier: str, pool: int) -> list[Node]:
        return [n for n in self.nodes if self.tier(pool, n) == tier]

    def tier(self, pool: int, node: Node) -> str | None:
        page = node.pages[pool]
        return None if page is None else page.tier

    # -- counting -----------------------------------------------------------------------------

    def evictable(self, tier: str, pool: int) -> list[Node]:
        """Nodes whose page in `pool` could be taken, now or after their descendants."""
        there = self.on(tier, pool)
        if pool in self.full:
            claimed = self.claimed()
            return [n for n in there if n not in claimed]
        return [n for n in there if not self.page_claims(pool, n)]

    def taken(self, tier: str, pool: int) -> int:
        pages = {page for n in self.nodes for page in [n.pages[pool]]}
        for c in self.caches:
            pages |= {*c.table[pool], *c.fenced[pool]}
        landing = sum(c.landing[pool] for c in self.caches) if tier == DEVICE else 0
        return sum(page is not None and page.tier == tier for page in pages) + landing

    def free(self, tier: str, pool: int) -> int:
        return self.slots[tier][pool] - self.taken(tier, pool)

    def available(self, tier: str, pool: int) -> int:
        promised = sum(c.promise[pool] for c in self.caches) if tier == DEVICE else 0
        return self.free(tier, pool) + len(self.evictable(tier, pool)) - promised

    # -- orders -------------------------------------------------------------------------------

    def rank(self, node: Node) -> int:
        return -1 if node.root[1] < self.epoch else node.priority

    def highest(self, node: Node) -> int:
        """Private blocks below do not count: nobody can find them."""
        return max(self.rank(n) for n in self.below(node) if n.tokens)

    def slot(self, node: Node) -> int:
        """Of its page in the first full-attention pool, else in the first."""
        page = node.pages[(self.full or [0])[0]]
        return 0 if page is None else page.slot

    def block_key(self, node: Node) -> tuple[int, bool, Use, int, int]:
        return self.rank(node), True, node.used, -node.depth, self.slot(node)

    def page_key(self, pool: int, node: Node) -> tuple[int, bool, Use, int, int]:
        page = node.pages[pool]
        assert page is not None
        used = page.used if page.stale else max(page.used, node.used)
        return self.rank(node), not page.stale, used, -node.depth, page.slot

    def near_blocks(self) -> list[Node]:
        """Blocks that may leave the device, in order: nobody keeps them there, no descendant is there."""
        here = self.on(DEVICE, self.full[0])
        kept = self.claimed(self.staying()) | {n.parent for n in here}
        return sorted((n for n in here if n not in kept), key=self.block_key)

    def near_pages(self, pool: int) -> list[Node]:
        """The same for pages of a windowed pool."""
        here = self.on(DEVICE, pool)
        staying = self.staying()
        free = [n for n in here if not self.page_claims(pool, n, staying)]
        return sorted(free, key=lambda n: self.page_key(pool, n))

    def leaves(self) -> list[Node]:
        """Blocks that may leave the tree, in order; among equals those on the host first."""
        kept = self.claimed() | {n.parent for n in self.nodes}
        leaves = [n for n in self.blocks() if n not in kept]
        return sorted(leaves, key=lambda n: (*self.block_key(n), self.full and self.tier(self.full[0], n) == DEVICE))

    # -- leaving for good ---------------------------------------------------------------------

    def drop_page(self, pool: int, node: Node) -> None:
        if node.pages[pool] is not None:
            self.dropped += 1
            self.evicted += self.tier(pool, node) == DEVICE
            node.pages[pool] = None

    def remove(self, node: Node) -> None:
        """With all descendants."""
        for child in self.children(node):
            self.remove(child)
        for pool in self.pools:
            self.drop_page(pool, node)
        self.nodes.remove(node)
        if node.parent is not None:
            self.sweep(node.parent)

    def sweep(self, node: Node) -> None:
        """Without a full-attention pool a node can lose its last page before it is a leaf."""
        if not self.full and node in self.leaves() and not any(node.pages):
            self.remove(node)

    # -- down to the host ---------------------------------------------------------------------

    def move(self, way: str, pool: int, slot: int) -> int:
        """That this slot was copied was told. Returns the slot it was copied to."""
        move = next((m for m in self.told if m[:3] == (way, pool, slot)), None)
        assert move is not None, f"pool {pool}, slot {slot}: no move {way} among {self.told}"
        self.told.remove(move)
        return move[3]

    def host_victim(self, pool: int) -> tuple[Rank, Node] | None:
        """The first unclaimed page of the host."""
        there = self.evictable(HOST, pool)
        if pool in self.full:
            keys = [(self.block_key(n), n) for n in there if not self.children(n)]
        else:
            keys = [(self.page_key(pool, n), n) for n in there]
        key, node = min(keys, key=lambda each: each[0], default=(None, None))
        return None if key is None or node is None else (key[:3], node)

    def has_room(self, pool: int, node: Node) -> bool:
        """For an unclaimed page: a free slot, or a victim that comes before it."""
        if self.free(HOST, pool):
            return True
        key = self.block_key(node) if pool in self.full else self.page_key(pool, node)
        victim = self.host_victim(pool)
        return victim is not None and victim[0] < (self.highest(node), *key[1:3])

    def make_place(self, pool: int) -> None:
        while not self.free(HOST, pool):
            victim = self.host_victim(pool)
            assert victim is not None
            if pool in self.full:
                self.remove(victim[1])
            else:
                self.drop_page(pool, victim[1])
                self.sweep(victim[1])

    def goes_down(self, pool: int, node: Node) -> bool:
        """Whether this page of a windowed pool, alone or with its block, gets a place on the host; and makes it."""
        if self.page_claims(pool, node):
            goes = self.available(HOST, pool) > 0
        else:
            goes = self.highest(node) >= self.least and self.has_room(pool, node)
        if goes:
            self.make_place(pool)
        return goes

    def send(self, pool: int, node: Node) -> None:
        page = node.pages[pool]
        assert page is not None
        page.slot, page.tier = self.move("down", pool, page.slot), HOST
        self.offloaded += 1
        self.evicted += 1

    def move_block(self, node: Node) -> bool:
        """Down with its pages in all pools, whole if claimed. False: it cannot, or does not merit it."""
        along = [pool for pool in self.windowed if self.tier(pool, node) == DEVICE]
        bound = [pool for pool in along if self.page_claims(pool, node)]
        if node in self.claimed():
            goes = all(self.available(HOST, pool) > 0 for pool in self.full + bound)
        else:
            goes = self.highest(node) >= self.least and all(self.has_room(pool, node) for pool in self.full)
        if not goes:
            return False
        for pool in self.full:
            self.make_place(pool)
        gone = {pool for pool in along if not self.goes_down(pool, node)}
        assert not gone & set(bound)
        for pool in [*self.full, *along]:
            if pool in gone:
                self.drop_page(pool, node)
            else:
                self.send(pool, node)
        return True

    # -- leaving the device -------------------------------------------------------------------

    def evict_block(self) -> bool:
        """The next block leaves the device: down, or for good."""
        if not self.full:
            leaves = self.leaves()
            if leaves:
                self.remove(leaves[0])
            return bool(leaves)
        for node in self.near_blocks():
            if self.move_block(node):
                return True
            if node not in self.claimed():
                self.remove(node)
                return True
        return False

    def evict_page(self, pool: int) -> bool:
        """The next page of a windowed pool leaves the device, alone."""
        for node in self.near_pages(pool):
            if self.goes_down(pool, node):
                self.send(pool, node)
                return True
            if not self.page_claims(pool, node):
                self.drop_page(pool, node)
                self.sweep(node)
                return True
        return False

    def evict_next(self, pool: int) -> bool:
        return self.evict_block() if pool in self.full else self.evict_page(pool)

    def take(self, pool: int) -> Page:
        """A new page in a slot that is free or made free."""
        if not self.free(DEVICE, pool):
            assert self.evict_next(pool)
        return Page()

    def take_node(self) -> bool:
        """Room for a node: the first leaf goes, whatever its tier."""
        if len(self.blocks()) == self.max_blocks:
            leaves = self.leaves()
            if not leaves:
                return False
            self.remove(leaves[0])
        return True

    def evict(self, n: int) -> int:
        if self.full or not self.tiered:
            return sum(1 for _ in range(n) if self.evict_block())
        return sum(1 for _ in range(n) if self.evict_page(0))

    def clear(self) -> None:
        evicted = self.evicted
        while leaves := self.leaves():
            self.remove(leaves[0])
        for pool in self.windowed:
            for node in self.evictable(DEVICE, pool) + self.evictable(HOST, pool):
                self.drop_page(pool, node)
                self.sweep(node)
        self.evicted = evicted

    # -- room for a need ----------------------------------------------------------------------

    def can_have(self, need: list[int]) -> bool:
        """Whether each pool could have so many slots available if pages of SUSPENDED caches moved down: on paper."""
        device = [self.available(DEVICE, pool) for pool in self.pools]
        host = [self.available(HOST, pool) for pool in self.pools]
        if all(have >= want for have, want in zip(device, need, strict=True)):
            return True
        gone: set[tuple[int, Node]] = set()
        claimed, kept = self.claimed(), self.claimed(self.staying())

        def bound(pool: int, node: Node) -> bool:
            """Claimed by SUSPENDED caches only, and on the device."""
            held = node in claimed if pool in self.full else self.page_claims(pool, node)
            return bool(held) and self.tier(pool, node) == DEVICE and (pool, node) not in gone

        def leave(pools: list[int], node: Node) -> bool:
            """These pages leave the device together, claimed ones for the host."""
            own = [pool for pool in pools if bound(pool, node)]
            if any(host[pool] == 0 for pool in own):
                return False
            for pool in own:
                host[pool] -= 1
                device[pool] += 1
            gone.update((pool, node) for pool in pools)
            return True

        def next_block() -> bool:
            here = [n for n in self.on(DEVICE, self.full[0]) if (self.full[0], n) not in gone]
            free = [n for n in here if n not in kept | {n.parent for n in here}]
            return any(leave(list(self.pools), n) for n in sorted(free, key=self.block_key))

        def next_page(pool: int) -> bool:
            return any(leave([pool], n) for n in self.near_pages(pool) if (pool, n) not in gone)

        for pool in self.pools:
            while device[pool] < need[pool]:
                if not (next_block() if pool in self.full else next_page(pool)):
                    return False
        return True

    def room(self, need: list[int]) -> bool:
        """So many slots available in each pool, or nothing has changed."""
        if not self.can_have(need):
            return False
        for pool in self.pools:
            while self.available(DEVICE, pool) < need[pool]:
                assert self.evict_next(pool)
        return True
